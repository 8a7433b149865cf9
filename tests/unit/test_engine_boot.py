"""How a machine shares files with its guest."""

from __future__ import annotations

from pathlib import Path

import pytest
import sandbox_support

from kata import journal_undo
from kata.engine.lifecycle import boot, guest_setup, volumes
from kata.errors import (
    HostError,
)
from kata.hypervisor import virtiofsd
from kata.journal import Journal


def test_a_virtiofsd_that_is_asked_for_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtiofsd, "find", lambda configured="": None)
    journal = Journal.create_dir(str(tmp_path / "r"), "sandbox", {})

    noted: list[str] = []

    def server(accel: str, shared_fs: str = "", *, bounces: bool = False) -> object:
        settings = sandbox_support.sandbox("x", "/c", accel=accel, kernel="/k", initrd="/i")
        settings.notes = noted
        assert settings.machine is not None
        settings.machine.share.protocol = shared_fs
        settings.machine.guest.bounces = bounces
        start = boot.Boot(settings, str(tmp_path), journal)
        start.choose_monitor()
        start.machine.share = volumes.Share(str(tmp_path), journal)
        start.prepare_file_server()
        return start.machine.files

    assert server("kvm", shared_fs="virtio-9p") is None
    assert noted == []  # it was asked for
    assert server("kvm") is None
    assert "no virtiofsd" in noted.pop()
    assert server("tcg", shared_fs="virtio-fs") is None
    assert "kernel cannot have virtio-fs" in noted.pop()
    with pytest.raises(HostError, match="no virtiofsd"):
        server("tcg", shared_fs="virtio-fs", bounces=True)
    with pytest.raises(HostError, match="no virtiofsd"):
        server("kvm", shared_fs="virtio-fs")
    assert journal_undo.undo(journal) == []


@pytest.mark.parametrize(
    ("version", "cache"),
    [
        ("6.1.192", "mmap"),
        ("6.3", "mmap"),
        ("6.4.0", "none"),
        ("6.12.117", "none"),
        ("7.0", "none"),
        ("", "none"),
    ],
)
def test_9p_keeps_only_what_the_kernel_keeps_right(version: str, cache: str) -> None:
    assert guest_setup._9p_cache(version) == cache
