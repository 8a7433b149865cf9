//! One image: its layers are read one after the other, and what is to be said of each file is noted as its bytes pass.

use std::collections::HashMap;
use std::io::{self, Read};
use std::time::Instant;

use crate::elf::{self, Elf};
use crate::json::{shown, Value};
use crate::packages::{self, Package};
use crate::secrets::{self, Secret};
use crate::tar::{Archive, Member};
use crate::tree::{clean, Id, Kind, Node, Problem, Tree, ROOT};

const HEAD: u64 = 64 << 10;
const MAX_WHOLE: u64 = 256 << 20;
/// After the beginning of a file, text that looks like a key is looked for in steps of this, up to `MAX_SCANNED`.
const STEP: u64 = 1 << 20;
const MAX_SCANNED: u64 = 1 << 30;
const MAX_NODES: u64 = 3_000_000;
const MAX_BEHIND: u64 = 64 << 20;
const MAX_SCRIPT: usize = 4096;
const MAX_SCRIPTS: usize = 16 << 20;
const MAX_OF_A_KIND: usize = 500;
const MAX_SECRETS_OF_A_FILE: usize = 5;
const LARGE: u64 = 16 << 20;
const BOMB_SIZE: u64 = 1 << 30;
const BOMB_RATIO: u64 = 100;
pub const SHOWN: usize = 500;

/// Bounds of the work on all images together.
pub struct Limits {
    pub bytes: u64,
    pub entries: u64,
    pub end: Instant,
}

pub struct Finding {
    pub kind: &'static str,
    pub path: String,
    /// Counted from 1; 0 where it is about no layer.
    pub layer: u32,
    pub detail: String,
}

/// What was noted of a file's content.
#[derive(Default)]
pub struct Content {
    pub packages: Vec<Package>,
    /// The packages count only if a known path of a database leads here.
    pub is_aside: bool,
    pub elf: Option<Elf>,
    pub secrets: Vec<Secret>,
    /// The beginning of a script, or of a file of settings that is looked at in the end.
    pub text: Vec<u8>,
    pub hash: u64,
}

#[derive(Default)]
pub struct LayerFacts {
    pub digest: String,
    pub kind: String,
    pub stored: u64,
    pub bytes: u64,
    pub entries: u64,
    pub files: u64,
    pub whole: bool,
}

pub struct Image {
    pub tree: Tree,
    pub contents: HashMap<Id, Content>,
    pub layers: Vec<LayerFacts>,
    pub findings: Vec<Finding>,
    pub counts: HashMap<&'static str, usize>,
    pub config: Value,
    pub has_layers: bool,
    /// How many layers the manifest has, be they read or not.
    pub listed: usize,
    /// Strings of the configuration that nobody is to see.
    pub masks: Vec<String>,
    scripts: usize,
    /// The last regular file, and where its content begins in its layer.
    last: Option<(Id, u64)>,
    buffer: Vec<u8>,
    /// Contents are compared with another image's.
    pub hashes: Option<u64>,
    /// When no more is read.
    pub end: Option<Instant>,
}

enum Stop {
    /// The rest of this layer cannot be read.
    Layer(&'static str, String),
    /// A limit: nothing more is read at all.
    All(&'static str, String),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Stop::Layer("bad-layer", error.to_string())
    }
}

impl Image {
    pub fn new(config: Value, hashes: Option<u64>) -> Image {
        Image {
            tree: Tree::default(),
            contents: HashMap::new(),
            layers: Vec::new(),
            findings: Vec::new(),
            counts: HashMap::new(),
            config,
            has_layers: true,
            listed: 0,
            masks: Vec::new(),
            scripts: 0,
            last: None,
            buffer: Vec::new(),
            hashes,
            end: None,
        }
    }

    /// Whether all scripts were kept.
    pub fn scripts_fit(&self) -> bool {
        self.scripts < MAX_SCRIPTS
    }

    /// A text of the configuration without what is to be hidden.
    pub fn masked(&self, text: &str) -> String {
        self.masks.iter().fold(text.to_string(), |text, mask| {
            if mask.is_empty() {
                text
            } else {
                text.replace(mask.as_str(), &secrets::redacted(mask.as_bytes()))
            }
        })
    }

    pub fn note(&mut self, kind: &'static str, path: &[u8], layer: u32, detail: impl Into<String>) {
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        if *count <= MAX_OF_A_KIND {
            let detail: String = detail.into().chars().take(SHOWN).collect();
            self.findings.push(Finding { kind, path: shown(path, SHOWN), layer, detail });
        }
    }

    /// Read one layer; false if a limit was reached that ends all reading.
    pub fn apply(
        &mut self,
        mut archive: Archive,
        mut facts: LayerFacts,
        limits: &mut Limits,
        taken: &dyn Fn() -> u64,
    ) -> bool {
        let layer = self.layers.len() as u32;
        self.end = Some(limits.end);
        let outcome = self.members(&mut archive, &mut facts, layer, limits, taken);
        let outcome = match outcome {
            // What follows the archive's end is part of the layer, and may be hidden data.
            Ok(()) => self.behind(&mut archive, layer),
            stopped => stopped,
        };
        if let (Err(_), Some((id, start))) = (&outcome, self.last) {
            let node = &mut self.tree.nodes[id as usize];
            node.size = node.size.min(archive.stream.passed.saturating_sub(start));
        }
        facts.bytes = archive.stream.passed;
        limits.bytes = limits.bytes.saturating_sub(facts.bytes);
        facts.whole = outcome.is_ok();
        self.layers.push(facts);
        match outcome {
            Ok(()) => true,
            Err(Stop::Layer(kind, text)) => {
                self.note(kind, b"", layer + 1, text);
                true
            }
            Err(Stop::All(kind, text)) => {
                self.note(kind, b"", layer + 1, text);
                false
            }
        }
    }

    /// Look at what follows the end of an archive.
    fn behind(&mut self, archive: &mut Archive, layer: u32) -> Result<(), Stop> {
        let mut piece = vec![0; 256 << 10];
        let end = archive.stream.passed + MAX_BEHIND;
        while archive.stream.passed < end {
            let done = archive.stream.read(&mut piece)?;
            if done == 0 {
                break;
            }
            if piece[..done].iter().any(|byte| *byte != 0) {
                self.note("odd-member", b"", layer + 1, "data follows the end of the archive");
                break;
            }
        }
        // A packed stream is known to be whole when all of it has passed.
        archive.stream.skip(MAX_BEHIND)?;
        Ok(())
    }

    fn members(
        &mut self,
        archive: &mut Archive,
        facts: &mut LayerFacts,
        layer: u32,
        limits: &mut Limits,
        taken: &dyn Fn() -> u64,
    ) -> Result<(), Stop> {
        let mut absolute = 0;
        loop {
            let member = archive.next()?;
            // By what has passed, and not by what a header claims: a lie is met at the end of the archive.
            check(archive.stream.passed, limits, taken)?;
            let Some(member) = member else { return Ok(()) };
            self.last = None;
            for text in std::mem::take(&mut archive.oddities) {
                self.note("odd-member", &member.name, layer + 1, text);
            }
            if member.name.starts_with(b"/") && member.name.len() > 1 {
                absolute += 1;
                if absolute == 1 {
                    self.note(
                        "odd-member",
                        &member.name,
                        layer + 1,
                        "its name begins with '/', as others of the layer may",
                    );
                }
            }
            facts.entries += 1;
            if limits.entries == 0 {
                return Err(Stop::All("limit", "the image has more members than are read".into()));
            }
            limits.entries -= 1;
            if self.tree.nodes.len() as u64 > MAX_NODES {
                return Err(Stop::All("limit", "the image has more directories than are read".into()));
            }
            facts.files += u64::from(member.kind == b'0');
            if let Err(problem) = self.member(archive, &member, layer) {
                match problem {
                    Problem::Escapes => {
                        self.note("path-escape", &member.name, layer + 1, "its name leads out of the root directory");
                    }
                    Problem::NoWay => {
                        self.note(
                            "odd-member",
                            &member.name,
                            layer + 1,
                            "a parent is no directory or a link to nowhere",
                        );
                    }
                    Problem::TooLong => self.note("odd-name", &member.name, layer + 1, "its name is too long"),
                }
            }
            if member.size > BOMB_SIZE && member.size / member.stored.max(1) > BOMB_RATIO {
                let text = format!("a sparse file of {} bytes, of which {} are stored", member.size, member.stored);
                self.note("archive-bomb", &member.name, layer + 1, text);
            } else if member.stored > LARGE {
                self.skim(archive, limits, taken)?;
            }
        }
    }

    /// Go past a large content in steps.
    fn skim(&mut self, archive: &mut Archive, limits: &Limits, taken: &dyn Fn() -> u64) -> Result<(), Stop> {
        let mut piece = vec![0; 1 << 20];
        while Dense(archive).read(&mut piece)? > 0 {
            check(archive.stream.passed, limits, taken)?;
        }
        Ok(())
    }

    fn member(&mut self, archive: &mut Archive, member: &Member, layer: u32) -> Result<(), Problem> {
        let mut parts = clean(&member.name)?;
        if member.name.split(|byte| *byte == b'/').any(|part| part == b"..") {
            self.note("path-escape", &member.name, layer + 1, "its name has a component '..'");
        }
        let Some(name) = parts.pop() else {
            if member.kind == b'5' {
                let root = &mut self.tree.nodes[ROOT as usize];
                (root.mode, root.uid, root.gid) = (member.mode, member.uid, member.gid);
            } else if !matches!(member.kind, b'x' | b'g') {
                self.note("odd-member", &member.name, layer + 1, "the root of the file system is no directory");
            }
            return Ok(());
        };
        let path =
            [b"/".as_slice(), parts.join(&b'/').as_slice(), if parts.is_empty() { b"".as_slice() } else { b"/" }, name]
                .concat();
        self.look_at_name(&path, layer);
        if member.is_overlay {
            self.note("odd-whiteout", &path, layer + 1, "it has attributes by which overlayfs hides files");
        }
        if self.tree.is_through_own_link(&parts, layer) {
            self.note("odd-member", &path, layer + 1, "its way leads through a link of the same layer");
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            self.whiteout(&parts, hidden, &path, member, layer);
            return Ok(());
        }
        let parent = self.tree.directory(&parts, layer)?;
        let old = self.tree.node(parent).children.get(name).copied();
        let kind = match member.kind {
            b'0' => Kind::File,
            b'1' => {
                return {
                    self.link(parent, name, &path, member, layer);
                    Ok(())
                }
            }
            b'2' => Kind::Link,
            b'3' => Kind::Character,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                self.note(
                    "odd-member",
                    &path,
                    layer + 1,
                    format!("a member of the unknown type {:?}", char::from(other)),
                );
                return Ok(());
            }
        };
        if kind == Kind::Character && (member.major, member.minor) == (0, 0) {
            self.note("odd-whiteout", &path, layer + 1, "a character device 0:0, as overlayfs writes them");
            self.tree.remove_older(parent, name, &path, layer);
            return Ok(());
        }
        if let Some(id) = old {
            let node = &mut self.tree.nodes[id as usize];
            if node.kind == Kind::Directory && kind == Kind::Directory {
                (node.mode, node.uid, node.gid) = (member.mode, member.uid, member.gid);
                (node.layer, node.latest) = (layer, layer);
                return Ok(());
            }
            if node.layer == layer && self.has_layers {
                self.note("odd-member", &path, layer + 1, "the layer has two members of this name");
            }
            self.tree.remove(parent, name, &path, layer);
        }
        let mut node = Node::new(kind, member.mode, layer);
        (node.uid, node.gid, node.size) = (member.uid, member.gid, member.size);
        node.device = (member.major, member.minor);
        node.capability.clone_from(&member.capability);
        if kind == Kind::Link {
            node.target.clone_from(&member.link);
        }
        let id = self.tree.add(node);
        self.tree.nodes[parent as usize].children.insert(name.into(), id);
        if kind == Kind::File && member.size > 0 {
            self.last = Some((id, archive.stream.passed));
            // An error of the stream is met again by who asks for the next member.
            let _ = if member.size > MAX_WHOLE && member.stored < member.size {
                self.read_content(&path, id, &mut Dense(archive), member.stored)
            } else {
                self.read_content(&path, id, archive, member.size)
            };
        }
        Ok(())
    }

    fn look_at_name(&mut self, path: &[u8], layer: u32) {
        if path.iter().all(|byte| (0x20..0x7f).contains(byte)) {
            return;
        }
        let Ok(text) = std::str::from_utf8(path) else {
            return self.note("odd-name", path, layer + 1, "its name is no UTF-8");
        };
        if text.chars().any(char::is_control) {
            self.note("odd-name", path, layer + 1, "its name has control characters");
        } else if text.chars().any(
            |c| matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}'),
        ) {
            self.note(
                "odd-name",
                path,
                layer + 1,
                "its name has characters that cannot be seen or turn the text around",
            );
        }
    }

    fn whiteout(&mut self, parts: &[&[u8]], hidden: &[u8], path: &[u8], member: &Member, layer: u32) {
        if member.kind != b'0' || member.size != 0 {
            self.note("odd-whiteout", path, layer + 1, "it is no empty file");
        }
        let Some(parent) =
            self.tree.find(&parts.join(&b'/'), true).filter(|id| self.tree.node(*id).kind == Kind::Directory)
        else {
            return self.note("odd-whiteout", path, layer + 1, "there is no such directory");
        };
        let base = [b"/".as_slice(), &parts.join(&b'/')].concat();
        if hidden == b".wh..opq" {
            if layer == 0 {
                self.note("odd-whiteout", path, layer + 1, "an opaque directory in the lowest layer");
            }
            return self.tree.clear(parent, if parts.is_empty() { b"" } else { &base }, layer);
        }
        if hidden.starts_with(b".wh.") || matches!(hidden, b"" | b"." | b"..") {
            return self.note("odd-whiteout", path, layer + 1, "a name that hides nothing by the specification");
        }
        let target = [if parts.is_empty() { b"".as_slice() } else { &base }, b"/", hidden].concat();
        match self.tree.node(parent).children.get(hidden).copied() {
            None => self.note("odd-whiteout", path, layer + 1, "what it hides is not there"),
            Some(id) if self.tree.node(id).layer == layer => {
                self.note("odd-whiteout", path, layer + 1, "the same layer has what it hides");
                if self.tree.node(id).kind == Kind::Directory {
                    self.tree.clear(id, &target, layer);
                }
            }
            Some(_) => {
                self.tree.remove_older(parent, hidden, &target, layer);
            }
        }
    }

    fn link(&mut self, parent: Id, name: &[u8], path: &[u8], member: &Member, layer: u32) {
        let target = match clean(&member.link) {
            Ok(parts) => self.tree.find(&parts.join(&b'/'), false),
            Err(_) => {
                return self.note(
                    "path-escape",
                    path,
                    layer + 1,
                    format!("a hard link to {}", shown(&member.link, 200)),
                );
            }
        };
        match target.filter(|id| self.tree.node(*id).kind != Kind::Directory) {
            None => self.note(
                "odd-link",
                path,
                layer + 1,
                format!("a hard link to {}, which is not there", shown(&member.link, 200)),
            ),
            Some(id) => {
                if self.tree.node(parent).children.get(name) != Some(&id) {
                    self.tree.remove(parent, name, path, layer);
                    self.tree.nodes[id as usize].names += 1;
                    self.tree.nodes[parent as usize].children.insert(name.into(), id);
                }
            }
        }
    }

    /// Note what a regular file's bytes tell.
    pub fn read_content(&mut self, path: &[u8], id: Id, reader: &mut dyn Read, size: u64) -> io::Result<()> {
        let mut data = std::mem::take(&mut self.buffer);
        data.clear();
        let outcome = self.noted(path, id, reader, size, &mut data);
        self.buffer = if data.capacity() > 4 << 20 { Vec::new() } else { data };
        outcome
    }

    fn noted(&mut self, path: &[u8], id: Id, reader: &mut dyn Read, size: u64, data: &mut Vec<u8>) -> io::Result<()> {
        let mut content = Content::default();
        reader.take(HEAD).read_to_end(data)?;
        let source = packages::source(path, data);
        let is_text = !data[..data.len().min(1024)].contains(&0);
        if (data.len() as u64) < size && (source.is_some() || elf::is_program(data)) {
            data.reserve_exact(usize::try_from(size.min(MAX_WHOLE)).unwrap_or(0).saturating_sub(data.len()));
            reader.take(MAX_WHOLE - HEAD).read_to_end(data)?;
            if data.len() as u64 >= MAX_WHOLE {
                let layer = self.tree.node(id).layer + 1;
                self.note("limit", path, layer, format!("only its first {} MiB were read", MAX_WHOLE >> 20));
            }
        }
        if let Some(source) = source {
            content.is_aside = source.is_aside;
            match packages::read(source.kind, path, data) {
                packages::Found::Packages(found) => content.packages = found,
                packages::Found::Damaged(text) if !source.is_aside => {
                    let layer = self.tree.node(id).layer + 1;
                    self.note("bad-database", path, layer, text);
                }
                _ => {}
            }
        }
        if elf::is_program(data) {
            content.elf = elf::read(data);
            if let Some(modules) = elf::go_modules(data) {
                content.packages.extend(modules.into_iter().take(5000).map(|(name, version)| Package {
                    kind: "golang",
                    name: name.chars().take(200).collect(),
                    version: version.chars().take(200).collect(),
                    ..Package::default()
                }));
            }
        }
        let is_script = data.starts_with(b"#!");
        if (is_script || is_kept(path)) && self.scripts < MAX_SCRIPTS {
            let most = if is_script { MAX_SCRIPT } else { 64 << 10 };
            content.text = data[..data.len().min(most)].to_vec();
            self.scripts += content.text.len();
        }
        let mut search = secrets::Search::new(data, is_text && is_setting(path), MAX_SECRETS_OF_A_FILE);
        search.is_library = content.elf.as_ref().is_some_and(|elf| !elf.is_program);
        let mut hash = self.hashes.map(Hash);
        let mut piece = std::mem::take(data);
        let mut passed = 0;
        while !piece.is_empty() && (passed < MAX_SCANNED || hash.is_some()) {
            search.feed(&piece, passed + piece.len() as u64 >= size);
            if let Some(hash) = &mut hash {
                hash.update(&piece);
            }
            passed += piece.len() as u64;
            piece.clear();
            // Who asks for the next member says that there was no time for this one.
            if self.end.is_some_and(|end| Instant::now() > end) {
                break;
            }
            if passed < size {
                reader.take(STEP).read_to_end(&mut piece)?;
            }
        }
        *data = piece;
        content.secrets = search.found;
        content.hash = hash.map_or(0, |hash| hash.0);
        if self.hashes.is_some()
            || content.elf.is_some()
            || !content.packages.is_empty()
            || !content.secrets.is_empty()
            || !content.text.is_empty()
        {
            self.contents.insert(id, content);
        }
        Ok(())
    }
}

/// Whether a layer may be read on: an error at a limit, and if it was made to fill disks.
fn check(made: u64, limits: &Limits, taken: &dyn Fn() -> u64) -> Result<(), Stop> {
    if made > limits.bytes {
        return Err(Stop::All("limit", "the image unpacks to more bytes than are read".into()));
    }
    if Instant::now() > limits.end {
        return Err(Stop::All("limit", "there was no time to read all of it".into()));
    }
    let packed = taken().max(1);
    if made > BOMB_SIZE && made / packed > BOMB_RATIO {
        return Err(Stop::Layer("archive-bomb", format!("{packed} bytes unpack to more than {BOMB_SIZE}")));
    }
    Ok(())
}

/// A hash whose key the image's maker does not know: two files of one hash have one content.
struct Hash(u64);

impl Hash {
    fn update(&mut self, data: &[u8]) {
        let mut words = data.chunks_exact(8);
        for word in &mut words {
            self.mix(u64::from_le_bytes(word.try_into().unwrap_or_default()));
        }
        let mut last = [0; 8];
        last[..words.remainder().len()].copy_from_slice(words.remainder());
        self.mix(u64::from_le_bytes(last) ^ words.remainder().len() as u64);
    }

    fn mix(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ (product as u64).rotate_left(29);
    }
}

/// Files whose text the report is about.
const KEPT: &[&[u8]] = &[
    b"/etc/passwd",
    b"/etc/shadow",
    b"/etc/group",
    b"/etc/os-release",
    b"/usr/lib/os-release",
    b"/etc/ld.so.preload",
    b"/etc/sudoers",
];

fn is_kept(path: &[u8]) -> bool {
    KEPT.contains(&path) || path.starts_with(b"/etc/sudoers.d/") || path.ends_with(b"/.ssh/authorized_keys")
}

/// The pieces of a sparse file without its holes.
struct Dense<'a>(&'a mut Archive);

impl Read for Dense<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.pass_hole();
        self.0.read(buffer)
    }
}

/// Whether a file is of a kind in which people write passwords.
fn is_setting(path: &[u8]) -> bool {
    const ENDS: &[&[u8]] = &[
        b".env",
        b".envrc",
        b".ini",
        b".cfg",
        b".cnf",
        b".conf",
        b".config",
        b".yml",
        b".yaml",
        b".json",
        b".properties",
        b".toml",
        b".tfvars",
        b".tfstate",
        b".xml",
        b".php",
        b".sh",
        b".npmrc",
        b".yarnrc",
        b".pypirc",
        b".netrc",
        b".pgpass",
        b".my.cnf",
        b"_history",
        b"bashrc",
        b"profile",
        b"credentials",
        b".git-credentials",
        b".htpasswd",
        b"Dockerfile",
    ];
    const APART: [&[u8]; 7] = [
        b"/usr/share/",
        b"/usr/lib/",
        b"/usr/include/",
        b"/node_modules/",
        b"/site-packages/",
        b"/dist-packages/",
        b"/var/lib/dpkg/",
    ];
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    (ENDS.iter().any(|end| name.ends_with(end)) || name.starts_with(b".env"))
        && !APART.iter().any(|part| elf::find(path, part).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// An archive of small files.
    fn archive(count: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for number in 0..count {
            let mut block = [0; 512];
            block[..6].copy_from_slice(format!("f{number:05}").as_bytes());
            block[100..107].copy_from_slice(b"0000644");
            block[124..135].copy_from_slice(b"00000000001");
            block[148..156].fill(b' ');
            block[156] = b'0';
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            out.extend(block);
            out.extend([b'x'; 1]);
            out.extend([0; 511]);
        }
        out.extend([0; 1024]);
        out
    }

    fn read(data: Vec<u8>, bytes: u64, end: Instant) -> Image {
        let mut image = Image::new(Value::Null, None);
        let size = data.len() as u64;
        let pieces = crate::stream::unpacked(Box::new(io::Cursor::new(data)), "plain").unwrap();
        let mut limits = Limits { bytes, entries: 1000, end };
        image.apply(Archive::new(pieces), LayerFacts::default(), &mut limits, &|| size);
        image
    }

    #[test]
    fn each_member_is_the_last_one_when_time_or_room_is_over() {
        let later = Instant::now() + Duration::from_secs(60);
        let image = read(archive(5), 1 << 20, later);
        assert_eq!((image.layers[0].files, image.findings.len()), (5, 0));
        // Two members and the header of the third one.
        let image = read(archive(5), 2500, later);
        assert_eq!((image.layers[0].files, image.findings[0].kind), (2, "limit"));
        assert!(!image.layers[0].whole);
        // What is too much may be the end of the last member.
        let image = read(archive(5), 5 * 1024, later);
        assert_eq!((image.layers[0].files, image.findings[0].kind), (5, "limit"));
        let image = read(archive(5), 1 << 20, Instant::now());
        assert_eq!((image.layers[0].files, image.findings[0].kind), (0, "limit"));
    }

    #[test]
    fn one_large_file_does_not_outlast_the_time() {
        struct Endless(u64);
        impl Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                buffer.fill(b'x');
                self.0 += buffer.len() as u64;
                Ok(buffer.len())
            }
        }
        let mut image = Image::new(Value::Null, Some(1));
        image.end = Some(Instant::now());
        let id = image.tree.add(Node::new(Kind::File, 0o644, 0));
        let mut reader = Endless(0);
        image.read_content(b"/x", id, &mut reader, 1 << 50).unwrap();
        assert!(reader.0 <= HEAD + STEP, "{}", reader.0);
    }
}
