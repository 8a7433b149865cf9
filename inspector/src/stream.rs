//! A layer's bytes, decompressed: plain, gzip or zstd, told by their first bytes.
//!
//! Sources: RFC 1952 (gzip), RFC 8878 (zstd).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{sync_channel, Receiver};
use std::sync::{atomic::AtomicU64, atomic::Ordering, Arc};

use miniz_oxide::inflate::core::{decompress, inflate_flags, DecompressorOxide};
use miniz_oxide::inflate::TINFLStatus;

const PIECE: usize = 256 << 10;
const WINDOW: usize = 32 << 10;

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
    let mut reader: Box<dyn Read + Send> = match kind {
        "gzip" => Box::new(Gzip::new(source)),
        "zstd" => Box::new(Zstd { source: io::BufReader::with_capacity(PIECE, source), decoder: None }),
        "plain" => source,
        other => return Err(io::Error::other(format!("{other} is no packing of the OCI specification"))),
    };
    let (sender, receiver) = sync_channel(8);
    std::thread::spawn(move || loop {
        let mut piece = vec![0; PIECE];
        let mut filled = 0;
        let mut failure = None;
        while filled < PIECE {
            match reader.read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(done) => filled += done,
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        let over = filled < PIECE;
        piece.truncate(filled);
        if !piece.is_empty() && sender.send(Ok(piece)).is_err() {
            return;
        }
        if let Some(error) = failure {
            let _ = sender.send(Err(error));
            return;
        }
        if over {
            return;
        }
    });
    Ok(Pieces { receiver, piece: Vec::new(), at: 0, passed: 0 })
}

/// What comes out of the thread.
pub struct Pieces {
    receiver: Receiver<io::Result<Vec<u8>>>,
    piece: Vec<u8>,
    at: usize,
    /// How many bytes were read or skipped.
    pub passed: u64,
}

impl Pieces {
    fn fill(&mut self) -> io::Result<bool> {
        while self.at == self.piece.len() {
            match self.receiver.recv() {
                Ok(piece) => {
                    self.piece = piece?;
                    self.at = 0;
                }
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Go past `size` bytes; how many there were.
    pub fn skip(&mut self, size: u64) -> io::Result<u64> {
        let mut left = size;
        while left > 0 && self.fill()? {
            let step = left.min((self.piece.len() - self.at) as u64);
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
        let step = buffer.len().min(self.piece.len() - self.at);
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

/// gzip, of one member or several.
struct Gzip {
    source: Box<dyn Read + Send>,
    input: Vec<u8>,
    from: usize,
    to: usize,
    state: Box<DecompressorOxide>,
    /// The last 32 KiB before `done`, then what was made since: twice the size of the window and a piece.
    output: Vec<u8>,
    at: usize,
    given: usize,
    stage: Stage,
    /// Of the member's output until now: its checksum (not yet inverted), and its length.
    sum: u32,
    length: u32,
    /// What went wrong behind the output that is still to be given.
    failure: Option<io::Error>,
}

enum Stage {
    Header,
    Body,
    Over,
}

impl Gzip {
    fn new(source: Box<dyn Read + Send>) -> Gzip {
        Gzip {
            source,
            input: vec![0; PIECE],
            from: 0,
            to: 0,
            state: Box::default(),
            output: vec![0; 4 * PIECE],
            at: 0,
            given: 0,
            stage: Stage::Header,
            sum: u32::MAX,
            length: 0,
            failure: None,
        }
    }

    fn fail(&mut self, text: &str) {
        self.failure = Some(io::Error::other(text.to_string()));
    }

    fn more(&mut self) -> io::Result<bool> {
        self.input.copy_within(self.from..self.to, 0);
        self.to -= self.from;
        self.from = 0;
        if self.to == self.input.len() {
            return Ok(true);
        }
        let done = self.source.read(&mut self.input[self.to..])?;
        self.to += done;
        Ok(done > 0)
    }

    fn byte(&mut self) -> io::Result<Option<u8>> {
        if self.from == self.to && !self.more()? {
            return Ok(None);
        }
        self.from += 1;
        Ok(Some(self.input[self.from - 1]))
    }

    fn needed(&mut self) -> io::Result<u8> {
        self.byte()?.ok_or_else(|| io::Error::other("the gzip stream is cut short"))
    }

    /// Read a member's header; false at the end of the stream.
    fn header(&mut self) -> io::Result<bool> {
        // Zeros between and behind members are padding, as for gzip(1).
        let first = loop {
            match self.byte()? {
                None => return Ok(false),
                Some(0) => {}
                Some(byte) => break byte,
            }
        };
        if first != 0x1f || self.needed()? != 0x8b || self.needed()? != 8 {
            return Err(io::Error::other("what follows in the gzip stream is no gzip"));
        }
        let flags = self.needed()?;
        for _ in 0..6 {
            self.needed()?;
        }
        if flags & 4 != 0 {
            let length = u16::from_le_bytes([self.needed()?, self.needed()?]);
            for _ in 0..length {
                self.needed()?;
            }
        }
        for bit in [8, 16] {
            if flags & bit != 0 {
                while self.needed()? != 0 {}
            }
        }
        if flags & 2 != 0 {
            self.needed()?;
            self.needed()?;
        }
        Ok(true)
    }
}

impl Read for Gzip {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.given < self.at {
                let step = buffer.len().min(self.at - self.given);
                buffer[..step].copy_from_slice(&self.output[self.given..self.given + step]);
                self.given += step;
                return Ok(step);
            }
            if let Some(error) = self.failure.take() {
                return Err(error);
            }
            match self.stage {
                Stage::Over => return Ok(0),
                Stage::Header => {
                    if !self.header()? {
                        self.stage = Stage::Over;
                        return Ok(0);
                    }
                    self.state.init();
                    (self.sum, self.length) = (u32::MAX, 0);
                    self.stage = Stage::Body;
                }
                Stage::Body => {
                    if self.at > self.output.len() - PIECE {
                        self.output.copy_within(self.at - WINDOW..self.at, 0);
                        self.at = WINDOW;
                        self.given = WINDOW;
                    }
                    let mut last = false;
                    if self.from == self.to {
                        last = !self.more()?;
                    }
                    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF
                        | if last { 0 } else { inflate_flags::TINFL_FLAG_HAS_MORE_INPUT };
                    let (status, taken, made) =
                        decompress(&mut self.state, &self.input[self.from..self.to], &mut self.output, self.at, flags);
                    self.from += taken;
                    self.sum = crc(self.sum, &self.output[self.at..self.at + made]);
                    self.length = self.length.wrapping_add(made as u32);
                    self.at += made;
                    match status {
                        TINFLStatus::Done => {
                            let mut trailer = [0; 8];
                            for byte in &mut trailer {
                                *byte = self.needed()?;
                            }
                            if trailer[..4] != (!self.sum).to_le_bytes() || trailer[4..] != self.length.to_le_bytes() {
                                self.fail("the gzip stream has a wrong checksum");
                            }
                            self.stage = Stage::Header;
                        }
                        TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput => {}
                        TINFLStatus::FailedCannotMakeProgress => self.fail("the gzip stream is cut short"),
                        _ => self.fail("the gzip stream is damaged"),
                    }
                }
            }
        }
    }
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
