//! What of an image's files deserves a word, and sums of all of them.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::elf::Elf;
use crate::image::{Content, Image};
use crate::json::shown;
use crate::packages;
use crate::secrets;
use crate::tree::{Hidden, Id, Kind, Node};

/// Places where anybody may write a link to, without a word.
const SOCKETS: &[&[u8]] = &[b"docker.sock", b"containerd.sock", b"crio.sock", b"podman.sock"];

type Note = (&'static str, Vec<u8>, u32, String);

#[derive(Default)]
pub struct Sums {
    pub files: i64,
    pub directories: i64,
    pub links: i64,
    pub others: i64,
    pub bytes: i64,
    pub programs: i64,
    pub libraries: i64,
    pub weak: BTreeMap<&'static str, i64>,
    pub folders: HashMap<Vec<u8>, (i64, i64)>,
}

/// Look at the finished tree: what is visible, and what of it deserves a word.
pub fn judge(image: &mut Image) -> Sums {
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
