//! Storages: file systems that the host wants mounted in the guest before a container starts (agent protocol,
//! `Storage`).
//!
//! One function per driver family. Options that a driver does not know go to the file system or are refused by name;
//! none is dropped.

use crate::devices::{find_block, find_block_by_scsi, wait_for_share};
use crate::fs;
use crate::huge_pages;
use crate::log;
use crate::mountopts::{parse_options, MountOptions, MS_BIND, MS_RDONLY, MS_REC, MS_REMOUNT};
use crate::ownership;
use crate::prelude::*;
use crate::proto::agent::Storage;
use crate::sys::{self, Errno, Fd};
use crate::volume_disk;
use crate::watchable::{self, Watched};

/// The drivers, for AgentDetails.storage_handlers.
pub const DRIVERS: &[&str] = &[
    "9p",
    "bind",
    "blk",
    "ephemeral",
    "local",
    "mmioblk",
    "nvdimm",
    "overlayfs",
    "pmem",
    "scsi",
    "virtio-fs",
    "watchable-bind",
];

/// A directory to make before an overlay is mounted, as an option or a driver option.
const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory=";
/// Option: give this overlay a writable layer beside its mount point.
const OVERLAY_RW: &str = "io.katacontainers.fs-opt.overlay-rw";
/// Ephemeral storages below it belong to the sandbox: the first container that names one mounts it, later ones find it,
/// and it stays when they end (a volume in memory outlives restarts of a pod's containers).
const OF_SANDBOX: &str = "/run/kata-containers/sandbox/";
/// Where the host's share is mounted.
const SHARES: &str = "/run/kata-containers/shared/containers";

/// Mounts one storage; where. On failure nothing stays mounted.
pub fn mount_storage(storage: &Storage) -> Result<String> {
    check_mount_point(&storage.mount_point)?;
    let outcome = match storage.driver.as_str() {
        "blk" | "mmioblk" | "nvdimm" | "pmem" | "scsi" => block(storage),
        "9p" => share(storage, "9p", &["trans=virtio", "version=9p2000.L"]),
        "virtio-fs" => wait_for_share()
            .and_then(|()| share(storage, "virtiofs", &[]))
            .inspect(|()| read_ahead(&storage.mount_point)),
        "ephemeral" => ephemeral(storage),
        "local" => local(storage),
        "bind" => bind(storage),
        "overlayfs" => overlay(storage),
        "watchable-bind" => watchable_bind(storage),
        other => {
            return Err(Error::unimplemented(format!(
                "storage driver {other:?} is not among those of this agent: {}",
                DRIVERS.join(", ")
            )));
        }
    };
    outcome.with_context(|| format!("storage {:?}", storage.driver))?;
    Ok(storage.mount_point.clone())
}

/// Whether a storage stays when the container that named it goes.
pub fn is_of_sandbox(mount_point: &str) -> bool {
    mount_point.starts_with(OF_SANDBOX)
}

/// Unmounts what [`mount_storage`] has mounted. Nothing mounted there is fine. A mount that is still in use is
/// detached and disappears with its last user, its data written back before.
pub fn unmount(mount_point: &str) -> Result<()> {
    let outcome = unmount_only(mount_point);
    // The copy of a watched source; most storages have none.
    let _ = fs::remove_dir_all(watchable::copy_of(mount_point));
    outcome
}

fn unmount_only(mount_point: &str) -> Result<()> {
    match sys::umount(mount_point, libc::UMOUNT_NOFOLLOW) {
        // EINVAL: not a mount point (the local driver mounts nothing).
        Ok(()) | Err(Errno(libc::EINVAL | libc::ENOENT)) => Ok(()),
        Err(Errno(libc::EBUSY)) => {
            if let Ok(directory) = sys::open(mount_point, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW, 0) {
                let _ = sys::syncfs(directory.raw());
            }
            sys::umount(mount_point, libc::UMOUNT_NOFOLLOW | libc::MNT_DETACH)
                .with_context(|| format!("detach {mount_point}"))
        }
        Err(e) => Err(e).with_context(|| format!("unmount {mount_point}")),
    }
}

/// Gives a mounted ephemeral storage its new options, such as a size (UpdateEphemeralMounts).
pub fn remount_ephemeral(storage: &Storage) -> Result<()> {
    check_mount_point(&storage.mount_point)?;
    if storage.driver != "ephemeral" {
        return Err(Error::invalid(format!("storage driver {:?} cannot be remounted", storage.driver)));
    }
    let (options, _) = split_group(&storage.options)?;
    let mut parsed = parse_options(&options)?;
    parsed.flags |= MS_REMOUNT;
    parsed.mount(&storage.source, &storage.mount_point, &storage.fstype)
}

/// Looks at every mount below the share's directory, so that the host's virtiofsd releases deleted inodes
/// (RemoveStaleVirtiofsShareMounts). A mount that cannot be looked at any more is stale: no error.
pub fn touch_shares() -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    for point in table.lines().filter_map(|line| line.split(' ').nth(4)) {
        if point.starts_with(SHARES) {
            let _ = sys::stat(unescape(point));
        }
    }
    Ok(())
}

/// The kernel writes blanks and the like as three octal digits.
fn unescape(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let octal = text.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        if let Some(byte) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            plain.push(byte);
            at += 4;
        } else {
            plain.push(bytes[at]);
            at += 1;
        }
    }
    plain
}

/// Paths come from the host, and may not contain tricks that make two of them equal.
fn check_mount_point(path: &str) -> Result<()> {
    if path.len() > 1 && path.starts_with('/') && !path[1..].split('/').any(|part| matches!(part, "." | "..")) {
        return Ok(());
    }
    Err(Error::invalid(format!("storage: mount point {path:?} is not a plain absolute path")))
}

fn make_mount_point(path: &str) -> Result<()> {
    fs::create_dir_all(path, 0o755).with_context(|| format!("make the mount point {path}"))
}

fn refuse_driver_options(storage: &Storage, known: &[&str]) -> Result<()> {
    match storage.driver_options.iter().find(|option| !known.contains(&option.as_str())) {
        Some(option) => Err(unknown_driver_option(option)),
        None => Ok(()),
    }
}

fn unknown_driver_option(option: &str) -> Error {
    Error::unimplemented(format!("driver option {option:?} is not supported"))
}

/// Mounts, then hands the files to the group. Unmounts again when that fails.
fn mount_and_own(storage: &Storage, source: &str, fstype: &str, options: &MountOptions) -> Result<()> {
    if fstype.is_empty() {
        return Err(Error::invalid("no file system type given"));
    }
    make_mount_point(&storage.mount_point)?;
    options.mount(source, &storage.mount_point, fstype)?;
    let Some(group) = &storage.fs_group else { return Ok(()) };
    if options.flags & MS_RDONLY != 0 {
        return Ok(());
    }
    ownership::give_to_group(&storage.mount_point, group).inspect_err(|_| {
        let _ = unmount(&storage.mount_point);
    })
}

fn block(storage: &Storage) -> Result<()> {
    let (volume, others) = volume_disk::split_options(&storage.driver_options);
    // "rw" is the default of a mount; read-only ones have "ro" among their options.
    if let Some(option) = others.iter().find(|option| **option != "rw") {
        return Err(unknown_driver_option(option));
    }
    let device = match storage.driver.as_str() {
        "scsi" => find_block_by_scsi(&storage.source)?,
        _ => find_block(&storage.source)?,
    };
    let options = parse_options(&storage.options)?;
    if options.flags & MS_RDONLY != 0 && matches!(storage.driver.as_str(), "nvdimm" | "pmem") {
        never_flush(&device);
    }
    mount_and_own(storage, &device, &storage.fstype, &options)?;
    let Some(volume) = volume else { return Ok(()) };
    volume_disk::prepare(&storage.mount_point, &volume).inspect_err(|_| {
        let _ = unmount(&storage.mount_point);
    })
}

/// Has the kernel pass no flushes on to a device of persistent memory that is only read. virtio-pmem waits for the host's
/// answer without end, and the interrupt of that is not heard in a machine without ACPI, or one that went on from a
/// template: QEMU 7.2 gives the device no message signalled one, and does not save it. A failure harms only
/// who flushes the device itself.
fn never_flush(device: &str) {
    let name = device.rsplit('/').next().unwrap_or_default();
    let file = format!("/sys/block/{name}/queue/write_cache");
    if let Err(e) = fs::write_existing(&file, "write through") {
        log::warn(&format!("{file}: {e}"));
    }
}

/// Mounts a shared directory of the host, by its tag. `defaults` are added where the options do not set the same name.
fn share(storage: &Storage, fstype: &str, defaults: &[&str]) -> Result<()> {
    refuse_driver_options(storage, &[])?;
    let mut options = storage.options.clone();
    for default in defaults {
        let name = default.split('=').next().unwrap_or_default();
        if !options.iter().any(|option| option.split('=').next() == Some(name)) {
            options.push((*default).to_string());
        }
    }
    mount_and_own(storage, &storage.source, fstype, &parse_options(&options)?)
}

/// How far a share reads ahead. The kernel's 128 KiB are for disks: here each request is a round trip to another process.
const READ_AHEAD_KIB: u32 = 1024;

/// Raises the read-ahead of a share's mounts; submounts of the host's other file systems use the same backing device. A
/// failure only makes them slower.
fn read_ahead(mount_point: &str) {
    let Ok(stat) = sys::stat(mount_point) else { return };
    let device = (libc::major(stat.st_dev), libc::minor(stat.st_dev));
    let file = format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.0, device.1);
    if let Err(e) = fs::write_existing(&file, &READ_AHEAD_KIB.to_string()) {
        log::warn(&format!("{file}: {e}"));
    }
}

/// Splits off `fsgid=N`, which is for the agent and not for the kernel.
fn split_group(options: &[String]) -> Result<(Vec<&String>, Option<u32>)> {
    let (mut rest, mut group) = (Vec::new(), None);
    for option in options {
        match option.strip_prefix("fsgid=") {
            Some(text) => {
                group =
                    Some(text.parse().map_err(|_| Error::invalid(format!("option {option}: not a group's number")))?);
            }
            None => rest.push(option),
        }
    }
    Ok((rest, group))
}

/// A tmpfs, or huge pages of its own.
fn ephemeral(storage: &Storage) -> Result<()> {
    refuse_driver_options(storage, &[])?;
    let (options, group) = split_group(&storage.options)?;
    let mut lock = None;
    if is_of_sandbox(&storage.mount_point) {
        lock = Some(lock_sandbox_mounts()?);
        if is_mounted(&storage.mount_point)? {
            return Ok(());
        }
    }
    let pool = match storage.fstype.as_str() {
        "hugetlbfs" => Some(huge_pages::reserve(huge_pages::POOLS, &options)?),
        _ => None,
    };
    let source = if storage.source.is_empty() { storage.fstype.as_str() } else { storage.source.as_str() };
    let mounted = parse_options(&options)
        .and_then(|options| mount_and_own(storage, source, &storage.fstype, &options))
        .and_then(|()| group.map_or(Ok(()), |group| ownership::set_group(&storage.mount_point, group)));
    if let (Err(_), Some((file, before))) = (&mounted, pool) {
        let _ = fs::write_existing(file, &before.to_string());
    }
    drop(lock);
    mounted
}

/// A lock between builders, which may run at the same time: it is held until the returned descriptor is dropped.
fn lock_sandbox_mounts() -> Result<Fd> {
    make_mount_point(OF_SANDBOX)?;
    let lock = sys::open(OF_SANDBOX, libc::O_RDONLY | libc::O_DIRECTORY, 0).context("open the sandbox's directory")?;
    sys::flock(lock.raw(), libc::LOCK_EX).context("wait for another container")?;
    Ok(lock)
}

/// Whether something is mounted on a path: then it is on another file system than the directory that it is in.
fn is_mounted(mount_point: &str) -> Result<bool> {
    let (parent, _) = mount_point.rsplit_once('/').unwrap_or_default();
    let device = |path: &str| match sys::stat(path) {
        Ok(status) => Ok(Some(status.st_dev)),
        Err(Errno(libc::ENOENT)) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("look at {path}")),
    };
    Ok(device(mount_point)?.is_some_and(|inner| device(parent).is_ok_and(|outer| outer != Some(inner))))
}

/// A directory in the guest, kept as long as the sandbox.
fn local(storage: &Storage) -> Result<()> {
    refuse_driver_options(storage, &[])?;
    let (options, group) = split_group(&storage.options)?;
    let mut mode = None;
    for option in options {
        let Some(text) = option.strip_prefix("mode=") else {
            return Err(Error::invalid(format!("option {option:?} is neither mode= nor fsgid=")));
        };
        mode = Some(
            u32::from_str_radix(text, 8)
                .ok()
                .filter(|mode| *mode <= 0o7777)
                .ok_or_else(|| Error::invalid(format!("option {option:?}: not an octal mode")))?,
        );
    }
    make_mount_point(&storage.mount_point)?;
    if let Some(mode) = mode {
        sys::fchmodat(libc::AT_FDCWD, &storage.mount_point, mode)
            .with_context(|| format!("set the mode of {}", storage.mount_point))?;
    }
    match (group, &storage.fs_group) {
        (Some(group), _) => ownership::set_group(&storage.mount_point, group),
        (None, Some(group)) => ownership::give_to_group(&storage.mount_point, group),
        (None, None) => Ok(()),
    }
}

fn bind(storage: &Storage) -> Result<()> {
    refuse_driver_options(storage, &[])?;
    let mut options = parse_options(&storage.options)?;
    if !options.data.is_empty() {
        return Err(Error::invalid(format!("bind mounts take no options like {:?}", options.data)));
    }
    options.flags |= MS_BIND;
    let source = sys::stat(&storage.source).with_context(|| format!("bind {}", storage.source))?;
    if source.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return mount_and_own(storage, &storage.source, "bind", &options);
    }
    let (parent, _) = storage.mount_point.rsplit_once('/').unwrap_or_default();
    make_mount_point(parent)?;
    sys::open(&storage.mount_point, libc::O_CREAT | libc::O_WRONLY | libc::O_NOFOLLOW, 0o644)
        .with_context(|| format!("make the mount point {}", storage.mount_point))?;
    options.flags &= !MS_REC;
    options.mount(&storage.source, &storage.mount_point, "bind")
}

/// A copy of the source, which changes when the source does, so that inotify works; too large ones are bound
/// themselves.
fn watchable_bind(storage: &Storage) -> Result<()> {
    if storage.fs_group.is_some() {
        return Err(Error::unimplemented(
            "the copies belong to the owners of their sources: fs_group is not supported",
        ));
    }
    let copy = watchable::prepare(&storage.source, &storage.mount_point)?;
    let source = copy.clone().unwrap_or_else(|| storage.source.clone());
    bind(&Storage { source, ..storage.clone() }).inspect_err(|_| {
        if let Some(copy) = &copy {
            let _ = fs::remove_dir_all(copy);
        }
    })
}

/// Those of a request's storages that have to be kept up to date.
pub fn watched(storages: &[Storage]) -> Vec<Watched> {
    let of = |storage: &Storage| Watched { source: storage.source.clone(), mount_point: storage.mount_point.clone() };
    storages.iter().filter(|storage| storage.driver == "watchable-bind").map(of).collect()
}

fn overlay(storage: &Storage) -> Result<()> {
    let mut options = Vec::new();
    let mut directories = Vec::new();
    let mut writable = false;
    for option in storage.options.iter().chain(&storage.driver_options) {
        if let Some(directory) = option.strip_prefix(CREATE_DIRECTORY) {
            directories.push(directory.to_string());
        } else if option == OVERLAY_RW {
            writable = true;
        } else {
            options.push(option.clone());
        }
    }
    if writable {
        let (parent, _) = storage.mount_point.rsplit_once('/').unwrap_or_default();
        for (name, directory) in [("upperdir", "upper"), ("workdir", "work")] {
            let directory = format!("{parent}/{directory}");
            options.push(format!("{name}={directory}"));
            directories.push(directory);
        }
    }
    let parsed = parse_options(&options)?;
    let of = |name: &str| parsed.data.split(',').find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
    let top_layer = of("lowerdir").and_then(|layers| layers.split(':').next());
    for layer in of("lowerdir").iter().flat_map(|layers| layers.split(':')) {
        // A mount of the host's below a virtio-fs share is mounted here when it is first opened. An overlay takes the
        // directory without opening it, and refuses one that waits to be mounted upon. A missing layer is reported by
        // the mount itself.
        let _ = sys::open(layer, libc::O_RDONLY | libc::O_DIRECTORY, 0);
    }
    for directory in &directories {
        check_mount_point(directory)?;
        if fs::is_dir(directory) {
            continue;
        }
        fs::create_dir_all(directory, 0o755).with_context(|| format!("make the directory {directory}"))?;
        // The overlay's root looks like the root of its upper layer: it starts as a copy of the layer beneath.
        if let Some(lower) = top_layer.filter(|_| of("upperdir") == Some(directory)) {
            let lower = sys::stat(lower).with_context(|| format!("look at the layer {lower}"))?;
            sys::fchownat(libc::AT_FDCWD, directory, lower.st_uid, lower.st_gid, 0)
                .and_then(|()| sys::fchmodat(libc::AT_FDCWD, directory, lower.st_mode & 0o7777))
                .with_context(|| format!("set the owner and mode of {directory}"))?;
        }
    }
    let source = if storage.source.is_empty() { "overlay" } else { storage.source.as_str() };
    mount_and_own(storage, source, "overlay", &parsed)
}

#[cfg(test)]
#[path = "storage_tests.rs"]
mod tests;
