//! An image whose layers are no longer there one by one: its file system, mounted read-only.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Instant;

use crate::image::{Image, LayerFacts, Limits};
use crate::tree::{Id, Kind, Node, ROOT};

/// Mount `device` (erofs) at `place`, so that nothing on it is followed, executed or taken for a device.
pub fn mount(device: &str, place: &str) -> io::Result<()> {
    fs::create_dir_all(place)?;
    let text = |value: &str| std::ffi::CString::new(value).map_err(io::Error::other);
    let (device, place, kind) = (text(device)?, text(place)?, text("erofs")?);
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: three strings that end in zeros and outlive the call.
    let outcome = unsafe { libc::mount(device.as_ptr(), place.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Read a mounted file system as the one layer of an image.
pub fn read(image: &mut Image, root: &str, limits: &mut Limits) {
    let mut facts = LayerFacts { kind: "erofs".into(), whole: true, ..LayerFacts::default() };
    image.has_layers = false;
    image.end = Some(limits.end);
    let mut inodes = std::collections::HashMap::new();
    let mut waiting = vec![(root.as_bytes().to_vec(), ROOT)];
    let mut problem = None;
    'all: while let Some((directory, parent)) = waiting.pop() {
        let names = match fs::read_dir(Path::new(std::ffi::OsStr::from_bytes(&directory))) {
            Ok(names) => names,
            Err(error) => {
                problem = Some(("bad-layer", format!("a directory cannot be read: {error}")));
                continue;
            }
        };
        for entry in names.flatten() {
            if limits.entries == 0 || Instant::now() > limits.end || facts.bytes > limits.bytes {
                problem = Some(("limit", "there was more than is read".to_string()));
                break 'all;
            }
            limits.entries -= 1;
            facts.entries += 1;
            let name = entry.file_name();
            let path = entry.path();
            let Ok(status) = fs::symlink_metadata(&path) else { continue };
            let kind = match status.file_type() {
                kind if kind.is_dir() => Kind::Directory,
                kind if kind.is_symlink() => Kind::Link,
                kind if kind.is_char_device() => Kind::Character,
                kind if kind.is_block_device() => Kind::Block,
                kind if kind.is_fifo() => Kind::Fifo,
                kind if kind.is_socket() => Kind::Socket,
                _ => Kind::File,
            };
            if status.nlink() > 1 && kind != Kind::Directory {
                if let Some(id) = inodes.get(&status.ino()) {
                    let id: Id = *id;
                    image.tree.nodes[id as usize].names += 1;
                    image.tree.nodes[parent as usize].children.insert(name.as_bytes().into(), id);
                    continue;
                }
            }
            let mut node = Node::new(kind, status.mode() & 0o7777, 0);
            (node.uid, node.gid, node.size) = (u64::from(status.uid()), u64::from(status.gid()), status.size());
            node.device = (libc::major(status.rdev()), libc::minor(status.rdev()));
            if kind == Kind::Link {
                node.target = fs::read_link(&path).map(|to| to.as_os_str().as_bytes().to_vec()).unwrap_or_default();
            }
            if kind == Kind::File {
                node.capability = capability(&path);
            }
            let id = image.tree.add(node);
            inodes.insert(status.ino(), id);
            image.tree.nodes[parent as usize].children.insert(name.as_bytes().into(), id);
            if kind == Kind::Directory {
                waiting.push((path.as_os_str().as_bytes().to_vec(), id));
            } else if kind == Kind::File && status.size() > 0 {
                facts.files += 1;
                facts.bytes += status.size();
                let inside = path.as_os_str().as_bytes()[root.len()..].to_vec();
                if let Ok(mut file) = File::open(&path) {
                    let _ = image.read_content(&inside, id, &mut file, status.size());
                }
            }
        }
    }
    facts.whole = problem.is_none();
    image.layers.push(facts);
    if let Some((kind, text)) = problem {
        image.note(kind, b"", 1, text);
    }
}

fn capability(path: &Path) -> Vec<u8> {
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) else { return Vec::new() };
    let mut value = [0_u8; 64];
    // SAFETY: two strings that end in zeros, and a buffer of the length that is said.
    let size = unsafe {
        libc::lgetxattr(path.as_ptr(), c"security.capability".as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    value[..usize::try_from(size).unwrap_or(0)].to_vec()
}
