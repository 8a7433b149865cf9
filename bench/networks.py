"""Networks with a name: requests between two machines beside two runc containers, many containers, and netavark.

* ``requests``: a server and a client (`bench/load.c`) in two containers of one network, with kata (``kata network``)
  and with runc (a bridge and veth pairs in a network namespace). In every round each once, in an order shuffled anew.
  Reported are medians, and kata's share of what runc reaches.
* ``life``: containers are started in two networks and removed again, and what is left then is counted.
* ``setup``: processor time and memory of what a network costs: netavark with aardvark-dns, as Debian packages them,
  for one container; and what an engine does for its machine. The namespaces are made before.

Needs root, runc, gcc, busybox's image and a guest; netavark where it is unpacked (``tools/setup test``).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
sys.path += [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests/vm")]

import leftovers  # noqa: E402
from start import IMAGE, KATA, unpack  # noqa: E402

from kata.journal import Journal  # noqa: E402
from kata.network import bridge, held, members, resolver, user  # noqa: E402
from kata.settings import EndpointSettings  # noqa: E402

_STARTS = 4
"""How many containers start at the same time."""
_CONTAINER_KIB = 128 << 10
"""What a container takes of the host's memory, with some to spare."""
PORT = "7007"
CONNECTIONS = ("1", "16")
NETAVARK = ROOT / "build/programs/podman/usr/lib/podman/netavark"
NAMES = [f"kb{os.getpid()}{letter}" for letter in "sab"]
"""Network namespaces of runc: the bridge's, the server's, the client's."""


class Host:
    """Directories, and kata in them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tools = directory / "tools"
        self.tools.mkdir()
        self.environment = {
            **os.environ,
            "KATA_RUN_DIR": str(directory / "r"),
            "KATA_STATE_DIR": str(directory / "s"),
            "KATA_GUEST_DIR": os.environ.get("KATA_GUEST_DIR", str(ROOT / "build/guest")),
        }
        subprocess.run(
            ["gcc", "-O2", "-static", "-o", str(self.tools / "load"), str(ROOT / "bench/load.c")], check=True
        )

    def kata(self, *words: str) -> str:
        """Run `kata`; its output."""
        done = subprocess.run(
            [*KATA, *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"error: kata {' '.join(words)}: {done.stderr}")
        return done.stdout


def _detached(network: str, name: str, *options: str) -> list[str]:
    """Words that start a container in a network; its command is to follow."""
    return ["run", "-d", "-q", "--network", network, "--name", name, *options, f"oci:{IMAGE}"]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _runc_up(host: Host) -> None:
    """A bridge with two namespaces at it, and a container in each."""
    root = host.directory / "rootfs"
    root.mkdir()
    unpack(IMAGE, root)
    shutil.copy(host.tools / "load", root / "load")
    for name in NAMES:
        _ip("netns", "add", name)
    _ip("-n", NAMES[0], "link", "add", "bridge0", "type", "bridge")
    _ip("-n", NAMES[0], "link", "set", "bridge0", "up")
    for number, name in enumerate(NAMES[1:], 1):
        peer = ("peer", "name", "eth0", "netns", name)
        _ip("-n", NAMES[0], "link", "add", f"v{number}", "type", "veth", *peer)
        _ip("-n", NAMES[0], "link", "set", f"v{number}", "master", "bridge0", "up")
        _ip("-n", name, "addr", "add", f"10.9.9.{number}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
    for number, name in enumerate(NAMES[1:], 1):
        bundle = host.directory / f"bundle{number}"
        bundle.mkdir()
        subprocess.run(["runc", "spec", "-b", str(bundle)], check=True)
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"].update(
            terminal=False, args=["/load", "serve", PORT] if number == 1 else ["sleep", "1000000"]
        )
        spec["root"] = {"path": str(root), "readonly": True}
        for one in spec["linux"]["namespaces"]:
            if one["type"] == "network":
                one["path"] = f"/run/netns/{name}"
        (bundle / "config.json").write_text(json.dumps(spec))
        subprocess.run(
            ["runc", "run", "-d", "-b", str(bundle), name],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _runc_down() -> None:
    for name in NAMES[1:]:
        subprocess.run(["runc", "delete", "-f", name], check=False)
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def requests(host: Host, seconds: float, rounds: int) -> None:
    """Measure and print requests a second."""
    kata = host.kata
    kata("network", "create", "bench")
    found: dict[str, dict[str, list[float]]] = {count: {"kata": [], "runc": []} for count in CONNECTIONS}
    try:
        mount = f"{host.tools}:/tools:ro"
        kata(*_detached("bench", "server", "-v", mount), "/tools/load", "serve", PORT)
        kata(*_detached("bench", "client", "-v", mount), "sleep", "1000000")
        [about] = json.loads(kata("network", "inspect", "bench"))
        address = next(
            one["IPv4Address"].partition("/")[0]
            for one in about["Containers"].values()
            if one["Name"] == "server"
        )
        _runc_up(host)
        for _ in range(rounds):
            for count in CONNECTIONS:
                for name in random.sample(["kata", "runc"], 2):
                    words = ["requests", "HOST", PORT, str(seconds), count]
                    if name == "kata":
                        words[1] = address
                        said = kata("exec", "client", "/tools/load", *words)
                    else:
                        words[1] = "10.9.9.1"
                        said = subprocess.run(
                            ["runc", "exec", NAMES[2], "/load", *words],
                            check=True,
                            capture_output=True,
                            text=True,
                        ).stdout
                    found[count][name].append(float(said))
    finally:
        _runc_down()
        for name in ("server", "client"):
            subprocess.run([*KATA, "rm", "-f", name], env=host.environment, capture_output=True, check=False)
        kata("network", "rm", "bench")
    print(f"{'requests a second over':28}{'kata':>10}{'runc':>10}{'kata/runc':>11}")
    for count, values in found.items():
        ours, theirs = (statistics.median(values[name]) for name in ("kata", "runc"))
        print(f"{count + ' connections':28}{ours:10.0f}{theirs:10.0f}{ours / theirs:11.3f}")


def _fit(count: int) -> int:
    """How many containers at once this host's memory allows: half of what is available, at most all."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return max(1, min(count, int(lines["MemAvailable"].split()[0]) // 2 // _CONTAINER_KIB))


def _start(host: Host, names: list[str]) -> None:
    """Start containers at the same time, in one network and the other in turns."""
    started = [
        subprocess.Popen(
            [*KATA, *_detached(("one", "two")[int(name[1:]) % 2], name), "sleep", "1000000"],
            env=host.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for name in names
    ]
    failed = sum(one.wait() != 0 for one in started)
    if failed:
        raise SystemExit(f"error: {failed} of {names} did not start")


def life(host: Host, count: int, at_once: int) -> None:
    """Start and remove containers in two networks; print what is left."""
    kata = host.kata
    at_once = at_once or _fit(count)
    before = leftovers.snapshot()
    ids = {name: kata("network", "create", name).strip() for name in ("one", "two")}
    began = time.monotonic()
    for first in range(0, count, at_once):
        names = [f"c{number}" for number in range(first, min(first + at_once, count))]
        try:
            for some in range(0, len(names), _STARTS):
                _start(host, names[some : some + _STARTS])
            last, other = names[-1], names[-3] if len(names) > 2 else names[-1]
            if other not in kata("exec", last, "nslookup", other):  # of the same network, among all these
                raise SystemExit(f"error: {last} does not find {other}")
        finally:
            subprocess.run(
                [*KATA, "rm", "-f", *names], env=host.environment, stdout=subprocess.DEVNULL, check=False
            )
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{first + len(names)} of {count}")
    took = time.monotonic() - began
    left = []
    for name, identity in ids.items():
        network = host.directory / "r/networks" / identity
        left += [f"member {one} of {name}" for one in os.listdir(network / "members")]
        holders = json.loads((network / "network.json").read_text())["holders"]
        left += [f"holder {one} of {name}" for one in holders if held.Holder(*one).open() is not None]
    for name in ids:
        kata("network", "rm", name)
    left += [f"sandbox {one.name}" for one in (host.directory / "r/sandboxes").glob("*")]
    left += [f"container {one.name}" for one in (host.directory / "s/containers").glob("*")]
    left += [f"network {one}" for one in (host.directory / "r/networks").glob("*")]
    # Processes, mounts, cgroups, interfaces and files; those of others who use this machine do not count.
    ours = leftovers.Ours(str(host.directory), f"KATA_RUN_DIR={host.directory}")
    left += leftovers.compare(before, leftovers.snapshot(), ours, strict=False)
    print(f"{count} containers in two networks, {at_once} at once, {took:.0f} s; left: {len(left)}")
    for one in left:
        print(f"  {one}")
    if left:
        raise SystemExit(1)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _pss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _daemons(directory: Path) -> list[int]:
    """aardvark-dns that serves from below a directory."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"aardvark-dns") and str(directory).encode() in b" ".join(words):
            found.append(int(pid))
    return found


def _netavark(directory: Path, times: int) -> tuple[float, float, int]:
    """Processor milliseconds to set up and to tear down a container, and KiB of aardvark-dns."""
    outer, inner = NAMES[:2]
    config: dict[str, Any] = {
        "container_id": "c" * 64,
        "container_name": "bench",
        "networks": {
            "bench": {"static_ips": ["10.9.8.2"], "interface_name": "eth0", "aliases": ["bench"]},
        },
        "network_info": {
            "bench": {
                "name": "bench",
                "id": "d" * 64,
                "driver": "bridge",
                "network_interface": "kbench0",
                "subnets": [{"subnet": "10.9.8.0/24", "gateway": "10.9.8.1"}],
                "ipv6_enabled": False,
                "internal": False,
                "dns_enabled": True,
                "ipam_options": {"driver": "host-local"},
            }
        },
    }
    took: dict[str, list[float]] = {"setup": [], "teardown": []}
    memory = 0
    _ip("netns", "add", outer)
    _ip("netns", "add", inner)
    try:
        for _ in range(times):
            for command in took:
                before = _children_s()
                done = subprocess.run(
                    [
                        *("ip", "netns", "exec", outer, str(NETAVARK), "--config", str(directory)),
                        *(
                            "--aardvark-binary",
                            str(NETAVARK.parent / "aardvark-dns"),
                            command,
                            f"/run/netns/{inner}",
                        ),
                    ],
                    input=json.dumps(config),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise SystemExit(f"error: netavark {command}: {done.stdout}{done.stderr}")
                took[command].append((_children_s() - before) * 1e3)
                if command == "setup":
                    [pid] = _daemons(directory)
                    memory = _pss_kib(pid)
    finally:
        for pid in _daemons(directory):
            os.kill(pid, signal.SIGKILL)
        for name in (outer, inner):
            subprocess.run(["ip", "netns", "delete", name], check=False)
    return statistics.median(took["setup"]), statistics.median(took["teardown"]), memory


def _engine(host: Host, times: int) -> tuple[float, float]:
    """Processor milliseconds of what an engine does to be in a network, and to leave it."""
    identity = host.kata("network", "create", "bench").strip()
    network = str(host.directory / "r/networks" / identity)
    os.makedirs(os.path.dirname(network), exist_ok=True)
    journal = Journal.create_dir(os.path.dirname(network), identity, {"client": "kata", "id": "bench"})
    took: list[list[float]] = [[], []]
    try:
        os.mkdir(members.directory(network))
        namespace = held.make()
        one = EndpointSettings(
            network="bench",
            path=network,
            namespace=held.Holder.own(namespace).path,
            address="10.210.0.2",
            prefix=24,
            mac="02:00:00:00:00:09",
        )
        seen = user.HostNetwork(True, False, resolver.parse(""))
        for _ in range(times):
            own = Journal.create_dir(str(host.directory), "engine", {"client": "kata", "id": "engine"})
            began = time.process_time()
            plan = bridge.BridgedPlan("02:00:00:00:01:00", [], seen, endpoints=[one], outside=False)
            plan.journal = own
            nics = plan.setup_nics(4)
            plan.start(own, "engine")
            took[0].append((time.process_time() - began) * 1e3)
            began = time.process_time()
            plan.stop()
            for nic in nics:
                nic.close()
            took[1].append((time.process_time() - began) * 1e3)
            from kata import journal_undo

            journal_undo.undo(own)
    finally:
        journal.close()
        host.kata("network", "rm", "bench")
    return statistics.median(took[0]), statistics.median(took[1])


def setup(host: Host, times: int) -> None:
    """Measure and print what a network costs a container, beside netavark with aardvark-dns."""
    ours = _engine(host, times)
    print(f"{'':34}{'set up':>10}{'take down':>11}{'daemon':>12}")
    print(f"{'kata (in the engine), CPU ms':34}{ours[0]:10.1f}{ours[1]:11.1f}{'none':>12}")
    if NETAVARK.exists():
        directory = host.directory / "netavark"
        directory.mkdir()
        up, down, memory = _netavark(directory, times)
        print(f"{'netavark, aardvark-dns, CPU ms':34}{up:10.1f}{down:11.1f}{f'{memory} KiB':>12}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Networks with a name, beside runc and netavark.")
    parser.add_argument(
        "what", nargs="*", default=["requests", "life", "setup"], help="requests, life, setup"
    )
    parser.add_argument("--seconds", type=float, default=3, help="of each test (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is run (default %(default)s)")
    parser.add_argument("--containers", type=int, default=100, help="with life (default %(default)s)")
    parser.add_argument(
        "--at-once", type=int, default=0, help="with life (default: as many as half of the memory holds)"
    )
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="kb-", dir="/tmp"))
    try:
        host = Host(directory)
        if "setup" in options.what:
            setup(host, options.rounds * 4)
        if "requests" in options.what:
            requests(host, options.seconds, options.rounds)
        if "life" in options.what:
            life(host, options.containers, options.at_once)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
