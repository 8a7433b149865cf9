//! Over real pipes and a real connection, without a process.

use super::*;
use crate::process::Pipes;
use crate::runtime;
use crate::server::conn::{Conn, State, BULK_BOUND};
use crate::sys::Fd;
use crate::test_support::container;

const INIT: Key = 1_000_000;

/// A container with one further process, and a connection whose other end is `host`.
struct Fixture {
    io: Connections,
    containers: Containers,
    processes: Processes,
    conn: u32,
    host: Fd,
    key: Key,
    /// The process's ends of its streams: stdin, stdout, stderr.
    child: Option<[Fd; 3]>,
}

impl Fixture {
    fn new() -> Fixture {
        let mut io = Connections::new().unwrap();
        let (ours, host) = sys::socketpair(libc::SOCK_STREAM | libc::SOCK_NONBLOCK).unwrap();
        let conn = io.add(Conn::new(ours, false)).unwrap();
        let mut container = container(INIT);
        let mut pipes = Pipes::new(&runtime::no_program().unwrap(), 0).unwrap();
        let child = pipes.child.take();
        let (report, _builder) = sys::socketpair(libc::SOCK_SEQPACKET).unwrap();
        let mut processes = Processes::default();
        let mut process = Process::new("c", "e", 0, report, pipes, 0);
        process.starter = None;
        process.enter(Phase::Ready);
        let key = processes.add(&mut io, process).unwrap();
        container.execs.insert("e".into(), key);
        let mut containers = Containers::default();
        containers.insert("c", container);
        Fixture { io, containers, processes, conn, host, key, child }
    }

    fn call(&mut self, stream: u32) -> CallId {
        self.io.calls.add(Reply { conn: self.conn, stream, deadline: u64::MAX }).unwrap()
    }

    fn read(&mut self, call: CallId, len: u32) {
        let request = pb::ReadStreamRequest { container_id: "c".into(), exec_id: "e".into(), len };
        self.processes.read_stream(&mut self.io, &mut self.containers, call, &request, 0).unwrap();
    }

    fn stream(&mut self, call: CallId, credit: u32) -> Result<()> {
        let target = StreamTarget { process: self.key, input: false, output: Some(0) };
        self.processes.begin_stream(&mut self.io, &mut self.containers, call, target, credit)
    }

    fn writes(&self, data: &[u8]) {
        sys::write_all(self.child.as_ref().unwrap()[1].raw(), data).unwrap();
    }

    fn notice(&mut self) {
        self.processes.on_output(&mut self.io, &mut self.containers, self.key, 0);
    }

    /// What has been sent to the host.
    fn sent(&mut self) -> Vec<u8> {
        assert!(self.io.get_mut(self.conn).unwrap().flush() == State::Open);
        let mut sent = Vec::new();
        while sys::read_append(self.host.raw(), &mut sent, 1 << 20).is_ok_and(|n| n > 0) {}
        sent
    }

    fn ends(&mut self, code: i32) {
        self.child = None;
        let process = self.processes.get_mut(self.key).unwrap();
        process.exit = Some(code);
        process.enter(Phase::Exited);
        process.outputs.iter_mut().for_each(crate::streams::Output::drain);
        self.processes.answer_waiters(&mut self.io, &mut self.containers, self.key);
    }
}

/// The answer of a read call, or a piece of a streaming one.
fn read_frame(stream: u32, data: &[u8]) -> Vec<u8> {
    frame::answer(stream, &Ok(pb::ReadStreamResponse { data: data.to_vec() }.to_vec()))
}

fn data_frame(stream: u32, data: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0; frame::DATA_OFFSET];
    buffer.extend_from_slice(data);
    let out = frame::data_frame_around(stream, buffer);
    out.bytes[out.start..].to_vec()
}

#[test]
fn read_calls_come_before_the_streaming_one_which_stays() {
    let mut f = Fixture::new();
    let (stream, read) = (f.call(1), f.call(3));
    f.stream(stream, 4).unwrap();
    f.read(read, 3);
    assert_eq!(f.sent(), [], "there is nothing yet");
    f.writes(b"abcdefghij");
    f.notice();
    assert_eq!(f.sent(), [read_frame(3, b"abc"), data_frame(1, b"defg")].concat(), "the rest has no credit");
    assert!(!f.io.calls.is_waiting(read) && f.io.calls.is_waiting(stream));
    let other = f.call(5);
    assert!(f.stream(other, 1).unwrap_err().message.contains("another streaming call"));
    let piece = crate::proto::agentext::StreamPiece { credit: 100, ..Default::default() }.to_vec();
    f.processes.get_mut(f.key).unwrap().outputs[0].grant(frame::parse_piece(&piece).unwrap().credit as usize);
    f.processes.serve_readers(&mut f.io, &mut f.containers, f.key, 0);
    assert_eq!(f.sent(), data_frame(1, b"hij"));
}

#[test]
fn a_call_that_is_over_leaves_its_data_to_the_next() {
    let mut f = Fixture::new();
    let (gone, next) = (f.call(1), f.call(3));
    f.read(gone, 10);
    f.io.calls.take(gone);
    f.read(next, 10);
    f.writes(b"data");
    f.notice();
    assert_eq!(f.sent(), read_frame(3, b"data"));
}

#[test]
fn output_waits_for_a_connection_that_is_full() {
    let mut f = Fixture::new();
    let stream = f.call(1);
    f.stream(stream, 100).unwrap();
    f.io.send_bytes(f.conn, vec![0; BULK_BOUND]);
    f.writes(b"later");
    f.notice();
    assert!(!f.processes.serve_stalled(&mut f.io, &mut f.containers), "the connection is still full");
    assert_eq!(f.sent().len(), BULK_BOUND);
    assert!(f.processes.serve_stalled(&mut f.io, &mut f.containers));
    assert_eq!(f.sent(), data_frame(1, b"later"));
}

#[test]
fn an_exit_is_kept_once_all_output_has_been_read() {
    let mut f = Fixture::new();
    let (wait, early) = (f.call(1), f.call(3));
    assert_eq!(f.processes.wait(&f.containers, wait, "c", "e"), Ok(None));
    f.writes(b"last words");
    sys::write_all(f.child.as_ref().unwrap()[2].raw(), b"!").unwrap();
    f.ends(7);
    assert_eq!(f.sent(), frame::answer(1, &Ok(pb::WaitProcessResponse { status: 7 }.to_vec())));
    assert!(f.processes.get(f.key).is_some(), "there is output to read");
    f.read(early, 100);
    let end = f.call(5);
    f.read(end, 100);
    assert_eq!(f.sent(), [read_frame(3, b"last words"), read_frame(5, b"")].concat());
    assert!(f.processes.get(f.key).is_some(), "standard error has not been read to its end");
    let request = pb::ReadStreamRequest { container_id: "c".into(), exec_id: "e".into(), len: 10 };
    let errors = f.call(7);
    f.processes.read_stream(&mut f.io, &mut f.containers, errors, &request, 1).unwrap();
    assert_eq!(f.sent(), read_frame(7, b"!"));
    assert!(f.processes.get(f.key).is_none());
    assert_eq!(f.containers.get("c").unwrap().finished_code("e"), Some(7));
    let again = f.call(9);
    let known = pb::WaitProcessResponse { status: 7 }.to_vec();
    assert_eq!(f.processes.wait(&f.containers, again, "c", "e"), Ok(Some(known)));
}

#[test]
fn a_removed_process_fails_its_waiters() {
    let mut f = Fixture::new();
    let (wait, read) = (f.call(1), f.call(3));
    f.processes.wait(&f.containers, wait, "c", "").unwrap_err();
    f.processes.wait(&f.containers, wait, "c", "e").unwrap();
    f.read(read, 10);
    f.processes.remove(&mut f.io, f.key);
    let gone = Err(Error::not_found("process \"e\" has been removed"));
    assert_eq!(f.sent(), [frame::answer(1, &gone), frame::answer(3, &Ok(vec![]))].concat());
}
