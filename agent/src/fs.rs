//! Small file helpers in the manner of `std::fs`, over [`crate::sys`].

use crate::prelude::*;
use crate::sort::sort;
use crate::sys::{self, Errno, SysResult, AT_FDCWD};

/// The longest file that [`read`] takes: files that the agent reads whole are small; a hostile file may be endless.
const MAX_FILE: usize = 16 << 20;

/// A whole file (also of /proc and /sys, whose size is unknown).
pub fn read(path: impl AsRef<[u8]>) -> SysResult<Vec<u8>> {
    let fd = sys::open(path, libc::O_RDONLY, 0)?;
    read_fd(fd.raw())
}

/// The rest of a file, from the descriptor's position.
pub fn read_fd(fd: sys::RawFd) -> SysResult<Vec<u8>> {
    let mut out = Vec::new();
    while sys::read_append(fd, &mut out, 4096)? > 0 {
        if out.len() > MAX_FILE {
            return Err(Errno(libc::EFBIG));
        }
    }
    Ok(out)
}

/// A whole file as text; bytes that are not UTF-8 are replaced.
pub fn read_to_string(path: impl AsRef<[u8]>) -> SysResult<String> {
    let bytes = read(path)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
}

/// A value of /proc/meminfo (`MemTotal`, `SwapFree`, ...) in bytes.
pub fn meminfo(key: &str) -> Option<u64> {
    let text = read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Writes an existing file in one call without creating it: right for /proc, /sys and cgroup files.
pub fn write_existing(path: impl AsRef<[u8]>, data: &str) -> SysResult<()> {
    let fd = sys::open(path, libc::O_WRONLY, 0)?;
    // Such files take a value in one write or not at all; an empty value is meaningful to some of them.
    sys::write(fd.raw(), data.as_bytes()).map(drop)
}

/// Creates or replaces a file.
pub fn write(path: impl AsRef<[u8]>, data: &[u8]) -> SysResult<()> {
    let fd = sys::open(path, libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC, 0o644)?;
    sys::write_all(fd.raw(), data)
}

pub fn exists(path: impl AsRef<[u8]>) -> bool {
    sys::stat(path).is_ok()
}

pub fn is_dir(path: impl AsRef<[u8]>) -> bool {
    sys::stat(path).is_ok_and(|s| s.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

pub fn mkdir(path: impl AsRef<[u8]>, mode: u32) -> SysResult<()> {
    sys::mkdirat(AT_FDCWD, path, mode)
}

/// `mkdir -p`; an existing directory is fine.
pub fn create_dir_all(path: &str, mode: u32) -> SysResult<()> {
    match mkdir(path, mode) {
        Ok(()) => return Ok(()),
        Err(Errno(libc::EEXIST)) if is_dir(path) => return Ok(()),
        Err(Errno(libc::ENOENT)) => {}
        Err(e) => return Err(e),
    }
    for (at, _) in path.match_indices('/').filter(|(at, _)| *at > 0) {
        match mkdir(&path[..at], mode) {
            Ok(()) | Err(Errno(libc::EEXIST)) => {}
            Err(e) => return Err(e),
        }
    }
    match mkdir(path, mode) {
        Err(Errno(libc::EEXIST)) if is_dir(path) => Ok(()),
        other => other,
    }
}

pub fn remove_file(path: impl AsRef<[u8]>) -> SysResult<()> {
    sys::unlinkat(AT_FDCWD, path, 0)
}

pub fn remove_dir(path: impl AsRef<[u8]>) -> SysResult<()> {
    sys::unlinkat(AT_FDCWD, path, libc::AT_REMOVEDIR)
}

/// Removes a tree without following symlinks and without leaving its file system; a missing one is fine.
pub fn remove_dir_all(path: impl AsRef<[u8]>) -> SysResult<()> {
    match remove_tree_at(AT_FDCWD, path.as_ref(), 0) {
        Err(Errno(libc::ENOENT)) => Ok(()),
        other => other,
    }
}

/// Deeper trees are refused: only an attack has them.
const MAX_DEPTH: usize = 256;

/// Like [`remove_dir_all`], below an open directory.
pub fn remove_tree_at(dir: sys::RawFd, name: &[u8], depth: usize) -> SysResult<()> {
    match sys::unlinkat(dir, name, 0) {
        Ok(()) => return Ok(()),
        Err(Errno(libc::EISDIR | libc::EPERM)) => {}
        Err(e) => return Err(e),
    }
    if depth > MAX_DEPTH {
        return Err(Errno(libc::ELOOP));
    }
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    // RESOLVE_NO_XDEV: a mount that is still there must not be emptied.
    let fd = match sys::openat2(dir, name, flags, 0, if depth == 0 { 0 } else { libc::RESOLVE_NO_XDEV }) {
        Err(Errno(libc::EXDEV)) => return Err(Errno(libc::EBUSY)),
        other => other?,
    };
    for entry in list_fd(fd.raw())? {
        remove_tree_at(fd.raw(), &entry.name, depth + 1)?;
    }
    sys::unlinkat(dir, name, libc::AT_REMOVEDIR)
}

/// The entries of an open directory but `.` and `..`, in the order of the file system.
pub fn list_fd(fd: sys::RawFd) -> SysResult<Vec<sys::DirEntry>> {
    let mut entries = Vec::new();
    sys::read_dir_fd(fd, |entry| {
        entries.push(entry);
        Ok::<(), Errno>(())
    })?;
    Ok(entries)
}

/// The entries of a directory but `.` and `..`.
pub fn read_dir(path: impl AsRef<[u8]>) -> SysResult<Vec<sys::DirEntry>> {
    let fd = sys::open(path, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
    list_fd(fd.raw())
}

/// The names in a directory as text, sorted: for /sys and our own directories.
pub fn names(path: &str) -> SysResult<Vec<String>> {
    let mut names: Vec<String> =
        read_dir(path)?.into_iter().map(|e| String::from_utf8_lossy(&e.name).into_owned()).collect();
    sort(&mut names);
    Ok(names)
}

/// The target of a symlink; bytes that are not UTF-8 are replaced.
pub fn read_link(path: &str) -> SysResult<String> {
    Ok(String::from_utf8_lossy(&sys::readlinkat(AT_FDCWD, path)?).into_owned())
}

pub fn rename(from: &str, to: &str) -> SysResult<()> {
    sys::renameat(AT_FDCWD, from, AT_FDCWD, to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_in_bytes() {
        let (total, free) = (meminfo("MemTotal").unwrap(), meminfo("MemFree").unwrap());
        assert!(free > 0 && free < total && total % 1024 == 0);
        assert_eq!(meminfo("Mem"), None, "a whole name only");
    }

    #[test]
    fn a_tree_is_made_read_and_removed() {
        let base = format!("/tmp/kata-agent-fs-{}", sys::getpid());
        create_dir_all(&format!("{base}/a/b/c"), 0o755).unwrap();
        create_dir_all(&format!("{base}/a/b/c"), 0o755).unwrap();
        write(format!("{base}/a/file"), b"text\n").unwrap();
        sys::symlinkat("/etc", AT_FDCWD, format!("{base}/a/link")).unwrap();
        assert_eq!(read_to_string(format!("{base}/a/file")).unwrap(), "text\n");
        assert_eq!(names(&format!("{base}/a")).unwrap(), ["b", "file", "link"]);
        assert_eq!(read_link(&format!("{base}/a/link")).unwrap(), "/etc");
        assert_eq!(create_dir_all(&format!("{base}/a/file/x"), 0o755), Err(Errno(libc::ENOTDIR)));
        remove_dir_all(&base).unwrap();
        assert!(!exists(&base) && exists("/etc"));
        remove_dir_all(&base).unwrap();
    }

    #[test]
    fn proc_files_are_read_whole() {
        assert!(read_to_string("/proc/self/status").unwrap().contains("Name:"));
        assert_eq!(read("/nonexistent/x"), Err(Errno(libc::ENOENT)));
    }
}
