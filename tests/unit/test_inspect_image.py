"""`kata inspect-image` on the host: how an image is handed over, and what is believed of a machine's report."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from image_support import docker_save, layer, member, simple_layout

from kata.cli import (
    inspect_configuration,
    inspect_html,
    inspect_image,
    inspect_kinds,
    inspect_sbom,
    inspect_schema,
    inspect_text,
)
from kata.errors import ImageError, UsageError
from kata.images import handover, platform
from kata.images.archive import Archive
from kata.images.layout import Layout

LIMITS = {"bytes": 1 << 30, "entries": 1000, "seconds": 10}


def plan_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    assert data[:8] == handover.MAGIC
    plan: dict[str, Any] = json.loads(data[16 : 16 + int.from_bytes(data[8:16], "little")])
    return plan


def test_layers_are_handed_over_as_they_are_stored(tmp_path: Path) -> None:
    data = layer(member("etc/a", content=b"x" * 9000))
    simple_layout(tmp_path / "oci", data, data[:-512], how="gzip")
    chosen = handover.of_source("x", Layout(str(tmp_path / "oci")), "", platform.host())
    handover.write(str(tmp_path / "out"), [chosen], LIMITS, {"mode": "y"})
    plan, whole = plan_of(tmp_path / "out"), (tmp_path / "out").read_bytes()
    assert plan["mode"] == "y"
    layers = plan["images"][0]["layers"]
    for entry, wanted in zip(layers, (data, data[:-512]), strict=True):
        assert entry["offset"] % 4096 == 0
        stored = whole[entry["offset"] : entry["offset"] + entry["size"]]
        assert gzip.decompress(stored) == wanted
    assert json.loads(plan["images"][0]["config"])["os"] == "linux"


def test_those_of_an_archive_too(tmp_path: Path) -> None:
    data = layer(member("a", content=b"y" * 100))
    archive = docker_save(tmp_path / "a.tar", [{"layers": [data]}])
    source = Archive(str(archive), str(tmp_path), 1 << 30)
    chosen = handover.of_source("x", source, "", platform.host())
    handover.write(str(tmp_path / "out"), [chosen], LIMITS, {})
    [entry] = plan_of(tmp_path / "out")["images"][0]["layers"]
    assert (tmp_path / "out").read_bytes()[entry["offset"] :][: entry["size"]] == data
    chosen.close()


def test_a_missing_or_odd_blob_is_described_and_not_waited_for(tmp_path: Path) -> None:
    data = [layer(member(name)) for name in ("a", "b")]
    simple_layout(tmp_path / "oci", *data)
    chosen = handover.of_source("x", Layout(str(tmp_path / "oci")), "", platform.host())
    first, second = (tmp_path / "oci/blobs/sha256" / one.digest[7:] for one in chosen.layers)
    first.unlink()
    second.unlink()
    os.mkfifo(second)
    handover.write(str(tmp_path / "out"), [chosen], LIMITS, {})
    problems = [entry["problem"] for entry in plan_of(tmp_path / "out")["images"][0]["layers"]]
    assert "is missing" in problems[0]
    assert "no regular file" in problems[1]


def test_too_large_an_image_is_refused(tmp_path: Path) -> None:
    simple_layout(tmp_path / "oci", layer(member("a", content=bytes(5000))))
    chosen = handover.of_source("x", Layout(str(tmp_path / "oci")), "", platform.host())
    with pytest.raises(ImageError, match="more than 100 bytes"):
        handover.write(str(tmp_path / "out"), [chosen], {**LIMITS, "bytes": 100}, {})


def test_layers_do_not_pass_through_this_process(tmp_path: Path) -> None:
    simple_layout(tmp_path / "oci", layer(member("a", content=os.urandom(1 << 20) * 64)))
    chosen = handover.of_source("x", Layout(str(tmp_path / "oci")), "", platform.host())
    tracemalloc.start()
    try:
        handover.write(str(tmp_path / "out"), [chosen], LIMITS, {})
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("how", ["pipe", "file"])
def test_standard_input_is_copied_within_limits(tmp_path: Path, how: str) -> None:
    (tmp_path / "in").write_bytes(b"z" * 50_000)
    source = os.open(tmp_path / "in", os.O_RDONLY)
    if how == "pipe":
        source, writer = os.pipe()
        os.write(writer, b"z" * 50_000)
        os.close(writer)
    for limit, fits in ((50_000, True), (49_999, False)):
        target = os.open(tmp_path / f"out{limit}", os.O_RDWR | os.O_CREAT)
        if fits:
            handover.spool_input(source, target, limit)
            assert os.fstat(target).st_size == 50_000
            if how == "pipe":
                break
            os.lseek(source, 0, os.SEEK_SET)
        else:
            with pytest.raises(ImageError, match="more than"):
                handover.spool_input(source, target, limit)


# ---- the report ----


def report_of_a_machine(**changes: Any) -> dict[str, Any]:
    image: dict[str, Any] = {
        "has_layers": True,
        "system": {"id": "debian", "version": "12", "name": "Debian"},
        "totals": dict.fromkeys(
            ("files", "directories", "links", "others", "bytes", "programs", "libraries"), 1
        ),
        "layers": [
            {
                "digest": "sha256:0", "kind": "gzip", "stored_bytes": 1, "bytes": 2, "entries": 3, "files": 1,
                "whole": True,
            }
        ],
        "masks": ["q7Wx9Zt2Lm4"],
        "folders": [{"path": "/usr", "bytes": 1, "files": 1}],
        "hidden": {"files": 1, "bytes": 1, "largest": [{"path": "/x", "bytes": 1, "layer": 1, "by": 2}]},
        "start": {"command": ["sh"], "path": "/bin/sh", "kind": "script", "scripts": [{"path": "/a", "text": "b\n"}]},
        "counts": {"set-uid": 1},
        "findings": [{"kind": "set-uid", "path": "/bin/su", "detail": "mode 4755", "layer": 1}],
        "packages_found": 1,
        "packages": [
            {
                "kind": "deb", "name": "bash", "version": "5", "architecture": "amd64", "licence": "", "path": "/p",
                "within": "", "layer": 1,
            }
        ],
    }  # fmt: skip
    image.update(changes)
    return {"format": 1, "images": [image], "milliseconds": 5}


def test_a_proper_report_is_believed() -> None:
    content = report_of_a_machine()
    assert inspect_schema.parse(json.dumps(content).encode(), 1) == content


@pytest.mark.parametrize(
    "changes",
    [
        {"has_layers": 1},
        {"packages_found": True},
        {"packages_found": 1 << 70},
        {"packages_found": 1.5},
        {"packages_found": -7},
        {"findings": {}},
        {"findings": [{"kind": "x"}]},
        {"findings": [{"kind": "x", "path": "y" * 5000, "detail": "", "layer": 1}]},
        {"findings": [{"kind": "x", "path": "y", "detail": "", "layer": 1, "more": 1}]},
        {"counts": {str(number): 1 for number in range(200)}},
        {"counts": {"x" * 5000: 1}},
        {"system": None},
        {"further": 1},
    ],
)
def test_any_other_is_not(changes: dict[str, Any]) -> None:
    with pytest.raises(ImageError):
        inspect_schema.parse(json.dumps(report_of_a_machine(**changes)).encode(), 1)


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"\xff", b'{"format": 1}', b"NaN"])
def test_nor_is_what_is_no_report(data: bytes) -> None:
    with pytest.raises(ImageError):
        inspect_schema.parse(data, 1)


def whole_report(**changes: Any) -> dict[str, Any]:
    """The document of ``--json``."""
    config = {
        "created": "2024-01-01T00:00:00Z",
        "os": "linux",
        "architecture": "amd64",
        "config": {"Env": ["A_TOKEN=abcdefgh"]},
    }
    chosen = handover.Selection("x", "sha256:1", json.dumps(config))
    return {
        "format": 1, "tool": "kata 0", **inspect_configuration.described(chosen), "problem": "",
        "found": report_of_a_machine(**changes)["images"][0],
    }  # fmt: skip


def test_nothing_of_an_image_reaches_the_terminal_as_it_is() -> None:
    nasty = "\x1b]0;x\x07\x1b[2J\r\n\u202e<script>"
    text = inspect_text.text(
        whole_report(
            findings=[{"kind": nasty, "path": nasty, "detail": nasty, "layer": 1}],
            counts={nasty: 1},
            folders=[{"path": nasty, "bytes": 1, "files": 1}],
            start={
                "command": [nasty],
                "path": nasty,
                "kind": nasty,
                "scripts": [{"path": nasty, "text": nasty}],
            },
            system={"id": nasty, "version": nasty, "name": nasty},
        )
    )
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "<script>" in text


def test_a_secret_in_the_environment_is_redacted() -> None:
    [shown] = whole_report()["configuration"]["environment"]
    assert shown == "A_TOKEN=abcd... (8 characters)"


def test_a_secret_that_looks_masked_is_masked() -> None:
    config = {"config": {"Env": ["A_TOKEN=hunter2 (8 characters)", "B_TOKEN=abcd... (8 characters)"]}}
    shown = inspect_configuration.described(handover.Selection("x", "", json.dumps(config)))
    assert shown["configuration"]["environment"] == [
        "A_TOKEN=hunt... (22 characters)",
        "B_TOKEN=abcd... (8 characters)",
    ]


def test_what_the_machine_calls_secret_is_shown_nowhere() -> None:
    key = "-----BEGIN PRIVATE KEY-----\n" + "Ab1+" * 2000
    config = {
        "config": {
            "Env": ["X=q7Wx9Zt2Lm4"],
            "Labels": {"l": "p:q7Wx9Zt2Lm4;"},
            "Cmd": ["--x", "q7Wx9Zt2Lm4"],
        },
        "history": [{"created_by": "y" * 995 + "q7Wx9Zt2Lm4"}, {"created_by": f"echo '{key}' > k"}],
    }
    chosen = handover.Selection("x", "", json.dumps(config))
    shown = json.dumps(inspect_configuration.described(chosen, ["q7Wx9Zt2Lm4", key, "short", "characters)"]))
    assert "q7Wx9" not in shown
    assert "Ab1+" not in shown
    assert "X=q7Wx... (11 characters)" in shown
    assert len(shown) < 3000


@pytest.mark.parametrize(
    "config", ["", "[]", '{"config": [], "history": {}}', '{"config": {"Env": "x", "Labels": []}}']
)
def test_a_configuration_of_any_shape_is_described(config: str) -> None:
    assert inspect_configuration.described(handover.Selection("x", "", config))["history"] == []


def test_every_kind_has_a_severity() -> None:
    source = Path(__file__).parents[2] / "inspector/src"
    text = "".join(path.read_text() for path in source.glob("*.rs"))
    for kind in inspect_kinds.KINDS:
        assert f'"{kind}"' in text, kind
    assert {grade for grade, _ in inspect_kinds.KINDS.values()} == set(inspect_kinds.SEVERITIES)


def test_what_fails_a_build() -> None:
    found = {"counts": {"set-uid": 1}}  # medium
    assert [inspect_image._fails(found, grade) for grade in inspect_kinds.SEVERITIES] == [
        False,
        True,
        True,
        True,
    ]


# ---- for other programs ----

NASTY = "a\x00\x1b[2J</script><b>\u202e\ud800&\"'%2f../é"


def hostile_report() -> dict[str, Any]:
    package = {
        "version": NASTY,
        "architecture": NASTY,
        "licence": NASTY,
        "path": NASTY,
        "within": NASTY,
        "layer": 1,
    }
    kinds = ("deb", "rpm", "apk", "pypi", "npm", "golang", "maven", NASTY)
    return whole_report(
        packages=[
            {"kind": kind, "name": name, **package} for kind in kinds for name in (NASTY, "", "@a/b", "g:a")
        ],
        findings=[{"kind": kind, "path": NASTY, "detail": NASTY, "layer": 2} for kind in ("set-uid", NASTY)],
        counts={"set-uid": 1, NASTY: 1},
        system={"id": NASTY, "version": NASTY, "name": NASTY},
    )


@pytest.mark.parametrize("make", [whole_report, hostile_report])
def test_cyclonedx_is_valid(make: Any) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = json.dumps(inspect_sbom.cyclonedx(make()))
    assert JsonStrictValidator(SchemaVersion.V1_5).validate_str(text) is None


@pytest.mark.parametrize("make", [whole_report, hostile_report])
def test_spdx_is_valid(tmp_path: Path, make: Any) -> None:
    from spdx_tools.spdx.parser.parse_anything import parse_file
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

    (tmp_path / "x.spdx.json").write_text(json.dumps(inspect_sbom.spdx(make())))
    assert validate_full_spdx_document(parse_file(str(tmp_path / "x.spdx.json"))) == []


def test_sarif_has_a_rule_for_each_result() -> None:
    [run] = inspect_sbom.sarif(hostile_report())["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    assert {result["level"] for result in run["results"]} == {"warning", "note"}
    uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri.isascii()
    assert " " not in uri


def test_package_urls() -> None:
    system = {"id": "debian", "version": "12", "name": ""}

    def url(kind: str, name: str, version: str, architecture: str = "") -> str:
        package = {"kind": kind, "name": name, "version": version, "architecture": architecture}
        return inspect_sbom.package_url(package, system)

    assert url("deb", "libc6", "2.36-9+deb12u4", "amd64") == (
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u4?arch=amd64&distro=debian-12"
    )
    assert url("rpm", "bash", "1:5.2-1", "x86_64") == (
        "pkg:rpm/debian/bash@5.2-1?arch=x86_64&distro=debian-12&epoch=1"
    )
    assert url("npm", "@scope/x", "1.0.0") == "pkg:npm/%40scope/x@1.0.0"
    assert url("golang", "github.com/a/b", "v1.0.0") == "pkg:golang/github.com/a/b@v1.0.0"
    assert url("maven", "org.x:y", "1") == "pkg:maven/org.x/y@1"
    assert url("pypi", "Some_Name", "1") == "pkg:pypi/some-name@1"


def test_nothing_of_an_image_becomes_markup() -> None:
    from html.parser import HTMLParser

    seen: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append(tag)
            assert not [
                name for name, _ in attrs if name.startswith("on") or name in ("href", "src", "style")
            ]

    report = hostile_report()
    report["problem"] = NASTY
    report["image"]["name"] = NASTY
    page = inspect_html.page(report)
    Tags().feed(page)
    assert not set(seen) & {"script", "b", "img", "a", "iframe", "link", "form"} - {"b"}
    assert seen.count("b") == inspect_html.page(whole_report()).count("<b>") + 1  # one more card: a note
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "default-src &#x27;none&#x27;" in page
    page.encode()


def test_what_changed_in_a_configuration() -> None:
    old, new = (
        {"configuration": {"user": user, "environment": env, "command": ["x"]}}
        for user, env in (("", ["A=1"]), ("u", ["B=2"]))
    )
    assert inspect_image._changes(old, new) == [
        "user: - -> u",
        "environment: without A=1",
        "environment: with B=2",
    ]


@pytest.mark.parametrize(
    ("config", "built"),
    [
        ({"os": "linux", "architecture": "amd64"}, None),
        ({"os": "linux", "architecture": "arm64"}, "linux/arm64"),
        ({"os": "windows", "architecture": "amd64"}, "windows/amd64"),
        ({}, "no known platform"),
    ],
)
def test_a_platform_that_was_asked_for_is_the_images_own(config: dict[str, str], built: str | None) -> None:
    chosen = handover.Selection("the image", "sha256:0", json.dumps(config))
    if built is None:
        inspect_image._need_platform(chosen, platform.parse("linux/amd64"))
    else:
        with pytest.raises(ImageError, match=f"the image is built for {built}, not for linux/amd64"):
            inspect_image._need_platform(chosen, platform.parse("linux/amd64"))


def test_a_file_that_cannot_be_written_is_told_before_the_reading(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "a/b.html", "No such file or directory")):
        with pytest.raises(UsageError, match=f"--html {path}: {why}"):
            inspect_image._check_writable("html", str(path))
    inspect_image._check_writable("html", str(tmp_path / "x.html"))
    assert not (tmp_path / "x.html").exists()


def test_a_file_that_cannot_be_written_does_not_cost_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = inspect_image.COMMANDS["inspect-image"].parse(
        ["--html", "x.html", "--spdx", "y.json", "--json", "x"]
    )
    asked = inspect_image._Asked(arguments)
    (tmp_path / "x.html").mkdir()  # meanwhile
    with pytest.raises(UsageError, match=r"--html x\.html: Is a directory"):
        inspect_image._show(whole_report(), asked)
    assert json.loads(capsys.readouterr().out)["found"]["packages_found"] == 1
    assert (tmp_path / "y.json").exists()
