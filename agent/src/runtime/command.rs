//! Which file a command is, with runc's error messages when there is none, and the environment it gets.

use crate::errors::code;
use crate::prelude::*;
use crate::sys::{self, Errno, SysResult, AT_FDCWD};
use crate::syscall;

/// Finds the program of `args[0]` as the present user in the present root and directory (Go's exec.LookPath, whose
/// words the callers of runtimes look for).
pub fn find(args: &[String], env: &[String]) -> Result<String> {
    let Some(name) = args.first() else {
        return Err(Error::invalid("the process has no arguments"));
    };
    if name.contains('/') {
        return match check(name) {
            Ok(()) => Ok(name.clone()),
            Err((call, e)) => {
                let call = if call.is_empty() { String::new() } else { format!("{call} {name}: ") };
                Err(Error::new(code_of(e), format!("exec: {name:?}: {call}{e}")))
            }
        };
    }
    let path = env.iter().rev().find_map(|e| e.strip_prefix("PATH=")).unwrap_or("");
    for directory in path.split(':').filter(|_| !path.is_empty() && !name.is_empty()) {
        let candidate = format!("{}/{name}", if directory.is_empty() { "." } else { directory });
        if check(&candidate).is_ok() {
            return Ok(candidate);
        }
    }
    Err(Error::not_found(format!("exec: {name:?}: executable file not found in $PATH")))
}

/// The error of an execve that failed: a missing interpreter, a file that is no program.
pub fn exec_error(path: &str, e: Errno) -> Error {
    Error::new(code_of(e), format!("exec {path}: {e}"))
}

/// "Not found" and "cannot be executed" are different exit codes of the tools above us (127 and 126).
fn code_of(e: Errno) -> i32 {
    match e.0 {
        libc::ENOENT => code::NOT_FOUND,
        libc::EACCES | libc::EPERM | libc::EISDIR | libc::ENOTDIR | libc::ENOEXEC | libc::ELOOP => {
            code::PERMISSION_DENIED
        }
        _ => code::INTERNAL,
    }
}

/// The call that has failed (as Go names it) and why.
fn check(path: &str) -> core::result::Result<(), (&'static str, Errno)> {
    let stat = sys::stat(path).map_err(|e| ("stat", e))?;
    if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(("", Errno(libc::EISDIR)));
    }
    may_execute(path).map_err(|e| ("", e))
}

fn may_execute(path: &str) -> SysResult<()> {
    let path = sys::cstr(path)?;
    // SAFETY: NUL-terminated path.
    unsafe { syscall!(libc::SYS_faccessat2, AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) }.map(drop)
}

/// The environment with a HOME and without doubles (the last one counts, as in runc).
pub fn environment(env: &[String], home: &str) -> Vec<String> {
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    let mut kept: Vec<&String> = Vec::with_capacity(env.len() + 1);
    for variable in env {
        let Some((name, _)) = variable.split_once('=') else { continue };
        if let Some(place) = places.get(name) {
            kept[*place] = variable;
        } else {
            places.insert(name, kept.len());
            kept.push(variable);
        }
    }
    let has_home = places.get("HOME").is_some_and(|place| kept[*place].len() > "HOME=".len());
    let mut out: Vec<String> = kept.into_iter().filter(|e| has_home || *e != "HOME=").cloned().collect();
    if !has_home {
        out.push(format!("HOME={home}"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    fn find_words(name: &str, env: &[&str]) -> (i32, String) {
        let env: Vec<String> = env.iter().map(ToString::to_string).collect();
        let e = find(&[name.to_string()], &env).unwrap_err();
        (e.code, e.message)
    }

    #[test]
    fn missing_commands_are_told_in_runcs_words() {
        let not_found = "exec: \"nope\": executable file not found in $PATH".to_string();
        assert_eq!(find_words("nope", &["PATH=/bin"]), (code::NOT_FOUND, not_found.clone()));
        assert_eq!(find_words("nope", &[]), (code::NOT_FOUND, not_found));
        let nothing = "exec: \"\": executable file not found in $PATH".to_string();
        assert_eq!(find_words("", &["PATH=/bin"]), (code::NOT_FOUND, nothing));
        assert_eq!(
            find_words("/bin/nope", &[]),
            (code::NOT_FOUND, "exec: \"/bin/nope\": stat /bin/nope: no such file or directory".to_string())
        );
        let directory = TempDir::new("command");
        let plain = directory.file("plain", "no program");
        assert_eq!(find_words(&plain, &[]), (code::PERMISSION_DENIED, format!("exec: {plain:?}: permission denied")));
        assert_eq!(find_words("/etc", &[]), (code::PERMISSION_DENIED, "exec: \"/etc\": is a directory".to_string()));
        assert!(find(&[], &[]).is_err());
        let env = ["PATH=/nowhere".to_string(), "PATH=/nowhere:/bin".to_string()];
        assert_eq!(find(&["sh".to_string()], &env).unwrap(), "/bin/sh");
        assert_eq!(exec_error("/x", Errno(libc::ENOEXEC)).message, "exec /x: exec format error");
    }

    #[test]
    fn the_environment_has_a_home_and_no_doubles() {
        let env: Vec<String> = ["A=1", "B=2", "A=3", "junk", "HOME="].iter().map(ToString::to_string).collect();
        assert_eq!(environment(&env, "/root"), ["A=3", "B=2", "HOME=/root"]);
        assert_eq!(environment(&["HOME=/h".to_string()], "/root"), ["HOME=/h"]);
    }

    /// Service links make thousands of variables: each is looked up in a map, not compared with all before it.
    #[test]
    fn a_large_environment_takes_no_more_than_its_share() {
        let large: Vec<String> = (0..200_000).map(|n| format!("SERVICE_{n}_PORT=tcp://10.0.0.1:{n}")).collect();
        let out = environment(&large, "/root");
        assert_eq!((out.len(), &out[199_999], &out[200_000]), (200_001, &large[199_999], &"HOME=/root".to_string()));
    }
}
