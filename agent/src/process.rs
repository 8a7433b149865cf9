//! The agent's record of one process of a container.

use crate::agent::Agent;
use crate::agent::Token;
use crate::log;
use crate::prelude::*;
use crate::proto::agent::{WaitProcessResponse, WriteStreamResponse};
use crate::proto::codec::Message;
use crate::runtime::launch::{Program, Stdio};
use crate::runtime::report;
use crate::server::calls::CallId;
use crate::server::conn::Conn;
use crate::server::frame;
use crate::streams::{Input, Output, Read, Written};
use crate::sys::{self, Errno, Fd, Pid, SysResult};

/// Names a process record; also the number in its epoll tokens.
pub type Key = u32;

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The builder or the process itself prepares; the create or exec call waits.
    Building,
    /// A container's init, prepared, before its start.
    Ready,
    /// Told to go; the start (or exec) call waits for the exec.
    Starting,
    Running,
    Exited,
}

pub struct Process {
    pub container: String,
    pub exec_id: String,
    pub phase: Phase,
    /// 0 until the builder has said.
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

/// Four times the kernel's default: fewer and longer answers to reads. Memory is only taken by what is in the pipe.
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

    /// One of the agent's own, of no container: a child with streams, or (pid 0) a stream alone.
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

    /// Neither output nor anybody who waits for some is left.
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
        self.phase = Phase::Starting;
        match &self.report {
            Some(fd) => report::start(fd.raw()).context("start the process"),
            None => Err(Error::precondition("the process has ended before its start")),
        }
    }
}

/// The name of what is no process.
const CONNECTION: &str = "connection";

/// Nothing until it is asked for: a container that writes without a reader on the host must not keep the agent awake.
const STREAM_EVENTS: u32 = libc::EPOLLONESHOT as u32;

impl Agent {
    /// Takes a process in whose builder is on its way.
    pub fn add_process(&mut self, process: Process) -> Result<Key> {
        let key = self.fresh_id();
        if let Some(fd) = process.report_fd() {
            sys::set_nonblocking(fd, true).context("prepare the report socket")?;
            self.watch(fd, Token::Report(key), libc::EPOLLIN as u32)?;
        }
        self.processes.insert(key, process);
        self.watch_streams(key)?;
        Ok(key)
    }

    fn watch_streams(&self, key: Key) -> Result<()> {
        let Some(process) = self.processes.get(&key) else { return Ok(()) };
        if let Some(fd) = process.input.raw() {
            self.watch(fd, Token::Stdin(key), STREAM_EVENTS)?;
        }
        for (which, output) in process.outputs.iter().enumerate() {
            if let Some(fd) = output.raw() {
                self.watch(fd, Token::Output(key, which as u8), STREAM_EVENTS)?;
            }
        }
        Ok(())
    }

    /// Forgets a process whose record nobody needs any more; whoever still waits is told so.
    pub fn drop_process(&mut self, key: Key) {
        let Some(mut process) = self.processes.remove(&key) else { return };
        let gone = || Error::not_found(format!("process {:?} has been removed", process.exec_id));
        for call in process.waiters.drain(..).chain(process.starter.take()) {
            self.answer(call, Err(gone()));
        }
        self.answer_writes(process.input.fail("the process has been removed"));
        for output in &mut process.outputs {
            for call in output.close() {
                self.answer(call, Ok(vec![]));
            }
        }
    }

    /// The child's end of the report socket has said something.
    pub fn on_report(&mut self, key: Key) {
        loop {
            let Some(process) = self.processes.get_mut(&key) else { return };
            let Some(fd) = process.report_fd() else { return };
            match report::receive(fd) {
                Ok(Some(message)) => self.on_message(key, message),
                Err(Errno(libc::EAGAIN)) => return,
                Ok(None) => return self.on_report_end(key),
                Err(e) => {
                    process.failure.get_or_insert(Error::internal(format!("report of a process: {e}")));
                    return self.on_report_end(key);
                }
            }
        }
    }

    fn on_message(&mut self, key: Key, message: report::Message) {
        let Some(process) = self.processes.get_mut(&key) else { return };
        match message {
            report::Message::Pid(pid) => process.pid = pid,
            report::Message::Mounted(count) => {
                let container = process.container.clone();
                if let Some(container) = self.containers.get_mut(&container) {
                    container.mounted = count as usize;
                }
            }
            report::Message::Terminal(master) => {
                if let Err(e) = self.take_terminal(key, master) {
                    log::error(&e.message);
                }
            }
            report::Message::Ready => self.on_ready(key),
            report::Message::Failed(error) => {
                process.failure.get_or_insert(error);
            }
        }
    }

    fn take_terminal(&mut self, key: Key, master: Fd) -> Result<()> {
        let Some(process) = self.processes.get_mut(&key) else { return Ok(()) };
        sys::set_nonblocking(master.raw(), true).context("prepare the terminal")?;
        let (input, output) =
            (master.try_clone().context("copy the terminal")?, master.try_clone().context("copy the terminal")?);
        process.input = Input::new(input, true);
        let waiting = core::mem::take(&mut process.outputs[0]);
        process.outputs[0] = Output::new(output, true);
        process.outputs[0].take_readers_of(waiting);
        process.terminal = Some(master);
        self.watch_streams(key)
    }

    fn on_ready(&mut self, key: Key) {
        let Some(process) = self.processes.get_mut(&key) else { return };
        if process.phase != Phase::Building {
            return;
        }
        process.phase = Phase::Ready;
        let is_init = self.containers.get(&process.container).is_some_and(|c| c.init == key);
        if is_init {
            let (container, starter) = (process.container.clone(), process.starter.take());
            self.on_created(&container);
            if let Some(call) = starter {
                self.answer(call, Ok(vec![]));
            }
        } else if let Err(e) = process.release() {
            process.failure.get_or_insert(e);
        }
        // Whoever has asked for a stream that there is none of (a terminal's stderr) has waited for this.
        self.serve_readers(key, 0);
        self.serve_readers(key, 1);
    }

    /// End of file: the exec has worked, or the process (or its builder) has ended.
    fn on_report_end(&mut self, key: Key) {
        let Some(process) = self.processes.get_mut(&key).filter(|p| p.report_fd().is_some()) else { return };
        process.close_report();
        let failure = process.failure.clone();
        match (process.phase, failure) {
            (Phase::Starting, None) => {
                process.phase = Phase::Running;
                if let Some(call) = process.starter.take() {
                    self.answer(call, Ok(vec![]));
                }
            }
            // One that somebody has killed between create and start has an exit like any other.
            (Phase::Ready, None) | (Phase::Running | Phase::Exited, _) => {}
            (Phase::Building | Phase::Ready | Phase::Starting, failure) => {
                let error = failure.unwrap_or_else(|| {
                    Error::internal("the process was killed while it was being set up (out of memory?)")
                });
                self.on_failed_start(key, error);
            }
        }
    }

    /// A child has been reaped.
    pub fn on_child_exit(&mut self, pid: Pid, code: i32) {
        let Some(key) = self.processes.iter().find(|(_, p)| p.pid == pid && p.is_alive()).map(|(k, _)| *k) else {
            return self.on_builder_exit(pid);
        };
        // What it has said before its end comes first. Its builder may still hold the socket open: there is no end of
        // file to wait for.
        self.on_report(key);
        self.on_report_end(key);
        let Some(process) = self.processes.get_mut(&key) else { return };
        process.exit = Some(code);
        process.phase = Phase::Exited;
        for output in &mut process.outputs {
            output.drain();
        }
        let (container, is_init) = (process.container.clone(), self.is_init(key));
        log::debug(&format!("container {container}: pid {pid} has ended with {code}"));
        if is_init {
            self.on_init_exit(&container);
        }
        self.settle_exit(key);
        self.continue_removal(&container);
    }

    fn on_builder_exit(&mut self, pid: Pid) {
        let Some((key, process)) = self.processes.iter_mut().find(|(_, p)| p.builder == pid) else { return };
        process.builder = 0;
        let (key, container) = (*key, process.container.clone());
        // What it has said may name the process that it has made.
        self.on_report(key);
        self.continue_removal(&container);
    }

    /// Tells those who wait for the end, once it may be told.
    pub fn settle_exit(&mut self, key: Key) {
        let Some(process) = self.processes.get_mut(&key) else { return };
        let Some(code) = process.exit else { return };
        let waiters = core::mem::take(&mut process.waiters);
        let writes = process.input.fail("the process has ended");
        let starter = process.starter.take();
        for call in waiters {
            self.answer(call, Ok(WaitProcessResponse { status: code }.to_vec()));
        }
        if let Some(call) = starter {
            self.answer(call, Err(Error::precondition("the process has ended before its start")));
        }
        self.answer_writes(writes);
        self.serve_readers(key, 0);
        self.serve_readers(key, 1);
        self.forget_if_finished(key);
    }

    pub fn is_init(&self, key: Key) -> bool {
        self.processes
            .get(&key)
            .and_then(|p| self.containers.get(&p.container))
            .is_some_and(|container| container.init == key)
    }

    pub fn answer_writes(&mut self, over: Vec<Written>) {
        for (call, outcome) in over {
            self.answer(call, outcome.map(|len| WriteStreamResponse { len }.to_vec()));
        }
    }

    /// Moves standard input on: into the process, answers to their callers.
    pub fn on_stdin(&mut self, key: Key) {
        let Some(process) = self.processes.get_mut(&key) else { return };
        let over = process.input.pump();
        let (blocked, credit) = (process.input.blocked(), process.input.take_credit());
        if let Some(fd) = blocked {
            self.arm(fd, Token::Stdin(key), libc::EPOLLOUT);
        }
        self.answer_writes(over);
        if let Some((call, credit)) = credit {
            self.give_credit(call, credit);
        }
        self.end_connection(key);
    }

    /// Forgets a connection both of whose directions have ended.
    fn end_connection(&mut self, key: Key) {
        let Some(process) = self.processes.get(&key).filter(|p| p.is_connection()) else { return };
        if process.input.raw().is_none() && process.outputs[0].at_end() {
            if let Some(call) = process.input.attached() {
                self.answer(call, Ok(vec![]));
            }
            self.drop_process(key);
        }
    }

    pub fn on_output(&mut self, key: Key, which: u8) {
        if let Some(process) = self.processes.get_mut(&key) {
            process.outputs[usize::from(which)].notice();
            self.serve_readers(key, usize::from(which));
        }
    }

    /// Gives waiting calls what is there, as long as their connection takes it.
    pub fn serve_readers(&mut self, key: Key, which: usize) {
        loop {
            let Some(process) = self.processes.get_mut(&key) else { return };
            let output = &mut process.outputs[which];
            let Some(reader) = output.next_reader() else { return };
            let Some(reply) = self.calls.get(reader.call) else {
                // Over meanwhile: its data stays for the next one.
                output.finish_turn(reader, None);
                continue;
            };
            if !output.has_news() || reader.streaming && reader.len == 0 && !output.at_end() {
                return;
            }
            // Before there is a process there is no end of file either.
            if process.phase == Phase::Building && output.raw().is_none() {
                return;
            }
            let splice = reader.streaming && output.is_splice_worthwhile();
            let conn = self.connection(reply.conn);
            let is_full = |c: &&mut Conn| if reader.streaming { !c.takes_bulk() } else { c.is_full() };
            if conn.as_ref().is_some_and(is_full) {
                self.stalled.push((key, which as u8));
                return;
            }
            let pipe = conn.filter(|_| splice).and_then(Conn::pipe);
            let Some(process) = self.processes.get_mut(&key) else { return };
            let output = &mut process.outputs[which];
            if let Some(moved) = pipe.and_then(|pipe| output.move_into(reader.len, pipe)) {
                output.finish_turn(reader, Some(moved));
                self.send_outgoing(reply.conn, frame::data_frame_before(reply.stream, moved));
                continue;
            }
            match output.read(reader.len) {
                Read::Wait => {
                    if let Some(fd) = output.raw() {
                        self.arm(fd, Token::Output(key, which as u8), libc::EPOLLIN);
                    }
                    return;
                }
                Read::Data(buffer) => {
                    let taken = buffer.len() - frame::DATA_OFFSET;
                    let stays = reader.streaming && taken > 0;
                    output.finish_turn(reader, stays.then_some(taken));
                    let over = output.is_over();
                    if stays {
                        self.send_outgoing(reply.conn, frame::data_frame_around(reply.stream, buffer));
                    } else if process.is_connection() {
                        if process.outputs[which].has_failed() {
                            process.input.fail("the connection has been reset");
                        }
                        self.send_bytes(reply.conn, frame::end_frame(reply.stream));
                        return self.end_connection(key);
                    } else if reader.streaming {
                        self.answer(reader.call, Ok(vec![]));
                    } else {
                        self.calls.take(reader.call);
                        self.send_outgoing(reply.conn, frame::ok_frame_around(reply.stream, buffer));
                    }
                    if over {
                        self.forget_if_finished(key);
                    }
                }
            }
        }
    }
}
