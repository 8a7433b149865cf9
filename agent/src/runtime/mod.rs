//! The container runtime: what happens in the children that the agent forks.
//!
//! Two steps for each process. A *builder*, still in the agent's namespaces, does what may take long (storages, waiting
//! for devices) and makes the process itself with CLONE_PARENT, so that the agent is its parent; then the process sets
//! itself up from inside. Both report over one socket ([`report`]). The agent never waits for either.

pub mod attach;
pub mod caps;
pub mod command;
pub mod console;
pub mod devices;
pub mod hooks;
pub mod launch;
pub mod limits;
pub mod mounts;
pub mod namespaces;
pub mod path;
pub mod report;
pub mod rootfs;
pub mod shared_mounts;
pub mod user;

use crate::prelude::*;
use crate::proto::agent::{Device, Storage, StringUser};
use crate::proto::oci::{LinuxDevice, LinuxIDMapping, Process, Spec};
use crate::sys::{self, Fd, Fork, Pid, RawFd};
use crate::{cgroup_limits, fs, log, storage};
use core::convert::Infallible;
use launch::{Filter, Program, Stdio};
use namespaces::{Namespaces, Shared};
use report::Reporter;
use rootfs::Rootfs;

const DEFAULT_UMASK: u32 = 0o022;

/// A new container, everything checked that can be checked without doing it.
pub struct ContainerPlan<'a> {
    pub id: &'a str,
    pub spec: &'a Spec,
    pub storages: &'a [Storage],
    pub devices: &'a [Device],
    pub shared_mounts: &'a [shared_mounts::Source],
    pub program: &'a Program,
    pub filter: Option<&'a Filter>,
    pub namespaces: Namespaces,
    /// The sandbox's namespaces, where it has some.
    pub shared: Shared,
    /// The cgroup's directory: open, and by name.
    pub cgroup: Option<(RawFd, &'a str)>,
    /// Its device program, where that is in the kernel already.
    pub device_program: Option<RawFd>,
    pub stdio: &'a Stdio,
    pub report: Reporter,
}

/// A further process in a container.
pub struct ExecPlan<'a> {
    pub container: &'a str,
    /// The container's first process, and a pidfd of it.
    pub init: Pid,
    pub pidfd: RawFd,
    pub cgroup: Option<RawFd>,
    pub namespaces: Namespaces,
    pub program: &'a Program,
    pub filter: Option<&'a Filter>,
    pub stdio: &'a Stdio,
    pub report: Reporter,
}

/// Checks a process of the spec.
pub fn program(process: &Process, string_user: Option<&StringUser>) -> Result<Program> {
    if process.args.is_empty() {
        return Err(Error::invalid("process.args is empty"));
    }
    for (what, text) in
        [("process.apparmorProfile", &process.apparmor_profile), ("process.selinuxLabel", &process.selinux_label)]
    {
        if !text.is_empty() {
            return Err(Error::unimplemented(format!("{what} {text:?}: the guest has no such security module")));
        }
    }
    Ok(Program {
        args: process.args.clone(),
        env: process.env.clone(),
        cwd: process.cwd.clone(),
        user: user::Wanted::new(process.user.as_deref(), string_user),
        caps: caps::parse(process.capabilities.as_deref()),
        limits: limits::parse(&process.rlimits)?,
        no_new_privileges: process.no_new_privileges,
        oom_score_adj: process.oom_score_adj,
        umask: process.user.as_ref().and_then(|user| user.umask).unwrap_or(DEFAULT_UMASK) & 0o777,
        terminal: process.terminal,
        no_stdin: false,
        console_size: process.console_size.as_deref().cloned(),
    })
}

/// A placeholder for the program of a container without a process, which is only made to work on its files.
pub fn no_program() -> Result<Program> {
    Ok(Program {
        args: vec![],
        env: vec![],
        cwd: String::new(),
        user: user::Wanted::new(None, None),
        caps: caps::parse(None),
        limits: vec![],
        no_new_privileges: true,
        oom_score_adj: 0,
        umask: DEFAULT_UMASK,
        terminal: false,
        no_stdin: false,
        console_size: None,
    })
}

/// Forks the builder of a container; its pid.
pub fn create(plan: &ContainerPlan) -> Result<Pid> {
    match sys::fork(0, None).context("fork")? {
        Fork::Parent(pid) => Ok(pid),
        Fork::Child => {
            let mut others =
                vec![plan.cgroup.map(|c| c.0), plan.device_program, plan.shared.ipc, plan.shared.uts, plan.shared.pid];
            others.extend(plan.shared_mounts.iter().map(|source| Some(source.process.raw())));
            become_child(plan.stdio, plan.report, &others);
            finish(plan.report, build_container(plan))
        }
    }
}

/// Forks the builder of a process in a container; its pid.
pub fn exec(plan: &ExecPlan) -> Result<Pid> {
    match sys::fork(0, None).context("fork")? {
        Fork::Parent(pid) => Ok(pid),
        Fork::Child => {
            become_child(plan.stdio, plan.report, &[plan.cgroup, Some(plan.pidfd)]);
            finish(plan.report, build_exec(plan))
        }
    }
}

/// Reports a failure and ends the child.
fn finish(report: Reporter, outcome: Result<()>) -> ! {
    match outcome {
        Ok(()) => sys::exit(0),
        Err(e) => {
            report.failed(&e);
            sys::exit(1)
        }
    }
}

/// Closes the agent's descriptors and makes this process unreadable to the container.
fn become_child(stdio: &Stdio, report: Reporter, others: &[Option<RawFd>]) {
    let mut keep: Vec<RawFd> = vec![report.fd];
    keep.extend(others.iter().flatten());
    if let Some(ends) = stdio {
        keep.extend(ends.iter().map(Fd::raw));
    }
    sys::close_all_but(keep);
    // The console is closed with the rest.
    log::set_output(2);
    // No process of the container may inspect this one, or open its /proc/PID/exe, before it has become the program.
    let _ = sys::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
}

fn build_container(plan: &ContainerPlan) -> Result<()> {
    plan.report.phase("preparation");
    let attached = attach::resolve(plan.devices, plan.spec)?;
    set_oom_score(plan.program.oom_score_adj)?;
    plan.report.phase("devices");
    for (count, storage) in plan.storages.iter().enumerate() {
        storage::mount_storage(storage)?;
        plan.report.mounted(count as u32 + 1);
    }
    plan.report.phase("storages");
    if let Some((cgroup, path)) = plan.cgroup {
        match plan.device_program {
            Some(program) => crate::devices_bpf::attach_loaded(cgroup, program)?,
            None => attach::restrict(cgroup, plan.spec, &attached)?,
        }
        cgroup_limits::apply(path, &attached.limits)?;
    }
    let shared = shared_mounts::take(plan.shared_mounts)?;
    let root = plan.spec.root.as_deref().map_or("", |r| &r.path);
    if !fs::is_dir(root) {
        return Err(Error::invalid(format!("root.path {root:?} is not a directory of the guest")));
    }
    plan.shared.join()?;
    plan.report.phase("cgroup and shared namespaces");
    let flags = libc::CLONE_NEWNS as u64 | libc::CLONE_PARENT as u64 | plan.namespaces.clone_flags(&plan.shared);
    let (wait, go) = sys::pipe(0).context("make a pipe")?;
    match sys::fork(flags, plan.cgroup.map(|c| c.0)).context("make the container's process")? {
        Fork::Child => {
            drop(go);
            let Err(e) = init_container(plan, &attached.devices, root, &shared, &wait);
            plan.report.failed(&e);
            sys::exit(1)
        }
        Fork::Parent(pid) => {
            plan.report.pid(pid);
            if plan.namespaces.user {
                let linux = plan.spec.linux.as_deref();
                let map = write_map(pid, "uid_map", "uidMappings", linux.map_or(&[], |l| &l.uid_mappings))
                    .and_then(|()| write_map(pid, "gid_map", "gidMappings", linux.map_or(&[], |l| &l.gid_mappings)));
                if let Err(e) = map {
                    let _ = sys::kill(pid, libc::SIGKILL);
                    return Err(e);
                }
            }
            sys::write_all(go.raw(), b"g").context("let the container's process go")
        }
    }
}

fn write_map(pid: Pid, file: &str, name: &str, mappings: &[LinuxIDMapping]) -> Result<()> {
    if mappings.is_empty() {
        return Err(Error::invalid(format!("a user namespace needs {name}")));
    }
    let text: String = mappings.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size)).collect();
    fs::write_existing(format!("/proc/{pid}/{file}"), &text).with_context(|| format!("write {file}"))
}

fn set_oom_score(adjustment: i64) -> Result<()> {
    if adjustment == 0 {
        return Ok(());
    }
    fs::write_existing("/proc/self/oom_score_adj", &adjustment.to_string())
        .with_context(|| format!("set oomScoreAdj to {adjustment}"))
}

/// The container's first process, from its birth in new namespaces.
fn init_container(
    plan: &ContainerPlan,
    devices: &[LinuxDevice],
    root: &str,
    shared: &[shared_mounts::Tree],
    wait: &Fd,
) -> Result<Infallible> {
    let mut byte = [0u8];
    if sys::read(wait.raw(), &mut byte).context("wait for the builder")? == 0 {
        return Err(Error::internal("the builder has ended early"));
    }
    sys::setsid().context("start a session")?;
    if plan.namespaces.user {
        sys::set_gid(0).and_then(|()| sys::set_uid(0)).context("become root of the user namespace")?;
    }
    if plan.namespaces.cgroup {
        // Here, not at the clone: the root of the new namespace is the group that the caller is in.
        sys::unshare(libc::CLONE_NEWCGROUP).context("make a cgroup namespace")?;
    }
    let spec = plan.spec;
    let linux = spec.linux.as_deref().ok_or_else(|| Error::invalid("the spec has no linux section"))?;
    if !spec.hostname.is_empty() {
        sys::sethostname(&spec.hostname).with_context(|| format!("set the host name {:?}", spec.hostname))?;
    }
    // Opened while the agent's own file system is still visible.
    let proc = sys::open("/proc", libc::O_PATH | libc::O_DIRECTORY, 0).context("open /proc")?;
    let null = sys::open("/dev/null", libc::O_PATH, 0).context("open /dev/null")?;

    plan.report.phase("namespaces");
    let rootfs = Rootfs::new(root, linux)?;
    let context = mounts::MountContext {
        cgroup: plan.cgroup.map(|c| c.1),
        own_cgroup_namespace: plan.namespaces.cgroup,
        user_namespace: plan.namespaces.user,
    };
    rootfs.fill(spec, devices, &context)?;
    shared_mounts::attach(rootfs.fd(), shared)?;
    plan.report.phase("mounts");
    let terminal = if plan.program.terminal {
        let (master, slave) = console::open(rootfs.fd(), plan.program.console_size.as_ref())?;
        console::bind_console(rootfs.fd(), slave.raw())?;
        plan.report.terminal(master.raw());
        Some(slave)
    } else {
        None
    };
    rootfs::set_sysctls(proc.raw(), linux)?;
    rootfs.protect(linux, &plan.program.cwd, null.raw())?;
    rootfs.pivot(spec)?;
    drop((proc, null));
    plan.report.phase("root");
    let hooks = spec.hooks.as_deref().map_or(&[][..], |h| &h.start_container);
    launch::launch(plan.program, plan.filter, terminal.as_ref(), plan.stdio, hooks, plan.id, plan.report)
}

fn build_exec(plan: &ExecPlan) -> Result<()> {
    plan.report.phase("preparation");
    set_oom_score(plan.program.oom_score_adj)?;
    let inits = plan.cgroup.and_then(|_| crate::cgroup::of_process(plan.init));
    // The cgroup namespace comes later: from inside it, the agent's own group cannot be left.
    let mut kinds = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if plan.namespaces.user {
        kinds |= libc::CLONE_NEWUSER;
    }
    sys::setns(plan.pidfd, kinds).context("join the container's namespaces")?;
    let (wait, go) = sys::pipe(0).context("make a pipe")?;
    let forked = sys::fork(libc::CLONE_PARENT as u64, plan.cgroup).or_else(|e| match (e.0, &inits) {
        // A group whose processes have made groups below it for its controllers takes no process any more, nor does one
        // of a threaded tree. Like runc, it is then put where the first process is, which is below and so within the
        // same limits.
        (libc::EBUSY | libc::EOPNOTSUPP, Some(group)) => sys::fork(libc::CLONE_PARENT as u64, Some(group.raw())),
        _ => Err(e),
    });
    match forked.context("make the process")? {
        Fork::Child => {
            drop(go);
            let Err(e) = init_exec(plan, &wait);
            plan.report.failed(&e);
            sys::exit(1)
        }
        Fork::Parent(pid) => {
            plan.report.pid(pid);
            sys::write_all(go.raw(), b"g").context("let the process go")
        }
    }
}

fn init_exec(plan: &ExecPlan, wait: &Fd) -> Result<Infallible> {
    let mut byte = [0u8];
    if sys::read(wait.raw(), &mut byte).context("wait for the builder")? == 0 {
        return Err(Error::internal("the builder has ended early"));
    }
    sys::setsid().context("start a session")?;
    if plan.namespaces.cgroup {
        sys::setns(plan.pidfd, libc::CLONE_NEWCGROUP).context("join the container's cgroup namespace")?;
    }
    if plan.namespaces.user {
        sys::set_gid(0).and_then(|()| sys::set_uid(0)).context("become root of the user namespace")?;
    }
    plan.report.phase("namespaces");
    let terminal = if plan.program.terminal {
        let root = sys::open("/", libc::O_PATH | libc::O_DIRECTORY, 0).context("open /")?;
        let (master, slave) = console::open(root.raw(), plan.program.console_size.as_ref())?;
        plan.report.terminal(master.raw());
        Some(slave)
    } else {
        None
    };
    launch::launch(plan.program, plan.filter, terminal.as_ref(), plan.stdio, &[], plan.container, plan.report)
}
