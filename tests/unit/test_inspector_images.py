"""The program that reads images, started here without a machine: what it says of images that are made to be nasty."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import planted_images
import pytest
from conftest import ROOT

from kata.cli import inspect_configuration, inspect_kinds, inspect_machine, inspect_schema
from kata.images import handover, platform
from kata.images.layout import Layout

PROGRAM = ROOT / "inspector/target/x86_64-unknown-linux-gnu/release/kata-inspector"
LIMITS = {"bytes": 16 << 30, "entries": 100_000, "seconds": 60}


def inspected(directory: Path, *layouts: Path) -> tuple[dict[str, Any], list[handover.Selection]]:
    """The report of the program, and what the host knows of the images."""
    if not PROGRAM.exists():
        pytest.skip("the inspector is not built: tools/setup test")
    chosen = [handover.of_source(one.name, Layout(str(one)), "", platform.host()) for one in layouts]
    handover.write(str(directory / "image"), chosen, LIMITS, {})
    done = subprocess.run(
        [PROGRAM, "report", directory / "image"], capture_output=True, timeout=120, check=True
    )
    (directory / "report").write_bytes(done.stdout)
    return inspect_schema.parse(done.stdout, len(chosen)), chosen


@pytest.mark.parametrize("name", planted_images.cases(large=False))
def test_what_was_planted_is_found_and_nothing_else(tmp_path: Path, name: str) -> None:
    image = planted_images.cases()[name]()
    content, [chosen] = inspected(tmp_path, planted_images.write(image, tmp_path / "layout"))
    [found] = content["images"]
    assert Counter((one["kind"], one["path"]) for one in found["findings"]) == Counter(image.findings)
    packages = Counter((one["kind"], one["name"], one["version"]) for one in found["packages"])
    assert packages == Counter(image.packages)
    assert Counter(one["path"] for one in found["hidden"]["largest"]) == Counter(image.hidden)
    assert {one["path"] for one in found["start"]["scripts"]} == set(image.scripts)
    assert all(one["kind"] in inspect_kinds.KINDS for one in found["findings"])
    shown = json.dumps([inspect_configuration.described(chosen, found.pop("masks")), found])
    for text in image.text:
        assert text not in shown


def test_whole_files_are_counted_and_no_others(tmp_path: Path) -> None:
    image = planted_images.cases()["a-size-that-lies"]()
    content, _ = inspected(tmp_path, planted_images.write(image, tmp_path / "layout"))
    assert content["images"][0]["totals"]["bytes"] < 2000
    assert [one["whole"] for one in content["images"][0]["layers"]] == [False]


def test_sparse_files_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    from planted_files import sparse_1_0

    layouts = [
        planted_images.write(
            planted_images.Image([planted_images.raw(sparse_1_0("a", 90_000, [(80_000, text)]))]),
            tmp_path / text.decode(),
        )
        for text in (b"one", b"two")
    ]
    content, _ = inspected(tmp_path, *layouts)
    assert [one["path"] for one in content["difference"]["files"]] == ["/a"]


def test_two_images_full_of_findings_fit_into_one_report(tmp_path: Path) -> None:
    import planted_files as made
    from image_support import layer, member

    status = "".join(made.deb(f"{number:05}-{'p' * 180}", "1" * 180) for number in range(12_000))
    names = [f"srv/{'d' * 200}/{'e' * 200}/{number:04}" for number in range(450)]
    members = [
        *(member(name, mode=0o6777) for name in names),
        *(member(f"{name}-link", "symlink", link="/proc/1/root") for name in names),
        *(member(f"{name}-pipe", "fifo") for name in names),
        member("var/lib/dpkg/status", content=status.encode()),
    ]
    variables = [f"PASSWORD_{number}={number}{'€' * 990}" for number in range(190)]
    layout = planted_images.write(
        planted_images.Image([layer(*members)], config={"Env": variables}), tmp_path / "layout"
    )
    content, _ = inspected(tmp_path, layout, layout)
    for found in content["images"]:
        assert 0 < len(found["findings"]) <= sum(found["counts"].values())
        assert found["packages_found"] == 12_000
        assert 1000 < len(found["packages"]) < 12_000
        assert 50 < len(found["masks"]) < 190
        assert found["counts"]["limit"] == 1
    size = (tmp_path / "report").stat().st_size
    assert 3 << 20 < size < inspect_machine.MAX_REPORT - (1 << 20)


def test_a_mask_may_be_the_beginning_of_a_longer_one() -> None:
    secret = "q7" * 1500
    config = json.dumps({"config": {"Env": [f"X={secret}"], "Labels": {"a": f"x{secret[:998]}"}}})
    shown = inspect_configuration.described(handover.Selection("x", "", config), [secret[:1000], "abcdefgh"])
    assert shown["configuration"]["environment"] == ["X=q7q7... (3000 characters)"]
    assert shown["configuration"]["labels"] == [f"a=x{secret[:499]}"]
