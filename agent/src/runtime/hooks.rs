//! startContainer hooks: run in the container, by the container's process, right before it becomes the program.
//!
//! Errors are worded as runc words them: its callers read them.

use crate::prelude::*;
use crate::proto::oci::Hook;
use crate::sys::{self, CStringArray, Fork};

/// Runs the hooks one after the other; the first that fails ends the start.
///
/// A hook without an environment has the program's.
pub fn run(hooks: &[Hook], env: &CStringArray, container: &str) -> Result<()> {
    for (number, hook) in hooks.iter().enumerate() {
        run_one(hook, env, container)
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

fn run_one(hook: &Hook, env: &CStringArray, container: &str) -> Result<()> {
    let (input, feed) = sys::pipe(0).context("make a pipe")?;
    let pid = match sys::fork(0, None).context("fork")? {
        Fork::Child => {
            let args = if hook.args.is_empty() { core::slice::from_ref(&hook.path) } else { &hook.args[..] };
            if let (Ok(argv), Ok(own)) = (CStringArray::new(args), CStringArray::new(&hook.env)) {
                let _ = sys::dup_to(input.raw(), 0);
                let _ = sys::close_range(3, libc::CLOSE_RANGE_CLOEXEC);
                sys::execve(&hook.path, &argv, if hook.env.is_empty() { env } else { &own });
            }
            sys::exit(127)
        }
        Fork::Parent(pid) => pid,
    };
    drop(input);
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
    match sys::wait_exit(pid).context("wait for it")? {
        0 => Ok(()),
        code => Err(Error::internal(format!("exit status {code}"))),
    }
}
