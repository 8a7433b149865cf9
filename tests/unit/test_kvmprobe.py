"""The KVM probe: its verdict here, its cache, and the choice that follows from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kata.errors import HostError, UsageError
from kata.hypervisor import accel, kvmprobe

HAVE_KVM = os.access("/dev/kvm", os.R_OK | os.W_OK)


@pytest.fixture(autouse=True)
def _run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("KATA_ACCEL", raising=False)


@pytest.mark.skipif(not HAVE_KVM, reason="needs /dev/kvm")
def test_the_verdict_is_true_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = kvmprobe.probe()
    assert verdict.state in (kvmprobe.WORKS, kvmprobe.OPENS_ONLY)
    assert verdict.reason
    if os.path.exists("/sys/module/kvm_pvm"):
        assert verdict.state == kvmprobe.OPENS_ONLY, "this KVM emulates the kernels of ordinary guests"
        assert "one instruction at a time" in verdict.reason
    monkeypatch.setattr(kvmprobe, "_run_probe", lambda deadline: pytest.fail("probed again"))
    again = kvmprobe.probe()
    assert (again.state, again.reason, again.hint) == (verdict.state, verdict.reason, verdict.hint)


def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    device = tmp_path / "kvm"
    device.write_text("")
    monkeypatch.setattr(kvmprobe, "DEVICE", str(device))
    return device


def test_a_device_that_is_no_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, tmp_path)
    verdict = kvmprobe.probe()
    assert verdict.state == kvmprobe.OPENS_ONLY
    assert "ioctl" in verdict.reason
    assert not verdict.works


def test_a_guest_that_hangs_does_not_hang_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, tmp_path)

    def hang() -> str:
        import time

        time.sleep(3600)
        return "ok"

    monkeypatch.setattr(kvmprobe, "_guest", hang)
    verdict = kvmprobe._run_probe(0.1)
    assert verdict.state == kvmprobe.OPENS_ONLY
    assert "hangs" in verdict.reason


def test_a_guest_that_is_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, tmp_path)
    monkeypatch.setattr(kvmprobe, "_guest", lambda: kvmprobe._EMULATED)
    verdict = kvmprobe.probe()
    assert verdict.state == kvmprobe.OPENS_ONLY
    assert "one instruction at a time" in verdict.reason


def test_a_guest_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, tmp_path)
    monkeypatch.setattr(kvmprobe, "_guest", lambda: "ok")
    assert kvmprobe.probe().works
    assert accel.choose().accel == "kvm"
    assert accel.choose("tcg").accel == "tcg"


def test_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvmprobe, "DEVICE", str(tmp_path / "none"))
    verdict = kvmprobe.probe()
    assert verdict.state == kvmprobe.ABSENT
    assert verdict.hint
    choice = accel.choose()
    assert choice.accel == "tcg"
    assert verdict.reason in choice.reason
    with pytest.raises(HostError, match="KVM was asked for"):
        accel.choose("kvm")
    monkeypatch.setenv("KATA_ACCEL", "kvm")
    with pytest.raises(HostError, match="KVM was asked for"):
        accel.choose()
    with pytest.raises(UsageError):
        accel.choose("xen")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert kvmprobe.probe().state == kvmprobe.NO_PERMISSION


def test_an_old_answer_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, tmp_path)
    monkeypatch.setattr(kvmprobe, "_guest", lambda: "ok")
    assert kvmprobe.probe().works
    cache = tmp_path / "run" / "kvm-probe"
    assert cache.exists()
    cache.write_text(cache.read_text().replace("1 ", "1 another-boot ", 1))
    monkeypatch.setattr(kvmprobe, "_guest", lambda: "failed a triple fault")
    verdict = kvmprobe.probe()
    assert verdict.state == kvmprobe.OPENS_ONLY
    assert "a triple fault" in verdict.reason
    cache.write_bytes(b"\xff\xfe")
    assert kvmprobe.probe().state == kvmprobe.OPENS_ONLY
