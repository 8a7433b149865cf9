"""Hooks of the runtime specification: what they get, and what becomes of those that fail."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kata.engine.containers import hooks
from kata.engine.hostns import Namespaces
from kata.errors import HostError

if os.geteuid() != 0:
    pytest.skip("entering namespaces needs root", allow_module_level=True)

STATE = hooks.state("c", "/bundle", 7, "creating", {"ociVersion": "1.1.0", "annotations": {"a": "b"}})


def hook(script: str, **more: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **more}


def run(*these: dict[str, Any]) -> None:
    host = Namespaces()
    try:
        hooks.run("prestart", these, STATE, host)
    finally:
        host.close()


def test_a_hook_gets_the_state_its_arguments_and_nothing_else_of_ours(tmp_path: Path) -> None:
    script = f'cat >{tmp_path}/state; {{ pwd; echo "$0 $1"; /usr/bin/env; }} >{tmp_path}/seen; echo noise'
    run({"path": "/bin/sh", "args": ["sh", "-c", script, "zero", "one"], "env": ["A=1=2", "B="]})
    assert json.loads((tmp_path / "state").read_text()) == {
        "ociVersion": "1.1.0",
        "id": "c",
        "status": "creating",
        "pid": 7,
        "bundle": "/bundle",
        "annotations": {"a": "b"},
    }
    directory, arguments, *environment = (tmp_path / "seen").read_text().splitlines()
    assert (directory, arguments) == ("/", "zero one")
    assert {line for line in environment if not line.startswith(("PWD=", "SHLVL=", "_="))} == {"A=1=2", "B="}


def test_a_hook_that_fails_is_named_with_its_last_words_and_ends_the_row(tmp_path: Path) -> None:
    later = hook(f"touch {tmp_path}/later")
    with pytest.raises(
        HostError, match=r"error running prestart hook #0: /bin/sh ended with 3: oh \\x1b\[31mno"
    ) as caught:
        run(hook("printf 'oh \\033[31mno' >&2; exit 3"), later)
    assert "config.json" in caught.value.hint
    assert not (tmp_path / "later").exists()
    with pytest.raises(HostError, match="ended with 1") as caught:
        run(hook("head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1"))
    assert len(caught.value.message) < 2 * hooks.SAID_BYTES, "what it says is bounded"


@pytest.mark.parametrize("path", ["/none/such", "relative", "/etc/passwd", ""])
def test_a_hook_that_cannot_be_executed_is_named(path: str) -> None:
    with pytest.raises(HostError, match=f"error running prestart hook #0: {path} cannot be executed"):
        run({"path": path})


def test_a_hook_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    script = f"echo $$ >{tmp_path}/pid; exec sleep 600"
    with pytest.raises(HostError, match="took longer than its 1 s"):
        run(hook(script, timeout=1))
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
