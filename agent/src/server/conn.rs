//! A connection or a virtio-serial port: bytes in, frames out, with bounds on both.
//!
//! Descriptors are registered edge-triggered: a virtio-serial port whose host end is closed would otherwise report its
//! hang-up without end. So readiness is remembered here, and the loop pumps until the kernel returns EAGAIN.

use super::frame::{self, Head, Outgoing};
use crate::prelude::*;
use crate::sys::{self, Errno, Fd, RawFd};
use alloc::collections::VecDeque;

/// Bytes of answers waiting for the host above which no further request is read.
pub const OUT_BOUND: usize = 1 << 20;
/// The same bound for data of streaming calls, which is lower because answers of other calls wait behind it.
pub const BULK_BOUND: usize = 128 << 10;
/// Small answers are gathered in buffers of about this size.
const GATHER: usize = 8 << 10;
/// Size of the pipe before a port: 64 pages, fewer than the device's queue has descriptors.
const PIPE_SIZE: usize = 256 << 10;
/// How much is read at a time while the length of the next frame is unknown.
const READ_CHUNK: usize = 16 << 10;

/// How long a port may report that it is closed after data has come through it.
const OPENING_NS: u64 = 100_000_000;
/// The same once it has hung up again without data.
const CLOSING_NS: u64 = 10_000_000;

/// What a port's other end is doing. The driver gets data and the notice of opening or closing by different queues: the
/// first request may arrive before the notice that the host has connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Open,
    Closed,
    /// Data has come, but the port still reports no peer; that counts as closed after this time.
    Opening(u64),
}

/// What becomes of the connection after a step.
#[derive(Debug, PartialEq, Eq)]
pub enum State {
    /// Goes on; wait for the next event.
    Open,
    /// The other end is gone. A port stays open; all state of the old connection is dropped.
    Gone,
}

pub struct Conn {
    fd: Fd,
    /// A virtio-serial port: end of file is not the end.
    port: bool,
    link: Link,
    readable: bool,
    writable: bool,
    /// Whether epoll has been asked to tell when the descriptor takes more.
    waits_to_write: bool,
    input: Vec<u8>,
    out: VecDeque<Outgoing>,
    out_bytes: usize,
    /// Data on its way from a container to a port, which takes the pages as they are. One piece at a time: Linux
    /// (6.12, `port_fops_splice_write`) describes all of a pipe to the device even if only a part is asked for.
    pipe: Option<(Fd, Fd)>,
    /// The kernel does not move pages into this descriptor.
    copies: bool,
    /// The byte stream had no frame where one was expected, and that has been logged.
    desynced: bool,
}

/// What a frame of the host's is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Request,
    /// Of a streaming call; the host's last one or not.
    Data {
        last: bool,
    },
}

/// A whole frame, out of the input so that the connection is free while it is handled.
pub struct Call {
    pub stream: u32,
    pub kind: Kind,
    frame: Vec<u8>,
}

impl Call {
    pub fn body(&self) -> &[u8] {
        &self.frame[frame::HEADER..]
    }

    /// The frame's bytes behind `part`'s start, `part` being a slice of [`Call::body`] by its place and length.
    pub fn into_part(self, part: core::ops::Range<usize>) -> Chunk {
        Chunk { bytes: self.frame, range: part.start + frame::HEADER..part.end + frame::HEADER }
    }

    /// Where `part`, a slice of [`Call::body`], lies in it.
    pub fn place_of(&self, part: &[u8]) -> core::ops::Range<usize> {
        let start = (part.as_ptr() as usize).saturating_sub(self.body().as_ptr() as usize);
        start..start + part.len()
    }
}

/// Some of the bytes of a buffer that is kept whole, to save a copy.
pub struct Chunk {
    bytes: Vec<u8>,
    range: core::ops::Range<usize>,
}

impl Chunk {
    pub fn data(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

impl From<Vec<u8>> for Chunk {
    fn from(bytes: Vec<u8>) -> Chunk {
        let range = 0..bytes.len();
        Chunk { bytes, range }
    }
}

impl Conn {
    pub fn new(fd: Fd, port: bool) -> Self {
        // Readable from the start: an edge may have passed before the registration.
        Conn {
            fd,
            port,
            link: if port { Link::Closed } else { Link::Open },
            readable: true,
            writable: true,
            waits_to_write: false,
            input: Vec::new(),
            out: VecDeque::new(),
            out_bytes: 0,
            pipe: None,
            copies: !port,
            desynced: false,
        }
    }

    pub fn fd(&self) -> sys::RawFd {
        self.fd.raw()
    }

    pub fn is_port(&self) -> bool {
        self.port
    }

    /// Notes the readiness that epoll has reported.
    pub fn notice(&mut self, events: u32) {
        if events & libc::EPOLLHUP as u32 == 0 {
            self.link = Link::Open;
        } else if let (Link::Opening(until), true) = (self.link, events & libc::EPOLLIN as u32 == 0) {
            self.link = Link::Opening(until.min(sys::monotonic_ns() + CLOSING_NS));
        }
        self.readable |= events & (libc::EPOLLIN | libc::EPOLLHUP | libc::EPOLLERR | libc::EPOLLRDHUP) as u32 != 0;
        self.writable |= events & (libc::EPOLLOUT | libc::EPOLLERR) as u32 != 0;
    }

    /// True when answers have piled up: neither new requests nor more output of containers now.
    pub fn is_full(&self) -> bool {
        self.out_bytes >= OUT_BOUND
    }

    /// Whether more data of streaming calls may be queued now.
    pub fn takes_bulk(&self) -> bool {
        self.out_bytes < BULK_BOUND
    }

    /// Where data can be put that is sent without a copy; to be followed by [`Conn::push_outgoing`] of what tells its
    /// length. `None` if that is not possible now, or never.
    pub fn pipe(&mut self) -> Option<RawFd> {
        if self.copies || self.out.iter().any(|out| out.piped > 0) {
            return None;
        }
        if self.pipe.is_none() {
            let (from, to) = sys::pipe(libc::O_NONBLOCK).ok()?;
            sys::fcntl(to.raw(), libc::F_SETPIPE_SZ, PIPE_SIZE).ok()?;
            self.pipe = Some((from, to));
        }
        self.pipe.as_ref().map(|(_, to)| to.raw())
    }

    /// Whether [`Conn::flush`] has something to write and the descriptor takes it.
    pub fn can_write(&self) -> bool {
        self.writable && self.has_output()
    }

    /// The next whole frame, read from the descriptor as needed. `Ok(None)`: nothing more for now.
    pub fn next_call(&mut self) -> core::result::Result<Option<Call>, State> {
        loop {
            match frame::head(&self.input) {
                Head::Request { stream, total } => {
                    self.desynced = false;
                    return Ok(Some(Call { stream, kind: Kind::Request, frame: self.take_frame(total) }));
                }
                Head::Data { stream, total, last } => {
                    self.desynced = false;
                    return Ok(Some(Call { stream, kind: Kind::Data { last }, frame: self.take_frame(total) }));
                }
                Head::Other { stream, total } => {
                    self.take_frame(total);
                    let error = Error::unimplemented("only requests and their streams are understood");
                    self.push(frame::answer(stream, &Err(error)));
                }
                Head::Garbage(why) => self.resync(why)?,
                Head::Partial(wanted) => {
                    if !self.readable || self.is_full() {
                        return Ok(None);
                    }
                    self.fill(wanted)?;
                }
            }
        }
    }

    /// Removes the first frame from the input.
    fn take_frame(&mut self, total: usize) -> Vec<u8> {
        if self.input.len() == total {
            // The usual case, and the one that matters for big frames: no copy, no memory kept.
            return core::mem::take(&mut self.input);
        }
        let frame = self.input[..total].to_vec();
        self.input.drain(..total);
        frame
    }

    fn fill(&mut self, wanted: usize) -> core::result::Result<(), State> {
        let missing = wanted - self.input.len();
        // Exactly to the end of a known frame, so that it can be handed on whole; otherwise a bit ahead.
        let room = if wanted > frame::HEADER { missing } else { READ_CHUNK };
        match sys::read_append(self.fd.raw(), &mut self.input, room) {
            Ok(0) => return self.on_eof(),
            Ok(_) => {
                if self.link != Link::Open {
                    self.link = Link::Opening(sys::monotonic_ns() + OPENING_NS);
                }
            }
            Err(Errno(libc::EAGAIN)) => {
                self.link = Link::Open;
                self.readable = false;
                if self.input.is_empty() {
                    self.input = Vec::new();
                }
            }
            Err(_) => return Err(self.end()),
        }
        Ok(())
    }

    /// End of file: of a connection that was open it is the end.
    fn on_eof(&mut self) -> core::result::Result<(), State> {
        match self.link {
            Link::Open => Err(self.end()),
            Link::Opening(until) if sys::monotonic_ns() >= until => Err(self.end()),
            Link::Opening(_) | Link::Closed => {
                self.readable = false;
                Ok(())
            }
        }
    }

    /// When to look again whether a port has opened; `u64::MAX` = no need.
    pub fn deadline(&self) -> u64 {
        match self.link {
            Link::Opening(until) => until,
            _ => u64::MAX,
        }
    }

    /// The deadline has passed.
    pub fn retry_read(&mut self) {
        self.readable = true;
    }

    /// The other end is gone: forgets half frames both ways.
    fn end(&mut self) -> State {
        self.link = Link::Closed;
        self.readable = false;
        self.input = Vec::new();
        self.out.clear();
        self.out_bytes = 0;
        self.pipe = None;
        State::Gone
    }

    fn resync(&mut self, why: &'static str) -> core::result::Result<(), State> {
        if !self.desynced {
            crate::log::error(&format!("channel: {why}"));
            self.desynced = true;
        }
        if !self.port {
            return Err(self.end());
        }
        // After a reconnect, bytes of the former connection may come first: search for the next bytes that can be a
        // header.
        let next = (1..self.input.len())
            .find(|at| !matches!(frame::head(&self.input[*at..]), Head::Garbage(_)))
            .unwrap_or(self.input.len());
        self.input.drain(..next);
        Ok(())
    }

    /// Queues bytes; [`Conn::flush`] sends them.
    pub fn push(&mut self, bytes: Vec<u8>) {
        self.out_bytes += bytes.len();
        if let Some(last) = self.out.back_mut() {
            if last.piped == 0 && last.bytes.len() + bytes.len() <= GATHER {
                last.bytes.extend_from_slice(&bytes);
                return;
            }
        }
        self.out.push_back(Outgoing { bytes, start: 0, piped: 0 });
    }

    pub fn push_outgoing(&mut self, out: Outgoing) {
        self.out_bytes += out.bytes.len() - out.start + out.piped;
        self.out.push_back(out);
    }

    /// Writes what the kernel takes.
    pub fn flush(&mut self) -> State {
        while self.writable {
            let Some(first) = self.out.front_mut() else {
                return State::Open;
            };
            let rest = &first.bytes[first.start..];
            let moved = match &self.pipe {
                Some((from, _)) if rest.is_empty() => sys::splice(from.raw(), self.fd.raw(), first.piped),
                _ => sys::write(self.fd.raw(), rest),
            };
            match moved {
                Ok(0) => return self.end(),
                Ok(n) => {
                    self.link = Link::Open;
                    self.out_bytes -= n;
                    if first.start < first.bytes.len() {
                        first.start += n;
                    } else {
                        first.piped -= n;
                    }
                    if first.start == first.bytes.len() && first.piped == 0 {
                        self.out.pop_front();
                        if self.out.is_empty() {
                            self.out = VecDeque::new();
                        }
                    }
                }
                Err(Errno(libc::EAGAIN)) => self.writable = false,
                Err(_) if self.copy_piped() => {}
                Err(_) => return self.end(),
            }
        }
        State::Open
    }

    /// After the kernel has refused to move pages (no memory to describe them): copies the data in the pipe instead,
    /// from now on. False if the failed write was not about the pipe.
    fn copy_piped(&mut self) -> bool {
        let (Some((from, _)), Some(first)) = (&self.pipe, self.out.front_mut()) else { return false };
        if first.start < first.bytes.len() || first.piped == 0 {
            return false;
        }
        self.copies = true;
        let mut bytes = Vec::new();
        while bytes.len() < first.piped {
            let missing = first.piped - bytes.len();
            if !sys::read_append(from.raw(), &mut bytes, missing).is_ok_and(|n| n > 0) {
                return false;
            }
        }
        *first = Outgoing { bytes, start: 0, piped: 0 };
        true
    }

    /// Whether events about writing are wanted, when that is different from the last time.
    pub fn blocked_changed(&mut self) -> Option<bool> {
        // A port shows that it has opened by becoming writable.
        let blocked = !self.writable && self.has_output() || matches!(self.link, Link::Opening(_));
        let changed = blocked != self.waits_to_write;
        self.waits_to_write = blocked;
        changed.then_some(blocked)
    }

    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::codec::Message;
    use crate::proto::ttrpc;

    fn pair() -> (Conn, Fd) {
        let (ours, theirs) = sys::socketpair(libc::SOCK_STREAM | libc::SOCK_NONBLOCK).unwrap();
        (Conn::new(ours, true), theirs)
    }

    fn frame(stream: u32, payload: usize) -> Vec<u8> {
        let request =
            ttrpc::Request { service: "s".into(), method: "m".into(), payload: vec![7; payload], ..Default::default() };
        let body = request.to_vec();
        let mut out = (body.len() as u32).to_be_bytes().to_vec();
        out.extend(stream.to_be_bytes());
        out.extend([1, 0]);
        out.extend(body);
        out
    }

    #[test]
    fn requests_come_whole_however_they_are_cut() {
        let (mut conn, host) = pair();
        let mut bytes = frame(1, 10);
        bytes.extend(frame(3, 40_000));
        bytes.extend(frame(5, 0));
        let mut got = vec![];
        for piece in bytes.chunks(997) {
            sys::write_all(host.raw(), piece).unwrap();
            conn.notice(libc::EPOLLIN as u32);
            while let Ok(Some(call)) = conn.next_call() {
                let request = frame::parse_request(call.body()).unwrap();
                got.push((call.stream, request.payload.len()));
            }
        }
        assert_eq!(got, [(1, 10), (3, 40_000), (5, 0)]);
    }

    #[test]
    fn a_port_finds_its_step_again_and_survives_the_end() {
        let (mut conn, host) = pair();
        let mut bytes = vec![0xff; 33];
        bytes.extend(frame(9, 5));
        sys::write_all(host.raw(), &bytes).unwrap();
        assert_eq!(conn.next_call().ok().flatten().map(|c| c.stream), Some(9));
        conn.notice(libc::EPOLLOUT as u32);
        drop(host);
        conn.notice(libc::EPOLLHUP as u32);
        assert_eq!(conn.next_call().err(), Some(State::Gone));
        assert!(conn.next_call().is_ok_and(|c| c.is_none()));
    }

    #[test]
    fn data_may_come_before_the_news_of_its_connection() {
        // A socket whose writer is gone looks like a port with data whose other end is not there (yet).
        let (mut conn, host) = pair();
        sys::write_all(host.raw(), &frame(1, 1)).unwrap();
        drop(host);
        assert!(conn.next_call().is_ok_and(|c| c.is_some()));
        conn.push(vec![1]);
        assert!(conn.next_call().is_ok_and(|c| c.is_none()));
        assert!(conn.has_output() && conn.deadline() < u64::MAX);
        conn.link = Link::Opening(0);
        conn.retry_read();
        assert_eq!(conn.next_call().err(), Some(State::Gone));
        assert!(!conn.has_output() && conn.deadline() == u64::MAX);
    }

    #[test]
    fn a_connection_with_an_impossible_frame_is_given_up() {
        let (ours, host) = sys::socketpair(libc::SOCK_STREAM | libc::SOCK_NONBLOCK).unwrap();
        let mut conn = Conn::new(ours, false);
        sys::write_all(host.raw(), &[0xff; 20]).unwrap();
        assert_eq!(conn.next_call().err(), Some(State::Gone));
    }

    fn next_frame(host: &Fd) -> Vec<u8> {
        let mut frame = vec![0; frame::HEADER];
        assert_eq!(sys::read(host.raw(), &mut frame), Ok(frame::HEADER));
        let rest = u32::from_be_bytes([frame[0], frame[1], frame[2], frame[3]]) as usize;
        while frame.len() < frame::HEADER + rest {
            let missing = frame::HEADER + rest - frame.len();
            assert!(sys::read_append(host.raw(), &mut frame, missing).is_ok_and(|n| n > 0));
        }
        frame
    }

    #[test]
    fn data_goes_through_the_pipe_in_its_place() {
        let (mut conn, host) = pair();
        for round in 0..3u8 {
            // The last time nothing can be written: the connection is gone.
            if round == 2 {
                conn.fd = sys::open("/dev/null", libc::O_RDONLY, 0).unwrap();
            }
            conn.push(frame::credit_frame(5, 7));
            let pipe = conn.pipe().unwrap();
            sys::write_all(pipe, &[round; 10_000]).unwrap();
            conn.push_outgoing(frame::data_frame_before(3, 10_000));
            assert!(conn.pipe().is_none() && conn.out_bytes > 10_000);
            conn.push(frame::credit_frame(5, 9));
            if round == 2 {
                assert_eq!(conn.flush(), State::Gone);
                assert!(!conn.has_output() && conn.out_bytes == 0);
                return;
            }
            assert_eq!(conn.flush(), State::Open);
            assert!(!conn.has_output() && conn.out_bytes == 0);
            assert_eq!(next_frame(&host), frame::credit_frame(5, 7));
            let data = next_frame(&host);
            assert_eq!(frame::parse_piece(&data[frame::HEADER..]).unwrap().data, [round; 10_000]);
            assert_eq!(next_frame(&host), frame::credit_frame(5, 9));
        }
    }

    #[test]
    fn what_cannot_be_moved_is_copied() {
        let (mut conn, host) = pair();
        let pipe = conn.pipe().unwrap();
        sys::write_all(pipe, &[7; 10_000]).unwrap();
        conn.push_outgoing(frame::data_frame_before(3, 10_000));
        // As if the head were out and the kernel had refused.
        let first = conn.out.front_mut().unwrap();
        let head = first.bytes.split_off(first.start);
        first.start = first.bytes.len();
        conn.out_bytes -= head.len();
        assert!(conn.copy_piped());
        assert!(conn.pipe().is_none());
        assert_eq!(conn.flush(), State::Open);
        assert_eq!(conn.out_bytes, 0);
        let mut got = vec![0; 20_000];
        assert_eq!(sys::read(host.raw(), &mut got), Ok(10_000));
        assert!(got[..10_000].iter().all(|byte| *byte == 7));
        assert!(!conn.copy_piped());
    }

    #[test]
    fn a_slow_reader_stops_the_reading_of_requests() {
        let (mut conn, host) = pair();
        conn.push(vec![1; 3 << 20]);
        assert_eq!(conn.flush(), State::Open);
        assert!(conn.has_output() && conn.is_full());
        sys::write_all(host.raw(), &frame(1, 1)).unwrap();
        conn.notice(libc::EPOLLIN as u32);
        assert!(conn.next_call().is_ok_and(|c| c.is_none()));
        let mut total = 0;
        let mut buf = vec![0; 1 << 20];
        while total < 3 << 20 {
            if let Ok(n) = sys::read(host.raw(), &mut buf) {
                total += n;
            } else {
                conn.notice(libc::EPOLLOUT as u32);
                conn.flush();
            }
        }
        assert!(conn.next_call().is_ok_and(|c| c.is_some()));
    }
}
