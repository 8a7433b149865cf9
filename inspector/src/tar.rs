//! The members of a layer's archive.
//!
//! Sources: POSIX.1-2017 pax (ustar and its extended headers), the GNU tar manual ("Basic Tar Format").

use std::io::{self, Read};

use crate::stream::Pieces;

const BLOCK: usize = 512;
const MAX_EXTENSION: u64 = 1 << 20;

/// A member. Its content follows in the stream: `size` bytes.
#[derive(Debug, Default, Clone)]
pub struct Member {
    pub name: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub size: u64,
    pub link: Vec<u8>,
    pub major: u32,
    pub minor: u32,
    /// The value of `security.capability`; empty without one.
    pub capability: Vec<u8>,
    /// The content is a sparse file's: a map and pieces.
    pub is_sparse: bool,
}

pub struct Archive {
    pub stream: Pieces,
    left: u64,
    padding: u64,
    global: Extended,
}

#[derive(Debug, Default, Clone)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    capability: Vec<u8>,
    is_sparse: bool,
}

fn bad(text: &str) -> io::Error {
    io::Error::other(text.to_string())
}

/// A number of a header: octal digits, or base 256.
fn number(field: &[u8]) -> io::Result<u64> {
    let out_of_range = || bad("a number in an archive's header is out of range");
    if field[0] & 0x80 != 0 {
        let mut bytes = field.to_vec();
        bytes[0] &= 0x7f;
        let (high, low) = bytes.split_at(bytes.len() - 8);
        if field[0] & 0x40 != 0 || high.iter().any(|byte| *byte != 0) {
            return Err(out_of_range());
        }
        return Ok(low.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)));
    }
    let mut sum = 0_u64;
    let mut digits = field.iter().skip_while(|byte| **byte == b' ').peekable();
    while let Some(byte) = digits.next_if(|byte| (b'0'..=b'7').contains(*byte)) {
        sum = sum.checked_mul(8).ok_or_else(out_of_range)? | u64::from(byte - b'0');
    }
    match digits.next() {
        None | Some(0 | b' ') => Ok(sum),
        Some(_) => Err(bad("a number in an archive's header is malformed")),
    }
}

fn text(field: &[u8]) -> Vec<u8> {
    field.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

impl Archive {
    pub fn new(stream: Pieces) -> Archive {
        Archive { stream, left: 0, padding: 0, global: Extended::default() }
    }

    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.stream.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(bad("the archive is cut short")),
                done => filled += done,
            }
        }
        Ok(Some(block))
    }

    /// The next member; `None` at the end. What is left of the last one's content is skipped.
    pub fn next(&mut self) -> io::Result<Option<Member>> {
        let rest = self.left + self.padding;
        if self.stream.skip(rest)? < rest {
            return Err(bad("the archive is cut short"));
        }
        self.left = 0;
        self.padding = 0;
        let mut extended = self.global.clone();
        loop {
            let Some(block) = self.block()? else { return Ok(None) };
            if block.iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            let sum: u64 = block
                .iter()
                .enumerate()
                .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u64::from(*byte) })
                .sum();
            if number(&block[148..156])? != sum {
                return Err(bad("an archive's header has a wrong checksum"));
            }
            let size = number(&block[124..136])?;
            match block[156] {
                b'x' | b'g' | b'L' | b'K' => {
                    let data = self.extension(size)?;
                    match block[156] {
                        b'L' => extended.path = Some(text(&data)),
                        b'K' => extended.link = Some(text(&data)),
                        b'x' => pax(&data, &mut extended)?,
                        _ => pax(&data, &mut self.global)?,
                    }
                }
                kind => {
                    let member = self.member(&block, kind, size, extended)?;
                    return Ok(Some(member));
                }
            }
        }
    }

    fn member(&mut self, block: &[u8; BLOCK], kind: u8, size: u64, extended: Extended) -> io::Result<Member> {
        let mut name = text(&block[..100]);
        if &block[257..263] == b"ustar\0" && block[345] != 0 {
            let mut whole = text(&block[345..500]);
            whole.push(b'/');
            whole.extend(name);
            name = whole;
        }
        let kind = match kind {
            0 | b'7' | b'S' => b'0',
            other => other,
        };
        let mut member = Member {
            name: extended.path.unwrap_or(name),
            kind,
            mode: (number(&block[100..108])? & 0o7777) as u32,
            uid: extended.uid.map_or_else(|| number(&block[108..116]), Ok)?,
            gid: extended.gid.map_or_else(|| number(&block[116..124]), Ok)?,
            size: extended.size.unwrap_or(size),
            link: extended.link.unwrap_or_else(|| text(&block[157..257])),
            major: 0,
            minor: 0,
            capability: extended.capability,
            is_sparse: extended.is_sparse || block[156] == b'S',
        };
        if matches!(kind, b'3' | b'4') {
            member.major = number(&block[329..337])? as u32;
            member.minor = number(&block[337..345])? as u32;
        }
        if block[156] == b'0' && member.name.ends_with(b"/") {
            member.kind = b'5'; // as archives from before POSIX have directories
        }
        if !matches!(member.kind, b'0') {
            // Links may have a size, for which there is no content.
            if matches!(member.kind, b'1'..=b'6') {
                member.size = 0;
            }
        }
        if block[156] == b'S' {
            let mut more = block[482];
            while more != 0 {
                more = self.block()?.ok_or_else(|| bad("the archive is cut short"))?[504];
            }
        }
        self.left = member.size;
        self.padding = member.size.wrapping_neg() % BLOCK as u64;
        if member.size > 1 << 60 {
            return Err(bad("a member of the archive is larger than any file"));
        }
        Ok(member)
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(bad("an extension header of the archive is too large"));
        }
        let padded = size.next_multiple_of(BLOCK as u64);
        let mut data = vec![0; padded as usize];
        self.stream.read_exact(&mut data).map_err(|_| bad("the archive is cut short"))?;
        data.truncate(size as usize);
        Ok(data)
    }
}

/// The current member's content.
impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let step = self.left.min(buffer.len() as u64) as usize;
        if step == 0 {
            return Ok(0);
        }
        let done = self.stream.read(&mut buffer[..step])?;
        if done == 0 {
            return Err(bad("the archive is cut short"));
        }
        self.left -= done as u64;
        Ok(done)
    }
}

/// Read the records of an extended header: `LENGTH KEY=VALUE\n`.
fn pax(mut data: &[u8], into: &mut Extended) -> io::Result<()> {
    let wrong = || bad("an extended header of the archive is malformed");
    while !data.is_empty() {
        let space = data.iter().take(20).position(|byte| *byte == b' ').ok_or_else(wrong)?;
        let length: usize = std::str::from_utf8(&data[..space]).ok().and_then(|t| t.parse().ok()).ok_or_else(wrong)?;
        if length <= space + 1 || length > data.len() || data[length - 1] != b'\n' {
            return Err(wrong());
        }
        let record = &data[space + 1..length - 1];
        data = &data[length..];
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let whole = || std::str::from_utf8(value).ok().and_then(|t| t.parse().ok());
        match key {
            b"path" | b"GNU.sparse.name" => into.path = Some(value.to_vec()),
            b"linkpath" => into.link = Some(value.to_vec()),
            b"size" => into.size = Some(whole().ok_or_else(wrong)?),
            b"uid" => into.uid = whole(),
            b"gid" => into.gid = whole(),
            b"SCHILY.xattr.security.capability" => into.capability = value.to_vec(),
            _ if key.starts_with(b"GNU.sparse.") => into.is_sparse = true,
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0").unwrap(), 0o644);
        assert_eq!(number(b"   644 \0").unwrap(), 0o644);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]).unwrap(), 256);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]).unwrap(), 512);
        assert!(number(&[0xff; 12]).is_err());
        assert!(number(b"12x45\0\0\0").is_err());
    }

    #[test]
    fn extended_headers() {
        let mut into = Extended::default();
        pax(b"19 path=some/where\n11 size=12\n", &mut into).unwrap();
        assert_eq!(into.path.unwrap(), b"some/where");
        assert_eq!(into.size, Some(12));
        for text in [&b"9999 path=x\n"[..], b"path=x\n", b"5 p=x\n", b"0 a=b\n", b"11 path=\xff"] {
            assert!(pax(text, &mut Extended::default()).is_err());
        }
    }
}
