//! ClamAV's scanner over every file of every layer, be it hidden by a later one.
//!
//! Its program and its signatures come on disks of their own. The files are laid out as numbers, so no name of the image
//! is in what the scanner prints, and two members of the same name are two files.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::extract;
use crate::image::Image;
use crate::json::{shown, Writer};
use crate::tar::Archive;
use crate::tree::{clean, Kind};

/// Of what the scanner prints, a line for each file that it names.
const MAX_OUTPUT: u64 = 64 << 20;
const PLACE: &str = "/mnt/clamav";
/// The largest file that it reads (libclamav takes no more than 2 GiB).
const MOST: &str = "2000M";
const EXCEEDED: &str = "Heuristics.Limits.Exceeded";

/// A file that is scanned: its name in the image, and the layer that has it, from 1.
type Scanned = (Vec<u8>, u32);

/// What the scanner did.
#[derive(Default)]
pub struct Outcome {
    pub files: u64,
    pub signatures: u64,
    pub seconds: u64,
    /// Why not all of it is known; empty otherwise.
    pub problem: String,
}

/// Files that are to be scanned, laid out below `PLACE`.
pub struct Files {
    names: Vec<Scanned>,
    /// Bytes that may still be written.
    left: u64,
    end: Instant,
}

impl Files {
    pub fn new(bytes: u64, end: Instant) -> io::Result<Files> {
        for name in ["files", "tmp"] {
            fs::create_dir_all(format!("{PLACE}/{name}"))?;
        }
        Ok(Files { names: Vec::new(), left: bytes, end })
    }

    fn place(&mut self, name: Vec<u8>, layer: u32) -> String {
        self.names.push((name, layer));
        format!("{PLACE}/files/{}", self.names.len() - 1)
    }

    /// Lay out the regular files of a layer.
    pub fn add_layer(&mut self, archive: &mut Archive, layer: u32) -> io::Result<()> {
        while let Some(member) = archive.next()? {
            if member.kind != b'0' || member.stored == 0 {
                continue;
            }
            if member.stored > self.left || Instant::now() > self.end {
                return Err(io::Error::other("there was more than is read"));
            }
            self.left -= member.stored;
            let mut name = Vec::new();
            for part in clean(&member.name).unwrap_or_default() {
                name.push(b'/');
                name.extend_from_slice(part);
            }
            let place = self.place(if name.is_empty() { member.name.clone() } else { name }, layer);
            extract::content(archive, &member, place.as_ref())?;
        }
        Ok(())
    }

    /// Lay out the regular files of a mounted file system, which is the image's only layer.
    pub fn add_mounted(&mut self, image: &Image, root: &str) -> io::Result<()> {
        use std::os::unix::ffi::OsStrExt;
        let mut found = Vec::new();
        image.tree.visit(|path, _, node| {
            if node.kind == Kind::File && node.size > 0 {
                found.push(path.to_vec());
            }
        });
        for name in found {
            let target = [root.as_bytes(), &name].concat();
            let place = self.place(name, 1);
            symlink(std::ffi::OsStr::from_bytes(&target), place)?;
        }
        Ok(())
    }

    /// Have the files scanned, and note in `image` what was found.
    pub fn scan(self, image: &mut Image, outcome: &mut Outcome) -> io::Result<()> {
        let (output, errors) = (format!("{PLACE}/output"), format!("{PLACE}/errors"));
        let left = self.end.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        let mut scanner = Command::new("/clamav/ld-linux-x86-64.so.2")
            .args(["--library-path", "/clamav", "/clamav/clamscan"])
            .args(["--database=/signatures", "--infected", "--recursive"])
            .args(["--follow-file-symlinks=2", "--follow-dir-symlinks=0", "--alert-exceeds-max=yes"])
            .args([format!("--tempdir={PLACE}/tmp"), format!("--max-scantime={}", left.as_millis())])
            .args([format!("--max-filesize={MOST}"), format!("--max-scansize={MOST}"), format!("{PLACE}/files")])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(File::create(&errors)?)
            .spawn()?;
        let status = loop {
            if let Some(status) = scanner.try_wait()? {
                break Some(status);
            }
            if Instant::now() > self.end {
                scanner.kill()?;
                scanner.wait()?;
                break None;
            }
            sleep(Duration::from_millis(50));
        };
        let trouble = note(image, &self.names, &text_of(&output)?, outcome);
        let complaint = text_of(&errors)?
            .lines()
            .chain(trouble.lines())
            .find(|line| line.contains("ERROR"))
            .map_or_else(|| "it does not say why".into(), |line| shown(line.as_bytes(), 300));
        outcome.problem = match status.map(|status| status.code()) {
            None => "it did not come to its end in time: --timeout gives it more".into(),
            Some(None) => "it was killed, most likely since it needed more memory than --memory gives it".into(),
            Some(Some(0 | 1)) => String::new(),
            Some(Some(code)) => format!("it failed with status {code}: {complaint}"),
        };
        Ok(())
    }
}

fn text_of(path: &str) -> io::Result<String> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_OUTPUT).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Take the findings and figures from what the scanner printed; returns the lines that are neither.
fn note(image: &mut Image, names: &[Scanned], output: &str, outcome: &mut Outcome) -> String {
    let files = format!("{PLACE}/files/");
    let mut others = String::new();
    let mut found = Vec::new();
    for line in output.lines() {
        let figure = |title: &str| line.strip_prefix(title).and_then(|text| text.trim().parse().ok());
        if let Some(number) = figure("Known viruses:") {
            outcome.signatures = number;
        } else if let Some(number) = figure("Scanned files:") {
            outcome.files = number;
        } else if let Some((number, said)) = line.strip_prefix(&files).and_then(|rest| rest.split_once(": ")) {
            let name = number.parse().ok().and_then(|at: usize| Some((at, names.get(at)?)));
            match (name, said.strip_suffix(" FOUND")) {
                (Some((at, (path, layer))), Some(signature)) => found.push((at, path, *layer, signature)),
                _ => others += &format!("{line}\n"),
            }
        }
    }
    found.sort_unstable();
    for (_, path, layer, signature) in found {
        if let Some(what) = signature.strip_prefix(EXCEEDED) {
            image.note("limit", path, layer, format!("ClamAV did not read all of it{}", what.replace('.', ": ")));
            continue;
        }
        let hides = |one: &&crate::tree::Hidden| one.path == *path && image.tree.node(one.id).layer + 1 == layer;
        let hidden =
            image.tree.hidden.iter().find(hides).map_or_else(String::new, |one| {
                format!("; hidden by layer {}, and still in layer {layer}", one.by + 1)
            });
        image.note("malware", path, layer, format!("{}{hidden}", shown(signature.as_bytes(), 200)));
    }
    others
}

/// Write what the scanner did as a member of the report.
pub fn write(out: &mut Writer, outcome: &Outcome) {
    out.open('{');
    for (key, number) in [("files", outcome.files), ("signatures", outcome.signatures), ("seconds", outcome.seconds)] {
        out.key(key);
        out.number(number.min(1 << 62) as i64);
    }
    out.key("problem");
    out.text(&outcome.problem.chars().take(500).collect::<String>());
    out.close('}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::Value;

    #[test]
    fn what_the_scanner_prints() {
        let mut image = Image::new(Value::Null, None);
        let names = vec![(b"/a: b FOUND".to_vec(), 1), (b"/c".to_vec(), 2), (b"/d".to_vec(), 2)];
        let output = "/mnt/clamav/files/1: Heuristics.Limits.Exceeded.MaxFileSize FOUND\n\
             /mnt/clamav/files/0: Planted.UNOFFICIAL FOUND\n\
             /mnt/clamav/files/2: Can't open file ERROR\n/mnt/clamav/files/77: No.Such FOUND\n\n\
             ----------- SCAN SUMMARY -----------\nKnown viruses: 12\nEngine version: 1.4.6\nScanned files: 3\n";
        let mut outcome = Outcome::default();
        let others = note(&mut image, &names, output, &mut outcome);
        let found: Vec<_> = image.findings.iter().map(|one| (one.kind, one.path.as_str(), one.layer)).collect();
        assert_eq!(found, [("malware", "/a: b FOUND", 1), ("limit", "/c", 2)]);
        assert_eq!(image.findings[0].detail, "Planted.UNOFFICIAL");
        assert_eq!(image.findings[1].detail, "ClamAV did not read all of it: MaxFileSize");
        assert_eq!((outcome.signatures, outcome.files), (12, 3));
        assert_eq!(others.lines().count(), 2);
    }
}
