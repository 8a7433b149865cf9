//! Processes: fork, exec, wait, signals, credentials, limits.

use super::call::{retry, CStringArray, SysResult};
use super::errno::Errno;
use super::file::{Fd, RawFd};
use crate::prelude::*;
use crate::syscall;

pub type Pid = i32;

/// The two sides of a fork.
pub enum Fork {
    Child,
    Parent(Pid),
}

/// Forks with extra clone flags (`libc::CLONE_NEW*`, CLONE_PARENT), optionally straight into a cgroup.
///
/// The process has one thread and no lock can be held, so that the child may go on in ordinary Rust.
pub fn fork(flags: u64, cgroup: Option<RawFd>) -> SysResult<Fork> {
    // struct clone_args, version 2 (88 bytes).
    let mut args = [0u64; 11];
    args[0] = flags;
    // With CLONE_PARENT the exit signal is that of the caller and must be 0 here.
    args[4] = if flags & libc::CLONE_PARENT as u64 == 0 { libc::SIGCHLD as u64 } else { 0 };
    if let Some(fd) = cgroup {
        args[0] |= 0x2_0000_0000; // CLONE_INTO_CGROUP
        args[10] = fd as u64;
    }
    // SAFETY: no stack is given, so that the child runs on a copy of this one, like fork(2).
    let pid = unsafe { syscall!(libc::SYS_clone3, args.as_ptr(), core::mem::size_of_val(&args)) }?;
    Ok(if pid == 0 { Fork::Child } else { Fork::Parent(pid as Pid) })
}

pub fn exit(code: i32) -> ! {
    loop {
        // SAFETY: ends the process.
        let _ = unsafe { syscall!(libc::SYS_exit_group, code) };
    }
}

/// Only returns when it fails.
pub fn execve(path: impl AsRef<[u8]>, argv: &CStringArray, envp: &CStringArray) -> Errno {
    let path = match super::call::cstr(path) {
        Ok(path) => path,
        Err(e) => return e,
    };
    // SAFETY: a NUL-terminated path and two null-terminated arrays of such.
    match unsafe { syscall!(libc::SYS_execve, path.as_ptr(), argv.as_ptr(), envp.as_ptr()) } {
        Ok(_) => Errno(libc::EIO),
        Err(e) => e,
    }
}

/// How a child ended, as a shell reports it: the code, or 128 + signal.
pub fn exit_code(wait_status: i32) -> i32 {
    let signal = wait_status & 0x7f;
    if signal == 0 {
        (wait_status >> 8) & 0xff
    } else {
        128 + signal
    }
}

/// wait4(2): `Ok(None)` with WNOHANG when nothing has ended; the status is raw.
pub fn wait4(pid: Pid, options: i32) -> SysResult<Option<(Pid, i32)>> {
    let mut status = 0i32;
    // SAFETY: one int for the status, no rusage.
    let found = retry(|| unsafe { syscall!(libc::SYS_wait4, pid, &raw mut status, options | libc::__WALL, 0) })?;
    Ok(if found == 0 { None } else { Some((found as Pid, status)) })
}

/// Waits for one child; its exit code in a shell's words.
pub fn wait_exit(pid: Pid) -> SysResult<i32> {
    loop {
        if let Some((_, status)) = wait4(pid, 0)? {
            return Ok(exit_code(status));
        }
    }
}

pub fn kill(pid: Pid, signal: i32) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_kill, pid, signal) }.map(drop)
}

pub fn pidfd_open(pid: Pid) -> SysResult<Fd> {
    // SAFETY: no memory is involved; pidfds are always CLOEXEC.
    unsafe { syscall!(libc::SYS_pidfd_open, pid, 0) }.map(|fd| Fd::from_raw(fd as RawFd))
}

pub fn getpid() -> Pid {
    // SAFETY: cannot fail.
    unsafe { super::arch::syscall0(libc::SYS_getpid) as Pid }
}

pub fn getppid() -> Pid {
    // SAFETY: cannot fail.
    unsafe { super::arch::syscall0(libc::SYS_getppid) as Pid }
}

pub fn geteuid() -> u32 {
    // SAFETY: cannot fail.
    unsafe { super::arch::syscall0(libc::SYS_geteuid) as u32 }
}

pub fn setsid() -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_setsid) }.map(drop)
}

pub fn umask(mask: u32) -> u32 {
    // SAFETY: cannot fail.
    unsafe { super::arch::syscall1(libc::SYS_umask, mask as usize) as u32 }
}

pub fn chdir(path: impl AsRef<[u8]>) -> SysResult<()> {
    let path = super::call::cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_chdir, path.as_ptr()) }.map(drop)
}

pub fn fchdir(fd: RawFd) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_fchdir, fd) }.map(drop)
}

pub fn getcwd() -> SysResult<String> {
    let mut buf = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer is valid for its length; the kernel counts the NUL.
    let n = unsafe { syscall!(libc::SYS_getcwd, buf.as_mut_ptr(), buf.len()) }?;
    buf.truncate(n.saturating_sub(1));
    String::from_utf8(buf).map_err(|_| Errno(libc::EINVAL))
}

pub fn setgroups(groups: &[u32]) -> SysResult<()> {
    // SAFETY: the list is valid for its length.
    unsafe { syscall!(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }.map(drop)
}

/// Real, effective and saved.
pub fn set_uid(uid: u32) -> SysResult<()> {
    // SAFETY: no memory is involved; one thread, so that no other keeps old credentials.
    unsafe { syscall!(libc::SYS_setresuid, uid, uid, uid) }.map(drop)
}

/// Real, effective and saved.
pub fn set_gid(gid: u32) -> SysResult<()> {
    // SAFETY: as above.
    unsafe { syscall!(libc::SYS_setresgid, gid, gid, gid) }.map(drop)
}

/// `resource`: RLIMIT_*.
pub fn set_rlimit(pid: Pid, resource: u32, soft: u64, hard: u64) -> SysResult<()> {
    let limit = [soft, hard];
    // SAFETY: struct rlimit64 is two u64.
    unsafe { syscall!(libc::SYS_prlimit64, pid, resource, limit.as_ptr(), 0) }.map(drop)
}

pub fn prctl(option: i32, a: usize, b: usize, c: usize, d: usize) -> SysResult<usize> {
    // SAFETY: only options with integer arguments are used through this wrapper.
    unsafe { syscall!(libc::SYS_prctl, option, a, b, c, d) }
}

/// The three sets of the calling process, as 64-bit masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapSets {
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
}

const CAP_VERSION_3: u32 = 0x2008_0522;

pub fn capget() -> SysResult<CapSets> {
    let header = [CAP_VERSION_3, 0];
    let mut data = [0u32; 6];
    // SAFETY: header of two words, two records of three words.
    unsafe { syscall!(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()) }?;
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    Ok(CapSets {
        effective: join(data[0], data[3]),
        permitted: join(data[1], data[4]),
        inheritable: join(data[2], data[5]),
    })
}

pub fn capset(sets: CapSets) -> SysResult<()> {
    let header = [CAP_VERSION_3, 0];
    let data = [
        sets.effective as u32,
        sets.permitted as u32,
        sets.inheritable as u32,
        (sets.effective >> 32) as u32,
        (sets.permitted >> 32) as u32,
        (sets.inheritable >> 32) as u32,
    ];
    // SAFETY: header of two words, two records of three words.
    unsafe { syscall!(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }.map(drop)
}
