//! Connections of the host to what listens on the guest's loopback.

use crate::agent::Agent;
use crate::prelude::*;
use crate::process::Process;
use crate::server::calls::CallId;
use crate::server::frame::StreamPiece;
use crate::sys::{self, Errno, Fd, SysResult};

/// Loopback answers at once. Only a listener whose queue is full does not, and the loop must not wait for that.
const CONNECT_MS: i32 = 100;
const SOCKADDR_LEN: usize = 16;
const SOCKADDR6_LEN: usize = 28;

impl Agent {
    /// A connection whose two directions are the streaming call.
    pub fn dial(&mut self, call: CallId, first: &StreamPiece) -> Result<()> {
        let port = u16::try_from(first.port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| Error::invalid(format!("{} is not a TCP port", first.port)))?;
        let socket = connect4(port)
            .or_else(|e| connect6(port).map_err(|_| e))
            .map_err(|e| Error::unavailable(format!("dial localhost:{port} in the guest: {e}")))?;
        let key = self.add_process(Process::connection(socket).context("prepare the connection")?)?;
        self.begin_stream(call, key, true, Some(0), first.credit)
    }
}

fn connect4(port: u16) -> SysResult<Fd> {
    // struct sockaddr_in: family, port and address in network byte order.
    let mut address = [0u8; SOCKADDR_LEN];
    address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&port.to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    connect(libc::AF_INET, &address, SOCKADDR_LEN)
}

fn connect6(port: u16) -> SysResult<Fd> {
    // struct sockaddr_in6: family, port, flow, address, scope.
    let mut address = [0u8; SOCKADDR6_LEN];
    address[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&port.to_be_bytes());
    address[23] = 1;
    connect(libc::AF_INET6, &address, SOCKADDR6_LEN)
}

fn connect<A>(family: i32, address: &A, len: usize) -> SysResult<Fd> {
    let socket = sys::socket(family, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    match sys::connect(socket.raw(), address, len) {
        Ok(()) => return Ok(socket),
        Err(Errno(libc::EINPROGRESS)) => {}
        Err(e) => return Err(e),
    }
    match sys::poll_one(socket.raw(), libc::POLLOUT, CONNECT_MS)? {
        0 => Err(Errno(libc::ETIMEDOUT)),
        events if events & (libc::POLLERR | libc::POLLHUP) != 0 => Err(Errno(libc::ECONNREFUSED)),
        _ => Ok(socket),
    }
}
