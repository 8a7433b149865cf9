//! Ends containers that thrash at their memory limit without being killed by the kernel.
//!
//! As long as reclaim frees a single page the kernel does not call it out of memory. If all of a container's memory is
//! anonymous except its program's pages, those are reclaimed over and over: each page fault evicts a page that is
//! needed next and has to be read again from the image or the share. On a host such pages are mostly charged to other
//! groups; in a guest they are the container's own, and where each read takes a while the kernel declares the group out
//! of memory after minutes, or never. So the agent does what the kernel would do in the end: it kills the process that
//! the kernel would choose, and reports that as an OOM kill.

use crate::cgroup::Cgroup;
use crate::cgroup_stats::value_of;
use crate::fs;
use crate::log;
use crate::prelude::*;
use crate::sys::{self, Pid};

/// The shortest time between two looks: the kernel announces up to a hundred times a second that a limit was hit.
pub const LOOK_NS: u64 = 200_000_000;
/// How long a container is observed before it can count as stuck.
const WINDOW_NS: u64 = 3_000_000_000;
/// It is stuck if all its processes waited for memory during this part of the time (a program that only reads its own
/// pages again and again reaches 40 to 60: the reading itself is not counted as waiting),
const STALLED_PERCENT: u64 = 25;
/// and if its pages of files were, on average, evicted and read again this many times.
const TURNOVERS: u64 = 16;
const PAGE: u64 = 4096;
/// Reclaimable memory up to this part of the limit (1/64) counts as none.
const RECLAIMABLE_PART: u64 = 64;

/// An observation of a container that is at its limit with nothing to reclaim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Squeeze {
    /// When (CLOCK_MONOTONIC).
    at_ns: u64,
    /// For how long all its processes have waited for memory so far (Documentation/accounting/psi.rst).
    stalled_us: u64,
    /// Pages of files that were read again after eviction, so far.
    refaults: u64,
    /// Bytes of files that it has.
    file: u64,
}

/// Compares two observations of a container: the one to keep, and whether it is stuck.
fn step(before: Option<Squeeze>, now: Option<Squeeze>) -> (Option<Squeeze>, bool) {
    let (Some(before), Some(now)) = (before, now) else { return (now, false) };
    let elapsed_ns = now.at_ns.saturating_sub(before.at_ns);
    if elapsed_ns < WINDOW_NS {
        return (Some(before), false);
    }
    let waited_ns = now.stalled_us.saturating_sub(before.stalled_us).saturating_mul(1000);
    let read_again = now.refaults.saturating_sub(before.refaults).saturating_mul(PAGE);
    let is_stuck = waited_ns >= elapsed_ns / 100 * STALLED_PERCENT && read_again >= now.file.max(PAGE) * TURNOVERS;
    (Some(now), is_stuck)
}

/// Bytes of swap that a group may still fill, of `free` in the guest. With some, its anonymous memory can be reclaimed:
/// it is slow, not stuck. `read` gives a file of the group.
fn swap_room(free: u64, read: &dyn Fn(&str) -> Option<String>) -> u64 {
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let Some(limit) = number("memory.swap.max") else { return free }; // "max", or a kernel that keeps no count
    limit.saturating_sub(number("memory.swap.current").unwrap_or(0)).min(free)
}

/// Looks at a group at `at_ns`; nothing if it is not at its limit, or has something to reclaim. `read` gives a file of
/// the group, `free_swap` the guest's free swap in bytes.
fn look(at_ns: u64, read: &dyn Fn(&str) -> Option<String>, free_swap: &dyn Fn() -> u64) -> Option<Squeeze> {
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let limit = number("memory.max")?; // "max" is no number
    if number("memory.current")?.saturating_add(limit / RECLAIMABLE_PART) < limit {
        return None;
    }
    let stat = read("memory.stat")?;
    let value = |key| value_of(&stat, key).unwrap_or(0);
    let file = value("file").saturating_sub(value("shmem"));
    if file > limit / RECLAIMABLE_PART || swap_room(free_swap(), read) > limit / RECLAIMABLE_PART {
        return None;
    }
    let pressure = read("memory.pressure")?;
    let full = pressure.lines().find_map(|line| line.strip_prefix("full "))?;
    let stalled_us = full.split(' ').find_map(|word| word.strip_prefix("total="))?.parse().ok()?;
    Some(Squeeze { at_ns, stalled_us, refaults: value("workingset_refault_file"), file })
}

/// The process that the kernel would kill: the one with the highest score, if it may be killed at all.
fn victim(pids: &[Pid]) -> Option<Pid> {
    let read = |pid: Pid, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
    let number = |text: Option<String>| text.and_then(|text| text.trim().parse::<i64>().ok());
    let may = |pid: &Pid| number(read(*pid, "oom_score_adj")).is_some_and(|adjustment| adjustment > -1000);
    pids.iter().copied().filter(may).max_by_key(|pid| number(read(*pid, "oom_score")).unwrap_or(0))
}

/// Kills what the kernel would kill; false if there is nothing to kill.
fn kill(cgroup: &Cgroup) -> Result<bool> {
    let whole = fs::read_to_string(format!("{}/memory.oom.group", cgroup.path())).is_ok_and(|text| text.trim() == "1");
    if whole {
        return cgroup.kill_all().map(|()| true);
    }
    match victim(&cgroup.pids()?) {
        Some(pid) => sys::kill(pid, libc::SIGKILL).context("kill a process").map(|()| true),
        None => Ok(false),
    }
}

/// Looks at a container at `now_ns` (CLOCK_MONOTONIC) and kills a process if it is stuck; whether one was killed.
/// `squeeze` is the former observation, and becomes the present one.
pub fn check(id: &str, cgroup: &Cgroup, squeeze: &mut Option<Squeeze>, now_ns: u64) -> bool {
    let read = |file: &str| fs::read_to_string(format!("{}/{file}", cgroup.path())).ok();
    let (seen, is_stuck) = step(*squeeze, look(now_ns, &read, &|| fs::meminfo("SwapFree").unwrap_or(0)));
    *squeeze = seen;
    is_stuck
        && kill(cgroup).unwrap_or_else(|e| {
            log::error(&format!("container {id} is stuck at its memory limit: {}", e.message));
            false
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(seconds: u64, stalled_ms: u64, refaults: u64) -> Option<Squeeze> {
        Some(Squeeze { at_ns: seconds * 1_000_000_000, stalled_us: stalled_ms * 1000, refaults, file: 2 * PAGE })
    }

    #[test]
    fn only_a_container_that_waits_and_reads_the_same_again_is_stuck() {
        assert_eq!(step(None, None), (None, false));
        let first = seen(10, 1000, 500);
        assert_eq!(step(None, first), (first, false));
        assert_eq!(step(first, seen(12, 3000, 9000)), (first, false)); // not long enough yet
        assert_eq!(step(first, seen(13, 2000, 532)), (seen(13, 2000, 532), true));
        assert!(!step(first, seen(13, 1700, 9000)).1); // it makes progress
        assert!(!step(first, seen(13, 4000, 531)).1); // what it reads is new
        assert_eq!(step(first, None), (None, false)); // it has room again
    }

    fn group(max: &str, current: &str, file: u64, shmem: u64) -> Option<Squeeze> {
        let read = |name: &str| match name {
            "memory.max" => Some(format!("{max}\n")),
            "memory.current" => Some(format!("{current}\n")),
            "memory.stat" => Some(format!("anon 1\nfile {file}\nshmem {shmem}\nworkingset_refault_file 5\n")),
            "memory.pressure" => {
                Some("some avg10=0.00 total=9\nfull avg10=1.00 avg60=0.0 avg300=0.0 total=77\n".into())
            }
            _ => None,
        };
        look(3, &read, &|| 0)
    }

    #[test]
    fn a_container_with_room_or_with_pages_to_give_up_is_not_looked_at() {
        let squeezed = |file| Some(Squeeze { at_ns: 3, stalled_us: 77, refaults: 5, file });
        assert_eq!(group("6400", "6400", 90, 0), squeezed(90));
        assert_eq!(group("6400", "6310", 90, 0), squeezed(90));
        assert_eq!(group("6400", "6200", 90, 0), None);
        assert_eq!(group("6400", "6400", 200, 0), None);
        assert_eq!(group("6400", "6400", 200, 150), squeezed(50)); // shared memory cannot be reclaimed
        assert_eq!(group("max", "6400", 0, 0), None);
        assert_eq!(look(3, &|_| None, &|| 0), None);
    }

    #[test]
    fn a_container_that_can_still_swap_is_not_looked_at() {
        let with = |swap_max: &'static str, used: &'static str, free: u64| {
            let read = move |name: &str| {
                let text = match name {
                    "memory.max" | "memory.current" => "6400\n",
                    "memory.stat" => "file 10\nshmem 0\nworkingset_refault_file 5\n",
                    "memory.pressure" => "full avg10=1.00 avg60=0.0 avg300=0.0 total=77\n",
                    "memory.swap.max" if !swap_max.is_empty() => swap_max,
                    "memory.swap.current" if !used.is_empty() => used,
                    _ => return None,
                };
                Some(text.to_string())
            };
            look(3, &read, &|| free).is_some()
        };
        assert!(!with("max\n", "0\n", 5000), "no limit but the guest's swap");
        assert!(!with("", "", 5000), "a kernel that keeps no count of swap");
        assert!(!with("900\n", "700\n", 5000));
        assert!(with("900\n", "850\n", 5000), "its share is full");
        assert!(with("0\n", "0\n", 5000), "it may have none");
        assert!(with("max\n", "0\n", 0), "the guest has none");
    }

    #[test]
    fn the_victim_is_one_that_may_be_killed() {
        let own = sys::getpid();
        assert_eq!(victim(&[own]), Some(own));
        assert_eq!(victim(&[i32::MAX]), None);
        assert_eq!(victim(&[]), None);
    }
}
