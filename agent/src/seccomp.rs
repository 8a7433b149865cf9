//! Compiles a container's seccomp profile (OCI runtime spec, `linux.seccomp`) to classic BPF and installs it.
//!
//! The result is what libseccomp and runc make of the same profile:
//!
//! * Names that an ABI does not have are skipped, so one profile serves many kernels.
//! * Several rules for one call: an unconditional one beats those with arguments; otherwise the first that matches
//!   counts. A rule whose action is the default action anyway is left out first, as runc does.
//! * All arguments of one rule must match, unless two conditions are about the same argument: then each condition is a
//!   rule of its own. That is what runc and crun do, and profiles are written for them.
//! * What no rule is for has the default action, with the profile's error number for it, EPERM without one.
//! * An ABI whose architecture is not listed is killed; the native one counts as listed.
//! * When the default is not permissive, calls numbered above everything that the profile names fail with ENOSYS
//!   (runc's "ENOSYS stub"): a libc that probes for a call newer than the profile then takes its fall-back.

use crate::prelude::*;
use crate::proto::oci::{LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};
use crate::sort::sort;
use crate::sys;
use crate::syscall;
use crate::syscalls::{numbers, Numbers};
use libc::sock_filter;

const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

/// The kernel's largest error number.
const MAX_ERRNO: u32 = 4095;
/// The kernel's limit of one classic BPF program (BPF_MAXINSNS).
const MAX_INSTRUCTIONS: usize = 4096;
/// x32 calls have the native architecture and this bit in their number.
const X32_BIT: u32 = 0x4000_0000;

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH_NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH_NATIVE: u32 = 0xc000_00b7;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;

// Instruction codes (linux/bpf_common.h).
const LD_ABS: u16 = 0x20;
const AND_K: u16 = 0x54;
const JA: u16 = 0x05;
const JEQ_K: u16 = 0x15;
const JGT_K: u16 = 0x25;
const JGE_K: u16 = 0x35;
const RET_K: u16 = 0x06;

// Offsets in struct seccomp_data; each argument is 8 bytes, low word first on the little-endian machines we know.
const DATA_NR: u32 = 0;
const DATA_ARCH: u32 = 4;
const DATA_ARGS: u32 = 16;

/// A condition on one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Condition {
    index: u32,
    test: Test,
    value: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Test {
    Ne,
    Lt,
    Le,
    Eq,
    Ge,
    Gt,
    /// `arg & mask == value`
    Masked(u64),
}

/// One entry of the profile, or one of the ways in which i386 reaches a call of it.
struct Rule {
    action: u32,
    conditions: Vec<Condition>,
}

/// The calls of one ABI that have rules: (number, index of the rule), sorted. And the highest number that the profile
/// mentions.
#[derive(Default)]
struct Table {
    calls: Vec<(u32, usize)>,
    highest: Option<u32>,
}

/// What happens to a range of call numbers.
#[derive(Clone, Copy)]
enum Leaf<'a> {
    Action(u32),
    Rules(&'a [(u32, usize)]),
}

/// Start of a range, and what happens there.
type Point<'a> = (u32, Leaf<'a>);

/// Compiles a profile. Errors name the action, operator, flag or architecture that is not understood.
pub fn compile(profile: &LinuxSeccomp) -> Result<Vec<sock_filter>> {
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let listed = architectures(&profile.architectures)?;
    let permissive = matches!(default & 0xffff_0000, RET_ALLOW | RET_LOG | RET_TRACE);
    let above = |table: &Table| match table.highest {
        Some(_) if !permissive => RET_ERRNO | libc::ENOSYS as u32,
        _ => default,
    };

    let Profile { rules, native, x86, x32 } = collect(&profile.syscalls, default, &listed)?;
    let compiler = Compiler { rules: &rules, default };
    let mut points = Vec::new();
    compiler.lay_out(&mut points, 0, &native, above(&native));
    if cfg!(target_arch = "x86_64") {
        if listed.x32 {
            compiler.lay_out(&mut points, X32_BIT, &x32, above(&x32));
        } else if permissive {
            points.push((X32_BIT, Leaf::Action(RET_KILL_THREAD)));
            // -1 is a tracer's way of skipping a call, not an x32 call.
            points.push((u32::MAX, Leaf::Action(default)));
        }
    }

    let mut program = vec![load(DATA_ARCH)];
    compiler.section(&mut program, AUDIT_ARCH_NATIVE, &points, true)?;
    if listed.x86 {
        points.clear();
        compiler.lay_out(&mut points, 0, &x86, above(&x86));
        compiler.section(&mut program, AUDIT_ARCH_I386, &points, false)?;
    }
    program.push(ret(RET_KILL_THREAD));
    if program.len() > MAX_INSTRUCTIONS {
        return Err(Error::invalid(format!(
            "linux.seccomp: the profile compiles to {} instructions, the kernel takes {MAX_INSTRUCTIONS}",
            program.len()
        )));
    }
    Ok(program)
}

/// `linux.seccomp.flags` as the kernel's bits.
pub fn flags(names: &[String]) -> Result<u32> {
    names.iter().try_fold(0, |set, name| match name.as_str() {
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(set | 1),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(set | 2),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(set | 4),
        // WAIT_KILLABLE_RECV belongs to SCMP_ACT_NOTIFY.
        _ => Err(Error::invalid(format!("linux.seccomp.flags: {name:?} is not supported"))),
    })
}

/// Puts the calling thread under the filter. It must hold no_new_privs or CAP_SYS_ADMIN.
pub fn install(program: &[sock_filter], flags: u32) -> Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| Error::internal("the seccomp program is too long"))?;
    let header = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the header describes `program`, which outlives the call; the kernel only reads both.
    unsafe { syscall!(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const header) }.map(drop).map_err(
        |e: sys::Errno| match e.0 {
            libc::ENOSYS => Error::unimplemented("this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)"),
            _ => Error::internal(format!("install the seccomp filter: {e}")),
        },
    )
}

#[derive(Default)]
struct Listed {
    x86: bool,
    x32: bool,
}

/// Which foreign ABIs of this machine are listed. Those of other machines can never occur and are skipped.
fn architectures(names: &[String]) -> Result<Listed> {
    const OTHERS: &[&str] = &[
        "ARM",
        "AARCH64",
        "LOONGARCH64",
        "M68K",
        "MIPS",
        "MIPS64",
        "MIPS64N32",
        "MIPSEL",
        "MIPSEL64",
        "MIPSEL64N32",
        "PARISC",
        "PARISC64",
        "PPC",
        "PPC64",
        "PPC64LE",
        "RISCV64",
        "S390",
        "S390X",
        "SH",
        "SHEB",
        "X86_64",
    ];
    let mut listed = Listed::default();
    for name in names {
        match name.strip_prefix("SCMP_ARCH_") {
            Some("X86") => listed.x86 = cfg!(target_arch = "x86_64"),
            Some("X32") => listed.x32 = cfg!(target_arch = "x86_64"),
            Some(other) if OTHERS.contains(&other) => {}
            _ => return Err(Error::invalid(format!("linux.seccomp.architectures: {name:?} is unknown"))),
        }
    }
    Ok(listed)
}

/// An action's return value for the kernel.
fn action(name: &str, errno: Option<u32>) -> Result<u32> {
    let number = errno.unwrap_or(libc::EPERM as u32);
    if number > MAX_ERRNO {
        return Err(Error::invalid(format!("linux.seccomp: errnoRet {number} is above {MAX_ERRNO}")));
    }
    let plain = match name {
        "SCMP_ACT_ERRNO" => return Ok(RET_ERRNO | number),
        "SCMP_ACT_TRACE" => return Ok(RET_TRACE | number),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => RET_KILL_PROCESS,
        "SCMP_ACT_TRAP" => RET_TRAP,
        "SCMP_ACT_LOG" => RET_LOG,
        "SCMP_ACT_ALLOW" => RET_ALLOW,
        "SCMP_ACT_NOTIFY" => {
            return Err(Error::unimplemented("linux.seccomp: SCMP_ACT_NOTIFY is not supported inside a VM"));
        }
        _ => return Err(Error::invalid(format!("linux.seccomp: unknown action {name:?}"))),
    };
    match errno {
        // Some hosts send 0 for "not given".
        None | Some(0) => Ok(plain),
        Some(_) => Err(Error::invalid(format!("linux.seccomp: {name} takes no errnoRet"))),
    }
}

fn condition(arg: &LinuxSeccompArg) -> Result<Condition> {
    let index = u32::try_from(arg.index)
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| Error::invalid(format!("linux.seccomp: argument index {} is not in 0..=5", arg.index)))?;
    let (test, value) = match arg.op.as_str() {
        "SCMP_CMP_NE" => (Test::Ne, arg.value),
        "SCMP_CMP_LT" => (Test::Lt, arg.value),
        "SCMP_CMP_LE" => (Test::Le, arg.value),
        "SCMP_CMP_EQ" => (Test::Eq, arg.value),
        "SCMP_CMP_GE" => (Test::Ge, arg.value),
        "SCMP_CMP_GT" => (Test::Gt, arg.value),
        // OCI: `value` is the mask, `valueTwo` what must remain.
        "SCMP_CMP_MASKED_EQ" => (Test::Masked(arg.value), arg.value_two),
        op => return Err(Error::invalid(format!("linux.seccomp: unknown operator {op:?}"))),
    };
    Ok(Condition { index, test, value })
}

/// The rules of a profile and, per ABI, which calls they are for.
struct Profile {
    rules: Vec<Rule>,
    native: Table,
    x86: Table,
    x32: Table,
}

fn collect(syscalls: &[LinuxSyscall], default: u32, listed: &Listed) -> Result<Profile> {
    let mut rules = Vec::new();
    let (mut native, mut x86, mut x32) = (Table::default(), Table::default(), Table::default());
    for entry in syscalls {
        let action = action(&entry.action, entry.errnoret)?;
        let conditions = entry.args.iter().map(condition).collect::<Result<Vec<_>>>()?;
        let plain = conditions.is_empty();
        let first = rules.len();
        rules.extend(alternatives(conditions).into_iter().map(|conditions| Rule { action, conditions }));
        let own = first..rules.len();
        for name in &entry.names {
            let found: Numbers = numbers(name);
            for (table, number) in [(&mut native, found.native), (&mut x86, found.x86), (&mut x32, found.x32)] {
                table.highest = table.highest.max(number);
                if let Some(number) = number.filter(|_| action != default) {
                    table.calls.extend(own.clone().map(|at| (number, at)));
                }
            }
            // The arguments proper of a multiplexed call are behind a pointer: a rule that looks at them cannot be
            // expressed there, and is held against the direct call only (libseccomp has the same limit).
            if listed.x86 && plain && action != default {
                if let Some((number, sub_call)) = multiplexed(name) {
                    x86.calls.push((number, rules.len()));
                    let conditions = vec![Condition { index: 0, test: Test::Eq, value: sub_call }];
                    rules.push(Rule { action, conditions });
                }
            }
        }
    }
    for table in [&mut native, &mut x86, &mut x32] {
        sort(&mut table.calls);
    }
    Ok(Profile { rules, native, x86, x32 })
}

/// The conditions of an entry's rules: one rule with all of them, or one rule for each where two share an argument.
fn alternatives(conditions: Vec<Condition>) -> Vec<Vec<Condition>> {
    let shared = |at: usize| conditions[..at].iter().any(|before| before.index == conditions[at].index);
    if (1..conditions.len()).any(shared) {
        conditions.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![conditions]
    }
}

/// i386 reaches sockets and System V IPC also through `socketcall` (102) and `ipc` (117), by number.
fn multiplexed(name: &str) -> Option<(u32, u64)> {
    const SOCKETCALL: &[&str] = &[
        "socket",
        "bind",
        "connect",
        "listen",
        "accept",
        "getsockname",
        "getpeername",
        "socketpair",
        "send",
        "recv",
        "sendto",
        "recvfrom",
        "shutdown",
        "setsockopt",
        "getsockopt",
        "sendmsg",
        "recvmsg",
        "accept4",
        "recvmmsg",
        "sendmmsg",
    ];
    const IPC: &[(&str, u64)] = &[
        ("semop", 1),
        ("semget", 2),
        ("semctl", 3),
        ("semtimedop", 4),
        ("msgsnd", 11),
        ("msgrcv", 12),
        ("msgget", 13),
        ("msgctl", 14),
        ("shmat", 21),
        ("shmdt", 22),
        ("shmget", 23),
        ("shmctl", 24),
    ];
    if let Some(at) = SOCKETCALL.iter().position(|known| *known == name) {
        return Some((102, at as u64 + 1));
    }
    IPC.iter().find(|(known, _)| *known == name).map(|(_, call)| (117, *call))
}

struct Compiler<'a> {
    rules: &'a [Rule],
    default: u32,
}

impl<'a> Compiler<'a> {
    /// Appends the ranges of one table to `points`, from `base` upwards; `above` is for numbers beyond the highest.
    fn lay_out(&self, points: &mut Vec<Point<'a>>, base: u32, table: &'a Table, above: u32) {
        let mut push = |start: u32, leaf: Leaf<'a>| match (points.last(), leaf) {
            // Neighbours with the same outcome are one range.
            (Some((_, Leaf::Action(last))), Leaf::Action(action)) if *last == action => {}
            _ => points.push((start, leaf)),
        };
        let mut next = base;
        for calls in table.calls.chunk_by(|a, b| a.0 == b.0) {
            let number = base + calls[0].0;
            if number > next {
                push(next, Leaf::Action(self.default));
            }
            let unconditional = calls.iter().map(|(_, at)| &self.rules[*at]).find(|rule| rule.conditions.is_empty());
            push(number, unconditional.map_or(Leaf::Rules(calls), |rule| Leaf::Action(rule.action)));
            next = number + 1;
        }
        // The highest number may belong to a call that only has the default action.
        let end = table.highest.map_or(next, |highest| base + highest + 1);
        if end > next {
            push(next, Leaf::Action(self.default));
        }
        push(end.max(next), Leaf::Action(above));
    }

    /// Appends "if the architecture is `arch`, decide by number"; otherwise execution falls to what comes after.
    fn section(&self, program: &mut Vec<sock_filter>, arch: u32, points: &[Point], wide: bool) -> Result<()> {
        program.push(jump(JEQ_K, arch, 1, 0));
        let skip = program.len();
        program.push(load(DATA_NR));
        program.push(load(DATA_NR));
        self.tree(program, points, wide)?;
        program[skip] = jump(JA, (program.len() - skip - 1) as u32, 0, 0);
        Ok(())
    }

    /// Bisection over sorted ranges. Every path ends in a return.
    fn tree(&self, program: &mut Vec<sock_filter>, points: &[Point], wide: bool) -> Result<()> {
        match points {
            [] => program.push(ret(self.default)),
            [(_, Leaf::Action(action))] => program.push(ret(*action)),
            // libseccomp takes x32 for a 32-bit machine as well.
            [(start, Leaf::Rules(calls))] => self.chain(program, calls, wide && *start < X32_BIT)?,
            _ => {
                let (left, right) = points.split_at(points.len() / 2);
                let pivot = right[0].0;
                let at = program.len();
                program.push(ret(self.default));
                self.tree(program, left, wide)?;
                let distance = program.len() - at - 1;
                // Conditional jumps reach 255 instructions, the unconditional one any distance.
                if let Ok(distance) = u8::try_from(distance) {
                    program[at] = jump(JGE_K, pivot, distance, 0);
                } else {
                    program[at] = jump(JGE_K, pivot, 0, 1);
                    program.insert(at + 1, jump(JA, distance as u32, 0, 0));
                }
                self.tree(program, right, wide)?;
            }
        }
        Ok(())
    }

    /// Rules in order, the default when none matches.
    fn chain(&self, program: &mut Vec<sock_filter>, calls: &[(u32, usize)], wide: bool) -> Result<()> {
        for (_, at) in calls {
            let rule = &self.rules[*at];
            let start = program.len();
            for condition in &rule.conditions {
                condition_code(program, condition, wide);
            }
            program.push(ret(rule.action));
            let end = program.len();
            if end - start >= usize::from(FAIL) {
                return Err(Error::invalid("linux.seccomp: one rule has more conditions than one jump can cross"));
            }
            for (left, instruction) in program[start..].iter_mut().rev().enumerate() {
                let distance = left as u8;
                for target in [&mut instruction.jt, &mut instruction.jf] {
                    if *target == FAIL {
                        *target = distance;
                    }
                }
            }
        }
        program.push(ret(self.default));
        Ok(())
    }
}

/// Stands for "this condition does not hold" until the rule's length is known.
const FAIL: u8 = u8::MAX;

/// Falls through when the condition holds, otherwise jumps to FAIL. Compares 64 bits as two words, the high one first;
/// of 32-bit calls (not `wide`) only the low one: the high one holds leftovers of the caller's registers.
fn condition_code(code: &mut Vec<sock_filter>, condition: &Condition, wide: bool) {
    let low_at = DATA_ARGS + 8 * condition.index;
    let (low, high) = (condition.value as u32, (condition.value >> 32) as u32);
    let mask = match condition.test {
        Test::Masked(mask) => mask,
        _ => u64::MAX,
    };
    // The comparison of the low words decides when the high ones are equal.
    let decide = match condition.test {
        Test::Eq | Test::Masked(_) => jump(JEQ_K, low, 0, FAIL),
        Test::Ne => jump(JEQ_K, low, FAIL, 0),
        Test::Gt => jump(JGT_K, low, 0, FAIL),
        Test::Ge => jump(JGE_K, low, 0, FAIL),
        Test::Lt => jump(JGE_K, low, FAIL, 0),
        Test::Le => jump(JGT_K, low, FAIL, 0),
    };
    let masked = mask as u32 != u32::MAX;
    if wide {
        // Over the load, the mask and the decision.
        let over = 2 + u8::from(masked);
        code.push(load(low_at + 4));
        if mask >> 32 != u64::from(u32::MAX) {
            code.push(jump(AND_K, (mask >> 32) as u32, 0, 0));
        }
        match condition.test {
            Test::Eq | Test::Masked(_) => code.push(jump(JEQ_K, high, 0, FAIL)),
            Test::Ne => code.push(jump(JEQ_K, high, 0, over)),
            Test::Gt | Test::Ge => code.extend([jump(JGT_K, high, over + 1, 0), jump(JEQ_K, high, 0, FAIL)]),
            Test::Lt | Test::Le => code.extend([jump(JGT_K, high, FAIL, 0), jump(JEQ_K, high, 0, over)]),
        }
    }
    code.push(load(low_at));
    if masked {
        code.push(jump(AND_K, mask as u32, 0, 0));
    }
    code.push(decide);
}

fn load(offset: u32) -> sock_filter {
    jump(LD_ABS, offset, 0, 0)
}

fn ret(value: u32) -> sock_filter {
    jump(RET_K, value, 0, 0)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
#[path = "seccomp_tests.rs"]
mod tests;
