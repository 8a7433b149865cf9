"""podman with `kata-runtime`: the operations of ``tools/conformance --podman`` that go different ways.

The whole table, beside runc and crun, takes minutes and is docs/podman.md's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import podman
import podman_support
import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ROWS = (
    "run -it",
    "a missing command",
    "exec",
    "stop",
    "port",
    "volume",
    "cp",
    "pod",
    "a lost conmon",
    "build",
)


@pytest.fixture(scope="module")
def client(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[podman.Podman]:
    directory = Path(tempfile.mkdtemp(prefix="p", dir=run_directory))
    with podman_support.running(directory, guest_assets, busybox_image) as program:
        yield podman.Podman(program)


@pytest.mark.parametrize("row", ROWS)
def test_podman_does_as_with_runc(client: podman.Podman, row: str) -> None:
    seen = podman.tried(client)[row]("kata")
    assert podman.works(row, seen) or podman.why(row, seen), seen
    assert client.program.sweep() == []
