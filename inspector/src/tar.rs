//! The members of a layer's archive.
//!
//! Sources: POSIX.1-2017 pax (ustar and its extended headers), the GNU tar manual ("Basic Tar Format").

use std::io::{self, Read};

use crate::stream::Pieces;

const BLOCK: usize = 512;
const MAX_EXTENSION: u64 = 1 << 20;
const MAX_SPARSE: usize = 100_000;
const MAX_SIZE: u64 = 1 << 60;
/// Of one member. Archives have at most one of each type.
const MAX_HEADERS: usize = 16;
const ARCHIVE_CUT: &str = "the archive is cut short";
const BAD_MAP: &str = "the map of a sparse file is malformed";

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
    /// How many bytes of content are in the archive: fewer than `size` for a sparse file.
    pub stored: u64,
    /// It has attributes by which overlayfs knows whiteouts.
    pub is_overlay: bool,
}

pub struct Archive {
    pub stream: Pieces,
    /// Bytes of the current content that are in the archive and were not read yet.
    left: u64,
    padding: u64,
    /// How long the current content is, holes included, and how far it was read.
    size: u64,
    at: u64,
    /// The pieces of a sparse file that are in the archive, last first: (offset, length).
    runs: Vec<(u64, u64)>,
    is_sparse: bool,
    /// What is odd about headers, for whoever asks after each member.
    pub oddities: Vec<&'static str>,
}

#[derive(Debug, Default, Clone)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    capability: Vec<u8>,
    is_overlay: bool,
    sparse: PaxSparse,
}

/// What the `GNU.sparse.*` records say.
#[derive(Debug, Default, Clone)]
struct PaxSparse {
    name: Option<Vec<u8>>,
    size: Option<u64>,
    major: Vec<u8>,
    /// The numbers of formats 0.0 and 0.1; 1.0 has them before the data.
    map: Option<Vec<u64>>,
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
        Archive {
            stream,
            left: 0,
            padding: 0,
            size: 0,
            at: 0,
            runs: Vec::new(),
            is_sparse: false,
            oddities: Vec::new(),
        }
    }

    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.stream.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(bad(ARCHIVE_CUT)),
                done => filled += done,
            }
        }
        Ok(Some(block))
    }

    /// The next member; `None` at the end. What is left of the last one's content is skipped.
    pub fn next(&mut self) -> io::Result<Option<Member>> {
        let rest = self.left + self.padding;
        if self.stream.skip(rest)? < rest {
            return Err(bad(ARCHIVE_CUT));
        }
        (self.left, self.padding, self.size, self.at, self.is_sparse) = (0, 0, 0, 0, false);
        self.runs.clear();
        let mut extended = Extended::default();
        let mut headers = 0;
        loop {
            let Some(block) = self.block()? else { return Ok(None) };
            if block.iter().all(|byte| *byte == 0) {
                // Who reads on after one block of zeros, as some do, finds members that nobody else does.
                if self.block()?.is_some_and(|next| next.iter().any(|byte| *byte != 0)) {
                    return Err(bad("a header follows a block of zeros"));
                }
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
                    headers += 1;
                    if headers > MAX_HEADERS {
                        return Err(bad("a member has too many extension headers"));
                    }
                    let data = self.extension(size)?;
                    match block[156] {
                        b'L' => extended.path = Some(text(&data)),
                        b'K' => extended.link = Some(text(&data)),
                        b'x' => pax(&data, &mut extended)?,
                        _ => self.global(&data)?,
                    }
                }
                kind => {
                    let member = self.member(&block, kind, size, extended)?;
                    return Ok(Some(member));
                }
            }
        }
    }

    /// A header for all members that follow. containerd and Docker ignore it; tar(1) and Python do not.
    fn global(&mut self, data: &[u8]) -> io::Result<()> {
        let mut all = Extended::default();
        pax(data, &mut all)?;
        if all.path.is_some() || all.link.is_some() || all.size.is_some() || all.uid.is_some() || all.gid.is_some() {
            self.oddities.push("a header for all that follow, which some tools obey and others ignore");
        }
        Ok(())
    }

    fn member(&mut self, block: &[u8; BLOCK], kind: u8, size: u64, extended: Extended) -> io::Result<Member> {
        let mut name = text(&block[..100]);
        if &block[257..265] == b"ustar\x0000" && block[345] != 0 {
            let end = if &block[508..] == b"tar\0" { 476 } else { 500 };
            let mut whole = text(&block[345..end]);
            whole.push(b'/');
            whole.extend(name);
            name = whole;
        }
        let name = extended.sparse.name.clone().or(extended.path).unwrap_or(name);
        let kind = match kind {
            0 if name.ends_with(b"/") => b'5', // as archives from before POSIX have directories
            0 | b'7' | b'S' => b'0',
            other => other,
        };
        let whole = extended.size.unwrap_or(size);
        if extended.size.is_some_and(|other| other != size && size != 0 && size < 1 << 33) {
            self.oddities.push("its two headers differ in its size");
        }
        let mut member = Member {
            name,
            kind,
            mode: (number(&block[100..108])? & 0o7777) as u32,
            uid: extended.uid.map_or_else(|| number(&block[108..116]), Ok)?,
            gid: extended.gid.map_or_else(|| number(&block[116..124]), Ok)?,
            size: whole,
            stored: whole,
            link: extended.link.unwrap_or_else(|| text(&block[157..257])),
            major: 0,
            minor: 0,
            capability: extended.capability,
            is_overlay: extended.is_overlay,
        };
        if matches!(kind, b'3' | b'4') {
            member.major = number(&block[329..337])? as u32;
            member.minor = number(&block[337..345])? as u32;
        }
        if matches!(member.kind, b'1'..=b'6') {
            // Links may have a size, for which there is no content.
            (member.size, member.stored) = (0, 0);
        }
        if member.size > MAX_SIZE {
            return Err(bad("a member of the archive is larger than any file"));
        }
        self.left = member.stored;
        self.padding = member.stored.wrapping_neg() % BLOCK as u64;
        self.size = member.size;
        if block[156] == b'S' {
            let runs = self.old_map(block)?;
            self.sparse(&mut member, number(&block[483..495])?, runs)?;
        } else if member.kind == b'0' {
            if let Some(real) = extended.sparse.size {
                let numbers = if extended.sparse.major == b"1" { Some(self.map_lines()?) } else { extended.sparse.map };
                if let Some(numbers) = numbers {
                    let runs = numbers.chunks(2).map(|pair| (pair[0], pair.get(1).copied().unwrap_or(u64::MAX)));
                    self.sparse(&mut member, real, runs.collect())?;
                }
            }
        }
        Ok(member)
    }

    /// The map of GNU's own format: four runs in the header, more in blocks that follow it.
    fn old_map(&mut self, header: &[u8; BLOCK]) -> io::Result<Vec<(u64, u64)>> {
        let mut runs = Vec::new();
        let (mut block, mut from, mut count, mut more) = (*header, 386, 4, header[482]);
        loop {
            for field in block[from..from + 24 * count].chunks(24).take_while(|field| field[0] != 0) {
                runs.push((number(&field[..12])?, number(&field[12..])?));
            }
            if more == 0 {
                return Ok(runs);
            }
            if runs.len() > MAX_SPARSE {
                return Err(bad(BAD_MAP));
            }
            block = self.block()?.ok_or_else(|| bad(ARCHIVE_CUT))?;
            (from, count, more) = (0, 21, block[504]);
        }
    }

    /// The map of format 1.0: a count, then that many pairs, a number each line, padded to a block.
    fn map_lines(&mut self) -> io::Result<Vec<u64>> {
        let (mut numbers, mut line) = (Vec::new(), Vec::new());
        let mut wanted = usize::MAX;
        while numbers.len() < wanted {
            self.left = self.left.checked_sub(BLOCK as u64).ok_or_else(|| bad(BAD_MAP))?;
            for byte in self.block()?.ok_or_else(|| bad(ARCHIVE_CUT))? {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                if numbers.len() >= wanted {
                    break;
                }
                let number: u64 =
                    std::str::from_utf8(&line).ok().and_then(|text| text.parse().ok()).ok_or_else(|| bad(BAD_MAP))?;
                line.clear();
                if wanted == usize::MAX {
                    wanted = usize::try_from(number).ok().and_then(|n| n.checked_mul(2)).unwrap_or(usize::MAX);
                    if wanted > 2 * MAX_SPARSE {
                        return Err(bad(BAD_MAP));
                    }
                } else {
                    numbers.push(number);
                }
            }
            if numbers.len() < wanted && line.len() > 20 {
                return Err(bad(BAD_MAP));
            }
        }
        Ok(numbers)
    }

    fn sparse(&mut self, member: &mut Member, real: u64, runs: Vec<(u64, u64)>) -> io::Result<()> {
        let (mut at, mut stored) = (0, 0_u64);
        for (offset, length) in &runs {
            let end = offset.checked_add(*length).filter(|end| *offset >= at && *end <= real);
            at = end.ok_or_else(|| bad(BAD_MAP))?;
            stored += length;
        }
        if stored > self.left || real > MAX_SIZE {
            return Err(bad(BAD_MAP));
        }
        (member.size, self.size, self.is_sparse) = (real, real, true);
        self.runs = runs.into_iter().filter(|(_, length)| *length > 0).rev().collect();
        Ok(())
    }

    /// Where the next bytes of the content are that are no hole, and how many: (offset, length).
    pub fn run(&self) -> Option<(u64, u64)> {
        if self.is_sparse {
            self.runs.last().copied()
        } else {
            (self.left > 0).then_some((self.at, self.left))
        }
    }

    /// Go to the next bytes that are no hole.
    pub fn pass_hole(&mut self) {
        self.at = self.run().map_or(self.size, |(offset, _)| offset.max(self.at));
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(bad("an extension header of the archive is too large"));
        }
        let padded = size.next_multiple_of(BLOCK as u64);
        let mut data = vec![0; padded as usize];
        self.stream.read_exact(&mut data).map_err(|_| bad(ARCHIVE_CUT))?;
        data.truncate(size as usize);
        Ok(data)
    }
}

/// The current member's content, with holes as zeros.
impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut step = (self.size - self.at).min(buffer.len() as u64);
        if step == 0 {
            return Ok(0);
        }
        if self.is_sparse {
            let next = self.runs.last().map_or(self.size, |(offset, _)| *offset);
            if self.at < next {
                step = step.min(next - self.at);
                buffer[..step as usize].fill(0);
                self.at += step;
                return Ok(step as usize);
            }
            step = step.min(self.runs.last().map_or(0, |(_, length)| *length));
        }
        let done = self.stream.read(&mut buffer[..step as usize])? as u64;
        if done == 0 {
            return Err(bad(ARCHIVE_CUT));
        }
        self.left -= done;
        self.at += done;
        if let Some((_, length)) = self.runs.last().copied().filter(|_| self.is_sparse) {
            self.runs.pop();
            if length > done {
                self.runs.push((self.at, length - done));
            }
        }
        Ok(done as usize)
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
        if matches!(key, b"path" | b"linkpath" | b"GNU.sparse.name") && value.contains(&0) {
            return Err(wrong());
        }
        match key {
            // An empty value takes a record back.
            b"path" => into.path = Some(value.to_vec()).filter(|name| !name.is_empty()),
            b"linkpath" => into.link = Some(value.to_vec()).filter(|name| !name.is_empty()),
            b"size" if value.is_empty() => into.size = None,
            b"size" => into.size = Some(whole().ok_or_else(wrong)?),
            b"GNU.sparse.name" => into.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => into.sparse.size = Some(whole().ok_or_else(wrong)?),
            b"GNU.sparse.major" => into.sparse.major = value.to_vec(),
            b"GNU.sparse.map" | b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let map = into.sparse.map.get_or_insert_default();
                for one in value.split(|byte| *byte == b',').filter(|one| !one.is_empty()) {
                    map.push(std::str::from_utf8(one).ok().and_then(|t| t.parse().ok()).ok_or_else(wrong)?);
                }
                if map.len() > 2 * MAX_SPARSE {
                    return Err(wrong());
                }
            }
            b"uid" => into.uid = whole(),
            b"gid" => into.gid = whole(),
            b"SCHILY.xattr.security.capability" => into.capability = value.to_vec(),
            _ if key.starts_with(b"SCHILY.xattr.trusted.overlay.")
                || key.starts_with(b"SCHILY.xattr.user.overlay.") =>
            {
                into.is_overlay = true;
            }
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
