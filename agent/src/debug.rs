//! For those who look into a guest: a shell on a terminal, the log as a stream, the log's level.
//!
//! Shell and log come over streaming calls of the one channel, whatever that is; and, as with the original, over vsock
//! ports of their own when the kernel command line names them (over unix sockets for an ordinary process).

use crate::agent::{Agent, Token};
use crate::log;
use crate::prelude::*;
use crate::process::{Key, Process};
use crate::proto::agentext::SetLogLevelRequest;
use crate::runtime::console;
use crate::server::calls::CallId;
use crate::server::frame::StreamPiece;
use crate::server::listen::{self, Address, Channel};
use crate::sys::{self, CStringArray, Fd, Fork, RawFd};

const SHELLS: &[&str] = &["/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh"];
const NO_SHELL: &[u8] = b"this guest has no shell: its initrd needs one as /debug/sh\r\n";

/// A listener of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    Console,
    Log,
}

impl Agent {
    /// Opens the ports that the settings name; a guest without them is still of use.
    pub fn open_debug_ports(&mut self) {
        let wanted =
            [(Port::Console, self.settings.console_address.clone()), (Port::Log, self.settings.log_address.clone())];
        for (port, address) in wanted {
            let Some(address) = address else { continue };
            if port == Port::Console && !self.settings.debug_console {
                log::warn("no debug console: agent.debug_console is not set");
                continue;
            }
            if let Err(e) = self.open_debug_port(port, &address) {
                log::error(&format!("debug port: {}", e.message));
            }
        }
    }

    fn open_debug_port(&mut self, port: Port, address: &Address) -> Result<()> {
        let Channel::Listener(fd, kind) = listen::open(address, 0)? else {
            return Err(Error::invalid("it needs a vsock or unix address"));
        };
        self.watch(fd.raw(), Token::Debug(port), libc::EPOLLIN as u32)?;
        self.debug_ports.push((port, fd, kind));
        Ok(())
    }

    pub fn on_debug_port(&mut self, port: Port) {
        let Some((_, fd, kind)) = self.debug_ports.iter().find(|(p, _, _)| *p == port) else { return };
        match listen::accept(fd, *kind) {
            Ok(Some(socket)) => match port {
                Port::Log => log::set_stream(Some(socket)),
                Port::Console => {
                    if let Err(e) = spawn_console(socket) {
                        log::error(&e.message);
                    }
                }
            },
            Ok(None) => {}
            Err(e) => log::error(&e.message),
        }
    }

    /// A shell whose terminal is the streaming call.
    pub fn debug_console(&mut self, call: CallId, first: &StreamPiece) -> Result<()> {
        if !self.settings.debug_console {
            return Err(Error::denied("agent.debug_console is not on the kernel command line"));
        }
        let (ours, theirs) = sys::socketpair(libc::SOCK_STREAM).context("make a pair of sockets")?;
        sys::set_nonblocking(ours.raw(), true).context("prepare the console")?;
        let input = ours.try_clone().context("prepare the console")?;
        let pid = spawn_console(theirs)?;
        let key = self.add_process(Process::internal("console", pid, Some(input), ours))?;
        self.begin_stream(call, key, true, Some(0), first.credit)
    }

    /// The log from now on.
    pub fn log_stream(&mut self, call: CallId, first: &StreamPiece) -> Result<()> {
        let (read_end, write_end) = sys::pipe(libc::O_NONBLOCK).context("make a pipe")?;
        let key = self.add_process(Process::internal("log", 0, None, read_end))?;
        // The former reader, if there is one, sees its end.
        log::set_stream(Some(write_end));
        self.begin_stream(call, key, false, Some(0), first.credit)
    }

    /// The other side of a console, a log or a connection is gone. With `flush`, what it has still said is delivered.
    pub fn end_internal(&mut self, key: Key, flush: bool) {
        let Some(process) = self.processes.get_mut(&key).filter(|p| p.is_internal()) else { return };
        if process.pid == 0 {
            if !flush || process.input.raw().is_none() {
                self.drop_process(key);
            } else {
                // What the other side still says is for nobody; it goes with the last of what it is told.
                process.outputs[0].close();
            }
        } else {
            // Its end comes as any other's.
            process.kill();
        }
    }
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
    let (master, slave) = console::open(root.raw(), None)?;
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
            // End of file, or EIO of a terminal that nobody has open any more.
            match sys::read(entry.fd, &mut buffer) {
                Ok(n) if n > 0 && sys::write_all(to, &buffer[..n]).is_ok() => {}
                _ => return Ok(()),
            }
        }
    }
}

/// Only returns when there is no shell.
fn become_shell(slave: &Fd) {
    let prepared = sys::setsid().is_ok() && console::control(slave.raw()).is_ok();
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
