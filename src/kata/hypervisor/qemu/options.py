"""What of the configuration is QEMU's alone: program, firmware, machine type, and options that it is handed."""

from __future__ import annotations

import os

from kata.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

_ARGUMENT = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,=+-")
"""Characters of options that are handed to QEMU: none that could name a file."""
_FILES = (("path", "path"), ("firmware", "firmware"), ("entropy", "entropy_source"))
_TEXTS = (("machine_options", "machine_accelerators"), ("cpu_features", "cpu_features"))


def read(configuration: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
    """QEMU's options. See `kata.hypervisor.protocols.Monitor.options` for arguments, result and errors."""
    found: dict[str, Any] = {}
    for option, key in _FILES:
        path = configuration.get(key, "")
        if path and not os.path.exists(path):
            raise ConfigError(f"{origin(key)}: {key} {path} does not exist")
        if path:
            found[option] = path
    if configuration.get("seccompsandbox"):
        found["sandbox"] = configuration["seccompsandbox"]
    if configuration.get("disable_vhost_net"):
        found["vhost_net"] = False
    for option, key in _TEXTS:
        text = str(configuration.get(key, "")).strip(",")
        if not _ARGUMENT.issuperset(text):
            raise ConfigError(f"{origin(key)}: {key} {text!r} has characters that no option has")
        if text:
            found[option] = text
    machine = str(configuration.get("machine_type", ""))
    if machine:
        found["machine"] = _machine_type(machine, origin("machine_type"))
    return found


def _machine_type(text: str, origin: str) -> str:
    """*text*, if it is a machine on which our devices have their places.

    Raises:
        ConfigError: It is another.
    """
    if text in ("q35", "pc", "microvm") or text.startswith(("pc-q35-", "pc-i440fx-")):
        return text
    raise ConfigError(f"{origin}: there is no machine type {text!r} here", "q35, pc or microvm")
