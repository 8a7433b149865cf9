//! The guest's packet filter as text (GetIPTables, SetIPTables), by programs that a guest has only when its initrd was
//! given the extension `iptables`.

use crate::fs;
use crate::prelude::*;
use crate::sys::{self, CStringArray, Fd, Fork, SysResult};
use crate::syscall;

/// A root directory of its own, with the libraries that the programs need.
const ROOT: &str = "/ext/iptables";
/// How much of a program's error output is passed on.
const MAX_WORDS: usize = 1000;

/// All rules, as `iptables-save` writes them.
pub fn save(ipv6: bool) -> Result<Vec<u8>> {
    run(if ipv6 { "ip6tables-save" } else { "iptables-save" }, &[])
}

/// Replaces the tables that `rules` names.
pub fn restore(ipv6: bool, rules: &[u8]) -> Result<Vec<u8>> {
    run(if ipv6 { "ip6tables-restore" } else { "iptables-restore" }, rules)
}

/// Runs a program to its end; its output. For a child of the agent's.
fn run(name: &str, input: &[u8]) -> Result<Vec<u8>> {
    let path = format!("/usr/sbin/{name}");
    if !fs::is_dir(ROOT) {
        return Err(Error::precondition(format!(
            "the guest has no {name}: it was started without the extension \"iptables\" (kata guest build --extension)"
        )));
    }
    // Files, not pipes: so that reading and writing need not be interleaved.
    let files = [memory_file(), memory_file(), memory_file()];
    let [Ok(stdin), Ok(stdout), Ok(stderr)] = &files else {
        return Err(Error::exhausted(format!("no memory for the streams of {name}")));
    };
    sys::write_all(stdin.raw(), input).with_context(|| format!("hand {name} its input"))?;
    rewind(stdin)?;
    let (argv, envp) = (CStringArray::new(&[name])?, CStringArray::new(&["PATH=/usr/sbin"])?);
    let status = match sys::fork(0, None).context("fork")? {
        Fork::Child => {
            let entered = || -> SysResult<()> {
                sys::chroot(ROOT)?;
                sys::chdir("/")?;
                for (number, file) in [stdin, stdout, stderr].into_iter().enumerate() {
                    sys::dup_to(file.raw(), number as sys::RawFd)?;
                }
                sys::default_signals();
                sys::set_signal_mask(0).map(drop)
            };
            if entered().is_ok() {
                let _ = sys::execve(&path, &argv, &envp);
            }
            sys::exit(127)
        }
        Fork::Parent(pid) => sys::wait_exit(pid).with_context(|| format!("wait for {name}"))?,
    };
    if status == 0 {
        rewind(stdout)?;
        return fs::read_fd(stdout.raw()).with_context(|| format!("read the output of {name}"));
    }
    rewind(stderr)?;
    let errors = fs::read_fd(stderr.raw()).unwrap_or_default();
    let words = String::from_utf8_lossy(&errors[..errors.len().min(MAX_WORDS)]).trim().to_string();
    Err(match status {
        127 => Error::internal(format!("{name} of the guest's extension cannot be executed")),
        _ if input.is_empty() => Error::internal(format!("{name} ended with {status}: {words}")),
        _ => Error::invalid(format!("{name} ended with {status}: {words}")),
    })
}

fn memory_file() -> SysResult<Fd> {
    // SAFETY: NUL-terminated name.
    unsafe { syscall!(libc::SYS_memfd_create, c"iptables".as_ptr(), libc::MFD_CLOEXEC) }
        .map(|fd| Fd::from_raw(fd as sys::RawFd))
}

fn rewind(file: &Fd) -> Result<()> {
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_lseek, file.raw(), 0, libc::SEEK_SET) }.map(drop).context("rewind a memory file")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::code;

    #[test]
    fn without_the_extension_that_is_said() {
        let missing = save(true).unwrap_err();
        assert_eq!(missing.code, code::FAILED_PRECONDITION);
        assert!(missing.message.contains("ip6tables-save") && missing.message.contains("extension"), "{missing}");
    }

    #[test]
    fn memory_files_are_read_from_their_start() {
        let file = memory_file().unwrap();
        sys::write_all(file.raw(), b"text").unwrap();
        rewind(&file).unwrap();
        assert_eq!(fs::read_fd(file.raw()).unwrap(), b"text");
    }
}
