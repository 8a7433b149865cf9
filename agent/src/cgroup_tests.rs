//! On whatever cgroup v2 hierarchy the machine has, with or without controllers.

use super::*;

/// A parent group of the test's own, gone when dropped.
struct Parent(String);

impl Parent {
    fn new(name: &str) -> Option<Parent> {
        let root = [ROOT, "/sys/fs/cgroup/unified"].into_iter().find(|path| {
            fs::exists(format!("{path}/cgroup.controllers")) && fs::exists(format!("{path}/cgroup.procs"))
        });
        let parent = root.map(|root| format!("{root}/kata-agent-{name}-{}", sys::getpid()));
        match &parent {
            Some(path) if fs::mkdir(path, 0o755).is_ok() => parent.map(Parent),
            _ => {
                eprintln!("skipped: no cgroup v2 hierarchy to write to");
                None
            }
        }
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        Cgroup { path: self.0.clone() }.kill_all().unwrap();
        Cgroup { path: self.0.clone() }.remove().unwrap();
    }
}

/// A child in the group that sleeps for ever, with a grandchild that does the same.
fn sleepers(group: &Cgroup) -> Pid {
    let directory = group.open().unwrap();
    match sys::fork(0, Some(directory.raw())).unwrap() {
        sys::Fork::Child => {
            let _ = sys::fork(0, None);
            loop {
                sys::sleep_ms(1_000_000);
            }
        }
        sys::Fork::Parent(pid) => pid,
    }
}

#[test]
fn processes_are_listed_frozen_killed_and_the_group_removed() {
    let Some(parent) = Parent::new("life") else { return };
    let group = Cgroup::create_below(&parent.0, "box", None).unwrap();
    assert_eq!(Cgroup::create_below(&parent.0, "box", None).unwrap(), group, "a left-over is reused");
    assert!(group.is_empty().unwrap());
    let child = sleepers(&group);
    while group.pids().unwrap().len() < 2 {
        sys::sleep_ms(1);
    }
    assert!(group.pids().unwrap().contains(&child) && !group.is_empty().unwrap());
    // A group that the container made for itself counts as well.
    let inner = Cgroup::create_below(group.path(), "inner", None).unwrap();
    inner.add(child).unwrap();
    assert_eq!(group.pids().unwrap().len(), 2);
    assert_eq!(inner.pids().unwrap(), [child]);
    assert_eq!(group.try_remove(), Err(Errno(libc::EBUSY)));

    group.freeze().unwrap();
    let state = fs::read_to_string(format!("{}/cgroup.events", group.path())).unwrap();
    assert!(state.contains("frozen 1"));
    group.thaw().unwrap();
    group.freeze().unwrap();
    group.kill_all().unwrap();
    assert_eq!(sys::wait_exit(child), Ok(137));
    group.remove().unwrap();
    assert!(!fs::exists(group.path()) && group.pids().unwrap().is_empty());
    group.remove().unwrap();
    assert!(group.stats().is_err());
}

#[test]
fn killing_one_by_one_gets_them_all() {
    let Some(parent) = Parent::new("kill") else { return };
    let group = Cgroup::create_below(&parent.0, "box", None).unwrap();
    let child = sleepers(&group);
    group.kill_each().unwrap();
    assert_eq!(sys::wait_exit(child), Ok(137));
    group.remove().unwrap();
}

#[test]
fn names_cannot_lead_elsewhere() {
    for id in ["", ".", "..", "a/b", "../x", "a\n"] {
        assert!(Cgroup::create_below("/nonexistent", id, None).is_err(), "{id:?}");
    }
}

#[test]
fn a_limit_without_its_controller_is_an_error_that_names_it() {
    let Some(parent) = Parent::new("limit") else { return };
    let group = Cgroup::create_below(&parent.0, "box", None).unwrap();
    if fs::exists(format!("{}/pids.max", group.path())) {
        return;
    }
    let pids = Some(Box::new(crate::proto::oci::LinuxPids { limit: 5 }));
    let error = group.apply(&LinuxResources { pids, ..Default::default() }).unwrap_err();
    assert!(error.message.contains("\"pids\"") && error.message.contains("pids.limit = 5"), "{error}");
    assert!(group.stats().unwrap().pids_stats.is_none());
}
