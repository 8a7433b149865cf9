//! The guest as a machine: its clock, entropy, modules, processors and memory.

use crate::fs;
use crate::prelude::*;
use crate::sys::{self, Errno, RawFd};
use crate::syscall;
use crate::uevent::{await_device, hotplug_timeout_ms};

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";
/// The most random bytes taken from one request.
const MAX_SEED: usize = 1 << 16;

/// Tries until there is an answer or the time is over. It polls: changes are visible in sysfs before their uevents are
/// sent, and one look costs microseconds.
pub fn wait_for<T>(timeout_ms: u64, mut look: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let deadline = sys::monotonic_ns().saturating_add(timeout_ms.saturating_mul(1_000_000));
    let mut pause = 1;
    loop {
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        if sys::monotonic_ns() >= deadline {
            return Ok(None);
        }
        sys::sleep_ms(pause);
        pause = (pause * 2).min(20);
    }
}

/// Sets the clock (SetGuestDateTime).
pub fn set_date_time(seconds: i64, microseconds: i64) -> Result<()> {
    if !(0..1_000_000).contains(&microseconds) || seconds < 0 {
        return Err(Error::invalid(format!("no point in time: {seconds} s and {microseconds} us")));
    }
    let time = [seconds, microseconds];
    // SAFETY: struct timeval is two i64; no time zone.
    unsafe { syscall!(libc::SYS_settimeofday, time.as_ptr(), 0) }.map(drop).context("set the clock")
}

/// Mixes `data` into the kernel's pool, credits it, and makes the generator start anew from it (ReseedRandomDev): a
/// clone of a template must not repeat its siblings' randomness.
pub fn reseed(data: &[u8]) -> Result<()> {
    if data.is_empty() || data.len() > MAX_SEED {
        return Err(Error::invalid(format!("{} random bytes: send between 1 and {MAX_SEED}", data.len())));
    }
    let pool = sys::open("/dev/urandom", libc::O_WRONLY, 0).context("open /dev/urandom")?;
    sys::write_all(pool.raw(), data).context("write to /dev/urandom")?;
    let bits = data.len() as i32 * 8;
    random_ioctl(pool.raw(), RND_ADD_TO_ENT_CNT, &raw const bits as usize).context("credit the entropy")?;
    random_ioctl(pool.raw(), RND_RESEED_CRNG, 0).context("reseed the random number generator")
}

/// _IOW('R', 1, int) and _IO('R', 7) of linux/random.h.
const RND_ADD_TO_ENT_CNT: u64 = 0x4004_5201;
const RND_RESEED_CRNG: u64 = 0x5207;

fn random_ioctl(fd: RawFd, request: u64, argument: usize) -> sys::SysResult<()> {
    sys::ioctl(fd, request, argument).map(drop)
}

/// Bytes of one block of hot-pluggable memory; 0 where the kernel cannot plug memory.
pub fn memory_block_size() -> Result<u64> {
    let path = format!("{MEMORY}/block_size_bytes");
    match fs::read_to_string(&path) {
        Ok(text) => u64::from_str_radix(text.trim(), 16)
            .map_err(|_| Error::internal(format!("{path} holds {text:?}, not a hexadecimal number"))),
        Err(Errno(libc::ENOENT)) => Ok(0),
        Err(e) => Err(e).with_context(|| format!("read {path}")),
    }
}

/// Whether memory can be announced by address (MemHotplugByProbe).
pub fn supports_memory_probe() -> bool {
    fs::exists(format!("{MEMORY}/probe"))
}

/// Announces memory at physical addresses (arm64 hosts need it).
pub fn probe_memory(addresses: &[u64]) -> Result<()> {
    if !supports_memory_probe() {
        return Err(Error::unimplemented("this guest kernel finds hot-plugged memory by itself (no memory/probe)"));
    }
    addresses.iter().try_for_each(|address| {
        fs::write_existing(format!("{MEMORY}/probe"), &format!("{address:#x}"))
            .with_context(|| format!("announce the memory at {address:#x}"))
    })
}

/// Brings plugged processors and memory into use (OnlineCPUMem); how many processors it has turned on. With `wait`
/// it keeps looking until `processors` have been turned on or the hot-plug timeout is over.
pub fn online_cpu_mem(wait: bool, processors: u32, cpu_only: bool) -> Result<u32> {
    let mut online = 0;
    let enough = await_device("cpu", || {
        online += turn_on(CPUS, "cpu")?;
        Ok((!wait || online >= processors).then_some(()))
    })?;
    if enough.is_none() {
        let timeout = hotplug_timeout_ms();
        return Err(Error::deadline(format!("only {online} of {processors} new processors appeared in {timeout} ms")));
    }
    if !cpu_only && fs::is_dir(MEMORY) {
        turn_on(MEMORY, "memory")?;
    }
    Ok(online)
}

/// Has `count` processors in use, of those that the machine was started with: the first of them by number. A machine
/// may be started with more than the guest is to use at first (`maxcpus=` of the kernel command line).
pub fn set_processors(count: u32) -> Result<()> {
    set_processors_in(CPUS, count)
}

fn set_processors_in(directory: &str, count: u32) -> Result<()> {
    let mut present: Vec<u32> = vec![];
    for name in fs::names(directory).with_context(|| format!("list {directory}"))? {
        let Some(number) = name.strip_prefix("cpu").and_then(|digits| digits.parse().ok()) else { continue };
        present.push(number);
    }
    present.sort_unstable();
    if count == 0 || count as usize > present.len() {
        return Err(Error::invalid(format!("{count} processors: this machine has {}", present.len())));
    }
    for (position, number) in present.iter().enumerate() {
        let path = format!("{directory}/cpu{number}/online");
        let wanted = if position < count as usize { "1" } else { "0" };
        // The first processor has no such file, and is always on.
        if fs::read_to_string(&path).is_ok_and(|state| state.trim() != wanted) {
            fs::write_existing(&path, wanted).with_context(|| format!("turn processor {number} on or off"))?;
        }
    }
    Ok(())
}

/// Writes 1 to every `<directory>/<prefix>N/online` that holds 0; how many there were.
fn turn_on(directory: &str, prefix: &str) -> Result<u32> {
    let mut count = 0;
    for name in fs::names(directory).with_context(|| format!("list {directory}"))? {
        let number = name.strip_prefix(prefix).unwrap_or_default();
        if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let path = format!("{directory}/{name}/online");
        // The first processor has no such file.
        if fs::read_to_string(&path).is_ok_and(|state| state.trim() == "0") {
            fs::write_existing(&path, "1").with_context(|| format!("turn on {name}"))?;
            count += 1;
        }
    }
    Ok(count)
}

/// Loads a kernel module and those that it depends on. It is no error if it is loaded or built in already; then
/// `parameters` are not applied.
pub fn load_module(name: &str, parameters: &[String]) -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("ask for the kernel's release")?;
    load_module_from(&format!("/lib/modules/{}", release.trim()), name, &parameters.join(" "))
}

fn load_module_from(directory: &str, name: &str, parameters: &str) -> Result<()> {
    if name.is_empty() || name.contains(['/', '\0']) {
        return Err(Error::invalid(format!("{name:?} cannot be the name of a kernel module")));
    }
    let builtin = fs::read_to_string(format!("{directory}/modules.builtin")).unwrap_or_default();
    if fs::is_dir(format!("/sys/module/{}", name.replace('-', "_")))
        || builtin.lines().any(|path| module_name(path) == name.replace('-', "_"))
    {
        return Ok(());
    }
    let text = fs::read_to_string(format!("{directory}/modules.dep")).map_err(|e| {
        Error::not_found(format!("kernel module {name}: {directory}/modules.dep: {e} (the guest kernel may have none)"))
    })?;
    let Some((path, needed)) = dependencies(&text, name) else {
        return Err(Error::not_found(format!("kernel module {name} is neither in {directory} nor in the kernel")));
    };
    // modules.dep lists the complete set, in the reverse order of loading.
    for dependency in needed.iter().rev() {
        insert(&format!("{directory}/{dependency}"), "")?;
    }
    insert(&format!("{directory}/{path}"), parameters)
}

/// `kernel/drivers/net/virtio_net.ko.xz` is called `virtio_net`; kernel names have no dashes.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split(".ko").next().unwrap_or_default().replace('-', "_")
}

/// The line of `modules.dep` for a module: its path and those of the modules that it needs.
fn dependencies<'a>(text: &'a str, name: &str) -> Option<(&'a str, Vec<&'a str>)> {
    let name = name.replace('-', "_");
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(path, _)| module_name(path) == name)
        .map(|(path, needed)| (path, needed.split_whitespace().collect()))
}

fn insert(path: &str, parameters: &str) -> Result<()> {
    const COMPRESSED_FILE: i32 = 4;
    let file = sys::open(path, libc::O_RDONLY, 0).with_context(|| format!("open the kernel module {path}"))?;
    let parameters = sys::cstr(parameters)?;
    let flags = if path.ends_with(".ko") { 0 } else { COMPRESSED_FILE };
    // SAFETY: NUL-terminated string; the descriptor is open.
    match unsafe { syscall!(libc::SYS_finit_module, file.raw(), parameters.as_ptr(), flags) } {
        Ok(_) | Err(Errno(libc::EEXIST)) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("load the kernel module {path}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    #[test]
    fn modules_are_found_with_what_they_need() {
        let text = "kernel/a/virtio-net.ko.xz: kernel/b/net_failover.ko.xz kernel/b/failover.ko.xz\nkernel/b/failover.ko.xz:\n";
        let found = dependencies(text, "virtio_net").unwrap();
        assert_eq!(
            found,
            ("kernel/a/virtio-net.ko.xz", vec!["kernel/b/net_failover.ko.xz", "kernel/b/failover.ko.xz"])
        );
        assert_eq!(dependencies(text, "failover").unwrap().1, Vec::<&str>::new());
        assert!(dependencies(text, "virtio").is_none());
        let dir = TempDir::new("modules");
        dir.file("modules.builtin", "kernel/fs/no-such-thing.ko\n");
        assert_eq!(load_module_from(&dir.0, "no_such_thing", ""), Ok(()));
        assert!(load_module_from(&dir.0, "none", "").unwrap_err().message.contains("modules.dep"));
        dir.file("modules.dep", text);
        assert!(load_module_from(&dir.0, "none", "").unwrap_err().message.contains("neither"));
        assert!(load_module_from(&dir.0, "../x", "").is_err());
    }

    #[test]
    fn only_what_is_off_is_turned_on() {
        let dir = TempDir::new("online");
        for (path, state) in
            [("cpu0/present", "1"), ("cpu1/online", "0\n"), ("cpu2/online", "1\n"), ("cpuidle/online", "0")]
        {
            dir.file(path, state);
        }
        assert_eq!(turn_on(&dir.0, "cpu"), Ok(1));
        let state = |name: &str| fs::read_to_string(format!("{}/{name}/online", dir.0)).unwrap();
        // A file in /sys would hold just what was written; in this one the old newline remains behind it.
        assert_eq!((state("cpu1").as_str(), state("cpuidle").as_str()), ("1\n", "0"));
    }

    #[test]
    fn processors_are_turned_on_and_off_from_the_end() {
        let dir = TempDir::new("processors");
        for (path, state) in [("cpu0/present", "1"), ("cpu1/online", "1"), ("cpu2/online", "0"), ("cpu10/online", "0")]
        {
            dir.file(path, state);
        }
        dir.file("cpuidle/online", "0");
        let states =
            || [1, 2, 10].map(|n| fs::read_to_string(format!("{}/cpu{n}/online", dir.0)).unwrap().trim().to_string());
        assert_eq!(set_processors_in(&dir.0, 3), Ok(()));
        assert_eq!(states(), ["1", "1", "0"]);
        assert_eq!(set_processors_in(&dir.0, 1), Ok(()));
        assert_eq!(states(), ["0", "0", "0"]);
        assert_eq!(set_processors_in(&dir.0, 4), Ok(()));
        assert_eq!(states(), ["1", "1", "1"]);
        let refused = set_processors_in(&dir.0, 5).unwrap_err();
        assert!(refused.message.contains("5 processors: this machine has 4"));
        assert!(set_processors_in(&dir.0, 0).is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(set_date_time(0, 1_000_000).is_err() && set_date_time(-1, 0).is_err());
        assert!(reseed(&[]).is_err());
    }

    #[test]
    fn waiting_ends() {
        let mut looks = 0;
        let found = wait_for(10_000, || {
            looks += 1;
            Ok((looks == 3).then_some("found"))
        });
        assert_eq!((found, looks), (Ok(Some("found")), 3));
        assert_eq!(wait_for(0, || Ok(None::<()>)), Ok(None));
    }
}
