//! The guest's routes: the main table, IPv4 and IPv6.

use crate::netlink::{ip_from, kernel_family, link_by_name, links, octets, parse_ip, wire_family, Link, NLM_F_CREATE};
use crate::prelude::*;
use crate::proto::agent::Routes;
use crate::proto::types::Route;
use crate::rtnl::{attributes, u32_at, Message, Rtnl};
use core::net::IpAddr;

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const NLM_F_APPEND: u16 = 0x800;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTAX_MTU: u16 = 2;

const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
const RTPROT_REDIRECT: u8 = 1;
const RTPROT_KERNEL: u8 = 2;
const RTPROT_BOOT: u8 = 3;
const RTPROT_RA: u8 = 9;
const RT_SCOPE_LINK: u8 = 253;
const RTM_F_CLONED: u32 = 0x200;
/// Flags of a next hop that a host may set: pervasive and on-link.
const SETTABLE_FLAGS: u32 = 2 | 4;

/// One route of the main table; each next hop of a multipath route is an entry of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    dest: (IpAddr, u8),
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    index: u32,
    scope: u8,
    protocol: u8,
    flags: u32,
    mtu: u32,
}

impl Entry {
    /// Whether the kernel has made it (for an address, from a router's advertisement); such routes are left alone.
    fn is_kernels(&self) -> bool {
        matches!(self.protocol, RTPROT_REDIRECT | RTPROT_KERNEL | RTPROT_RA)
    }
}

/// Replaces all routes but the kernel's own by these; the table afterwards. Nothing is changed if one of them is
/// invalid.
pub fn update_routes(wanted: &Routes) -> Result<Routes> {
    let mut rtnl = Rtnl::open()?;
    let links = links(&mut rtnl)?;
    let entries = wanted.routes.iter().map(|route| parse(route, &links)).collect::<Result<Vec<_>>>()?;
    // A gateway must be reachable by the time it is used.
    let (behind_gateways, direct): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| entry.gateway.is_some());

    let (mut kept, mut old) = (Vec::new(), Vec::new());
    dump(&mut rtnl, |entry, body| {
        if entry.is_kernels() {
            kept.push(entry);
        } else if !old.iter().any(|known| known == body) {
            old.push(body.to_vec());
        }
    })?;
    for body in old {
        // The kernel accepts its own description of a route as the key of the route to delete.
        match rtnl.change(Message::new(RTM_DELROUTE, 0, &body)) {
            Err(refusal) if refusal.errno.0 == libc::ESRCH => {}
            other => other.context("remove an old route")?,
        }
    }
    for entry in direct.into_iter().chain(behind_gateways) {
        let same = |kernel: &Entry| {
            kernel.dest == entry.dest && kernel.index == entry.index && kernel.gateway == entry.gateway
        };
        if entry.mtu == 0 && kept.iter().any(same) {
            continue;
        }
        match rtnl.change(new_route(&entry)) {
            // The request has the same route twice.
            Err(refusal) if refusal.errno.0 == libc::EEXIST => {}
            other => other.with_context(|| {
                let via = entry.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
                format!("add the route to {}/{}{via}", entry.dest.0, entry.dest.1)
            })?,
        }
    }
    list_routes()
}

/// The main table.
pub fn list_routes() -> Result<Routes> {
    let mut rtnl = Rtnl::open()?;
    let links = links(&mut rtnl)?;
    let mut routes = Vec::new();
    dump(&mut rtnl, |entry, _| {
        let (ip, prefix) = entry.dest;
        let name = links.iter().find(|link| link.index == entry.index).map(|link| link.name.clone());
        let text = |ip: Option<IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
        routes.push(Route {
            // The default route has an empty destination on the wire.
            dest: if prefix == 0 { String::new() } else { format!("{ip}/{prefix}") },
            gateway: text(entry.gateway),
            device: name.unwrap_or_default(),
            source: text(entry.source),
            scope: u32::from(entry.scope),
            family: wire_family(ip),
            flags: entry.flags,
            mtu: entry.mtu,
        });
    })?;
    Ok(Routes { routes })
}

fn parse(route: &Route, links: &[Link]) -> Result<Entry> {
    let optional = |text: &str| if text.is_empty() { Ok(None) } else { parse_ip(text).map(Some) };
    let (gateway, source) = (optional(&route.gateway)?, optional(&route.source)?);
    let dest = match route.dest.as_str() {
        "" | "default" => {
            let v6 = route.family != 0 || gateway.is_some_and(|ip| ip.is_ipv6());
            (if v6 { parse_ip("::")? } else { parse_ip("0.0.0.0")? }, 0)
        }
        text => {
            let (ip, prefix) = text.split_once('/').unwrap_or((text, ""));
            let ip = parse_ip(ip)?;
            let most = if ip.is_ipv4() { 32 } else { 128 };
            let prefix = if prefix.is_empty() { Some(most) } else { prefix.parse().ok() };
            let invalid = || Error::invalid(format!("route: {text:?} is no network"));
            (ip, prefix.filter(|prefix| *prefix <= most).ok_or_else(invalid)?)
        }
    };
    let index = if route.device.is_empty() {
        0
    } else {
        link_by_name(links, &route.device).with_context(|| format!("route to {:?}", route.dest))?.index
    };
    if index == 0 && gateway.is_none() {
        return Err(Error::invalid(format!("the route to {:?} has neither a device nor a gateway", route.dest)));
    }
    let mut scope = u8::try_from(route.scope)
        .map_err(|_| Error::invalid(format!("the route to {:?} has scope {}", route.dest, route.scope)))?;
    if dest.0.is_ipv4() && gateway.is_none() && scope == 0 {
        // With the scope of the universe, no gateway could be reached through it.
        scope = RT_SCOPE_LINK;
    }
    let flags = route.flags & SETTABLE_FLAGS;
    Ok(Entry { dest, gateway, source, index, scope, protocol: RTPROT_BOOT, flags, mtu: route.mtu })
}

/// Appends: a second way to the same destination does not push out the first.
fn new_route(entry: &Entry) -> Message {
    let (ip, prefix) = entry.dest;
    // struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags.
    let mut body =
        [kernel_family(ip), prefix, 0, 0, RT_TABLE_MAIN, entry.protocol, entry.scope, RTN_UNICAST, 0, 0, 0, 0];
    body[8..].copy_from_slice(&entry.flags.to_ne_bytes());
    let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, &body);
    if prefix > 0 {
        message = message.attribute(RTA_DST, &octets(ip));
    }
    message = match entry.gateway {
        Some(gateway) if gateway.is_ipv4() == ip.is_ipv4() => message.attribute(RTA_GATEWAY, &octets(gateway)),
        // An IPv4 network behind an IPv6 router: struct rtvia has the family in front.
        Some(gateway) => {
            let mut via = u16::from(kernel_family(gateway)).to_ne_bytes().to_vec();
            via.extend(octets(gateway));
            message.attribute(RTA_VIA, &via)
        }
        None => message,
    };
    if let Some(source) = entry.source {
        message = message.attribute(RTA_PREFSRC, &octets(source));
    }
    if entry.index != 0 {
        message = message.number(RTA_OIF, entry.index);
    }
    if entry.mtu != 0 {
        message = message.nested(RTA_METRICS, |metrics| metrics.number(RTAX_MTU, entry.mtu));
    }
    message
}

/// Calls `each` with every unicast route of the main table, and the kernel's message for it.
fn dump(rtnl: &mut Rtnl, mut each: impl FnMut(Entry, &[u8])) -> Result<()> {
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut body = [0; 12];
        body[0] = family as u8;
        let dumped = rtnl.dump(&Message::new(RTM_GETROUTE, 0, &body), |kind, body| {
            if kind == RTM_NEWROUTE && body.len() >= 12 {
                for entry in read_entries(body) {
                    each(entry, body);
                }
            }
        });
        match dumped {
            // A kernel without IPv6.
            Err(refusal) if family == libc::AF_INET6 && refusal.errno.0 == libc::EOPNOTSUPP => {}
            other => other.context("list the routes")?,
        }
    }
    Ok(())
}

fn read_entries(body: &[u8]) -> Vec<Entry> {
    let flags = u32_at(body, 8);
    let of = |wanted| attributes(&body[12..]).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let table = of(RTA_TABLE).map_or(u32::from(body[4]), |value| u32_at(value, 0));
    if table != u32::from(RT_TABLE_MAIN) || body[7] != RTN_UNICAST || flags & RTM_F_CLONED != 0 {
        return Vec::new();
    }
    let any = if i32::from(body[0]) == libc::AF_INET { [0; 16][..4].to_vec() } else { vec![0; 16] };
    let Some(dest) = ip_from(of(RTA_DST).unwrap_or(&any)) else { return Vec::new() };
    let metrics = of(RTA_METRICS).unwrap_or_default();
    let mtu = attributes(metrics).find(|(kind, _)| *kind == RTAX_MTU).map_or(0, |(_, value)| u32_at(value, 0));
    let way = |index: u32, gateway: Option<IpAddr>, flags: u32| Entry {
        dest: (dest, body[1]),
        gateway,
        source: of(RTA_PREFSRC).and_then(ip_from),
        index,
        scope: body[6],
        protocol: body[5],
        flags: flags & SETTABLE_FLAGS,
        mtu,
    };
    let Some(mut ways) = of(RTA_MULTIPATH) else {
        let index = of(RTA_OIF).map_or(0, |value| u32_at(value, 0));
        return vec![way(index, gateway_in(&body[12..]), flags)];
    };
    let mut entries = Vec::new();
    // struct rtnexthop: length, flags, weight, index; attributes follow.
    while ways.len() >= 8 {
        let length = usize::from(u16::from_ne_bytes([ways[0], ways[1]]));
        let Some(attributes) = ways.get(8..length) else { break };
        entries.push(way(u32_at(ways, 4), gateway_in(attributes), u32::from(ways[2])));
        ways = ways.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    entries
}

fn gateway_in(bytes: &[u8]) -> Option<IpAddr> {
    attributes(bytes).find_map(|(kind, value)| match kind {
        RTA_GATEWAY => ip_from(value),
        RTA_VIA => ip_from(value.get(2..)?),
        _ => None,
    })
}
