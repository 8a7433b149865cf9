//! The program: start-up without a C library, then [`kata_agent::start`].
// (`clippy --all-targets` also looks at it as a test, which needs std.)
#![cfg_attr(not(test), no_std, no_main)]

#[cfg(not(test))]
mod program {
    use core::arch::global_asm;

    // The kernel enters here with argc, argv and envp on the stack. Only the stack pointer is handed on, aligned as the
    // ABI wants it.
    global_asm!(
        ".globl _start",
        "_start:",
        "xor %ebp, %ebp",
        "mov %rsp, %rdi",
        "and $-16, %rsp",
        "call {start}",
        "ud2",
        start = sym start,
        options(att_syntax),
    );

    /// # Safety
    /// Called once by `_start` with the stack pointer at program entry.
    unsafe extern "C" fn start(stack: *const usize) -> ! {
        // SAFETY: the kernel puts argc at the stack pointer and argv right behind it.
        let code = unsafe { kata_agent::start(*stack, stack.add(1).cast()) };
        kata_agent::sys::exit(code)
    }

    #[panic_handler]
    fn panic(info: &core::panic::PanicInfo) -> ! {
        kata_agent::rt::panicked(info)
    }

    /// Named by the precompiled `alloc`; with panic=abort nothing ever unwinds.
    #[no_mangle]
    extern "C" fn rust_eh_personality() {}

    /// As above.
    #[no_mangle]
    extern "C" fn _Unwind_Resume() -> ! {
        kata_agent::sys::exit(102)
    }

    #[global_allocator]
    static ALLOCATOR: kata_agent::rt::Allocator = kata_agent::rt::Allocator;
}
