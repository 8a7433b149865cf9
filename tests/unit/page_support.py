"""A monitor without sandboxes behind it, which says what a test wants, and a browser to look at its page with.

`Node` answers what the monitor answers (docs/monitor.md), with the monitor's own headers and the page's own files.
Run as a program it plays a busy node: ``python tests/unit/page_support.py [SANDBOXES]``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

PATIENCE_S = 60.0
BEGIN = 1_795_834_800.0
"""A fixed time, 2026-11-28 03:00 UTC."""
MIB = 1 << 20
SECOND_S = 0.2
"""How soon the second sample of a stream comes after the first, so that a test does not wait for rates."""

Document = dict[str, Any]


def container(name: str, *, image: str = "docker.io/library/nginx:1.27", **more: Any) -> Document:
    """A container as the state document has it, with *more* in place of what it says of a quiet one."""
    return {
        "id": f"{name}-id",
        "name": name,
        "image": image,
        "state": "running",
        "error": "",
        "created": 0.0,
        "started": 0.0,
        "finished": None,
        "pid": 4711,
        "exit_code": None,
        "oom_killed": False,
        "oom_kills": 0,
        "cpu_seconds": 1.0,
        "throttled_seconds": 0.0,
        "throttled_periods": 0,
        "memory_bytes": 24 * MIB,
        "memory_limit_bytes": None,
        "pids": 3,
        "read_bytes": 5 * MIB,
        "written_bytes": MIB,
        "labels": {},
        **more,
    }


STEPS = (
    ("command", 0.0, 0.031),
    ("journal and socket", 0.031, 0.012),
    ("hypervisor", 0.043, 0.118),
    ("imports", 0.052, 0.094),
    ("guest kernel", 0.161, 0.392),
    ("agent", 0.553, 0.041),
    ("network", 0.594, 0.018),
    ("rootfs", 0.596, 0.037),
    ("container", 0.633, 0.088),
    ("start", 0.721, 0.024),
)


def sandbox(identity: str, *containers: Document, **more: Any) -> Document:
    """A state document with what the monitor adds to it, with *more* in place of what a quiet sandbox says."""
    return {
        "time": 0.0,
        "id": identity,
        "client": "kata",
        "namespace": "",
        "state": "ready",
        "error": "",
        "created": 0.0,
        "name": identity,
        "labels": {},
        "hypervisor": {
            "name": "qemu",
            "version": "8.2.1",
            "pid": 4700,
            "accelerator": "kvm",
            "channel": "vsock",
        },
        "vcpus": 2,
        "memory_bytes": 2048 * MIB,
        "host": {
            "cpu_seconds": 10.0,
            "memory_bytes": 212 * MIB,
            "processes": [
                _process("engine", 4699, 0.8, 31),
                _process("hypervisor", 4700, 9.0, 171),
                _process("virtiofsd", 4703, 0.2, 10),
            ],
        },
        "guest": {
            "memory_total_bytes": 2000 * MIB,
            "memory_available_bytes": 1700 * MIB,
            "memory_returned_bytes": 640 * MIB,
            "cpu_seconds": 8.0,
            "load1": 0.21,
        },
        "overhead": {"cpu_seconds": 2.0, "memory_bytes": 58 * MIB},
        "network": [
            {
                "interface": "eth0",
                "received_bytes": 83 * MIB,
                "received_packets": 61000,
                "sent_bytes": 12 * MIB,
                "sent_packets": 40000,
            }
        ],
        "disk_error": "",
        "disk_errors": 0,
        "containers": list(containers),
        "timings": [
            {"name": step, "start_seconds": start, "duration_seconds": took} for step, start, took in STEPS
        ],
        "cri": None,
        "reachable": True,
        "problem": "",
        **more,
    }


def _process(role: str, pid: int, cpu_s: float, mib: int) -> Document:
    return {
        "role": role,
        "pid": pid,
        "cpu_seconds": cpu_s,
        "rss_bytes": mib * MIB,
        "pss_bytes": None,
        "threads": 4,
        "read_bytes": 9 * MIB,
        "written_bytes": 2 * MIB,
    }


class Node:
    """What a monitor would know.

    Attributes:
        tick: Called before each sample with the number of samples before it; changes the sandboxes.
        texts: What is answered for a path below ``/api/v1/sandboxes/``.
        watchers: How many streams are open.
        hurry: How many samples are said at once when somebody comes; none follows then.
        interval_s: Seconds between two samples, whatever a page asks for; absent, as it asks.
        requests: Method and path with query of each request, so that a test sees what a page asked for.
    """

    def __init__(self, *sandboxes: Document, name: str = "node-7") -> None:
        self.sandboxes = list(sandboxes)
        self.events: list[Document] = []
        self.name = name
        self.time: Callable[[], float] = time.time
        self.tick: Callable[[int], None] = lambda number: None
        self.texts: dict[str, str | tuple[int, str]] = {}
        self.watchers = 0
        self.most_watchers = 0
        self.samples = 0
        self.requests: list[str] = []
        self.refusing = False
        self.hurry = 0
        self.interval_s: float | None = None
        self._wake: list[asyncio.Queue[Document]] = []
        self._streams: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self.port = 0

    # ---- for tests ----

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self, port: int = 0) -> None:
        """Answer on loopback."""
        if not self._thread.is_alive():
            self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(port or self.port), self._loop).result(PATIENCE_S)

    def stop_answering(self) -> None:
        """End all connections, and refuse new ones, until `start`."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(PATIENCE_S)

    def close(self) -> None:
        self.stop_answering()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def happen(self, event: str, sandbox_id: str, **more: Any) -> None:
        """An event, told to all who watch."""
        one = {"time": stamp(self.time()), "event": event, "sandbox": sandbox_id, "client": "kata", **more}

        def tell() -> None:
            self.events.append(one)
            for queue in self._wake:
                queue.put_nowait(one)

        self._loop.call_soon_threadsafe(tell)

    # ---- the server ----

    async def _start(self, port: int) -> None:
        from kata.monitor.web import HEADERS, PAGE

        async def headers(request: web.Request, response: web.StreamResponse) -> None:
            response.headers.update(HEADERS)

        async def file(request: web.Request) -> web.StreamResponse:
            path = Path(PAGE) / request.match_info.get("file", "index.html")
            if not path.is_file():
                raise web.HTTPNotFound
            return web.FileResponse(path)

        application = web.Application(middlewares=[self._note])
        application.add_routes(
            [
                web.get("/api/v1/sandboxes", self._states),
                web.get("/api/v1/sandboxes/{id}/{what}", self._text),
                web.get("/api/v1/events", self._events),
                web.get("/api/v1/stream", self._stream),
                web.get("/", file),
                web.get("/{file:[A-Za-z0-9_.-]+}", file),
            ]
        )
        application.on_response_prepare.append(headers)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        for task in list(self._streams):
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path_qs}")
        answer: web.StreamResponse = await handler(request)
        return answer

    def snapshot(self) -> Document:
        """As ``/api/v1/sandboxes`` answers."""
        self.tick(self.samples)
        self.samples += 1
        now = self.time()
        for one in self.sandboxes:
            if one["reachable"]:
                one["time"] = now
        return {"time": now, "node": self.name, "version": "0.1.0", "sandboxes": self.sandboxes}

    async def _states(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.snapshot())

    async def _text(self, request: web.Request) -> web.StreamResponse:
        what = f"{request.match_info['id']}/{request.match_info['what']}"
        found = self.texts.get(f"{what}?{request.query.get('container', '')}", self.texts.get(what, ""))
        status, text = found if isinstance(found, tuple) else (200, found)
        body = text.encode("utf-8", "replace")
        return web.Response(body=body, status=status, content_type="text/plain", charset="utf-8")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"events": self.events[-int(request.query.get("limit", "200")) :]})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        if self.refusing:
            return web.json_response({"error": "too many watch already"}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        queue: asyncio.Queue[Document] = asyncio.Queue()
        self._wake.append(queue)
        self.watchers += 1
        self.most_watchers = max(self.most_watchers, self.watchers)
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        interval_s = self.interval_s or float(request.query["interval"])
        pause_s = min(SECOND_S, interval_s)
        due = 0.0
        try:
            for _ in range(self.hurry):
                await self._say(response, "snapshot", self.snapshot())
            while True:
                if time.monotonic() >= due and not self.hurry:
                    await self._say(response, "snapshot", self.snapshot())
                    due, pause_s = time.monotonic() + pause_s, interval_s
                with contextlib.suppress(TimeoutError):
                    one = await asyncio.wait_for(queue.get(), max(0.02, min(0.2, due - time.monotonic())))
                    await self._say(response, "life", one)
                if request.transport is None or request.transport.is_closing():
                    return response
        except (ConnectionError, asyncio.CancelledError):
            return response
        finally:
            self._streams.discard(task)
            self._wake.remove(queue)
            self.watchers -= 1

    async def _say(self, response: web.StreamResponse, name: str, value: Document) -> None:
        await response.write(f"event: {name}\ndata: {json.dumps(value)}\n\n".encode())


def stamp(at_s: float) -> str:
    """A point in time as events have it."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_s))
    return f"{whole}.{int(at_s % 1 * 1e9):09d}Z"


class Clock:
    """A time that goes on by one interval with each sample, so that pictures come out the same.

    Args:
        at_s: Its beginning.
        step_s: What a sample adds.
    """

    def __init__(self, at_s: float, step_s: float = 2.0) -> None:
        self.at_s = at_s
        self.step_s = step_s

    def __call__(self) -> float:
        return self.at_s


# ---- a node that is worth a look ----


def busy_node(clock: Clock, more: int = 0) -> Node:
    """A node with work on it, and with most that can be wrong.

    Args:
        clock: Its time, which goes on with each sample.
        more: How many further sandboxes there are.
    """
    begin = clock.at_s
    pods: list[tuple[str, str, list[tuple[str, str, float, int, int | None]]]] = [
        (
            "checkout-7d9f5c",
            "shop",
            [
                ("app", "registry.example/shop/checkout:4.2", 0.62, 300, 512),
                ("proxy", "registry.example/mesh/proxy:1.9", 0.08, 40, 64),
            ],
        ),
        ("search-0", "shop", [("search", "registry.example/shop/search:11", 1.31, 961, 1024)]),
        ("ingest-5b8c", "data", [("ingest", "registry.example/data/ingest:2026-11", 0.44, 180, 256)]),
        ("report-nightly", "data", [("report", "registry.example/data/report:7", 0.0, 90, 128)]),
        ("ci-runner-18", "ci", [("runner", "docker.io/library/debian:12", 1.92, 720, None)]),
        ("cache-0", "shop", [("redis", "docker.io/library/redis:7.4", 0.11, 212, 384)]),
    ]  # fmt: skip
    sandboxes: list[Document] = []
    plan: list[tuple[Document, float]] = []

    def add(one: Document, load: float, age_s: float) -> Document:
        one["created"] = begin - age_s
        for each in one["containers"]:
            each["created"] = begin - age_s + 0.6
            each["started"] = begin - age_s + 0.75
        sandboxes.append(one)
        plan.append((one, load))
        return one

    for place, (name, namespace, described) in enumerate(pods):
        containers = [
            container(
                each,
                image=image,
                memory_bytes=memory * MIB,
                memory_limit_bytes=limit and limit * MIB,
                load=load,
            )
            for each, image, load, memory, limit in described
        ]
        used = sum(memory for _, _, _, memory, _ in described)
        one = sandbox(
            f"{place:x}f3a91c0d27e4b58"[:12],
            *containers,
            name=described[0][0],
            client="containerd",
            namespace="k8s.io",
            cri={"uid": f"5e1c2a77-{place}b1d-4f0e-9a54-3d2f7c6e1b20", "name": name, "namespace": namespace},
            labels={"io.kubernetes.pod.namespace": namespace, "app": described[0][0]},
        )
        one["guest"]["memory_available_bytes"] = (2000 - used - 70) * MIB
        one["guest"]["memory_returned_bytes"] = (1400 - used) * MIB
        one["host"]["memory_bytes"] = (used + 131) * MIB
        one["overhead"]["memory_bytes"] = (52 + place * 3) * MIB
        add(one, sum(load for _, _, load, _, _ in described), 86400 * 3 + 7000 * place)
    sandboxes[2]["containers"][0]["oom_kills"] = 2
    sandboxes[3]["containers"][0] |= {
        "state": "stopped",
        "exit_code": 137,
        "oom_killed": True,
        "oom_kills": 1,
    }
    add(
        sandbox("b41c77ae90f2", container("web"), name="web", labels={"tier": "front"}),
        0.03,
        5220,
    )
    add(
        sandbox("77d0e1c4a3b9", container("shell", image="docker.io/library/busybox:latest"), name="shell"),
        0.0,
        340,
    )
    add(
        sandbox(
            "c20fd9ab6e11", name="batch-41", state="failed", error="the hypervisor was killed (signal 9)"
        ),
        0.0,
        410,
    )
    lost = add(sandbox("e9a3b07f5512", container("db"), name="db"), 0.2, 90000)
    new = add(sandbox("0a7be33d19c4", name="new", state="booting", timings=[]), 0.0, 1.2)
    for place in range(more):
        one = sandbox(f"{place:012x}", container("main"), container("side"), name=f"worker-{place}")
        one["cri"] = {"uid": f"uid-{place}", "name": f"worker-{place}", "namespace": "load"}
        add(one, 0.05 + place % 7 / 10, 600.0 + place * 37)

    node = Node(*sandboxes, name="node-7.example")
    node.time = clock

    def tick(number: int) -> None:
        clock.at_s += clock.step_s
        new["created"] = clock.at_s - 1.2
        for place, (one, load) in enumerate(plan):
            wave = 1 + 0.45 * math.sin(number / 6 + place) + 0.2 * math.sin(number / 2.3 + place * 2)
            step = load * wave * clock.step_s
            one["host"]["cpu_seconds"] += step * 1.1
            one["guest"]["cpu_seconds"] += step
            one["guest"]["memory_available_bytes"] += int(2 * MIB * math.sin(number / 5 + place))
            card = one["network"][0]
            card["received_bytes"] += int(load * wave * 900_000)
            card["sent_bytes"] += int(load * wave * 210_000)
            for each in one["containers"]:
                if each["state"] != "running":
                    continue
                each["cpu_seconds"] += each.get("load", load) * wave * clock.step_s
                each["read_bytes"] += int(load * 90_000 * max(0.0, wave - 0.8))
                each["written_bytes"] += int(load * wave * 260_000)
        sandboxes[4]["containers"][0]["throttled_seconds"] += 0.31 * clock.step_s
        if number == 30:
            lost.update({"reachable": False, "problem": "its engine does not answer within 3 s"})

    node.tick = tick
    events: tuple[tuple[str, str, int, Document], ...] = (
        ("sandbox.created", "0a7be33d19c4", -2, {"vcpus": 2, "memory_mib": 2048, "name": "new"}),
        ("sandbox.failed", "c20fd9ab6e11", -95, {"error": "the hypervisor was killed (signal 9)"}),
        ("container.oom", sandboxes[2]["id"], -130, {"container": "ingest-id"}),
        ("container.exited", sandboxes[3]["id"], -210, {"container": "report-id", "exit_code": 137}),
        ("container.oom", sandboxes[3]["id"], -210, {"container": "report-id"}),
        ("exec.exited", sandboxes[4]["id"], -260, {"container": "runner-id", "exec": "a1", "exit_code": 0}),
        ("exec.started", sandboxes[4]["id"], -290, {"container": "runner-id", "exec": "a1"}),
        ("container.started", "77d0e1c4a3b9", -339, {"container": "shell-id"}),
        ("container.created", "77d0e1c4a3b9", -339, {"container": "shell-id", "name": "shell", "image": "busybox"}),
        ("sandbox.ready", "77d0e1c4a3b9", -340, {}),
        ("sandbox.created", "77d0e1c4a3b9", -341, {"vcpus": 2, "memory_mib": 2048, "name": "shell"}),
    )  # fmt: skip
    for event, which, at, rest in reversed(events):
        node.events.append({"time": stamp(begin + at), "event": event, "sandbox": which, **rest})
    for one in sandboxes:
        node.texts[f"{one['id']}/console"] = CONSOLE
        node.texts[f"{one['id']}/logs"] = LOG
    return node


CONSOLE = """\
[    0.000000] Linux version 6.12.117 (kata) #1 SMP PREEMPT_DYNAMIC
[    0.000000] Command line: console=hvc0 panic=-1 quiet
[    0.021144] smpboot: Allowing 2 CPUs, 0 hotplug CPUs
[    0.091723] virtio_blk virtio2: [vda] 204800 512-byte logical blocks (105 MB/100 MiB)
[    0.143009] erofs (device vda): mounted with root inode @ nid 36.
[    0.201356] Run /init as init process
kata-agent 0.1.0: listening on vsock port 1024
kata-agent: container search: started, pid 118
"""
LOG = "".join(
    f"10.0.4.{17 + place % 9} - - [28/Nov/2026:03:{place // 60:02}:{place % 60:02} +0000]"
    f' "GET /v1/items?page={place} HTTP/1.1"'
    f" {200 if place % 13 else 502} {1200 + place * 37 % 900}\n"
    for place in range(240)
)


@contextlib.contextmanager
def serving(node: Node) -> Iterator[Node]:
    """The node, answering while the block runs."""
    node.start()
    try:
        yield node
    finally:
        node.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    with serving(busy_node(Clock(time.time()), int(sys.argv[1]) if len(sys.argv) > 1 else 0)) as one:
        print(one.url, flush=True)
        threading.Event().wait()
