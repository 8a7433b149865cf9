//! epoll, signalfd, timers, clocks.

use super::call::{retry, SysResult};
use super::file::{Fd, RawFd};
use crate::syscall;
use core::mem::MaybeUninit;

pub fn epoll_create() -> SysResult<Fd> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_epoll_create1, libc::EPOLL_CLOEXEC) }.map(|fd| Fd::from_raw(fd as RawFd))
}

/// `op`: EPOLL_CTL_ADD / MOD / DEL; `data` comes back with the event.
pub fn epoll_ctl(epoll: RawFd, op: i32, fd: RawFd, events: u32, data: u64) -> SysResult<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the event outlives the call.
    unsafe { syscall!(libc::SYS_epoll_ctl, epoll, op, fd, &raw mut event) }.map(drop)
}

/// `timeout_ms` -1 waits for ever. An interrupted wait is 0 events.
pub fn epoll_wait(epoll: RawFd, events: &mut [libc::epoll_event], timeout_ms: i32) -> SysResult<usize> {
    // SAFETY: the array is valid for its length; no signal mask.
    retry(|| unsafe { syscall!(libc::SYS_epoll_pwait, epoll, events.as_mut_ptr(), events.len(), timeout_ms, 0, 8) })
}

/// A set of signals as the kernel wants it.
pub fn signal_set(signals: &[i32]) -> u64 {
    signals.iter().fold(0, |set, signal| set | 1 << (signal - 1))
}

/// Replaces the mask of blocked signals, returns the old one.
pub fn set_signal_mask(mask: u64) -> SysResult<u64> {
    let mut old = 0u64;
    // SAFETY: two 8-byte sets.
    unsafe { syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, &raw mut old, 8) }?;
    Ok(old)
}

/// Waits for one of these (blocked) signals and takes it.
pub fn wait_signal(set: u64) {
    // SAFETY: an 8-byte set; no information and no timeout are asked for.
    let _ = unsafe { syscall!(libc::SYS_rt_sigtimedwait, &raw const set, 0, 0, 8) };
}

/// Every signal back to its default action, as an exec'd program expects it (ignored ones would be inherited).
pub fn default_signals() {
    // struct kernel_sigaction: handler, flags, restorer, mask.
    let default = [0u64; 4];
    for signal in 1..=64 {
        // SAFETY: SIG_DFL needs no code; SIGKILL and SIGSTOP answer EINVAL, which is right.
        let _ = unsafe { syscall!(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, 8) };
    }
}

pub fn ignore_signal(signal: i32) {
    let ignore = [libc::SIG_IGN as u64, 0, 0, 0];
    // SAFETY: SIG_IGN needs no code.
    let _ = unsafe { syscall!(libc::SYS_rt_sigaction, signal, ignore.as_ptr(), 0, 8) };
}

pub fn signalfd(mask: u64) -> SysResult<Fd> {
    // SAFETY: an 8-byte set.
    unsafe { syscall!(libc::SYS_signalfd4, -1i32, &raw const mask, 8, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) }
        .map(|fd| Fd::from_raw(fd as RawFd))
}

/// A timer that is not running; it can be read when its time has come.
pub fn timer() -> SysResult<Fd> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_timerfd_create, libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) }
        .map(|fd| Fd::from_raw(fd as RawFd))
}

/// Lets a timer run: for `first_ns`, and then again and again for `period_ns` (0 = only once).
pub fn set_timer(timer: RawFd, first_ns: u64, period_ns: u64) -> SysResult<()> {
    // struct itimerspec: interval and first time, seconds and nanoseconds.
    let split = |ns: u64| [ns / 1_000_000_000, ns % 1_000_000_000];
    let when = [split(period_ns), split(first_ns)];
    // SAFETY: the structure is complete; the old setting is not asked for.
    unsafe { syscall!(libc::SYS_timerfd_settime, timer, 0, when.as_ptr(), 0) }.map(drop)
}

/// Nanoseconds of a clock (`libc::CLOCK_*`).
pub fn clock_ns(clock: i32) -> u64 {
    let mut now = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the kernel fills the structure; zeroed is a valid value should it not.
    unsafe {
        let _ = syscall!(libc::SYS_clock_gettime, clock, now.as_mut_ptr());
        let now = now.assume_init();
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }
}

/// Sets the wall clock: nanoseconds since the epoch.
pub fn set_clock(ns: u64) -> SysResult<()> {
    let time = [ns / 1_000_000_000, ns % 1_000_000_000];
    // SAFETY: one struct timespec.
    unsafe { syscall!(libc::SYS_clock_settime, libc::CLOCK_REALTIME, time.as_ptr()) }.map(drop)
}

/// Has the wall clock gain so many microseconds, or lose them, by and by (adjtimex(2)).
pub fn slew_clock(microseconds: i64) -> SysResult<()> {
    // struct timex of linux/timex.h: 208 bytes, of which only the first two fields are read for this mode.
    let mut change = [0i64; 26];
    change[0] = ADJ_OFFSET_SINGLESHOT;
    change[1] = microseconds;
    // SAFETY: the kernel fills the structure, which is complete.
    unsafe { syscall!(libc::SYS_adjtimex, change.as_mut_ptr()) }.map(drop)
}

/// linux/timex.h.
const ADJ_OFFSET_SINGLESHOT: i64 = 0x8001;

pub fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

pub fn sleep_ms(ms: u64) {
    let time = [ms / 1000, ms % 1000 * 1_000_000];
    // SAFETY: one struct timespec; an early return is harmless to every caller.
    let _ = unsafe { syscall!(libc::SYS_nanosleep, time.as_ptr(), 0) };
}

/// Waits for one descriptor; the events that came (0 = time is over).
pub fn poll_one(fd: RawFd, events: i16, timeout_ms: i32) -> SysResult<i16> {
    let mut entry = [libc::pollfd { fd, events, revents: 0 }];
    poll(&mut entry, timeout_ms)?;
    Ok(entry[0].revents)
}

/// Waits for any of several descriptors; how many have events.
pub fn poll(entries: &mut [libc::pollfd], timeout_ms: i32) -> SysResult<usize> {
    // SAFETY: the array is valid for its length.
    retry(|| unsafe { syscall!(libc::SYS_poll, entries.as_mut_ptr(), entries.len(), timeout_ms) })
}

pub fn inotify() -> SysResult<Fd> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_inotify_init1, libc::IN_CLOEXEC | libc::IN_NONBLOCK) }
        .map(|fd| Fd::from_raw(fd as RawFd))
}

pub fn inotify_add_watch(inotify: RawFd, path: impl AsRef<[u8]>, mask: u32) -> SysResult<i32> {
    let path = super::call::cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_inotify_add_watch, inotify, path.as_ptr(), mask) }.map(|wd| wd as i32)
}
