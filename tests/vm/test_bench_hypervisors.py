"""`bench/hypervisors.py`: each machine beside the bare monitor, started by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Kata

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_qemu_by_hand_and_with_kata(shared_kata: Kata, guest_assets: Path) -> None:
    program = [sys.executable, "-I", str(ROOT / "bench/hypervisors.py")]
    options = ["--json", "--rounds", "1", "--settle", "0.5", "--hypervisor", "qemu"]
    environment = {**shared_kata.env, "KATA_GUEST_DIR": str(guest_assets)}
    done = subprocess.run([*program, *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["results"]["qemu"]
    # A bare monitor boots the same kernel, with less around it; both take more than its processes' own pages.
    assert all(milliseconds > 0 for milliseconds in found["median_ms"].values())
    assert found["median_ms"]["kata start"] < 20 * found["median_ms"]["bare start"]
    memory = found["memory_mib"]
    assert 5 < memory["bare"]["in all"] < memory["kata"]["in all"] < 400
    assert 10 < memory["bare"]["guest"] < found["mib"]
    unknown = subprocess.run(
        [*program, "--hypervisor", "none"], capture_output=True, text=True, env=environment, check=False
    )
    assert unknown.returncode == 1
    assert "there is no hypervisor 'none'" in unknown.stderr
    assert "hint: one of" in unknown.stderr
