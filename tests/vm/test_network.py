"""The user network: outgoing, published ports, names, and what the guest must not reach."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import frames
import minivm
import netlab
import pytest
from netlab import HOST4, HOST6, INTERNET4, INTERNET6, Server, answer_a
from waiting import PATIENCE

from kata import journal_undo, mount_table, sysio
from kata.errors import HostError
from kata.guest import manifest
from kata.hypervisor.qemu import slots
from kata.journal import Journal
from kata.network import egress_filter, passt, resolver, user
from kata.network.plan import plan
from kata.settings import NetworkSettings

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

UDP = socket.SOCK_DGRAM
PORTS = [
    {"host_port": 8080, "guest_port": 80, "proto": "tcp"},
    {"host_ip": HOST4, "host_port": 81, "guest_port": 81, "proto": "tcp"},
    {"host_port": 5300, "guest_port": 5301, "proto": "udp"},
]


@pytest.fixture(autouse=True)
def _passt_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is passt, also one whose TCP ports the engine would rather carry itself."""
    monkeypatch.setattr(passt, "waits_for_clients", lambda program: False)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, str]]:
    with netlab.lab() as names:
        yield names


class Sandbox:
    """A network, and on demand the machine on it, inside the host namespace."""

    def __init__(self, base: Path, settings: dict[str, Any]) -> None:
        self.journal = minivm.sandbox_dir(base, f"n{os.getpid()}")
        self.name = f"ktest{os.getpid()}"
        self.plan = plan(NetworkSettings.from_plain(settings))
        self._host = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        [self.nic] = self.plan.setup_nics(1)
        sysio.setns(self._host)
        self.plan.place(0, slots.nic_path())

    def start(self) -> None:
        """Start the helper. We stay in the host namespace, also where an engine is in the machine's."""
        try:
            self.plan.start(self.journal, self.name)
        finally:
            sysio.setns(self._host)

    def boot(self, guest: Path) -> minivm.Shell:
        """Boot a machine, tell it its network as the agent does, and give its shell."""
        assets = manifest.load(str(guest))
        initrd = minivm.build_initrd(
            Path(os.path.dirname(self.journal.path)) / "initrd", Path(assets.initrd)
        )
        vm = minivm.settings(self.journal, kernel=assets.kernel, initrd=str(initrd), nic=self.nic)
        self.process, shell = minivm.start(vm, self.journal)
        self.start()
        shell.wait()
        failure = self.plan.failure()
        if failure:
            raise failure
        interface = self.plan.interface
        assert interface is not None
        eth = shell.ok(f"ls /sys/bus/pci/devices/0000:00:{interface['devicePath']}.0/virtio*/net")
        shell.ok(f"ip link set {eth} name {interface['name']}; ip link set eth0 mtu {interface['mtu']} up")
        for address in interface["IPAddresses"]:
            shell.ok(f"ip addr add {address['address']}/{address['mask']} dev eth0")
        for route in self.plan.routes:
            family = "-6" if route["family"] else "-4"
            shell.ok(f"ip {family} route add default via {route['gateway']} dev {route['device']}")
        for line in self.plan.resolv_conf().splitlines():
            shell.ok(f"echo '{line}' >>/etc/resolv.conf")
        # An IPv6 address is not used before the guest has seen that nobody else has it.
        shell.ok(
            "for i in 1 2 3 4 5 6 7 8 9; do ip addr show eth0 | grep -q tentative || exit 0; sleep 1; done"
        )
        return shell

    def end(self) -> None:
        self.plan.stop()
        os.close(self._host)
        assert journal_undo.undo(self.journal, 30) == []
        assert not os.path.exists(os.path.dirname(self.journal.path))


def inside(
    namespaces: tuple[str, str],
    base: Path,
    settings: dict[str, Any],
    work: Callable[[Sandbox], Any],
    resolv_conf: str = f"nameserver {INTERNET4}\nsearch example.com\n",
) -> Any:
    """Do something with a sandbox's network in the host namespace."""

    def there() -> Any:
        sandbox = Sandbox(base, settings)
        try:
            return work(sandbox)
        finally:
            sandbox.end()

    return netlab.within(namespaces[0], there, resolv_conf)


def ask(address: str, port: int, tries: int = 1) -> str:
    """A UDP datagram's answer, or how it failed."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, UDP) as sock:
        sock.settimeout(10)
        sock.sendto(b"question", (address, port))
        try:
            return sock.recv(100).decode()
        except TimeoutError:
            return "no answer"


@pytest.mark.parametrize("mode", ["user", "tap"])
def test_a_guest_on_the_network(mode: str, guest_assets: Path, tmp_path: Path) -> None:
    """Through a tap, TCP ports are the engine's to publish (`test_cli_network`), and all else is alike."""
    with netlab.lab() as namespaces:
        _guest_on_the_network(mode, namespaces, guest_assets, tmp_path)


def _guest_on_the_network(
    mode: str, namespaces: tuple[str, str], guest_assets: Path, tmp_path: Path
) -> None:
    host, internet = namespaces
    ipv4 = netlab.serve_in(internet, (INTERNET4, 8000), b"over IPv4\n")
    ipv6 = netlab.serve_in(internet, (INTERNET6, 8000), b"over IPv6\n")
    names = netlab.serve_in(internet, (INTERNET4, 53), answer_a, UDP)

    def work(sandbox: Sandbox) -> dict[str, Any]:
        secret = Server(("127.0.0.1", 9000), b"secret\n")
        shell = sandbox.boot(guest_assets)
        # The server is to hang up first: passt of 2023 (Debian 12) may lose its FIN when the guest has sent one
        # already, and nc would wait for ever in FIN_WAIT2.
        say = "(echo hello; sleep 2) | timeout 60 nc -w 20"
        found: dict[str, Any] = {
            "ipv4": shell.ok(f"{say} {INTERNET4} 8000"),
            "ipv6": shell.ok(f"{say} {INTERNET6} 8000"),
            "name": shell.ok("nslookup somewhere.example.com"),
            "resolv.conf": shell.ok("cat /etc/resolv.conf"),
        }
        for address in (user.GATEWAY4, user.GATEWAY6, HOST4, HOST6, "127.0.0.1"):
            status, _ = shell.run(f"echo x | nc -w 2 {address} 9000")
            assert status != 0, address
        assert secret.peers == []
        shell.ok(
            "mkdir /www; echo from the guest >/www/index.html; httpd -p 80 -h /www; httpd -p 81 -h /www"
        )
        get = b"GET /index.html HTTP/1.0\r\n\r\n"
        found["published"] = [
            netlab.connect_in(where, address, get).decode().splitlines()[-1:]
            for where, address in (
                (host, ("127.0.0.1", 8080)),
                (host, ("::1", 8080)),
                (internet, (HOST4, 8080)),
                (internet, (HOST6, 8080)),
                (internet, (HOST4, 81)),
                (host, ("127.0.0.1", 81)),  # published at another address only
                (host, ("127.0.0.1", 5300)),  # published for UDP only
            )
            if mode == "user"
        ]
        shell.close()
        return found

    found = inside(namespaces, tmp_path, {"mode": mode, "ports": PORTS}, work)
    assert found["ipv4"] == "over IPv4"
    assert found["ipv6"] == "over IPv6"
    assert ipv4.peers == [HOST4]
    assert ipv6.peers == [HOST6]
    assert ipv4.heard == [b"hello\n"]
    assert "192.0.2.77" in found["name"]
    assert set(names.peers) == {HOST4}
    assert found["resolv.conf"].splitlines() == [f"nameserver {INTERNET4}", "search example.com"]
    assert found["published"] == ([["from the guest"]] * 5 + [[]] * 2 if mode == "user" else [])


ATTEMPTS = (
    "import json, socket, sys\n"
    "open(sys.argv[1] + '/cgroup.procs', 'w').write('0')\n"
    "def attempt(address, port, kind):\n"
    "    family = socket.AF_INET6 if ':' in address else socket.AF_INET\n"
    "    with socket.socket(family, kind) as sock:\n"
    "        try:\n"
    "            if kind == socket.SOCK_STREAM:\n"
    "                sock.connect((address, port))\n"
    "            else:\n"
    "                sock.sendto(b'', (address, port))\n"
    "        except PermissionError:\n"
    "            return False\n"
    "        except OSError:\n"
    "            pass\n"
    "        return True\n"
    "kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM)\n"
    "print(json.dumps([[attempt(a, p, k) for k in kinds] for a, p in json.loads(sys.argv[2])]))\n"
)
"""An ordinary program that joins a cgroup, and then tries addresses by TCP and UDP: false is what was refused."""


def attempts(cgroup: str, addresses: list[tuple[str, int]]) -> list[list[bool]]:
    command = [sys.executable, "-c", ATTEMPTS, cgroup, json.dumps(addresses)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    verdicts: list[list[bool]] = json.loads(done.stdout)
    return verdicts


@pytest.mark.parametrize("mode", ["user", "tap"])
def test_the_helper_is_kept_from_the_loopback(
    mode: str, namespaces: tuple[str, str], tmp_path: Path
) -> None:
    """The helper is in a cgroup in which no program gets to what listens there, and gets to everything else."""

    def work(sandbox: Sandbox) -> dict[str, Any]:
        stream = socket.SOCK_STREAM
        local = [Server((a, 9000), b"secret", kind) for a in ("127.0.0.1", "::1") for kind in (stream, UDP)]
        for_all = [Server((a, 9001), b"for all", kind) for a in (HOST4, HOST6) for kind in (stream, UDP)]
        sandbox.start()
        [cgroup] = [entry.params["path"] for entry in sandbox.journal.entries if entry.kind == "cgroup"]
        assert sandbox.plan._child is not None  # type: ignore[attr-defined]
        helper = sandbox.plan._child.pid  # type: ignore[attr-defined]
        found = {
            "helper is in it": str(helper) in Path(f"{cgroup}/cgroup.procs").read_text().split(),
            "loopback": attempts(cgroup, [("127.0.0.1", 9000), ("::1", 9000)]),
            "others": attempts(cgroup, [(HOST4, 9001), (HOST6, 9001)]),
        }
        deadline = time.monotonic() + PATIENCE
        while not all(server.peers for server in for_all) and time.monotonic() < deadline:
            time.sleep(0.05)
        sandbox.nic.close()
        found["heard"] = [[bool(server.peers) for server in servers] for servers in (local, for_all)]
        return found

    assert inside(namespaces, tmp_path, {"mode": mode}, work) == {
        "helper is in it": True,
        "loopback": [[False, False]] * 2,
        "others": [[True, True]] * 2,
        "heard": [[False] * 4, [True] * 4],
    }


def test_a_loopback_resolver_is_asked_for_the_guest(
    namespaces: tuple[str, str], guest_assets: Path, tmp_path: Path
) -> None:
    def work(sandbox: Sandbox) -> tuple[list[str], str, list[str]]:
        local = Server(("127.0.0.53", 53), answer_a, UDP)
        shell = sandbox.boot(guest_assets)
        said = shell.ok("nslookup somewhere.example.com")
        shell.close()
        return sandbox.plan.dns, said, local.peers

    settings = {"mode": "user"}
    dns, said, peers = inside(namespaces, tmp_path, settings, work, "nameserver 127.0.0.53\n")
    assert dns == [user.DNS4]
    assert "192.0.2.77" in said
    assert peers


def test_without_a_default_route_ports_are_still_published(guest_assets: Path, tmp_path: Path) -> None:
    with netlab.lab(default_routes=False) as names:

        def work(sandbox: Sandbox) -> str:
            shell = sandbox.boot(guest_assets)
            shell.ok("mkdir /www; echo here >/www/index.html; httpd -p 80 -h /www")
            said = netlab.connect_in(names[0], ("127.0.0.1", 8080), b"GET /index.html HTTP/1.0\r\n\r\n")
            shell.close()
            return said.decode()

        assert inside(names, tmp_path, {"mode": "user", "ports": PORTS[:1]}, work).endswith("here\n")


@pytest.mark.parametrize("mode", ["user", "tap"])
def test_published_udp_ports(mode: str, namespaces: tuple[str, str], tmp_path: Path) -> None:
    """By hand: what comes for a published port is a frame to the guest's port."""

    def work(sandbox: Sandbox) -> str:
        sandbox.start()
        [end] = sandbox.nic.descriptors()
        wire = end.raw if mode == "tap" else socket.socket(fileno=end.detach())
        for frame in frames.neighbour_claims():
            frames.send(wire, frame)
            while not frames.receive(wire, 1):  # pasta has to open its device first
                frames.send(wire, frame)
        netlab.send_in(namespaces[1], (HOST4, 5300), b"for the guest")
        while frame := frames.receive(wire, 20):
            if frame.endswith(b"for the guest"):
                break
        end.close() if isinstance(wire, int) else wire.close()
        return frame.hex()

    frame = bytes.fromhex(inside(namespaces, tmp_path, {"mode": mode, "ports": PORTS}, work))
    assert frame[12:14] == b"\x08\x00"
    assert socket.inet_ntoa(frame[30:34]) == user.ADDRESS4
    assert int.from_bytes(frame[36:38], "big") == 5301


@pytest.mark.parametrize("mode", ["user", "tap"])
def test_ports_that_are_taken(mode: str, namespaces: tuple[str, str], tmp_path: Path) -> None:
    def work(sandbox: Sandbox) -> list[str]:
        taken = Server(("0.0.0.0", 8080), b"")
        sandbox.nic.close()
        try:
            sandbox.start()
        except HostError as error:
            return [error.message, error.hint]
        finally:
            taken.sock.close()
        return []

    message, hint = inside(namespaces, tmp_path, {"mode": mode, "ports": PORTS}, work)
    assert message == "cannot publish port 8080->80/tcp: Address already in use"
    assert "ss -lntup" in hint


def test_a_port_that_is_taken_behind_our_back(
    namespaces: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user, "check_ports", lambda ports: None)

    def work(sandbox: Sandbox) -> str:
        taken = Server(("::", 8080), b"")
        sandbox.start()
        assert sandbox.plan.child is not None
        assert sandbox.plan.child.wait(PATIENCE) is not None
        failure = sandbox.plan.failure()
        sandbox.nic.close()
        taken.sock.close()
        return str(failure)

    assert "cannot publish 8080->80/tcp" in inside(
        namespaces, tmp_path, {"mode": "user", "ports": PORTS[:1]}, work
    )


def test_the_helper_ends_with_the_machine(namespaces: tuple[str, str], tmp_path: Path) -> None:
    def with_machine(sandbox: Sandbox) -> bool:
        sandbox.start()
        assert sandbox.plan.child is not None
        assert sandbox.plan.child.pid
        sandbox.nic.close()  # all that passt sees of the machine
        return sandbox.plan.child.wait(PATIENCE) is not None

    assert inside(namespaces, tmp_path, {"mode": "user"}, with_machine)


@pytest.mark.parametrize(("mode", "cgroups_are_hidden"), [("user", False), ("user", True), ("tap", False)])
def test_the_helper_ends_with_the_engine(
    mode: str, namespaces: tuple[str, str], tmp_path: Path, cgroups_are_hidden: bool
) -> None:
    script = (
        f"import sys, os, time; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
        "from pathlib import Path\n"
        "import test_network\n"
        f"sandbox = test_network.Sandbox(Path({str(tmp_path)!r}), {{'mode': {mode!r}}})\n"
        "sandbox.start()\n"
        "print(sandbox.journal.path, sandbox.plan._child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    # `ip netns exec` gives a mount namespace with another /sys, without the cgroups.
    enter = ["ip", "netns", "exec", namespaces[0]]
    if not cgroups_are_hidden:
        enter = ["nsenter", f"--net=/run/netns/{namespaces[0]}"]
    command = [*enter, sys.executable, "-c", script]
    engine = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    path, pid = engine.stdout.readline().rsplit(" ", 1)
    pidfd = os.pidfd_open(int(pid))
    engine.kill()
    engine.wait()
    engine.stdout.close()
    assert sysio.pidfd_wait(pidfd, PATIENCE)
    os.close(pidfd)
    journal = Journal.open(path)
    below = [entry.params["inside"] for entry in journal.entries if entry.kind == "cgroup"]
    base = next((m.target for m in mount_table.mounts() if m.fstype == "cgroup2"), "")
    assert below
    if base:
        assert all(os.path.isdir(base + inside) for inside in below)
    assert journal_undo.undo(journal) == []
    assert not any(os.path.exists(base + inside) for inside in below)


def test_the_guard_refuses_what_it_should() -> None:
    """The BPF programs on the kernel's own terms: connect and sendto from inside the cgroup."""
    base = next((m.target for m in mount_table.mounts() if m.fstype == "cgroup2"), None)
    if base is None:
        pytest.skip("needs a mounted cgroup v2 hierarchy")
    refused = [("127.0.0.1", 1), ("127.255.0.1", 53), ("0.0.0.0", 1), ("::1", 1), ("::", 1)]
    refused += [("::ffff:127.0.0.1", 1), ("::ffff:0.0.0.0", 1)]
    allowed = [
        ("127.0.0.200", 53),
        ("::1", 53),
        ("192.0.2.1", 1),
        ("::ffff:192.0.2.1", 1),
        ("2001:db8::1", 1),
    ]

    journal = Journal.create_dir("/tmp", f"kt-guard-{os.urandom(4).hex()}", {})
    try:
        path = egress_filter.make_cgroup(
            journal,
            f"kt-guard-{os.urandom(4).hex()}",
            socket.inet_aton("127.0.0.200"),
            socket.inet_pton(socket.AF_INET6, "::1"),
        )
        verdicts = attempts(path, refused + allowed)
    finally:
        assert journal_undo.undo(journal) == []
    assert verdicts[: len(refused)] == [[False, False]] * len(refused)
    assert verdicts[len(refused) :] == [[True, True]] * len(allowed)


def test_the_host_is_seen_as_it_is(namespaces: tuple[str, str]) -> None:
    def look() -> list[object]:
        host = user.HostNetwork.look()
        return [host.ipv4, host.ipv6, host.resolver.servers, host.resolver.search]

    conf = "# comment\nnameserver 127.0.0.53\nnameserver 192.0.2.9\nsearch a b\noptions edns0\n"
    seen = netlab.within(namespaces[0], look, conf)
    assert seen == [True, True, ["127.0.0.53", "192.0.2.9"], ["a", "b"]]
    assert resolver.parse(conf).reachable == ["192.0.2.9"]
