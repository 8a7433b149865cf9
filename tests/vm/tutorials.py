"""Runs the commands of a page of the documents in their order, and compares what they print with what stands there.

A page's fenced blocks of the kind ``sh`` are one script, run by bash, which ends at the first command that fails. A
block of the kind ``text`` right behind one is its standard output, the whole of it; ``...`` in a line stands for
anything, alone for any lines. A block that cannot be run here has a comment before it:
``<!-- not run: the reason, and what runs it instead -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ROOT / "docs"

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_END = "---- end of block"


class Block:
    """A block of commands.

    Attributes:
        text: The commands.
        reason: Why no test runs them; empty if one does.
        expected: What they print, a pattern for each line; None if the page does not say.
    """

    __slots__ = ("expected", "reason", "text")

    def __init__(self, text: str, reason: str) -> None:
        self.text = text
        self.reason = reason
        self.expected: list[str] | None = None


def blocks(text: str) -> list[Block]:
    """The blocks of commands of a page."""
    found: list[Block] = []
    commands_end = -1
    for match in _BLOCK.finditer(text):
        if match["kind"] == "sh":
            found.append(Block(match["text"], match["reason"] or ""))
            commands_end = match.end()
        elif match["kind"] == "text" and found and not text[commands_end : match.start()].strip():
            found[-1].expected = match["text"].splitlines()
    return found


def differences(expected: list[str], printed: str) -> str:
    """What is wrong with an output; empty if it is as the page has it."""
    lines = [
        re.escape(line).replace(r"\.\.\.", ".*") + "\n" if line != "..." else r"(?:.*\n)*"
        for line in expected
    ]
    same = re.fullmatch("".join(lines), printed)
    return "" if same else f"expected:\n{os.linesep.join(expected)}\nprinted:\n{printed}"


def run(page: str, directory: Path, environment: Mapping[str, str], changes: Mapping[str, str] = {}) -> None:
    """Run a page's commands.

    Args:
        page: Its path below docs/.
        directory: Where they run; empty.
        environment: Theirs, in which ``kata`` and the client are on the PATH.
        changes: Texts that are replaced before, for what belongs to the whole machine: ports.

    Raises:
        AssertionError: A command failed, or printed something else.
    """
    todo = [block for block in blocks((DOCUMENTS / page).read_text()) if not block.reason]
    assert todo, f"{page} has no commands"
    script = "".join(f"{block.text}echo '{_END}'\n" for block in todo)
    for old, new in changes.items():
        assert old in script, f"{page} does not have {old}"
        script = script.replace(old, new)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
        check=False,
    )
    printed = done.stdout.split(f"{_END}\n")
    which = todo[min(len(printed), len(todo)) - 1].text
    assert done.returncode == 0, f"{page}: {done.returncode} in\n{which}\n{done.stdout}\n{done.stderr}"
    for block, output in zip(todo, printed, strict=False):
        wrong = differences(block.expected, output) if block.expected is not None else ""
        assert not wrong, f"{page}:\n{block.text}\n{wrong}\n{done.stderr}"


def program(directory: Path, name: str, *command: str) -> None:
    """Put a program on the PATH of a page: *directory*/*name*, which executes *command* and what it is given."""
    path = directory / name
    path.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
    path.chmod(0o755)
