"""What `make dist` makes, as far as it can be looked at without installing it; `tools/prove-packages` does that."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import zipfile
from pathlib import Path

import dist
import installer
import pytest
import release_notes

import kata
from kata import paths
from kata.errors import GuestAssetError
from kata.guest import manifest, recipe

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_one() -> None:
    assert release_notes.version() == kata.__version__
    assert release_notes.crate_versions() == dict.fromkeys(("agent", "inspector"), kata.__version__)
    assert installer.digest().startswith(f"{kata.__version__}-")


def test_the_wheel_has_the_code_and_what_it_runs(tmp_path: Path) -> None:
    if not (installer.AGENT.exists() and installer.INSPECTOR.exists()):
        pytest.skip("needs agent and inspector (tools/setup run)")
    wheel = dist.make_wheel(tmp_path, guest=False)
    assert wheel.name == f"kata-{kata.__version__}-py3-none-{dist.PLATFORM}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        sources = {
            str(path.relative_to(ROOT / "src"))
            for path in (ROOT / "src/kata").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert sources <= names
        shipped = {name.removeprefix("kata/shipped/") for name in names if name.startswith("kata/shipped/")}
        assert shipped == {"kata-agent", "kata-inspector"} | {
            f"recipe/{path.name}" for path in (ROOT / "guest").iterdir()
        }
        assert archive.read("kata/shipped/kata-agent") == installer.AGENT.read_bytes()
        about = f"kata-{kata.__version__}.dist-info"
        scripts = configparser.ConfigParser(delimiters="=")
        scripts.optionxform = str  # type: ignore[assignment, method-assign]
        scripts.read_string(archive.read(f"{about}/entry_points.txt").decode())
        assert set(scripts["console_scripts"]) == set(installer.COMMANDS)
        assert f"Version: {kata.__version__}\n" in archive.read(f"{about}/METADATA").decode()


@pytest.mark.parametrize("what", ["notes", "deb"])
def test_what_cannot_be_made_is_an_error_with_a_hint(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n")
    monkeypatch.setattr(release_notes, "CHANGELOG", tmp_path / "CHANGELOG.md")
    # A guest that is damaged is found when its turn comes.
    monkeypatch.setattr(dist, "GUEST", tmp_path)
    monkeypatch.setitem(dist.MAKERS, "deb", lambda target: dist.ship_guest(target))
    monkeypatch.setattr("sys.argv", ["dist.py", str(tmp_path / "made"), what])
    assert dist.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "\nhint: " in said


def test_the_notes_of_a_version_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n")
    monkeypatch.setattr(release_notes, "CHANGELOG", tmp_path / "CHANGELOG.md")
    monkeypatch.setattr("sys.argv", ["release_notes.py"])
    assert release_notes.main() == 1
    assert capsys.readouterr().err == f"error: CHANGELOG.md has no heading '## {kata.__version__} (...)'\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's directory as an installation has it, which `kata.paths` takes for its own."""
    package = tmp_path / "site-packages/kata"
    (package / "shipped/guest").mkdir(parents=True)
    monkeypatch.setattr(paths, "_PACKAGE", str(package))
    for name in ("KATA_GUEST_DIR", "KATA_AGENT_BINARY", "KATA_INSPECTOR_BINARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    return package


def guest(directory: Path, version: str) -> None:
    """A guest that can be told from another."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("kernel", "initrd"):
        (directory / name).write_bytes(b"1234")
    facts = {"path": "kernel", "size": 4, "kind": "small", "version": version}
    initrd = {"path": "initrd", "size": 4, "agent_version": "1"}
    (directory / manifest.NAME).write_text(
        json.dumps({"format": manifest.FORMAT, "kernel": facts, "initrd": initrd})
    )


def test_the_guest_that_came_along_is_taken_until_one_is_built(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GuestAssetError, match=f"{tmp_path}/state/guest"):
        manifest.installed()
    guest(package / "shipped/guest", "1")
    assert manifest.installed().kernel == str(package / "shipped/guest/kernel")
    guest(tmp_path / "state/guest", "2")
    assert manifest.installed().kernel_version == "2"
    # Whoever names a directory does not get what is elsewhere.
    monkeypatch.setenv("KATA_GUEST_DIR", str(tmp_path / "empty"))
    with pytest.raises(GuestAssetError, match=f"{tmp_path}/empty"):
        manifest.installed()


def test_an_installation_has_what_it_builds_guests_from(package: Path) -> None:
    installer.ship(package.parent / "other/kata")
    os.rename(package.parent / "other/kata/shipped", package / "other")
    assert {path.name for path in (package / "other").iterdir()} == {
        "kata-agent",
        "kata-inspector",
        "recipe",
    }
    os.rename(package / "other/recipe", package / "shipped/recipe")
    assert recipe.read(recipe.CONFIGURATION) == (ROOT / "guest" / recipe.CONFIGURATION).read_text()
    assert [name for name, _text in recipe.patches()] == sorted(
        path.name for path in ROOT.glob("guest/*.patch")
    )
    assert paths.agent_binary() == str(package / "shipped/kata-agent")
    assert paths.inspector_binary() == str(package / "shipped/kata-inspector")


@pytest.mark.parametrize("name", dist.SCRIPTS)
def test_scripts_of_the_debian_package_are_shell(name: str) -> None:
    path = dist.DEBIAN / name
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["sh", "-n", path], check=False).returncode == 0
    assert "\nset -e\n" in path.read_text()


def test_the_notes_of_a_release_are_its_part_of_the_changelog() -> None:
    changelog = (
        "# Changelog\n\nWords.\n\n## 0.2.0 (2027-01-31)\n\n### A\n\n* One ([two](docs/two.md)). [x](https://x.example/)\n\n"
        "## 0.1.0 (not released)\n\n* Old\n"
    )
    assert release_notes.notes(changelog, "0.2.0") == (
        "kata 0.2.0 (2027-01-31)\n\n### A\n\n* One (two). [x](https://x.example/)\n"
    )
    assert release_notes.notes(changelog, "0.1.0").endswith("\n\n* Old\n")
    with pytest.raises(LookupError, match=r"## 0\.3\.0"):
        release_notes.notes(changelog, "0.3.0")
    release_notes.part(release_notes.CHANGELOG.read_text(), kata.__version__)


def test_what_keeps_a_commit_from_being_a_release_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changelog = tmp_path / "CHANGELOG.md"
    monkeypatch.setattr(release_notes, "CHANGELOG", changelog)
    said: dict[str, str] = {}
    monkeypatch.setattr(release_notes, "_git", lambda *arguments: said.get(arguments[0], ""))
    changelog.write_text(f"## {kata.__version__} (2027-01-31)\n\n* A\n")
    assert release_notes.obstacles() == []
    changelog.write_text(f"## {kata.__version__} (not released)\n\n* A\n")
    said.update(status=" M README.md", tag=f"v{kata.__version__}")
    assert release_notes.obstacles() == [
        f"the CHANGELOG's heading of {kata.__version__} has no date, but 'not released'",
        "something is not committed",
        f"the tag v{kata.__version__} exists",
    ]
