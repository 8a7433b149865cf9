"""The KVM probe: that it tells the truth, on this machine and where KVM works."""

from __future__ import annotations

import json
import os
import select
from pathlib import Path

import minivm
import pytest
from conftest import Kata
from waiting import PATIENCE

from kata import journal_undo
from kata.errors import HostError
from kata.guest import manifest
from kata.hypervisor import accel, kvmprobe
from kata.hypervisor.qemu import process as qemu_process

TRUTH_S = 30.0
"""How long a guest gets on a KVM of which the probe says that it does not work."""


def boots(base: Path, guest_assets: Path, patience_s: float) -> bool:
    """Whether QEMU with KVM brings a guest as far as its first program."""
    guest = manifest.load(str(guest_assets))
    journal = minivm.sandbox_dir(base)
    initrd = minivm.build_initrd(base / "initrd", Path(guest.initrd))
    vm = minivm.settings(journal, kernel=guest.kernel, initrd=str(initrd), accel="kvm")
    process = qemu_process.spawn(vm, journal)
    port = process.detach_fd("agent")
    try:
        poller = select.poll()
        poller.register(port, select.POLLIN)
        poller.register(process.pidfd, select.POLLIN)
        ready = dict(poller.poll(patience_s * 1000))
        return process.pidfd not in ready and port in ready and os.read(port, 16) == b"ready\n"
    finally:
        os.close(port)
        assert journal_undo.undo(journal, 30) == []
        assert process.child.wait(30) is not None
        process.close()


@pytest.mark.here
def test_qemu_finds_what_the_probe_said_about_this_machine(tmp_path: Path, guest_assets: Path) -> None:
    verdict = kvmprobe.probe(use_cache=False)
    patience_s = PATIENCE if verdict.works else TRUTH_S
    assert boots(tmp_path, guest_assets, patience_s) == verdict.works, verdict


@pytest.mark.here
def test_a_kvm_that_cannot_run_a_guest_is_told_from_one_that_can() -> None:
    verdict = kvmprobe.probe(use_cache=False)
    if verdict.works:
        assert accel.choose("auto").accel == "kvm"
        return
    assert accel.choose("auto").accel == "tcg"
    assert verdict.reason in accel.choose("auto").reason
    if verdict.state == kvmprobe.OPENS_ONLY:
        assert "/dev/kvm opens, but" in verdict.reason
    with pytest.raises(HostError, match="KVM was asked for and cannot be used") as caught:
        accel.choose("kvm")
    assert verdict.reason in caught.value.message
    assert caught.value.hint == verdict.hint


def test_probe_says_that_kvm_works() -> None:
    verdict = kvmprobe.probe(use_cache=False)
    assert (verdict.state, verdict.hint) == (kvmprobe.WORKS, "")


def test_qemu_runs_a_guest_where_the_probe_says_so(tmp_path: Path, guest_assets: Path) -> None:
    assert boots(tmp_path, guest_assets, PATIENCE)


def test_the_answer_is_kept_for_this_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path))
    assert kvmprobe.probe().works
    kept = tmp_path / "kvm-probe"
    key, state, _reason, hint = kept.read_text().split("\n")[:4]
    kept.write_text("\n".join((key, state, "as it was found before", hint, "")))
    assert kvmprobe.probe().reason == "as it was found before"
    # Another boot is another key.
    kept.write_text(
        "\n".join((key.replace("1 ", "1 0", 1), kvmprobe.OPENS_ONLY, "of another boot", hint, ""))
    )
    assert kvmprobe.probe().works


def test_kata_uses_kvm_by_itself(kvm_kata: Kata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KATA_ACCEL", raising=False)
    assert accel.choose().accel == "kvm"
    checks = {check["name"]: check for check in json.loads(kvm_kata.ok("doctor", "--json"))["checks"]}
    assert checks["kvm"]["result"] == "ok", checks
    assert checks["vhost-vsock"]["result"] == "ok", checks
    assert (checks["cgroups"]["result"], checks["cgroups"]["text"]) == (
        "ok",
        "version 2: memory and cpu and pids",
    ), checks
