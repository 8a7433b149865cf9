//! Sockets of the guest that stand for ones of the host.
//!
//! Each connection is carried to the host by a streaming call that the host has opened beforehand. It is accepted from
//! the kernel's queue only when such a call waits, so the host chooses how many there may be at a time; further clients
//! wait as with any busy listener.

use crate::connections::{Connections, StreamTarget, Target};
use crate::container::Containers;
use crate::datagrams::Datagrams;
use crate::poller::{Poller, Token};
use crate::prelude::*;
use crate::process::Process;
use crate::processes::Processes;
use crate::proto::agentext::{CloseSocketRequest, ListenSocketRequest};
use crate::server::calls::CallId;
use crate::server::conn::Call;
use crate::server::frame::{self, StreamPiece};
use crate::sys::{self, Errno, Fd, RawFd, SysResult};
use crate::{fs, internet, log};
use alloc::collections::VecDeque;

/// Connections that wait in the kernel; connect(2) waits above that.
const BACKLOG: i32 = 128;

/// A listening socket, or one of datagrams.
struct Socket {
    /// Of a unix socket.
    path: Option<String>,
    fd: Fd,
    /// Of a loopback socket: the BPF link that keeps its port.
    _link: Option<Fd>,
    datagrams: Option<Datagrams>,
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

    /// The descriptor and the datagrams' part of a socket of datagrams.
    fn parts(&mut self) -> Option<(RawFd, &mut Datagrams)> {
        let fd = self.fd.raw();
        self.datagrams.as_mut().map(|datagrams| (fd, datagrams))
    }

    fn remove_name(&self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

/// By the host's numbers.
#[derive(Default)]
pub struct Sockets {
    records: BTreeMap<u32, Socket>,
}

impl Sockets {
    /// Makes a socket whose connections, or datagrams, the host will take.
    pub fn listen(&mut self, poller: &Poller, request: &ListenSocketRequest) -> Result<()> {
        if self.records.contains_key(&request.number) {
            return Err(Error::exists(format!("socket {} exists", request.number)));
        }
        let socket = if request.address.is_empty() { Socket::unix(request)? } else { Socket::loopback(request)? };
        let watched = poller.watch(socket.fd.raw(), Token::Socket(request.number), libc::EPOLLONESHOT as u32);
        if let Err(e) = watched {
            socket.remove_name();
            return Err(e);
        }
        self.records.insert(request.number, socket);
        Ok(())
    }

    /// Closes a socket and ends the calls that wait for a connection; those that have one go on. It is no error if there
    /// is no such socket.
    pub fn close(&mut self, io: &mut Connections, request: &CloseSocketRequest) {
        let Some(socket) = self.records.remove(&request.number) else { return };
        socket.remove_name();
        let datagrams = socket.datagrams.as_ref().and_then(Datagrams::call);
        for call in socket.waiting.iter().map(|(call, _)| *call).chain(datagrams) {
            io.answer(call, Ok(vec![]));
        }
    }

    /// A streaming call for the next connection.
    pub fn accept(
        &mut self,
        io: &mut Connections,
        processes: &mut Processes,
        containers: &mut Containers,
        call: CallId,
        first: &StreamPiece,
    ) -> Result<()> {
        let number = first.socket;
        let socket =
            self.records.get_mut(&number).ok_or_else(|| Error::not_found(format!("there is no socket {number}")))?;
        socket.waiting.push_back((call, first.credit));
        self.on_readable(io, processes, containers, number);
        Ok(())
    }

    /// A streaming call for datagrams; see [`Datagrams::exchange`].
    pub fn exchange(&mut self, io: &mut Connections, call: CallId, first: &StreamPiece) -> Result<()> {
        let number = first.socket;
        let socket = self.records.get_mut(&number);
        let Some((fd, datagrams)) = socket.and_then(Socket::parts) else {
            return Err(Error::not_found(format!("there is no socket of datagrams {number}")));
        };
        datagrams.exchange(io, call, first.credit as usize);
        io.attach(call, Target::Datagrams(number));
        datagrams.forward(io, fd, number);
        Ok(())
    }

    /// A data frame of the streaming call for datagrams: an answer. The `last` ends the call.
    pub fn take_datagram(&mut self, io: &mut Connections, number: u32, frame: &Call, last: bool) -> Result<()> {
        let piece = frame::parse_piece(frame.body())?;
        let Some((fd, datagrams)) = self.records.get_mut(&number).and_then(Socket::parts) else { return Ok(()) };
        datagrams.answer(fd, piece.datagram, piece.data);
        if last {
            datagrams.end(io);
        } else {
            datagrams.forward(io, fd, number);
        }
        Ok(())
    }

    /// Hands connections or datagrams that have arrived to the calls that wait for them.
    pub fn on_readable(
        &mut self,
        io: &mut Connections,
        processes: &mut Processes,
        containers: &mut Containers,
        number: u32,
    ) {
        loop {
            let Some(socket) = self.records.get_mut(&number) else { return };
            let fd = socket.fd.raw();
            if let Some(datagrams) = &mut socket.datagrams {
                return datagrams.forward(io, fd, number);
            }
            // Skip calls that have ended.
            while socket.waiting.front().is_some_and(|(call, _)| !io.calls.is_waiting(*call)) {
                socket.waiting.pop_front();
            }
            let Some((call, credit)) = socket.waiting.front().copied() else { return };
            match accept(fd) {
                Ok(connection) => {
                    socket.waiting.pop_front();
                    if let Err(e) = begin_connection(io, processes, containers, (call, credit), connection) {
                        io.answer(call, Err(e));
                    }
                }
                Err(Errno(libc::EAGAIN)) => return io.poller.arm(fd, Token::Socket(number), libc::EPOLLIN),
                Err(e) => {
                    // Out of descriptors, most likely: the host tries again.
                    log::error(&format!("socket {number}: accept: {e}"));
                    socket.waiting.pop_front();
                    io.answer(call, Err(Error::exhausted(format!("accept: {e}"))));
                }
            }
        }
    }
}

fn begin_connection(
    io: &mut Connections,
    processes: &mut Processes,
    containers: &mut Containers,
    (call, credit): (CallId, u32),
    connection: Fd,
) -> Result<()> {
    let key = processes.add(io, Process::connection(connection).context("prepare the connection")?)?;
    // So that the host knows that there is one.
    io.give_credit(call, 0);
    processes.begin_stream(io, containers, call, StreamTarget { process: key, input: true, output: Some(0) }, credit)
}

fn accept(listener: RawFd) -> SysResult<Fd> {
    // The peer's address is not needed; the buffer is large enough for any.
    let mut peer = [0u8; 128];
    sys::accept(listener, &mut peer)
}

/// A socket at a path, listening, with mode and owner as given.
fn listen(path: &str, mode: u32, uid: u32, gid: u32) -> Result<Fd> {
    let (directory, _) = path.rsplit_once('/').filter(|(directory, _)| !directory.is_empty()).unwrap_or_default();
    if directory.is_empty() || path.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!("{path:?} is not a plain absolute path")));
    }
    // 0711: the root of a user namespace is an unprivileged user out here and still has to traverse it.
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
    use crate::internet::address4;
    use crate::proto::{agentext, codec::Message};
    use crate::server::calls::Reply;
    use crate::server::conn::Conn;
    use crate::test_support::TempDir;

    /// A waiting call with this stream number on a connection.
    fn call(io: &mut Connections, conn: u32, stream: u32) -> CallId {
        io.calls.add(Reply { conn, stream, deadline: u64::MAX }).unwrap()
    }

    #[test]
    fn a_further_exchange_ends_the_former_one() {
        let mut io = Connections::new().unwrap();
        let (ours, host) = sys::socketpair(libc::SOCK_STREAM | libc::SOCK_NONBLOCK).unwrap();
        let conn = io.add(Conn::new(ours, false)).unwrap();
        let mut sockets = Sockets::default();
        let request = ListenSocketRequest {
            number: 5,
            address: vec![127, 0, 0, 11],
            port: 4244,
            datagrams: true,
            ..Default::default()
        };
        sockets.listen(&io.poller, &request).unwrap();
        let calls = [call(&mut io, conn, 1), call(&mut io, conn, 3)];
        let piece = agentext::StreamPiece { socket: 5, credit: 8, ..Default::default() }.to_vec();
        for call in calls {
            sockets.exchange(&mut io, call, &frame::parse_piece(&piece).unwrap()).unwrap();
        }
        assert!(!io.calls.is_waiting(calls[0]) && io.calls.is_waiting(calls[1]));
        assert!(io.attachment(conn, 1).is_none() && io.attachment(conn, 3).is_some());
        io.get_mut(conn).unwrap().flush();
        let mut answer = [0u8; 64];
        let length = sys::read(host.raw(), &mut answer).unwrap();
        assert_eq!(answer[..length], frame::answer(1, &Ok(vec![])), "the former call has ended, without an error");
        // Datagrams go to the second call.
        let client = sys::socket(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap();
        sys::send_to(client.raw(), b"?", &address4([127, 0, 0, 11], 4244)).unwrap();
        sockets.on_readable(&mut io, &mut Processes::default(), &mut Containers::default(), 5);
        io.get_mut(conn).unwrap().flush();
        let length = sys::read(host.raw(), &mut answer).unwrap();
        assert_eq!(answer[..length], frame::datagram_frame(3, b"?", 1));
        sockets.close(&mut io, &CloseSocketRequest { number: 5 });
        assert!(!io.calls.is_waiting(calls[1]));
    }

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
