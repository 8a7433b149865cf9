"""The files in /etc that a container without an outer runtime gets, as with Docker."""

from __future__ import annotations

import asyncio
import os

from kata.engine.containers import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine.access import EtcAccess
    from kata.engine.containers.binds import ContainerMounts


def name_servers(config: dict[str, Any], lines: list[str]) -> list[str]:
    """The addresses of a container's name servers. Blocks.

    Args:
        config: Its specification.
        lines: Of the resolv.conf that it has where it brings none of its own.
    """
    from kata.network import resolver

    for mount in config.get("mounts") or ():
        if os.path.normpath(str(mount.get("destination"))) == resolver.RESOLV_CONF:
            # What the guest writes there counts as what its client has written.
            return resolver.read((str(mount.get("source") or ""),)).servers
    return resolver.parse("\n".join(lines)).servers


class EtcFiles:
    """The files in /etc that a container without an outer runtime gets, as with Docker.

    Args:
        sandbox: Its network is in them.
        config: The container's spec; its host name.
        container_id: The container.
        shared: Carries them where there is a share; otherwise the agent writes them.

    Attributes:
        mounts: Destination in the container -> path in the guest.
    """

    __slots__ = ("_contents", "_sandbox", "_shared", "mounts")

    def __init__(
        self, sandbox: EtcAccess, config: dict[str, Any], container_id: str, shared: ContainerMounts
    ) -> None:
        self._sandbox = sandbox
        self._shared = shared
        self._contents: dict[str, bytes] = {}
        self.mounts: dict[str, str] = {}
        if not sandbox.settings.client.makes_etc_files:
            return
        hostname = config.get("hostname") or sandbox.settings.hostname or container_id[:12]
        hosts = (
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
            f"{sandbox.address or '127.0.1.1'}\t{hostname}\n"
        )
        for name, content in (("hostname", f"{hostname}\n"), ("hosts", hosts)):
            self._contents[f"{container_id}-{name}"] = content.encode()
            self.mounts[f"/etc/{name}"] = f"{spec.GUEST_SHARE}/{container_id}-{name}"
        if sandbox.dns:
            self.mounts["/etc/resolv.conf"] = spec.GUEST_RESOLV
        if sandbox.settings.pod is not None:
            self.mounts["/dev/shm"] = "/dev/shm"  # the guest's own is the pod's

    async def write(self, agent: AgentClient) -> None:
        """Bring them into the guest; before the container is made, which mounts them.

        Raises:
            KataError: One could not be written.
        """
        if self._sandbox.share is not None:
            for name, content in self._contents.items():
                await self._sandbox.run_blocking(self._shared.add_file, name, content)
            return
        await asyncio.gather(
            *(
                agent.copy_file(f"{spec.GUEST_SHARE}/{name}", content)
                for name, content in self._contents.items()
            )
        )
