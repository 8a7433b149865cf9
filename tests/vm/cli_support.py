"""Containers that tests of the `kata` command look at, and what it says of them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator

import pytest
from conftest import Kata
from waiting import until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, makes device nodes or taps on the host")
"""For tests of what ordinary users can do that are themselves more than that (`make test-user`)."""
FOREVER = "trap 'exit 0' TERM; while :; do sleep 0.2; done"


@pytest.fixture(scope="module")
def box(shared_kata: Kata, busybox_image: str) -> Iterator[str]:
    """A running container that several tests look at."""
    shared_kata.ok(
        "run",
        "-d",
        "--name",
        "box",
        "-e",
        "MINE=1",
        "-e",
        "PASSWORD=dont-look-5x7",
        busybox_image,
        "sh",
        "-c",
        f"echo first; echo second >&2; {FOREVER}",
    )
    until(lambda: b"second" in shared_kata.call("logs", "box").stderr, "its first words")
    yield "box"
    shared_kata.ok("rm", "-f", "box")


@contextlib.contextmanager
def container(kata: Kata, image: str, name: str, script: str = FOREVER, *options: str) -> Iterator[str]:
    kata.ok("run", "-d", "--name", name, *options, image, "sh", "-c", script)
    try:
        yield name
    finally:
        kata.ok("rm", "-f", name)


def status(kata: Kata, name: str) -> str:
    return str(json.loads(kata.ok("inspect", name))[0]["state"]["status"])


def identity_of(kata: Kata, name: str) -> str:
    return str(json.loads(kata.ok("inspect", name))[0]["id"])


def names(kata: Kata) -> list[str]:
    return [entry["name"] for entry in json.loads(kata.ok("ps", "-a", "--json"))]


def vm_pid(kata: Kata, name: str) -> int:
    return int(json.loads(kata.ok("inspect", name))[0]["state"]["pid"])
