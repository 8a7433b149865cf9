"""Networks with a name: names both ways, isolation, ports beside it, and what a killed engine leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from concurrent import futures

import pytest
from cli_support import container
from conftest import Kata
from waiting import until

from kata.network import held

SERVE = "mkdir /www; hostname > /www/index.html; httpd -p 80 -h /www; sleep 1000000"


@pytest.fixture
def networks(shared_kata: Kata) -> Iterator[list[str]]:
    names = ["front", "back"]
    for name in names:
        # With IPv6 in one of them, which the machines are otherwise in alike.
        more = ["--ipv6", "--subnet", "fd00:210::/64"] if name == "front" else []
        shared_kata.ok("network", "create", "--label", "test=names", *more, name)
    try:
        yield names
    finally:
        shared_kata.ok("network", "rm", *names)


def _sh(kata: Kata, name: str, script: str) -> str:
    done = kata.call("exec", name, "sh", "-c", script)
    return done.stdout.decode() + done.stderr.decode()


def _engine_pid(kata: Kata, name: str) -> int:
    [about] = json.loads(kata.ok("inspect", name))
    return int(about["State"]["Pid"])


def test_names_isolation_and_what_a_killed_engine_leaves(
    shared_kata: Kata, busybox_image: str, networks: list[str]
) -> None:
    kata = shared_kata
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as running:

        def start(name: str, network: str, *more: str) -> None:
            options = ("--network", network, "-h", name, *more)
            running.enter_context(container(kata, busybox_image, name, SERVE, *options))

        start("fa", "front", "-p", f"127.0.0.1:{port}:80", "--network-alias", "web")
        start("fb", "front")
        start("ba", "back", "--network-alias", "web")
        start("bb", "back")
        # Both ways, by name and by alias; who is later is found by who was before.
        assert _sh(kata, "fa", "wget -qO- http://fb/") == "fb\n"
        assert _sh(kata, "fb", "wget -qO- http://web/") == "fa\n"
        assert _sh(kata, "bb", "wget -qO- http://web/") == "ba\n"
        [front] = json.loads(kata.ok("network", "inspect", "front"))
        address = {one["Name"]: one["IPv4Address"].partition("/")[0] for one in front["Containers"].values()}
        assert set(address) == {"fa", "fb"}
        assert "fa" in _sh(kata, "fb", f"nslookup {address['fa']}")
        # Neither the name nor the address leads from one network to another.
        assert address["fa"] in _sh(kata, "fb", "nslookup fa")
        assert address["fa"] not in _sh(kata, "bb", "timeout 5 nslookup fa")
        assert "fb" not in _sh(kata, "bb", f"wget -T 3 -qO- http://{address['fb']}/")
        # Ports are published as without such a network.

        def published() -> bool:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as a,
            ):
                return bool(a.read() == b"fa\n")
            return False

        until(published, "the page")
        refused = kata.call("network", "rm", "front")
        assert refused.returncode != 0
        assert b"is in the network front" in refused.stderr
        # The name of a killed engine is gone before anybody has cleaned up.
        os.kill(_engine_pid(kata, "fa"), signal.SIGKILL)
        until(
            lambda: address["fa"] not in _sh(kata, "fb", "timeout 5 nslookup fa"),
            "the name to be gone",
        )


def test_a_container_is_put_into_a_network_and_taken_out_of_it(
    shared_kata: Kata, busybox_image: str, networks: list[str]
) -> None:
    kata = shared_kata
    with contextlib.ExitStack() as running:
        for name, network in (("ma", "front"), ("mb", "back")):
            options = ("--network", network, "-h", name)
            running.enter_context(container(kata, busybox_image, name, SERVE, *options))
        before = _sh(kata, "ma", "ip -o addr")
        assert "eth2" not in before
        assert "mb" not in _sh(kata, "ma", "wget -T 3 -qO- http://mb/ 2>&1 || echo none").replace("//mb", "")
        kata.ok("network", "connect", "--alias", "www", "--ip", "10.210.1.77", "back", "ma")
        assert _sh(kata, "ma", "wget -qO- http://mb/") == "mb\n"
        assert _sh(kata, "mb", "wget -qO- http://www/") == "ma\n"
        assert "10.210.1.77/24" in _sh(kata, "ma", "ip -o addr show eth2")
        again = kata.call("network", "connect", "back", "ma")
        assert b"is in the network back already" in again.stderr
        # Out of the one in which it was started: its interface there goes, the other stays.
        kata.ok("network", "disconnect", "front", "ma")
        assert "eth1" not in _sh(kata, "ma", "ip -o addr")
        assert _sh(kata, "mb", "wget -qO- http://ma/") == "ma\n"
        # The place is free for another, and the network's record without it.
        kata.ok("network", "connect", "front", "ma")
        assert "10.210.0." in _sh(kata, "ma", "ip -o addr show eth1")
        kata.ok("network", "disconnect", "back", "ma")
        [back] = json.loads(kata.ok("network", "inspect", "back"))
        assert [one["Name"] for one in back["Containers"].values()] == ["mb"]
        assert "www" in _sh(kata, "mb", "timeout 5 nslookup www")
        assert "10.210.1.77" not in _sh(kata, "mb", "timeout 5 nslookup www")


def test_an_internal_network_leads_nowhere(shared_kata: Kata, busybox_image: str) -> None:
    kata = shared_kata
    kata.ok("network", "create", "--internal", "inner")
    try:
        refused = kata.call("run", "--rm", "--network", "inner", "-p", "1234:80", busybox_image, "true")
        assert refused.returncode == 125
        assert b"the network inner is internal" in refused.stderr
        refused = kata.call("run", "--rm", "--network", "inner", "--dns", "9.9.9.9", busybox_image, "true")
        assert refused.returncode == 125
        assert b"--dns 9.9.9.9 cannot be asked" in refused.stderr
        said = kata.ok(
            "run", "--rm", "--network", "inner", busybox_image, "sh", "-c", "ip -o addr; ip route"
        )
        assert "eth0" not in said
        assert "default" not in said
        assert "eth1" in said
    finally:
        kata.ok("network", "rm", "inner")


def test_containers_that_start_at_the_same_time_meet(
    shared_kata: Kata, busybox_image: str, networks: list[str]
) -> None:
    """Nobody has the network's namespace before, nor an ordinary user the user namespace that it belongs to."""
    kata = shared_kata

    def start(name: str) -> None:
        kata.ok(
            "run", "-d", "--name", name, "--network", "front", "-h", name, busybox_image, "sh", "-c", SERVE
        )

    try:
        with futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(start, ("ta", "tb")))
        until(lambda: _sh(kata, "ta", "wget -qO- http://tb/") == "tb\n", "the page of tb")
        until(lambda: _sh(kata, "tb", "wget -qO- http://ta/") == "ta\n", "the page of ta")
        # By IPv6 as well, whose addresses have the same numbers.
        address6 = json.loads(kata.ok("inspect", "tb"))[0]["NetworkSettings"]["Networks"]["front"][
            "GlobalIPv6Address"
        ]
        assert address6.startswith("fd00:210::")
        assert _sh(kata, "ta", f"wget -qO- http://[{address6}]/") == "tb\n"
        assert address6 in _sh(kata, "ta", "nslookup -type=aaaa tb")
    finally:
        kata.call("rm", "-f", "ta", "tb")


def test_a_network_leaves_nothing(shared_kata: Kata, busybox_image: str) -> None:
    kata = shared_kata
    identity = kata.ok("network", "create", "--subnet", "10.99.1.0/24", "gone").strip()
    directory = kata.run_dir / "networks" / identity
    try:
        said = kata.ok(
            "run", "--rm", "--network", "gone", "--ip", "10.99.1.77", busybox_image, "ip", "-4", "addr"
        )
        assert "10.99.1.77/24" in said
        # Its namespace has ended with its only member, and it is a network none the less.
        known = json.loads((directory / "network.json").read_text())
        assert [one for one in known["holders"] if held.Holder(*one).open() is not None] == []
        assert list((directory / "members").iterdir()) == []
        kata.ok("gc")
        assert directory.is_dir()
        assert "10.99.1.2/24" in kata.ok(
            "run", "--rm", "--network", "gone", busybox_image, "ip", "-4", "addr"
        )
    finally:
        kata.ok("network", "rm", "gone")
    assert not directory.exists()
    missing = kata.call("run", "--rm", "--network", "gone", busybox_image, "true")
    assert missing.returncode == 125
    assert b"there is no network 'gone'" in missing.stderr
