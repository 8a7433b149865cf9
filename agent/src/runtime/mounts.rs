//! The mounts of a container, made below its root file system before pivot_root.
//!
//! Every target is a descriptor found with RESOLVE_IN_ROOT and mounted on through the descriptor, so that a symlink of
//! the image (or one that is being changed meanwhile) cannot move a mount to another place.

use super::path;
use crate::fs;
use crate::mountopts::{parse_options, MountOptions, MS_BIND, MS_RDONLY, MS_REC};
use crate::prelude::*;
use crate::proto::oci::Mount;
use crate::sys::{self, Errno, Fd, MountAttr, RawFd, AT_FDCWD};

/// open_tree(2): a copy of the mount, not the mount itself.
const OPEN_TREE_CLONE: u32 = 1;
const EMPTY_PATH: u32 = libc::AT_EMPTY_PATH as u32;
const RECURSIVE: u32 = libc::AT_RECURSIVE as u32;

/// What may be mounted below /proc: files that tell a container about itself (lxcfs), as runc allows them.
const PROC_FILES: &[&str] = &[
    "cpuinfo",
    "diskstats",
    "meminfo",
    "stat",
    "swaps",
    "uptime",
    "loadavg",
    "slabinfo",
    "net/dev",
    "sys/kernel/ns_last_pid",
    "sys/crypto/fips_enabled",
];

const PROC_SUPER_MAGIC: i64 = 0x9fa0;

/// What the mounts need to know about their container.
pub struct MountContext<'a> {
    /// The container's cgroup directory as the agent sees it, if there is one.
    pub cgroup: Option<&'a str>,
    pub own_cgroup_namespace: bool,
    pub user_namespace: bool,
}

/// Makes one mount. `root` is the container's root directory (O_PATH).
pub fn mount(root: RawFd, mount: &Mount, context: &MountContext) -> Result<()> {
    let destination = clean(&mount.destination)?;
    let options = parse_options(&mount.options).with_context(|| format!("mount on {destination}"))?;
    check_proc(&destination, mount)?;
    let bind = options.flags & MS_BIND != 0 || mount.type_ == "bind";
    let done = if bind {
        bind_mount(root, &mount.source, &destination, &options)
    } else {
        match mount.type_.as_str() {
            "cgroup" | "cgroup2" => cgroup_mount(root, &destination, &options, context),
            "proc" | "sysfs" => kernel_mount(root, mount, &destination, &options, context),
            "tmpfs" => tmpfs_mount(root, mount, &destination, &options),
            "" => Err(Error::invalid("the mount has no type")),
            kind => plain_mount(root, kind, &mount.source, &destination, &options),
        }
    };
    done.with_context(|| format!("mount {:?} ({}) on {destination}", mount.source, mount.type_))
}

/// The destination as an absolute path without `.`, `..` and doubled slashes (resolved as text, as runc does).
fn clean(destination: &str) -> Result<String> {
    let mut parts: Vec<&str> = vec![];
    for part in destination.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err(Error::invalid(format!("mount destination {destination:?} is the root itself")));
    }
    Ok(format!("/{}", parts.join("/")))
}

/// /proc is what the masked paths and the kernel's own checks rely on: only procfs belongs there.
fn check_proc(destination: &str, mount: &Mount) -> Result<()> {
    let Some(below) = destination.strip_prefix("/proc") else { return Ok(()) };
    if below.is_empty() {
        let source_is_proc = || {
            let fd = sys::open(&mount.source, libc::O_PATH, 0)?;
            sys::fstatfs(fd.raw()).map(|s| s.f_type == PROC_SUPER_MAGIC)
        };
        if mount.type_ == "proc" || source_is_proc().unwrap_or(false) {
            return Ok(());
        }
        return Err(Error::invalid(format!("{:?} cannot be mounted on /proc: it is not procfs", mount.source)));
    }
    match below.strip_prefix('/') {
        Some(file) if !PROC_FILES.contains(&file) => {
            Err(Error::invalid(format!("{destination:?} cannot be mounted on: it is inside /proc")))
        }
        _ => Ok(()),
    }
}

/// The directory to mount on, made if missing.
fn directory(root: RawFd, destination: &str) -> Result<Fd> {
    path::make_dir(root, destination, 0o755).context("make the mount point")
}

fn plain_mount(root: RawFd, kind: &str, source: &str, destination: &str, options: &MountOptions) -> Result<()> {
    let target = directory(root, destination)?;
    mount_on(root, &target, kind, source, destination, options)
}

/// Mounts a file system on an open directory. A read-only /dev becomes so at the end, when its nodes are made.
fn mount_on(
    root: RawFd,
    target: &Fd,
    kind: &str,
    source: &str,
    destination: &str,
    options: &MountOptions,
) -> Result<()> {
    let mut flags = options.flags;
    if destination == "/dev" {
        flags &= !MS_RDONLY;
    }
    let source = if source.is_empty() { kind } else { source };
    sys::mount(source, sys::proc_fd(target.raw()), kind, flags, &options.data)
        .map_err(|e| explain(e, kind, &options.data))?;
    if options.propagation.is_empty() && options.recursive_attributes().is_none() {
        return Ok(());
    }
    // The descriptor is of the directory beneath; the mount itself is found by looking again.
    let mounted = path::open(root, destination, libc::O_PATH | libc::O_DIRECTORY).context("find the new mount")?;
    finish(mounted.raw(), options)
}

fn explain(e: Errno, kind: &str, data: &str) -> Error {
    match e.0 {
        libc::ENODEV => Error::unimplemented(format!("the guest kernel has no file system {kind:?}")),
        libc::EINVAL => Error::internal(format!("{e} (options {data:?})")),
        _ => e.into(),
    }
}

/// Propagation and recursive attributes of a mount, by descriptor.
fn finish(mount: RawFd, options: &MountOptions) -> Result<()> {
    for kind in &options.propagation {
        let attr = MountAttr { propagation: kind & !MS_REC, ..Default::default() };
        let recursive = if kind & MS_REC != 0 { RECURSIVE } else { 0 };
        sys::mount_setattr(mount, "", EMPTY_PATH | recursive, &attr).context("set the propagation")?;
    }
    if let Some(attr) = options.recursive_attributes() {
        sys::mount_setattr(mount, "", EMPTY_PATH | RECURSIVE, &attr).context("set recursive attributes")?;
    }
    Ok(())
}

fn bind_mount(root: RawFd, source: &str, destination: &str, options: &MountOptions) -> Result<()> {
    // As with runc, options of a file system (`options.data`) change nothing: a bind mount has none of its own.
    let recursive = if options.flags & MS_REC != 0 { RECURSIVE } else { 0 };
    let tree = sys::open_tree(AT_FDCWD, source, OPEN_TREE_CLONE | recursive)
        .with_context(|| format!("bind source {source:?}"))?;
    // Attributes are set before the mount becomes visible.
    let attr = options.attributes();
    if attr.set | attr.clear != 0 {
        sys::mount_setattr(tree.raw(), "", EMPTY_PATH, &attr).context("set the attributes")?;
    }
    if let Some(attr) = options.recursive_attributes() {
        sys::mount_setattr(tree.raw(), "", EMPTY_PATH | RECURSIVE, &attr).context("set recursive attributes")?;
    }
    let target = if path::is_dir(&tree).context("look at the bind source")? {
        directory(root, destination)?
    } else {
        path::make_file(root, destination).context("make the mount point")?
    };
    sys::move_mount(tree.raw(), target.raw()).context("attach the bind mount")?;
    if options.propagation.is_empty() {
        return Ok(());
    }
    // Propagation is a property of an attached mount.
    let mounted = path::open(root, destination, libc::O_PATH).context("find the new mount")?;
    for kind in &options.propagation {
        let attr = MountAttr { propagation: kind & !MS_REC, ..Default::default() };
        let recursive = if kind & MS_REC != 0 { RECURSIVE } else { 0 };
        sys::mount_setattr(mounted.raw(), "", EMPTY_PATH | recursive, &attr).context("set the propagation")?;
    }
    Ok(())
}

/// procfs and sysfs are only mounted on plain directories: behind a symlink they would not be where masked paths and
/// other protections expect them.
fn kernel_mount(
    root: RawFd,
    mount: &Mount,
    destination: &str,
    options: &MountOptions,
    context: &MountContext,
) -> Result<()> {
    let target = directory(root, destination)?;
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let (parent, name) = path::split(destination).context("split the destination")?;
    let parent = path::open(root, parent, libc::O_PATH | libc::O_DIRECTORY).context("open the parent")?;
    let plain = sys::openat(parent.raw(), name, flags, 0).context("look at the mount point")?;
    if !path::is_dir(&plain).context("look at the mount point")? {
        return Err(Error::invalid(format!("{} must be mounted on an ordinary directory", mount.type_)));
    }
    match mount_on(root, &target, &mount.type_, &mount.source, destination, options) {
        // sysfs belongs to the network namespace, which the container shares: its own user namespace may not mount it.
        Err(_) if mount.type_ == "sysfs" && context.user_namespace => {
            let options = MountOptions { flags: options.flags | MS_BIND | MS_REC, ..options.clone() };
            bind_mount(root, "/sys", destination, &options)
        }
        other => other,
    }
}

/// The container sees its own group only: as the root of its namespace, or as a bind mount of its directory.
fn cgroup_mount(root: RawFd, destination: &str, options: &MountOptions, context: &MountContext) -> Result<()> {
    // Options of cgroup v1 (controller names) mean nothing to v2.
    let options = MountOptions { data: String::new(), ..options.clone() };
    if context.own_cgroup_namespace {
        match plain_mount(root, "cgroup2", "cgroup", destination, &options) {
            // In a user namespace /sys is the guest's, cgroup2 with it, and one does not go on top of the other.
            Err(_) if context.user_namespace && context.cgroup.is_some() => {}
            other => return other,
        }
    }
    match context.cgroup {
        Some(directory) => bind_mount(root, directory, destination, &options),
        None => Err(Error::precondition("there is no cgroup v2 hierarchy to mount")),
    }
}

fn tmpfs_mount(root: RawFd, mount: &Mount, destination: &str, options: &MountOptions) -> Result<()> {
    let mut options = options.clone();
    let beneath = path::open(root, destination, libc::O_RDONLY | libc::O_DIRECTORY);
    if let Ok(beneath) = &beneath {
        // As before the mount, unless the options say otherwise: /tmp stays 1777.
        if !options.data.split(',').any(|o| o.starts_with("mode=")) {
            let mode = sys::fstat(beneath.raw()).context("look at the mount point")?.st_mode & 0o7777;
            let comma = if options.data.is_empty() { "" } else { "," };
            options.data = format!("{}{comma}mode={mode:04o}", options.data);
        }
    }
    if !options.tmpcopyup {
        return plain_mount(root, "tmpfs", &mount.source, destination, &options);
    }
    let read_only = options.flags & MS_RDONLY != 0;
    options.flags &= !MS_RDONLY;
    plain_mount(root, "tmpfs", &mount.source, destination, &options)?;
    let mounted = path::open(root, destination, libc::O_RDONLY | libc::O_DIRECTORY).context("find the new mount")?;
    if let Ok(beneath) = beneath {
        copy_tree(beneath.raw(), mounted.raw(), 0).context("copy the directory's content into the tmpfs")?;
    }
    if read_only {
        let attr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() };
        sys::mount_setattr(mounted.raw(), "", EMPTY_PATH, &attr).context("make it read-only")?;
    }
    Ok(())
}

/// Directories, files and symlinks with owner and mode, on one file system.
fn copy_tree(from: RawFd, to: RawFd, depth: u32) -> Result<()> {
    if depth > 64 {
        return Err(Error::invalid("the directory is nested too deeply"));
    }
    for entry in fs::list_fd(from)? {
        let name = entry.name.as_slice();
        let stat = sys::fstatat(from, name, libc::AT_SYMLINK_NOFOLLOW)?;
        let no_follow = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFDIR => {
                sys::mkdirat(to, name, 0o700)?;
                let inner_from =
                    sys::openat2(from, name, libc::O_RDONLY | libc::O_DIRECTORY | no_follow, 0, libc::RESOLVE_NO_XDEV);
                let inner_to = sys::openat(to, name, libc::O_RDONLY | libc::O_DIRECTORY | no_follow, 0)?;
                if let Ok(inner_from) = inner_from {
                    copy_tree(inner_from.raw(), inner_to.raw(), depth + 1)?;
                }
                sys::fchownat(inner_to.raw(), "", stat.st_uid, stat.st_gid, libc::AT_EMPTY_PATH)?;
                sys::fchmod(inner_to.raw(), stat.st_mode & 0o7777)?;
            }
            libc::S_IFREG => {
                let source = sys::openat(from, name, libc::O_RDONLY | no_follow, 0)?;
                let target = sys::openat(to, name, libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | no_follow, 0o600)?;
                let mut piece = Vec::new();
                while sys::read_append(source.raw(), &mut piece, 64 << 10)? > 0 {
                    sys::write_all(target.raw(), &piece)?;
                    piece.clear();
                }
                sys::fchownat(target.raw(), "", stat.st_uid, stat.st_gid, libc::AT_EMPTY_PATH)?;
                sys::fchmod(target.raw(), stat.st_mode & 0o7777)?;
            }
            libc::S_IFLNK => {
                let link = sys::readlinkat(from, name)?;
                sys::symlinkat(link, to, name)?;
                sys::fchownat(to, name, stat.st_uid, stat.st_gid, libc::AT_SYMLINK_NOFOLLOW)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// After the devices were made: protects what was left writable for them.
pub fn finish_dev(root: RawFd, mounts: &[Mount]) -> Result<()> {
    for mount in mounts.iter().filter(|m| m.destination.trim_end_matches('/') == "/dev" && m.type_ != "bind") {
        if parse_options(&mount.options)?.flags & MS_RDONLY != 0 {
            let dev = path::open(root, "/dev", libc::O_PATH | libc::O_DIRECTORY).context("open /dev")?;
            let attr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() };
            sys::mount_setattr(dev.raw(), "", EMPTY_PATH, &attr).context("make /dev read-only")?;
        }
    }
    Ok(())
}

/// Bind-mounts an open file (a device of the agent's, a terminal) on a file of the container.
pub fn bind_fd(from: RawFd, target: RawFd) -> Result<()> {
    let tree = sys::open_tree(from, "", OPEN_TREE_CLONE | EMPTY_PATH).context("copy the mount")?;
    sys::move_mount(tree.raw(), target).context("attach it")
}

/// Makes paths unreadable: files become /dev/null (`null`, the agent's own, checked), directories an empty tmpfs.
pub fn mask(root: RawFd, paths: &[String], null: RawFd) -> Result<()> {
    for masked in paths {
        let target = match path::open(root, masked, libc::O_PATH) {
            Ok(target) => target,
            Err(Errno(libc::ENOENT | libc::ENOTDIR)) => continue,
            Err(e) => return Err(e).with_context(|| format!("mask {masked}")),
        };
        let done = if path::is_dir(&target)? {
            sys::mount("tmpfs", sys::proc_fd(target.raw()), "tmpfs", MS_RDONLY, "nr_inodes=2").map_err(Error::from)
        } else {
            bind_fd(null, target.raw())
        };
        done.with_context(|| format!("mask {masked}"))?;
    }
    Ok(())
}

/// Makes paths read-only by a bind mount on themselves.
pub fn make_readonly(root: RawFd, paths: &[String]) -> Result<()> {
    for readonly in paths {
        let target = match path::open(root, readonly, libc::O_PATH) {
            Ok(target) => target,
            Err(Errno(libc::ENOENT | libc::ENOTDIR)) => continue,
            Err(e) => return Err(e).with_context(|| format!("make {readonly} read-only")),
        };
        let protect = || -> Result<()> {
            let tree = sys::open_tree(target.raw(), "", OPEN_TREE_CLONE | EMPTY_PATH | RECURSIVE)?;
            let attr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() };
            sys::mount_setattr(tree.raw(), "", EMPTY_PATH | RECURSIVE, &attr)?;
            sys::move_mount(tree.raw(), target.raw())?;
            Ok(())
        };
        protect().with_context(|| format!("make {readonly} read-only"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: &str, source: &str, destination: &str) -> Mount {
        Mount { type_: kind.into(), source: source.into(), destination: destination.into(), options: vec![] }
    }

    #[test]
    fn destinations_are_cleaned_as_text() {
        assert_eq!(clean("/a//b/./c/../d").unwrap(), "/a/b/d");
        assert_eq!(clean("data").unwrap(), "/data");
        assert!(clean("/").is_err() && clean("/a/..").is_err() && clean("../..").is_err());
    }

    #[test]
    fn proc_is_guarded() {
        assert!(check_proc("/proc", &of("proc", "proc", "/proc")).is_ok());
        assert!(check_proc("/proc", &of("bind", "/proc", "/proc")).is_ok());
        assert!(check_proc("/proc", &of("tmpfs", "tmpfs", "/proc")).is_err());
        assert!(check_proc("/proc", &of("bind", "/etc", "/proc")).is_err());
        assert!(check_proc("/proc/cpuinfo", &of("bind", "/x", "/proc/cpuinfo")).is_ok());
        assert!(check_proc("/proc/self/attr", &of("bind", "/x", "/proc/self/attr")).is_err());
        assert!(check_proc("/processes", &of("tmpfs", "", "/processes")).is_ok());
    }
}
