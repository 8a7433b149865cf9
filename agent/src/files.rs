//! Files of a container (service `kata.agent.v1.Files`).
//!
//! The container is hostile: paths are resolved by openat2(2) inside its root (`root`, an open directory: best
//! `/proc/<pid>/root`, which has the container's mounts), so that neither `..` nor a symbolic link leads out, and magic
//! links are refused. A file's type is checked through an O_PATH descriptor before it is opened, because opening a
//! device or a fifo has side effects.
//!
//! A file system that the container serves itself (FUSE) can still make any of these calls wait as long as it likes:
//! callers run them in a child, so that only that call waits.

use crate::errors::code;
use crate::fs;
use crate::prelude::*;
use crate::proto::agentext::{
    FileInfo, LinkRequest, ListFilesRequest, ListFilesResponse, MkdirRequest, NodeRequest, ReadFileRequest,
    ReadFileResponse, RemoveFileRequest, StatFileRequest, SymlinkRequest, SyncFilesRequest, WriteFileRequest,
};
use crate::sort::sort;
use crate::sys::{self, Errno, Fd, RawFd, SysResult};

const RESOLVE: u64 = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
/// Most bytes of one answer to Read.
const READ_MAX: usize = 1 << 20;
/// Where one answer to List ends: entries, and bytes of names and link targets (a message is at most 4 MiB).
const LIST_MAX: usize = 4096;
const LIST_MAX_BYTES: usize = 2 << 20;

/// Attributes of `path`; with `follow`, of the target of a symbolic link.
pub fn stat(root: RawFd, request: &StatFileRequest) -> Result<FileInfo> {
    let flags = libc::O_PATH | if request.follow { 0 } else { libc::O_NOFOLLOW };
    let look = || {
        let fd = sys::openat2(root, checked(&request.path)?, flags, 0, RESOLVE)?;
        let name = split(&request.path).map(|(_, name)| name.to_vec()).unwrap_or_default();
        info(&sys::fstat(fd.raw())?, name, || sys::readlinkat(fd.raw(), ""))
    };
    look().map_err(|e| failed(&request.path, e))
}

/// A page of a directory, in the order of the names' bytes.
pub fn list(root: RawFd, request: &ListFilesRequest) -> Result<ListFilesResponse> {
    let limit = match request.limit as usize {
        0 => LIST_MAX,
        limit => limit.min(LIST_MAX),
    };
    list_page(root, request, limit).map_err(|e| failed(&request.path, e))
}

/// Up to 1 MiB of a regular file; empty at its end.
pub fn read(root: RawFd, request: &ReadFileRequest) -> Result<ReadFileResponse> {
    let len = if request.len == 0 { READ_MAX } else { (request.len as usize).min(READ_MAX) };
    let read = || {
        let file = open_regular(root, &request.path, libc::O_RDONLY)?;
        let mut data = vec![0; len];
        let mut filled = 0;
        while filled < len {
            let n = sys::pread(file.raw(), &mut data[filled..], request.offset + filled as u64)?;
            if n == 0 {
                break;
            }
            filled += n;
        }
        data.truncate(filled);
        Ok(ReadFileResponse { data })
    };
    check_range(request.offset, len).and_then(|()| read()).map_err(|e| failed(&request.path, e))
}

/// Writes one chunk; makes the file if need be.
pub fn write(root: RawFd, request: &WriteFileRequest) -> Result<()> {
    let write = || {
        check_range(request.offset, request.data.len())?;
        let truncate = if request.truncate { libc::O_TRUNC } else { 0 };
        let (file, new) = match open_regular(root, &request.path, libc::O_WRONLY | truncate) {
            Err(Errno(libc::ENOENT)) => (create(root, &request.path)?, true),
            other => (other?, false),
        };
        pwrite_all(file.raw(), &request.data, request.offset)?;
        let mode = request.mode.or(new.then_some(0o644));
        set_attributes(file.raw(), request.uid, request.gid, mode, request.mtime_ns)
    };
    write().map_err(|e| failed(&request.path, e))
}

pub fn mkdir(root: RawFd, request: &MkdirRequest) -> Result<()> {
    let path = request.path.as_slice();
    let make = || {
        let made = if request.parents {
            make_parents(root, path)?;
            match make_directory(root, path) {
                Err(Errno(libc::EEXIST)) => false,
                // The root itself, or a path that ends in dots: it is there, or the open below fails.
                Err(Errno(libc::EINVAL)) if !path.is_empty() => false,
                other => other.map(|()| true)?,
            }
        } else {
            make_directory(root, path)?;
            true
        };
        let directory = sys::openat2(root, checked(path)?, libc::O_RDONLY | libc::O_DIRECTORY, 0, RESOLVE)?;
        let mode = request.mode.or(made.then_some(0o755));
        set_attributes(directory.raw(), request.uid, request.gid, mode, request.mtime_ns)
    };
    make().map_err(|e| failed(path, e))
}

pub fn symlink(root: RawFd, request: &SymlinkRequest) -> Result<()> {
    let make = || {
        let (parent, name) = open_parent(root, &request.path)?;
        place(parent.raw(), name, request.replace, |name| {
            sys::symlinkat(&request.target, parent.raw(), name)?;
            own(parent.raw(), name, request.uid, request.gid)
        })
    };
    make().map_err(|e| failed(&request.path, e))
}

/// A further name of a file.
pub fn link(root: RawFd, request: &LinkRequest) -> Result<()> {
    let (from, target) = open_parent(root, &request.target).map_err(|e| failed(&request.target, e))?;
    let make = || {
        let (parent, name) = open_parent(root, &request.path)?;
        place(parent.raw(), name, request.replace, |name| sys::linkat(from.raw(), target, parent.raw(), name))
    };
    make().map_err(|e| failed(&request.path, e))
}

/// A fifo or device.
pub fn node(root: RawFd, request: &NodeRequest) -> Result<()> {
    let make = || {
        if !matches!(request.mode & libc::S_IFMT, libc::S_IFIFO | libc::S_IFCHR | libc::S_IFBLK) {
            return Err(Errno(libc::EINVAL));
        }
        let (parent, name) = open_parent(root, &request.path)?;
        place(parent.raw(), name, request.replace, |name| {
            // Not chmod(2) afterwards, which would follow a link that the container puts there. A child runs this alone.
            let before = sys::umask(0);
            let made = sys::mknodat(parent.raw(), name, request.mode & (libc::S_IFMT | 0o777), request.rdev);
            sys::umask(before);
            made?;
            own(parent.raw(), name, request.uid, request.gid)
        })
    };
    make().map_err(|e| failed(&request.path, e))
}

/// Makes a name by `make`. With `replace` one that is there gives way once the new one is whole, and stays if that
/// fails.
fn place(parent: RawFd, name: &[u8], replace: bool, make: impl Fn(&[u8]) -> SysResult<()>) -> SysResult<()> {
    match make(name) {
        Err(Errno(libc::EEXIST)) if replace => {}
        other => return other,
    }
    let aside = format!(".kata-{}-{:x}", sys::getpid(), sys::monotonic_ns());
    let moved = make(aside.as_bytes()).and_then(|()| match sys::renameat(parent, &aside, parent, name) {
        Err(Errno(libc::EISDIR)) => {
            sys::unlinkat(parent, name, libc::AT_REMOVEDIR)?;
            sys::renameat(parent, &aside, parent, name)
        }
        other => other,
    });
    // rename(2) between two names of the same file does nothing and reports success.
    match sys::unlinkat(parent, &aside, 0) {
        Ok(()) | Err(Errno(libc::ENOENT)) => moved,
        Err(e) => moved.and(Err(e)),
    }
}

/// Sets the owner of a name; a symbolic link is not followed.
fn own(parent: RawFd, name: &[u8], uid: Option<u32>, gid: Option<u32>) -> SysResult<()> {
    if uid.is_none() && gid.is_none() {
        return Ok(());
    }
    sys::fchownat(parent, name, uid.unwrap_or(u32::MAX), gid.unwrap_or(u32::MAX), libc::AT_SYMLINK_NOFOLLOW)
}

/// Removes a file, a link itself or a directory; with `recursive` all that is in it.
pub fn remove(root: RawFd, request: &RemoveFileRequest) -> Result<()> {
    let remove = || {
        let (parent, name) = open_parent(root, &request.path)?;
        if request.recursive {
            return fs::remove_tree_at(parent.raw(), name, 0);
        }
        match sys::unlinkat(parent.raw(), name, 0) {
            Err(Errno(libc::EISDIR)) => sys::unlinkat(parent.raw(), name, libc::AT_REMOVEDIR),
            other => other,
        }
    };
    remove().map_err(|e| failed(&request.path, e))
}

/// Writes the file system that a directory is on to its disk.
pub fn sync(root: RawFd, request: &SyncFilesRequest) -> Result<()> {
    let sync = || {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        sys::syncfs(sys::openat2(root, checked(&request.path)?, flags, 0, RESOLVE)?.raw())
    };
    sync().map_err(|e| failed(&request.path, e))
}

/// The error for a path, with the status code that fits.
pub fn failed(path: &[u8], e: Errno) -> Error {
    let status = match e.0 {
        libc::ENOENT => code::NOT_FOUND,
        libc::EEXIST => code::ALREADY_EXISTS,
        libc::EACCES | libc::EPERM | libc::ELOOP | libc::EXDEV | libc::EROFS => code::PERMISSION_DENIED,
        libc::EINVAL | libc::ENAMETOOLONG => code::INVALID_ARGUMENT,
        libc::ENOTDIR | libc::EISDIR | libc::ENOTEMPTY | libc::EBUSY | libc::ETXTBSY => code::FAILED_PRECONDITION,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => code::RESOURCE_EXHAUSTED,
        _ => code::INTERNAL,
    };
    Error::new(status, format!("{:?}: {e}", String::from_utf8_lossy(path)))
}

pub fn pwrite_all(file: RawFd, mut data: &[u8], mut offset: u64) -> SysResult<()> {
    while !data.is_empty() {
        match sys::pwrite(file, data, offset)? {
            0 => return Err(Errno(libc::EIO)),
            n => {
                data = &data[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

/// Owner first: a change of owner clears the set-user-id bit.
fn set_attributes(
    fd: RawFd,
    uid: Option<u32>,
    gid: Option<u32>,
    mode: Option<u32>,
    mtime_ns: Option<i64>,
) -> SysResult<()> {
    if uid.is_some() || gid.is_some() {
        sys::fchownat(fd, "", uid.unwrap_or(u32::MAX), gid.unwrap_or(u32::MAX), libc::AT_EMPTY_PATH)?;
    }
    if let Some(mode) = mode {
        sys::fchmod(fd, mode & 0o7777)?;
    }
    match mtime_ns {
        Some(ns) => sys::utimensat(fd, "", ns, ns, 0),
        None => Ok(()),
    }
}

/// An empty path is nothing; a NUL is refused further down.
fn checked(path: &[u8]) -> SysResult<&[u8]> {
    if path.is_empty() {
        return Err(Errno(libc::EINVAL));
    }
    Ok(path)
}

/// Parent and last component; `None` for the root and for paths that end in `.` or `..`.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = path.iter().rposition(|byte| *byte != b'/')? + 1;
    let start = path[..end].iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let name = &path[start..end];
    if matches!(name, b"." | b"..") {
        return None;
    }
    Some((&path[..start], name))
}

fn open_parent(root: RawFd, path: &[u8]) -> SysResult<(Fd, &[u8])> {
    let (parent, name) = split(path).ok_or(Errno(libc::EINVAL))?;
    let parent = if parent.is_empty() { b"." } else { parent };
    Ok((sys::openat2(root, parent, libc::O_PATH | libc::O_DIRECTORY, 0, RESOLVE)?, name))
}

/// Opens what `path` leads to, if that is a regular file.
fn open_regular(root: RawFd, path: &[u8], flags: i32) -> SysResult<Fd> {
    let found = sys::openat2(root, checked(path)?, libc::O_PATH, 0, RESOLVE)?;
    match sys::fstat(found.raw())?.st_mode & libc::S_IFMT {
        libc::S_IFREG => sys::open(sys::proc_fd(found.raw()), flags, 0),
        libc::S_IFDIR => Err(Errno(libc::EISDIR)),
        _ => Err(Errno(libc::EACCES)),
    }
}

/// A new regular file. A symbolic link that leads nowhere is not written through.
fn create(root: RawFd, path: &[u8]) -> SysResult<Fd> {
    let (parent, name) = open_parent(root, path)?;
    sys::openat(parent.raw(), name, libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW, 0o600)
}

fn make_directory(root: RawFd, path: &[u8]) -> SysResult<()> {
    let (parent, name) = open_parent(root, path)?;
    sys::mkdirat(parent.raw(), name, 0o755)
}

fn make_parents(root: RawFd, path: &[u8]) -> SysResult<()> {
    for (at, _) in path.iter().enumerate().filter(|(at, byte)| *at > 0 && **byte == b'/') {
        match make_directory(root, &path[..at]) {
            // EINVAL: this step is `.`, `..` or nothing.
            Ok(()) | Err(Errno(libc::EEXIST | libc::EINVAL)) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The kernel's offsets are signed.
fn check_range(offset: u64, len: usize) -> SysResult<()> {
    match offset.checked_add(len as u64) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(Errno(libc::EINVAL)),
    }
}

fn list_page(root: RawFd, request: &ListFilesRequest, limit: usize) -> SysResult<ListFilesResponse> {
    let path = checked(&request.path)?;
    let directory = sys::openat2(root, path, libc::O_RDONLY | libc::O_DIRECTORY, 0, RESOLVE)?;
    let mut names: Vec<Vec<u8>> = Vec::new();
    let mut dropped = false;
    // At most two pages of entries are kept, however large the directory is.
    let mut shrink = |names: &mut Vec<Vec<u8>>| {
        sort(names);
        dropped |= names.len() > limit;
        names.truncate(limit);
    };
    sys::read_dir_fd(directory.raw(), |entry| {
        if request.after.is_empty() || entry.name > request.after {
            names.push(entry.name);
            if names.len() >= 2 * limit {
                shrink(&mut names);
            }
        }
        Ok::<(), Errno>(())
    })?;
    shrink(&mut names);
    let mut page = ListFilesResponse { entries: Vec::new(), more: dropped };
    let mut bytes = 0;
    for name in names {
        let status = match sys::fstatat(directory.raw(), &name, libc::AT_SYMLINK_NOFOLLOW) {
            // Removed since it was listed.
            Err(Errno(libc::ENOENT)) => continue,
            other => other?,
        };
        let entry = info(&status, name.clone(), || sys::readlinkat(directory.raw(), &name))?;
        bytes += entry.name.len() + entry.link_target.len() + 64;
        if bytes > LIST_MAX_BYTES {
            page.more = true;
            break;
        }
        page.entries.push(entry);
    }
    Ok(page)
}

fn info(status: &libc::stat, name: Vec<u8>, target: impl FnOnce() -> SysResult<Vec<u8>>) -> SysResult<FileInfo> {
    let link_target = if status.st_mode & libc::S_IFMT == libc::S_IFLNK { target()? } else { Vec::new() };
    Ok(FileInfo {
        name,
        mode: status.st_mode,
        uid: status.st_uid,
        gid: status.st_gid,
        size: status.st_size as u64,
        mtime_ns: status.st_mtime.saturating_mul(1_000_000_000).saturating_add(status.st_mtime_nsec),
        rdev: status.st_rdev,
        link_target,
        device: status.st_dev,
        number: status.st_ino,
        links: u32::try_from(status.st_nlink).unwrap_or(u32::MAX),
    })
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
