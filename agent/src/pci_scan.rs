//! Looking for a device that nothing announces.
//!
//! A machine with next to no ACPI does not tell its guest what is plugged into a PCI Express port. Where its share by
//! virtio-fs comes while the sandbox is already being made, the kernel command line says so, and at which PCI path:
//! `agent.pci_scan=04/00`. Then the agent has the kernel look at the bus behind the port (`rescan`,
//! Documentation/ABI/testing/sysfs-bus-pci).

use crate::fs;
use crate::pci_path::PciPath;
use crate::prelude::*;
use crate::sys::{self, Errno};
use crate::uevent::hotplug_timeout_ms;

const PARAMETER: &str = "agent.pci_scan=";
const COMMAND_LINE: &str = "/proc/cmdline";
/// Pause between two looks. Once its code is known to an emulator, a look at an empty port takes a fraction of that.
const LOOK_AGAIN_MS: u64 = 4;

/// Where the share by virtio-fs will be, if nothing announces it. Read each time, as [`hotplug_timeout_ms`].
pub fn share() -> Result<Option<PciPath>> {
    parameter(&fs::read_to_string(COMMAND_LINE).unwrap_or_default()).map(PciPath::parse).transpose()
}

fn parameter(line: &str) -> Option<&str> {
    line.split_ascii_whitespace().find_map(|word| word.strip_prefix(PARAMETER))
}

/// Has the kernel look for a device behind its port until it is there or `agent.hotplug_timeout` is over.
///
/// `devices` is sysfs' directory of devices, and `look` says whether the device can be used.
pub fn await_device<T>(
    path: &PciPath,
    devices: &str,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<Option<T>> {
    let deadline = sys::monotonic_ns().saturating_add(hotplug_timeout_ms().saturating_mul(1_000_000));
    let mut found = look()?;
    while found.is_none() {
        // Its driver has taken it when this returns.
        scan(path, devices)?;
        found = look()?;
        if found.is_none() {
            if sys::monotonic_ns() >= deadline {
                break;
            }
            sys::sleep_ms(LOOK_AGAIN_MS);
        }
    }
    Ok(found)
}

/// Has the kernel look once; whether there is such a port.
fn scan(path: &PciPath, devices: &str) -> Result<bool> {
    let Some(port) = path.port(devices)? else { return Ok(false) };
    let buses = format!("{port}/pci_bus");
    let bus = match fs::names(&buses) {
        Ok(names) => names.into_iter().next(),
        Err(Errno(libc::ENOENT)) => None,
        Err(error) => return Err(error).with_context(|| format!("list {buses}")),
    };
    let Some(bus) = bus else { return Ok(false) };
    let file = format!("{buses}/{bus}/rescan");
    fs::write_existing(&file, "1").with_context(|| format!("have the kernel look for devices by {file}"))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    #[test]
    fn the_command_line_says_whether_and_where() {
        assert_eq!(parameter("quiet agent.pci_scan=04/00 rw"), Some("04/00"));
        assert_eq!(parameter("quiet agent.pci_scans=1 pci_scan=1 agent.pci_scan"), None);
    }

    #[test]
    fn the_bus_behind_the_port_is_scanned_until_the_device_is_there() {
        let sys = TempDir::new("pci-scan");
        sys.dir("pci0000:00/0000:00:04.0/pci_bus/0000:01");
        sys.file("pci0000:00/0000:00:04.0/pci_bus/0000:01/rescan", "");
        let path = PciPath::parse("04/00").unwrap();
        let mut looks = 0;
        let found = await_device(&path, &sys.0, || {
            looks += 1;
            Ok((looks == 4).then_some(looks))
        });
        assert_eq!(found, Ok(Some(4)));
        let written = fs::read_to_string(format!("{}/pci0000:00/0000:00:04.0/pci_bus/0000:01/rescan", sys.0));
        assert_eq!(written.as_deref(), Ok("1"));
        // A device on the root bus has no port, and another port is not there.
        assert_eq!(scan(&PciPath::parse("05").unwrap(), &sys.0), Ok(false));
        assert_eq!(scan(&PciPath::parse("0c/00").unwrap(), &sys.0), Ok(false));
    }
}
