//! What the containers of one guest have in common: host name, namespaces, storages, name servers.

use crate::connections::Connections;
use crate::container;
use crate::jobs::{Completion, Jobs};
use crate::paths::STATE_DIR;
use crate::policy::Policy;
use crate::prelude::*;
use crate::proto::agent as pb;
use crate::runtime::namespaces::Shared;
use crate::server::calls::CallId;
use crate::sys::{self, Fd, Fork, Pid};
use crate::watcher::Watcher;
use crate::{boot, fs, guest, log, storage};

#[derive(Default)]
pub struct Sandbox {
    created: bool,
    /// Namespaces that were made ahead: IPC and UTS.
    spare: Option<(Fd, Fd)>,
    ipc: Option<Fd>,
    uts: Option<Fd>,
    /// A PID namespace for containers to share, with the process that reaps there.
    pid: Option<(Fd, Pid)>,
    /// Whether all containers are in it, or only those that ask for it.
    pub all_share_pids: bool,
    /// Mount points, in the order of mounting.
    storages: Vec<String>,
    /// DestroySandbox has been called; this call is answered when all is down.
    destroyer: Option<CallId>,
    /// Which requests are answered; `None`: all.
    pub policy: Option<Policy>,
    /// How often GetMetrics was called.
    pub scrapes: u64,
}

impl Sandbox {
    pub fn shared(&self) -> Shared {
        Shared {
            ipc: self.ipc.as_ref().map(Fd::raw),
            uts: self.uts.as_ref().map(Fd::raw),
            pid: self.pid.as_ref().map(|(fd, _)| fd.raw()),
        }
    }

    /// A container has gone before there is a sandbox: this machine is being prepared for one. Its namespaces are made
    /// now, which takes the longer the less of the kernel has been translated.
    pub fn prepare(&mut self) {
        if !self.created && self.ipc.is_none() && self.spare.is_none() {
            self.spare = new_namespaces().inspect_err(|e| log::error(&e.message)).ok();
        }
    }

    /// Namespaces for the containers to share; the agent itself goes back to its own.
    fn make_namespaces(&mut self, hostname: &str) -> Result<()> {
        let (ipc, uts) = self.spare.take().map_or_else(new_namespaces, Ok)?;
        if !hostname.is_empty() {
            let own = own_namespace("uts")?;
            sys::setns(uts.raw(), libc::CLONE_NEWUTS).context("enter the sandbox's UTS namespace")?;
            let named = sys::sethostname(hostname).with_context(|| format!("set the host name {hostname:?}"));
            sys::setns(own.raw(), libc::CLONE_NEWUTS).context("go back to the agent's namespaces")?;
            named?;
        }
        self.ipc = Some(ipc);
        self.uts = Some(uts);
        Ok(())
    }

    /// The PID namespace that containers share which ask for it, with a process 1 that reaps; made once.
    pub fn make_pid_namespace(&mut self) -> Result<()> {
        if self.pid.is_some() {
            return Ok(());
        }
        match sys::fork(libc::CLONE_NEWPID as u64, None).context("make the sandbox's PID namespace")? {
            Fork::Child => reap_for_ever(),
            Fork::Parent(pid) => {
                let fd = sys::open(format!("/proc/{pid}/ns/pid"), libc::O_RDONLY, 0)
                    .context("open the sandbox's PID namespace")
                    .inspect_err(|_| {
                        let _ = sys::kill(pid, libc::SIGKILL);
                    })?;
                self.pid = Some((fd, pid));
                Ok(())
            }
        }
    }

    /// CreateSandbox. Modules are loaded and storages mounted by a job.
    pub fn create(
        &mut self,
        io: &mut Connections,
        jobs: &mut Jobs,
        watcher: &mut Watcher,
        call: CallId,
        request: &pb::CreateSandboxRequest,
    ) -> Result<()> {
        if self.created {
            return Err(Error::exists("the sandbox exists"));
        }
        if !request.sandbox_id.is_empty() {
            container::check_id(&request.sandbox_id)?;
        }
        if !request.guest_hook_path.is_empty() {
            return Err(Error::unimplemented(format!(
                "guest_hook_path {:?}: hooks that lie in the guest are not supported",
                request.guest_hook_path
            )));
        }
        fs::create_dir_all(&format!("{STATE_DIR}/sandbox"), 0o755).context("make the state directory")?;
        fs::create_dir_all(&format!("{STATE_DIR}/shared/containers"), 0o755).context("make the share's directory")?;
        if self.ipc.is_none() {
            self.make_namespaces(&request.hostname)?;
        }
        if request.sandbox_pidns {
            self.make_pid_namespace()?;
            self.all_share_pids = true;
        }
        // Also for the agent's own: containers without a UTS namespace of their own see it. Not on a host, where the
        // agent is not PID 1.
        if !request.hostname.is_empty() && sys::getpid() == 1 {
            sys::sethostname(&request.hostname).with_context(|| format!("set the host name {:?}", request.hostname))?;
        }
        write_resolv_conf(&request.dns)?;
        self.created = true;
        watcher.of_sandbox = storage::watched(&request.storages);
        if !watcher.of_sandbox.is_empty() {
            watcher.start(&io.poller)?;
        }
        self.storages = request.storages.iter().map(|s| s.mount_point.clone()).collect();
        if request.storages.is_empty() && request.kernel_modules.is_empty() {
            io.answer(call, Ok(vec![]));
            return Ok(());
        }
        jobs.spawn(&mut io.poller, Completion::Answer(call), &[], || {
            for module in &request.kernel_modules {
                guest::load_module(&module.name, &module.parameters)?;
            }
            for (count, wanted) in request.storages.iter().enumerate() {
                if let Err(e) = storage::mount_storage(wanted) {
                    for done in request.storages[..count].iter().rev() {
                        let _ = storage::unmount(&done.mount_point);
                    }
                    return Err(e);
                }
            }
            Ok(vec![])
        })
    }

    /// DestroySandbox: keeps the call until [`Sandbox::finish`].
    pub fn begin_destroy(&mut self, call: CallId) -> Result<()> {
        if self.destroyer.is_some() {
            return Err(Error::precondition("the sandbox is being destroyed already"));
        }
        self.destroyer = Some(call);
        Ok(())
    }

    /// Called when the last container is gone: if the sandbox is to be destroyed, what remains of it is taken down by a
    /// job (storages unmounted, data written back), whose end is the agent's.
    pub fn finish(&mut self, io: &mut Connections, jobs: &mut Jobs) {
        let Some(call) = self.destroyer else { return };
        if let Some((_, pid)) = self.pid.take() {
            let _ = sys::kill(pid, libc::SIGKILL);
        }
        let storages = core::mem::take(&mut self.storages);
        let spawned = jobs.spawn(&mut io.poller, Completion::PowerOff(call), &[], || {
            let mut outcome = Ok(vec![]);
            for mount in storages.iter().rev() {
                if let (Err(e), Ok(_)) = (storage::unmount(mount), &outcome) {
                    outcome = Err(e);
                }
            }
            sys::sync();
            outcome
        });
        if let Err(e) = spawned {
            log::error(&e.message);
            boot::power_off();
        }
    }
}

fn own_namespace(kind: &str) -> Result<Fd> {
    sys::open(format!("/proc/self/ns/{kind}"), libc::O_RDONLY, 0).with_context(|| format!("open own {kind} namespace"))
}

/// New IPC and UTS namespaces, in which nobody is.
fn new_namespaces() -> Result<(Fd, Fd)> {
    let (own_ipc, own_uts) = (own_namespace("ipc")?, own_namespace("uts")?);
    sys::unshare(libc::CLONE_NEWIPC | libc::CLONE_NEWUTS).context("make the sandbox's namespaces")?;
    let made = own_namespace("ipc").and_then(|ipc| Ok((ipc, own_namespace("uts")?)));
    sys::setns(own_ipc.raw(), libc::CLONE_NEWIPC)
        .and_then(|()| sys::setns(own_uts.raw(), libc::CLONE_NEWUTS))
        .context("go back to the agent's namespaces")?;
    made
}

/// Process 1 of a shared PID namespace: it reaps orphans and does nothing else.
fn reap_for_ever() -> ! {
    let _ = sys::close_range(0, 0);
    // Containers see this process; they must not be able to inspect it.
    let _ = sys::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
    // All signals blocked; as process 1 it is immune to those of its own namespace anyway.
    let _ = sys::set_signal_mask(u64::MAX);
    let _ = sys::prctl(libc::PR_SET_NAME, c"pause".as_ptr() as usize, 0, 0, 0);
    loop {
        match sys::wait4(-1, 0) {
            Ok(_) => {}
            // No children at the moment: the blocked SIGCHLD of the next one's end is waited for.
            Err(_) => sys::wait_signal(sys::signal_set(&[libc::SIGCHLD])),
        }
    }
}

fn write_resolv_conf(dns: &[String]) -> Result<()> {
    if dns.is_empty() {
        return Ok(());
    }
    let path = format!("{STATE_DIR}/sandbox/resolv.conf");
    fs::create_dir_all(&format!("{STATE_DIR}/sandbox"), 0o755).context("make the sandbox's directory")?;
    let mut text = dns.join("\n");
    text.push('\n');
    fs::write(&path, text.as_bytes()).with_context(|| format!("write {path}"))?;
    // The guest's own file, for programs outside of containers.
    if sys::getpid() == 1 {
        fs::write("/etc/resolv.conf", text.as_bytes()).context("write /etc/resolv.conf")?;
    }
    Ok(())
}
