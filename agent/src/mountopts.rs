//! Mount options as text (OCI runtime spec, mount(8)) and what mount(2) makes of them.

use crate::prelude::*;
use crate::sys::{self, Errno, MountAttr, SysResult};

// linux/mount.h. Written out because `libc` has some of them signed, some not at all.
pub const MS_RDONLY: u64 = 1;
const MS_NOSUID: u64 = 2;
const MS_NODEV: u64 = 4;
const MS_NOEXEC: u64 = 8;
const MS_SYNCHRONOUS: u64 = 16;
pub const MS_REMOUNT: u64 = 32;
const MS_MANDLOCK: u64 = 64;
const MS_DIRSYNC: u64 = 128;
const MS_NOSYMFOLLOW: u64 = 256;
const MS_NOATIME: u64 = 1024;
const MS_NODIRATIME: u64 = 2048;
pub const MS_BIND: u64 = 4096;
pub const MS_REC: u64 = 16384;
const MS_SILENT: u64 = 32768;
const MS_UNBINDABLE: u64 = 1 << 17;
const MS_PRIVATE: u64 = 1 << 18;
const MS_SLAVE: u64 = 1 << 19;
const MS_SHARED: u64 = 1 << 20;
const MS_RELATIME: u64 = 1 << 21;
const MS_I_VERSION: u64 = 1 << 23;
const MS_STRICTATIME: u64 = 1 << 24;
const MS_LAZYTIME: u64 = 1 << 25;

const ATTR_RDONLY: u64 = 1;
const ATTR_NOSUID: u64 = 2;
const ATTR_NODEV: u64 = 4;
const ATTR_NOEXEC: u64 = 8;
/// The access time settings are a number in these bits: 0 = relatime.
const ATTR_ATIME: u64 = 0x70;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x20_0000;

/// Options that set a flag, and (`true`) those that clear it.
const FLAGS: &[(&str, bool, u64)] = &[
    ("async", true, MS_SYNCHRONOUS),
    ("atime", true, MS_NOATIME),
    ("bind", false, MS_BIND),
    ("defaults", false, 0),
    ("dev", true, MS_NODEV),
    ("diratime", true, MS_NODIRATIME),
    ("dirsync", false, MS_DIRSYNC),
    ("exec", true, MS_NOEXEC),
    ("iversion", false, MS_I_VERSION),
    ("lazytime", false, MS_LAZYTIME),
    ("loud", true, MS_SILENT),
    ("mand", false, MS_MANDLOCK),
    ("noatime", false, MS_NOATIME),
    ("nodev", false, MS_NODEV),
    ("nodiratime", false, MS_NODIRATIME),
    ("noexec", false, MS_NOEXEC),
    ("noiversion", true, MS_I_VERSION),
    ("nolazytime", true, MS_LAZYTIME),
    ("nomand", true, MS_MANDLOCK),
    ("norelatime", true, MS_RELATIME),
    ("nostrictatime", true, MS_STRICTATIME),
    ("nosuid", false, MS_NOSUID),
    ("nosymfollow", false, MS_NOSYMFOLLOW),
    ("rbind", false, MS_BIND | MS_REC),
    ("relatime", false, MS_RELATIME),
    ("remount", false, MS_REMOUNT),
    ("ro", false, MS_RDONLY),
    ("rw", true, MS_RDONLY),
    ("silent", false, MS_SILENT),
    ("strictatime", false, MS_STRICTATIME),
    ("suid", true, MS_NOSUID),
    ("symfollow", true, MS_NOSYMFOLLOW),
    ("sync", false, MS_SYNCHRONOUS),
];

const PROPAGATION: &[(&str, u64)] = &[
    ("private", MS_PRIVATE),
    ("rprivate", MS_PRIVATE | MS_REC),
    ("rshared", MS_SHARED | MS_REC),
    ("rslave", MS_SLAVE | MS_REC),
    ("runbindable", MS_UNBINDABLE | MS_REC),
    ("shared", MS_SHARED),
    ("slave", MS_SLAVE),
    ("unbindable", MS_UNBINDABLE),
];

/// For the whole tree of mounts: mount_setattr(2) with AT_RECURSIVE.
const RECURSIVE: &[(&str, bool, u64)] = &[
    ("ratime", true, ATTR_NOATIME),
    ("rdev", true, ATTR_NODEV),
    ("rdiratime", true, ATTR_NODIRATIME),
    ("rexec", true, ATTR_NOEXEC),
    ("rnoatime", false, ATTR_NOATIME),
    ("rnodev", false, ATTR_NODEV),
    ("rnodiratime", false, ATTR_NODIRATIME),
    ("rnoexec", false, ATTR_NOEXEC),
    ("rnorelatime", true, ATTR_ATIME),
    ("rnostrictatime", true, ATTR_STRICTATIME),
    ("rnosuid", false, ATTR_NOSUID),
    ("rnosymfollow", false, ATTR_NOSYMFOLLOW),
    ("rrelatime", false, 0),
    ("rro", false, ATTR_RDONLY),
    ("rrw", true, ATTR_RDONLY),
    ("rstrictatime", false, ATTR_STRICTATIME),
    ("rsuid", true, ATTR_NOSUID),
    ("rsymfollow", true, ATTR_NOSYMFOLLOW),
];

/// Options that concern fstab and its tools, not the kernel.
const USER_SPACE: &[&str] = &["_netdev", "auto", "group", "noauto", "nofail", "nouser", "owner", "user", "users"];

/// mount(2) copies this much of the data, the NUL at the end included.
const DATA_MAX: usize = 4096;

/// Parsed options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// MS_* to set.
    pub flags: u64,
    /// MS_* that an option (`rw`, `dev`, ...) clears and no later one sets.
    pub clear_flags: u64,
    /// Propagation types with MS_REC where recursive, each for a mount(2) call of its own after the mount.
    pub propagation: Vec<u64>,
    /// MOUNT_ATTR_* for the mount and all below it.
    pub recursive_set: u64,
    pub recursive_clear: u64,
    /// The remaining options, which are for the file system, joined by commas.
    pub data: String,
    /// A tmpfs starts with a copy of the directory beneath it (runc's extension).
    pub tmpcopyup: bool,
}

/// Sorts options into flags, propagation and data. A later option beats an earlier one.
pub fn parse_options<S: AsRef<str>>(options: &[S]) -> Result<MountOptions> {
    let mut parsed = MountOptions::default();
    for option in options.iter().map(AsRef::as_ref).filter(|option| !option.is_empty()) {
        if let Some((_, clear, flag)) = FLAGS.iter().find(|(name, ..)| *name == option) {
            let (set, clear) = if *clear { (0, *flag) } else { (*flag, 0) };
            parsed.flags = parsed.flags & !clear | set;
            parsed.clear_flags = parsed.clear_flags & !set | clear;
        } else if let Some((_, kind)) = PROPAGATION.iter().find(|(name, _)| *name == option) {
            parsed.propagation.push(*kind);
        } else if let Some((name, clear, flag)) = RECURSIVE.iter().find(|(name, ..)| *name == option) {
            let (set, clear) = if *clear { (0, *flag) } else { (*flag, 0) };
            parsed.recursive_set = parsed.recursive_set & !clear | set;
            parsed.recursive_clear = parsed.recursive_clear & !set | clear;
            if name.ends_with("atime") && !name.ends_with("diratime") {
                // An enumeration: the kernel wants the old value cleared whatever the new one is.
                parsed.recursive_set = parsed.recursive_set & !ATTR_ATIME | set;
                parsed.recursive_clear |= ATTR_ATIME;
            }
        } else if option == "tmpcopyup" {
            parsed.tmpcopyup = true;
        } else if matches!(option, "idmap" | "ridmap") {
            return Err(Error::unimplemented(format!("mount option {option}: idmapped mounts are not supported")));
        } else if USER_SPACE.contains(&option) || ["x-", "X-", "comment="].iter().any(|p| option.starts_with(p)) {
            // No option of the mount itself.
        } else {
            if !parsed.data.is_empty() {
                parsed.data.push(',');
            }
            parsed.data.push_str(option);
        }
    }
    Ok(parsed)
}

impl MountOptions {
    /// The flags and cleared flags as attributes of one mount: for bind mounts, where attributes that no option names
    /// stay as they are in the source (a share's nosuid, nodev).
    pub fn attributes(&self) -> MountAttr {
        const PAIRS: &[(u64, u64)] = &[
            (MS_RDONLY, ATTR_RDONLY),
            (MS_NOSUID, ATTR_NOSUID),
            (MS_NODEV, ATTR_NODEV),
            (MS_NOEXEC, ATTR_NOEXEC),
            (MS_NODIRATIME, ATTR_NODIRATIME),
            (MS_NOSYMFOLLOW, ATTR_NOSYMFOLLOW),
        ];
        let translate = |flags: u64| {
            PAIRS.iter().filter(|(flag, _)| flags & flag != 0).fold(0, |set, (_, attribute)| set | attribute)
        };
        let mut attr =
            MountAttr { set: translate(self.flags), clear: translate(self.clear_flags), ..Default::default() };
        let atime = MS_NOATIME | MS_STRICTATIME | MS_RELATIME;
        if (self.flags | self.clear_flags) & atime != 0 {
            attr.clear |= ATTR_ATIME;
            attr.set |= match self.flags & atime {
                flags if flags & MS_NOATIME != 0 => ATTR_NOATIME,
                flags if flags & MS_STRICTATIME != 0 => ATTR_STRICTATIME,
                _ => 0,
            };
        }
        attr
    }

    /// The attributes for the mount and all below it; `None` where no option asks for any.
    pub fn recursive_attributes(&self) -> Option<MountAttr> {
        let (set, clear) = (self.recursive_set, self.recursive_clear);
        (set | clear != 0).then_some(MountAttr { set, clear, ..Default::default() })
    }

    /// Mounts `source` on the existing `target`. `fstype` "bind" means MS_BIND.
    pub fn mount(&self, source: &str, target: &str, fstype: &str) -> Result<()> {
        let what = || format!("mount {source:?} ({fstype}) on {target}");
        self.mount_only(source, target, fstype).map_err(|e| match e.0 {
            libc::ENODEV => Error::unimplemented(format!("{}: the guest kernel has no file system {fstype:?}", what())),
            libc::EINVAL => Error::internal(format!("{}: {e} (options {:?})", what(), self.data)),
            _ => Error::internal(format!("{}: {e}", what())),
        })?;
        self.finish(target).with_context(what)
    }

    fn mount_only(&self, source: &str, target: &str, fstype: &str) -> SysResult<()> {
        if self.flags & MS_REMOUNT != 0 {
            return sys::mount(source, target, fstype, self.flags, &self.data);
        }
        if self.flags & MS_BIND != 0 || fstype == "bind" {
            sys::mount(source, target, "", MS_BIND | self.flags & MS_REC, "")?;
            let attr = self.attributes();
            if attr.set | attr.clear != 0 {
                sys::mount_setattr(libc::AT_FDCWD, target, 0, &attr)?;
            }
            return Ok(());
        }
        if self.data.len() < DATA_MAX {
            return sys::mount(source, target, fstype, self.flags, &self.data);
        }
        if fstype != "overlay" {
            return Err(Errno(libc::E2BIG));
        }
        let (data, _directories) = shorten_layers(&self.data)?;
        if data.len() >= DATA_MAX {
            return Err(Errno(libc::E2BIG));
        }
        sys::mount(source, target, fstype, self.flags, &data)
    }

    /// Propagation and recursive attributes of a finished mount.
    fn finish(&self, target: &str) -> SysResult<()> {
        for kind in &self.propagation {
            sys::mount("", target, "", *kind, "")?;
        }
        if let Some(attr) = self.recursive_attributes() {
            sys::mount_setattr(libc::AT_FDCWD, target, libc::AT_RECURSIVE as u32, &attr)?;
        }
        Ok(())
    }
}

/// Overlay options with each lower layer as `/proc/self/fd/N`: 240 layers then fit into one page, however long their
/// paths are. Works on every kernel, which the newer `lowerdir+` does not. The descriptors must live until the mount.
fn shorten_layers(data: &str) -> SysResult<(String, Vec<sys::Fd>)> {
    let mut directories = Vec::new();
    let mut options = Vec::new();
    for option in data.split(',') {
        let Some(layers) = option.strip_prefix("lowerdir=") else {
            options.push(option.to_string());
            continue;
        };
        let mut short = Vec::new();
        for layer in layers.split(':') {
            let directory = sys::open(layer, libc::O_PATH | libc::O_DIRECTORY, 0)?;
            short.push(sys::proc_fd(directory.raw()));
            directories.push(directory);
        }
        options.push(format!("lowerdir={}", short.join(":")));
    }
    Ok((options.join(","), directories))
}

#[cfg(test)]
#[path = "mountopts_tests.rs"]
mod tests;
