//! Talks rtnetlink: messages, attributes, requests with an answer and dumps (linux/netlink.h, linux/rtnetlink.h).

use crate::prelude::*;
use crate::sys::{self, Errno, Fd};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
/// In an error message: attributes follow the header of the request.
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Upper bits of an attribute's type say how it is encoded.
const ATTR_TYPE_MASK: u16 = 0x3fff;
const NETLINK_CAP_ACK: i32 = 10;
const NETLINK_EXT_ACK: i32 = 11;

const HEADER: usize = 16;
/// The kernel's dumps come in pieces of at most 32 KiB.
const RECEIVE_BUFFER: usize = 32 << 10;
/// How often a dump is repeated if a change disturbed it.
const DUMP_ATTEMPTS: usize = 16;

/// A request under construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message(Vec<u8>);

impl Message {
    /// `body` is the fixed structure behind the header.
    pub fn new(kind: u16, flags: u16, body: &[u8]) -> Message {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(body);
        Message(bytes)
    }

    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Message {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 4]);
        self.0.extend_from_slice(value);
        self.close(start, kind);
        self
    }

    pub fn number(self, kind: u16, value: u32) -> Message {
        self.attribute(kind, &value.to_ne_bytes())
    }

    pub fn text(self, kind: u16, value: &str) -> Message {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// Bytes of a fixed structure (a multiple of 4) inside a nested attribute.
    #[cfg(test)]
    pub fn raw(mut self, bytes: &[u8]) -> Message {
        self.0.extend_from_slice(bytes);
        self
    }

    /// An attribute that holds attributes.
    pub fn nested(mut self, kind: u16, fill: impl FnOnce(Message) -> Message) -> Message {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 4]);
        let mut filled = fill(self);
        filled.close(start, kind);
        filled
    }

    fn close(&mut self, start: usize, kind: u16) {
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(&mut self, flags: u16, sequence: u32) -> &[u8] {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        let flags = flags | u16::from_ne_bytes([self.0[6], self.0[7]]);
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        &self.0
    }
}

/// The attributes in `bytes`: (type, value). Ends at the first that is malformed.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    core::iter::from_fn(move || {
        let header = bytes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & ATTR_TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A number in a fixed structure or attribute, 0 where the bytes are too few.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |four| u32::from_ne_bytes(four.try_into().unwrap_or_default()))
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |eight| u64::from_ne_bytes(eight.try_into().unwrap_or_default()))
}

/// Text of an attribute, without the NUL.
pub fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// Why the kernel refused, with its message if there is one.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub errno: Errno,
    words: String,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Refusal {
        Refusal { errno, words: String::new() }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        match refusal.words.as_str() {
            "" => refusal.errno.into(),
            words => Error::internal(format!("{} ({words})", refusal.errno)),
        }
    }
}

pub struct Rtnl {
    socket: Fd,
    sequence: u32,
}

impl Rtnl {
    /// In the caller's network namespace.
    pub fn open() -> Result<Rtnl> {
        let open = || {
            let socket = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
            // Have errors carry the kernel's message, and not repeat the request. Older kernels lack these options.
            for option in [NETLINK_CAP_ACK, NETLINK_EXT_ACK] {
                let _ = sys::setsockopt_int(socket.raw(), libc::SOL_NETLINK, option, 1);
            }
            // struct sockaddr_nl: port 0 lets the kernel choose, no groups.
            let mut address = [0u16; 6];
            address[0] = libc::AF_NETLINK as u16;
            sys::bind(socket.raw(), &address, 12)?;
            Ok::<Fd, Errno>(socket)
        };
        Ok(Rtnl { socket: open().context("open a netlink socket")?, sequence: 0 })
    }

    /// Sends a request that changes something and waits for its outcome.
    pub fn change(&mut self, mut message: Message) -> core::result::Result<(), Refusal> {
        self.sequence += 1;
        sys::send(self.socket.raw(), message.finish(NLM_F_ACK, self.sequence), 0)?;
        self.receive(|_, _| {}).map(drop)
    }

    /// Sends a request for a list; calls `each` with type and body of every entry. The list is consistent: if it
    /// changes meanwhile, it is asked for again.
    pub fn dump(&mut self, message: &Message, mut each: impl FnMut(u16, &[u8])) -> core::result::Result<(), Refusal> {
        for _ in 0..DUMP_ATTEMPTS {
            self.sequence += 1;
            let mut request = message.clone();
            sys::send(self.socket.raw(), request.finish(NLM_F_DUMP, self.sequence), 0)?;
            let mut entries: Vec<(u16, Vec<u8>)> = Vec::new();
            if self.receive(|kind, body| entries.push((kind, body.to_vec())))? {
                for (kind, body) in &entries {
                    each(*kind, body);
                }
                return Ok(());
            }
        }
        Err(Errno(libc::EAGAIN).into())
    }

    /// Reads answers to the last request until its end; false when a dump was disturbed by a change.
    fn receive(&self, mut each: impl FnMut(u16, &[u8])) -> core::result::Result<bool, Refusal> {
        let mut buffer = vec![0u8; RECEIVE_BUFFER];
        let mut whole = true;
        loop {
            let length = sys::recv(self.socket.raw(), &mut buffer, 0)?;
            let mut rest = &buffer[..length];
            while rest.len() >= HEADER {
                let size = u32_at(rest, 0) as usize;
                let Some(body) = rest.get(HEADER..size) else { return Err(Errno(libc::EPROTO).into()) };
                let kind = u16::from_ne_bytes([rest[4], rest[5]]);
                let flags = u16::from_ne_bytes([rest[6], rest[7]]);
                let ours = u32_at(rest, 8) == self.sequence;
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
                if !ours {
                    continue;
                }
                whole &= flags & NLM_F_DUMP_INTR == 0;
                match kind {
                    NLMSG_ERROR | NLMSG_DONE => return outcome(kind, flags, body).map(|()| whole),
                    _ => each(kind, body),
                }
            }
        }
    }
}

/// The error number at the start of an end message, and the words behind it.
fn outcome(kind: u16, flags: u16, body: &[u8]) -> core::result::Result<(), Refusal> {
    let errno = (u32_at(body, 0) as i32).wrapping_neg();
    if errno == 0 {
        return Ok(());
    }
    let words = if flags & NLM_F_ACK_TLVS != 0 {
        // An error repeats the header of the request first.
        let skip = if kind == NLMSG_ERROR { 4 + HEADER } else { 4 };
        let mut texts = attributes(body.get(skip..).unwrap_or_default()).filter(|(kind, _)| *kind == NLMSGERR_ATTR_MSG);
        texts.next().map(|(_, text)| text_of(text)).unwrap_or_default()
    } else {
        String::new()
    };
    Err(Refusal { errno: Errno(errno), words })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_laid_out_as_the_kernel_wants_them() {
        let mut message = Message::new(16, 0, &[7; 4]).text(3, "lo").nested(18, |m| m.number(1, 9));
        let bytes = message.finish(4, 5).to_vec();
        assert_eq!(u32_at(&bytes, 0) as usize, bytes.len());
        assert_eq!(bytes[4..8], [16, 0, 5, 0]);
        assert_eq!(u32_at(&bytes, 8), 5);
        let parsed: Vec<_> = attributes(&bytes[20..]).collect();
        assert_eq!(parsed[0], (3, b"lo\0".as_slice()));
        assert_eq!(parsed[1].0, 18);
        assert_eq!(attributes(parsed[1].1).collect::<Vec<_>>(), [(1, [9, 0, 0, 0].as_slice())]);
    }

    #[test]
    fn malformed_attributes_end_the_list() {
        for bytes in [&[1u8, 0][..], &[3, 0, 1, 0], &[200, 0, 1, 0, 0, 0, 0, 0], &[0; 8]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
        assert_eq!((u32_at(&[1, 2], 0), u64_at(&[], 8), text_of(b"a\0b").as_str()), (0, 0, "a"));
    }

    #[test]
    fn the_kernel_answers() {
        let mut rtnl = Rtnl::open().unwrap();
        let mut names = Vec::new();
        rtnl.dump(&Message::new(18, 0, &[0; 16]), |_, body| {
            names.extend(attributes(&body[16..]).filter(|(kind, _)| *kind == 3).map(|(_, text)| text_of(text)));
        })
        .unwrap();
        assert!(names.contains(&"lo".to_string()), "{names:?}");
        // No such link.
        let mut body = [0u8; 16];
        body[4..8].copy_from_slice(&0x7fff_0000u32.to_ne_bytes());
        assert_eq!(rtnl.change(Message::new(17, 0, &body)).unwrap_err().errno, Errno(libc::ENODEV));
    }
}
