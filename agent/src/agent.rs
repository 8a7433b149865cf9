//! The agent's one loop: takes the kernel's events and the host's requests and hands each to the part that it concerns.

use crate::cmdline::Settings;
use crate::connections::{Attachment, Target};
use crate::jobs::Completion;
use crate::poller::Token;
use crate::prelude::*;
use crate::process::Process;
use crate::proto::agent::AGENT_SERVICE;
use crate::server::calls::Reply;
use crate::server::conn::{self, Call};
use crate::server::frame;
use crate::server::listen::Address;
use crate::state::State;
use crate::sys::{self, Fd};
use crate::{dispatch, fs, lifecycle, log, process_events, rt};

/// After this much idle time (up to twice as much) the loop returns spare memory to the kernel. Longer than the pauses
/// between the calls of a start: what is returned there has to be fetched again a moment later.
const TRIM_AFTER_NS: u64 = 1_000_000_000;

/// How many rounds over the connections are made before other events are handled.
const PUMP_ROUNDS: u32 = 8;

pub struct Agent {
    pub state: State,
    signals: Fd,
    /// Runs from the first event after a trim until the next trim. It is a timer descriptor because a timeout of
    /// epoll_wait would program the machine's timer with every call.
    idle_timer: Fd,
    idle_timer_runs: bool,
    /// Something has happened since the timer was set.
    active: bool,
    /// The last round has left work to do: the next wait returns at once.
    backlog: bool,
    stopping: bool,
}

impl Agent {
    pub fn new(settings: Settings) -> Result<Agent> {
        let state = State::new(settings)?;
        // Writing to a pipe without a reader returns an error instead of killing the agent.
        sys::ignore_signal(libc::SIGPIPE);
        let watched = sys::signal_set(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT]);
        sys::set_signal_mask(watched).context("block signals")?;
        let signals = sys::signalfd(watched).context("create a signalfd")?;
        let idle_timer = sys::timer().context("make a timer")?;
        state.io.poller.watch(signals.raw(), Token::Signals, libc::EPOLLIN as u32)?;
        state.io.poller.watch(idle_timer.raw(), Token::IdleTimer, libc::EPOLLIN as u32)?;
        Ok(Agent { state, signals, idle_timer, idle_timer_runs: false, active: false, backlog: false, stopping: false })
    }

    /// Opens the channel.
    pub fn listen(&mut self) -> Result<()> {
        self.state.io.listen(&self.state.settings.address)?;
        self.state.boot.ready_ns = sys::clock_ns(libc::CLOCK_BOOTTIME);
        Ok(())
    }

    /// The loop. Returns when the sandbox has been destroyed and the answer to that is out.
    pub fn run(&mut self) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 32];
        loop {
            self.pump();
            if self.stopping && !self.state.io.has_output() {
                return;
            }
            let n = match self.state.io.poller.wait(&mut events, self.timeout_ms()) {
                Ok(n) => n,
                Err(e) => {
                    log::error(&format!("epoll: {e}"));
                    return;
                }
            };
            for event in &events[..n] {
                if let Some(token) = Token::unpack(event.u64) {
                    self.active |= token != Token::IdleTimer;
                    self.on_event(token, event.events);
                }
            }
            if self.active && !self.idle_timer_runs {
                self.start_idle_timer();
            }
            self.expire();
        }
    }

    fn timeout_ms(&self) -> i32 {
        if self.backlog {
            return 0;
        }
        match self.state.io.deadline() {
            u64::MAX => -1,
            deadline => deadline.saturating_sub(sys::monotonic_ns()).div_ceil(1_000_000).min(1 << 30) as i32,
        }
    }

    fn start_idle_timer(&mut self) {
        self.active = false;
        self.idle_timer_runs = sys::set_timer(self.idle_timer.raw(), TRIM_AFTER_NS, 0).is_ok();
    }

    fn on_idle_timer(&mut self) {
        let _ = sys::read(self.idle_timer.raw(), &mut [0u8; 8]);
        self.idle_timer_runs = false;
        if self.active || self.backlog {
            self.start_idle_timer();
        } else {
            rt::trim();
        }
    }

    fn on_event(&mut self, token: Token, events: u32) {
        let state = &mut self.state;
        match token {
            Token::Listener => state.io.accept(),
            Token::Conn(id) => {
                if let Some(conn) = state.io.get_mut(id) {
                    conn.notice(events);
                }
            }
            Token::Signals => self.on_signals(),
            Token::OomWatch => state.oom.on_inotify(&mut state.io, &mut state.containers),
            Token::Report(key) => process_events::on_report(state, key),
            Token::Stdin(key) => state.processes.pump_input(&mut state.io, key),
            Token::Output(key, which) => state.processes.on_output(&mut state.io, &mut state.containers, key, which),
            Token::Job(id) => self.on_job(id),
            Token::Debug(port) => state.debug_ports.accept(port),
            Token::WatchTimer => state.watcher.on_timer(&mut state.io.poller, &mut state.jobs, &state.containers),
            Token::IdleTimer => self.on_idle_timer(),
            Token::Socket(number) => {
                state.sockets.on_readable(&mut state.io, &mut state.processes, &mut state.containers, number);
            }
        }
    }

    fn on_signals(&mut self) {
        let mut info = [0u8; 128];
        let mut end = false;
        while sys::read(self.signals.raw(), &mut info).is_ok_and(|n| n == info.len()) {
            let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            end |= signal != libc::SIGCHLD && sys::getpid() != 1;
        }
        while let Ok(Some((pid, status))) = sys::wait4(-1, libc::WNOHANG) {
            process_events::on_child_exit(&mut self.state, pid, sys::exit_code(status));
        }
        self.stopping |= end;
    }

    fn on_job(&mut self, id: u32) {
        let Some((completion, outcome)) = self.state.jobs.read(id) else { return };
        match completion {
            Completion::Answer(call) => self.state.io.answer(call, outcome),
            Completion::Removed(container) => lifecycle::on_removed(&mut self.state, &container, outcome),
            Completion::Copied => self.state.watcher.on_copied(outcome),
            Completion::PowerOff(call) => {
                self.state.io.answer(call, outcome);
                // No more requests; the loop ends when the answers are out.
                self.stopping = true;
            }
        }
    }

    /// Handles the requests that have arrived and writes as many answers as the connections accept.
    fn pump(&mut self) {
        // Bounded: a container that writes without end, to a host that reads as fast, must not hold up other events.
        for _ in 0..PUMP_ROUNDS {
            for id in self.state.io.ids() {
                self.pump_conn(id);
            }
            // Once a connection has room, output that was held back flows again and has to be written.
            let flows = self.state.processes.serve_stalled(&mut self.state.io, &mut self.state.containers);
            if !flows && !self.state.io.can_write() {
                self.backlog = false;
                return;
            }
        }
        self.backlog = true;
    }

    fn pump_conn(&mut self, id: u32) {
        loop {
            let Some(conn) = self.state.io.get_mut(id) else { return };
            if conn.flush() == conn::State::Gone {
                return self.on_connection_end(id);
            }
            self.state.io.update_events(id);
            let Some(conn) = self.state.io.get_mut(id) else { return };
            if conn.is_full() || self.stopping {
                return;
            }
            match conn.next_call() {
                Ok(Some(call)) => self.on_call(id, call),
                // A frame that was not a request has been answered by next_call.
                Ok(None) if conn.can_write() => {}
                Ok(None) => return,
                Err(_) => return self.on_connection_end(id),
            }
        }
    }

    fn on_connection_end(&mut self, id: u32) {
        for process in self.state.io.end(id) {
            self.state.processes.end_internal(&mut self.state.io, process, false);
        }
    }

    fn on_call(&mut self, conn: u32, call: Call) {
        let state = &mut self.state;
        let stream = call.stream;
        if let conn::Kind::Data { last } = call.kind {
            return self.on_data(conn, call, last);
        }
        let request = match frame::parse_request(call.body()) {
            Ok(request) => request,
            Err(error) => return state.io.send(conn, stream, &Err(error)),
        };
        let patience_ns = u64::try_from(request.timeout_nano).unwrap_or(0);
        let id = match state.io.calls.add(Reply { conn, stream, deadline: u64::MAX }) {
            Ok(id) => id,
            Err(error) => return state.io.send(conn, stream, &Err(error)),
        };
        if !request.traceparent.is_empty() {
            state.io.trace.begin(id, request.traceparent, request.method);
        }
        let policy = state.sandbox.policy.as_ref();
        let allowed = policy.map_or(Ok(()), |policy| policy.check(request.service, request.method, request.payload));
        let outcome = match allowed {
            Err(refused) => Err(refused),
            Ok(()) if (request.service, request.method) == (AGENT_SERVICE, "WriteStdin") => {
                state.processes.write_stdin(&mut state.io, &state.containers, id, call).map(|()| None)
            }
            Ok(()) => dispatch::handle(state, id, &request),
        };
        match outcome {
            Ok(Some(payload)) => state.io.answer(id, Ok(payload)),
            // Set only now: for a call that is answered at once, reading the clock would cost more than the answer.
            Ok(None) if patience_ns > 0 => {
                state.io.calls.set_deadline(id, sys::monotonic_ns().saturating_add(patience_ns));
            }
            Ok(None) => {}
            Err(error) => {
                log::debug(&format!("call refused: {error:?}"));
                state.io.answer(id, Err(error));
            }
        }
    }

    /// A data frame from the host. If its call is over, the frame was sent before the host saw the end; it is dropped.
    fn on_data(&mut self, conn: u32, frame: Call, last: bool) {
        let State { io, processes, containers, sockets, .. } = &mut self.state;
        let Some(Attachment { call, to }) = io.attachment(conn, frame.stream) else { return };
        let taken = match to {
            Target::Streams(to) => processes.take_piece(io, containers, (call, to), frame, last),
            Target::Datagrams(socket) => sockets.take_datagram(io, socket, &frame, last),
        };
        if let Err(error) = taken {
            io.answer(call, Err(error));
        }
    }

    fn expire(&mut self) {
        let io = &mut self.state.io;
        if io.deadline() == u64::MAX {
            return;
        }
        let now = sys::monotonic_ns();
        io.retry_reads(now);
        for id in io.calls.expired(now) {
            let error = Error::deadline("the caller's time limit is over");
            if !lifecycle::give_up(&mut self.state, id, &error) {
                self.state.io.answer(id, Err(error));
            }
        }
    }

    /// Cleans up after an agent that runs as an ordinary process: its containers and its socket's file would stay
    /// behind.
    pub fn end_as_process(&mut self) {
        self.state.processes.all().for_each(Process::kill);
        if let Address::Unix(path) = &self.state.settings.address {
            if !path.starts_with('@') {
                let _ = fs::remove_file(path);
            }
        }
    }
}
