//! The agent's state, in its parts. Code that needs some parts takes those as arguments. The whole is for code that
//! needs most of them: dispatching a call, and creating, starting and removing a container.

use crate::cmdline::Settings;
use crate::connections::Connections;
use crate::container::Containers;
use crate::debug::DebugPorts;
use crate::devices_bpf;
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
    pub device_program: devices_bpf::Kept,
}

impl State {
    pub fn new(settings: Settings) -> Result<State> {
        let mut io = Connections::new()?;
        io.trace.on = settings.trace;
        Ok(State {
            settings,
            boot: BootTimesResponse::default(),
            io,
            containers: Containers::default(),
            processes: Processes::default(),
            jobs: Jobs::default(),
            sandbox: Sandbox::default(),
            sockets: Sockets::default(),
            debug_ports: DebugPorts::default(),
            oom: OomWatch::default(),
            watcher: Watcher::default(),
            device_program: devices_bpf::Kept::default(),
        })
    }
}
