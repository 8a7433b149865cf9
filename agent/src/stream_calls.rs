//! The calls about a process's end and its streams.

use crate::agent::Agent;
use crate::prelude::*;
use crate::process::Key;
use crate::proto::agent as pb;
use crate::proto::codec::Message;
use crate::runtime::console;
use crate::server::calls::CallId;
use crate::server::conn::Call;
use crate::server::frame;

impl Agent {
    pub fn wait_process(&mut self, call: CallId, id: &str, exec_id: &str) -> Result<Option<Vec<u8>>> {
        if let Some(code) = self.container(id)?.finished_code(exec_id) {
            return Ok(Some(pb::WaitProcessResponse { status: i32::from(code) }.to_vec()));
        }
        let process = self.process(id, exec_id)?;
        if let Some(status) = process.exit {
            return Ok(Some(pb::WaitProcessResponse { status }.to_vec()));
        }
        process.waiters.push(call);
        Ok(None)
    }

    /// `which`: 0 stdout, 1 stderr.
    pub fn read_stream(&mut self, call: CallId, request: &pb::ReadStreamRequest, which: usize) -> Result<()> {
        if self.container(&request.container_id)?.finished_code(&request.exec_id).is_some() {
            self.answer(call, Ok(vec![]));
            return Ok(());
        }
        let key = self.find_process(&request.container_id, &request.exec_id)?;
        if let Some(process) = self.processes.get_mut(&key) {
            process.outputs[which].add_reader(call, request.len as usize);
        }
        self.serve_readers(key, which);
        Ok(())
    }

    /// Keeps only the exit code of a process (not of a container's first one) that has nothing else to give.
    pub fn forget_if_finished(&mut self, key: Key) {
        let Some(process) = self.processes.get(&key) else { return };
        let (Some(code), true) = (process.exit, process.is_drained()) else { return };
        if self.is_init(key) {
            return;
        }
        let (id, exec_id) = (process.container.clone(), process.exec_id.clone());
        self.drop_process(key);
        if let Some(container) = self.containers.get_mut(&id) {
            container.execs.remove(&exec_id);
            container.remember(exec_id, code as u8);
        }
    }

    /// Takes the whole request, so that its data need not be copied.
    pub fn write_stdin(&mut self, id: CallId, call: Call) -> Result<()> {
        let request = frame::parse_write(frame::parse_request(call.body())?.payload)?;
        // The original's way of closing.
        let close = request.data.is_empty();
        let place = call.place_of(request.data);
        let key = self.find_process(request.container_id, request.exec_id)?;
        let Some(process) = self.processes.get_mut(&key) else { return Ok(()) };
        process.input.write(id, call.into_part(place))?;
        if close {
            process.input.close();
        }
        self.on_stdin(key);
        Ok(())
    }

    pub fn close_stdin(&mut self, id: &str, exec_id: &str) -> Result<()> {
        if self.container(id)?.finished_code(exec_id).is_some() {
            return Ok(());
        }
        let key = self.find_process(id, exec_id)?;
        if let Some(process) = self.processes.get_mut(&key) {
            process.input.close();
        }
        self.on_stdin(key);
        Ok(())
    }

    pub fn resize_terminal(&mut self, request: &pb::TtyWinResizeRequest) -> Result<()> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let Some(terminal) = &process.terminal else {
            return Err(Error::unavailable(format!("process {:?} has no terminal", request.exec_id)));
        };
        console::resize(terminal.raw(), request.row, request.column)
    }
}
