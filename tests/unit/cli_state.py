"""Commands of `kata` against a state directory of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata.cli import main


@pytest.fixture(name="state", autouse=True)
def state_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory; commands take the user for root."""
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return tmp_path / "s"


def outcome(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What a command has printed, if it succeeds; otherwise its error."""
    assert main.main(list(words)) == status
    shown = capsys.readouterr()
    return shown.out if status == 0 else shown.err
