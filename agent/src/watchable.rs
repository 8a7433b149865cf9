//! Copies of small trees of the host's, kept up to date (storage driver `watchable-bind`).
//!
//! inotify in the guest does not see changes that the host makes in a share. So a watched source is copied into the
//! guest's memory and the container gets the copy. Every two seconds changed files are copied again: files in place, so
//! that inotify reports them, symbolic links (by which Kubernetes switches versions) by renaming.

use crate::fs;
use crate::paths::STATE_DIR;
use crate::prelude::*;
use crate::sys::{self, Errno, Fd, RawFd, SysResult, AT_FDCWD};
use core::fmt::Write;

/// Limits of a copy, which takes the guest's memory: a larger tree is not a configuration, and is mounted itself.
const MAX_FILES: u32 = 16;
const MAX_BYTES: u64 = 1 << 20;
const MAX_DEPTH: u32 = 16;
const NO_FOLLOW: i32 = libc::O_NOFOLLOW | libc::O_NONBLOCK;

/// A source whose copy is kept up to date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watched {
    pub source: String,
    pub mount_point: String,
}

/// Where the copy for a mount point lies: on a tmpfs of the agent's.
pub fn copy_of(mount_point: &str) -> String {
    // FNV-1a: names of any length and content become one of a directory.
    let hash = mount_point
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{STATE_DIR}/watchable/{hash:016x}")
}

/// Makes the first copy; `None` for a tree that is too large to be copied, which is then mounted itself.
pub fn prepare(source: &str, mount_point: &str) -> Result<Option<String>> {
    let copy = copy_of(mount_point);
    fs::create_dir_all(&format!("{STATE_DIR}/watchable"), 0o700).context("make the directory of copies")?;
    let status = sys::stat(source).with_context(|| format!("watch {source}"))?;
    if is(status.st_mode, libc::S_IFDIR) {
        fs::mkdir(&copy, 0o755).with_context(|| format!("make the copy of {source}"))?;
    } else {
        fs::write(&copy, b"").with_context(|| format!("make the copy of {source}"))?;
    }
    match synchronise(source, &copy) {
        Ok(()) => Ok(Some(copy)),
        Err(e) => {
            let _ = fs::remove_dir_all(&copy);
            if e.0 == libc::EFBIG {
                return Ok(None);
            }
            Err(e).with_context(|| format!("copy {source}"))
        }
    }
}

/// Makes the copy equal to the source. EFBIG: it has become too large.
fn synchronise(source: &str, copy: &str) -> SysResult<()> {
    let mut room = Room { files: MAX_FILES, bytes: MAX_BYTES };
    let source_is = sys::stat(source)?.st_mode;
    if !is(source_is, libc::S_IFDIR) {
        // The source may itself be a symbolic link; its target counts.
        let found = sys::open(source, libc::O_RDONLY | libc::O_NONBLOCK, 0)?;
        return copy_file(AT_FDCWD, sys::proc_fd(found.raw()).as_bytes(), 0, AT_FDCWD, copy.as_bytes(), &mut room);
    }
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    // Measured as a whole first: half of a new version is worse than the old one.
    measure(sys::open(source, flags, 0)?.raw(), &mut Room { files: MAX_FILES, bytes: MAX_BYTES }, 0)?;
    // Opened anew: a directory is read once through.
    let (from, to) = (sys::open(source, flags, 0)?, sys::open(copy, flags | libc::O_NOFOLLOW, 0)?);
    copy_directory(from.raw(), to.raw(), &mut room, 0)
}

struct Room {
    files: u32,
    bytes: u64,
}

impl Room {
    fn take(&mut self, status: &libc::stat) -> SysResult<()> {
        self.files = self.files.checked_sub(1).ok_or(Errno(libc::EFBIG))?;
        self.bytes = self.bytes.checked_sub(status.st_size as u64).ok_or(Errno(libc::EFBIG))?;
        Ok(())
    }
}

fn is(mode: u32, kind: u32) -> bool {
    mode & libc::S_IFMT == kind
}

fn modified_ns(status: &libc::stat) -> i64 {
    status.st_mtime.saturating_mul(1_000_000_000).saturating_add(status.st_mtime_nsec)
}

fn look(dir: RawFd, name: &[u8]) -> SysResult<libc::stat> {
    sys::fstatat(dir, name, libc::AT_SYMLINK_NOFOLLOW)
}

fn open_below(dir: RawFd, name: &[u8]) -> SysResult<Fd> {
    sys::openat(dir, name, libc::O_RDONLY | libc::O_DIRECTORY | NO_FOLLOW, 0)
}

fn measure(from: RawFd, room: &mut Room, depth: u32) -> SysResult<()> {
    if depth > MAX_DEPTH {
        return Err(Errno(libc::EFBIG));
    }
    for entry in fs::list_fd(from)? {
        let status = look(from, &entry.name)?;
        if is(status.st_mode, libc::S_IFDIR) {
            measure(open_below(from, &entry.name)?.raw(), room, depth + 1)?;
        } else if is(status.st_mode, libc::S_IFREG) {
            room.take(&status)?;
        }
    }
    Ok(())
}

fn copy_directory(from: RawFd, to: RawFd, room: &mut Room, depth: u32) -> SysResult<()> {
    if depth > MAX_DEPTH {
        return Err(Errno(libc::EFBIG));
    }
    let entries = fs::list_fd(from)?;
    let mut links = Vec::new();
    for entry in &entries {
        let name = entry.name.as_slice();
        let status = look(from, name)?;
        make_room_for(to, name, status.st_mode)?;
        match status.st_mode & libc::S_IFMT {
            libc::S_IFDIR => {
                match sys::mkdirat(to, name, 0o700) {
                    Ok(()) | Err(Errno(libc::EEXIST)) => {}
                    Err(e) => return Err(e),
                }
                let inner = open_below(to, name)?;
                copy_directory(open_below(from, name)?.raw(), inner.raw(), room, depth + 1)?;
                own(inner.raw(), &status)?;
            }
            libc::S_IFREG => copy_file(from, name, libc::O_NOFOLLOW, to, name, room)?,
            libc::S_IFLNK => links.push(name),
            // Sockets, pipes and devices are not copied: they are no configuration.
            _ => {}
        }
    }
    // Links last, so that their targets are complete.
    for name in links {
        copy_link(from, to, name)?;
    }
    for there in fs::list_fd(to)? {
        if !entries.iter().any(|entry| entry.name == there.name) {
            fs::remove_tree_at(to, &there.name, 1)?;
        }
    }
    Ok(())
}

/// Removes what is in the way of an entry of another type.
fn make_room_for(to: RawFd, name: &[u8], mode: u32) -> SysResult<()> {
    match look(to, name) {
        Ok(there) if !is(there.st_mode, mode & libc::S_IFMT) => fs::remove_tree_at(to, name, 1),
        _ => Ok(()),
    }
}

fn own(fd: RawFd, status: &libc::stat) -> SysResult<()> {
    let now = sys::fstat(fd)?;
    if (now.st_uid, now.st_gid) != (status.st_uid, status.st_gid) {
        sys::fchownat(fd, "", status.st_uid, status.st_gid, libc::AT_EMPTY_PATH)?;
    }
    if now.st_mode != status.st_mode {
        sys::fchmod(fd, status.st_mode & 0o7777)?;
    }
    Ok(())
}

fn copy_file(from: RawFd, name: &[u8], follow: i32, to: RawFd, target: &[u8], room: &mut Room) -> SysResult<()> {
    let source = sys::openat(from, name, libc::O_RDONLY | libc::O_NONBLOCK | follow, 0)?;
    // Read before the content, so that a change in between is noticed the next time.
    let status = sys::fstat(source.raw())?;
    if !is(status.st_mode, libc::S_IFREG) {
        return Ok(());
    }
    room.take(&status)?;
    let there = look(to, target);
    if there.is_ok_and(|now| {
        (now.st_size, modified_ns(&now), now.st_mode, now.st_uid, now.st_gid)
            == (status.st_size, modified_ns(&status), status.st_mode, status.st_uid, status.st_gid)
    }) {
        return Ok(());
    }
    let mut content = Vec::new();
    while sys::read_append(source.raw(), &mut content, 64 << 10)? > 0 {
        if content.len() as u64 > MAX_BYTES {
            return Err(Errno(libc::EFBIG));
        }
    }
    let file = sys::openat(to, target, libc::O_WRONLY | libc::O_CREAT | NO_FOLLOW, 0o600)?;
    // Over the old content, never through an empty file: a program may be reading it.
    sys::write_all(file.raw(), &content)?;
    sys::ftruncate(file.raw(), content.len() as u64)?;
    own(file.raw(), &status)?;
    let modified = modified_ns(&status);
    sys::utimensat(file.raw(), "", modified, modified, 0)
}

fn copy_link(from: RawFd, to: RawFd, name: &[u8]) -> SysResult<()> {
    const NEW: &[u8] = b".kata-new-link";
    let target = sys::readlinkat(from, name)?;
    if sys::readlinkat(to, name).is_ok_and(|now| now == target) {
        return Ok(());
    }
    match sys::unlinkat(to, NEW, 0) {
        Ok(()) | Err(Errno(libc::ENOENT)) => {}
        Err(e) => return Err(e),
    }
    sys::symlinkat(target, to, NEW)?;
    sys::renameat(to, NEW, to, name)
}

/// Copies what has changed; one line for each source whose copy is not up to date.
pub fn update(watched: &[Watched]) -> String {
    let mut errors = String::new();
    for one in watched {
        let copy = copy_of(&one.mount_point);
        let why = match sys::lstat(&copy).and_then(|_| synchronise(&one.source, &copy)) {
            Ok(()) => continue,
            Err(Errno(libc::ENOENT)) if !fs::exists(&copy) => {
                format!("more than {MAX_FILES} files or {MAX_BYTES} bytes: mounted itself, no change is announced")
            }
            Err(Errno(libc::EFBIG)) => format!("more than {MAX_FILES} files or {MAX_BYTES} bytes: no longer copied"),
            Err(e) => e.to_string(),
        };
        let _ = writeln!(errors, "watched directory {}: {why}", one.source);
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    fn text(path: &str) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_copy_follows_its_source() {
        let base = TempDir::new("watch");
        let (source, copy) = (base.dir("source"), base.dir("copy"));
        base.file("source/..v1/key", "one");
        base.file("source/plain", "x");
        sys::symlinkat("..v1", AT_FDCWD, format!("{source}/..data")).unwrap();
        sys::symlinkat("..data/key", AT_FDCWD, format!("{source}/key")).unwrap();
        synchronise(&source, &copy).unwrap();
        assert_eq!((text(&format!("{copy}/key")).as_str(), text(&format!("{copy}/plain")).as_str()), ("one", "x"));
        let inode = sys::stat(format!("{copy}/plain")).unwrap().st_ino;
        // As Kubernetes does it: a new directory, the link renamed, the old one removed.
        base.file("source/..v2/key", "two");
        sys::symlinkat("..v2", AT_FDCWD, format!("{source}/..tmp")).unwrap();
        fs::rename(&format!("{source}/..tmp"), &format!("{source}/..data")).unwrap();
        fs::remove_dir_all(format!("{source}/..v1")).unwrap();
        base.file("source/plain", "longer");
        synchronise(&source, &copy).unwrap();
        assert_eq!((text(&format!("{copy}/key")).as_str(), text(&format!("{copy}/plain")).as_str()), ("two", "longer"));
        assert_eq!(sys::stat(format!("{copy}/plain")).unwrap().st_ino, inode, "who watches the file hears of it");
        assert_eq!(fs::names(&copy).unwrap(), ["..data", "..v2", "key", "plain"]);
        // A directory in the place of a file.
        fs::remove_file(format!("{source}/plain")).unwrap();
        base.file("source/plain/inner", "y");
        synchronise(&source, &copy).unwrap();
        assert_eq!(text(&format!("{copy}/plain/inner")), "y");
    }

    #[test]
    fn what_has_not_changed_is_not_touched() {
        let base = TempDir::new("watch-same");
        let source = base.file("file", "same");
        let copy = base.file("copy", "");
        synchronise(&source, &copy).unwrap();
        let before = sys::stat(&copy).unwrap();
        synchronise(&source, &copy).unwrap();
        let after = sys::stat(&copy).unwrap();
        assert_eq!((before.st_ctime, before.st_ctime_nsec), (after.st_ctime, after.st_ctime_nsec));
        assert_eq!(text(&copy), "same");
    }

    #[test]
    fn large_trees_are_left_as_they_are() {
        let base = TempDir::new("watch-large");
        let (source, copy) = (base.dir("source"), base.dir("copy"));
        for number in 0..=MAX_FILES {
            base.file(&format!("source/d/{number}"), "x");
        }
        assert_eq!(synchronise(&source, &copy), Err(Errno(libc::EFBIG)));
        assert_eq!(fs::names(&copy).unwrap(), Vec::<String>::new());
        let large = base.file("large", &"x".repeat(1 + MAX_BYTES as usize));
        assert_eq!(synchronise(&large, &base.file("large-copy", "")), Err(Errno(libc::EFBIG)));
    }
}
