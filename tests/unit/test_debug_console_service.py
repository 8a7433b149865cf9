"""The debug console, as the engine and its client carry it; a shell is in tests/vm/test_debug_console.py."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from managed_engine import Managed, make_fixture, managed_fixture  # noqa: F401 - fixtures

from kata import management as client
from kata.engine.services import debug_console
from kata.errors import NotFoundError, StateError
from kata.settings import GuestSettings


def test_a_connection_goes_on_in_another_protocol(
    managed: Managed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def carry(agent: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"at once;")
        while data := await reader.read(10):
            writer.write(data.upper())

    target, protocol = "/kata/v1/debug-console", debug_console.PROTOCOL
    assert managed.curl(target, "-X", "POST")[0] == 426
    with pytest.raises(StateError, match="not enabled when the sandbox was made") as refused:
        client.take_over(managed.path, target, protocol)
    assert "debug_console_enabled" in refused.value.hint
    monkeypatch.setattr(debug_console, "check", lambda guest: None)
    monkeypatch.setattr(debug_console, "carry", carry)
    with client.take_over(managed.path, target, protocol) as sock:
        sock.settimeout(10)
        sock.sendall(b"words")
        sock.shutdown(socket.SHUT_WR)
        said = b""
        while piece := sock.recv(3):
            said += piece
        assert said == b"at once;WORDS"
    managed.settle()
    with pytest.raises(NotFoundError, match="there is no '/x' here"):
        client.take_over(managed.path, "/x", protocol)
    with pytest.raises(NotFoundError, match="no engine is running"):
        client.take_over(str(tmp_path / "none"), target, protocol)


def test_which_guests_have_a_debug_console() -> None:
    def guest(cmdline: str, version: str, *extensions: str) -> GuestSettings:
        found = GuestSettings(kernel="/g/vmlinux", initrd="/g/initrd", extensions=list(extensions))
        found.cmdline, found.kernel_version = cmdline, version
        return found

    enabled = "quiet agent.debug_console agent.debug_console_vport=1026"
    debug_console.check(guest(enabled, "6.12", "/g/extension-shell-0123"))
    debug_console.check(guest(enabled, ""))  # somebody else's, whose initrd may have a shell
    with pytest.raises(StateError, match="was not enabled"):
        debug_console.check(guest("quiet", "6.12", "/g/extension-shell-0123"))
    with pytest.raises(StateError, match="has no shell"):
        debug_console.check(guest(enabled, "6.12", "/g/extension-iptables-0123"))
