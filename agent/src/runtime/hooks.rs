//! startContainer hooks: run in the container, by the container's process, right before it becomes the program.
//!
//! Errors are worded as runc words them: its callers read them.

use super::command;
use crate::prelude::*;
use crate::proto::oci::Hook;
use crate::sys::{self, CStringArray, Fork, Pid};

/// Longest text of a child about why it did not become its hook.
const MOST_SAID: usize = 4096;

/// Runs the hooks one after the other; the first that fails ends the start.
///
/// A hook without an environment has the program's. Each calls `confine` right before it is executed, so that it has
/// the program's system call filter and capabilities, as with runc. The caller is not confined yet: whatever the filter
/// is, it can make the hooks and wait for them.
pub fn run(hooks: &[Hook], env: &CStringArray, container: &str, confine: &dyn Fn() -> Result<()>) -> Result<()> {
    for (number, hook) in hooks.iter().enumerate() {
        run_one(hook, env, container, confine)
            .with_context(|| format!("error running startContainer hook #{number}: {}", hook.path))?;
    }
    Ok(())
}

/// The container's state as the runtime specification wants it on a hook's standard input.
fn state(container: &str) -> String {
    // An id has no characters that JSON would escape.
    format!(
        "{{\"ociVersion\":\"1.0.2\",\"id\":\"{container}\",\"status\":\"created\",\"pid\":1,\
         \"bundle\":\"/run/kata-containers/{container}\"}}"
    )
}

fn run_one(hook: &Hook, env: &CStringArray, container: &str, confine: &dyn Fn() -> Result<()>) -> Result<()> {
    let (input, feed) = sys::pipe(0).context("make a pipe")?;
    let (news, tell) = sys::pipe(0).context("make a pipe")?;
    let pid = match sys::fork(0, None).context("fork")? {
        Fork::Child => {
            let Err(error) = become_hook(hook, env, input.raw(), confine);
            let _ = sys::write_all(tell.raw(), error.message.as_bytes());
            sys::exit(127)
        }
        Fork::Parent(pid) => pid,
    };
    drop((input, tell));
    // A few hundred bytes always fit into the pipe; a hook that does not read is no error.
    let _ = sys::write_all(feed.raw(), state(container).as_bytes());
    drop(feed);
    if hook.timeout > 0 {
        let watched = sys::pidfd_open(pid).context("watch it")?;
        let patience = i32::try_from(hook.timeout.saturating_mul(1000)).unwrap_or(i32::MAX);
        if sys::poll_one(watched.raw(), libc::POLLIN, patience).context("wait for it")? == 0 {
            let _ = sys::kill(pid, libc::SIGKILL);
            let _ = sys::wait_exit(pid);
            return Err(Error::internal(format!("still running after {} s", hook.timeout)));
        }
    }
    let end = how_it_ended(pid);
    // The pipe is at its end once the hook was executed.
    let mut said = Vec::new();
    if sys::read_append(news.raw(), &mut said, MOST_SAID).context("ask how it went")? > 0 {
        return Err(Error::internal(String::from_utf8_lossy(&said).into_owned()));
    }
    end
}

/// Only returns when that fails.
fn become_hook(
    hook: &Hook,
    env: &CStringArray,
    input: sys::RawFd,
    confine: &dyn Fn() -> Result<()>,
) -> Result<core::convert::Infallible> {
    let args = if hook.args.is_empty() { core::slice::from_ref(&hook.path) } else { &hook.args[..] };
    let (argv, own) =
        (CStringArray::new(args).context("arguments")?, CStringArray::new(&hook.env).context("environment")?);
    sys::dup_to(input, 0).context("connect its input")?;
    sys::close_range(3, libc::CLOSE_RANGE_CLOEXEC).context("mark descriptors")?;
    confine()?;
    Err(command::exec_error(&hook.path, sys::execve(&hook.path, &argv, if hook.env.is_empty() { env } else { &own })))
}

/// Waits for a hook.
fn how_it_ended(pid: Pid) -> Result<()> {
    let status = sys::wait4(pid, 0).context("wait for it")?.map_or(0, |(_, status)| status);
    if status == 0 {
        return Ok(());
    }
    Err(Error::internal(how(status)))
}

/// A wait status in the words of Go's `ProcessState`, which runc has.
fn how(status: i32) -> String {
    match status & 0x7f {
        0 => format!("exit status {}", sys::exit_code(status)),
        libc::SIGKILL => "signal: killed".into(),
        libc::SIGSEGV => "signal: segmentation fault".into(),
        libc::SIGSYS => "signal: bad system call".into(),
        number => format!("signal: signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(args: &[&str], timeout: i64) -> Hook {
        Hook { path: args[0].into(), args: args.iter().map(ToString::to_string).collect(), timeout, ..Hook::default() }
    }

    fn error(hooks: &[Hook], confine: &dyn Fn() -> Result<()>) -> String {
        let env = CStringArray::new(&[] as &[&str]).unwrap();
        run(hooks, &env, "box", confine).unwrap_err().message
    }

    #[test]
    fn the_first_that_fails_is_named_with_how_it_ended() {
        let free = || Ok(());
        let env = CStringArray::new(&[] as &[&str]).unwrap();
        let reads = hook(&["/bin/sh", "-c", "grep -q '\"id\":\"box\"'"], 0);
        assert_eq!(run(core::slice::from_ref(&reads), &env, "box", &free), Ok(()));
        for (script, how) in [
            ("exit 3", "exit status 3"),
            ("exit 137", "exit status 137"),
            ("kill -KILL $$", "signal: killed"),
            ("kill -SYS $$", "signal: bad system call"),
            ("kill -TERM $$", "signal: signal 15"),
        ] {
            let said = error(&[reads.clone(), hook(&["/bin/sh", "-c", script], 5)], &free);
            assert_eq!(said, format!("error running startContainer hook #1: /bin/sh: {how}"));
        }
        let said = error(&[hook(&["/no/such"], 0)], &free);
        assert!(said.ends_with("#0: /no/such: exec /no/such: no such file or directory"), "{said}");
    }

    #[test]
    fn each_is_confined_and_who_waits_is_not() {
        let confined = || sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).map(drop).context("set no_new_privs");
        let env = CStringArray::new(&[] as &[&str]).unwrap();
        let sees = hook(&["/bin/grep", "-q", "^NoNewPrivs:.*1", "/proc/self/status"], 0);
        let before = sys::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0).unwrap();
        assert_eq!(run(&[sees.clone(), sees.clone()], &env, "box", &confined), Ok(()));
        assert_eq!(sys::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0).unwrap(), before);
        let said = error(&[sees], &|| Err(Error::internal("no filter")));
        assert!(said.ends_with("/bin/grep: no filter"), "{said}");
    }
}
