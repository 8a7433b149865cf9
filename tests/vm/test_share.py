"""Files of the host in the guest under software emulation, in each way that there is; tests/kvm has KVM's."""

from __future__ import annotations

import json
import os
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

from kata.hypervisor import accel

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(params=SHARES)
def kata(
    shared_kata: Kata, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Kata:
    return sharing(shared_kata, request.param, tmp_path_factory.mktemp("configuration"))


def test_a_kernel_without_bounce_pages_shares_by_9p_whatever_is_asked(
    kata_env: Kata, busybox_image: str, tmp_path: Path
) -> None:
    if accel.choose().accel != "tcg":
        pytest.skip("is about emulated machines, and this machine has KVM")
    manifest = json.loads((kata_env.guest_dir / "guest.json").read_text())
    manifest["kernel"]["patches"] = []
    for file in kata_env.guest_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "guest.json").unlink()
    (tmp_path / "guest.json").write_text(json.dumps(manifest))
    kata_env.env.update(KATA_GUEST_DIR=str(tmp_path), KATA_SHARED_FS="virtio-fs")
    done = kata_env.call("run", "--rm", "-v", "/etc:/e:ro", busybox_image, "grep", " /e ", "/proc/mounts")
    assert done.stdout.split()[2] == b"9p", done.stderr
    assert b"guest's kernel cannot have virtio-fs in an emulated machine" in done.stderr
    del kata_env.env["KATA_SHARED_FS"]
    doctor = {row["name"]: row for row in json.loads(kata_env.call("doctor", "--json").stdout)["checks"]}
    assert doctor["virtiofsd"]["result"] == "warn"
    kata_env.ok("run", "-d", "--name", "by9p", "-v", "/etc:/e:ro", busybox_image, "sleep", "1000")
    [sandbox] = kata_env.sandboxes()
    assert "shared by 9p" in (kata_env.run_dir / "sandboxes" / sandbox / "engine.log").read_text()
    kata_env.ok("rm", "-f", "by9p")
