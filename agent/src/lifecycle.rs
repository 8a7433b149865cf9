//! From create to remove: what the calls do with containers and processes.

use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::container::{check_id, unknown, Container, Status, TerminationLog, STATE_DIR};
use crate::jobs::Completion;
use crate::prelude::*;
use crate::process::{Key, Phase, Pipes, Process};
use crate::proto::agent as pb;
use crate::proto::oci::{Linux, Spec};
use crate::runtime::launch::Filter;
use crate::runtime::report::Reporter;
use crate::runtime::shared_mounts::Source;
use crate::runtime::{self, namespaces, ContainerPlan, ExecPlan};
use crate::server::calls::CallId;
use crate::sys::{self, Fd};
use crate::{fs, log, seccomp, storage};
use alloc::collections::VecDeque;

impl Agent {
    pub fn create_container(&mut self, call: CallId, request: pb::CreateContainerRequest) -> Result<()> {
        let id = request.container_id.as_str();
        check_id(id)?;
        if self.containers.contains_key(id) {
            return Err(Error::exists(format!("container {id:?} exists")));
        }
        if request.stdin_port | request.stdout_port | request.stderr_port != 0 {
            return Err(Error::unimplemented("streams by passed descriptors are not supported"));
        }
        let missing = |what: &str| Error::invalid(format!("the request has no {what}"));
        let spec = request.oci.as_deref().ok_or_else(|| missing("OCI spec"))?;
        let linux = spec.linux.as_deref().ok_or_else(|| missing("linux section"))?;
        // The specification needs a process only for a start: without one, the files can be worked on.
        let mut program = match spec.process.as_deref() {
            Some(process) => runtime::program(process, request.string_user.as_deref())?,
            None => runtime::no_program()?,
        };
        program.no_stdin = request.no_stdin;
        let namespaces = namespaces::parse(linux)?;
        let filter = compile_filter(linux)?;
        let root = spec.root.as_deref().map_or("", |r| &r.path).to_string();
        let name = container_name(spec).unwrap_or(id);
        let shared_mounts = self.sources_of(&request.shared_mounts, &[id, name])?;
        let exec_id = if request.exec_id.is_empty() { id } else { &request.exec_id };

        let shares_pids = request.sandbox_pidns || self.sandbox.all_share_pids;
        if shares_pids {
            self.sandbox.make_pid_namespace()?;
        }
        let others_pids = self.pid_namespace_of(&request.pids_of)?;
        let cgroup = self.make_cgroup(id, linux)?;
        let mut container = Container {
            status: Status::Creating,
            init: 0,
            execs: BTreeMap::new(),
            finished: VecDeque::new(),
            cgroup,
            namespaces,
            filter,
            root,
            storages: request.storages.iter().map(|s| s.mount_point.clone()).collect(),
            mounted: 0,
            watched: storage::watched(&request.storages),
            name: container_name(spec).map(Into::into),
            termination_log: TerminationLog::of(spec),
            remover: None,
            failure: None,
            oom_kills: 0,
            squeeze: None,
        };
        let mut shared = self.sandbox.shared().usable_by(&namespaces);
        if !shares_pids {
            shared.pid = None;
        }
        if let Some(namespace) = &others_pids {
            shared.pid = Some(namespace.raw());
        }
        let forked = (|| {
            // Root of a user namespace is nobody here, and still has to get through.
            fs::create_dir_all(&format!("{STATE_DIR}/{id}"), 0o711).context("make the container's directory")?;
            let directory = container.cgroup.as_ref().map(Cgroup::open).transpose()?;
            let pipes = Pipes::new(&program, self.settings.pipe_size)?;
            let (ours, theirs) = sys::socketpair(libc::SOCK_SEQPACKET).context("make a report socket")?;
            let plan = ContainerPlan {
                id,
                spec,
                storages: &request.storages,
                devices: &request.devices,
                shared_mounts: &shared_mounts,
                program,
                filter: container.filter.as_ref(),
                namespaces,
                shared,
                cgroup: container.cgroup.as_ref().zip(directory.as_ref()).map(|(c, fd)| (fd.raw(), c.path())),
                stdio: &pipes.child,
                report: Reporter(theirs.raw()),
            };
            let builder = runtime::create(&plan)?;
            self.add_process(Process::new(id, exec_id, builder, ours, pipes, call))
        })();
        match forked {
            Ok(key) => {
                container.init = key;
                let watches = !container.watched.is_empty();
                self.containers.insert(id.to_string(), container);
                if watches {
                    // Without the clock the container is as it was made: it is not lost for that.
                    self.start_watch_timer().unwrap_or_else(|e| log::error(&e.message));
                }
                Ok(())
            }
            Err(e) => {
                let _ = fs::remove_dir_all(format!("{STATE_DIR}/{id}"));
                if let Some(cgroup) = &container.cgroup {
                    let _ = cgroup.remove();
                }
                Err(e)
            }
        }
    }

    /// The containers and paths that are to be shared with a new container, which goes by `names`.
    fn sources_of(&self, wanted: &[pb::SharedMount], names: &[&str]) -> Result<Vec<Source>> {
        let find = |mount: &pb::SharedMount| {
            if !mount.dst_ctr.is_empty() && !names.contains(&mount.dst_ctr.as_str()) {
                return Err(Error::invalid(format!("it is for container {:?}, which is not this one", mount.dst_ctr)));
            }
            let by_name = || self.containers.values().find(|c| c.name.as_deref() == Some(&mount.src_ctr));
            let source = self.containers.get(&mount.src_ctr).or_else(by_name).ok_or_else(|| unknown(&mount.src_ctr))?;
            let process = self.processes.get(&source.init).filter(|p| p.is_alive() && p.pid != 0);
            let (Status::Created | Status::Running, Some(process)) = (source.status, process) else {
                return Err(Error::precondition(format!("container {:?} is not running", mount.src_ctr)));
            };
            Ok(Source {
                process: sys::pidfd_open(process.pid).context("open the other container's process")?,
                path: mount.src_path.clone(),
                destination: mount.dst_path.clone(),
            })
        };
        wanted.iter().map(|mount| find(mount).with_context(|| format!("shared mount {:?}", mount.name))).collect()
    }

    fn make_cgroup(&self, id: &str, linux: &Linux) -> Result<Option<Cgroup>> {
        if !self.has_cgroups {
            return Ok(None);
        }
        let cgroup = Cgroup::create(id, linux.resources.as_deref())?;
        if let Err(e) = self.watch_oom(&cgroup) {
            let _ = cgroup.remove();
            return Err(e);
        }
        Ok(Some(cgroup))
    }

    pub fn start_container(&mut self, call: CallId, id: &str) -> Result<()> {
        let container = self.containers.get_mut(id).ok_or_else(|| unknown(id))?;
        if container.status != Status::Created {
            return Err(Error::precondition(format!("container {id:?} is not created but {:?}", container.status)));
        }
        let process = self.processes.get_mut(&container.init).ok_or_else(|| unknown(id))?;
        process.release()?;
        process.starter = Some(call);
        container.status = Status::Running;
        Ok(())
    }

    /// The PID namespace of a running container's first process; none for an empty id.
    fn pid_namespace_of(&self, id: &str) -> Result<Option<Fd>> {
        if id.is_empty() {
            return Ok(None);
        }
        let container = self.container(id)?;
        let Some(init) = self.processes.get(&container.init).filter(|p| p.is_alive() && p.pid != 0) else {
            return Err(Error::precondition(format!(
                "container {id:?} is not running: nobody is in its PID namespace"
            )));
        };
        let namespace = sys::open(format!("/proc/{}/ns/pid", init.pid), libc::O_RDONLY, 0);
        namespace.with_context(|| format!("open the PID namespace of container {id:?}")).map(Some)
    }

    pub fn exec_process(&mut self, call: CallId, request: &pb::ExecProcessRequest) -> Result<()> {
        let (id, exec_id) = (request.container_id.as_str(), request.exec_id.as_str());
        let container = self.container(id)?;
        check_id(exec_id).map_err(|_| Error::invalid(format!("exec id {exec_id:?} is not a name")))?;
        let former = self.find_process(id, exec_id).ok();
        if former.and_then(|key| self.processes.get(&key)).is_some_and(|p| p.is_alive() || p.exec_id != exec_id) {
            return Err(Error::exists(format!("process {exec_id:?} of container {id:?} exists")));
        }
        let init = self.processes.get(&container.init).filter(|p| p.is_alive() && p.pid != 0);
        let (Status::Created | Status::Running, Some(init)) = (container.status, init) else {
            return Err(Error::precondition(format!("container {id:?} is not running")));
        };
        // It would freeze at its birth, and the call with it.
        if container.cgroup.as_ref().is_some_and(is_frozen) {
            return Err(Error::precondition(format!("container {id:?} is paused")));
        }
        if request.stdin_port | request.stdout_port | request.stderr_port != 0 {
            return Err(Error::unimplemented("streams by passed descriptors are not supported"));
        }
        let process = request.process.as_deref().ok_or_else(|| Error::invalid("the request has no process"))?;
        let mut program = runtime::program(process, request.string_user.as_deref())?;
        program.no_stdin = request.no_stdin;
        let pidfd = sys::pidfd_open(init.pid).context("open the container's process")?;
        let directory = container.cgroup.as_ref().map(Cgroup::open).transpose()?;
        let pipes = Pipes::new(&program, self.settings.pipe_size)?;
        let (ours, theirs) = sys::socketpair(libc::SOCK_SEQPACKET).context("make a report socket")?;
        let plan = ExecPlan {
            container: id,
            init: init.pid,
            pidfd: pidfd.raw(),
            cgroup: directory.as_ref().map(Fd::raw),
            namespaces: container.namespaces,
            program,
            filter: container.filter.as_ref(),
            stdio: &pipes.child,
            report: Reporter(theirs.raw()),
        };
        let builder = runtime::exec(&plan)?;
        // The name of one that has ended may be used again.
        if let Some(key) = former {
            self.drop_process(key);
        }
        let key = self.add_process(Process::new(id, exec_id, builder, ours, pipes, call))?;
        if let Some(container) = self.containers.get_mut(id) {
            container.finished.retain(|(known, _)| &**known != exec_id);
            container.execs.insert(exec_id.to_string(), key);
        }
        Ok(())
    }

    /// The process never became its program.
    pub fn on_failed_start(&mut self, key: Key, error: Error) {
        let Some(process) = self.processes.get_mut(&key) else { return };
        let (id, exec_id, starter) = (process.container.clone(), process.exec_id.clone(), process.starter.take());
        let building = process.phase == Phase::Building;
        process.kill();
        let Some(container) = self.containers.get_mut(&id) else { return };
        if container.init != key {
            container.execs.remove(&exec_id);
            self.drop_process(key);
        } else if building {
            // Nothing stays of a container that could not be made; the call is answered when that is so.
            container.remover = starter;
            container.failure = Some(error);
            self.begin_removal(&id);
            return;
        }
        if let Some(call) = starter {
            self.answer(call, Err(error));
        }
    }

    pub fn on_created(&mut self, id: &str) {
        if let Some(container) = self.containers.get_mut(id) {
            container.status = Status::Created;
        }
    }

    /// The container's first process has ended: so does the rest of it.
    pub fn on_init_exit(&mut self, id: &str) {
        self.look_for_oom();
        let Some(container) = self.containers.get_mut(id) else { return };
        if let Some(cgroup) = &container.cgroup {
            if let Err(e) = cgroup.kill_all() {
                log::error(&e.message);
            }
        }
        if container.status != Status::Removing {
            container.status = Status::Stopped;
        }
    }

    /// A signal to every process of the container, whoever started it.
    pub fn signal_all(&mut self, id: &str, signal: u32) -> Result<()> {
        let signal = signal_number(signal)?;
        let pids = self.pids_of(id)?;
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

    /// SIGKILL to the first process means the whole container.
    pub fn signal(&mut self, id: &str, exec_id: &str, signal: u32) -> Result<()> {
        let signal = signal_number(signal)?;
        let key = self.find_process(id, exec_id)?;
        let whole = signal == libc::SIGKILL && self.is_init(key);
        if whole {
            if let Some(cgroup) = &self.container(id)?.cgroup {
                cgroup.kill_all()?;
            }
        }
        let Some(process) = self.processes.get(&key) else { return Ok(()) };
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

    pub fn remove_container(&mut self, call: CallId, id: &str) -> Result<()> {
        let Some(container) = self.containers.get_mut(id) else {
            // Already gone is what the caller wants.
            self.answer(call, Ok(vec![]));
            return Ok(());
        };
        if container.status == Status::Removing {
            return Err(Error::precondition(format!("container {id:?} is being removed already")));
        }
        container.remover = Some(call);
        self.begin_removal(id);
        Ok(())
    }

    /// Kills what lives; the rest follows when it is dead.
    pub fn begin_removal(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        container.status = Status::Removing;
        if let Some(cgroup) = &container.cgroup {
            if let Err(e) = cgroup.thaw().and_then(|()| cgroup.kill_all()) {
                log::error(&e.message);
            }
        }
        for process in self.processes.values().filter(|p| p.container == id) {
            process.kill();
        }
        self.continue_removal(id);
    }

    /// Called whenever a process of the container may have gone.
    pub fn continue_removal(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id).filter(|c| c.status == Status::Removing) else { return };
        if self.processes.values().any(|p| p.container == id && p.is_anything_left()) {
            return;
        }
        let mounted = container.storages.drain(..).take(container.mounted);
        let mounts: Vec<String> = mounted.filter(|mount| !storage::is_of_sandbox(mount)).rev().collect();
        let cgroup = container.cgroup.take();
        let directory = format!("{STATE_DIR}/{id}");
        let spawned =
            self.spawn_job(Completion::Removed(id.to_string()), &[], || undo(&mounts, cgroup.as_ref(), &directory));
        if let Err(e) = spawned {
            self.on_removed(id, Err(e));
        }
    }

    pub fn on_removed(&mut self, id: &str, outcome: Result<Vec<u8>>) {
        let Some(container) = self.containers.remove(id) else { return };
        if let Err(e) = &outcome {
            log::error(&format!("remove container {id}: {e}"));
        }
        let keys: Vec<Key> = self.processes.iter().filter(|(_, p)| p.container == id).map(|(k, _)| *k).collect();
        for key in keys {
            self.drop_process(key);
        }
        if let Some(call) = container.remover {
            self.answer(call, container.failure.map_or(outcome, Err));
        }
        self.continue_destroy();
    }
}

/// What Kubernetes calls a container: containerd's annotation or CRI-O's.
fn container_name(spec: &Spec) -> Option<&str> {
    let known = ["io.kubernetes.cri.container-name", "io.kubernetes.container.name"];
    known.iter().find_map(|name| spec.annotations.get(*name)).map(String::as_str)
}

fn signal_number(signal: u32) -> Result<i32> {
    let signal = i32::try_from(signal).ok().filter(|s| (0..=64).contains(s));
    signal.ok_or_else(|| Error::invalid("the signal is not between 0 and 64"))
}

fn is_frozen(cgroup: &Cgroup) -> bool {
    fs::read(format!("{}/cgroup.freeze", cgroup.path())).is_ok_and(|text| text.starts_with(b"1"))
}

fn compile_filter(linux: &Linux) -> Result<Option<Filter>> {
    linux
        .seccomp
        .as_deref()
        .map(|profile| Ok(Filter { program: seccomp::compile(profile)?, flags: seccomp::flags(&profile.flags)? }))
        .transpose()
}

/// In a child: storages in reverse (their data written back), directory, control group; goes on after an error and
/// reports the first.
fn undo(mounts: &[String], cgroup: Option<&Cgroup>, directory: &str) -> Result<Vec<u8>> {
    let mut first = Ok(vec![]);
    let mut note = |outcome: Result<()>| {
        if let (Err(e), Ok(_)) = (outcome, &first) {
            first = Err(e);
        }
    };
    for mount in mounts {
        note(storage::unmount(mount));
    }
    if let Some(cgroup) = cgroup {
        note(cgroup.remove());
    }
    note(fs::remove_dir_all(directory).with_context(|| format!("remove {directory}")));
    first
}
