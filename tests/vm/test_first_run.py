"""What a newcomer calls first, and what a start costs in imports."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from conftest import Kata

ROOT = Path(__file__).resolve().parents[2]

TOO_DEAR = {
    "argparse",
    "asyncio",
    "dataclasses",
    "inspect",
    "logging",
    "pathlib",
    "ssl",
    "subprocess",
    "typing",
}
"""What ``kata run`` does without, from its first line to its last."""


def test_make_run_shows_both_kernels(guest_assets: Path, busybox_image: str) -> None:
    done = subprocess.run(
        [ROOT / "tools" / "first-run"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "KATA_GUEST_DIR": str(guest_assets)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    host = re.search(r"kernel of this machine: +(\S.*)", done.stdout)
    guest = re.search(r"kernel the container has: +(\S.*)", done.stdout)
    assert host is not None
    assert guest is not None
    assert (
        host[1]
        == subprocess.run(["uname", "-sr"], capture_output=True, text=True, check=True).stdout.strip()
    )
    assert guest[1].startswith("Linux ")


def test_run_imports_nothing_dear(kata_env: Kata, busybox_image: str) -> None:
    kata_env.ok("run", "--rm", busybox_image, "true")  # the first one converts the image
    command = kata_env.command("run", "--rm", busybox_image, "true")
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=kata_env.env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "kata.cli.session" in imported
    assert {name for name in imported if name.split(".")[0] in TOO_DEAR} == set()
