"""The checks of habits: commit messages, scripts in findings/, what pyproject.toml says."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import check_commits  # noqa: E402
import check_findings  # noqa: E402

# ---- commits ----


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("Add a thing\n\nIt was missing.\n", ""),
        ("A" * 72 + "\n\nBecause.", ""),
        ("A" * 73 + "\n\nBecause.", "the title has 73 characters, 72 at most"),
        ("x", "the title does not begin with a capital letter"),
        ("Add a thing.\n\nBecause.", "the title ends with a full stop"),
        ("Add a thing", "there is no body: say why"),
        ("Add a thing\nand another\n", "no empty line follows the title"),
        ('Revert "x"\n\nThis reverts commit 1.', ""),
    ],
)
def test_the_form_of_a_message(message: str, fault: str) -> None:
    found = list(check_commits.faults(message))
    assert fault in found if fault else found == []


def test_only_commits_after_the_base_are_looked_at(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    base = git("rev-parse", "HEAD")
    assert check_commits.check(base, tmp_path) == ([], "")
    git("commit", "-q", "--allow-empty", "-m", "Do it\n\nOne line.\n\nAnother.")
    assert check_commits.check(base, tmp_path) == ([], "")
    (tmp_path / "a.md").touch()
    git("add", "a.md")
    git("commit", "-q", "-m", "Say it")  # documents alone
    assert check_commits.check(base, tmp_path) == ([], "")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "a.py").touch()
    git("add", "a.md", "a.py")
    git("commit", "-q", "-m", "do it.")
    name = git("rev-parse", "--short", "HEAD")
    faults, reason = check_commits.check(base, tmp_path)
    assert reason == ""
    assert [line.partition(": ")[0] for line in faults] == [f"{name} 'do it.'"] * 3
    assert check_commits.check("1" * 40, tmp_path) == ([], f"there is no commit {'1' * 40} in this clone")


# ---- findings ----

GOOD = "#!/bin/sh\n# What: a file is gone.\n# Version: Linux 6.1\n# Source: fs/namei.c\nexit 1\n"


def test_a_script_says_what_it_shows(tmp_path: Path) -> None:
    script = tmp_path / "gone"
    script.write_text(GOOD)
    assert check_findings.check(tmp_path) == ["gone: it has no run bit (chmod +x)"]
    script.chmod(0o755)
    (tmp_path / "README.md").touch()
    (tmp_path / "gone.data").mkdir()
    assert check_findings.check(tmp_path) == []
    script.write_text(GOOD.replace("# Version: Linux 6.1\n", "# Version:\n").replace("#!/bin/sh\n", ""))
    assert check_findings.check(tmp_path) == [
        "gone: its first line does not say what runs it (#!)",
        "gone: its header has no line '# What: ...'",
        "gone: its header has no line '# Version: ...'",
    ]


def test_the_findings_of_this_checkout() -> None:
    assert check_findings.check(ROOT / "findings") == []


# ---- pyproject.toml ----


def test_the_project_file_names_what_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / project["readme"]).exists()
    assert all((ROOT / name).exists() for name in project["license-files"])
    spec = importlib.util.spec_from_file_location("installer", ROOT / "tools/installer.py")
    assert spec is not None
    assert spec.loader is not None
    installer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installer)
    # The same programs as `make install` makes links for, by the same files.
    files = {
        name: f"{target.partition(':')[0].replace('.', '/')}.py"
        for name, target in project["scripts"].items()
    }
    assert files == installer.COMMANDS
    for target in project["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
