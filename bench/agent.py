"""What the agent costs, and how quick it is, in a running guest; with the raw channel measured in the same run.

Footprint: summed over *all* processes of the agent's binary (helpers count), from ``/proc/*/smaps_rollup``, read by a
shell that runs beside the agent (`agentguest.py`), so that nothing that measures is on the agent's account.

Latency: an empty call (Health.Check) from a blocking client, beside the same number of bytes sent to and fro over a
second port of the same virtio-serial device behind which ``busybox cat`` reads and writes; by turns.

Throughput: ``busybox dd`` in a container writing to its stdout or reading its stdin, as the engine's client moves it;
beside the same ``dd`` on that second port.

Parallelism: Health.Check while 100 calls of WaitProcess and ReadStdout wait on the same connection.

Needs root, a guest, and the busybox image (``make setup``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
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
from kata.hypervisor import accel, slots  # noqa: E402
from kata.images import store  # noqa: E402
from kata.proto import agent_pb, health_pb, oci_pb  # noqa: E402
from kata.ttrpc.client import Client  # noqa: E402
from kata.ttrpc.sync_client import Client as BlockingClient  # noqa: E402

STATE = "/run/kata-containers"
PING = bytes(48)
"""As long as the frame of an empty call."""
PIECE = 1 << 16

Row = dict[str, Any]


def percentiles(seconds: list[float]) -> Row:
    """Median and 99th percentile in microseconds."""
    ordered = sorted(seconds)
    return {
        "p50_us": round(statistics.median(ordered) * 1e6, 1),
        "p99_us": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6, 1),
    }


# ---- latency ----


def round_trips(guest: agentguest.Guest, calls: int) -> Row:
    """Raw round trips and empty calls by turns, in blocks of 50."""
    guest.sh("cat 1<>$raw 0<&1 & echo $! >/tmp/echo")
    client = BlockingClient(guest.agent.dup())
    raw: list[float] = []
    empty: list[float] = []

    def ping() -> None:
        guest.raw.sendall(PING)
        left = len(PING)
        while left:
            left -= len(guest.raw.recv(left))

    def call() -> None:
        client.call(
            "grpc.Health", "Check", health_pb.CheckRequest(), health_pb.HealthCheckResponse, timeout=60
        )

    for number in range(calls // 50 + 1):
        for one, into in ((ping, raw), (call, empty)):
            for _ in range(50):
                began = time.perf_counter()
                one()
                if number:  # the first block warms up
                    into.append(time.perf_counter() - began)
    guest.sh("kill $(cat /tmp/echo)")
    rows = {"raw": percentiles(raw), "empty call": percentiles(empty)}
    for name in ("p50_us", "p99_us"):
        rows["empty call"][f"{name[:3]}_to_raw"] = round(rows["empty call"][name] / rows["raw"][name], 2)
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


def raw_throughput(guest: agentguest.Guest, size: int) -> dict[str, float]:
    """MB/s from and to the guest over the raw port."""
    count = size // PIECE
    guest.begin(f"dd if=/dev/zero bs={PIECE} count={count} 1<>$raw 2>/dev/null")
    began, left = 0.0, size
    while left:
        left -= len(guest.raw.recv(1 << 18))
        began = began or time.perf_counter()
    out = size / (time.perf_counter() - began) / 1e6
    guest.end("dd")
    guest.begin(f"dd of=/dev/null bs={PIECE} count={count} iflag=fullblock 0<>$raw 2>/dev/null")
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
    await agent.learn()
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
    speeds: dict[str, list[dict[str, float]]] = {"raw": [], "direct": [], "calls": []}
    features = agent.features
    for number in range(options.rounds):
        speeds["raw"].append(await loop.run_in_executor(None, raw_throughput, guest, size))
        for name, has in (("direct", features), ("calls", features - {FEATURE})):
            agent.features = frozenset(has)
            speeds[name].append(await container_throughput(agent, size, f"{name}{number}"))
    rows: Row = {}
    for name, found in speeds.items():
        rows[name] = {
            way: round(statistics.median(one[way] for one in found), 1) for way in ("stdout", "stdin")
        }
    for way in ("stdout", "stdin"):
        rows["direct"][f"{way}_to_raw"] = round(rows["direct"][way] / rows["raw"][way], 2)
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
                print(f"  {name:14}" + ", ".join(f"{what} {value}" for what, value in row.items()))
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
    rootfs = store.resolve(f"oci:{ROOT / 'build/images/busybox'}").rootfs_path
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
