"""What `make conformance` makes of its results: the page, what counts as unexplained, and going on where it was."""

from __future__ import annotations

from pathlib import Path

import page
import pytest
from critest import Result
from main import Results
from matrix import Cell, Cells, section, unexplained

PASSED, FAILED = Result("passed", "", 1.0), Result("failed", "first line\nsecond", 2.0)
VERSIONS = page.Versions("v1", "2", "3", "kata 4")


def test_a_test_that_only_kata_fails_needs_a_reason() -> None:
    results = {
        ("runc", "a"): PASSED,
        ("kata", "a"): FAILED,
        ("runc", "both"): FAILED,
        ("kata", "both"): FAILED,
        ("runc", "NamespaceOption runtime should support HostPID"): PASSED,
        ("kata", "NamespaceOption runtime should support HostPID"): FAILED,
    }
    assert page.unexplained(results) == ["a"]
    text = page.page(results, VERSIONS, ["## Clients", ""])
    assert "| a | passed | not known: first line |" in text
    assert f"| NamespaceOption runtime should support HostPID | passed | {page.OWN_KERNEL} |" in text
    assert "| passed | 2 | 0 |" in text


def test_what_clients_see_is_compared() -> None:
    found = {
        ("ctr", "run -d"): Cell("RUNNING", "RUNNING"),
        ("ctr", "top"): Cell("sleep", "qemu"),
        ("ctr", "kill"): Cell("status 3", "status 4"),
        # A reason is one for what it names, and for nothing else.
        ("crictl", "OOM"): Cell("Error 137", "OOMKilled 137"),
        ("docker", "top"): Cell("sleep", "bash"),
        # Equal, and worthless: with runc it is not what it should be.
        ("ctr", "pause"): Cell("failed", "failed"),
    }
    assert unexplained(found) == ["ctr kill", "ctr pause", "docker top"]
    text = "\n".join(section(found, {"ctr": "1.6"}))
    for line in (
        "| run -d | works |",
        "| top | differs |",
        "| kill | differs |",
        "| pause | not with runc |",
    ):
        assert line in text
    assert "| ctr kill | `status 3` | `status 4` | not known |" in text


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    results.add("runc", "one", PASSED)
    results.add("kata", "two", FAILED)
    assert Results(tmp_path / "results").found == {("runc", "one"): PASSED, ("kata", "two"): FAILED}
    results.forget("two")
    assert Results(tmp_path / "results").found == {("runc", "one"): PASSED}
    cells = Cells(tmp_path / "cells")
    cells.add("ctr", "kill", Cell("a", "b"))
    cells.add("ctr", "run -d", Cell("c", "c"))
    cells.forget("kill")
    assert Cells(tmp_path / "cells").found == {("ctr", "run -d"): Cell("c", "c")}


@pytest.mark.parametrize("text", ["", "x | y\nz"])
def test_messages_stay_in_their_cells(text: str) -> None:
    results = {("runc", "t"): PASSED, ("kata", "t"): Result("failed", text, 1.0)}
    [line] = [
        line
        for line in page.page(results, VERSIONS, []).splitlines()
        if line.startswith("| t | passed | not")
    ]
    assert line.replace("\\|", "").count("|") == 4
