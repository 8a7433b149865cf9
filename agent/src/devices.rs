//! Finds the guest's device nodes by their PCI path or serial, never by the order of their names.
//!
//! A PCI path (`02/03`, `05`, `20/01`) lists slots from the root bus downwards, one bridge per step, each `slot` or
//! `slot.function` in hexadecimal. A first number above 1f is no slot: it is the root bus itself, of a host bridge of
//! its own (NUMA expander).

use crate::fs;
use crate::prelude::*;
use crate::sort::sort;
use crate::sys::{self, Errno};
use crate::uevent::await_device;
use crate::uevent::hotplug_timeout_ms;

const NET_DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";
const DEVICES: &str = "/sys/devices";
const BLOCK: &str = "/sys/block";
const SCSI_HOSTS: &str = "/sys/class/scsi_host";
const SCSI_DEVICES: &str = "/sys/class/scsi_device";
/// virtioN/block/vda is two directories down, virtioN/ndbus0/region0/namespace0.0/block/pmem0 five.
const MAX_DEPTH: usize = 6;

/// The node of a disk, named by `/dev/...`, `serial:...` or its PCI path; waits for it to appear.
pub fn find_block(address: &str) -> Result<String> {
    if address.starts_with("/dev/") {
        wait_for_block(address)?;
        return Ok(address.to_string());
    }
    match address.strip_prefix("serial:") {
        Some(serial) => find_block_by_serial(serial),
        None => find_block_by_pci(address),
    }
}

/// The node of the SCSI disk with this `id:lun`, on whichever host adapter; waits for it to appear.
pub fn find_block_by_scsi(address: &str) -> Result<String> {
    let number = |text: &str| text.parse::<u16>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    let parsed = address.split_once(':').and_then(|(id, lun)| Some((number(id)?, number(lun)?)));
    let (id, lun) = parsed.ok_or_else(|| Error::invalid(format!("{address:?} is no SCSI address (id:lun)")))?;
    let hosts = names(SCSI_HOSTS)?;
    if hosts.is_empty() {
        return Err(Error::precondition("the guest has no SCSI host adapter (or its kernel no driver for it)"));
    }
    // Adapters do not announce a disk that was plugged in before they were scanned.
    for host in &hosts {
        fs::write_existing(format!("{SCSI_HOSTS}/{host}/scan"), &format!("0 {id} {lun}"))
            .with_context(|| format!("make {host} look for SCSI device {address}"))?;
    }
    let suffix = format!(":0:{id}:{lun}");
    let node = await_device("block", || {
        let devices = names(SCSI_DEVICES)?;
        let found = devices
            .iter()
            .filter(|name| name.ends_with(&suffix))
            .find_map(|name| names(&format!("{SCSI_DEVICES}/{name}/device/block")).ok()?.into_iter().next());
        Ok(found.map(|name| node_path(&name)).filter(|node| is_block(node)))
    })?;
    node.ok_or_else(|| absent(&format!("no disk at SCSI address {address}")))
}

/// The node in /dev of the disk at a PCI path; waits for it to appear (`agent.hotplug_timeout`).
pub fn find_block_by_pci(path: &str) -> Result<String> {
    let path = PciPath::parse(path)?;
    let node = await_device("block", || {
        let name = path.directory(DEVICES)?.and_then(|directory| find_class(&directory, "block", MAX_DEPTH));
        Ok(name.map(|name| node_path(&name)).filter(|node| is_block(node)))
    })?;
    node.ok_or_else(|| absent(&format!("no disk at PCI path {path}")))
}

/// The name of the network interface at a PCI path; waits for it to appear.
pub fn find_interface_by_pci(path: &str) -> Result<String> {
    let path = PciPath::parse(path)?;
    let name = await_device("net", || {
        Ok(path.directory(DEVICES)?.and_then(|directory| find_class(&directory, "net", MAX_DEPTH)))
    })?;
    name.ok_or_else(|| absent(&format!("no network interface at PCI path {path}")))
}

/// Gives the device at a PCI path its driver back, if it has none (see [`unbind_interface`]).
pub fn bind_interface(path: &str) -> Result<()> {
    let Some((directory, device)) = virtio_device(path)? else { return Ok(()) };
    if fs::exists(format!("{directory}/driver")) {
        return Ok(());
    }
    match fs::write_existing(format!("{NET_DRIVER}/bind"), &device) {
        // The kernel is binding it at this moment.
        Err(Errno(libc::ENODEV | libc::EBUSY)) => Ok(()),
        other => other.with_context(|| format!("give {device} its driver")),
    }
}

/// Unbinds the network interface at a PCI path from its driver. It is no error if there is none.
pub fn unbind_interface(path: &str) -> Result<()> {
    let Some((directory, device)) = virtio_device(path)? else { return Ok(()) };
    if !fs::is_dir(format!("{directory}/net")) {
        return Ok(());
    }
    match fs::write_existing(format!("{directory}/driver/unbind"), &device) {
        Err(Errno(libc::ENODEV | libc::ENOENT)) => Ok(()),
        other => other.with_context(|| format!("take {device} from its driver")),
    }
}

/// Directory and name of the virtio device at a PCI path.
fn virtio_device(path: &str) -> Result<Option<(String, String)>> {
    let Some(directory) = PciPath::parse(path)?.directory(DEVICES)? else { return Ok(None) };
    let device = names(&directory)?.into_iter().find(|name| name.starts_with("virtio"));
    Ok(device.map(|device| (format!("{directory}/{device}"), device)))
}

/// The node of the virtio disk with this serial; waits for it to appear.
pub fn find_block_by_serial(serial: &str) -> Result<String> {
    let node = await_device("block", || {
        let names = fs::names(BLOCK).with_context(|| format!("list {BLOCK}"))?;
        let found = names.iter().find(|name| {
            fs::read_to_string(format!("{BLOCK}/{name}/serial")).is_ok_and(|text| text.trim_end_matches('\n') == serial)
        });
        Ok(found.map(|name| node_path(name)).filter(|node| is_block(node)))
    })?;
    node.ok_or_else(|| absent(&format!("no disk with serial {serial:?}")))
}

/// Waits until a block device node is there.
pub fn wait_for_block(node: &str) -> Result<()> {
    let found = await_device("block", || Ok(is_block(node).then_some(())))?;
    found.ok_or_else(|| absent(&format!("no block device {node}")))
}

fn absent(what: &str) -> Error {
    Error::not_found(format!("{what} after {} ms", hotplug_timeout_ms()))
}

fn is_block(node: &str) -> bool {
    sys::stat(node).is_ok_and(|s| s.st_mode & libc::S_IFMT == libc::S_IFBLK)
}

/// sysfs has `!` where the node's name has a slash.
fn node_path(name: &str) -> String {
    format!("/dev/{}", name.replace('!', "/"))
}

/// A parsed PCI path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciPath {
    root_bus: u8,
    /// (slot, function), the root bus's first.
    slots: Vec<(u8, u8)>,
}

impl PciPath {
    pub fn parse(text: &str) -> Result<PciPath> {
        let invalid = || {
            Error::invalid(format!("{text:?} is no PCI path (slots in hexadecimal, from the root: \"05\", \"02/03\")"))
        };
        let mut path = PciPath { root_bus: 0, slots: Vec::new() };
        for (at, step) in text.split('/').enumerate() {
            let (slot, function) = step.split_once('.').unwrap_or((step, "0"));
            let parse = |digits: &str, most: usize| {
                let plain = (1..=most).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
                plain.then(|| u8::from_str_radix(digits, 16).ok()).flatten().ok_or_else(invalid)
            };
            match (parse(slot, 2)?, parse(function, 1)?) {
                (bus, _) if at == 0 && bus > 0x1f && !step.contains('.') => path.root_bus = bus,
                (0..=0x1f, function @ 0..=7) => path.slots.push((parse(slot, 2)?, function)),
                _ => return Err(invalid()),
            }
        }
        if path.slots.is_empty() || path.slots.len() > 32 {
            return Err(invalid());
        }
        Ok(path)
    }

    /// The device's directory below `devices` (sysfs); `None` while it is not there.
    fn directory(&self, devices: &str) -> Result<Option<String>> {
        let Some(mut directory) = self.root(devices)? else { return Ok(None) };
        for (slot, function) in &self.slots {
            // Domain and bus in front of it are the kernel's choice.
            let suffix = format!(":{slot:02x}.{function}");
            let name = names(&directory)?.into_iter().find(|name| is_pci_address(name) && name.ends_with(&suffix));
            match name {
                Some(name) => directory = format!("{directory}/{name}"),
                None => return Ok(None),
            }
        }
        Ok(Some(directory))
    }

    /// The root bus: below a platform device on machines whose firmware is a device tree.
    fn root(&self, devices: &str) -> Result<Option<String>> {
        let bus = format!("pci0000:{:02x}", self.root_bus);
        let direct = format!("{devices}/{bus}");
        if fs::is_dir(&direct) {
            return Ok(Some(direct));
        }
        let platform = format!("{devices}/platform");
        let candidates = names(&platform)?.into_iter().map(|name| format!("{platform}/{name}/{bus}"));
        Ok(candidates.into_iter().find(|directory| fs::is_dir(directory)))
    }
}

impl core::fmt::Display for PciPath {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.root_bus != 0 {
            write!(f, "{:02x}/", self.root_bus)?;
        }
        for (at, (slot, function)) in self.slots.iter().enumerate() {
            let separator = if at == 0 { "" } else { "/" };
            write!(f, "{separator}{slot:02x}")?;
            if *function != 0 {
                write!(f, ".{function}")?;
            }
        }
        Ok(())
    }
}

/// `0000:00:05.0`
fn is_pci_address(name: &str) -> bool {
    name.len() == 12 && name.as_bytes()[4] == b':' && name.as_bytes()[7] == b':' && name.as_bytes()[10] == b'.'
}

/// The entries of a directory, sorted; none where it does not exist (any more).
fn names(directory: &str) -> Result<Vec<String>> {
    match fs::names(directory) {
        Err(Errno(libc::ENOENT)) => Ok(Vec::new()),
        other => other.with_context(|| format!("list {directory}")),
    }
}

/// The first entry of a directory called `class` in a device's part of sysfs, not crossing into other PCI devices.
fn find_class(directory: &str, class: &str, depth: usize) -> Option<String> {
    if let Some(name) =
        fs::names(format!("{directory}/{class}").as_str()).ok().and_then(|names| names.into_iter().next())
    {
        return Some(name);
    }
    if depth == 0 {
        return None;
    }
    let entries = fs::read_dir(directory).ok()?;
    let mut children: Vec<String> = entries
        .into_iter()
        .filter(|entry| entry.kind == libc::DT_DIR)
        .map(|entry| String::from_utf8_lossy(&entry.name).into_owned())
        .filter(|name| !is_pci_address(name))
        .collect();
    sort(&mut children);
    children.iter().find_map(|child| find_class(&format!("{directory}/{child}"), class, depth - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    #[test]
    fn paths_are_parsed_and_printed() {
        for text in ["05", "02/03", "20/01", "02/03.1", "1f/00/0a"] {
            assert_eq!(PciPath::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(PciPath::parse("5").unwrap(), PciPath::parse("05").unwrap());
        for text in ["", "/", "05/", "/05", "05/20", "20", "5g", "005", "05.8", "../05", "05.0.0", "+5", "20.0/01"] {
            assert!(PciPath::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn devices_are_found_behind_their_bridges() {
        let sys = TempDir::new("pci");
        sys.dir("pci0000:00/0000:00:05.0/virtio3/block/vdb");
        sys.dir("pci0000:00/0000:00:02.0/0000:01:03.0/virtio4/net/eth7");
        sys.dir("pci0000:00/0000:00:06.0/virtio5/ndbus0/region0/namespace0.0/block/pmem0");
        sys.dir("platform/4010000000.pcie/pci0000:20/0000:20:01.0/virtio9/block/vdz");
        let find = |path: &str, class: &str| {
            let directory = PciPath::parse(path).unwrap().directory(&sys.0).unwrap()?;
            find_class(&directory, class, MAX_DEPTH)
        };
        assert_eq!(find("05", "block").as_deref(), Some("vdb"));
        assert_eq!(find("02/03", "net").as_deref(), Some("eth7"));
        assert_eq!(find("06", "block").as_deref(), Some("pmem0"));
        assert_eq!(find("20/01", "block").as_deref(), Some("vdz"));
        assert_eq!(find("02", "net"), None, "a device behind a bridge is not the bridge's");
        assert_eq!(find("05", "net"), None);
        assert_eq!(find("07", "block"), None);
        assert_eq!(find("21/01", "block"), None);
    }
}
