"""What a guest has of its network namespace beyond addresses: parameters, routes, rules; and what changes there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import netlab
import pytest
from containerd_support import Containerd, daemon_fixture  # noqa: F401 - a fixture
from test_containerd import wired  # noqa: F401 - a fixture
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# The host's own ip(8), in the guest.
LOADER = next(
    iter([*Path("/usr/lib64").glob("ld-linux-*.so.?"), *Path("/usr/lib").glob("ld-linux-*.so.?"), Path()])
)
LIBRARIES = "/host/lib:" + ":".join(
    f"/host/lib/{path.name}" for path in Path("/usr/lib").glob("*-linux-gnu")
)
PROGRAM = Path(shutil.which("ip", path="/usr/sbin:/usr/bin:/sbin:/bin") or "/usr/sbin/ip").resolve()
IP = " ".join(
    f"{word}".replace("/usr/", "/host/") for word in (LOADER.resolve(), "--library-path", LIBRARIES, PROGRAM)
)
MOUNTS = (
    {"destination": "/host", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
)
PARAMETERS = {
    "ipv4.ip_forward": "1",
    "ipv4.ip_local_port_range": "20000\t30000",
    "ipv4.tcp_keepalive_time": "600",
    "ipv4.conf.default.rp_filter": "2",
    "ipv4.conf.eth0.rp_filter": "2",
    "ipv4.conf.eth0.arp_announce": "2",
    "ipv4.conf.eth0.proxy_arp": "1",
    "ipv4.neigh.eth0.base_reachable_time_ms": "40000",
    "ipv6.conf.eth0.accept_ra": "0",
    "ipv6.conf.eth0.accept_redirects": "0",
    "core.somaxconn": "1234",
}
WON = "ipv4.tcp_retries2"
"""By the container's specification."""
ROUTES = """
    route replace default via 10.9.0.1 mtu 1300 advmss 1200 metric 100
    route add default via 198.51.100.9 dev eth0 onlink metric 200
    route add 172.16.0.0/16 via 10.9.0.1 table 77 rto_min 100ms quickack 1 window 20000
    route add 192.0.2.0/24 dev eth0 table 77 scope link src 10.9.0.2
    route add 100.64.0.0/10 via 10.9.0.1 table 1000 mtu lock 1200 congctl reno
    route add blackhole 172.31.0.0/16 metric 5
    route add prohibit 172.30.0.0/16
    route add throw 10.0.0.0/8 table 77
    route add local 203.0.113.0/24 dev lo
    -6 route add 2001:db8:5::/48 via fd00:9::1 metric 77 mtu 1290 pref high
    -6 route add unreachable 2001:db8:6::/48
    -6 route add 2001:db8:7::/48 nexthop via fd00:9::1 nexthop via fd00:9::3 weight 3
    -6 route add 2001:db8:8::/48 via fd00:9::1 expires 3000
    rule add from 10.9.0.2 lookup 77 priority 1000
    rule add fwmark 0x10/0xf0 iif eth0 lookup 1000 priority 1001
    rule add not to 198.51.100.0/24 ipproto tcp dport 80-90 uidrange 0-9 lookup 77 priority 1002
    rule add lookup main suppress_prefixlength 0 priority 1003
    rule add from 0.0.0.0/0 prohibit priority 40000
    -6 rule add from 2001:db8:5::/48 lookup 77 priority 1000
    route add 198.18.0.0/15 nexthop via 10.9.0.1 nexthop via 10.9.0.5
"""


def state(run: Callable[..., str]) -> dict[str, Any]:
    """Routes and rules as ip(8) shows them: those of the kernel and what passes with time aside."""
    found: dict[str, Any] = {}
    for family in ("-4", "-6"):
        routes = json.loads(run("-j", "-N", "-d", family, "route", "show", "table", "all") or "[]")
        for route in routes:
            for passing in ("cache", "flags", "expires"):
                route.pop(passing, None)
            for way in route.get("nexthops", ()):
                way.pop("flags")
        found[f"routes {family}"] = sorted(
            json.dumps(route, sort_keys=True) for route in routes if route.get("protocol") != "2"
        )
        found[f"rules {family}"] = [
            json.dumps({**rule, "protocol": ""}, sort_keys=True)
            for rule in json.loads(run("-j", "-N", family, "rule"))
        ]
    return found


def advertise(namespace: str, interface: str) -> None:
    """One router advertisement of a documentation prefix (RFC 3849) to all who listen at the end of a cable."""

    def send() -> None:
        prefix = socket.inet_pton(socket.AF_INET6, "2001:db8:77::")
        option = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 3600, 1800, 0) + prefix
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            index = socket.if_nametoindex(interface)
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            raw.sendto(
                struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + option, ("ff02::1", 0, 0, index)
            )

    netlab.within(namespace, send)


def test_the_guest_has_what_its_namespace_has(daemon: Containerd, wired: str) -> None:  # noqa: F811
    def outside(*arguments: str) -> str:
        return subprocess.run(
            ["ip", "-n", wired, *arguments], check=True, capture_output=True, text=True
        ).stdout

    def set_parameter(name: str, value: str) -> None:
        command = ["ip", "netns", "exec", wired, "sysctl", "-qw", f"net.{name}={value}"]
        subprocess.run(command, check=True, capture_output=True)

    def inside(*arguments: str) -> str:
        return daemon.ok(
            "task", "exec", "--exec-id", os.urandom(4).hex(), "look", "/bin/busybox", *arguments
        )

    def guest_ip(*arguments: str) -> str:
        # What changes while it is listed makes ip fail: it is asked again.
        once = f"{IP} {' '.join(arguments)}"
        return inside("sh", "-c", f'for n in 1 2 3; do o=$({once}) && break; done && echo "$o"')

    def parameter(name: str) -> str:
        return inside("cat", "/proc/sys/net/" + name.replace(".", "/")).strip()

    for name, value in PARAMETERS.items():
        set_parameter(name, value)
    set_parameter(WON, "9")
    for line in ROUTES.split("\n"):
        if line.strip():
            outside(*line.split())
    spec = daemon.spec({})
    spec["mounts"] += MOUNTS
    spec["linux"]["sysctl"] = {f"net.{WON}": "7"}
    spec["linux"]["namespaces"][-1]["path"] = f"/run/netns/{wired}"
    for one in ("task", "container"):  # of an earlier attempt that failed
        daemon.ctr(one, "rm", *(["-f"] if one == "task" else []), "look")
    daemon.run_spec("look", spec)
    log = daemon.diagnosis
    shown = inside(
        "sh",
        "-c",
        "; ".join(f"/bin/busybox cat /proc/sys/net/{n.replace('.', '/')}" for n in (*PARAMETERS, WON)),
    )
    assert dict(zip((*PARAMETERS, WON), shown.splitlines(), strict=True)) == {**PARAMETERS, WON: "7"}

    def differences() -> list[str]:
        here, there = state(outside), state(guest_ip)
        return [
            f"{key}: {sorted(set(here[key]) ^ set(there[key]))}" for key in here if here[key] != there[key]
        ]

    assert differences() == [], log()
    # Who is no router is not believed.
    advertise(wired[:-1] + "o", "v1")
    time.sleep(1)
    assert "2001:db8:77:" not in guest_ip("-6", "address") + guest_ip("-6", "route")
    # What is changed while it runs.
    set_parameter("ipv6.conf.eth0.accept_ra", "2")
    set_parameter("ipv6.conf.eth0.router_solicitations", "0")
    outside("route", "del", "blackhole", "172.31.0.0/16")
    outside("route", "add", "unreachable", "172.29.0.0/16")
    outside("rule", "del", "priority", "1001")
    outside("-6", "rule", "add", "priority", "2000", "lookup", "77")
    outside("link", "set", "eth0", "mtu", "1350")
    outside("address", "add", "10.9.0.12/24", "dev", "eth0")
    until(lambda: "10.9.0.12/24" in guest_ip("address"), "the guest has the new address", log)
    until(lambda: differences() == [], "and the rest", lambda: f"{differences()} {log()}")
    assert parameter("ipv6.conf.eth0.accept_ra") == "2"
    assert inside("cat", "/sys/class/net/eth0/mtu").strip() == "1350"
    advertise(wired[:-1] + "o", "v1")
    until(
        lambda: "2001:db8:77:" in guest_ip("-6", "address"),
        "the owner wants advertisements to be taken",
        log,
    )
    assert "default via fe80:" in guest_ip("-6", "route")
    outside("link", "del", "eth0")
    until(
        lambda: inside("sh", "-c", "cd /sys/class/net; echo *") == "lo\n",
        "an interface that is gone is gone",
        log,
    )
