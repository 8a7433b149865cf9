//! The last stretch of every process, container init or exec: from root in the container's namespaces to the program.

use super::caps::{self, Caps};
use super::report::Reporter;
use super::user::Wanted;
use super::{command, console, hooks, limits};
use crate::prelude::*;
use crate::proto::oci::{ConsoleBox, Hook};
use crate::seccomp;
use crate::sys::{self, CStringArray, Fd, RawFd};
use libc::sock_filter;

/// Everything about a process that is checked before the fork.
pub struct Program {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub user: Wanted,
    pub caps: Caps,
    pub limits: Vec<(u32, u64, u64)>,
    pub no_new_privileges: bool,
    pub oom_score_adj: i64,
    pub umask: u32,
    pub terminal: bool,
    /// Standard input is /dev/null.
    pub no_stdin: bool,
    pub console_size: Option<ConsoleBox>,
}

/// A compiled filter with its flags.
pub struct Filter {
    pub program: Vec<sock_filter>,
    pub flags: u32,
}

/// The child's ends of its streams: stdin, stdout, stderr. `None` with a terminal.
pub type Stdio = Option<[Fd; 3]>;

/// Runs `program`; only returns when that fails. The caller is root in the container's namespaces and root directory.
///
/// The order is forced: limits and the bounding set while still privileged, user change with the permitted set kept,
/// working directory and command looked up as the user, the filter last (without no_new_privs it takes CAP_SYS_ADMIN,
/// which is therefore kept until then).
pub fn launch(
    program: &Program,
    filter: Option<&Filter>,
    terminal: Option<&Fd>,
    stdio: &Stdio,
    start_hooks: &[Hook],
    container: &str,
    report: Reporter,
) -> Result<core::convert::Infallible> {
    if program.args.is_empty() {
        return pause(report);
    }
    let identity = program.user.resolve()?;
    let env = command::environment(&program.env, &identity.home);
    connect_streams(terminal, stdio, program.no_stdin, identity.uid)?;
    sys::umask(program.umask);
    sys::default_signals();
    sys::set_signal_mask(0).context("unblock signals")?;

    let known = caps::known();
    let caps = program.caps.limited_to(known);
    if program.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).context("set no_new_privs")?;
    }
    caps.drop_bounding(known)?;
    limits::apply(&program.limits)?;

    let cwd = if program.cwd.is_empty() { "/" } else { &program.cwd };
    // Perhaps only root gets there, perhaps only the user does (runc tries both).
    let entered = sys::chdir(cwd);
    sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).context("keep capabilities")?;
    sys::setgroups(&identity.groups).context("set the additional groups")?;
    sys::set_gid(identity.gid).with_context(|| format!("become group {}", identity.gid))?;
    sys::set_uid(identity.uid).with_context(|| format!("become user {}", identity.uid))?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0).context("forget to keep capabilities")?;
    let extra = if filter.is_some() && !program.no_new_privileges { caps::SYS_ADMIN } else { 0 };
    caps.apply(extra)?;
    if entered.is_err() {
        sys::chdir(cwd)
            .map_err(|e| Error::invalid(format!("chdir to cwd ({cwd:?}) set in config.json failed: {e}")))?;
    }
    // A directory outside of this root (a leaked descriptor of the host's) has no path, or an unreachable one.
    if !sys::getcwd().is_ok_and(|path| path.starts_with('/')) {
        return Err(Error::invalid(format!("the working directory {cwd:?} is outside of the container's root")));
    }

    let path = command::find(&program.args, &env)?;
    let (argv, envp) =
        (CStringArray::new(&program.args).context("arguments")?, CStringArray::new(&env).context("environment")?);
    // All are CLOEXEC by birth; this is for the one that is not.
    sys::close_range(3, libc::CLOSE_RANGE_CLOEXEC).context("mark descriptors")?;

    report.phase("program");
    report.ready();
    if !report.wait_for_start() {
        return Err(Error::internal("the agent has given the process up"));
    }
    let confine = || {
        if let Some(filter) = filter {
            seccomp::install(&filter.program, filter.flags)?;
        }
        if extra != 0 {
            caps.finish()?;
        }
        Ok(())
    };
    hooks::run(start_hooks, &envp, container, &confine)?;
    confine()?;
    Err(command::exec_error(&path, sys::execve(&path, &argv, &envp)))
}

/// Keeps the namespaces of a container without a process, until it is removed.
fn pause(report: Reporter) -> Result<core::convert::Infallible> {
    report.ready();
    if report.wait_for_start() {
        return Err(Error::precondition("the container was made without a process: there is nothing to start"));
    }
    Err(Error::internal("the agent has given the container up"))
}

/// The container's /dev/null, if it is one; opening another kind of file must not block.
fn own_null() -> Option<Fd> {
    const NULL: (u32, u32) = (1, 3); // Documentation/admin-guide/devices.txt
    let fd = sys::open("/dev/null", libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY, 0).ok()?;
    let stat = sys::fstat(fd.raw()).ok()?;
    let is_null = stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == libc::makedev(NULL.0, NULL.1);
    (is_null && sys::set_nonblocking(fd.raw(), false).is_ok()).then_some(fd)
}

/// Standard streams at 0, 1, 2, owned by the user, so that /dev/stdout can be opened again.
fn connect_streams(terminal: Option<&Fd>, stdio: &Stdio, no_stdin: bool, uid: u32) -> Result<()> {
    let streams: [RawFd; 3] = match (terminal, stdio) {
        (Some(slave), _) => {
            console::control(slave.raw())?;
            [slave.raw(); 3]
        }
        (None, Some(ends)) => [ends[0].raw(), ends[1].raw(), ends[2].raw()],
        (None, None) => return Err(Error::internal("the process has no streams")),
    };
    for (number, fd) in streams.iter().enumerate() {
        if no_stdin && number == 0 && terminal.is_none() {
            // The container's own /dev/null if it has one, because programs identify it by its path. Its owner is not
            // changed.
            let null = own_null();
            sys::dup_to(null.as_ref().map_or(*fd, Fd::raw), 0).context("connect the streams")?;
            continue;
        }
        // In a user namespace the pipe's owner may have no name; then it stays as it is.
        match sys::fchownat(*fd, "", uid, u32::MAX, libc::AT_EMPTY_PATH) {
            Ok(()) => {}
            Err(e) if e.0 == libc::EPERM || e.0 == libc::EINVAL || e.0 == libc::EROFS => {}
            Err(e) => return Err(e).context("give the streams to the user"),
        }
        sys::dup_to(*fd, number as RawFd).context("connect the streams")?;
    }
    Ok(())
}
