"""virtiofsd's command lines."""

from __future__ import annotations

from kata.hypervisor import virtiofsd


def test_each_virtiofsd_is_asked_in_its_own_words() -> None:
    c = virtiofsd.command(virtiofsd.C_PROGRAM, "/share", 7)
    rust = virtiofsd.command(virtiofsd.RUST_PROGRAMS[0], "/share", 7)
    assert "--fd=7" in c
    assert "--fd=7" in rust
    assert c[-1].startswith("source=/share,")
    assert "announce_submounts" in c[-1]
    assert "--shared-dir=/share" in rust
    assert "--announce-submounts" in rust
