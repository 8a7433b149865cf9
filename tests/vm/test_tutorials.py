"""The commands of the pages that need `kata` alone; those of others are in `test_docker.py` and `test_cri.py`."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tutorials
from cli_support import needs_root
from conftest import Kata
from prometheus_support import free_port

MOST_MIB = 800
"""What the machines of the page on 1 GiB may take together; the rest is for the box itself."""


@pytest.fixture(scope="module")
def environment(shared_kata: Kata, busybox_image: str, run_directory: Path) -> dict[str, str]:
    """That of the pages: ``kata``, and an image by the name that they use."""
    programs = run_directory / "tutorials"
    programs.mkdir()
    tutorials.program(programs, "kata", *shared_kata.command())
    shared_kata.ok("pull", busybox_image)
    shared_kata.ok("tag", busybox_image, "busybox")
    return {**shared_kata.env, "PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    "page", ["tutorials/laptop.md", "tutorials/ci-runner.md", "from-kata.md", "troubleshooting.md"]
)
def test_a_page(page: str, environment: dict[str, str], tmp_path: Path) -> None:
    changes = {"8080": str(free_port())} if page.endswith("laptop.md") else {}
    tutorials.run(page, tmp_path, environment, changes)


def test_the_page_about_networks(environment: dict[str, str], tmp_path: Path) -> None:
    tutorials.run("networks.md", tmp_path, environment, {"8080": str(free_port())})


def test_the_readme(environment: dict[str, str], tmp_path: Path, busybox_image: str) -> None:
    (tmp_path / "image").symlink_to(busybox_image.partition(":")[2])
    (tmp_path / "words").write_text("b\na\n")
    (tmp_path / "site").mkdir()
    # For nginx there is a server of busybox.
    changes = {
        "8080": str(free_port()),
        "--cpus 2 nginx": "--cpus 2 busybox httpd -f -h /site",
        "/etc/nginx": "/etc",
    }
    tutorials.run("../README.md", tmp_path, environment, changes)


@needs_root
def test_the_page_on_a_box_with_1_gib(environment: dict[str, str], tmp_path: Path) -> None:
    with memory_of(environment["KATA_RUN_DIR"]) as seen:
        tutorials.run("tutorials/edge-box.md", tmp_path, environment)
    assert 100 < max(seen) < MOST_MIB, max(seen)


@contextlib.contextmanager
def memory_of(run_dir: str) -> Iterator[list[int]]:
    """While the block runs, MiB that all processes of a kata take, engines, hypervisors and helpers: some readings."""
    seen: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            seen.append(sum(map(_kib, _processes(run_dir))) // 1024)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _processes(run_dir: str) -> set[str]:
    """The processes that have the run directory in their words, and their descendants: a hypervisor has not."""
    parents, found = {}, set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[entry] = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]
            where = Path(f"/proc/{entry}/cmdline").read_bytes() + Path(f"/proc/{entry}/environ").read_bytes()
            if run_dir.encode() in where:
                found.add(entry)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _kib(pid: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0
