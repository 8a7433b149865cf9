//! Unpacks an image onto the machine's throw-away disk, for a shell that looks at it or for starting it once.
//!
//! The program has made the directory its root before it begins, so whatever a name or a link says leads to nowhere else.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
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
    let mut fresh = std::collections::HashSet::new();
    while let Some(member) = archive.next()? {
        if member.size > *most {
            return Err(io::Error::other("the image is larger than the throw-away disk"));
        }
        *most -= member.size;
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

fn put(archive: &mut Archive, member: &Member, fresh: &mut std::collections::HashSet<PathBuf>) -> io::Result<()> {
    let wrong = || io::Error::other("a name that leads nowhere");
    let mut parts = clean(&member.name).map_err(|_| wrong())?;
    let path = path_of(&parts);
    let Some(name) = parts.pop() else { return Ok(()) };
    let parent = path_of(&parts);
    if let Some(hidden) = name.strip_prefix(b".wh.") {
        if hidden == b".wh..opq" {
            for entry in fs::read_dir(&parent)?.flatten().filter(|entry| !fresh.contains(&entry.path())) {
                gone(&entry.path());
            }
        } else if !matches!(hidden, b"" | b"." | b"..") {
            let target = parent.join(std::ffi::OsStr::from_bytes(hidden));
            if !fresh.contains(&target) {
                gone(&target);
            }
        }
        return Ok(());
    }
    fs::create_dir_all(&parent)?;
    fresh.insert(path.clone());
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
            let mut file = fs::File::create(&path)?;
            let mut piece = vec![0; 1 << 18];
            while let done @ 1.. = archive.read(&mut piece)? {
                file.write_all(&piece[..done])?;
            }
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
