//! From create to remove: containers and the processes in them.

use crate::cgroup::Cgroup;
use crate::cgroup_limits;
use crate::container::{check_id, unknown, Container, Containers, NewContainer, Status, TerminationLog};
use crate::jobs::Completion;
use crate::oom::OomWatch;
use crate::paths::STATE_DIR;
use crate::prelude::*;
use crate::process::{Key, Phase, Pipes, Process};
use crate::processes::Processes;
use crate::proto::agent as pb;
use crate::proto::oci::{Linux, Spec};
use crate::runtime::launch::{Filter, Program};
use crate::runtime::namespaces::{Namespaces, Shared};
use crate::runtime::report::Reporter;
use crate::runtime::shared_mounts::Source;
use crate::runtime::{self, namespaces, ContainerPlan, ExecPlan};
use crate::server::calls::CallId;
use crate::state::State;
use crate::sys::{self, Fd, RawFd};
use crate::{fs, log, seccomp, storage};

// ---- create ----

/// A CreateContainer request whose parts have been checked and read; nothing has been done yet.
struct Checked<'a> {
    request: &'a pb::CreateContainerRequest,
    id: &'a str,
    spec: &'a Spec,
    linux: &'a Linux,
    program: Program,
    namespaces: Namespaces,
    filter: Option<Filter>,
    shared_mounts: Vec<Source>,
}

/// CreateContainer: forks the builder. The call is answered when the first process is prepared.
pub fn create_container(state: &mut State, call: CallId, request: &pb::CreateContainerRequest) -> Result<()> {
    let checked = check(&state.containers, &state.processes, request)?;
    let shares_pids = request.sandbox_pidns || state.sandbox.all_share_pids;
    if shares_pids {
        state.sandbox.make_pid_namespace()?;
    }
    let others_pids = pid_namespace_of(&state.containers, &state.processes, &request.pids_of)?;
    let mut shared = state.sandbox.shared().usable_by(&checked.namespaces);
    if !shares_pids {
        shared.pid = None;
    }
    if let Some(namespace) = &others_pids {
        shared.pid = Some(namespace.raw());
    }
    let device_program =
        if state.oom.has_cgroups() { runtime::attach::known_program(&request.devices, checked.spec)? } else { None };
    let device_program = device_program.map(|code| state.device_program.load(code)).transpose()?;
    let cgroup = make_cgroup(&state.oom, checked.id, checked.linux)?;
    let created = start_builder(state, call, &checked, shared, cgroup.as_ref(), device_program);
    let key = created.inspect_err(|_| discard(checked.id, cgroup.as_ref()))?;
    let container = Container::new(record_of(checked, cgroup), key);
    let watches = !container.watched.is_empty();
    state.containers.insert(&request.container_id, container);
    if watches {
        // Without the timer the copy stays as it was made: the container is not lost for that.
        state.watcher.start(&state.io.poller).unwrap_or_else(|e| log::error(&e.message));
    }
    Ok(())
}

fn check<'a>(
    containers: &Containers,
    processes: &Processes,
    request: &'a pb::CreateContainerRequest,
) -> Result<Checked<'a>> {
    let id = request.container_id.as_str();
    check_id(id)?;
    if containers.contains(id) {
        return Err(Error::exists(format!("container {id:?} exists")));
    }
    refuse_passed_streams(request.stdin_port | request.stdout_port | request.stderr_port)?;
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
    let names = [id, container_name(spec).unwrap_or(id)];
    let shared_mounts = sources_of(containers, processes, &request.shared_mounts, &names)?;
    Ok(Checked { request, id, spec, linux, program, namespaces, filter, shared_mounts })
}

fn refuse_passed_streams(ports: u32) -> Result<()> {
    if ports != 0 {
        return Err(Error::unimplemented("streams by passed descriptors are not supported"));
    }
    Ok(())
}

/// The containers and paths that are to be shared with a new container, which goes by `names`.
fn sources_of(
    containers: &Containers,
    processes: &Processes,
    wanted: &[pb::SharedMount],
    names: &[&str],
) -> Result<Vec<Source>> {
    let find = |mount: &pb::SharedMount| {
        if !mount.dst_ctr.is_empty() && !names.contains(&mount.dst_ctr.as_str()) {
            return Err(Error::invalid(format!("it is for container {:?}, which is not this one", mount.dst_ctr)));
        }
        let by_name = || containers.all().find(|c| c.name.as_deref() == Some(&mount.src_ctr));
        let source = containers.get(&mount.src_ctr).ok().or_else(by_name).ok_or_else(|| unknown(&mount.src_ctr))?;
        let Some(process) = processes.running_init(source).filter(|_| source.has_processes()) else {
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

/// The PID namespace of a running container's first process; none for an empty id.
fn pid_namespace_of(containers: &Containers, processes: &Processes, id: &str) -> Result<Option<Fd>> {
    if id.is_empty() {
        return Ok(None);
    }
    let Some(init) = processes.running_init(containers.get(id)?) else {
        return Err(Error::precondition(format!("container {id:?} is not running: nobody is in its PID namespace")));
    };
    let namespace = sys::open(format!("/proc/{}/ns/pid", init.pid), libc::O_RDONLY, 0);
    namespace.with_context(|| format!("open the PID namespace of container {id:?}")).map(Some)
}

/// The control group of a new container, with its limits; none where the agent has no control groups.
fn make_cgroup(oom: &OomWatch, id: &str, linux: &Linux) -> Result<Option<Cgroup>> {
    if !oom.has_cgroups() {
        return Ok(None);
    }
    // The builder sets limits of single devices: it learns their numbers.
    let resources = linux.resources.as_deref().map(cgroup_limits::without_devices);
    let cgroup = Cgroup::create(id, resources.as_ref())?;
    oom.watch(&cgroup).inspect_err(|_| {
        let _ = cgroup.remove();
    })?;
    Ok(Some(cgroup))
}

/// Makes the container's directory and forks its builder; the key of its first process.
fn start_builder(
    state: &mut State,
    call: CallId,
    checked: &Checked,
    shared: Shared,
    cgroup: Option<&Cgroup>,
    device_program: Option<RawFd>,
) -> Result<Key> {
    let (id, request) = (checked.id, checked.request);
    // 0711: the root of a user namespace is an unprivileged user out here and still has to traverse it.
    fs::create_dir_all(&format!("{STATE_DIR}/{id}"), 0o711).context("make the container's directory")?;
    let directory = cgroup.map(Cgroup::open).transpose()?;
    let pipes = Pipes::new(&checked.program, state.settings.pipe_size)?;
    let (ours, theirs) = sys::socketpair(libc::SOCK_SEQPACKET).context("make a report socket")?;
    let builder = runtime::create(&ContainerPlan {
        id,
        spec: checked.spec,
        storages: &request.storages,
        devices: &request.devices,
        shared_mounts: &checked.shared_mounts,
        program: &checked.program,
        filter: checked.filter.as_ref(),
        namespaces: checked.namespaces,
        shared,
        cgroup: cgroup.zip(directory.as_ref()).map(|(cgroup, fd)| (fd.raw(), cgroup.path())),
        device_program,
        stdio: &pipes.child,
        report: Reporter { fd: theirs.raw(), phases: state.io.trace.is_recorded(call) },
    })?;
    let process = Process::new(id, exec_id_of(request), builder, ours, pipes, call);
    state.processes.add(&mut state.io, process)
}

/// The name of the container's first process among its processes.
fn exec_id_of(request: &pb::CreateContainerRequest) -> &str {
    if request.exec_id.is_empty() {
        &request.container_id
    } else {
        &request.exec_id
    }
}

/// Removes what was made for a container whose builder could not be started.
fn discard(id: &str, cgroup: Option<&Cgroup>) {
    let _ = fs::remove_dir_all(format!("{STATE_DIR}/{id}"));
    if let Some(cgroup) = cgroup {
        let _ = cgroup.remove();
    }
}

fn record_of(checked: Checked, cgroup: Option<Cgroup>) -> NewContainer {
    let (request, spec) = (checked.request, checked.spec);
    NewContainer {
        init_exec_id: exec_id_of(request).to_string(),
        cgroup,
        namespaces: checked.namespaces,
        filter: checked.filter,
        root: spec.root.as_deref().map_or("", |r| &r.path).to_string(),
        storages: request.storages.iter().map(|s| s.mount_point.clone()).collect(),
        watched: storage::watched(&request.storages),
        name: container_name(spec).map(Into::into),
        termination_log: TerminationLog::of(spec),
    }
}

/// The first process is prepared. A container that is being removed meanwhile stays so.
pub fn on_created(containers: &mut Containers, id: &str) {
    if let Some(container) = containers.get_mut(id) {
        container.enter(Status::Created);
    }
}

// ---- start and exec ----

/// StartContainer: answered when the first process has become its program.
pub fn start_container(state: &mut State, call: CallId, id: &str) -> Result<()> {
    let container = state.containers.get_mut(id).ok_or_else(|| unknown(id))?;
    if container.status() != Status::Created {
        return Err(Error::precondition(format!("container {id:?} is not created but {:?}", container.status())));
    }
    let process = state.processes.get_mut(container.init).ok_or_else(|| unknown(id))?;
    process.release()?;
    process.starter = Some(call);
    container.enter(Status::Running);
    Ok(())
}

/// ExecProcess: forks the builder of a further process. The call is answered when that has become its program.
pub fn exec_process(state: &mut State, call: CallId, request: &pb::ExecProcessRequest) -> Result<()> {
    let (id, exec_id) = (request.container_id.as_str(), request.exec_id.as_str());
    let container = state.containers.get(id)?;
    check_id(exec_id).map_err(|_| Error::invalid(format!("exec id {exec_id:?} is not a name")))?;
    let former = state.containers.find_process(id, exec_id).ok();
    if former.and_then(|key| state.processes.get(key)).is_some_and(|p| p.is_alive() || p.exec_id != exec_id) {
        return Err(Error::exists(format!("process {exec_id:?} of container {id:?} exists")));
    }
    let Some(init) = state.processes.running_init(container).filter(|_| container.has_processes()) else {
        return Err(Error::precondition(format!("container {id:?} is not running")));
    };
    // A process born into a frozen group freezes, and the call would wait for it.
    if container.cgroup.as_ref().is_some_and(is_frozen) {
        return Err(Error::precondition(format!("container {id:?} is paused")));
    }
    refuse_passed_streams(request.stdin_port | request.stdout_port | request.stderr_port)?;
    let process = request.process.as_deref().ok_or_else(|| Error::invalid("the request has no process"))?;
    let mut program = runtime::program(process, request.string_user.as_deref())?;
    program.no_stdin = request.no_stdin;
    let pidfd = sys::pidfd_open(init.pid).context("open the container's process")?;
    let directory = container.cgroup.as_ref().map(Cgroup::open).transpose()?;
    let pipes = Pipes::new(&program, state.settings.pipe_size)?;
    let (ours, theirs) = sys::socketpair(libc::SOCK_SEQPACKET).context("make a report socket")?;
    let builder = runtime::exec(&ExecPlan {
        container: id,
        init: init.pid,
        pidfd: pidfd.raw(),
        cgroup: directory.as_ref().map(Fd::raw),
        namespaces: container.namespaces,
        program: &program,
        filter: container.filter.as_ref(),
        stdio: &pipes.child,
        report: Reporter { fd: theirs.raw(), phases: state.io.trace.is_recorded(call) },
    })?;
    // The name of one that has ended may be used again.
    if let Some(key) = former {
        state.processes.remove(&mut state.io, key);
    }
    let process = Process::new(id, exec_id, builder, ours, pipes, call);
    let key = state.processes.add(&mut state.io, process)?;
    if let Some(container) = state.containers.get_mut(id) {
        container.finished.retain(|(known, _)| &**known != exec_id);
        container.execs.insert(exec_id.to_string(), key);
    }
    Ok(())
}

/// The process never became its program.
pub fn on_failed_start(state: &mut State, key: Key, error: Error) {
    let Some(process) = state.processes.get_mut(key) else { return };
    let (id, exec_id, starter) = (process.container.clone(), process.exec_id.clone(), process.starter.take());
    let building = process.phase() == Phase::Building;
    process.kill();
    let Some(container) = state.containers.get_mut(&id) else { return };
    if container.init != key {
        container.execs.remove(&exec_id);
        state.processes.remove(&mut state.io, key);
    } else if building {
        // A container that could not be made is removed completely; the call is answered after that.
        container.remover = starter;
        container.failure = Some(error);
        begin_removal(state, &id);
        return;
    }
    if let Some(call) = starter {
        state.io.answer(call, Err(error));
    }
}

/// Gives up a process that is still being made for a call whose time is over: its failure is the answer. False: there
/// is none.
pub fn give_up(state: &mut State, call: CallId, error: &Error) -> bool {
    let key = state.processes.find(|p| p.starter == Some(call) && p.phase() == Phase::Building);
    if let Some(key) = key {
        state.io.answer(call, Err(error.clone()));
        on_failed_start(state, key, error.clone());
    }
    key.is_some()
}

// ---- the end ----

/// The container's first process has ended: so does the rest of it.
pub fn on_init_exit(state: &mut State, id: &str) {
    state.oom.look_for_kills(&mut state.io, &mut state.containers);
    let Some(container) = state.containers.get_mut(id) else { return };
    if let Some(cgroup) = &container.cgroup {
        if let Err(e) = cgroup.kill_all() {
            log::error(&e.message);
        }
    }
    if container.status() != Status::Removing {
        container.enter(Status::Stopped);
    }
}

/// RemoveContainer: answered when nothing is left of it.
pub fn remove_container(state: &mut State, call: CallId, id: &str) -> Result<()> {
    let Some(container) = state.containers.get_mut(id) else {
        // It is already gone: that is what the caller wants.
        state.io.answer(call, Ok(vec![]));
        return Ok(());
    };
    if container.status() == Status::Removing {
        return Err(Error::precondition(format!("container {id:?} is being removed already")));
    }
    container.remover = Some(call);
    begin_removal(state, id);
    Ok(())
}

/// DestroySandbox: removes every container, then what they had in common.
pub fn destroy_sandbox(state: &mut State, call: CallId) -> Result<()> {
    state.sandbox.begin_destroy(call)?;
    for id in state.containers.ids() {
        begin_removal(state, &id);
    }
    finish_sandbox(state);
    Ok(())
}

fn finish_sandbox(state: &mut State) {
    if state.containers.is_empty() {
        state.sandbox.finish(&mut state.io, &mut state.jobs);
    }
}

/// Kills what lives; the rest follows when it is dead.
fn begin_removal(state: &mut State, id: &str) {
    let Some(container) = state.containers.get_mut(id) else { return };
    if container.status() != Status::Removing {
        container.enter(Status::Removing);
    }
    if let Some(cgroup) = &container.cgroup {
        if let Err(e) = cgroup.thaw().and_then(|()| cgroup.kill_all()) {
            log::error(&e.message);
        }
    }
    state.processes.of_container(id).for_each(Process::kill);
    continue_removal(state, id);
}

/// Called whenever a process of the container may have gone.
pub fn continue_removal(state: &mut State, id: &str) {
    let Some(container) = state.containers.get_mut(id).filter(|c| c.status() == Status::Removing) else { return };
    if state.processes.of_container(id).any(Process::is_anything_left) {
        return;
    }
    let mounted = container.storages.drain(..).take(container.mounted);
    let mounts: Vec<String> = mounted.filter(|mount| !storage::is_of_sandbox(mount)).rev().collect();
    let cgroup = container.cgroup.take();
    let directory = format!("{STATE_DIR}/{id}");
    let completion = Completion::Removed(id.to_string());
    let spawned =
        state.jobs.spawn(&mut state.io.poller, completion, &[], || undo(&mounts, cgroup.as_ref(), &directory));
    if let Err(e) = spawned {
        on_removed(state, id, Err(e));
    }
}

/// The job that took the container's things away has ended.
pub fn on_removed(state: &mut State, id: &str, outcome: Result<Vec<u8>>) {
    let Some(container) = state.containers.remove(id) else { return };
    if let Err(e) = &outcome {
        log::error(&format!("remove container {id}: {e}"));
    }
    for key in state.processes.keys_of(id) {
        state.processes.remove(&mut state.io, key);
    }
    if let Some(call) = container.remover {
        state.io.answer(call, container.failure.map_or(outcome, Err));
    }
    state.sandbox.prepare();
    finish_sandbox(state);
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

// ---- parts of a specification ----

/// What Kubernetes calls a container: containerd's annotation or CRI-O's.
fn container_name(spec: &Spec) -> Option<&str> {
    let known = ["io.kubernetes.cri.container-name", "io.kubernetes.container.name"];
    known.iter().find_map(|name| spec.annotations.get(*name)).map(String::as_str)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::container;

    #[test]
    fn a_container_that_is_being_removed_does_not_become_created() {
        // Its creation was given up while the report that its process is ready was on the way.
        let mut containers = Containers::default();
        let mut record = container(1);
        record.enter(Status::Removing);
        containers.insert("c", record);
        containers.insert("d", container(2));
        for id in ["c", "d", "unknown"] {
            on_created(&mut containers, id);
        }
        assert_eq!(containers.get("c").unwrap().status(), Status::Removing);
        assert_eq!(containers.get("d").unwrap().status(), Status::Created);
    }
}
