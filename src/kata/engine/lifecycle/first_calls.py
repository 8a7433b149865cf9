"""The calls with which a guest is set up, and those of them that a machine is given before there is an event loop.

One that goes on from a template can answer long before the engine has loaded what it needs to wait for answers. So its
first calls are in the agent's channel by then, in their order, and the guest carries them out meanwhile.
"""

from __future__ import annotations

import os

from kata.engine.containers.spec import GUEST_SHARE
from kata.proto import agent_pb
from kata.ttrpc import frame
from kata.ttrpc.calls import encoded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from kata.engine.lifecycle.volumes import Share
    from kata.hypervisor.protocols import Started
    from kata.hypervisor.virtiofsd import FileServer
    from kata.network.user import NetworkPlan
    from kata.settings import SandboxSettings
    from kata.ttrpc.messages import Encodable

    class Machine(Protocol):
        """What of a machine decides on its guest; see `kata.engine.lifecycle.booted_machine.BootedMachine`."""

        started: Started | None
        share: Share | None
        files: FileServer | None
        network: NetworkPlan | None
        calls_made: dict[str, int]


AGENT = "grpc.AgentService"
SEED_BYTES = 512
READY_S = 60.0
"""How long a guest may take to answer, in seconds; it takes one, but a host may be busy, or itself an emulated machine.
The sandbox's settings may say otherwise (`kata.settings.GuestSettings`)."""
# Not nosuid: an image's sudo and ping work as they do elsewhere. (What the host exports is nosuid for the host itself.)
SHARE_MOUNT_OPTIONS = {
    "9p": ["trans=virtio", "version=9p2000.L", "nodev"],
    "virtio-fs": ["nodev"],
}
SHARE_MSIZE = 512000


def give(machine: Machine, settings: SandboxSettings) -> None:
    """Put the first calls into the channel of a machine that goes on from a template; their streams by method are in
    its ``calls_made`` then. Nothing is done where the channel is not there before the guest listens, or where calls
    are traced, which have to tell the agent so.
    """
    started = machine.started
    if started is None or settings.described().tracing is not None:
        return
    ready_s = settings.described().guest.ready_s or READY_S
    calls: list[tuple[str, Encodable]] = [
        # Before anything else draws from what it has of its template's.
        ("ReseedRandomDev", agent_pb.ReseedRandomDevRequest(data=os.urandom(SEED_BYTES))),
        ("GetGuestDetails", agent_pb.GuestDetailsRequest()),
        ("CreateSandbox", sandbox_request(machine, settings)),
    ]
    words, streams, number = b"", {}, 1
    for method, request in calls:
        words += frame.encode(number, frame.REQUEST, encoded(AGENT, method, request, ready_s))
        streams[method] = number
        number += 2  # a client's streams are odd
    if started.give_agent(words):
        machine.calls_made = streams


def sandbox_request(machine: Machine, settings: SandboxSettings) -> agent_pb.CreateSandboxRequest:
    """What CreateSandbox is asked for."""
    return agent_pb.CreateSandboxRequest(
        # A container without a name of its own has the host's, as with a runtime that shares the host's kernel.
        hostname=settings.hostname or os.uname().nodename,
        dns=dns(machine, settings),
        storages=_share(machine, settings),
        sandbox_id=settings.id,
        kernel_modules=[
            agent_pb.KernelModule(name=name, parameters=parameters)
            for name, *parameters in settings.described().guest.modules
        ],
    )


def dns(machine: Machine, settings: SandboxSettings) -> list[str]:
    """Lines of the guest's resolv.conf; empty without a network."""
    if settings.resolv_conf is not None:
        return settings.resolv_conf
    plan = machine.network
    return plan.resolv_conf().splitlines() if plan is not None else []


def _share(machine: Machine, settings: SandboxSettings) -> list[agent_pb.Storage]:
    """The mount of the sandbox's share in the guest, if there is one."""
    described = settings.described()
    if machine.share is None:
        return []
    kind = "9p" if machine.files is None else "virtio-fs"
    options = list(SHARE_MOUNT_OPTIONS[kind])
    if kind == "9p":
        options += [
            f"msize={described.share.msize or SHARE_MSIZE}",
            f"cache={cache_of_9p(described.guest.kernel_version)}",
        ]
    return [
        agent_pb.Storage(
            driver=kind,
            source=machine.started.share_tag if machine.started is not None else "",
            fstype=kind.replace("-", ""),
            options=options,
            mount_point=GUEST_SHARE,
        )
    ]


def cache_of_9p(kernel_version: str) -> str:
    """What a guest keeps of files that it has by 9p (the kernel's Documentation/filesystems/9p.rst).

    Until Linux 6.4 ``mmap`` keeps what is mapped and nothing else. From then on it is a cache with write-back that
    nothing invalidates: what others change is not seen, and what is written arrives late or, when the machine is
    killed, never. Without a cache all that is right, and shared writable mappings are refused.
    """
    numbers = [int(part) for part in kernel_version.split(".")[:2] if part.isdecimal()]
    return "mmap" if len(numbers) == 2 and numbers < [6, 4] else "none"
