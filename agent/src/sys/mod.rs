//! System calls without a C library: thin wrappers with owned descriptors and `Result<_, Errno>`.
//!
//! Anything not wrapped here is one [`syscall!`](crate::syscall) away. Every descriptor made here is CLOEXEC.

mod arch;
mod bpf;
mod call;
pub mod errno;
mod file;
mod kernel;
mod poll;
mod process;
mod socket;

pub use arch::{syscall0, syscall1, syscall2, syscall3, syscall4, syscall5, syscall6};
pub use bpf::{bpf, bpf_fd, bpf_load, instruction};
pub use call::{check, cstr, retry, CStringArray, SysResult};
pub use errno::Errno;
pub use file::*;
pub use kernel::*;
pub use poll::*;
pub use process::*;
pub use socket::*;
