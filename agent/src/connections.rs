//! The host's connections, the calls that wait on them, and the streams that streaming calls are tied to.

use crate::log;
use crate::poller::{Poller, Token};
use crate::prelude::*;
use crate::process::Key;
use crate::server::calls::{CallId, Calls};
use crate::server::conn::Conn;
use crate::server::frame::{self, Outgoing};
use crate::server::listen::{self, Address, Channel, Kind};
use crate::sys::{Fd, RawFd};
use crate::trace::Trace;

/// Connections: always to read, and to write while something waits to be written.
const CONN_IN: u32 = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET) as u32;
const CONN_IN_OUT: u32 = CONN_IN | libc::EPOLLOUT as u32;

/// How long the host may take to open the channel, in milliseconds.
const OPEN_MS: u64 = 5000;

/// A streaming call, and what its data frames are about.
#[derive(Debug, Clone, Copy)]
pub struct Attachment {
    pub call: CallId,
    pub to: Target,
}

#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// Streams of a process.
    Streams(StreamTarget),
    /// The datagram socket of this number; the frames are answers.
    Datagrams(u32),
}

/// Which streams of a process a streaming call carries.
#[derive(Debug, Clone, Copy)]
pub struct StreamTarget {
    pub process: Key,
    /// Standard input, or the sending direction of a connection.
    pub input: bool,
    /// 0 stdout or the terminal, 1 stderr.
    pub output: Option<u8>,
}

pub struct Connections {
    pub poller: Poller,
    pub calls: Calls,
    pub trace: Trace,
    listener: Option<(Fd, Kind)>,
    conns: BTreeMap<u32, Conn>,
    /// Streaming calls by connection and stream number.
    attachments: BTreeMap<(u32, u32), Attachment>,
}

impl Connections {
    pub fn new() -> Result<Connections> {
        Ok(Connections {
            poller: Poller::new()?,
            calls: Calls::default(),
            trace: Trace::default(),
            listener: None,
            conns: BTreeMap::new(),
            attachments: BTreeMap::new(),
        })
    }

    // ---- their coming and going ----

    /// Opens the channel: a listener, or the one port.
    pub fn listen(&mut self, address: &Address) -> Result<()> {
        match listen::open(address, OPEN_MS)? {
            Channel::Listener(fd, kind) => {
                self.poller.watch(fd.raw(), Token::Listener, libc::EPOLLIN as u32)?;
                self.listener = Some((fd, kind));
            }
            Channel::Port(fd) => {
                self.add(Conn::new(fd, true))?;
            }
        }
        Ok(())
    }

    /// Whether the host can open further connections. There is only one over a port.
    pub fn takes_connections(&self) -> bool {
        self.listener.is_some()
    }

    /// The listener has a connection.
    pub fn accept(&mut self) {
        let Some((fd, kind)) = &self.listener else { return };
        let accepted = listen::accept(fd, *kind);
        if let Err(e) = accepted.and_then(|socket| socket.map_or(Ok(0), |socket| self.add(Conn::new(socket, false)))) {
            log::error(&e.message);
        }
    }

    /// Takes a connection in; its number.
    pub fn add(&mut self, conn: Conn) -> Result<u32> {
        let id = self.poller.fresh_id();
        self.poller.watch(conn.fd(), Token::Conn(id), CONN_IN)?;
        self.conns.insert(id, conn);
        Ok(id)
    }

    /// A connection has ended: its calls are over. Returns the processes whose streams had a streaming call on it. A
    /// port stays for the next client that opens it.
    pub fn end(&mut self, id: u32) -> Vec<Key> {
        self.calls.drop_connection(id);
        self.trace.keep(|call| self.calls.is_waiting(call));
        let process = |attachment: &Attachment| match attachment.to {
            Target::Streams(to) => Some(to.process),
            Target::Datagrams(_) => None,
        };
        let ended = self.attachments.range((id, 0)..=(id, u32::MAX)).filter_map(|(_, a)| process(a)).collect();
        self.attachments.retain(|(of, _), _| *of != id);
        if self.conns.get(&id).is_some_and(|conn| !conn.is_port()) {
            self.conns.remove(&id);
        }
        ended
    }

    // ---- reading and writing ----

    pub fn ids(&self) -> Vec<u32> {
        self.conns.keys().copied().collect()
    }

    pub fn get_mut(&mut self, id: u32) -> Option<&mut Conn> {
        self.conns.get_mut(&id)
    }

    /// Has epoll announce when a connection takes more, or no longer.
    pub fn update_events(&mut self, id: u32) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Some(blocked) = conn.blocked_changed() {
            let events = if blocked { CONN_IN_OUT } else { CONN_IN };
            let _ = self.poller.change(conn.fd(), Token::Conn(id), events);
        }
    }

    /// Whether any of them has bytes to write.
    pub fn has_output(&self) -> bool {
        self.conns.values().any(Conn::has_output)
    }

    /// Whether any of them has bytes to write and takes some.
    pub fn can_write(&self) -> bool {
        self.conns.values().any(Conn::can_write)
    }

    /// Whether a connection should not be given more output now; `bulk`: data of a streaming call.
    pub fn is_congested(&self, id: u32, bulk: bool) -> bool {
        self.conns.get(&id).is_some_and(|conn| if bulk { !conn.takes_bulk() } else { conn.is_full() })
    }

    /// Where output can be put that goes out over a connection without being copied; see [`Conn::pipe`].
    pub fn pipe(&mut self, id: u32) -> Option<RawFd> {
        self.conns.get_mut(&id).and_then(Conn::pipe)
    }

    /// The earliest time (CLOCK_MONOTONIC nanoseconds) at which a call expires or a port has to be read again;
    /// `u64::MAX` = never.
    pub fn deadline(&self) -> u64 {
        let opening = self.conns.values().map(Conn::deadline).min().unwrap_or(u64::MAX);
        self.calls.next_deadline().min(opening)
    }

    /// Has those read again whose port may have opened by `now`.
    pub fn retry_reads(&mut self, now: u64) {
        self.conns.values_mut().filter(|conn| conn.deadline() <= now).for_each(Conn::retry_read);
    }

    // ---- answers ----

    /// Answers a call, if it still waits.
    pub fn answer(&mut self, id: CallId, outcome: Result<Vec<u8>>) {
        if let Some(reply) = self.calls.take(id) {
            self.attachments.remove(&(reply.conn, reply.stream));
            self.trace.end(id);
            self.send(reply.conn, reply.stream, &outcome);
        }
    }

    /// Sends the answer to the call with this stream number.
    pub fn send(&mut self, id: u32, stream: u32, outcome: &Result<Vec<u8>>) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.push(frame::answer(stream, outcome));
        }
    }

    pub fn send_outgoing(&mut self, id: u32, out: Outgoing) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.push_outgoing(out);
        }
    }

    pub fn send_bytes(&mut self, id: u32, bytes: Vec<u8>) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.push(bytes);
        }
    }

    // ---- streaming calls ----

    /// Ties a streaming call to what its data frames are about.
    pub fn attach(&mut self, call: CallId, to: Target) {
        if let Some(reply) = self.calls.get(call) {
            self.attachments.insert((reply.conn, reply.stream), Attachment { call, to });
        }
    }

    /// What the data frames of a stream are about; none if its call is over.
    pub fn attachment(&self, id: u32, stream: u32) -> Option<Attachment> {
        self.attachments.get(&(id, stream)).copied()
    }

    /// Allows the host to send `credit` bytes more on a streaming call.
    pub fn give_credit(&mut self, call: CallId, credit: usize) {
        if let Some(reply) = self.calls.get(call) {
            self.send_bytes(reply.conn, frame::credit_frame(reply.stream, credit));
        }
    }
}
