"""The check of the agent's modules finds circles and scattered methods, and finds neither in the source."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "check_rust_modules", ROOT / "tools" / "check_rust_modules.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def crate(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in {"lib.rs": "mod a;\nmod b;\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_agent_has_neither(check: ModuleType) -> None:
    source = ROOT / "agent" / "src"
    assert len(check.modules_of(source)) > 80
    assert list(check.violations(source)) == []


@pytest.mark.parametrize(
    ("files", "members"),
    [
        ({"a.rs": "use crate::b::B;", "b.rs": "fn f() { crate::a::g() }"}, ["a", "b"]),
        (
            {"a.rs": "use crate::{c, b::{self, B}};", "b.rs": "use crate::c;", "c.rs": "use super::a;"},
            ["a", "b", "c"],
        ),
        ({"a.rs": "pub use crate::b::B as C;", "b.rs": "use crate::a::*;"}, ["a", "b"]),
        ({"a/mod.rs": "mod x;\npub use x::X;\nstruct S;", "a/x.rs": "use super::S;"}, ["a", "a::x"]),
        (
            {"a/mod.rs": "mod x;\nmod y;", "a/x.rs": "use super::y::Y;", "a/y.rs": "use super::x::X;"},
            ["a::x", "a::y"],
        ),
    ],
)
def test_a_circle_is_found(
    check: ModuleType, tmp_path: Path, files: dict[str, str], members: list[str]
) -> None:
    found = list(check.violations(crate(tmp_path, files)))
    assert len(found) == 1
    assert found[0].startswith(f"circle of {len(members)} modules: ")
    assert all(f"{member} -> " in found[0] for member in members)


@pytest.mark.parametrize(
    "text",
    [
        "// use crate::a;\n/* crate::a::f() */ fn f<'a>(x: &'a str) -> char { '\"' }",
        'const C: &str = "crate::a::f()"; const R: &str = r#"use crate::a; "quoted""#;',
        "#[cfg(test)]\nmod tests {\n    use crate::a::A;\n    fn f() { if true {} }\n}",
        '#[cfg(test)]\n#[path = "b_tests.rs"]\nmod tests;\n#[cfg(test)]\nuse crate::a::A;',
        "macro_rules! m { () => { $crate::a::f() } }",
        "use super::b; use self::inner::X; mod inner { pub struct X; }",
    ],
)
def test_what_is_no_arrow_is_none(check: ModuleType, tmp_path: Path, text: str) -> None:
    assert list(check.violations(crate(tmp_path, {"a.rs": "use crate::b;", "b.rs": text}))) == []


def test_methods_stand_where_their_type_does(check: ModuleType, tmp_path: Path) -> None:
    files = {
        "a.rs": "pub struct A<'x>(&'x str);\nimpl<'x> A<'x> { fn f() {} }\nimpl crate::c::T for A<'_> {}",
        "b.rs": "use crate::a::A;\n\nimpl A<'_> {\n    fn g() {}\n}\n",
        "c.rs": "pub trait T {}\npub enum E { X }\nimpl E {}\n",
    }
    found = list(check.violations(crate(tmp_path, files)))
    assert len(found) == 1
    assert found[0].endswith("b.rs:3: methods of A, which is defined elsewhere")
