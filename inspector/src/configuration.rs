//! The configuration of an image beside what is really there: its history, user, secrets and command.

use crate::image::{Image, SHOWN};
use crate::json::{shown, Value};
use crate::secrets;
use crate::tree::{Id, Kind};

const MAX_SCRIPTS: usize = 12;

const MACHINES: &[(&str, u16)] =
    &[("amd64", 62), ("386", 3), ("arm64", 183), ("arm", 40), ("riscv64", 243), ("ppc64le", 21), ("s390x", 22)];

/// What a container of the image starts.
pub struct Start {
    pub command: Vec<String>,
    pub path: Vec<u8>,
    pub kind: String,
    pub scripts: Vec<(String, String)>,
}

/// The words of the command that a container starts.
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
    // The longest first: what another one begins with would leave the rest of it to be seen.
    image.masks.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    image.masks.dedup();
}

/// Compare the configuration with what is there. Returns what it starts.
pub fn check(image: &mut Image) -> Start {
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

pub fn content_of(image: &Image, id: Id) -> Vec<u8> {
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
