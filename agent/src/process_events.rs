//! How a process comes into being and ends: the messages on its report socket, and the reaping of children.

use crate::lifecycle;
use crate::log;
use crate::prelude::*;
use crate::process::{Key, Phase, Process};
use crate::runtime::report;
use crate::state::State;
use crate::streams::{Input, Output};
use crate::sys::{self, Errno, Fd, Pid};

/// There are messages on the report socket of a process, or its end.
pub fn on_report(state: &mut State, key: Key) {
    loop {
        let Some(process) = state.processes.get_mut(key) else { return };
        let Some(fd) = process.report_fd() else { return };
        match report::receive(fd) {
            Ok(Some(message)) => on_message(state, key, message),
            Err(Errno(libc::EAGAIN)) => return,
            Ok(None) => return on_report_end(state, key),
            Err(e) => {
                process.failure.get_or_insert(Error::internal(format!("report of a process: {e}")));
                return on_report_end(state, key);
            }
        }
    }
}

fn on_message(state: &mut State, key: Key, message: report::Message) {
    let Some(process) = state.processes.get_mut(key) else { return };
    match message {
        report::Message::Pid(pid) => process.pid = pid,
        report::Message::Mounted(count) => {
            if let Some(container) = state.containers.get_mut(&process.container) {
                container.mounted = count as usize;
            }
        }
        report::Message::Terminal(master) => {
            let taken = take_terminal(process, master).and_then(|()| state.processes.watch_streams(&state.io, key));
            if let Err(e) = taken {
                log::error(&e.message);
            }
        }
        report::Message::Ready => on_ready(state, key),
        report::Message::Phase(name, at) => {
            if let Some(call) = process.starter {
                state.io.trace.mark(call, &name, at);
            }
        }
        report::Message::Failed(error) => {
            process.failure.get_or_insert(error);
        }
    }
}

/// The terminal becomes the process's streams. Readers that have come before it go on to wait there.
fn take_terminal(process: &mut Process, master: Fd) -> Result<()> {
    sys::set_nonblocking(master.raw(), true).context("prepare the terminal")?;
    let (input, output) =
        (master.try_clone().context("copy the terminal")?, master.try_clone().context("copy the terminal")?);
    process.input = Input::new(input, true);
    let waiting = core::mem::take(&mut process.outputs[0]);
    process.outputs[0] = Output::new(output, true);
    process.outputs[0].take_readers_of(waiting);
    process.terminal = Some(master);
    Ok(())
}

/// The process is prepared. A container's first one waits for the start, another one becomes its program at once.
fn on_ready(state: &mut State, key: Key) {
    let Some(process) = state.processes.get_mut(key) else { return };
    if process.phase() != Phase::Building {
        return;
    }
    process.enter(Phase::Ready);
    if state.containers.is_init(&process.container, key) {
        lifecycle::on_created(&mut state.containers, &process.container);
        if let Some(call) = process.starter.take() {
            state.io.answer(call, Ok(vec![]));
        }
    } else if let Err(e) = process.release() {
        process.failure.get_or_insert(e);
    }
    // A reader of a stream that does not exist (a terminal's stderr) has waited for this.
    state.processes.serve_outputs(&mut state.io, &mut state.containers, key);
}

/// End of file: the exec has worked, or the process (or its builder) has ended.
fn on_report_end(state: &mut State, key: Key) {
    let Some(process) = state.processes.get_mut(key).filter(|p| p.report_fd().is_some()) else { return };
    process.close_report();
    match (process.phase(), process.failure.clone()) {
        (Phase::Starting, None) => {
            process.enter(Phase::Running);
            if let Some(call) = process.starter.take() {
                state.io.answer(call, Ok(vec![]));
            }
        }
        // One that was killed between create and start has an exit like any other.
        (Phase::Ready, None) | (Phase::Running | Phase::Exited, _) => {}
        (Phase::Building | Phase::Ready | Phase::Starting, failure) => {
            let error = failure.unwrap_or_else(|| {
                Error::internal("the process was killed while it was being set up (out of memory?)")
            });
            lifecycle::on_failed_start(state, key, error);
        }
    }
}

/// A child has been reaped: a process, or the builder of one. (Jobs tell their end by their pipe.)
pub fn on_child_exit(state: &mut State, pid: Pid, code: i32) {
    let Some(key) = state.processes.find(|p| p.pid == pid && p.is_alive()) else {
        return on_builder_exit(state, pid);
    };
    // Messages from before its end are handled first. Its builder may still hold the socket open: there is no end of
    // file to wait for.
    on_report(state, key);
    on_report_end(state, key);
    let Some(process) = state.processes.get_mut(key) else { return };
    process.exit = Some(code);
    process.enter(Phase::Exited);
    for output in &mut process.outputs {
        output.drain();
    }
    let container = process.container.clone();
    log::debug(&format!("container {container}: pid {pid} has ended with {code}"));
    if state.containers.is_init(&container, key) {
        lifecycle::on_init_exit(state, &container);
    }
    state.processes.answer_waiters(&mut state.io, &mut state.containers, key);
    lifecycle::continue_removal(state, &container);
}

fn on_builder_exit(state: &mut State, pid: Pid) {
    let Some(key) = state.processes.find(|p| p.builder == pid) else { return };
    let Some(process) = state.processes.get_mut(key) else { return };
    process.builder = 0;
    let container = process.container.clone();
    // Its last messages may name the process that it has made.
    on_report(state, key);
    lifecycle::continue_removal(state, &container);
}
