"""A pool of thin volumes for containerd's devmapper snapshotter, on loop devices."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

SECTORS = 512
DATA, METADATA = 512 << 20, 16 << 20
BLOCK = 128
"""Of the pool: 64 KiB."""


class Missing(Exception):
    """What this host lacks for it."""


def environment() -> dict[str, str]:
    """For dmsetup, ours and containerd's: it leaves the nodes to udev, whether it runs or not."""
    return {} if os.path.exists("/run/udev/control") else {"DM_DISABLE_UDEV": "1"}


def configuration(name: str, directory: Path) -> str:
    """What containerd is told of a pool.

    Args:
        name: The pool's.
        directory: For what containerd knows of its volumes.
    """
    return f"""
[plugins."io.containerd.snapshotter.v1.devmapper"]
root_path = {json.dumps(str(directory))}
pool_name = "{name}"
base_image_size = "64MB"
fs_type = "ext4"
"""


@contextlib.contextmanager
def pool(directory: Path, name: str) -> Iterator[None]:
    """A pool, as long as the context lasts; its volumes go with it.

    Args:
        directory: For its files.
        name: Its name.

    Raises:
        Missing: There can be none here.
    """
    if shutil.which("dmsetup") is None:
        raise Missing("needs dmsetup (apt-get install dmsetup)")
    subprocess.run(["modprobe", "-a", "loop", "dm-thin-pool"], capture_output=True, check=False)
    known = _dmsetup("targets", check=False)
    if "thin-pool" not in known.stdout:
        raise Missing(f"needs the device mapper's thin volumes in the kernel: {known.stderr.strip()}")
    loops: list[str] = []
    try:
        loops.append(_loop(directory / "metadata", METADATA))
        loops.append(_loop(directory / "data", DATA))
        _dmsetup("create", name, "--table", f"0 {DATA // SECTORS} thin-pool {loops[0]} {loops[1]} {BLOCK} 0")
        try:
            yield
        finally:
            # Its volumes first.
            lines = _dmsetup("ls").stdout.splitlines()
            volumes = [line.split()[0] for line in lines if line.startswith(f"{name}-snap")]
            for one in [*volumes, name]:
                _dmsetup("remove", "--retry", one)
    finally:
        for node in loops:
            subprocess.run(["losetup", "--detach", node], check=True)
        for file in ("metadata", "data"):
            (directory / file).unlink(missing_ok=True)


def _dmsetup(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["dmsetup", *arguments],
        capture_output=True,
        text=True,
        check=check,
        env={**os.environ, **environment()},
    )


def _loop(path: Path, size: int) -> str:
    with path.open("wb") as file:
        file.truncate(size)
    made = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=False)
    if made.returncode:
        raise Missing(f"needs loop devices: {made.stderr.strip()}")
    return made.stdout.strip()
