//! The agent's record of one process of a container.

use crate::log;
use crate::prelude::*;
use crate::runtime::launch::{Program, Stdio};
use crate::runtime::report;
use crate::server::calls::CallId;
use crate::streams::{Input, Output};
use crate::sys::{self, Fd, Pid, SysResult};

/// Names a process record; also the number in its epoll tokens.
pub type Key = u32;

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The builder or the process itself prepares; the create or exec call waits.
    Building,
    /// A container's init, prepared, before its start.
    Ready,
    /// It has been released; the start (or exec) call waits for its execve.
    Starting,
    Running,
    Exited,
}

/// The phases that may follow each; a process may end in any of them.
const NEXT_PHASES: &[(Phase, &[Phase])] = &[
    (Phase::Building, &[Phase::Ready, Phase::Exited]),
    (Phase::Ready, &[Phase::Starting, Phase::Exited]),
    (Phase::Starting, &[Phase::Running, Phase::Exited]),
    (Phase::Running, &[Phase::Exited]),
    (Phase::Exited, &[]),
];

impl Phase {
    fn may_become(self, next: Phase) -> bool {
        NEXT_PHASES.iter().any(|(phase, followers)| *phase == self && followers.contains(&next))
    }
}

pub struct Process {
    pub container: String,
    pub exec_id: String,
    /// Changed by [`Process::enter`] alone.
    phase: Phase,
    /// 0 until the builder has reported it.
    pub pid: Pid,
    /// The child that makes the process; 0 once it has ended.
    pub builder: Pid,
    pub exit: Option<i32>,
    /// The call that waits for the next phase.
    pub starter: Option<CallId>,
    pub waiters: Vec<CallId>,
    /// Why the process failed before it was one.
    pub failure: Option<Error>,
    report: Option<Fd>,
    pub input: Input,
    /// stdout (or the terminal) and stderr.
    pub outputs: [Output; 2],
    /// The terminal's master, for the window size.
    pub terminal: Option<Fd>,
}

/// Four times the kernel's default: fewer and longer answers to reads. An empty pipe takes no memory.
const PIPE_SIZE: usize = 256 << 10;

/// The pipes of a process without a terminal, both sides.
pub struct Pipes {
    pub child: Stdio,
    /// stdin, unless that is /dev/null; stdout and stderr.
    ours: Option<(Option<Fd>, [Fd; 2])>,
}

impl Pipes {
    pub fn new(program: &Program, size: u32) -> Result<Pipes> {
        if program.terminal {
            return Ok(Pipes { child: None, ours: None });
        }
        let make = || -> sys::SysResult<_> {
            let (stdin_read, stdin_write) = if program.no_stdin {
                (sys::open("/dev/null", libc::O_RDWR, 0)?, None)
            } else {
                let (read, write) = sys::pipe(0)?;
                (read, Some(write))
            };
            let (stdout_read, stdout_write) = sys::pipe(0)?;
            let (stderr_read, stderr_write) = sys::pipe(0)?;
            for fd in stdin_write.iter().chain([&stdout_read, &stderr_read]) {
                sys::set_nonblocking(fd.raw(), true)?;
                // The limit for unprivileged users does not bind root; a kernel short of memory may still refuse.
                let size = if size == 0 { PIPE_SIZE } else { size as usize };
                let _ = sys::fcntl(fd.raw(), libc::F_SETPIPE_SZ, size);
            }
            Ok(([stdin_read, stdout_write, stderr_write], (stdin_write, [stdout_read, stderr_read])))
        };
        let (child, ours) = make().context("make the pipes of the process")?;
        Ok(Pipes { child: Some(child), ours: Some(ours) })
    }
}

impl Process {
    pub fn new(container: &str, exec_id: &str, builder: Pid, report: Fd, pipes: Pipes, starter: CallId) -> Process {
        let (input, outputs) = match pipes.ours {
            Some((stdin, [stdout, stderr])) => (
                stdin.map_or_else(Input::default, |fd| Input::new(fd, false)),
                [Output::new(stdout, false), Output::new(stderr, false)],
            ),
            None => Default::default(),
        };
        Process {
            container: container.to_string(),
            exec_id: exec_id.to_string(),
            phase: Phase::Building,
            pid: 0,
            builder,
            exit: None,
            starter: Some(starter),
            waiters: vec![],
            failure: None,
            report: Some(report),
            input,
            outputs,
            terminal: None,
        }
    }

    /// A process of the agent's own, of no container: a child with streams, or (pid 0) a stream alone.
    pub fn internal(name: &str, pid: Pid, input: Option<Fd>, output: Fd) -> Process {
        Process {
            container: String::new(),
            exec_id: name.to_string(),
            phase: Phase::Running,
            pid,
            builder: 0,
            exit: None,
            starter: None,
            waiters: vec![],
            failure: None,
            report: None,
            input: input.map_or_else(Input::default, |fd| Input::new(fd, false)),
            outputs: [Output::new(output, false), Output::default()],
            terminal: None,
        }
    }

    pub fn is_internal(&self) -> bool {
        self.container.is_empty()
    }

    /// A connected socket of the agent's own, with no process behind it.
    pub fn connection(socket: Fd) -> SysResult<Process> {
        let input = Input::of_connection(socket.try_clone()?);
        Ok(Process { input, ..Process::internal(CONNECTION, 0, None, socket) })
    }

    pub fn is_connection(&self) -> bool {
        self.is_internal() && self.exec_id == CONNECTION
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Changes the phase; false, and nothing is changed, where [`NEXT_PHASES`] does not have it.
    pub fn enter(&mut self, next: Phase) -> bool {
        let allowed = self.phase.may_become(next);
        if allowed {
            self.phase = next;
        } else {
            log::error(&format!("process {:?} cannot become {next:?}: it is {:?}", self.exec_id, self.phase));
        }
        allowed
    }

    pub fn is_alive(&self) -> bool {
        self.exit.is_none()
    }

    /// Its builder or itself still runs.
    pub fn is_anything_left(&self) -> bool {
        self.builder != 0 || self.pid != 0 && self.is_alive()
    }

    /// SIGKILL to whatever is left. Both are unreaped children, so that the numbers are still theirs.
    pub fn kill(&self) {
        if self.builder != 0 {
            let _ = sys::kill(self.builder, libc::SIGKILL);
        }
        if self.pid != 0 && self.is_alive() {
            let _ = sys::kill(self.pid, libc::SIGKILL);
        }
    }

    /// Whether no output is left, nor a call that waits for some.
    pub fn is_drained(&self) -> bool {
        self.outputs.iter().all(Output::is_over)
    }

    pub fn report_fd(&self) -> Option<sys::RawFd> {
        self.report.as_ref().map(Fd::raw)
    }

    pub fn close_report(&mut self) {
        self.report = None;
    }

    /// Lets a prepared process become its program.
    pub fn release(&mut self) -> Result<()> {
        if !self.enter(Phase::Starting) {
            return Err(Error::precondition(format!("the process is not ready to be started but {:?}", self.phase)));
        }
        match &self.report {
            Some(fd) => report::start(fd.raw()).context("start the process"),
            None => Err(Error::precondition("the process has ended before its start")),
        }
    }
}

/// The exec id of records of connections, which have no process.
const CONNECTION: &str = "connection";

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Phase; 5] = [Phase::Building, Phase::Ready, Phase::Starting, Phase::Running, Phase::Exited];

    #[test]
    fn a_process_goes_through_its_phases_in_order() {
        let allowed = [
            (Phase::Building, Phase::Ready),
            (Phase::Ready, Phase::Starting),
            (Phase::Starting, Phase::Running),
            (Phase::Building, Phase::Exited),
            (Phase::Ready, Phase::Exited),
            (Phase::Starting, Phase::Exited),
            (Phase::Running, Phase::Exited),
        ];
        for from in ALL {
            for to in ALL {
                assert_eq!(from.may_become(to), allowed.contains(&(from, to)), "{from:?} -> {to:?}");
            }
        }
        let (output, _writer) = sys::pipe(0).unwrap();
        let mut process = Process::internal("test", 0, None, output);
        assert!(!process.enter(Phase::Starting) && process.phase() == Phase::Running);
        assert!(process.enter(Phase::Exited) && process.phase() == Phase::Exited);
    }

    #[test]
    fn only_a_prepared_process_is_released() {
        let (report, builder) = sys::socketpair(libc::SOCK_SEQPACKET).unwrap();
        let mut process = Process::new("c", "e", 0, report, Pipes { child: None, ours: None }, 1);
        assert!(process.release().is_err(), "it is still being built");
        assert_eq!(process.phase(), Phase::Building);
        assert!(process.enter(Phase::Ready) && process.release().is_ok());
        let mut told = [0; 8];
        assert!(sys::read(builder.raw(), &mut told).is_ok_and(|n| n > 0));
        assert!(process.release().is_err(), "it has been told already");
    }
}
