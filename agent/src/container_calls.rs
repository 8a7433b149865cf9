//! The calls about a container that exists: signals, resources, files to look into.

use crate::connections::Connections;
use crate::container::{Containers, TERMINATION_LOG};
use crate::devices_bpf;
use crate::jobs::{Completion, Jobs};
use crate::prelude::*;
use crate::processes::Processes;
use crate::proto::agent as pb;
use crate::proto::codec::Message;
use crate::runtime;
use crate::server::calls::CallId;
use crate::sys::{self, Fd, Pid};

/// The pids (in the guest) of all processes of a container. Without a control group, only those that the agent has
/// started are known.
pub fn pids_of(containers: &Containers, processes: &Processes, id: &str) -> Result<Vec<Pid>> {
    match &containers.get(id)?.cgroup {
        Some(cgroup) => cgroup.pids(),
        None => Ok(processes.of_container(id).filter(|p| p.pid != 0 && p.is_alive()).map(|p| p.pid).collect()),
    }
}

/// The container's root directory as its processes see it; if it has no process, as the agent sees it.
pub fn open_root(containers: &Containers, processes: &Processes, id: &str) -> Result<Fd> {
    let container = containers.get(id)?;
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    if let Some(init) = processes.running_init(container).filter(|_| container.has_processes()) {
        if let Ok(fd) = sys::open(format!("/proc/{}/root", init.pid), flags, 0) {
            return Ok(fd);
        }
    }
    sys::open(&container.root, flags, 0).with_context(|| format!("open the root of container {id}"))
}

/// Signals every process of the container, including those started by its own processes.
pub fn signal_all(containers: &Containers, processes: &Processes, id: &str, signal: u32) -> Result<()> {
    let signal = signal_number(signal)?;
    let pids = pids_of(containers, processes, id)?;
    if pids.is_empty() {
        return Err(Error::not_found("process already finished"));
    }
    for pid in pids {
        match sys::kill(pid, signal) {
            Err(e) if e.0 != libc::ESRCH => {
                return Err(e).with_context(|| format!("signal {signal} to process {pid} of {id}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A signal to one process. SIGKILL to the first one means the whole container.
pub fn signal(containers: &Containers, processes: &Processes, request: &pb::SignalProcessRequest) -> Result<()> {
    let (id, exec_id) = (&request.container_id, &request.exec_id);
    let signal = signal_number(request.signal)?;
    let key = containers.find_process(id, exec_id)?;
    let whole = signal == libc::SIGKILL && containers.is_init(id, key);
    if whole {
        if let Some(cgroup) = &containers.get(id)?.cgroup {
            cgroup.kill_all()?;
        }
    }
    let Some(process) = processes.get(key) else { return Ok(()) };
    if !process.is_alive() {
        return if whole { Ok(()) } else { Err(Error::not_found("process already finished")) };
    }
    if process.pid == 0 {
        return Err(Error::precondition("the process does not exist yet"));
    }
    match sys::kill(process.pid, signal) {
        Err(e) if e.0 != libc::ESRCH => Err(e).with_context(|| format!("signal {signal} to {id}/{exec_id}")),
        _ => Ok(()),
    }
}

fn signal_number(signal: u32) -> Result<i32> {
    let signal = i32::try_from(signal).ok().filter(|s| (0..=64).contains(s));
    signal.ok_or_else(|| Error::invalid("the signal is not between 0 and 64"))
}

/// UpdateContainer: new limits; all of them are set, or none.
pub fn update(containers: &Containers, request: &pb::UpdateContainerRequest) -> Result<()> {
    let cgroup = containers.cgroup_of(&request.container_id)?;
    let Some(resources) = request.resources.as_deref() else { return Ok(()) };
    if resources.devices.is_empty() {
        return cgroup.apply(resources).map(drop);
    }
    let rules = devices_bpf::compile(&runtime::devices::cgroup_rules(&resources.devices, &[]))?;
    let directory = cgroup.open()?;
    let limits = cgroup.apply(resources)?;
    devices_bpf::attach(directory.raw(), &rules).inspect_err(|_| limits.restore())
}

/// GetDiagnosticData, of which there is one kind: the termination log. A job reads it.
pub fn diagnostic_data(
    io: &mut Connections,
    jobs: &mut Jobs,
    containers: &Containers,
    processes: &Processes,
    call: CallId,
    request: &pb::GetDiagnosticDataRequest,
) -> Result<()> {
    if request.log_type != "termination_log" {
        return Err(Error::invalid(format!("log type {:?} is not termination_log", request.log_type)));
    }
    let id = &request.container_id;
    let log = containers.get(id)?.termination_log.as_ref();
    let log = log.ok_or_else(|| Error::not_found(format!("container {id:?} has no annotation {TERMINATION_LOG}")))?;
    let root = open_root(containers, processes, id)?;
    jobs.spawn(&mut io.poller, Completion::Answer(call), &[root.raw()], || {
        Ok(pb::GetDiagnosticDataResponse { data: log.read(root.raw())? }.to_vec())
    })
}
