//! The agent of the virtual machine: ttRPC server and OCI container runtime, PID 1 of the guest.
//!
//! **No C library, no `std`** (tests excepted). An empty static glibc program is 680 KB and an empty static Rust `std`
//! program 1.1 MB; every byte of the initrd is guest memory. So the crate is `core` + `alloc`:
//!
//! * every file starts with `use crate::prelude::*;` (String, Vec, Box, format!, vec!, BTreeMap, ToString ...);
//! * system calls go through [`sys`] (thin, `Result<_, Errno>`, owned descriptors close themselves and are always
//!   CLOEXEC) and small file helpers through [`fs`]; paths are `&str`;
//! * the `libc` crate gives constants and structures only: calling one of its functions is a link error;
//! * one thread, no signal handlers (signalfd): plain `Cell`/`RefCell` state, fork without fear.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod agent;
pub mod boot;
pub mod cgroup;
mod cgroup_limits;
mod cgroup_stats;
mod clock;
pub mod cmdline;
pub mod connections;
pub mod container;
mod container_calls;
pub mod copyfile;
pub mod datagrams;
pub mod debug;
pub mod devices;
pub mod devices_bpf;
pub mod dial;
pub mod dispatch;
pub mod errors;
pub mod files;
pub mod fs;
pub mod guest;
mod huge_pages;
mod internet;
mod iptables;
pub mod jobs;
mod json;
mod layers;
mod lifecycle;
pub mod log;
pub mod metrics;
pub mod mountopts;
pub mod netlink;
pub mod network;
mod oom;
mod ownership;
mod paths;
mod pci_path;
mod pci_scan;
mod policy;
pub mod poller;
pub mod prelude;
pub mod process;
mod process_events;
pub mod process_list;
pub mod processes;
pub mod proto;
pub mod routes;
pub mod rt;
mod rtnl;
pub mod runtime;
pub mod sandbox;
pub mod seccomp;
pub mod server;
mod sk_lookup;
pub mod sockets;
pub mod sort;
pub mod state;
pub mod storage;
pub mod streams;
pub mod swap;
pub mod sys;
pub mod syscalls;
#[cfg(test)]
mod test_support;
pub mod thrash;
pub mod trace;
pub mod uevent;
pub mod volume_disk;
pub mod volumes;
mod watchable;
mod watcher;

/// The program after its entry point; the exit code.
///
/// # Safety
/// `argv` points to `argc` NUL-terminated strings.
pub unsafe fn start(argc: usize, argv: *const *const core::ffi::c_char) -> i32 {
    let started_ns = sys::clock_ns(libc::CLOCK_BOOTTIME);
    // SAFETY: by the contract above.
    let arguments = unsafe { rt::arguments(argc, argv) };
    let settings = if sys::getpid() == 1 && !cmdline::asks_version(&arguments) {
        boot::init()
    } else {
        match cmdline::parse_arguments(&arguments) {
            Ok(cmdline::Command::Serve(settings)) => settings,
            Ok(cmdline::Command::Version) => return say(1, concat!("kata-agent ", env!("CARGO_PKG_VERSION"), "\n"), 0),
            Ok(cmdline::Command::Help) => return say(1, cmdline::USAGE, 0),
            Err(e) => return say(2, &alloc::format!("kata-agent: {e}\n{}", cmdline::USAGE), 1),
        }
    };
    log::set_level(settings.level);
    match serve(settings, started_ns) {
        Ok(()) => boot::power_off(),
        Err(e) => {
            log::error(&e.message);
            // A guest that cannot be reached is useless; powering it off tells the host at once.
            if sys::getpid() == 1 {
                boot::power_off();
            }
            1
        }
    }
}

fn say(fd: sys::RawFd, text: &str, code: i32) -> i32 {
    if sys::write_all(fd, text.as_bytes()).is_ok() {
        code
    } else {
        1
    }
}

fn serve(settings: cmdline::Settings, started_ns: u64) -> errors::Result<()> {
    use errors::Context;
    let mut agent = agent::Agent::new(settings)?;
    agent.state.boot.kernel_ns = started_ns;
    if sys::getpid() == 1 {
        for (what, done) in [
            ("control groups", cgroup::setup_root().and_then(|()| agent.state.oom.use_cgroups(&agent.state.io.poller))),
            ("loopback", netlink::bring_up_loopback()),
        ] {
            if let Err(e) = done {
                log::error(&alloc::format!("{what}: {e}"));
            }
        }
    } else {
        leave_host_alone().context("be a guest on somebody's machine (needs root)")?;
    }
    agent.listen()?;
    let state = &mut agent.state;
    state.debug_ports.open(&state.io.poller, &state.settings);
    log::info(concat!("kata-agent ", env!("CARGO_PKG_VERSION"), " is serving"));
    agent.run();
    if sys::getpid() != 1 {
        agent.end_as_process();
        let _ = sys::umount(paths::STATE_DIR, libc::MNT_DETACH);
        let _ = fs::remove_dir(paths::STATE_DIR);
    }
    Ok(())
}

/// As an ordinary process: mounts and files for containers are hidden in a mount namespace, and control groups are left
/// alone.
fn leave_host_alone() -> errors::Result<()> {
    use errors::Context;
    sys::unshare(libc::CLONE_NEWNS).context("make a mount namespace")?;
    sys::mount("", "/", "", libc::MS_REC | libc::MS_SLAVE, "").context("make / a slave")?;
    fs::create_dir_all(paths::STATE_DIR, 0o755).context("make the state directory")?;
    sys::mount("tmpfs", paths::STATE_DIR, "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "mode=0755")
        .context("mount the state directory")
}
