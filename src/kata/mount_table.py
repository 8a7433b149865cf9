"""The mounts of a process, from the kernel's table (``/proc/PID/mountinfo``, proc(5))."""

from __future__ import annotations


class MountInfo:
    """One line of ``/proc/PID/mountinfo`` (proc(5))."""

    __slots__ = (
        *("device", "fstype", "mount_id", "options", "propagation", "root", "source", "super_options"),
        "target",
    )

    def __init__(
        self,
        mount_id: int,
        device: str,
        root: str,
        target: str,
        options: str,
        propagation: str,
        fstype: str,
        source: str,
        super_options: str = "",
    ) -> None:
        self.mount_id = mount_id
        self.device = device
        self.root = root
        self.target = target
        self.options = options
        self.propagation = propagation
        self.fstype = fstype
        self.source = source
        self.super_options = super_options


def _unescape(field: str) -> str:
    if "\\" not in field:
        return field
    parts = field.split("\\")
    text = parts[0]
    for part in parts[1:]:
        text += chr(int(part[:3], 8)) + part[3:]
    return text


def _escape(name: str) -> str:
    for char in "\\ \t\n":  # the backslash first: the others become one
        name = name.replace(char, f"\\{ord(char):03o}")
    return name


def _parse_mount(line: str) -> MountInfo:
    fields = line.rstrip("\n").split(" ")
    dash = fields.index("-", 6)
    return MountInfo(
        int(fields[0]),
        fields[2],
        _unescape(fields[3]),
        _unescape(fields[4]),
        fields[5],
        " ".join(fields[6:dash]),
        fields[dash + 1],
        _unescape(fields[dash + 2]) if len(fields) > dash + 2 else "",
        fields[dash + 3] if len(fields) > dash + 3 else "",
    )


def mounts(pid: int | str = "self") -> list[MountInfo]:
    """The mounts in a process's mount namespace, in the order of the kernel's list."""
    # The kernel escapes spaces, tabs, newlines and backslashes in names; other white space in names does not separate.
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        return [_parse_mount(line) for line in lines]


def mount_at(target: str) -> MountInfo | None:
    """The topmost mount at exactly this path in our mount namespace; None if there is none."""
    # Parsing every line of a long list takes ten times as long as reading it.
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        text = file.read()
    wanted = f" {_escape(target)} "
    end = len(text)
    while (at := text.rfind(wanted, 0, end)) >= 0:
        line = text[text.rfind("\n", 0, at) + 1 : text.index("\n", at)]
        found = _parse_mount(line)
        if found.target == target:  # otherwise the path is the root, or the source, of another mount
            return found
        end = at + len(wanted) - 1
    return None
