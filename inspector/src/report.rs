//! What is said of an image when all of it has been read.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::elf::Elf;
use crate::image::{Content, Image, SHOWN};
use crate::json::{shown, Value, Writer};
use crate::packages::{self, Package};
use crate::secrets;
use crate::tree::{Hidden, Id, Kind, Node};

const MAX_PACKAGES: usize = 15_000;
const MAX_FOLDERS: usize = 30;
const MAX_HIDDEN: usize = 100;
const MAX_CHANGES: usize = 300;
const MAX_SCRIPTS: usize = 12;
const MAX_MASKS: usize = 200;
const MAX_MASK: usize = 10_000;
/// The whole report stays below this, whatever the image holds.
const MAX_REPORT: usize = 3 << 20;

/// Places where anybody may write a link to, without a word.
const SOCKETS: &[&[u8]] = &[b"docker.sock", b"containerd.sock", b"crio.sock", b"podman.sock"];

type Note = (&'static str, Vec<u8>, u32, String);

#[derive(Default)]
struct Sums {
    files: i64,
    directories: i64,
    links: i64,
    others: i64,
    bytes: i64,
    programs: i64,
    libraries: i64,
    weak: BTreeMap<&'static str, i64>,
    folders: HashMap<Vec<u8>, (i64, i64)>,
}

/// Look at the finished tree: what is visible, and what of it deserves a word.
fn judge(image: &mut Image) -> Sums {
    let mut sums = Sums::default();
    let mut notes: Vec<Note> = Vec::new();
    let contents = std::mem::take(&mut image.contents);
    image.tree.visit(|path, id, node| {
        match node.kind {
            Kind::File => {
                sums.files += 1;
                // A content counts once, however many names it has.
                let share = node.size as i64 / i64::from(node.names.max(1));
                sums.bytes = sums.bytes.saturating_add(share);
                for depth in 1..=2 {
                    let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).nth(depth);
                    if let Some(end) = ends {
                        let folder = sums.folders.entry(path[..end].to_vec()).or_default();
                        folder.0 = folder.0.saturating_add(share);
                        folder.1 += 1;
                    }
                }
            }
            Kind::Directory => sums.directories += 1,
            Kind::Link => sums.links += 1,
            _ => sums.others += 1,
        }
        let mut note = |kind, detail: String| notes.push((kind, path.to_vec(), node.layer + 1, detail));
        attributes(node, &mut note);
        if node.kind == Kind::Link {
            odd_link(path, node, &mut note);
        }
        let Some(content) = contents.get(&id) else { return };
        for secret in &content.secrets {
            note("secret", said(secret));
        }
        if let Some(elf) = &content.elf {
            if elf.is_program {
                sums.programs += 1;
            } else {
                sums.libraries += 1;
            }
            for (kind, detail) in weaknesses(elf) {
                *sums.weak.entry(kind).or_default() += 1;
                note(kind, detail);
            }
        }
        accounts(path, &content.text, &mut note);
    });
    for hidden in &image.tree.hidden {
        if let Some(content) = contents.get(&hidden.id) {
            if let Some(text) = hidden_packages(image, &contents, hidden, content.packages.len()) {
                notes.push(("hidden-database", hidden.path.clone(), image.tree.node(hidden.id).layer + 1, text));
            }
            for secret in &content.secrets {
                let layer = image.tree.node(hidden.id).layer + 1;
                let text = format!("{}; hidden by layer {}, and still in layer {layer}", said(secret), hidden.by + 1);
                notes.push(("secret", hidden.path.clone(), layer, text));
            }
        }
    }
    lists_without_packages(image, &contents, &mut notes);
    image.contents = contents;
    for (kind, path, layer, detail) in notes {
        image.note(kind, &path, layer, detail);
    }
    sums
}

/// A database that a later layer took away, or put an empty one in the place of.
fn hidden_packages(image: &Image, contents: &HashMap<Id, Content>, hidden: &Hidden, count: usize) -> Option<String> {
    if count == 0 || !packages::is_database(&hidden.path) {
        return None;
    }
    let now = image.tree.find(&hidden.path, true).and_then(|id| contents.get(&id)).map_or(0, |one| one.packages.len());
    (now == 0).then(|| format!("it names {count} packages, and layer {} took it away", hidden.by + 1))
}

/// dpkg keeps a list of files for each package: those of packages that its database does not name.
fn lists_without_packages(image: &Image, contents: &HashMap<Id, Content>, notes: &mut Vec<Note>) {
    let Some(directory) = image.tree.find(b"/var/lib/dpkg/info", true) else { return };
    let known = image.tree.find(b"/var/lib/dpkg/status", true).and_then(|id| contents.get(&id));
    let known: HashSet<&str> =
        known.map_or_else(HashSet::new, |one| one.packages.iter().map(|p| p.name.as_str()).collect());
    let mut missing: Vec<String> = Vec::new();
    for name in image.tree.node(directory).children.keys() {
        if let Some(name) = name.strip_suffix(b".list") {
            let name = name.split(|byte| *byte == b':').next().unwrap_or_default();
            if !known.contains(String::from_utf8_lossy(name).as_ref()) {
                missing.push(shown(name, 80));
            }
        }
    }
    // Removed packages whose settings stay have lists, too.
    if missing.len() > known.len() {
        missing.sort();
        let text = format!(
            "{} packages have files and are not in it: {}",
            missing.len(),
            missing[..missing.len().min(5)].join(", ")
        );
        let layer = image.tree.node(directory).layer + 1;
        notes.push(("bad-database", b"/var/lib/dpkg/status".to_vec(), layer, text));
    }
}

fn said(secret: &secrets::Secret) -> String {
    let shown = if secret.shown.is_empty() { String::new() } else { format!(": {}", secret.shown) };
    format!("{} in line {}{shown}", secret.rule, secret.line)
}

fn attributes(node: &Node, note: &mut impl FnMut(&'static str, String)) {
    let owner = || format!("mode {:04o}, owner {}:{}", node.mode, node.uid, node.gid);
    if node.kind == Kind::File {
        if node.mode & 0o4000 != 0 {
            note("set-uid", owner());
        }
        if node.mode & 0o2000 != 0 {
            note("set-gid", owner());
        }
        if !node.capability.is_empty() {
            note("file-capability", capabilities(&node.capability));
        }
    }
    match node.kind {
        Kind::File if node.mode & 0o002 != 0 => note("world-writable", owner()),
        Kind::Directory if node.mode & 0o1002 == 0o002 => note("world-writable", owner()),
        Kind::Character => note("device-node", format!("character device {}:{}", node.device.0, node.device.1)),
        Kind::Block => note("device-node", format!("block device {}:{}", node.device.0, node.device.1)),
        Kind::Fifo => note("special-file", "a named pipe".into()),
        Kind::Socket => note("special-file", "a socket".into()),
        _ => {}
    }
}

const CAPABILITIES: &[&str] = &[
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// The names in a `security.capability` attribute (`struct vfs_cap_data`).
fn capabilities(data: &[u8]) -> String {
    let word =
        |at: usize| data.get(at..at + 4).map_or(0, |four| u32::from_le_bytes(four.try_into().unwrap_or_default()));
    let permitted = u64::from(word(4)) | u64::from(word(12)) << 32;
    let inheritable = u64::from(word(8)) | u64::from(word(16)) << 32;
    let mut names = Vec::new();
    for (bit, name) in CAPABILITIES.iter().enumerate() {
        if permitted >> bit & 1 != 0 {
            names.push((*name).to_string());
        } else if inheritable >> bit & 1 != 0 {
            names.push(format!("{name} (inheritable)"));
        }
    }
    let effective = if word(0) & 1 != 0 { ", effective" } else { "" };
    if names.is_empty() {
        return format!("malformed, {} bytes", data.len());
    }
    format!("{}{effective}", names.join(" "))
}

fn odd_link(path: &[u8], node: &Node, note: &mut impl FnMut(&'static str, String)) {
    let target = &node.target;
    let depth = path.iter().filter(|byte| **byte == b'/').count() as i32 - 1;
    let mut at = if target.starts_with(b"/") { 0 } else { depth };
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => at -= 1,
            _ => at += 1,
        }
        if at < 0 {
            return note("odd-link", format!("leads out of the root directory: {}", shown(target, 200)));
        }
    }
    let name = target.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let of_process = target.strip_prefix(b"/proc/").is_some_and(|rest| {
        rest.first().is_some_and(u8::is_ascii_digit)
            || rest.ends_with(b"/root")
            || rest.ends_with(b"/cwd")
            || rest.starts_with(b"self/root")
    });
    let of_disk = target.strip_prefix(b"/dev/").is_some_and(|rest| {
        [&b"sd"[..], b"vd", b"nvme", b"mem", b"kmem", b"port", b"dm-", b"disk/"]
            .iter()
            .any(|start| rest.starts_with(start))
    });
    if of_process || of_disk || SOCKETS.contains(&name) {
        note("odd-link", format!("leads to {}", shown(target, 200)));
    }
}

fn weaknesses(elf: &Elf) -> Vec<(&'static str, String)> {
    let mut found = Vec::new();
    if elf.has_executable_stack {
        found.push(("elf-executable-stack", "its stack can be executed".to_string()));
    }
    if elf.is_program && !elf.is_pie {
        found.push(("elf-no-pie", "it is not position independent".into()));
    }
    if elf.is_program && !elf.is_static && elf.relro == 0 {
        found.push(("elf-no-relro", "its relocations stay writable".into()));
    }
    if elf.is_program && elf.canary == Some(false) {
        found.push(("elf-no-canary", "it has no stack protector".into()));
    }
    let odd = |part: &str| {
        let good = ["$ORIGIN", "${ORIGIN}", "/usr", "/lib", "/lib64", "/lib32", "/opt"];
        let is_below =
            |start: &&str| part.strip_prefix(*start).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        !good.iter().any(is_below) || part.split('/').any(|step| step == "tmp")
    };
    if !elf.run_path.is_empty() && elf.run_path.split(':').any(odd) {
        found.push(("elf-run-path", format!("looks for libraries in {}", elf.run_path)));
    }
    found
}

/// What the files of accounts say that nobody expects.
fn accounts(path: &[u8], text: &[u8], note: &mut impl FnMut(&'static str, String)) {
    let text = String::from_utf8_lossy(text);
    let rows = || text.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|row| row.len() >= 4);
    match path {
        b"/etc/passwd" => {
            for row in rows() {
                if row[2].trim().parse() == Ok(0_i64) && row[0] != "root" {
                    note("account", format!("{:?} has the user id 0", row[0].chars().take(40).collect::<String>()));
                }
                if row[1].is_empty() {
                    note("account", format!("{:?} has no password", row[0].chars().take(40).collect::<String>()));
                } else if row[1].starts_with('$') {
                    note(
                        "account",
                        format!("{:?} has a password that all can read", row[0].chars().take(40).collect::<String>()),
                    );
                }
            }
        }
        b"/etc/shadow" => {
            for row in rows() {
                if row[1].is_empty() {
                    note("account", format!("{:?} has no password", row[0].chars().take(40).collect::<String>()));
                } else if row[1].starts_with('$') {
                    note(
                        "account",
                        format!("{:?} has a password of its own", row[0].chars().take(40).collect::<String>()),
                    );
                }
            }
        }
        b"/etc/ld.so.preload" if !text.trim().is_empty() => {
            note("preload", format!("every program loads {}", text.trim().chars().take(200).collect::<String>()));
        }
        _ if path.ends_with(b"/.ssh/authorized_keys") => {
            let keys = text.lines().filter(|line| line.contains("ssh-") || line.contains("ecdsa-")).count();
            if keys > 0 {
                note("account", format!("{keys} keys open it from elsewhere"));
            }
        }
        _ if path == b"/etc/sudoers" || path.starts_with(b"/etc/sudoers.d/") => {
            for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#') && line.contains("NOPASSWD")) {
                note("account", format!("without a password: {}", line.chars().take(80).collect::<String>()));
            }
        }
        _ => {}
    }
}

// ---- the configuration beside what is there ----

const MACHINES: &[(&str, u16)] =
    &[("amd64", 62), ("386", 3), ("arm64", 183), ("arm", 40), ("riscv64", 243), ("ppc64le", 21), ("s390x", 22)];

struct Start {
    command: Vec<String>,
    path: Vec<u8>,
    kind: String,
    scripts: Vec<(String, String)>,
}

pub fn command(config: &Value) -> Vec<String> {
    let inner = config.get("config");
    ["Entrypoint", "Cmd"]
        .iter()
        .flat_map(|key| inner.get(key).list())
        .map(|word| word.text().chars().take(SHOWN).collect())
        .take(64)
        .collect()
}

/// Texts of the configuration in which passwords stand, each with what it is.
fn texts(config: &Value) -> Vec<(String, &str)> {
    let inner = config.get("config");
    let mut found: Vec<(String, &str)> = Vec::new();
    for key in ["Entrypoint", "Cmd"] {
        found.extend(inner.get(key).list().iter().take(1000).map(|word| ("the command".into(), word.text())));
    }
    found.extend(
        inner.get("Healthcheck").get("Test").list().iter().map(|word| ("the health check".into(), word.text())),
    );
    for (key, value) in inner.get("Labels").members() {
        found.push((format!("the label {}", key.chars().take(100).collect::<String>()), value.text()));
    }
    for (number, step) in config.get("history").list().iter().enumerate().take(5000) {
        found.push((format!("step {} of the history", number + 1), step.get("created_by").text()));
        found.push((format!("the comment on step {}", number + 1), step.get("comment").text()));
    }
    found
}

const SECRET_WORDS: &[&str] =
    &["PASSWORD", "PASSWD", "SECRET", "TOKEN", "APIKEY", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY"];

/// Passwords in the configuration. What is to be hidden wherever the configuration is shown comes into `image.masks`.
fn secrets_of_configuration(image: &mut Image, config: &Value) {
    for item in config.get("config").get("Env").list().iter().take(1000) {
        let (key, value) = item.text().split_once('=').unwrap_or((item.text(), ""));
        let upper = key.to_ascii_uppercase();
        let is_named = SECRET_WORDS.iter().any(|word| upper.contains(word));
        let spans = secrets::spans(value.as_bytes(), false, 10);
        let shown = if is_named && value.len() >= 6 && !value.starts_with('/') {
            image.masks.push(value.into());
            secrets::redacted(value.as_bytes())
        } else if let Some((_, secret)) = spans.first() {
            format!("{} {}", secret.rule, secret.shown)
        } else {
            continue;
        };
        image.masks.extend(spans.into_iter().map(|(span, _)| String::from_utf8_lossy(&value.as_bytes()[span]).into()));
        image.note("secret-in-configuration", b"", 0, format!("the variable {key}: {shown}"));
    }
    for (what, text) in texts(config) {
        for (span, secret) in secrets::spans(text.as_bytes(), true, 20) {
            image.masks.push(String::from_utf8_lossy(&text.as_bytes()[span]).into());
            image.note("secret-in-configuration", b"", 0, format!("{what}: {} {}", secret.rule, secret.shown));
        }
    }
    image.masks.sort();
    image.masks.dedup();
}

fn configuration(image: &mut Image) -> Start {
    let config = image.config.clone();
    let inner = config.get("config");
    secrets_of_configuration(image, &config);
    let has_layer = |step: &&Value| step.get("empty_layer") != &Value::Bool(true);
    let steps = config.get("history").list().iter().take(5000).filter(has_layer).count();
    let layers = image.listed;
    if image.has_layers && steps > 0 && steps != layers {
        image.note(
            "configuration",
            b"",
            0,
            format!("the history has {steps} steps with a layer, and there are {layers} layers"),
        );
    }
    let names = config.get("rootfs").get("diff_ids").list().len();
    if image.has_layers && names != layers {
        image.note("configuration", b"", 0, format!("the configuration names {names} layers, and there are {layers}"));
    }
    user(image, inner.get("User").text());
    start(image, &config)
}

/// A user that the image's own files do not know.
fn user(image: &mut Image, name: &str) {
    let name = name.split(':').next().unwrap_or_default();
    if name.is_empty() || name.chars().all(|digit| digit.is_ascii_digit()) || name == "root" {
        return;
    }
    let known = image.tree.find(b"/etc/passwd", true).and_then(|id| image.contents.get(&id)).is_some_and(|content| {
        String::from_utf8_lossy(&content.text).lines().any(|line| line.split(':').next() == Some(name))
    });
    if !known {
        image.note(
            "configuration",
            b"/etc/passwd",
            0,
            format!("the user {:?} is not in it", name.chars().take(80).collect::<String>()),
        );
    }
}

fn start(image: &mut Image, config: &Value) -> Start {
    let inner = config.get("config");
    let mut start = Start { command: command(config), path: Vec::new(), kind: String::new(), scripts: Vec::new() };
    let Some(first) = start.command.first().cloned() else { return start };
    let places: Vec<String> = if first.contains('/') {
        let base = if first.starts_with('/') { "" } else { inner.get("WorkingDir").text() };
        vec![format!("{base}/{first}")]
    } else {
        on_path(inner, &first)
    };
    let found: Vec<(String, Id)> =
        places.iter().filter_map(|place| Some((place.clone(), image.tree.find(place.as_bytes(), true)?))).collect();
    let can_run = |id: Id| image.tree.node(id).kind == Kind::File && image.tree.node(id).mode & 0o111 != 0;
    // As execvp(3): what cannot be executed is passed over, as long as there is something else.
    let Some((place, id)) = found.iter().find(|(_, id)| can_run(*id)).or(found.first()).cloned() else {
        image.note("entry-point", first.as_bytes(), 0, "the command is not in the image");
        return start;
    };
    start.path = tidy(place.as_bytes());
    scripts(image, inner, &mut start);
    if !can_run(id) {
        let path = start.path.clone();
        image.note("entry-point", &path, 0, "the command cannot be executed");
        return start;
    }
    let Some(content) = image.contents.get(&id).filter(|one| one.elf.is_some() || one.text.starts_with(b"#!")) else {
        start.kind = "file".into();
        if image.scripts_fit() {
            let path = start.path.clone();
            image.note("entry-point", &path, 0, "it is neither a program nor a script that names its interpreter");
        }
        return start;
    };
    if let Some(elf) = content.elf.clone() {
        start.kind = if elf.is_static { "static program".into() } else { "program".into() };
        let path = start.path.clone();
        let architecture = config.get("architecture").text().to_string();
        if let Some((_, wanted)) = MACHINES.iter().find(|(name, _)| *name == architecture) {
            if *wanted != elf.machine {
                image.note(
                    "entry-point",
                    &path,
                    0,
                    format!(
                        "the image says {architecture}, and the program is for another machine (ELF {})",
                        elf.machine
                    ),
                );
            }
        }
        if !elf.interpreter.is_empty() && image.tree.find(elf.interpreter.as_bytes(), true).is_none() {
            image.note("entry-point", &path, 0, format!("its loader {} is not in the image", elf.interpreter));
        }
    } else if content.text.starts_with(b"#!") {
        start.kind = "script".into();
        let line =
            String::from_utf8_lossy(&content_of(image, id)).lines().next().unwrap_or_default()[2..].trim().to_string();
        let interpreter = line.split_whitespace().next().unwrap_or_default().to_string();
        let mut wanted = vec![interpreter.clone()];
        if interpreter.ends_with("/env") {
            let named = line.split_whitespace().skip(1).find(|word| !word.starts_with('-') && !word.contains('='));
            wanted.extend(named.map(str::to_string));
        }
        for name in wanted {
            let places = if name.contains('/') { vec![name.clone()] } else { on_path(inner, &name) };
            if !places.iter().any(|place| image.tree.find(place.as_bytes(), true).is_some()) {
                let path = start.path.clone();
                image.note("entry-point", &path, 0, format!("its interpreter {name:?} is not in the image"));
            }
        }
    }
    start
}

/// Where a command may be, by the image's PATH.
fn on_path(inner: &Value, name: &str) -> Vec<String> {
    let variables = inner.get("Env").list();
    let path = variables
        .iter()
        .find_map(|item| item.text().strip_prefix("PATH="))
        .unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    path.split(':').take(64).map(|place| format!("{place}/{name}")).collect()
}

fn content_of(image: &Image, id: Id) -> Vec<u8> {
    image.contents.get(&id).map(|content| content.text.clone()).unwrap_or_default()
}

/// A path without the components that say nothing.
fn tidy(path: &[u8]) -> Vec<u8> {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
    parts.flat_map(|part| [&b"/"[..], part].concat()).collect()
}

/// Words of a text that may be paths: those with a slash or the ending of a script, below `base` if they are relative.
fn paths_in<'a>(text: &'a [u8], base: &'a [u8]) -> impl Iterator<Item = Vec<u8>> + 'a {
    text.split(|byte| !byte.is_ascii_graphic() || b"\"'`;&|(){}<>=$".contains(byte))
        .filter(|word| word.len() > 1 && !word.starts_with(b"-") && !word.starts_with(b"#!"))
        .filter(|word| {
            word.contains(&b'/')
                || [&b".sh"[..], b".bash", b".py", b".pl", b".rb", b".js"].iter().any(|e| word.ends_with(e))
        })
        .map(move |word| if word.starts_with(b"/") { word.to_vec() } else { [base, b"/", word].concat() })
        .take(200)
}

/// The script that is started, and those whose names are words of it or of the command.
fn scripts(image: &Image, inner: &Value, start: &mut Start) {
    let home = inner.get("WorkingDir").text().as_bytes().to_vec();
    let mut waiting: Vec<Vec<u8>> = Vec::new();
    for word in start.command.iter().skip(1).rev() {
        waiting.extend(paths_in(word.as_bytes(), &home));
    }
    waiting.push(start.path.clone());
    let mut seen: Vec<Id> = Vec::new();
    while let Some(path) = waiting.pop() {
        let Some(id) = image.tree.find(&path, true) else { continue };
        let node = image.tree.node(id);
        if node.kind == Kind::Directory && path.ends_with(b".d/") | path.ends_with(b".d") {
            let mut names: Vec<_> = node.children.keys().collect();
            names.sort();
            waiting.extend(names.iter().rev().take(MAX_SCRIPTS).map(|name| [&path, &b"/"[..], name].concat()));
            continue;
        }
        let text = content_of(image, id);
        if seen.contains(&id) || !text.starts_with(b"#!") || start.scripts.len() >= MAX_SCRIPTS {
            continue;
        }
        seen.push(id);
        let masked = secrets::masked(&shown(&text, 4096), true);
        start.scripts.push((shown(&tidy(&path), SHOWN), masked));
        let beside = path[..path.iter().rposition(|byte| *byte == b'/').unwrap_or(0)].to_vec();
        waiting.extend(paths_in(&text, &home));
        waiting.extend(paths_in(&text, &beside));
    }
}

// ---- writing ----

fn system(image: &Image) -> String {
    let id = image.tree.find(b"/etc/os-release", true).or_else(|| image.tree.find(b"/usr/lib/os-release", true));
    let text = id.map(|id| content_of(image, id)).unwrap_or_default();
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

/// Write one image's part of the report.
pub fn write(out: &mut Writer, image: &mut Image) {
    let start = configuration(image);
    let sums = judge(image);
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
    for text in image.masks.iter().take(MAX_MASKS) {
        out.text(&text.chars().take(MAX_MASK).collect::<String>());
    }
    out.close(']');
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
    for finding in &image.findings {
        if out.len() > MAX_REPORT / 2 {
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
        if out.len() > MAX_REPORT {
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
