//! What a control group has used, in the words of the agent protocol (which are cgroup v1's).

use crate::fs;
use crate::huge_pages::POOLS;
use crate::prelude::*;
use crate::proto::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData, MemoryStats, PidsStats,
    ThrottlingData,
};
use crate::sys;

/// Reads all of the group's counters. Those of missing controllers are absent.
pub fn read(path: &str) -> Result<CgroupStats> {
    if !fs::is_dir(path) {
        return Err(Error::not_found(format!("the control group {path} does not exist")));
    }
    let read = |file: &str| fs::read_to_string(format!("{path}/{file}")).ok();
    Ok(CgroupStats {
        cpu_stats: read("cpu.stat").map(|text| Box::new(cpu(&text))),
        memory_stats: memory(&read, sys::total_memory().unwrap_or(u64::MAX)).map(Box::new),
        pids_stats: pids(&read).map(Box::new),
        blkio_stats: read("io.stat").map(|text| Box::new(block_io(&text))),
        hugetlb_stats: huge_pages(&fs::names(POOLS).unwrap_or_default(), &read),
    })
}

type Reader<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The number behind `key` in a file of "key number" lines.
pub fn value_of(text: &str, key: &str) -> Option<u64> {
    pairs(text).find(|(candidate, _)| *candidate == key).map(|(_, value)| value)
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// A file that holds one number, or "max", which the protocol writes as the largest one.
fn number(text: &str) -> u64 {
    let text = text.trim();
    if text == "max" {
        u64::MAX
    } else {
        text.parse().unwrap_or(0)
    }
}

fn cpu(text: &str) -> CpuStats {
    let value = |key: &str| value_of(text, key).unwrap_or(0);
    // The kernel counts microseconds, the protocol nanoseconds. v2 has no usage per processor.
    let nanoseconds = |key: &str| value(key).saturating_mul(1000);
    CpuStats {
        cpu_usage: Some(Box::new(CpuUsage {
            total_usage: nanoseconds("usage_usec"),
            percpu_usage: Vec::new(),
            usage_in_kernelmode: nanoseconds("system_usec"),
            usage_in_usermode: nanoseconds("user_usec"),
        })),
        throttling_data: Some(Box::new(ThrottlingData {
            periods: value("nr_periods"),
            throttled_periods: value("nr_throttled"),
            throttled_time: nanoseconds("throttled_usec"),
        })),
    }
}

/// The limit of a group without one is the machine's memory: clients print this number beside the usage.
fn memory(read: Reader, total: u64) -> Option<MemoryStats> {
    let usage = number(&read("memory.current")?);
    let stat = read("memory.stat").unwrap_or_default();
    let value = |file: &str| read(file).map_or(0, |text| number(&text));
    let events = read("memory.events").unwrap_or_default();
    Some(MemoryStats {
        cache: value_of(&stat, "file").unwrap_or(0),
        usage: Some(Box::new(MemoryData {
            usage,
            // Since Linux 5.19; without it the present usage is the closest value.
            max_usage: value("memory.peak").max(usage),
            failcnt: value_of(&events, "max").unwrap_or(0),
            limit: value("memory.max").min(total),
        })),
        swap_usage: read("memory.swap.current").map(|text| {
            let usage = number(&text);
            Box::new(MemoryData {
                usage,
                max_usage: value("memory.swap.peak").max(usage),
                failcnt: read("memory.swap.events").and_then(|text| value_of(&text, "max")).unwrap_or(0),
                limit: value("memory.swap.max"),
            })
        }),
        kernel_usage: value_of(&stat, "kernel")
            .map(|usage| Box::new(MemoryData { usage, max_usage: usage, failcnt: 0, limit: u64::MAX })),
        use_hierarchy: true,
        // Of what happened at the limits the protocol has room for one number, `failcnt`: the others go by their names,
        // none of which memory.stat has.
        stats: pairs(&stat).chain(pairs(&events)).map(|(key, value)| (key.to_string(), value)).collect(),
    })
}

fn pids(read: Reader) -> Option<PidsStats> {
    let current = number(&read("pids.current")?);
    Some(PidsStats { current, limit: number(&read("pids.max")?) })
}

/// `io.stat`: one line per device, "major:minor key=number ...". Every device counts, also those without a name.
fn block_io(text: &str) -> BlkioStats {
    let mut stats = BlkioStats::default();
    for line in text.lines() {
        let mut words = line.split(' ');
        let Some((major, minor)) = words.next().and_then(|device| device.split_once(':')) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut stats.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut stats.io_service_bytes_recursive, "Write"),
                "dbytes" => (&mut stats.io_service_bytes_recursive, "Discard"),
                "rios" => (&mut stats.io_serviced_recursive, "Read"),
                "wios" => (&mut stats.io_serviced_recursive, "Write"),
                "dios" => (&mut stats.io_serviced_recursive, "Discard"),
                _ => continue,
            };
            list.push(BlkioStatsEntry { major, minor, op: op.to_string(), value: number(value) });
        }
    }
    stats
}

/// Files named `hugetlb.<size>.current`; `pools` are the kernel's, named `hugepages-<KiB>kB`. To look through the group's
/// directory instead takes longer than all of its numbers.
fn huge_pages(pools: &[String], read: Reader) -> BTreeMap<String, HugetlbStats> {
    let mut stats = BTreeMap::new();
    for pool in pools {
        let Some(kib) = pool.strip_prefix("hugepages-").and_then(|rest| rest.strip_suffix("kB")?.parse::<u64>().ok())
        else {
            continue;
        };
        let size = match kib {
            kib if kib >= 1 << 20 => format!("{}GB", kib >> 20),
            kib if kib >= 1 << 10 => format!("{}MB", kib >> 10),
            kib => format!("{kib}KB"),
        };
        let Some(text) = read(&format!("hugetlb.{size}.current")) else { continue };
        let events = read(&format!("hugetlb.{size}.events")).unwrap_or_default();
        let usage = number(&text);
        let failcnt = value_of(&events, "max").unwrap_or(0);
        stats.insert(size, HugetlbStats { usage, max_usage: usage, failcnt });
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_in_nanoseconds() {
        let stats =
            cpu("usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 7\nnr_throttled 2\nthrottled_usec 3\n");
        let usage = stats.cpu_usage.unwrap();
        assert_eq!(
            (usage.total_usage, usage.usage_in_kernelmode, usage.usage_in_usermode),
            (1_500_000, 500_000, 1_000_000)
        );
        let throttling = stats.throttling_data.unwrap();
        assert_eq!((throttling.periods, throttling.throttled_periods, throttling.throttled_time), (7, 2, 3000));
    }

    #[test]
    fn memory_counters() {
        let read = |file: &str| {
            Some(match file {
                "memory.current" => "4096\n".to_string(),
                "memory.max" => "max\n".to_string(),
                "memory.events" => "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n".to_string(),
                "memory.stat" => "anon 1\nfile 2048\nkernel 77\ninactive_file 12\n".to_string(),
                "memory.swap.current" => "5\n".to_string(),
                "memory.swap.max" => "100\n".to_string(),
                _ => return None,
            })
        };
        let stats = memory(&read, 8192).unwrap();
        let usage = stats.usage.unwrap();
        assert_eq!((usage.usage, usage.max_usage, usage.failcnt, usage.limit), (4096, 4096, 3, 8192));
        let swap = stats.swap_usage.unwrap();
        assert_eq!((swap.usage, swap.limit), (5, 100));
        assert_eq!((stats.cache, stats.kernel_usage.unwrap().usage, stats.stats["inactive_file"]), (2048, 77, 12));
        assert_eq!((stats.stats["oom"], stats.stats["oom_kill"]), (1, 1));
        assert!(memory(&|_| None, 8192).is_none());
    }

    #[test]
    fn huge_pages_of_every_size() {
        let read = |file: &str| {
            Some(match file {
                "hugetlb.2MB.current" => "4194304\n".to_string(),
                "hugetlb.2MB.events" => "max 5\n".to_string(),
                "hugetlb.1GB.current" | "hugetlb.64KB.current" => "0\n".to_string(),
                _ => return None,
            })
        };
        let pools = ["hugepages-2048kB", "hugepages-1048576kB", "hugepages-64kB", "hugepages-32768kB", "odd"];
        let stats = huge_pages(&pools.map(ToString::to_string), &read);
        assert_eq!(stats.keys().collect::<Vec<_>>(), ["1GB", "2MB", "64KB"]);
        assert_eq!((stats["2MB"].usage, stats["2MB"].failcnt), (4 << 20, 5));
    }

    #[test]
    fn all_block_devices_count() {
        let stats =
            block_io("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:1 rbytes=9\nnonsense\n0:x a=b\n");
        let bytes: Vec<_> =
            stats.io_service_bytes_recursive.iter().map(|e| (e.major, e.minor, e.op.as_str(), e.value)).collect();
        assert_eq!(bytes, [(254, 0, "Read", 1), (254, 0, "Write", 2), (254, 0, "Discard", 5), (7, 1, "Read", 9)]);
        assert_eq!(stats.io_serviced_recursive.len(), 3);
    }
}
