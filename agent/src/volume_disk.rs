//! Volumes on a disk of their own: a file system of which the container gets one directory.
//!
//! That directory is not the file system's root, in which there is a `lost+found` that some servers refuse to have among
//! their data. It is made when the volume is first mounted, with owner, mode and content of what the image has at
//! the volume's place, under another name: so a volume is filled once, and one whose filling was cut short is filled
//! anew.

use crate::fs;
use crate::prelude::*;
use crate::sys::{self, Errno, Fd, RawFd, SysResult};

/// Driver options of a block storage: the root directory of the container, where the volume is to be in it, and that
/// nothing but owner and mode is taken from there.
const ROOT: &str = "kata.volume.root=";
const PATH: &str = "kata.volume.path=";
const EMPTY: &str = "kata.volume.empty";
/// The directory that the container gets, as a name in the file system.
const DATA: &str = "data";
const NEW: &str = "data.new";
/// Deeper trees are refused: only an attack has them (as in [`fs`]).
const MAX_DEPTH: usize = 256;
const PIECE: usize = 128 << 10;
const DIRECTORY: i32 = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;

/// A block storage's driver options about a volume.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Volume<'a> {
    root: &'a str,
    path: &'a str,
    is_empty: bool,
}

/// Splits the options about a volume from the others.
pub fn split_options(options: &[String]) -> (Option<Volume<'_>>, Vec<&str>) {
    let mut volume = Volume::default();
    let mut others = Vec::new();
    for option in options {
        if let Some(root) = option.strip_prefix(ROOT) {
            volume.root = root;
        } else if let Some(path) = option.strip_prefix(PATH) {
            volume.path = path;
        } else if option == EMPTY {
            volume.is_empty = true;
        } else {
            others.push(option.as_str());
        }
    }
    ((!volume.root.is_empty()).then_some(volume), others)
}

/// Makes the directory of a volume whose file system is mounted at `mount_point`, unless it has one.
pub fn prepare(mount_point: &str, volume: &Volume) -> Result<()> {
    let top = sys::open(mount_point, DIRECTORY, 0).with_context(|| format!("open {mount_point}"))?;
    match sys::fstatat(top.raw(), DATA, libc::AT_SYMLINK_NOFOLLOW) {
        Ok(_) => return Ok(()),
        Err(Errno(libc::ENOENT)) => {}
        // A damaged file system: what the container has written is not taken for missing.
        Err(e) => return Err(e).with_context(|| format!("read the volume of {}", volume.path)),
    }
    fill(top.raw(), volume).with_context(|| format!("copy what the image has at {} into the volume", volume.path))
}

fn fill(top: RawFd, volume: &Volume) -> SysResult<()> {
    match fs::remove_tree_at(top, NEW.as_bytes(), 0) {
        Ok(()) | Err(Errno(libc::ENOENT)) => {}
        Err(e) => return Err(e),
    }
    sys::mkdirat(top, NEW, 0o755)?;
    let new = sys::openat(top, NEW, DIRECTORY, 0)?;
    if let Some(image) = of_image(volume)? {
        let status = sys::fstat(image.raw())?;
        if !volume.is_empty {
            Copy { to: new.raw(), links: Vec::new() }.directory(image.raw(), new.raw(), &mut Vec::new(), 0)?;
        }
        adopt(new.raw(), &status)?;
    }
    // Its content is on the disk before its name is: so an existing name stands for complete content.
    sys::syncfs(top)?;
    sys::renameat(top, NEW, top, DATA)
}

/// The directory that the image has at the volume's place, whatever links lead there; `None` without one.
fn of_image(volume: &Volume) -> SysResult<Option<Fd>> {
    let root = sys::open(volume.root, libc::O_PATH | libc::O_DIRECTORY, 0)?;
    let resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    match sys::openat2(root.raw(), volume.path, libc::O_RDONLY | libc::O_DIRECTORY, 0, resolve) {
        Ok(found) => Ok(Some(found)),
        Err(Errno(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// One copy of a tree.
struct Copy {
    /// Its top directory.
    to: RawFd,
    /// Of files with further names: inode, and the path of the copy's first name below the top.
    links: Vec<(u64, Vec<u8>)>,
}

impl Copy {
    /// Copies what is in one directory; `path` is where that is below the top.
    fn directory(&mut self, from: RawFd, to: RawFd, path: &mut Vec<u8>, depth: usize) -> SysResult<()> {
        if depth > MAX_DEPTH {
            return Err(Errno(libc::ELOOP));
        }
        for entry in fs::list_fd(from)? {
            let name = entry.name.as_slice();
            let status = sys::fstatat(from, name, libc::AT_SYMLINK_NOFOLLOW)?;
            let parent = path.len();
            if parent > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            self.entry(from, to, name, &status, path, depth)?;
            path.truncate(parent);
        }
        Ok(())
    }

    fn entry(
        &mut self,
        from: RawFd,
        to: RawFd,
        name: &[u8],
        status: &libc::stat,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> SysResult<()> {
        let kind = status.st_mode & libc::S_IFMT;
        if kind == libc::S_IFDIR {
            sys::mkdirat(to, name, 0o700)?;
            let (from, to) = (sys::openat(from, name, DIRECTORY, 0)?, sys::openat(to, name, DIRECTORY, 0)?);
            self.directory(from.raw(), to.raw(), path, depth + 1)?;
            copy_attributes(from.raw(), to.raw())?;
            return adopt(to.raw(), status);
        }
        if status.st_nlink > 1 {
            if let Some((_, first)) = self.links.iter().find(|(inode, _)| *inode == status.st_ino) {
                return sys::linkat(self.to, first, to, name);
            }
            self.links.push((status.st_ino, path.clone()));
        }
        match kind {
            libc::S_IFREG => copy_file(from, to, name, status),
            libc::S_IFLNK => {
                sys::symlinkat(sys::readlinkat(from, name)?, to, name)?;
                named(to, name, status)
            }
            _ => {
                sys::mknodat(to, name, status.st_mode, status.st_rdev)?;
                named(to, name, status)?;
                sys::fchmodat(to, name, status.st_mode & 0o7777)
            }
        }
    }
}

fn copy_file(from: RawFd, to: RawFd, name: &[u8], status: &libc::stat) -> SysResult<()> {
    let source = sys::openat(from, name, libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK, 0)?;
    let target = sys::openat(to, name, libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW, 0o600)?;
    let mut piece = vec![0; PIECE];
    loop {
        let n = sys::read(source.raw(), &mut piece)?;
        if n == 0 {
            break;
        }
        sys::write_all(target.raw(), &piece[..n])?;
    }
    // The owner first: a change of it takes capabilities and the set-user-id bit away.
    adopt(target.raw(), status)?;
    copy_attributes(source.raw(), target.raw())?;
    times(target.raw(), b"", status)
}

/// Gives an open file or directory the owner, mode and times of another.
fn adopt(fd: RawFd, status: &libc::stat) -> SysResult<()> {
    sys::fchownat(fd, "", status.st_uid, status.st_gid, libc::AT_EMPTY_PATH)?;
    sys::fchmod(fd, status.st_mode & 0o7777)?;
    times(fd, b"", status)
}

/// The same for the owner and times of what has to be reached by its name.
fn named(dir: RawFd, name: &[u8], status: &libc::stat) -> SysResult<()> {
    sys::fchownat(dir, name, status.st_uid, status.st_gid, libc::AT_SYMLINK_NOFOLLOW)?;
    times(dir, name, status)
}

fn times(dir: RawFd, name: &[u8], status: &libc::stat) -> SysResult<()> {
    let ns = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    let (accessed, modified) = (ns(status.st_atime, status.st_atime_nsec), ns(status.st_mtime, status.st_mtime_nsec));
    // Of an open file it is the file itself, and the kernel takes no flags then.
    let flags = if name.is_empty() { 0 } else { libc::AT_SYMLINK_NOFOLLOW };
    sys::utimensat(dir, name, accessed, modified, flags)
}

/// Copies extended attributes (capabilities of programs, access control lists); a file system without any has none.
fn copy_attributes(from: RawFd, to: RawFd) -> SysResult<()> {
    for name in sys::flistxattr(from)?.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        match sys::fgetxattr(from, name) {
            Ok(value) => sys::fsetxattr(to, name, &value)?,
            Err(Errno(libc::ENODATA | libc::EOPNOTSUPP)) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
    use std::path::Path;

    fn base(name: &str) -> String {
        let base = format!("/tmp/kata-agent-volume-{name}-{}", sys::getpid());
        let _ = std::fs::remove_dir_all(&base);
        std::fs::create_dir_all(format!("{base}/root/var/lib/app/deep")).unwrap();
        std::fs::create_dir(format!("{base}/disk")).unwrap();
        base
    }

    #[test]
    fn options_of_a_volume_are_told_from_others() {
        let options: Vec<String> = ["rw", "kata.volume.root=/r", "kata.volume.path=/x=y", "kata.volume.empty"]
            .iter()
            .map(|option| (*option).to_string())
            .collect();
        let (volume, others) = split_options(&options);
        assert_eq!(volume, Some(Volume { root: "/r", path: "/x=y", is_empty: true }));
        assert_eq!(others, ["rw"]);
        assert_eq!(split_options(&options[..1]), (None, vec!["rw"]));
    }

    #[test]
    fn a_volume_is_filled_once_with_what_the_image_has() {
        let base = base("filled");
        let image = format!("{base}/root/var/lib/app");
        std::fs::write(format!("{image}/deep/file"), vec![7u8; PIECE + 1]).unwrap();
        std::fs::hard_link(format!("{image}/deep/file"), format!("{image}/again")).unwrap();
        symlink("deep/file", format!("{image}/link")).unwrap();
        sys::mknodat(sys::AT_FDCWD, format!("{image}/fifo"), libc::S_IFIFO | 0o640, 0).unwrap();
        std::fs::set_permissions(format!("{image}/deep/file"), PermissionsExt::from_mode(0o4751)).unwrap();
        std::fs::set_permissions(&image, PermissionsExt::from_mode(0o1770)).unwrap();
        sys::utimensat(sys::AT_FDCWD, format!("{image}/deep"), 5, 1_000_000_007, 0).unwrap();
        symlink("/var/lib", format!("{base}/root/lib")).unwrap();
        let disk = format!("{base}/disk");
        // What an earlier, interrupted start has left.
        std::fs::create_dir_all(format!("{disk}/{NEW}/half")).unwrap();
        let root = format!("{base}/root");
        let volume = Volume { root: &root, path: "/lib/app", is_empty: false };
        prepare(&disk, &volume).unwrap();

        let data = format!("{disk}/{DATA}");
        let about = |name: &str| std::fs::symlink_metadata(format!("{data}/{name}")).unwrap();
        assert_eq!(about("").mode() & 0o7777, 0o1770);
        assert_eq!(std::fs::read(format!("{data}/again")).unwrap(), vec![7u8; PIECE + 1]);
        assert_eq!(about("again").ino(), about("deep/file").ino());
        assert_eq!(about("deep/file").mode() & 0o7777, 0o4751);
        assert_eq!((about("deep").mtime(), about("deep").mtime_nsec()), (1, 7));
        assert_eq!(std::fs::read_link(format!("{data}/link")).unwrap(), Path::new("deep/file"));
        assert_eq!(about("fifo").mode(), libc::S_IFIFO | 0o640);
        assert!(!Path::new(&format!("{data}/half")).exists() && !Path::new(&format!("{disk}/{NEW}")).exists());

        // It stays what the container has made of it.
        std::fs::remove_file(format!("{data}/again")).unwrap();
        prepare(&disk, &volume).unwrap();
        assert!(!Path::new(&format!("{data}/again")).exists());
        std::fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn without_content_there_is_a_directory_all_the_same() {
        let base = base("empty");
        let root = format!("{base}/root");
        std::fs::write(format!("{root}/var/lib/app/file"), b"x").unwrap();
        std::fs::set_permissions(format!("{root}/var/lib/app"), PermissionsExt::from_mode(0o700)).unwrap();
        for (number, (path, is_empty, mode)) in
            [("/var/lib/app", true, 0o700), ("/nothing/there", false, 0o755), ("/var/lib/app/file", false, 0o755)]
                .into_iter()
                .enumerate()
        {
            let disk = format!("{base}/disk/{number}");
            std::fs::create_dir(&disk).unwrap();
            prepare(&disk, &Volume { root: &root, path, is_empty }).unwrap();
            let data = format!("{disk}/{DATA}");
            assert_eq!(std::fs::metadata(&data).unwrap().mode() & 0o7777, mode);
            assert_eq!(std::fs::read_dir(&data).unwrap().count(), 0);
        }
        std::fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn extended_attributes_come_along() {
        let base = base("attributes");
        let image = format!("{base}/root/var/lib/app");
        std::fs::write(format!("{image}/program"), b"x").unwrap();
        let program = sys::open(format!("{image}/program"), libc::O_RDONLY, 0).unwrap();
        if sys::fsetxattr(program.raw(), b"user.kind", b"one").is_err() {
            return; // the file system of /tmp has none
        }
        let root = format!("{base}/root");
        prepare(&format!("{base}/disk"), &Volume { root: &root, path: "/var/lib/app", is_empty: false }).unwrap();
        let copy = sys::open(format!("{base}/disk/{DATA}/program"), libc::O_RDONLY, 0).unwrap();
        assert_eq!(sys::flistxattr(copy.raw()).unwrap(), b"user.kind\0");
        assert_eq!(sys::fgetxattr(copy.raw(), b"user.kind").unwrap(), b"one");
        std::fs::remove_dir_all(&base).unwrap();
    }
}
