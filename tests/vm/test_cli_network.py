"""Published ports and the network of a container that the `kata` command runs."""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from cli_support import container, needs_root, vm_pid
from conftest import Kata
from hypervisor_support import assert_user_network
from test_confinement import family
from waiting import until

from kata import sysio


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


@pytest.mark.parametrize("network", ["user", pytest.param("tap", marks=needs_root)])
def test_a_published_port_is_reachable(network: str, shared_kata: Kata, busybox_image: str) -> None:
    port, banner, private = _free_ports(3)
    script = (
        "mkdir /www; echo from the guest > /www/index.html; httpd -p 80 -h /www;"
        " (while :; do nc -l -s 127.0.0.1 -p 26 -e echo private; done) &"
        " while :; do nc -l -p 25 -e echo hello; done"
    )
    published = (f"127.0.0.1:{port}:80", f"{banner}:25", f"127.0.0.1:{private}:26")
    options = ["--network", network, *(word for one in published for word in ("-p", one))]
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
        again = ("run", "--rm", "--network", network, "-p")
        taken = shared_kata.call(*again, f"127.0.0.1:{port}:80", busybox_image, "true")
        assert taken.returncode == 125
        assert str(port) in taken.stderr.decode()
        assert b"fault of its own" not in taken.stderr
        if network == "tap":
            low = shared_kata.call(*again, "53:53/udp", busybox_image, "true")
            assert low.returncode == 125
            assert b"a UDP port below 1024 cannot be published through a tap device" in low.stderr
            assert b"hint: Publish it at a port from 1024 on" in low.stderr
            _has_nothing_of_the_host(shared_kata, "web")


def _has_nothing_of_the_host(kata: Kata, name: str) -> None:
    """pasta is a user of its own, and what it may do it may do in the machine's network namespace alone."""
    machine = vm_pid(kata, name)
    engine = int(Path(f"/proc/{machine}/stat").read_text().rpartition(")")[2].split()[1])
    pid = family(engine)["passt"]  # of which pasta is another name
    told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert min(map(int, told["Uid"].split() + told["Gid"].split())) >= 65534
    assert (told["NoNewPrivs"].strip(), told["Seccomp"].strip()) == ("1", "2")
    ours, its = ({kind: sysio.namespace_inode(kind, one) for kind in KINDS} for one in (os.getpid(), pid))
    assert [kind for kind in KINDS if ours[kind] == its[kind]] == ["net"]
    assert sysio.namespace_inode("net", machine) != ours["net"]


KINDS = ("ipc", "mnt", "net", "pid", "user", "uts")


@pytest.mark.parametrize("network", ["user", pytest.param("tap", marks=needs_root)])
def test_the_hosts_loopback_is_out_of_reach(network: str, shared_kata: Kata, busybox_image: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as secret:
        port = secret.getsockname()[1]
        script = (
            "gateway=$(ip route | awk '/default/{print $3}'); echo gateway $gateway;"
            f" for a in 127.0.0.1 10.0.2.2 $gateway; do nc -w 2 $a {port} </dev/null && echo reached $a; done; true"
        )
        shown = shared_kata.ok("run", "--rm", "--network", network, busybox_image, "sh", "-c", script)
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


@needs_root
def test_a_user_network_through_a_tap(shared_kata: Kata, busybox_image: str) -> None:
    """As hypervisors have it that take nothing else (tests/kvm); here with QEMU."""
    assert_user_network(shared_kata, busybox_image, "--network", "tap")
