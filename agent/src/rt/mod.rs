//! What a C library or `std` would have brought: memory functions, allocator, panic, the start of the program.

mod alloc;
mod memory;

pub use self::alloc::{trim, Allocator};

use crate::prelude::*;
use core::ffi::{c_char, CStr};

/// The arguments as owned strings (lossy UTF-8).
///
/// # Safety
/// `argv` points to `argc` NUL-terminated strings, as the kernel lays them out.
pub unsafe fn arguments(argc: usize, argv: *const *const c_char) -> Vec<String> {
    // SAFETY: by the contract above.
    (0..argc).map(|i| unsafe { CStr::from_ptr(*argv.add(i)) }.to_string_lossy().into_owned()).collect()
}

/// The panic handler: logs to the console, then powers the machine off if the agent is PID 1 (the host notices a VM
/// that is gone, not one that hangs).
pub fn panicked(info: &core::panic::PanicInfo) -> ! {
    use crate::sys;
    let text = format!("{info}");
    crate::log::error(&format!("the agent failed: {}", text.replace('\n', ": ")));
    if sys::getpid() == 1 {
        sys::sync();
        let _ = sys::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF as u32);
    }
    sys::exit(101)
}
