"""How this package's modules are found by a process of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package with two modules of its own, and nothing compiled."""
    kept = ("__init__.py", "launcher.py")
    package = tmp_path / "kata"
    package.mkdir()
    for name in kept:
        shutil.copy(SOURCE / "kata" / name, package / name)
    (package / "part").mkdir()
    (package / "part" / "__init__.py").write_text("VALUE = 1\n")
    (package / "part" / "module.py").write_text("def fail():\n    raise ValueError('here')\n")
    return tmp_path


def said(tree: Path, program: str) -> str:
    """What a program prints that begins as ours do."""
    whole = f"import sys; sys.path.append({str(tree)!r})\nfrom kata import launcher; launcher.settle()\n{program}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", whole], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


LOADERS = (
    "import kata.part.module as m, kata.part as p\n"
    "print(type(m.__loader__).__name__, type(p.__loader__).__name__)"
)


def test_compiled_modules_are_found_the_short_way(tree: Path) -> None:
    assert said(tree, LOADERS) == "SourceFileLoader SourceFileLoader\n"  # which compiles them
    assert said(tree, LOADERS) == "_Loader _Loader\n"
    said_more = said(
        tree,
        "import kata.part.module as m, kata.part as p, inspect\n"
        "print(p.VALUE, p.__path__, m.__file__, m.__cached__, m.__package__, m.__spec__.parent)\n"
        "print(inspect.getsource(m).splitlines()[0], p.__spec__.submodule_search_locations)\n",
    )
    part = tree / "kata" / "part"
    cached = part / "__pycache__" / f"module.{sys.implementation.cache_tag}.pyc"
    assert said_more == (
        f"1 ['{part}'] {part}/module.py {cached} kata.part kata.part\ndef fail(): ['{part}']\n"
    )


def test_a_module_that_has_changed_is_compiled_anew(tree: Path) -> None:
    said(tree, LOADERS)
    (tree / "kata" / "part" / "__init__.py").write_text("VALUE = 'another'\n")
    assert said(tree, "import kata.part as p; print(p.VALUE)") == "another\n"
    os.utime(tree / "kata" / "part" / "__init__.py", (1, 1))
    assert said(tree, LOADERS) == "_Loader SourceFileLoader\n"


@pytest.mark.parametrize("left", [0, 8])
def test_a_torn_compiled_module_is_none(tree: Path, left: int) -> None:
    said(tree, LOADERS)
    (compiled,) = (tree / "kata" / "part" / "__pycache__").glob("module.*")
    compiled.write_bytes(compiled.read_bytes()[:left])
    assert said(tree, LOADERS).startswith("SourceFileLoader")


def test_a_tree_that_was_moved_names_its_own_files(tree: Path) -> None:
    said(tree, LOADERS)
    moved = tree / "elsewhere"
    moved.mkdir()
    (tree / "kata").rename(moved / "kata")
    assert f'File "{moved}/kata/part/module.py", line 2' in said(
        moved, "import kata.part.module as m; m.fail()"
    )


def test_what_there_is_not_is_told_as_ever(tree: Path) -> None:
    said(tree, LOADERS)
    assert "No module named 'kata.part.other'" in said(tree, "import kata.part.other")
    assert "No module named 'kata.other'" in said(tree, "import kata.other.module")


def test_what_waits_for_the_end_of_a_process_is_done_in_its_order(tree: Path) -> None:
    program = (
        "import atexit, threading, time\n"
        "def late():\n"
        "    time.sleep(0.2)\n"
        "    print('thread')\n"
        "atexit.register(lambda: print('function'))\n"
        "threading.Thread(target=late).start()\n"
        "launcher.leave(launcher.let_go(3))\n"
    )
    assert said(tree, program) == "thread\nfunction\n"


def test_a_process_leaves_with_its_status(tree: Path) -> None:
    whole = f"import sys; sys.path.append({str(tree)!r})\nfrom kata import launcher\nlauncher.leave(3)"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", whole], check=False).returncode == 3
