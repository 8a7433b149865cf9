//! Connections of the host to servers in the guest.

use crate::connections::{Connections, StreamTarget};
use crate::container::Containers;
use crate::internet::{self, address4, address6};
use crate::prelude::*;
use crate::process::Process;
use crate::processes::Processes;
use crate::server::calls::CallId;
use crate::server::frame::StreamPiece;
use crate::sys::{self, Errno, Fd, SysResult};

/// The guest's own addresses answer at once. Only a listener whose queue is full does not, and the loop must not wait for that.
const CONNECT_MS: i32 = 100;

/// A connection whose two directions are the streaming call.
pub fn dial(
    io: &mut Connections,
    processes: &mut Processes,
    containers: &mut Containers,
    call: CallId,
    first: &StreamPiece,
) -> Result<()> {
    let port = internet::port(first.port)?;
    let connected = match (first.address, <[u8; 4]>::try_from(first.address), <[u8; 16]>::try_from(first.address)) {
        ([], _, _) => connect4([127, 0, 0, 1], port).or_else(|e| connect6(LOOPBACK6, port).map_err(|_| e)),
        (_, Ok(address), _) => connect4(address, port),
        (_, _, Ok(address)) => connect6(address, port),
        _ => return Err(Error::invalid("an address has 4 or 16 bytes")),
    };
    let socket = connected.map_err(|e| Error::unavailable(format!("dial port {port} in the guest: {e}")))?;
    let key = processes.add(io, Process::connection(socket).context("prepare the connection")?)?;
    let target = StreamTarget { process: key, input: true, output: Some(0) };
    processes.begin_stream(io, containers, call, target, first.credit)
}

const LOOPBACK6: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

fn connect4(address: [u8; 4], port: u16) -> SysResult<Fd> {
    connect(libc::AF_INET, &address4(address, port))
}

fn connect6(address: [u8; 16], port: u16) -> SysResult<Fd> {
    connect(libc::AF_INET6, &address6(address, port))
}

fn connect<A>(family: i32, address: &A) -> SysResult<Fd> {
    let socket = sys::socket(family, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    match sys::connect(socket.raw(), address, size_of::<A>()) {
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
