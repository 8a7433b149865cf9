//! The kernel's kills for lack of memory, and the calls that wait for news of one.

use crate::cgroup::Cgroup;
use crate::connections::Connections;
use crate::container::Containers;
use crate::log;
use crate::poller::{Poller, Token};
use crate::prelude::*;
use crate::proto::agent as pb;
use crate::proto::codec::Message;
use crate::server::calls::CallId;
use crate::sys::{self, Fd};
use crate::thrash;
use alloc::collections::VecDeque;

/// The most events kept while no call waits for them.
const MAX_EVENTS: usize = 64;

/// Watches the memory limits of containers. Without control groups of our own (on a host) it watches nothing.
#[derive(Default)]
pub struct OomWatch {
    inotify: Option<Fd>,
    /// Container ids of kills that have not been reported to a call yet.
    events: VecDeque<String>,
    /// GetOOMEvent calls.
    waiters: VecDeque<CallId>,
    /// When containers were last looked at for being stuck at their memory limits (CLOCK_MONOTONIC).
    thrash_looked_ns: u64,
}

impl OomWatch {
    /// Takes charge of control groups (the guest's, all of them).
    pub fn use_cgroups(&mut self, poller: &Poller) -> Result<()> {
        let inotify = sys::inotify().context("create an inotify descriptor")?;
        poller.watch(inotify.raw(), Token::OomWatch, libc::EPOLLIN as u32)?;
        self.inotify = Some(inotify);
        Ok(())
    }

    /// Whether containers get control groups.
    pub fn has_cgroups(&self) -> bool {
        self.inotify.is_some()
    }

    /// Watches the group of a new container.
    pub fn watch(&self, cgroup: &Cgroup) -> Result<()> {
        match &self.inotify {
            Some(fd) => cgroup.watch_oom_on(fd.raw()).map(drop),
            None => Ok(()),
        }
    }

    /// The inotify descriptor has something: which container does not matter, all are looked at.
    pub fn on_inotify(&mut self, io: &mut Connections, containers: &mut Containers) {
        let Some(fd) = self.inotify.as_ref().map(Fd::raw) else { return };
        let mut buf = [0u8; 1024];
        while sys::read(fd, &mut buf).is_ok_and(|n| n > 0) {}
        self.look_for_kills(io, containers);
        self.look_for_thrashing(io, containers);
    }

    /// Reports kills of the kernel's that have not been reported yet.
    pub fn look_for_kills(&mut self, io: &mut Connections, containers: &mut Containers) {
        for (id, container) in containers.all_mut() {
            let Some(cgroup) = &container.cgroup else { continue };
            let kills = cgroup.oom_kill_count().unwrap_or(container.oom_kills);
            if kills > container.oom_kills {
                container.oom_kills = kills;
                log::warn(&format!("container {id}: the kernel has killed a process for lack of memory"));
                self.report(id.clone());
            }
        }
        self.answer(io);
    }

    /// Ends processes of containers that are stuck at their limit, and reports that as an OOM kill.
    fn look_for_thrashing(&mut self, io: &mut Connections, containers: &mut Containers) {
        let now_ns = sys::monotonic_ns();
        if now_ns.saturating_sub(self.thrash_looked_ns) < thrash::LOOK_NS {
            return;
        }
        self.thrash_looked_ns = now_ns;
        for (id, container) in containers.all_mut() {
            let Some(cgroup) = &container.cgroup else { continue };
            if thrash::check(id, cgroup, &mut container.squeeze, now_ns) {
                log::warn(&format!(
                    "container {id} was stuck at its memory limit: a process was killed, as by the kernel"
                ));
                self.report(id.clone());
            }
        }
        self.answer(io);
    }

    /// Keeps the news of a kill for the next call that asks.
    fn report(&mut self, id: String) {
        if self.events.len() < MAX_EVENTS {
            self.events.push_back(id);
        }
    }

    /// GetOOMEvent.
    pub fn wait(&mut self, io: &mut Connections, call: CallId) {
        self.waiters.push_back(call);
        self.answer(io);
    }

    fn answer(&mut self, io: &mut Connections) {
        while let (Some(call), false) = (self.waiters.front().copied(), self.events.is_empty()) {
            self.waiters.pop_front();
            if io.calls.is_waiting(call) {
                if let Some(container_id) = self.events.pop_front() {
                    io.answer(call, Ok(pb::OOMEvent { container_id }.to_vec()));
                }
            }
        }
    }
}
