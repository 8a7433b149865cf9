//! Sockets of the guest that stand for ones of the host.
//!
//! Who connects to one is carried to the host by a streaming call that the host has made beforehand. A connection is
//! only taken from the kernel's queue when there is such a call: how many there may be at a time is the host's choice,
//! and who comes above that waits as with any listener that is busy.

use crate::agent::{Agent, Token};
use crate::datagrams::Datagrams;
use crate::prelude::*;
use crate::process::Process;
use crate::proto::agentext::{CloseSocketRequest, ListenSocketRequest};
use crate::server::calls::CallId;
use crate::server::frame::{self, StreamPiece};
use crate::sys::{self, Errno, Fd, RawFd, SysResult};
use crate::{fs, internet, log};
use alloc::collections::VecDeque;

/// Connections that wait in the kernel; connect(2) waits above that.
const BACKLOG: i32 = 128;

/// A listening socket, or one of datagrams.
pub struct Socket {
    /// Of a unix socket.
    path: Option<String>,
    pub fd: Fd,
    /// Of one of the loopback: what keeps its port.
    _link: Option<Fd>,
    pub datagrams: Option<Datagrams>,
    /// Streaming calls, each with its first credit, that wait for a connection.
    waiting: VecDeque<(CallId, u32)>,
}

impl Socket {
    fn unix(request: &ListenSocketRequest) -> Result<Socket> {
        let fd = listen(&request.path, request.mode, request.uid, request.gid)?;
        Ok(Socket { path: Some(request.path.clone()), fd, _link: None, datagrams: None, waiting: VecDeque::new() })
    }

    fn loopback(request: &ListenSocketRequest) -> Result<Socket> {
        let made = internet::loopback(&request.address, internet::port(request.port)?, request.datagrams)?;
        let datagrams = request.datagrams.then(|| Datagrams::new(&made)).transpose()?;
        Ok(Socket { path: None, fd: made.fd, _link: made.link, datagrams, waiting: VecDeque::new() })
    }

    fn remove_name(&self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

impl Agent {
    /// Makes a socket that the host will take connections of.
    pub fn listen_socket(&mut self, request: &ListenSocketRequest) -> Result<()> {
        if self.sockets.contains_key(&request.number) {
            return Err(Error::exists(format!("socket {} exists", request.number)));
        }
        let socket = if request.address.is_empty() { Socket::unix(request)? } else { Socket::loopback(request)? };
        let watched = self.watch(socket.fd.raw(), Token::Socket(request.number), libc::EPOLLONESHOT as u32);
        if let Err(e) = watched {
            socket.remove_name();
            return Err(e);
        }
        self.sockets.insert(request.number, socket);
        Ok(())
    }

    /// Takes it away, and ends the calls that wait for a connection; those that have one go on. One that is not there is
    /// what the caller wants.
    pub fn close_socket(&mut self, request: &CloseSocketRequest) -> Result<()> {
        let Some(socket) = self.sockets.remove(&request.number) else { return Ok(()) };
        socket.remove_name();
        let datagrams = socket.datagrams.as_ref().and_then(Datagrams::call);
        for call in socket.waiting.iter().map(|(call, _)| *call).chain(datagrams) {
            self.answer(call, Ok(vec![]));
        }
        Ok(())
    }

    /// A streaming call for the next connection.
    pub fn accept_socket(&mut self, call: CallId, first: &StreamPiece) -> Result<()> {
        let number = first.socket;
        let socket =
            self.sockets.get_mut(&number).ok_or_else(|| Error::not_found(format!("there is no socket {number}")))?;
        socket.waiting.push_back((call, first.credit));
        self.on_socket(number);
        Ok(())
    }

    /// Gives the calls that wait what has come.
    pub fn on_socket(&mut self, number: u32) {
        if self.sockets.get(&number).is_some_and(|socket| socket.datagrams.is_some()) {
            return self.on_datagrams(number);
        }
        loop {
            let Some(socket) = self.sockets.get_mut(&number) else { return };
            // Those whose caller has gone meanwhile.
            while socket.waiting.front().is_some_and(|(call, _)| !self.calls.is_waiting(*call)) {
                socket.waiting.pop_front();
            }
            let Some((call, credit)) = socket.waiting.front().copied() else { return };
            let fd = socket.fd.raw();
            match accept(fd) {
                Ok(connection) => {
                    socket.waiting.pop_front();
                    if let Err(e) = self.begin_connection(call, credit, connection) {
                        self.answer(call, Err(e));
                    }
                }
                Err(Errno(libc::EAGAIN)) => return self.arm(fd, Token::Socket(number), libc::EPOLLIN),
                Err(e) => {
                    // Out of descriptors, most likely: the host tries again.
                    log::error(&format!("socket {number}: accept: {e}"));
                    socket.waiting.pop_front();
                    self.answer(call, Err(Error::exhausted(format!("accept: {e}"))));
                }
            }
        }
    }

    fn begin_connection(&mut self, call: CallId, credit: u32, connection: Fd) -> Result<()> {
        let key = self.add_process(Process::connection(connection).context("prepare the connection")?)?;
        if let Some(reply) = self.calls.get(call) {
            self.send_bytes(reply.conn, frame::credit_frame(reply.stream, 0));
        }
        self.begin_stream(call, key, true, Some(0), credit)
    }
}

fn accept(listener: RawFd) -> SysResult<Fd> {
    // Nobody's name is asked for; the structure is as large as any.
    let mut peer = [0u8; 128];
    sys::accept(listener, &mut peer)
}

/// A socket at a path, listening, with mode and owner as given.
fn listen(path: &str, mode: u32, uid: u32, gid: u32) -> Result<Fd> {
    let (directory, _) = path.rsplit_once('/').filter(|(directory, _)| !directory.is_empty()).unwrap_or_default();
    if directory.is_empty() || path.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!("{path:?} is not a plain absolute path")));
    }
    // Root of a user namespace is nobody here, and still has to get through.
    fs::create_dir_all(directory, 0o711).with_context(|| format!("make {directory}"))?;
    let (address, len) = sys::unix_address(path)?;
    let make = || -> SysResult<Fd> {
        let socket = sys::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
        sys::bind(socket.raw(), &address, len)?;
        // The mode last: a change of owner takes bits away.
        let owned = sys::fchownat(libc::AT_FDCWD, path, uid, gid, libc::AT_SYMLINK_NOFOLLOW)
            .and_then(|()| sys::fchmodat(libc::AT_FDCWD, path, mode & 0o7777))
            .and_then(|()| sys::listen(socket.raw(), BACKLOG));
        owned.inspect_err(|_| {
            let _ = fs::remove_file(path);
        })?;
        Ok(socket)
    };
    make().with_context(|| format!("make the socket {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    #[test]
    fn a_socket_has_the_mode_and_the_owner_that_it_is_given() {
        let directory = TempDir::new("sockets");
        let path = format!("{}/deep/down/x.sock", directory.0);
        let (me, group) = (sys::geteuid(), sys::stat(directory.0.as_str()).unwrap().st_gid);
        let socket = listen(&path, 0o640, me, group).unwrap();
        let status = sys::stat(path.as_str()).unwrap();
        assert_eq!((status.st_mode, status.st_uid, status.st_gid), (libc::S_IFSOCK | 0o640, me, group));
        assert_eq!(accept(socket.raw()).unwrap_err(), Errno(libc::EAGAIN));
        assert!(listen(&path, 0o640, me, group).is_err(), "there is one");
        assert!(listen("x.sock", 0o640, me, group).is_err());
        assert!(listen("/a/../x.sock", 0o640, me, group).is_err());
    }
}
