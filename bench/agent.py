"""What the agent costs, and how quick it is, in a running guest; with the raw channel measured in the same run.

Footprint: summed over *all* processes of the agent's binary (helpers count), from ``/proc/*/smaps_rollup``, read by a
shell that runs beside the agent (`agentguest.py`), so that nothing that measures is on the agent's account.

Latency: an empty call (Health.Check), beside as many bytes sent to and fro over a second port of the same
virtio-serial device behind which ``busybox cat`` reads and writes; by turns. The call is made twice: from a bare
socket, its frame prepared beforehand, as the raw channel is used; and by the blocking client, whose share (encoding,
decoding, locks, and waiting with a time limit; Python, with cold caches) is printed. Meanwhile the guest falls asleep
and has to be woken, so the raw channel is also measured with pauses of that length ("raw, paced").

Throughput: ``busybox dd`` in a container writing to its stdout or reading its stdin, as the engine's client moves it;
beside the same ``dd`` on that second port ("raw"), and beside two of them with a pipe between ("raw + pipe"), which is
what anything between a process's standard streams and a port has to pay at least.

Parallelism: Health.Check while 100 calls of WaitProcess and ReadStdout wait on the same connection.

Needs root, a guest, and the busybox image (``make setup``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
sys.path.append(str(ROOT / "src"))

import agentguest  # noqa: E402

from kata import paths  # noqa: E402
from kata.agent.client import AgentClient, create_request  # noqa: E402
from kata.agent.streams import FEATURE, Input, Output  # noqa: E402
from kata.guest import manifest  # noqa: E402
from kata.hypervisor import accel  # noqa: E402
from kata.hypervisor.qemu import slots  # noqa: E402
from kata.images.resolve import resolve  # noqa: E402
from kata.proto import agent_pb, health_pb, oci_pb  # noqa: E402
from kata.ttrpc import envelope, frame  # noqa: E402
from kata.ttrpc.client import Client  # noqa: E402
from kata.ttrpc.sync_client import Client as BlockingClient  # noqa: E402

STATE = "/run/kata-containers"
PING = bytes(48)
"""As long as the frame of an empty call."""
PIECE = 1 << 16
BLOCK = 250
SETTLE_S = 0.2

Row = dict[str, Any]


def percentiles(seconds: list[float]) -> Row:
    """Median and 99th percentile in microseconds."""
    ordered = sorted(seconds)
    return {
        "p50_us": round(statistics.median(ordered) * 1e6, 1),
        "p99_us": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6, 1),
    }


# ---- latency ----


class Watched:
    """A socket that notes when something was sent and received; as much of one as the blocking client uses."""

    def __init__(self, sock: socket.socket) -> None:
        self.setblocking, self.fileno, self.shutdown, self.close = (
            sock.setblocking,
            sock.fileno,
            sock.shutdown,
            sock.close,
        )
        self._sock = sock
        self.sending = self.received = 0.0

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        """As a socket's."""
        self.sending = time.perf_counter()
        return self._sock.send(data, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As a socket's."""
        data = self._sock.recv(size, flags)
        self.received = time.perf_counter()
        return data


def round_trips(guest: agentguest.Guest, calls: int) -> Row:  # noqa: C901
    """Raw round trips and empty calls by turns, in blocks.

    The raw channel's other end lives only as long as its own blocks: all queues of the device share an interrupt, and
    once ``cat`` has written it is woken by each one of the agent's as well, which changes address spaces twice.
    """
    watched = Watched(guest.agent.dup())
    client = BlockingClient(watched)
    # The client polls before it reads, and the mode belongs to both descriptors.
    guest.agent.setblocking(True)
    request = envelope.Request("grpc.Health", "Check", b"", 60 * 10**9).encode()
    prepared = frame.encode(0xFFFF_FFFF, frame.REQUEST, request)
    answer = envelope.Response(health_pb.HealthCheckResponse(status=1).encode()).encode()
    names = ("raw", "raw, paced", "call from a bare socket", "call of the client")
    took: dict[str, list[float]] = {name: [] for name in names}
    share: list[float] = []
    pause = 0.0

    def bare() -> None:
        guest.agent.sendall(prepared)
        left = frame.HEADER_SIZE + len(answer)
        while left:
            left -= len(guest.agent.recv(left))

    def ping() -> None:
        guest.raw.sendall(PING)
        left = len(PING)
        while left:
            left -= len(guest.raw.recv(left))

    def call() -> None:
        client.call(
            "grpc.Health", "Check", health_pb.CheckRequest(), health_pb.HealthCheckResponse, timeout=60
        )

    for number in range(calls // BLOCK + 1):
        guest.sh("cat 1<>$raw 0<&1 & echo $! >/tmp/echo")
        for name, one in zip(names, (ping, ping, bare, call), strict=True):
            if one is bare:
                guest.sh("kill $(cat /tmp/echo)")
            time.sleep(SETTLE_S)
            for turn in range(BLOCK):
                if name == "raw, paced":
                    until = time.perf_counter() + pause
                    while time.perf_counter() < until:
                        pass
                began = time.perf_counter()
                one()
                ended = time.perf_counter()
                if one is call:
                    share.append(watched.sending - began + ended - watched.received)
                if number and turn >= BLOCK // 10:  # the first block, and the first ones of a block, warm up
                    took[name].append(ended - began)
        pause = statistics.median(share)
    rows = {name: percentiles(found) for name, found in took.items()}
    for name in names[2:]:
        for key in ("p50_us", "p99_us"):
            for beside in names[:2]:
                rows[name][f"{key[:3]}_to_{beside}"] = round(rows[name][key] / rows[beside][key], 2)
    rows["of that the client's own"] = percentiles(share)
    return rows


async def blocked(agent: AgentClient, calls: int) -> Row:
    """Empty calls alone, and while 100 others wait."""

    async def measure() -> list[float]:
        took = []
        for _ in range(calls):
            began = time.perf_counter()
            await agent.check(60.0)
            took.append(time.perf_counter() - began)
        return took

    await measure()
    idle, crowded = [], []
    for _ in range(3):
        idle += await measure()
        waiting: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(agent.wait("one", "")) for _ in range(50)
        ]
        waiting += [asyncio.ensure_future(agent.read("one", "", "stdout", PIECE)) for _ in range(50)]
        await agent.check(60.0)
        crowded += await measure()
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        # The agent does not know that they are given up: what they wait for answers them.
        await agent.signal("one", "", 9)
        await agent.remove_container("one")
        await run(agent, "one", "sleep", "100000")
    rows = {"idle": percentiles(idle), "100 waiting": percentiles(crowded)}
    rows["100 waiting"]["p99_to_idle"] = round(rows["100 waiting"]["p99_us"] / rows["idle"]["p99_us"], 2)
    return rows


# ---- containers ----


def specification(name: str, *argv: str) -> oci_pb.Spec:
    """A container with the usual namespaces and the fewest mounts."""
    flags = ["nosuid", "noexec", "nodev"]
    return oci_pb.Spec(
        Version="1.0.2",
        Process=process(*argv),
        Root=oci_pb.Root(Path=f"{STATE}/{name}/rootfs", Readonly=True),
        Mounts=[
            oci_pb.Mount(destination="/proc", type="proc", source="proc", options=flags),
            oci_pb.Mount(destination="/dev", type="tmpfs", source="tmpfs", options=["nosuid", "mode=755"]),
        ],
        Linux=oci_pb.Linux(
            Namespaces=[
                oci_pb.LinuxNamespace(Type=kind) for kind in ("pid", "mount", "ipc", "uts", "cgroup")
            ]
        ),
    )


def process(*argv: str) -> oci_pb.Process:
    """A process of root's."""
    return oci_pb.Process(Args=list(argv), Env=["PATH=/usr/bin:/bin"], Cwd="/", User=oci_pb.User())


async def run(agent: AgentClient, name: str, *argv: str) -> None:
    """Start a container."""
    storage = agent_pb.Storage(
        driver="blk",
        source=slots.disk_path(0),
        fstype="erofs",
        options=["ro"],
        mount_point=f"{STATE}/{name}/rootfs",
    )
    await agent.create_container(create_request(name, specification(name, *argv), [storage], []))
    await agent.start_container(name)


async def run_exec(agent: AgentClient, number: int) -> None:
    """A further process to its end, with its output."""
    exec_id = f"e{number}"
    await agent.exec_process("one", exec_id, process("echo", "hello"))
    said = [Output(agent, "one", exec_id, name) for name in ("stdout", "stderr")]
    for stream in said:
        while await stream.read():
            pass
    await agent.wait("one", exec_id)


# ---- throughput ----


def raw_throughput(guest: agentguest.Guest, size: int, piped: bool) -> dict[str, float]:
    """MB/s from and to the guest over the raw port; *piped*: with a pipe and a second process between."""
    count = size // PIECE
    through = f" | dd bs={PIECE} iflag=fullblock 2>/dev/null" if piped else ""
    guest.begin(f"dd if=/dev/zero bs={PIECE} count={count} 2>/dev/null{through} 1<>$raw")
    began, left = 0.0, size
    while left:
        left -= len(guest.raw.recv(1 << 18))
        began = began or time.perf_counter()
    out = size / (time.perf_counter() - began) / 1e6
    guest.end("dd")
    whole = f"bs={PIECE} iflag=fullblock"
    last = f"dd of=/dev/null {whole} 2>/dev/null"
    guest.begin(
        f"dd {whole} count={count} 0<>$raw 2>/dev/null | {last}"
        if piped
        else f"{last} count={count} 0<>$raw"
    )
    piece, began = bytes(PIECE), time.perf_counter()
    for _ in range(count):
        guest.raw.sendall(piece)
    guest.end("dd")
    return {"stdout": out, "stdin": size / (time.perf_counter() - began) / 1e6}


async def container_throughput(agent: AgentClient, size: int, tag: str) -> dict[str, float]:
    """MB/s of a container's process's stdout and stdin, through the agent."""
    count = size // PIECE
    out = f"o{tag}"
    await agent.exec_process("one", out, process("dd", "if=/dev/zero", f"bs={PIECE}", f"count={count}"))
    stream, began, got = Output(agent, "one", out, "stdout"), 0.0, 0
    while data := await stream.read():
        got += len(data)
        began = began or time.perf_counter()
    took = time.perf_counter() - began
    if got != size:
        raise SystemExit(f"error: {got} of {size} bytes of output arrived")
    into = f"i{tag}"
    await agent.exec_process("one", into, process("dd", "of=/dev/null", f"bs={PIECE}", "iflag=fullblock"))
    feed, piece, fed = Input(agent, "one", into), bytes(1 << 18), time.perf_counter()
    for _ in range(size // len(piece)):
        await feed.write(piece)
    await feed.close()
    await agent.wait("one", into)
    return {"stdout": size / took / 1e6, "stdin": size / (time.perf_counter() - fed) / 1e6}


# ---- the whole ----


async def measure(guest: agentguest.Guest, options: argparse.Namespace) -> Row:
    """Everything that needs the agent; its port is ours alone."""
    result: Row = {}
    loop = asyncio.get_running_loop()
    first = AgentClient(await Client.connect(guest.agent.dup()))
    await first.check(agentguest.PATIENCE_S)
    first.close()
    foot: Row = {}
    await asyncio.sleep(options.idle)
    foot["0 containers"] = guest.footprint()
    result["memory_kib"] = guest.memory()
    if not options.footprint_only:
        # A blocking client on the event loop's thread: nothing else runs.
        result["latency"] = round_trips(guest, options.calls)
    agent = AgentClient(await Client.connect(guest.agent))
    await agent.negotiate_features()
    await run(agent, "one", "sleep", "100000")
    await asyncio.sleep(options.idle)
    foot["1 container"] = guest.footprint()
    await run_exec(agent, 0)
    await asyncio.sleep(options.idle)
    foot["after 1 exec"] = guest.footprint()
    for number in range(1, 101):
        await run_exec(agent, number)
    await asyncio.sleep(options.idle)
    foot["after 101 execs"] = guest.footprint()
    for number in range(19):
        await run(agent, f"c{number}", "sleep", "100000")
    await asyncio.sleep(options.idle)
    foot["20 containers"] = guest.footprint()
    for number in range(19):
        await agent.signal(f"c{number}", "", 9)
        await agent.remove_container(f"c{number}")
    result["footprint_kib"] = foot
    result["growth_100_execs_kib"] = foot["after 101 execs"]["Anonymous"] - foot["after 1 exec"]["Anonymous"]
    if options.footprint_only:
        return result
    result["parallel"] = await blocked(agent, options.calls // 3)
    size = options.megabytes << 20
    speeds: dict[str, list[dict[str, float]]] = {"raw": [], "raw + pipe": [], "direct": [], "calls": []}
    features = agent.features
    for number in range(options.rounds):
        for name, piped in (("raw", False), ("raw + pipe", True)):
            speeds[name].append(await loop.run_in_executor(None, raw_throughput, guest, size, piped))
        for name, has in (("direct", features), ("calls", features - {FEATURE})):
            agent.features = frozenset(has)
            speeds[name].append(await container_throughput(agent, size, f"{name}{number}"))
    rows: Row = {}
    for name, found in speeds.items():
        rows[name] = {
            way: round(statistics.median(one[way] for one in found), 1) for way in ("stdout", "stdin")
        }
    for way in ("stdout", "stdin"):
        for beside in ("raw", "raw + pipe"):
            rows["direct"][f"{way}_to_{beside}"] = round(rows["direct"][way] / rows[beside][way], 2)
    result["throughput_mb_s"] = rows
    return result


def show(result: Row) -> None:
    """Print it for people."""
    print(__doc__)
    print(f"accelerator {result['accelerator']}, {result['idle_s']} s idle before each footprint\n")
    print("sizes in bytes: " + ", ".join(f"{name} {size}" for name, size in result["bytes"].items()))
    print(
        "\nfootprint, KiB  "
        + "".join(f"{name:>15}" for name in ("processes", "anonymous", "resident", "private dirty"))
    )
    for name, row in result["footprint_kib"].items():
        print(
            f"  {name:20}{row['processes']:>9}{row['Anonymous']:>15}{row['Rss']:>15}{row['Private_Dirty']:>15}"
        )
    print(f"  growth of anonymous memory over 100 execs: {result['growth_100_execs_kib']} KiB (at most 16)")
    memory = result["memory_kib"]
    print("\nguest at idle, KiB: " + ", ".join(f"{name} {value}" for name, value in memory.items()))
    print(f"  in use (MemTotal - MemAvailable): {memory['MemTotal'] - memory['MemAvailable']}")
    for title, key in (("round trip", "latency"), ("empty call beside waiting ones", "parallel")):
        if key in result:
            print(f"\n{title}, us")
            for name, row in result[key].items():
                print(f"  {name:26}" + ", ".join(f"{what} {value}" for what, value in row.items()))
    if "throughput_mb_s" in result:
        print("\nthroughput, MB/s")
        for name, row in result["throughput_mb_s"].items():
            print(f"  {name:14}" + ", ".join(f"{what} {value}" for what, value in row.items()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Footprint, latency and throughput of the agent.")
    parser.add_argument(
        "--idle", type=float, default=2.0, help="seconds before a footprint is taken (default %(default)s)"
    )
    parser.add_argument(
        "--calls", type=int, default=3000, help="empty calls per figure (default %(default)s)"
    )
    parser.add_argument("--megabytes", type=int, default=64, help="per throughput (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the throughputs (default %(default)s)")
    parser.add_argument("--memory", type=int, default=256, help="MiB of the guest (default %(default)s)")
    parser.add_argument("--footprint-only", action="store_true", help="no speeds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("error: virtual machines need root for now\nhint: sudo bench/agent")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the guest ends with us
    guest_dir = Path(paths.guest_dir())
    chosen = accel.choose(os.environ.get(accel.VARIABLE, "")).accel
    assets = manifest.load(str(guest_dir))
    rootfs = resolve(f"oci:{ROOT / 'build/images/busybox'}").rootfs_path
    result: Row = {
        "accelerator": chosen,
        "idle_s": options.idle,
        "bytes": {
            "agent": os.path.getsize(paths.agent_binary()),
            "initrd": os.path.getsize(assets.initrd),
            "kernel": os.path.getsize(assets.kernel),
        },
    }
    guest = agentguest.Guest(guest_dir, rootfs, chosen, options.memory)
    try:
        result |= asyncio.run(measure(guest, options))
    except OSError as error:
        raise SystemExit(f"error: the guest is gone: {error}") from error
    finally:
        guest.close()
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


if __name__ == "__main__":
    main()
