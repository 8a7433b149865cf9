//! Starts an image's command once, and notes what it does: processes, files, names, connections.
//!
//! The machine has no network. A resolver of our own answers each name with an address from the block for benchmarks, so
//! that the program goes on to connect, which fails and is noted.
//!
//! Sources: ptrace(2), RFC 1035, RFC 2544.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::CString;
use std::io::Read;
use std::net::UdpSocket;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::configuration;
use crate::json::{shown, Value, Writer};
use crate::secrets;

const MAX_ROWS: usize = 500;
const MAX_OUTPUT: usize = 8 << 10;

#[derive(Default)]
struct Seen {
    processes: Vec<(i32, i32, String)>,
    files: BTreeMap<String, BTreeSet<&'static str>>,
    connections: BTreeSet<String>,
    truncated: bool,
}

/// The questions that come to 127.0.0.1:53.
fn resolver(names: Arc<Mutex<BTreeSet<String>>>) {
    let Ok(socket) = UdpSocket::bind("127.0.0.1:53") else { return };
    std::thread::spawn(move || {
        let mut packet = [0; 1500];
        while let Ok((size, from)) = socket.recv_from(&mut packet) {
            let Some((name, end, kind)) = question(&packet[..size]) else { continue };
            if let Ok(mut all) = names.lock() {
                if all.len() < MAX_ROWS {
                    all.insert(name);
                }
            }
            let mut answer = packet[..end].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(kind == 1), 0, 0, 0, 0]);
            if kind == 1 {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 18, 0, 1]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
}

/// The name, the end of the question and its type.
fn question(packet: &[u8]) -> Option<(String, usize, u16)> {
    let mut at = 12;
    let mut name = Vec::new();
    loop {
        let length = usize::from(*packet.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        if length > 63 || name.len() > 255 {
            return None;
        }
        if !name.is_empty() {
            name.push(b'.');
        }
        name.extend(packet.get(at..at + length)?);
        at += length;
    }
    let kind = u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?);
    packet.get(at..at + 4)?;
    Some((shown(&name, 255), at + 4, kind))
}

/// Bytes of a stopped process's memory, as many as there are. (The small kernel has no `process_vm_readv`.)
fn memory(pid: i32, address: u64, size: usize) -> Vec<u8> {
    let mut data = vec![0_u8; size];
    let done = std::fs::File::open(format!("/proc/{pid}/mem")).and_then(|file| file.read_at(&mut data, address));
    data.truncate(done.unwrap_or(0));
    data
}

fn string(pid: i32, address: u64) -> String {
    let data = memory(pid, address, 400);
    shown(data.split(|byte| *byte == 0).next().unwrap_or_default(), 400)
}

impl Seen {
    fn file(&mut self, path: String, what: &'static str) {
        if path.is_empty() || self.files.len() >= MAX_ROWS && !self.files.contains_key(&path) {
            self.truncated |= !path.is_empty();
            return;
        }
        self.files.entry(path).or_default().insert(what);
    }

    fn call(&mut self, pid: i32, regs: &libc::user_regs_struct) {
        const WRITES: u64 = (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) as u64;
        let (a, b, c) = (regs.rdi, regs.rsi, regs.rdx);
        match regs.orig_rax as i64 {
            libc::SYS_open if b & WRITES != 0 => self.file(string(pid, a), "written"),
            libc::SYS_openat if c & WRITES != 0 => self.file(string(pid, b), "written"),
            libc::SYS_creat | libc::SYS_truncate => self.file(string(pid, a), "written"),
            libc::SYS_unlink | libc::SYS_rmdir => self.file(string(pid, a), "removed"),
            libc::SYS_unlinkat => self.file(string(pid, b), "removed"),
            libc::SYS_mkdir | libc::SYS_mknod => self.file(string(pid, a), "made"),
            libc::SYS_mkdirat | libc::SYS_mknodat => self.file(string(pid, b), "made"),
            libc::SYS_rename | libc::SYS_link | libc::SYS_symlink => self.file(string(pid, b), "made"),
            libc::SYS_renameat | libc::SYS_renameat2 | libc::SYS_linkat => self.file(string(pid, regs.r10), "made"),
            libc::SYS_chmod | libc::SYS_chown | libc::SYS_lchown => self.file(string(pid, a), "changed"),
            libc::SYS_fchmodat | libc::SYS_fchownat => self.file(string(pid, b), "changed"),
            libc::SYS_connect => self.address("connects to", &memory(pid, b, (c as usize).min(128))),
            libc::SYS_bind => self.address("listens at", &memory(pid, b, (c as usize).min(128))),
            libc::SYS_sendto if regs.r8 != 0 => {
                self.address("sends to", &memory(pid, regs.r8, (regs.r9 as usize).min(128)));
            }
            _ => {}
        }
    }

    fn address(&mut self, what: &str, data: &[u8]) {
        if data.len() < 4 || self.connections.len() >= MAX_ROWS {
            self.truncated |= data.len() >= 4;
            return;
        }
        let port = u16::from_be_bytes([data[2], data[3]]);
        let text = match i32::from(u16::from_le_bytes([data[0], data[1]])) {
            libc::AF_INET if data.len() >= 8 => {
                format!("{}:{port}", std::net::Ipv4Addr::new(data[4], data[5], data[6], data[7]))
            }
            libc::AF_INET6 if data.len() >= 24 => {
                let octets: [u8; 16] = data[8..24].try_into().unwrap_or_default();
                format!("[{}]:{port}", std::net::Ipv6Addr::from(octets))
            }
            libc::AF_UNIX => {
                let name = data[2..].strip_prefix(b"\0").unwrap_or(&data[2..]);
                format!("unix:{}", shown(name.split(|byte| *byte == 0).next().unwrap_or_default(), 200))
            }
            _ => return,
        };
        self.connections.insert(format!("{what} {text}"));
    }

    fn executed(&mut self, pid: i32, parent: i32) {
        if self.processes.len() >= MAX_ROWS {
            self.truncated = true;
            return;
        }
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<String> = line
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty())
            .take(40)
            .map(|word| shown(word, 200))
            .collect();
        self.processes.push((pid, parent, words.join(" ").chars().take(1000).collect()));
    }
}

fn strings(words: &[String]) -> Vec<CString> {
    words.iter().filter_map(|word| CString::new(word.as_bytes()).ok()).collect()
}

/// The numbers of the user of a configuration, by the image's own files.
fn user(config: &Value) -> (u32, u32) {
    let text = config.get("config").get("User").text().to_string();
    let (name, group) = text.split_once(':').unwrap_or((&text, ""));
    let find = |file: &str, name: &str, field: usize| {
        std::fs::read_to_string(file).ok()?.lines().find_map(|line| {
            let row: Vec<&str> = line.split(':').collect();
            (row.first() == Some(&name)).then(|| row.get(field)?.parse().ok())?
        })
    };
    let uid = name.parse().ok().or_else(|| find("/etc/passwd", name, 2)).unwrap_or(0);
    let gid = group.parse().ok().or_else(|| find("/etc/group", group, 2)).or_else(|| find("/etc/passwd", name, 3));
    (uid, gid.unwrap_or(0))
}

/// Start the command of `config` in what is now the root directory, and write what it did.
pub fn run(out: &mut Writer, config: &Value, seconds: u64) {
    let names = Arc::new(Mutex::new(BTreeSet::new()));
    resolver(names.clone());
    let _ = std::fs::create_dir_all("/etc");
    let _ = std::fs::remove_file("/etc/resolv.conf");
    let _ = std::fs::write("/etc/resolv.conf", "nameserver 127.0.0.1\n");
    let (mut seen, began) = (Seen::default(), Instant::now());
    let mut captured = Vec::new();
    let (status, ended) = traced(config, seconds, &mut seen, &mut captured);
    out.open('{');
    for (key, number) in [("seconds", began.elapsed().as_secs() as i64), ("status", status)] {
        out.key(key);
        out.number(number);
    }
    out.key("ended");
    out.text(&ended);
    out.key("processes");
    out.open('[');
    for (pid, parent, command) in &seen.processes {
        out.open('{');
        for (key, number) in [("pid", *pid), ("parent", *parent)] {
            out.key(key);
            out.number(i64::from(number));
        }
        out.key("command");
        out.text(&secrets::masked(command, true));
        out.close('}');
    }
    out.close(']');
    out.key("files");
    out.open('[');
    for (path, what) in &seen.files {
        out.open('{');
        out.key("path");
        out.text(path);
        out.key("what");
        out.text(&what.iter().copied().collect::<Vec<_>>().join(", "));
        out.close('}');
    }
    out.close(']');
    for (key, set) in [
        ("names", &*names.lock().unwrap_or_else(std::sync::PoisonError::into_inner)),
        ("connections", &seen.connections),
    ] {
        out.key(key);
        out.open('[');
        for text in set {
            out.text(text);
        }
        out.close(']');
    }
    out.key("output");
    out.text(&secrets::masked(&shown(&captured, MAX_OUTPUT), true));
    out.key("truncated");
    out.flag(seen.truncated);
    out.close('}');
}

fn traced(config: &Value, seconds: u64, seen: &mut Seen, captured: &mut Vec<u8>) -> (i64, String) {
    let command = strings(&configuration::command(config));
    if command.is_empty() {
        return (127, "the image has no command".into());
    }
    let inner = config.get("config");
    let mut variables: Vec<String> = inner.get("Env").list().iter().map(|item| item.text().to_string()).collect();
    if !variables.iter().any(|item| item.starts_with("PATH=")) {
        variables.push("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    }
    let environment = strings(&variables);
    let directory = inner.get("WorkingDir").text();
    let directory = CString::new(if directory.is_empty() { "/" } else { directory }).unwrap_or_default();
    let (uid, gid) = user(config);
    let mut arguments: Vec<*const libc::c_char> = command.iter().map(|word| word.as_ptr()).collect();
    arguments.push(std::ptr::null());
    let mut variables: Vec<*const libc::c_char> = environment.iter().map(|word| word.as_ptr()).collect();
    variables.push(std::ptr::null());
    let mut ends = [0; 2];
    // SAFETY: an array of two for the ends of the pipe.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return (125, "no pipe could be made".into());
    }
    // SAFETY: between fork and execve the child makes system calls only, on memory that was prepared above.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as said; every pointer is to memory of the parent's copy.
        unsafe {
            libc::dup2(ends[1], 1);
            libc::dup2(ends[1], 2);
            let nothing = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY);
            libc::dup2(nothing.max(0), 0);
            libc::setsid();
            libc::chdir(directory.as_ptr());
            libc::setgroups(0, std::ptr::null());
            libc::setgid(gid);
            libc::setuid(uid);
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
            libc::execvpe(arguments[0], arguments.as_ptr(), variables.as_ptr());
            libc::_exit(127);
        }
    }
    // SAFETY: the writing end belongs to the child alone from now on, the reading end to the thread.
    let mut reader = unsafe {
        libc::close(ends[1]);
        std::fs::File::from_raw_fd(ends[0])
    };
    let output = Arc::new(Mutex::new(Vec::new()));
    let into = output.clone();
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(done @ 1..) = reader.read(&mut piece) {
            if let Ok(mut all) = into.lock() {
                if all.len() < 2 * MAX_OUTPUT {
                    all.extend_from_slice(&piece[..done]);
                }
            }
        }
    });
    let outcome = follow(child, Duration::from_secs(seconds), seen);
    std::thread::sleep(Duration::from_millis(50));
    captured.clone_from(&*output.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    outcome
}

fn follow(child: i32, limit: Duration, seen: &mut Seen) -> (i64, String) {
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEEXEC
        | libc::PTRACE_O_EXITKILL;
    let end = Instant::now() + limit;
    let mut parents: HashMap<i32, i32> = HashMap::new();
    let mut entering: HashMap<i32, bool> = HashMap::new();
    let mut is_known = BTreeSet::new();
    loop {
        let mut status = 0;
        // SAFETY: a place for the status.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if Instant::now() > end {
            for one in is_known.iter().chain([&child]) {
                // SAFETY: a number; whoever has ended has not been replaced, being our own child.
                unsafe { libc::kill(*one, libc::SIGKILL) };
            }
            return (-1, format!("it was still running after {} s, and was ended", limit.as_secs()));
        }
        if pid == 0 {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        }
        if pid < 0 {
            return (-1, "it was lost".into());
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            is_known.remove(&pid);
            if pid == child {
                if libc::WIFSIGNALED(status) {
                    let number = i64::from(libc::WTERMSIG(status));
                    return (128 + number, format!("signal {number} ended it"));
                }
                let number = i64::from(libc::WEXITSTATUS(status));
                return (number, format!("it ended with status {number}"));
            }
            continue;
        }
        if !libc::WIFSTOPPED(status) {
            continue;
        }
        if is_known.insert(pid) {
            // SAFETY: numbers only.
            unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, options) };
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        let mut deliver = 0;
        if signal == libc::SIGTRAP | 0x80 {
            let enters = entering.entry(pid).or_insert(true);
            if *enters {
                // SAFETY: a structure of numbers, which the kernel fills.
                let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
                // SAFETY: the place for the registers outlives the call.
                if unsafe { libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut regs) } == 0 {
                    seen.call(pid, &regs);
                }
            }
            *enters = !*enters;
        } else if signal == libc::SIGTRAP && event == libc::PTRACE_EVENT_EXEC {
            entering.insert(pid, false);
            seen.executed(pid, parents.get(&pid).copied().unwrap_or(0));
        } else if signal == libc::SIGTRAP && event != 0 {
            let mut new: libc::c_ulong = 0;
            // SAFETY: a place for the number of the new process.
            unsafe { libc::ptrace(libc::PTRACE_GETEVENTMSG, pid, 0, &raw mut new) };
            parents.insert(new as i32, pid);
        } else if signal != libc::SIGSTOP && signal != libc::SIGTRAP {
            deliver = signal;
        }
        // SAFETY: numbers only.
        unsafe { libc::ptrace(libc::PTRACE_SYSCALL, pid, 0, deliver) };
    }
}

#[cfg(test)]
mod tests {
    use super::question;

    #[test]
    fn questions() {
        let mut packet = vec![0; 12];
        packet.extend(b"\x07example\x03org\0\0\x01\0\x01");
        assert_eq!(question(&packet), Some(("example.org".into(), 29, 1)));
        for length in 0..packet.len() {
            assert_eq!(question(&packet[..length]), None);
        }
    }
}
