//! The kernel's announcements of devices (netlink, NETLINK_KOBJECT_UEVENT).

use crate::fs;
use crate::prelude::*;
use crate::sys::{self, Errno, Fd, SysResult};

/// The multicast group of the kernel's own messages; udev's are in another.
const KERNEL_GROUP: u32 = 1;
/// One message: the kernel's buffer for it is 2 KiB.
const MAX_MESSAGE: usize = 4096;
/// The longest pause between two looks: should an announcement be lost, the device is found all the same.
const LOOK_AGAIN_MS: u64 = 500;

/// How long a device may take to appear, unless `agent.hotplug_timeout` says otherwise. The share of a machine that went
/// on from a template is waited for while the host still plugs it in, which takes seconds on a busy one.
const HOTPLUG_TIMEOUT_S: u64 = 10;

/// How long to wait for a device, in milliseconds: `agent.hotplug_timeout` (seconds) of the kernel command line. Read
/// each time, because waiting is rare and the children that wait do not have the settings.
pub fn hotplug_timeout_ms() -> u64 {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    parse_timeout(&line).unwrap_or(HOTPLUG_TIMEOUT_S).saturating_mul(1000)
}

fn parse_timeout(line: &str) -> Option<u64> {
    line.split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("agent.hotplug_timeout="))
        .next_back()?
        .parse()
        .ok()
}

/// Looks for a device until it is there or `agent.hotplug_timeout` is over, woken by the announcements of its subsystem.
/// Everything that belongs to a device, its node in /dev included, is there before it is announced.
pub fn await_device<T>(subsystem: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    // Most devices are there already: then no socket is needed.
    if let Some(found) = look()? {
        return Ok(Some(found));
    }
    let deadline = sys::monotonic_ns().saturating_add(hotplug_timeout_ms().saturating_mul(1_000_000));
    let socket = open().context("listen for devices")?;
    loop {
        // Only after the socket was opened, so that no announcement is missed in between.
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        if !wait(&socket, subsystem, deadline) {
            return Ok(None);
        }
    }
}

fn open() -> SysResult<Fd> {
    let socket = sys::socket(libc::AF_NETLINK, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, libc::NETLINK_KOBJECT_UEVENT)?;
    // struct sockaddr_nl: family and padding, port (0: the kernel chooses), groups.
    let address = [libc::AF_NETLINK as u32, 0, KERNEL_GROUP];
    sys::bind(socket.raw(), &address, core::mem::size_of_val(&address))?;
    Ok(socket)
}

/// Waits until another look may find the device; false at the deadline.
fn wait(socket: &Fd, subsystem: &str, deadline: u64) -> bool {
    let again = sys::monotonic_ns() + LOOK_AGAIN_MS * 1_000_000;
    let mut message = vec![0u8; MAX_MESSAGE];
    loop {
        let now = sys::monotonic_ns();
        if now >= deadline {
            return false;
        }
        let left = deadline.min(again).saturating_sub(now).div_ceil(1_000_000) as i32;
        if left == 0 || sys::poll_one(socket.raw(), libc::POLLIN, left) == Ok(0) {
            return sys::monotonic_ns() < deadline;
        }
        match sys::recv(socket.raw(), &mut message, 0) {
            Ok(length) if concerns(&message[..length], subsystem) => return true,
            // Messages were lost: any of them may have been the one.
            Err(Errno(libc::ENOBUFS)) => return true,
            _ => {}
        }
    }
}

/// Whether a message announces a new or changed device of a subsystem: "add@/devices/...", then NUL-terminated
/// variables.
fn concerns(message: &[u8], subsystem: &str) -> bool {
    let mut variables = message.split(|byte| *byte == 0);
    let header = variables.next().unwrap_or_default();
    ["add@", "change@", "bind@", "online@"].iter().any(|action| header.starts_with(action.as_bytes()))
        && variables.any(|variable| variable.strip_prefix(b"SUBSYSTEM=") == Some(subsystem.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_to_wait_comes_from_the_command_line() {
        assert_eq!(parse_timeout("quiet agent.hotplug_timeout=5 agent.hotplug_timeout=9\n"), Some(9));
        assert_eq!(parse_timeout("quiet agent.hotplug_timeout=soon"), None);
        assert_eq!(parse_timeout(""), None);
    }

    #[test]
    fn announcements_are_told_apart() {
        let message =
            b"add@/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb\0ACTION=add\0SUBSYSTEM=block\0MAJOR=254\0";
        assert!(concerns(message, "block"));
        assert!(!concerns(message, "net") && !concerns(message, "bloc"));
        assert!(!concerns(&message[1..], "block"));
        assert!(!concerns(b"remove@/x\0SUBSYSTEM=block\0", "block") && !concerns(b"", "block"));
    }

    #[test]
    fn the_socket_opens_and_a_deadline_ends_the_wait() {
        let socket = open().unwrap();
        assert!(!wait(&socket, "no-such-subsystem", sys::monotonic_ns() + 2_000_000));
    }
}
