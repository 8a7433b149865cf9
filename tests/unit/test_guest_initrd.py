"""The cpio writer and the initrd, with GNU cpio as the judge."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from kata.errors import GuestAssetError
from kata.guest import initrd
from kata.guest.cpio import Archive


def unpack(archive: bytes, directory: Path) -> None:
    subprocess.run(["cpio", "-idm", "--quiet"], input=archive, cwd=directory, check=True)


def names(archive: bytes) -> list[str]:
    done = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True)
    return done.stdout.decode().split()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 511, 512, 100_003])
def test_files_of_any_length_come_back(tmp_path: Path, length: int) -> None:
    data = os.urandom(length)
    archive = Archive()
    archive.file("one", data, 0o640)
    archive.file("two", data[::-1])
    unpack(archive.finish(), tmp_path)
    assert (tmp_path / "one").read_bytes() == data
    assert (tmp_path / "two").read_bytes() == data[::-1]
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o640


def test_parents_come_before_their_children() -> None:
    archive = Archive()
    archive.file("a/b/c", b"")
    archive.file("a/d", b"")
    assert names(archive.finish()) == ["a", "a/b", "a/b/c", "a/d"]


def test_links_and_devices(tmp_path: Path) -> None:
    archive = Archive()
    archive.symlink("bin/sh", "busybox")
    archive.character_device("dev/console", 5, 1)
    content = archive.finish()
    listing = subprocess.run(["cpio", "-tv", "--quiet"], input=content, capture_output=True, check=True)
    assert b"bin/sh -> busybox" in listing.stdout
    device = next(line for line in listing.stdout.decode().splitlines() if line.endswith("dev/console"))
    assert device.startswith("crw-------")
    assert device.replace(" ", "").count("5,1") == 1


def test_the_same_members_give_the_same_bytes() -> None:
    first, second = (initrd.build(b"agent", [("kernel/a.ko", b"module")], "6.1") for _ in range(2))
    assert first == second
    assert len(first) % 512 == 0


@pytest.mark.parametrize("path", ["", "/etc", "a//b", "../x", "a/../b", "a/.", "TRAILER!!!", "a\0b"])
def test_paths_that_are_not_plain_are_refused(path: str) -> None:
    with pytest.raises(GuestAssetError, match="relative and plain"):
        Archive().file(path, b"")


def test_nothing_is_added_twice() -> None:
    archive = Archive()
    archive.file("a/b", b"")
    with pytest.raises(GuestAssetError, match="twice"):
        archive.file("a/b", b"")


def test_modules_are_listed_in_their_order(tmp_path: Path) -> None:
    modules = [("kernel/z.ko", b"1"), ("kernel/drivers/a.ko", b"2")]
    unpack_without_devices = initrd.build(b"agent", modules, "6.1.0-1")
    found = names(unpack_without_devices)
    assert "init" in found
    assert "dev/console" in found
    done = subprocess.run(
        ["cpio", "-i", "--quiet", "--to-stdout", "etc/modules"],
        input=unpack_without_devices,
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().splitlines() == [
        "/lib/modules/6.1.0-1/kernel/z.ko",
        "/lib/modules/6.1.0-1/kernel/drivers/a.ko",
    ]


def test_without_modules_there_is_no_list() -> None:
    assert "etc/modules" not in names(initrd.build(b"agent", []))


def test_the_agents_version_is_read_without_running_it() -> None:
    assert initrd.agent_version(b"\0\0kata-agent 1.2.3-rc1\n\0") == "1.2.3-rc1"
    assert initrd.agent_version(b"something else") == "unknown"


def test_whether_an_agent_looks_for_a_share_is_found_in_it() -> None:
    assert initrd.scans_ports(b"kata.network\0kata.pci_scankata.pids.of")
    assert not initrd.scans_ports(b"kata.network\0kata.pids.of")


def test_an_agent_must_be_a_static_program() -> None:
    initrd.check_agent(Path("/usr/bin/busybox").read_bytes(), "busybox")
    with pytest.raises(GuestAssetError, match="dynamically linked"):
        initrd.check_agent(Path("/bin/ls").resolve().read_bytes(), "ls")
    with pytest.raises(GuestAssetError, match="not a 64-bit x86 program"):
        initrd.check_agent(b"#!/bin/sh\n" + bytes(100), "script")
    with pytest.raises(GuestAssetError, match="cut short"):
        initrd.check_agent(Path("/bin/ls").resolve().read_bytes()[:80], "ls")
