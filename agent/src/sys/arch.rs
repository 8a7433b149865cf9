//! The system call instruction.

use core::arch::asm;

macro_rules! define {
    ($name:ident $(, $arg:ident : $reg:tt)*) => {
        /// # Safety
        /// The arguments must be right for the system call `nr`: pointers valid, lengths true.
        #[inline]
        pub unsafe fn $name(nr: libc::c_long $(, $arg: usize)*) -> isize {
            let ret: isize;
            // SAFETY: the caller vouches for the arguments; the kernel clobbers only rcx, r11 and the result.
            unsafe {
                asm!(
                    "syscall",
                    inlateout("rax") nr as isize => ret,
                    $(in($reg) $arg,)*
                    lateout("rcx") _, lateout("r11") _,
                    options(nostack),
                );
            }
            ret
        }
    };
}

define!(syscall0);
define!(syscall1, a: "rdi");
define!(syscall2, a: "rdi", b: "rsi");
define!(syscall3, a: "rdi", b: "rsi", c: "rdx");
define!(syscall4, a: "rdi", b: "rsi", c: "rdx", d: "r10");
define!(syscall5, a: "rdi", b: "rsi", c: "rdx", d: "r10", e: "r8");
define!(syscall6, a: "rdi", b: "rsi", c: "rdx", d: "r10", e: "r8", f: "r9");
