//! Device nodes of a container.

use super::{mounts, path};
use crate::prelude::*;
use crate::proto::oci::{LinuxDevice, LinuxDeviceCgroup};
use crate::sys::{self, Errno, RawFd};

/// What every container has: (name, major, minor).
const DEFAULT: &[(&str, u32, u32)] =
    &[("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
];

/// Makes the default nodes, the spec's, `ptmx` and the links.
pub fn make_all(root: RawFd, listed: &[LinuxDevice], user_namespace: bool) -> Result<()> {
    for (name, major, minor) in DEFAULT {
        let node = format!("/dev/{name}");
        if !listed.iter().any(|d| d.path == node) {
            let device = LinuxDevice {
                path: node,
                type_: "c".to_string(),
                major: i64::from(*major),
                minor: i64::from(*minor),
                file_mode: 0o666,
                uid: 0,
                gid: 0,
            };
            make(root, &device, user_namespace)?;
        }
    }
    for device in listed {
        make(root, device, user_namespace)?;
    }
    let dev = path::make_dir(root, "/dev", 0o755).context("open /dev")?;
    // Always the container's own instance, whatever the image has there.
    link(dev.raw(), "pts/ptmx", "ptmx", true)?;
    for (target, name) in LINKS {
        link(dev.raw(), target, name, false)?;
    }
    Ok(())
}

fn link(dev: RawFd, target: &str, name: &str, replace: bool) -> Result<()> {
    if replace {
        match sys::unlinkat(dev, name, 0) {
            Ok(()) | Err(Errno(libc::ENOENT)) => {}
            Err(e) => return Err(e).with_context(|| format!("replace /dev/{name}")),
        }
    }
    match sys::symlinkat(target, dev, name) {
        Ok(()) | Err(Errno(libc::EEXIST)) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("link /dev/{name}")),
    }
}

fn kind(device: &LinuxDevice) -> Result<u32> {
    match device.type_.as_str() {
        "c" | "u" => Ok(libc::S_IFCHR),
        "b" => Ok(libc::S_IFBLK),
        "p" => Ok(libc::S_IFIFO),
        other => Err(Error::invalid(format!("device {}: unknown type {other:?}", device.path))),
    }
}

fn make(root: RawFd, device: &LinuxDevice, user_namespace: bool) -> Result<()> {
    let what = || format!("device {}", device.path);
    let (Ok(major), Ok(minor)) = (u32::try_from(device.major), u32::try_from(device.minor)) else {
        return Err(Error::invalid(format!("{}: its number is not one", what())));
    };
    let kind = kind(device)?;
    if user_namespace {
        // mknod is not allowed there: the agent's node of the same name is shown instead.
        let source = sys::open(&device.path, libc::O_PATH, 0).with_context(what)?;
        let target = path::make_file(root, &device.path).with_context(what)?;
        return mounts::bind_fd(source.raw(), target.raw()).with_context(what);
    }
    let number = if kind == libc::S_IFIFO { 0 } else { libc::makedev(major, minor) };
    let (parent, name) = path::split(&device.path).with_context(what)?;
    let parent = path::make_dir(root, parent, 0o755).with_context(what)?;
    // A mode of 0 is one that was not given.
    let mode = if device.file_mode & 0o7777 == 0 { 0o666 } else { device.file_mode & 0o7777 };
    match sys::mknodat(parent.raw(), name, kind | mode, number) {
        Ok(()) => {}
        Err(Errno(libc::EEXIST)) => {
            let there = sys::fstatat(parent.raw(), name, libc::AT_SYMLINK_NOFOLLOW).with_context(what)?;
            if there.st_mode & libc::S_IFMT != kind || there.st_rdev != number {
                // The image's own file of that name, where /dev is not a mount.
                sys::unlinkat(parent.raw(), name, 0).with_context(what)?;
                sys::mknodat(parent.raw(), name, kind | mode, number).with_context(what)?;
            }
        }
        Err(e) => return Err(e).with_context(what),
    }
    // The umask has cut the mode; the node is ours, in a directory that no other process changes yet.
    let node = sys::openat(parent.raw(), name, libc::O_PATH | libc::O_NOFOLLOW, 0).with_context(what)?;
    sys::fchmodat(sys::AT_FDCWD, sys::proc_fd(node.raw()), mode).with_context(what)?;
    sys::fchownat(node.raw(), "", device.uid, device.gid, libc::AT_EMPTY_PATH).with_context(what)
}

/// The rules for the cgroup: the spec's, and what no container can do without (runc's list).
pub fn cgroup_rules(rules: &[LinuxDeviceCgroup], listed: &[LinuxDevice]) -> Vec<LinuxDeviceCgroup> {
    let rule = |kind: &str, major: i64, minor: i64, access: &str| LinuxDeviceCgroup {
        allow: true,
        type_: kind.to_string(),
        major,
        minor,
        access: access.to_string(),
    };
    let mut all = rules.to_vec();
    all.push(rule("c", -1, -1, "m"));
    all.push(rule("b", -1, -1, "m"));
    for (_, major, minor) in DEFAULT {
        all.push(rule("c", i64::from(*major), i64::from(*minor), "rwm"));
    }
    all.push(rule("c", 136, -1, "rwm"));
    all.push(rule("c", 5, 2, "rwm"));
    all.extend(
        listed
            .iter()
            .filter(|d| d.type_ != "p")
            .map(|d| rule(if d.type_ == "b" { "b" } else { "c" }, d.major, d.minor, "rwm")),
    );
    all
}
