//! What the agent knows, in its parts. Code that needs one or two of them takes those; the whole is for what concerns
//! most of them: dispatching a call, and making, starting and removing a container.

use crate::cmdline::Settings;
use crate::connections::Connections;
use crate::container::Containers;
use crate::debug::DebugPorts;
use crate::jobs::Jobs;
use crate::oom::OomWatch;
use crate::prelude::*;
use crate::processes::Processes;
use crate::proto::agentext::BootTimesResponse;
use crate::sandbox::Sandbox;
use crate::sockets::Sockets;
use crate::watcher::Watcher;

pub struct State {
    pub settings: Settings,
    pub boot: BootTimesResponse,
    pub io: Connections,
    pub containers: Containers,
    pub processes: Processes,
    pub jobs: Jobs,
    pub sandbox: Sandbox,
    pub sockets: Sockets,
    pub debug_ports: DebugPorts,
    pub oom: OomWatch,
    pub watcher: Watcher,
}

impl State {
    pub fn new(settings: Settings) -> Result<State> {
        Ok(State {
            settings,
            boot: BootTimesResponse::default(),
            io: Connections::new()?,
            containers: Containers::default(),
            processes: Processes::default(),
            jobs: Jobs::default(),
            sandbox: Sandbox::default(),
            sockets: Sockets::default(),
            debug_ports: DebugPorts::default(),
            oom: OomWatch::default(),
            watcher: Watcher::default(),
        })
    }
}
