"""`tools/setup`, as far as it needs no package and no server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "tools/setup"
_ONLY_FUNCTIONS = "/^[a-z_]*() {/,/^}/p; /^temporary=/p"


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
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "TMPDIR": str(work)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == ("made" if ending == "exit 0" else "skipped"), done.stderr
    assert os.listdir(work) == []
    assert (tmp_path / "made/virtiofsd").exists() == (ending == "exit 0")
