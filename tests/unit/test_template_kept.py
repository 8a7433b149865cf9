"""Which template belongs to which machine, and how many are kept: with files, without a machine."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from kata.engine.factory import maker
from kata.engine.factory import template as templates
from kata.errors import StarvedError
from kata.hypervisor import tsc
from kata.hypervisor.base import Capabilities, MachineShape
from kata.hypervisor.qemu.monitor import MONITOR

DAY_S = 86400
ABLE = Capabilities(disk_slots=8, clones=True, hotplug_nics=True)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel, an initrd, an extension, a firmware and a hypervisor's program."""
    for name in ("kernel", "initrd", "extension", "firmware"):
        (tmp_path / name).write_text(name)
    shutil.copy("/bin/true", tmp_path / "qemu-system-x86_64")
    monkeypatch.setattr(
        tsc, "khz", lambda: 2_445_000
    )  # measured anew in each process where the kernel does not say it
    return tmp_path


def shape(files: Path, **changed: Any) -> MachineShape:
    options = {"path": str(files / "qemu-system-x86_64"), "firmware": str(files / "firmware")}
    about: dict[str, Any] = {
        "kernel": str(files / "kernel"),
        "initrd": str(files / "initrd"),
        "extensions": [str(files / "extension")],
        "parameters": "quiet",
        "memory_mib": 256,
        "disks": ["readonly", "writable"],
        "nics": 1,
        "options": options,
    }
    about |= changed
    return MachineShape(**about)


CHANGED: dict[str, Any] = {
    "accel": "kvm",
    "console": "none",
    "disks": ["writable"],
    "extensions": [],
    "host_devices": 1,
    "hotplug_nics": 2,
    "huge_pages": True,
    "initrd": "kernel",
    "kernel": "initrd",
    "ksm": True,
    "mapped_mib": 128,
    "max_memory_mib": 512,
    "max_vcpus": 4,
    "memory_mib": 300,
    "nics": 0,
    "options": {},
    "parameters": "quiet panic=1",
    "prealloc": True,
    "reclaim": False,
    "scans_ports": True,
    "share": "virtio-fs",
    "shared_memory": True,
    "taps": 1,
    "vcpus": 2,
}


def test_everything_of_a_shape_goes_into_the_key(files: Path) -> None:
    assert sorted(CHANGED) == sorted(MachineShape.__slots__), "what is new in a shape is tried here, too"
    key = templates.key_of(MONITOR, shape(files))
    assert templates.key_of(MONITOR, shape(files)) == key
    keys = {key}
    for name, value in CHANGED.items():
        if name in ("kernel", "initrd"):
            value = str(files / value)
        elif name == "options":
            value = {**dict(shape(files).options), "cpu_features": "-avx"}
        keys.add(templates.key_of(MONITOR, shape(files, **{name: value})))
    assert len(keys) == 1 + len(CHANGED)


@pytest.mark.parametrize("name", ["kernel", "initrd", "extension", "firmware", "qemu-system-x86_64"])
def test_a_file_that_is_replaced_makes_it_another_template(files: Path, name: str) -> None:
    """Also by one of the same size and time, as a package's upgrade may have it."""
    before = templates.key_of(MONITOR, shape(files))
    about = (files / name).stat()
    shutil.copy2(files / name, files / "new")
    os.utime(files / "new", ns=(about.st_atime_ns, about.st_mtime_ns))
    os.rename(files / "new", files / name)
    changed = templates.key_of(MONITOR, shape(files))
    assert changed != before
    os.utime(files / name, ns=(about.st_atime_ns, about.st_mtime_ns + 1))  # written to in place
    assert templates.key_of(MONITOR, shape(files)) not in (before, changed)


def test_so_does_the_speed_of_the_time_stamp_counter(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = templates.key_of(MONITOR, shape(files))
    monkeypatch.setattr(tsc, "khz", lambda: 2_445_300)  # it is measured, so not to the last digit
    assert templates.key_of(MONITOR, shape(files)) == before
    monkeypatch.setattr(tsc, "khz", lambda: 2_100_000)
    assert templates.key_of(MONITOR, shape(files)) != before


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"prealloc": True}, "its memory is its own"),
        ({"huge_pages": True}, "its memory is its own"),
        ({"shared_memory": True}, "servers of its disks"),
        ({"host_devices": 1}, "devices of the host"),
        ({"nics": 3, "taps": 1}, "several network interfaces"),
        ({"parameters": "quiet init_on_free=1"}, "memory that it gave away (init_on_free=1)"),
    ],
)
def test_what_cannot_have_one_boots_and_says_why(files: Path, changed: dict[str, Any], reason: str) -> None:
    found = templates.find(str(files / "t"), "on", MONITOR, ABLE, shape(files, **changed))
    assert reason in found.reason
    assert (found.key, found.is_missing) == ("", False)
    found = templates.find(str(files / "t"), "on", MONITOR, ABLE, shape(files))
    assert (found.reason, found.is_missing) == ("there is no template for it yet", True)
    found = templates.find(str(files / "t"), "off", MONITOR, ABLE, shape(files))
    assert (found.reason, found.is_missing) == ("templates are switched off", False)


def test_a_script_is_no_program_of_which_one_is_made(files: Path) -> None:
    (files / "qemu-system-x86_64").write_text("#!/bin/sh\nexec qemu-system-x86_64\n")
    (files / "qemu-system-x86_64").chmod(0o755)
    assert "is a script" in templates.why_not(MONITOR, ABLE, shape(files))


def made(root: Path, number: int, idle_s: float) -> Path:
    """A template as it is kept."""
    directory = root / f"{number:032x}"
    directory.mkdir(parents=True)
    (directory / "memory").write_bytes(b"x" * 5000)
    (directory / templates.WHOLE).write_text("{}")
    os.utime(directory, (time.time() - idle_s,) * 2)
    return directory


def test_those_that_were_used_last_are_kept(tmp_path: Path) -> None:
    every = [made(tmp_path, number, 100 + number) for number in range(10)]
    assert maker.clear(str(tmp_path)) == [str(one) for one in every[maker.MOST :]]
    assert [one["path"] for one in maker.listed(str(tmp_path))] == [str(one) for one in every[: maker.MOST]]
    assert maker.clear(str(tmp_path)) == []
    # One is about to be made: there is room for it.
    assert maker.clear(str(tmp_path), room_for=1) == [str(every[maker.MOST - 1])]


def test_one_that_a_start_has_just_found_is_not_taken_away(tmp_path: Path) -> None:
    every = [made(tmp_path, number, number) for number in range(10)]
    assert maker.clear(str(tmp_path)) == []
    assert all(one.exists() for one in every)


def test_one_that_nobody_has_used_for_two_weeks_goes(tmp_path: Path) -> None:
    kept, gone = made(tmp_path, 1, 13 * DAY_S), made(tmp_path, 2, 15 * DAY_S)
    torn = tmp_path / f".making-{'0' * 32}"
    torn.mkdir()
    (tmp_path / f"{'a' * 32}.failed").write_text("no space")
    (tmp_path / f"{'b' * 32}.failed").write_text("no space")
    os.utime(tmp_path / f"{'b' * 32}.failed", (time.time() - 2 * templates.FAILED_S,) * 2)
    assert maker.sweep(str(tmp_path)) == [str(torn), str(gone)]
    assert kept.exists()
    assert [key for key, _ in maker.failures(str(tmp_path))] == ["a" * 32]
    # Not while somebody makes one: what that has so far is no rest.
    torn.mkdir()
    with maker._locked(str(tmp_path), waits=False):
        assert maker.sweep(str(tmp_path)) == []
    assert maker.destroy(str(tmp_path)) == [kept.name]
    assert not torn.exists()
    assert maker.failures(str(tmp_path)) == []


def test_what_a_busy_host_kept_from_being_made_is_soon_made_again(tmp_path: Path) -> None:
    wanted = templates.Template(str(tmp_path), "0" * 32)
    maker.write_failure(wanted, StarvedError("the host was busy"), counts_s=0.3)
    assert templates.failure(wanted) == "the host was busy"
    time.sleep(0.4)
    assert templates.failure(wanted) == ""
    maker.write_failure(wanted, StarvedError("no room"))
    assert templates.failure(wanted) == "no room"
