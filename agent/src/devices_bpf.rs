//! Device rules of a container (OCI `linux.resources.devices`) as an eBPF program on its cgroup: cgroup v2 has no
//! devices controller, the kernel asks a BPF_PROG_TYPE_CGROUP_DEVICE program instead.
//!
//! The rules are read like cgroup v1's: each one overrides earlier ones, permission by permission. So the program walks
//! them from the last to the first; each permission is decided by the first rule met that mentions it, and refused if
//! none does.

use crate::prelude::*;
use crate::proto::oci::LinuxDeviceCgroup;
use crate::sys::{bpf, bpf_fd, bpf_load, instruction, Errno, Fd, RawFd, SysResult};

const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_DETACH: i32 = 9;
const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_PROG_QUERY: i32 = 16;

const PROG_TYPE_CGROUP_DEVICE: u64 = 15;
const ATTACH_TYPE_CGROUP_DEVICE: u64 = 6;
const F_ALLOW_MULTI: u64 = 2;
const F_REPLACE: u64 = 4;

// linux/bpf.h: bits of bpf_cgroup_dev_ctx.access_type, permissions in the upper half, type in the lower one.
const DEVICE_BLOCK: i32 = 1;
const DEVICE_CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const EVERYTHING: i32 = MKNOD | READ | WRITE;

// Instruction codes.
const LDX_W: u8 = 0x61;
const MOV_K: u8 = 0xb7;
const MOV_X: u8 = 0xbf;
const AND_K: u8 = 0x57;
const RSH_K: u8 = 0x77;
const JA: u8 = 0x05;
const JSET_K: u8 = 0x45;
const JNE_K: u8 = 0x55;
const EXIT: u8 = 0x95;

// What the registers hold: r0 the answer, r1 the context (at entry), then:
const TYPE: u8 = 2;
/// The permissions that were requested and are not granted yet.
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// A rule in the kernel's terms; `None` matches anything.
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// Compiles rules to eBPF instructions. Errors name the field that makes no sense.
pub fn compile(rules: &[LinuxDeviceCgroup]) -> Result<Vec<u64>> {
    let rules = rules.iter().map(parse).collect::<Result<Vec<_>>>()?;
    let mut code = vec![
        instruction(LDX_W, TYPE, 1, 0, 0),
        instruction(MOV_X, WANTED, TYPE, 0, 0),
        instruction(RSH_K, WANTED, 0, 0, 16),
        instruction(AND_K, TYPE, 0, 0, 0xffff),
        instruction(LDX_W, MAJOR, 1, 4, 0),
        instruction(LDX_W, MINOR, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let body = if rule.allow { allow(rule.access) } else { deny(rule.access) };
        let tests = [(TYPE, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
        let tests: Vec<(u8, i32)> = tests.iter().filter_map(|(register, value)| Some((*register, (*value)?))).collect();
        for (at, (register, value)) in tests.iter().enumerate() {
            let over = (tests.len() - at - 1 + body.len()) as i16;
            code.push(instruction(JNE_K, *register, 0, over, *value));
        }
        code.extend(&body);
        if tests.is_empty() && rule.access == EVERYTHING {
            // This rule decides everything; the verifier refuses instructions that can never be reached.
            return Ok(code);
        }
    }
    code.extend(answer(0));
    Ok(code)
}

/// A program in the kernel.
pub struct Loaded {
    code: Vec<u64>,
    fd: Fd,
}

/// The program that was loaded last, since most containers have the same rules: checking and translating it is most of
/// what a container's device rules cost.
#[derive(Default)]
pub struct Kept(Option<Loaded>);

impl Kept {
    /// The descriptor of this program, which is loaded unless it is the one that is kept.
    pub fn load(&mut self, code: Vec<u64>) -> Result<RawFd> {
        if self.0.as_ref().is_none_or(|kept| kept.code != code) {
            let fd = load(&code)?;
            self.0 = Some(Loaded { code, fd });
        }
        Ok(self.0.as_ref().map_or(-1, |kept| kept.fd.raw()))
    }
}

/// Loads `program` and makes it the device program of the cgroup, in place of whatever was there.
pub fn attach(cgroup: RawFd, program: &[u64]) -> Result<()> {
    attach_loaded(cgroup, load(program)?.raw())
}

/// The same with a program that is in the kernel already.
pub fn attach_loaded(cgroup: RawFd, program: RawFd) -> Result<()> {
    let before = attached(cgroup).map_err(|e| unsupported("query the device programs of the cgroup", e))?;
    // A single program is replaced atomically, so that the container is never without rules.
    if let [only] = before.as_slice() {
        let old = program_by_id(*only).map_err(|e| unsupported("open the cgroup's device program", e))?;
        return change(BPF_PROG_ATTACH, cgroup, program, F_ALLOW_MULTI | F_REPLACE, old.raw())
            .map_err(|e| unsupported("replace the device program of the cgroup", e));
    }
    change(BPF_PROG_ATTACH, cgroup, program, F_ALLOW_MULTI, 0)
        .map_err(|e| unsupported("attach the device program to the cgroup", e))?;
    // With several programs attached, access needs the consent of each: the old ones would keep refusing.
    for id in before {
        program_by_id(id)
            .and_then(|old| change(BPF_PROG_DETACH, cgroup, old.raw(), 0, 0))
            .map_err(|e| unsupported("detach an old device program", e))?;
    }
    Ok(())
}

fn unsupported(what: &str, e: Errno) -> Error {
    match e.0 {
        libc::ENOSYS | libc::EINVAL => {
            Error::unimplemented(format!("{what}: {e} (device rules need a kernel with CONFIG_CGROUP_BPF)"))
        }
        _ => Error::internal(format!("{what}: {e}")),
    }
}

fn parse(rule: &LinuxDeviceCgroup) -> Result<Rule> {
    let kind = match rule.type_.as_str() {
        "" | "a" => None,
        "b" => Some(DEVICE_BLOCK),
        "c" | "u" => Some(DEVICE_CHAR),
        other => return Err(Error::invalid(format!("linux.resources.devices: unknown type {other:?}"))),
    };
    // Hosts that cannot say "absent" send 0:0, which no device has (a whiteout, 0:0, is never asked about).
    let absent = rule.major <= 0 && rule.minor <= 0;
    let id = |value: i64| match value {
        _ if absent => Ok(None),
        ..0 => Ok(None),
        _ => i32::try_from(value)
            .map(Some)
            .map_err(|_| Error::invalid(format!("linux.resources.devices: device number {value} is too large"))),
    };
    let access = if rule.access.is_empty() { "rwm" } else { rule.access.as_str() };
    let access = access.chars().try_fold(0, |set, letter| match letter {
        'r' => Ok(set | READ),
        'w' => Ok(set | WRITE),
        'm' => Ok(set | MKNOD),
        _ => Err(Error::invalid(format!("linux.resources.devices: unknown access {:?}", rule.access))),
    })?;
    Ok(Rule { allow: rule.allow, kind, major: id(rule.major)?, minor: id(rule.minor)?, access })
}

/// Grants permissions; answers yes when none is left.
fn allow(access: i32) -> Vec<u64> {
    let [yes, exit] = answer(1);
    if access == EVERYTHING {
        return vec![yes, exit];
    }
    vec![instruction(AND_K, WANTED, 0, 0, !access), instruction(JNE_K, WANTED, 0, 2, 0), yes, exit]
}

/// Answers no when one of the permissions is still wanted.
fn deny(access: i32) -> Vec<u64> {
    let [no, exit] = answer(0);
    if access == EVERYTHING {
        return vec![no, exit];
    }
    vec![instruction(JSET_K, WANTED, 0, 1, access), instruction(JA, 0, 0, 2, 0), no, exit]
}

fn answer(value: i32) -> [u64; 2] {
    [instruction(MOV_K, 0, 0, 0, value), instruction(EXIT, 0, 0, 0, 0)]
}

fn load(program: &[u64]) -> Result<Fd> {
    bpf_load(PROG_TYPE_CGROUP_DEVICE, 0, *b"kata_devices\0\0\0\0", program)
        .map_err(|e| unsupported("load the device program", e))
}

/// The ids of the cgroup's own device programs.
fn attached(cgroup: RawFd) -> SysResult<Vec<u32>> {
    // The kernel's limit of programs per cgroup.
    let mut ids = [0u32; 64];
    let mut attr = [cgroup as u64 | ATTACH_TYPE_CGROUP_DEVICE << 32, 0, ids.as_mut_ptr() as u64, ids.len() as u64];
    bpf(BPF_PROG_QUERY, &mut attr)?;
    let count = (attr[3] as u32 as usize).min(ids.len());
    Ok(ids[..count].to_vec())
}

fn program_by_id(id: u32) -> SysResult<Fd> {
    bpf_fd(BPF_PROG_GET_FD_BY_ID, &mut [u64::from(id), 0])
}

fn change(command: i32, cgroup: RawFd, program: RawFd, flags: u64, replaced: RawFd) -> SysResult<()> {
    let mut attr = [cgroup as u64 | (program as u64) << 32, ATTACH_TYPE_CGROUP_DEVICE | flags << 32, replaced as u64];
    bpf(command, &mut attr).map(drop)
}

#[cfg(test)]
#[path = "devices_bpf_tests.rs"]
mod tests;
