//! What every wrapper of a system call is made of.

use super::errno::Errno;
use alloc::ffi::CString;
use alloc::vec::Vec;

/// The outcome of a system call.
pub type SysResult<T> = core::result::Result<T, Errno>;

/// `syscall!(libc::SYS_xxx, args...)` -> `SysResult<usize>`; every argument is cast to `usize`. Unsafe: the caller
/// answers for pointers and lengths.
#[macro_export]
macro_rules! syscall {
    ($nr:expr) => { $crate::sys::check($crate::sys::syscall0($nr)) };
    ($nr:expr, $a:expr) => { $crate::sys::check($crate::sys::syscall1($nr, $a as usize)) };
    ($nr:expr, $a:expr, $b:expr) => { $crate::sys::check($crate::sys::syscall2($nr, $a as usize, $b as usize)) };
    ($nr:expr, $a:expr, $b:expr, $c:expr) => {
        $crate::sys::check($crate::sys::syscall3($nr, $a as usize, $b as usize, $c as usize))
    };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr) => {
        $crate::sys::check($crate::sys::syscall4($nr, $a as usize, $b as usize, $c as usize, $d as usize))
    };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr) => {
        $crate::sys::check($crate::sys::syscall5(
            $nr, $a as usize, $b as usize, $c as usize, $d as usize, $e as usize,
        ))
    };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr, $f:expr) => {
        $crate::sys::check($crate::sys::syscall6(
            $nr, $a as usize, $b as usize, $c as usize, $d as usize, $e as usize, $f as usize,
        ))
    };
}

/// The kernel's return value: -4095..=-1 is an error number.
pub fn check(raw: isize) -> SysResult<usize> {
    if (-4095..0).contains(&raw) {
        Err(Errno(-raw as i32))
    } else {
        Ok(raw as usize)
    }
}

/// A path for the kernel; a NUL inside is EINVAL.
pub fn cstr(s: impl AsRef<[u8]>) -> SysResult<CString> {
    CString::new(s.as_ref()).map_err(|_| Errno(libc::EINVAL))
}

/// Repeats an interrupted call.
pub fn retry<T>(mut call: impl FnMut() -> SysResult<T>) -> SysResult<T> {
    loop {
        match call() {
            Err(Errno(libc::EINTR)) => {}
            other => return other,
        }
    }
}

/// The bytes of a NUL-terminated list of strings for execve: the strings and the pointer array that ends in null.
pub struct CStringArray {
    _strings: Vec<CString>,
    pointers: Vec<*const core::ffi::c_char>,
}

impl CStringArray {
    pub fn new<S: AsRef<str>>(items: &[S]) -> SysResult<Self> {
        let strings = items.iter().map(|s| cstr(s.as_ref())).collect::<SysResult<Vec<_>>>()?;
        let mut pointers: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
        pointers.push(core::ptr::null());
        Ok(CStringArray { _strings: strings, pointers })
    }

    pub fn as_ptr(&self) -> *const *const core::ffi::c_char {
        self.pointers.as_ptr()
    }
}
