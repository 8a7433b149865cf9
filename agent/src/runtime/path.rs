//! Paths inside a container's root, resolved so that no symlink of the image leads out of it.

use crate::prelude::*;
use crate::sys::{self, Errno, Fd, RawFd, SysResult};

/// Links followed while a missing path is being made.
const MAX_LINKS: u32 = 40;

/// Opens `path` as if `root` were the root directory: absolute symlinks and `..` stay inside, magic links fail.
pub fn open(root: RawFd, path: &str, flags: i32) -> SysResult<Fd> {
    let relative = path.trim_start_matches('/');
    let relative = if relative.is_empty() { "." } else { relative };
    sys::openat2(root, relative, flags, 0, libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS)
}

/// The directory at `path` (O_PATH), made with all its parents if it is missing.
pub fn make_dir(root: RawFd, path: &str, mode: u32) -> SysResult<Fd> {
    make_dir_following(root, path, mode, 0)
}

fn make_dir_following(root: RawFd, path: &str, mode: u32, links: u32) -> SysResult<Fd> {
    match open(root, path, libc::O_PATH | libc::O_DIRECTORY) {
        Err(Errno(libc::ENOENT)) => {}
        other => return other,
    }
    let (parent_path, name) = split(path)?;
    let parent = make_dir_following(root, parent_path, mode, links)?;
    match sys::mkdirat(parent.raw(), name, mode) {
        Ok(()) => {}
        // It exists by now, or it is a symlink to a missing target, which then has to be made.
        Err(Errno(libc::EEXIST)) => {
            if let Some(target) = dangling(parent.raw(), parent_path, name, links)? {
                return make_dir_following(root, &target, mode, links + 1);
            }
        }
        Err(e) => return Err(e),
    }
    sys::openat(parent.raw(), name, libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW, 0)
}

/// The file at `path` (O_PATH), made empty, with its parents, if it is missing. A directory there is EISDIR.
pub fn make_file(root: RawFd, path: &str) -> SysResult<Fd> {
    make_file_following(root, path, 0)
}

fn make_file_following(root: RawFd, path: &str, links: u32) -> SysResult<Fd> {
    match open(root, path, libc::O_PATH) {
        Err(Errno(libc::ENOENT)) => {}
        Ok(fd) if is_dir(&fd)? => return Err(Errno(libc::EISDIR)),
        other => return other,
    }
    let (parent_path, name) = split(path)?;
    let parent = make_dir_following(root, parent_path, 0o755, links)?;
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY | libc::O_NOFOLLOW;
    match sys::openat(parent.raw(), name, flags, 0o644) {
        Ok(fd) => drop(fd),
        Err(Errno(libc::EEXIST)) => {
            if let Some(target) = dangling(parent.raw(), parent_path, name, links)? {
                return make_file_following(root, &target, links + 1);
            }
        }
        Err(e) => return Err(e),
    }
    sys::openat(parent.raw(), name, libc::O_PATH | libc::O_NOFOLLOW, 0)
}

/// Parent and last component. A path that ends in `..` or names the root itself has none.
pub fn split(path: &str) -> SysResult<(&str, &str)> {
    let path = path.trim_end_matches('/');
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    match name {
        "" | "." | ".." => Err(Errno(libc::EINVAL)),
        _ => Ok((parent, name)),
    }
}

/// Where a symlink points to, as a path from the root; `None` for anything but a symlink.
fn dangling(parent: RawFd, parent_path: &str, name: &str, links: u32) -> SysResult<Option<String>> {
    if links >= MAX_LINKS {
        return Err(Errno(libc::ELOOP));
    }
    match sys::readlinkat(parent, name) {
        Ok(target) => {
            let target = String::from_utf8(target).map_err(|_| Errno(libc::EILSEQ))?;
            Ok(Some(if target.starts_with('/') { target } else { format!("{parent_path}/{target}") }))
        }
        Err(Errno(libc::EINVAL)) => Ok(None),
        Err(e) => Err(e),
    }
}

pub fn is_dir(fd: &Fd) -> SysResult<bool> {
    Ok(sys::fstat(fd.raw())?.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs;
    use crate::test_support::TempDir;

    fn link(target: &str, path: &str) {
        sys::symlinkat(target, sys::AT_FDCWD, path).unwrap();
    }

    #[test]
    fn symlinks_of_the_image_stay_inside() {
        let base = TempDir::new("path");
        let root_path = base.dir("root");
        let outside = base.dir("outside");
        link(&outside, &format!("{root_path}/abs"));
        link("../../outside", &format!("{root_path}/rel"));
        link("/loop", &format!("{root_path}/loop"));
        link("/run", &format!("{root_path}/var"));
        let root = sys::open(&root_path, libc::O_PATH | libc::O_DIRECTORY, 0).unwrap();
        make_dir(root.raw(), "/abs/made", 0o755).unwrap();
        make_file(root.raw(), "rel/file").unwrap();
        make_dir(root.raw(), "/var/lock/x", 0o755).unwrap();
        make_dir(root.raw(), "/../../up", 0o755).unwrap();
        assert_eq!(fs::names(&outside).unwrap(), Vec::<String>::new());
        assert!(fs::is_dir(format!("{root_path}{outside}/made")));
        assert!(fs::exists(format!("{root_path}/outside/file")));
        assert!(fs::is_dir(format!("{root_path}/run/lock/x")) && fs::is_dir(format!("{root_path}/up")));
        assert_eq!(make_dir(root.raw(), "/loop/x", 0o755), Err(Errno(libc::ELOOP)));
        assert_eq!(make_file(root.raw(), "/run"), Err(Errno(libc::EISDIR)));
        assert_eq!(make_dir(root.raw(), "/outside/file/x", 0o755), Err(Errno(libc::ENOTDIR)));
        assert_eq!(make_file(root.raw(), "/"), Err(Errno(libc::EISDIR)));
        assert!(make_dir(root.raw(), "/missing/..", 0o755).is_err());
        assert!(open(root.raw(), "/abs/made", libc::O_PATH).is_ok());
    }
}
