"""What QEMU was started with, for reports: its arguments, and which of them may be shown."""

from __future__ import annotations

import os

_MOST_BYTES = 1 << 20
NAME = "qemu.args"
"""File in the sandbox's directory with QEMU's arguments, each with a final zero."""
_HARMLESS = frozenset(
    {
        *(
            "-name",
            "-machine",
            "-accel",
            "-cpu",
            "-smp",
            "-m",
            "-global",
            "-bios",
            "-fw_cfg",
            "-kernel",
            "-initrd",
        ),
        *("-sandbox", "-chardev", "-mon", "-device", "-fsdev", "-object", "-add-fd", "-blockdev", "-netdev"),
        *("-display", "-run-with", "-rtc", "-icount", "-numa", "-msg", "-serial", "-parallel", "-vga"),
        *(
            "-no-user-config",
            "-nodefaults",
            "-no-reboot",
            "-no-hpet",
            "-no-acpi",
            "-overcommit",
            "-action",
            "-S",
        ),
    }
)


def read(run_dir: str) -> list[tuple[str, str]]:
    """See `kata.hypervisor.protocols.Monitor.arguments`."""
    fd = os.open(os.path.join(run_dir, NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        words = file.read(_MOST_BYTES).decode("utf-8", "backslashreplace").split("\0")
    found = [(words[0], "plain")]
    option = ""
    for word in words[1:]:
        if word.startswith("-"):
            option = word
            found.append((word, "plain" if word in _HARMLESS or word == "-append" else "unknown"))
        elif word:
            known = "plain" if option in _HARMLESS else "unknown"
            found.append((word, "parameters" if option == "-append" else known))
    return found
