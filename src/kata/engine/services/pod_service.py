"""containerd's Sandbox API (``containerd.runtime.sandbox.v1.Sandbox``): a pod without a container of its own.

The sandbox's machine is the pod. It is started by CreateSandbox, which is the first to say of which network namespace
and how large. The containers come by the Task API, as with any other pod.
"""

from __future__ import annotations

import json
import platform
import time

from kata.engine.containers.process import KILLED
from kata.engine.containers.process_end import timestamp
from kata.engine.lifecycle import pod
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.engine.services import stats
from kata.engine.services.sandbox_service import describe
from kata.errors import NotFoundError, StateError
from kata.proto import google_pb
from kata.proto import podsandbox_pb as pb
from kata.ttrpc.server import finish

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from typing import Protocol

    from kata.engine.access import MachineControl
    from kata.engine.services.sandbox_service import DescribedSandbox
    from kata.ttrpc.server import Context

    class PodMachine(MachineControl, Protocol):
        """A machine that can be started and stopped on request."""

        async def stop(self) -> None:
            """End the machine; the engine goes on answering."""

        async def wait_terminated(self) -> None:
            """Return when there is no machine any more."""

    class PodSandbox(DescribedSandbox, Protocol):
        """What the Sandbox API takes of a sandbox: its machine and its states."""

        @property
        def runtime(self) -> PodMachine:
            """The machine."""

        @property
        def ended(self) -> asyncio.Event:
            """Is set when nothing of the sandbox is left but this process."""

        def power_on(self) -> None:
            """Start the machine that the settings describe."""

        async def network_up(self) -> None:
            """Return when the guest's network is as it should be."""

        def end(self) -> None:
            """End the sandbox."""


SERVICE = "containerd.runtime.sandbox.v1.Sandbox"
_READY, _NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class PodService:
    """The handlers.

    Args:
        sandbox: What they act on.
    """

    def __init__(self, sandbox: PodSandbox) -> None:
        self._sandbox = sandbox

    def _check(self, sandbox_id: str) -> PodSandbox:
        if sandbox_id != self._sandbox.id:
            raise NotFoundError(f"sandbox {sandbox_id!r} is not served here, but {self._sandbox.id!r}")
        return self._sandbox

    @finish
    async def CreateSandbox(
        self, request: pb.CreateSandboxRequest, context: Context
    ) -> pb.CreateSandboxResponse:
        sandbox = self._check(request.sandbox_id)
        if sandbox.life.state is not SandboxState.NEW:
            raise StateError(f"sandbox {sandbox.id!r} has been created already, or is ending")
        pod.describe(sandbox.settings, request)
        # Blocks, and has to: hypervisor and namespaces are the main thread's, before there is any other.
        sandbox.power_on()
        return pb.CreateSandboxResponse()

    async def StartSandbox(
        self, request: pb.StartSandboxRequest, context: Context
    ) -> pb.StartSandboxResponse:
        sandbox = self._running(request.sandbox_id)
        await sandbox.runtime.ready()
        await sandbox.network_up()
        return pb.StartSandboxResponse(
            pid=sandbox.runtime.host_pid, created_at=timestamp(sandbox.life.created_ns)
        )

    def _running(self, sandbox_id: str) -> PodSandbox:
        sandbox = self._check(sandbox_id)
        if not sandbox.life.created_ns:
            raise StateError(f"sandbox {sandbox_id!r} has not been created")
        return sandbox

    async def Platform(self, request: pb.PlatformRequest, context: Context) -> pb.PlatformResponse:
        self._check(request.sandbox_id)
        machine = platform.machine()
        about = pb.GuestPlatform(os="linux", architecture=_ARCHITECTURES.get(machine, machine))
        return pb.PlatformResponse(platform=about)

    @finish
    async def StopSandbox(self, request: pb.StopSandboxRequest, context: Context) -> pb.StopSandboxResponse:
        sandbox = self._check(request.sandbox_id)
        if sandbox.life.created_ns and not sandbox.runtime.is_lost:
            await sandbox.runtime.stop()
        return pb.StopSandboxResponse()

    async def WaitSandbox(self, request: pb.WaitSandboxRequest, context: Context) -> pb.WaitSandboxResponse:
        sandbox = self._running(request.sandbox_id)
        await sandbox.runtime.wait_terminated()
        status = 0 if sandbox.life.exit_state is SandboxState.STOPPED else KILLED
        return pb.WaitSandboxResponse(exit_status=status, exited_at=timestamp(sandbox.life.exited_ns))

    async def SandboxStatus(
        self, request: pb.SandboxStatusRequest, context: Context
    ) -> pb.SandboxStatusResponse:
        sandbox = self._check(request.sandbox_id)
        lives = bool(sandbox.life.created_ns) and not sandbox.runtime.is_lost
        info = {"info": json.dumps(await describe(sandbox))} if request.verbose else {}
        return pb.SandboxStatusResponse(
            sandbox_id=sandbox.id,
            pid=sandbox.runtime.host_pid,
            state=_READY if lives else _NOT_READY,
            info=info,
            created_at=timestamp(sandbox.life.created_ns),
            exited_at=timestamp(sandbox.life.exited_ns),
        )

    async def PingSandbox(self, request: pb.PingRequest, context: Context) -> pb.PingResponse:
        sandbox = self._running(request.sandbox_id)
        if sandbox.runtime.is_lost:
            raise StateError(f"sandbox {sandbox.id!r} has ended: {sandbox.life.lost_reason}")
        return pb.PingResponse()

    @finish
    async def ShutdownSandbox(
        self, request: pb.ShutdownSandboxRequest, context: Context
    ) -> pb.ShutdownSandboxResponse:
        sandbox = self._check(request.sandbox_id)
        sandbox.end()
        await sandbox.ended.wait()
        return pb.ShutdownSandboxResponse()

    async def SandboxMetrics(
        self, request: pb.SandboxMetricsRequest, context: Context
    ) -> pb.SandboxMetricsResponse:
        sandbox = self._running(request.sandbox_id)
        cgroup = sandbox.runtime.machine.cgroup
        if sandbox.runtime.is_lost or cgroup is None:
            raise NotFoundError(f"no statistics: sandbox {sandbox.id!r} has ended")
        cpu_ns, memory = cgroup.usage()
        now = time.time_ns()
        return pb.SandboxMetricsResponse(
            metrics=pb.Metric(
                timestamp=google_pb.Timestamp(seconds=now // 10**9, nanos=now % 10**9),
                id=sandbox.id,
                data=stats.of_host(cpu_ns, memory, shape_v2=stats.host_has_v2()),
            )
        )
