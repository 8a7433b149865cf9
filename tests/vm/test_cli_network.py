"""Published ports and the network of a container that the `kata` command runs."""

from __future__ import annotations

import contextlib
import socket
import urllib.request
from functools import partial

import pytest
from cli_support import container
from conftest import Kata
from waiting import until


def _fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        return str(answer.read().decode())


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _hear(address: str, port: int) -> bytes:
    """What a server says to a client that says nothing; empty while there is none."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 10) as client:
        client.settimeout(10)
        return client.recv(100)
    return b""


def test_a_published_port_is_reachable(shared_kata: Kata, busybox_image: str) -> None:
    port, banner, private = _free_ports(3)
    script = (
        "mkdir /www; echo from the guest > /www/index.html; httpd -p 80 -h /www;"
        " (while :; do nc -l -s 127.0.0.1 -p 26 -e echo private; done) &"
        " while :; do nc -l -p 25 -e echo hello; done"
    )
    published = (f"127.0.0.1:{port}:80", f"{banner}:25", f"127.0.0.1:{private}:26")
    options = [word for one in published for word in ("-p", one)]
    with container(shared_kata, busybox_image, "web", script, *options):

        def served() -> bool:
            with contextlib.suppress(OSError):
                return _fetch(port) == "from the guest\n"
            return False

        until(served, "the page")
        assert shared_kata.ok("port", "web", "80") == f"127.0.0.1:{port}\n"
        assert f"80/tcp -> 127.0.0.1:{port}\n" in shared_kata.ok("port", "web")
        # A server may speak first. (passt of Debian 12 would let it wait for its client.)
        addresses = ["127.0.0.1"]
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            addresses.append("::1")
        for address in addresses:
            assert until(partial(_hear, address, banner), f"the banner at {address}") == b"hello\n"
        # What listens on the guest's loopback alone is not published.
        assert _hear("127.0.0.1", private) == b""
        taken = shared_kata.call("run", "--rm", "-p", f"127.0.0.1:{port}:80", busybox_image, "true")
        assert taken.returncode == 125
        assert str(port) in taken.stderr.decode()
        assert b"fault of its own" not in taken.stderr


def test_the_hosts_loopback_is_out_of_reach(shared_kata: Kata, busybox_image: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as secret:
        port = secret.getsockname()[1]
        script = (
            "gateway=$(ip route | awk '/default/{print $3}'); echo gateway $gateway;"
            f" for a in 127.0.0.1 10.0.2.2 $gateway; do nc -w 2 $a {port} </dev/null && echo reached $a; done; true"
        )
        shown = shared_kata.ok("run", "--rm", busybox_image, "sh", "-c", script)
        assert "gateway" in shown
        assert "reached" not in shown
        secret.settimeout(0.1)
        with pytest.raises(TimeoutError):
            secret.accept()


def test_without_a_network_there_is_loopback_only(shared_kata: Kata, busybox_image: str) -> None:
    shown = shared_kata.ok("run", "--rm", "--network", "none", busybox_image, "ip", "-o", "link")
    # The machine has its spare interface, which leads nowhere.
    flags = {
        line.split(":")[1].strip(): line.partition("<")[2].partition(">")[0] for line in shown.splitlines()
    }
    assert "UP" in flags.pop("lo").split(",")
    assert all("UP" not in given.split(",") for given in flags.values()), shown
