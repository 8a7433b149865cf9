//! Hands a volume to a group, as Kubernetes' fsGroup wants it.
//!
//! The volume may be shared with a container that is running, so no path is resolved twice: every step is relative to a
//! descriptor, and symbolic links are changed themselves, never followed.

use crate::fs;
use crate::prelude::*;
use crate::proto::agent::FSGroup;
use crate::sys::{self, Errno, RawFd, SysResult};

/// FSGroupChangePolicy.OnRootMismatch
const ON_ROOT_MISMATCH: i32 = 1;
const SETGID: u32 = 0o2000;
/// What the group may do with files, and with directories.
const FILE_MODE: u32 = 0o660;
const DIRECTORY_MODE: u32 = 0o770 | SETGID;
const MAX_DEPTH: usize = 256;

/// The tree at `path` belongs to the group and is readable and writable for it; new files in it will be, too.
pub fn give_to_group(path: &str, group: &FSGroup) -> Result<()> {
    let root = open_directory(path)?;
    let status = sys::fstat(root.raw()).with_context(|| format!("look at {path}"))?;
    let right = status.st_gid == group.group_id && status.st_mode & DIRECTORY_MODE == DIRECTORY_MODE;
    if group.group_change_policy == ON_ROOT_MISMATCH && right {
        return Ok(());
    }
    walk(root.raw(), group.group_id, 0).with_context(|| format!("give {path} to group {}", group.group_id))
}

/// Only the directory itself.
pub fn set_group(path: &str, group: u32) -> Result<()> {
    let directory = open_directory(path)?;
    own(directory.raw(), group, SETGID).with_context(|| format!("give {path} to group {group}"))
}

fn open_directory(path: &str) -> Result<sys::Fd> {
    sys::open(path, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW, 0).with_context(|| format!("open {path}"))
}

fn own(fd: RawFd, group: u32, add_mode: u32) -> SysResult<()> {
    sys::fchownat(fd, "", u32::MAX, group, libc::AT_EMPTY_PATH)?;
    let mode = sys::fstat(fd)?.st_mode & 0o7777;
    // fchmod refuses an O_PATH descriptor but accepts its path below /proc.
    sys::fchmodat(libc::AT_FDCWD, sys::proc_fd(fd), mode | add_mode)
}

fn walk(directory: RawFd, group: u32, depth: usize) -> SysResult<()> {
    if depth > MAX_DEPTH {
        return Err(Errno(libc::ELOOP));
    }
    for entry in fs::list_fd(directory)? {
        let fd = match sys::openat(directory, &entry.name, libc::O_PATH | libc::O_NOFOLLOW, 0) {
            // Removed since it was listed.
            Err(Errno(libc::ENOENT)) => continue,
            other => other?,
        };
        match sys::fstat(fd.raw())?.st_mode & libc::S_IFMT {
            libc::S_IFLNK => sys::fchownat(fd.raw(), "", u32::MAX, group, libc::AT_EMPTY_PATH)?,
            libc::S_IFDIR => {
                let inner = sys::openat(fd.raw(), ".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
                walk(inner.raw(), group, depth + 1)?;
            }
            _ => own(fd.raw(), group, FILE_MODE)?,
        }
    }
    // The root comes last: an interrupted walk must not look finished to OnRootMismatch.
    own(directory, group, DIRECTORY_MODE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    #[test]
    fn a_tree_is_handed_over_but_not_what_links_point_to() {
        if sys::geteuid() != 0 {
            return;
        }
        let dir = TempDir::new("group");
        let outside = dir.file("outside", "");
        let file = dir.file("volume/sub/file", "");
        let link = format!("{}/volume/link", dir.0);
        sys::symlinkat(&outside, libc::AT_FDCWD, &link).unwrap();
        let volume = dir.dir("volume");
        give_to_group(&volume, &FSGroup { group_id: 1234, group_change_policy: 0 }).unwrap();
        let of = |path: &str| {
            let status = sys::lstat(path).unwrap();
            (status.st_gid, status.st_mode & 0o7777)
        };
        assert_eq!(of(&file), (1234, 0o664));
        assert_eq!(of(&volume), (1234, 0o2775));
        assert_eq!(of(&format!("{volume}/sub")), (1234, 0o2775));
        assert_eq!(of(&link).0, 1234);
        assert_eq!(of(&outside), (0, 0o644));

        // With OnRootMismatch, a root with the right owner ends the work.
        let new = dir.file("volume/new", "");
        sys::fchownat(libc::AT_FDCWD, &new, 0, 0, 0).unwrap();
        give_to_group(&volume, &FSGroup { group_id: 1234, group_change_policy: ON_ROOT_MISMATCH }).unwrap();
        assert_eq!(of(&new).0, 0);
        give_to_group(&volume, &FSGroup { group_id: 77, group_change_policy: ON_ROOT_MISMATCH }).unwrap();
        assert_eq!((of(&new).0, of(&volume).0), (77, 77));
        set_group(&volume, 5).unwrap();
        assert_eq!((of(&new).0, of(&volume)), (77, (5, 0o2775)));
    }
}
