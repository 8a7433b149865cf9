"""Machines that go on from templates (`tests/vm/test_templates.py`) under KVM, of each hypervisor that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Kata
from hypervisor_support import with_hypervisor
from test_templates import (  # noqa: F401
    path_of,
    status,
    test_a_clone_has_files_of_the_host,
    test_clones_share_nothing_that_is_a_sandboxs_own,
)

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]


@pytest.fixture(params=["qemu", "cloud-hypervisor", "firecracker"])
def templates(request: pytest.FixtureRequest, kata_env: Kata, tmp_path: Path) -> Kata:
    if "files_of_the_host" in request.node.name and request.param == "firecracker":
        pytest.skip("Firecracker shares no files of the host")
    kata = with_hypervisor(kata_env, request.param, tmp_path)
    kata.env |= {"KATA_TEMPLATES": "on", "KATA_ACCEL": "kvm", "KATA_BOOT_TIMEOUT": "300"}
    return kata


def test_a_clone_writes_to_its_own_disk(templates: Kata, busybox_image: str) -> None:
    """Whose size is not that of the template's: it has what fits, and the template stays as it was."""
    kata, run = templates, ["--network", "none", busybox_image]
    kata.env["KATA_TEMPLATES"] = "use"
    kata.ok("factory", "init")
    # That one has a network, and this machine none: another template.
    assert path_of(kata, *run, "true") == "start: cold: there is no template for it yet"
    script = (
        "head -c 40000000 /dev/urandom >/big; sync; sum=$(md5sum </big); echo 3 >/proc/sys/vm/drop_caches;"
    )
    script += ' test "$sum" = "$(md5sum </big)" && df -k / | tail -n 1'
    (one,) = status(kata)["templates"]
    before = {file.name: file.stat().st_mtime_ns for file in Path(one["path"]).iterdir()}
    sizes = []
    for path in ("off", "use"):
        kata.env["KATA_TEMPLATES"] = path
        done = kata.call("run", "--rm", "--timings", "--privileged", busybox_image, "sh", "-c", script)
        assert done.returncode == 0, done.stderr.decode()
        assert ("start: template" in done.stderr.decode()) == (path == "use")
        sizes.append(done.stdout.decode().split()[1])
    assert sizes[0] == sizes[1]
    assert before == {file.name: file.stat().st_mtime_ns for file in Path(one["path"]).iterdir()}
