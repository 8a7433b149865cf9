//! What a container has written into its writable layer (service `kata.agent.v1.Layers`): a directory tree in parts.
//!
//! Nothing is kept between two calls: an answer says where the next one goes on, as the directories on the way with the
//! position in each, which a file system keeps as long as nobody writes to them. So a directory of a million names is
//! read once. It is all of the container's making: links are not followed, and only regular files are opened. The
//! container may be running: what is removed meanwhile is left out.

use crate::prelude::*;
use crate::proto::agentext::{LayerAttribute, LayerEntry, LayerPart, ReadLayerRequest, ReadLayerResponse};
use crate::sys::{self, DirEntry, Errno, Fd, RawFd, SysResult};

/// Where one answer ends, in bytes (a message is at most 4 MiB).
const ENOUGH: usize = 1 << 20;
const PIECE: u64 = 256 << 10;
/// What a file counts beside its names and data.
const ENTRY: usize = 96;

/// A directory that is being read.
struct Level {
    fd: Fd,
    name: Vec<u8>,
    /// Behind the last entry that was dealt with.
    position: u64,
    /// Entries that were read, the next one last.
    waiting: Vec<DirEntry>,
}

struct Walk {
    levels: Vec<Level>,
    /// The file of the last level whose data are not all sent: its name, and where they go on.
    file: Option<(Vec<u8>, u64)>,
    response: ReadLayerResponse,
    bytes: usize,
    without_data: bool,
}

/// The next part of the tree.
pub fn read(request: &ReadLayerRequest) -> Result<ReadLayerResponse> {
    let what = || format!("read the layer {:?}", request.directory);
    let top =
        sys::open(&request.directory, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW, 0).with_context(what)?;
    let mut walk = Walk {
        levels: vec![],
        file: None,
        response: ReadLayerResponse::default(),
        bytes: 0,
        without_data: request.without_data,
    };
    if request.next.is_empty() {
        walk.enter(top, vec![]).with_context(what)?;
    } else {
        walk.resume(top, &request.next).ok_or_else(|| Error::invalid("this is not where an answer ended"))?;
    }
    walk.go().with_context(what)?;
    Ok(walk.response)
}

/// `_IOWR('X', 121, struct fstrim_range)`, linux/fs.h.
const FITRIM: u64 = 0xc018_5879;

/// Tells the disk below a directory what is not used.
pub fn trim(directory: &str) -> Result<()> {
    let top = sys::open(directory, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW, 0)
        .with_context(|| format!("open {directory}"))?;
    // Start, length, and the shortest run of blocks that is worth it.
    let mut range: [u64; 3] = [0, u64::MAX, 64 << 10];
    match sys::ioctl(top.raw(), FITRIM, range.as_mut_ptr() as usize) {
        Err(Errno(libc::EOPNOTSUPP | libc::ENOTTY)) => Err(Error::unimplemented("its disk cannot be told")),
        other => other.map(drop).with_context(|| format!("trim {directory}")),
    }
}

impl Walk {
    fn go(&mut self) -> SysResult<()> {
        if let Some((name, offset)) = self.file.take() {
            let Some(level) = self.levels.last() else { return Ok(()) };
            if let Some(file) = unless_gone(open_file(level.fd.raw(), &name))? {
                self.data(&file, name, offset)?;
            }
        }
        while self.bytes < ENOUGH && self.file.is_none() {
            let Some(level) = self.levels.last_mut() else { return Ok(()) };
            if level.waiting.is_empty() {
                if sys::read_dir_some(level.fd.raw(), &mut level.waiting)? {
                    level.waiting.reverse();
                } else {
                    self.levels.pop();
                }
                continue;
            }
            let Some(entry) = level.waiting.pop() else { continue };
            level.position = entry.next;
            let dir = level.fd.raw();
            let Some(status) = unless_gone(sys::fstatat(dir, &entry.name, libc::AT_SYMLINK_NOFOLLOW))? else {
                continue;
            };
            match status.st_mode & libc::S_IFMT {
                libc::S_IFDIR => {
                    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
                    if let Some(below) = unless_gone(sys::openat(dir, &entry.name, flags, 0))? {
                        self.enter(below, entry.name)?;
                    }
                }
                libc::S_IFREG if self.without_data => self.add(self.path(&entry.name), &status, vec![], vec![]),
                libc::S_IFREG => {
                    let Some(file) = unless_gone(open_file(dir, &entry.name))? else { continue };
                    self.add(self.path(&entry.name), &status, vec![], attributes(file.raw())?);
                    self.data(&file, entry.name, 0)?;
                }
                kind => {
                    let link = libc::S_IFLNK == kind;
                    let target = if link { unless_gone(sys::readlinkat(dir, &entry.name))? } else { Some(vec![]) };
                    let Some(target) = target else { continue };
                    self.add(self.path(&entry.name), &status, target, vec![]);
                }
            }
        }
        if !self.levels.is_empty() {
            self.response.next = self.here();
        }
        Ok(())
    }

    /// A new directory, which is told before what is in it.
    fn enter(&mut self, fd: Fd, name: Vec<u8>) -> SysResult<()> {
        let path = if self.levels.is_empty() { vec![] } else { self.path(&name) };
        self.add(path, &sys::fstat(fd.raw())?, vec![], attributes(fd.raw())?);
        self.levels.push(Level { fd, name, position: 0, waiting: vec![] });
        Ok(())
    }

    fn add(&mut self, path: Vec<u8>, status: &libc::stat, target: Vec<u8>, attributes: Vec<LayerAttribute>) {
        let size = |one: &LayerAttribute| one.name.len() + one.value.len();
        self.bytes += ENTRY + path.len() + target.len() + attributes.iter().map(size).sum::<usize>();
        let entry = LayerEntry {
            path,
            mode: status.st_mode,
            uid: status.st_uid,
            gid: status.st_gid,
            size: status.st_size as u64,
            mtime_ns: status.st_mtime.saturating_mul(1_000_000_000).saturating_add(status.st_mtime_nsec),
            rdev: status.st_rdev,
            link_target: target,
            number: status.st_ino,
            links: u32::try_from(status.st_nlink).unwrap_or(u32::MAX),
            attributes,
            device: status.st_dev,
        };
        self.response.parts.push(LayerPart { entry: Some(Box::new(entry)), ..Default::default() });
    }

    /// The content of a file from `offset` on, as much of it as fits.
    fn data(&mut self, file: &Fd, name: Vec<u8>, mut offset: u64) -> SysResult<()> {
        loop {
            offset = match sys::lseek(file.raw(), offset, libc::SEEK_DATA) {
                Ok(offset) => offset,
                // Nothing but a hole up to the end.
                Err(Errno(libc::ENXIO)) => return Ok(()),
                Err(e) => return Err(e),
            };
            if self.bytes >= ENOUGH {
                self.file = Some((name, offset));
                return Ok(());
            }
            let end = sys::lseek(file.raw(), offset, libc::SEEK_HOLE)?;
            let mut data = vec![0; end.saturating_sub(offset).min(PIECE) as usize];
            let n = sys::pread(file.raw(), &mut data, offset)?;
            if n == 0 {
                return Ok(());
            }
            data.truncate(n);
            self.bytes += n;
            self.response.parts.push(LayerPart { entry: None, offset, data });
            offset += n as u64;
        }
    }

    /// The path of a name in the last directory.
    fn path(&self, name: &[u8]) -> Vec<u8> {
        let mut path = Vec::new();
        for level in self.levels.iter().skip(1) {
            path.extend_from_slice(&level.name);
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }

    /// Where this answer ends: a position and a name for the file, and for each directory.
    fn here(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut add = |position: u64, name: &[u8]| {
            out.extend_from_slice(&position.to_le_bytes());
            out.extend_from_slice(&(name.len() as u16).to_le_bytes());
            out.extend_from_slice(name);
        };
        match &self.file {
            Some((name, offset)) => add(*offset, name),
            None => add(0, b""),
        }
        for level in &self.levels {
            add(level.position, &level.name);
        }
        out
    }

    /// Opens the directories again that the last answer has ended in.
    fn resume(&mut self, top: Fd, mut next: &[u8]) -> Option<()> {
        let mut take = || {
            let (position, rest) = next.split_first_chunk::<8>()?;
            let (length, rest) = rest.split_first_chunk::<2>()?;
            let (name, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
            next = rest;
            Some((u64::from_le_bytes(*position), name.to_vec(), rest.is_empty()))
        };
        let (offset, name, mut last) = take()?;
        self.file = (!name.is_empty()).then_some((name, offset));
        let mut top = Some(top);
        while !last {
            let (position, name, end) = take()?;
            last = end;
            let fd = match (top.take(), self.levels.last()) {
                (Some(top), _) => top,
                (None, above) => {
                    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
                    match sys::openat(above?.fd.raw(), &name, flags, 0) {
                        // It was removed since: what is left goes on in the directory above.
                        Err(Errno(libc::ENOENT)) => {
                            self.file = None;
                            return Some(());
                        }
                        opened => opened.ok()?,
                    }
                }
            };
            sys::lseek(fd.raw(), position, libc::SEEK_SET).ok()?;
            self.levels.push(Level { fd, name, position, waiting: vec![] });
        }
        Some(())
    }
}

/// None for a name that was removed, or became another kind of file, since it was read.
fn unless_gone<T>(result: SysResult<T>) -> SysResult<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Errno(libc::ENOENT | libc::ELOOP | libc::ENOTDIR | libc::EINVAL | libc::ESTALE)) => Ok(None),
        Err(e) => Err(e),
    }
}

fn open_file(dir: RawFd, name: &[u8]) -> SysResult<Fd> {
    sys::openat(dir, name, libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK, 0)
}

fn attributes(fd: RawFd) -> SysResult<Vec<LayerAttribute>> {
    let mut found = Vec::new();
    for name in sys::flistxattr(fd)?.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        found.push(LayerAttribute { name: name.to_vec(), value: sys::fgetxattr(fd, name)? });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;
    use std::os::unix::fs::symlink;

    /// Every entry by its path, with its data; and how many answers that took.
    fn whole(directory: &str) -> (BTreeMap<String, (LayerEntry, Vec<u8>)>, usize) {
        let (mut found, mut calls, mut last) = (BTreeMap::new(), 0, String::new());
        let mut request = ReadLayerRequest { directory: directory.to_string(), ..Default::default() };
        loop {
            let answer = read(&request).unwrap();
            assert!(answer.to_vec().len() < 4 << 20);
            calls += 1;
            for part in answer.parts {
                if let Some(entry) = part.entry {
                    last = String::from_utf8(entry.path.clone()).unwrap();
                    let above = last.rsplit_once('/').map_or("", |(above, _)| above);
                    assert!(last.is_empty() || found.contains_key(above), "{last} comes before its directory");
                    assert!(found.insert(last.clone(), (*entry, vec![])).is_none(), "{last} comes twice");
                } else {
                    let (_, data) = found.get_mut(&last).unwrap();
                    assert!(part.offset as usize >= data.len());
                    data.resize(part.offset as usize, 0);
                    data.extend(part.data);
                }
            }
            if answer.next.is_empty() {
                return (found, calls);
            }
            request.next = answer.next;
        }
    }

    use crate::proto::codec::Message;

    #[test]
    fn a_tree_comes_in_parts_and_whole() {
        let top = TempDir::new("layers");
        let large: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
        std::fs::write(top.file("a/b/c/large", ""), &large).unwrap();
        for n in 0..15_000 {
            std::fs::write(format!("{}/a/b/{n}", top.0), n.to_string()).unwrap();
        }
        let mut deep = "deep".to_string();
        for _ in 0..100 {
            deep.push_str("/d");
        }
        top.file(&format!("{deep}/end"), "end");
        symlink("/etc/passwd", format!("{}/link", top.0)).unwrap();
        std::fs::hard_link(format!("{}/a/b/0", top.0), format!("{}/again", top.0)).unwrap();
        sys::mknodat(sys::AT_FDCWD, format!("{}/fifo", top.0), libc::S_IFIFO | 0o640, 0).unwrap();
        let sparse = std::fs::File::create(format!("{}/sparse", top.0)).unwrap();
        sparse.set_len(1 << 40).unwrap();
        sys::pwrite(std::os::fd::AsRawFd::as_raw_fd(&sparse), b"middle", 1 << 20).unwrap();

        let (found, calls) = whole(&top.0);
        assert!(calls > 3);
        assert_eq!(found.len(), 1 + 3 + 1 + 15_000 + 101 + 1 + 4);
        assert_eq!(found["a/b/c/large"].1, large);
        assert!((0..15_000).all(|n| found[&format!("a/b/{n}")].1 == n.to_string().into_bytes()));
        assert_eq!(found[&format!("{deep}/end")].1, b"end");
        assert_eq!(found["link"].0.link_target, b"/etc/passwd");
        assert_eq!(found["again"].0.number, found["a/b/0"].0.number);
        assert_eq!(found["again"].0.links, 2);
        assert_eq!(found["fifo"].0.mode, libc::S_IFIFO | 0o640);
        let (entry, data) = &found["sparse"];
        assert_eq!((entry.size, data.len() <= (1 << 20) + 4096), (1 << 40, true));
        assert_eq!(&data[1 << 20..(1 << 20) + 6], b"middle");
    }

    #[test]
    fn names_alone_come_without_data() {
        let top = TempDir::new("layers-names");
        top.file("a/file", "content");
        let request = ReadLayerRequest { directory: top.0.clone(), without_data: true, ..ReadLayerRequest::default() };
        let parts = read(&request).unwrap().parts;
        let entries: Vec<_> = parts.iter().map(|part| part.entry.as_ref().unwrap()).collect();
        assert_eq!(parts.iter().map(|part| part.data.len()).sum::<usize>(), 0);
        assert_eq!(entries.iter().map(|entry| &entry.path[..]).collect::<Vec<_>>(), [&b""[..], b"a", b"a/file"]);
        assert_eq!(entries[2].size, 7);
        assert_ne!(entries[2].device, 0);
    }

    #[test]
    fn what_goes_while_it_is_read_is_left_out() {
        let top = TempDir::new("layers-live");
        top.file("a/b/large", &"x".repeat(3 << 20));
        top.file("z", "");
        let mut request = ReadLayerRequest { directory: top.0.clone(), ..ReadLayerRequest::default() };
        request.next = read(&request).unwrap().next;
        assert!(!request.next.is_empty());
        std::fs::remove_dir_all(format!("{}/a/b", top.0)).unwrap();
        while !request.next.is_empty() {
            let answer = read(&request).unwrap();
            assert!(answer.parts.iter().all(|part| part.data.is_empty()));
            request.next = answer.next;
        }
    }

    #[test]
    fn a_file_system_without_blocks_has_none_to_trim() {
        assert!(trim("/proc").is_err_and(|e| e.message.contains("cannot be told")));
        assert!(trim("/nowhere/at/all").is_err());
    }

    #[test]
    fn what_is_no_end_of_an_answer_is_refused() {
        let top = TempDir::new("layers-bad");
        top.file("a/file", "");
        let ask = |next: &[u8]| {
            read(&ReadLayerRequest { directory: top.0.clone(), next: next.to_vec(), ..Default::default() })
        };
        for next in [&b"x"[..], &[0; 9], &[0, 0, 0, 0, 0, 0, 0, 0, 200, 0, b'a'], b"\0\0\0\0\0\0\0\0\x01\0"] {
            assert!(ask(next).is_err());
        }
        // A directory on the way that is a link now.
        symlink("/etc", format!("{}/l", top.0)).unwrap();
        let mut next = vec![0; 10];
        next.extend([0; 10]);
        next.extend([0, 0, 0, 0, 0, 0, 0, 0, 1, 0, b'l']);
        assert!(ask(&next).is_err());
        assert!(read(&ReadLayerRequest { directory: format!("{}/none", top.0), ..Default::default() }).is_err());
    }
}
