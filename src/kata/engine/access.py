"""What parts of the engine need of a sandbox, and no more: the type that they take in place of the sandbox itself."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any, Protocol, TypeVar

    from kata.agent.client import AgentClient
    from kata.engine.lifecycle.booted_machine import BootedMachine
    from kata.engine.lifecycle.volumes import Share
    from kata.engine.standard_streams.logger import Logger
    from kata.errors import KataError
    from kata.hypervisor.protocols import Machine
    from kata.settings import SandboxSettings

    T = TypeVar("T")

    class HasConfig(Protocol):
        """A container, to those who ask for its specification only."""

        @property
        def config(self) -> dict[str, Any]:
            """Its OCI specification."""

    class MachineAccess(Protocol):
        """The virtual machine of a sandbox, which may not be there yet, or no longer (`MachineRuntime`)."""

        @property
        def vm(self) -> Machine | None:
            """The hypervisor, once there is one."""

        @property
        def machine(self) -> BootedMachine:
            """What the boot has made: the machine's capabilities, network, share, cgroups."""

        @property
        def is_lost(self) -> bool:
            """Whether there is no machine any more."""

        @property
        def living_agent(self) -> AgentClient | None:
            """The agent, if it can still be asked."""

        async def ready(self) -> AgentClient:
            """The agent, once the guest is up. Raises what kept it from that."""

        async def race_vm_exit(self, work: Awaitable[T], *, outlives_caller: bool = False) -> T:
            """Await *work*; the end of the machine ends it, with its reason (`Lifecycle.race_vm_exit`)."""

    class MachineControl(MachineAccess, Protocol):
        """The same for those who may have to end it, and report how it ended."""

        disk_error: str
        disk_errors: int

        @property
        def host_pid(self) -> int:
            """The host process that stands for the processes in the guest."""

        @property
        def lost_reason(self) -> str:
            """Why there is no machine any more; empty while there is."""

        def fail(self, reason: str) -> None:
            """Give the machine up: every live process ends as 137."""

        async def await_exit_reason(self, otherwise: str) -> KataError:
            """The agent is gone: why, or *otherwise*, for which the machine is given up then."""

    class StreamAccess(Protocol):
        """What opening a process's streams takes."""

        @property
        def settings(self) -> SandboxSettings:
            """What the client wants."""

        async def ready(self) -> AgentClient:
            """The agent, once the guest is up. Raises what kept it from that."""

        def start_logger(self, uri: str, container_id: str) -> Logger:
            """Start the logging program that a client wants a container's output to go to."""

    class EtcAccess(Protocol):
        """What the files in a container's /etc are made of, and how they get there."""

        @property
        def settings(self) -> SandboxSettings:
            """What the client wants."""

        @property
        def share(self) -> Share | None:
            """The directory that the guest sees, if there is one."""

        @property
        def address(self) -> str:
            """The guest's address; empty if it has none."""

        @property
        def dns(self) -> list[str]:
            """Lines of the guest's resolv.conf; empty without a network."""

        @property
        def run_blocking(self) -> Callable[..., Awaitable[None]]:
            """Runs something that blocks in the helper thread."""
