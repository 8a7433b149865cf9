//! Which namespaces a container has of its own, and which it shares with the sandbox.

use crate::prelude::*;
use crate::proto::oci::Linux;
use crate::sys::{self, RawFd};

/// What the spec asks for. A mount namespace is always made; the network is always the guest's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    pub pid: bool,
    pub ipc: bool,
    pub uts: bool,
    pub cgroup: bool,
    pub user: bool,
}

/// The sandbox's namespaces to join instead of making new ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shared {
    pub ipc: Option<RawFd>,
    pub uts: Option<RawFd>,
    pub pid: Option<RawFd>,
}

pub fn parse(linux: &Linux) -> Result<Namespaces> {
    // PID namespaces are not shared by default: `sandbox_pidns` asks for that.
    let mut found = Namespaces { pid: true, ..Default::default() };
    for namespace in &linux.namespaces {
        if !namespace.path.is_empty() {
            return Err(Error::invalid(format!(
                "namespace {} has the path {:?}: paths of the host mean nothing in the guest",
                namespace.type_, namespace.path
            )));
        }
        match namespace.type_.as_str() {
            "pid" | "mount" | "network" => {}
            "ipc" => found.ipc = true,
            "uts" => found.uts = true,
            "cgroup" => found.cgroup = true,
            "user" => found.user = true,
            other => return Err(Error::invalid(format!("namespaces of type {other:?} are not supported"))),
        }
    }
    let mapped = !linux.uid_mappings.is_empty() || !linux.gid_mappings.is_empty();
    if mapped && !found.user {
        return Err(Error::invalid("uidMappings and gidMappings need a user namespace"));
    }
    Ok(found)
}

impl Namespaces {
    /// CLONE_NEW* for what is not shared.
    pub fn clone_flags(&self, shared: &Shared) -> u64 {
        let mut flags = 0;
        if self.pid && shared.pid.is_none() {
            flags |= libc::CLONE_NEWPID;
        }
        if self.ipc && shared.ipc.is_none() {
            flags |= libc::CLONE_NEWIPC;
        }
        if self.uts && shared.uts.is_none() {
            flags |= libc::CLONE_NEWUTS;
        }
        if self.user {
            flags |= libc::CLONE_NEWUSER;
        }
        flags as u64
    }
}

impl Shared {
    /// What a container can share: root of a user namespace of its own may not change the sandbox's namespaces, not even
    /// their host name, and gets its own ones.
    pub fn usable_by(self, namespaces: &Namespaces) -> Shared {
        if namespaces.user {
            Shared { pid: self.pid, ..Shared::default() }
        } else {
            self
        }
    }

    /// The caller (and its children; for the pid namespace only these) joins.
    pub fn join(&self) -> Result<()> {
        for (fd, kind, name) in [
            (self.ipc, libc::CLONE_NEWIPC, "ipc"),
            (self.uts, libc::CLONE_NEWUTS, "uts"),
            (self.pid, libc::CLONE_NEWPID, "pid"),
        ] {
            if let Some(fd) = fd {
                sys::setns(fd, kind).with_context(|| format!("join the sandbox's {name} namespace"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::oci::{LinuxIDMapping, LinuxNamespace};

    fn linux(kinds: &[(&str, &str)]) -> Linux {
        let namespaces =
            kinds.iter().map(|(k, p)| LinuxNamespace { type_: (*k).to_string(), path: (*p).to_string() }).collect();
        Linux { namespaces, ..Default::default() }
    }

    #[test]
    fn the_spec_says_what_is_new() {
        let found = parse(&linux(&[("pid", ""), ("uts", ""), ("network", ""), ("mount", "")])).unwrap();
        assert_eq!(found, Namespaces { pid: true, uts: true, ..Default::default() });
        let all = found.clone_flags(&Shared::default());
        assert_eq!(all, (libc::CLONE_NEWPID | libc::CLONE_NEWUTS) as u64);
        assert_eq!(found.clone_flags(&Shared { uts: Some(3), pid: Some(4), ipc: None }), 0);
        assert!(parse(&linux(&[("pid", "/proc/1/ns/pid")])).is_err());
        assert!(parse(&linux(&[("time", "")])).is_err());
        let mapped = Linux { uid_mappings: vec![LinuxIDMapping::default()], ..Default::default() };
        assert!(parse(&mapped).is_err());
    }
}
