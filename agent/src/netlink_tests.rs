//! In network namespaces of their own, with real (veth) interfaces.

use super::*;
use crate::errors::code;
use crate::proto::agent::Routes;
use crate::proto::types::Route;
use crate::routes::{list_routes, update_routes};
use crate::test_support::in_namespaces;

const VETH_INFO_PEER: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const NLM_F_EXCL: u16 = 0x200;
const MAC: &str = "02:00:00:00:00:01";

/// A pair of interfaces with the MACs 02:..:01 and 02:..:02, both up.
fn veth(first: &str, second: &str) {
    let mut rtnl = Rtnl::open().unwrap();
    let message = Message::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &link_body(0, 0, 0))
        .text(IFLA_IFNAME, first)
        .attribute(IFLA_ADDRESS, &parse_mac(MAC).unwrap())
        .nested(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |peer| {
                    // The peer is described by a message body of its own. It has 16 bytes, so that the attributes
                    // behind it stay aligned.
                    peer.raw(&link_body(0, 0, 0))
                        .text(IFLA_IFNAME, second)
                        .attribute(IFLA_ADDRESS, &parse_mac("02:00:00:00:00:02").unwrap())
                })
            })
        });
    rtnl.change(message).unwrap();
    for name in [first, second] {
        rtnl.change(Message::new(RTM_NEWLINK, 0, &link_body(0, IFF_UP, IFF_UP)).text(IFLA_IFNAME, name)).unwrap();
    }
}

fn ip(address: &str, mask: &str) -> IPAddress {
    IPAddress { family: i32::from(address.contains(':')), address: address.into(), mask: mask.into() }
}

fn interface(name: &str, mac: &str, addresses: &[(&str, &str)]) -> Interface {
    Interface {
        name: name.into(),
        hw_addr: mac.into(),
        ip_addresses: addresses.iter().map(|(address, mask)| ip(address, mask)).collect(),
        ..Default::default()
    }
}

/// The addresses that somebody has set.
fn set_addresses(interface: &Interface) -> Vec<String> {
    let global = interface.ip_addresses.iter().filter(|ip| !ip.address.starts_with("fe80"));
    global.map(|ip| format!("{}/{}", ip.address, ip.mask)).collect()
}

#[test]
fn an_interface_is_renamed_and_its_addresses_are_replaced() {
    in_namespaces(libc::CLONE_NEWNET, || {
        veth("a", "b");
        let mut wanted = interface("eth0", MAC, &[("10.1.2.3", "24"), ("fd00::3", "64")]);
        wanted.mtu = 1400;
        let after = update_interface(&wanted).unwrap();
        assert_eq!((after.name.as_str(), after.mtu, after.hw_addr.as_str()), ("eth0", 1400, MAC));
        assert_eq!(
            (set_addresses(&after), after.type_.as_str()),
            (vec!["10.1.2.3/24".into(), "fd00::3/64".into()], "veth")
        );
        assert_eq!(after.raw_flags & (IFF_UP | IFF_NOARP), IFF_UP);
        // Again, with another set: what is not named goes, also when it was somebody's primary address.
        wanted.ip_addresses = vec![ip("10.1.2.9", "24"), ip("192.168.7.1", "32")];
        wanted.raw_flags = IFF_NOARP;
        let after = update_interface(&wanted).unwrap();
        assert_eq!(set_addresses(&after), ["10.1.2.9/24", "192.168.7.1/32"]);
        assert_eq!(after.raw_flags & IFF_NOARP, IFF_NOARP);
        assert_eq!(after.mtu, 1400);
        let listed = list_interfaces().unwrap().interfaces;
        let mut names: Vec<_> = listed.iter().map(|interface| interface.name.as_str()).collect();
        // Some kernels put tunnels of their own into every namespace.
        names.retain(|name| !name.starts_with("sit") && !name.starts_with("tunl") && !name.starts_with("ip6tnl"));
        names.sort_unstable();
        assert_eq!(names, ["b", "eth0", "lo"]);
    });
}

#[test]
fn names_are_swapped_when_taken() {
    in_namespaces(libc::CLONE_NEWNET, || {
        veth("eth0", "eth1");
        let after = update_interface(&interface("eth1", MAC, &[("10.0.0.1", "8")])).unwrap();
        assert_eq!((after.name.as_str(), after.hw_addr.as_str()), ("eth1", MAC));
        let listed = list_interfaces().unwrap().interfaces;
        let other = listed.iter().find(|interface| interface.hw_addr.ends_with("02")).unwrap();
        assert_eq!((other.name.as_str(), other.raw_flags & IFF_UP), ("eth0", IFF_UP));
    });
}

#[test]
fn mistakes_are_named() {
    in_namespaces(libc::CLONE_NEWNET, || {
        veth("a", "b");
        let fails = |wanted: &Interface| update_interface(wanted).unwrap_err();
        let missing = fails(&interface("eth0", "02:00:00:00:00:99", &[]));
        assert!(missing.code == code::NOT_FOUND && missing.message.starts_with("Link not found"), "{missing}");
        assert_eq!(fails(&interface("eth0", "", &[])).code, code::INVALID_ARGUMENT);
        for wrong in ["02:00", "zz:00:00:00:00:01", "0200.0000.0001"] {
            assert!(fails(&interface("eth0", wrong, &[])).message.contains(wrong));
        }
        assert!(fails(&interface("eth0", MAC, &[("10.0.0.300", "8")])).message.contains("10.0.0.300"));
        assert!(fails(&interface("eth0", MAC, &[("10.0.0.3", "255.0.0.0")])).message.contains("255.0.0.0"));
        assert!(fails(&interface("eth0", MAC, &[("10.0.0.3", "33")])).message.contains("33"));
        assert!(fails(&interface("much-too-long-a-name", MAC, &[])).message.contains("much-too-long"));
        let mut huge = interface("", MAC, &[]);
        huge.mtu = 1 << 20;
        let refused = fails(&huge);
        assert!(refused.message.contains("mtu"), "the kernel's own words: {refused}");
        assert_eq!(set_addresses(&update_interface(&interface("", MAC, &[])).unwrap()), Vec::<String>::new());
    });
}

fn route(dest: &str, gateway: &str, device: &str) -> Route {
    Route { dest: dest.into(), gateway: gateway.into(), device: device.into(), ..Default::default() }
}

fn seen(routes: &Routes) -> Vec<String> {
    let set = routes.routes.iter().filter(|route| !route.dest.starts_with("fe80") && !route.dest.starts_with("ff00"));
    let mut lines: Vec<_> = set
        .map(|r| {
            format!("{} via {} dev {} src {} mtu {} flags {}", r.dest, r.gateway, r.device, r.source, r.mtu, r.flags)
        })
        .collect();
    lines.sort_unstable();
    lines
}

#[test]
fn routes_are_replaced_but_the_kernels_stay() {
    in_namespaces(libc::CLONE_NEWNET, || {
        veth("a", "b");
        update_interface(&interface("eth0", MAC, &[("10.1.2.3", "24"), ("fd00::3", "64")])).unwrap();
        // The gateway of the first is reached by the second, the last one is the kernel's already.
        let mut far = route("172.16.0.0/12", "10.9.9.1", "eth0");
        far.mtu = 1300;
        let mut direct = route("10.9.9.0/24", "", "eth0");
        direct.source = "10.1.2.3".into();
        let mut v6 = route("", "fd00::1", "eth0");
        v6.family = FAMILY_V6;
        let mut onlink = route("10.50.0.0/16", "10.60.0.1", "eth0");
        onlink.flags = 4;
        let wanted = vec![far, route("", "10.1.2.1", "eth0"), v6, direct, onlink, route("10.1.2.0/24", "", "eth0")];
        let after = update_routes(&Routes { routes: wanted }).unwrap();
        let expected = [
            " via 10.1.2.1 dev eth0 src  mtu 0 flags 0",
            " via fd00::1 dev eth0 src  mtu 0 flags 0",
            "10.1.2.0/24 via  dev eth0 src 10.1.2.3 mtu 0 flags 0",
            "10.50.0.0/16 via 10.60.0.1 dev eth0 src  mtu 0 flags 4",
            "10.9.9.0/24 via  dev eth0 src 10.1.2.3 mtu 0 flags 0",
            "172.16.0.0/12 via 10.9.9.1 dev eth0 src  mtu 1300 flags 0",
            "fd00::/64 via  dev eth0 src  mtu 0 flags 0",
        ];
        assert_eq!(seen(&after), expected);
        assert_eq!(after, list_routes().unwrap());

        let two_ways = vec![route("default", "10.1.2.1", "eth0"), route("0.0.0.0/0", "10.1.2.2", "eth0")];
        let after = update_routes(&Routes { routes: two_ways }).unwrap();
        let expected = [
            " via 10.1.2.1 dev eth0 src  mtu 0 flags 0",
            " via 10.1.2.2 dev eth0 src  mtu 0 flags 0",
            "10.1.2.0/24 via  dev eth0 src 10.1.2.3 mtu 0 flags 0",
            "fd00::/64 via  dev eth0 src  mtu 0 flags 0",
        ];
        assert_eq!(seen(&after), expected);

        // A mistake leaves everything as it is.
        for wrong in [route("", "10.1.2.1", "eth9"), route("10.0.0.0/40", "", "eth0"), route("10.0.0.0/8", "", "")] {
            let error = update_routes(&Routes { routes: vec![wrong.clone()] }).unwrap_err();
            assert!(error.message.contains("eth9") || error.message.contains("10.0.0.0"), "{error}");
            assert_eq!(seen(&list_routes().unwrap()), expected);
        }
        let unreachable = update_routes(&Routes { routes: vec![route("", "10.77.0.1", "eth0")] }).unwrap_err();
        assert!(unreachable.message.contains("10.77.0.1"), "{unreachable}");
    });
}

#[test]
fn several_v6_ways_are_listed_and_removed() {
    in_namespaces(libc::CLONE_NEWNET, || {
        veth("a", "b");
        update_interface(&interface("eth0", MAC, &[("fd00::3", "64")])).unwrap();
        let ways = vec![route("fd77::/64", "fd00::1", "eth0"), route("fd77::/64", "fd00::2", "eth0")];
        let count = |routes: Routes| routes.routes.iter().filter(|route| route.dest == "fd77::/64").count();
        assert_eq!(count(update_routes(&Routes { routes: ways }).unwrap()), 2);
        assert_eq!(count(update_routes(&Routes { routes: vec![] }).unwrap()), 0);
        let foreign = update_routes(&Routes { routes: vec![route("10.0.0.0/8", "fd00::9", "eth0")] }).unwrap();
        assert!(seen(&foreign).contains(&"10.0.0.0/8 via fd00::9 dev eth0 src  mtu 0 flags 0".to_string()));
    });
}

#[test]
fn neighbours_loopback_and_counters() {
    in_namespaces(libc::CLONE_NEWNET, || {
        bring_up_loopback().unwrap();
        veth("a", "b");
        update_interface(&interface("eth0", MAC, &[("10.1.2.3", "24")])).unwrap();
        let mut neighbor = ARPNeighbor {
            to_ip_address: Some(Box::new(ip("10.1.2.7", ""))),
            device: "eth0".into(),
            lladdr: "02:00:00:00:00:07".into(),
            ..Default::default()
        };
        let add = |neighbor: &ARPNeighbor| add_arp_neighbors(&ARPNeighbors { arp_neighbors: vec![neighbor.clone()] });
        add(&neighbor).unwrap();
        add(&neighbor).unwrap();
        let table = crate::fs::read_to_string("/proc/thread-self/net/arp").unwrap();
        assert!(table.contains("10.1.2.7") && table.contains("0x6") && table.contains("02:00:00:00:00:07"), "{table}");
        neighbor.device = "eth9".into();
        assert!(add(&neighbor).unwrap_err().message.contains("eth9"));
        neighbor.to_ip_address = None;
        assert!(add(&neighbor).is_err());
        let interfaces = list_interfaces().unwrap().interfaces;
        let lo = interfaces.iter().find(|interface| interface.name == "lo").unwrap();
        assert!(lo.ip_addresses.iter().any(|ip| ip.address == "127.0.0.1" && ip.mask == "8"));
        let mut names: Vec<_> = network_stats().unwrap().into_iter().map(|stats| stats.name).collect();
        names.sort_unstable();
        assert_eq!(names, ["b", "eth0"]);
    });
}
