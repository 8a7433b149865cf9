"""The documents: what they link to is there, and so is what they name of the source."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kata.cli.main import COMMANDS
from kata.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


def documents() -> list[str]:
    """Every Markdown file of the project, those that are about to be added included."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(listed, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]
    # An unpacked archive of the sources.
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "findings").rglob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


DOCUMENTS = documents()
NAMING = [name for name in DOCUMENTS if name != "CHANGELOG.md"]
"""Those that name files as they are now."""


def prose(text: str) -> str:
    """A document without its blocks of code."""
    text = re.sub(r"^(```+).*?^\1`*\s*$", "", text, flags=re.M | re.S)
    return re.sub(r"^ {4}.*$", "", text, flags=re.M)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", prose(text))


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them, and those that it sets itself."""
    found: set[str] = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    counts: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*?)#*\s*$", prose(text), flags=re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        count = counts.get(anchor, 0)
        counts[anchor] = count + 1
        found.add(f"{anchor}-{count}" if count else anchor)
    return found


def links(text: str) -> list[str]:
    """The targets of links and pictures."""
    plain = without_code(text)
    return re.findall(r"\]\(([^)\s]+)\)", plain) + re.findall(r'(?:href|src|srcset)="([^"]+)"', plain)


def broken(name: str, text: str) -> list[str]:
    """Links of the document *name* that lead nowhere, each with its reason."""
    wrong = []
    for link in links(text):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue  # somebody else's
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists():
            wrong.append(f"{link}: there is no {path}")
        elif anchor and target.suffix == ".md":
            there = text if not path else target.read_text()
            if anchor not in anchors(there):
                wrong.append(f"{link}: {path or name} has no such heading")
    return wrong


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    assert broken(name, (ROOT / name).read_text()) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    text = "# One\n\n## A `b`, c\n\n[x](#a-b-c) [y](#nothing) [z](nowhere.md) `[no](link.md)`\n\n    [no](code.md)\n"
    assert broken("README.md", text) == [
        "#nothing: README.md has no such heading",
        "nowhere.md: there is no nowhere.md",
    ]
    assert broken("docs/x.md", "[up](../README.md#nothing)") == [
        "../README.md#nothing: ../README.md has no such heading"
    ]
    assert links('![p](i.svg) <a href="b.md">') == ["i.svg", "b.md"]


# ---- what they name of the source ----

_PATH = re.compile(
    r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|rs|md|proto|patch|svg|sh|toml)|(?:tools|bench|\.ci)/[\w.-]+)`"
)
_TEST = re.compile(r"`((?:tests/)?(?:[\w-]+/)*test_\w+\.py)(?:::(\w+))?`")
_TEST_FUNCTION = re.compile(r"`(test_\w+)`")
_PLACES = ("", "src/kata/", "tests/", "tests/unit/", "tests/vm/", "tests/kvm/", "tests/hostile/", "docs/")


def source_paths(text: str) -> set[str]:
    """Files of the project that a document names in code style, with at least one directory."""
    return set(_PATH.findall(prose(text)))


# What runs write into build/, and what is in an image or on a machine, is no file of the project.
_FOREIGN = re.compile(r"^(build|etc|conf|images|x)/|^\.venv/")


def missing_paths(text: str) -> list[str]:
    """Those of `source_paths` that are not there."""
    return [
        path
        for path in sorted(source_paths(text))
        if not _FOREIGN.match(path) and not any((ROOT / place / path).exists() for place in _PLACES)
    ]


@pytest.mark.parametrize("name", NAMING)
def test_named_files_of_the_source_are_there(name: str) -> None:
    assert missing_paths((ROOT / name).read_text()) == []


def missing_tests(text: str) -> list[str]:
    """Tests that a document names, by file or by file and function, and that are not there."""
    missing = []
    for path, function in _TEST.findall(prose(text)):
        found = next((ROOT / place / path for place in _PLACES if (ROOT / place / path).exists()), None)
        if found is None or (function and f"def {function}(" not in found.read_text()):
            missing.append(f"{path}::{function}" if function else path)
    return missing + sorted(set(_TEST_FUNCTION.findall(prose(text))) - functions())


@functools.cache
def functions() -> frozenset[str]:
    """Names of all functions in the tests."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        found.update(re.findall(r"^ *(?:async )?def (test_\w+)\(", path.read_text(), flags=re.M))
    return frozenset(found)


@pytest.mark.parametrize("name", NAMING)
def test_named_tests_are_there(name: str) -> None:
    assert missing_tests((ROOT / name).read_text()) == []


def test_what_is_named_and_not_there_is_found() -> None:
    assert missing_paths("`engine/main.py` `engine/nowhere.py` `tools/lint` `tools/nothing` `a/b`") == [
        "engine/nowhere.py",
        "tools/nothing",
    ]
    own = "test_what_is_named_and_not_there_is_found"
    assert missing_tests(
        f"`tests/unit/test_docs.py` `test_docs.py::{own}` `test_docs.py::test_no`, `test_no.py`"
    ) == [
        "test_docs.py::test_no",
        "test_no.py",
    ]


# ---- pictures ----


@pytest.mark.parametrize("path", sorted((ROOT / "docs/images").glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_is_whole_and_reads_in_light_and_dark(path: Path) -> None:
    picture = ElementTree.parse(path).getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text()
    assert "prefers-color-scheme: dark" in text
    # For those who hear it, and nothing that is fetched from elsewhere.
    assert {"title", "desc"} <= {child.tag.partition("}")[2] for child in picture}
    assert not re.findall(r'(?:href|url\()="?https?:', text)
    # Every class that is drawn has a colour.
    used = {name for element in picture.iter() for name in element.get("class", "").split()}
    assert used <= set(re.findall(r"\.([a-z]+) \{", text))


def test_examples_of_style_are_from_the_source() -> None:
    lines = {
        line.strip() for path in (ROOT / "src/kata").rglob("*.py") for line in path.read_text().splitlines()
    }
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    assert len(examples) >= 3
    for example in examples:
        assert [line for line in example.splitlines() if line.strip() not in lines] == []


# ---- what they name of the program ----


def code(text: str) -> list[str]:
    """What is set as code, line by line: spans, and blocks, of which a command may be continued."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    blocks += re.findall(r"^ {4}(.*)$", text, flags=re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", prose(text))


def wrong_commands(text: str) -> list[str]:
    """Commands of `kata` that a document shows and that the program does not know, or not with these options."""
    wrong = []
    for line in code(text):
        for part in re.split(r"; +|\||&&|\$\(|#|→", line):
            match = re.match(
                r"\s*(?:[A-Z_]+=\S+ +)*(?:sudo +)?(?:tools/)?kata +([a-z]+(?:-[a-z]+)*)\b(.*)", part
            )
            if match is None:
                continue
            name, rest = match[1], match[2]
            if name not in COMMANDS:
                wrong.append(f"kata {name}")
                continue
            command = import_module(f"kata.cli.{COMMANDS[name][0]}").COMMANDS[name]
            try:
                words = shlex.split(rest.replace("...", "x"), comments=True)
                command.parse([word for word in words if word not in ("--help", "<", ">")])
            except ValueError:
                pass  # half of a quotation
            except UsageError as error:
                if "option" in error.message or "is a switch" in error.message:
                    wrong.append(f"kata {name}: {error.message}")
    return wrong


@pytest.mark.parametrize("name", NAMING)
def test_commands_are_as_the_program_has_them(name: str) -> None:
    assert wrong_commands((ROOT / name).read_text()) == []


def test_a_wrong_command_is_found() -> None:
    text = "`kata rnu x` `kata run --rm x --nothing`\n\n```sh\nkata run --nothing \\\n  x; kata ps -a | head\n```\n"
    assert wrong_commands(text) == ["kata run: kata run: unknown option --nothing", "kata rnu"]


@pytest.mark.parametrize("name", NAMING)
def test_targets_of_make_and_variables_are_there(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {match for line in code(text) for match in re.findall(r"^\s*make ([a-z][a-z-]*)\b", line)}
    assert named - targets == set()
    assert set(re.findall(r"\bKATA_[A-Z_]+\b(?!\*)", text)) - variables() == set()


@functools.cache
def variables() -> frozenset[str]:
    """Variables of the environment that the program, its tools or tests name."""
    found: set[str] = set()
    for place in ("src/kata", "tools", "tests", "bench", ".ci"):
        for path in (ROOT / place).rglob("*"):
            if path.is_file() and path.suffix in ("", ".py") and path.name != "test_docs.py":
                found.update(re.findall(r"KATA_[A-Z_]+", path.read_text(errors="replace")))
    return frozenset(found)
