//! Finds the guest's devices by their PCI path, MMIO address or serial, never by the order of their names.
//!
//! `mmio:d0001000` is the virtio device whose registers are at that physical address (hexadecimal), for machines without
//! PCI.

use crate::fs;
use crate::pci_path::{is_pci_address, names, PciPath};
use crate::pci_scan;
use crate::prelude::*;
use crate::sort::sort;
use crate::sys::{self, Errno};
use crate::uevent::await_device;
use crate::uevent::hotplug_timeout_ms;

/// The driver of virtio-fs, with a link to each of its devices.
const SHARES: &str = "/sys/bus/virtio/drivers/virtiofs";
const TAGS: &str = "/sys/fs/virtiofs";
const NET_DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";
const DEVICES: &str = "/sys/devices";
const IOMEM: &str = "/proc/iomem";
const BLOCK: &str = "/sys/block";
const SCSI_HOSTS: &str = "/sys/class/scsi_host";
const SCSI_DEVICES: &str = "/sys/class/scsi_device";
/// virtioN/block/vda is two directories down, virtioN/ndbus0/region0/namespace0.0/block/pmem0 five.
const MAX_DEPTH: usize = 6;

/// The node of a disk, named by `/dev/...`, `serial:...`, its PCI path or `mmio:...`; waits for it to appear.
pub fn find_block(address: &str) -> Result<String> {
    if address.starts_with("/dev/") {
        wait_for_block(address)?;
        return Ok(address.to_string());
    }
    match address.strip_prefix("serial:") {
        Some(serial) => find_block_by_serial(serial),
        None => find_block_by_bus(address),
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

/// The node in /dev of the disk at a PCI path or MMIO address; waits for it to appear (`agent.hotplug_timeout`).
pub fn find_block_by_bus(address: &str) -> Result<String> {
    let address = BusAddress::parse(address)?;
    let node = await_device("block", || {
        let name = address.directory(DEVICES, IOMEM)?.and_then(|directory| find_class(&directory, "block", MAX_DEPTH));
        Ok(name.map(|name| node_path(&name)).filter(|node| is_block(node)))
    })?;
    node.ok_or_else(|| absent(&format!("no disk at {address}")))
}

/// The name of the network interface at a PCI path or MMIO address; waits for it to appear.
pub fn find_interface(address: &str) -> Result<String> {
    let address = BusAddress::parse(address)?;
    let name = await_device("net", || {
        Ok(address.directory(DEVICES, IOMEM)?.and_then(|directory| find_class(&directory, "net", MAX_DEPTH)))
    })?;
    name.ok_or_else(|| absent(&format!("no network interface at {address}")))
}

/// Gives a device its driver back, if it has none (see [`unbind_interface`]).
pub fn bind_interface(address: &str) -> Result<()> {
    let Some((directory, device)) = virtio_device(address)? else { return Ok(()) };
    if fs::exists(format!("{directory}/driver")) {
        return Ok(());
    }
    match fs::write_existing(format!("{NET_DRIVER}/bind"), &device) {
        // The kernel is binding it at this moment.
        Err(Errno(libc::ENODEV | libc::EBUSY)) => Ok(()),
        other => other.with_context(|| format!("give {device} its driver")),
    }
}

/// Unbinds the network interface at a PCI path or MMIO address from its driver. It is no error if there is none.
pub fn unbind_interface(address: &str) -> Result<()> {
    let Some((directory, device)) = virtio_device(address)? else { return Ok(()) };
    if !fs::is_dir(format!("{directory}/net")) {
        return Ok(());
    }
    match fs::write_existing(format!("{directory}/driver/unbind"), &device) {
        Err(Errno(libc::ENODEV | libc::ENOENT)) => Ok(()),
        other => other.with_context(|| format!("take {device} from its driver")),
    }
}

/// Directory and name of the virtio device at a PCI path or MMIO address.
fn virtio_device(address: &str) -> Result<Option<(String, String)>> {
    let Some(directory) = BusAddress::parse(address)?.directory(DEVICES, IOMEM)? else { return Ok(None) };
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

/// Waits until there is a virtio-fs device; what it serves is known by its tag then.
pub fn wait_for_share() -> Result<()> {
    let look = || {
        let bound = fs::names(SHARES).unwrap_or_default().iter().any(|name| name.starts_with("virtio"));
        // The link is there before the driver is done with the device; Linux from 6.9 on says when it is.
        let known = fs::names(TAGS).map_or(true, |tags| !tags.is_empty());
        Ok((bound && known).then_some(()))
    };
    let found = match pci_scan::share()? {
        Some(path) => pci_scan::await_device(&path, DEVICES, look)?,
        None => await_device("virtio", look)?,
    };
    found.ok_or_else(|| absent("no virtio-fs device"))
}

fn absent(what: &str) -> Error {
    Error::not_found(format!("{what} after {} ms", hotplug_timeout_ms()))
}

/// Whether there is a disk behind a node. The node is there a moment before the disk can be opened (ENXIO).
fn is_block(node: &str) -> bool {
    let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    sys::stat(node).is_ok_and(|s| s.st_mode & libc::S_IFMT == libc::S_IFBLK)
        && !matches!(sys::open(node, flags, 0), Err(Errno(libc::ENXIO)))
}

/// sysfs has `!` where the node's name has a slash.
fn node_path(name: &str) -> String {
    format!("/dev/{}", name.replace('!', "/"))
}

/// Where a device is on the machine's buses.
#[derive(Clone, Debug, PartialEq, Eq)]
enum BusAddress {
    Pci(PciPath),
    /// The physical address of a virtio device's registers.
    Mmio(u64),
}

impl BusAddress {
    fn parse(text: &str) -> Result<BusAddress> {
        let Some(digits) = text.strip_prefix("mmio:") else { return Ok(BusAddress::Pci(PciPath::parse(text)?)) };
        parse_hex(digits)
            .map(BusAddress::Mmio)
            .ok_or_else(|| Error::invalid(format!("{text:?} is no MMIO address (hexadecimal: \"mmio:d0001000\")")))
    }

    /// The device's directory below `devices` (sysfs); `None` while it is not there.
    fn directory(&self, devices: &str, iomem: &str) -> Result<Option<String>> {
        match self {
            BusAddress::Pci(path) => path.directory(devices),
            BusAddress::Mmio(base) => mmio_directory(*base, devices, iomem),
        }
    }
}

impl core::fmt::Display for BusAddress {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            BusAddress::Pci(path) => write!(f, "PCI path {path}"),
            BusAddress::Mmio(base) => write!(f, "MMIO address {base:x}"),
        }
    }
}

fn parse_hex(digits: &str) -> Option<u64> {
    let plain = (1..=16).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

/// The platform device with its registers at `base`. A device tree has the address in its name; for one from ACPI or
/// the kernel's command line (`virtio_mmio.device=`), the list of memory regions says whose they are.
fn mmio_directory(base: u64, devices: &str, iomem: &str) -> Result<Option<String>> {
    let by_tree = format!("{base:x}.");
    let regions = fs::read_to_string(iomem).with_context(|| format!("read {iomem}"))?;
    // `  d0001000-d0001fff : LNRO0005:00`
    let owner = regions.lines().find_map(|line| {
        let (range, owner) = line.trim().split_once(" : ")?;
        let (first, _) = range.split_once('-')?;
        (parse_hex(first)? == base).then_some(owner.split(' ').next()?)
    });
    let platform = format!("{devices}/platform");
    for parent in [platform, format!("{devices}/virtio-mmio-cmdline")] {
        let found = names(&parent)?.into_iter().find(|name| owner == Some(name) || name.starts_with(&by_tree));
        if let Some(name) = found {
            return Ok(Some(format!("{parent}/{name}")));
        }
    }
    Ok(None)
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

    #[test]
    fn devices_without_pci_are_found_by_the_address_of_their_registers() {
        let sys = TempDir::new("mmio");
        sys.dir("virtio-mmio-cmdline/virtio-mmio.0/virtio0/block/vda");
        sys.dir("virtio-mmio-cmdline/virtio-mmio.1/virtio1/net/eth0");
        sys.dir("platform/LNRO0005:00/virtio2/net/eth1");
        sys.dir("platform/a003e00.virtio_mmio/virtio3/net/eth2");
        sys.file(
            "iomem",
            "00000000-00000fff : Reserved\n\
             d0000000-d0000fff : virtio-mmio.0\n  d0000000-d0000fff : virtio-mmio.0 virtio-mmio.0\n\
             d0001000-d0001fff : virtio-mmio.1\n\
             c0000000-dfffffff : PCI Bus 0000:00\n  d0002000-d0002fff : LNRO0005:00\n\
             a nonsense line\nx-y : z\n",
        );
        let iomem = format!("{}/iomem", sys.0);
        let find = |address: &str, class: &str| {
            let directory = BusAddress::parse(address).unwrap().directory(&sys.0, &iomem).unwrap()?;
            find_class(&directory, class, MAX_DEPTH)
        };
        assert_eq!(find("mmio:d0000000", "block").as_deref(), Some("vda"));
        assert_eq!(find("mmio:d0001000", "net").as_deref(), Some("eth0"));
        assert_eq!(find("mmio:D0002000", "net").as_deref(), Some("eth1"));
        assert_eq!(find("mmio:a003e00", "net").as_deref(), Some("eth2"));
        assert_eq!(find("mmio:d0001000", "block"), None, "it is no disk");
        assert_eq!(find("mmio:d0003000", "net"), None);
        assert_eq!(find("mmio:d0001", "net"), None);
        for text in ["mmio:", "mmio:0xd0001000", "mmio:-1", "mmio:+1", "mmio:d0001000.1", "mmio:11111111111111111"] {
            assert!(BusAddress::parse(text).is_err(), "{text:?}");
        }
        assert_eq!(BusAddress::parse("mmio:D0001000").unwrap().to_string(), "MMIO address d0001000");
        assert_eq!(BusAddress::parse("02/03").unwrap().to_string(), "PCI path 02/03");
    }
}
