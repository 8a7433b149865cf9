//! Directs packets for one address and port to a socket that is bound to another port.
//!
//! A program of the kind `sk_lookup` is asked before the kernel looks for a socket. So the agent can serve a port while
//! a program in a container may bind the same port on every address, as a DNS server does. The program applies to the
//! network namespace where it was attached, until the last descriptor of its link is closed.
//!
//! Source: the kernel's `Documentation/bpf/prog_sk_lookup.rst` and `linux/bpf.h` (struct bpf_sk_lookup); Linux 5.9.

use crate::sys::{self, bpf, bpf_fd, bpf_load, instruction, Fd, RawFd, SysResult};

const MAP_CREATE: i32 = 0;
const MAP_UPDATE: i32 = 2;
const LINK_CREATE: i32 = 28;
const MAP_TYPE_SOCKMAP: u64 = 15;
const PROG_TYPE_SK_LOOKUP: u64 = 30;
const ATTACH_TYPE_SK_LOOKUP: u64 = 36;

// Offsets in struct bpf_sk_lookup. The address is in network byte order, nothing else is.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_PORT: i16 = 60;

// Instruction codes, and helpers.
const LDX_W: u8 = 0x61;
const ST_W: u8 = 0x62;
const MOV_K: u8 = 0xb7;
const MOV_X: u8 = 0xbf;
const ADD_K: u8 = 0x07;
const JEQ_K: u8 = 0x15;
const JNE32_K: u8 = 0x56;
const LD_IMM64: u8 = 0x18;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const MAP_FD: u8 = 1;
const MAP_LOOKUP: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

const LENGTH: usize = 25;
/// The offset of the exit that lets the kernel go on with its own lookup.
const PASS: usize = 23;

/// The program: packets of this protocol for the address and port go to the first socket of the map.
fn program(map: RawFd, protocol: i32, address: [u8; 4], port: u16) -> [u64; LENGTH] {
    let unless = |at: usize, value: i32| instruction(JNE32_K, 2, 0, (PASS - at - 1) as i16, value);
    [
        instruction(MOV_X, 6, 1, 0, 0),
        instruction(LDX_W, 2, 6, PROTOCOL, 0),
        unless(2, protocol),
        instruction(LDX_W, 2, 6, FAMILY, 0),
        unless(4, libc::AF_INET),
        instruction(LDX_W, 2, 6, LOCAL_PORT, 0),
        unless(6, i32::from(port)),
        instruction(LDX_W, 2, 6, LOCAL_IP4, 0),
        unless(8, i32::from_ne_bytes(address)),
        instruction(ST_W, 10, 0, -4, 0),
        instruction(LD_IMM64, 1, MAP_FD, 0, map),
        0, // the upper half of that constant
        instruction(MOV_X, 2, 10, 0, 0),
        instruction(ADD_K, 2, 0, 0, -4),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP),
        instruction(JEQ_K, 0, 0, (PASS - 15 - 1) as i16, 0),
        instruction(MOV_X, 7, 0, 0, 0),
        instruction(MOV_X, 1, 6, 0, 0),
        instruction(MOV_X, 2, 7, 0, 0),
        instruction(MOV_K, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SK_ASSIGN),
        instruction(MOV_X, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, SK_RELEASE),
        instruction(MOV_K, 0, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// From now on `socket`, which is bound and, of TCP, listens, has the port of the address in the caller's network
/// namespace, until what this returns is closed. `protocol`: IPPROTO_TCP or IPPROTO_UDP.
pub fn attach(socket: RawFd, protocol: i32, address: [u8; 4], port: u16) -> SysResult<Fd> {
    // Type and size of a key, size of a value (a socket's cookie can be asked for) and number of entries.
    let map = bpf_fd(MAP_CREATE, &mut [MAP_TYPE_SOCKMAP | 4 << 32, 8 | 1 << 32, 0])?;
    let (key, value) = (0u32, socket as u64);
    let mut entry = [map.raw() as u64, &raw const key as u64, &raw const value as u64, 0];
    bpf(MAP_UPDATE, &mut entry)?;
    let code = program(map.raw(), protocol, address, port);
    let loaded = bpf_load(PROG_TYPE_SK_LOOKUP, ATTACH_TYPE_SK_LOOKUP, *b"kata_sk_lookup\0\0", &code)?;
    let namespace = sys::open("/proc/self/ns/net", libc::O_RDONLY, 0)?;
    let target = loaded.raw() as u64 | (namespace.raw() as u64) << 32;
    bpf_fd(LINK_CREATE, &mut [target, ATTACH_TYPE_SK_LOOKUP])
}
