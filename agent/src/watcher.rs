//! When copies of watched directories are renewed: every two seconds, as long as there are some.

use crate::container::Containers;
use crate::jobs::{Completion, Jobs};
use crate::log;
use crate::poller::{Poller, Token};
use crate::prelude::*;
use crate::sys::{self, Fd, SysResult};
use crate::watchable::{self, Watched};

const PERIOD_NS: u64 = 2_000_000_000;

#[derive(Default)]
pub struct Watcher {
    /// Sources that are copied for the sandbox, not for one container.
    pub of_sandbox: Vec<Watched>,
    /// Runs while something is watched.
    timer: Option<Fd>,
    job_runs: bool,
    /// The errors of the last time, so that each is logged once.
    last_error: String,
}

impl Watcher {
    /// Starts the timer; called when there is something to watch.
    pub fn start(&mut self, poller: &Poller) -> Result<()> {
        if self.timer.is_none() {
            let timer = periodic_timer().context("make a timer")?;
            poller.watch(timer.raw(), Token::WatchTimer, libc::EPOLLIN as u32)?;
            self.timer = Some(timer);
        }
        Ok(())
    }

    /// Time to look at the sources again: in a child, because a share may hang.
    pub fn on_timer(&mut self, poller: &mut Poller, jobs: &mut Jobs, containers: &Containers) {
        let Some(timer) = &self.timer else { return };
        let _ = sys::read(timer.raw(), &mut [0u8; 8]);
        if self.job_runs {
            return;
        }
        let of_containers = containers.all().filter(|c| c.is_living()).flat_map(|c| &c.watched);
        let watched: Vec<Watched> = self.of_sandbox.iter().chain(of_containers).cloned().collect();
        if watched.is_empty() {
            self.timer = None;
            return;
        }
        let started = jobs.spawn(poller, Completion::Copied, &[], || Ok(watchable::update(&watched).into_bytes()));
        self.job_runs = started.is_ok();
    }

    /// The job has ended. Logs its errors if they are new.
    pub fn on_copied(&mut self, outcome: Result<Vec<u8>>) {
        self.job_runs = false;
        let errors = match outcome {
            Ok(text) => String::from_utf8_lossy(&text).into_owned(),
            Err(e) => e.message,
        };
        if errors != self.last_error {
            errors.lines().for_each(log::warn);
            self.last_error = errors;
        }
    }
}

/// A descriptor that can be read every [`PERIOD_NS`].
fn periodic_timer() -> SysResult<Fd> {
    let timer = sys::timer()?;
    sys::set_timer(timer.raw(), PERIOD_NS, PERIOD_NS)?;
    Ok(timer)
}
