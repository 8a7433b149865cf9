//! A layer's bytes, decompressed: plain, gzip or zstd, told by their first bytes.
//!
//! Sources: RFC 1952 (gzip), RFC 8878 (zstd).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{channel, sync_channel, Receiver, Sender, SyncSender};
use std::sync::{atomic::AtomicU64, atomic::Ordering, Arc};

use crate::inflate::{self, Input, Output, SLACK, WINDOW};

const PIECE: usize = 512 << 10;

/// A part of a disk.
pub struct Part {
    file: Arc<File>,
    at: u64,
    end: u64,
    taken: Arc<AtomicU64>,
}

impl Part {
    pub fn new(file: Arc<File>, offset: u64, size: u64) -> Part {
        Part { file, at: offset, end: offset.saturating_add(size), taken: Arc::default() }
    }

    /// A count of the bytes that were read so far, which goes on being true.
    pub fn counter(&self) -> Arc<AtomicU64> {
        self.taken.clone()
    }
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from((self.end - self.at).min(buffer.len() as u64)).unwrap_or(0);
        let done = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += done as u64;
        self.taken.fetch_add(done as u64, Ordering::Relaxed);
        Ok(done)
    }
}

/// How a layer is packed, by its first bytes.
pub fn kind_of(head: &[u8]) -> &'static str {
    if head.starts_with(&[0x1f, 0x8b]) {
        "gzip"
    } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
    // a frame that readers skip
    {
        "zstd"
    } else if head.starts_with(b"BZh") {
        "bzip2"
    } else if head.starts_with(&[0xfd, b'7', b'z', b'X', b'Z']) {
        "xz"
    } else {
        "plain"
    }
}

/// The decompressed bytes of `source`, made by a thread of their own.
pub fn unpacked(source: Box<dyn Read + Send>, kind: &str) -> io::Result<Pieces> {
    let kind = match kind {
        "gzip" | "zstd" | "plain" => kind.to_string(),
        other => return Err(io::Error::other(format!("{other} is no packing of the OCI specification"))),
    };
    let (sender, receiver) = sync_channel(4);
    let (back, spare) = channel();
    std::thread::spawn(move || {
        let mut sink = Sink { piece: vec![0; SIZE], at: WINDOW, from: WINDOW, sender, spare };
        let outcome = match kind.as_str() {
            "gzip" => gunzip(source, &mut sink),
            "zstd" => copy(&mut Zstd { source: io::BufReader::with_capacity(PIECE, source), decoder: None }, &mut sink),
            _ => copy(&mut { source }, &mut sink),
        };
        // What was made before an error is part of the stream, too. Nobody may be there any more to take it.
        if sink.turn().is_ok() {
            if let Err(error) = outcome {
                let _ = sink.sender.send(Err(error));
            }
        }
    });
    Ok(Pieces { receiver, back, piece: Vec::new(), at: 0, end: 0, passed: 0 })
}

/// Bytes of a piece, behind as many as a match reaches back to.
const SIZE: usize = WINDOW + PIECE + SLACK;

/// Where a thread puts what it makes.
struct Sink {
    piece: Vec<u8>,
    at: usize,
    /// Where that begins which was not handed on yet.
    from: usize,
    sender: SyncSender<io::Result<(Vec<u8>, usize, usize)>>,
    /// Pieces that were read: memory that the machine need not clear again.
    spare: Receiver<Vec<u8>>,
}

impl Output for Sink {
    fn parts(&mut self) -> (&mut [u8], usize) {
        (&mut self.piece, self.at)
    }

    fn filled(&mut self, at: usize) {
        self.at = at;
    }

    fn turn(&mut self) -> io::Result<()> {
        let mut next = self.spare.try_recv().unwrap_or_else(|_| vec![0; SIZE]);
        next[..WINDOW].copy_from_slice(&self.piece[self.at - WINDOW..self.at]);
        let made = (std::mem::replace(&mut self.piece, next), self.from, self.at);
        (self.at, self.from) = (WINDOW, WINDOW);
        self.sender.send(Ok(made)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

fn copy(source: &mut dyn Read, sink: &mut Sink) -> io::Result<()> {
    loop {
        let done = source.read(&mut sink.piece[sink.at..])?;
        if done == 0 {
            return Ok(());
        }
        sink.at += done;
        if sink.at == SIZE {
            sink.turn()?;
        }
    }
}

/// What comes out of the thread.
pub struct Pieces {
    receiver: Receiver<io::Result<(Vec<u8>, usize, usize)>>,
    back: Sender<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
    end: usize,
    /// How many bytes were read or skipped.
    pub passed: u64,
}

impl Pieces {
    fn fill(&mut self) -> io::Result<bool> {
        while self.at == self.end {
            let Ok(next) = self.receiver.recv() else { return Ok(false) };
            let old = std::mem::take(&mut self.piece);
            if !old.is_empty() {
                let _ = self.back.send(old);
            }
            (self.at, self.end) = (0, 0);
            (self.piece, self.at, self.end) = next?;
        }
        Ok(true)
    }

    /// Go past `size` bytes; how many there were.
    pub fn skip(&mut self, size: u64) -> io::Result<u64> {
        let mut left = size;
        while left > 0 && self.fill()? {
            let step = left.min((self.end - self.at) as u64);
            self.at += usize::try_from(step).unwrap_or(0);
            left -= step;
        }
        self.passed += size - left;
        Ok(size - left)
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || !self.fill()? {
            return Ok(0);
        }
        let step = buffer.len().min(self.end - self.at);
        buffer[..step].copy_from_slice(&self.piece[self.at..self.at + step]);
        self.at += step;
        self.passed += step as u64;
        Ok(step)
    }
}

/// Tables for eight bytes at a time: the remainders of a byte that 0 to 7 more follow.
static CRC: [[u32; 256]; 8] = {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 != 0 { value >> 1 ^ 0xedb8_8320 } else { value >> 1 };
            bit += 1;
        }
        tables[0][byte] = value;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let last = tables[table - 1][byte];
            tables[table][byte] = last >> 8 ^ tables[0][(last & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
};

/// Go on with a CRC-32 as gzip has it.
fn crc(mut sum: u32, data: &[u8]) -> u32 {
    let mut words = data.chunks_exact(8);
    for word in &mut words {
        let mut next = 0;
        for (at, byte) in word.iter().enumerate() {
            let byte = if at < 4 { byte ^ (sum >> (8 * at)) as u8 } else { *byte };
            next ^= CRC[7 - at][usize::from(byte)];
        }
        sum = next;
    }
    words.remainder().iter().fold(sum, |sum, byte| sum >> 8 ^ CRC[0][usize::from(sum as u8 ^ byte)])
}

/// What follows in a gzip stream has to be there.
fn needed(input: &mut Input) -> io::Result<u8> {
    input.byte()?.ok_or_else(inflate::cut_short)
}

/// Read a member's header; false at the end of the stream.
fn header(input: &mut Input) -> io::Result<bool> {
    // Zeros between and behind members are padding, as for gzip(1).
    let first = loop {
        match input.byte()? {
            None => return Ok(false),
            Some(0) => {}
            Some(byte) => break byte,
        }
    };
    if first != 0x1f || needed(input)? != 0x8b || needed(input)? != 8 {
        return Err(io::Error::other("what follows in the gzip stream is no gzip"));
    }
    let flags = needed(input)?;
    for _ in 0..6 {
        needed(input)?;
    }
    if flags & 4 != 0 {
        let length = u16::from_le_bytes([needed(input)?, needed(input)?]);
        for _ in 0..length {
            needed(input)?;
        }
    }
    for bit in [8, 16] {
        if flags & bit != 0 {
            while needed(input)? != 0 {}
        }
    }
    if flags & 2 != 0 {
        needed(input)?;
        needed(input)?;
    }
    Ok(true)
}

/// A member's output on its way: its checksum (not yet inverted) and its length.
struct Summed<'a> {
    sink: &'a mut Sink,
    from: usize,
    sum: u32,
    length: u32,
}

impl Summed<'_> {
    fn add(&mut self) {
        let made = &self.sink.piece[self.from..self.sink.at];
        self.sum = crc(self.sum, made);
        self.length = self.length.wrapping_add(made.len() as u32);
        self.from = self.sink.at;
    }
}

impl Output for Summed<'_> {
    fn parts(&mut self) -> (&mut [u8], usize) {
        self.sink.parts()
    }

    fn filled(&mut self, at: usize) {
        self.sink.at = at;
    }

    fn turn(&mut self) -> io::Result<()> {
        self.add();
        self.from = WINDOW;
        self.sink.turn()
    }
}

/// Unpack gzip, of one member or several.
fn gunzip(source: Box<dyn Read + Send>, sink: &mut Sink) -> io::Result<()> {
    let mut input = Input::new(source);
    let mut tables = Box::<inflate::Tables>::default();
    while header(&mut input)? {
        let floor = sink.at;
        let mut output = Summed { from: floor, sink, sum: u32::MAX, length: 0 };
        inflate::inflate(&mut input, &mut output, &mut tables, floor)?;
        output.add();
        let mut trailer = [0; 8];
        for byte in &mut trailer {
            *byte = needed(&mut input)?;
        }
        if trailer[..4] != (!output.sum).to_le_bytes() || trailer[4..] != output.length.to_le_bytes() {
            return Err(io::Error::other("the gzip stream has a wrong checksum"));
        }
    }
    Ok(())
}

/// zstd, of one frame or several.
struct Zstd {
    source: io::BufReader<Box<dyn Read + Send>>,
    decoder: Option<Box<ruzstd::decoding::FrameDecoder>>,
}

impl Read for Zstd {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use ruzstd::decoding::BlockDecodingStrategy;
        use std::io::BufRead;
        loop {
            if self.decoder.is_none() {
                if self.source.fill_buf()?.is_empty() {
                    return Ok(0);
                }
                let mut decoder = Box::new(ruzstd::decoding::FrameDecoder::new());
                match decoder.reset(&mut self.source) {
                    Ok(()) => self.decoder = Some(decoder),
                    Err(ruzstd::decoding::errors::FrameDecoderError::ReadFrameHeaderError(
                        ruzstd::decoding::errors::ReadFrameHeaderError::SkipFrame { length, .. },
                    )) => {
                        io::copy(&mut (&mut self.source).take(u64::from(length)), &mut io::sink())?;
                        continue;
                    }
                    Err(error) => return Err(io::Error::other(format!("the zstd stream is damaged: {error}"))),
                }
            }
            let Some(decoder) = self.decoder.as_mut() else { return Ok(0) };
            if decoder.can_collect() == 0 && !decoder.is_finished() {
                decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBytes(PIECE))
                    .map_err(|error| io::Error::other(format!("the zstd stream is damaged: {error}")))?;
            }
            let done = decoder.read(buffer)?;
            if done > 0 {
                return Ok(done);
            }
            if decoder.is_finished() {
                self.decoder = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(data: Vec<u8>) -> io::Result<Vec<u8>> {
        let kind = kind_of(&data);
        let mut out = Vec::new();
        unpacked(Box::new(io::Cursor::new(data)), kind)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
        out.extend(miniz_oxide::deflate::compress_to_vec(data, 6));
        out.extend((!crc(u32::MAX, data)).to_le_bytes());
        out.extend((data.len() as u32).to_le_bytes());
        out
    }

    #[test]
    fn members_follow_one_another() {
        let data: Vec<u8> = (0..3_000_000_u32).map(|at| (at.wrapping_mul(at) >> 7) as u8).collect();
        let mut packed = gzip(&data);
        packed.extend(gzip(b"and more"));
        packed.extend([0; 100]);
        let mut wanted = data;
        wanted.extend(b"and more");
        assert!(read(packed).unwrap() == wanted);
    }

    #[test]
    fn checksums() {
        assert_eq!(!crc(u32::MAX, b"123456789"), 0xcbf4_3926);
        assert_eq!(!crc(crc(u32::MAX, b"1234"), b"56789"), 0xcbf4_3926);
        let mut packed = gzip(b"some text");
        let last = packed.len() - 1;
        packed[last] ^= 1;
        assert!(read(packed).unwrap_err().to_string().contains("checksum"));
    }

    #[test]
    fn what_is_cut_short_is_an_error() {
        let packed = gzip(&[7; 100_000]);
        assert!(read(packed[..packed.len() / 2].to_vec()).is_err());
        let mut pieces = unpacked(Box::new(io::Cursor::new(packed[..packed.len() - 12].to_vec())), "gzip").unwrap();
        let mut made = Vec::new();
        assert!(pieces.read_to_end(&mut made).is_err());
        assert!(made.len() > 90_000, "{}", made.len());
        assert!(read(vec![0x1f, 0x8b, 8, 0]).is_err());
        assert!(read(b"BZh91AY".to_vec()).is_err());
        assert!(read(vec![0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3]).is_err());
    }

    #[test]
    fn plain_bytes_stay() {
        assert_eq!(read(b"plain".to_vec()).unwrap(), b"plain");
    }
}
