//! bpf(2): programs as words, and what loads them.

use super::call::SysResult;
use super::file::{Fd, RawFd};
use crate::syscall;

const BPF_PROG_LOAD: i32 = 5;
const LICENSE: &core::ffi::CStr = c"Apache-2.0";

/// bpf(2); `attr` is the command's part of union bpf_attr, in words.
pub fn bpf(command: i32, attr: &mut [u64]) -> SysResult<usize> {
    // SAFETY: the attribute is valid for its length; addresses in it point to live buffers of the callers.
    unsafe { syscall!(libc::SYS_bpf, command, attr.as_mut_ptr(), core::mem::size_of_val(attr)) }
}

/// The same for a command that makes a descriptor.
pub fn bpf_fd(command: i32, attr: &mut [u64]) -> SysResult<Fd> {
    bpf(command, attr).map(|fd| Fd::from_raw(fd as RawFd))
}

/// Loads a program.
///
/// `kind` and `attach_type`: BPF_PROG_TYPE_*, BPF_*; `name`: with NULs behind it.
pub fn bpf_load(kind: u64, attach_type: u64, name: [u8; 16], program: &[u64]) -> SysResult<Fd> {
    let name = u128::from_le_bytes(name);
    let mut attr = [
        kind | (program.len() as u64) << 32,
        program.as_ptr() as u64,
        LICENSE.as_ptr() as u64,
        0,
        0,
        0,
        name as u64,
        (name >> 64) as u64,
        attach_type << 32,
    ];
    bpf_fd(BPF_PROG_LOAD, &mut attr)
}

/// struct bpf_insn as one little-endian word.
pub const fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    code as u64
        | (dst as u64) << 8
        | (src as u64) << 12
        | (offset as u16 as u64) << 16
        | (immediate as u32 as u64) << 32
}
