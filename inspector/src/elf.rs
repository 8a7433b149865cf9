//! How an ELF file was hardened when it was linked, and the modules of a Go program.
//!
//! Sources: the System V ABI (ELF-64), `elf.h` of glibc; Go's `debug/buildinfo`.

const MAX_STRINGS: usize = 16 << 20;

#[derive(Debug, Default, Clone, PartialEq)]
pub struct Elf {
    pub machine: u16,
    /// It has a program interpreter or is no shared object: it can be executed.
    pub is_program: bool,
    pub is_static: bool,
    pub is_pie: bool,
    /// 0: none, 1: partial, 2: full.
    pub relro: u8,
    pub has_executable_stack: bool,
    /// `None`: nothing in the file tells.
    pub canary: Option<bool>,
    pub run_path: String,
    pub interpreter: String,
}

struct File<'a> {
    data: &'a [u8],
    wide: bool,
    big: bool,
}

impl File<'_> {
    fn number(&self, at: u64, bytes: usize) -> Option<u64> {
        let from = usize::try_from(at).ok()?;
        let field = self.data.get(from..from.checked_add(bytes)?)?;
        Some(if self.big {
            field.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        } else {
            field.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        })
    }

    /// A field whose place differs between the two classes.
    fn field(&self, narrow: (u64, usize), wide: (u64, usize), base: u64) -> Option<u64> {
        let (at, bytes) = if self.wide { wide } else { narrow };
        self.number(base.checked_add(at)?, bytes)
    }

    fn string(&self, at: u64) -> &[u8] {
        let from = usize::try_from(at).unwrap_or(usize::MAX).min(self.data.len());
        let rest = &self.data[from..self.data.len().min(from.saturating_add(4096))];
        rest.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

struct Segment {
    kind: u64,
    flags: u64,
    offset: u64,
    address: u64,
    size: u64,
}

fn open(data: &[u8]) -> Option<(File<'_>, Vec<Segment>)> {
    if !data.starts_with(b"\x7fELF") || data.len() < 52 {
        return None;
    }
    let file = File { data, wide: data[4] == 2, big: data[5] == 2 };
    let table = file.field((28, 4), (32, 8), 0)?;
    let size = file.field((42, 2), (54, 2), 0)?;
    let count = file.field((44, 2), (56, 2), 0)?.min(1024);
    let mut segments = Vec::new();
    for at in 0..count {
        let base = table.checked_add(at * size)?;
        segments.push(Segment {
            kind: file.number(base, 4)?,
            flags: file.field((24, 4), (4, 4), base)?,
            offset: file.field((4, 4), (8, 8), base)?,
            address: file.field((8, 4), (16, 8), base)?,
            size: file.field((16, 4), (32, 8), base)?,
        });
    }
    Some((file, segments))
}

/// Read what there is to know of an ELF file; `None` for any other, and for one that is damaged.
pub fn read(data: &[u8]) -> Option<Elf> {
    let (file, segments) = open(data)?;
    let kind = file.number(16, 2)?;
    if kind != 2 && kind != 3 {
        return None; // an object file or a core
    }
    let mut elf = Elf { machine: file.number(18, 2)? as u16, ..Elf::default() };
    let mut has_stack = false;
    let mut has_interpreter = false;
    let mut dynamic = None;
    let mut has_relro = false;
    for segment in &segments {
        match segment.kind {
            2 => dynamic = Some((segment.offset, segment.size)),
            3 => {
                has_interpreter = true;
                elf.interpreter = crate::json::shown(file.string(segment.offset), 200);
            }
            0x6474_e551 => {
                has_stack = true;
                elf.has_executable_stack = segment.flags & 1 != 0;
            }
            0x6474_e552 => has_relro = true,
            _ => {}
        }
    }
    if !has_stack && matches!(elf.machine, 3 | 62) {
        elf.has_executable_stack = true; // the kernel's default on x86 without the header
    }
    let mut flags_1 = 0;
    let mut binds_now = false;
    let mut strings = (0, 0);
    let mut run_path = None;
    let step = if file.wide { 16 } else { 8 };
    if let Some((offset, size)) = dynamic {
        for at in 0..(size / step).min(4096) {
            let base = offset.checked_add(at * step)?;
            let tag = file.field((0, 4), (0, 8), base)?;
            let value = file.field((4, 4), (8, 8), base)?;
            match tag {
                0 => break,
                5 => strings.0 = value,
                10 => strings.1 = value,
                15 | 29 => run_path = Some(value),
                24 => binds_now = true,
                30 => binds_now |= value & 8 != 0,
                0x6fff_fffb => {
                    flags_1 = value;
                    binds_now |= value & 1 != 0;
                }
                _ => {}
            }
        }
    }
    let table = offset_of(&segments, strings.0);
    elf.is_program = kind == 2 || has_interpreter || flags_1 & 0x0800_0000 != 0;
    elf.is_static = !has_interpreter && elf.is_program;
    elf.is_pie = kind == 3;
    elf.relro = if !has_relro {
        0
    } else if binds_now || (elf.is_static && dynamic.is_none()) {
        2
    } else {
        1
    };
    if let Some(table) = table {
        if let Some(value) = run_path {
            elf.run_path = crate::json::shown(file.string(table.saturating_add(value)), 200);
        }
        let from = usize::try_from(table).unwrap_or(usize::MAX).min(data.len());
        let to = from.saturating_add((strings.1 as usize).min(MAX_STRINGS)).min(data.len());
        elf.canary = Some(find(&data[from..to], b"__stack_chk_").is_some());
    }
    Some(elf)
}

/// The first place of `needle`.
pub fn find(data: &[u8], needle: &[u8]) -> Option<usize> {
    let first = needle[0];
    let mut at = 0;
    while at + needle.len() <= data.len() {
        match data[at..=data.len() - needle.len()].iter().position(|byte| *byte == first) {
            None => return None,
            Some(step) => at += step,
        }
        if &data[at..at + needle.len()] == needle {
            return Some(at);
        }
        at += 1;
    }
    None
}

/// Whether a file begins as programs do: of Linux (ELF), Windows (PE) or macOS (Mach-O), which all may be Go's.
pub fn is_program(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
        || head.starts_with(b"MZ")
        || matches!(head, [0xcf | 0xce, 0xfa, 0xed, 0xfe, ..] | [0xfe, 0xed, 0xfa, 0xce | 0xcf, ..])
}

const GO_MAGIC: &[u8] = b"\xff Go buildinf:";
const GO_ALIGNMENT: usize = 16;

/// Where the record of a Go program's build is. The linker aligns it within the first writable segment of an ELF file.
fn go_record(data: &[u8]) -> Option<usize> {
    let search = |from: usize, to: usize| {
        let from = from.next_multiple_of(GO_ALIGNMENT);
        let part = data.get(from..to.min(data.len()))?;
        part.chunks(GO_ALIGNMENT).position(|chunk| chunk.starts_with(GO_MAGIC)).map(|at| from + GO_ALIGNMENT * at)
    };
    let Some((_, segments)) = open(data) else { return search(0, data.len()) };
    segments.iter().filter(|s| s.kind == 1 && s.flags & 2 != 0).find_map(|segment| {
        let from = usize::try_from(segment.offset).unwrap_or(usize::MAX).min(data.len());
        search(from, from.saturating_add(usize::try_from(segment.size).unwrap_or(usize::MAX)))
    })
}

/// The modules that a Go program was built from: (name, version), itself first and Go as `stdlib`.
pub fn go_modules(data: &[u8]) -> Option<Vec<(String, String)>> {
    let at = go_record(data)?;
    let header = data.get(at..at + 32)?;
    let (version, modules) = if header[15] & 2 == 0 {
        // Before Go 1.18 the record has pointers to two strings.
        let (file, segments) = open(data)?;
        let width = usize::from(header[14]);
        if width != 4 && width != 8 {
            return None;
        }
        let file = File { big: header[15] & 1 != 0, ..file };
        let string = |place: usize| -> Option<&[u8]> {
            let header = offset_of(&segments, file.number((at + place) as u64, width)?)?;
            let length = usize::try_from(file.number(header + width as u64, width)?).ok()?;
            let from = usize::try_from(offset_of(&segments, file.number(header, width)?)?).ok()?;
            data.get(from..from.checked_add(length)?)
        };
        (string(16)?, string(16 + width).unwrap_or_default())
    } else {
        let (version, rest) = counted(data.get(at + 32..)?)?;
        (version, counted(rest)?.0)
    };
    let mut found = vec![];
    let version = String::from_utf8_lossy(version);
    if modules.len() > 33 {
        // Sixteen bytes at either end are markers for those who search memory.
        let text = String::from_utf8_lossy(&modules[16..modules.len() - 16]).into_owned();
        for line in text.lines().take(10_000) {
            let mut fields = line.split('\t');
            match (fields.next(), fields.next(), fields.next()) {
                (Some("mod" | "dep"), Some(name), Some(version)) => found.push((name.into(), version.into())),
                (Some("=>"), Some(name), Some(version)) => {
                    found.pop();
                    found.push((name.into(), version.into()));
                }
                _ => {}
            }
        }
    }
    found.push(("stdlib".into(), version.split(' ').next().unwrap_or_default().into()));
    Some(found)
}

/// Where in the file an address is.
fn offset_of(segments: &[Segment], address: u64) -> Option<u64> {
    segments
        .iter()
        .find(|s| s.kind == 1 && s.address <= address && address - s.address < s.size)
        .map(|s| s.offset.saturating_add(address - s.address))
}

/// A string that follows its length (a varint), and what follows it.
fn counted(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut length = 0_usize;
    for (at, byte) in data.iter().take(5).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            let end = (at + 1).checked_add(length)?;
            return Some((data.get(at + 1..end)?, &data[end..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_very_program() {
        let data = std::fs::read("/proc/self/exe").unwrap();
        let elf = read(&data).unwrap();
        assert_eq!((elf.machine, elf.is_program, elf.has_executable_stack), (62, true, false));
        assert!(go_modules(&data).is_none());
    }

    #[test]
    fn whatever_the_bytes_nothing_breaks() {
        let mut data = std::fs::read("/proc/self/exe").unwrap();
        data.truncate(4096);
        for at in 0..1024 {
            let old = data[at];
            for value in [0, 1, 0x7f, 0xff] {
                data[at] = value;
                let _ = read(&data);
                let _ = go_modules(&data);
            }
            data[at] = old;
        }
        for length in 0..256 {
            let _ = read(&data[..length]);
        }
    }

    #[test]
    fn modules_of_go() {
        let text = format!(
            "{0}path\tx\nmod\texample.org/x\tv1.0.0\th1:\ndep\ta.org/b\tv2.0.0\n=>\tc.org/d\tv3.0.0\n{0}",
            "0123456789abcdef"
        );
        let mut info = b"\xff Go buildinf:".to_vec();
        info.extend([8, 2]);
        info.resize(32, 0);
        info.push(8);
        info.extend(b"go1.22.3");
        info.extend([(text.len() & 0x7f) as u8 | 0x80, (text.len() >> 7) as u8]);
        info.extend(text.as_bytes());
        let mut data = b"\x7fELF\x02\x01\x01".to_vec();
        data.resize(64, 0);
        data[16] = 2;
        data[32] = 64;
        data[54] = 56;
        data[56] = 1;
        let mut segment = vec![1, 0, 0, 0, 6, 0, 0, 0, 120, 0, 0, 0, 0, 0, 0, 0];
        segment.resize(56, 0);
        segment[8] = 128;
        segment[32..34].copy_from_slice(&(info.len() as u16).to_le_bytes());
        data.extend(segment);
        data.resize(128, 0);
        data.extend(info);
        let found = go_modules(&data).unwrap();
        let names: Vec<_> = found.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        assert_eq!(names, [("example.org/x", "v1.0.0"), ("c.org/d", "v3.0.0"), ("stdlib", "go1.22.3")]);
    }
}
