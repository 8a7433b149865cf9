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
    from kata.settings import ContainerSettings


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


def resolv_conf(own: ContainerSettings, lines: list[str]) -> list[str]:
    """The lines of a container's resolv.conf: what its settings ask for, the rest as it is.

    Args:
        own: Its settings.
        lines: Of the resolv.conf of the guest.
    """
    wanted = [f"nameserver {server}" for server in own.dns_servers]
    if own.dns_searches and own.dns_searches != ["."]:
        wanted.append(f"search {' '.join(own.dns_searches)}")
    if own.dns_options:
        wanted.append(f"options {' '.join(own.dns_options)}")
    replaced = [
        *(["nameserver"] if own.dns_servers else []),
        *(["search", "domain"] if own.dns_searches else []),
        *(["options"] if own.dns_options else []),
    ]
    return [
        *(line for line in lines if line.split(maxsplit=1)[:1] not in [[one] for one in replaced]),
        *wanted,
    ]


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
        own = sandbox.settings.container if container_id == sandbox.settings.id else None
        if own is not None and own.extra_hosts:
            hosts += "\n".join(own.extra_hosts) + "\n"
        files = [("hostname", f"{hostname}\n"), ("hosts", hosts)]
        asks = own is not None and (own.dns_servers or own.dns_searches or own.dns_options)
        if own is not None and asks:
            files.append(("resolv.conf", "\n".join(resolv_conf(own, sandbox.dns)) + "\n"))
        for name, content in files:
            self._contents[f"{container_id}-{name}"] = content.encode()
            self.mounts[f"/etc/{name}"] = f"{spec.GUEST_SHARE}/{container_id}-{name}"
        if sandbox.dns and not asks:
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
