"""What of the configuration is Firecracker's alone."""

from __future__ import annotations

import os

from kata.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def read(configuration: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
    """Its options. See `kata.hypervisor.protocols.Monitor.options` for arguments, result and errors."""
    path = configuration.get("path", "")
    if path and not os.path.exists(path):
        raise ConfigError(f"{origin('path')}: path {path} does not exist")
    return {"path": path} if path else {}
