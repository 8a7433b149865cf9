"""Planning a network: settings in, passt's command line and the guest's addresses out. Nothing is started."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from kata import children
from kata.errors import HostError, KataError, UnsupportedError, UsageError
from kata.network import passt, resolver, user
from kata.network.nested import NestedPlan
from kata.network.plan import plan
from kata.settings import NetworkSettings


def host(
    ipv4: bool = True, ipv6: bool = True, resolv_conf: str = "nameserver 192.0.2.53\n"
) -> user.HostNetwork:
    return user.HostNetwork(ipv4, ipv6, resolver.parse(resolv_conf))


@pytest.fixture(autouse=True)
def _passt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "find_program", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(passt, "waits_for_clients", lambda program: False)


def network(mode: str = "user", **settings: Any) -> NetworkSettings:
    return NetworkSettings.from_plain({"mode": mode, **settings})


def user_plan(seen: user.HostNetwork, **settings: Any) -> user.UserPlan:
    made = plan(network(**settings), seen)
    assert isinstance(made, user.UserPlan)
    return made


def pairs(argv: list[str], option: str) -> list[str]:
    return [argv[i + 1] for i, word in enumerate(argv) if word == option]


def test_no_network_still_has_a_plug() -> None:
    made = plan(network("none"), host())
    assert made.interface is None
    assert made.routes == []
    [nic] = made.setup_nics(1)
    assert nic.backend == made.backend == ""
    made.place(0, "09")
    assert made.idle() == ["09"]
    assert made.setup_nics(0) == []
    assert made.failure() is None
    assert made.child is None
    made.stop()


def test_both_families() -> None:
    made = user_plan(host())
    assert made.interface is not None
    assert [a["address"] for a in made.interface["IPAddresses"]] == [user.ADDRESS4, user.ADDRESS6]
    assert made.interface["hwAddr"] == made.mac
    made.place(0, "09")
    assert made.interface["devicePath"] == "09"
    assert made.idle() == []
    assert [r["gateway"] for r in made.routes] == [user.GATEWAY4, user.GATEWAY6]
    argv = made.command("--fd", "7")
    assert argv[0] == "/usr/bin/passt"
    assert pairs(argv, "--fd") == ["7"]
    assert "--no-map-gw" in argv
    assert pairs(argv, "-a") == [user.ADDRESS4, user.ADDRESS6]
    assert pairs(argv, "-t") == pairs(argv, "-u") == ["none"]
    assert "-i" not in argv


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "addresses", "words"),
    [
        (True, False, [user.ADDRESS4], {"-4", "lo"}),
        (False, True, [user.ADDRESS6], {"-6"}),
        (False, False, [user.ADDRESS4], {"-4", "lo"}),
    ],
)
def test_one_family_or_none(ipv4: bool, ipv6: bool, addresses: list[str], words: set[str]) -> None:
    made = user_plan(host(ipv4, ipv6))
    assert made.interface is not None
    assert [a["address"] for a in made.interface["IPAddresses"]] == addresses
    argv = made.command("--fd", "7")
    assert pairs(argv, "-a") == addresses
    assert words <= set(argv)


def test_published_ports() -> None:
    ports = [
        {"host_port": 8080, "guest_port": 80, "proto": "tcp"},
        {"host_ip": "0.0.0.0", "host_port": 443, "guest_port": 443},
        {"host_ip": "192.0.2.1", "host_port": 53, "guest_port": 5353, "proto": "udp"},
    ]
    made = user_plan(host(), ports=ports)
    argv = made.command("--fd", "7")
    assert pairs(argv, "-t") == ["8080:80", "443:443"]
    assert pairs(argv, "-u") == ["192.0.2.1/53:5353"]
    assert "loopback" in made.warnings[0]


def test_ports_that_the_engine_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "waits_for_clients", lambda program: True)
    ports = [
        {"host_port": 8080, "guest_port": 80, "proto": "tcp"},
        {"host_port": 53, "guest_port": 5353, "proto": "udp"},
    ]
    made = user_plan(host(), ports=ports)
    argv = made.command("--fd", "7")
    assert (pairs(argv, "-t"), pairs(argv, "-u")) == (["none"], ["53:5353"])
    four, six = resolver.pack(user.ADDRESS4), resolver.pack(user.ADDRESS6)
    clients = ("192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "fe80::1%eth0")
    assert [made.guest_address(one) for one in clients] == [four, four, six, six]
    assert {user_plan(host(True, False), ports=ports).guest_address(one) for one in clients} == {four}
    assert {user_plan(host(False, True), ports=ports).guest_address(one) for one in clients} == {six}


@pytest.mark.parametrize("waits", [False, True])
def test_doctor_names_a_passt_whose_ports_the_engine_carries(
    monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    from kata.cli import host as doctor

    monkeypatch.setattr(passt, "waits_for_clients", lambda program: waits)
    check = doctor._network_helper()
    assert check.result == doctor.OK
    assert ("published TCP ports go through the engine" in check.text) == waits
    monkeypatch.setattr(children, "find_program", lambda name: None)
    assert doctor._network_helper().text == "passt is not installed"


def test_listening_on_published_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        for address in ("", "127.0.0.1"):
            with pytest.raises(HostError, match=f"{number}->80/tcp: Address already in use"):
                user.listen([user.Port(address, number, 80, "tcp")])
    # One of every address has the others with it.
    ports = [user.Port(address, number, 80, "tcp") for address in ("127.0.0.1", "")]
    [(listener, port)] = user.listen(ports)
    with listener:
        assert port is ports[1]
        assert not listener.getblocking()
        socket.create_connection(("127.0.0.1", number), 10).close()


@pytest.mark.parametrize(
    ("version", "options", "waits"),
    [
        ("passt unknown version", "--no-map-gw", True),  # Debian 12
        ("passt unknown version", "--map-host-loopback ADDR", False),
        ("passt 2023_09_08.05627dc", "", True),
        ("passt 2023_11_10.5ec3634", "", False),
        ("passt 0.0~git20230309.7c7625d-1", "--map-host-loopback ADDR", True),
        ("passt 0.0~git20240220.1e6f92b-1", "", False),
        ("passt 0.0~git20250503.587980c-2", "--map-host-loopback ADDR", False),
    ],
)
def test_what_passt_can_is_found_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, options: str, waits: bool
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "run"))
    program = tmp_path / "passt"
    program.write_text(
        f"#!/bin/sh\necho $1 >>{tmp_path}/asked\n"
        f"[ $1 = --version ] && echo '{version}\nCopyright 2026' || {{ echo 'usage {options}' >&2; exit 1; }}\n"
    )
    program.chmod(0o755)
    assert [passt.waits_for_clients(str(program)) for _ in range(3)] == [waits] * 3
    assert (tmp_path / "asked").read_text().split().count("--version") == 1
    assert passt.waits_for_clients(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("resolv_conf", "dns", "forward"),
    [
        ("nameserver 192.0.2.1\nnameserver 2001:db8::1\n", ["192.0.2.1", "2001:db8::1"], []),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.1\n", ["192.0.2.1"], []),
        ("nameserver 127.0.0.53\n", [user.DNS4], [user.DNS4]),
        ("nameserver ::1\n", [user.DNS6], [user.DNS6]),
        ("nameserver fe80::1%eth0\n", [], []),
        ("", [], []),
    ],
)
def test_names(resolv_conf: str, dns: list[str], forward: list[str]) -> None:
    made = user_plan(host(resolv_conf=resolv_conf))
    assert made.dns == dns
    assert pairs(made.command("--fd", "7"), "--dns-forward") == forward
    assert bool(made.warnings) == (not dns)


def test_names_that_were_asked_for() -> None:
    made = user_plan(
        host(resolv_conf="nameserver 127.0.0.53\nsearch a b\noptions ndots:5\n"), dns=["192.0.2.9"]
    )
    assert made.resolv_conf() == "nameserver 192.0.2.9\nsearch a b\noptions ndots:5\n"
    assert "--dns-forward" not in made.command("--fd", "7")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "bridge"}, "no network mode 'bridge'"),
        ({"mode": "none", "ports": [{"host_port": 1, "guest_port": 1}]}, "without a network"),
        ({"ports": [{"host_port": 0, "guest_port": 1}]}, "0 is not a port number"),
        ({"ports": [{"host_port": 1, "guest_port": 70000}]}, "70000 is not a port number"),
        ({"ports": [{"host_port": 1, "guest_port": 1, "proto": "sctp"}]}, "no protocol 'sctp'"),
        ({"ports": [{"host_ip": "here", "host_port": 1, "guest_port": 1}]}, "not an address"),
        ({"ports": [{"host_ip": "127.0.0.1", "host_port": 1, "guest_port": 1, "proto": "udp"}]}, "UDP"),
        ({"dns": ["dns.example"]}, "not the address of a DNS server"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(network(**settings), host())


def test_through_a_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine takes nothing else, and where it is asked for."""
    low = [{"host_port": 53, "guest_port": 53, "proto": "udp"}]
    ports = [{**low[0], "proto": "tcp"}, {**low[0], "host_port": 5353}]
    for mode, backends in (("user", ("tap",)), ("tap", ("stream", "tap"))):
        made = plan(network(mode, ports=ports), host(), backends)
        assert made.backend == "tap"
        assert isinstance(made, user.UserPlan)
        argv = made.command("--netns", "x")
        assert argv[0] == "/usr/bin/pasta"
        assert pairs(argv, "-t") == ["none"]  # they are the engine's
        assert pairs(argv, "-u") == ["5353:53"]
    assert plan(network(ports=low), host(), ("stream", "tap")).backend == "stream"
    with pytest.raises(UnsupportedError, match="a UDP port below 1024 cannot be published through a tap"):
        plan(network(ports=low), host(), ("tap",))
    monkeypatch.setattr(children, "find_program", lambda name: None)
    with pytest.raises(HostError, match="the user network needs pasta, which is not installed"):
        plan(network("tap"), host())


def test_passt_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "find_program", lambda name: None)
    with pytest.raises(HostError) as caught:
        plan(network(), host())
    assert "passt" in caught.value.message
    assert "apt-get install passt" in caught.value.hint
    assert plan(network("none"), host()).interface is None


def test_taken_and_contradictory_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(HostError, match="Address already in use"):
            user.check_ports([user.Port("127.0.0.1", number, 80, "tcp")])
    user.check_ports([user.Port("127.0.0.1", number, 80, "tcp")])
    with pytest.raises(HostError, match="Cannot assign requested address"):
        user.check_ports([user.Port("192.0.2.1", number, 80, "tcp")])
    with pytest.raises(UsageError, match="published as both"):
        user.check_ports([user.Port("", number, 80, "tcp"), user.Port("", number, 81, "tcp")])


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.1.2.3", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::1%lo"]
)
def test_loopback_addresses(address: str) -> None:
    assert resolver.is_loopback(address)


@pytest.mark.parametrize("address", ["128.0.0.1", "10.0.0.1", "::2", "fe80::1", "::ffff:10.0.0.1"])
def test_other_addresses(address: str) -> None:
    assert resolver.is_address(address)
    assert not resolver.is_loopback(address)


def test_errors_have_hints() -> None:
    for mode in ("none", "user"):
        with pytest.raises(KataError) as caught:
            plan(network(mode, ports=[{"host_port": 1, "guest_port": 1, "proto": "x"}]), host())
        assert caught.value.hint


def test_an_ordinary_users_udp_ports_go_through_both_programs() -> None:
    ports = [user.Port("192.0.2.1", 5300, 53, "udp"), user.Port("", 8080, 80, "tcp")]
    plan = NestedPlan("02:00:00:00:00:01", ports, host(), program="/passt", outer="/pasta")
    inner = plan.command("--fd", "3")
    assert inner[inner.index("-u") + 1] == "5300:53"
    assert inner[inner.index("-t") + 1] == "none"
    assert [port.outer_spec for port in ports] == ["192.0.2.1/5300", "8080"]
