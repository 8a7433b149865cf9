//! The processes that the agent has made: their streams, and the calls that wait for output, input and the end.
//!
//! How a process comes into being and ends is in `process_events`.

use crate::connections::{Connections, StreamTarget, Target};
use crate::container::{Container, Containers};
use crate::poller::Token;
use crate::prelude::*;
use crate::process::{Key, Phase, Process};
use crate::proto::agent as pb;
use crate::proto::codec::Message;
use crate::runtime::console;
use crate::server::calls::{CallId, Reply};
use crate::server::conn::Call;
use crate::server::frame::{self, StreamPiece};
use crate::streams::{NextReader, Read, Written};
use crate::sys;

/// No events until a stream is armed: a container that writes without a reader on the host must not keep the agent
/// awake.
const STREAM_EVENTS: u32 = libc::EPOLLONESHOT as u32;

/// What serving one reader came to.
enum Served {
    /// It has been given something, or is gone: the next one, which may be the same.
    Next,
    /// It has been served, and the stream is over with no reader left.
    Over,
    /// There is nothing to give now, or no reader.
    Wait,
}

#[derive(Default)]
pub struct Processes {
    records: BTreeMap<Key, Process>,
    /// Output streams whose readers wait for their connection to take more.
    stalled: Vec<(Key, u8)>,
}

impl Processes {
    // ---- records ----

    /// Takes a process in whose builder has been started.
    pub fn add(&mut self, io: &mut Connections, process: Process) -> Result<Key> {
        let key = io.poller.fresh_id();
        if let Some(fd) = process.report_fd() {
            sys::set_nonblocking(fd, true).context("prepare the report socket")?;
            io.poller.watch(fd, Token::Report(key), libc::EPOLLIN as u32)?;
        }
        self.records.insert(key, process);
        self.watch_streams(io, key)?;
        Ok(key)
    }

    pub fn watch_streams(&self, io: &Connections, key: Key) -> Result<()> {
        let Some(process) = self.records.get(&key) else { return Ok(()) };
        if let Some(fd) = process.input.raw() {
            io.poller.watch(fd, Token::Stdin(key), STREAM_EVENTS)?;
        }
        for (which, output) in process.outputs.iter().enumerate() {
            if let Some(fd) = output.raw() {
                io.poller.watch(fd, Token::Output(key, which as u8), STREAM_EVENTS)?;
            }
        }
        Ok(())
    }

    /// Drops a record. Calls that wait for the process fail, calls that wait for its output end.
    pub fn remove(&mut self, io: &mut Connections, key: Key) {
        let Some(mut process) = self.records.remove(&key) else { return };
        let gone = || Error::not_found(format!("process {:?} has been removed", process.exec_id));
        for call in process.waiters.drain(..).chain(process.starter.take()) {
            io.answer(call, Err(gone()));
        }
        answer_writes(io, process.input.fail("the process has been removed"));
        for output in &mut process.outputs {
            for call in output.close() {
                io.answer(call, Ok(vec![]));
            }
        }
    }

    pub fn get(&self, key: Key) -> Option<&Process> {
        self.records.get(&key)
    }

    pub fn get_mut(&mut self, key: Key) -> Option<&mut Process> {
        self.records.get_mut(&key)
    }

    pub fn all(&self) -> impl Iterator<Item = &Process> {
        self.records.values()
    }

    /// Those of a container.
    pub fn of_container<'a>(&'a self, id: &'a str) -> impl Iterator<Item = &'a Process> {
        self.records.values().filter(move |process| process.container == id)
    }

    pub fn keys_of(&self, id: &str) -> Vec<Key> {
        self.records.iter().filter(|(_, process)| process.container == id).map(|(key, _)| *key).collect()
    }

    /// The first for which `is_it` holds.
    pub fn find(&self, is_it: impl Fn(&Process) -> bool) -> Option<Key> {
        self.records.iter().find(|(_, process)| is_it(process)).map(|(key, _)| *key)
    }

    /// The first process of a container, if it exists and has not ended.
    pub fn running_init(&self, container: &Container) -> Option<&Process> {
        self.records.get(&container.init).filter(|process| process.is_alive() && process.pid != 0)
    }

    /// The process that a call names; an empty exec id is the container's first one.
    pub fn named(&mut self, containers: &Containers, id: &str, exec_id: &str) -> Result<&mut Process> {
        let key = containers.find_process(id, exec_id)?;
        self.records.get_mut(&key).ok_or_else(|| Error::not_found(format!("process {exec_id:?} is gone")))
    }

    // ---- output ----

    /// An output stream has become readable.
    pub fn on_output(&mut self, io: &mut Connections, containers: &mut Containers, key: Key, which: u8) {
        if let Some(process) = self.records.get_mut(&key) {
            process.outputs[usize::from(which)].notice();
            self.serve_readers(io, containers, key, usize::from(which));
        }
    }

    /// Serves those again whose connection was congested; whether fewer are left.
    pub fn serve_stalled(&mut self, io: &mut Connections, containers: &mut Containers) -> bool {
        let stalled = core::mem::take(&mut self.stalled);
        let before = stalled.len();
        for (key, which) in stalled {
            self.serve_readers(io, containers, key, usize::from(which));
        }
        self.stalled.len() < before
    }

    /// Serves both outputs: what readers wait for may have changed with the process.
    pub fn serve_outputs(&mut self, io: &mut Connections, containers: &mut Containers, key: Key) {
        self.serve_readers(io, containers, key, 0);
        self.serve_readers(io, containers, key, 1);
    }

    /// Gives waiting calls the output that is there, as long as their connections take it.
    pub fn serve_readers(&mut self, io: &mut Connections, containers: &mut Containers, key: Key, which: usize) {
        loop {
            match self.serve_next(io, key, which) {
                Served::Next => {}
                Served::Over => self.reap_if_finished(io, containers, key),
                Served::Wait => return,
            }
        }
    }

    /// One step of [`Processes::serve_readers`].
    fn serve_next(&mut self, io: &mut Connections, key: Key, which: usize) -> Served {
        let Some(process) = self.records.get_mut(&key) else { return Served::Wait };
        let phase = process.phase();
        let output = &mut process.outputs[which];
        let Some(reader) = output.next_reader() else { return Served::Wait };
        let Some(reply) = io.calls.get(reader.call) else {
            // The call is over: the data stays for the next one.
            output.finish_served(reader, None);
            return Served::Next;
        };
        let has_credit = !reader.streaming || reader.len > 0 || output.at_end();
        // Before there is a process there is no end of file either.
        let may_end = phase != Phase::Building || output.raw().is_some();
        if !(output.has_news() && has_credit && may_end) {
            return Served::Wait;
        }
        if io.is_congested(reply.conn, reader.streaming) {
            self.stalled.push((key, which as u8));
            return Served::Wait;
        }
        let pipe = if reader.streaming && output.is_splice_worthwhile() { io.pipe(reply.conn) } else { None };
        if let Some(moved) = pipe.and_then(|pipe| output.move_into(reader.len, pipe)) {
            output.finish_served(reader, Some(moved));
            io.send_outgoing(reply.conn, frame::data_frame_before(reply.stream, moved));
            return Served::Next;
        }
        match output.read(reader.len) {
            Read::Wait => {
                if let Some(fd) = output.raw() {
                    io.poller.arm(fd, Token::Output(key, which as u8), libc::EPOLLIN);
                }
                Served::Wait
            }
            Read::Data(buffer) if reader.streaming => self.serve_stream(io, key, which, (reader, reply), buffer),
            Read::Data(buffer) => {
                output.finish_served(reader, None);
                let is_over = output.is_over();
                io.calls.take(reader.call);
                io.send_outgoing(reply.conn, frame::ok_frame_around(reply.stream, buffer));
                if is_over {
                    Served::Over
                } else {
                    Served::Next
                }
            }
        }
    }

    /// Gives a streaming call the data in `buffer`, behind `DATA_OFFSET` bytes of room. No data is the end of the
    /// stream, which ends the call unless it carries a connection, whose other direction goes on.
    fn serve_stream(
        &mut self,
        io: &mut Connections,
        key: Key,
        which: usize,
        (reader, reply): (NextReader, Reply),
        buffer: Vec<u8>,
    ) -> Served {
        let Some(process) = self.records.get_mut(&key) else { return Served::Wait };
        let taken = buffer.len() - frame::DATA_OFFSET;
        let output = &mut process.outputs[which];
        output.finish_served(reader, (taken > 0).then_some(taken));
        let is_over = output.is_over();
        if taken > 0 {
            io.send_outgoing(reply.conn, frame::data_frame_around(reply.stream, buffer));
        } else if process.is_connection() {
            if process.outputs[which].has_failed() {
                process.input.fail("the connection has been reset");
            }
            io.send_bytes(reply.conn, frame::end_frame(reply.stream));
            self.end_connection(io, key);
            return Served::Wait;
        } else {
            io.answer(reader.call, Ok(vec![]));
        }
        if is_over {
            Served::Over
        } else {
            Served::Next
        }
    }

    /// ReadStdout (`which` 0) and ReadStderr (1).
    pub fn read_stream(
        &mut self,
        io: &mut Connections,
        containers: &mut Containers,
        call: CallId,
        request: &pb::ReadStreamRequest,
        which: usize,
    ) -> Result<()> {
        if containers.get(&request.container_id)?.finished_code(&request.exec_id).is_some() {
            io.answer(call, Ok(vec![]));
            return Ok(());
        }
        let key = containers.find_process(&request.container_id, &request.exec_id)?;
        if let Some(process) = self.records.get_mut(&key) {
            process.outputs[which].add_reader(call, request.len as usize);
        }
        self.serve_readers(io, containers, key, which);
        Ok(())
    }

    // ---- input ----

    /// Moves standard input on: into the process, answers to their callers.
    pub fn pump_input(&mut self, io: &mut Connections, key: Key) {
        let Some(process) = self.records.get_mut(&key) else { return };
        let over = process.input.pump();
        let (blocked, credit) = (process.input.blocked(), process.input.take_credit());
        if let Some(fd) = blocked {
            io.poller.arm(fd, Token::Stdin(key), libc::EPOLLOUT);
        }
        answer_writes(io, over);
        if let Some((call, credit)) = credit {
            io.give_credit(call, credit);
        }
        self.end_connection(io, key);
    }

    /// WriteStdin. Takes the whole request, so that its data need not be copied.
    pub fn write_stdin(&mut self, io: &mut Connections, containers: &Containers, id: CallId, call: Call) -> Result<()> {
        let request = frame::parse_write(frame::parse_request(call.body())?.payload)?;
        // An empty write closes standard input, as with the original agent.
        let close = request.data.is_empty();
        let place = call.place_of(request.data);
        let key = containers.find_process(request.container_id, request.exec_id)?;
        let Some(process) = self.records.get_mut(&key) else { return Ok(()) };
        process.input.write(id, call.into_part(place))?;
        if close {
            process.input.close();
        }
        self.pump_input(io, key);
        Ok(())
    }

    /// CloseStdin.
    pub fn close_stdin(
        &mut self,
        io: &mut Connections,
        containers: &Containers,
        request: &pb::CloseStdinRequest,
    ) -> Result<()> {
        if containers.get(&request.container_id)?.finished_code(&request.exec_id).is_some() {
            return Ok(());
        }
        let key = containers.find_process(&request.container_id, &request.exec_id)?;
        if let Some(process) = self.records.get_mut(&key) {
            process.input.close();
        }
        self.pump_input(io, key);
        Ok(())
    }

    // ---- streaming calls ----

    /// Begins a streaming call about the stream that its first piece names.
    pub fn attach(
        &mut self,
        io: &mut Connections,
        containers: &mut Containers,
        call: CallId,
        first: &StreamPiece,
    ) -> Result<()> {
        let (id, exec_id) = (first.container_id, first.exec_id);
        let output = match first.stream {
            0 => None,
            1 => Some(0),
            2 => Some(1),
            other => return Err(Error::invalid(format!("a process has no stream {other}"))),
        };
        if containers.get(id)?.finished_code(exec_id).is_some() {
            if output.is_none() {
                return Err(Error::precondition("standard input: the process has ended"));
            }
            io.answer(call, Ok(vec![]));
            return Ok(());
        }
        let target = StreamTarget { process: containers.find_process(id, exec_id)?, input: output.is_none(), output };
        self.begin_stream(io, containers, call, target, first.credit)
    }

    /// Ties a call to streams of a process. The host takes `credit` bytes of output at first.
    pub fn begin_stream(
        &mut self,
        io: &mut Connections,
        containers: &mut Containers,
        call: CallId,
        target: StreamTarget,
        credit: u32,
    ) -> Result<()> {
        let Some(process) = self.records.get_mut(&target.process).filter(|_| io.calls.is_waiting(call)) else {
            return Ok(());
        };
        let former = if target.input { process.input.attached() } else { None };
        let former = former.or(target.output.and_then(|which| process.outputs[usize::from(which)].attached()));
        if former.is_some_and(|former| io.calls.is_waiting(former)) {
            return Err(Error::precondition("another streaming call has this stream"));
        }
        if target.input {
            process.input.attach(call)?;
        }
        if let Some(which) = target.output {
            process.outputs[usize::from(which)].attach(call, credit as usize);
        }
        io.attach(call, Target::Streams(target));
        if let Some(which) = target.output {
            self.serve_readers(io, containers, target.process, usize::from(which));
        }
        Ok(())
    }

    /// Takes a data frame of a streaming call: input, credit for output, or the end (`last`).
    pub fn take_piece(
        &mut self,
        io: &mut Connections,
        containers: &mut Containers,
        (id, to): (CallId, StreamTarget),
        call: Call,
        last: bool,
    ) -> Result<()> {
        let piece = frame::parse_piece(call.body())?;
        let end = last || piece.end;
        let Some(process) = self.records.get_mut(&to.process) else { return Ok(()) };
        if let Some(which) = to.output {
            process.outputs[usize::from(which)].grant(piece.credit as usize);
        }
        if !piece.data.is_empty() {
            if !to.input {
                return Err(Error::invalid("an output takes no data"));
            }
            let place = call.place_of(piece.data);
            process.input.feed(call.into_part(place))?;
        }
        if end && to.input {
            process.input.close();
        }
        if to.input {
            self.pump_input(io, to.process);
        }
        if let Some(which) = to.output {
            if last {
                // The reader has seen enough; the stream stays for others.
                io.answer(id, Ok(vec![]));
            }
            self.serve_readers(io, containers, to.process, usize::from(which));
        }
        if last {
            self.end_internal(io, to.process, true);
        }
        Ok(())
    }

    /// The host's end of a console, a log or a connection is gone. With `flush`, the input that it has sent before is
    /// still delivered. Does nothing to a container's process.
    pub fn end_internal(&mut self, io: &mut Connections, key: Key, flush: bool) {
        let Some(process) = self.records.get_mut(&key).filter(|p| p.is_internal()) else { return };
        if process.pid != 0 {
            // It is reaped like any other child.
            process.kill();
        } else if !flush || process.input.raw().is_none() {
            self.remove(io, key);
        } else {
            // Its output has no reader any more; the record goes when the input has been delivered.
            process.outputs[0].close();
        }
    }

    /// Drops a connection both of whose directions have ended.
    fn end_connection(&mut self, io: &mut Connections, key: Key) {
        let Some(process) = self.records.get(&key).filter(|p| p.is_connection()) else { return };
        if process.input.raw().is_none() && process.outputs[0].at_end() {
            if let Some(call) = process.input.attached() {
                io.answer(call, Ok(vec![]));
            }
            self.remove(io, key);
        }
    }

    // ---- the end ----

    /// WaitProcess: the exit code if there is one already.
    pub fn wait(&mut self, containers: &Containers, call: CallId, id: &str, exec_id: &str) -> Result<Option<Vec<u8>>> {
        if let Some(code) = containers.get(id)?.finished_code(exec_id) {
            return Ok(Some(pb::WaitProcessResponse { status: i32::from(code) }.to_vec()));
        }
        let process = self.named(containers, id, exec_id)?;
        if let Some(status) = process.exit {
            return Ok(Some(pb::WaitProcessResponse { status }.to_vec()));
        }
        process.waiters.push(call);
        Ok(None)
    }

    /// Answers the calls that wait for the end of a process, if it has ended.
    pub fn answer_waiters(&mut self, io: &mut Connections, containers: &mut Containers, key: Key) {
        let Some(process) = self.records.get_mut(&key) else { return };
        let Some(code) = process.exit else { return };
        let waiters = core::mem::take(&mut process.waiters);
        let writes = process.input.fail("the process has ended");
        let starter = process.starter.take();
        for call in waiters {
            io.answer(call, Ok(pb::WaitProcessResponse { status: code }.to_vec()));
        }
        if let Some(call) = starter {
            io.answer(call, Err(Error::precondition("the process has ended before its start")));
        }
        answer_writes(io, writes);
        self.serve_outputs(io, containers, key);
        self.reap_if_finished(io, containers, key);
    }

    /// Drops the record of a process that has ended and whose output has been read, keeping its exit code. A
    /// container's first process keeps its record.
    fn reap_if_finished(&mut self, io: &mut Connections, containers: &mut Containers, key: Key) {
        let Some(process) = self.records.get(&key) else { return };
        let (Some(code), true) = (process.exit, process.is_drained()) else { return };
        if containers.is_init(&process.container, key) {
            return;
        }
        let (id, exec_id) = (process.container.clone(), process.exec_id.clone());
        self.remove(io, key);
        if let Some(container) = containers.get_mut(&id) {
            container.execs.remove(&exec_id);
            container.remember(exec_id, code as u8);
        }
    }

    /// TtyWinResize.
    pub fn resize_terminal(&mut self, containers: &Containers, request: &pb::TtyWinResizeRequest) -> Result<()> {
        let process = self.named(containers, &request.container_id, &request.exec_id)?;
        let Some(terminal) = &process.terminal else {
            return Err(Error::unavailable(format!("process {:?} has no terminal", request.exec_id)));
        };
        console::resize(terminal.raw(), request.row, request.column)
    }
}

fn answer_writes(io: &mut Connections, over: Vec<Written>) {
    for (call, outcome) in over {
        io.answer(call, outcome.map(|len| pb::WriteStreamResponse { len }.to_vec()));
    }
}

#[cfg(test)]
#[path = "processes_tests.rs"]
mod tests;
