"""`--restart`: which policies there are, and the unit that is written for one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kata.cli import records, restart, session
from kata.errors import HostError, ToldToEnd, UnsupportedError, UsageError


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    return tmp_path


@pytest.mark.parametrize(
    "text", ["sometimes", "always:3", "on-failure:", "on-failure:-1", "on-failure:x", ""]
)
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(UsageError, match="is no policy"):
        restart.parse(text)


def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert restart.parse("no") is None
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(restart, "_in_user_namespace", lambda: False)
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    with pytest.raises(UnsupportedError, match="does not run systemd") as caught:
        restart.parse("always")
    assert "kata start -a NAME" in caught.value.hint
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    assert restart.parse("unless-stopped") == {"name": "unless-stopped", "max": 0}
    assert restart.parse("on-failure:3") == {"name": "on-failure", "max": 3}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnsupportedError, match="only root's"):
        restart.parse("always")


@pytest.mark.parametrize("text", ["always", "unless-stopped", "on-failure", "on-failure:3"])
def test_systemd_reads_the_unit(text: str, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a name that has a meaning in unit files, and it is gone with the container."""
    units = state / "units"
    units.mkdir()
    monkeypatch.setattr(restart, "_DIRECTORY", str(units))
    monkeypatch.setattr(restart, "_WANTS", str(units / "multi-user.target.wants"))
    told: list[tuple[str, ...]] = []

    def systemctl(*words: str, timeout_s: float | None = None) -> str:
        told.append(words)
        return ""

    monkeypatch.setattr(restart, "_systemctl", systemctl)
    monkeypatch.setenv("KATA_HYPERVISOR", "firecracker")
    monkeypatch.setenv("KATA_CONF_FILE", '/with a $HOME, 5% and "that"')
    monkeypatch.setenv(records.RESTART_UNIT, "of another")
    name, _, often = text.partition(":")
    # Its own limit is forgotten whenever units are read again.
    limit = "StartLimitIntervalSec=0\n"
    pending = records.PendingContainer("web")
    restart.write_unit(pending, {"name": name, "max": int(often or 0)})
    unit = units / restart.unit_name(pending.id)
    content = unit.read_text()
    assert limit in content
    assert "StartLimitBurst" not in content
    assert ("ConditionPathExists=!" in content) == (name != "always")
    # As the command was called, so do its restarts; $ has no meaning here, systemd.exec(5).
    assert 'Environment="KATA_HYPERVISOR=firecracker"\n' in content
    assert 'Environment="KATA_CONF_FILE=/with a $HOME, 5%% and \\"that\\""\n' in content
    assert "of another" not in content
    assert f"Restart={'on-failure' if name == 'on-failure' else 'always'}\n" in content
    assert os.readlink(units / "multi-user.target.wants" / unit.name) == str(unit)
    assert told == [("daemon-reload",)]
    if shutil.which("systemd-analyze"):
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
        )
        assert unit.name not in checked.stderr, checked.stderr
    pending.discard()
    assert [path for path in units.rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize(
    ("active", "runs", "stops"),
    [
        # A unit whose container runs ends as that does, with the grace that was asked for.
        ("active", True, False),
        ("activating", True, False),
        # It waits for the time of a restart, or its machine boots.
        ("activating", False, True),
        ("inactive", False, False),
    ],
)
def test_who_stops_it_by_hand_before_it_is_started_again(
    active: str, runs: bool, stops: bool, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    container = SimpleNamespace(id="abc", directory=str(state), running=lambda: runs)

    def systemctl(*words: str, timeout_s: float | None = None) -> str:
        told.append(words[0])
        # What the unit runs has begun meanwhile.
        restart.begin(container)  # type: ignore[arg-type]
        return f"{active}\n"

    monkeypatch.setattr(restart, "_systemctl", systemctl)
    restart.mark_stopped(container)  # type: ignore[arg-type]
    assert told == ["show", *(["stop"] if stops else [])]
    if active == "activating":
        assert restart.was_stopped(container)  # type: ignore[arg-type]
    restart.begin(container)  # type: ignore[arg-type]
    assert not restart.was_stopped(container)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ends", "allowed", "restarts", "by_hand", "expected"),
    [
        (0, 2, 2, False, 0),
        (3, 2, 1, False, 3),
        (3, 2, 2, False, signal.SIGPROF),
        (3, 0, 99, False, 3),
        (None, 2, 1, False, 125),
        (None, 2, 2, False, signal.SIGPROF),
        # Also what was the sign of an end by hand once is a container's own.
        (250, 0, 0, False, 250),
        (250, 2, 0, True, signal.SIGVTALRM),
        (0, 2, 9, True, signal.SIGVTALRM),
    ],
)
def test_how_the_process_of_a_unit_ends(
    ends: int | None,
    allowed: int,
    restarts: int,
    by_hand: bool,
    expected: int,
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    container = SimpleNamespace(id="abc", directory=str(state), record={"restart": {"max": allowed}})

    def run_attached(*_: object, **__: object) -> int:
        os.write(2, b"of the container")
        if by_hand:
            (state / "stopped-by-hand").touch()
        if ends is None:
            raise HostError("it cannot be started", "try")
        return ends

    monkeypatch.setattr(session, "run_attached", run_attached)
    monkeypatch.setattr(restart, "_systemctl", lambda *words, **_: f"{restarts}\n")
    before, stderr = os.dup(2), sys.stderr
    try:
        if isinstance(expected, signal.Signals):
            with pytest.raises(ToldToEnd) as caught:
                restart.attend(container)  # type: ignore[arg-type]
            assert caught.value.number == expected
        else:
            assert restart.attend(container) == expected  # type: ignore[arg-type]
        sys.stderr.close()
    finally:
        os.dup2(before, 2)
        os.close(before)
        sys.stderr = stderr
    # The journal is for kata's own words.
    said = capfd.readouterr().err
    assert "of the container" not in said
    assert ("it cannot be started" in said) == (ends is None)
