//! Where the host reaches the agent: vsock, a virtio-serial port, a unix socket.

use crate::prelude::*;
use crate::sys::{self, Fd};
use crate::{fs, log};

/// The vsock port of the agent protocol.
pub const VSOCK_PORT: u32 = 1024;
/// The name of the virtio-serial port that stands in for it.
pub const PORT_NAME: &str = "agent.channel.0";

/// A channel that the agent can be reached on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Chosen by what the machine has: vsock if its device is there, otherwise the port.
    Any,
    Vsock(u32),
    /// The virtio-serial port [`PORT_NAME`].
    Serial,
    /// A path, or an abstract name with a leading `@`.
    Unix(String),
}

impl Address {
    /// `vsock://-1:1024`, `unix:///run/agent.sock`, `unix://@name`; also `serial` and `vsock`.
    pub fn parse(text: &str) -> Result<Address> {
        let wrong = || Error::invalid(format!("server address {text:?} is not vsock://-1:PORT or unix://PATH"));
        match text {
            "serial" => return Ok(Address::Serial),
            "vsock" => return Ok(Address::Vsock(VSOCK_PORT)),
            _ => {}
        }
        if let Some(path) = text.strip_prefix("unix://") {
            return if path.is_empty() { Err(wrong()) } else { Ok(Address::Unix(path.to_string())) };
        }
        let (cid, port) = text.strip_prefix("vsock://").and_then(|t| t.split_once(':')).ok_or_else(wrong)?;
        // Only "any" can be listened on; the guest does not choose its own id.
        if cid != "-1" && cid != "4294967295" {
            return Err(wrong());
        }
        port.parse().map(Address::Vsock).map_err(|_| wrong())
    }
}

/// An open channel.
pub enum Channel {
    Listener(Fd, Kind),
    Port(Fd),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Vsock,
    Unix,
}

/// Opens the channel; waits up to `patience_ms` for a device that is still being found.
pub fn open(address: &Address, patience_ms: u64) -> Result<Channel> {
    let deadline = sys::monotonic_ns() + patience_ms * 1_000_000;
    loop {
        let tried = match address {
            Address::Any if fs::exists("/dev/vsock") && has_vsock_device() => listen_vsock(VSOCK_PORT),
            Address::Any | Address::Serial => open_port(),
            Address::Vsock(port) => listen_vsock(*port),
            Address::Unix(path) => return listen_unix(path),
        };
        match tried {
            Ok(channel) => return Ok(channel),
            Err(error) if sys::monotonic_ns() >= deadline => return Err(error),
            Err(_) => sys::sleep_ms(2),
        }
    }
}

/// True when a virtio device of type 19 (vsock) is there; the socket family exists even without a device.
fn has_vsock_device() -> bool {
    let base = "/sys/bus/virtio/devices";
    fs::names(base)
        .unwrap_or_default()
        .iter()
        .any(|name| fs::read_to_string(format!("{base}/{name}/device")).is_ok_and(|id| id.trim() == "0x0013"))
}

fn listen_vsock(port: u32) -> Result<Channel> {
    let socket = sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).context("open a vsock")?;
    // SAFETY: zero is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { core::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    sys::bind(socket.raw(), &address, core::mem::size_of_val(&address))
        .with_context(|| format!("bind vsock port {port}"))?;
    sys::listen(socket.raw(), 16).context("listen on vsock")?;
    Ok(Channel::Listener(socket, Kind::Vsock))
}

fn listen_unix(path: &str) -> Result<Channel> {
    let socket =
        sys::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).context("open a unix socket")?;
    let (address, len) = sys::unix_address(path)?;
    sys::bind(socket.raw(), &address, len).with_context(|| format!("bind {path}"))?;
    sys::listen(socket.raw(), 16).with_context(|| format!("listen on {path}"))?;
    Ok(Channel::Listener(socket, Kind::Unix))
}

fn open_port() -> Result<Channel> {
    let base = "/sys/class/virtio-ports";
    for name in fs::names(base).unwrap_or_default() {
        if fs::read_to_string(format!("{base}/{name}/name")).is_ok_and(|found| found.trim() == PORT_NAME) {
            let path = format!("/dev/{name}");
            let fd = sys::open(&path, libc::O_RDWR | libc::O_NONBLOCK, 0).with_context(|| format!("open {path}"))?;
            return Ok(Channel::Port(fd));
        }
    }
    Err(Error::unavailable(format!("neither a vsock device nor a virtio-serial port named {PORT_NAME}")))
}

/// Takes one connection from a listener. `Ok(None)`: no client is waiting, or one that is not allowed.
pub fn accept(listener: &Fd, kind: Kind) -> Result<Option<Fd>> {
    // SAFETY: zero is a valid sockaddr_vm, and its room is enough for the family of any peer.
    let mut peer: libc::sockaddr_vm = unsafe { core::mem::zeroed() };
    let socket = match sys::accept(listener.raw(), &mut peer) {
        Ok(socket) => socket,
        Err(e) if e.0 == libc::EAGAIN => return Ok(None),
        Err(e) => return Err(e).context("accept a connection"),
    };
    // A container reaches the vsock of its own guest through the loopback (CID 1): only the host may speak here.
    if kind == Kind::Vsock && (peer.svm_family != libc::AF_VSOCK as u16 || peer.svm_cid != libc::VMADDR_CID_HOST) {
        log::warn(&format!("refused a connection from vsock CID {}", peer.svm_cid));
        return accept(listener, kind);
    }
    Ok(Some(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_the_original() {
        assert_eq!(Address::parse("vsock://-1:1024"), Ok(Address::Vsock(1024)));
        assert_eq!(Address::parse("unix://@a"), Ok(Address::Unix("@a".into())));
        assert_eq!(Address::parse("serial"), Ok(Address::Serial));
        for bad in ["", "unix://", "vsock://3:1024", "vsock://-1:x", "tcp://1"] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
    }
}
