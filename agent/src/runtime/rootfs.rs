//! The container's root: from a directory of the agent's to `/` of a mount namespace with nothing else in it.

use super::{devices, mounts, path};
use crate::prelude::*;
use crate::proto::oci::{Linux, LinuxDevice, Spec};
use crate::sys::{self, Fd, MountAttr, AT_FDCWD};

/// The propagation of `/` in the new namespace, as mount(2) flags.
fn propagation(linux: &Linux) -> Result<u64> {
    Ok(match linux.rootfs_propagation.as_str() {
        "" | "rslave" => libc::MS_SLAVE | libc::MS_REC,
        "slave" => libc::MS_SLAVE,
        "private" => libc::MS_PRIVATE,
        "rprivate" => libc::MS_PRIVATE | libc::MS_REC,
        "shared" => libc::MS_SHARED,
        "rshared" => libc::MS_SHARED | libc::MS_REC,
        "unbindable" => libc::MS_UNBINDABLE,
        "runbindable" => libc::MS_UNBINDABLE | libc::MS_REC,
        other => return Err(Error::invalid(format!("unknown rootfsPropagation {other:?}"))),
    })
}

/// A root that is being prepared in the calling process's new mount namespace.
pub struct Rootfs {
    root: Fd,
    propagation: u64,
}

impl Rootfs {
    /// Cuts the namespace off from the agent's and makes `path` a mount.
    pub fn new(path: &str, linux: &Linux) -> Result<Rootfs> {
        let propagation = propagation(linux)?;
        // Whatever propagation is requested later: no mount made here may reach the agent's namespace.
        sys::mount("", "/", "", libc::MS_SLAVE | libc::MS_REC, "").context("make / a slave")?;
        sys::mount(path, path, "", libc::MS_BIND | libc::MS_REC, "")
            .with_context(|| format!("bind the root {path}"))?;
        // pivot_root refuses a shared root.
        let attr = MountAttr { propagation: libc::MS_PRIVATE, ..Default::default() };
        sys::mount_setattr(AT_FDCWD, path, 0, &attr).context("make the root private")?;
        let root = sys::open(path, libc::O_PATH | libc::O_DIRECTORY, 0).with_context(|| format!("open {path}"))?;
        Ok(Rootfs { root, propagation })
    }

    pub fn fd(&self) -> sys::RawFd {
        self.root.raw()
    }

    /// All mounts of the spec, then the nodes of /dev, unless /dev is a bind mount.
    pub fn fill(&self, spec: &Spec, devices: &[LinuxDevice], context: &mounts::MountContext) -> Result<()> {
        let root = self.root.raw();
        for mount in &spec.mounts {
            mounts::mount(root, mount, context)?;
        }
        let foreign_dev = spec.mounts.iter().any(|m| {
            m.destination.trim_end_matches('/') == "/dev"
                && (m.type_ == "bind" || m.options.iter().any(|o| o == "bind" || o == "rbind"))
        });
        if !foreign_dev {
            devices::make_all(root, devices, context.user_namespace)?;
        }
        Ok(())
    }

    /// Masked and read-only paths; a working directory that is missing is made.
    pub fn protect(&self, linux: &Linux, cwd: &str, null: sys::RawFd) -> Result<()> {
        let root = self.root.raw();
        mounts::make_readonly(root, &linux.readonly_paths)?;
        mounts::mask(root, &linux.masked_paths, null)?;
        if !cwd.is_empty() {
            path::make_dir(root, cwd, 0o755)
                .map_err(|e| Error::invalid(format!("the working directory {cwd:?} cannot be made: {e}")))?;
        }
        Ok(())
    }

    /// Becomes `/`; everything else leaves the namespace.
    pub fn pivot(self, spec: &Spec) -> Result<()> {
        mounts::finish_dev(self.root.raw(), &spec.mounts)?;
        let old = sys::open("/", libc::O_PATH | libc::O_DIRECTORY, 0).context("open the old root")?;
        sys::fchdir(self.root.raw()).context("enter the new root")?;
        // pivot_root with both on one path: the old root then lies on top of the new one, and is unmounted.
        sys::pivot_root(".", ".").context("pivot_root")?;
        sys::fchdir(old.raw()).context("enter the old root")?;
        sys::mount("", ".", "", libc::MS_SLAVE | libc::MS_REC, "").context("make the old root a slave")?;
        sys::umount(".", libc::MNT_DETACH).context("detach the old root")?;
        sys::chdir("/").context("enter the new root")?;
        if self.propagation != libc::MS_SLAVE | libc::MS_REC {
            sys::mount("", "/", "", self.propagation, "").context("set rootfsPropagation")?;
        }
        if spec.root.as_deref().is_some_and(|r| r.readonly) {
            let attr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() };
            sys::mount_setattr(AT_FDCWD, "/", 0, &attr).context("make the root read-only")?;
        }
        Ok(())
    }
}

/// Writes kernel parameters through the agent's own /proc (`proc`), never through a path of the container's.
pub fn set_sysctls(proc: sys::RawFd, linux: &Linux) -> Result<()> {
    for (name, value) in &linux.sysctl {
        // A dot in a network interface's name is written as a slash in sysctl's notation, and the other way round.
        let swapped: String = name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect();
        if swapped.split('/').any(|part| part.is_empty() || part == "..") {
            return Err(Error::invalid(format!("sysctl {name:?} is not a name")));
        }
        let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
        sys::openat2(proc, format!("sys/{swapped}"), libc::O_WRONLY, 0, resolve)
            .and_then(|fd| sys::write_all(fd.raw(), value.as_bytes()))
            .with_context(|| format!("set sysctl {name}={value}"))?;
    }
    Ok(())
}
