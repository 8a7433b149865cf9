"""Which pod a sandbox is: its name, uid and namespace, asked of the container runtime's CRI socket.

A listing is made when a sandbox has come whose pod is not known, and never on a schedule: a pod's name, uid and
namespace do not change. It is made by a process of its own (`kata.monitor.cri_query`), since the gRPC library wakes up
once a second as long as a process lives (findings/grpcio-wakes-an-idle-process.sh), has eight threads and 10 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

USUAL_ENDPOINTS = (
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/k3s/containerd/containerd.sock",
)
"""Where container runtimes have their CRI sockets."""
DEADLINE_S = 10.0
"""Of one listing, the start of its process included."""
SETTLE_S = 0.5
"""How long after a sandbox has come its pod is asked for: several tend to come at once."""
AGAIN_S = 5.0
"""How long a listing that did not have all pods is good for."""
ATTEMPTS = 6
"""How many listings a sandbox may be missing in before it is taken for none of Kubernetes'."""
MAX_LISTING_BYTES = 16 << 20
_LOG = logging.getLogger("kata.monitor")


class Pods:
    """The pods of the node's sandboxes.

    Args:
        endpoints: Paths of CRI sockets.
    """

    def __init__(self, endpoints: Iterable[str]) -> None:
        self._endpoints = list(endpoints)
        self._known: dict[str, tuple[str, str, str]] = {}
        self._missing: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._asked = -AGAIN_S
        self._complaint = ""

    @property
    def busy(self) -> bool:
        """Whether a listing is going on."""
        return self._task is not None and not self._task.done()

    def of(self, sandbox_id: str) -> tuple[str, str, str] | None:
        """Uid, name and namespace of a sandbox's pod; absent while not known."""
        return self._known.get(sandbox_id)

    def labels(self, sandbox_id: str) -> list[tuple[str, str]]:
        """The labels that tell a sandbox."""
        labels = [("sandbox_id", sandbox_id)]
        if pod := self._known.get(sandbox_id):
            labels += zip(("cri_uid", "cri_name", "cri_namespace"), pod, strict=True)
        return labels

    def now_there(self, ids: Iterable[str]) -> None:
        """The sandboxes of the node are these: forget others, and ask for those whose pods are not known."""
        there = set(ids)
        self._known = {one: pod for one, pod in self._known.items() if one in there}
        missing = {one: self._missing.get(one, 0) for one in there if one not in self._known}
        fresh = missing.keys() - self._missing.keys()
        self._missing = missing
        if fresh:
            self._begin(SETTLE_S)

    def look_again(self) -> None:
        """Somebody wants to know now: ask once more if a pod is missing and the last listing is old."""
        if time.monotonic() - self._asked >= AGAIN_S:
            self._begin(0.0)

    async def close(self) -> None:
        """End a listing that is going on."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _begin(self, after_s: float) -> None:
        waiting = any(count < ATTEMPTS for count in self._missing.values())
        if waiting and not self.busy and any(map(os.path.exists, self._endpoints)):
            self._task = asyncio.create_task(self._list(after_s))

    async def _list(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._asked = time.monotonic()
        asked_for = set(self._missing)
        try:
            pods, problems = await _query([path for path in self._endpoints if os.path.exists(path)])
        except (OSError, ValueError, TimeoutError) as error:
            self._complain(str(error) or f"no answer within {DEADLINE_S:g} s")
            return
        self._complain("; ".join(problems))
        for one in asked_for & self._missing.keys():
            if one in pods:
                self._known[one] = pods[one]
                del self._missing[one]
            elif not problems:
                self._missing[one] += 1

    def _complain(self, text: str) -> None:
        if text and text != self._complaint:
            _LOG.warning("pods' names are not known: %s", text)
        self._complaint = text


async def _query(endpoints: list[str]) -> tuple[dict[str, tuple[str, str, str]], list[str]]:
    """Have a process of its own list the pods. Returns them, and what went wrong."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", program, "__cri", *endpoints),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PATH": os.environ.get("PATH", ""), "GRPC_VERBOSITY": "NONE"},
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert child.stdout is not None
            raw = bytearray()
            while chunk := await child.stdout.read(1 << 16):
                raw += chunk
                if len(raw) > MAX_LISTING_BYTES:
                    raise ValueError("the listing of pods is too large")
            await child.wait()
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if child.returncode:
        raise ValueError(f"the listing of pods ended with status {child.returncode}")
    found = json.loads(raw)
    pods = {str(one): (str(uid), str(name), str(space)) for one, (uid, name, space) in found["pods"].items()}
    return pods, [str(one) for one in found["problems"]]
