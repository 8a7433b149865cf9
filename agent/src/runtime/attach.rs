//! Devices that the host hands to a container (CreateContainer.devices): found by their address in the guest; the
//! spec's device numbers, which are the host's, are replaced by the guest's.

use super::devices::cgroup_rules;
use crate::devices::{find_block, find_block_by_scsi};
use crate::devices_bpf;
use crate::prelude::*;
use crate::proto::agent::Device;
use crate::proto::oci::{LinuxBlockIO, LinuxDevice, LinuxDeviceCgroup, LinuxResources, Spec};
use crate::sys::{self, RawFd};

/// The types, for AgentDetails.device_handlers.
pub const TYPES: &[&str] = &["blk", "mmioblk", "nvdimm", "scsi"];

/// A device's number on the host, and its number and node in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Numbers {
    host: (i64, i64),
    guest: (i64, i64),
}

/// The spec's devices and their rules, with the guest's numbers.
pub struct Attached {
    pub devices: Vec<LinuxDevice>,
    rules: Vec<LinuxDeviceCgroup>,
    /// The guest's numbers of those that the host handed over.
    handed: Vec<(i64, i64)>,
    /// Limits and weights of single block devices, and nothing else.
    pub limits: LinuxResources,
}

/// Waits for the devices and finds out their numbers.
pub fn resolve(wanted: &[Device], spec: &Spec) -> Result<Attached> {
    let linux = spec.linux.as_deref().ok_or_else(|| Error::invalid("the spec has no linux section"))?;
    let resources = linux.resources.as_deref();
    let rules = resources.map_or(&[][..], |r| &r.devices);
    let mut attached = Attached {
        devices: linux.devices.clone(),
        rules: rules.to_vec(),
        handed: Vec::new(),
        limits: LinuxResources {
            block_io: resources
                .and_then(|r| r.block_io.clone())
                .map(|io| Box::new(LinuxBlockIO { weight: 0, leaf_weight: 0, ..*io })),
            ..Default::default()
        },
    };
    let mut found = Vec::new();
    for device in wanted {
        let what = || format!("device {:?} of type {:?}", device.container_path, device.type_);
        found.push(number(device, &mut attached.devices).with_context(what)?);
    }
    attached.handed = found.iter().map(|one| one.guest).collect();
    // All in one step: a device's number in the guest may be another device's number on the host.
    renumber(&mut attached.rules, &found);
    if let Some(io) = attached.limits.block_io.as_deref_mut() {
        renumber_limits(io, &found);
    }
    Ok(attached)
}

fn number(device: &Device, listed: &mut [LinuxDevice]) -> Result<Numbers> {
    if !TYPES.contains(&device.type_.as_str()) {
        return Err(Error::unimplemented(format!("this agent knows: {}", TYPES.join(", "))));
    }
    let listed = listed
        .iter_mut()
        .find(|listed| listed.path == device.container_path)
        .ok_or_else(|| Error::invalid("the spec's linux.devices has no such path"))?;
    let node = match (device.type_.as_str(), device.id.as_str(), device.vm_path.as_str()) {
        ("scsi", address, _) => find_block_by_scsi(address)?,
        // A PCI path or a serial is a better name than a node, which depends on the order of probing.
        ("blk", id, _) if !id.is_empty() => find_block(id)?,
        (_, _, node) if node.starts_with("/dev/") => find_block(node)?,
        _ => return Err(Error::invalid("it has neither an address in `id` nor a node in `vm_path`")),
    };
    let status = sys::stat(&node).with_context(|| format!("look at {node}"))?;
    let numbers = Numbers {
        host: (listed.major, listed.minor),
        guest: (i64::from(libc::major(status.st_rdev)), i64::from(libc::minor(status.st_rdev))),
    };
    listed.type_ = "b".to_string();
    (listed.major, listed.minor) = numbers.guest;
    Ok(numbers)
}

fn renumber(rules: &mut [LinuxDeviceCgroup], found: &[Numbers]) {
    for rule in rules.iter_mut().filter(|rule| rule.type_ == "b") {
        (rule.major, rule.minor) = here((rule.major, rule.minor), found);
    }
}

fn renumber_limits(io: &mut LinuxBlockIO, found: &[Numbers]) {
    for weight in &mut io.weight_device {
        (weight.major, weight.minor) = here((weight.major, weight.minor), found);
    }
    for rate in [
        &mut io.throttle_read_bps_device,
        &mut io.throttle_write_bps_device,
        &mut io.throttle_read_iops_device,
        &mut io.throttle_write_iops_device,
    ]
    .into_iter()
    .flatten()
    {
        (rate.major, rate.minor) = here((rate.major, rate.minor), found);
    }
}

/// The guest's device for one of the host's; a device that is not in the list keeps its numbers.
fn here(numbers: (i64, i64), found: &[Numbers]) -> (i64, i64) {
    found.iter().find(|one| one.host == numbers).map_or(numbers, |one| one.guest)
}

impl Attached {
    /// The devices that the container may use without a rule: all that are listed, where the host sends no rules; else a
    /// volume on a disk, for which there is none. What has a rule (`--device PATH:PATH:r`) has that one alone.
    fn unruled(&self) -> Vec<LinuxDevice> {
        let has_rule =
            |d: &LinuxDevice| self.rules.iter().any(|r| r.type_ == d.type_ && (r.major, r.minor) == (d.major, d.minor));
        let is_handed = |d: &LinuxDevice| d.type_ == "b" && self.handed.contains(&(d.major, d.minor));
        let counts = |d: &&LinuxDevice| self.rules.is_empty() || is_handed(d) && !has_rule(d);
        self.devices.iter().filter(counts).cloned().collect()
    }
}

/// The device program of a container that is handed no devices; none where it is, since theirs is known only when they
/// are there, and where it may use all devices.
pub fn known_program(wanted: &[Device], spec: &Spec) -> Result<Option<Vec<u64>>> {
    if wanted.is_empty() {
        program(spec, &resolve(&[], spec)?)
    } else {
        Ok(None)
    }
}

/// Restricts a container to its devices.
pub fn restrict(cgroup: RawFd, spec: &Spec, attached: &Attached) -> Result<()> {
    program(spec, attached)?.map_or(Ok(()), |code| devices_bpf::attach(cgroup, &code))
}

/// Device rules of the spec. Hosts of the original system send none. Then a container without CAP_SYS_ADMIN may use the
/// default devices, and one with it (a privileged one) all of them.
fn program(spec: &Spec, attached: &Attached) -> Result<Option<Vec<u64>>> {
    let bounding = spec.process.as_deref().and_then(|p| p.capabilities.as_deref()).map_or(&[][..], |c| &c.bounding);
    if attached.rules.is_empty() && bounding.iter().any(|c| c == "CAP_SYS_ADMIN") {
        return Ok(None);
    }
    devices_bpf::compile(&cgroup_rules(&attached.rules, &attached.unruled())).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::code;
    use crate::proto::oci::{Linux, LinuxThrottleDevice, LinuxWeightDevice};

    fn spec() -> Spec {
        let devices = vec![LinuxDevice { path: "/dev/data".into(), type_: "b".into(), ..Default::default() }];
        Spec { linux: Some(Box::new(Linux { devices, ..Default::default() })), ..Default::default() }
    }

    #[test]
    fn a_device_with_a_rule_has_that_one_alone() {
        let listed =
            |type_: &str, major, minor| LinuxDevice { type_: type_.into(), major, minor, ..Default::default() };
        let rule = |type_: &str, major, minor, access: &str| LinuxDeviceCgroup {
            allow: true,
            type_: type_.into(),
            major,
            minor,
            access: access.into(),
        };
        let deny = LinuxDeviceCgroup { major: -1, minor: -1, access: "rwm".into(), ..Default::default() };
        let mut attached = Attached {
            devices: vec![listed("c", 1, 11), listed("b", 254, 0), listed("b", 254, 16)],
            rules: vec![],
            handed: vec![(254, 0), (254, 16)],
            limits: LinuxResources::default(),
        };
        let numbers = |a: &Attached| a.unruled().iter().map(|d| (d.major, d.minor)).collect::<Vec<_>>();
        assert_eq!(numbers(&attached), [(1, 11), (254, 0), (254, 16)]);
        attached.rules = vec![deny, rule("b", 254, 0, "r")];
        assert_eq!(numbers(&attached), [(254, 16)]);
    }

    fn device(type_: &str, id: &str, container_path: &str) -> Device {
        Device { type_: type_.into(), id: id.into(), container_path: container_path.into(), ..Default::default() }
    }

    #[test]
    fn what_cannot_be_found_is_named() {
        let fails = |device: Device| resolve(&[device], &spec()).err().unwrap();
        let unknown = fails(device("vfio-pci", "05", "/dev/data"));
        assert!(unknown.code == code::UNIMPLEMENTED && unknown.message.contains("vfio-pci"), "{unknown}");
        assert!(fails(device("blk", "05", "/dev/other")).message.contains("/dev/other"));
        assert!(fails(device("mmioblk", "05", "/dev/data")).message.contains("neither"));
        assert!(fails(device("scsi", "x", "/dev/data")).message.contains("id:lun"));
    }

    #[test]
    fn rules_move_with_their_device() {
        let rule = |type_: &str, major, minor| LinuxDeviceCgroup {
            allow: true,
            type_: type_.into(),
            major,
            minor,
            access: "rw".into(),
        };
        let mut rules = [rule("b", 8, 0), rule("c", 8, 0), rule("b", 8, 16), rule("b", 254, 0)];
        let found = [Numbers { host: (8, 0), guest: (254, 0) }, Numbers { host: (254, 0), guest: (254, 16) }];
        renumber(&mut rules, &found);
        let rate = |major, minor| LinuxThrottleDevice { major, minor, rate: 1 };
        let weight = |major, minor| LinuxWeightDevice { major, minor, weight: 10, leaf_weight: 0 };
        let mut io = LinuxBlockIO {
            weight_device: vec![weight(8, 0)],
            throttle_write_bps_device: vec![rate(254, 0), rate(8, 0), rate(7, 7)],
            ..Default::default()
        };
        renumber_limits(&mut io, &found);
        assert_eq!(io.weight_device, [weight(254, 0)]);
        assert_eq!(io.throttle_write_bps_device, [rate(254, 16), rate(254, 0), rate(7, 7)]);
        assert_eq!(rules, [rule("b", 254, 0), rule("c", 8, 0), rule("b", 8, 16), rule("b", 254, 16)]);
    }
}
