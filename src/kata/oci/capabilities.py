"""Linux capabilities as the `kata` command grants them.

Names are those of capabilities(7), with the ``CAP_`` prefix. Users may leave the prefix out and write either case, as
with Docker and Podman.
"""

from __future__ import annotations

from kata.errors import UsageError

DEFAULT = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""Capabilities of a container when no option changes them: Docker's default set."""

ALL = (
    *DEFAULT,
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_DAC_READ_SEARCH",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_NET_ADMIN",
    "CAP_NET_BROADCAST",
    "CAP_PERFMON",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
)
"""Every capability of Linux 5.9 to 6.x."""


def normalise(name: str) -> str:
    """Return the kernel's name for a capability as a user wrote it (``net_admin``, ``CAP_NET_ADMIN``).

    Raises:
        UsageError: There is no such capability.
    """
    full = name.upper()
    if not full.startswith("CAP_"):
        full = "CAP_" + full
    if full not in ALL:
        raise UsageError(
            f"unknown capability {name!r}", "see capabilities(7) for the names; 'ALL' stands for every one"
        )
    return full


def resolve(add: list[str], drop: list[str], *, privileged: bool = False) -> list[str]:
    """Apply ``--cap-add`` and ``--cap-drop`` to the default set.

    ``ALL`` in *drop* empties the set before anything is added, ``ALL`` in *add* fills it before anything is
    dropped; otherwise a name in both lists ends up dropped. This is Docker's order.

    Returns:
        Sorted kernel names.

    Raises:
        UsageError: A name is unknown.
    """
    if privileged:
        return sorted(ALL)
    adds = [normalise(name) for name in add if name.upper() != "ALL"]
    drops = {normalise(name) for name in drop if name.upper() != "ALL"}
    add_all = any(name.upper() == "ALL" for name in add)
    drop_all = any(name.upper() == "ALL" for name in drop)
    granted = set(ALL) if add_all else set() if drop_all else set(DEFAULT)
    granted.update(adds)
    return sorted(granted - drops)
