//! From a method's name to the code that does it.

use crate::agent::Agent;
use crate::jobs::Completion;
use crate::policy::Policy;
use crate::prelude::*;
use crate::proto::codec::{DecodeError, Message};
use crate::proto::health::{HealthCheckResponse, VersionCheckResponse, HEALTH_CHECK_RESPONSE_SERVING_STATUS_SERVING};
use crate::proto::{agent as pb, agentext, health};
use crate::server::calls::CallId;
use crate::server::frame::{parse_piece, Request};
use crate::{
    copyfile, debug, files, guest, iptables, metrics, netlink, network, processes, routes, runtime, storage, swap, sys,
    volumes,
};

/// The version of the protocol, as the original counts it.
const API_VERSION: &str = "0.0.1";
const AGENT_VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the agent can beyond the protocol.
const EXTRA_FEATURES: &[&str] = &[
    "kata.boot",
    "kata.debug",
    "kata.dial",
    "kata.files",
    "kata.internet",
    "kata.machine",
    "kata.network",
    "kata.pids.of",
    "kata.policy",
    "kata.processes",
    "kata.sockets",
    "kata.stdin.null",
    "kata.streams",
    "seccomp",
];

/// A streaming call may have a connection to itself.
const CONNECTIONS: &str = "kata.streams.connections";

/// `Ok(None)`: the answer comes later.
type Outcome = Result<Option<Vec<u8>>>;

pub fn handle(agent: &mut Agent, call: CallId, request: &Request) -> Outcome {
    match request.service {
        pb::AGENT_SERVICE => {
            let outcome = containers(agent, call, request)?;
            if matches!(outcome, Handled::NotMine) {
                return rest_of_agent_service(agent, call, request);
            }
            outcome.into()
        }
        health::HEALTH => match request.method {
            "Check" => done(&HealthCheckResponse { status: HEALTH_CHECK_RESPONSE_SERVING_STATUS_SERVING }),
            "Version" => done(&VersionCheckResponse {
                grpc_version: API_VERSION.to_string(),
                agent_version: AGENT_VERSION.to_string(),
            }),
            _ => unknown(request),
        },
        agentext::BOOT => match request.method {
            "Times" => done(&agent.boot.clone()),
            _ => unknown(request),
        },
        agentext::MACHINE => match request.method {
            "SetProcessors" => {
                let r: agentext::SetProcessorsRequest = decode(request)?;
                job(agent, call, || guest::set_processors(r.count))
            }
            _ => unknown(request),
        },
        agentext::NETWORK => match request.method {
            "Prepare" => {
                let r: agentext::PrepareNetworkRequest = decode(request)?;
                answer_from(agent, call, || network::prepare(&r))
            }
            "Hide" => {
                let r: agentext::HideInterfaceRequest = decode(request)?;
                job(agent, call, || network::hide(&r.device_path))
            }
            "Route" => {
                let r: agentext::RouteRequest = decode(request)?;
                answer_from(agent, call, || network::route(&r))
            }
            _ => unknown(request),
        },
        agentext::STREAMS => match request.method {
            "Attach" => agent.attach(call, &parse_piece(request.payload)?).map(|()| None),
            _ => unknown(request),
        },
        agentext::DIAL => match request.method {
            "Tcp" => agent.dial(call, &parse_piece(request.payload)?).map(|()| None),
            _ => unknown(request),
        },
        agentext::SOCKETS => match request.method {
            "Listen" => agent.listen_socket(&decode(request)?).map(empty),
            "Close" => agent.close_socket(&decode(request)?).map(empty),
            "Accept" => agent.accept_socket(call, &parse_piece(request.payload)?).map(|()| None),
            "Exchange" => agent.exchange_datagrams(call, &parse_piece(request.payload)?).map(|()| None),
            _ => unknown(request),
        },
        agentext::DEBUG => match request.method {
            "Console" => agent.debug_console(call, &parse_piece(request.payload)?).map(|()| None),
            "Log" => agent.log_stream(call, &parse_piece(request.payload)?).map(|()| None),
            "SetLogLevel" => debug::set_log_level(&decode(request)?).map(empty),
            _ => unknown(request),
        },
        agentext::FILES => files_service(agent, call, request),
        agentext::PROCESSES => match request.method {
            "List" => {
                let r: agentext::ListProcessesRequest = decode(request)?;
                let pids = agent.pids_of(&r.container_id)?;
                // In a child: what a process has mapped can make the reading of its arguments wait.
                agent.spawn_job(Completion::Answer(call), &[], || {
                    Ok(agentext::ListProcessesResponse { processes: processes::list(&pids)? }.to_vec())
                })?;
                Ok(None)
            }
            "Signal" => {
                let r: agentext::SignalProcessesRequest = decode(request)?;
                agent.signal_all(&r.container_id, r.signal).map(empty)
            }
            _ => unknown(request),
        },
        _ => Err(Error::unimplemented(format!("unknown service {:?}", request.service))),
    }
}

/// What became of a call in one of the tables.
enum Handled {
    Now(Vec<u8>),
    Later,
    NotMine,
}

impl From<Handled> for Outcome {
    fn from(handled: Handled) -> Outcome {
        match handled {
            Handled::Now(payload) => Ok(Some(payload)),
            Handled::Later | Handled::NotMine => Ok(None),
        }
    }
}

/// The life of containers and processes.
fn containers(agent: &mut Agent, call: CallId, request: &Request) -> Result<Handled> {
    match request.method {
        "CreateContainer" => agent.create_container(call, decode(request)?)?,
        "StartContainer" => {
            let r: pb::StartContainerRequest = decode(request)?;
            agent.start_container(call, &r.container_id)?;
        }
        "RemoveContainer" => {
            let r: pb::RemoveContainerRequest = decode(request)?;
            agent.remove_container(call, &r.container_id)?;
        }
        "ExecProcess" => agent.exec_process(call, &decode(request)?)?,
        "ReadStdout" => agent.read_stream(call, &decode(request)?, 0)?,
        "ReadStderr" => agent.read_stream(call, &decode(request)?, 1)?,
        "CreateSandbox" => agent.create_sandbox(call, &decode(request)?)?,
        "DestroySandbox" => agent.destroy_sandbox(call)?,
        "GetOOMEvent" => {
            agent.sandbox.oom_waiters.push_back(call);
            agent.answer_oom();
        }
        "WaitProcess" => {
            let r: pb::WaitProcessRequest = decode(request)?;
            return Ok(match agent.wait_process(call, &r.container_id, &r.exec_id)? {
                Some(payload) => Handled::Now(payload),
                None => Handled::Later,
            });
        }
        "SignalProcess" => {
            let r: pb::SignalProcessRequest = decode(request)?;
            agent.signal(&r.container_id, &r.exec_id, r.signal)?;
            return Ok(Handled::Now(vec![]));
        }
        "CloseStdin" => {
            let r: pb::CloseStdinRequest = decode(request)?;
            agent.close_stdin(&r.container_id, &r.exec_id)?;
            return Ok(Handled::Now(vec![]));
        }
        "TtyWinResize" => {
            agent.resize_terminal(&decode(request)?)?;
            return Ok(Handled::Now(vec![]));
        }
        _ => return Ok(Handled::NotMine),
    }
    Ok(Handled::Later)
}

/// Resources of containers, and the guest as a whole.
fn rest_of_agent_service(agent: &mut Agent, call: CallId, request: &Request) -> Outcome {
    match request.method {
        "UpdateContainer" => agent.update_container(&decode(request)?).map(empty),
        "StatsContainer" => {
            let r: pb::StatsContainerRequest = decode(request)?;
            done(&pb::StatsContainerResponse {
                cgroup_stats: Some(Box::new(agent.cgroup_of(&r.container_id)?.stats()?)),
                network_stats: netlink::network_stats()?,
            })
        }
        "PauseContainer" => {
            let r: pb::PauseContainerRequest = decode(request)?;
            let cgroup = agent.cgroup_of(&r.container_id)?.clone();
            job(agent, call, || cgroup.freeze())
        }
        "ResumeContainer" => {
            let r: pb::ResumeContainerRequest = decode(request)?;
            agent.cgroup_of(&r.container_id)?.thaw().map(empty)
        }
        "UpdateEphemeralMounts" => {
            let r: pb::UpdateEphemeralMountsRequest = decode(request)?;
            r.storages.iter().try_for_each(storage::remount_ephemeral).map(empty)
        }
        "CopyFile" => copyfile::copy_file(&decode(request)?).map(empty),
        "UpdateInterface" => {
            let r: pb::UpdateInterfaceRequest = decode(request)?;
            let wanted = r.interface.ok_or_else(|| Error::invalid("the request has no interface"))?;
            // It may have to wait for the device.
            agent
                .spawn_job(Completion::Answer(call), &[], || netlink::update_interface(&wanted).map(|i| i.to_vec()))?;
            Ok(None)
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
            job(agent, call, || guest::online_cpu_mem(r.wait, r.nb_cpus, r.cpu_only).map(drop))
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
        "GetGuestDetails" => details(agent, &decode(request)?),
        "GetIPTables" => {
            let r: pb::GetIPTablesRequest = decode(request)?;
            answer_from(agent, call, || Ok(pb::GetIPTablesResponse { data: iptables::save(r.is_ipv6)? }))
        }
        "SetIPTables" => {
            let r: pb::SetIPTablesRequest = decode(request)?;
            answer_from(agent, call, || Ok(pb::SetIPTablesResponse { data: iptables::restore(r.is_ipv6, &r.data)? }))
        }
        "GetMetrics" => {
            agent.sandbox.scrapes += 1;
            let scrapes = agent.sandbox.scrapes;
            // In a child: the text is long, and what it takes goes with it.
            let me = sys::getpid();
            answer_from(agent, call, || Ok(pb::Metrics { metrics: metrics::collect(me, scrapes) }))
        }
        "SetPolicy" => {
            let r: pb::SetPolicyRequest = decode(request)?;
            agent.sandbox.policy = Some(Policy::parse(&r.policy)?);
            Ok(empty(()))
        }
        "GetDiagnosticData" => agent.diagnostic_data(call, &decode(request)?),
        "AddSwap" => {
            let r: pb::AddSwapRequest = decode(request)?;
            job(agent, call, || swap::add_by_pci(&r.pci_path))
        }
        "AddSwapPath" => {
            let r: pb::AddSwapPathRequest = decode(request)?;
            job(agent, call, || swap::add_by_path(&r.path))
        }
        "GetVolumeStats" => {
            let r: pb::VolumeStatsRequest = decode(request)?;
            answer_from(agent, call, || volumes::stats(&r.volume_guest_path))
        }
        "ResizeVolume" => {
            let r: pb::ResizeVolumeRequest = decode(request)?;
            job(agent, call, || volumes::resize(&r.volume_guest_path, r.size))
        }
        "RemoveStaleVirtiofsShareMounts" => job(agent, call, storage::touch_shares),
        "MemAgentMemcgSet" | "MemAgentCompactSet" => Err(Error::unimplemented(format!(
            "{}: this agent has no memory agent (it leaves reclaim and compaction to the guest kernel)",
            request.method
        ))),
        _ => unknown(request),
    }
}

/// Files of a container. In a child: a file system of the container's may hang.
fn files_service(agent: &mut Agent, call: CallId, request: &Request) -> Outcome {
    /// One method: decode, open the container's root, run in a child.
    macro_rules! in_root {
        ($kind:ty, $work:expr) => {{
            let wanted: $kind = decode(request)?;
            let root = agent.open_root(&wanted.container_id)?;
            agent.spawn_job(Completion::Answer(call), &[root.raw()], || $work(root.raw(), &wanted))?;
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
        _ => unknown(request),
    }
}

fn details(agent: &Agent, request: &pb::GuestDetailsRequest) -> Outcome {
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
                .chain(agent.takes_connections().then(|| CONNECTIONS.to_string()))
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

fn job(agent: &mut Agent, call: CallId, work: impl FnOnce() -> Result<()>) -> Outcome {
    agent.spawn_job(Completion::Answer(call), &[], || work().map(|()| vec![]))?;
    Ok(None)
}

/// Work in a child whose outcome is the answer.
fn answer_from<M: Message>(agent: &mut Agent, call: CallId, work: impl FnOnce() -> Result<M>) -> Outcome {
    agent.spawn_job(Completion::Answer(call), &[], || work().map(|message| message.to_vec()))?;
    Ok(None)
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
