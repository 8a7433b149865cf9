//! The agent's state and its one loop.

use crate::attach::Attachment;
use crate::cmdline::Settings;
use crate::container::Container;
use crate::debug;
use crate::jobs::Job;
use crate::prelude::*;
use crate::process::{Key, Phase, Process};
use crate::proto::agent::AGENT_SERVICE;
use crate::proto::agentext::BootTimesResponse;
use crate::sandbox::Sandbox;
use crate::server::calls::{CallId, Calls, Reply};
use crate::server::conn::{self, Call, Conn, State};
use crate::server::frame::{self, Outgoing};
use crate::server::listen::{self, Address, Channel, Kind};
use crate::sockets::Socket;
use crate::sys::{self, Fd, RawFd};
use crate::{dispatch, fs, log, rt};

/// What a descriptor in the epoll set is; the number in the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    Signals,
    Listener,
    OomWatch,
    Conn(u32),
    /// The report socket of a process that is being made.
    Report(Key),
    Stdin(Key),
    /// 0 stdout or the terminal, 1 stderr.
    Output(Key, u8),
    Job(u32),
    /// A socket that stands for one of the host's.
    Socket(u32),
    /// A listener for a console or the log.
    Debug(debug::Port),
    /// Time to look at what is watched.
    WatchTimer,
    /// Time to look whether anything has happened.
    IdleTimer,
}

impl Token {
    fn pack(self) -> u64 {
        let (kind, id) = match self {
            Token::Signals => (1, 0),
            Token::Listener => (2, 0),
            Token::OomWatch => (3, 0),
            Token::Conn(id) => (4, id),
            Token::Report(key) => (5, key),
            Token::Stdin(key) => (6, key),
            Token::Output(key, which) => (7 + u64::from(which), key),
            Token::Job(id) => (9, id),
            Token::Debug(debug::Port::Console) => (DEBUG_TOKEN, 0),
            Token::Debug(debug::Port::Log) => (DEBUG_TOKEN, 1),
            Token::WatchTimer => (20, 0),
            Token::IdleTimer => (21, 0),
            Token::Socket(number) => (22, number),
        };
        kind << 32 | u64::from(id)
    }

    fn unpack(data: u64) -> Option<Token> {
        let id = data as u32;
        Some(match data >> 32 {
            1 => Token::Signals,
            2 => Token::Listener,
            3 => Token::OomWatch,
            4 => Token::Conn(id),
            5 => Token::Report(id),
            6 => Token::Stdin(id),
            7 => Token::Output(id, 0),
            8 => Token::Output(id, 1),
            9 => Token::Job(id),
            DEBUG_TOKEN if id == 0 => Token::Debug(debug::Port::Console),
            DEBUG_TOKEN => Token::Debug(debug::Port::Log),
            20 => Token::WatchTimer,
            21 => Token::IdleTimer,
            22 => Token::Socket(id),
            _ => return None,
        })
    }
}

const DEBUG_TOKEN: u64 = 16;

/// Connections: always to read, and to write while something waits to be written.
const CONN_IN: u32 = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET) as u32;
const CONN_IN_OUT: u32 = CONN_IN | libc::EPOLLOUT as u32;

/// Idle for so long (up to twice that), the loop gives kept memory back.
const TRIM_AFTER_NS: u64 = 200_000_000;

/// So often connections are looked at before other events have their turn.
const PUMP_ROUNDS: u32 = 8;

pub struct Agent {
    pub settings: Settings,
    pub calls: Calls,
    pub boot: BootTimesResponse,
    pub containers: BTreeMap<String, Container>,
    pub processes: BTreeMap<Key, Process>,
    pub jobs: BTreeMap<u32, Job>,
    pub sandbox: Sandbox,
    /// False on a host, whose control groups are not ours.
    pub has_cgroups: bool,
    pub oom_watch: Option<Fd>,
    /// When containers were last looked at for being stuck at their memory limits (CLOCK_MONOTONIC).
    pub thrash_looked_ns: u64,
    /// Output streams whose readers wait for their connection to take more.
    pub stalled: Vec<(Key, u8)>,
    /// Streaming calls, by connection and number.
    pub debug_ports: Vec<(debug::Port, Fd, Kind)>,
    /// By the host's numbers.
    pub sockets: BTreeMap<u32, Socket>,
    pub attachments: BTreeMap<(u32, u32), Attachment>,
    epoll: Fd,
    signals: Fd,
    listener: Option<(Fd, Kind)>,
    conns: BTreeMap<u32, Conn>,
    next_id: u32,
    /// Runs from the first event after a trim to the next trim. A descriptor, because a time limit of the wait itself
    /// would set and unset the machine's timer with every call.
    idle_timer: Fd,
    idle_timer_runs: bool,
    /// Something has happened since the timer was set.
    active: bool,
    /// The last round has left things to do: the next wait is none.
    backlog: bool,
    stopping: bool,
}

impl Agent {
    pub fn new(settings: Settings) -> Result<Agent> {
        let epoll = sys::epoll_create().context("create epoll")?;
        // Writing to a pipe whose reader is gone is an error, not an end.
        sys::ignore_signal(libc::SIGPIPE);
        let watched = sys::signal_set(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT]);
        sys::set_signal_mask(watched).context("block signals")?;
        let signals = sys::signalfd(watched).context("create a signalfd")?;
        let idle_timer = sys::timer().context("make a timer")?;
        let agent = Agent {
            settings,
            calls: Calls::default(),
            boot: BootTimesResponse::default(),
            containers: BTreeMap::new(),
            processes: BTreeMap::new(),
            jobs: BTreeMap::new(),
            sandbox: Sandbox::default(),
            has_cgroups: false,
            oom_watch: None,
            thrash_looked_ns: 0,
            stalled: Vec::new(),
            attachments: BTreeMap::new(),
            debug_ports: Vec::new(),
            sockets: BTreeMap::new(),
            epoll,
            signals,
            listener: None,
            conns: BTreeMap::new(),
            next_id: 1,
            idle_timer,
            idle_timer_runs: false,
            active: false,
            backlog: false,
            stopping: false,
        };
        agent.watch(agent.signals.raw(), Token::Signals, libc::EPOLLIN as u32)?;
        agent.watch(agent.idle_timer.raw(), Token::IdleTimer, libc::EPOLLIN as u32)?;
        Ok(agent)
    }

    /// Takes charge of control groups (the guest's, all of them).
    pub fn use_cgroups(&mut self) -> Result<()> {
        let watch = sys::inotify().context("create an inotify descriptor")?;
        self.watch(watch.raw(), Token::OomWatch, libc::EPOLLIN as u32)?;
        self.oom_watch = Some(watch);
        self.has_cgroups = true;
        Ok(())
    }

    /// Opens the channel.
    pub fn listen(&mut self) -> Result<()> {
        match listen::open(&self.settings.address, 5000)? {
            Channel::Listener(fd, kind) => {
                self.watch(fd.raw(), Token::Listener, libc::EPOLLIN as u32)?;
                self.listener = Some((fd, kind));
            }
            Channel::Port(fd) => {
                self.add_conn(Conn::new(fd, true))?;
            }
        }
        self.boot.ready_ns = sys::clock_ns(libc::CLOCK_BOOTTIME);
        Ok(())
    }

    /// Whether the host can open further connections, as it cannot on a port.
    pub fn takes_connections(&self) -> bool {
        self.listener.is_some()
    }

    /// A number not used for anything else.
    pub fn fresh_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1).max(1);
        id
    }

    pub fn watch(&self, fd: RawFd, token: Token, events: u32) -> Result<()> {
        sys::epoll_ctl(self.epoll.raw(), libc::EPOLL_CTL_ADD, fd, events, token.pack()).context("add to epoll")
    }

    /// Asks for one event of a descriptor that is watched already.
    pub fn arm(&self, fd: RawFd, token: Token, events: i32) {
        let events = (events | libc::EPOLLONESHOT) as u32;
        if let Err(e) = sys::epoll_ctl(self.epoll.raw(), libc::EPOLL_CTL_MOD, fd, events, token.pack()) {
            log::error(&format!("epoll: {e}"));
        }
    }

    fn add_conn(&mut self, conn: Conn) -> Result<u32> {
        let id = self.fresh_id();
        self.watch(conn.fd(), Token::Conn(id), CONN_IN)?;
        self.conns.insert(id, conn);
        Ok(id)
    }

    /// The loop. Returns when the sandbox has been destroyed and the answer to that is out.
    pub fn run(&mut self) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 32];
        loop {
            self.pump();
            if self.stopping && self.conns.values().all(|c| !c.has_output()) {
                return;
            }
            let n = match sys::epoll_wait(self.epoll.raw(), &mut events, self.timeout_ms()) {
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

    /// When something has to be done although nothing happens; `u64::MAX` = never.
    fn deadline(&self) -> u64 {
        let opening = self.conns.values().map(Conn::deadline).min().unwrap_or(u64::MAX);
        self.calls.next_deadline().min(opening)
    }

    fn timeout_ms(&self) -> i32 {
        if self.backlog {
            return 0;
        }
        match self.deadline() {
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
        match token {
            Token::Listener => self.on_listener(),
            Token::Conn(id) => {
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.notice(events);
                }
            }
            Token::Signals => self.on_signals(),
            Token::OomWatch => {
                if let Some(fd) = self.oom_watch.as_ref().map(Fd::raw) {
                    self.on_oom_watch(fd);
                }
            }
            Token::Report(key) => self.on_report(key),
            Token::Stdin(key) => self.on_stdin(key),
            Token::Output(key, which) => self.on_output(key, which),
            Token::Job(id) => self.on_job(id),
            Token::Debug(port) => self.on_debug_port(port),
            Token::WatchTimer => self.on_watch_timer(),
            Token::IdleTimer => self.on_idle_timer(),
            Token::Socket(number) => self.on_socket(number),
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
            self.on_child_exit(pid, sys::exit_code(status));
        }
        if end {
            self.stop();
        }
    }

    fn on_listener(&mut self) {
        let Some((fd, kind)) = &self.listener else { return };
        match listen::accept(fd, *kind) {
            Ok(Some(socket)) => {
                if let Err(e) = self.add_conn(Conn::new(socket, false)) {
                    log::error(&e.message);
                }
            }
            Ok(None) => {}
            Err(e) => log::error(&e.message),
        }
    }

    /// Handles every request that is there and writes every answer that is taken.
    fn pump(&mut self) {
        // A container that writes without end to a host that reads as fast must not keep the loop here.
        for _ in 0..PUMP_ROUNDS {
            let ids: Vec<u32> = self.conns.keys().copied().collect();
            for id in ids {
                self.pump_conn(id);
            }
            // Room on a connection lets the output of containers flow again, which then has to be written.
            let stalled = self.stalled.len();
            self.serve_stalled();
            if self.stalled.len() >= stalled && !self.conns.values().any(Conn::can_write) {
                self.backlog = false;
                return;
            }
        }
        self.backlog = true;
    }

    fn pump_conn(&mut self, id: u32) {
        loop {
            let Some(conn) = self.conns.get_mut(&id) else { return };
            if conn.flush() == State::Gone {
                return self.connection_gone(id);
            }
            if let Some(blocked) = conn.blocked_changed() {
                let events = if blocked { CONN_IN_OUT } else { CONN_IN };
                let _ =
                    sys::epoll_ctl(self.epoll.raw(), libc::EPOLL_CTL_MOD, conn.fd(), events, Token::Conn(id).pack());
            }
            if conn.is_full() || self.stopping {
                return;
            }
            match conn.next_call() {
                Ok(Some(call)) => self.on_call(id, call),
                // What is no request was answered on the way.
                Ok(None) if self.conns.get(&id).is_some_and(Conn::can_write) => {}
                Ok(None) => return,
                Err(_) => return self.connection_gone(id),
            }
        }
    }

    fn serve_stalled(&mut self) {
        for (key, which) in core::mem::take(&mut self.stalled) {
            self.serve_readers(key, usize::from(which));
        }
    }

    pub fn connection(&mut self, id: u32) -> Option<&mut Conn> {
        self.conns.get_mut(&id)
    }

    pub fn send_outgoing(&mut self, conn: u32, out: Outgoing) {
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.push_outgoing(out);
        }
    }

    pub fn send_bytes(&mut self, conn: u32, bytes: Vec<u8>) {
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.push(bytes);
        }
    }

    fn connection_gone(&mut self, id: u32) {
        self.calls.forget_connection(id);
        self.forget_attachments(id);
        if self.conns.get(&id).is_some_and(|c| !c.is_port()) {
            self.conns.remove(&id);
        }
    }

    fn on_call(&mut self, conn: u32, call: Call) {
        let stream = call.stream;
        if let conn::Kind::Data { last } = call.kind {
            return self.on_piece(conn, call, last);
        }
        let request = match frame::parse_request(call.body()) {
            Ok(request) => request,
            Err(error) => return self.send(conn, stream, &Err(error)),
        };
        let patience_ns = u64::try_from(request.timeout_nano).unwrap_or(0);
        let id = match self.calls.add(Reply { conn, stream, deadline: u64::MAX }) {
            Ok(id) => id,
            Err(error) => return self.send(conn, stream, &Err(error)),
        };
        let allowed = self
            .sandbox
            .policy
            .as_ref()
            .map_or(Ok(()), |policy| policy.check(request.service, request.method, request.payload));
        let outcome = match allowed {
            Err(refused) => Err(refused),
            Ok(()) if (request.service, request.method) == (AGENT_SERVICE, "WriteStdin") => {
                self.write_stdin(id, call).map(|()| None)
            }
            Ok(()) => dispatch::handle(self, id, &request),
        };
        match outcome {
            Ok(Some(payload)) => self.answer(id, Ok(payload)),
            // Only now: asking the clock costs a call that is answered at once more than its answer.
            Ok(None) if patience_ns > 0 => {
                self.calls.set_deadline(id, sys::monotonic_ns().saturating_add(patience_ns));
            }
            Ok(None) => {}
            Err(error) => {
                log::debug(&format!("call refused: {error:?}"));
                self.answer(id, Err(error));
            }
        }
    }

    /// Answers a call, if it still waits.
    pub fn answer(&mut self, id: CallId, outcome: Result<Vec<u8>>) {
        if let Some(reply) = self.calls.take(id) {
            self.attachments.remove(&(reply.conn, reply.stream));
            self.send(reply.conn, reply.stream, &outcome);
        }
    }

    fn send(&mut self, conn: u32, stream: u32, outcome: &Result<Vec<u8>>) {
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.push(frame::answer(stream, outcome));
        }
    }

    fn expire(&mut self) {
        if self.deadline() == u64::MAX {
            return;
        }
        let now = sys::monotonic_ns();
        self.conns.values_mut().filter(|c| c.deadline() <= now).for_each(Conn::retry_read);
        for id in self.calls.expired(now) {
            let error = Error::deadline("the caller's time limit is over");
            // A process that is still being made for nobody is given up; its failure is the answer.
            let waits = |p: &Process| p.starter == Some(id) && p.phase == Phase::Building;
            match self.processes.iter().find(|(_, p)| waits(p)).map(|(key, _)| *key) {
                Some(key) => {
                    self.answer(id, Err(error.clone()));
                    self.on_failed_start(key, error);
                }
                None => self.answer(id, Err(error)),
            }
        }
    }

    /// The end of an agent that is no machine's init: its containers and its socket's name would stay behind.
    pub fn end_as_process(&mut self) {
        self.processes.values().for_each(Process::kill);
        if let Address::Unix(path) = &self.settings.address {
            if !path.starts_with('@') {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// No more requests; the loop ends when the answers are out.
    pub fn stop(&mut self) {
        self.stopping = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::Signals,
            Token::Listener,
            Token::OomWatch,
            Token::Conn(u32::MAX),
            Token::Report(1),
            Token::Stdin(2),
            Token::Output(3, 0),
            Token::Output(3, 1),
            Token::Job(7),
            Token::Debug(debug::Port::Console),
            Token::Debug(debug::Port::Log),
            Token::WatchTimer,
            Token::IdleTimer,
            Token::Socket(8),
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(0), None);
    }
}
