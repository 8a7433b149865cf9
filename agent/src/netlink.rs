//! The guest's network: interfaces, addresses, neighbours (routes are in `routes`).

use crate::devices::find_interface;
use crate::prelude::*;
use crate::proto::agent::{ARPNeighbors, Interfaces, NetworkStats};
use crate::proto::types::{ARPNeighbor, IPAddress, Interface};
use crate::rtnl::{attributes, text_of, u32_at, u64_at, Message, Refusal, Rtnl};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWNEIGH: u16 = 28;
pub const NLM_F_REPLACE: u16 = 0x100;
pub const NLM_F_CREATE: u16 = 0x400;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_STATS64: u16 = 23;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_NODAD: u8 = 2;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
const IFF_NOARP: u32 = 0x80;
/// Longest name of an interface.
const NAME_MAX: usize = 15;
/// How often a rename is tried again if the name was taken in the meantime.
const NAME_ATTEMPTS: usize = 8;

/// IPFamily
pub const FAMILY_V4: i32 = 0;
pub const FAMILY_V6: i32 = 1;

/// A network interface as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    mac: Vec<u8>,
    mtu: u32,
    flags: u32,
    kind: String,
    stats: NetworkStats,
}

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    index: u32,
    ip: IpAddr,
    prefix: u8,
}

/// Configures the interface at `device_path` (PCI or MMIO) or, without one, with the MAC `hw_addr`: MAC (only when found by
/// path), name, MTU, ARP flag, up; its addresses are replaced (IPv6 link-local ones excepted). Returns its new
/// description.
pub fn update_interface(wanted: &Interface) -> Result<Interface> {
    let mut rtnl = Rtnl::open()?;
    let addresses = wanted.ip_addresses.iter().map(parse_address).collect::<Result<Vec<_>>>()?;
    let mac = if wanted.hw_addr.is_empty() { None } else { Some(parse_mac(&wanted.hw_addr)?) };
    check_name(&wanted.name)?;
    // The list of interfaces is made after the wait for the device.
    let name = match wanted.device_path.as_str() {
        "" => None,
        path => Some(find_interface(path).context("Link not found")?),
    };
    let links = links(&mut rtnl)?;
    let link = match (&name, &mac) {
        (Some(name), _) => link_by_name(&links, name)?,
        (None, Some(mac)) => links.iter().find(|link| link.mac == *mac).ok_or_else(|| {
            Error::not_found(format!("Link not found: no interface has the address {}", wanted.hw_addr))
        })?,
        (None, None) => {
            return Err(Error::invalid("an interface is found by devicePath or hwAddr, and neither is given"));
        }
    };
    configure(&mut rtnl, link, wanted, mac.as_deref()).with_context(|| format!("configure interface {}", link.name))?;
    replace_addresses(&mut rtnl, link.index, &addresses)?;
    let after = self::links(&mut rtnl)?.into_iter().find(|candidate| candidate.index == link.index);
    let after = after.ok_or_else(|| Error::not_found(format!("Link not found: {} has disappeared", link.name)))?;
    Ok(describe(&after, &self::addresses(&mut rtnl)?))
}

fn check_name(name: &str) -> Result<()> {
    if name.len() > NAME_MAX || name.contains(['/', ':', ' ']) {
        return Err(Error::invalid(format!("{name:?} cannot be the name of an interface")));
    }
    Ok(())
}

/// Renames an interface. It is taken down for that, and stays down.
pub fn rename_interface(device: &str, name: &str) -> Result<()> {
    check_name(name)?;
    if device == name || name.is_empty() {
        return Ok(());
    }
    let mut rtnl = Rtnl::open()?;
    let link = link_by_name(&links(&mut rtnl)?, device)?.clone();
    if link.flags & IFF_UP != 0 {
        rtnl.change(Message::new(RTM_NEWLINK, 0, &link_body(link.index, 0, IFF_UP))).context("take it down")?;
    }
    give_name(&mut rtnl, link.index, name)
}

/// Every interface with its addresses, the loopback included.
pub fn list_interfaces() -> Result<Interfaces> {
    let mut rtnl = Rtnl::open()?;
    let addresses = addresses(&mut rtnl)?;
    let interfaces = links(&mut rtnl)?.iter().map(|link| describe(link, &addresses)).collect();
    Ok(Interfaces { interfaces })
}

/// Makes (or replaces) neighbour entries, permanent unless they say otherwise.
pub fn add_arp_neighbors(neighbors: &ARPNeighbors) -> Result<()> {
    let mut rtnl = Rtnl::open()?;
    let links = links(&mut rtnl)?;
    neighbors.arp_neighbors.iter().try_for_each(|neighbor| {
        add_neighbor(&mut rtnl, &links, neighbor)
            .with_context(|| format!("neighbour {} of {}", neighbor.lladdr, neighbor.device))
    })
}

/// `lo` up, where 127.0.0.1 and ::1 come from.
pub fn bring_up_loopback() -> Result<()> {
    let mut rtnl = Rtnl::open()?;
    let message = Message::new(RTM_NEWLINK, 0, &link_body(0, IFF_UP, IFF_UP)).text(IFLA_IFNAME, "lo");
    rtnl.change(message).context("bring up the loopback interface")
}

/// Traffic of every interface except the loopback and those that were never used (the kernel's own tunnels).
pub fn network_stats() -> Result<Vec<NetworkStats>> {
    let links = links(&mut Rtnl::open()?)?;
    let used = |link: &Link| link.flags & IFF_UP != 0 || link.stats.rx_packets | link.stats.tx_packets != 0;
    let counted = links.into_iter().filter(|link| link.flags & IFF_LOOPBACK == 0 && used(link));
    Ok(counted.map(|link| link.stats).collect())
}

/// The interfaces of the caller's network namespace.
pub fn links(rtnl: &mut Rtnl) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    rtnl.dump(&Message::new(RTM_GETLINK, 0, &[0; 16]), |kind, body| {
        if kind == RTM_NEWLINK && body.len() >= 16 {
            links.push(parse_link(body));
        }
    })
    .context("list the interfaces")?;
    Ok(links)
}

/// The error that the host's side looks for: it asks again until the device has appeared.
pub fn link_by_name<'a>(links: &'a [Link], name: &str) -> Result<&'a Link> {
    links
        .iter()
        .find(|link| link.name == name)
        .ok_or_else(|| Error::not_found(format!("Link not found: no interface is called {name:?}")))
}

pub fn parse_ip(text: &str) -> Result<IpAddr> {
    text.parse().map_err(|_| Error::invalid(format!("{text:?} is no IP address")))
}

pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// An address of 4 or 16 bytes.
pub fn ip_from(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|four| IpAddr::V4(Ipv4Addr::from(four))),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|sixteen| IpAddr::V6(Ipv6Addr::from(sixteen))),
        _ => None,
    }
}

/// The kernel's number of an address family.
pub fn kernel_family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() {
        libc::AF_INET as u8
    } else {
        libc::AF_INET6 as u8
    }
}

pub fn wire_family(ip: IpAddr) -> i32 {
    if ip.is_ipv4() {
        FAMILY_V4
    } else {
        FAMILY_V6
    }
}

fn configure(rtnl: &mut Rtnl, link: &Link, wanted: &Interface, mac: Option<&[u8]>) -> Result<()> {
    let new_mac = mac.filter(|mac| *mac != link.mac);
    let rename = !wanted.name.is_empty() && wanted.name != link.name;
    if (new_mac.is_some() || rename) && link.flags & IFF_UP != 0 {
        rtnl.change(Message::new(RTM_NEWLINK, 0, &link_body(link.index, 0, IFF_UP))).context("take it down")?;
    }
    if rename {
        give_name(rtnl, link.index, &wanted.name)?;
    }
    let flags = IFF_UP | wanted.raw_flags & IFF_NOARP;
    let mut message = Message::new(RTM_NEWLINK, 0, &link_body(link.index, flags, IFF_UP | IFF_NOARP));
    if let Some(mac) = new_mac {
        message = message.attribute(IFLA_ADDRESS, mac);
    }
    if wanted.mtu != 0 && wanted.mtu != u64::from(link.mtu) {
        let mtu = u32::try_from(wanted.mtu).map_err(|_| Error::invalid(format!("MTU {} is too large", wanted.mtu)))?;
        message = message.number(IFLA_MTU, mtu);
    }
    rtnl.change(message).context("set MAC, MTU and flags")
}

/// Gives an interface a name. If another interface has that name, the two swap names. An interface that is plugged in
/// at the same moment may get the name from the kernel; then it takes part in the swap.
fn give_name(rtnl: &mut Rtnl, index: u32, name: &str) -> Result<()> {
    let mut attempts = NAME_ATTEMPTS;
    loop {
        let links = links(rtnl)?;
        let link = links.iter().find(|link| link.index == index);
        let link = link.ok_or_else(|| Error::not_found(format!("Link not found: number {index} has disappeared")))?;
        let outcome = match links.iter().find(|other| other.name == name && other.index != index) {
            Some(other) => swap_names(rtnl, link, other),
            None => set_name(rtnl, index, name),
        };
        match outcome {
            Err(refusal) if refusal.errno.0 == libc::EEXIST && attempts > 0 => attempts -= 1,
            outcome => return outcome.with_context(|| format!("rename it to {name}")),
        }
    }
}

fn set_name(rtnl: &mut Rtnl, index: u32, name: &str) -> core::result::Result<(), Refusal> {
    rtnl.change(Message::new(RTM_NEWLINK, 0, &link_body(index, 0, 0)).text(IFLA_IFNAME, name))
}

/// The other interface is configured later, unless it was down and stays so.
fn swap_names(rtnl: &mut Rtnl, link: &Link, other: &Link) -> core::result::Result<(), Refusal> {
    let was_up = other.flags & IFF_UP != 0;
    if was_up {
        rtnl.change(Message::new(RTM_NEWLINK, 0, &link_body(other.index, 0, IFF_UP)))?;
    }
    set_name(rtnl, other.index, &format!("kata-{}", other.index))?;
    set_name(rtnl, link.index, &other.name)?;
    set_name(rtnl, other.index, &link.name)?;
    if was_up {
        rtnl.change(Message::new(RTM_NEWLINK, 0, &link_body(other.index, IFF_UP, IFF_UP)))?;
    }
    Ok(())
}

fn replace_addresses(rtnl: &mut Rtnl, index: u32, wanted: &[(IpAddr, u8)]) -> Result<()> {
    for address in addresses(rtnl)?.iter().filter(|address| address.index == index) {
        // The kernel makes link-local addresses only when an interface comes up, and IPv6 needs them.
        let link_local = matches!(address.ip, IpAddr::V6(ip) if ip.segments()[0] & 0xffc0 == 0xfe80);
        if link_local || wanted.contains(&(address.ip, address.prefix)) {
            continue;
        }
        let message = address_message(RTM_DELADDR, 0, index, address.ip, address.prefix, 0);
        match rtnl.change(message) {
            // Secondary addresses go with their primary one.
            Err(refusal) if refusal.errno.0 == libc::EADDRNOTAVAIL => {}
            other => other.with_context(|| format!("remove the address {}", address.ip))?,
        }
    }
    for (ip, prefix) in wanted {
        // The host's network has assigned the address, so duplicate address detection is skipped and it can be used at
        // once.
        let flags = if ip.is_ipv6() { IFA_F_NODAD } else { 0 };
        let mut message = address_message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, *ip, *prefix, flags);
        if let (IpAddr::V4(ip), 0..=30) = (ip, prefix) {
            message = message.attribute(IFA_BROADCAST, &(u32::from(*ip) | u32::MAX >> prefix).to_be_bytes());
        }
        rtnl.change(message).with_context(|| format!("add the address {ip}/{prefix}"))?;
    }
    Ok(())
}

fn address_message(kind: u16, message_flags: u16, index: u32, ip: IpAddr, prefix: u8, flags: u8) -> Message {
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let mut body = [kernel_family(ip), prefix, flags, 0, 0, 0, 0, 0];
    body[4..].copy_from_slice(&index.to_ne_bytes());
    let octets = octets(ip);
    Message::new(kind, message_flags, &body).attribute(IFA_LOCAL, &octets).attribute(IFA_ADDRESS, &octets)
}

fn add_neighbor(rtnl: &mut Rtnl, links: &[Link], neighbor: &ARPNeighbor) -> Result<()> {
    let address = neighbor.to_ip_address.as_ref().ok_or_else(|| Error::invalid("toIPAddress is missing"))?;
    let ip = parse_ip(&address.address)?;
    let link = link_by_name(links, &neighbor.device)?;
    let number = |value: i32, what: &str| {
        u16::try_from(value).map_err(|_| Error::invalid(format!("{what} {value} is out of range")))
    };
    let state = if neighbor.state == 0 { NUD_PERMANENT } else { number(neighbor.state, "state")? };
    let flags = number(neighbor.flags, "flags")?.to_ne_bytes()[0];
    // struct ndmsg: family, padding, index, state, flags, type.
    let mut body = [0u8; 12];
    body[0] = kernel_family(ip);
    body[4..8].copy_from_slice(&link.index.to_ne_bytes());
    body[8..10].copy_from_slice(&state.to_ne_bytes());
    body[10] = flags;
    let mut message = Message::new(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &body).attribute(NDA_DST, &octets(ip));
    if !neighbor.lladdr.is_empty() {
        message = message.attribute(NDA_LLADDR, &parse_mac(&neighbor.lladdr)?);
    }
    rtnl.change(message).with_context(|| format!("add {ip}"))
}

/// struct ifinfomsg: family, type, index, flags, which of the flags to change.
fn link_body(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..].copy_from_slice(&change.to_ne_bytes());
    body
}

fn parse_link(body: &[u8]) -> Link {
    let mut link = Link { index: u32_at(body, 4), flags: u32_at(body, 8), ..Default::default() };
    for (kind, value) in attributes(&body[16..]) {
        match kind {
            IFLA_ADDRESS => link.mac = value.to_vec(),
            IFLA_IFNAME => link.name = text_of(value),
            IFLA_MTU => link.mtu = u32_at(value, 0),
            IFLA_LINKINFO => {
                let mut kinds = attributes(value).filter(|(kind, _)| *kind == IFLA_INFO_KIND);
                link.kind = kinds.next().map(|(_, text)| text_of(text)).unwrap_or_default();
            }
            IFLA_STATS64 => {
                // struct rtnl_link_stats64: eight counters, in pairs of received and sent.
                let counter = |n: usize| u64_at(value, n * 8);
                link.stats = NetworkStats {
                    name: String::new(),
                    rx_packets: counter(0),
                    tx_packets: counter(1),
                    rx_bytes: counter(2),
                    tx_bytes: counter(3),
                    rx_errors: counter(4),
                    tx_errors: counter(5),
                    rx_dropped: counter(6),
                    tx_dropped: counter(7),
                };
            }
            _ => {}
        }
    }
    link.stats.name.clone_from(&link.name);
    link
}

fn addresses(rtnl: &mut Rtnl) -> Result<Vec<Address>> {
    let mut addresses = Vec::new();
    rtnl.dump(&Message::new(RTM_GETADDR, 0, &[0; 8]), |kind, body| {
        if kind != RTM_NEWADDR || body.len() < 8 {
            return;
        }
        // On point-to-point links IFA_ADDRESS is the other end.
        let of = |wanted| attributes(&body[8..]).find(|(kind, _)| *kind == wanted).and_then(|(_, ip)| ip_from(ip));
        if let Some(ip) = of(IFA_LOCAL).or_else(|| of(IFA_ADDRESS)) {
            addresses.push(Address { index: u32_at(body, 4), ip, prefix: body[1] });
        }
    })
    .context("list the addresses")?;
    Ok(addresses)
}

fn describe(link: &Link, addresses: &[Address]) -> Interface {
    let own = addresses.iter().filter(|address| address.index == link.index);
    Interface {
        device: link.name.clone(),
        name: link.name.clone(),
        ip_addresses: own
            .map(|address| IPAddress {
                family: wire_family(address.ip),
                address: address.ip.to_string(),
                mask: address.prefix.to_string(),
            })
            .collect(),
        mtu: u64::from(link.mtu),
        hw_addr: link.mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"),
        device_path: String::new(),
        type_: link.kind.clone(),
        raw_flags: link.flags,
    }
}

fn parse_address(address: &IPAddress) -> Result<(IpAddr, u8)> {
    let ip = parse_ip(&address.address)?;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    match address.mask.parse::<u8>() {
        Ok(prefix) if prefix <= most => Ok((ip, prefix)),
        _ => Err(Error::invalid(format!("{:?} is no prefix length for {ip}", address.mask))),
    }
}

fn parse_mac(text: &str) -> Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|pair| {
            let plain = pair.len() == 2 && pair.bytes().all(|byte| byte.is_ascii_hexdigit());
            plain.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
        })
        .collect();
    // Ethernet, or the longer addresses of InfiniBand.
    bytes
        .filter(|bytes| (6..=32).contains(&bytes.len()))
        .ok_or_else(|| Error::invalid(format!("{text:?} is no hardware address")))
}

#[cfg(test)]
#[path = "netlink_tests.rs"]
mod tests;
