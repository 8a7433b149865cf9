//! The guest's pools of huge pages, for ephemeral storages of type hugetlbfs.

use crate::fs;
use crate::prelude::*;

/// Where the kernel has its pools, one directory for each size of pages.
pub const POOLS: &str = "/sys/kernel/mm/hugepages";
/// Memory that huge pages must leave free: small pages are needed as well.
const HEADROOM: u64 = 32 << 20;

/// Adds `size` bytes of pages of `pagesize` to the kernel's pool. Returns the pool's file and its former number of
/// pages.
pub fn reserve(pools: &str, options: &[&String]) -> Result<(String, u64)> {
    let find = |name: &str| options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
    let (Some(page), Some(size)) = (find("pagesize"), find("size")) else {
        return Err(Error::invalid("hugetlbfs needs the options pagesize= and size="));
    };
    let (page_bytes, bytes) = (parse_size(page)?, parse_size(size)?);
    if page_bytes < 1024 || bytes % page_bytes != 0 {
        return Err(Error::invalid(format!("hugetlbfs: size={size} is not a multiple of pagesize={page}")));
    }
    let file = format!("{pools}/hugepages-{}kB/nr_hugepages", page_bytes / 1024);
    let count = || -> Result<u64> {
        let text = fs::read_to_string(&file)
            .map_err(|e| Error::unimplemented(format!("the guest kernel has no huge pages of {page}: {file}: {e}")))?;
        text.trim().parse().map_err(|_| Error::internal(format!("{file} holds {text:?}")))
    };
    let before = count()?;
    let wanted = before + bytes / page_bytes;
    let exhausted = |room: u64| {
        Error::exhausted(format!(
            "{} huge pages of {page} are wanted, the guest has room for {room}",
            bytes / page_bytes
        ))
    };
    // The kernel would try, and then kill some process for lack of memory.
    let available = fs::meminfo("MemAvailable")
        .ok_or_else(|| Error::internal("/proc/meminfo does not say how much memory is available"))?;
    let room = available.saturating_sub(HEADROOM);
    if bytes > room {
        return Err(exhausted(room / page_bytes));
    }
    fs::write_existing(&file, &wanted.to_string()).with_context(|| format!("write {wanted} to {file}"))?;
    let got = count()?;
    if got < wanted {
        let _ = fs::write_existing(&file, &before.to_string());
        return Err(exhausted(got.saturating_sub(before)));
    }
    Ok((file, before))
}

/// `2M`, `1Gi`, `2097152`.
fn parse_size(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match text[digits.len()..].trim_end_matches('B').trim_end_matches(['i', 'b']) {
        "" => 1,
        "K" | "k" => 1 << 10,
        "M" | "m" => 1 << 20,
        "G" | "g" => 1 << 30,
        _ => 0,
    };
    let size = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).filter(|size| *size > 0);
    size.ok_or_else(|| Error::invalid(format!("{text:?} is not a size")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    #[test]
    fn sizes() {
        let known =
            [("2M", 2 << 20), ("2Mi", 2 << 20), ("1GB", 1 << 30), ("2048KiB", 2 << 20), ("64kb", 64 << 10), ("77", 77)];
        for (text, size) in known {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        assert!(["", "M", "0", "2T", "-1M", "99999999999G"].iter().all(|text| parse_size(text).is_err()));
    }

    #[test]
    fn huge_pages_are_added_to_the_pool() {
        let pools = TempDir::new("huge");
        let file = pools.file("hugepages-2048kB/nr_hugepages", "3\n");
        let options = ["pagesize=2M".to_string(), "size=8M".to_string()];
        let options: Vec<&String> = options.iter().collect();
        reserve(&pools.0, &options).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "7\n");
        assert!(reserve(&pools.0, &options[..1]).is_err());
        let odd = ["pagesize=2M".to_string(), "size=3M".to_string()];
        assert!(reserve(&pools.0, &odd.iter().collect::<Vec<_>>()).unwrap_err().message.contains("multiple"));
        let large = ["pagesize=1G".to_string(), "size=1G".to_string()];
        assert!(reserve(&pools.0, &large.iter().collect::<Vec<_>>()).unwrap_err().message.contains("1G"));
    }
}
