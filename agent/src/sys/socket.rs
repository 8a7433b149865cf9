//! Sockets: unix, vsock, netlink.

use super::call::{retry, SysResult};
use super::file::{Fd, RawFd};
use crate::prelude::*;
use crate::syscall;

pub fn socket(domain: i32, kind: i32, protocol: i32) -> SysResult<Fd> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_socket, domain, kind | libc::SOCK_CLOEXEC, protocol) }
        .map(|fd| Fd::from_raw(fd as RawFd))
}

pub fn socketpair(kind: i32) -> SysResult<(Fd, Fd)> {
    let mut ends = [0i32; 2];
    // SAFETY: the kernel writes two ints.
    unsafe { syscall!(libc::SYS_socketpair, libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) }?;
    Ok((Fd::from_raw(ends[0]), Fd::from_raw(ends[1])))
}

/// `address` is a `sockaddr_*` structure.
pub fn bind<A>(fd: RawFd, address: &A, len: usize) -> SysResult<()> {
    debug_assert!(len <= core::mem::size_of::<A>());
    // SAFETY: the address is valid for `len` bytes.
    unsafe { syscall!(libc::SYS_bind, fd, core::ptr::from_ref(address), len) }.map(drop)
}

pub fn connect<A>(fd: RawFd, address: &A, len: usize) -> SysResult<()> {
    debug_assert!(len <= core::mem::size_of::<A>());
    // SAFETY: the address is valid for `len` bytes.
    retry(|| unsafe { syscall!(libc::SYS_connect, fd, core::ptr::from_ref(address), len) }).map(drop)
}

pub fn listen(fd: RawFd, backlog: i32) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_listen, fd, backlog) }.map(drop)
}

/// Non-blocking, CLOEXEC; the peer's address goes to `address` (a `sockaddr_*`).
pub fn accept<A>(fd: RawFd, address: &mut A) -> SysResult<Fd> {
    let mut len = core::mem::size_of::<A>() as u32;
    // SAFETY: the address is valid for `len` bytes, which the kernel never exceeds.
    retry(|| unsafe {
        syscall!(
            libc::SYS_accept4,
            fd,
            core::ptr::from_mut(address),
            &raw mut len,
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK
        )
    })
    .map(|fd| Fd::from_raw(fd as RawFd))
}

/// `how`: SHUT_*.
pub fn shutdown(fd: RawFd, how: i32) -> SysResult<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_shutdown, fd, how) }.map(drop)
}

/// `flags`: MSG_*.
pub fn send(fd: RawFd, buf: &[u8], flags: i32) -> SysResult<usize> {
    // SAFETY: the buffer is valid for its length.
    retry(|| unsafe { syscall!(libc::SYS_sendto, fd, buf.as_ptr(), buf.len(), flags, 0, 0) })
}

pub fn recv(fd: RawFd, buf: &mut [u8], flags: i32) -> SysResult<usize> {
    // SAFETY: the buffer is valid for its length.
    retry(|| unsafe { syscall!(libc::SYS_recvfrom, fd, buf.as_mut_ptr(), buf.len(), flags, 0, 0) })
}

/// A datagram; the sender's address goes to `address` (a `sockaddr_*`). With MSG_TRUNC the whole length of one that is
/// longer than the buffer.
pub fn recv_from<A>(fd: RawFd, buf: &mut [u8], flags: i32, address: &mut A) -> SysResult<usize> {
    let mut len = core::mem::size_of::<A>() as u32;
    // SAFETY: buffer and address are valid for their lengths, which the kernel never exceeds.
    retry(|| unsafe {
        syscall!(libc::SYS_recvfrom, fd, buf.as_mut_ptr(), buf.len(), flags, core::ptr::from_mut(address), &raw mut len)
    })
}

/// `address` is a `sockaddr_*` structure.
pub fn send_to<A>(fd: RawFd, buf: &[u8], address: &A) -> SysResult<usize> {
    let len = core::mem::size_of::<A>();
    // SAFETY: buffer and address are valid for their lengths.
    retry(|| unsafe { syscall!(libc::SYS_sendto, fd, buf.as_ptr(), buf.len(), 0, core::ptr::from_ref(address), len) })
}

/// An integer socket option.
pub fn setsockopt_int(fd: RawFd, level: i32, name: i32, value: i32) -> SysResult<()> {
    // SAFETY: the value is four bytes, as passed.
    unsafe { syscall!(libc::SYS_setsockopt, fd, level, name, &raw const value, 4) }.map(drop)
}

/// struct cmsghdr {size_t len; int level; int type;} and one int, padded.
type Control = [u64; 3];
const CONTROL_LEN: u64 = 20;
const RIGHTS: u64 = (libc::SOL_SOCKET as u64) | ((libc::SCM_RIGHTS as u64) << 32);

/// Sends one message, with a descriptor if there is one. The data must not be empty.
pub fn send_with_fd(socket: RawFd, data: &[u8], fd: Option<RawFd>) -> SysResult<usize> {
    let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let mut control: Control = [CONTROL_LEN, RIGHTS, u64::from(fd.unwrap_or(0) as u32)];
    // SAFETY: zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    if fd.is_some() {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = core::mem::size_of::<Control>();
    }
    // SAFETY: all pointers in the message outlive the call; the kernel only reads the data.
    retry(|| unsafe { syscall!(libc::SYS_sendmsg, socket, &raw const message, libc::MSG_NOSIGNAL) })
}

/// Receives one message: its length (0 = end of file) and a descriptor if one came along.
pub fn recv_with_fd(socket: RawFd, data: &mut [u8]) -> SysResult<(usize, Option<Fd>)> {
    let mut iov = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let mut control: Control = [0; 3];
    // SAFETY: zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = core::mem::size_of::<Control>();
    // SAFETY: all pointers in the message outlive the call.
    let n = retry(|| unsafe { syscall!(libc::SYS_recvmsg, socket, &raw mut message, libc::MSG_CMSG_CLOEXEC) })?;
    let came = message.msg_controllen as u64 >= CONTROL_LEN && control[0] >= CONTROL_LEN && control[1] == RIGHTS;
    Ok((n, came.then(|| Fd::from_raw(control[2] as u32 as RawFd))))
}

/// A `sockaddr_un` for a path, or for an abstract name when it starts with `@`; and its length.
pub fn unix_address(path: &str) -> Result<(libc::sockaddr_un, usize)> {
    // SAFETY: zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { core::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    if path.len() >= address.sun_path.len() || path.is_empty() || path.contains('\0') {
        return Err(Error::invalid(format!("unix socket path {path:?} is empty or longer than 107 bytes")));
    }
    for (slot, byte) in address.sun_path.iter_mut().zip(path.bytes()) {
        *slot = byte as core::ffi::c_char;
    }
    if path.starts_with('@') {
        address.sun_path[0] = 0;
        return Ok((address, 2 + path.len()));
    }
    Ok((address, 2 + path.len() + 1))
}
