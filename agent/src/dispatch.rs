//! From a method's name to the code that does it.

use crate::fs;
use crate::jobs::Completion;
use crate::policy::Policy;
use crate::prelude::*;
use crate::proto::codec::{DecodeError, Message};
use crate::proto::health::{HealthCheckResponse, VersionCheckResponse, HEALTH_CHECK_RESPONSE_SERVING_STATUS_SERVING};
use crate::proto::{agent as pb, agentext, health};
use crate::server::calls::CallId;
use crate::server::frame::{parse_piece, Request};
use crate::state::State;
use crate::{
    clock, container_calls, copyfile, debug, dial, files, guest, iptables, layers, lifecycle, metrics, netlink,
    network, process_list, routes, runtime, storage, swap, sys, volumes,
};

/// The protocol version that the original agent reports.
const API_VERSION: &str = "0.0.1";
const AGENT_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Extensions of the protocol that this agent has.
const EXTRA_FEATURES: &[&str] = &[
    "kata.boot",
    "kata.clock",
    "kata.debug",
    "kata.device.limits",
    "kata.dial",
    "kata.files",
    "kata.internet",
    "kata.layers",
    "kata.machine",
    "kata.network",
    "kata.pci_scan",
    "kata.pids.of",
    "kata.policy",
    "kata.processes",
    "kata.seccomp.default_errno",
    "kata.sockets",
    "kata.stdin.null",
    "kata.streams",
    "kata.version",
    "seccomp",
];

/// Further connections are accepted, so that a streaming call may have one to itself.
const CONNECTIONS: &str = "kata.streams.connections";

/// With `agent.trace`: calls that carry a context are recorded.
const TRACE: &str = "kata.trace";

/// `Ok(None)`: the answer comes later.
type Outcome = Result<Option<Vec<u8>>>;

/// Does what a request asks for.
pub fn handle(state: &mut State, call: CallId, request: &Request) -> Outcome {
    match request.service {
        pb::AGENT_SERVICE => agent_service(state, call, request),
        health::HEALTH => match request.method {
            "Check" => done(&HealthCheckResponse { status: HEALTH_CHECK_RESPONSE_SERVING_STATUS_SERVING }),
            "Version" => done(&VersionCheckResponse {
                grpc_version: API_VERSION.to_string(),
                agent_version: AGENT_VERSION.to_string(),
            }),
            _ => unknown(request),
        },
        agentext::BOOT => match request.method {
            "Times" => done(&state.boot.clone()),
            _ => unknown(request),
        },
        agentext::TRACE => match request.method {
            "Take" => done(&agentext::TakeSpansResponse { spans: state.io.trace.take() }),
            _ => unknown(request),
        },
        agentext::MACHINE => match request.method {
            "Clock" => {
                let r: agentext::ClockRequest = decode(request)?;
                done(&clock::put_right(r.add_ns)?)
            }
            "SetProcessors" => {
                let r: agentext::SetProcessorsRequest = decode(request)?;
                job(state, call, || guest::set_processors(r.count))
            }
            _ => unknown(request),
        },
        agentext::NETWORK => match request.method {
            "Prepare" => {
                let r: agentext::PrepareNetworkRequest = decode(request)?;
                answer_from(state, call, || network::prepare(&r))
            }
            "Hide" => {
                let r: agentext::HideInterfaceRequest = decode(request)?;
                job(state, call, || network::hide(&r.device_path))
            }
            "Route" => {
                let r: agentext::RouteRequest = decode(request)?;
                answer_from(state, call, || network::route(&r))
            }
            _ => unknown(request),
        },
        agentext::SOCKETS => match request.method {
            "Listen" => state.sockets.listen(&state.io.poller, &decode(request)?).map(empty),
            "Close" => {
                state.sockets.close(&mut state.io, &decode(request)?);
                Ok(empty(()))
            }
            _ => streaming(state, call, request),
        },
        agentext::DEBUG => match request.method {
            "SetLogLevel" => debug::set_log_level(&decode(request)?).map(empty),
            _ => streaming(state, call, request),
        },
        agentext::STREAMS | agentext::DIAL => streaming(state, call, request),
        agentext::FILES => files_service(state, call, request),
        agentext::LAYERS => match request.method {
            "Read" => {
                let r: agentext::ReadLayerRequest = decode(request)?;
                answer_from(state, call, || layers::read(&r))
            }
            "Trim" => {
                let r: agentext::TrimLayerRequest = decode(request)?;
                job(state, call, || layers::trim(&r.directory))
            }
            _ => unknown(request),
        },
        agentext::PROCESSES => match request.method {
            "List" => {
                let r: agentext::ListProcessesRequest = decode(request)?;
                let pids = container_calls::pids_of(&state.containers, &state.processes, &r.container_id)?;
                // In a child: reading a process's arguments can block on what it has mapped.
                answer_from(state, call, || {
                    Ok(agentext::ListProcessesResponse { processes: process_list::list(&pids)? })
                })
            }
            "Signal" => {
                let r: agentext::SignalProcessesRequest = decode(request)?;
                container_calls::signal_all(&state.containers, &state.processes, &r.container_id, r.signal).map(empty)
            }
            _ => unknown(request),
        },
        _ => Err(Error::unimplemented(format!("unknown service {:?}", request.service))),
    }
}

/// Streaming calls, by what their first piece names.
fn streaming(state: &mut State, call: CallId, request: &Request) -> Outcome {
    let first = || parse_piece(request.payload);
    let State { settings, io, processes, containers, sockets, .. } = state;
    match (request.service, request.method) {
        (agentext::STREAMS, "Attach") => later(processes.attach(io, containers, call, &first()?)),
        (agentext::DIAL, "Tcp") => later(dial::dial(io, processes, containers, call, &first()?)),
        (agentext::SOCKETS, "Accept") => later(sockets.accept(io, processes, containers, call, &first()?)),
        (agentext::SOCKETS, "Exchange") => later(sockets.exchange(io, call, &first()?)),
        (agentext::DEBUG, "Console") => later(debug::console(settings, io, processes, containers, call, &first()?)),
        (agentext::DEBUG, "Log") => later(debug::log_stream(io, processes, containers, call, &first()?)),
        _ => unknown(request),
    }
}

/// The agent protocol's own service (WriteStdin excepted, which takes the whole frame: see `agent`).
fn agent_service(state: &mut State, call: CallId, request: &Request) -> Outcome {
    match request.method {
        // Sandbox and containers.
        "CreateSandbox" => {
            let State { io, jobs, watcher, sandbox, .. } = state;
            later(sandbox.create(io, jobs, watcher, call, &decode(request)?))
        }
        "DestroySandbox" => later(lifecycle::destroy_sandbox(state, call)),
        "CreateContainer" => later(lifecycle::create_container(state, call, &decode(request)?)),
        "StartContainer" => {
            let r: pb::StartContainerRequest = decode(request)?;
            later(lifecycle::start_container(state, call, &r.container_id))
        }
        "RemoveContainer" => {
            let r: pb::RemoveContainerRequest = decode(request)?;
            later(lifecycle::remove_container(state, call, &r.container_id))
        }
        "UpdateContainer" => container_calls::update(&state.containers, &decode(request)?).map(empty),
        "StatsContainer" => {
            let r: pb::StatsContainerRequest = decode(request)?;
            done(&pb::StatsContainerResponse {
                cgroup_stats: Some(Box::new(state.containers.cgroup_of(&r.container_id)?.stats()?)),
                network_stats: netlink::network_stats()?,
            })
        }
        "PauseContainer" => {
            let r: pb::PauseContainerRequest = decode(request)?;
            let cgroup = state.containers.cgroup_of(&r.container_id)?.clone();
            job(state, call, || cgroup.freeze())
        }
        "ResumeContainer" => {
            let r: pb::ResumeContainerRequest = decode(request)?;
            state.containers.cgroup_of(&r.container_id)?.thaw().map(empty)
        }
        "GetDiagnosticData" => {
            let State { io, jobs, containers, processes, .. } = state;
            later(container_calls::diagnostic_data(io, jobs, containers, processes, call, &decode(request)?))
        }
        "GetOOMEvent" => {
            state.oom.wait(&mut state.io, call);
            Ok(None)
        }
        // Processes.
        "ExecProcess" => later(lifecycle::exec_process(state, call, &decode(request)?)),
        "ReadStdout" => {
            later(state.processes.read_stream(&mut state.io, &mut state.containers, call, &decode(request)?, 0))
        }
        "ReadStderr" => {
            later(state.processes.read_stream(&mut state.io, &mut state.containers, call, &decode(request)?, 1))
        }
        "WaitProcess" => {
            let r: pb::WaitProcessRequest = decode(request)?;
            state.processes.wait(&state.containers, call, &r.container_id, &r.exec_id)
        }
        "SignalProcess" => container_calls::signal(&state.containers, &state.processes, &decode(request)?).map(empty),
        "CloseStdin" => state.processes.close_stdin(&mut state.io, &state.containers, &decode(request)?).map(empty),
        "TtyWinResize" => state.processes.resize_terminal(&state.containers, &decode(request)?).map(empty),
        // The guest as a whole.
        "UpdateEphemeralMounts" => {
            let r: pb::UpdateEphemeralMountsRequest = decode(request)?;
            r.storages.iter().try_for_each(storage::remount_ephemeral).map(empty)
        }
        "CopyFile" => copyfile::copy_file(&decode(request)?).map(empty),
        "UpdateInterface" => {
            let r: pb::UpdateInterfaceRequest = decode(request)?;
            let wanted = r.interface.ok_or_else(|| Error::invalid("the request has no interface"))?;
            // It may have to wait for the device.
            answer_from(state, call, || netlink::update_interface(&wanted))
        }
        "UpdateRoutes" => {
            let r: pb::UpdateRoutesRequest = decode(request)?;
            let wanted = r.routes.ok_or_else(|| Error::invalid("the request has no routes"))?;
            done(&routes::update_routes(&wanted)?)
        }
        "ListInterfaces" => done(&netlink::list_interfaces()?),
        "ListRoutes" => done(&routes::list_routes()?),
        "AddARPNeighbors" => {
            let r: pb::AddARPNeighborsRequest = decode(request)?;
            let wanted = r.neighbors.ok_or_else(|| Error::invalid("the request has no neighbors"))?;
            netlink::add_arp_neighbors(&wanted).map(empty)
        }
        "OnlineCPUMem" => {
            let r: pb::OnlineCPUMemRequest = decode(request)?;
            job(state, call, || guest::online_cpu_mem(r.wait, r.nb_cpus, r.cpu_only).map(drop))
        }
        "MemHotplugByProbe" => {
            let r: pb::MemHotplugByProbeRequest = decode(request)?;
            guest::probe_memory(&r.mem_hotplug_probe_addr).map(empty)
        }
        "ReseedRandomDev" => {
            let r: pb::ReseedRandomDevRequest = decode(request)?;
            guest::reseed(&r.data).map(empty)
        }
        "SetGuestDateTime" => {
            let r: pb::SetGuestDateTimeRequest = decode(request)?;
            guest::set_date_time(r.sec, r.usec).map(empty)
        }
        "GetGuestDetails" => details(state, &decode(request)?),
        "GetIPTables" => {
            let r: pb::GetIPTablesRequest = decode(request)?;
            answer_from(state, call, || Ok(pb::GetIPTablesResponse { data: iptables::save(r.is_ipv6)? }))
        }
        "SetIPTables" => {
            let r: pb::SetIPTablesRequest = decode(request)?;
            answer_from(state, call, || Ok(pb::SetIPTablesResponse { data: iptables::restore(r.is_ipv6, &r.data)? }))
        }
        "GetMetrics" => {
            state.sandbox.scrapes += 1;
            let scrapes = state.sandbox.scrapes;
            let me = sys::getpid();
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            let collect = || pb::Metrics { metrics: metrics::collect(me, scrapes, &mounts) };
            // A child costs as much again as the text.
            if metrics::may_wait(&mounts) {
                answer_from(state, call, || Ok(collect()))
            } else {
                done(&collect())
            }
        }
        "SetPolicy" => {
            let r: pb::SetPolicyRequest = decode(request)?;
            state.sandbox.policy = Some(Policy::parse(&r.policy)?);
            Ok(empty(()))
        }
        "AddSwap" => {
            let r: pb::AddSwapRequest = decode(request)?;
            job(state, call, || swap::add_by_pci(&r.pci_path))
        }
        "AddSwapPath" => {
            let r: pb::AddSwapPathRequest = decode(request)?;
            job(state, call, || swap::add_by_path(&r.path))
        }
        "GetVolumeStats" => {
            let r: pb::VolumeStatsRequest = decode(request)?;
            answer_from(state, call, || volumes::stats(&r.volume_guest_path))
        }
        "ResizeVolume" => {
            let r: pb::ResizeVolumeRequest = decode(request)?;
            job(state, call, || volumes::resize(&r.volume_guest_path, r.size))
        }
        "RemoveStaleVirtiofsShareMounts" => job(state, call, storage::touch_shares),
        "MemAgentMemcgSet" | "MemAgentCompactSet" => Err(Error::unimplemented(format!(
            "{}: this agent has no memory agent (it leaves reclaim and compaction to the guest kernel)",
            request.method
        ))),
        _ => unknown(request),
    }
}

/// Files of a container. In a child: a file system of the container's may hang.
fn files_service(state: &mut State, call: CallId, request: &Request) -> Outcome {
    /// One method: decode, open the container's root, run in a child.
    macro_rules! in_root {
        ($kind:ty, $work:expr) => {{
            let wanted: $kind = decode(request)?;
            let root = container_calls::open_root(&state.containers, &state.processes, &wanted.container_id)?;
            state
                .jobs
                .spawn(&mut state.io.poller, Completion::Answer(call), &[root.raw()], || $work(root.raw(), &wanted))?;
            Ok(None)
        }};
    }
    /// For those that answer nothing.
    macro_rules! change {
        ($kind:ty, $work:path) => {
            in_root!($kind, |root, wanted: &$kind| $work(root, wanted).map(|()| vec![]))
        };
    }
    match request.method {
        "Stat" => in_root!(agentext::StatFileRequest, |root, wanted| files::stat(root, wanted).map(|r| r.to_vec())),
        "List" => in_root!(agentext::ListFilesRequest, |root, wanted| files::list(root, wanted).map(|r| r.to_vec())),
        "Read" => in_root!(agentext::ReadFileRequest, |root, wanted| files::read(root, wanted).map(|r| r.to_vec())),
        "Write" => change!(agentext::WriteFileRequest, files::write),
        "Mkdir" => change!(agentext::MkdirRequest, files::mkdir),
        "Symlink" => change!(agentext::SymlinkRequest, files::symlink),
        "Link" => change!(agentext::LinkRequest, files::link),
        "Node" => change!(agentext::NodeRequest, files::node),
        "Remove" => change!(agentext::RemoveFileRequest, files::remove),
        "Sync" => change!(agentext::SyncFilesRequest, files::sync),
        _ => unknown(request),
    }
}

fn details(state: &State, request: &pb::GuestDetailsRequest) -> Outcome {
    let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    let mut response = pb::GuestDetailsResponse {
        agent_details: Some(Box::new(pb::AgentDetails {
            version: AGENT_VERSION.to_string(),
            init_daemon: sys::getpid() == 1,
            device_handlers: list(runtime::attach::TYPES),
            storage_handlers: list(storage::DRIVERS),
            supports_seccomp: true,
            extra_features: list(EXTRA_FEATURES)
                .into_iter()
                .chain(state.io.takes_connections().then(|| CONNECTIONS.to_string()))
                .chain(state.io.trace.on.then(|| TRACE.to_string()))
                .collect(),
        })),
        ..Default::default()
    };
    if request.mem_block_size {
        response.mem_block_size_bytes = guest::memory_block_size()?;
    }
    if request.mem_hotplug_probe {
        response.support_mem_hotplug_probe = guest::supports_memory_probe();
    }
    done(&response)
}

fn decode<M: Message>(request: &Request) -> Result<M> {
    M::decode(request.payload).map_err(|error| match error {
        DecodeError::TooBig => Error::exhausted(format!("{} request: {error}", request.method)),
        _ => Error::invalid(format!("malformed {} request: {error}", request.method)),
    })
}

fn job(state: &mut State, call: CallId, work: impl FnOnce() -> Result<()>) -> Outcome {
    state.jobs.spawn(&mut state.io.poller, Completion::Answer(call), &[], || work().map(|()| vec![]))?;
    Ok(None)
}

/// Work in a child whose outcome is the answer.
fn answer_from<M: Message>(state: &mut State, call: CallId, work: impl FnOnce() -> Result<M>) -> Outcome {
    state.jobs.spawn(&mut state.io.poller, Completion::Answer(call), &[], || work().map(|message| message.to_vec()))?;
    Ok(None)
}

/// The answer comes later, unless the call has failed.
fn later(outcome: Result<()>) -> Outcome {
    outcome.map(|()| None)
}

fn done<M: Message>(message: &M) -> Outcome {
    Ok(Some(message.to_vec()))
}

fn empty((): ()) -> Option<Vec<u8>> {
    Some(vec![])
}

fn unknown(request: &Request) -> Outcome {
    Err(Error::unimplemented(format!("this agent has no method {}.{}", request.service, request.method)))
}
