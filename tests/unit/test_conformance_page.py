"""What `make conformance` makes of its results: the page, what counts as unexplained, and going on where it was."""

from __future__ import annotations

from pathlib import Path

import main
import marked_page
import page
import podman
import podman_page
import pytest
import work
from critest import Result
from main import Results
from matrix import Cell, Cells, section, unexplained
from podman_support import RUNTIMES

PASSED, FAILED = Result("passed", "", 1.0), Result("failed", "first line\nsecond", 2.0)
VERSIONS = page.Versions("v1", "3", "kata 4")


def of(handler: str, test: str, containerd: str = "1.6") -> page.Key:
    return page.Key(containerd, handler, test)


def test_a_test_that_only_kata_fails_needs_a_reason() -> None:
    results = {
        of("runc", "a"): PASSED,
        of("kata", "a"): FAILED,
        of("runc", "both"): FAILED,
        of("kata", "both"): FAILED,
        of("runc", "NamespaceOption runtime should support HostPID"): PASSED,
        of("kata", "NamespaceOption runtime should support HostPID"): FAILED,
    }
    assert page.unexplained(results) == ["a (containerd 1.6)"]
    text = page.page(results, VERSIONS, ["## Clients", ""])
    assert "| a | 1.6 | passed | not known: first line |" in text
    assert f"| NamespaceOption runtime should support HostPID | 1.6 | passed | {page.OWN_KERNEL} |" in text
    assert "| both | 1.6 | failed | with runc as well: first line |" in text
    assert "| passed | 2 | 0 |" in text
    assert page.sections(text)["Clients"] == ["## Clients", ""]
    assert "".join(f"{line}\n" for lines in page.sections(text).values() for line in lines) == text


def test_each_containerd_has_its_column() -> None:
    results = {
        of("runc", "a"): PASSED,
        of("kata", "a"): PASSED,
        of("runc", "a", "2.4"): PASSED,
        of("kata", "a", "2.4"): FAILED,
        of("runc", "new", "2.4"): Result("skipped", "AppArmor is off", 0.1),
        of("kata", "new", "2.4"): Result("skipped", "AppArmor is off", 0.1),
        of("kata", "old", "1.10"): PASSED,
    }
    text = page.page(results, VERSIONS, [])
    assert "| containerd | 1.6, runc | 1.6, kata | 1.10, runc | 1.10, kata | 2.4, runc | 2.4, kata |" in text
    assert "| a | 2.4 | passed | not known: first line |" in text
    assert "| a | passed | not run | passed, failed | see above |" in text
    assert "| new | not run | not run | skipped | AppArmor is off |" in text
    assert "| old | not run | not run, passed | not run |  |" in text


def test_what_clients_see_is_compared() -> None:
    found = {
        ("ctr", "run -d"): Cell("RUNNING", "RUNNING"),
        ("ctr", "top"): Cell("sleep", "qemu"),
        ("ctr", "kill"): Cell("status 3", "status 4"),
        # A reason is one for what it names, and for nothing else.
        ("crictl", "OOM"): Cell("Error 137", "OOMKilled 137"),
        ("docker", "top"): Cell("sleep", "bash"),
        ("CRI-O oci", "run -d"): Cell("CONTAINER_RUNNING", "CONTAINER_RUNNING"),
        # Equal, and worthless: with runc it is not what it should be.
        ("ctr", "pause"): Cell("failed", "failed"),
    }
    assert unexplained(found) == ["ctr kill", "ctr pause", "docker top"]
    text = "\n".join(section(found, {"ctr": "1.6"}))
    for line in (
        "| | ctr 1.6 | crictl | docker | CRI-O oci |",
        "| run -d | works |  |  | works |",
        "| top | differs |",
        "| kill | differs |",
        "| pause | not with runc |",
    ):
        assert line in text
    assert "| ctr kill | `status 3` | `status 4` | not known |" in text


def test_what_was_not_run_here_stays_on_the_pages() -> None:
    """A checkout without a record runs one thing alone: of all others the pages say what they have said."""
    text = main.PAGE.read_text()
    before = page.sections(text)[page.CLIENTS]
    assert section({}, {}, before) == before
    cell = Cell("sleep", "something else")
    told = section({("docker", "top"): cell, ("ctr", "kill"): cell}, {"docker": "99.1"}, before)
    changed = [(old, new) for old, new in zip(before, told, strict=False) if old != new]
    assert len(told) == len(before) + 1  # why `ctr kill` differs
    assert "docker 99.1" in changed[0][1]
    assert (
        changed[0][0].replace("docker 26.1.5", "docker 99.1").replace("ctr 1.6.20", "ctr") == changed[0][1]
    )
    assert "| ctr kill | `sleep` | `something else` | not known |" in told
    assert "| docker top | `sleep` | `something else` | not known |" in told
    assert sum(line.startswith("| docker top |") for line in told) == 1
    # What works now is no longer told of as something that differs.
    told = section({("docker", "top"): Cell("sleep", "sleep")}, {"docker": "26.1.5"}, before)
    assert not any(line.startswith("| docker top |") for line in told)
    lines = marked_page.lines_of(main.WORK_PAGE, work.BEGIN, work.END)
    assert work.table({}, lines) == lines
    case = work.CASES[0]
    changed = list(zip(lines, work.table({(case.__name__, "runc"): "odd"}, lines), strict=True))
    assert [new for old, new in changed if old != new] == [changed[2][1]]
    assert "| `odd` |" in changed[2][1]


def test_a_page_keeps_what_is_said_of_containerds_without_results_here() -> None:
    results = {
        of(handler, "a", version): PASSED for handler in page.HANDLERS for version in ("1.6.20", "2.4.2")
    }
    text = page.page(results, VERSIONS, [])
    assert page.lacking(results, text) == []
    assert page.lacking({of("runc", "a", "1.6.33"): PASSED}, text) == ["2.4.2"]
    assert page.lacking({}, text) == ["1.6.20", "2.4.2"]
    assert page.lacking(results, "# A page without a table\n") == []


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    results.add(of("runc", "one"), PASSED)
    results.add(of("kata", "two"), FAILED)
    assert Results(tmp_path / "results").found == {of("runc", "one"): PASSED, of("kata", "two"): FAILED}
    results.forget("two", ["2.4"])
    assert len(results.found) == 2
    results.forget("two", ["1.6", "2.4"])
    assert Results(tmp_path / "results").found == {of("runc", "one"): PASSED}
    cells = Cells(tmp_path / "cells")
    cells.add("ctr", "kill", Cell("a", "b"))
    cells.add("ctr", "run -d", Cell("c", "c"))
    cells.forget("kill")
    assert Cells(tmp_path / "cells").found == {("ctr", "run -d"): Cell("c", "c")}


@pytest.mark.parametrize("text", ["", "x | y\nz"])
def test_messages_stay_in_their_cells(text: str) -> None:
    results = {of("runc", "t"): PASSED, of("kata", "t"): Result("failed", text, 1.0)}
    [line] = [
        line
        for line in page.page(results, VERSIONS, []).splitlines()
        if line.startswith("| t | 1.6 | passed | not")
    ]
    assert line.replace("\\|", "").count("|") == 5


def test_podmans_table_says_what_differs_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = podman.Record(tmp_path / "record")
    for runtime in RUNTIMES:
        record.add("kill", runtime, "137" if runtime != "kata" else "139")
        record.add("top", runtime, "sleep" if runtime != "kata" else "qemu | x")
    record.add("pod", "runc", "failed: /tmp/kpabc/x")
    monkeypatch.setitem(podman_page.REASONS, "top", ("qemu.*", "a machine"))
    found = podman.Record(tmp_path / "record").found
    assert podman_page.wrong(found) == ["kill"]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{podman_page.BEGIN}\nold\n{podman_page.END}\nafter\n")
    podman_page.write(page, {"4.3": found, "5.8": {("kill", "kata"): "137"}})
    text = page.read_text()
    for line in (
        "before",
        "| | podman 4.3, runc | podman 4.3, crun | podman 4.3, kata | podman 5.8, kata |",
        "| kill | works | works | differs | works |",
        "| top | works | works | differs |  |",
        "| pod | differs |  |  |  |",
        "| kill | kata (4.3) | `139` | not known |",
        "| top | kata (4.3) | `qemu / x` | a machine |",
        "| pod | runc (4.3) | `failed: DIR/x` | not known |",
        "after",
    ):
        assert line in text.splitlines()
    assert "old" not in text
    # What is not tried anew stays, with its reason.
    podman_page.write(page, {"4.3": {("kill", "kata"): "137"}, "5.4": {("pod", "kata"): "failed"}})
    lines = page.read_text().splitlines()
    assert (
        "| | podman 4.3, runc | podman 4.3, crun | podman 4.3, kata | podman 5.4, kata | podman 5.8, kata |"
        in lines
    )
    assert "| kill | works | works | works |  | works |" in lines
    assert "| pod | differs |  |  | differs |  |" in lines
    assert [line for line in lines if "`" in line] == [
        "| top | kata (4.3) | `qemu / x` | a machine |",
        "| pod | runc (4.3) | `failed: DIR/x` | not known |",
        "| pod | kata (5.4) | `failed` | not known |",
    ]
    record.forget("kill", ("kata",))
    assert podman_page.wrong(podman.Record(tmp_path / "record").found) == []
    with pytest.raises(ValueError, match="no place"):
        podman_page.write(tmp_path / "record", {"4.3": found})


def test_every_row_of_podman_is_tried_and_judged() -> None:
    known = podman.tried(podman.Podman.__new__(podman.Podman))
    assert set(known) | {podman_page.LEFT} == set(podman_page.EXPECTED)
