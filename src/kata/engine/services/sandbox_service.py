"""The engine's second service (``kata.sandbox.v1.Sandbox``): what the Task API has no words for."""

from __future__ import annotations

import json
import os

from kata.agent.client import ASK_S, LAYERS, Encoded
from kata.agent.text import escape_line
from kata.engine.containers import rootfs
from kata.engine.containers.process import CREATED
from kata.engine.standard_streams.stdio import parse_stdio
from kata.errors import KataError, StateError, UnsupportedError, UsageError
from kata.proto import agentext_pb, google_pb, sandbox_pb
from kata.ttrpc.server import finish

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import Any, Protocol

    from kata.engine.access import MachineControl
    from kata.engine.containers.container import Container
    from kata.engine.forwarding.guestnet import GuestNetwork
    from kata.engine.lifecycle.resize import MachineResizer
    from kata.engine.lifecycle.sandbox_state import Lifecycle
    from kata.engine.timings import Timings
    from kata.proto.codec import Message
    from kata.settings import SandboxSettings
    from kata.ttrpc.server import Context

    class DescribedSandbox(Protocol):
        """What a description of a sandbox is made of."""

        id: str
        settings: SandboxSettings
        resizer: MachineResizer
        timings: Timings

        @property
        def containers(self) -> Mapping[str, Container]:
            """By their ids."""

        @property
        def runtime(self) -> MachineControl:
            """The machine."""

        @property
        def life(self) -> Lifecycle:
            """The state."""

    class ServedSandbox(DescribedSandbox, Protocol):
        """What this service takes of a sandbox."""

        guest_network: GuestNetwork

        def container(self, container_id: str, *, may_come: bool = False) -> Container:
            """The container with this id."""

        def discard(self, removed: str = "") -> None:
            """End the sandbox, with what was written; and remove the container of this name."""


SERVICE = "kata.sandbox.v1.Sandbox"
_FILES = "kata.agent.v1.Files"
_PROCESSES = "kata.agent.v1.Processes"
_FILE_CALL_S = 120.0
_DETAILS_S = 5.0
"""How long a description waits for what the agent says of itself; without it, it is complete but for that."""


def _of_files(method: str) -> Callable[..., Awaitable[Message]]:
    """The handler that passes a call of the agent's Files service on."""

    async def handler(service: SandboxService, request: Any, context: Context) -> Message:
        return await service._forward(request.container_id, _FILES, method, request, _FILE_CALL_S)

    return handler


class SandboxService:
    """The handlers.

    Args:
        sandbox: What they act on.
    """

    def __init__(self, sandbox: ServedSandbox) -> None:
        self._sandbox = sandbox

    async def Attach(self, request: sandbox_pb.AttachRequest, context: Context) -> google_pb.Empty:
        process = self._sandbox.container(request.id).process(request.exec_id)
        if process.streams is None or not (process.alive or process.state == CREATED):
            raise StateError(f"cannot attach to a {process.state} process: {process.label}")
        own = self._sandbox.settings.container
        closes = own is not None and own.stdin_once
        process.streams.attach(
            parse_stdio(False, request.stdin, request.stdout, request.stderr), closes=closes
        )
        return google_pb.Empty()

    async def _forward(
        self, container_id: str, service: str, method: str, request: Message, timeout_s: float
    ) -> Message:
        """Pass a request about a container on to the agent, which answers in the same words."""
        self._sandbox.container(container_id)
        agent = await self._sandbox.runtime.ready()
        _, answer = agentext_pb.SERVICES[service][method]
        return await agent.call(service, method, request, answer, timeout_s)

    # ---- files: passed on to the agent, which resolves every path inside the container's root ----

    Stat = _of_files("Stat")
    List = _of_files("List")
    Read = _of_files("Read")
    Write = finish(_of_files("Write"))
    Mkdir = finish(_of_files("Mkdir"))
    Symlink = finish(_of_files("Symlink"))
    Link = finish(_of_files("Link"))
    Node = finish(_of_files("Node"))
    Remove = finish(_of_files("Remove"))
    Sync = _of_files("Sync")

    async def ReadLayer(self, request: sandbox_pb.ReadLayerRequest, context: Context) -> Message:
        self._sandbox.container(request.id)
        own = self._sandbox.settings.container
        shared = own is not None and own.rootfs is not None and own.rootfs.kind == "share"
        directories = {
            "root": rootfs.path(request.id),
            "image": rootfs.lower_path(request.id, shared=shared),
            "written": rootfs.upper_path(request.id),
        }
        if request.layer not in directories:
            raise UsageError(
                f"there is no layer {request.layer!r} of a container", f"one of {', '.join(directories)}"
            )
        agent = await self._sandbox.runtime.ready()
        if LAYERS not in agent.features:
            raise UnsupportedError("this guest's agent cannot read a container's layers", "kata guest build")
        return await agent.read_layer(
            directories[request.layer], request.next, _FILE_CALL_S, without_data=request.without_data
        )

    # ---- what can be learnt ----

    async def Processes(self, request: agentext_pb.ListProcessesRequest, context: Context) -> Message:
        return await self._forward(request.container_id, _PROCESSES, "List", request, ASK_S)

    async def Timings(
        self, request: sandbox_pb.TimingsRequest, context: Context
    ) -> sandbox_pb.TimingsResponse:
        steps = [
            sandbox_pb.Timing(name=name, start_ns=start, duration_ns=duration, part_of=step)
            for name, start, duration, step in self._sandbox.timings.whole()
        ]
        timings = self._sandbox.timings
        return sandbox_pb.TimingsResponse(timings=steps, path=timings.path, reason=timings.reason)

    async def Describe(
        self, request: sandbox_pb.DescribeRequest, context: Context
    ) -> sandbox_pb.DescribeResponse:
        return sandbox_pb.DescribeResponse(json=json.dumps(await describe(self._sandbox)))

    # ---- networks ----

    @finish
    async def ConnectNetwork(
        self, request: sandbox_pb.ConnectNetworkRequest, context: Context
    ) -> google_pb.Empty:
        from kata.settings import EndpointSettings

        await self._sandbox.guest_network.connect(
            EndpointSettings(
                network=request.network,
                path=request.path,
                namespace=request.namespace,
                address=request.address,
                prefix=request.prefix,
                address6=request.address6,
                prefix6=request.prefix6,
                mac=request.mac,
                names=request.names,
            )
        )
        return google_pb.Empty()

    @finish
    async def DisconnectNetwork(
        self, request: sandbox_pb.DisconnectNetworkRequest, context: Context
    ) -> google_pb.Empty:
        await self._sandbox.guest_network.disconnect(request.network)
        return google_pb.Empty()

    # ---- the end ----

    async def Discard(self, request: sandbox_pb.DiscardRequest, context: Context) -> google_pb.Empty:
        self._sandbox.discard(request.removed)
        if request.removed:
            await self._sandbox.life.ended.wait()
        return google_pb.Empty()

    # ---- for tools ----

    async def AgentCall(
        self, request: sandbox_pb.AgentCallRequest, context: Context
    ) -> sandbox_pb.AgentCallResponse:
        agent = await self._sandbox.runtime.ready()
        payload = Encoded(request.payload)
        answer = await agent.call(request.service, request.method, payload, Encoded, context.remaining())
        return sandbox_pb.AgentCallResponse(payload=answer.payload)


def _described(life: Lifecycle) -> str:
    """The state in the words of ``kata.sandbox.v1``."""
    return "ending" if life.is_ending else "lost" if life.is_lost else "running"


async def describe(sandbox: DescribedSandbox) -> dict[str, Any]:
    """The sandbox's facts, as JSON values."""
    settings = sandbox.settings
    described = settings.machine
    facts: dict[str, Any] = {
        "id": sandbox.id,
        "client": settings.client.name,
        "engine_pid": os.getpid(),
        "hypervisor": sandbox.runtime.machine.describe_monitor(),
        "hypervisor_pid": sandbox.runtime.vm.pid if sandbox.runtime.vm is not None else 0,
        "accelerator": described.hypervisor.accel if described else "",
        "agent_channel": sandbox.runtime.vm.channel.kind if sandbox.runtime.vm is not None else "",
        "kernel": described.guest.kernel if described else "",
        "initrd": described.guest.initrd if described else "",
        "host_cgroups": sandbox.runtime.machine.cgroup.paths
        if sandbox.runtime.machine.cgroup is not None
        else {},
        "vcpus": sandbox.resizer.vcpus,
        "memory_mib": sandbox.resizer.memory_mib,
        "sizing": sandbox.resizer.describe(),
        "configuration": described.configuration if described else {},
        "disks": [disk.to_plain() if disk else None for disk in settings.disks],
        "volumes": [volume.to_plain() for volume in settings.container.volumes]
        if settings.container
        else [],
        "network": settings.network.to_plain(),
        "state": _described(sandbox.life),
        "error": sandbox.life.lost_reason if sandbox.life.failed else "",
        "disk_error": sandbox.runtime.disk_error,
        "disk_errors": sandbox.runtime.disk_errors,
        "start": sandbox.timings.record(),
        "containers": {
            container.id: {
                "state": container.init.state,
                "error": container.init.error,
                "oom_killed": container.init.oom_killed,
                "execs": {one.exec_id: one.state for one in container.execs.values()},
            }
            for container in sandbox.containers.values()
        },
    }
    if sandbox.runtime.vm is not None:
        facts["hypervisor_usage"] = await sandbox.runtime.vm.metrics()
    agent = sandbox.runtime.living_agent
    if agent is not None and not sandbox.life.is_ending:
        try:
            details = (await agent.details(_DETAILS_S)).agent_details
        except KataError as error:
            facts["agent"] = {"error": escape_line(error.message)}
            return facts
        if details is not None:
            facts["agent"] = {
                "version": details.version,
                "extra_features": list(details.extra_features),
                "storage_handlers": list(details.storage_handlers),
                "seccomp": details.supports_seccomp,
            }
    return facts
