//! The guest's and the agent's own numbers as Prometheus text (GetMetrics).
//!
//! Names and labels are the original's. Everything is read from /proc in a child of the agent: `agent` is the agent's
//! pid.

use crate::fs;
use crate::prelude::*;
use crate::sys::{self, Pid};
use core::fmt::Write;

/// USER_HZ: the same on every architecture that Linux knows today.
const TICKS_PER_SECOND: u64 = 100;
const PAGE: u64 = 4096;

const CPU_ITEMS: &[&str] =
    &["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"];
/// /proc/diskstats from its fourth column on.
const DISK_ITEMS: &[&str] = &[
    "reads",
    "merged",
    "sectors_read",
    "time_reading",
    "writes",
    "writes_merged",
    "sectors_written",
    "time_writing",
    "in_progress",
    "time_in_progress",
    "weighted_time_in_progress",
    "discards",
    "discards_merged",
    "sectors_discarded",
    "time_discarding",
    "flushes",
    "time_flushing",
];
const NET_ITEMS: &[&str] = &[
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];
const STATUS_ITEMS: &[&str] = &[
    "HugetlbPages",
    "nonvoluntary_ctxt_switches",
    "RssAnon",
    "RssFile",
    "RssShmem",
    "VmData",
    "VmExe",
    "VmHWM",
    "VmLck",
    "VmLib",
    "VmPeak",
    "VmPin",
    "VmPTE",
    "VmRSS",
    "VmSize",
    "VmStk",
    "VmSwap",
    "voluntary_ctxt_switches",
];
/// File systems with room of their own.
const FILE_SYSTEMS: &[&str] = &["btrfs", "ext4", "overlay", "vfat", "xfs"];

/// All of them. `scrapes` counts this call.
pub fn collect(agent: Pid, scrapes: u64) -> String {
    let mut out = Text { out: String::with_capacity(32 << 10) };
    of_agent(&mut out, &|file| fs::read_to_string(format!("/proc/{agent}/{file}")).unwrap_or_default(), scrapes);
    if let Ok(open) = fs::read_dir(format!("/proc/{agent}/fd")) {
        out.one("kata_agent_process_open_fds", "gauge", "Open descriptors of the agent.", &open.len());
    }
    of_guest(&mut out, &|file| fs::read_to_string(format!("/proc/{file}")).unwrap_or_default());
    file_systems(&mut out, &fs::read_to_string(format!("/proc/{agent}/mounts")).unwrap_or_default());
    out.out
}

type Reader<'a> = &'a dyn Fn(&str) -> String;

/// The text being written.
struct Text {
    out: String,
}

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// `labels`: pairs of name and value.
    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: &dyn core::fmt::Display) {
        self.out.push_str(name);
        for (at, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.out, "{}{label}=\"", if at == 0 { '{' } else { ',' });
            for c in text.chars() {
                match c {
                    '\n' => self.out.push_str("\\n"),
                    '"' | '\\' => self.out.extend(['\\', c]),
                    c => self.out.push(c),
                }
            }
            self.out.push('"');
        }
        let _ = writeln!(self.out, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: &dyn core::fmt::Display) {
        self.family(name, kind, help);
        self.value(name, &[], value);
    }

    /// One row of numbers with names.
    fn row(
        &mut self,
        name: &str,
        label: Option<(&str, &str)>,
        items: &[&str],
        numbers: &mut dyn Iterator<Item = &str>,
    ) {
        for (item, number) in items.iter().zip(numbers) {
            let labels = [label.unwrap_or_default(), ("item", item)];
            self.value(name, if label.is_some() { &labels } else { &labels[1..] }, &number);
        }
    }
}

/// Seconds with two decimals, of ticks.
fn seconds(ticks: u64) -> String {
    format!("{}.{:02}", ticks / TICKS_PER_SECOND, ticks % TICKS_PER_SECOND)
}

fn of_agent(out: &mut Text, read: Reader, scrapes: u64) {
    out.one("kata_agent_scrape_count", "counter", "How often these metrics were asked for.", &scrapes);
    let stat = read("stat");
    // The name in parentheses may hold anything; the fields after it are counted from the state, field 3.
    let fields: Vec<u64> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect())
        .unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
    let (used, size, resident) = (field(14) + field(15), field(23), field(24) * PAGE);
    out.one("kata_agent_threads", "gauge", "Threads of the agent.", &field(20));
    out.one("kata_agent_total_time", "gauge", "Seconds of processor time that the agent has used.", &seconds(used));
    out.one("kata_agent_total_vm", "gauge", "Virtual memory of the agent in bytes.", &size);
    out.one("kata_agent_total_rss", "gauge", "Resident memory of the agent in bytes.", &resident);
    out.family("kata_agent_proc_stat", "gauge", "Processor time of the agent in ticks.");
    for (item, number) in [("utime", 14), ("stime", 15), ("cutime", 16), ("cstime", 17)] {
        out.value("kata_agent_proc_stat", &[("item", item)], &field(number));
    }
    out.family("kata_agent_proc_status", "gauge", "The agent's memory in kB, and its context switches.");
    for line in read("status").lines() {
        let Some((key, rest)) = line.split_once(':') else { continue };
        if let (true, Some(number)) = (STATUS_ITEMS.contains(&key), rest.split_whitespace().next()) {
            out.value("kata_agent_proc_status", &[("item", &key.to_ascii_lowercase())], &number);
        }
    }
    out.family("kata_agent_io_stat", "gauge", "What the agent has read and written.");
    for (key, number) in read("io").lines().filter_map(|line| line.split_once(": ")) {
        out.value("kata_agent_io_stat", &[("item", key)], &number);
    }
    let used = seconds(used);
    out.one("kata_agent_process_cpu_seconds_total", "counter", "Processor time of the agent.", &used);
    out.one("kata_agent_process_resident_memory_bytes", "gauge", "Resident memory of the agent.", &resident);
    out.one("kata_agent_process_virtual_memory_bytes", "gauge", "Virtual memory of the agent.", &size);
    let booted =
        sys::clock_ns(libc::CLOCK_REALTIME).saturating_sub(sys::clock_ns(libc::CLOCK_BOOTTIME)) / 1_000_000_000;
    let started = booted.saturating_mul(TICKS_PER_SECOND) + field(22);
    out.one("kata_agent_process_start_time_seconds", "gauge", "When the agent was started.", &seconds(started));
    let limits = read("limits");
    let most = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    out.one("kata_agent_process_max_fds", "gauge", "Most descriptors the agent may have.", &most.unwrap_or("0"));
}

fn of_guest(out: &mut Text, read: Reader) {
    out.family("kata_guest_cpu_time", "gauge", "Time of each processor in ticks.");
    for line in read("stat").lines() {
        let mut words = line.split_whitespace();
        let Some(cpu) = words.next().and_then(|word| word.strip_prefix("cpu")) else { continue };
        let cpu = if cpu.is_empty() { "total" } else { cpu };
        out.row("kata_guest_cpu_time", Some(("cpu", cpu)), CPU_ITEMS, &mut words);
    }
    let load = read("loadavg");
    let words: Vec<&str> = load.split_whitespace().collect();
    out.family("kata_guest_load", "gauge", "Mean number of processes that run or would like to.");
    out.row("kata_guest_load", None, &["load1", "load5", "load15"], &mut words.iter().copied());
    out.family("kata_guest_tasks", "gauge", "Tasks that run, and all.");
    out.row("kata_guest_tasks", None, &["cur", "max"], &mut words.get(3).copied().unwrap_or_default().split('/'));
    out.family("kata_guest_meminfo", "gauge", "Memory in bytes, huge pages in pages.");
    for line in read("meminfo").lines() {
        let Some((key, rest)) = line.split_once(':') else { continue };
        let mut words = rest.split_whitespace();
        let number: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let factor = if words.next().is_some() { 1024 } else { 1 };
        out.value("kata_guest_meminfo", &[("item", &meminfo_item(key))], &(number * factor));
    }
    out.family("kata_guest_vm_stat", "gauge", "The counters of /proc/vmstat.");
    for (key, number) in read("vmstat").lines().filter_map(|line| line.split_once(' ')) {
        out.value("kata_guest_vm_stat", &[("item", key)], &number);
    }
    out.family("kata_guest_diskstat", "gauge", "Disks: requests, sectors, and times in milliseconds.");
    for line in read("diskstats").lines() {
        let mut words = line.split_whitespace().skip(2);
        if let Some(disk) = words.next() {
            out.row("kata_guest_diskstat", Some(("disk", disk)), DISK_ITEMS, &mut words);
        }
    }
    out.family("kata_guest_netdev_stat", "gauge", "Network interfaces: bytes, packets and what went wrong.");
    for (name, rest) in read("net/dev").lines().filter_map(|line| line.split_once(':')) {
        let label = Some(("interface", name.trim()));
        out.row("kata_guest_netdev_stat", label, NET_ITEMS, &mut rest.split_whitespace());
    }
}

/// `Active(anon)` is called `active_anon`, `DirectMap4k` `direct_map_4k`, `HugePages_Free` `hugepages_free`.
fn meminfo_item(key: &str) -> String {
    if let Some(size) = key.strip_prefix("DirectMap") {
        return format!("direct_map_{size}");
    }
    let key = key.replace("HugePages", "Hugepages").replace("Percpu", "PerCpu").replace('(', "_").replace(')', "");
    let bytes = key.as_bytes();
    let mut item = String::new();
    for (at, byte) in bytes.iter().enumerate() {
        let before = at.checked_sub(1).map_or(b'_', |before| bytes[before]);
        let starts_word = before.is_ascii_uppercase() && bytes.get(at + 1).is_some_and(u8::is_ascii_lowercase);
        if byte.is_ascii_uppercase() && (before.is_ascii_lowercase() || starts_word) {
            item.push('_');
        }
        item.push(byte.to_ascii_lowercase() as char);
    }
    item
}

/// Writable file systems, each device once.
fn file_systems(out: &mut Text, mounts: &str) {
    let mut seen: Vec<&str> = Vec::new();
    let mut found = Vec::new();
    for line in mounts.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [device, mount, kind, options, ..] = words[..] else { continue };
        if !FILE_SYSTEMS.contains(&kind) || options.split(',').any(|o| o == "ro") || seen.contains(&device) {
            continue;
        }
        let Ok(usage) = sys::open(mount, libc::O_PATH, 0).and_then(|fd| sys::fstatfs(fd.raw())) else { continue };
        seen.push(device);
        found.push((device, mount, usage));
    }
    for (name, help) in [
        ("kata_guest_filesystem_bytes", "Room on the guest's file systems."),
        ("kata_guest_filesystem_inodes", "Inodes of the guest's file systems."),
    ] {
        out.family(name, "gauge", help);
        for (device, mount, usage) in &found {
            let block = usage.f_frsize as u64;
            let (total, free, available) = match name {
                "kata_guest_filesystem_bytes" => {
                    (usage.f_blocks * block, usage.f_bfree * block, usage.f_bavail * block)
                }
                _ => (usage.f_files, usage.f_ffree, usage.f_ffree),
            };
            for (item, number) in [("total", total), ("used", total.saturating_sub(free)), ("available", available)] {
                out.value(name, &[("mount", mount), ("device", device), ("item", item)], &number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_memory_are_the_originals() {
        for (key, item) in [
            ("MemTotal", "mem_total"),
            ("Active(anon)", "active_anon"),
            ("AnonHugePages", "anon_hugepages"),
            ("Committed_AS", "committed_as"),
            ("DirectMap1G", "direct_map_1G"),
            ("HugePages_Rsvd", "hugepages_rsvd"),
            ("Hugepagesize", "hugepagesize"),
            ("KReclaimable", "k_reclaimable"),
            ("NFS_Unstable", "nfs_unstable"),
            ("Percpu", "per_cpu"),
            ("SUnreclaim", "s_unreclaim"),
            ("ShmemPmdMapped", "shmem_pmd_mapped"),
            ("VmallocChunk", "vmalloc_chunk"),
        ] {
            assert_eq!(meminfo_item(key), item);
        }
    }

    #[test]
    fn all_families_are_there_and_well_formed() {
        let text = collect(sys::getpid(), 7);
        let mut families = 0;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                families += 1;
                assert!(rest.ends_with(" gauge") || rest.ends_with(" counter"), "{line}");
            } else if !line.starts_with('#') {
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(name.starts_with("kata_agent_") || name.starts_with("kata_guest_"), "{line}");
            }
        }
        assert_eq!(families, 23);
        assert!(text.contains("kata_agent_scrape_count 7\n"));
        assert!(text.contains("kata_guest_cpu_time{cpu=\"total\",item=\"user\"} "));
        assert!(text.contains("kata_agent_proc_status{item=\"vmrss\"} "));
        assert!(text.contains("kata_guest_netdev_stat{interface=\"lo\",item=\"sent_packets\"} "));
    }

    #[test]
    fn labels_are_escaped() {
        let mut out = Text { out: String::new() };
        out.value("x", &[("mount", "a\"b\\c\nd"), ("y", "z")], &1);
        assert_eq!(out.out, "x{mount=\"a\\\"b\\\\c\\nd\",y=\"z\"} 1\n");
        assert_eq!(seconds(1205), "12.05");
    }
}
