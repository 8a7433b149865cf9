//! The epoll set: which descriptors are watched, and what an event of each is about.

use crate::log;
use crate::prelude::*;
use crate::process::Key;
use crate::sys::{self, Fd, RawFd, SysResult};

/// A debug listener beside the agent's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugPort {
    Console,
    Log,
}

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
    /// A socket of the guest that stands for one of the host's.
    Socket(u32),
    /// A listener for a console or the log.
    Debug(DebugPort),
    /// Time to copy what has changed in watched directories.
    WatchTimer,
    /// Time to check whether the agent has become idle.
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
            Token::Debug(DebugPort::Console) => (DEBUG_TOKEN, 0),
            Token::Debug(DebugPort::Log) => (DEBUG_TOKEN, 1),
            Token::WatchTimer => (20, 0),
            Token::IdleTimer => (21, 0),
            Token::Socket(number) => (22, number),
        };
        kind << 32 | u64::from(id)
    }

    /// The token in an event; none if it is not one of ours.
    pub fn unpack(data: u64) -> Option<Token> {
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
            DEBUG_TOKEN if id == 0 => Token::Debug(DebugPort::Console),
            DEBUG_TOKEN => Token::Debug(DebugPort::Log),
            20 => Token::WatchTimer,
            21 => Token::IdleTimer,
            22 => Token::Socket(id),
            _ => return None,
        })
    }
}

const DEBUG_TOKEN: u64 = 16;

/// The epoll descriptor, and the source of the numbers in its tokens.
pub struct Poller {
    epoll: Fd,
    next_id: u32,
}

impl Poller {
    pub fn new() -> Result<Poller> {
        Ok(Poller { epoll: sys::epoll_create().context("create epoll")?, next_id: 1 })
    }

    /// A number that names nothing else.
    pub fn fresh_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1).max(1);
        id
    }

    /// Adds a descriptor; closing it removes it.
    pub fn watch(&self, fd: RawFd, token: Token, events: u32) -> Result<()> {
        sys::epoll_ctl(self.epoll.raw(), libc::EPOLL_CTL_ADD, fd, events, token.pack()).context("add to epoll")
    }

    /// Waits for other events of a descriptor that is watched already.
    pub fn change(&self, fd: RawFd, token: Token, events: u32) -> SysResult<()> {
        sys::epoll_ctl(self.epoll.raw(), libc::EPOLL_CTL_MOD, fd, events, token.pack())
    }

    /// Waits for one event of a descriptor that is watched already.
    pub fn arm(&self, fd: RawFd, token: Token, events: i32) {
        if let Err(e) = self.change(fd, token, (events | libc::EPOLLONESHOT) as u32) {
            log::error(&format!("epoll: {e}"));
        }
    }

    /// Waits; how many of `events` have been filled in. A negative time limit (milliseconds) is none.
    pub fn wait(&self, events: &mut [libc::epoll_event], timeout_ms: i32) -> SysResult<usize> {
        sys::epoll_wait(self.epoll.raw(), events, timeout_ms)
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
            Token::Debug(DebugPort::Console),
            Token::Debug(DebugPort::Log),
            Token::WatchTimer,
            Token::IdleTimer,
            Token::Socket(8),
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(0), None);
    }
}
