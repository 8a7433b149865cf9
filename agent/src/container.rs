//! Containers: their records, and the calls about their resources.

use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::devices_bpf;
use crate::jobs::Completion;
use crate::prelude::*;
use crate::process::{Key, Process};
use crate::proto::agent as pb;
use crate::proto::codec::Message;
use crate::proto::oci::Spec;
use crate::runtime;
use crate::runtime::launch::Filter;
use crate::runtime::namespaces::Namespaces;
use crate::server::calls::CallId;
use crate::sys::{self, Fd, RawFd};
use crate::watchable::Watched;
use alloc::collections::VecDeque;

/// Where the agent keeps what belongs to containers.
pub const STATE_DIR: &str = "/run/kata-containers";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Stopped,
    /// Being taken down; takes no further calls.
    Removing,
}

pub struct Container {
    pub status: Status,
    pub init: Key,
    /// Further processes by their exec id.
    pub execs: BTreeMap<String, Key>,
    /// Those that are over with all their output read: what is left to tell is the exit code.
    pub finished: VecDeque<(Box<str>, u8)>,
    pub cgroup: Option<Cgroup>,
    pub namespaces: Namespaces,
    /// For processes that come later.
    pub filter: Option<Filter>,
    /// The root directory in the agent's view.
    pub root: String,
    /// Mount points of its storages, in order, and how many of them are mounted.
    pub storages: Vec<String>,
    pub mounted: usize,
    /// Storages that are copies, which have to be kept up to date.
    pub watched: Vec<Watched>,
    /// What Kubernetes calls it, for others that share its mounts.
    pub name: Option<Box<str>>,
    /// Where it writes why it has ended: a path of the agent's, or one inside its root.
    pub termination_log: Option<TerminationLog>,
    /// The call that waits for the removal, and what to tell it instead of success.
    pub remover: Option<CallId>,
    pub failure: Option<Error>,
    /// OOM kills that have been reported.
    pub oom_kills: u64,
    /// While it is at its memory limit with nothing to reclaim.
    pub squeeze: Option<crate::thrash::Squeeze>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TerminationLog {
    /// The source of a bind mount: it outlives the container's processes.
    Guest(String),
    Inside(String),
}

/// Annotation with the path of the file in which a container may leave its last words (Kubernetes).
const TERMINATION_LOG: &str = "io.kubernetes.container.terminationMessagePath";
/// What the kubelet reads of it.
const MAX_TERMINATION_LOG: usize = 4096;

impl TerminationLog {
    pub fn of(spec: &Spec) -> Option<TerminationLog> {
        let path = spec.annotations.get(TERMINATION_LOG)?;
        let bound = |m: &&crate::proto::oci::Mount| {
            m.destination == *path && (m.type_ == "bind" || m.options.iter().any(|o| o == "bind" || o == "rbind"))
        };
        Some(match spec.mounts.iter().find(bound) {
            Some(mount) => TerminationLog::Guest(mount.source.clone()),
            None => TerminationLog::Inside(path.clone()),
        })
    }

    /// Up to 4096 bytes of it, `root` being the container's root directory.
    fn read(&self, root: RawFd) -> Result<String> {
        let file = match self {
            TerminationLog::Guest(path) => sys::open(path, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOFOLLOW, 0),
            TerminationLog::Inside(path) => runtime::path::open(root, path, libc::O_RDONLY | libc::O_NONBLOCK),
        };
        let file = file.context("open the termination log")?;
        if sys::fstat(file.raw())?.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(Error::precondition("the termination log is not an ordinary file"));
        }
        let mut text = Vec::new();
        while text.len() < MAX_TERMINATION_LOG {
            let room = MAX_TERMINATION_LOG - text.len();
            if sys::read_append(file.raw(), &mut text, room).context("read the termination log")? == 0 {
                break;
            }
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl Container {
    pub fn finished_code(&self, exec_id: &str) -> Option<u8> {
        self.finished.iter().rev().find(|(known, _)| &**known == exec_id).map(|(_, code)| *code)
    }

    pub fn remember(&mut self, exec_id: String, code: u8) {
        if self.finished.len() >= MAX_FINISHED {
            self.finished.pop_front();
        }
        self.finished.push_back((exec_id.into_boxed_str(), code));
    }
}

/// Exit codes that are remembered per container: a probe every few seconds must not fill the guest in a year.
const MAX_FINISHED: usize = 1024;

/// Names of containers become directory and cgroup names.
pub fn check_id(id: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if id.is_empty() || id.len() > 128 || !id.chars().all(good) || !id.starts_with(|c: char| c.is_ascii_alphanumeric())
    {
        return Err(Error::invalid(format!(
            "container id {id:?}: wanted are up to 128 letters, digits, '.', '_', '-', the first a letter or digit"
        )));
    }
    Ok(())
}

pub fn unknown(id: &str) -> Error {
    Error::invalid(format!("container {id:?} is not known to the agent"))
}

impl Agent {
    pub fn container(&self, id: &str) -> Result<&Container> {
        self.containers.get(id).ok_or_else(|| unknown(id))
    }

    /// The process that a call names; an empty exec id is the container's first one.
    pub fn find_process(&self, container: &str, exec_id: &str) -> Result<Key> {
        let record = self.container(container)?;
        if exec_id.is_empty() || self.processes.get(&record.init).is_some_and(|p| p.exec_id == exec_id) {
            return Ok(record.init);
        }
        if record.finished_code(exec_id).is_some() {
            return Err(Error::not_found("process already finished"));
        }
        record
            .execs
            .get(exec_id)
            .copied()
            .ok_or_else(|| Error::not_found(format!("process {exec_id:?} of container {container:?} is not known")))
    }

    pub fn process(&mut self, container: &str, exec_id: &str) -> Result<&mut Process> {
        let key = self.find_process(container, exec_id)?;
        self.processes.get_mut(&key).ok_or_else(|| Error::not_found(format!("process {exec_id:?} is gone")))
    }

    /// The container's group, for the calls about resources.
    pub fn cgroup_of(&self, id: &str) -> Result<&Cgroup> {
        self.container(id)?
            .cgroup
            .as_ref()
            .ok_or_else(|| Error::precondition(format!("container {id:?} has no control group")))
    }

    /// Every process of the container, as the guest numbers them; of one without a control group, those that the agent
    /// has started.
    pub fn pids_of(&self, id: &str) -> Result<Vec<sys::Pid>> {
        match &self.container(id)?.cgroup {
            Some(cgroup) => cgroup.pids(),
            None => Ok(self
                .processes
                .values()
                .filter(|p| p.container == id && p.pid != 0 && p.is_alive())
                .map(|p| p.pid)
                .collect()),
        }
    }

    pub fn update_container(&self, request: &pb::UpdateContainerRequest) -> Result<()> {
        let cgroup = self.cgroup_of(&request.container_id)?;
        let Some(resources) = request.resources.as_deref() else { return Ok(()) };
        if resources.devices.is_empty() {
            return cgroup.apply(resources).map(drop);
        }
        let rules = devices_bpf::compile(&runtime::devices::cgroup_rules(&resources.devices, &[]))?;
        let directory = cgroup.open()?;
        let limits = cgroup.apply(resources)?;
        devices_bpf::attach(directory.raw(), &rules).inspect_err(|_| limits.restore())
    }

    /// GetDiagnosticData: the termination log is what there is.
    pub fn diagnostic_data(&mut self, call: CallId, request: &pb::GetDiagnosticDataRequest) -> Result<Option<Vec<u8>>> {
        if request.log_type != "termination_log" {
            return Err(Error::invalid(format!("log type {:?} is not termination_log", request.log_type)));
        }
        let id = &request.container_id;
        let log = self
            .container(id)?
            .termination_log
            .clone()
            .ok_or_else(|| Error::not_found(format!("container {id:?} has no annotation {TERMINATION_LOG}")))?;
        let root = self.open_root(id)?;
        self.spawn_job(Completion::Answer(call), &[root.raw()], || {
            Ok(pb::GetDiagnosticDataResponse { data: log.read(root.raw())? }.to_vec())
        })?;
        Ok(None)
    }

    /// The container's root directory as its processes see it; of one that has none, as the agent does.
    pub fn open_root(&self, id: &str) -> Result<Fd> {
        let container = self.container(id)?;
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let pid = self.processes.get(&container.init).filter(|p| p.is_alive()).map_or(0, |p| p.pid);
        if pid != 0 && matches!(container.status, Status::Created | Status::Running) {
            if let Ok(fd) = sys::open(format!("/proc/{pid}/root"), flags, 0) {
                return Ok(fd);
            }
        }
        sys::open(&container.root, flags, 0).with_context(|| format!("open the root of container {id}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain_names() {
        for good in ["a", "a1", "web-1_x.y", "0123abc"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "\u{e4}", "a\0"] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
        assert!(check_id(&"x".repeat(129)).is_err());
    }
}
