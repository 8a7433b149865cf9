//! Swap devices (AddSwap, AddSwapPath). Their header was written by the host: the agent has no mkswap.

use crate::devices::{find_block_by_bus, wait_for_block};
use crate::prelude::*;
use crate::sys::{self, Errno};
use crate::syscall;

/// Swaps to the disk at a PCI path, given as its numbers.
pub fn add_by_pci(path: &[u32]) -> Result<()> {
    let steps: Vec<String> = path.iter().map(|slot| format!("{slot:02x}")).collect();
    add(&find_block_by_bus(&steps.join("/"))?)
}

/// Swaps to a device node.
pub fn add_by_path(path: &str) -> Result<()> {
    if !path.starts_with("/dev/") {
        return Err(Error::invalid(format!("swap device {path:?} is not below /dev")));
    }
    wait_for_block(path)?;
    add(path)
}

fn add(node: &str) -> Result<()> {
    let path = sys::cstr(node)?;
    // SAFETY: NUL-terminated path; no flags.
    match unsafe { syscall!(libc::SYS_swapon, path.as_ptr(), 0) } {
        Ok(_) => Ok(()),
        Err(Errno(libc::EINVAL)) => Err(Error::precondition(format!(
            "{node} has no swap header of this guest's page size: it takes mkswap on the host"
        ))),
        Err(Errno(libc::EBUSY)) => Err(Error::exists(format!("{node} is in use already"))),
        Err(Errno(libc::ENOSYS)) => Err(Error::unimplemented("the guest kernel cannot swap")),
        Err(e) => Err(e).with_context(|| format!("swap to {node}")),
    }
}
