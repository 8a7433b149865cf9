"""`tools/setup`, as far as it needs no package and no server."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "tools/setup"
_ONLY_FUNCTIONS = "/^[a-z_]*() {/,/^}/p; /^temporary=/p"


def bash(script: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    """How a script ends whose temporary files are in that directory."""
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("ending", ["exit 0", "exit 7", "kill $$"])
def test_a_step_leaves_no_temporary_directory(tmp_path: Path, ending: str) -> None:
    """Whether what it calls succeeds, fails or is killed."""
    work, cargo = tmp_path / "tmp", tmp_path / "cargo"
    work.mkdir()
    # What `cargo install --root` leaves, and whatever it was doing when it failed.
    cargo.write_text(
        "#!/bin/bash\n[[ $4 == --root ]] || exit 9\nmkdir -p $5/bin $5/target/half\ntouch $5/bin/virtiofsd\n"
        + ending
    )
    cargo.chmod(0o755)
    script = (
        f"set -euo pipefail; . <(sed -n '{_ONLY_FUNCTIONS}' {SETUP}); cargo={cargo}; virtiofsd_version=1\n"
        f"logs={tmp_path}/logs tty=0 root={tmp_path}; say() {{ :; }}; ticking=''; ticker() {{ :; }}\n"
        f"optional_step build build_virtiofsd {tmp_path}/made && echo made || echo skipped"
    )
    done = bash(script, work)
    assert done.stdout.strip() == ("made" if ending == "exit 0" else "skipped"), done.stderr
    assert os.listdir(work) == []
    assert (tmp_path / "made/virtiofsd").exists() == (ending == "exit 0")


@pytest.mark.parametrize("status", [0, 7])
def test_what_goes_on_aside_is_shown_and_counts(tmp_path: Path, status: int) -> None:
    script = (
        f"set -euo pipefail; . <(sed -n '{_ONLY_FUNCTIONS}' {SETUP}); logs={tmp_path}/logs tty=1 aside='' ticking=''\n"
        "ticker() { exec sleep 60; }; root=.; said() { echo inside; return $1; }\n"
        f"build() {{ step 'build it' said {status}; }}\n"
        "aside build; say foreground; joined; say after"
    )
    done = bash(script, tmp_path)
    first, second, *more = done.stderr.splitlines()
    assert first == "foreground"
    if status:
        assert (second, done.returncode) == ("  FAILED build it", 1)
        assert "    | inside" in more
        assert "after" not in more
    else:
        assert second.startswith("  ok  build it (")
        assert (more, done.returncode) == (["after"], 0)
    assert os.listdir(tmp_path) == ["logs"]


TOOLS = sorted(
    path.name
    for path in SETUP.parent.iterdir()
    if path.is_file() and path.name != "usage" and b'/usage"\n' in path.read_bytes()
)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_that_is_asked_for_help_does_nothing_else(tmp_path: Path, name: str) -> None:
    """``tools/clean --help`` cleaned, and ``tools/setup --help`` waited for the set-up that was going on."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for file in ("usage", name):
        shutil.copy2(SETUP.parent / file, tools / file)
    kept = tmp_path / "build"
    kept.mkdir()
    done = subprocess.run([tools / name, "--help"], capture_output=True, text=True, check=True, timeout=60)
    first = (tools / name).read_text().splitlines()[1]
    assert done.stdout.splitlines()[0] == first.removeprefix("# ")
    assert (done.stderr, sorted(tmp_path.iterdir())) == ("", [kept, tools])


def test_the_tools_that_remove_or_install_are_among_them() -> None:
    assert {"clean", "setup", "renew-constraints", "prove-packages", "bare-machine"} <= set(TOOLS)
