//! Reads a container image in a virtual machine without network, and prints a report as JSON.
//!
//! The image comes on a read-only disk whose serial is `image`: a header, a plan (JSON), then the layers as they are
//! stored. A stored image comes as erofs on a disk of its own. Whatever is wrong with an image ends in a finding.
//! `src/kata/images/handover.py` of the host writes the plan.

mod clamav;
mod configuration;
mod elf;
mod extract;
mod findings;
mod image;
mod inflate;
mod json;
mod mounted;
mod packages;
mod report;
mod rpm;
mod secrets;
mod sha256;
mod stream;
mod tar;
mod trace;
mod tree;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use image::{Image, LayerFacts, Limits};
use json::{Value, Writer};

const MAGIC: &[u8; 8] = b"KATAINSP";
const MAX_PLAN: u64 = 32 << 20;

/// The device node of the disk with this serial.
pub fn disk(serial: &str) -> io::Result<String> {
    for entry in fs::read_dir("/sys/block")?.flatten() {
        let base = entry.path();
        let found = fs::read_to_string(base.join("serial")).unwrap_or_default();
        if found.trim() != serial {
            continue;
        }
        let numbers = fs::read_to_string(base.join("dev"))?;
        let (major, minor) =
            numbers.trim().split_once(':').ok_or_else(|| io::Error::other("a device without numbers"))?;
        let path = format!("/dev/kata-{serial}");
        let name = std::ffi::CString::new(path.clone()).map_err(io::Error::other)?;
        let device = libc::makedev(major.parse().unwrap_or(0), minor.parse().unwrap_or(0));
        // SAFETY: a string that ends in a zero and outlives the call.
        if unsafe { libc::mknod(name.as_ptr(), libc::S_IFBLK | 0o400, device) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(error);
            }
        }
        return Ok(path);
    }
    Err(io::Error::other(format!("the machine has no disk {serial}")))
}

pub struct Plan {
    pub content: Value,
    pub disk: Arc<File>,
}

/// Read the plan from the beginning of the image's disk (or of a file).
fn plan(path: &str) -> io::Result<Plan> {
    let disk = File::open(path)?;
    let mut head = [0; 16];
    disk.read_exact_at(&mut head, 0)?;
    let size = u64::from_le_bytes(head[8..].try_into().unwrap_or_default());
    if &head[..8] != MAGIC || size > MAX_PLAN {
        return Err(io::Error::other("the disk has no plan"));
    }
    let mut text = vec![0; size as usize];
    disk.read_exact_at(&mut text, 16)?;
    let content = json::parse(&text).ok_or_else(|| io::Error::other("the plan is no JSON"))?;
    Ok(Plan { content, disk: Arc::new(disk) })
}

/// A thread that compares stored layers with their digests; it returns those that differ, by number.
fn verify(disk: &Arc<File>, layers: &[Value], end: Instant) -> std::thread::JoinHandle<Vec<(usize, String)>> {
    let wanted: Vec<(u64, u64, String)> = layers
        .iter()
        .map(|one| {
            (one.get("offset").number() as u64, one.get("size").number() as u64, one.get("digest").text().into())
        })
        .collect();
    let disk = disk.clone();
    std::thread::spawn(move || {
        let mut found = Vec::new();
        let mut piece = vec![0; 1 << 18];
        for (number, (offset, size, digest)) in wanted.into_iter().enumerate() {
            let Some(digits) = digest.strip_prefix("sha256:").filter(|_| size > 0) else { continue };
            let mut hash = sha256::Sha256::default();
            let mut part = stream::Part::new(disk.clone(), offset, size);
            while let Ok(done @ 1..) = part.read(&mut piece) {
                hash.update(&piece[..done]);
                if Instant::now() > end {
                    return found;
                }
            }
            let is = hash.finish();
            if is != digits {
                found.push((number, is));
            }
        }
        found
    })
}

fn read_image(plan: &Plan, described: &Value, limits: &mut Limits, hashes: Option<u64>) -> Image {
    let config = json::parse(described.get("config").text().as_bytes()).unwrap_or(Value::Null);
    let is_odd = config == Value::Null && !described.get("config").text().is_empty();
    let mut image = Image::new(config, hashes);
    if is_odd {
        image.note("configuration", b"", 0, "the configuration is no JSON that can be read");
    }
    let serial = described.get("erofs").text();
    if !serial.is_empty() {
        let place = format!("/run/kata-{serial}");
        match disk(serial).and_then(|device| mounted::mount(&device, &place)) {
            Ok(()) => mounted::read(&mut image, &place, limits),
            Err(error) => image.note("bad-layer", b"", 1, format!("the file system cannot be mounted: {error}")),
        }
        return image;
    }
    let layers = described.get("layers").list();
    image.listed = layers.len();
    let verified = verify(&plan.disk, layers, limits.end);
    for (number, layer) in layers.iter().enumerate() {
        let (offset, size) = (layer.get("offset").number() as u64, layer.get("size").number() as u64);
        let problem = layer.get("problem").text();
        if !problem.is_empty() {
            image.layers.push(LayerFacts { digest: shown_digest(layer), ..LayerFacts::default() });
            image.note("bad-layer", b"", number as u32 + 1, problem);
            continue;
        }
        let part = stream::Part::new(plan.disk.clone(), offset, size);
        let counter = part.counter();
        let mut head = [0; 8];
        let _ = plan.disk.read_at(&mut head[..size.min(8) as usize], offset);
        let kind = stream::kind_of(&head);
        let facts =
            LayerFacts { digest: shown_digest(layer), kind: kind.into(), stored: size, ..LayerFacts::default() };
        match stream::unpacked(Box::new(part), kind) {
            Ok(pieces) => {
                let archive = tar::Archive::new(pieces);
                if !image.apply(archive, facts, limits, &|| counter.load(Ordering::Relaxed)) {
                    break;
                }
            }
            Err(error) => {
                image.layers.push(facts);
                image.note("bad-layer", b"", number as u32 + 1, error.to_string());
            }
        }
    }
    for (number, is) in verified.join().unwrap_or_default() {
        image.note("digest", b"", number as u32 + 1, format!("the layer's bytes have the digest sha256:{is}"));
    }
    image
}

fn shown_digest(layer: &Value) -> String {
    layer.get("digest").text().chars().take(200).collect()
}

fn key() -> u64 {
    let mut bytes = [0; 8];
    let _ = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    u64::from_le_bytes(bytes) | 1
}

fn report(path: &str) -> io::Result<()> {
    let plan = plan(path)?;
    let described = plan.content.get("images").list();
    let bounds = plan.content.get("limits");
    let hashes = (described.len() > 1).then(key);
    let began = Instant::now();
    let mut out = Writer::default();
    let mut images: Vec<Image> = Vec::new();
    let share = Duration::from_secs(bounds.get("seconds").number().max(1) as u64 / described.len().max(1) as u64);
    out.open('{');
    out.key("format");
    out.number(1);
    out.key("images");
    out.open('[');
    let mut scanned = None;
    let scan_seconds = plan.content.get("clamav_seconds").number();
    for one in described {
        let mut limits = Limits {
            bytes: bounds.get("bytes").number() as u64,
            entries: bounds.get("entries").number() as u64,
            end: Instant::now() + share,
        };
        // A fault of ours in reading one image must not take the others' report away.
        let read = catch_unwind(AssertUnwindSafe(|| read_image(&plan, one, &mut limits, hashes)));
        let mut image = read.unwrap_or_else(|_| {
            let mut image = Image::new(Value::Null, hashes);
            image.note("bad-layer", b"", 0, "the inspector failed while it read the image: please report this");
            image
        });
        if images.is_empty() && scan_seconds > 0 {
            scanned = Some(scan(&plan, &mut image, scan_seconds as u64));
        }
        report::write(&mut out, &mut image, report::MAX_IMAGES / described.len().max(1));
        images.push(image);
    }
    out.close(']');
    if let [new, old] = images.as_slice() {
        out.key("difference");
        report::write_difference(&mut out, old, new);
    }
    if let Some(outcome) = &scanned {
        out.key("clamav");
        clamav::write(&mut out, outcome);
    }
    let seconds = plan.content.get("run_seconds").number();
    if seconds > 0 {
        let trace = trace_of(&plan, seconds as u64)?;
        if !trace.is_empty() {
            out.key("trace");
            out.raw(&trace);
        }
    }
    out.key("milliseconds");
    out.number(began.elapsed().as_millis() as i64);
    out.close('}');
    let mut stdout = io::stdout().lock();
    stdout.write_all(out.finish().as_bytes())?;
    stdout.write_all(b"\n")
}

/// Have ClamAV look at the files of the first image, and note in `image` what it finds.
fn scan(plan: &Plan, image: &mut Image, seconds: u64) -> clamav::Outcome {
    let began = Instant::now();
    let mut outcome = clamav::Outcome::default();
    if let Err(error) = scan_files(plan, image, began + Duration::from_secs(seconds), &mut outcome) {
        outcome.problem = error.to_string();
    }
    outcome.seconds = began.elapsed().as_secs();
    outcome
}

fn scan_files(plan: &Plan, image: &mut Image, end: Instant, outcome: &mut clamav::Outcome) -> io::Result<()> {
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV;
    mounted_at(&disk("clamav")?, "/clamav", "erofs", flags, "")?;
    mounted_at(&disk("signatures")?, "/signatures", "erofs", flags | libc::MS_NOEXEC, "")?;
    let described = &plan.content.get("images").list()[0];
    let mut files = clamav::Files::new(plan.content.get("limits").get("bytes").number() as u64, end)?;
    let serial = described.get("erofs").text();
    if !serial.is_empty() {
        files.add_mounted(image, &format!("/run/kata-{serial}"))?;
    }
    // The layers that were read; what is wrong with others has been said.
    for (number, layer) in described.get("layers").list().iter().enumerate().take(image.layers.len()) {
        if !layer.get("problem").text().is_empty() {
            continue;
        }
        let outcome = archive_of(plan, layer).and_then(|mut archive| files.add_layer(&mut archive, number as u32 + 1));
        if let Err(error) = outcome {
            image.note("limit", b"", number as u32 + 1, format!("ClamAV was given a part of the layer: {error}"));
        }
    }
    files.scan(image, outcome)
}

/// The archive of a layer, as the plan describes it.
fn archive_of(plan: &Plan, layer: &Value) -> io::Result<tar::Archive> {
    let (offset, size) = (layer.get("offset").number() as u64, layer.get("size").number() as u64);
    let mut head = [0; 8];
    let _ = plan.disk.read_at(&mut head[..size.min(8) as usize], offset);
    let part = stream::Part::new(plan.disk.clone(), offset, size);
    Ok(tar::Archive::new(stream::unpacked(Box::new(part), stream::kind_of(&head))?))
}

const ROOT: &str = "/mnt/root";

fn mounted_at(source: &str, place: &str, kind: &str, flags: libc::c_ulong, options: &str) -> io::Result<()> {
    fs::create_dir_all(place)?;
    let text = |value: &str| std::ffi::CString::new(value).map_err(io::Error::other);
    let (source, place, kind, options) = (text(source)?, text(place)?, text(kind)?, text(options)?);
    // SAFETY: four strings that end in zeros and outlive the call.
    let outcome =
        unsafe { libc::mount(source.as_ptr(), place.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Unpack the first image below `ROOT`, and enter that: there is no way back for this process.
fn unpack(plan: &Plan) -> io::Result<()> {
    let described = &plan.content.get("images").list()[0];
    let serial = described.get("erofs").text();
    if !serial.is_empty() {
        let place = format!("/run/kata-{serial}");
        let _ = mounted::mount(&disk(serial)?, &place);
        mounted_at("none", "/mnt", "tmpfs", 0, "size=50%")?;
        for name in ["/mnt/upper", "/mnt/work"] {
            fs::create_dir_all(name)?;
        }
        let options = format!("lowerdir={place},upperdir=/mnt/upper,workdir=/mnt/work");
        mounted_at("none", ROOT, "overlay", 0, &options)?;
        return extract::enter(ROOT);
    }
    fs::create_dir_all(ROOT)?;
    extract::enter(ROOT)?;
    let mut most = plan.content.get("limits").get("bytes").number() as u64;
    for layer in described.get("layers").list() {
        let mut archive = archive_of(plan, layer)?;
        let outcome = extract::layer(&mut archive, &mut most);
        match outcome {
            Ok(0) => {}
            Ok(failed) => eprintln!("inspector: {failed} members of a layer could not be made"),
            Err(error) => eprintln!("inspector: a layer was not unpacked to its end: {error}"),
        }
    }
    Ok(())
}

/// Unpack in a process of its own, since that has another root directory afterwards.
fn unpacked_by_child(plan: &Plan, then: impl FnOnce()) -> io::Result<()> {
    // SAFETY: the threads that read have ended, so no lock is held that the child would wait for.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        let outcome = unpack(plan);
        if let Err(error) = &outcome {
            eprintln!("inspector: the image cannot be unpacked: {error}");
        } else {
            then();
        }
        std::process::exit(i32::from(outcome.is_err()));
    }
    let mut status = 0;
    // SAFETY: a place for the status of our own child.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    Ok(())
}

/// Start the image's command once, and write what it did as the last member of the report.
fn trace_of(plan: &Plan, seconds: u64) -> io::Result<String> {
    let path = "/tmp/trace.json";
    let target = File::create(path)?;
    unpacked_by_child(plan, || {
        let described = &plan.content.get("images").list()[0];
        let config = json::parse(described.get("config").text().as_bytes()).unwrap_or(Value::Null);
        let _ = mounted_at("proc", "/proc", "proc", 0, "");
        let _ = mounted_at("none", "/dev", "tmpfs", libc::MS_NOSUID, "size=64k");
        for (name, minor) in
            [(c"/dev/null", 3), (c"/dev/zero", 5), (c"/dev/full", 7), (c"/dev/random", 8), (c"/dev/urandom", 9)]
        {
            // SAFETY: a string that ends in a zero.
            unsafe { libc::mknod(name.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, minor)) };
            // SAFETY: likewise; the creation mask does not count.
            unsafe { libc::chmod(name.as_ptr(), 0o666) };
        }
        let mut out = Writer::default();
        trace::run(&mut out, &config, seconds);
        let mut target = &target;
        let _ = target.write_all(out.finish().as_bytes());
    })?;
    fs::read_to_string(path)
}

/// A shell beside the unpacked image, which is at /image and cannot be written or executed.
fn shell() -> io::Result<()> {
    use std::os::unix::process::CommandExt;
    let plan = plan(&disk("image")?)?;
    let serial = plan.content.get("images").list()[0].get("erofs").text().to_string();
    let from = if serial.is_empty() {
        unpacked_by_child(&plan, || {})?;
        ROOT.to_string()
    } else {
        let place = format!("/run/kata-{serial}");
        mounted::mount(&disk(&serial)?, &place)?;
        place
    };
    mounted_at(&from, "/image", "none", libc::MS_BIND, "")?;
    let flags = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    mounted_at(&from, "/image", "none", flags, "")?;
    println!("The image is at /image: read-only, nosuid, nodev, noexec. This machine has no network.");
    let error = std::process::Command::new("/busybox")
        .arg("sh")
        .current_dir("/image")
        .env("PATH", "/bin")
        .env("PS1", "image$ ")
        .exec();
    Err(error)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let outcome = match arguments.get(1).map(String::as_str) {
        Some("shell") => shell(),
        Some("report") => match arguments.get(2) {
            Some(path) => report(path),
            None => disk("image").and_then(|path| report(&path)),
        },
        _ => {
            eprintln!("usage: inspector report [FILE] | shell");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("inspector: {error}");
            ExitCode::FAILURE
        }
    }
}
