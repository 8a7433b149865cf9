"""What the suite of images for `kata inspect-image` makes of what it saw (tests/conformance/inspect_suite.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import inspect_suite
import marked_page


def row(**more: Any) -> dict[str, Any]:
    findings = inspect_suite.tally(
        Counter([("set-uid", "/a"), ("set-uid", "/b"), ("secret", "/c")]),
        Counter([("set-uid", "/a"), ("secret", "/c"), ("secret", "/d")]),
    )
    return {"problem": "", "here": True, "findings": findings, **more}


def test_a_page_has_rates_by_kind_and_what_other_scanners_find() -> None:
    rows = {
        "nasty/x": row(syft=5, syft_missed=[["deb", "x", "1"]], syft_wrong=[["deb", "y", "1"]]),
        "ordinary/y": row(here=False, syft=7, syft_missed=[]),
        "ordinary/z": row(syft=None, syft_missed=[]),
    }
    lines = inspect_suite.page_lines(rows)
    assert lines[0].startswith("1 nasty images and 2 ordinary ones; 2 of them were read without a machine")
    assert inspect_suite.page_lines({"nasty/x": row(here=False)})[0].endswith("; all were read in machines.")
    assert "| `secret` | 3 | 6 | 3 | 0.500 | 1.000 |" in lines
    assert "| `set-uid` | 6 | 3 | 3 | 1.000 | 0.500 |" in lines
    assert "| syft | 2 | 12 | 1 | 1 |" in lines


def test_what_is_wrong_is_counted(capsys: Any) -> None:
    # A finding that was missed, one too much, and a package that another scanner has.
    assert inspect_suite.show({"nasty/x": row(syft=5, syft_missed=[["deb", "x", "1"]])}) == 3
    assert "nasty/x: syft has deb x 1" in capsys.readouterr().out


def test_versions_that_are_made_up_are_not_missed() -> None:
    mine = [["golang", "a.org/x", "(devel)"], ["pypi", "Some_Name", "1"], ["maven", "g:a", "2"]]
    theirs = [
        ["golang", "a.org/x", "v0.0.0-20240101000000-abcdefabcdef"], ["pypi", "some-name", "1"], ["maven", "a", "2"],
        ["deb", "more", "1"],
    ]  # fmt: skip
    assert inspect_suite.missed(mine, theirs) == [("deb", "more", "1")]


def test_packages_as_their_urls_name_them() -> None:
    urls = {
        "pkg:deb/debian/git@2.39.5-0%2Bdeb12u3?arch=amd64&distro=debian-12&epoch=1": (
            "deb",
            "git",
            "1:2.39.5-0+deb12u3",
        ),
        "pkg:npm/%40a/b@1.0": ("npm", "@a/b", "1.0"),
        "pkg:golang/a.org/x/y@v1.2.3": ("golang", "a.org/x/y", "v1.2.3"),
        "pkg:golang/stdlib@v1.22.1": ("golang", "stdlib", "1.22.1"),
        "pkg:maven/org.a/b@3": ("maven", "org.a:b", "3"),
        "pkg:maven/b@3": ("maven", "b", "3"),
        "pkg:rpm/fedora/x@1-2?epoch=1": ("rpm", "x", "1-2"),
        "pkg:pypi/a": None,
        "pkg:cargo/a@1": None,
        "": None,
    }
    assert {url: inspect_suite.of_url(url) for url in urls} == urls


def test_what_was_planted_to_look_like_a_package_is_none() -> None:
    case = inspect_suite.Case("nasty/x", Path(), Counter(), Counter([("deb", "there", "1")]))
    absent = [("deb", "there", "1"), ("deb", "removed", "1")]
    assert inspect_suite.split("syft", case, absent) == {"syft_missed": absent[:1], "syft_wrong": absent[1:]}
    case.known = frozenset({"deb"})
    assert inspect_suite.split("syft", case, absent) == {"syft_missed": absent, "syft_wrong": []}


def test_the_page_has_a_place_for_the_tables() -> None:
    page = Path(inspect_suite.PAGE)
    assert marked_page.lines_of(page, inspect_suite.BEGIN, inspect_suite.END)
