//! Extensions of the protocol for networks: kernel parameters, routes and rules as netlink messages, and interfaces
//! that are hidden while their device stays.

use crate::devices::{bind_interface, find_interface, unbind_interface};
use crate::netlink::{link_by_name, links, rename_interface, Link, NLM_F_CREATE};
use crate::prelude::*;
use crate::proto::agentext::{NetworkRefusal, NetworkRefusals, NetworkSysctl, PrepareNetworkRequest, RouteRequest};
use crate::rtnl::{attributes, u32_at, Message, Refusal, Rtnl};
use crate::sys::{self, Fd};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_APPEND: u16 = 0x800;
/// A route may need another one to reach its gateway: how often refused routes are tried again.
const MOST_ROUNDS: u32 = 8;
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
/// struct rtmsg and struct fib_rule_hdr.
const HEADER: usize = 12;
/// struct rtnexthop: length, flags, weight, index.
const NEXT_HOP: usize = 8;

const PARAMETERS: &str = "/proc/sys/net";
const MAX_SYSCTLS: usize = 4096;
const MAX_VALUE: usize = 4096;
const MAX_MESSAGES: usize = 1 << 16;
const MAX_MESSAGE: usize = 16 << 10;

/// Sets kernel parameters. If a device is given, its driver is bound and its interface renamed first. Returns the
/// refused parameters by position.
pub fn prepare(wanted: &PrepareNetworkRequest) -> Result<NetworkRefusals> {
    bounded("kernel parameters", wanted.sysctls.len(), MAX_SYSCTLS)?;
    if !wanted.device_path.is_empty() {
        bind_interface(&wanted.device_path)?;
        let device = find_interface(&wanted.device_path).context("Link not found")?;
        rename_interface(&device, &wanted.name)?;
    }
    let top =
        sys::open(PARAMETERS, libc::O_PATH | libc::O_DIRECTORY, 0).with_context(|| format!("open {PARAMETERS}"))?;
    let mut refusals = NetworkRefusals::default();
    for (position, parameter) in wanted.sysctls.iter().enumerate() {
        if let Err(error) = set_parameter(&top, parameter) {
            refuse(&mut refusals, position, error.message);
        }
    }
    Ok(refusals)
}

/// Hides the interface of a device by unbinding its driver. It is no error if there is none.
pub fn hide(device_path: &str) -> Result<()> {
    unbind_interface(device_path)
}

/// Removes and adds routes and rules. Returns those that were refused by their position in routes, then rules.
pub fn route(request: &RouteRequest) -> Result<NetworkRefusals> {
    let lists = [&request.remove_routes, &request.routes, &request.remove_rules, &request.rules];
    bounded("routes and rules", lists.iter().map(|list| list.len()).sum(), MAX_MESSAGES)?;
    let mut rtnl = Rtnl::open()?;
    let links = links(&mut rtnl)?;
    let numbers = numbers(request, &links);
    let mut refusals = NetworkRefusals::default();

    for body in &request.remove_routes {
        // Errors are ignored: the route may have gone with its interface or an address.
        if let Ok(body) = translated(body, &numbers) {
            let _ = rtnl.change(Message::new(RTM_DELROUTE, 0, &body));
        }
    }
    add_routes(&mut rtnl, &request.routes, &numbers, &mut refusals);
    for (position, body) in request.rules.iter().enumerate() {
        let outcome = checked(body).and_then(|()| {
            let message = Message::new(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, body);
            unless_there(rtnl.change(message)).map_err(Error::from)
        });
        if let Err(error) = outcome {
            refuse(&mut refusals, request.routes.len() + position, error.message);
        }
    }
    // Removed last, so that the kernel's own rules go only after their replacements exist.
    for body in request.remove_rules.iter().filter(|body| checked(body).is_ok()) {
        let _ = rtnl.change(Message::new(RTM_DELRULE, 0, body));
    }
    Ok(refusals)
}

fn set_parameter(top: &Fd, parameter: &NetworkSysctl) -> Result<()> {
    if parameter.value.len() > MAX_VALUE {
        return Err(Error::invalid("the value is too long"));
    }
    let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
    let file = sys::openat2(top.raw(), &parameter.name, libc::O_WRONLY, 0, resolve)?;
    Ok(sys::write_all(file.raw(), parameter.value.as_bytes())?)
}

/// A route may need another one to reach its gateway: as long as a round adds at least one, refused routes are tried
/// again.
fn add_routes(rtnl: &mut Rtnl, wanted: &[Vec<u8>], numbers: &[(u32, u32)], refusals: &mut NetworkRefusals) {
    let mut left: Vec<usize> = (0..wanted.len()).collect();
    for round in 1.. {
        let mut refused: Vec<(usize, Error)> = Vec::new();
        for position in &left {
            let outcome = translated(&wanted[*position], numbers).and_then(|body| add_route(rtnl, &body));
            if let Err(error) = outcome {
                refused.push((*position, error));
            }
        }
        if refused.is_empty() || refused.len() == left.len() || round == MOST_ROUNDS {
            for (position, error) in refused {
                let ways = translated(&wanted[position], numbers).map(|body| single_ways(&body)).unwrap_or_default();
                let taken = ways.iter().filter(|way| add_route(rtnl, way).is_ok()).count();
                let so_far = if taken > 0 { "; its ways are there one behind the other" } else { "" };
                refuse(refusals, position, format!("{}{so_far}", error.message));
            }
            return;
        }
        left = refused.into_iter().map(|(position, _)| position).collect();
    }
}

/// Appends: a second way to the same destination does not push out the first.
fn add_route(rtnl: &mut Rtnl, body: &[u8]) -> Result<()> {
    let message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, body);
    unless_there(rtnl.change(message)).map_err(Error::from)
}

fn unless_there(outcome: core::result::Result<(), Refusal>) -> core::result::Result<(), Refusal> {
    match outcome {
        Err(refusal) if refusal.errno.0 == libc::EEXIST => Ok(()),
        other => other,
    }
}

fn refuse(refusals: &mut NetworkRefusals, position: usize, reason: String) {
    refusals.refused.push(NetworkRefusal { position: u32::try_from(position).unwrap_or(u32::MAX), reason });
}

fn bounded(what: &str, count: usize, most: usize) -> Result<()> {
    if count > most {
        return Err(Error::invalid(format!("{count} {what}: at most {most} are taken")));
    }
    Ok(())
}

/// The host's number of each interface, and the guest's.
fn numbers(request: &RouteRequest, links: &[Link]) -> Vec<(u32, u32)> {
    let named = request.interfaces.iter();
    named.filter_map(|one| link_by_name(links, &one.name).ok().map(|link| (one.number, link.index))).collect()
}

fn checked(body: &[u8]) -> Result<()> {
    if !(HEADER..=MAX_MESSAGE).contains(&body.len()) || body.len() % 4 != 0 {
        return Err(Error::invalid(format!("a message of {} bytes", body.len())));
    }
    Ok(())
}

/// A route with the guest's numbers of interfaces in place of the host's.
fn translated(body: &[u8], numbers: &[(u32, u32)]) -> Result<Vec<u8>> {
    checked(body)?;
    let of = |number: u32| {
        let found = numbers.iter().find(|(host, _)| *host == number).map(|(_, guest)| guest.to_ne_bytes());
        found.ok_or_else(|| Error::not_found("its interface is not in the guest"))
    };
    let mut message = body[..HEADER].to_vec();
    for (kind, value) in attributes(&body[HEADER..]) {
        let mut value = value.to_vec();
        match kind {
            RTA_IIF | RTA_OIF if value.len() == 4 => value = of(u32_at(&value, 0))?.to_vec(),
            RTA_MULTIPATH => {
                let mut at = 0;
                while let Some(hop) = value.get(at..at + NEXT_HOP) {
                    let length = usize::from(u16::from_ne_bytes([hop[0], hop[1]]));
                    if length < NEXT_HOP {
                        return Err(Error::invalid("a way that is too short"));
                    }
                    let number = of(u32_at(hop, 4))?;
                    value[at + 4..at + NEXT_HOP].copy_from_slice(&number);
                    at += length.next_multiple_of(4);
                }
            }
            _ => {}
        }
        append(&mut message, kind, &value);
    }
    Ok(message)
}

/// Splits a multipath route into one route for each next hop, for kernels without multipath; empty for other routes.
fn single_ways(body: &[u8]) -> Vec<Vec<u8>> {
    let all: Vec<(u16, &[u8])> = attributes(&body[HEADER..]).collect();
    let Some((_, mut ways)) = all.iter().find(|(kind, _)| *kind == RTA_MULTIPATH) else { return Vec::new() };
    let mut single = Vec::new();
    while ways.len() >= NEXT_HOP {
        let length = usize::from(u16::from_ne_bytes([ways[0], ways[1]]));
        let Some(hop) = ways.get(NEXT_HOP..length) else { break };
        let mut message = body[..HEADER].to_vec();
        message[8] |= ways[2];
        for (kind, value) in all.iter().filter(|(kind, _)| *kind != RTA_MULTIPATH) {
            append(&mut message, *kind, value);
        }
        append(&mut message, RTA_OIF, &ways[4..NEXT_HOP]);
        for (kind, value) in attributes(hop) {
            append(&mut message, kind, value);
        }
        single.push(message);
        ways = ways.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    single
}

fn append(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::bring_up_loopback;
    use crate::proto::agentext::NumberedInterface;
    use crate::test_support::in_namespaces;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        append(&mut bytes, kind, value);
        bytes
    }

    /// A route to 203.0.113.`last`/32 in table 77; the host's number of the interface is 9.
    fn to(last: u8, more: &[Vec<u8>]) -> Vec<u8> {
        let mut body = vec![2, 32, 0, 0, 77, 3, 253, 1, 0, 0, 0, 0];
        append(&mut body, 1, &[203, 0, 113, last]);
        body.extend(more.concat());
        body
    }

    fn rule(priority: u32) -> Vec<u8> {
        let mut body = vec![2, 0, 0, 0, 77, 0, 0, 1, 0, 0, 0, 0];
        append(&mut body, 6, &priority.to_ne_bytes());
        body
    }

    fn count(get: u16, kind: u16) -> usize {
        let mut found = 0;
        let mut body = [0; HEADER];
        body[0] = 2;
        Rtnl::open()
            .unwrap()
            .dump(&Message::new(get, 0, &body), |seen, body| found += usize::from(seen == kind && body[4] == 77))
            .unwrap();
        found
    }

    #[test]
    fn routes_and_rules_come_and_go() {
        in_namespaces(libc::CLONE_NEWNET, || {
            bring_up_loopback().unwrap();
            let device = attribute(RTA_OIF, &9u32.to_ne_bytes());
            let mut hop = vec![8, 0, 0, 0];
            hop.extend(9u32.to_ne_bytes());
            let unknown = to(3, &[attribute(RTA_OIF, &8u32.to_ne_bytes())]);
            let behind = to(4, &[device.clone(), attribute(5, &[203, 0, 113, 200])]);
            let mut request = RouteRequest {
                routes: vec![to(1, core::slice::from_ref(&device)), unknown, behind, vec![2; 8], vec![2; 13]],
                rules: vec![rule(5), rule(6)],
                interfaces: vec![NumberedInterface { number: 9, name: "lo".into() }],
                ..Default::default()
            };
            let refused: Vec<u32> = route(&request).unwrap().refused.iter().map(|one| one.position).collect();
            assert_eq!(refused, [1, 2, 3, 4], "the others are there");
            assert_eq!((count(26, RTM_NEWROUTE), count(34, RTM_NEWRULE)), (1, 2));
            // Again: what is there is no refusal, nor what is not there to be removed.
            request.routes.truncate(1);
            request.remove_rules = vec![rule(6), rule(7), vec![1]];
            request.remove_routes = vec![to(9, core::slice::from_ref(&device)), vec![]];
            request.rules.clear();
            assert_eq!(route(&request).unwrap().refused, []);
            assert_eq!((count(26, RTM_NEWROUTE), count(34, RTM_NEWRULE)), (1, 1));
            request.remove_routes = core::mem::take(&mut request.routes);
            route(&request).unwrap();
            assert_eq!(count(26, RTM_NEWROUTE), 0);
            request.routes = vec![vec![]; MAX_MESSAGES + 1];
            assert!(route(&request).unwrap_err().message.contains("at most"));
        });
    }

    #[test]
    fn several_ways_are_taken_apart() {
        let mut ways = vec![16, 0, 4, 0];
        ways.extend(9u32.to_ne_bytes());
        ways.extend(attribute(5, &[10, 0, 0, 1]));
        ways.extend([8, 0, 0, 0, 9, 0, 0, 0]);
        let body = to(1, &[attribute(RTA_MULTIPATH, &ways)]);
        let single = single_ways(&translated(&body, &[(9, 3)]).unwrap());
        let device = attribute(RTA_OIF, &3u32.to_ne_bytes());
        let mut first = to(1, &[device.clone(), attribute(5, &[10, 0, 0, 1])]);
        first[8] = 4;
        assert_eq!(single, [first, to(1, &[device])]);
        assert_eq!(single_ways(&to(1, &[])), Vec::<Vec<u8>>::new());
        assert!(translated(&body, &[]).is_err());
        assert!(translated(&to(1, &[attribute(RTA_MULTIPATH, &[0; 8])]), &[(0, 1)]).is_err());
        for cut in 0..body.len() {
            let _ = translated(&body[..cut], &[(9, 3)]).map(|body| single_ways(&body));
        }
    }

    #[test]
    fn parameters_are_set_below_their_directory() {
        in_namespaces(libc::CLONE_NEWNET, || {
            let set = |name: &str, value: &str| NetworkSysctl { name: name.into(), value: value.into() };
            let mut wanted = PrepareNetworkRequest {
                sysctls: vec![
                    set("ipv4/tcp_retries2", "7"),
                    set("../kernel/hostname", "x"),
                    set("/proc/sys/kernel/hostname", "x"),
                    set("ipv4/no_such", "1"),
                    set("ipv4/ip_forward", &"1".repeat(MAX_VALUE + 1)),
                ],
                ..Default::default()
            };
            let refused: Vec<u32> = prepare(&wanted).unwrap().refused.iter().map(|one| one.position).collect();
            assert_eq!(refused, [1, 2, 3, 4]);
            assert_eq!(crate::fs::read_to_string("/proc/sys/net/ipv4/tcp_retries2").unwrap().trim(), "7");
            wanted.sysctls = vec![set("x", ""); MAX_SYSCTLS + 1];
            assert!(prepare(&wanted).is_err());
        });
    }
}
