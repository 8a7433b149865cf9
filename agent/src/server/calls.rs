//! Calls that wait for their answer.

use crate::prelude::*;

/// Names one call for as long as it waits.
pub type CallId = u32;

/// The most calls of one connection that may wait at a time.
pub const MAX_WAITING: usize = 1024;

/// Where an answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    pub conn: u32,
    pub stream: u32,
    /// CLOCK_MONOTONIC nanoseconds; `u64::MAX` = never.
    pub deadline: u64,
}

/// All calls that wait. Code that answers later holds the id only: a call that is over (deadline, connection gone) is
/// no longer in here.
#[derive(Default)]
pub struct Calls {
    waiting: BTreeMap<CallId, Reply>,
    next: CallId,
}

impl Calls {
    /// Takes a call in; too many of one connection are refused.
    pub fn add(&mut self, reply: Reply) -> Result<CallId> {
        if self.waiting.values().filter(|w| w.conn == reply.conn).count() >= MAX_WAITING {
            return Err(Error::exhausted(format!("{MAX_WAITING} calls are waiting on this connection already")));
        }
        // Ids are not reused while their call waits.
        while self.waiting.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.waiting.insert(id, reply);
        Ok(id)
    }

    /// Sets until when the caller waits, for a call that was not answered at once.
    pub fn set_deadline(&mut self, id: CallId, deadline: u64) {
        if let Some(reply) = self.waiting.get_mut(&id) {
            reply.deadline = deadline;
        }
    }

    pub fn is_waiting(&self, id: CallId) -> bool {
        self.waiting.contains_key(&id)
    }

    pub fn get(&self, id: CallId) -> Option<Reply> {
        self.waiting.get(&id).copied()
    }

    /// The call is about to be answered.
    pub fn take(&mut self, id: CallId) -> Option<Reply> {
        self.waiting.remove(&id)
    }

    /// Drops all calls of a connection that has ended.
    pub fn drop_connection(&mut self, conn: u32) {
        self.waiting.retain(|_, w| w.conn != conn);
    }

    pub fn next_deadline(&self) -> u64 {
        self.waiting.values().map(|w| w.deadline).min().unwrap_or(u64::MAX)
    }

    /// The calls whose time is over.
    pub fn expired(&self, now: u64) -> Vec<CallId> {
        self.waiting.iter().filter(|(_, w)| w.deadline <= now).map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_wait_expire_and_go_with_their_connection() {
        let mut calls = Calls::default();
        let a = calls.add(Reply { conn: 1, stream: 1, deadline: 50 }).unwrap();
        let b = calls.add(Reply { conn: 2, stream: 1, deadline: 70 }).unwrap();
        calls.set_deadline(b, u64::MAX);
        calls.set_deadline(77, 1);
        assert_eq!(calls.next_deadline(), 50);
        assert_eq!(calls.expired(49), []);
        assert_eq!(calls.expired(50), [a]);
        assert_eq!(calls.take(a).map(|r| r.conn), Some(1));
        assert!(calls.take(a).is_none() && calls.is_waiting(b));
        calls.drop_connection(2);
        assert!(!calls.is_waiting(b));
        for stream in 0..MAX_WAITING as u32 {
            calls.add(Reply { conn: 3, stream, deadline: u64::MAX }).unwrap();
        }
        assert!(calls.add(Reply { conn: 3, stream: 9999, deadline: u64::MAX }).is_err());
        assert!(calls.add(Reply { conn: 4, stream: 1, deadline: u64::MAX }).is_ok());
    }
}
