"""Files of the host in the guest by virtio-fs, with a real virtiofsd."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Kata
from share_cases import (  # noqa: F401 - collected here
    SHARES,
    sharing,
    test_a_killed_file_server_is_told,
    test_a_program_that_was_replaced_is_not_run,
    test_files_behave_as_files,
    test_files_of_two_file_systems_stay_apart,
    test_several_sides_see_one_file_system,
    test_the_owner_of_a_guest_gains_nothing_by_it,
    test_volumes,
    test_what_files_can_do,
)

LONG = {
    "test_a_killed_file_server_is_told",
    "test_a_program_that_was_replaced_is_not_run",
    "test_files_of_two_file_systems_stay_apart",
    "test_several_sides_see_one_file_system",
    "test_the_owner_of_a_guest_gains_nothing_by_it",
    "test_volumes",
    "test_what_files_can_do",
}
"""The lane with emulated machines runs these in every test run."""


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs. Elsewhere in the lab is an overlay, and its kernel's overlays (6.1) do not know RWF_APPEND, which is how
    virtiofsd in Rust appends.
    """
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.fixture(params=[SHARES[1], pytest.param(SHARES[2], marks=pytest.mark.long)])
def kata(kvm_kata: Kata, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kata:
    return sharing(kvm_kata, request.param, tmp_path_factory.mktemp("configuration"))


@pytest.mark.long
def test_a_root_of_the_hosts(kata: Kata, tmp_path: Path) -> None:
    """What is executed from a share, twice and through an overlay, runs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tmp_path / "bin/busybox").chmod(0o755)
    (tmp_path / "bin/sh").symlink_to("busybox")
    script = "/bin/busybox true; echo new > /made; /bin/busybox cat /made"
    assert (
        kata.ok("run", "--rm", "--network", "none", f"rootfs:{tmp_path}", "/bin/sh", "-c", script) == "new\n"
    )
    assert not (tmp_path / "made").exists()
