"""Device rules on a cgroup of version 2, with this host's own kernel."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata import sysio
from kata.resources import device_rules, host_cgroup

OPENER = """
import os, sys
directory, path, flags = sys.argv[1:]
with open(directory + "/cgroup.procs", "w") as file:
    file.write("0")
os.close(os.open(path, int(flags)))
"""
REFUSED = "PermissionError"


@pytest.fixture
def leaf(tmp_path: Path) -> Iterator[str]:
    """A cgroup of version 2: such a hierarchy can be mounted beside those of version 1."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    mounted = tmp_path / "cgroup2"
    mounted.mkdir()
    try:
        sysio.mount("cgroup2", str(mounted), "cgroup2", 0)
    except OSError as error:
        pytest.skip(f"needs cgroup v2 in the kernel: {error}")
    directory = mounted / f"kata-devices-{os.getpid()}"
    directory.mkdir()
    yield str(directory)
    directory.rmdir()
    sysio.umount2(str(mounted), 0)


def opens(leaf: str, path: str, flags: int = os.O_RDONLY) -> str:
    """What a process in the cgroup gets from open(2): nothing, or the name of the error."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", OPENER, leaf, path, str(flags)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.splitlines()[-1].partition(":")[0] if done.returncode else ""


def attached(leaf: str, rules: list[str] | tuple[str, ...]) -> None:
    try:
        device_rules.attach(leaf, rules)
    except PermissionError as error:
        pytest.skip(f"needs the right to load BPF programs: {error}")


def test_only_what_a_rule_allows_is_opened(leaf: str) -> None:
    assert opens(leaf, "/dev/zero") == ""
    attached(leaf, ["c 1:3 rwm", "c 1:5 r", "c 5:* w", "b 7:0 r", "b 7:0 w"])
    assert opens(leaf, "/dev/null", os.O_RDWR) == ""
    assert opens(leaf, "/dev/zero") == ""
    assert opens(leaf, "/dev/zero", os.O_RDWR) == REFUSED
    assert opens(leaf, "/dev/urandom") == REFUSED
    assert opens(leaf, "/etc/passwd") == ""
    # Outside it nothing has changed.
    os.close(os.open("/dev/urandom", os.O_RDONLY))


def test_the_rules_of_a_sandbox(leaf: str, tmp_path: Path) -> None:
    attached(leaf, host_cgroup.DEVICES)
    for path in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/full"):
        assert opens(leaf, path, os.O_RDWR) == "", path
    assert opens(leaf, "/dev/ptmx", os.O_RDWR) == ""
    # A device that is none of its business: the kernel's log, by a node of our own.
    node = tmp_path / "kmsg"
    try:
        os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(1, 11))
        os.close(os.open(node, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        pytest.skip(f"needs the right to open the kernel's log: {error}")
    assert opens(leaf, str(node), os.O_RDONLY | os.O_NONBLOCK) == REFUSED


def test_disks_come_and_go(leaf: str, tmp_path: Path) -> None:
    """A block device that nothing is behind: what is asked first is the cgroup."""
    node = tmp_path / "disk"
    try:
        os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(7, 230))
    except PermissionError:
        pytest.skip("needs the right to make device nodes")
    attached(leaf, host_cgroup.DEVICES)
    cgroup = host_cgroup.HostCgroup()
    cgroup._leaf = leaf
    before = opens(leaf, str(node))
    assert before == REFUSED
    cgroup.allow_disk((7, 230))
    cgroup.allow_disk((7, 230))
    assert opens(leaf, str(node)) != REFUSED
    assert opens(leaf, "/dev/null", os.O_RDWR) == ""
    cgroup.take_disk((7, 230))
    assert opens(leaf, str(node)) != REFUSED
    cgroup.take_disk((7, 230))
    assert opens(leaf, str(node)) == REFUSED
    assert cgroup.warnings == []


def test_a_rule_that_is_none_is_not_taken() -> None:
    for wrong in ("x 1:3 r", "c 1:3 q", "c 1 r", "c 1:x r"):
        with pytest.raises(ValueError, match="is no device rule"):
            device_rules.program([wrong])


def test_every_jump_stays_within_the_program() -> None:
    code = device_rules.program(host_cgroup.DEVICES)
    assert len(code) % 8 == 0
    count = len(code) // 8
    for index in range(count):
        operation = code[index * 8]
        if operation in (0x55, 0x45):
            target = index + 1 + int.from_bytes(code[index * 8 + 2 : index * 8 + 4], "little")
            # A rule that does not fit is left for the next rule, or for the refusal at the end.
            assert index < target <= count - 2
