"""Where the sandbox of a containerd container lives on this host."""

from __future__ import annotations

import os

from kata import paths
from kata.engine.launch import SOCKET_NAME
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

ADDRESS_FILE = "address"
"""In every bundle: the address of the engine that serves it. containerd reads it when it restarts."""


def required(values: Mapping[str, str], name: str) -> str:
    """An option that containerd always gives.

    Raises:
        UsageError: It is missing.
    """
    value = values.get(name)
    if not value:
        raise UsageError(f"option -{name} is missing", "containerd executes this program")
    return value


def directory_name(namespace: str, container_id: str) -> str:
    """The name of a sandbox's run directory: an id is unique only within its namespace.

    Readable while its socket's path fits into a ``sockaddr_un``, else a digest.
    """
    name = f"{namespace}.{container_id}"
    path = os.path.join(paths.run_dir(), "sandboxes", name, SOCKET_NAME)
    if len(os.fsencode(path)) <= paths.MAX_SOCKET_PATH and name[0] not in "._-":
        return name
    import hashlib

    return "c-" + hashlib.sha256(name.encode()).hexdigest()[:32]
