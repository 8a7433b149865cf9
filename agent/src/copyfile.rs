//! CopyFile: the host hands files over in pieces, for volumes of sandboxes without a shared directory.
//!
//! They land below one directory only. Paths are walked step by step without following any symbolic link: a link made
//! by an earlier copy must not redirect a later one.

use crate::files::{failed, pwrite_all};
use crate::fs;
use crate::prelude::*;
use crate::proto::agent::CopyFileRequest;
use crate::sys::{self, Errno, Fd, RawFd, SysResult};

/// Where copies go.
const BASE: &str = "/run/kata-containers/shared/containers";
const RESOLVE: u64 = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;

/// Takes one piece of a file (which becomes visible with its last piece), a directory or a symbolic link, as
/// `file_mode` says. Missing parents are made.
pub fn copy_file(request: &CopyFileRequest) -> Result<()> {
    copy_below(BASE, request)
}

fn copy_below(base: &str, request: &CopyFileRequest) -> Result<()> {
    let steps = check(base, request)?;
    fs::create_dir_all(base, 0o750).with_context(|| format!("make {base}"))?;
    let place = || {
        let base = sys::open(base, libc::O_PATH | libc::O_DIRECTORY, 0)?;
        let (parent, name) = open_parent(base, &steps, request.dir_mode & 0o7777)?;
        match request.file_mode & libc::S_IFMT {
            libc::S_IFDIR => directory(parent.raw(), name, request),
            libc::S_IFLNK => link(parent.raw(), name, request),
            _ => piece(parent.raw(), name, request),
        }
    };
    place().map_err(|e| failed(request.path.as_bytes(), e))
}

/// The steps from the base to the file.
fn check<'a>(base: &str, request: &'a CopyFileRequest) -> Result<Vec<&'a str>> {
    let path = &request.path;
    let relative = path.strip_prefix(base).and_then(|rest| rest.strip_prefix('/'));
    let steps: Vec<&str> = relative.unwrap_or_default().split('/').filter(|step| !step.is_empty()).collect();
    if steps.is_empty() || steps.iter().any(|step| matches!(*step, "." | "..")) {
        return Err(Error::denied(format!("{path:?} is not a plain path below {base}")));
    }
    if !matches!(request.file_mode & libc::S_IFMT, 0 | libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK) {
        return Err(Error::invalid(format!("{path:?}: only files, directories and symbolic links can be copied")));
    }
    let (offset, size) = (request.offset, request.file_size);
    let end = offset.checked_add(request.data.len() as i64);
    let is_file = matches!(request.file_mode & libc::S_IFMT, 0 | libc::S_IFREG);
    if is_file && (offset < 0 || size < 0 || end.is_none_or(|end| end > size)) {
        return Err(Error::invalid(format!(
            "{path:?}: {} bytes at offset {offset} do not fit into a file of {size}",
            request.data.len()
        )));
    }
    Ok(steps)
}

/// Walks to the parent, creating missing directories.
fn open_parent<'a>(base: Fd, steps: &[&'a str], mode: u32) -> SysResult<(Fd, &'a str)> {
    let (name, parents) = steps.split_last().ok_or(Errno(libc::EINVAL))?;
    let mut directory = base;
    for step in parents {
        let made = match sys::mkdirat(directory.raw(), step, 0o755) {
            Ok(()) => true,
            Err(Errno(libc::EEXIST)) => false,
            Err(e) => return Err(e),
        };
        directory = sys::openat2(directory.raw(), step, libc::O_RDONLY | libc::O_DIRECTORY, 0, RESOLVE)?;
        if made && mode != 0 {
            sys::fchmod(directory.raw(), mode)?;
        }
    }
    Ok((directory, name))
}

fn directory(parent: RawFd, name: &str, request: &CopyFileRequest) -> SysResult<()> {
    match sys::mkdirat(parent, name, 0o755) {
        Ok(()) | Err(Errno(libc::EEXIST)) => {}
        Err(e) => return Err(e),
    }
    let made = sys::openat2(parent, name, libc::O_RDONLY | libc::O_DIRECTORY, 0, RESOLVE)?;
    finish(made.raw(), request)
}

/// Replaces an existing file or link atomically; a directory is not replaced.
fn link(parent: RawFd, name: &str, request: &CopyFileRequest) -> SysResult<()> {
    let temporary = temporary(name);
    remove(parent, &temporary)?;
    sys::symlinkat(&request.data, parent, &temporary)?;
    sys::fchownat(parent, &temporary, request.uid as u32, request.gid as u32, libc::AT_SYMLINK_NOFOLLOW)?;
    match sys::renameat(parent, &temporary, parent, name) {
        Err(Errno(libc::EISDIR)) => {
            remove(parent, name)?;
            sys::renameat(parent, &temporary, parent, name)
        }
        other => other,
    }
}

fn piece(parent: RawFd, name: &str, request: &CopyFileRequest) -> SysResult<()> {
    let temporary = temporary(name);
    let first = if request.offset == 0 { libc::O_TRUNC } else { 0 };
    // O_NONBLOCK: opening a fifo of that name must not block.
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_NONBLOCK | first;
    let file = sys::openat2(parent, &temporary, flags, 0o600, RESOLVE)?;
    if sys::fstat(file.raw())?.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(Errno(libc::EACCES));
    }
    // `check` has made sure that neither is negative.
    let (offset, size) = (request.offset as u64, request.file_size as u64);
    pwrite_all(file.raw(), &request.data, offset)?;
    if offset + (request.data.len() as u64) < size {
        return Ok(());
    }
    finish(file.raw(), request)?;
    sys::renameat(parent, &temporary, parent, name)
}

fn finish(fd: RawFd, request: &CopyFileRequest) -> SysResult<()> {
    sys::fchownat(fd, "", request.uid as u32, request.gid as u32, libc::AT_EMPTY_PATH)?;
    sys::fchmod(fd, request.file_mode & 0o7777)
}

fn temporary(name: &str) -> String {
    format!("{name}.tmp")
}

fn remove(parent: RawFd, name: &str) -> SysResult<()> {
    match fs::remove_tree_at(parent, name.as_bytes(), 0) {
        Err(Errno(libc::ENOENT)) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::code;
    use crate::test_support::TempDir;

    fn request(dir: &TempDir, path: &str, mode: u32, data: &[u8]) -> CopyFileRequest {
        CopyFileRequest {
            path: format!("{}/base/{path}", dir.0),
            file_size: data.len() as i64,
            file_mode: mode,
            dir_mode: 0o711,
            data: data.to_vec(),
            ..Default::default()
        }
    }

    fn copy(dir: &TempDir, request: &CopyFileRequest) -> Result<()> {
        copy_below(&format!("{}/base", dir.0), request)
    }

    fn mode(path: &str) -> u32 {
        sys::lstat(path).unwrap().st_mode & 0o7777
    }

    #[test]
    fn a_file_appears_with_its_last_piece() {
        let dir = TempDir::new("copy");
        let path = format!("{}/base/a/b/file", dir.0);
        let mut part = request(&dir, "a/b/file", libc::S_IFREG | 0o640, b"first ");
        part.file_size = 12;
        copy(&dir, &part).unwrap();
        assert!(!fs::exists(&path) && fs::exists(format!("{path}.tmp")));
        part.offset = 6;
        part.data = b"second".to_vec();
        copy(&dir, &part).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "first second");
        assert!(!fs::exists(format!("{path}.tmp")));
        assert_eq!((mode(&path), mode(&format!("{}/base/a", dir.0))), (0o640, 0o711));
        // Again, shorter; and empty.
        copy(&dir, &request(&dir, "a/b/file", 0o600, b"new")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        copy(&dir, &request(&dir, "a/b/file", 0o600, b"")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn directories_and_links() {
        let dir = TempDir::new("copy");
        let at = |path: &str| format!("{}/base/{path}", dir.0);
        copy(&dir, &request(&dir, "d", libc::S_IFDIR | 0o750, b"")).unwrap();
        copy(&dir, &request(&dir, "d", libc::S_IFDIR | 0o755, b"")).unwrap();
        assert_eq!(mode(&at("d")), 0o755);
        copy(&dir, &request(&dir, "d/..data", libc::S_IFLNK | 0o777, b"..2026_1")).unwrap();
        copy(&dir, &request(&dir, "d/..data", libc::S_IFLNK | 0o777, b"..2026_2")).unwrap();
        assert_eq!(fs::read_link(&at("d/..data")).unwrap(), "..2026_2");
        dir.file("base/d/tree/file", "");
        copy(&dir, &request(&dir, "d/tree", libc::S_IFLNK, b"x")).unwrap();
        assert_eq!(fs::read_link(&at("d/tree")).unwrap(), "x");
    }

    #[test]
    fn nothing_leads_out() {
        let dir = TempDir::new("copy");
        let outside = dir.dir("outside");
        dir.dir("base");
        sys::symlinkat(&outside, libc::AT_FDCWD, format!("{}/base/link", dir.0)).unwrap();
        sys::symlinkat("outside/x", libc::AT_FDCWD, format!("{}/base/file.tmp", dir.0)).unwrap();
        for path in ["../x", "a/../../x", "a/./b", "", "/"] {
            assert_eq!(
                copy(&dir, &request(&dir, path, 0o600, b"")).unwrap_err().code,
                code::PERMISSION_DENIED,
                "{path}"
            );
        }
        for path in ["link/x", "link/a/x", "file"] {
            let error = copy(&dir, &request(&dir, path, 0o600, b"")).unwrap_err();
            assert_eq!(error.code, code::PERMISSION_DENIED, "{path}: {error}");
        }
        let mut elsewhere = request(&dir, "x", 0o600, b"");
        elsewhere.path = format!("{}/basement/x", dir.0);
        assert_eq!(copy(&dir, &elsewhere).unwrap_err().code, code::PERMISSION_DENIED);
        // A link as the last step is replaced, not followed.
        copy(&dir, &request(&dir, "link", 0o600, b"data")).unwrap();
        assert!(fs::names(&outside).unwrap().is_empty());
        assert_eq!(fs::read_to_string(format!("{}/base/link", dir.0)).unwrap(), "data");
    }

    #[test]
    fn impossible_pieces_are_refused() {
        let dir = TempDir::new("copy");
        let mut part = request(&dir, "x", 0o600, b"data");
        for (offset, size) in [(-1, 4), (1, 4), (0, -1), (i64::MAX, 4)] {
            (part.offset, part.file_size) = (offset, size);
            assert_eq!(copy(&dir, &part).unwrap_err().code, code::INVALID_ARGUMENT, "{offset} {size}");
        }
        assert!(copy(&dir, &request(&dir, "x", libc::S_IFCHR, b"")).is_err());
    }
}
