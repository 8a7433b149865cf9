//! Containers: their records.

use crate::cgroup::Cgroup;
use crate::log;
use crate::prelude::*;
use crate::process::Key;
use crate::proto::oci::Spec;
use crate::runtime;
use crate::runtime::launch::Filter;
use crate::runtime::namespaces::Namespaces;
use crate::server::calls::CallId;
use crate::sys::{self, RawFd};
use crate::thrash::Squeeze;
use crate::watchable::Watched;
use alloc::collections::VecDeque;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Stopped,
    /// Being taken down; takes no further calls.
    Removing,
}

/// The states that may follow each.
const NEXT_STATES: &[(Status, &[Status])] = &[
    (Status::Creating, &[Status::Created, Status::Removing]),
    (Status::Created, &[Status::Running, Status::Stopped, Status::Removing]),
    (Status::Running, &[Status::Stopped, Status::Removing]),
    (Status::Stopped, &[Status::Removing]),
    (Status::Removing, &[]),
];

impl Status {
    fn may_become(self, next: Status) -> bool {
        NEXT_STATES.iter().any(|(status, followers)| *status == self && followers.contains(&next))
    }
}

/// What a new container is made of.
pub struct NewContainer {
    /// The exec id by which the host names its first process.
    pub init_exec_id: String,
    pub cgroup: Option<Cgroup>,
    pub namespaces: Namespaces,
    pub filter: Option<Filter>,
    pub root: String,
    pub storages: Vec<String>,
    pub watched: Vec<Watched>,
    pub name: Option<Box<str>>,
    pub termination_log: Option<TerminationLog>,
}

pub struct Container {
    /// Changed by [`Container::enter`] alone.
    status: Status,
    pub init: Key,
    init_exec_id: Box<str>,
    /// Further processes by their exec id.
    pub execs: BTreeMap<String, Key>,
    /// Exit codes of processes that have ended and whose output has been read, by exec id.
    pub finished: VecDeque<(Box<str>, u8)>,
    pub cgroup: Option<Cgroup>,
    pub namespaces: Namespaces,
    /// The seccomp filter for further processes.
    pub filter: Option<Filter>,
    /// The root directory in the agent's view.
    pub root: String,
    /// Mount points of its storages, in order, and how many of them are mounted.
    pub storages: Vec<String>,
    pub mounted: usize,
    /// Storages that are copies, which have to be kept up to date.
    pub watched: Vec<Watched>,
    /// Its name in Kubernetes, by which other containers that share its mounts refer to it.
    pub name: Option<Box<str>>,
    /// Kubernetes' termination log: a path in the guest, or one inside the container's root.
    pub termination_log: Option<TerminationLog>,
    /// The call that waits for the removal, and the error to answer it with instead of success.
    pub remover: Option<CallId>,
    pub failure: Option<Error>,
    /// OOM kills that have been reported.
    pub oom_kills: u64,
    /// While it is at its memory limit with nothing to reclaim.
    pub squeeze: Option<Squeeze>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TerminationLog {
    /// The source of a bind mount: it outlives the container's processes.
    Guest(String),
    Inside(String),
}

/// Annotation of Kubernetes: the path of the container's termination log.
pub const TERMINATION_LOG: &str = "io.kubernetes.container.terminationMessagePath";
/// How much of it the kubelet reads.
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
    pub fn read(&self, root: RawFd) -> Result<String> {
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
    /// One that is being created; its first process is `init`.
    pub fn new(new: NewContainer, init: Key) -> Container {
        Container {
            status: Status::Creating,
            init,
            init_exec_id: new.init_exec_id.into_boxed_str(),
            execs: BTreeMap::new(),
            finished: VecDeque::new(),
            cgroup: new.cgroup,
            namespaces: new.namespaces,
            filter: new.filter,
            root: new.root,
            storages: new.storages,
            mounted: 0,
            watched: new.watched,
            name: new.name,
            termination_log: new.termination_log,
            remover: None,
            failure: None,
            oom_kills: 0,
            squeeze: None,
        }
    }

    pub fn status(&self) -> Status {
        self.status
    }

    /// Changes the status; false, and nothing is changed, where [`NEXT_STATES`] does not have it.
    pub fn enter(&mut self, next: Status) -> bool {
        let allowed = self.status.may_become(next);
        if allowed {
            self.status = next;
        } else {
            log::debug(&format!("a container cannot become {next:?}: it is {:?}", self.status));
        }
        allowed
    }

    /// Whether it has not ended, nor is being removed.
    pub fn is_living(&self) -> bool {
        self.status == Status::Creating || self.has_processes()
    }

    /// Whether its first process exists: it has been created, and has not ended.
    pub fn has_processes(&self) -> bool {
        matches!(self.status, Status::Created | Status::Running)
    }

    /// The exit code of a process that is over, if it is still known.
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

/// The most exit codes kept per container: a probe every few seconds must not fill the guest's memory within a year.
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

/// The containers of the guest, by their ids.
#[derive(Default)]
pub struct Containers {
    records: BTreeMap<String, Container>,
}

impl Containers {
    /// The container that a call names.
    pub fn get(&self, id: &str) -> Result<&Container> {
        self.records.get(id).ok_or_else(|| unknown(id))
    }

    pub fn get_mut(&mut self, id: &str) -> Option<&mut Container> {
        self.records.get_mut(id)
    }

    pub fn contains(&self, id: &str) -> bool {
        self.records.contains_key(id)
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    pub fn ids(&self) -> Vec<String> {
        self.records.keys().cloned().collect()
    }

    pub fn all(&self) -> impl Iterator<Item = &Container> {
        self.records.values()
    }

    pub fn all_mut(&mut self) -> impl Iterator<Item = (&String, &mut Container)> {
        self.records.iter_mut()
    }

    pub fn insert(&mut self, id: &str, container: Container) {
        self.records.insert(id.to_string(), container);
    }

    pub fn remove(&mut self, id: &str) -> Option<Container> {
        self.records.remove(id)
    }

    /// The process that a call names; an empty exec id is the container's first one.
    pub fn find_process(&self, id: &str, exec_id: &str) -> Result<Key> {
        let record = self.get(id)?;
        if exec_id.is_empty() || *record.init_exec_id == *exec_id {
            return Ok(record.init);
        }
        if record.finished_code(exec_id).is_some() {
            return Err(Error::not_found("process already finished"));
        }
        record
            .execs
            .get(exec_id)
            .copied()
            .ok_or_else(|| Error::not_found(format!("process {exec_id:?} of container {id:?} is not known")))
    }

    /// Whether a process is the first one of the container.
    pub fn is_init(&self, id: &str, process: Key) -> bool {
        self.records.get(id).is_some_and(|container| container.init == process)
    }

    /// The container's group, for the calls about resources.
    pub fn cgroup_of(&self, id: &str) -> Result<&Cgroup> {
        self.get(id)?
            .cgroup
            .as_ref()
            .ok_or_else(|| Error::precondition(format!("container {id:?} has no control group")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::container;

    const ALL: [Status; 5] = [Status::Creating, Status::Created, Status::Running, Status::Stopped, Status::Removing];

    #[test]
    fn a_container_goes_through_its_states_in_order() {
        let allowed = [
            (Status::Creating, Status::Created),
            (Status::Created, Status::Running),
            (Status::Created, Status::Stopped),
            (Status::Running, Status::Stopped),
            (Status::Creating, Status::Removing),
            (Status::Created, Status::Removing),
            (Status::Running, Status::Removing),
            (Status::Stopped, Status::Removing),
        ];
        let mut container = container(7);
        for from in ALL {
            for to in ALL {
                container.status = from;
                let is_allowed = allowed.contains(&(from, to));
                assert_eq!(container.enter(to), is_allowed, "{from:?} -> {to:?}");
                assert_eq!(container.status(), if is_allowed { to } else { from });
            }
        }
    }

    #[test]
    fn processes_are_found_by_what_calls_name_them() {
        let mut containers = Containers::default();
        let mut record = container(7);
        record.execs.insert("shell".into(), 9);
        record.remember("over".into(), 3);
        containers.insert("c", record);
        assert_eq!(containers.find_process("c", ""), Ok(7));
        assert_eq!(containers.find_process("c", "first"), Ok(7));
        assert_eq!(containers.find_process("c", "shell"), Ok(9));
        assert_eq!(containers.find_process("c", "over").unwrap_err().message, "process already finished");
        assert!(containers.find_process("c", "other").unwrap_err().message.contains("is not known"));
        assert!(containers.find_process("d", "").unwrap_err().message.contains("is not known to the agent"));
        assert!(containers.is_init("c", 7) && !containers.is_init("c", 9) && !containers.is_init("d", 7));
    }

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
