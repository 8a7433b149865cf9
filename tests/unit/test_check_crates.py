"""The check of the agent's dependencies finds what it is there to find, and finds nothing in the source."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_crates", ROOT / "tools" / "check_crates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file with one good crate, and a registry that has it."""
    monkeypatch.setenv("CARGO_HOME", str(tmp_path))
    add_source(tmp_path, "libc", "MIT OR Apache-2.0")
    path = tmp_path / "Cargo.lock"
    path.write_text(entry("kata-agent", "") + entry("libc"))
    return path


def add_source(home: Path, name: str, licence: str) -> None:
    directory = home / f"registry/src/index/{name}-1.0.0"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "Cargo.toml").write_text(f'[package]\nname = "{name}"\nlicense = "{licence}"\n')


def entry(name: str, source: str = CRATES_IO) -> str:
    text = f'[[package]]\nname = "{name}"\nversion = "1.0.0"\n'
    return text + (f'source = "{source}"\nchecksum = "00"\n' if source else "")


def test_a_good_lock_file_has_no_complaints(check: ModuleType, lock: Path) -> None:
    assert check.complaints(lock) == []


def test_a_crate_that_nobody_has_thought_about(check: ModuleType, lock: Path) -> None:
    add_source(lock.parent, "leftpad", "MIT")
    lock.write_text(lock.read_text() + entry("leftpad"))
    assert [line.split(":")[0] for line in check.complaints(lock)] == ["leftpad 1.0.0"]


@pytest.mark.parametrize("source", ["git+https://example.org/libc", ""])
def test_a_crate_from_elsewhere(check: ModuleType, lock: Path, source: str) -> None:
    lock.write_text(entry("libc", source))
    assert "crates.io" in check.complaints(lock)[0]


def test_a_licence_that_is_not_allowed_or_not_known(check: ModuleType, lock: Path) -> None:
    add_source(lock.parent, "libc", "GPL-3.0-only")
    assert "GPL-3.0-only" in check.complaints(lock)[0]
    (lock.parent / "registry/src/index/libc-1.0.0/Cargo.toml").unlink()
    assert "cargo fetch" in check.complaints(lock)[0]


@pytest.mark.parametrize(
    ("expression", "good"),
    [
        ("MIT", True),
        ("MIT/Apache-2.0", True),
        ("GPL-2.0-only OR MIT", True),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("MIT AND GPL-2.0-only", False),
        ("(MIT OR Apache-2.0) AND GPL-2.0-only", False),
        ("", False),
    ],
)
def test_expressions(check: ModuleType, expression: str, good: bool) -> None:
    assert check.acceptable(expression) is good
