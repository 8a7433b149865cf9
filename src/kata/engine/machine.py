"""What every door tells an engine of the machine to start: its size, its accelerator, and the guest in it."""

from __future__ import annotations

import os

from .. import paths
from ..errors import UsageError
from ..guest import manifest
from ..hypervisor import accel
from ..resources import sizing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BOOT_TIMEOUT = "KATA_BOOT_TIMEOUT"
"""Variable with the seconds that a guest may take to come up; the engine has a default."""
SHARED_FS = "KATA_SHARED_FS"
"""Variable that says how files of the host reach the guest: ``virtio-fs``, ``virtio-9p``, or whichever there is."""
EXTENSIONS = "KATA_GUEST_EXTENSIONS"
"""Variable with the names of what the guest gets behind its initrd, separated by commas."""


def settings(cpus: float | None, memory: int | None) -> tuple[dict[str, Any], str]:
    """The keys of ``sandbox.json`` that are about the machine.

    Args:
        cpus: Number of CPUs that were asked for, or None.
        memory: Bytes, or None.

    Returns:
        The keys, and a sentence that the user should see once (that there is only software emulation), or nothing.

    Raises:
        GuestAssetError: There is no guest to boot, or it lacks an extension.
        UsageError: More CPUs than the host has, or a variable is malformed.
        ResourceExhaustedError: More memory than the host has.
    """
    guest = manifest.load(paths.guest_dir())
    size = sizing.plan(cpus, memory, guest.kernel_kind)
    choice = accel.choose()
    found = {
        "hypervisor": {
            "accel": choice.accel,
            "kernel": guest.kernel,
            "initrd": guest.initrd,
            "extensions": [guest.extension(name) for name in _extensions()],
            "ready_s": boot_timeout(),
            "shared_fs": shared_fs(),
        },
        "vcpus": size.vcpus,
        "memory_mib": size.memory_mib,
    }
    return found, choice.reason if choice.accel == "tcg" else ""


def _extensions() -> list[str]:
    return [name.strip() for name in os.environ.get(EXTENSIONS, "").split(",") if name.strip()]


def shared_fs() -> str:
    """``virtio-fs``, ``virtio-9p``, or nothing: virtio-fs where the host has its program.

    Raises:
        UsageError: The variable says something else.
    """
    wanted = os.environ.get(SHARED_FS, "")
    if wanted not in ("", "virtio-fs", "virtio-9p"):
        raise UsageError(f"{SHARED_FS} is {wanted!r}", "It may be virtio-fs or virtio-9p.")
    return wanted


def boot_timeout() -> int:
    """Seconds that a guest may take to come up; 0 is the engine's default.

    Raises:
        UsageError: The variable is no number of seconds.
    """
    text = os.environ.get(BOOT_TIMEOUT) or "0"
    if not (text.isdecimal() and len(text) < 6):
        raise UsageError(f"{BOOT_TIMEOUT} is {text!r}, which is no number of seconds", "For example 120.")
    return int(text)
