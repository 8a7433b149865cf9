//! Resource limits of the OCI runtime spec, which speaks cgroup v1, written to cgroup v2 files as runc does it.
//!
//! The messages cannot tell an absent number from 0, so 0 means absent; -1 means no limit. Settings without an
//! equivalent in v2 are refused by name instead of being dropped.

use crate::fs;
use crate::prelude::*;
use crate::proto::oci::{LinuxBlockIO, LinuxCPU, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use crate::sys::Errno;

/// The error for a limit that this kernel cannot keep.
pub fn missing_controller(controller: &str, what: &str) -> Error {
    Error::unimplemented(format!("{what}: the guest kernel has no \"{controller}\" cgroup controller"))
}

/// One write to one file of the group.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    controller: &'static str,
    file: String,
    value: String,
    /// The field of the spec, for error texts.
    field: &'static str,
    /// The file may be missing: then the limit is in force without it.
    optional: bool,
}

/// Reads a file of the group; `None` where it does not exist.
type Reader<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What a change of limits has overwritten, to restore it when a later step fails.
#[derive(Debug, Default)]
pub struct Undo {
    /// Files and what to write into them, in the order in which they were changed.
    written: Vec<(String, String)>,
}

impl Undo {
    /// Restores the former values; errors are ignored.
    pub fn restore(self) {
        for (file, value) in self.written.into_iter().rev() {
            let _ = fs::write_existing(file, &value);
        }
    }
}

/// Writes the limits of `resources` to the group at `path`: all of them, or none on an error. The devices are not its
/// business; network classes and priorities, which v2 lacks, are refused.
pub fn apply(path: &str, resources: &LinuxResources) -> Result<Undo> {
    let read = |file: &str| fs::read_to_string(format!("{path}/{file}")).ok();
    let mut undo = Undo::default();
    for setting in plan(resources, &read)? {
        let before = read(&setting.file).map(|text| undoing(&setting, &text));
        match write(path, &setting) {
            Ok(()) => undo.written.extend(before.map(|value| (format!("{path}/{}", setting.file), value))),
            Err(e) => {
                undo.restore();
                return Err(e);
            }
        }
    }
    Ok(undo)
}

/// `resources` but for the limits and weights of single block devices.
pub fn without_devices(resources: &LinuxResources) -> LinuxResources {
    let block_io = resources.block_io.as_ref().map(|io| {
        let (weight, leaf_weight) = (io.weight, io.leaf_weight);
        Box::new(LinuxBlockIO { weight, leaf_weight, ..Default::default() })
    });
    LinuxResources { block_io, ..resources.clone() }
}

fn write(path: &str, setting: &Setting) -> Result<()> {
    if setting.file == "memory.max" {
        make_room(path, &setting.value)?;
    }
    match fs::write_existing(format!("{path}/{}", setting.file), &setting.value) {
        Ok(()) => Ok(()),
        Err(Errno(libc::ENOENT)) if setting.optional => Ok(()),
        Err(Errno(libc::ENOENT)) if fs::is_dir(path) => Err(missing_controller(
            setting.controller,
            &format!("linux.resources.{} = {}", setting.field, setting.value),
        )),
        Err(e) => Err(Error::internal(format!(
            "linux.resources.{}: write {:?} to {path}/{}: {e}",
            setting.field, setting.value, setting.file
        ))),
    }
}

/// Has the kernel reclaim memory of the group so that a lower limit fits. A limit that still does not fit is refused:
/// cgroup v2 would accept it and kill processes until they fit.
fn make_room(path: &str, limit: &str) -> Result<()> {
    let used = || fs::read_to_string(format!("{path}/memory.current")).ok()?.trim().parse::<u64>().ok();
    let fits = |limit| used().is_none_or(|used| used <= limit);
    let Ok(limit) = limit.parse::<u64>() else { return Ok(()) };
    let high = format!("{path}/memory.high");
    let Some(before) = fs::read_to_string(&high).ok().filter(|_| !fits(limit)) else { return Ok(()) };
    // Writing memory.high reclaims at once what can be reclaimed, and kills nothing.
    let _ = fs::write_existing(&high, &limit.to_string());
    let fits = fits(limit);
    let _ = fs::write_existing(&high, before.trim());
    if fits {
        return Ok(());
    }
    Err(Error::precondition(format!(
        "linux.resources.memory.limit: the container uses {} MiB of memory and cannot be limited to {} MiB",
        used().unwrap_or(0) >> 20,
        limit >> 20
    )))
}

/// The value to write to restore a file's present content (`text`).
fn undoing(setting: &Setting, text: &str) -> String {
    let device = setting.value.split(' ').next().filter(|word| word.contains(':'));
    let Some(device) = device else {
        // In files with one line per device, the first line is the default.
        return text.lines().next().unwrap_or_default().trim().to_string();
    };
    let line = text.lines().find(|line| line.split(' ').next() == Some(device));
    match line {
        Some(line) => line.trim().to_string(),
        None if setting.file == "io.max" => format!("{device} rbps=max wbps=max riops=max wiops=max"),
        None => format!("{device} default"),
    }
}

/// What to write, in order.
fn plan(resources: &LinuxResources, read: Reader) -> Result<Vec<Setting>> {
    let mut plan = Plan { settings: Vec::new(), read };
    if let Some(memory) = &resources.memory {
        plan.memory(memory)?;
    }
    if let Some(cpu) = &resources.cpu {
        plan.cpu(cpu)?;
    }
    if let Some(pids) = &resources.pids {
        match pids.limit {
            0 => {}
            limit => plan.set("pids", "pids.max", limit_text(limit), "pids.limit"),
        }
    }
    if let Some(block_io) = &resources.block_io {
        plan.block_io(block_io)?;
    }
    plan.hugepages(&resources.hugepage_limits)?;
    if let Some(network) = &resources.network {
        if network.class_id != 0 || !network.priorities.is_empty() {
            return Err(unsupported("network"));
        }
    }
    Ok(plan.settings)
}

struct Plan<'a> {
    settings: Vec<Setting>,
    read: Reader<'a>,
}

impl Plan<'_> {
    fn set(&mut self, controller: &'static str, file: &str, value: String, field: &'static str) {
        let file = file.to_string();
        self.settings.push(Setting { controller, file, value, field, optional: false });
    }

    fn has(&self, file: &str) -> bool {
        (self.read)(file).is_some()
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<()> {
        for (value, field) in [(memory.kernel, "memory.kernel"), (memory.kernel_tcp, "memory.kernelTCP")] {
            if value > 0 {
                return Err(unsupported(field));
            }
        }
        if memory.swappiness != 0 {
            return Err(unsupported("memory.swappiness"));
        }
        if memory.disable_oom_killer {
            return Err(unsupported("memory.disableOOMKiller"));
        }
        if let Some(swap) = swap_limit(memory.swap, memory.limit)? {
            self.set("memory", "memory.swap.max", swap, "memory.swap");
            // A kernel without swap has no such file, and nothing is ever swapped out.
            let has_memory = self.has("memory.max");
            if let Some(last) = self.settings.last_mut() {
                last.optional = has_memory;
            }
        }
        if memory.limit != 0 {
            self.set("memory", "memory.max", limit_text(memory.limit), "memory.limit");
        }
        if memory.reservation != 0 {
            self.set("memory", "memory.low", limit_text(memory.reservation), "memory.reservation");
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCPU) -> Result<()> {
        if cpu.realtime_runtime != 0 || cpu.realtime_period != 0 {
            return Err(unsupported("cpu.realtimeRuntime"));
        }
        if cpu.shares != 0 {
            self.set("cpu", "cpu.weight", cpu_weight(cpu.shares).to_string(), "cpu.shares");
        }
        if cpu.quota != 0 || cpu.period != 0 {
            // A period alone keeps the quota that is there.
            let current = (self.read)("cpu.max").unwrap_or_default();
            let quota = match cpu.quota {
                0 => current.split_whitespace().next().unwrap_or("max").to_string(),
                quota => limit_text(quota),
            };
            let period = if cpu.period == 0 { 100_000 } else { cpu.period };
            let field = if cpu.quota == 0 { "cpu.period" } else { "cpu.quota" };
            self.set("cpu", "cpu.max", format!("{quota} {period}"), field);
        }
        if !cpu.cpus.is_empty() {
            self.set("cpuset", "cpuset.cpus", cpu.cpus.clone(), "cpu.cpus");
        }
        if !cpu.mems.is_empty() {
            self.set("cpuset", "cpuset.mems", cpu.mems.clone(), "cpu.mems");
        }
        Ok(())
    }

    fn block_io(&mut self, io: &LinuxBlockIO) -> Result<()> {
        if io.leaf_weight != 0 || io.weight_device.iter().any(|device| device.leaf_weight != 0) {
            return Err(unsupported("blockIO.leafWeight"));
        }
        // The BFQ scheduler has the spec's scale, 10 to 1000; the cost model's is 1 to 10000.
        let bfq = self.has("io.bfq.weight");
        let (file, scale): (_, fn(u32) -> u32) =
            if bfq { ("io.bfq.weight", |weight| weight) } else { ("io.weight", io_weight) };
        let weight = |weight: u32, field: &str| match weight {
            10..=1000 => Ok(scale(weight)),
            _ => Err(Error::invalid(format!("linux.resources.{field}: weight {weight} is not in 10..=1000"))),
        };
        if io.weight != 0 {
            self.set("io", file, weight(io.weight, "blockIO.weight")?.to_string(), "blockIO.weight");
        }
        for device in &io.weight_device {
            let value = weight(device.weight, "blockIO.weightDevice")?;
            self.set("io", file, format!("{}:{} {value}", device.major, device.minor), "blockIO.weightDevice");
        }
        for (devices, key, field) in [
            (&io.throttle_read_bps_device, "rbps", "blockIO.throttleReadBpsDevice"),
            (&io.throttle_write_bps_device, "wbps", "blockIO.throttleWriteBpsDevice"),
            (&io.throttle_read_iops_device, "riops", "blockIO.throttleReadIOPSDevice"),
            (&io.throttle_write_iops_device, "wiops", "blockIO.throttleWriteIOPSDevice"),
        ] {
            for device in devices {
                let rate = if device.rate == 0 { "max".to_string() } else { device.rate.to_string() };
                self.set("io", "io.max", format!("{}:{} {key}={rate}", device.major, device.minor), field);
            }
        }
        Ok(())
    }

    fn hugepages(&mut self, limits: &[LinuxHugepageLimit]) -> Result<()> {
        for limit in limits {
            if limit.pagesize.is_empty() || limit.pagesize.contains(['/', '.']) {
                return Err(Error::invalid(format!("linux.resources.hugepageLimits: page size {:?}", limit.pagesize)));
            }
            // A limit of 0 holds by itself: without the controller (or that page size) no huge page can be used.
            let optional = limit.limit == 0;
            for (suffix, optional) in [("max", optional), ("rsvd.max", true)] {
                let file = format!("hugetlb.{}.{suffix}", limit.pagesize);
                self.set("hugetlb", &file, limit.limit.to_string(), "hugepageLimits");
                if let Some(last) = self.settings.last_mut() {
                    last.optional = optional;
                }
            }
        }
        Ok(())
    }
}

fn unsupported(field: &str) -> Error {
    Error::unimplemented(format!("linux.resources.{field}: cgroup v2, which the guest uses, has no such limit"))
}

fn limit_text(value: i64) -> String {
    if value < 0 {
        "max".to_string()
    } else {
        value.to_string()
    }
}

/// The spec limits memory and swap together, v2 limits swap alone.
fn swap_limit(swap: i64, memory: i64) -> Result<Option<String>> {
    let invalid = |why: &str| Err(Error::invalid(format!("linux.resources.memory.swap = {swap}: {why}")));
    match (swap, memory) {
        (0, ..0) | (..0, _) => Ok(Some("max".to_string())),
        (0, _) => Ok(None),
        (_, ..=0) => invalid("the sum of memory and swap can only be limited together with memory"),
        _ if swap < memory => invalid("the limit of memory and swap together is below that of memory"),
        _ => Ok(Some((swap - memory).to_string())),
    }
}

/// 10..=1000 to 1..=10000.
fn io_weight(weight: u32) -> u32 {
    1 + (weight - 10) * 9999 / 990
}

/// CPU shares (2..=262144, 1024 as the default) to the weight of v2 (1..=10000, 100 as the default).
///
/// runc's formula since 1.4: a quadratic in the logarithm that goes through both ends and the defaults.
fn cpu_weight(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let l = log2(shares);
    let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
    // Rounding up must not go to the next number when the result is a whole number but for the last bit.
    let weight = power_of_ten(exponent) - 1e-9;
    weight as u64 + 1
}

/// The binary logarithm, digit by digit: the program has no mathematics library.
fn log2(value: u64) -> f64 {
    let whole = value.ilog2();
    let mut mantissa = value as f64 / (1u64 << whole) as f64;
    let (mut result, mut digit) = (f64::from(whole), 0.5);
    for _ in 0..48 {
        mantissa *= mantissa;
        if mantissa >= 2.0 {
            mantissa /= 2.0;
            result += digit;
        }
        digit /= 2.0;
    }
    result
}

/// 10 to the power of 0..=4, by the series of the exponential function.
fn power_of_ten(exponent: f64) -> f64 {
    let whole = exponent as u32;
    let x = (exponent - f64::from(whole)) * core::f64::consts::LN_10;
    let (mut sum, mut term) = (1.0, 1.0);
    for n in 1..32 {
        term *= x / f64::from(n);
        sum += term;
    }
    sum * f64::from(10u32.pow(whole))
}

#[cfg(test)]
#[path = "cgroup_limits_tests.rs"]
mod tests;
