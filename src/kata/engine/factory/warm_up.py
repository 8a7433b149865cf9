"""A container that runs and goes in a machine before that waits for a sandbox, or is saved as a template.

Under software emulation the first container of a machine takes several times as long as the second: most of what the
guest's kernel and its agent do for it has yet to be translated. A machine that waits has done that before. One that is
saved keeps nothing that is translated, but what kernel and agent have made: threads, caches, the program of the device
rules. What runs is the agent's own program, which says its version: there is nothing of a sandbox in the machine yet,
nor of an image.

Afterwards nothing of it is there: no process, mount, file or cgroup (`tests/vm/test_pool_warm_up.py` looks). What it
has drawn from the kernel's random numbers is no secret, and they are seeded anew for the sandbox.
"""

from __future__ import annotations

import asyncio

from kata.agent.client import VERSION, AgentClient, create_request
from kata.engine.containers import rootfs, spec
from kata.errors import AgentError
from kata.oci import spec as oci_spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.proto.agent_pb import CreateContainerRequest

ID = "warm-up"
COMMAND = ["/proc/self/exe", "--version"]
"""Found in any root file system: it is the agent's own child that looks (`VERSION`)."""
MOST_S = 60.0
_OUTPUT_BYTES = 4096


def request(share_tag: str) -> CreateContainerRequest:
    """What the agent is asked for.

    Args:
        share_tag: Mount tag of the machine's share by virtio-fs; empty without one.
    """
    asked = oci_spec.Request(ID)
    asked.command = list(COMMAND)
    config = spec.for_guest(
        oci_spec.build(asked, {}),
        rootfs=rootfs.path(ID),
        bundle="",
        container_type="single_container",
        binds=[],
        files={},
        cgroups_path=f"/{ID}",
    )
    return create_request(ID, spec.to_message(config, []), rootfs.empty(ID, share_tag), [], no_stdin=True)


async def run(agent: AgentClient, share_tag: str) -> None:
    """Run it, and return when nothing of it is left.

    Args:
        agent: Of a machine that nobody has yet.
        share_tag: See `request`.

    Raises:
        KataError: It did not end as it should: the machine is of no use.
        TimeoutError: It took too long.
    """
    async with asyncio.timeout(MOST_S):
        await agent.negotiate_features()
        if VERSION not in agent.features:
            return  # that of another guest, which might take itself for the init of one
        await agent.create_container(request(share_tag))
        await agent.start_container(ID)
        status = await agent.wait(ID, ID)
        if status:
            raise AgentError(f"the container that runs before a machine waits ended with {status}")
        await agent.read(ID, ID, "stdout", _OUTPUT_BYTES)
        await agent.remove_container(ID)
