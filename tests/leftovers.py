"""What the host has before and after the tests: a test that leaves something behind fails the run.

On a machine of one's own (CI sets ``CI=true``) every difference counts. Elsewhere other people's virtual
machines come and go meanwhile, so only that counts which can be traced to this run: by the directory that
all its paths are below, or by a variable in a process's environment.

Lanes that run beside each other (``KATA_TEST_BESIDE``) cannot tell what is new from what is the other's either. Who
starts them compares the host before and after all of them instead::

    python tests/leftovers.py before FILE
    python tests/leftovers.py since FILE    # a line for each leftover; status 1 if there are some
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MARK = "KATA_TEST_RUN"
"""Environment variable that a test run's processes inherit."""
BESIDE = "KATA_TEST_BESIDE"
"""Environment variable: another lane runs meanwhile, and who started both looks for what they left."""
_LAB = "KVM_LAB"
"""Environment variable: this is in the KVM lab."""
_ENDING_S = 10.0
"""An engine that is just ending is no leftover."""

_PROGRAMS = re.compile(
    r"qemu-system|passt|virtiofsd|containerd|dockerd|kata/__main__\.py|docker-registry|kata-agent"
)
_FILE_SYSTEMS = ("erofs", "overlay", "9p", "virtiofs", "fuse")


class Thing(NamedTuple):
    """One resource of the host: what sort, and what tells it from others of its sort."""

    sort: str
    name: str


class Ours(NamedTuple):
    """How this run's resources are told from others."""

    directory: str
    mark: str

    def in_text(self, text: str) -> bool:
        return self.directory in text or self.mark in text


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _links(directory: str) -> Iterator[str]:
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        try:
            yield os.readlink(f"{directory}/{name}")
        except OSError:
            continue


def _is_ours(pid: str, ours: Ours) -> bool:
    """Whether a process belongs to this run: by environment, arguments or open files."""
    if ours.mark in _read(f"/proc/{pid}/environ") or ours.in_text(_read(f"/proc/{pid}/cmdline")):
        return True
    return any(
        ours.directory in link for link in [*_links(f"/proc/{pid}/fd"), *_links(f"/proc/{pid}/cwd/..")]
    )


def _processes() -> Iterator[tuple[Thing, str]]:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        command = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
        stat = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        if not command or not stat or int(pid) == os.getpid():
            continue  # a kernel thread, a zombie, or gone
        yield Thing("process", f"{pid} (started {stat[19]}): {command[:160]}"), pid


def _mounts() -> Iterator[tuple[Thing, str]]:
    for line in _read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        yield Thing("mount", f"{before.split()[4]} ({after.split()[0]} from {after.split()[1]})"), line


def _names(sort: str, directory: str, pattern: str = "") -> Iterator[tuple[Thing, str]]:
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        if re.search(pattern, name):
            yield Thing(sort, f"{directory}/{name}"), name


def _cgroups() -> Iterator[tuple[Thing, str]]:
    for path, directories, _ in os.walk("/sys/fs/cgroup"):
        for name in directories:
            if "kata" in name:
                yield Thing("cgroup", f"{path}/{name}"), name


def _loops() -> Iterator[tuple[Thing, str]]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        backing = _read(str(path)).strip()
        yield Thing("loop device", f"{path.parts[3]} of {backing}"), backing


def snapshot() -> dict[Thing, str]:
    """Everything on the host of the sorts that kata makes, each with a text to look for traces in."""
    things: dict[Thing, str] = {}
    for source in (
        _processes(),
        _mounts(),
        _cgroups(),
        _loops(),
        _names("network interface", "/sys/class/net"),
        _names("network namespace", "/run/netns"),
        _names("sandbox", "/run/kata/sandboxes"),
        _names("container", "/var/lib/kata/containers"),
        _names("temporary file", "/tmp", r"kata|^kt-"),
        _names("shared memory", "/dev/shm", r"kata|qemu"),
    ):
        things.update(source)
    return things


def compare(before: dict[Thing, str], after: dict[Thing, str], ours: Ours, strict: bool) -> list[str]:
    """What is there now and was not before, and is this run's.

    Args:
        before: A `snapshot`.
        after: A later one.
        ours: How to tell this run's things.
        strict: Nobody else makes such things on this machine, so all that are new are this run's.

    Returns:
        A line for each.
    """
    found = []
    for thing, text in after.items():
        if thing in before:
            continue
        if thing.sort == "process":
            # Shells and compilers of whoever uses the machine are never ours; our programs may be.
            guilty = _is_ours(text, ours) or (strict and _PROGRAMS.search(thing.name) is not None)
        elif thing.sort == "mount":
            guilty = ours.in_text(text) or (
                strict and any(f"({kind}" in thing.name for kind in _FILE_SYSTEMS)
            )
        else:
            # Below the KVM lab's /tmp is that of the machine which it runs on, where others are at work.
            others = thing.sort == "temporary file" and _LAB in os.environ
            guilty = (strict and not others) or ours.in_text(text) or ours.in_text(thing.name)
        if guilty:
            found.append(f"{thing.sort} {thing.name}")
    return sorted(found)


def is_ours_alone() -> bool:
    """Whether everything that is new on this machine is this run's."""
    return os.environ.get("CI") == "true" and not os.environ.get(BESIDE)


def left_since(before: dict[Thing, str], ours: Ours, strict: bool) -> list[str]:
    """As `compare` with what is there now, once what is just ending has ended."""
    deadline = time.monotonic() + _ENDING_S
    while (left := compare(before, snapshot(), ours, strict)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def main(what: str, file: str) -> int:
    """What ``before`` and ``since`` do. On a machine that is not ours alone nothing counts: see each lane's own check.

    Returns:
        1 when something is left.
    """
    if what == "before":
        Path(file).write_text(json.dumps([*snapshot()]))
        return 0
    if not is_ours_alone():
        return 0
    before = {Thing(*thing): "" for thing in json.loads(Path(file).read_text())}
    left = left_since(before, Ours("/no/directory", f"{MARK}=none"), strict=True)
    print("".join(f"{line}\n" for line in left), end="")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
