//! Processes of a container (service `kata.agent.v1.Processes`), from /proc.
//!
//! To read the arguments of a process the kernel reads its memory, which a process can make slow (a mapped file of a
//! file system that it serves itself): callers run this in a child, so that only that call waits.

use crate::fs;
use crate::prelude::*;
use crate::proto::agentext::ProcessInfo;
use crate::sys::{self, Errno, Pid, SysResult};

/// Clock ticks per second in /proc/<pid>/stat: USER_HZ, 100 on every architecture that Linux has today.
const TICKS_PER_SECOND: u64 = 100;
const NS_PER_TICK: u64 = 1_000_000_000 / TICKS_PER_SECOND;
/// The memory page of x86-64 (and of our kernels elsewhere).
const PAGE_SIZE: u64 = 4096;
/// Bytes of arguments that are shown of one process; a container can make them as long as its memory.
const COMMAND_MAX: usize = 16 << 10;
/// Bytes of arguments in one answer, so that it fits into a message.
const COMMANDS_MAX: usize = 2 << 20;

/// Describes processes by their numbers in the guest; those that have ended meanwhile are left out.
pub fn list(pids: &[Pid]) -> Result<Vec<ProcessInfo>> {
    let booted_ns = sys::clock_ns(libc::CLOCK_REALTIME).saturating_sub(sys::clock_ns(libc::CLOCK_BOOTTIME));
    let mut processes = Vec::new();
    let mut bytes = 0;
    for pid in pids {
        let mut process = match read(*pid, booted_ns) {
            Ok(Some(process)) => process,
            // Ended while it was being read.
            Ok(None) | Err(Errno(libc::ENOENT | libc::ESRCH)) => continue,
            Err(e) => return Err(e).with_context(|| format!("read about process {pid}")),
        };
        bytes += process.command.iter().map(Vec::len).sum::<usize>();
        if bytes > COMMANDS_MAX {
            process.command.truncate(1);
        }
        processes.push(process);
    }
    Ok(processes)
}

fn read(pid: Pid, booted_ns: u64) -> SysResult<Option<ProcessInfo>> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    let status = fs::read(format!("/proc/{pid}/status"))?;
    let uid = effective_uid(&status).ok_or(Errno(libc::EPROTO))?;
    let command = read_command(pid)?;
    Ok(parse(&stat, &command).map(|mut process| {
        process.uid = uid;
        process.start_time = process.start_time.saturating_add(booted_ns);
        process
    }))
}

fn read_command(pid: Pid) -> SysResult<Vec<u8>> {
    let file = sys::open(format!("/proc/{pid}/cmdline"), libc::O_RDONLY, 0)?;
    let mut command = Vec::new();
    while command.len() < COMMAND_MAX && sys::read_append(file.raw(), &mut command, 4096)? > 0 {}
    command.truncate(COMMAND_MAX);
    Ok(command)
}

/// From the line "Uid: real effective saved file-system". The owner of /proc/<pid> would be root for any process that
/// may not be dumped.
fn effective_uid(status: &[u8]) -> Option<u32> {
    let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Uid:"))?;
    core::str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// All but the owner, and with the start counted from the boot, from the two files of a process.
fn parse(stat: &[u8], command: &[u8]) -> Option<ProcessInfo> {
    // "pid (name) state ppid ...": the name may hold anything, so the last parenthesis ends it.
    let open = stat.iter().position(|byte| *byte == b'(')?;
    let close = stat.iter().rposition(|byte| *byte == b')')?;
    let name = stat.get(open + 1..close)?;
    let rest = core::str::from_utf8(stat.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // Counted from the state, which is field 3 of proc(5).
    let field = |number: usize| fields.get(number - 3)?.parse::<i64>().ok();
    let ticks = field(14)?.saturating_add(field(15)?);
    let mut arguments: Vec<Vec<u8>> = command.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
    // A NUL ends each argument, so that the last piece is empty; a process may have written over them, though.
    if arguments.last().is_some_and(Vec::is_empty) {
        arguments.pop();
    }
    if arguments.is_empty() {
        arguments.push([b"[", name, b"]"].concat());
    }
    Some(ProcessInfo {
        pid: core::str::from_utf8(&stat[..open]).ok()?.trim().parse().ok()?,
        ppid: u32::try_from(field(4)?).ok()?,
        uid: 0,
        start_time: u64::try_from(field(22)?).ok()?.saturating_mul(NS_PER_TICK),
        cpu_ns: u64::try_from(ticks).ok()?.saturating_mul(NS_PER_TICK),
        rss_bytes: u64::try_from(field(24)?).unwrap_or(0).saturating_mul(PAGE_SIZE),
        tty: terminal(field(7)?),
        command: arguments,
    })
}

/// The name of a terminal from its device number; empty = none.
fn terminal(device: i64) -> String {
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
    match (major, minor) {
        (0, 0) => String::new(),
        // Eight majors of 256 pseudo terminals each, of which Linux uses the first for all.
        (136..=143, _) => format!("pts/{}", (major - 136) * 256 + minor),
        (4, 64..) => format!("ttyS{}", minor - 64),
        (4, _) => format!("tty{minor}"),
        (5, 1) => "console".to_string(),
        (229, _) => format!("hvc{minor}"),
        _ => format!("{major}:{minor}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_difficult_name() {
        let stat =
            b"77 (a) b (c\n) S 5 77 77 34816 77 0 1 2 3 4 150 50 0 0 20 0 1 0 1234 4096 25 18446744073709551615\n";
        let process = parse(stat, b"a b\0-x\0\0").unwrap();
        assert_eq!((process.pid, process.ppid, process.cpu_ns), (77, 5, 2_000_000_000));
        assert_eq!((process.start_time, process.rss_bytes, process.tty.as_str()), (12_340_000_000, 25 << 12, "pts/0"));
        assert_eq!(process.command, [b"a b".to_vec(), b"-x".to_vec(), b"".to_vec()]);
        assert_eq!(parse(stat, b"").unwrap().command, [b"[a) b (c\n]".to_vec()]);
        assert!(parse(b"", b"").is_none() && parse(b"1 (x", b"").is_none() && parse(b"1 )x( S", b"").is_none());
        assert!(parse(b"1 (x) S 1", b"").is_none());
    }

    #[test]
    fn the_effective_user_counts() {
        assert_eq!(effective_uid(b"Name:\tx\nUid:\t1000\t0\t0\t0\n"), Some(0));
        assert_eq!(effective_uid(b"Name:\tUid: 1 2 3\n"), None);
    }

    #[test]
    fn terminals_have_names() {
        let device = |major: i64, minor: i64| minor & 0xff | major << 8 | (minor & !0xff) << 12;
        for (major, minor, name) in [
            (136, 7, "pts/7"),
            (136, 300, "pts/300"),
            (4, 64, "ttyS0"),
            (4, 1, "tty1"),
            (5, 1, "console"),
            (229, 0, "hvc0"),
            (0, 0, ""),
            (9, 9, "9:9"),
        ] {
            assert_eq!(terminal(device(major, minor)), name);
        }
    }

    #[test]
    fn this_process_is_found_and_a_missing_one_left_out() {
        let me = sys::getpid();
        let found = list(&[me, Pid::MAX]).unwrap();
        assert_eq!(found.len(), 1);
        let process = &found[0];
        assert_eq!((process.pid as Pid, process.ppid as Pid, process.uid), (me, sys::getppid(), sys::geteuid()));
        assert!(process.rss_bytes > 0 && process.command[0].starts_with(b"/"));
        let age = sys::clock_ns(libc::CLOCK_REALTIME).abs_diff(process.start_time);
        assert!(age < 3_600_000_000_000, "started an hour ago?");
    }
}
