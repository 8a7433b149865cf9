//! Unpacks an image onto the machine's throw-away disk, for a shell that looks at it or for starting it once.
//!
//! The program has made the directory its root before it begins, so whatever a name or a link says leads to nowhere else.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{chown, lchown, symlink, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::tar::{Archive, Member};
use crate::tree::clean;

/// Make `place` the root directory of this process and those that it starts.
pub fn enter(place: &str) -> io::Result<()> {
    let text = CString::new(place).map_err(io::Error::other)?;
    // SAFETY: a string that ends in a zero and outlives the call.
    if unsafe { libc::chroot(text.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    std::env::set_current_dir("/")
}

/// Unpack a layer over what is there. Members that cannot be made are left out, and counted.
pub fn layer(archive: &mut Archive, most: &mut u64) -> io::Result<usize> {
    let mut failed = 0;
    let mut fresh = HashSet::new();
    while let Some(member) = archive.next()? {
        if member.stored > *most {
            return Err(io::Error::other("the image is larger than the throw-away disk"));
        }
        *most -= member.stored;
        if put(archive, &member, &mut fresh).is_err() {
            failed += 1;
        }
    }
    Ok(failed)
}

fn path_of(parts: &[&[u8]]) -> PathBuf {
    let mut path = PathBuf::from("/");
    for part in parts {
        path.push(std::ffi::OsStr::from_bytes(part));
    }
    path
}

fn gone(path: &Path) {
    if fs::remove_file(path).is_err() {
        let _ = fs::remove_dir_all(path);
    }
}

/// Take away what lower layers have in a directory, be it below what this layer has made.
fn clear(directory: PathBuf, fresh: &HashSet<PathBuf>) {
    let mut waiting = vec![directory];
    while let Some(directory) = waiting.pop() {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            if !fresh.contains(&path) {
                gone(&path);
            } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                waiting.push(path);
            }
        }
    }
}

/// Make a file with the content of the member that the archive is at, holes included.
pub fn content(archive: &mut Archive, member: &Member, path: &Path) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    let mut piece = vec![0; 1 << 18];
    while let Some((offset, length)) = archive.run() {
        archive.pass_hole();
        let most = piece.len().min(usize::try_from(length).unwrap_or(usize::MAX));
        file.seek(io::SeekFrom::Start(offset))?;
        let done = archive.read(&mut piece[..most])?;
        file.write_all(&piece[..done])?;
    }
    file.set_len(member.size)
}

fn put(archive: &mut Archive, member: &Member, fresh: &mut HashSet<PathBuf>) -> io::Result<()> {
    let wrong = || io::Error::other("a name that leads nowhere");
    let mut parts = clean(&member.name).map_err(|_| wrong())?;
    let path = path_of(&parts);
    let Some(name) = parts.pop() else { return Ok(()) };
    let parent = path_of(&parts);
    if let Some(hidden) = name.strip_prefix(b".wh.") {
        if hidden == b".wh..opq" {
            clear(parent, fresh);
        } else if !matches!(hidden, b"" | b"." | b"..") && !hidden.starts_with(b".wh.") {
            let target = parent.join(std::ffi::OsStr::from_bytes(hidden));
            if fresh.contains(&target) {
                clear(target, fresh);
            } else {
                gone(&target);
            }
        }
        return Ok(());
    }
    fs::create_dir_all(&parent)?;
    fresh.extend(path.ancestors().map(Path::to_path_buf));
    let (uid, gid) = (Some(member.uid as u32), Some(member.gid as u32));
    if member.kind == b'5' {
        if !fs::symlink_metadata(&path).is_ok_and(|status| status.is_dir()) {
            gone(&path);
            fs::create_dir(&path)?;
        }
        chown(&path, uid, gid)?;
        return fs::set_permissions(&path, fs::Permissions::from_mode(member.mode));
    }
    gone(&path);
    match member.kind {
        b'0' => {
            content(archive, member, &path)?;
            chown(&path, uid, gid)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(member.mode))
        }
        b'1' => fs::hard_link(path_of(&clean(&member.link).map_err(|_| wrong())?), &path),
        b'2' => {
            symlink(std::ffi::OsStr::from_bytes(&member.link), &path)?;
            lchown(&path, uid, gid)
        }
        // Device nodes and pipes are of no use to who looks, and open doors for who is started.
        _ => Ok(()),
    }
}
