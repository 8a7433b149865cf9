//! For unit tests that need namespaces or directories of their own.

use crate::container::{Container, NewContainer};
use crate::fs;
use crate::process::Key;
use crate::runtime::namespaces::Namespaces;
use crate::sys;

/// Runs `check` in a thread with namespaces (`libc::CLONE_NEW*`) of its own, which end with it. False, with a word on
/// stderr, where that is not allowed.
pub fn in_namespaces(kinds: i32, check: impl FnOnce() + Send) -> bool {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Err(e) = sys::unshare(kinds) {
                eprintln!("skipped: no namespaces: {e}");
                return false;
            }
            if kinds & libc::CLONE_NEWNS != 0 {
                sys::mount("", "/", "", libc::MS_REC | libc::MS_PRIVATE, "").unwrap();
            }
            check();
            true
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A directory below /tmp, removed with all that is in it when dropped.
pub struct TempDir(pub String);

impl TempDir {
    pub fn new(name: &str) -> TempDir {
        let path = format!("/tmp/kata-agent-{name}-{}-{}", sys::getpid(), sys::monotonic_ns());
        fs::create_dir_all(&path, 0o755).unwrap();
        TempDir(path)
    }

    /// Makes a file, and the directories above it.
    pub fn file(&self, path: &str, text: &str) -> String {
        let path = format!("{}/{path}", self.0);
        fs::create_dir_all(&path[..path.rfind('/').unwrap()], 0o755).unwrap();
        fs::write(&path, text.as_bytes()).unwrap();
        path
    }

    pub fn dir(&self, path: &str) -> String {
        let path = format!("{}/{path}", self.0);
        fs::create_dir_all(&path, 0o755).unwrap();
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A container's record with nothing behind it; its first process is called `first`.
pub fn container(init: Key) -> Container {
    let new = NewContainer {
        init_exec_id: "first".into(),
        cgroup: None,
        namespaces: Namespaces::default(),
        filter: None,
        root: String::new(),
        storages: vec![],
        watched: vec![],
        name: None,
        termination_log: None,
    };
    Container::new(new, init)
}
