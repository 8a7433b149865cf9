//! What package managers and languages' installers have recorded.
//!
//! Sources: Debian Policy 5 (control files), Alpine's `apk-installed`(5), Python's core metadata, npm's `package.json`,
//! the JAR file specification and Maven's `pom.properties`.

use miniz_oxide::inflate::decompress_to_vec_with_limit;

use crate::json;

const MAX_PACKAGES: usize = 20_000;
const MAX_MEMBER: usize = 1 << 20;
const MAX_NESTING: u32 = 3;

#[derive(Debug, Default, Clone, PartialEq)]
pub struct Package {
    pub kind: &'static str,
    pub name: String,
    pub version: String,
    pub architecture: String,
    pub licence: String,
    /// Where in the file it was, for archives within archives.
    pub within: String,
}

pub enum Found {
    Packages(Vec<Package>),
    /// It is such a file, and is damaged.
    Damaged(String),
    Nothing,
}

fn package(kind: &'static str, name: &str, version: &str) -> Package {
    let cut = |text: &str| text.trim().chars().take(200).collect();
    Package { kind, name: cut(name), version: cut(version), ..Package::default() }
}

/// What a file is read as.
pub struct Source {
    pub kind: Kind,
    /// It looks like a database, and is not where one is looked for: it counts if a link leads here.
    pub is_aside: bool,
}

#[derive(PartialEq, Clone, Copy, Debug)]
pub enum Kind {
    Dpkg,
    DpkgPart,
    Apk,
    Rpm,
    Python,
    Npm,
    Java,
}

/// Where the distributions' databases are: directory and name. They are looked for below any directory, since images
/// hold root directories of others.
const DATABASES: &[(&[u8], &[u8], Kind)] = &[
    (b"var/lib/dpkg/", b"status", Kind::Dpkg),
    (b"usr/lib/dpkg/", b"status", Kind::Dpkg),
    (b"lib/opkg/", b"status", Kind::Dpkg),
    (b"lib/apk/db/", b"installed", Kind::Apk),
    (b"var/lib/rpm/", b"rpmdb.sqlite", Kind::Rpm),
    (b"var/lib/rpm/", b"Packages", Kind::Rpm),
    (b"var/lib/rpm/", b"Packages.db", Kind::Rpm),
    (b"usr/lib/sysimage/rpm/", b"rpmdb.sqlite", Kind::Rpm),
    (b"usr/lib/sysimage/rpm/", b"Packages", Kind::Rpm),
    (b"usr/lib/sysimage/rpm/", b"Packages.db", Kind::Rpm),
    (b"usr/share/rpm/", b"rpmdb.sqlite", Kind::Rpm),
    (b"usr/share/rpm/", b"Packages", Kind::Rpm),
    (b"usr/share/rpm/", b"Packages.db", Kind::Rpm),
];

/// The paths of the databases.
pub fn databases() -> impl Iterator<Item = Vec<u8>> {
    DATABASES.iter().map(|(directory, name, _)| [b"/", *directory, *name].concat())
}

/// Whether a path is a distribution's database, which has all of its packages.
pub fn is_database(path: &[u8]) -> bool {
    matches!(kind_of(path), Some(Kind::Dpkg | Kind::Apk | Kind::Rpm))
}

const ARCHIVES: &[&[u8]] = &[b".jar", b".war", b".ear", b".par", b".sar", b".nar", b".jpi", b".hpi", b".kar", b".lpkg"];

fn is_java(name: &[u8]) -> bool {
    ARCHIVES.iter().any(|end| name.len() > end.len() && name[name.len() - end.len()..].eq_ignore_ascii_case(end))
}

fn kind_of(path: &[u8]) -> Option<Kind> {
    let text = path.strip_prefix(b"/").unwrap_or(path);
    let place = text.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let (directory, name) = text.split_at(place);
    let is_below = |wanted: &[u8]| {
        directory.ends_with(wanted)
            && (directory.len() == wanted.len() || directory[directory.len() - wanted.len() - 1] == b'/')
    };
    if let Some((_, _, kind)) = DATABASES.iter().find(|(place, wanted, _)| *wanted == name && is_below(place)) {
        Some(*kind)
    } else if (is_below(b"var/lib/dpkg/status.d/") && !name.ends_with(b".md5sums"))
        || (is_below(b"lib/opkg/info/") && name.ends_with(b".control"))
    {
        Some(Kind::DpkgPart)
    } else if (name == b"METADATA" && ends_without_case(directory, b".dist-info/"))
        || (name == b"PKG-INFO" && ends_without_case(directory, b".egg-info/"))
        || (name == b"PKG-INFO" && directory.ends_with(b"EGG-INFO/"))
        || name.ends_with(b".egg-info")
    {
        Some(Kind::Python)
    } else if name == b"package.json" {
        Some(Kind::Npm)
    } else if is_java(name) {
        Some(Kind::Java)
    } else {
        None
    }
}

fn ends_without_case(text: &[u8], end: &[u8]) -> bool {
    text.len() >= end.len() && text[text.len() - end.len()..].eq_ignore_ascii_case(end)
}

/// What a file is read as, by its path or by its beginning.
pub fn source(path: &[u8], head: &[u8]) -> Option<Source> {
    let has = |part: &[u8]| crate::elf::find(head, part).is_some();
    if let Some(kind) = kind_of(path) {
        return Some(Source { kind, is_aside: false });
    }
    let aside = |kind| Some(Source { kind, is_aside: true });
    if head.starts_with(b"PK\x03\x04") {
        return has(b"META-INF/MANIFEST.MF").then_some(Source { kind: Kind::Java, is_aside: false });
    }
    if head.starts_with(b"Package: ") && has(b"\nStatus: ") {
        aside(Kind::Dpkg)
    } else if head.starts_with(b"C:Q1") && has(b"\nP:") {
        aside(Kind::Apk)
    } else if head.starts_with(b"RpmP") || (head.starts_with(b"SQLite format 3\0") && has(b"'Packages'")) {
        aside(Kind::Rpm)
    } else {
        None
    }
}

/// The packages that a file records.
pub fn read(kind: Kind, path: &[u8], data: &[u8]) -> Found {
    match kind {
        Kind::Dpkg | Kind::DpkgPart => dpkg(data),
        Kind::Apk => apk(data),
        Kind::Rpm => match crate::rpm::read(data) {
            Ok(packages) => Found::Packages(packages),
            Err(text) => Found::Damaged(text),
        },
        Kind::Python => python(data),
        Kind::Npm => npm(data),
        Kind::Java => {
            let mut found = Vec::new();
            let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            let mut budget = 512 << 20;
            match java(&String::from_utf8_lossy(name), data, "", 0, &mut budget, &mut found) {
                Some(()) => Found::Packages(found),
                None => Found::Damaged("the archive cannot be read".into()),
            }
        }
    }
}

fn lossy(data: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(data)
}

fn dpkg(data: &[u8]) -> Found {
    let text = lossy(data);
    let mut found = Vec::new();
    let mut damaged = 0;
    for paragraph in text.split("\n\n").take(2 * MAX_PACKAGES) {
        let field = |name: &str| {
            paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default().trim()
        };
        if paragraph.trim().is_empty() {
            continue;
        }
        let (name, version) = (field("Package"), field("Version"));
        let status = field("Status");
        if name.is_empty() {
            damaged += 1;
            continue;
        }
        // Removed ones whose settings are still there are no packages of the image.
        if version.is_empty() || status.contains("config-files") || status.contains("not-installed") {
            continue;
        }
        let mut one = package("deb", name, version);
        one.architecture = field("Architecture").chars().take(40).collect();
        found.push(one);
    }
    if damaged > 0 && found.is_empty() {
        return Found::Damaged("no paragraph of it names a package".into());
    }
    Found::Packages(found)
}

fn apk(data: &[u8]) -> Found {
    let text = lossy(data);
    let mut found = Vec::new();
    for paragraph in text.split("\n\n").take(MAX_PACKAGES) {
        let field = |name: char| {
            paragraph
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .unwrap_or_default()
                .trim()
                .to_string()
        };
        let (name, version) = (field('P'), field('V'));
        if !name.is_empty() && !version.is_empty() {
            let mut one = package("apk", &name, &version);
            one.architecture = field('A').chars().take(40).collect();
            one.licence = field('L').chars().take(200).collect();
            found.push(one);
        }
    }
    if found.is_empty() && !text.trim().is_empty() {
        return Found::Damaged("no paragraph of it names a package".into());
    }
    Found::Packages(found)
}

fn python(data: &[u8]) -> Found {
    let text = lossy(data);
    let head = text.split("\n\n").next().unwrap_or_default();
    let field = |name: &str| {
        head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default().trim()
    };
    let (name, version) = (field("Name"), field("Version"));
    if name.is_empty() || version.is_empty() {
        return Found::Nothing;
    }
    let mut one = package("pypi", name, version);
    let licence = field("License-Expression");
    let licence = if licence.is_empty() { field("License") } else { licence };
    one.licence = licence.chars().take(200).collect();
    Found::Packages(vec![one])
}

fn npm(data: &[u8]) -> Found {
    let Some(document) = json::parse(data.strip_prefix(b"\xef\xbb\xbf").unwrap_or(data)) else { return Found::Nothing };
    let (name, version) = (document.get("name").text(), document.get("version").text());
    if name.is_empty() || version.is_empty() {
        return Found::Nothing;
    }
    let mut one = package("npm", name, version);
    one.licence = document.get("license").text().chars().take(200).collect();
    Found::Packages(vec![one])
}

// ---- Java ----

struct ZipMember<'a> {
    name: &'a [u8],
    method: u16,
    size: usize,
    data: &'a [u8],
}

fn short(data: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(data.get(at..at + 2)?.try_into().ok()?)))
}

fn long(data: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?) as usize)
}

/// The members of a zip archive, by its central directory.
fn zip(data: &[u8]) -> Option<Vec<ZipMember<'_>>> {
    let from = data.len().saturating_sub(65_557);
    let end = from + data[from..].windows(4).rposition(|part| part == b"PK\x05\x06")?;
    let count = short(data, end + 10)?;
    let (length, offset) = (long(data, end + 12)?, long(data, end + 16)?);
    // An archive may follow a program or script that starts it, with places counted from either's beginning.
    let mut at = end.checked_sub(length)?;
    let mut base = at.saturating_sub(offset);
    if data.get(at..at.checked_add(4)?)? != b"PK\x01\x02" {
        (at, base) = (offset, 0);
    }
    if base > 0 && data.get(offset..offset.saturating_add(4)) == Some(&b"PK\x01\x02"[..]) {
        (at, base) = (offset, 0);
    }
    let mut found = Vec::new();
    for _ in 0..count {
        if data.get(at..at.checked_add(4)?)? != b"PK\x01\x02" {
            return None;
        }
        let method = short(data, at + 10)? as u16;
        let (packed, size) = (long(data, at + 20)?, long(data, at + 24)?);
        let (name, extra, comment) = (short(data, at + 28)?, short(data, at + 30)?, short(data, at + 32)?);
        let place = long(data, at + 42)?.checked_add(base)?;
        let name_bytes = data.get(at + 46..at + 46 + name)?;
        at += 46 + name + extra + comment;
        // Members whose place is wrong are left out: what is in the directory alone cannot be run either.
        let Some(skip) = short(data, place.checked_add(26)?).zip(short(data, place + 28)) else { continue };
        let body = place + 30 + skip.0 + skip.1;
        let Some(content) = data.get(body..body.saturating_add(packed)) else { continue };
        found.push(ZipMember { name: name_bytes, method, size, data: content });
    }
    Some(found)
}

fn unpack(member: &ZipMember<'_>, most: usize) -> Option<Vec<u8>> {
    match member.method {
        0 => Some(member.data[..member.data.len().min(most)].to_vec()),
        8 if member.size <= most => decompress_to_vec_with_limit(member.data, most).ok(),
        _ => None,
    }
}

/// Unpack a member of an archive out of what all of the outermost one may take. Those that fail cost what they could
/// have taken.
fn charged(member: &ZipMember<'_>, most: usize, budget: &mut usize) -> Option<Vec<u8>> {
    let most = most.min(*budget);
    let made = unpack(member, most);
    *budget -= made.as_ref().map_or(most, Vec::len).min(*budget);
    made
}

fn java(name: &str, data: &[u8], within: &str, depth: u32, budget: &mut usize, found: &mut Vec<Package>) -> Option<()> {
    let members = zip(data)?;
    let mut own = Vec::new();
    let mut manifest = None;
    for member in &members {
        if found.len() + own.len() >= MAX_PACKAGES || *budget == 0 {
            break;
        }
        if member.name == b"META-INF/MANIFEST.MF" {
            manifest = charged(member, MAX_MEMBER, budget);
        } else if member.name.starts_with(b"META-INF/maven/") && member.name.ends_with(b"/pom.properties") {
            let Some(text) = charged(member, MAX_MEMBER, budget) else { continue };
            let text = lossy(&text).into_owned();
            let value = |key: &str| {
                text.lines()
                    .find_map(|line| line.trim().strip_prefix(key)?.trim_start().strip_prefix('='))
                    .unwrap_or_default()
                    .trim()
                    .to_string()
            };
            let (group, artifact, version) = (value("groupId"), value("artifactId"), value("version"));
            if !artifact.is_empty() && !version.is_empty() {
                let full = if group.is_empty() { artifact } else { format!("{group}:{artifact}") };
                let mut one = package("maven", &full, &version);
                one.within = within.into();
                own.push(one);
            }
        } else if depth < MAX_NESTING && is_java(member.name) {
            if let Some(inner) = charged(member, 64 << 20, budget) {
                let inner_name = lossy(member.name).into_owned();
                let place = if within.is_empty() { inner_name.clone() } else { format!("{within}!{inner_name}") };
                let short_name = inner_name.rsplit('/').next().unwrap_or_default().to_string();
                let _ = java(&short_name, &inner, &place, depth + 1, budget, found);
            }
        }
    }
    // An archive that has taken others in has their records, and maybe none of its own.
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let is_named = own.iter().any(|one| {
        let artifact = one.name.rsplit(':').next().unwrap_or_default();
        stem.strip_prefix(artifact).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.', '_']))
    });
    if !is_named && own.len() != 1 {
        own.extend(by_manifest(name, manifest.as_deref(), within));
    }
    found.append(&mut own);
    Some(())
}

/// What an archive without Maven's records says of itself, be it in its name.
fn by_manifest(name: &str, manifest: Option<&[u8]>, within: &str) -> Option<Package> {
    let text = lossy(manifest.unwrap_or_default()).replace("\r\n", "\n").replace("\n ", "");
    let main = text.split("\n\n").next().unwrap_or_default();
    let field = |key: &str| {
        main.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap_or_default().trim().to_string()
    };
    let first = |keys: &[&str]| keys.iter().map(|key| field(key)).find(|value| !value.is_empty());
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let split = stem.match_indices('-').find(|(at, _)| stem[at + 1..].starts_with(|c: char| c.is_ascii_digit()));
    let (stem_name, stem_version) = split.map_or((stem, ""), |(at, _)| (&stem[..at], &stem[at + 1..]));
    let version = first(&["Implementation-Version", "Bundle-Version", "Specification-Version"])
        .unwrap_or_else(|| stem_version.to_string());
    if version.is_empty() && manifest.is_none() {
        return None;
    }
    let mut one = package("maven", stem_name, if version.is_empty() { "unknown" } else { &version });
    one.within = within.into();
    Some(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &[u8], data: &[u8]) -> Found {
        source(path, data).map_or(Found::Nothing, |source| super::read(source.kind, path, data))
    }

    fn names(found: Found) -> Vec<String> {
        match found {
            Found::Packages(all) => {
                all.iter().map(|one| format!("{} {} {}", one.kind, one.name, one.version)).collect()
            }
            Found::Damaged(text) => vec![format!("damaged: {text}")],
            Found::Nothing => vec![],
        }
    }

    #[test]
    fn the_distributions_databases() {
        let status = b"Package: bash\nStatus: install ok installed\nArchitecture: amd64\nVersion: 5.2-1\n\n\
            Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n";
        assert_eq!(names(read(b"/var/lib/dpkg/status", status)), ["deb bash 5.2-1"]);
        assert_eq!(
            names(read(b"var/lib/dpkg/status.d/base", b"Package: base-files\nVersion: 12\n")),
            ["deb base-files 12"]
        );
        let installed = b"C:Q1\nP:musl\nV:1.2.5-r0\nA:x86_64\nL:MIT\n\nP:busybox\nV:1.36-r1\n\n";
        assert_eq!(names(read(b"lib/apk/db/installed", installed)), ["apk musl 1.2.5-r0", "apk busybox 1.36-r1"]);
        assert!(names(read(b"var/lib/dpkg/status", b"\xff\xfe\x00garbage"))[0].starts_with("damaged"));
        assert_eq!(names(read(b"/other/root/lib/apk/db/installed", installed)).len(), 2);
        assert!(source(b"/opt/xvar/lib/dpkg/status", b"").is_none());
        assert!(source(b"/opt/elsewhere", status).is_some_and(|source| source.is_aside));
    }

    #[test]
    fn the_languages() {
        let metadata = b"Metadata-Version: 2.1\nName: requests\nVersion: 2.31.0\nLicense: Apache 2.0\n\nName: no\n";
        assert_eq!(names(read(b"x/requests-2.31.0.dist-info/METADATA", metadata)), ["pypi requests 2.31.0"]);
        assert_eq!(names(read(b"a/package.json", br#"{"name":"x","version":"1.0.0"}"#)), ["npm x 1.0.0"]);
        assert!(names(read(b"a/package.json", br#"{"name":"x"}"#)).is_empty());
        assert!(names(read(b"a/package.json", b"{{{{")).is_empty());
    }

    /// A zip archive of members that are only stored.
    pub fn stored(members: &[(&str, &[u8])]) -> Vec<u8> {
        let (mut out, mut directory) = (Vec::new(), Vec::new());
        for (name, data) in members {
            let mut common = vec![0; 16];
            common.extend((data.len() as u32).to_le_bytes());
            common.extend((data.len() as u32).to_le_bytes());
            common.extend((name.len() as u16).to_le_bytes());
            common.extend([0, 0]);
            directory.extend(b"PK\x01\x02\x14\x00");
            directory.extend(&common[2..]);
            directory.extend([0; 10]);
            directory.extend((out.len() as u32).to_le_bytes());
            directory.extend(name.as_bytes());
            out.extend(b"PK\x03\x04");
            out.extend(&common[2..]);
            out.extend(name.as_bytes());
            out.extend(*data);
        }
        let start = out.len() as u32;
        out.extend(&directory);
        out.extend(b"PK\x05\x06\0\0\0\0");
        out.extend([members.len() as u8, 0, members.len() as u8, 0]);
        out.extend((directory.len() as u32).to_le_bytes());
        out.extend(start.to_le_bytes());
        out.extend([0, 0]);
        out
    }

    #[test]
    fn what_is_within_archives_is_bounded_together() {
        let data = miniz_oxide::deflate::compress_to_vec(&[7; 1000], 6);
        let member = ZipMember { name: b"x", method: 8, size: 1000, data: &data };
        let mut budget = 2500;
        assert_eq!(charged(&member, 1500, &mut budget).map(|made| made.len()), Some(1000));
        assert_eq!(budget, 1500);
        // One that lies costs what it could have taken.
        let liar = ZipMember { name: b"x", method: 8, size: 10, data: &data };
        assert_eq!(charged(&liar, 900, &mut budget), None);
        assert_eq!((charged(&member, 1500, &mut budget), budget), (None, 0));

        let inner = stored(&[("META-INF/maven/g/a/pom.properties", b"groupId=g\nartifactId=a\nversion=1.2\n")]);
        let all: Vec<String> = (0..9).map(|number| format!("lib/a{number}-1.2.jar")).collect();
        let members: Vec<(&str, &[u8])> = all.iter().map(|name| (name.as_str(), inner.as_slice())).collect();
        let outer = stored(&members);
        let found = |mut budget: usize| {
            let mut found = Vec::new();
            java("o.jar", &outer, "", 0, &mut budget, &mut found);
            found.iter().filter(|one| one.name == "g:a").count()
        };
        assert_eq!((found(1 << 20), found(inner.len() * 3)), (9, 2));
    }

    #[test]
    fn java_archives_also_within_others() {
        let inner = stored(&[("META-INF/maven/g/a/pom.properties", b"groupId=g\nartifactId=a\nversion=1.2\n")]);
        let outer = stored(&[
            ("META-INF/MANIFEST.MF", b"Manifest-Version: 1.0\r\nImplementation-Version: 3.0\r\n\r\n"),
            ("BOOT-INF/lib/a-1.2.jar", &inner),
        ]);
        let mut found = names(read(b"opt/app-9.jar", &outer));
        found.sort();
        assert_eq!(found, ["maven app 3.0", "maven g:a 1.2"]);
        for length in 0..outer.len() {
            let _ = read(b"opt/app.jar", &outer[..length]);
        }
        let mut behind = b"#!/bin/sh\nexec java -jar $0\n".to_vec();
        behind.extend(&outer);
        let mut found = names(read(b"opt/app-9.jar", &behind));
        found.sort();
        assert_eq!(found, ["maven app 3.0", "maven g:a 1.2"]);
        assert!(names(read(b"opt/app.bin", &outer)).contains(&"maven g:a 1.2".to_string()));
    }
}
