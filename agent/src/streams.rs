//! The agent's ends of a process's standard streams, and the calls that wait on them.
//!
//! This module knows neither connections nor epoll: descriptors are non-blocking, edge-triggered readiness is
//! remembered in flags, and answers are returned as values.

use crate::prelude::*;
use crate::runtime::console;
use crate::server::calls::CallId;
use crate::server::conn::Chunk;
use crate::server::frame::DATA_OFFSET;
use crate::sys::{self, Errno, Fd, RawFd};
use alloc::collections::VecDeque;

/// The most that one read answers.
pub const MAX_READ: usize = 1 << 20;
/// Standard input that may wait in the agent, per process. The host keeps one write in flight per process; more than
/// this is a host that does not wait for its answers.
const MAX_WAITING_INPUT: usize = 16 << 20;
/// How many bytes of input a streaming call may have in flight.
pub const INPUT_WINDOW: usize = 1 << 20;
/// The most bytes in one data frame of a streaming call; as many as a pipe holds. Long frames cost the least, but other
/// answers wait behind them.
const MAX_PIECE: usize = 256 << 10;
/// Fewer bytes are copied instead of spliced: splicing takes two more system calls.
const MIN_MOVED: usize = 16 << 10;
const FIONREAD: u64 = 0x541b;

/// An output stream: stdout, stderr, or the terminal.
#[derive(Default)]
pub struct Output {
    fd: Option<Fd>,
    terminal: bool,
    readable: bool,
    /// The last read returned much data: splicing may pay off.
    splice_worthwhile: bool,
    /// Once the process has been reaped: bytes left of what the pipe held when the process exited.
    left: Option<usize>,
    /// The last read has failed; on a connection: the peer has reset it.
    failed: bool,
    readers: VecDeque<(CallId, usize)>,
    /// The streaming call that gets the output that no read call asks for, and its remaining credit in bytes.
    attached: Option<(CallId, usize)>,
}

/// The call that gets the next output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextReader {
    pub call: CallId,
    /// How many bytes it may get; 0 = only the end of the stream.
    pub len: usize,
    /// A streaming call, which stays.
    pub streaming: bool,
}

/// The result of reading an output stream.
pub enum Read {
    /// Data behind [`DATA_OFFSET`] bytes of room; none behind it = end of file.
    Data(Vec<u8>),
    /// Nothing yet.
    Wait,
}

impl Output {
    pub fn new(fd: Fd, terminal: bool) -> Output {
        Output { fd: Some(fd), terminal, readable: true, ..Default::default() }
    }

    pub fn raw(&self) -> Option<RawFd> {
        self.fd.as_ref().map(Fd::raw)
    }

    pub fn notice(&mut self) {
        self.readable = true;
    }

    pub fn add_reader(&mut self, call: CallId, len: usize) {
        self.readers.push_back((call, len));
    }

    /// Takes over the calls that have waited since before the stream existed.
    pub fn take_readers_of(&mut self, other: Output) {
        self.readers = other.readers;
        self.attached = other.attached;
    }

    /// The streaming call that has the stream, if any.
    pub fn attached(&self) -> Option<CallId> {
        self.attached.map(|(call, _)| call)
    }

    pub fn attach(&mut self, call: CallId, credit: usize) {
        self.attached = Some((call, credit));
    }

    /// Gives the streaming call `more` bytes of credit.
    pub fn grant(&mut self, more: usize) {
        if let Some((_, credit)) = &mut self.attached {
            *credit = credit.saturating_add(more);
        }
    }

    /// The call that is served next: read calls come before the streaming call.
    pub fn next_reader(&self) -> Option<NextReader> {
        let reader = self.readers.front().map(|(call, len)| NextReader { call: *call, len: *len, streaming: false });
        let attached =
            self.attached.map(|(call, credit)| NextReader { call, len: credit.min(MAX_PIECE), streaming: true });
        reader.or(attached)
    }

    /// It has been served: it was given `taken` bytes, or is no longer there.
    pub fn finish_served(&mut self, next_reader: NextReader, taken: Option<usize>) {
        if !next_reader.streaming {
            self.readers.pop_front();
            if self.readers.is_empty() {
                self.readers = VecDeque::new();
            }
            return;
        }
        match (taken, &mut self.attached) {
            (Some(taken), Some((_, credit))) => *credit -= taken.min(*credit),
            _ => self.attached = None,
        }
    }

    /// Whether the stream is known to be at its end, without reading.
    pub fn at_end(&self) -> bool {
        self.fd.is_none() || self.left == Some(0)
    }

    /// Whether no more output can come and no call waits.
    pub fn is_over(&self) -> bool {
        self.at_end() && self.readers.is_empty() && self.attached.is_none()
    }

    /// Whether the end came as an error.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Whether [`Output::read`] is worth calling.
    pub fn has_news(&self) -> bool {
        self.fd.is_none() || self.readable || self.left.is_some()
    }

    /// Reads up to `len` bytes without blocking.
    pub fn read(&mut self, len: usize) -> Read {
        let mut buffer = Vec::new();
        let Some(fd) = self.raw() else {
            buffer.resize(DATA_OFFSET, 0);
            return Read::Data(buffer);
        };
        let mut want = len.clamp(1, MAX_READ);
        if let Some(left) = self.left {
            want = want.min(left);
        }
        if want > 0 {
            // Allocate as much as is there to read, not as much as the caller would accept.
            want = want.min(available(fd).max(512));
            buffer.reserve(DATA_OFFSET + want);
            buffer.resize(DATA_OFFSET, 0);
            match sys::read_append(fd, &mut buffer, want) {
                Ok(n) if n > 0 => {
                    self.splice_worthwhile = n >= MIN_MOVED && !self.terminal;
                    if let Some(left) = self.left.filter(|_| !self.terminal) {
                        self.left = Some(left - n.min(left));
                    }
                    return Read::Data(buffer);
                }
                Err(Errno(libc::EAGAIN)) if self.left.is_none() => {
                    self.readable = false;
                    return Read::Wait;
                }
                Ok(_) => {}
                // A terminal reports its end by EIO.
                Err(_) => self.failed = true,
            }
        } else {
            buffer.resize(DATA_OFFSET, 0);
        }
        self.fd = None;
        Read::Data(buffer)
    }

    /// Whether [`Output::move_into`] is worth calling.
    pub fn is_splice_worthwhile(&self) -> bool {
        self.splice_worthwhile
    }

    /// Moves what is there, up to `len` bytes, into the pipe `to` without copying it. `None`, and nothing is moved, if
    /// there is too little or it is not a pipe.
    pub fn move_into(&mut self, len: usize, to: RawFd) -> Option<usize> {
        let fd = self.raw()?;
        let want = len.min(available(fd)).min(self.left.unwrap_or(usize::MAX));
        let moved = if want < MIN_MOVED { 0 } else { sys::splice(fd, to, want).unwrap_or(0) };
        self.splice_worthwhile = moved > 0;
        if let Some(left) = &mut self.left {
            *left -= moved;
        }
        self.splice_worthwhile.then_some(moved)
    }

    /// The process is gone: only what the pipe holds now will be delivered, even if other processes still hold its
    /// write end.
    pub fn drain(&mut self) {
        if let Some(fd) = self.raw() {
            // A terminal returns all that was written to it before it reports EAGAIN or EIO.
            self.left = Some(if self.terminal { usize::MAX } else { available(fd) });
        }
    }

    /// Closes the stream; returns the calls that waited for it.
    pub fn close(&mut self) -> Vec<CallId> {
        self.fd = None;
        let attached = self.attached.take().map(|(call, _)| call);
        core::mem::take(&mut self.readers).into_iter().map(|(call, _)| call).chain(attached).collect()
    }
}

fn available(fd: RawFd) -> usize {
    let mut count = 0i32;
    match sys::ioctl(fd, FIONREAD, &raw mut count as usize) {
        Ok(_) => usize::try_from(count).unwrap_or(0),
        Err(_) => 0,
    }
}

struct Write {
    /// `None` for data of the streaming call.
    call: Option<CallId>,
    data: Chunk,
    done: usize,
}

/// A streaming call that feeds an input.
struct InputStream {
    call: CallId,
    /// Bytes taken by the process, for which the host has not got new credit yet.
    unacked: usize,
    /// Bytes in the queue.
    queued: usize,
}

/// Standard input: a pipe or the terminal; or the sending direction of a connection.
#[derive(Default)]
pub struct Input {
    fd: Option<Fd>,
    terminal: bool,
    /// A connection: its streaming call goes on after this direction has ended, for the other one.
    connection: bool,
    queue: VecDeque<Write>,
    closing: bool,
    /// Why nothing more is taken.
    broken: Option<&'static str>,
    stream: Option<InputStream>,
}

/// A finished write: the call, and how many bytes were taken or why not. For a streaming call it is its end (0 bytes:
/// standard input was closed as requested).
pub type Written = (CallId, Result<u32>);

impl Input {
    pub fn new(fd: Fd, terminal: bool) -> Input {
        Input { fd: Some(fd), terminal, ..Default::default() }
    }

    /// The sending direction of a connection.
    pub fn of_connection(fd: Fd) -> Input {
        Input { fd: Some(fd), connection: true, ..Default::default() }
    }

    pub fn raw(&self) -> Option<RawFd> {
        self.fd.as_ref().map(Fd::raw)
    }

    /// Takes data in; it is answered by [`Input::pump`] when all of it is in the pipe.
    pub fn write(&mut self, call: CallId, data: Chunk) -> Result<()> {
        self.check_open()?;
        let waiting: usize = self.queue.iter().map(|w| w.data.data().len()).sum();
        if waiting > 0 && waiting + data.data().len() > MAX_WAITING_INPUT {
            return Err(Error::exhausted(format!("{waiting} bytes of standard input are waiting already")));
        }
        self.queue.push_back(Write { call: Some(call), data, done: 0 });
        Ok(())
    }

    fn check_open(&self) -> Result<()> {
        if let Some(why) = self.broken {
            return Err(Error::precondition(format!("standard input: {why}")));
        }
        if self.closing || self.fd.is_none() {
            return Err(Error::precondition("standard input is closed"));
        }
        Ok(())
    }

    /// The streaming call that feeds it, if any.
    pub fn attached(&self) -> Option<CallId> {
        self.stream.as_ref().map(|stream| stream.call)
    }

    /// Lets a streaming call feed it; the former one's data stays in the queue.
    pub fn attach(&mut self, call: CallId) -> Result<()> {
        self.check_open()?;
        self.stream = Some(InputStream { call, unacked: 0, queued: 0 });
        Ok(())
    }

    /// Takes in data of the streaming call.
    pub fn feed(&mut self, data: Chunk) -> Result<()> {
        let len = data.data().len();
        if let (true, Some(_), Some(stream)) = (self.connection, self.broken, &mut self.stream) {
            // Discarded: nothing reads it any more. The host learns of the end in the other direction, after the data
            // from there.
            stream.unacked += len;
            return Ok(());
        }
        self.check_open()?;
        match &mut self.stream {
            Some(stream) if stream.queued + stream.unacked + len <= INPUT_WINDOW => stream.queued += len,
            _ => return Err(Error::exhausted("more standard input than there was credit for")),
        }
        self.queue.push_back(Write { call: None, data, done: 0 });
        Ok(())
    }

    /// Returns credit for the streaming call once half the window has been consumed, to batch updates.
    pub fn take_credit(&mut self) -> Option<(CallId, usize)> {
        let stream = self.stream.as_mut().filter(|stream| stream.unacked >= INPUT_WINDOW / 2)?;
        Some((stream.call, core::mem::take(&mut stream.unacked)))
    }

    /// Closes the input once the queued data has been written.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Writes as much as the descriptor takes; returns the writes that are finished.
    pub fn pump(&mut self) -> Vec<Written> {
        let mut over = vec![];
        while let (Some(fd), Some(first)) = (self.raw(), self.queue.front_mut()) {
            let rest = &first.data.data()[first.done..];
            match if rest.is_empty() { Ok(0) } else { sys::write(fd, rest) } {
                Ok(n) => {
                    first.done += n;
                    let (call, done, whole) = (first.call, first.done, first.done == first.data.data().len());
                    if let (None, Some(stream)) = (call, &mut self.stream) {
                        // What a former stream has left in the queue is not counted.
                        let n = n.min(stream.queued);
                        stream.queued -= n;
                        stream.unacked += n;
                    }
                    if whole {
                        over.extend(call.map(|call| (call, Ok(done as u32))));
                        self.queue.pop_front();
                    }
                }
                Err(Errno(libc::EAGAIN)) => return over,
                Err(_) => {
                    over.extend(self.fail("broken pipe"));
                    return over;
                }
            }
        }
        if self.closing && self.queue.is_empty() && self.fd.is_some() {
            self.finish();
            if !self.connection {
                over.extend(self.stream.take().map(|stream| (stream.call, Ok(0))));
            }
        }
        over
    }

    /// The descriptor, if something waits for it to take more.
    pub fn blocked(&self) -> Option<RawFd> {
        self.raw().filter(|_| !self.queue.is_empty())
    }

    fn finish(&mut self) {
        match self.raw() {
            // A terminal has no end that could be closed without hanging up on the process: its user would press the
            // key for end of file.
            Some(fd) if self.terminal => {
                if let Some(character) = console::end_of_file(fd) {
                    let _ = sys::write(fd, &[character]);
                }
                self.broken = Some("closed");
            }
            Some(fd) if self.connection => {
                // The other direction has a descriptor of its own. Failure means that the peer has gone, and is
                // ignored.
                let _ = sys::shutdown(fd, libc::SHUT_WR);
                self.fd = None;
            }
            _ => self.fd = None,
        }
    }

    /// Discards the queue because nothing will read it any more; returns the calls that fail with `why`.
    pub fn fail(&mut self, why: &'static str) -> Vec<Written> {
        self.broken = Some(why);
        self.fd = None;
        let queue = core::mem::take(&mut self.queue);
        if let (true, Some(stream)) = (self.connection, &mut self.stream) {
            stream.unacked += core::mem::take(&mut stream.queued);
            return vec![];
        }
        queue
            .into_iter()
            .filter_map(|w| w.call)
            .chain(self.stream.take().map(|stream| stream.call))
            .map(|call| (call, Err(Error::precondition(format!("standard input: {why}")))))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> (Output, Fd) {
        let (read_end, write_end) = sys::pipe(0).unwrap();
        sys::set_nonblocking(read_end.raw(), true).unwrap();
        (Output::new(read_end, false), write_end)
    }

    fn text(read: Read) -> Option<String> {
        match read {
            Read::Data(buffer) => Some(String::from_utf8_lossy(&buffer[DATA_OFFSET..]).into_owned()),
            Read::Wait => None,
        }
    }

    #[test]
    fn output_comes_as_it_is_there_and_ends_with_the_writer() {
        let (mut out, writer) = output();
        assert_eq!(text(out.read(100)), None);
        assert!(!out.has_news());
        sys::write_all(writer.raw(), b"hello").unwrap();
        out.notice();
        assert_eq!(text(out.read(2)).as_deref(), Some("he"));
        assert_eq!(text(out.read(0)).as_deref(), Some("l"));
        drop(writer);
        assert_eq!(text(out.read(100)).as_deref(), Some("lo"));
        assert_eq!(text(out.read(100)).as_deref(), Some(""));
        assert_eq!(text(out.read(100)).as_deref(), Some(""));
    }

    #[test]
    fn much_output_is_moved_and_little_is_not() {
        let (mut out, writer) = output();
        let (from, to) = sys::pipe(libc::O_NONBLOCK).unwrap();
        sys::write_all(writer.raw(), &vec![b'x'; 40_000]).unwrap();
        assert!(!out.is_splice_worthwhile());
        assert_eq!(text(out.read(20_000)).map(|t| t.len()), Some(20_000));
        assert!(out.is_splice_worthwhile());
        assert_eq!(out.move_into(17_000, to.raw()), Some(17_000));
        assert_eq!(out.move_into(17_000, to.raw()), None);
        assert!(!out.is_splice_worthwhile());
        assert_eq!(text(out.read(9000)).map(|t| t.len()), Some(3000));
        // This also holds for output that is left after the process's end, and no more than that.
        sys::write_all(writer.raw(), &vec![b'y'; 20_000]).unwrap();
        out.drain();
        sys::write_all(writer.raw(), &vec![b'z'; 20_000]).unwrap();
        assert_eq!(out.move_into(1 << 20, to.raw()), Some(20_000));
        assert!(out.at_end());
        assert_eq!(text(out.read(9)).as_deref(), Some(""));
        let mut moved = vec![0; 40_000];
        assert_eq!(sys::read(from.raw(), &mut moved), Ok(37_000));
        assert!(moved[..17_000].iter().all(|b| *b == b'x') && moved[17_000..37_000].iter().all(|b| *b == b'y'));
    }

    #[test]
    fn after_the_process_only_what_was_in_the_pipe_counts() {
        let (mut out, writer) = output();
        sys::write_all(writer.raw(), &[b'x'; 1000]).unwrap();
        out.drain();
        sys::write_all(writer.raw(), b"from a daemon").unwrap();
        assert_eq!(text(out.read(600)).map(|t| t.len()), Some(600));
        assert_eq!(text(out.read(600)).map(|t| t.len()), Some(400));
        assert_eq!(text(out.read(600)).as_deref(), Some(""));
        let (mut out, _writer) = output();
        out.drain();
        assert_eq!(text(out.read(600)).as_deref(), Some(""));
    }

    #[test]
    fn input_is_answered_when_it_is_in_the_pipe_and_closed_behind_it() {
        let (read_end, write_end) = sys::pipe(0).unwrap();
        sys::set_nonblocking(write_end.raw(), true).unwrap();
        let mut input = Input::new(write_end, false);
        input.write(1, vec![7; 200_000].into()).unwrap();
        input.write(2, vec![].into()).unwrap();
        input.close();
        assert!(input.write(3, vec![1].into()).is_err());
        assert_eq!(input.pump(), []);
        let mut total = 0;
        let mut over = vec![];
        let mut buf = vec![0; 65536];
        loop {
            let n = sys::read(read_end.raw(), &mut buf).unwrap();
            if n == 0 {
                break;
            }
            total += n;
            over.extend(input.pump());
        }
        assert_eq!((total, over), (200_000, vec![(1, Ok(200_000)), (2, Ok(0))]));
    }

    #[test]
    fn a_reader_that_is_gone_is_an_error() {
        let (read_end, write_end) = sys::pipe(0).unwrap();
        sys::ignore_signal(libc::SIGPIPE);
        let mut input = Input::new(write_end, false);
        drop(read_end);
        input.write(1, vec![7].into()).unwrap();
        assert!(matches!(&input.pump()[..], [(1, Err(e))] if e.message.contains("broken pipe")));
        assert!(input.write(2, vec![7].into()).is_err());
    }

    fn connection() -> (Input, Output, Fd) {
        sys::ignore_signal(libc::SIGPIPE);
        let (ours, theirs) = sys::socketpair(libc::SOCK_STREAM).unwrap();
        sys::set_nonblocking(ours.raw(), true).unwrap();
        let mut input = Input::of_connection(ours.try_clone().unwrap());
        input.attach(5).unwrap();
        (input, Output::new(ours, false), theirs)
    }

    #[test]
    fn a_connection_has_two_ends() {
        let (mut input, mut output, theirs) = connection();
        input.feed(vec![b'?'].into()).unwrap();
        input.close();
        assert_eq!(input.pump(), [], "its call goes on");
        assert_eq!((input.raw(), input.attached()), (None, Some(5)));
        let mut buf = [0; 8];
        assert_eq!(sys::read(theirs.raw(), &mut buf), Ok(1));
        assert_eq!(sys::read(theirs.raw(), &mut buf), Ok(0));
        sys::write_all(theirs.raw(), b"late").unwrap();
        assert_eq!(text(output.read(100)).as_deref(), Some("late"));
        drop(theirs);
        assert_eq!(text(output.read(100)).as_deref(), Some(""));
        assert!(output.at_end() && !output.has_failed());
    }

    #[test]
    fn what_a_connection_does_not_take_is_credited_and_its_output_still_comes() {
        let (mut input, mut output, theirs) = connection();
        sys::write_all(theirs.raw(), b"no").unwrap();
        let piece = || Chunk::from(vec![7; 300 << 10]);
        input.feed(piece()).unwrap();
        assert_eq!(input.pump(), []);
        assert!(input.blocked().is_some());
        drop(theirs);
        assert_eq!(input.pump(), []);
        input.feed(piece()).unwrap();
        assert_eq!((input.pump(), input.take_credit(), input.blocked()), (vec![], Some((5, 600 << 10)), None));
        assert_eq!(text(output.read(100)).as_deref(), Some("no"));
        assert_eq!(text(output.read(100)).as_deref(), Some(""));
        assert!(output.has_failed(), "it has thrown away what it had not read");
    }

    #[test]
    fn a_streaming_call_takes_what_it_has_credit_for() {
        let (mut out, writer) = output();
        out.attach(7, 3);
        sys::write_all(writer.raw(), b"hello").unwrap();
        let next_reader = out.next_reader().unwrap();
        assert_eq!((next_reader.call, next_reader.len, next_reader.streaming), (7, 3, true));
        assert_eq!(text(out.read(next_reader.len)).as_deref(), Some("hel"));
        out.finish_served(next_reader, Some(3));
        assert_eq!(out.next_reader().map(|t| t.len), Some(0));
        // A read call comes first, and does not stay.
        out.add_reader(8, 1);
        let reader = out.next_reader().unwrap();
        assert_eq!((reader.call, reader.len, reader.streaming), (8, 1, false));
        out.finish_served(reader, Some(1));
        out.grant(10);
        assert_eq!(out.next_reader().map(|t| (t.call, t.len)), Some((7, 10)));
        assert_eq!(out.attached(), Some(7));
        assert_eq!(out.close(), [7]);
    }

    #[test]
    fn a_streaming_call_is_given_its_credit_back_as_the_pipe_takes_it() {
        let (read_end, write_end) = sys::pipe(0).unwrap();
        sys::set_nonblocking(write_end.raw(), true).unwrap();
        let mut input = Input::new(write_end, false);
        assert!(input.feed(vec![1].into()).is_err());
        input.attach(5).unwrap();
        let piece = || Chunk::from(vec![7; 64 << 10]);
        for _ in 0..16 {
            input.feed(piece()).unwrap();
        }
        assert!(input.feed(vec![1].into()).is_err());
        assert_eq!(input.pump(), []);
        assert_eq!(input.take_credit(), None);
        let mut buf = vec![0; 64 << 10];
        let mut given = 0;
        for _ in 0..16 {
            let mut left = buf.len();
            while left > 0 {
                left -= sys::read(read_end.raw(), &mut buf[..left]).unwrap();
                assert_eq!(input.pump(), []);
            }
            given += input.take_credit().map_or(0, |(call, credit)| {
                assert_eq!(call, 5);
                credit
            });
        }
        assert_eq!(given, INPUT_WINDOW);
        input.close();
        assert_eq!(input.pump(), [(5, Ok(0))]);
        assert!(input.attach(6).is_err());
    }
}
