//! For debugging a guest: a shell on a terminal, the log as a stream, the log's level.
//!
//! Shell and log are streaming calls on the agent's channel. As with the original agent, they are also offered on vsock
//! ports of their own if the kernel command line names them (on unix sockets if the agent is an ordinary process).

use crate::cmdline::Settings;
use crate::connections::{Connections, StreamTarget};
use crate::container::Containers;
use crate::log;
use crate::poller::{DebugPort, Poller, Token};
use crate::prelude::*;
use crate::process::Process;
use crate::processes::Processes;
use crate::proto::agentext::SetLogLevelRequest;
use crate::runtime::console as terminal;
use crate::server::calls::CallId;
use crate::server::frame::StreamPiece;
use crate::server::listen::{self, Address, Channel, Kind};
use crate::sys::{self, CStringArray, Fd, Fork, RawFd};

const SHELLS: &[&str] = &["/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh"];
const NO_SHELL: &[u8] = b"this guest has no shell: its initrd needs one as /bin/sh\r\n";

/// Listeners beside the agent's own.
#[derive(Default)]
pub struct DebugPorts {
    ports: Vec<(DebugPort, Fd, Kind)>,
}

impl DebugPorts {
    /// Opens the ports that the settings name. A failure is only logged.
    pub fn open(&mut self, poller: &Poller, settings: &Settings) {
        for (port, address) in
            [(DebugPort::Console, &settings.console_address), (DebugPort::Log, &settings.log_address)]
        {
            let Some(address) = address else { continue };
            if port == DebugPort::Console && !settings.debug_console {
                log::warn("no debug console: agent.debug_console is not set");
                continue;
            }
            if let Err(e) = self.open_one(poller, port, address) {
                log::error(&format!("debug port: {}", e.message));
            }
        }
    }

    fn open_one(&mut self, poller: &Poller, port: DebugPort, address: &Address) -> Result<()> {
        let Channel::Listener(fd, kind) = listen::open(address, 0)? else {
            return Err(Error::invalid("it needs a vsock or unix address"));
        };
        poller.watch(fd.raw(), Token::Debug(port), libc::EPOLLIN as u32)?;
        self.ports.push((port, fd, kind));
        Ok(())
    }

    /// Takes a connection of a port.
    pub fn accept(&self, port: DebugPort) {
        let Some((_, fd, kind)) = self.ports.iter().find(|(p, _, _)| *p == port) else { return };
        match listen::accept(fd, *kind) {
            Ok(Some(socket)) => match port {
                DebugPort::Log => log::set_stream(Some(socket)),
                DebugPort::Console => {
                    if let Err(e) = spawn_console(socket) {
                        log::error(&e.message);
                    }
                }
            },
            Ok(None) => {}
            Err(e) => log::error(&e.message),
        }
    }
}

/// A shell whose terminal is the streaming call.
pub fn console(
    settings: &Settings,
    io: &mut Connections,
    processes: &mut Processes,
    containers: &mut Containers,
    call: CallId,
    first: &StreamPiece,
) -> Result<()> {
    if !settings.debug_console {
        return Err(Error::denied("agent.debug_console is not on the kernel command line"));
    }
    let (ours, theirs) = sys::socketpair(libc::SOCK_STREAM).context("make a pair of sockets")?;
    sys::set_nonblocking(ours.raw(), true).context("prepare the console")?;
    let input = ours.try_clone().context("prepare the console")?;
    let pid = spawn_console(theirs)?;
    let key = processes.add(io, Process::internal("console", pid, Some(input), ours))?;
    let target = StreamTarget { process: key, input: true, output: Some(0) };
    processes.begin_stream(io, containers, call, target, first.credit)
}

/// A streaming call that gets the log from now on.
pub fn log_stream(
    io: &mut Connections,
    processes: &mut Processes,
    containers: &mut Containers,
    call: CallId,
    first: &StreamPiece,
) -> Result<()> {
    let (read_end, write_end) = sys::pipe(libc::O_NONBLOCK).context("make a pipe")?;
    let key = processes.add(io, Process::internal("log", 0, None, read_end))?;
    // A former reader sees end of file.
    log::set_stream(Some(write_end));
    let target = StreamTarget { process: key, input: false, output: Some(0) };
    processes.begin_stream(io, containers, call, target, first.credit)
}

pub fn set_log_level(request: &SetLogLevelRequest) -> Result<()> {
    let level = log::Level::parse(&request.level)
        .ok_or_else(|| Error::invalid(format!("{:?} is not a level of the log", request.level)))?;
    log::set_level(level);
    Ok(())
}

/// Forks a child that carries bytes between `peer` and a shell's terminal; its pid.
fn spawn_console(peer: Fd) -> Result<sys::Pid> {
    match sys::fork(0, None).context("fork")? {
        Fork::Parent(pid) => Ok(pid),
        Fork::Child => {
            let peer = peer.into_raw();
            sys::close_all_but(vec![peer]);
            log::set_output(2);
            let _ = sys::set_nonblocking(peer, false);
            if let Err(e) = serve_console(peer) {
                let _ = sys::write_all(peer, format!("{}\r\n", e.message).as_bytes());
            }
            sys::exit(0)
        }
    }
}

fn serve_console(peer: RawFd) -> Result<()> {
    let root = sys::open("/", libc::O_PATH | libc::O_DIRECTORY, 0).context("open /")?;
    let (master, slave) = terminal::open(root.raw(), None)?;
    match sys::fork(0, None).context("fork")? {
        Fork::Child => {
            drop(master);
            become_shell(&slave);
            let _ = sys::write_all(slave.raw(), NO_SHELL);
            sys::exit(127)
        }
        Fork::Parent(_) => drop(slave),
    }
    let mut buffer = [0u8; 4096];
    loop {
        let mut entries = [
            libc::pollfd { fd: peer, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: master.raw(), events: libc::POLLIN, revents: 0 },
        ];
        sys::poll(&mut entries, -1).context("poll")?;
        for (entry, to) in entries.iter().zip([master.raw(), peer]) {
            if entry.revents == 0 {
                continue;
            }
            // End of file, or EIO from a terminal whose last process has closed it.
            match sys::read(entry.fd, &mut buffer) {
                Ok(n) if n > 0 && sys::write_all(to, &buffer[..n]).is_ok() => {}
                _ => return Ok(()),
            }
        }
    }
}

/// Only returns when there is no shell.
fn become_shell(slave: &Fd) {
    let prepared = sys::setsid().is_ok() && terminal::control(slave.raw()).is_ok();
    sys::default_signals();
    if !prepared || sys::set_signal_mask(0).is_err() || (0..3).any(|fd| sys::dup_to(slave.raw(), fd).is_err()) {
        return;
    }
    let environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "TERM=linux", "PS1=guest# "];
    for shell in SHELLS {
        if let (Ok(argv), Ok(envp)) = (CStringArray::new(&[*shell]), CStringArray::new(&environment)) {
            sys::execve(shell, &argv, &envp);
        }
    }
}
