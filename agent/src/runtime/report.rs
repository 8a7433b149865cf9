//! The messages from a process to the agent before it becomes the user's program, and the agent's one answer.
//!
//! One SOCK_SEQPACKET pair per process. The child's end is CLOEXEC: end of file after [`Message::Ready`] and the
//! start means that the exec has worked.

use crate::prelude::*;
use crate::sys::{self, Errno, Fd, Pid, RawFd};

/// An error's text is cut to this.
const MAX_TEXT: usize = 3000;

pub enum Message {
    /// The process exists, under this number.
    Pid(Pid),
    /// How many of the request's storages are mounted.
    Mounted(u32),
    /// The master end of its terminal.
    Terminal(Fd),
    /// Everything is prepared, the command found; it waits for the start.
    Ready,
    Failed(Error),
    /// What it has done since the last of these, or since the call, is called so, and was done at this time
    /// (CLOCK_MONOTONIC).
    Phase(String, u64),
}

/// The child's end.
#[derive(Clone, Copy)]
pub struct Reporter {
    pub fd: RawFd,
    /// Whether somebody wants to know the phases.
    pub phases: bool,
}

impl Reporter {
    fn send(self, kind: u8, data: &[u8], fd: Option<RawFd>) {
        let mut message = vec![kind];
        message.extend_from_slice(data);
        // If the agent has closed its end, it has also killed the process.
        let _ = sys::send_with_fd(self.fd, &message, fd);
    }

    pub fn pid(self, pid: Pid) {
        self.send(b'P', &pid.to_ne_bytes(), None);
    }

    pub fn mounted(self, count: u32) {
        self.send(b'M', &count.to_ne_bytes(), None);
    }

    pub fn terminal(self, master: RawFd) {
        self.send(b'T', &[], Some(master));
    }

    pub fn ready(self) {
        self.send(b'R', &[], None);
    }

    pub fn phase(self, name: &str) {
        if self.phases {
            let mut data = sys::monotonic_ns().to_ne_bytes().to_vec();
            data.extend_from_slice(name.as_bytes());
            self.send(b'N', &data, None);
        }
    }

    pub fn failed(self, error: &Error) {
        let mut end = error.message.len().min(MAX_TEXT);
        while !error.message.is_char_boundary(end) {
            end -= 1;
        }
        let mut data = error.code.to_ne_bytes().to_vec();
        data.extend_from_slice(&error.message.as_bytes()[..end]);
        self.send(b'E', &data, None);
    }

    /// Blocks until the agent gives the start; false if it has closed the socket instead.
    pub fn wait_for_start(self) -> bool {
        let mut word = [0u8; 1];
        matches!(sys::recv(self.fd, &mut word, 0), Ok(1))
    }
}

/// The agent's end: the next message. `Ok(None)`: the other end is closed. EAGAIN is an error of the kernel's.
pub fn receive(fd: RawFd) -> core::result::Result<Option<Message>, Errno> {
    let mut buf = [0u8; MAX_TEXT + 8];
    let (n, descriptor) = match sys::recv_with_fd(fd, &mut buf) {
        Err(Errno(libc::ECONNRESET)) => return Ok(None),
        other => other?,
    };
    let Some((kind, data)) = buf[..n].split_first() else { return Ok(None) };
    let number = || data.first_chunk::<4>().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    Ok(Some(match kind {
        b'P' => Message::Pid(number()),
        b'M' => Message::Mounted(number() as u32),
        b'R' => Message::Ready,
        b'N' => Message::Phase(
            String::from_utf8_lossy(data.get(8..).unwrap_or_default()).into_owned(),
            data.first_chunk::<8>().map_or(0, |bytes| u64::from_ne_bytes(*bytes)),
        ),
        b'T' => match descriptor {
            Some(master) => Message::Terminal(master),
            None => Message::Failed(Error::internal("the terminal's descriptor did not arrive")),
        },
        _ => Message::Failed(Error::new(
            number(),
            String::from_utf8_lossy(data.get(4..).unwrap_or_default()).into_owned(),
        )),
    }))
}

/// Lets a prepared process go.
pub fn start(fd: RawFd) -> sys::SysResult<()> {
    sys::send(fd, b"S", libc::MSG_NOSIGNAL).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_one_by_one_with_their_descriptor() {
        let (ours, theirs) = sys::socketpair(libc::SOCK_SEQPACKET).unwrap();
        let child = Reporter { fd: theirs.raw(), phases: true };
        Reporter { phases: false, ..child }.phase("unwanted");
        let (read_end, _write_end) = sys::pipe(0).unwrap();
        child.pid(42);
        child.mounted(3);
        child.terminal(read_end.raw());
        child.ready();
        child.phase("storages");
        child.failed(&Error::not_found("no \u{e4}pfel"));
        assert!(matches!(receive(ours.raw()), Ok(Some(Message::Pid(42)))));
        assert!(matches!(receive(ours.raw()), Ok(Some(Message::Mounted(3)))));
        let Ok(Some(Message::Terminal(got))) = receive(ours.raw()) else { panic!() };
        assert_eq!(sys::fstat(got.raw()).unwrap().st_ino, sys::fstat(read_end.raw()).unwrap().st_ino);
        assert!(matches!(receive(ours.raw()), Ok(Some(Message::Ready))));
        assert!(matches!(receive(ours.raw()), Ok(Some(Message::Phase(name, at))) if name == "storages" && at > 0));
        let Ok(Some(Message::Failed(e))) = receive(ours.raw()) else { panic!() };
        assert_eq!(e, Error::not_found("no \u{e4}pfel"));
        start(ours.raw()).unwrap();
        assert!(child.wait_for_start());
        drop(ours);
        assert!(!child.wait_for_start());
    }
}
