//! Descriptors, files, directories.

use super::call::{check, cstr, retry, SysResult};
use super::errno::Errno;
use crate::prelude::*;
use crate::syscall;
use core::mem::MaybeUninit;

pub type RawFd = i32;

/// Relative paths start at the working directory.
pub const AT_FDCWD: RawFd = libc::AT_FDCWD;

/// An owned descriptor, closed when dropped.
#[derive(Debug, PartialEq, Eq)]
pub struct Fd(RawFd);

impl Fd {
    /// Takes ownership of a descriptor that nothing else will close.
    pub fn from_raw(fd: RawFd) -> Fd {
        Fd(fd)
    }

    pub fn raw(&self) -> RawFd {
        self.0
    }

    /// Gives the number away without closing it.
    pub fn into_raw(self) -> RawFd {
        let raw = self.0;
        core::mem::forget(self);
        raw
    }

    pub fn try_clone(&self) -> SysResult<Fd> {
        fcntl(self.0, libc::F_DUPFD_CLOEXEC, 0).map(|fd| Fd(fd as RawFd))
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        close(self.0);
    }
}

/// Closes a descriptor by number; errors have no remedy and are dropped.
pub fn close(fd: RawFd) {
    // SAFETY: closing takes no memory; the caller owns the number.
    let _ = unsafe { syscall!(libc::SYS_close, fd) };
}

pub fn open(path: impl AsRef<[u8]>, flags: i32, mode: u32) -> SysResult<Fd> {
    openat(AT_FDCWD, path, flags, mode)
}

pub fn openat(dir: RawFd, path: impl AsRef<[u8]>, flags: i32, mode: u32) -> SysResult<Fd> {
    let path = cstr(path)?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    retry(|| unsafe { syscall!(libc::SYS_openat, dir, path.as_ptr(), flags | libc::O_CLOEXEC, mode) })
        .map(|fd| Fd(fd as RawFd))
}

/// openat2(2): `resolve` is a set of `libc::RESOLVE_*`.
pub fn openat2(dir: RawFd, path: impl AsRef<[u8]>, flags: i32, mode: u32, resolve: u64) -> SysResult<Fd> {
    let path = cstr(path)?;
    let how: [u64; 3] = [(flags | libc::O_CLOEXEC) as u64, u64::from(mode), resolve];
    // With RESOLVE_IN_ROOT a rename anywhere on the machine may make the kernel answer EAGAIN: try again, bounded.
    let mut last = Errno(libc::EAGAIN);
    for _ in 0..128 {
        // SAFETY: `how` is struct open_how (three u64), its size is passed along; the path is NUL-terminated.
        match unsafe { syscall!(libc::SYS_openat2, dir, path.as_ptr(), how.as_ptr(), core::mem::size_of_val(&how)) } {
            Ok(fd) => return Ok(Fd(fd as RawFd)),
            Err(e) if e.0 == libc::EAGAIN || e.0 == libc::EINTR => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

pub fn read(fd: RawFd, buf: &mut [u8]) -> SysResult<usize> {
    // SAFETY: the buffer is valid for its length.
    retry(|| unsafe { syscall!(libc::SYS_read, fd, buf.as_mut_ptr(), buf.len()) })
}

/// Appends up to `max` bytes from `fd` to `out`; 0 = end of file.
pub fn read_append(fd: RawFd, out: &mut Vec<u8>, max: usize) -> SysResult<usize> {
    out.reserve(max);
    let spare = out.spare_capacity_mut();
    let room = spare.len().min(max);
    // SAFETY: the spare capacity is valid for writes of `room` bytes.
    let n = retry(|| unsafe { syscall!(libc::SYS_read, fd, spare.as_mut_ptr(), room) })?;
    // SAFETY: the kernel has written `n` bytes there.
    unsafe { out.set_len(out.len() + n) };
    Ok(n)
}

pub fn write(fd: RawFd, buf: &[u8]) -> SysResult<usize> {
    // SAFETY: the buffer is valid for its length.
    retry(|| unsafe { syscall!(libc::SYS_write, fd, buf.as_ptr(), buf.len()) })
}

pub fn write_all(fd: RawFd, mut buf: &[u8]) -> SysResult<()> {
    while !buf.is_empty() {
        let n = write(fd, buf)?;
        if n == 0 {
            return Err(Errno(libc::EIO));
        }
        buf = &buf[n..];
    }
    Ok(())
}

pub fn pread(fd: RawFd, buf: &mut [u8], offset: u64) -> SysResult<usize> {
    // SAFETY: the buffer is valid for its length.
    retry(|| unsafe { syscall!(libc::SYS_pread64, fd, buf.as_mut_ptr(), buf.len(), offset) })
}

pub fn pwrite(fd: RawFd, buf: &[u8], offset: u64) -> SysResult<usize> {
    // SAFETY: the buffer is valid for its length.
    retry(|| unsafe { syscall!(libc::SYS_pwrite64, fd, buf.as_ptr(), buf.len(), offset) })
}

pub fn ftruncate(fd: RawFd, len: u64) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_ftruncate, fd, len) }.map(drop)
}

/// `arg` is an integer command argument (F_SETFD, F_SETFL, F_DUPFD_CLOEXEC, F_SETPIPE_SZ ...).
pub fn fcntl(fd: RawFd, command: i32, arg: usize) -> SysResult<usize> {
    // SAFETY: only integer commands are used through this wrapper.
    unsafe { syscall!(libc::SYS_fcntl, fd, command, arg) }
}

pub fn set_nonblocking(fd: RawFd, on: bool) -> SysResult<()> {
    let flags = fcntl(fd, libc::F_GETFL, 0)? as i32;
    let wanted = if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
    fcntl(fd, libc::F_SETFL, wanted as usize).map(drop)
}

/// Like dup2: `to` is *not* CLOEXEC afterwards, also when both numbers are equal.
pub fn dup_to(from: RawFd, to: RawFd) -> SysResult<()> {
    if from == to {
        return fcntl(from, libc::F_SETFD, 0).map(drop);
    }
    // SAFETY: no memory is involved; the caller owns the number `to`.
    retry(|| unsafe { syscall!(libc::SYS_dup3, from, to, 0) }).map(drop)
}

/// Both ends CLOEXEC: (read end, write end).
pub fn pipe(flags: i32) -> SysResult<(Fd, Fd)> {
    let mut ends = [0i32; 2];
    // SAFETY: the kernel writes two ints.
    unsafe { syscall!(libc::SYS_pipe2, ends.as_mut_ptr(), flags | libc::O_CLOEXEC) }?;
    Ok((Fd(ends[0]), Fd(ends[1])))
}

/// Moves up to `len` bytes from a pipe into another file without copying them where the kernel can; waits for neither.
pub fn splice(from: RawFd, to: RawFd, len: usize) -> SysResult<usize> {
    // SAFETY: no memory of ours is involved; null offsets are what pipes and ports want.
    retry(|| unsafe { syscall!(libc::SYS_splice, from, 0, to, 0, len, libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK) })
}

/// Closes (or, with CLOSE_RANGE_CLOEXEC, marks) every descriptor from `first` up.
pub fn close_range(first: RawFd, flags: u32) -> SysResult<()> {
    // SAFETY: the caller says that nothing above `first` is needed any more.
    unsafe { syscall!(libc::SYS_close_range, first, u32::MAX, flags) }.map(drop)
}

/// Closes every descriptor above the standard ones but those in `keep`: for children, which have no business with the
/// rest (an inherited end of a pipe would keep its reader waiting).
pub fn close_all_but(mut keep: Vec<RawFd>) {
    crate::sort::sort(&mut keep);
    let mut first = 3;
    for fd in keep {
        if fd > first {
            // SAFETY: the caller says that none of them is needed any more; no memory is involved.
            let _ = unsafe { syscall!(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = first.max(fd + 1);
    }
    let _ = close_range(first, 0);
}

pub fn ioctl(fd: RawFd, request: u64, arg: usize) -> SysResult<usize> {
    // SAFETY: callers pass either an integer or the address of the structure that `request` names.
    unsafe { syscall!(libc::SYS_ioctl, fd, request, arg) }
}

pub fn fstatat(dir: RawFd, path: impl AsRef<[u8]>, flags: i32) -> SysResult<libc::stat> {
    let path = cstr(path)?;
    let mut out = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel fills the structure on success.
    unsafe {
        syscall!(libc::SYS_newfstatat, dir, path.as_ptr(), out.as_mut_ptr(), flags)?;
        Ok(out.assume_init())
    }
}

pub fn fstat(fd: RawFd) -> SysResult<libc::stat> {
    fstatat(fd, "", libc::AT_EMPTY_PATH)
}

/// Follows symlinks.
/// Locks an open file or directory, with `libc::LOCK_*`; the lock goes with the descriptor.
pub fn flock(fd: RawFd, operation: i32) -> SysResult<()> {
    // SAFETY: takes no memory.
    retry(|| unsafe { syscall!(libc::SYS_flock, fd, operation) }).map(drop)
}

pub fn stat(path: impl AsRef<[u8]>) -> SysResult<libc::stat> {
    fstatat(AT_FDCWD, path, 0)
}

pub fn lstat(path: impl AsRef<[u8]>) -> SysResult<libc::stat> {
    fstatat(AT_FDCWD, path, libc::AT_SYMLINK_NOFOLLOW)
}

pub fn fstatfs(fd: RawFd) -> SysResult<libc::statfs> {
    let mut out = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel fills the structure on success.
    unsafe {
        syscall!(libc::SYS_fstatfs, fd, out.as_mut_ptr())?;
        Ok(out.assume_init())
    }
}

pub fn mkdirat(dir: RawFd, path: impl AsRef<[u8]>, mode: u32) -> SysResult<()> {
    let path = cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_mkdirat, dir, path.as_ptr(), mode) }.map(drop)
}

/// `flags`: 0 or AT_REMOVEDIR.
pub fn unlinkat(dir: RawFd, path: impl AsRef<[u8]>, flags: i32) -> SysResult<()> {
    let path = cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_unlinkat, dir, path.as_ptr(), flags) }.map(drop)
}

/// A further name of a file; a symbolic link is not followed.
pub fn linkat(from: RawFd, target: impl AsRef<[u8]>, dir: RawFd, path: impl AsRef<[u8]>) -> SysResult<()> {
    let (target, path) = (cstr(target)?, cstr(path)?);
    // SAFETY: NUL-terminated paths.
    unsafe { syscall!(libc::SYS_linkat, from, target.as_ptr(), dir, path.as_ptr(), 0) }.map(drop)
}

pub fn symlinkat(target: impl AsRef<[u8]>, dir: RawFd, path: impl AsRef<[u8]>) -> SysResult<()> {
    let (target, path) = (cstr(target)?, cstr(path)?);
    // SAFETY: NUL-terminated paths.
    unsafe { syscall!(libc::SYS_symlinkat, target.as_ptr(), dir, path.as_ptr()) }.map(drop)
}

pub fn renameat(from_dir: RawFd, from: impl AsRef<[u8]>, to_dir: RawFd, to: impl AsRef<[u8]>) -> SysResult<()> {
    let (from, to) = (cstr(from)?, cstr(to)?);
    // SAFETY: NUL-terminated paths.
    unsafe { syscall!(libc::SYS_renameat2, from_dir, from.as_ptr(), to_dir, to.as_ptr(), 0) }.map(drop)
}

/// The target of a symlink.
pub fn readlinkat(dir: RawFd, path: impl AsRef<[u8]>) -> SysResult<Vec<u8>> {
    let path = cstr(path)?;
    let mut buf = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer is valid for its length.
    let n = unsafe { syscall!(libc::SYS_readlinkat, dir, path.as_ptr(), buf.as_mut_ptr(), buf.len()) }?;
    buf.truncate(n);
    Ok(buf)
}

/// `device` as from `libc::makedev`.
pub fn mknodat(dir: RawFd, path: impl AsRef<[u8]>, mode: u32, device: u64) -> SysResult<()> {
    let path = cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_mknodat, dir, path.as_ptr(), mode, device) }.map(drop)
}

pub fn fchmod(fd: RawFd, mode: u32) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_fchmod, fd, mode) }.map(drop)
}

/// Follows symlinks (the kernel call knows no flags).
pub fn fchmodat(dir: RawFd, path: impl AsRef<[u8]>, mode: u32) -> SysResult<()> {
    let path = cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_fchmodat, dir, path.as_ptr(), mode) }.map(drop)
}

/// `flags`: AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH; `u32::MAX` leaves an id as it is.
pub fn fchownat(dir: RawFd, path: impl AsRef<[u8]>, uid: u32, gid: u32, flags: i32) -> SysResult<()> {
    let path = cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_fchownat, dir, path.as_ptr(), uid, gid, flags) }.map(drop)
}

/// Access and modification time, nanoseconds since the epoch.
pub fn utimensat(dir: RawFd, path: impl AsRef<[u8]>, atime_ns: i64, mtime_ns: i64, flags: i32) -> SysResult<()> {
    let path = cstr(path)?;
    let split = |ns: i64| [ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000)];
    let times = [split(atime_ns), split(mtime_ns)];
    // SAFETY: two struct timespec (two i64 each) and a NUL-terminated path (or the descriptor itself if empty).
    unsafe {
        let name = if path.as_bytes().is_empty() { core::ptr::null() } else { path.as_ptr() };
        syscall!(libc::SYS_utimensat, dir, name, times.as_ptr(), flags)
    }
    .map(drop)
}

/// The largest extended attribute, and the largest list of their names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_MAX: usize = 64 << 10;

/// The names of the extended attributes of an open file, each with a NUL behind it; none where the file system has none.
pub fn flistxattr(fd: RawFd) -> SysResult<Vec<u8>> {
    let mut buf = vec![0u8; XATTR_MAX];
    // SAFETY: the buffer is valid for its length.
    match unsafe { syscall!(libc::SYS_flistxattr, fd, buf.as_mut_ptr(), buf.len()) } {
        Ok(n) => buf.truncate(n),
        Err(Errno(libc::EOPNOTSUPP)) => buf.clear(),
        Err(e) => return Err(e),
    }
    Ok(buf)
}

/// One of them, by its name.
pub fn fgetxattr(fd: RawFd, name: &[u8]) -> SysResult<Vec<u8>> {
    let name = cstr(name)?;
    let mut buf = vec![0u8; XATTR_MAX];
    // SAFETY: a NUL-terminated name, and a buffer that is valid for its length.
    let n = unsafe { syscall!(libc::SYS_fgetxattr, fd, name.as_ptr(), buf.as_mut_ptr(), buf.len()) }?;
    buf.truncate(n);
    Ok(buf)
}

/// Sets one, whether it is there or not.
pub fn fsetxattr(fd: RawFd, name: &[u8], value: &[u8]) -> SysResult<()> {
    let name = cstr(name)?;
    // SAFETY: a NUL-terminated name, and a value that is valid for its length.
    unsafe { syscall!(libc::SYS_fsetxattr, fd, name.as_ptr(), value.as_ptr(), value.len(), 0) }.map(drop)
}

/// Waits until the file system that holds `fd` is on its disk.
pub fn syncfs(fd: RawFd) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_syncfs, fd) }.map(drop)
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    pub name: Vec<u8>,
    pub inode: u64,
    /// `libc::DT_*`; DT_UNKNOWN on some file systems.
    pub kind: u8,
    /// Where reading goes on behind it ([`lseek`]).
    pub next: u64,
}

/// Calls `each` for every entry but `.` and `..`; stops at its first error.
pub fn read_dir_fd<E: From<Errno>>(
    fd: RawFd,
    mut each: impl FnMut(DirEntry) -> core::result::Result<(), E>,
) -> core::result::Result<(), E> {
    // u64 elements give the alignment of struct linux_dirent64.
    let mut buf = vec![0u64; 512];
    while read_some(fd, &mut buf, &mut each)? {}
    Ok(())
}

/// Appends the next few entries but `.` and `..`; false at the end of the directory.
pub fn read_dir_some(fd: RawFd, out: &mut Vec<DirEntry>) -> SysResult<bool> {
    read_some(fd, &mut vec![0u64; 512], &mut |entry| {
        out.push(entry);
        Ok(())
    })
}

fn read_some<E: From<Errno>>(
    fd: RawFd,
    buf: &mut [u64],
    each: &mut impl FnMut(DirEntry) -> core::result::Result<(), E>,
) -> core::result::Result<bool, E> {
    // SAFETY: the buffer is valid for its length in bytes.
    let n = check(unsafe {
        super::arch::syscall3(libc::SYS_getdents64, fd as usize, buf.as_mut_ptr() as usize, buf.len() * 8)
    })?;
    // SAFETY: the kernel has written `n` bytes of the buffer.
    let bytes = unsafe { core::slice::from_raw_parts(buf.as_ptr().cast::<u8>(), n) };
    let number = |field: &[u8]| u64::from_ne_bytes(field.try_into().unwrap_or_default());
    let mut at = 0;
    while at + 19 <= n {
        let record = &bytes[at..];
        let length = usize::from(u16::from_ne_bytes([record[16], record[17]]));
        if length < 19 || at + length > n {
            return Err(Errno(libc::EIO).into());
        }
        let name = record[19..length].split(|b| *b == 0).next().unwrap_or_default();
        if name != b"." && name != b".." {
            let (inode, next) = (number(&record[0..8]), number(&record[8..16]));
            each(DirEntry { name: name.to_vec(), inode, kind: record[18], next })?;
        }
        at += length;
    }
    Ok(n > 0)
}

/// lseek(2): `whence` is SEEK_SET, SEEK_DATA or SEEK_HOLE.
pub fn lseek(fd: RawFd, offset: u64, whence: i32) -> SysResult<u64> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_lseek, fd, offset, whence) }.map(|at| at as u64)
}
