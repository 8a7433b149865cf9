//! The guest's and the agent's own numbers as Prometheus text (GetMetrics).
//!
//! Names and labels are the original's; where its document and its code spell an item differently, both are there.
//! Scraping must be cheap: the text is put together without format strings (which were a third of it under software
//! emulation), by the agent itself where nothing that is asked can make it wait, see [`may_wait`]. What a container
//! can choose, the names of interfaces and mount points, is escaped and bounded here and checked again on the host.

use crate::fs;
use crate::prelude::*;
use crate::sys::{self, Pid};

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
/// The agent's `cancelled_write_bytes` by the name that the original's document has for it.
const CANCELLED: (&str, &str) = ("cancelled_write_bytes", "cancelled_write_byte");
/// File systems with room of their own.
const FILE_SYSTEMS: &[&str] = &["btrfs", "ext4", "overlay", "vfat", "xfs"];
/// File systems that answer out of the kernel's memory, whatever the host or a process in a container does.
const LOCAL: &[&str] = &[
    "autofs",
    "bpf",
    "cgroup2",
    "debugfs",
    "devpts",
    "devtmpfs",
    "erofs",
    "ext4",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "overlay",
    "proc",
    "ramfs",
    "rootfs",
    "securityfs",
    "squashfs",
    "sysfs",
    "tmpfs",
    "tracefs",
    "xfs",
];
/// A container can make any number of interfaces and mounts, with paths as long as it likes.
const MOST_OF_A_KIND: usize = 128;
const LONGEST_PATH: usize = 256;

/// Whether putting the text together can hang: a mount of the agent's is answered by the host, by a process, or reads
/// its disk for that. `mounts` is /proc/self/mounts.
pub fn may_wait(mounts: &str) -> bool {
    !mounts.lines().all(|line| line.split(' ').nth(2).is_some_and(|kind| LOCAL.contains(&kind)))
}

/// All of them, in the text format of Prometheus. `scrapes` counts this call, `mounts` is the agent's /proc/self/mounts.
pub fn collect(agent: Pid, scrapes: u64, mounts: &str) -> String {
    let mut out = Text { out: String::with_capacity(32 << 10) };
    of_agent(&mut out, &|file| fs::read_to_string(format!("/proc/{agent}/{file}")).unwrap_or_default(), scrapes);
    if let Ok(open) = fs::read_dir(format!("/proc/{agent}/fd")) {
        out.one("kata_agent_process_open_fds", "gauge", "Open descriptors of the agent.", &open.len().to_string());
    }
    of_guest(&mut out, &|file| fs::read_to_string(format!("/proc/{file}")).unwrap_or_default());
    file_systems(&mut out, mounts);
    out.out
}

type Reader<'a> = &'a dyn Fn(&str) -> String;

/// The text being written.
struct Text {
    out: String,
}

impl Text {
    fn put(&mut self, pieces: &[&str]) {
        for piece in pieces {
            self.out.push_str(piece);
        }
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.put(&["# HELP ", name, " ", help, "\n# TYPE ", name, " ", kind, "\n"]);
    }

    /// A family with one value and no labels.
    fn one(&mut self, name: &str, kind: &str, help: &str, number: &str) {
        self.family(name, kind, help);
        self.put(&[name, " ", number, "\n"]);
    }

    /// `labels` is empty or ends in a comma: see [`label`]. What the kernel does not tell is left out.
    fn item(&mut self, name: &str, labels: &str, item: &str, number: &str) {
        if number.is_empty() {
            return;
        }
        self.put(&[name, "{", labels, "item=\"", item, "\"} ", number, "\n"]);
    }

    /// One row of numbers with names.
    fn row<'a>(&mut self, name: &str, labels: &str, items: &[&str], numbers: impl Iterator<Item = &'a str>) {
        for (item, number) in items.iter().zip(numbers) {
            self.item(name, labels, item, number);
        }
    }
}

/// `name="value",`, with the value escaped.
fn label(name: &str, value: &str) -> String {
    let mut out = String::with_capacity(name.len() + value.len() + 8);
    out.push_str(name);
    out.push_str("=\"");
    for c in value.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '"' | '\\' => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out.push_str("\",");
    out
}

/// Seconds with two decimals, of ticks.
fn seconds(ticks: u64) -> String {
    format!("{}.{:02}", ticks / TICKS_PER_SECOND, ticks % TICKS_PER_SECOND)
}

fn of_agent(out: &mut Text, read: Reader, scrapes: u64) {
    let scrapes = scrapes.to_string();
    out.one("kata_agent_scrape_count", "counter", "How often these metrics were asked for.", &scrapes);
    let stat = read("stat");
    // The name in parentheses may hold anything; the fields after it are counted from the state, field 3.
    let fields: Vec<&str> =
        stat.rsplit_once(") ").map(|(_, rest)| rest.split_ascii_whitespace().collect()).unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or("0");
    let count = |number: usize| field(number).parse::<u64>().unwrap_or(0);
    let used = seconds(count(14) + count(15));
    let (size, resident) = (field(23), (count(24) * PAGE).to_string());
    out.one("kata_agent_threads", "gauge", "Threads of the agent.", field(20));
    out.one("kata_agent_total_time", "gauge", "Seconds of processor time that the agent has used.", &used);
    out.one("kata_agent_total_vm", "gauge", "Virtual memory of the agent in bytes.", size);
    out.one("kata_agent_total_rss", "gauge", "Resident memory of the agent in bytes.", &resident);
    out.family("kata_agent_proc_stat", "gauge", "Processor time of the agent in ticks.");
    for (item, number) in [("utime", 14), ("stime", 15), ("cutime", 16), ("cstime", 17)] {
        out.item("kata_agent_proc_stat", "", item, field(number));
    }
    out.family("kata_agent_proc_status", "gauge", "The agent's memory in kB, and its context switches.");
    for line in read("status").lines() {
        let Some((key, rest)) = line.split_once(':') else { continue };
        if let (true, Some(number)) = (STATUS_ITEMS.contains(&key), rest.split_ascii_whitespace().next()) {
            out.item("kata_agent_proc_status", "", &key.to_ascii_lowercase(), number);
        }
    }
    out.family("kata_agent_io_stat", "gauge", "What the agent has read and written.");
    for (key, number) in read("io").lines().filter_map(|line| line.split_once(": ")) {
        out.item("kata_agent_io_stat", "", key, number);
        if key == CANCELLED.0 {
            out.item("kata_agent_io_stat", "", CANCELLED.1, number);
        }
    }
    out.one("kata_agent_process_cpu_seconds_total", "counter", "Processor time of the agent in seconds.", &used);
    out.one("kata_agent_process_resident_memory_bytes", "gauge", "Resident memory of the agent.", &resident);
    out.one("kata_agent_process_virtual_memory_bytes", "gauge", "Virtual memory of the agent.", size);
    let booted =
        sys::clock_ns(libc::CLOCK_REALTIME).saturating_sub(sys::clock_ns(libc::CLOCK_BOOTTIME)) / 1_000_000_000;
    let started = seconds(booted.saturating_mul(TICKS_PER_SECOND) + count(22));
    out.one("kata_agent_process_start_time_seconds", "gauge", "When the agent was started.", &started);
    let limits = read("limits");
    let most = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_ascii_whitespace().next());
    let most = most.unwrap_or("0").replace("unlimited", "+Inf");
    out.one("kata_agent_process_max_fds", "gauge", "Most descriptors the agent may have.", &most);
}

fn of_guest(out: &mut Text, read: Reader) {
    out.family("kata_guest_cpu_time", "gauge", "Time of each processor in ticks.");
    // The processors come first, then counters of every interrupt.
    for cpu in read("stat").lines().map_while(|line| line.strip_prefix("cpu")) {
        let mut words = cpu.split_ascii_whitespace();
        let name = if cpu.starts_with(' ') { "total" } else { words.next().unwrap_or_default() };
        out.row("kata_guest_cpu_time", &label("cpu", name), CPU_ITEMS, words);
    }
    let load = read("loadavg");
    let words: Vec<&str> = load.split_ascii_whitespace().collect();
    out.family("kata_guest_load", "gauge", "Mean number of processes that run or would like to.");
    out.row("kata_guest_load", "", &["load1", "load5", "load15"], words.iter().copied());
    out.family("kata_guest_tasks", "gauge", "Tasks that run, and all.");
    out.row("kata_guest_tasks", "", &["cur", "max"], words.get(3).copied().unwrap_or_default().split('/'));
    out.family("kata_guest_meminfo", "gauge", "Memory in bytes, huge pages in pages.");
    for line in read("meminfo").lines() {
        let Some((key, rest)) = line.split_once(':') else { continue };
        let mut words = rest.split_ascii_whitespace();
        let number = words.next().unwrap_or("0");
        let item = meminfo_item(key);
        if words.next().is_some() {
            let kib: u64 = number.parse().unwrap_or(0);
            out.item("kata_guest_meminfo", "", &item, &kib.saturating_mul(1024).to_string());
        } else {
            out.item("kata_guest_meminfo", "", &item, number);
        }
    }
    out.family("kata_guest_vm_stat", "gauge", "The counters of /proc/vmstat.");
    for (key, number) in read("vmstat").lines().filter_map(|line| line.split_once(' ')) {
        out.item("kata_guest_vm_stat", "", key, number);
    }
    out.family("kata_guest_diskstat", "gauge", "Disks: requests, sectors, and times in milliseconds.");
    for line in read("diskstats").lines().take(MOST_OF_A_KIND) {
        let mut words = line.split_ascii_whitespace().skip(2);
        if let Some(disk) = words.next() {
            out.row("kata_guest_diskstat", &label("disk", disk), DISK_ITEMS, words);
        }
    }
    out.family("kata_guest_netdev_stat", "gauge", "Network interfaces: bytes, packets and what went wrong.");
    let text = read("net/dev");
    for (name, rest) in interfaces(&text) {
        out.row("kata_guest_netdev_stat", &label("interface", name), NET_ITEMS, rest.split_ascii_whitespace());
    }
}

/// Names and numbers of /proc/net/dev. A name may be of any bytes but white space, `/` and `:`; two names whose bytes
/// are no UTF-8 can be the same text, of which only one may occur.
fn interfaces(text: &str) -> Vec<(&str, &str)> {
    let mut found: Vec<(&str, &str)> = Vec::new();
    for (name, rest) in text.lines().filter_map(|line| line.split_once(':')).take(MOST_OF_A_KIND) {
        let name = name.trim_start_matches(' ');
        if !found.iter().any(|(other, _)| *other == name) {
            found.push((name, rest));
        }
    }
    found
}

/// `Active(anon)` is called `active_anon`, `DirectMap4k` `direct_map_4k`, `HugePages_Free` `hugepages_free`.
fn meminfo_item(key: &str) -> String {
    if let Some(size) = key.strip_prefix("DirectMap") {
        return format!("direct_map_{size}");
    }
    if key == "Percpu" {
        return "per_cpu".to_string();
    }
    let bytes = key.as_bytes();
    let mut item = String::with_capacity(key.len() + 4);
    for (at, byte) in bytes.iter().enumerate() {
        let before = at.checked_sub(1).map_or(b'_', |before| bytes[before]);
        let starts_word = before.is_ascii_uppercase() && bytes.get(at + 1).is_some_and(u8::is_ascii_lowercase);
        let is_word = byte.is_ascii_uppercase() && (before.is_ascii_lowercase() || starts_word);
        if is_word && !bytes[..at].ends_with(b"Huge") {
            item.push('_');
        }
        match byte {
            b'(' => item.push('_'),
            b')' => {}
            byte => item.push(byte.to_ascii_lowercase() as char),
        }
    }
    item
}

/// A path or a device of /proc/self/mounts, where white space and backslashes are octal numbers (`\040`).
fn unescaped(word: &str) -> String {
    let mut parts = word.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let number = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(number.unwrap_or(b'\\'));
        bytes.extend_from_slice(&part.as_bytes()[if number.is_some() { 3 } else { 0 }..]);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Writable file systems, each device once.
fn file_systems(out: &mut Text, mounts: &str) {
    let mut seen: Vec<&str> = Vec::new();
    let mut found = Vec::new();
    for line in mounts.lines() {
        let mut words = line.split(' ');
        let (Some(device), Some(mount), Some(kind), Some(options)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        if !FILE_SYSTEMS.contains(&kind)
            || mount.len() > LONGEST_PATH
            || device.len() > LONGEST_PATH
            || seen.len() == MOST_OF_A_KIND
            || options.split(',').any(|option| option == "ro")
            || seen.contains(&device)
        {
            continue;
        }
        let path = unescaped(mount);
        let Ok(usage) = sys::open(&path, libc::O_PATH, 0).and_then(|fd| sys::fstatfs(fd.raw())) else { continue };
        seen.push(device);
        found.push((label("mount", &path) + &label("device", &unescaped(device)), usage));
    }
    if found.is_empty() {
        return;
    }
    for (name, help) in [
        ("kata_guest_filesystem_bytes", "Room on the guest's file systems."),
        ("kata_guest_filesystem_inodes", "Inodes of the guest's file systems."),
    ] {
        out.family(name, "gauge", help);
        for (labels, usage) in &found {
            let block = usage.f_frsize as u64;
            let (total, free, available) = match name {
                "kata_guest_filesystem_bytes" => {
                    (usage.f_blocks * block, usage.f_bfree * block, usage.f_bavail * block)
                }
                _ => (usage.f_files, usage.f_ffree, usage.f_ffree),
            };
            for (item, number) in [("total", total), ("used", total.saturating_sub(free)), ("available", available)] {
                out.item(name, labels, item, &number.to_string());
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
            ("ShmemHugePages", "shmem_hugepages"),
            ("ShmemPmdMapped", "shmem_pmd_mapped"),
            ("VmallocChunk", "vmalloc_chunk"),
            ("WritebackTmp", "writeback_tmp"),
        ] {
            assert_eq!(meminfo_item(key), item);
        }
    }

    /// What every reader of the format insists on, also of a text that a container has had a hand in.
    fn check(text: &str) -> Vec<(&str, &str)> {
        let (mut families, mut samples): (Vec<(&str, &str)>, Vec<&str>) = (Vec::new(), Vec::new());
        let mut lines = text.lines();
        assert!(text.ends_with('\n'));
        while let Some(line) = lines.next() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(!help.contains('\\') && !families.iter().any(|(other, _)| *other == name), "{line}");
                let kind = lines.next().unwrap().strip_prefix("# TYPE ").unwrap().strip_prefix(name).unwrap();
                assert!([" gauge", " counter"].contains(&kind), "{line}");
                families.push((name, &kind[1..]));
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            assert_eq!(name, families.last().unwrap().0, "{line}");
            assert!(labels.is_empty() || labels.ends_with("\"}") && labels.contains("item=\""), "{line}");
            assert!(!samples.contains(&series), "twice: {line}");
            samples.push(series);
        }
        families
    }

    #[test]
    fn all_families_are_there_and_well_formed() {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let text = collect(sys::getpid(), 7, &mounts);
        let families = check(&text);
        assert!(families.len() >= 21, "{families:?}");
        assert_eq!(families[0], ("kata_agent_scrape_count", "counter"));
        assert!(text.contains("kata_agent_scrape_count 7\n"));
        assert!(text.contains("kata_guest_cpu_time{cpu=\"total\",item=\"user\"} "));
        assert!(text.contains("kata_agent_proc_status{item=\"vmrss\"} "));
        assert!(text.contains("kata_guest_netdev_stat{interface=\"lo\",item=\"sent_packets\"} "));
        for spelling in ["cancelled_write_bytes", "cancelled_write_byte"] {
            assert!(text.contains(&format!("kata_agent_io_stat{{item=\"{spelling}\"}} ")));
        }
    }

    #[test]
    fn names_that_a_container_chose_break_nothing() {
        let mut out = Text { out: String::new() };
        let names = "h1\nh2\n  a\"b: 1 2\n c\\d}: 3 4\n\u{fffd}: 5\n\u{fffd}: 6\nlo\u{2003}: 7\nlo: 8\n";
        of_guest(&mut out, &|file| if file == "net/dev" { names.to_string() } else { String::new() });
        check(&out.out);
        for line in
            ["a\\\"b\",item=\"recv_packets\"} 2", "c\\\\d}\",item=\"recv_bytes\"} 3", "lo\",item=\"recv_bytes\"} 8"]
        {
            assert!(out.out.contains(&format!("kata_guest_netdev_stat{{interface=\"{line}\n")), "{}", out.out);
        }
        assert!(!out.out.contains("} 6\n"));
        let many: String = (0..1000).map(|number| format!("v{number}: 1\n")).collect();
        assert_eq!(interfaces(&many).len(), MOST_OF_A_KIND);
    }

    #[test]
    fn words_of_the_mount_table() {
        assert_eq!(unescaped("/a\\040b\\134c"), "/a b\\c");
        assert_eq!(unescaped("odd\\9\\"), "odd\\9\\");
        let mut out = Text { out: String::new() };
        let long = "x".repeat(LONGEST_PATH);
        file_systems(
            &mut out,
            &format!("d1 / ext4 rw 0 0\nd1 /proc ext4 rw\nd2 / xfs ro,x 0 0\nd3 /{long} ext4 rw\n\nd4\n"),
        );
        assert_eq!(
            check(&out.out),
            [("kata_guest_filesystem_bytes", "gauge"), ("kata_guest_filesystem_inodes", "gauge")]
        );
        assert_eq!(out.out.lines().count(), 10);
        assert!(out.out.contains("kata_guest_filesystem_bytes{mount=\"/\",device=\"d1\",item=\"used\"} "));
    }

    #[test]
    fn a_mount_that_the_host_answers_may_wait() {
        let local = "proc /proc proc rw 0 0\n/dev/vda /x erofs ro 0 0\noverlay /y overlay rw,upperdir=/u 0 0\n";
        assert!(!may_wait(local));
        for kind in ["virtiofs", "9p", "fuse.sshfs", "nfs4", "vfat", "btrfs"] {
            assert!(may_wait(&format!("{local}a /b {kind} rw 0 0\n")), "{kind}");
        }
        assert!(may_wait("nonsense\n"));
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(label("mount", "a\"b\\c\nd"), "mount=\"a\\\"b\\\\c\\nd\",");
        assert_eq!(seconds(1205), "12.05");
    }
}
