//! The kernel's kills for lack of memory, and the calls that wait for news of one.

use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::log;
use crate::prelude::*;
use crate::proto::agent as pb;
use crate::proto::codec::Message;
use crate::sys::{self, RawFd};

/// News that nobody asks for do not pile up.
const MAX_EVENTS: usize = 64;

impl Agent {
    pub fn watch_oom(&self, cgroup: &Cgroup) -> Result<()> {
        match &self.oom_watch {
            Some(fd) => cgroup.watch_oom_on(fd.raw()).map(drop),
            None => Ok(()),
        }
    }

    /// The inotify descriptor has something: which container does not matter, all are asked.
    pub fn on_oom_watch(&mut self, fd: RawFd) {
        let mut buf = [0u8; 1024];
        while sys::read(fd, &mut buf).is_ok_and(|n| n > 0) {}
        self.look_for_oom();
        self.look_for_thrashing();
    }

    pub fn look_for_oom(&mut self) {
        let mut hit = vec![];
        for (id, container) in &mut self.containers {
            let Some(cgroup) = &container.cgroup else { continue };
            let kills = cgroup.oom_kill_count().unwrap_or(container.oom_kills);
            if kills > container.oom_kills {
                container.oom_kills = kills;
                hit.push(id.clone());
            }
        }
        for id in hit {
            log::warn(&format!("container {id}: the kernel has killed a process for lack of memory"));
            self.report_oom(id);
        }
        self.answer_oom();
    }

    /// Keeps the news of a kill for whoever asks next.
    pub fn report_oom(&mut self, id: String) {
        if self.sandbox.oom_events.len() < MAX_EVENTS {
            self.sandbox.oom_events.push_back(id);
        }
    }

    pub fn answer_oom(&mut self) {
        while let (Some(call), false) = (self.sandbox.oom_waiters.front().copied(), self.sandbox.oom_events.is_empty())
        {
            self.sandbox.oom_waiters.pop_front();
            if self.calls.is_waiting(call) {
                if let Some(container_id) = self.sandbox.oom_events.pop_front() {
                    self.answer(call, Ok(pb::OOMEvent { container_id }.to_vec()));
                }
            }
        }
    }
}
