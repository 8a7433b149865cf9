"""Growing and shrinking the memory of a running machine: by virtio-mem beyond what it was started with, by its balloon
below that.

The guest takes part in it: it takes memory, or gives it back, as the device asks. What it does not take within the
patience is taken back, so that an error leaves the machine as it was; what it does not give back it keeps, and is not
asked for it any further.

Sources: virtio 1.2, 5.5 and 5.15; QEMU's ``hw/virtio/virtio-mem.c`` for the properties, ``qapi/machine.json`` for
``balloon`` and ``query-balloon``.
"""

from __future__ import annotations

from kata.hypervisor.qemu import slots
from kata.hypervisor.settle import MIB, PATIENCE_S, inflate, number, plug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Monitor(Protocol):
        """What is needed of the machine."""

        async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any: ...


_MEMORY_PATH = f"/machine/peripheral/{slots.MEMORY_ID}"


async def set_memory(vm: Monitor, plugged_mib: int, patience_s: float = PATIENCE_S) -> int:
    """Set how much memory the guest has in addition to what it was started with.

    Args:
        vm: The machine.
        plugged_mib: A multiple of `kata.hypervisor.base.MEMORY_STEP_MIB`.
        patience_s: How long the guest may go without plugging in a block before it is given up.

    Returns:
        MiB that are plugged in now: more than asked for where the guest does not release all of them.

    Raises:
        HypervisorError: The machine cannot grow that far, or the guest does not plug in all of it. Nothing is changed
            then.
    """

    async def request(size: int) -> None:
        await vm.command("qom-set", {"path": _MEMORY_PATH, "property": "requested-size", "value": size})

    async def plugged() -> int:
        return number(await vm.command("qom-get", {"path": _MEMORY_PATH, "property": "size"}))

    return await plug(plugged, request, plugged_mib, patience_s)


async def set_balloon(vm: Monitor, first_mib: int, returned_mib: int, patience_s: float = PATIENCE_S) -> int:
    """Set how much of the memory that it was started with the guest gives back: its ``MemTotal`` shrinks by that.

    Args:
        vm: The machine.
        first_mib: MiB that it was started with.
        returned_mib: MiB to give back.
        patience_s: How long the guest may make no progress in taking memory back before it is given up.

    Returns:
        MiB that it has given back: fewer than asked for where it cannot spare them.

    Raises:
        HypervisorError: QEMU refused, or the guest does not take back what it had given; nothing is changed then.
    """

    async def request(returned: int) -> None:
        await vm.command("balloon", {"value": first_mib * MIB - returned})

    async def returned() -> int:
        return first_mib * MIB - number(await vm.command("query-balloon"), "actual")

    return await inflate(returned, request, returned_mib, patience_s)
