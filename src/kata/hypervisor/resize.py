"""Growing and shrinking the memory of a running machine, by virtio-mem.

The guest takes part in it: it takes blocks of memory, or gives them back, as the device asks. What it does not do
within the patience is taken back, so that an error leaves the machine as it was.

Sources: virtio 1.2, 5.15; QEMU's ``hw/virtio/virtio-mem.c`` for the properties.
"""

from __future__ import annotations

import asyncio

from kata.errors import HypervisorError
from kata.hypervisor import slots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Monitor(Protocol):
        """What is needed of the machine."""

        async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any: ...


MIB = 1 << 20
PATIENCE_S = 20.0
SLACK_PATIENCE_S = 1.0
"""How long the guest may take to give back the rest that may stay."""
_POLL_S = 0.02
_PLUG_PATH = f"/machine/peripheral/{slots.PLUG_ID}"


async def set_memory(
    vm: Monitor, plugged_mib: int, slack_mib: int = 0, patience_s: float = PATIENCE_S
) -> int:
    """Have so much memory in the guest beside what it was started with.

    Args:
        vm: The machine.
        plugged_mib: How much; a multiple of `kata.hypervisor.settings.PLUG_MIB`.
        slack_mib: So much more may stay when memory is taken away: some blocks hold what the guest cannot move. It is
            asked for them all the same, and may give them back later.
        patience_s: How long the guest may take without anything moving.

    Returns:
        How much it has now.

    Raises:
        HypervisorError: The machine has no room for more, or the guest does not take it or let it go; nothing is
            changed then.
    """
    wanted = plugged_mib * MIB
    before = await _plugged(vm)
    try:
        await _request(vm, wanted)
    except HypervisorError as error:
        raise HypervisorError(
            f"the virtual machine cannot have {plugged_mib} MiB plugged into it: {error.message}"
        ) from None
    last = before
    quiet_s = 0.0
    while last != wanted and quiet_s < patience_s:
        if wanted < last <= wanted + slack_mib * MIB and quiet_s >= min(SLACK_PATIENCE_S, patience_s / 2):
            return last // MIB
        await asyncio.sleep(_POLL_S)
        now = await _plugged(vm)
        quiet_s = 0.0 if now != last else quiet_s + _POLL_S
        last = now
    if last != wanted:
        await _request(vm, before)
        verb = "take" if wanted > before else "give back"
        raise HypervisorError(
            f"the guest did not {verb} {abs(wanted - last) // MIB} of {abs(wanted - before) // MIB} MiB of memory",
            "What its kernel and processes use in place cannot be taken away." if wanted < before else "",
        )
    return last // MIB


async def _request(vm: Monitor, size: int) -> None:
    await vm.command("qom-set", {"path": _PLUG_PATH, "property": "requested-size", "value": size})


async def _plugged(vm: Monitor) -> int:
    return int(await vm.command("qom-get", {"path": _PLUG_PATH, "property": "size"}))
