"""virtiofsd's command lines, and the connection to it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from kata.hypervisor import virtiofsd
from kata.journal import Journal


def test_each_virtiofsd_is_asked_in_its_own_words() -> None:
    c = virtiofsd.command(virtiofsd.C_PROGRAM, "/share", 7)
    rust = virtiofsd.command(virtiofsd.RUST_PROGRAMS[0], "/share", 7)
    assert "--fd=7" in c
    assert "--fd=7" in rust
    assert c[-1].startswith("source=/share,")
    assert "announce_submounts" in c[-1]
    assert "--shared-dir=/share" in rust
    assert "--announce-submounts" in rust


def test_hanging_up_ends_a_connection_that_its_hypervisor_still_has(tmp_path: Path) -> None:
    journal = Journal.create_dir(str(tmp_path), "run", {"client": "kata", "id": "s1"})
    files = virtiofsd.FileServer(virtiofsd.C_PROGRAM, str(tmp_path), str(tmp_path / "run"), journal)
    with files.connect(), socket.socket(fileno=os.dup(files._listener.raw)) as listener:
        served, _ = listener.accept()
        with served:
            served.settimeout(10)
            files.hang_up()
            assert served.recv(1) == b""
        files.hang_up()
    files.close_socket()
    journal.close()
