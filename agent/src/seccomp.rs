//! Compiles a container's seccomp profile (OCI runtime spec, `linux.seccomp`) to classic BPF and installs it.
//!
//! What libseccomp and runc do with the same profile is the measure:
//!
//! * Names that an ABI does not have are skipped, so one profile serves many kernels.
//! * Several rules for one call: an unconditional one beats those with arguments, else the first that matches counts.
//!   A rule whose action is the default action anyway is left out first, as runc does.
//! * All arguments of one rule must match.
//! * An ABI whose architecture is not listed is killed; the native one counts as listed.
//! * When the default is not permissive, calls numbered above everything that the profile names fail with ENOSYS
//!   (runc's "ENOSYS stub"): a libc that probes for a call newer than the profile then takes its fall-back.

use crate::prelude::*;
use crate::proto::oci::{LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};
use crate::sys;
use crate::syscall;
use crate::syscalls::{number, Abi};
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
#[derive(Clone, Debug, PartialEq, Eq)]
struct Condition {
    index: u32,
    test: Test,
    value: u64,
    /// False for 32-bit calls: the high words are whatever the caller left in its registers, and count for nothing.
    wide: bool,
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

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    action: u32,
    conditions: Vec<Condition>,
}

/// What happens to a range of call numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Leaf {
    Action(u32),
    Rules(Vec<Rule>),
}

/// The calls of one ABI that have rules, and the highest number that the profile mentions.
struct Table {
    calls: BTreeMap<u32, Vec<Rule>>,
    highest: Option<u32>,
}

/// Compiles a profile. Errors name the action, operator, flag or architecture that is not understood.
pub fn compile(profile: &LinuxSeccomp) -> Result<Vec<sock_filter>> {
    let default = action(&profile.default_action, None)?;
    let listed = architectures(&profile.architectures)?;
    let permissive = matches!(default & 0xffff_0000, RET_ALLOW | RET_LOG | RET_TRACE);
    let above = |table: &Table| match table.highest {
        Some(_) if !permissive => RET_ERRNO | libc::ENOSYS as u32,
        _ => default,
    };

    let native = collect(&profile.syscalls, Abi::Native, default)?;
    let mut points = Vec::new();
    lay_out(&mut points, 0, &native, default, above(&native));
    if cfg!(target_arch = "x86_64") {
        if listed.x32 {
            let x32 = collect(&profile.syscalls, Abi::X32, default)?;
            lay_out(&mut points, X32_BIT, &x32, default, above(&x32));
        } else if permissive {
            points.push((X32_BIT, Leaf::Action(RET_KILL_THREAD)));
            // -1 is a tracer's way of skipping a call, not an x32 call.
            points.push((u32::MAX, Leaf::Action(default)));
        }
    }

    let mut program = vec![load(DATA_ARCH)];
    section(&mut program, AUDIT_ARCH_NATIVE, &points, default)?;
    if listed.x86 {
        let x86 = collect(&profile.syscalls, Abi::X86, default)?;
        let mut points = Vec::new();
        lay_out(&mut points, 0, &x86, default, above(&x86));
        section(&mut program, AUDIT_ARCH_I386, &points, default)?;
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

fn condition(arg: &LinuxSeccompArg, abi: Abi) -> Result<Condition> {
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
    Ok(Condition { index, test, value, wide: abi != Abi::X86 })
}

/// Gathers the rules of one ABI by call number.
fn collect(syscalls: &[LinuxSyscall], abi: Abi, default: u32) -> Result<Table> {
    let mut table = Table { calls: BTreeMap::new(), highest: None };
    for entry in syscalls {
        let action = action(&entry.action, entry.errnoret)?;
        let conditions = entry.args.iter().map(|arg| condition(arg, abi)).collect::<Result<Vec<_>>>()?;
        for name in &entry.names {
            let direct = number(abi, name);
            table.highest = table.highest.max(direct);
            if action == default {
                continue;
            }
            if let Some(nr) = direct {
                add(&mut table, nr, Rule { action, conditions: conditions.clone() });
            }
            // The arguments proper of a multiplexed call are behind a pointer: a rule that looks at them cannot be
            // expressed there, and is held against the direct call only (libseccomp has the same limit).
            if let (Abi::X86, true, Some((nr, sub_call))) = (abi, conditions.is_empty(), multiplexed(name)) {
                let conditions = vec![Condition { index: 0, test: Test::Eq, value: sub_call, wide: false }];
                add(&mut table, nr, Rule { action, conditions });
            }
        }
    }
    Ok(table)
}

fn add(table: &mut Table, nr: u32, rule: Rule) {
    let rules = table.calls.entry(nr).or_default();
    if rules.first().is_some_and(|first| first.conditions.is_empty()) {
        return;
    }
    if rule.conditions.is_empty() {
        rules.clear();
    }
    rules.push(rule);
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

/// Appends the ranges of one table to `points` (start of a range, what happens there), from `base` upwards.
fn lay_out(points: &mut Vec<(u32, Leaf)>, base: u32, table: &Table, default: u32, above: u32) {
    let mut next = base;
    let mut push = |start: u32, leaf: Leaf| {
        // Neighbours with the same outcome are one range.
        if points.last().is_none_or(|(_, last)| *last != leaf) {
            points.push((start, leaf));
        }
    };
    for (nr, rules) in &table.calls {
        let nr = base + nr;
        if nr > next {
            push(next, Leaf::Action(default));
        }
        push(
            nr,
            match rules.as_slice() {
                [only] if only.conditions.is_empty() => Leaf::Action(only.action),
                _ => Leaf::Rules(rules.clone()),
            },
        );
        next = nr + 1;
    }
    // The highest number may belong to a call that only has the default action.
    let end = table.highest.map_or(next, |highest| base + highest + 1);
    if end > next {
        push(next, Leaf::Action(default));
    }
    push(end.max(next), Leaf::Action(above));
}

/// Appends "if the architecture is `arch`, decide by number"; otherwise execution falls to what comes after.
fn section(program: &mut Vec<sock_filter>, arch: u32, points: &[(u32, Leaf)], default: u32) -> Result<()> {
    let mut code = vec![load(DATA_NR)];
    code.extend(tree(points, default)?);
    program.push(jump(JEQ_K, arch, 1, 0));
    program.push(jump(JA, code.len() as u32, 0, 0));
    program.extend(code);
    Ok(())
}

/// Bisection over sorted ranges. Every path ends in a return.
fn tree(points: &[(u32, Leaf)], default: u32) -> Result<Vec<sock_filter>> {
    if let [(_, leaf)] = points {
        return match leaf {
            Leaf::Action(action) => Ok(vec![ret(*action)]),
            Leaf::Rules(rules) => chain(rules, default),
        };
    }
    let (left, right) = points.split_at(points.len() / 2);
    let pivot = right[0].0;
    let left = tree(left, default)?;
    let mut code = match u8::try_from(left.len()) {
        Ok(distance) => vec![jump(JGE_K, pivot, distance, 0)],
        // Conditional jumps reach 255 instructions, the unconditional one any distance.
        Err(_) => vec![jump(JGE_K, pivot, 0, 1), jump(JA, left.len() as u32, 0, 0)],
    };
    code.extend(left);
    code.extend(tree(right, default)?);
    Ok(code)
}

/// Rules in order, the default when none matches.
fn chain(rules: &[Rule], default: u32) -> Result<Vec<sock_filter>> {
    let mut code = Vec::new();
    for rule in rules {
        code.extend(rule_code(rule)?);
    }
    if rules.last().is_none_or(|rule| !rule.conditions.is_empty()) {
        code.push(ret(default));
    }
    Ok(code)
}

/// Stands for "this condition does not hold" until the rule's length is known.
const FAIL: u8 = u8::MAX;

fn rule_code(rule: &Rule) -> Result<Vec<sock_filter>> {
    let mut code = Vec::new();
    for condition in &rule.conditions {
        condition_code(&mut code, condition);
    }
    code.push(ret(rule.action));
    let end = code.len();
    if end >= usize::from(FAIL) {
        return Err(Error::invalid("linux.seccomp: one rule has more conditions than one jump can cross"));
    }
    for (at, instruction) in code.iter_mut().enumerate() {
        let distance = (end - at - 1) as u8;
        for target in [&mut instruction.jt, &mut instruction.jf] {
            if *target == FAIL {
                *target = distance;
            }
        }
    }
    Ok(code)
}

/// Falls through when the condition holds, else jumps to FAIL. Compares 64 bits as two words, the high one first.
fn condition_code(code: &mut Vec<sock_filter>, condition: &Condition) {
    let low_at = DATA_ARGS + 8 * condition.index;
    let (low, high) = (condition.value as u32, (condition.value >> 32) as u32);
    // The comparison of the low words decides when the high ones are equal.
    let mask = match condition.test {
        Test::Masked(mask) => mask,
        _ => u64::MAX,
    };
    let decide = match condition.test {
        Test::Eq | Test::Masked(_) => jump(JEQ_K, low, 0, FAIL),
        Test::Ne => jump(JEQ_K, low, FAIL, 0),
        Test::Gt => jump(JGT_K, low, 0, FAIL),
        Test::Ge => jump(JGE_K, low, 0, FAIL),
        Test::Lt => jump(JGE_K, low, FAIL, 0),
        Test::Le => jump(JGT_K, low, FAIL, 0),
    };
    let mut low_code = vec![load(low_at)];
    if mask as u32 != u32::MAX {
        low_code.push(jump(AND_K, mask as u32, 0, 0));
    }
    low_code.push(decide);
    if condition.wide {
        let over = low_code.len() as u8;
        code.push(load(low_at + 4));
        if mask >> 32 != u64::from(u32::MAX) {
            code.push(jump(AND_K, (mask >> 32) as u32, 0, 0));
        }
        match condition.test {
            Test::Eq | Test::Masked(_) => code.push(jump(JEQ_K, high, 0, FAIL)),
            Test::Ne => code.push(jump(JEQ_K, high, 0, over)),
            Test::Gt | Test::Ge => {
                code.extend([jump(JGT_K, high, over + 1, 0), jump(JEQ_K, high, 0, FAIL)]);
            }
            Test::Lt | Test::Le => {
                code.extend([jump(JGT_K, high, FAIL, 0), jump(JEQ_K, high, 0, over)]);
            }
        }
    }
    code.extend(low_code);
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
