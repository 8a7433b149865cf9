//! The agent's state and its one loop.

use crate::cmdline::Settings;
use crate::prelude::*;
use crate::server::calls::{CallId, Calls, Reply};
use crate::server::conn::{Conn, State};
use crate::server::frame;
use crate::server::listen::{self, Channel, Kind};
use crate::sys::{self, Fd, RawFd};
use crate::{dispatch, log, rt};

/// What a descriptor in the epoll set is; the number in the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    Signals,
    Listener,
    Conn(u32),
}

impl Token {
    fn pack(self) -> u64 {
        match self {
            Token::Signals => 1 << 32,
            Token::Listener => 2 << 32,
            Token::Conn(id) => 3 << 32 | u64::from(id),
        }
    }

    fn unpack(data: u64) -> Option<Token> {
        let id = data as u32;
        Some(match data >> 32 {
            1 => Token::Signals,
            2 => Token::Listener,
            3 => Token::Conn(id),
            _ => return None,
        })
    }
}

const EDGE: u32 = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET) as u32;

/// Idle for so long, the loop gives kept memory back.
const TRIM_AFTER_MS: i32 = 200;

pub struct Agent {
    pub settings: Settings,
    pub calls: Calls,
    pub boot: crate::proto::agentext::BootTimesResponse,
    epoll: Fd,
    listener: Option<(Fd, Kind)>,
    conns: BTreeMap<u32, Conn>,
    next_id: u32,
    /// True when nothing has happened since the last trim.
    trimmed: bool,
    stopping: bool,
}

impl Agent {
    pub fn new(settings: Settings) -> Result<Agent> {
        let epoll = sys::epoll_create().context("create epoll")?;
        Ok(Agent {
            settings,
            calls: Calls::default(),
            boot: crate::proto::agentext::BootTimesResponse::default(),
            epoll,
            listener: None,
            conns: BTreeMap::new(),
            next_id: 1,
            trimmed: false,
            stopping: false,
        })
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

    /// A number not used for anything else.
    pub fn fresh_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1).max(1);
        id
    }

    pub fn watch(&self, fd: RawFd, token: Token, events: u32) -> Result<()> {
        sys::epoll_ctl(self.epoll.raw(), libc::EPOLL_CTL_ADD, fd, events, token.pack()).context("add to epoll")
    }

    fn add_conn(&mut self, conn: Conn) -> Result<u32> {
        let id = self.fresh_id();
        self.watch(conn.fd(), Token::Conn(id), EDGE)?;
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
            if n == 0 && !self.trimmed {
                rt::trim();
                self.trimmed = true;
            } else if n > 0 {
                self.trimmed = false;
            }
            for event in &events[..n] {
                if let Some(token) = Token::unpack(event.u64) {
                    self.on_event(token, event.events);
                }
            }
            self.expire();
        }
    }

    fn timeout_ms(&self) -> i32 {
        let deadline = self.calls.next_deadline();
        let idle = if self.trimmed { -1 } else { TRIM_AFTER_MS };
        if deadline == u64::MAX {
            return idle;
        }
        let left = deadline.saturating_sub(sys::monotonic_ns()).div_ceil(1_000_000).min(1 << 30) as i32;
        if idle < 0 {
            left
        } else {
            left.min(idle)
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
            Token::Signals => {}
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
        let ids: Vec<u32> = self.conns.keys().copied().collect();
        for id in ids {
            loop {
                let Some(conn) = self.conns.get_mut(&id) else { break };
                if conn.flush() == State::Gone {
                    self.connection_gone(id);
                    break;
                }
                if conn.is_full() || self.stopping {
                    break;
                }
                match conn.next_call() {
                    Ok(Some(call)) => self.on_call(id, call.stream, &call.frame),
                    Ok(None) => break,
                    Err(_) => {
                        self.connection_gone(id);
                        break;
                    }
                }
            }
        }
    }

    fn connection_gone(&mut self, id: u32) {
        self.calls.forget_connection(id);
        if self.conns.get(&id).is_some_and(|c| !c.is_port()) {
            self.conns.remove(&id);
        }
    }

    fn on_call(&mut self, conn: u32, stream: u32, body: &[u8]) {
        let request = match frame::parse_request(body) {
            Ok(request) => request,
            Err(error) => return self.send(conn, stream, &Err(error)),
        };
        let deadline = match u64::try_from(request.timeout_nano) {
            Ok(0) | Err(_) => u64::MAX,
            Ok(nanos) => sys::monotonic_ns().saturating_add(nanos),
        };
        let id = match self.calls.add(Reply { conn, stream, deadline }) {
            Ok(id) => id,
            Err(error) => return self.send(conn, stream, &Err(error)),
        };
        match dispatch::handle(self, id, &request) {
            Ok(Some(payload)) => self.answer(id, Ok(payload)),
            Ok(None) => {}
            Err(error) => {
                log::info(&format!("{}: {error:?}", request.method));
                self.answer(id, Err(error));
            }
        }
    }

    /// Answers a call, if it still waits.
    pub fn answer(&mut self, id: CallId, outcome: Result<Vec<u8>>) {
        if let Some(reply) = self.calls.take(id) {
            self.send(reply.conn, reply.stream, &outcome);
        }
    }

    fn send(&mut self, conn: u32, stream: u32, outcome: &Result<Vec<u8>>) {
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.push(frame::answer(stream, outcome));
        }
    }

    fn expire(&mut self) {
        for id in self.calls.expired(sys::monotonic_ns()) {
            self.answer(id, Err(Error::deadline("the caller's time limit is over")));
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
        for token in [Token::Signals, Token::Listener, Token::Conn(7), Token::Conn(u32::MAX)] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(0), None);
    }
}
