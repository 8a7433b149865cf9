//! What is said of an image when all of it has been read.

use std::collections::{BTreeMap, HashSet};

use crate::configuration;
use crate::findings;
use crate::image::{Image, SHOWN};
use crate::json::{shown, Writer};
use crate::packages::{self, Package};
use crate::secrets;
use crate::tree::Kind;

const MAX_PACKAGES: usize = 15_000;
const MAX_FOLDERS: usize = 30;
const MAX_HIDDEN: usize = 100;
const MAX_CHANGES: usize = 300;
const MAX_MASKS: usize = 200;
/// Characters of a mask, of which the host knows that more may follow.
const MAX_MASK: usize = 1000;
const MAX_MASKS_TOGETHER: usize = 256 << 10;
/// What all images of a report may take together, whatever they hold. The host takes no report of more than 6 MiB, in
/// which are also differences (600 KiB) and what a command did when it was started.
pub const MAX_IMAGES: usize = 9 << 19;

fn system(image: &Image) -> String {
    let id = image.tree.find(b"/etc/os-release", true).or_else(|| image.tree.find(b"/usr/lib/os-release", true));
    let text = id.map(|id| configuration::content_of(image, id)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let field = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .unwrap_or_default()
            .trim_matches('"')
            .to_string()
    };
    let (id, version, name) = (field("ID"), field("VERSION_ID"), field("PRETTY_NAME"));
    [id, version, name].map(|part| part.chars().take(100).collect::<String>()).join("\t")
}

/// Packages of files that are visible, each with its file's path.
fn all_packages(image: &Image) -> Vec<(Package, String, u32)> {
    let mut found = Vec::new();
    image.tree.visit(|path, id, node| {
        let Some(content) = image.contents.get(&id).filter(|content| !content.is_aside) else { return };
        for package in &content.packages {
            found.push((package.clone(), shown(path, SHOWN), node.layer + 1));
        }
    });
    let mut seen = HashSet::new();
    for path in packages::databases() {
        let Some(id) = image.tree.find(&path, true).filter(|id| seen.insert(*id)) else { continue };
        for package in image.contents.get(&id).filter(|one| one.is_aside).iter().flat_map(|one| &one.packages) {
            found.push((package.clone(), shown(&path, SHOWN), image.tree.node(id).layer + 1));
        }
    }
    found.sort_by(|a, b| (a.0.kind, &a.0.name, &a.0.version, &a.1).cmp(&(b.0.kind, &b.0.name, &b.0.version, &b.1)));
    found
}

fn pairs(out: &mut Writer, texts: &[(&str, &str)]) {
    for (key, text) in texts {
        out.key(key);
        out.text(text);
    }
}

fn numbers(out: &mut Writer, values: &[(&str, i64)]) {
    for (key, number) in values {
        out.key(key);
        out.number(*number);
    }
}

/// Write one image's part of the report, of `most` bytes: a third of it for findings, the rest for packages.
pub fn write(out: &mut Writer, image: &mut Image, most: usize) {
    let began = out.len();
    let start = configuration::check(image);
    let sums = findings::judge(image);
    out.open('{');
    out.key("has_layers");
    out.flag(image.has_layers);
    let system = system(image);
    let system: Vec<&str> = system.split('\t').collect();
    out.key("system");
    out.open('{');
    pairs(out, &[("id", system[0]), ("version", system[1]), ("name", system[2])]);
    out.close('}');
    out.key("totals");
    out.open('{');
    numbers(
        out,
        &[
            ("files", sums.files),
            ("directories", sums.directories),
            ("links", sums.links),
            ("others", sums.others),
            ("bytes", sums.bytes),
            ("programs", sums.programs),
            ("libraries", sums.libraries),
        ],
    );
    out.close('}');
    layers(out, image);
    out.key("masks");
    out.open('[');
    let before = out.len();
    let mut hidden_texts = 0;
    for text in image.masks.iter().take(MAX_MASKS) {
        if out.len() - before > MAX_MASKS_TOGETHER {
            break;
        }
        out.text(&text.chars().take(MAX_MASK).collect::<String>());
        hidden_texts += 1;
    }
    out.close(']');
    if hidden_texts < image.masks.len() {
        let text = format!("of {} secrets of the configuration, {hidden_texts} are hidden", image.masks.len());
        image.note("limit", b"", 0, text);
    }
    out.key("folders");
    out.open('[');
    let mut folders: Vec<_> = sums.folders.iter().collect();
    folders.sort_by(|a, b| (b.1 .0, a.0).cmp(&(a.1 .0, b.0)));
    for (path, (bytes, files)) in folders.into_iter().take(MAX_FOLDERS) {
        out.open('{');
        pairs(out, &[("path", &shown(path, SHOWN))]);
        numbers(out, &[("bytes", *bytes), ("files", *files)]);
        out.close('}');
    }
    out.close(']');
    hidden(out, image);
    out.key("start");
    out.open('{');
    out.key("command");
    out.open('[');
    for word in &start.command {
        out.text(&secrets::masked(&image.masked(word), true));
    }
    out.close(']');
    pairs(out, &[("path", &shown(&start.path, SHOWN)), ("kind", &start.kind)]);
    out.key("scripts");
    out.open('[');
    for (path, text) in &start.scripts {
        out.open('{');
        pairs(out, &[("path", path), ("text", text)]);
        out.close('}');
    }
    out.close(']');
    out.close('}');
    out.key("counts");
    out.open('{');
    let mut counts: Vec<_> = image.counts.iter().collect();
    counts.sort();
    for (kind, count) in counts {
        out.key(kind);
        out.number(*count as i64);
    }
    out.close('}');
    out.key("findings");
    out.open('[');
    let before = out.len();
    for finding in &image.findings {
        if out.len() - before > most / 3 {
            break;
        }
        out.open('{');
        pairs(out, &[("kind", finding.kind), ("path", &finding.path), ("detail", &finding.detail)]);
        numbers(out, &[("layer", i64::from(finding.layer))]);
        out.close('}');
    }
    out.close(']');
    let all = all_packages(image);
    numbers(out, &[("packages_found", all.len() as i64)]);
    out.key("packages");
    out.open('[');
    for (package, path, layer) in all.iter().take(MAX_PACKAGES) {
        if out.len() - began > most {
            break;
        }
        out.open('{');
        pairs(out, &[("kind", package.kind), ("name", &package.name), ("version", &package.version)]);
        pairs(out, &[("architecture", &package.architecture), ("licence", &package.licence)]);
        pairs(out, &[("path", path), ("within", &package.within.chars().take(SHOWN).collect::<String>())]);
        numbers(out, &[("layer", i64::from(*layer))]);
        out.close('}');
    }
    out.close(']');
    out.close('}');
}

fn layers(out: &mut Writer, image: &Image) {
    out.key("layers");
    out.open('[');
    for layer in &image.layers {
        out.open('{');
        pairs(out, &[("digest", &layer.digest), ("kind", &layer.kind)]);
        numbers(
            out,
            &[
                ("stored_bytes", layer.stored as i64),
                ("bytes", layer.bytes as i64),
                ("entries", layer.entries as i64),
                ("files", layer.files as i64),
            ],
        );
        out.key("whole");
        out.flag(layer.whole);
        out.close('}');
    }
    out.close(']');
}

fn hidden(out: &mut Writer, image: &Image) {
    let mut rows: Vec<_> = image
        .tree
        .hidden
        .iter()
        .map(|one| (one, image.tree.node(one.id)))
        .filter(|(_, node)| node.names == 0)
        .collect();
    rows.sort_by(|a, b| (b.1.size, &a.0.path).cmp(&(a.1.size, &b.0.path)));
    out.key("hidden");
    out.open('{');
    let bytes: u64 = rows.iter().fold(0, |sum: u64, (_, node)| sum.saturating_add(node.size));
    numbers(out, &[("files", rows.len() as i64), ("bytes", bytes.min(1 << 62) as i64)]);
    out.key("largest");
    out.open('[');
    for (one, node) in rows.iter().take(MAX_HIDDEN) {
        out.open('{');
        pairs(out, &[("path", &shown(&one.path, SHOWN))]);
        numbers(
            out,
            &[("bytes", node.size as i64), ("layer", i64::from(node.layer) + 1), ("by", i64::from(one.by) + 1)],
        );
        out.close('}');
    }
    out.close(']');
    out.close('}');
}

/// Write how two images differ: packages, and files by what they are and hold.
pub fn write_difference(out: &mut Writer, old: &Image, new: &Image) {
    out.open('{');
    let versions = |image: &Image| {
        let mut found: BTreeMap<(&'static str, String), Vec<String>> = BTreeMap::new();
        for (package, _, _) in all_packages(image) {
            let all = found.entry((package.kind, package.name)).or_default();
            if !all.contains(&package.version) {
                all.push(package.version);
            }
        }
        found
    };
    let (before, after) = (versions(old), versions(new));
    let mut rows = Vec::new();
    let mut keys: Vec<_> = before.keys().chain(after.keys()).collect();
    keys.sort();
    keys.dedup();
    for key in keys {
        let (was, is) = (before.get(key), after.get(key));
        if was != is {
            rows.push((key.0, key.1.as_str(), joined(was), joined(is)));
        }
    }
    numbers(out, &[("packages_changed", rows.len() as i64)]);
    out.key("packages");
    out.open('[');
    for (kind, name, was, is) in rows.iter().take(MAX_CHANGES) {
        out.open('{');
        pairs(out, &[("kind", kind), ("name", name), ("was", was), ("is", is)]);
        out.close('}');
    }
    out.close(']');
    let files = |image: &Image| {
        let mut found: BTreeMap<Vec<u8>, (u32, String)> = BTreeMap::new();
        image.tree.visit(|path, id, node| {
            let hash = image.contents.get(&id).map_or(0, |content| content.hash);
            let kind = format!("{:?}", node.kind).to_lowercase();
            let size = if node.kind == Kind::File { format!(", {} bytes", node.size) } else { String::new() };
            let target =
                if node.kind == Kind::Link { format!(" to {}", shown(&node.target, 200)) } else { String::new() };
            let text = format!("{kind}{target}, {:04o} {}:{}{size}", node.mode, node.uid, node.gid);
            found.insert(path.to_vec(), ((hash >> 32) as u32 ^ hash as u32, text));
        });
        found
    };
    let (before, after) = (files(old), files(new));
    let mut rows: Vec<(&Vec<u8>, &str, &str)> = Vec::new();
    for (path, (hash, text)) in &before {
        match after.get(path) {
            None => rows.push((path, text, "")),
            Some((other, is)) if other != hash || is != text => rows.push((path, text, is)),
            Some(_) => {}
        }
    }
    rows.extend(
        after.iter().filter(|(path, _)| !before.contains_key(*path)).map(|(path, (_, text))| (path, "", text.as_str())),
    );
    rows.sort();
    numbers(out, &[("files_changed", rows.len() as i64)]);
    out.key("files");
    out.open('[');
    for (path, was, is) in rows.iter().take(MAX_CHANGES) {
        out.open('{');
        pairs(out, &[("path", &shown(path, SHOWN)), ("was", was), ("is", is)]);
        out.close('}');
    }
    out.close(']');
    out.close('}');
}

fn joined(versions: Option<&Vec<String>>) -> String {
    versions.map(|all| all.iter().take(8).cloned().collect::<Vec<_>>().join(", ")).unwrap_or_default()
}
