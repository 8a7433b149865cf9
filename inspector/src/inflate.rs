//! Decompresses DEFLATE, in a way that an emulated processor is quick at.
//!
//! Under emulation each byte of an image costs ten times what it costs elsewhere, and most of them come out of here. So
//! the hot loop has few branches and no calls, refills its bits by whole words, and copies matches by words, too. Nothing
//! is suspended within a block: the input is read, and the output handed on, from in here.
//!
//! Source: RFC 1951. Codes that are incomplete are refused as zlib refuses them.

use std::io::{self, Read};

/// How far back a match can reach.
pub const WINDOW: usize = 32 << 10;
/// Room behind the output that one step of the loop may write to: the longest match, rounded up to words, and literals.
pub const SLACK: usize = 288;

const LITERAL_BITS: u32 = 11;
const DISTANCE_BITS: u32 = 8;
const LENGTH_BITS: u32 = 7;
/// Zeros behind the input, and how much of it one step of the loop may take.
const MARGIN: usize = 32;
const INPUT: usize = 256 << 10;

// An entry of a table: in the upper half what it stands for, and whether that is a literal; in bits 8 to 12 how many
// extra bits follow; in the lowest byte how many bits the code has; and what else it may be.
const IS_LITERAL: u32 = 1 << 31;
const IS_TABLE: u32 = 1 << 15;
const IS_END: u32 = 1 << 14;
const IS_WRONG: u32 = 1 << 13;
const IS_SPECIAL: u32 = IS_TABLE | IS_END | IS_WRONG;
const VALUE: u32 = 0x7fff;

type Table<const SIZE: usize> = [u32; SIZE];

/// Where the output goes: a buffer of more than `WINDOW + SLACK` bytes, of which the first `WINDOW` are there from the
/// start.
pub trait Output {
    /// The buffer, and how far it is filled.
    fn parts(&mut self) -> (&mut [u8], usize);
    /// `at` bytes of it are filled now.
    fn filled(&mut self, at: usize);
    /// Hand on what was made, and go on in a buffer that begins with the last `WINDOW` bytes of it.
    fn turn(&mut self) -> io::Result<()>;
}

/// The input of one or several streams.
pub struct Input {
    source: Box<dyn Read + Send>,
    data: Vec<u8>,
    at: usize,
    end: usize,
    is_over: bool,
    bits: u64,
    count: u32,
}

pub fn damaged() -> io::Error {
    io::Error::other("the gzip stream is damaged")
}

pub fn cut_short() -> io::Error {
    io::Error::other("the gzip stream is cut short")
}

fn word(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(data[at..at + 8].try_into().unwrap_or_default())
}

impl Input {
    pub fn new(source: Box<dyn Read + Send>) -> Input {
        Input { source, data: vec![0; INPUT + MARGIN], at: 0, end: 0, is_over: false, bits: 0, count: 0 }
    }

    /// How far the loop may go before it has to ask for more.
    fn limit(&self) -> usize {
        if self.is_over {
            self.end + 8
        } else {
            self.end.saturating_sub(MARGIN)
        }
    }

    /// Read on. An error at the end of the input.
    fn more(&mut self) -> io::Result<()> {
        if self.is_over {
            return Err(cut_short());
        }
        // Bytes whose bits are waiting stay, since `align` may give them back.
        let from = self.at.saturating_sub(8);
        self.data.copy_within(from..self.end, 0);
        self.end -= from;
        self.at -= from;
        while self.end < 2 * MARGIN && !self.is_over {
            let done = self.source.read(&mut self.data[self.end..INPUT])?;
            self.end += done;
            self.is_over = done == 0;
        }
        self.data[self.end..self.end + MARGIN].fill(0);
        Ok(())
    }

    /// Have at least 56 bits; zeros behind the end of the input.
    fn refill(&mut self) -> io::Result<()> {
        if self.at >= self.limit() {
            self.more()?;
        }
        self.bits |= word(&self.data, self.at) << self.count;
        self.at += ((63 - self.count) >> 3) as usize;
        self.count |= 56;
        Ok(())
    }

    /// The next bits, at most 32 of those that are there.
    fn take(&mut self, count: u32) -> u32 {
        let value = self.bits & !(u64::MAX << count);
        self.bits >>= count;
        self.count -= count;
        value as u32
    }

    fn bits(&mut self, count: u32) -> io::Result<u32> {
        if self.count < count {
            self.refill()?;
        }
        Ok(self.take(count))
    }

    /// Drop the rest of a byte, and give back whole ones: what follows is read by bytes.
    fn align(&mut self) -> io::Result<()> {
        self.at -= (self.count >> 3) as usize;
        (self.bits, self.count) = (0, 0);
        if self.at > self.end {
            return Err(cut_short());
        }
        Ok(())
    }

    /// The next byte, where no bits are waiting; `None` at the end.
    pub fn byte(&mut self) -> io::Result<Option<u8>> {
        if self.at == self.end {
            if self.is_over {
                return Ok(None);
            }
            self.more()?;
            if self.at == self.end {
                return Ok(None);
            }
        }
        self.at += 1;
        Ok(Some(self.data[self.at - 1]))
    }
}

const fn entry(value: u32, extra: u32) -> u32 {
    value << 16 | extra << 8
}

/// What each symbol for literals and lengths stands for.
static LITERALS: [u32; 288] = {
    let mut table = [IS_WRONG; 288];
    let mut at = 0;
    while at < 256 {
        table[at] = IS_LITERAL | entry(at as u32, 0);
        at += 1;
    }
    table[256] = IS_END;
    let (mut base, mut symbol) = (3, 257);
    while symbol < 285 {
        let extra = if symbol < 265 { 0 } else { (symbol as u32 - 261) / 4 };
        table[symbol] = entry(base, extra);
        base += 1 << extra;
        symbol += 1;
    }
    table[285] = entry(258, 0);
    table
};

static DISTANCES: [u32; 32] = {
    let mut table = [IS_WRONG; 32];
    let (mut base, mut symbol) = (1, 0);
    while symbol < 30 {
        let extra = if symbol < 4 { 0 } else { (symbol as u32 - 2) / 2 };
        table[symbol] = entry(base, extra);
        base += 1 << extra;
        symbol += 1;
    }
    table
};

static LENGTHS: [u32; 19] = {
    let mut table = [0; 19];
    let mut at = 0;
    while at < 19 {
        table[at] = entry(at as u32, 0);
        at += 1;
    }
    table
};

/// Make the table of a canonical code. The first `bits` bits of the input choose an entry; longer codes have further
/// tables behind the first one.
fn build<const SIZE: usize>(lengths: &[u8], meanings: &[u32], bits: u32, table: &mut Table<SIZE>) -> io::Result<()> {
    let mut counts = [0_u32; 16];
    for length in lengths {
        counts[usize::from(*length & 15)] += 1;
    }
    counts[0] = 0;
    let longest = (1..16).rev().find(|length| counts[*length] > 0).unwrap_or(0);
    let mut next = [0_u32; 17];
    let mut left = 1_i32;
    for length in 1..16 {
        left = 2 * left - counts[length] as i32;
        if left < 0 {
            return Err(damaged());
        }
        next[length + 1] = (next[length] + counts[length]) << 1;
    }
    // One code of one bit may be all, and none at all where nothing is to be coded.
    if left > 0 && (longest > 1 || bits == LENGTH_BITS) {
        return Err(damaged());
    }
    let first = 1 << bits;
    table[..first].fill(IS_WRONG | 1);
    let mut codes = [0_u16; 288];
    for (symbol, length) in lengths.iter().enumerate().filter(|(_, length)| **length > 0) {
        let code = &mut next[usize::from(*length)];
        let reversed = (*code).reverse_bits() >> (32 - u32::from(*length));
        *code += 1;
        codes[symbol] = reversed as u16;
        if u32::from(*length) > bits {
            // For now, the longest code that begins like this.
            let place = &mut table[reversed as usize & (first - 1)];
            *place = IS_TABLE | (*place & 15).max(u32::from(*length) - bits);
        } else {
            let value = meanings[symbol] | u32::from(*length);
            for place in table[reversed as usize..first].iter_mut().step_by(1 << length) {
                *place = value;
            }
        }
    }
    let mut end = first;
    if longest as u32 > bits {
        for place in table[..first].iter_mut().filter(|place| **place & IS_TABLE != 0) {
            let size = *place & 15;
            *place = IS_TABLE | (end as u32) << 16 | size << 8 | bits;
            end += 1 << size;
        }
        if end > SIZE {
            return Err(damaged());
        }
        table[first..end].fill(IS_WRONG | 1);
        for (symbol, length) in lengths.iter().enumerate().filter(|(_, length)| u32::from(**length) > bits) {
            let code = usize::from(codes[symbol]);
            let link = table[code & (first - 1)];
            let from = (link >> 16 & VALUE) as usize & (SIZE - 1);
            let length = u32::from(*length) - bits;
            let value = meanings[symbol] | length;
            for place in table[from..from + (1 << (link >> 8 & 15))].iter_mut().skip(code >> bits).step_by(1 << length)
            {
                *place = value;
            }
        }
    }
    Ok(())
}

/// The tables of a block.
pub struct Tables {
    literals: Table<4096>,
    distances: Table<1024>,
}

impl Default for Tables {
    fn default() -> Self {
        Tables { literals: [0; 4096], distances: [0; 1024] }
    }
}

impl Tables {
    fn fixed(&mut self) -> io::Result<()> {
        let mut lengths = [8; 288];
        lengths[144..256].fill(9);
        lengths[256..280].fill(7);
        build(&lengths, &LITERALS, LITERAL_BITS, &mut self.literals)?;
        build(&[5; 32], &DISTANCES, DISTANCE_BITS, &mut self.distances)
    }

    /// Read the codes of a block.
    fn read(&mut self, input: &mut Input) -> io::Result<()> {
        const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
        let literals = input.bits(5)? as usize + 257;
        let distances = input.bits(5)? as usize + 1;
        let count = input.bits(4)? as usize + 4;
        if literals > 286 || distances > 30 {
            return Err(damaged());
        }
        let mut lengths = [0_u8; 19];
        for place in &ORDER[..count] {
            lengths[*place] = input.bits(3)? as u8;
        }
        let mut table: Table<128> = [0; 128];
        build(&lengths, &LENGTHS, LENGTH_BITS, &mut table)?;
        let mut all = [0_u8; 286 + 30];
        let mut at = 0;
        while at < literals + distances {
            input.refill()?;
            let found = table[input.bits as usize & 127];
            if found & IS_WRONG != 0 {
                return Err(damaged());
            }
            input.take(found & 31);
            let (value, times) = match found >> 16 & VALUE {
                16 if at == 0 => return Err(damaged()),
                16 => (all[at - 1], 3 + input.take(2)),
                17 => (0, 3 + input.take(3)),
                18 => (0, 11 + input.take(7)),
                length => (length as u8, 1),
            };
            let to = at + times as usize;
            if to > literals + distances {
                return Err(damaged());
            }
            all[at..to].fill(value);
            at = to;
        }
        // A block that cannot end is none.
        if all[256] == 0 {
            return Err(damaged());
        }
        build(&all[..literals], &LITERALS, LITERAL_BITS, &mut self.literals)?;
        build(&all[literals..at], &DISTANCES, DISTANCE_BITS, &mut self.distances)
    }
}

/// Decompress one stream. Matches may not reach before `floor`, which is where its output begins in the buffer.
pub fn inflate(input: &mut Input, output: &mut dyn Output, tables: &mut Tables, floor: usize) -> io::Result<()> {
    let mut floor = floor;
    loop {
        let is_last = input.bits(1)? == 1;
        match input.bits(2)? {
            0 => stored(input, output, &mut floor)?,
            1 => {
                tables.fixed()?;
                coded(input, output, tables, &mut floor)?;
            }
            2 => {
                tables.read(input)?;
                coded(input, output, tables, &mut floor)?;
            }
            _ => return Err(damaged()),
        }
        if is_last {
            return input.align();
        }
    }
}

fn turn(output: &mut dyn Output, floor: &mut usize) -> io::Result<()> {
    let moved = output.parts().1 - WINDOW;
    output.turn()?;
    *floor = floor.saturating_sub(moved);
    Ok(())
}

fn stored(input: &mut Input, output: &mut dyn Output, floor: &mut usize) -> io::Result<()> {
    input.align()?;
    let mut head = [0; 4];
    for byte in &mut head {
        *byte = input.byte()?.ok_or_else(cut_short)?;
    }
    if head[0] != !head[2] || head[1] != !head[3] {
        return Err(damaged());
    }
    let mut left = usize::from(u16::from_le_bytes([head[0], head[1]]));
    while left > 0 {
        if input.at == input.end {
            input.more()?;
            if input.at == input.end {
                return Err(cut_short());
            }
        }
        let (piece, at) = output.parts();
        let step = left.min(input.end - input.at).min(piece.len() - SLACK - at);
        piece[at..at + step].copy_from_slice(&input.data[input.at..input.at + step]);
        input.at += step;
        left -= step;
        output.filled(at + step);
        if at + step + SLACK >= output.parts().0.len() {
            turn(output, floor)?;
        }
    }
    Ok(())
}

fn coded(input: &mut Input, output: &mut dyn Output, tables: &Tables, floor: &mut usize) -> io::Result<()> {
    loop {
        if input.at >= input.limit() {
            input.more()?;
        }
        let (piece, at) = output.parts();
        let room = piece.len() - SLACK;
        let mut state = State { bits: input.bits, count: input.count, from: input.at, to: at };
        // In the last bytes one step at a time, so that no zeros behind the end are taken for codes.
        let fast = input.end.saturating_sub(MARGIN);
        let is_near_end = input.is_over && input.at >= fast;
        let limits = if is_near_end { (input.limit(), at + 1) } else { (fast, room) };
        let outcome = run(&mut state, &input.data, piece, tables, limits, *floor);
        (input.bits, input.count, input.at) = (state.bits, state.count, state.from);
        if is_near_end && input.at - (input.count >> 3) as usize > input.end {
            return Err(cut_short());
        }
        output.filled(state.to);
        match outcome {
            Outcome::Over => return Ok(()),
            Outcome::Wrong => return Err(damaged()),
            Outcome::Limit => {}
        }
        if state.to >= room {
            turn(output, floor)?;
        }
    }
}

struct State {
    bits: u64,
    count: u32,
    from: usize,
    to: usize,
}

enum Outcome {
    /// The block has ended.
    Over,
    /// There is too little input, or too little room.
    Limit,
    Wrong,
}

fn run(
    state: &mut State,
    input: &[u8],
    output: &mut [u8],
    tables: &Tables,
    limits: (usize, usize),
    floor: usize,
) -> Outcome {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("bmi2") {
        // SAFETY: the processor has what the function was compiled for.
        return unsafe { run_with_bmi2(state, input, output, tables, limits, floor) };
    }
    codes(state, input, output, tables, limits, floor)
}

/// The same with shifts that leave the flags alone, which an emulator need not compute then.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "bmi2")]
unsafe fn run_with_bmi2(
    state: &mut State,
    input: &[u8],
    output: &mut [u8],
    tables: &Tables,
    limits: (usize, usize),
    floor: usize,
) -> Outcome {
    codes(state, input, output, tables, limits, floor)
}

#[inline(always)]
fn codes(
    state: &mut State,
    input: &[u8],
    output: &mut [u8],
    tables: &Tables,
    limits: (usize, usize),
    floor: usize,
) -> Outcome {
    let State { mut bits, mut count, mut from, mut to } = *state;
    let (literals, distances) = (&tables.literals, &tables.distances);
    macro_rules! refill {
        () => {
            bits |= word(input, from) << (count & 63);
            from += ((count ^ 63) >> 3 & 7) as usize;
            count |= 56;
        };
    }
    macro_rules! consume {
        ($entry:expr) => {
            bits >>= $entry & 63;
            count = count.wrapping_sub($entry); // only its lowest six bits count
        };
    }
    let outcome = loop {
        if from >= limits.0 || to >= limits.1 {
            break Outcome::Limit;
        }
        refill!();
        let mut found = literals[bits as usize & ((1 << LITERAL_BITS) - 1)];
        if found & IS_LITERAL != 0 {
            consume!(found);
            output[to] = (found >> 16) as u8;
            to += 1;
            found = literals[bits as usize & ((1 << LITERAL_BITS) - 1)];
            if found & IS_LITERAL != 0 {
                consume!(found);
                output[to] = (found >> 16) as u8;
                to += 1;
                found = literals[bits as usize & ((1 << LITERAL_BITS) - 1)];
                if found & IS_LITERAL != 0 {
                    consume!(found);
                    output[to] = (found >> 16) as u8;
                    to += 1;
                    continue;
                }
            }
            refill!();
        }
        if found & IS_SPECIAL != 0 {
            if found & IS_TABLE != 0 {
                consume!(found);
                let index = (found >> 16 & VALUE) as usize + (bits & !(u64::MAX << (found >> 8 & 15))) as usize;
                found = literals[index & 4095];
                if found & IS_LITERAL != 0 {
                    consume!(found);
                    output[to] = (found >> 16) as u8;
                    to += 1;
                    continue;
                }
            }
            if found & IS_END != 0 {
                consume!(found);
                break Outcome::Over;
            }
            if found & IS_WRONG != 0 {
                break Outcome::Wrong;
            }
        }
        consume!(found);
        let extra = found >> 8 & 31;
        let length = (found >> 16 & VALUE) as usize + (bits & !(u64::MAX << extra)) as usize;
        bits >>= extra;
        count = count.wrapping_sub(extra);
        let mut found = distances[bits as usize & ((1 << DISTANCE_BITS) - 1)];
        if found & IS_SPECIAL != 0 {
            if found & IS_TABLE != 0 {
                consume!(found);
                let index = (found >> 16 & VALUE) as usize + (bits & !(u64::MAX << (found >> 8 & 15))) as usize;
                found = distances[index & 1023];
            }
            if found & IS_WRONG != 0 {
                break Outcome::Wrong;
            }
        }
        consume!(found);
        let extra = found >> 8 & 31;
        let distance = (found >> 16 & VALUE) as usize + (bits & !(u64::MAX << extra)) as usize;
        bits >>= extra;
        count = count.wrapping_sub(extra);
        if distance > to - floor {
            break Outcome::Wrong;
        }
        let end = to + length;
        if distance >= 8 {
            // What is written too much is written over, or behind the end.
            let reached = &mut output[to - distance..to + 264];
            let mut at = 0;
            loop {
                let eight = word(reached, at);
                reached[at + distance..at + distance + 8].copy_from_slice(&eight.to_le_bytes());
                at += 8;
                if at >= length {
                    break;
                }
            }
        } else if distance == 1 {
            let byte = output[to - 1];
            output[to..end].fill(byte);
        } else {
            for at in to..end {
                output[at] = output[at - distance];
            }
        }
        to = end;
    };
    *state = State { bits, count: count & 63, from, to };
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use miniz_oxide::deflate::compress_to_vec;

    /// All in one buffer.
    struct Whole {
        made: Vec<u8>,
        piece: Vec<u8>,
        at: usize,
    }

    impl Output for Whole {
        fn parts(&mut self) -> (&mut [u8], usize) {
            (&mut self.piece, self.at)
        }

        fn filled(&mut self, at: usize) {
            self.at = at;
        }

        fn turn(&mut self) -> io::Result<()> {
            self.made.extend(&self.piece[WINDOW..self.at]);
            self.piece.copy_within(self.at - WINDOW..self.at, 0);
            self.at = WINDOW;
            Ok(())
        }
    }

    /// A reader that has little to give at a time.
    struct Dripping(Vec<u8>, usize);

    impl Read for Dripping {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let step = buffer.len().min(self.0.len() - self.1).min(1 + self.1 % 4000);
            buffer[..step].copy_from_slice(&self.0[self.1..self.1 + step]);
            self.1 += step;
            Ok(step)
        }
    }

    fn inflated(data: &[u8]) -> (Vec<u8>, io::Result<()>) {
        let mut input = Input::new(Box::new(Dripping(data.to_vec(), 0)));
        let mut output = Whole { made: Vec::new(), piece: vec![0; WINDOW + 40_000 + SLACK], at: WINDOW };
        let outcome = inflate(&mut input, &mut output, &mut Tables::default(), WINDOW);
        output.turn().unwrap();
        (output.made, outcome)
    }

    /// Bytes that look random, of so many different ones.
    fn noise(count: u32, kinds: u32) -> Vec<u8> {
        let mut state = 1_u32;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8 % kinds as u8
            })
            .collect()
    }

    fn samples() -> Vec<Vec<u8>> {
        let mut far = noise(32_768, 255);
        far.extend(far.clone());
        let mut short: Vec<u8> = Vec::new();
        for distance in 1..12 {
            for length in 3..60 {
                short.extend(noise(distance, 251).iter().cycle().take((distance + length) as usize));
            }
        }
        vec![
            vec![],
            b"x".to_vec(),
            vec![0; 300_000],
            noise(200_000, 255),
            noise(200_000, 3),
            far,
            short,
            b"some text that comes again, some text that does not\n".repeat(3000),
        ]
    }

    #[test]
    fn what_was_packed_comes_out() {
        for (number, data) in samples().iter().enumerate() {
            for level in [0, 1, 6, 9] {
                let (made, outcome) = inflated(&compress_to_vec(data, level));
                assert!(outcome.is_ok() && made == *data, "{number} at level {level}");
            }
        }
    }

    #[test]
    fn what_is_cut_short_is_an_error_and_nothing_is_made_up() {
        let data = [noise(3000, 9), vec![0; 3000], noise(3000, 200)].concat();
        let packed = compress_to_vec(&data, 6);
        for length in (0..packed.len()).filter(|length| length % 7 == 0 || packed.len() - length < 40) {
            let (made, outcome) = inflated(&packed[..length]);
            assert!(outcome.is_err(), "{length}");
            assert!(data.starts_with(&made), "{length}");
        }
    }

    #[test]
    fn damaged_streams_are_what_they_are_to_others() {
        let data = [noise(2000, 20), b"abc".repeat(300)].concat();
        let packed = compress_to_vec(&data, 6);
        for at in (0..packed.len()).step_by(5) {
            for bit in [1, 8, 128] {
                let mut other = packed.clone();
                other[at] ^= bit;
                let (made, outcome) = inflated(&other);
                if let Ok(theirs) = miniz_oxide::inflate::decompress_to_vec_with_limit(&other, 1 << 24) {
                    assert!(outcome.is_ok() && made == theirs, "byte {at}, bit {bit}");
                }
            }
        }
    }

    #[test]
    fn codes_that_are_none() {
        // The third type of block; a match before the beginning; a stored block whose lengths differ.
        for data in [&[7][..], &[3, 2, 0], &[1, 5, 0, 5, 0, 1, 2, 3, 4, 5], &[]] {
            assert!(inflated(data).1.is_err(), "{data:?}");
        }
        let mut table: Table<4096> = [0; 4096];
        assert!(build(&[1, 1, 1], &LITERALS, LITERAL_BITS, &mut table).is_err());
        assert!(build(&[2, 2, 2], &LITERALS, LITERAL_BITS, &mut table).is_err());
        assert!(build(&[1, 2, 2], &LITERALS, LITERAL_BITS, &mut table).is_ok());
    }
}
