//! Datagrams that are carried to the host, and their answers.
//!
//! The agent numbers each datagram and keeps its sender until the host has answered it or reported that there is no
//! answer; it has no timeout of its own. The host limits how many may wait for an answer. Further ones stay in the
//! kernel's receive queue.

use crate::connections::Connections;
use crate::internet::{Address4, Loopback};
use crate::poller::Token;
use crate::prelude::*;
use crate::server::calls::CallId;
use crate::server::frame;
use crate::sys::{self, Errno, Fd, RawFd, SysResult};

/// The longest datagram that is forwarded; longer ones are dropped.
const MAX_LENGTH: usize = 4096;
/// How many datagrams are forwarded before other events are handled.
const MOST_AT_ONCE: u32 = 64;
/// Headers of IPv4 and UDP.
const HEADERS: usize = 28;

/// What a socket of datagrams has beyond its descriptor.
pub struct Datagrams {
    /// The streaming call that takes them, and how many may wait at a time.
    call: Option<(CallId, usize)>,
    /// Number and address of each sender that waits for an answer.
    askers: Vec<(u32, Address4)>,
    last: u32,
    /// Raw socket for answers, where the socket itself is not bound to the port that it serves.
    raw: Option<Fd>,
    address: [u8; 4],
    port: u16,
}

impl Datagrams {
    pub fn new(socket: &Loopback) -> Result<Datagrams> {
        let make = || sys::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, libc::IPPROTO_RAW);
        let raw = socket.link.as_ref().map(|_| make()).transpose().context("make a raw socket")?;
        Ok(Datagrams { call: None, askers: vec![], last: 0, raw, address: socket.address, port: socket.port })
    }

    /// The call that ends with the socket.
    pub fn call(&self) -> Option<CallId> {
        self.call.map(|(call, _)| call)
    }

    /// Has a streaming call take the datagrams from now on, `most` of which may wait for their answers. It replaces a
    /// former call, which ends; senders that wait for an answer by that call get none.
    pub fn exchange(&mut self, io: &mut Connections, call: CallId, most: usize) {
        self.end(io);
        self.call = Some((call, most));
        self.askers.clear();
    }

    /// Ends the streaming call.
    pub fn end(&mut self, io: &mut Connections) {
        if let Some((call, _)) = self.call.take() {
            io.answer(call, Ok(vec![]));
        }
    }

    /// Forwards the datagrams that have arrived, up to the limit of those that may wait for an answer. `fd` is the
    /// socket, known to the host as `number`.
    pub fn forward(&mut self, io: &mut Connections, fd: RawFd, number: u32) {
        let mut buffer = [0u8; MAX_LENGTH];
        // Bounded: a container that sends without end must not hold up other events.
        for _ in 0..MOST_AT_ONCE {
            let Some((call, most)) = self.call else { return };
            let Some(reply) = io.calls.get(call) else { return };
            if self.askers.len() >= most {
                return;
            }
            let mut asker = Address4::default();
            match sys::recv_from(fd, &mut buffer, libc::MSG_TRUNC, &mut asker) {
                Ok(length) if length == 0 || length > MAX_LENGTH => {}
                Ok(length) => {
                    let id = self.number(asker);
                    io.send_bytes(reply.conn, frame::datagram_frame(reply.stream, &buffer[..length], id));
                }
                Err(Errno(libc::EAGAIN)) => return io.poller.arm(fd, Token::Socket(number), libc::EPOLLIN),
                // A pending error of the socket (an ICMP message); receiving has cleared it.
                Err(_) => {}
            }
        }
        io.poller.arm(fd, Token::Socket(number), libc::EPOLLIN);
    }

    fn number(&mut self, asker: Address4) -> u32 {
        self.last = self.last.wrapping_add(1).max(1);
        self.askers.push((self.last, asker));
        self.last
    }

    /// Sends an answer to the sender of datagram `number`; no data means that there is none. Send errors are ignored:
    /// datagrams may get lost.
    pub fn answer(&mut self, socket: RawFd, number: u32, data: &[u8]) {
        let Some(place) = self.askers.iter().position(|(of, _)| *of == number) else { return };
        let (_, asker) = self.askers.swap_remove(place);
        if data.is_empty() {
            return;
        }
        let _ = match &self.raw {
            Some(raw) => {
                packet(self.address, self.port, &asker, data).and_then(|p| sys::send_to(raw.raw(), &p, &asker))
            }
            None => sys::send_to(socket, data, &asker),
        };
    }
}

/// An IPv4 packet with a datagram. The kernel fills in checksum and identification of the header; that of UDP may be
/// absent.
fn packet(from: [u8; 4], port: u16, to: &Address4, data: &[u8]) -> SysResult<Vec<u8>> {
    let length = u16::try_from(HEADERS + data.len()).map_err(|_| Errno(libc::EMSGSIZE))?;
    let mut out = Vec::with_capacity(usize::from(length));
    // Version and length of the header, service; then identification, "don't fragment", time to live, UDP, checksum.
    out.extend([0x45, 0]);
    out.extend(length.to_be_bytes());
    out.extend([0, 0, 0x40, 0, 64, libc::IPPROTO_UDP as u8, 0, 0]);
    out.extend(from);
    out.extend(&to[4..8]);
    out.extend(port.to_be_bytes());
    out.extend(&to[2..4]);
    out.extend((length - 20).to_be_bytes());
    out.extend([0, 0]);
    out.extend(data);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::internet::{address4, loopback};

    #[test]
    fn a_packet_is_what_the_kernel_would_send() {
        let to = address4([127, 0, 0, 1], 4660);
        let whole = packet([127, 0, 0, 11], 53, &to, b"abc").unwrap();
        let head = [0x45, 0, 0, 31, 0, 0, 0x40, 0, 64, 17, 0, 0, 127, 0, 0, 11, 127, 0, 0, 1];
        assert_eq!(whole[..20], head);
        assert_eq!(whole[20..], [0, 53, 0x12, 0x34, 0, 11, 0, 0, b'a', b'b', b'c']);
        assert!(packet([127, 0, 0, 11], 53, &to, &vec![0; 65508]).is_err());
    }

    #[test]
    fn only_who_has_asked_gets_an_answer_and_only_one() {
        let bound = loopback(&[127, 0, 0, 11], 4242, true).unwrap();
        let client = sys::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, 0).unwrap();
        sys::bind(client.raw(), &address4([127, 0, 0, 1], 0), 16).unwrap();
        sys::send_to(client.raw(), b"?", &address4([127, 0, 0, 11], 4242)).unwrap();
        let (mut asker, mut buffer) = (Address4::default(), [0; 8]);
        assert_eq!(sys::recv_from(bound.fd.raw(), &mut buffer, 0, &mut asker), Ok(1));
        let mut datagrams = Datagrams::new(&bound).unwrap();
        let id = datagrams.number(asker);
        datagrams.answer(bound.fd.raw(), id + 1, b"not this");
        datagrams.answer(bound.fd.raw(), id, b"yes");
        datagrams.answer(bound.fd.raw(), id, b"no");
        let mut from = Address4::default();
        assert_eq!(sys::recv_from(client.raw(), &mut buffer, 0, &mut from), Ok(3));
        assert_eq!((&buffer[..3], from), (&b"yes"[..], address4([127, 0, 0, 11], 4242)));
        assert_eq!(sys::recv_from(client.raw(), &mut buffer, 0, &mut from), Err(Errno(libc::EAGAIN)));
    }
}
