"""Who is killed first on a host without memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
PROGRAM = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
from kata.resources import oom_score
child = subprocess.Popen(["sleep", "100"])
protected = oom_score.protect_engine()
assert oom_score.set_machine(int(sys.argv[2]))
own = int(open("/proc/self/oom_score_adj").read())
assert protected == (own <= oom_score.ENGINE), own
print(own, open(f"/proc/{child.pid}/oom_score_adj").read())
child.kill()
child.wait()
"""


@pytest.mark.parametrize("wanted", [-1000, 0, 500, 5000])
def test_the_machine_goes_before_the_engine(wanted: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, SOURCE, str(wanted)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    own, machine = map(int, done.stdout.split())
    assert machine == min(1000, max(wanted, own + 1))
