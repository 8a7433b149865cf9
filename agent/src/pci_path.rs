//! Where a PCI device is, by the bridges on the way to it.
//!
//! A PCI path (`02/03`, `05`, `20/01`) lists slots from the root bus downwards, one bridge per step, each `slot` or
//! `slot.function` in hexadecimal. A first number above 1f is no slot: it is the root bus itself, of a host bridge of
//! its own (NUMA expander).

use crate::fs;
use crate::prelude::*;
use crate::sys::Errno;

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
    pub fn directory(&self, devices: &str) -> Result<Option<String>> {
        self.directory_of(&self.slots, devices)
    }

    /// The directory of the port that it is behind; `None` if there is none.
    pub fn port(&self, devices: &str) -> Result<Option<String>> {
        match self.slots.as_slice() {
            [ports @ .., _] if !ports.is_empty() => self.directory_of(ports, devices),
            _ => Ok(None),
        }
    }

    fn directory_of(&self, slots: &[(u8, u8)], devices: &str) -> Result<Option<String>> {
        let Some(mut directory) = self.root(devices)? else { return Ok(None) };
        for (slot, function) in slots {
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
pub fn is_pci_address(name: &str) -> bool {
    name.len() == 12 && name.as_bytes()[4] == b':' && name.as_bytes()[7] == b':' && name.as_bytes()[10] == b'.'
}

/// The entries of a directory, sorted; none where it does not exist (any more).
pub fn names(directory: &str) -> Result<Vec<String>> {
    match fs::names(directory) {
        Err(Errno(libc::ENOENT)) => Ok(Vec::new()),
        other => other.with_context(|| format!("list {directory}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
