"""The kinds of findings: how grave each is, and what it means. The machine says which; what is said of it is ours."""

from __future__ import annotations

HIGH, MEDIUM, LOW, NOTE = "high", "medium", "low", "note"
SEVERITIES = (HIGH, MEDIUM, LOW, NOTE)

KINDS: dict[str, tuple[str, str]] = {
    "malware": (HIGH, "a file that ClamAV has a signature of"),
    "secret": (HIGH, "text that looks like a key or a password"),
    "secret-in-configuration": (HIGH, "a password in the image's configuration or history"),
    "path-escape": (HIGH, "a member of a layer that tries to leave the root directory"),
    "archive-bomb": (HIGH, "a layer that was made to fill a disk"),
    "digest": (HIGH, "a layer that is not what the manifest says"),
    "bad-layer": (HIGH, "a layer that cannot be read to its end"),
    "bad-database": (MEDIUM, "a package database that cannot be read, or leaves packages out"),
    "hidden-database": (MEDIUM, "a package database that a later layer took away, and not its packages"),
    "limit": (MEDIUM, "the image is larger than what is read of it"),
    "entry-point": (MEDIUM, "the command of the image cannot run"),
    "preload": (HIGH, "a library that every program loads"),
    "account": (MEDIUM, "an account that nobody expects"),
    "device-node": (MEDIUM, "a device node"),
    "set-uid": (MEDIUM, "a program that runs as its owner"),
    "set-gid": (LOW, "a program that runs as its group"),
    "file-capability": (MEDIUM, "a program with capabilities of its own"),
    "world-writable": (MEDIUM, "a file or directory that everybody may write"),
    "odd-link": (MEDIUM, "a link to where none should lead"),
    "odd-name": (MEDIUM, "a name that deceives who reads it"),
    "odd-member": (MEDIUM, "a member of a layer that tools understand differently"),
    "odd-whiteout": (LOW, "a whiteout that tools understand differently"),
    "configuration": (LOW, "a configuration that does not fit what is there"),
    "special-file": (LOW, "a named pipe or a socket"),
    "elf-executable-stack": (MEDIUM, "a program or library whose stack can be executed"),
    "elf-run-path": (MEDIUM, "a program that loads libraries from where others may write"),
    "elf-no-pie": (LOW, "a program at a fixed address"),
    "elf-no-relro": (LOW, "a program whose relocations stay writable"),
    "elf-no-canary": (NOTE, "a program without a stack protector"),
}
"""Kind -> (severity, what it is)."""


def severity(kind: str) -> str:
    """How grave a kind of finding is; an unknown one is ``note``."""
    return KINDS.get(kind, (NOTE, ""))[0]


def meaning(kind: str) -> str:
    """What a kind of finding is."""
    return KINDS.get(kind, (NOTE, "a finding of a kind that this version does not know"))[1]
