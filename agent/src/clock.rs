//! The guest's clock, kept right by the host's.
//!
//! A machine's clock stands still while the machine is paused or its host sleeps, and runs a little faster or slower
//! than the host's at all other times. Under KVM the guest can ask for the host's time without a wait (`ptp_kvm`, see
//! the kernel's Documentation/virt/kvm/x86/hypercalls.rst, KVM_HC_CLOCK_PAIRING); elsewhere the host says by how much the
//! clock is wrong.

use crate::fs;
use crate::log;
use crate::prelude::*;
use crate::proto::agentext::ClockResponse;
use crate::sys::{self, Fd};

/// What is at least as wrong as this is set at once. Less is made up for by a clock that runs by 0.05 % faster or slower
/// for a while, which no program notices.
const STEP_NS: i64 = 2_000_000;
/// Less than this is not worth a correction.
const RIGHT_NS: i64 = 20_000;
/// How often the device is asked: the answer that took the shortest is used.
const READINGS: usize = 5;
const DEVICES: &str = "/sys/class/ptp";
/// The name of `ptp_kvm`'s clock. A network interface may bring a clock of its own, of which nothing is known.
const KVM_CLOCK: &str = "KVM virtual PTP";

/// How a clock that is wrong is corrected.
#[derive(Debug, PartialEq, Eq)]
enum Correction {
    None,
    Slew,
    Step,
}

impl Correction {
    fn of(behind_ns: i64) -> Correction {
        match behind_ns.unsigned_abs() {
            wrong if wrong < RIGHT_NS.unsigned_abs() => Correction::None,
            wrong if wrong < STEP_NS.unsigned_abs() => Correction::Slew,
            _ => Correction::Step,
        }
    }
}

/// Puts the clock right, by the host's clock if there is a device for that, and otherwise by what the host says.
///
/// # Errors
/// The host's correction leads to no point in time, or the kernel refuses it.
pub fn put_right(add_ns: i64) -> Result<ClockResponse> {
    let measured = host_clock().and_then(|device| behind(&device));
    correct(measured.unwrap_or(add_ns))?;
    Ok(ClockResponse { now_ns: now_ns(), by_device: measured.is_some() })
}

fn now_ns() -> i64 {
    sys::clock_ns(libc::CLOCK_REALTIME) as i64
}

/// The device that has the host's clock.
fn host_clock() -> Option<Fd> {
    let names = fs::names(DEVICES).ok()?;
    let name = names.iter().find(|name| {
        fs::read_to_string(format!("{DEVICES}/{name}/clock_name")).is_ok_and(|text| text.trim() == KVM_CLOCK)
    })?;
    sys::open(format!("/dev/{name}"), libc::O_RDONLY, 0).ok()
}

/// By how many nanoseconds the guest's clock is behind that of a device; none if the device cannot be read.
fn behind(device: &Fd) -> Option<i64> {
    // A clock that is a descriptor: the kernel's include/linux/posix-timers.h, CPUCLOCK_... and CLOCKFD.
    let clock = (!device.raw() << 3) | 3;
    let mut best: Option<(u64, i64)> = None;
    for _ in 0..READINGS {
        let before = sys::clock_ns(libc::CLOCK_REALTIME);
        let host = sys::clock_ns(clock);
        let after = sys::clock_ns(libc::CLOCK_REALTIME);
        if host == 0 {
            return None;
        }
        let took = after.saturating_sub(before);
        if best.is_none_or(|(least, _)| took < least) {
            best = Some((took, (host as i64).wrapping_sub((before + took / 2) as i64)));
        }
    }
    best.map(|(_, behind)| behind)
}

fn correct(behind_ns: i64) -> Result<()> {
    match Correction::of(behind_ns) {
        Correction::None => Ok(()),
        Correction::Slew => sys::slew_clock(behind_ns / 1000).context("correct the clock"),
        Correction::Step => {
            let wrong = || Error::invalid(format!("no point in time is {behind_ns} ns from now"));
            let wanted = now_ns().checked_add(behind_ns).filter(|ns| *ns >= 0).ok_or_else(wrong)?;
            sys::set_clock(wanted as u64).context("set the clock")?;
            log::info(&format!("the clock was set: it was behind by {} ms", behind_ns / 1_000_000));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_far_off_is_set_at_once() {
        for (behind, correction) in [
            (0, Correction::None),
            (-19_999, Correction::None),
            (20_000, Correction::Slew),
            (-1_999_999, Correction::Slew),
            (2_000_000, Correction::Step),
            (-3_600_000_000_000, Correction::Step),
            (i64::MIN, Correction::Step),
        ] {
            assert_eq!(Correction::of(behind), correction, "{behind}");
        }
    }

    #[test]
    fn a_correction_before_the_epoch_or_beyond_all_numbers_is_refused() {
        for behind in [i64::MIN, i64::MAX] {
            assert!(correct(behind).is_err(), "{behind}");
        }
    }

    #[test]
    fn a_descriptor_that_is_no_clock_tells_nothing() {
        let device = sys::open("/dev/null", libc::O_RDONLY, 0).unwrap();
        assert_eq!(behind(&device), None);
    }
}
