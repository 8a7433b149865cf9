"""`kata build` before a builder is at work. One that is, is in tests/vm."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata.cli import build, main
from kata.errors import HostError


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return tmp_path / "s"


def test_without_a_builder_it_says_what_to_install(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main.main(["build", "-t", "x", str(tmp_path)]) == 125
    said = capsys.readouterr().err
    assert "neither is on the PATH" in said
    assert "apt-get install buildah" in said
    assert not (state / "build").exists()
    with pytest.raises(HostError):
        build.builder()


def test_buildah_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("podman", "buildah"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        assert build.builder() == str(tmp_path / name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere"], "is no directory"),
        (["-t", "a@sha256:" + "0" * 64, "."], "no name of an image"),
        (["--network", "host", "."], "is not offered for RUN"),
    ],
)
def test_what_it_refuses(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["build", *words]) == 125
    assert said in capsys.readouterr().err
