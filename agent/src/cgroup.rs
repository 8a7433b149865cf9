//! Control groups of the containers (v2 only), below `/sys/fs/cgroup/kata`.
//!
//! This file makes, fills, freezes, kills and removes them; limits are in `cgroup_limits`, numbers in `cgroup_stats`.
//! The agent itself stays in the root, which alone may hold processes beside sub-groups with controllers.

use crate::cgroup_limits::{self, missing_controller};
use crate::cgroup_stats;
use crate::fs;
use crate::prelude::*;
use crate::proto::agent::CgroupStats;
use crate::proto::oci::LinuxResources;
use crate::sys::{self, Errno, Fd, Pid};

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The parent of all containers' groups.
const CONTAINERS: &str = "/sys/fs/cgroup/kata";

/// The control group of a process, opened; `None` if the process or its group no longer exists.
pub fn of_process(pid: Pid) -> Option<Fd> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    sys::open(format!("{ROOT}{path}"), libc::O_RDONLY | libc::O_DIRECTORY, 0).ok()
}

/// How long to wait until all processes of a group have stopped or ended; far more than the kernel needs.
const PATIENCE_MS: u64 = 10_000;

/// Mounts the hierarchy if it is not there yet and gives every controller to the groups below the root.
pub fn setup_root() -> Result<()> {
    let mounted = fs::exists(format!("{ROOT}/cgroup.controllers"));
    if !mounted {
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        sys::mount("cgroup2", ROOT, "cgroup2", flags, "nsdelegate,memory_recursiveprot")
            // Kernels before 5.7 do not know the second option.
            .or_else(|_| sys::mount("cgroup2", ROOT, "cgroup2", flags, "nsdelegate"))
            .with_context(|| format!("mount the cgroup v2 hierarchy on {ROOT}"))?;
    }
    delegate(ROOT)
}

/// The control group of one container. Dropping the value leaves the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    path: String,
}

impl Cgroup {
    /// Makes the group of container `id` (a single path component) with its limits; a left-over one is reused.
    pub fn create(id: &str, resources: Option<&LinuxResources>) -> Result<Cgroup> {
        Cgroup::create_below(CONTAINERS, id, resources)
    }

    /// Like [`Cgroup::create`] below another parent, which is made if need be.
    pub fn create_below(parent: &str, id: &str, resources: Option<&LinuxResources>) -> Result<Cgroup> {
        if id.is_empty() || id == "." || id == ".." || id.contains(['/', '\0', '\n']) {
            return Err(Error::invalid(format!("{id:?} cannot name a control group")));
        }
        if !fs::is_dir(parent) {
            fs::mkdir(parent, 0o755).with_context(|| format!("make the control group {parent}"))?;
            delegate(parent)?;
        }
        let group = Cgroup { path: format!("{parent}/{id}") };
        match fs::mkdir(&group.path, 0o755) {
            Err(Errno(libc::EEXIST)) => {}
            other => other.with_context(|| format!("make the control group {}", group.path))?,
        }
        if let Some(resources) = resources {
            group.apply(resources).inspect_err(|_| {
                let _ = fs::remove_dir(&group.path);
            })?;
        }
        Ok(group)
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// The directory, for CLONE_INTO_CGROUP and for device programs.
    pub fn open(&self) -> Result<Fd> {
        sys::open(&self.path, libc::O_RDONLY | libc::O_DIRECTORY, 0)
            .with_context(|| format!("open the control group {}", self.path))
    }

    /// Moves a process (all of its threads) into the group.
    pub fn add(&self, pid: Pid) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Sets the limits that `resources` names, leaves the others; on an error nothing is changed. Device rules are
    /// [`crate::devices_bpf`]'s.
    pub fn apply(&self, resources: &LinuxResources) -> Result<cgroup_limits::Undo> {
        cgroup_limits::apply(&self.path, resources)
    }

    /// Stops all processes of the group; returns when they have stopped.
    pub fn freeze(&self) -> Result<()> {
        self.write("cgroup.freeze", "1")?;
        if self.wait_for_event("frozen 1", PATIENCE_MS)? {
            return Ok(());
        }
        self.thaw()?;
        Err(Error::deadline(format!("the processes in {} did not stop: one of them hangs in the kernel", self.path)))
    }

    pub fn thaw(&self) -> Result<()> {
        self.write("cgroup.freeze", "0")
    }

    /// SIGKILL to every process in the group and below it, also if frozen. Does not wait for their end.
    pub fn kill_all(&self) -> Result<()> {
        match fs::write_existing(format!("{}/cgroup.kill", self.path), "1") {
            Ok(()) => Ok(()),
            // The group is gone, or the kernel older than 5.14.
            Err(Errno(libc::ENOENT)) => self.kill_each(),
            Err(e) => Err(e).with_context(|| format!("kill the processes of {}", self.path)),
        }
    }

    /// Kills one by one. Frozen processes cannot fork away from the loop.
    fn kill_each(&self) -> Result<()> {
        let frozen = self.freeze().is_ok();
        for pid in self.pids()? {
            match sys::kill(pid, libc::SIGKILL) {
                Ok(()) | Err(Errno(libc::ESRCH)) => {}
                Err(e) => return Err(e).with_context(|| format!("kill process {pid}")),
            }
        }
        if frozen {
            self.thaw()?;
        }
        Ok(())
    }

    /// The processes in the group and below it, as the caller's PID namespace numbers them. A missing group is empty.
    pub fn pids(&self) -> Result<Vec<Pid>> {
        let mut pids = Vec::new();
        for group in self.tree()? {
            match fs::read_to_string(format!("{group}/cgroup.procs")) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<Pid>().ok())),
                // A threaded group's processes are listed by the group that holds them; a removed one has none.
                Err(Errno(libc::EOPNOTSUPP | libc::ENODEV | libc::ENOENT)) => {}
                Err(e) => return Err(e).with_context(|| format!("list the processes of {group}")),
            }
        }
        // Numbers of processes outside the caller's PID namespace are 0.
        pids.retain(|pid| *pid != 0);
        Ok(pids)
    }

    pub fn is_empty(&self) -> Result<bool> {
        match fs::read_to_string(format!("{}/cgroup.events", self.path)) {
            Ok(text) => Ok(!text.lines().any(|line| line == "populated 1")),
            Err(Errno(libc::ENOENT | libc::ENODEV)) => Ok(true),
            Err(e) => Err(e).with_context(|| format!("read {}/cgroup.events", self.path)),
        }
    }

    /// Removes the group and what the container has made below it, once its processes are gone.
    pub fn remove(&self) -> Result<()> {
        let mut waited = 0;
        let mut pause = 1;
        loop {
            match self.try_remove() {
                Err(Errno(libc::EBUSY)) if waited < PATIENCE_MS => {
                    sys::sleep_ms(pause);
                    waited += pause;
                    pause = (pause * 2).min(100);
                }
                other => return other.with_context(|| format!("remove the control group {}", self.path)),
            }
        }
    }

    /// One attempt: EBUSY while a process is left.
    pub fn try_remove(&self) -> sys::SysResult<()> {
        // Children come before their parents.
        for group in self.tree()?.iter().rev() {
            match fs::remove_dir(group) {
                Ok(()) | Err(Errno(libc::ENOENT)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The group and every one below it, parents first; empty when it does not exist.
    fn tree(&self) -> sys::SysResult<Vec<String>> {
        if !fs::is_dir(&self.path) {
            return Ok(Vec::new());
        }
        let mut groups = vec![self.path.clone()];
        let mut at = 0;
        while at < groups.len() {
            match fs::read_dir(&groups[at]) {
                Ok(entries) => {
                    for entry in entries.iter().filter(|entry| entry.kind == libc::DT_DIR) {
                        let name = String::from_utf8_lossy(&entry.name);
                        groups.push(format!("{}/{name}", groups[at]));
                    }
                }
                Err(Errno(libc::ENOENT)) => {}
                Err(e) => return Err(e),
            }
            at += 1;
        }
        Ok(groups)
    }

    /// Usage of everything that the kernel counts for the group.
    pub fn stats(&self) -> Result<CgroupStats> {
        cgroup_stats::read(&self.path)
    }

    /// How many processes of the group (or below it) the kernel has killed for lack of memory so far.
    pub fn oom_kill_count(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("{}/memory.events", self.path))
            .with_context(|| format!("read {}/memory.events", self.path))?;
        Ok(cgroup_stats::value_of(&text, "oom_kill").unwrap_or(0))
    }

    /// A non-blocking inotify descriptor that becomes readable when [`Cgroup::oom_kill_count`] may have changed.
    pub fn watch_oom(&self) -> Result<Fd> {
        let watch = sys::inotify().context("make an inotify descriptor")?;
        self.watch_oom_on(watch.raw())?;
        Ok(watch)
    }

    /// Like [`Cgroup::watch_oom`] on a descriptor that serves several groups; the number of the watch.
    pub fn watch_oom_on(&self, inotify: sys::RawFd) -> Result<i32> {
        let file = format!("{}/memory.events", self.path);
        match sys::inotify_add_watch(inotify, &file, libc::IN_MODIFY) {
            Err(Errno(libc::ENOENT)) if fs::is_dir(&self.path) => {
                Err(missing_controller("memory", "watch for OOM kills"))
            }
            other => other.with_context(|| format!("watch {file}")),
        }
    }

    /// Waits until `cgroup.events` has the line; false when the time is over first.
    fn wait_for_event(&self, line: &str, patience_ms: u64) -> Result<bool> {
        let path = format!("{}/cgroup.events", self.path);
        let file = sys::open(&path, libc::O_RDONLY, 0).with_context(|| format!("open {path}"))?;
        let deadline = sys::monotonic_ns() + patience_ms * 1_000_000;
        let mut text = [0u8; 256];
        loop {
            let len = sys::pread(file.raw(), &mut text, 0).with_context(|| format!("read {path}"))?;
            if text[..len].split(|byte| *byte == b'\n').any(|candidate| candidate == line.as_bytes()) {
                return Ok(true);
            }
            let left = deadline.saturating_sub(sys::monotonic_ns()) / 1_000_000;
            if left == 0 {
                return Ok(false);
            }
            // kernfs announces a change since the last read as POLLPRI.
            sys::poll_one(file.raw(), libc::POLLPRI, left as i32).with_context(|| format!("poll {path}"))?;
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        fs::write_existing(format!("{}/{file}", self.path), value)
            .with_context(|| format!("write {value} to {}/{file}", self.path))
    }
}

/// Makes every controller of a group available to its children.
fn delegate(path: &str) -> Result<()> {
    let available = fs::read_to_string(format!("{path}/cgroup.controllers"))
        .with_context(|| format!("read {path}/cgroup.controllers"))?;
    let control = format!("{path}/cgroup.subtree_control");
    let all: Vec<String> = available.split_whitespace().map(|controller| format!("+{controller}")).collect();
    if all.is_empty() || fs::write_existing(&control, &all.join(" ")).is_ok() {
        return Ok(());
    }
    // All or nothing in one write: so they are enabled one by one. A controller that is not available (cpu, while a
    // real-time process runs) must not cost the others; a limit that needs a missing one fails by name.
    for controller in &all {
        let _ = fs::write_existing(&control, controller);
    }
    Ok(())
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
