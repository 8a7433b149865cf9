//! Mounts, namespaces, modules, the machine.

use core::mem::MaybeUninit;

use super::call::{cstr, SysResult};
use super::file::{Fd, RawFd};
use crate::syscall;

/// mount(2); empty strings become null pointers where the kernel allows that (source, type, data).
pub fn mount(
    source: impl AsRef<[u8]>,
    target: impl AsRef<[u8]>,
    fstype: &str,
    flags: u64,
    data: &str,
) -> SysResult<()> {
    let (source, target, fstype, data) = (cstr(source)?, cstr(target)?, cstr(fstype)?, cstr(data)?);
    let or_null = |s: &core::ffi::CStr| if s.is_empty() { core::ptr::null() } else { s.as_ptr() };
    // SAFETY: NUL-terminated strings that outlive the call.
    unsafe { syscall!(libc::SYS_mount, or_null(&source), target.as_ptr(), or_null(&fstype), flags, or_null(&data)) }
        .map(drop)
}

/// `flags`: MNT_DETACH, UMOUNT_NOFOLLOW ...
pub fn umount(target: impl AsRef<[u8]>, flags: i32) -> SysResult<()> {
    let target = cstr(target)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_umount2, target.as_ptr(), flags) }.map(drop)
}

pub fn pivot_root(new_root: impl AsRef<[u8]>, put_old: impl AsRef<[u8]>) -> SysResult<()> {
    let (new_root, put_old) = (cstr(new_root)?, cstr(put_old)?);
    // SAFETY: NUL-terminated paths.
    unsafe { syscall!(libc::SYS_pivot_root, new_root.as_ptr(), put_old.as_ptr()) }.map(drop)
}

pub fn chroot(path: impl AsRef<[u8]>) -> SysResult<()> {
    let path = cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_chroot, path.as_ptr()) }.map(drop)
}

/// struct mount_attr of mount_setattr(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MountAttr {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
    pub userns_fd: u64,
}

pub fn mount_setattr(dir: RawFd, path: impl AsRef<[u8]>, flags: u32, attr: &MountAttr) -> SysResult<()> {
    let path = cstr(path)?;
    // SAFETY: the structure is passed with its size.
    unsafe {
        syscall!(
            libc::SYS_mount_setattr,
            dir,
            path.as_ptr(),
            flags,
            core::ptr::from_ref(attr),
            core::mem::size_of::<MountAttr>()
        )
    }
    .map(drop)
}

/// open_tree(2): `flags` OPEN_TREE_CLONE, AT_RECURSIVE, AT_EMPTY_PATH ...
pub fn open_tree(dir: RawFd, path: impl AsRef<[u8]>, flags: u32) -> SysResult<Fd> {
    let path = cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_open_tree, dir, path.as_ptr(), flags | libc::O_CLOEXEC as u32) }
        .map(|fd| Fd::from_raw(fd as RawFd))
}

/// Attaches a detached tree (`from`, by descriptor) on the directory or file `to` (by descriptor).
pub fn move_mount(from: RawFd, to: RawFd) -> SysResult<()> {
    // MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    let empty = c"";
    // SAFETY: two NUL-terminated empty paths.
    unsafe { syscall!(libc::SYS_move_mount, from, empty.as_ptr(), to, empty.as_ptr(), 0x4 | 0x40) }.map(drop)
}

pub fn unshare(flags: i32) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_unshare, flags) }.map(drop)
}

/// `kind`: CLONE_NEW*, or 0 for whatever the descriptor is.
pub fn setns(fd: RawFd, kind: i32) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_setns, fd, kind) }.map(drop)
}

pub fn sethostname(name: &str) -> SysResult<()> {
    // SAFETY: the bytes are valid for the length.
    unsafe { syscall!(libc::SYS_sethostname, name.as_ptr(), name.len()) }.map(drop)
}

/// Loads a kernel module from an open file.
pub fn finit_module(fd: RawFd, parameters: &str) -> SysResult<()> {
    let parameters = cstr(parameters)?;
    // SAFETY: NUL-terminated string.
    unsafe { syscall!(libc::SYS_finit_module, fd, parameters.as_ptr(), 0) }.map(drop)
}

pub fn sync() {
    // SAFETY: no arguments, no failure.
    let _ = unsafe { syscall!(libc::SYS_sync) };
}

/// `command`: LINUX_REBOOT_CMD_*.
pub fn reboot(command: u32) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_reboot, libc::LINUX_REBOOT_MAGIC1, libc::LINUX_REBOOT_MAGIC2, command, 0) }.map(drop)
}

/// Bytes of memory that the machine has, as `MemTotal` of /proc/meminfo, without its other 50 numbers.
pub fn total_memory() -> SysResult<u64> {
    let mut out = MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: the kernel fills the structure; zeroed is a valid value of it.
    let info = unsafe {
        syscall!(libc::SYS_sysinfo, out.as_mut_ptr())?;
        out.assume_init()
    };
    Ok(info.totalram.saturating_mul(u64::from(info.mem_unit)))
}

/// The path of a descriptor for calls that only take strings.
pub fn proc_fd(fd: RawFd) -> alloc::string::String {
    alloc::format!("/proc/self/fd/{fd}")
}
