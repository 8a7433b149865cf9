//! Resource limits and the other small attributes of a process.

use crate::prelude::*;
use crate::proto::oci::POSIXRlimit;
use crate::sys;

/// In the order of their numbers (x86-64, and the generic ABI).
const NAMES: &[&str] = &[
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// Checked in the agent, set in the child: (number, soft, hard).
pub fn parse(limits: &[POSIXRlimit]) -> Result<Vec<(u32, u64, u64)>> {
    let mut parsed: Vec<(u32, u64, u64)> = vec![];
    for limit in limits {
        let number = limit
            .type_
            .strip_prefix("RLIMIT_")
            .and_then(|name| NAMES.iter().position(|known| *known == name))
            .ok_or_else(|| Error::invalid(format!("unknown resource limit {:?}", limit.type_)))?
            as u32;
        if parsed.iter().any(|(known, ..)| *known == number) {
            return Err(Error::invalid(format!("resource limit {} is given twice", limit.type_)));
        }
        if limit.soft > limit.hard {
            return Err(Error::invalid(format!(
                "resource limit {}: soft {} is above hard {}",
                limit.type_, limit.soft, limit.hard
            )));
        }
        parsed.push((number, limit.soft, limit.hard));
    }
    Ok(parsed)
}

/// For the calling process, while it may still raise them.
pub fn apply(limits: &[(u32, u64, u64)]) -> Result<()> {
    for (number, soft, hard) in limits {
        sys::set_rlimit(0, *number, *soft, *hard)
            .with_context(|| format!("set RLIMIT_{} to {soft}:{hard}", NAMES[*number as usize]))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(kind: &str, soft: u64, hard: u64) -> POSIXRlimit {
        POSIXRlimit { type_: kind.into(), soft, hard }
    }

    #[test]
    fn limits_are_known_single_and_sane() {
        assert_eq!(parse(&[limit("RLIMIT_NOFILE", 5, 9)]), Ok(vec![(7, 5, 9)]));
        assert_eq!(parse(&[limit("RLIMIT_RTTIME", 1, u64::MAX)]), Ok(vec![(15, 1, u64::MAX)]));
        assert!(parse(&[limit("RLIMIT_FOO", 1, 1)]).is_err());
        assert!(parse(&[limit("NOFILE", 1, 1)]).is_err());
        assert!(parse(&[limit("RLIMIT_CPU", 2, 1)]).is_err());
        assert!(parse(&[limit("RLIMIT_CPU", 1, 1), limit("RLIMIT_CPU", 1, 1)]).is_err());
    }
}
