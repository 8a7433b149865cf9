"""Kernel parameters, routes and rules of a namespace, as they are told to a guest."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from kata import sysio
from kata.engine.forwarding.guestnet import GuestNetwork
from kata.engine.lifecycle.sandbox_state import Lifecycle, SandboxState
from kata.errors import AgentError, HypervisorError
from kata.hypervisor.base import Nic
from kata.network import netns, routing, rtnetlink, sysctls
from kata.network.netns import NetnsPlan, link_local
from kata.network.rtnetlink import attribute
from kata.proto import agent_pb, agentext_pb, types_pb
from kata.ttrpc import frame

LO = {1: "lo", 7: "eth0"}


class _Kernel:
    """Says what it is told to say."""

    def __init__(self, *messages: tuple[int, bytes]) -> None:
        self._messages = messages

    def dump(self, kind: int, body: bytes) -> list[tuple[int, bytes]]:
        return [one for one in self._messages if one[0] == kind - 2 and body[0] in (0, one[1][0])]


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def route(
    *more: bytes, family: int = 2, length: int = 0, protocol: int = 3, sort: int = 1, flags: int = 0
) -> Any:
    header = struct.pack("=8BI", family, length, 0, 0, 254, protocol, 0, sort, flags)
    return 24, header + b"".join(more)


def test_what_is_told_of_parameters() -> None:
    assert sysctls.path("net.ipv4.conf.eth0/1.rp_filter") == "ipv4/conf/eth0.1/rp_filter"
    assert sysctls.path("kernel.shmmax") == ""
    for name, value in (
        ("ipv4/ip_local_port_range", "32768 60999"),
        ("ipv6/conf/eth0/accept_ra", "1"),
        ("ipv4/conf/all/accept_source_route", "0"),
        ("ipv4/conf/eth0/accept_source_route", "1"),
        ("ipv6/neigh/eth0/locktime", "0"),
        ("ipv4/neigh/eth0/locktime", "100"),
        ("ipv4/tcp_mtu_probing", "0"),
    ):
        assert sysctls.default(name) == value, name
    told = {"ipv4/ip_forward": "1", "ipv4/tcp_ecn": "1"}
    assert sysctls.changes({"ipv4/ip_forward": "1"}, told) == {"ipv4/tcp_ecn": "2"}, "its default again"
    assert sysctls.changes(told, told) == {}
    assert [
        name
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/eth0/mtu")
        if sysctls.reaches_all(name)
    ] == ["ipv4/ip_forward", "ipv6/conf/all/forwarding"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_parameters_of_a_namespace() -> None:
    """Without anybody's doing there is little to tell; and in the order in which it can be set."""
    pid = os.fork()
    if pid == 0:
        try:
            sysio.unshare(sysio.CLONE_NEWNET)
            for path in ("ipv4/tcp_retries2", "ipv6/conf/lo/accept_ra", "ipv4/ip_forward"):
                with open(f"/proc/sys/net/{path}", "w", encoding="ascii") as file:
                    file.write("0" if "ra" in path else "7" if "retries" in path else "1")
            found = sysctls.of_namespace()
            ours = [
                found[name] for name in ("ipv4/tcp_retries2", "ipv6/conf/lo/accept_ra", "ipv4/ip_forward")
            ]
            is_right = ours == ["7", "0", "1"] and next(iter(found)) == "ipv4/ip_forward" and len(found) < 60
            os._exit(0 if is_right and all("\t" not in value for value in found.values()) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_routes_are_carried_whole_but_for_their_state() -> None:
    left: list[str] = []
    metrics = attribute(8, number(2, 1300) + number(16, 0) + attribute(1, b"x"))
    ways = struct.pack("=HBBi", 8, 4 | 16, 2, 7) + struct.pack("=HBBi", 8, 0, 0, 7)
    cache = attribute(12, struct.pack("=IIiIIIII", 0, 0, 12345, 0, 0, 0, 0, 0))
    kernel: Any = _Kernel(
        route(number(4, 7), attribute(5, bytes([10, 0, 0, 1])), metrics, number(30, 9), flags=16 | 4),
        route(number(4, 7), protocol=2),
        route(number(4, 7), flags=0x200),
        route(number(4, 9), attribute(1, bytes([10, 9, 0, 0])), length=16),
        route(attribute(1, bytes([172, 31, 0, 0])), number(15, 1000), length=16, sort=6),
        route(attribute(9, ways)),
        route(number(4, 7), number(6, 1024), cache, family=10),
    )
    entries = routing.routes(kernel, LO, left)
    assert [entry.text for entry in entries] == [
        "default via 10.0.0.1 dev eth0",
        "blackhole 172.31.0.0/16 table 1000",
        "default with several ways",
        "default dev eth0 metric 1024",
    ]
    assert left == ["the route 10.9.0.0/16 dev number 9 is not in the guest: it has not this interface"]
    first, _, several, expiring = (entry.body for entry in entries)
    assert metrics in first
    assert number(30, 9) not in first
    assert struct.unpack_from("=I", first, 8) == (4,)
    assert struct.pack("=HBBi", 8, 4, 2, 7) in several
    assert number(23, 123) in expiring
    assert cache not in expiring
    # An agent of somebody else's is told what it can be told, and the log the rest.
    said = routing.in_stock_protocol(entries, LO, left)
    assert [(one["gateway"], one["mtu"], one["family"]) for one in said] == [
        ("10.0.0.1", 1300, 0),
        ("", 0, 1),
    ]
    assert [" ".join(one.split()[:4]) for one in left[1:]] == [
        "the route default via",
        "the route blackhole 172.31.0.0/16",
        "the route default with",
    ]


@pytest.mark.parametrize(("ways", "expected"), [(1, routing.MOST), (200, routing.MOST_BYTES // 1616)])
def test_more_routes_than_a_request_holds_are_left_out_by_name(ways: int, expected: int) -> None:
    """The agent takes 65536 messages and a frame 4 MiB: neither may fail a start."""
    hops = struct.pack("=HBBi", 8, 0, 0, 7) * ways
    found = [
        route(attribute(1, struct.pack("!I", 10 << 24 | one)), attribute(9, hops), length=32)
        for one in range(9000)
    ]
    left: list[str] = []
    kernel: Any = _Kernel(*found)
    entries = routing.routes(kernel, LO, left)
    bodies = [entry.body for entry in entries]
    assert abs(len(entries) - expected) < 20
    assert len(left) == 1
    assert left[0].startswith(
        f"{9000 - len(entries)} of 9000 routes are not in the guest, beginning with 10."
    )
    request = agentext_pb.RouteRequest(
        routes=bodies, remove_routes=bodies, rules=bodies, remove_rules=bodies
    )
    assert len(request.encode()) < frame.MAX_DATA - (1 << 16)


def test_more_neighbours_than_a_request_holds_are_left_out() -> None:
    class Kernel(_Kernel):
        def addresses(self) -> list[Any]:
            return []

        def links(self) -> list[rtnetlink.Link]:
            return [link]

        def neighbors(self) -> list[rtnetlink.Neighbor]:
            return [neighbor] * 9000

    class Connected(netns.Endpoint):
        def disconnect(self, rtnl: rtnetlink.Rtnl) -> None:
            raise AssertionError

    link = rtnetlink.Link(7, rtnetlink.UP)
    link.name, link.mac = "eth0", "02:00:00:00:00:07"
    neighbor = rtnetlink.Neighbor(7)
    neighbor.ip, neighbor.mac = "fd00:1111:2222:3333:4444:5555:6666:7777", "02:00:00:00:00:01"
    plan = netns.NetnsPlan("", "/n")
    plan.endpoints = [Connected(0, link.mac)]
    plan.endpoints[0].source = link
    kernel: Any = Kernel()
    plan.describe(kernel)
    assert plan.left_out == [
        "808 of 9000 permanent neighbours are not in the guest: at most 8192 are carried"
    ]
    listed = [types_pb.ARPNeighbor.from_dict(one) for one in plan.neighbors]
    request = agent_pb.AddARPNeighborsRequest(neighbors=agent_pb.ARPNeighbors(ARPNeighbors=listed))
    assert len(listed) == 8192
    assert len(request.encode()) < frame.MAX_DATA


def test_the_kernels_own_rules_are_known() -> None:
    def rule(family: int, priority: int, table: int, *more: bytes) -> tuple[int, bytes]:
        head = struct.pack("=8BI", family, 0, 0, 0, table, 0, 0, 1, 1)
        first = number(6, priority) if priority else b""
        return 32, head + first + number(15, table) + number(14, 0xFFFFFFFF) + attribute(
            21, b"\2"
        ) + b"".join(more)

    known = ((2, 0, 255), (2, 32766, 254), (2, 32767, 253), (10, 0, 255), (10, 32766, 254))
    kernel: Any = _Kernel(*(rule(*one) for one in known), rule(2, 5, 77, number(10, 16)), rule(129, 0, 1))
    found = routing.rules(kernel, [])
    assert set(routing.DEFAULT_RULES) <= set(found)
    assert [one.text for one in found if one not in routing.DEFAULT_RULES] == [
        "5: from all fwmark 10000000 table 77"
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_new_namespace_has_the_kernels_own_rules_and_no_routes() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            sysio.unshare(sysio.CLONE_NEWNET)
            with rtnetlink.Rtnl() as rtnl:
                rtnl.bring_up(1)
                left: list[str] = []
                found = routing.routes(rtnl, LO, left), routing.rules(rtnl, left), left
            os._exit(0 if found == ([], list(routing.DEFAULT_RULES), []) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_link_local_address_is_made_of_the_hardware_address() -> None:
    assert link_local("02:11:22:33:44:55") == "fe80::11:22ff:fe33:4455"
    assert socket.inet_pton(socket.AF_INET6, link_local("52:54:00:00:00:01"))[8] == 0x50


class _Agent:
    """Notes what it is asked for."""

    def __init__(self, *features: str, denies: bool = False) -> None:
        self.features = frozenset(features)
        self.denies = denies
        self.calls: list[tuple[str, Any]] = []

    async def prepare_network(self, request: Any) -> list[tuple[int, str]]:
        if self.denies:
            raise AgentError("a policy", code=7)
        self.calls.append(("prepare", {one.name: one.value for one in request.sysctls}))
        return [(0, "no such file"), (99, "a lie")]

    async def update_interface(self, interface: Any) -> None:
        self.calls.append(("interface", interface.name))

    async def update_routes(self, routes: Any) -> None:
        self.calls.append(("stock routes", len(routes)))

    async def route(self, request: Any) -> list[tuple[int, str]]:
        self.calls.append(("routes", (len(request.remove_routes), len(request.routes), len(request.rules))))
        return [(1, "no way")]

    async def hide_interface(self, path: str) -> None:
        self.calls.append(("hide", path))


class _Sandbox:
    """As much of a sandbox as there has to be."""

    def __init__(self, plan: Any) -> None:
        self.machine = SimpleNamespace(network=plan)
        self.settings = SimpleNamespace(sysctls={"net.ipv4.tcp_ecn": "1"})
        self.containers = {
            "c": SimpleNamespace(config={"linux": {"sysctl": {"net.ipv4.conf.eth0.tag": "3"}}})
        }
        self.timings = SimpleNamespace(add=lambda name, began: None)
        self.messages: list[str] = []
        self.log = self.messages.append

    async def run_blocking(self, work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    def guest_network(self) -> GuestNetwork:
        async def names_up(config: dict[str, Any]) -> None:
            pass

        this: Any = self
        return GuestNetwork(self.settings, this, this, self.timings, self.containers, names_up)  # type: ignore[arg-type]


def told(agent: Any, *changes: dict[str, str]) -> tuple[list[tuple[str, Any]], list[str]]:
    """What an agent is asked for, and what is written to the log, when a namespace is as in *changes*."""
    plan = NetnsPlan("02:00:00:00:00:01", "")
    plan.interfaces = [{"devicePath": "09", "name": "eth0", "hwAddr": plan.mac}]
    blackhole = route(attribute(1, bytes([172, 31, 0, 0])), length=16, sort=6)[1]
    plan.routing = [
        routing.Entry(route(number(4, 7))[1], "default dev eth0"),
        routing.Entry(blackhole, "blackhole 172.31.0.0/16"),
    ]
    plan.rules = [*routing.DEFAULT_RULES, routing.Entry(b"\2" + bytes(15), "5: from all table 77")]
    plan.names = LO
    sandbox: Any = _Sandbox(plan)

    async def tell() -> None:
        network = sandbox.guest_network()
        for parameters in changes:
            plan.sysctls = partial(list, [parameters])  # type: ignore[method-assign]
            await network.configure(agent)

    asyncio.run(tell())
    return agent.calls, sandbox.messages


def test_what_a_guest_is_told_and_when() -> None:
    first = {"ipv4/conf/eth0/tag": "1", "ipv6/conf/eth0/accept_ra": "0", "ipv4/tcp_ecn": "0"}
    second = {"ipv6/conf/all/forwarding": "1", "ipv6/conf/eth0/accept_ra": "0"}
    calls, log = told(_Agent("kata.network"), first, first, second)
    rest = [("interface", "eth0"), ("routes", (0, 2, 1))]
    again = [("interface", "eth0"), ("routes", (0, 2, 0))]
    assert calls == [
        # What a container or its pod sets is theirs.
        ("prepare", {"ipv6/conf/eth0/accept_ra": "0"}),
        *rest,
        *again,
        ("prepare", second),
        *again,
    ]
    assert log == [
        "net.ipv6.conf.eth0.accept_ra=0 is not set in the guest: no such file",
        "the route blackhole 172.31.0.0/16 is not in the guest as it should be: no way",
        "net.ipv6.conf.all.forwarding=1 is not set in the guest: no such file",
    ]


def test_thousands_of_routes_and_rules_are_compared_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    equal = routing.Entry.__eq__

    def count(one: routing.Entry, other: object) -> bool:
        nonlocal compared
        compared += 1
        return equal(one, other)

    monkeypatch.setattr(routing.Entry, "__eq__", count)

    def entries(first: int) -> list[routing.Entry]:
        # Made anew each time, as a look into the namespace does.
        return [
            routing.Entry(b"\2" + number.to_bytes(15, "big"), str(number)) for number in range(first, 3000)
        ]

    plan = NetnsPlan("02:00:00:00:00:01", "")
    plan.interfaces = [{"devicePath": "09", "name": "eth0", "hwAddr": plan.mac}]
    plan.names = LO
    plan.sysctls = partial(list, [{}])  # type: ignore[method-assign]
    agent: Any = _Agent("kata.network")
    sandbox: Any = _Sandbox(plan)

    async def tell() -> None:
        network = sandbox.guest_network()
        for first in (0, 1000):
            plan.routing, plan.rules = entries(first), [*routing.DEFAULT_RULES, *entries(first)]
            await network.configure(agent)

    asyncio.run(tell())
    assert [what for kind, what in agent.calls if kind == "routes"] == [(0, 3000, 3000), (1000, 2000, 0)]
    assert compared < 50_000


@pytest.mark.parametrize("agent", [_Agent(), _Agent("kata.network", denies=True)])
def test_an_agent_that_cannot_be_told_is_named_in_the_log(agent: _Agent) -> None:
    calls, log = told(agent, {"ipv6/conf/eth0/accept_ra": "0"})
    assert calls == [("interface", "eth0"), ("stock routes", 1)]
    assert [line.split(":")[0] for line in log] == [
        "the guest has no kernel parameters of its network",
        "the route blackhole 172.31.0.0/16 is not in the guest",
        "the rule 5",
    ]


def test_an_interface_is_attached_to_its_end_also_when_the_caller_is_cancelled() -> None:
    """Its descriptor is passed to the hypervisor in the middle of it, and its address is known only afterwards."""
    reading, writing = os.pipe()
    os.close(writing)
    nic = Nic("02:00:00:00:00:02", tap_fd=sysio.Fd(reading))

    async def run() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        was_open: list[bool] = []

        async def attach_nic(index: int, given: Nic) -> str:
            begun.set()
            await go_on.wait()
            was_open.extend(fd.is_open for fd in given.descriptors())
            if index:
                raise HypervisorError("no room")
            return "02/03"

        life = Lifecycle("s1")
        life.enter(SandboxState.BOOTING)
        arrived = [(0, nic)]
        placed: list[tuple[int, str]] = []
        plan: Any = SimpleNamespace(
            take_pending_hotplugs=lambda: [arrived.pop()] if arrived else [],
            place=lambda index, address: placed.append((index, address)),
        )
        sandbox: Any = _Sandbox(plan)
        sandbox.vm = SimpleNamespace(attach_nic=attach_nic)
        sandbox.race_vm_exit = life.race_vm_exit
        network = sandbox.guest_network()
        caller = asyncio.create_task(network._plug_in(plan))
        await begun.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert not placed
        second = asyncio.create_task(network._plug_in(plan))  # has to wait for it
        await asyncio.sleep(0.01)
        assert not second.done()
        go_on.set()
        await second
        assert placed == [(0, "02/03")]
        assert was_open == [True]
        assert not any(fd.is_open for fd in nic.descriptors())

        # One that fails when nobody waits any more is told in the log.
        begun.clear()
        go_on.clear()
        arrived.append((1, Nic("02:00:00:00:00:03")))
        caller = asyncio.create_task(network._plug_in(plan))
        await begun.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        go_on.set()
        await network._plug_in(plan)
        await asyncio.sleep(0)
        assert sandbox.messages == ["an interface was not given to the machine: no room"]

    asyncio.run(run())


def test_more_parameters_than_one_request_may_have_go_in_several() -> None:
    """The agent refuses a request with more than 4096 of them."""
    many = {f"ipv4/conf/eth{number}/tag": "1" for number in range(5000)}
    calls, log = told(_Agent("kata.network"), many)
    parts = [what for kind, what in calls if kind == "prepare"]
    assert [len(part) for part in parts] == [4096, 903]
    del many["ipv4/conf/eth0/tag"]  # which the container sets itself
    assert {key: value for part in parts for key, value in part.items()} == many
    # A refusal is told by its place in its own request.
    assert [line.split("=")[0] for line in log if "no such file" in line] == [
        "net.ipv4.conf.eth1.tag",
        "net.ipv4.conf.eth4097.tag",
    ]
