"""`kata` from end to end with Firecracker, where that is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Kata
from hypervisor_support import ALONE, FOREVER, assert_user_network, with_hypervisor
from waiting import until

from kata import sysio

NAME = "firecracker"


@pytest.fixture(scope="module")
def kata(kvm_kata: Kata, tmp_path_factory: pytest.TempPathFactory) -> Kata:
    return with_hypervisor(kvm_kata, NAME, tmp_path_factory.mktemp("configuration"))


@pytest.fixture(scope="module")
def box(kata: Kata, busybox_image: str) -> Iterator[str]:
    kata.ok("run", "-d", "--name", "fcbox", *ALONE, busybox_image, "sh", "-c", f"echo up; {FOREVER}")
    yield "fcbox"
    kata.ok("rm", "-f", "fcbox")


def test_a_container_runs(kata: Kata, box: str) -> None:
    found = json.loads(kata.ok("inspect", box))[0]
    assert found["sandbox"]["hypervisor"]["name"] == NAME
    assert found["sandbox"]["agent_channel"] == "hvsock"
    done = kata.call("exec", "-i", box, "sh", "-c", "cat; echo err >&2; exit 7", stdin=b"in and out")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in and out", b"err\n")
    assert kata.call("exec", "-i", box, "cat", stdin=b"x" * 100_000).stdout == b"x" * 100_000
    # Its root file system is a disk that can be written.
    assert kata.ok("exec", box, "sh", "-c", "echo a > /file; sync; cat /file") == "a\n"
    kata.ok("pause", box)
    kata.ok("resume", box)
    assert kata.ok("exec", box, "cat", "/proc/1/comm").strip() == "sh"


def test_its_metrics(kata: Kata, box: str) -> None:
    def value(line: str) -> float:
        found = [text for text in kata.ok("metrics", box).splitlines() if text.startswith(line + " ")]
        return float(found[0].split()[-1])

    first = value('kata_firecracker_block{item="read_bytes"}')
    assert first > 4096
    assert value('kata_hypervisor_device{device="disk0",item="read_bytes"}') <= first * 2
    kata.ok("exec", box, "sh", "-c", "dd if=/dev/zero of=/big bs=64k count=16 conv=fsync")
    assert value('kata_hypervisor_device{device="disk1",item="write_bytes"}') >= 1 << 20
    assert value('kata_firecracker_vcpu{item="failures"}') == 0


def test_it_is_left_with_nothing_of_the_host(kata: Kata, box: str) -> None:
    pid = json.loads(kata.ok("inspect", box))[0]["state"]["pid"]
    assert sorted(os.listdir(f"/proc/{pid}/root")) == ["disks", "state"]
    status = Path(f"/proc/{pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "Seccomp:\t2" in status
    directory = kata.run_dir / "sandboxes" / json.loads(kata.ok("inspect", box))[0]["id"]
    assert not (directory / "api.sock").exists()  # nobody else can ask it for anything


def test_limits_of_its_disks(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    """Two MiB read past the first second's share take some seconds: a bound that no slow machine breaks."""
    one = with_hypervisor(kata, NAME, tmp_path, "disk_rate_limiter_bw_max_rate = 4194304")
    script = (
        "dd if=/dev/zero of=/big bs=64k count=32 2>/dev/null;"
        " read a b < /proc/uptime; sync; read c d < /proc/uptime; echo $a $c"
    )
    began, ended = map(float, one.ok("run", "--rm", *ALONE, busybox_image, "sh", "-c", script).split())
    assert ended - began > 2, (began, ended)


def test_small_files_of_the_host_are_copied(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("copied\n")
    run = ("run", "--rm", *ALONE)
    shown = kata.ok(*run, "-v", f"{tmp_path}:/v:ro", busybox_image, "cat", "/v/key", "/etc/hostname")
    assert shown.startswith("copied\n")
    before = kata.sandboxes()
    refused = kata.call(*run, "-v", f"{tmp_path}:/v", busybox_image, "true")
    assert f"cannot mount {tmp_path} writable".encode() in refused.stderr
    assert kata.sandboxes() == before


def test_its_user_network(kata: Kata, busybox_image: str) -> None:
    before = kata.sandboxes()
    assert_user_network(kata, busybox_image)
    assert kata.sandboxes() == before


def test_the_end_of_the_machine_ends_the_container(kata: Kata, busybox_image: str) -> None:
    kata.ok("run", "-d", "--name", "fcvictim", *ALONE, busybox_image, "sh", "-c", FOREVER)
    found = json.loads(kata.ok("inspect", "fcvictim"))[0]
    os.kill(found["state"]["pid"], 9)
    assert kata.ok("wait", "fcvictim").strip() == "137"
    until(lambda: found["id"] not in kata.sandboxes(), "the sandbox is gone")
    assert sysio.proc_starttime(found["state"]["pid"]) is None
    kata.ok("rm", "fcvictim")
