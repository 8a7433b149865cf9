//! The agent of the virtual machine: ttRPC server and OCI container runtime, PID 1 of the guest.
//!
//! **No C library, no `std`** (tests excepted). An empty static glibc program is 680 KB and an empty static Rust `std`
//! program 1.1 MB; every byte of the initrd is guest memory. So the crate is `core` + `alloc`:
//!
//! * every file starts with `use crate::prelude::*;` (String, Vec, Box, format!, vec!, BTreeMap, ToString ...);
//! * system calls go through [`sys`] (thin, `Result<_, Errno>`, owned descriptors close themselves and are always
//!   CLOEXEC) and small file helpers through [`fs`]; paths are `&str`;
//! * the `libc` crate gives constants and structures only: calling one of its functions is a link error;
//! * one thread, no signal handlers (signalfd): plain `Cell`/`RefCell` state, fork without fear.
#![cfg_attr(not(test), no_std)]
#![allow(clippy::missing_errors_doc, clippy::module_name_repetitions, clippy::must_use_candidate)]

extern crate alloc;

pub mod errors;
pub mod fs;
pub mod log;
pub mod prelude;
pub mod rt;
pub mod sys;

/// The program after its entry point; the exit code.
///
/// # Safety
/// `argv` points to `argc` NUL-terminated strings.
pub unsafe fn start(argc: usize, argv: *const *const core::ffi::c_char) -> i32 {
    // SAFETY: by the contract above.
    let arguments = unsafe { rt::arguments(argc, argv) };
    log::info(&alloc::format!("started {arguments:?}"));
    0
}
