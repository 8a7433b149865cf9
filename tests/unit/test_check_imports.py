"""The check of import directions finds what it is there to find, and finds nothing in the source."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_imports", ROOT / "tools" / "check_imports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(tmp_path: Path, files: dict[str, str]) -> Path:
    source = tmp_path / "src" / "kata"
    for name, text in {"__init__.py": "", "errors.py": "", "cli/__init__.py": "", **files}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    return source


def test_the_source_keeps_the_direction(check: ModuleType) -> None:
    assert check.problems(ROOT / "src" / "kata", check.KNOTS) == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("errors.py", "from kata import sysio", ["errors.py:1", "'errors' imports 'kata.sysio'"]),
        ("errors.py", "def f():\n    import kata.cli.main", ["errors.py:2", "'kata.cli.main'"]),
        ("ttrpc/client.py", "from ..engine import sandbox", ["'ttrpc' imports 'kata.engine.sandbox'"]),
        ("ttrpc/__init__.py", "from .. import engine", ["'ttrpc' imports 'kata.engine'"]),
        (
            "oci/spec.py",
            "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from kata.cli.args import Option\n",
            ["spec.py:3", "'oci' imports"],
        ),
        ("hypervisor/qemu.py", "from ..network.user import Passt", ["'hypervisor' imports"]),
        ("network/user.py", "from ..storage import erofs", ["'network' imports"]),
        ("novelty.py", "", ["part 'novelty' has no row"]),
    ],
)
def test_an_arrow_that_points_up_is_found(
    check: ModuleType, tmp_path: Path, name: str, text: str, words: list[str]
) -> None:
    source = package(
        tmp_path, {"engine/x.py": "", "network/user.py": "", "storage/x.py": "", "sysio.py": "", name: text}
    )
    found = check.problems(source)
    assert len(found) == 1
    for word in words:
        assert word in found[0]


def test_arrows_that_point_down_pass(check: ModuleType, tmp_path: Path) -> None:
    source = package(
        tmp_path,
        {
            "cli/run.py": "import os\nfrom .. import __version__\nimport kata.engine.launch",
            "engine/launch.py": "from kata.hypervisor import qemu\nfrom . import state",
            "journal.py": "",
            "journal_undo.py": "from .journal import Journal",
            "hypervisor/__init__.py": "",
        },
    )
    assert check.problems(source) == []


CIRCLE = {
    "engine/one.py": "from kata.engine.two import f",
    "engine/two.py": "def f():\n    from kata.engine import three",
    "engine/three.py": "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from kata.engine.one import T\n",
    "engine/four.py": "from kata.engine import one",
}


def test_a_circle_within_a_part_is_found_whatever_kind_of_import_closes_it(
    check: ModuleType, tmp_path: Path
) -> None:
    (found,) = check.problems(package(tmp_path, CIRCLE))
    assert found.startswith(
        "modules import in a circle: kata.engine.one -> kata.engine.two, kata.engine.three ->"
    )
    assert "four" not in found


def test_a_known_knot_passes_until_it_is_none(check: ModuleType, tmp_path: Path) -> None:
    knots = frozenset({("kata.engine.three", "kata.engine.one")})
    source = package(tmp_path, CIRCLE)
    assert check.problems(source, knots) == []
    (source / "engine/two.py").write_text("")
    (found,) = check.problems(source, knots)
    assert "'kata.engine.three' -> 'kata.engine.one' closes no circle any more" in found
    (source / "engine/three.py").write_text("")
    assert check.problems(source, knots) == [found]
