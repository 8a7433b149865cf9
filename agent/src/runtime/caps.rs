//! Capabilities: names to bits, and into the five sets of the process.

use crate::log;
use crate::prelude::*;
use crate::proto::oci::LinuxCapabilities;
use crate::sys::{self, CapSets};

/// In the order of their numbers.
const NAMES: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

pub const SYS_ADMIN: u64 = 1 << 21;

/// What a process gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caps {
    pub bounding: u64,
    pub ambient: u64,
    pub sets: CapSets,
}

/// The capabilities that a process asks for, without what no process can have. That is logged and is no error (runtime
/// specification, config.md, "capabilities"). Without a list none are given.
///
/// The kernel's rules for the sets, capabilities(7): what is effective is permitted, what is inheritable is in the
/// bounding set (which is dropped before), and what is ambient is both permitted and inheritable.
pub fn parse(spec: Option<&LinuxCapabilities>) -> Caps {
    let Some(spec) = spec else { return Caps::default() };
    let bounding = mask("bounding", &spec.bounding, u64::MAX);
    let permitted = mask("permitted", &spec.permitted, u64::MAX);
    let inheritable = mask("inheritable", &spec.inheritable, bounding | permitted);
    Caps {
        bounding,
        ambient: mask("ambient", &spec.ambient, permitted & inheritable),
        sets: CapSets { effective: mask("effective", &spec.effective, permitted), permitted, inheritable },
    }
}

/// The capabilities of these names that are among the `possible`.
fn mask(kind: &str, names: &[String], possible: u64) -> u64 {
    let mut set = 0;
    for name in names {
        let upper = name.to_ascii_uppercase();
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        match NAMES.iter().position(|known| *known == short) {
            Some(number) if possible & 1 << number != 0 => set |= 1 << number,
            Some(_) => log::warn(&format!("{name} cannot be {kind}: the process's other sets are without it")),
            None => log::warn(&format!("unknown capability {name:?} is passed over")),
        }
    }
    set
}

/// The capabilities that the kernel knows, as a mask: an older kernel must not be asked for a newer capability.
pub fn known() -> u64 {
    let mut set = 0;
    for number in 0..NAMES.len() {
        if sys::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0).is_ok() {
            set |= 1 << number;
        }
    }
    set
}

impl Caps {
    /// Leaves out what this kernel does not know.
    pub fn limited_to(self, known: u64) -> Caps {
        Caps {
            bounding: self.bounding & known,
            ambient: self.ambient & known,
            sets: CapSets {
                effective: self.sets.effective & known,
                permitted: self.sets.permitted & known,
                inheritable: self.sets.inheritable & known,
            },
        }
    }

    /// First step, while still root: drops what can never be regained.
    pub fn drop_bounding(&self, known: u64) -> Result<()> {
        for number in (0..64).filter(|n| known & !self.bounding & (1 << n) != 0) {
            sys::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0)
                .with_context(|| format!("drop CAP_{} from the bounding set", NAMES[number]))?;
        }
        Ok(())
    }

    /// Last step, as the final user (who has kept the permitted set). `extra` stays permitted and effective for one
    /// more moment.
    pub fn apply(&self, extra: u64) -> Result<()> {
        let sets = CapSets {
            effective: self.sets.effective | extra,
            permitted: self.sets.permitted | extra,
            inheritable: self.sets.inheritable,
        };
        sys::capset(sets).context("set capabilities")?;
        sys::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as usize, 0, 0, 0)
            .context("clear ambient capabilities")?;
        for number in (0..64usize).filter(|n| self.ambient & (1 << n) != 0) {
            sys::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as usize, number, 0, 0)
                .with_context(|| format!("raise ambient CAP_{}", NAMES[number]))?;
        }
        Ok(())
    }

    /// Drops what [`Caps::apply`] has kept as `extra`.
    pub fn finish(&self) -> Result<()> {
        sys::capset(self.sets).context("set capabilities")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_the_kernels_bits() {
        let spec = LinuxCapabilities {
            bounding: vec!["CAP_CHOWN".into(), "CAP_CHECKPOINT_RESTORE".into()],
            permitted: vec!["cap_sys_admin".into(), "CAP_MAGIC".into()],
            ..Default::default()
        };
        let caps = parse(Some(&spec));
        assert_eq!(caps.bounding, 1 | 1 << 40);
        assert_eq!(caps.sets.permitted, SYS_ADMIN);
        assert_eq!(caps.limited_to(1).bounding, 1);
        assert!(known() & SYS_ADMIN != 0);
    }
    #[test]
    fn no_set_has_what_the_kernel_would_refuse_there() {
        let names = |words: &[&str]| words.iter().map(|word| (*word).into()).collect::<Vec<String>>();
        let spec = LinuxCapabilities {
            bounding: names(&["CAP_CHOWN"]),
            permitted: names(&["CAP_CHOWN", "CAP_FOWNER"]),
            effective: names(&["CAP_CHOWN", "CAP_KILL"]),
            inheritable: names(&["CAP_CHOWN", "CAP_KILL"]),
            ambient: names(&["CAP_CHOWN", "CAP_FOWNER", "CAP_KILL"]),
        };
        let caps = parse(Some(&spec));
        let chown = 1;
        assert_eq!((caps.sets.effective, caps.sets.inheritable, caps.ambient), (chown, chown, chown));
        assert_eq!(caps.sets.permitted, chown | 1 << 3);
    }
}
