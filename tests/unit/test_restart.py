"""`--restart`: which policies there are, and the unit that is written for one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from kata.cli import records, restart
from kata.errors import UnsupportedError, UsageError


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
    pending = records.PendingContainer("web")
    restart.write_unit(pending, {"name": name, "max": int(often or 0)})
    unit = units / restart.unit_name(pending.id)
    content = unit.read_text()
    assert ("StartLimitBurst=4" in content) == bool(often)
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


@pytest.mark.parametrize("substate", ["running", "auto-restart"])
def test_who_stops_it_by_hand_before_it_is_started_again(
    substate: str, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def systemctl(*words: str, timeout_s: float | None = None) -> str:
        told.append(words[0])
        return f"{substate}\n"

    monkeypatch.setattr(restart, "_systemctl", systemctl)
    container = SimpleNamespace(id="abc", directory=str(state))
    restart.mark_stopped(container)  # type: ignore[arg-type]
    # A unit whose container runs ends as that does, with the grace that was asked for.
    assert told == (["show", "stop"] if substate == "auto-restart" else ["show"])
    assert restart.was_stopped(container)  # type: ignore[arg-type]
    restart.begin(container)  # type: ignore[arg-type]
    assert not restart.was_stopped(container)  # type: ignore[arg-type]
