//! The packages in an rpm database: SQLite, ndb, or a Berkeley DB hash file.
//!
//! Sources: SQLite's "Database File Format"; rpm's `lib/backend/ndb/rpmpkg.c` layout as described in its comments; the
//! page layout of Berkeley DB's hash access method; the rpm file format's header structure.

use crate::packages::Package;

const MAX_PACKAGES: usize = 20_000;
const MAX_HEADER: usize = 32 << 20;

pub fn read(data: &[u8]) -> Result<Vec<Package>, String> {
    let blobs = if data.starts_with(b"SQLite format 3\0") {
        sqlite(data).ok_or("its SQLite pages are damaged")?
    } else if data.starts_with(b"RpmP") {
        ndb(data).ok_or("its ndb slots are damaged")?
    } else if little(data, 12) == Some(0x0006_1561) {
        berkeley(data).ok_or("its Berkeley DB pages are damaged")?
    } else if data.is_empty() {
        return Ok(Vec::new());
    } else {
        return Err("it is no rpm database of a known kind".into());
    };
    Ok(blobs.iter().filter_map(|blob| header(blob)).take(MAX_PACKAGES).collect())
}

fn big(data: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_be_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?) as usize)
}

fn big_short(data: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_be_bytes(data.get(at..at.checked_add(2)?)?.try_into().ok()?)))
}

fn little(data: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?) as usize)
}

fn little_short(data: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(data.get(at..at.checked_add(2)?)?.try_into().ok()?)))
}

/// Name, version, release, epoch, architecture and licence of a header (without the lead and its magic).
fn header(data: &[u8]) -> Option<Package> {
    let (count, size) = (big(data, 0)?, big(data, 4)?);
    if count > 65_536 || size > MAX_HEADER {
        return None;
    }
    let store = data.get(8 + 16 * count..)?;
    let mut found = Package { kind: "rpm", ..Package::default() };
    let (mut version, mut release, mut epoch) = (String::new(), String::new(), None);
    for at in 0..count {
        let entry = data.get(8 + 16 * at..24 + 16 * at)?;
        let (tag, kind, offset) = (big(entry, 0)?, big(entry, 4)?, big(entry, 8)?);
        let text = || {
            let rest = store.get(offset..)?;
            let end = rest.iter().take(400).position(|byte| *byte == 0)?;
            Some(String::from_utf8_lossy(&rest[..end]).into_owned())
        };
        match (tag, kind) {
            (1000, 6) => found.name = text()?,
            (1001, 6) => version = text()?,
            (1002, 6) => release = text()?,
            (1003, 4) => epoch = big(store, offset),
            (1014, 6) => found.licence = text().unwrap_or_default(),
            (1022, 6) => found.architecture = text().unwrap_or_default(),
            _ => {}
        }
    }
    if found.name.is_empty() {
        return None;
    }
    let epoch = epoch.filter(|number| *number > 0).map(|number| format!("{number}:")).unwrap_or_default();
    found.version = format!("{epoch}{version}-{release}");
    Some(found)
}

// ---- SQLite ----

struct Sqlite<'a> {
    data: &'a [u8],
    page: usize,
    usable: usize,
    visited: usize,
}

fn varint(data: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0_u64;
    for count in 0..9 {
        let byte = *data.get(*at)?;
        *at += 1;
        if count == 8 {
            return Some(value << 8 | u64::from(byte));
        }
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

impl<'a> Sqlite<'a> {
    fn page(&self, number: usize) -> Option<&'a [u8]> {
        let from = number.checked_sub(1)?.checked_mul(self.page)?;
        self.data.get(from..from + self.page)
    }

    /// Call `visit` with the payload of each row of a table.
    fn rows(&mut self, root: usize, visit: &mut dyn FnMut(Vec<u8>)) -> Option<()> {
        let mut waiting = vec![root];
        while let Some(number) = waiting.pop() {
            self.visited += 1;
            if self.visited > 2 * self.data.len() / self.page + 16 {
                return None; // pages that refer to one another in circles
            }
            let page = self.page(number)?;
            let base = if number == 1 { 100 } else { 0 };
            let kind = *page.get(base)?;
            let cells = big_short(page, base + 3)?;
            let head = if kind == 5 { 12 } else { 8 };
            for at in 0..cells {
                let mut place = big_short(page, base + head + 2 * at)?;
                match kind {
                    5 => waiting.push(big(page, place)?),
                    13 => {
                        let size = usize::try_from(varint(page, &mut place)?).ok()?;
                        varint(page, &mut place)?;
                        if size <= MAX_HEADER {
                            visit(self.payload(page, place, size)?);
                        }
                    }
                    _ => return None,
                }
            }
            if kind == 5 {
                waiting.push(big(page, base + 8)?);
            }
        }
        Some(())
    }

    fn payload(&self, page: &[u8], place: usize, size: usize) -> Option<Vec<u8>> {
        let most = self.usable - 35;
        if size <= most {
            return Some(page.get(place..place + size)?.to_vec());
        }
        let least = (self.usable - 12) * 32 / 255 - 23;
        let fitting = least + (size - least) % (self.usable - 4);
        let local = if fitting <= most { fitting } else { least };
        let mut out = page.get(place..place + local)?.to_vec();
        let mut next = big(page, place + local)?;
        let mut steps = 0;
        while out.len() < size {
            steps += 1;
            let more = self.page(next)?;
            let take = (size - out.len()).min(self.usable - 4);
            out.extend(more.get(4..4 + take)?);
            next = big(more, 0)?;
            if steps > self.data.len() / self.page {
                return None;
            }
        }
        Some(out)
    }
}

/// The values of a record: (serial type, bytes).
fn values(record: &[u8]) -> Option<Vec<(u64, &[u8])>> {
    let mut at = 0;
    let head = usize::try_from(varint(record, &mut at)?).ok()?;
    let mut body = head;
    let mut found = Vec::new();
    while at < head && found.len() < 64 {
        let kind = varint(record, &mut at)?;
        let length = match kind {
            0 | 8 | 9 => 0,
            1..=4 => kind as usize,
            5 => 6,
            6 | 7 => 8,
            _ => usize::try_from((kind.checked_sub(12)?) / 2).ok()?,
        };
        found.push((kind, record.get(body..body.checked_add(length)?)?));
        body += length;
    }
    Some(found)
}

fn sqlite(data: &[u8]) -> Option<Vec<Vec<u8>>> {
    let page = match big_short(data, 16)? {
        1 => 65_536,
        other => other,
    };
    if page < 512 || !page.is_power_of_two() {
        return None;
    }
    let usable = page - usize::from(*data.get(20)?);
    if usable < 480 {
        return None;
    }
    let mut file = Sqlite { data, page, usable, visited: 0 };
    let mut root = None;
    file.rows(1, &mut |record| {
        if let Some(fields) = values(&record) {
            if fields.len() >= 4 && fields[0].1 == b"table" && fields[1].1 == b"Packages" {
                root = Some(fields[3].1.iter().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte)));
            }
        }
    })?;
    let mut blobs = Vec::new();
    let mut total = 0;
    file.rows(root?, &mut |record| {
        total += record.len();
        if blobs.len() < MAX_PACKAGES && total < 256 << 20 {
            if let Some((_, blob)) = values(&record).and_then(|fields| fields.get(1).copied()) {
                blobs.push(blob.to_vec());
            }
        }
    })?;
    Some(blobs)
}

// ---- ndb ----

fn ndb(data: &[u8]) -> Option<Vec<Vec<u8>>> {
    let pages = little(data, 12)?;
    let slots = data.get(..pages.checked_mul(4096)?.min(data.len()))?;
    let mut blobs = Vec::new();
    for slot in slots.chunks_exact(16).skip(2).take(8 * MAX_PACKAGES) {
        if &slot[..4] != b"Slot" {
            return None;
        }
        let (index, offset) = (little(slot, 4)?, little(slot, 8)?);
        if index == 0 || blobs.len() >= MAX_PACKAGES {
            continue;
        }
        let at = offset.checked_mul(16)?;
        if data.get(at..at.checked_add(4)?)? != b"BlbS" {
            return None;
        }
        let length = little(data, at + 12)?;
        blobs.push(data.get(at + 16..(at + 16).checked_add(length)?)?.to_vec());
    }
    Some(blobs)
}

// ---- Berkeley DB ----

fn berkeley(data: &[u8]) -> Option<Vec<Vec<u8>>> {
    const HASH_PAGES: [u8; 2] = [2, 13];
    let size = little(data, 20)?;
    if !(512..=65_536).contains(&size) {
        return None;
    }
    let mut blobs = Vec::new();
    let mut budget = 256_usize << 20;
    for page in data.chunks_exact(size) {
        if !HASH_PAGES.contains(&page[25]) {
            continue;
        }
        // Keys and values take turns.
        for at in (1..little_short(page, 20)?).step_by(2) {
            let place = little_short(page, 26 + 2 * at)?;
            if page.get(place) != Some(&3) {
                continue; // not on pages of its own: too short for a header
            }
            let (mut next, length) = (little(page, place + 4)?, little(page, place + 8)?);
            if length > MAX_HEADER || blobs.len() >= MAX_PACKAGES {
                continue;
            }
            let mut blob = Vec::new();
            let mut steps = 0;
            while next != 0 && blob.len() < length && steps <= data.len() / size {
                let more = data.get(next.checked_mul(size)?..)?.get(..size)?;
                let used = little_short(more, 22)?.min(size - 26);
                blob.extend(&more[26..26 + used]);
                next = little(more, 16)?;
                steps += 1;
            }
            blob.truncate(length);
            budget = budget.checked_sub(blob.len())?;
            blobs.push(blob);
        }
    }
    Some(blobs)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A header of these tags.
    pub fn made(name: &str, version: &str, release: &str) -> Vec<u8> {
        let (mut index, mut store) = (Vec::new(), Vec::new());
        for (tag, text) in [(1000_u32, name), (1001, version), (1002, release), (1022, "x86_64")] {
            for word in [tag, 6, store.len() as u32, 1] {
                index.extend(word.to_be_bytes());
            }
            store.extend(text.as_bytes());
            store.push(0);
        }
        let mut out = (index.len() as u32 / 16).to_be_bytes().to_vec();
        out.extend((store.len() as u32).to_be_bytes());
        out.extend(index);
        out.extend(store);
        out
    }

    #[test]
    fn ndb_slots() {
        let blob = made("bash", "5.2", "1.fc40");
        let mut data = b"RpmP".to_vec();
        data.resize(4096, 0);
        data[12] = 1;
        for at in (32..4096).step_by(16) {
            data[at..at + 4].copy_from_slice(b"Slot");
        }
        data[36] = 1;
        data[40..42].copy_from_slice(&256_u16.to_le_bytes());
        data.extend(b"BlbS\x01\0\0\0\0\0\0\0");
        data.extend((blob.len() as u32).to_le_bytes());
        data.extend(blob);
        let found = read(&data).unwrap();
        assert_eq!((found[0].name.as_str(), found[0].version.as_str()), ("bash", "5.2-1.fc40"));
        for length in 0..data.len() {
            let _ = read(&data[..length]);
        }
    }

    #[test]
    fn what_is_no_database() {
        assert!(read(b"SQLite format 3\0").is_err());
        assert!(read(b"something").is_err());
        let mut data = b"SQLite format 3\0".to_vec();
        data.resize(8192, 0xff);
        assert!(read(&data).is_err());
    }
}
