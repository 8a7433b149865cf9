"""What the engine's concurrency model costs: start time and memory, with and without a pre-importing parent.

Four ways to have an engine's code in a process, measured in shuffled rounds in one run:

* ``bare``: ``python -I -S -c pass``, the floor.
* ``selectors``: the modules a hand-written loop would need (selectors, socket, json), nothing of ours.
* ``asyncio``: everything that an engine has imported once it serves.
* ``forked``: a fork of a parent that has imported the same: a pre-importing parent that lives on the node.

``hypervisor`` is what of ``asyncio`` comes before QEMU is executed: the part that a start really waits for, since the
rest is imported while the guest's kernel boots. Times are medians in ms; memory is of the process in kB: RSS, and PSS
(shared pages divided among their users), read from smaps_rollup.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src"
PYTHON = "/usr/bin/python3"

_PREFIX = f"import sys; sys.path.insert(0, {str(SRC)!r})\n"
EARLY = _PREFIX + "import kata.engine.main\nimport kata.engine.lifecycle.boot\n"
WHOLE = EARLY + (
    "sys.modules['ssl'] = None\nimport asyncio\n"
    "import kata.engine.lifecycle.sandbox, kata.engine.services.task_service, kata.ttrpc.server\n"
    "import kata.engine.services.sandbox_service\n"
    "import kata.hypervisor.qemu.machine\n"
)
VARIANTS = {
    "bare": "pass\n",
    "selectors": "import selectors, socket, json\n",
    "hypervisor": EARLY,
    "asyncio": WHOLE,
}
_REPORT = """
import os
def report():
    sizes = {}
    with open('/proc/self/smaps_rollup') as lines:
        for line in lines:
            name, _, rest = line.partition(':')
            if name in ('Rss', 'Pss'):
                sizes[name] = int(rest.split()[0])
    os.write(1, f"{sizes['Rss']} {sizes['Pss']}\\n".encode())
"""
_PARENT = """
report()
while os.read(0, 1):
    if os.fork() == 0:
        report()
        os._exit(0)
    os.wait()
"""


def _fresh(code: str) -> tuple[float, int, int]:
    began = time.perf_counter()
    process = subprocess.Popen(
        [PYTHON, "-I", "-S", "-c", code + _REPORT + "report()"],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    rss, pss = map(int, process.stdout.readline().split())
    took = (time.perf_counter() - began) * 1e3
    process.wait()
    process.stdout.close()
    return took, rss, pss


def _forked(parent: subprocess.Popen[bytes]) -> tuple[float, int, int]:
    assert parent.stdin is not None
    assert parent.stdout is not None
    began = time.perf_counter()
    parent.stdin.write(b"x")
    parent.stdin.flush()
    rss, pss = map(int, parent.stdout.readline().split())
    return (time.perf_counter() - began) * 1e3, rss, pss


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="rounds (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    subprocess.run(
        [PYTHON, "-m", "compileall", "-q", str(SRC)],
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
    )
    parent = subprocess.Popen(
        [PYTHON, "-I", "-S", "-c", WHOLE + _REPORT + _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    parent_rss, parent_pss = map(int, parent.stdout.readline().split())
    seen: dict[str, list[tuple[float, int, int]]] = {name: [] for name in (*VARIANTS, "forked")}
    for _ in range(arguments.rounds):
        order = list(seen)
        random.shuffle(order)
        for name in order:
            seen[name].append(_forked(parent) if name == "forked" else _fresh(VARIANTS[name]))
    parent.stdin.close()
    parent.wait()
    parent.stdout.close()
    result = {
        name: {
            key: round(statistics.median(row[index] for row in rows), 1)
            for index, key in enumerate(("ms", "rss_kb", "pss_kb"))
        }
        for name, rows in seen.items()
    }
    result["parent"] = {"rss_kb": parent_rss, "pss_kb": parent_pss}
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return 0
    print(f"{'variant':<12}{'ms':>8}{'RSS kB':>10}{'PSS kB':>10}")
    for name, row in result.items():
        print(f"{name:<12}{row.get('ms', ''):>8}{row['rss_kb']:>10.0f}{row['pss_kb']:>10.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
