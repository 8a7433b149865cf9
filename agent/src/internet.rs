//! Internet addresses as the kernel takes them, and sockets of the loopback that leave their port to others.

use crate::prelude::*;
use crate::sys::{self, Fd, SysResult};
use crate::{log, sk_lookup};

/// struct sockaddr_in: family, port and address, both in network byte order, and nothing.
pub type Address4 = [u8; 16];
/// struct sockaddr_in6: family, port, flow, address, scope.
pub type Address6 = [u8; 28];

/// Connections that wait in the kernel; connect(2) waits above that.
const BACKLOG: i32 = 128;

pub fn address4(address: [u8; 4], port: u16) -> Address4 {
    let mut out = [0; 16];
    out[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    out[2..4].copy_from_slice(&port.to_be_bytes());
    out[4..8].copy_from_slice(&address);
    out
}

pub fn address6(address: [u8; 16], port: u16) -> Address6 {
    let mut out = [0; 28];
    out[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
    out[2..4].copy_from_slice(&port.to_be_bytes());
    out[8..24].copy_from_slice(&address);
    out
}

/// A port number as it comes in a message.
pub fn port(number: u32) -> Result<u16> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| Error::invalid(format!("{number} is not a port number")))
}

/// A non-blocking socket that has a port of a loopback address.
pub struct Loopback {
    pub address: [u8; 4],
    pub port: u16,
    pub fd: Fd,
    /// The BPF link that gives it the port; `None` if the socket itself is bound to the port.
    pub link: Option<Fd>,
}

/// Makes one, of UDP or (listening) of TCP. The port stays free for a container's program that binds it on every
/// address. Where the kernel has no sk_lookup, the port is bound and so taken.
pub fn loopback(address: &[u8], port: u16, datagrams: bool) -> Result<Loopback> {
    let address: [u8; 4] = address
        .try_into()
        .ok()
        .filter(|address: &[u8; 4]| address[0] == 127)
        .ok_or_else(|| Error::invalid("a socket of the loopback needs four bytes of 127.0.0.0/8"))?;
    let (kind, protocol) =
        if datagrams { (libc::SOCK_DGRAM, libc::IPPROTO_UDP) } else { (libc::SOCK_STREAM, libc::IPPROTO_TCP) };
    let bound = |to: u16| -> SysResult<Fd> {
        let socket = sys::socket(libc::AF_INET, kind | libc::SOCK_NONBLOCK, 0)?;
        if !datagrams {
            // Connections keep the port in use, for a while even after their end.
            sys::setsockopt_int(socket.raw(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        }
        sys::bind(socket.raw(), &address4(address, to), 16)?;
        if !datagrams {
            sys::listen(socket.raw(), BACKLOG)?;
        }
        Ok(socket)
    };
    let name = || format!("listen on port {port} of the loopback");
    let fd = bound(0).with_context(name)?;
    match sk_lookup::attach(fd.raw(), protocol, address, port) {
        Ok(link) => Ok(Loopback { address, port, fd, link: Some(link) }),
        Err(e) => {
            log::warn(&format!("port {port} of the loopback is taken, no container can have it: sk_lookup: {e}"));
            Ok(Loopback { address, port, fd: bound(port).with_context(name)?, link: None })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Errno;

    #[test]
    fn a_port_of_the_loopback_is_left_to_others() {
        let place = [127, 0, 0, 11];
        let mut peer: Address4 = [0; 16];
        let listener = loopback(&place, 4243, false).unwrap();
        if listener.link.is_none() {
            return; // a kernel without sk_lookup, or no right to it
        }
        let client = sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
        sys::connect(client.raw(), &address4(place, 4243), 16).unwrap();
        assert!(sys::accept(listener.fd.raw(), &mut peer).is_ok());
        // A program that binds it on every address gets it, except on this address.
        let other = sys::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).unwrap();
        // As servers do; connections of the first one are still there.
        sys::setsockopt_int(other.raw(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).unwrap();
        sys::bind(other.raw(), &address4([0; 4], 4243), 16).unwrap();
        sys::listen(other.raw(), 1).unwrap();
        let clients = [place, [127, 0, 0, 1]].map(|address| {
            let client = sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
            sys::connect(client.raw(), &address4(address, 4243), 16).map(|()| client).unwrap()
        });
        assert!(sys::accept(listener.fd.raw(), &mut peer).is_ok());
        assert!(sys::accept(other.raw(), &mut peer).is_ok());
        assert_eq!(sys::accept(listener.fd.raw(), &mut peer).map(|_| ()), Err(Errno(libc::EAGAIN)));
        drop(clients);
        assert!(loopback(&[10, 0, 0, 1], 4243, false).is_err());
        assert!(loopback(&[127, 0, 0], 4243, false).is_err());
        assert!(port(0).is_err() && port(65536).is_err());
    }
}
