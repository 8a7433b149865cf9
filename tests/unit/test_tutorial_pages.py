"""Every command of the tutorials and the README is run by a test, or says why not; and how they are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tutorials

ROOT = Path(__file__).resolve().parents[2]
RUN_BY = {
    "tutorials/laptop.md": "test_tutorials.py",
    "tutorials/ci-runner.md": "test_tutorials.py",
    "tutorials/edge-box.md": "test_tutorials.py",
    "tutorials/docker-host.md": "test_docker.py",
    "tutorials/kubernetes-node.md": "test_cri.py",
    "from-kata.md": "test_tutorials.py",
    "troubleshooting.md": "test_tutorials.py",
    "networks.md": "test_tutorials.py",
    "../README.md": "test_tutorials.py",
}
"""Page -> the file in tests/vm that runs it."""
PAGES = [
    *RUN_BY,
    "packages.md",
    *(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs/tutorials").glob("*.md")),
]


@pytest.mark.parametrize("page", sorted(set(PAGES)))
def test_every_command_is_run_or_says_why_not(page: str) -> None:
    blocks = tutorials.blocks((ROOT / "docs" / page).read_text())
    left = [block.text for block in blocks if not block.reason]
    if page in RUN_BY:
        assert left
        assert f'"{page}"' in (ROOT / "tests/vm" / RUN_BY[page]).read_text()
    else:
        assert left == []
    for block in blocks:
        if block.reason and not block.reason.startswith("as above"):
            assert re.search(r"`[\w./-]*(test_\w+\.py|tools/[\w.-]+)`|--config", block.reason), block.reason


def test_blocks_are_found_with_their_output_and_their_reasons() -> None:
    text = (
        "# A\n\n```sh\none\ntwo\n```\n\n```text\n1\n```\n\nWords.\n\n```text\nno output\n```\n\n"
        "<!-- not run: it\nis dear -->\n\n```sh\nthree\n```\n\n```yaml\na: b\n```\n\n```text\nneither\n```\n"
    )
    found = [(block.text, block.reason, block.expected) for block in tutorials.blocks(text)]
    assert found == [("one\ntwo\n", "", ["1"]), ("three\n", "it\nis dear", None)]


def test_an_output_that_differs_is_found() -> None:
    assert tutorials.differences(["a [b] ...", "c"], "a [b] d\nc\n") == ""
    assert "expected:\na\nprinted:\nb" in tutorials.differences(["a"], "b\n")
    assert tutorials.differences(["a"], "a\nb\n")
    assert tutorials.differences(["a", "b"], "a\n")
    assert (
        tutorials.differences(["...", "b"], "a\na\nb\n") == tutorials.differences(["...", "b"], "b\n") == ""
    )
    assert tutorials.differences(["...", "b"], "b\na\n")


def test_a_page_whose_command_fails_or_prints_something_else_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tutorials, "DOCUMENTS", tmp_path)
    environment = {"PATH": "/usr/bin:/bin"}
    (tmp_path / "good.md").write_text("```sh\nx=1\n```\n\n```sh\necho $x 80\n```\n\n```text\n1 81\n```\n")
    tutorials.run("good.md", tmp_path, environment, {"80": "81"})
    (tmp_path / "fails.md").write_text("```sh\ntrue\n```\n\n```sh\nfalse\n```\n")
    with pytest.raises(AssertionError, match=r"fails\.md: 1 in\nfalse"):
        tutorials.run("fails.md", tmp_path, environment)
    (tmp_path / "differs.md").write_text("```sh\necho a\n```\n\n```text\nb\n```\n")
    with pytest.raises(AssertionError, match=r"expected:\nb\nprinted:\na"):
        tutorials.run("differs.md", tmp_path, environment)
