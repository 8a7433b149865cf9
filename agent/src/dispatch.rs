//! From a method's name to the code that does it.

use crate::agent::Agent;
use crate::prelude::*;
use crate::proto::codec::Message;
use crate::proto::health::{HealthCheckResponse, VersionCheckResponse, HEALTH_CHECK_RESPONSE_SERVING_STATUS_SERVING};
use crate::proto::{agent as pb, agentext, health};
use crate::server::calls::CallId;
use crate::server::frame::Request;

/// The version of the protocol, as the original counts it.
const API_VERSION: &str = "0.0.1";

/// `Ok(None)`: the answer comes later.
type Outcome = Result<Option<Vec<u8>>>;

pub fn handle(agent: &mut Agent, call: CallId, request: &Request) -> Outcome {
    match request.service {
        pb::AGENT_SERVICE => agent_service(agent, call, request),
        health::HEALTH => match request.method {
            "Check" => done(&HealthCheckResponse { status: HEALTH_CHECK_RESPONSE_SERVING_STATUS_SERVING }),
            "Version" => done(&VersionCheckResponse {
                grpc_version: API_VERSION.to_string(),
                agent_version: env!("CARGO_PKG_VERSION").to_string(),
            }),
            _ => unknown(request),
        },
        agentext::BOOT => match request.method {
            "Times" => done(&agent.boot.clone()),
            _ => unknown(request),
        },
        _ => Err(Error::unimplemented(format!("unknown service {:?}", request.service))),
    }
}

fn agent_service(_agent: &mut Agent, _call: CallId, request: &Request) -> Outcome {
    unknown(request)
}

fn done<M: Message>(message: &M) -> Outcome {
    Ok(Some(message.to_vec()))
}

fn unknown(request: &Request) -> Outcome {
    Err(Error::unimplemented(format!("this agent has no method {}.{}", request.service, request.method)))
}
