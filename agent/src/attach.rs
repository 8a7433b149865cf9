//! Streaming calls: a standard stream for as long as the call lasts, with credit for the bytes on the way.

use crate::agent::Agent;
use crate::prelude::*;
use crate::process::Key;
use crate::server::calls::CallId;
use crate::server::conn::Call;
use crate::server::frame::{self, StreamPiece};

/// What the pieces of a streaming call are about.
#[derive(Debug, Clone, Copy)]
pub struct Attachment {
    call: CallId,
    to: Target,
}

#[derive(Debug, Clone, Copy)]
enum Target {
    /// Streams of a process.
    Streams(Streams),
    /// Answers for a socket of datagrams.
    Datagrams(u32),
}

#[derive(Debug, Clone, Copy)]
struct Streams {
    process: Key,
    input: bool,
    /// 0 stdout or the terminal, 1 stderr.
    output: Option<u8>,
}

impl Agent {
    /// Begins a streaming call about the stream that its first piece names.
    pub fn attach(&mut self, call: CallId, first: &StreamPiece) -> Result<()> {
        let (id, exec_id) = (first.container_id, first.exec_id);
        let output = match first.stream {
            0 => None,
            1 => Some(0),
            2 => Some(1),
            other => return Err(Error::invalid(format!("a process has no stream {other}"))),
        };
        if self.container(id)?.finished_code(exec_id).is_some() {
            if output.is_none() {
                return Err(Error::precondition("standard input: the process has ended"));
            }
            self.answer(call, Ok(vec![]));
            return Ok(());
        }
        let key = self.find_process(id, exec_id)?;
        self.begin_stream(call, key, output.is_none(), output, first.credit)
    }

    /// Ties a call to streams of a process.
    pub fn begin_stream(&mut self, call: CallId, key: Key, input: bool, output: Option<u8>, credit: u32) -> Result<()> {
        let (Some(process), Some(reply)) = (self.processes.get_mut(&key), self.calls.get(call)) else { return Ok(()) };
        let former = if input { process.input.attached() } else { None };
        let former = former.or(output.and_then(|which| process.outputs[usize::from(which)].attached()));
        if former.is_some_and(|former| self.calls.is_waiting(former)) {
            return Err(Error::precondition("another streaming call has this stream"));
        }
        if input {
            process.input.attach(call)?;
        }
        if let Some(which) = output {
            process.outputs[usize::from(which)].attach(call, credit as usize);
        }
        let to = Target::Streams(Streams { process: key, input, output });
        self.attachments.insert((reply.conn, reply.stream), Attachment { call, to });
        if let Some(which) = output {
            self.serve_readers(key, usize::from(which));
        }
        Ok(())
    }

    /// Ties a call to a socket of datagrams.
    pub fn attach_datagrams(&mut self, call: CallId, socket: u32) {
        if let Some(reply) = self.calls.get(call) {
            self.attachments.insert((reply.conn, reply.stream), Attachment { call, to: Target::Datagrams(socket) });
        }
    }

    /// A data frame of the host's. One for a call that is over has crossed its end on the way.
    pub fn on_piece(&mut self, conn: u32, call: Call, last: bool) {
        let Some(attachment) = self.attachments.get(&(conn, call.stream)).copied() else { return };
        let taken = match attachment.to {
            Target::Streams(to) => self.take_piece(attachment.call, to, call, last),
            Target::Datagrams(socket) => self.answer_datagram(socket, &call, last),
        };
        if let Err(error) = taken {
            self.answer(attachment.call, Err(error));
        }
    }

    fn take_piece(&mut self, id: CallId, to: Streams, call: Call, last: bool) -> Result<()> {
        let piece = frame::parse_piece(call.body())?;
        let end = last || piece.end;
        let Some(process) = self.processes.get_mut(&to.process) else { return Ok(()) };
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
            self.on_stdin(to.process);
        }
        if let Some(which) = to.output {
            if last {
                // The reader has seen enough; the stream stays for others.
                self.answer(id, Ok(vec![]));
            }
            self.serve_readers(to.process, usize::from(which));
        }
        if last {
            self.end_internal(to.process, true);
        }
        Ok(())
    }

    /// A connection is gone, and with it its streaming calls.
    pub fn forget_attachments(&mut self, conn: u32) {
        let process = |attachment: &Attachment| match attachment.to {
            Target::Streams(to) => Some(to.process),
            Target::Datagrams(_) => None,
        };
        let gone: Vec<Key> =
            self.attachments.range((conn, 0)..=(conn, u32::MAX)).filter_map(|(_, a)| process(a)).collect();
        self.attachments.retain(|(of, _), _| *of != conn);
        for key in gone {
            self.end_internal(key, false);
        }
    }

    /// Tells the host of a streaming call that it may send more.
    pub fn give_credit(&mut self, call: CallId, credit: usize) {
        if let Some(reply) = self.calls.get(call) {
            self.send_bytes(reply.conn, frame::credit_frame(reply.stream, credit));
        }
    }
}
