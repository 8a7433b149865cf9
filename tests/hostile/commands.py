"""Every command and every option with values that nobody meant: a sentence and an exit status, and no traceback."""

from __future__ import annotations

import itertools
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import child
import mutate

from kata.cli import main as cli

_SKIPPED = frozenset(
    {"install", "uninstall"}
)  # they look for the machine's own daemons, whatever the values
_FIXED: tuple[tuple[str, ...], ...] = (
    *((name, "--help") for name in cli.COMMANDS),
    *((name,) for name in cli.COMMANDS if name not in (*_SKIPPED, "guest", "gc", "doctor")),
    *((name, "--nonsense") for name in cli.COMMANDS),
    (),
    ("",),
    ("--",),
    ("\udcff",),
    ("help", "nothing"),
)


def sweep(directory: Path, count: int, seed: int) -> child.Tally:
    """Try so many command lines, and those that every run tries.

    Args:
        directory: Unused; KATA_STATE_DIR and KATA_RUN_DIR are empty directories.
        count: How many besides.
        seed: Of the choice of values.
    """
    tally = child.Tally("commands")
    for words in _FIXED:
        _try(tally, words)
    for closed in ((0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)):
        for words in (("ps",), ("version",), ("run", "oci:/nonexistent"), ("nonsense",)):
            _try(tally, words, closed)
    for number in range(count):
        _try(tally, tuple(_line(random.Random(f"{seed}/{number}"))))
    return tally


def _try(tally: child.Tally, words: tuple[str, ...], closed: tuple[int, ...] = ()) -> None:
    name = " ".join(word if len(word) < 40 else f"{word[:40]}..." for word in words)
    if closed:
        name += f" (without {', '.join(map(str, closed))})"
    outcome = child.run(ascii(name), lambda: cli.main(list(words)), closed)
    if 2 in closed or words[:1] == ("doctor",):  # whose findings are on standard output
        outcome.said = outcome.said or "elsewhere"
    tally.add(outcome, lambda status: status in (0, 1, 125, 126, 127))


def _line(random_: random.Random) -> list[str]:
    name = random_.choice([name for name in cli.COMMANDS if name not in _SKIPPED])
    words = [name]
    options = _options(name)
    for option, takes_value in random_.sample(options, min(len(options), random_.randrange(4))):
        # What would go on for ever when all is well is no fault.
        if option in ("-f", "--follow", "-i", "-t", "--interactive", "--tty", "--interval"):
            continue
        words.append(option)
        if takes_value:
            words.append(random_.choice(mutate.TEXTS))
    if name == "guest":
        return ["guest", random_.choice(("info", *mutate.TEXTS))]
    words += [random_.choice(mutate.TEXTS) for _ in range(random_.randrange(4))]
    return words


def _options(command: str) -> list[tuple[str, bool]]:
    """The options of a command: (how it is written, whether a value follows)."""
    from importlib import import_module

    module: Any = import_module(f"kata.cli.{cli.COMMANDS[command][0]}")
    return [
        (name, bool(option.metavar)) for option in module.COMMANDS[command].options for name in option.names
    ]


def programs(directory: Path, seed: int) -> child.Tally:
    """The programs beside `kata`, executed as they are installed."""
    tally = child.Tally("programs")
    root = Path(__file__).resolve().parents[2]
    lines = [
        ["containerd-shim-kata-v2"],
        *(
            ["containerd-shim-kata-v2", word]
            for word in ("start", "delete", "nonsense", "-info", "-v", "\udcff")
        ),
        *(
            ["containerd-shim-kata-v2", "-namespace", "n", "-id", value, "start"]
            for value in mutate.TEXTS[:20]
        ),
        ["kata-agent-ctl"],
        *(
            ["kata-agent-ctl", *words]
            for words in itertools.product(("--nonsense", "Health", "\udcff"), ("", "{", "[]"))
        ),
        *(["kata-agent-ctl", "--server-address", value, "Check"] for value in mutate.TEXTS[:20]),
    ]
    for words in lines:
        if any("\0" in word for word in words):
            continue
        program = str(root / "tools" / words[0])
        outcome = child.run(
            ascii(" ".join(word[:40] for word in words)),
            partial(os.execv, program, [os.fsencode(word) for word in words]),
        )
        outcome.said = outcome.said or ("said on standard output" if outcome.status else "")
        tally.add(outcome, lambda status: status in (0, 1, 2, 125, 126, 127))
    return tally
