"""`kata` from end to end with Cloud Hypervisor, where that is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from hypervisor_support import ALONE, FOREVER, assert_user_network, with_hypervisor
from waiting import until

from kata import sysio
from kata.engine.client import EngineClient
from kata.hypervisor import virtiofsd
from kata.resources import sizing

MIB = 1 << 20
NAME = "cloud-hypervisor"


@pytest.fixture(scope="module")
def kata(kvm_kata: Kata, tmp_path_factory: pytest.TempPathFactory) -> Kata:
    return with_hypervisor(kvm_kata, NAME, tmp_path_factory.mktemp("configuration"))


@pytest.fixture(scope="module")
def box(kata: Kata, busybox_image: str) -> Iterator[str]:
    kata.ok("run", "-d", "--name", "chbox", *ALONE, busybox_image, "sh", "-c", f"echo up; {FOREVER}")
    yield "chbox"
    kata.ok("rm", "-f", "chbox")


def inspect(kata: Kata, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kata.ok("inspect", name))[0]
    return found


def test_a_container_runs(kata: Kata, box: str) -> None:
    found = inspect(kata, box)
    assert found["sandbox"]["hypervisor"]["name"] == NAME
    assert found["sandbox"]["agent_channel"] == "hvsock"
    done = kata.call("exec", "-i", box, "sh", "-c", "cat; echo err >&2; exit 7", stdin=b"in and out")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in and out", b"err\n")
    assert kata.call("exec", "-i", box, "cat", stdin=b"x" * 100_000).stdout == b"x" * 100_000
    kata.ok("pause", box)
    kata.ok("resume", box)
    assert kata.ok("exec", box, "cat", "/proc/1/comm").strip() == "sh"


def test_memory_follows_the_limit_both_ways(kata: Kata, busybox_image: str) -> None:
    kata.ok("run", "-d", "--name", "chsized", "-m", "256m", *ALONE, busybox_image, "sleep", "100000")
    found = inspect(kata, "chsized")
    with EngineClient(str(kata.run_dir / "sandboxes" / found["id"] / "engine.sock")) as engine:

        def become(mib: int) -> tuple[int, int]:
            """Have this limit; what the engine says was returned and plugged, in MiB."""
            engine.update(found["id"], {"memory": {"limit": mib * MIB, "swap": mib * MIB}})
            size = engine.describe()["sizing"]
            total = kata.ok("exec", "chsized", "awk", "/MemTotal/ {print int($2 / 1024)}", "/proc/meminfo")
            assert mib <= int(total) <= (sizing.total_of(mib * MIB, "small") // MIB) * 1.05
            return size["returned_mib"], size["plugged_mib"]

        returned, plugged = become(160)
        assert returned > 64
        assert plugged == 0
        returned, plugged = become(500)
        assert returned == 0
        assert plugged > 200
    kata.ok("rm", "-f", "chsized")


def test_volumes(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    if virtiofsd.find() is None:
        pytest.skip("needs virtiofsd (apt-get install virtiofsd)")
    (tmp_path / "there").write_text("from the host\n")
    shown = kata.ok(
        "run", "--rm", *ALONE, "-v", f"{tmp_path}:/data", busybox_image, "sh", "-c",
        "cat /data/there; echo from the guest > /data/made;"
        "sed -n 's/.* \\/data \\([^ ]*\\) .*/\\1/p' /proc/mounts",
    )  # fmt: skip
    assert shown == "from the host\nvirtiofs\n"
    assert (tmp_path / "made").read_text() == "from the guest\n"


def test_it_is_chosen_by_name(kata: Kata, kvm_kata: Kata, busybox_image: str) -> None:
    chosen = ("run", "-d", "--name", "chchosen", "--hypervisor", "clh", *ALONE)
    kvm_kata.ok(*chosen, busybox_image, "sleep", "100000")
    assert inspect(kvm_kata, "chchosen")["sandbox"]["hypervisor"]["name"] == NAME
    assert kvm_kata.ok("exec", "chchosen", "cat", "/proc/1/comm").strip() == "sleep"
    kvm_kata.ok("rm", "-f", "chchosen")


def test_its_user_network(kata: Kata, busybox_image: str) -> None:
    before = kata.sandboxes()
    assert_user_network(kata, busybox_image)
    assert kata.sandboxes() == before


def test_the_end_of_the_machine_ends_the_container(kata: Kata, busybox_image: str) -> None:
    kata.ok("run", "-d", "--name", "chvictim", *ALONE, busybox_image, "sh", "-c", FOREVER)
    found = inspect(kata, "chvictim")
    os.kill(found["state"]["pid"], 9)
    assert kata.ok("wait", "chvictim").strip() == "137"
    state = json.loads((kata.container_dir("chvictim") / "state.json").read_text())
    assert "signal 9" in state["error"], state
    until(lambda: found["id"] not in kata.sandboxes(), "the sandbox is gone")
    assert sysio.proc_starttime(found["state"]["pid"]) is None
    kata.ok("rm", "chvictim")
