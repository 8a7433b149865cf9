"""`kata inspect-image` over images that are made to be nasty, and ordinary ones: what it says, and what is right.

For each kind of finding and of package: how many were planted, how many were reported, precision and recall. Beside
other scanners (syft, trivy), the packages of the kinds that both know are compared: none may be missing that they find.
The lists of packages are checked by the tools of their formats. A run over all images writes the tables into
docs/inspect-image.md.

Resumable: what was seen of an image is a line of ``build/conformance/inspect.jsonl``, and is not tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import inspect_ordinary
import marked_page
import planted_images
from conftest import ROOT, Kata

from kata import __version__
from kata.cli import inspect_configuration, inspect_sbom, inspect_schema
from kata.errors import KataError
from kata.images import handover, platform
from kata.images.layout import Layout

LINES = ROOT / "build/conformance/inspect.jsonl"
IMAGES = ROOT / "build/conformance/inspect-images"
PROGRAM = ROOT / "inspector/target/x86_64-unknown-linux-gnu/release/kata-inspector"
PROGRAMS = ROOT / "build/programs"
PAGE = ROOT / "docs/inspect-image.md"
BEGIN, END = "<!-- written by tools/conformance --inspect -->", "<!-- up to here -->"
SYFT_KINDS = {
    "deb": "deb", "rpm": "rpm", "apk": "apk", "python": "pypi", "npm": "npm", "go-module": "golang",
    "java-archive": "maven",
}  # fmt: skip
GRAVE = ("secret", "secret-in-configuration", "path-escape", "archive-bomb", "digest", "bad-layer", "preload",
         "bad-database", "hidden-database", "entry-point", "odd-member", "odd-name", "odd-whiteout",
         "limit")  # fmt: skip
"""Kinds of which ordinary images have nothing."""


class Case:
    """An image that lies on the disk, and what is right to say of it."""

    def __init__(self, name: str, layout: Path, findings: Counter[Any], packages: Counter[Any]) -> None:
        self.name = name
        self.layout = layout
        self.findings = findings
        self.packages = packages
        self.known: frozenset[str] | None = None
        self.hidden: list[str] = []
        self.text: tuple[str, ...] = ()


def cases(work: Path, only: str, count: int) -> Iterator[Case]:
    names = [f"nasty/{name}" for name in planted_images.cases()]
    names += [f"ordinary/{name}" for name in inspect_ordinary.MAKERS]
    for full in [name for name in names if only in name][: count or None]:
        group, _, name = full.partition("/")
        if group == "ordinary":
            one = inspect_ordinary.ordinary(name, IMAGES)
            case = Case(full, one.layout, Counter(one.findings), Counter(one.packages))
            case.known = one.known
            yield case
            continue
        image = planted_images.cases()[name]()
        layout = planted_images.write(image, work / name)
        case = Case(full, layout, Counter(image.findings), Counter(image.packages))
        case.hidden, case.text = image.hidden, image.text
        yield case
        shutil.rmtree(layout)


def said_in_machine(kata: Kata, case: Case) -> tuple[str, str]:
    """What the command prints, and what it says of an error."""
    done = kata.call("inspect-image", "--json", "-q", f"oci:{case.layout}", timeout=900)
    return done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def said_here(case: Case, work: Path) -> tuple[str, str]:
    """The same by the program that the machine has, started here."""
    chosen = handover.of_source(case.name, Layout(str(case.layout)), "", platform.host())
    target = work / "image"
    handover.write(str(target), [chosen], {"bytes": 16 << 30, "entries": 1_000_000, "seconds": 600}, {})
    chosen.close()
    done = subprocess.run([PROGRAM, "report", target], capture_output=True, timeout=900, check=False)
    target.unlink()
    try:
        [found] = inspect_schema.parse(done.stdout, 1)["images"]
    except KataError as error:
        return "", error.message
    described = inspect_configuration.described(chosen, found.pop("masks"))
    return json.dumps({"tool": f"kata {__version__}", "found": found, "problem": "", **described}), ""


def judged(case: Case, said: tuple[str, str], began: float, work: Path) -> dict[str, Any]:
    """What of a report is right, and what is wrong."""
    text, error = said
    try:
        document = json.loads(text)
        found = document["found"] or {}
    except ValueError:
        return {"problem": error[-500:] or "it says nothing"}
    counted = None if case.known is None else inspect_ordinary.JUDGED | set(GRAVE)
    findings = Counter(
        (one["kind"], one["path"])
        for one in found.get("findings", [])
        if counted is None or one["kind"] in counted
    )
    packages = Counter(
        (one["kind"], one["name"], one["version"])
        for one in found.get("packages", [])
        if case.known is None or one["kind"] in case.known
    )
    if case.known is not None:  # one record each, however many files say it
        packages, case.packages = Counter(set(packages)), Counter(set(case.packages))
    hidden = Counter(one["path"] for one in found.get("hidden", {}).get("largest", []))
    problem = document["problem"] or "".join(
        f"shown: {secret[:4]}... " for secret in case.text if secret in text
    )
    if not problem and found:
        problem = wrong_lists(document, work)
    if not problem and case.known is None and hidden != Counter(case.hidden):
        problem = f"hidden: {dict(hidden)}"
    return {
        "problem": problem,
        "seconds": round(time.monotonic() - began, 1),
        "findings": tally(case.findings, findings),
        "packages": tally(case.packages, packages),
        "all": sorted({(one["kind"], one["name"], one["version"]) for one in found.get("packages", [])}),
    }  # fmt: skip


def wrong_lists(document: dict[str, Any], work: Path) -> str:
    """What the tools of CycloneDX and of SPDX say is wrong with the lists of packages; empty if nothing."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from spdx_tools.spdx.parser.parse_anything import parse_file
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

    problem = JsonStrictValidator(SchemaVersion.V1_5).validate_str(
        json.dumps(inspect_sbom.cyclonedx(document))
    )
    if problem is not None:
        return f"CycloneDX: {problem}"[:300]
    target = work / "packages.spdx.json"
    target.write_text(json.dumps(inspect_sbom.spdx(document)))
    try:
        wrong = validate_full_spdx_document(parse_file(str(target)))
    finally:
        target.unlink()
    return f"SPDX: {wrong[0].validation_message}"[:300] if wrong else ""


def tally(right: Counter[Any], found: Counter[Any]) -> dict[str, Any]:
    """For each kind: planted, found, and found of those planted; and what was missed or too much."""
    kinds: dict[str, list[int]] = {}
    for at, counted in enumerate((right, found, right & found)):
        for key, number in counted.items():
            kinds.setdefault(key[0], [0, 0, 0])[at] += number
    return {
        "kinds": kinds,
        "missed": sorted((right - found).elements()),
        "more": sorted((found - right).elements()),
    }


def seen_by_syft(case: Case, _work: Path) -> list[list[str]] | None:
    """What syft finds; None if it ends with an error, as it does with layers that are damaged."""
    done = subprocess.run(
        [PROGRAMS / "syft", "scan", f"oci-dir:{case.layout}", "-q", "-o", "json"],
        capture_output=True, timeout=900, check=False, env={**os.environ, "SYFT_CHECK_FOR_APP_UPDATE": "false"},
    )  # fmt: skip
    if done.returncode:
        return None
    found = set()
    for one in json.loads(done.stdout)["artifacts"]:
        if one["type"] in SYFT_KINDS and one["version"]:
            name = one["name"]
            if one["type"] == "java-archive":
                group = one.get("metadata", {}).get("pomProperties", {}).get("groupId", "")
                name = f"{group}:{name}" if group else name
            found.add((SYFT_KINDS[one["type"]], name, one["version"]))
    return sorted(map(list, found))


def seen_by_trivy(case: Case, work: Path) -> list[list[str]] | None:
    """What trivy lists when it has no database of vulnerabilities; None if it ends with an error."""
    done = subprocess.run(
        [PROGRAMS / "trivy", "image", "-q", "--input", case.layout, "--format", "cyclonedx", "--offline-scan",
         "--cache-dir", work / "trivy"],
        capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    if done.returncode:
        return None
    urls = [one.get("purl", "") for one in json.loads(done.stdout).get("components", [])]
    return sorted(map(list, {found for url in urls if (found := of_url(url)) is not None}))


def of_url(url: str) -> tuple[str, str, str] | None:
    """A package as its URL names it; None for a kind that is not compared, or without a version."""
    url, _, further = url.partition("?")
    kind, _, rest = url.removeprefix("pkg:").partition("/")
    path, _, version = rest.partition("@")
    parts = [unquote(part) for part in path.split("/")]
    version = unquote(version)
    if kind not in SYFT_KINDS.values() or not version:
        return None
    if kind == "golang":
        return kind, "/".join(parts), version.removeprefix("v") if path == "stdlib" else version
    if kind == "npm":
        return kind, "/".join(parts), version
    epoch = dict(parse_qsl(further)).get("epoch", "0")
    if kind == "deb" and epoch != "0":
        version = f"{epoch}:{version}"
    # Before the name is a group, or a distribution, which is not compared.
    return kind, f"{parts[-2]}:{parts[-1]}" if kind == "maven" and len(parts) > 1 else parts[-1], version


def plain(package: list[str]) -> tuple[str, str, str]:
    """A package as both name it."""
    kind, name, version = package
    if kind == "maven":
        name = name.rpartition(":")[2]
    if kind == "pypi":
        name = name.lower().replace("_", "-").replace(".", "-")
    if kind == "golang":
        # Of a module that was built where it lies, syft makes a version up from what version control said.
        version = "" if version == "(devel)" or version.startswith("v0.0.0-") else version.removeprefix("go")
    if kind == "rpm":
        version = version.partition(":")[2] or version
    return kind, name, version


def missed(mine: list[list[str]], theirs: list[list[str]]) -> list[tuple[str, str, str]]:
    have = {plain(one) for one in mine}
    loose = {one[:2] for one in have if one[0] == "golang" and not one[2]}
    return sorted(
        one for one in map(plain, theirs)
        if one not in have and (one[0], one[1]) not in loose and not (one[0] == "golang" and not one[2])
    )  # fmt: skip


def split(scanner: str, case: Case, absent: list[tuple[str, str, str]]) -> dict[str, Any]:
    """What a scanner finds and the report has not: packages, and what was planted to look like one.

    Only of nasty images all packages are known: one that was removed and left its settings is none of them.
    """
    there = {plain(list(one)) for one in case.packages}
    wrong = [one for one in absent if case.known is None and one not in there]
    return {f"{scanner}_missed": [one for one in absent if one not in wrong], f"{scanner}_wrong": wrong}


def totals(rows: dict[str, dict[str, Any]], what: str) -> dict[str, list[int]]:
    """For each kind of findings or of packages: planted, found, and found of those planted."""
    kinds: dict[str, list[int]] = {}
    for row in rows.values():
        for kind, numbers in row.get(what, {}).get("kinds", {}).items():
            total = kinds.setdefault(kind, [0, 0, 0])
            for at in range(3):
                total[at] += numbers[at]
    return kinds


def rates(numbers: list[int]) -> tuple[float, float]:
    """Precision and recall."""
    planted, found, right = numbers
    return right / found if found else 1.0, right / planted if planted else 1.0


def show(rows: dict[str, dict[str, Any]]) -> int:
    """Print the tables; how much is wrong."""
    wrong = 0
    for what in ("findings", "packages"):
        print(f"\n{what:<26} planted  found  right  precision  recall")
        for kind, numbers in sorted(totals(rows, what).items()):
            planted, found, right = numbers
            precision, recall = rates(numbers)
            print(f"{kind:<26} {planted:>7} {found:>6} {right:>6} {precision:>10.3f} {recall:>7.3f}")
    for name, row in rows.items():
        problems = [row["problem"]] if row["problem"] else []
        for what in ("findings", "packages"):
            for key in ("missed", "more"):
                problems += [f"{key}: {' '.join(one)}" for one in row.get(what, {}).get(key, [])[:10]]
        for scanner in SCANNERS:
            problems += [f"{scanner} has {' '.join(one)}" for one in row.get(f"{scanner}_missed", [])[:20]]
        wrong += len(problems)
        for problem in problems:
            print(f"{name}: {problem}")
    for line in beside(rows):
        print(line)
    print(f"{len(rows)} images, {wrong} wrong")
    return wrong


SCANNERS: dict[str, Callable[[Case, Path], list[list[str]] | None]] = {
    "syft": seen_by_syft,
    "trivy": seen_by_trivy,
}
"""Member of a row, which is the program's name -> what it finds."""


def beside(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What other scanners find, as a table."""
    lines = []
    for key in SCANNERS:
        those = [row for row in rows.values() if row.get(key) is not None]
        if those:
            wrong = sum(len(row.get(f"{key}_wrong", [])) for row in those)
            absent = sum(len(row[f"{key}_missed"]) for row in those)
            lines.append(f"| {key} | {len(those)} | {sum(row[key] for row in those)} | {wrong} | {absent} |")
    head = [
        "",
        "| scanner | images it reads | packages it finds | none: removed, or without a version | missing here |",
        "|---|---|---|---|---|",
    ]
    return head + lines if lines else []


def page_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The tables for the page."""
    nasty = sum(name.startswith("nasty/") for name in rows)
    here = sum(row["here"] for row in rows.values())
    how = "all were read in machines"
    if here:
        how = f"{here} of them were read without a machine (`--here`), by the same program"
    lines = [f"{nasty} nasty images and {len(rows) - nasty} ordinary ones; {how}.", ""]
    lines += ["| kind | planted | reported | rightly | precision | recall |", "|---|---|---|---|---|---|"]
    for what in ("findings", "packages"):
        for kind, numbers in sorted(totals(rows, what).items()):
            precision, recall = rates(numbers)
            shown = f"`{kind}`" if what == "findings" else f"packages: {kind}"
            planted, found, right = numbers
            lines.append(f"| {shown} | {planted} | {found} | {right} | {precision:.3f} | {recall:.3f} |")
    return lines + beside(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="images with this in their name")
    parser.add_argument("--count", type=int, default=0, help="at most so many")
    parser.add_argument("--fresh", action="store_true", help="try again what was tried")
    parser.add_argument(
        "--here", action="store_true", help="start the machine's program here: quick, and without a machine"
    )
    parser.add_argument("--alone", action="store_true", help="without other scanners, be they there")
    options = parser.parse_args()
    LINES.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        LINES.unlink(missing_ok=True)
    rows = {}
    if LINES.exists():
        rows = {row["name"]: row for row in map(json.loads, LINES.read_text().splitlines())}
    scanners = [key for key in SCANNERS if (PROGRAMS / key).exists() and not options.alone]
    chosen = {}
    with tempfile.TemporaryDirectory(prefix="ki") as directory:
        work = Path(directory)
        kata = Kata(work, Path(os.environ["KATA_GUEST_DIR"]))
        for case in cases(work / "images", options.only, options.count):
            row = rows.get(case.name)
            is_new = row is None
            if row is None:
                began = time.monotonic()
                said = said_here(case, work) if options.here else said_in_machine(kata, case)
                row = {"name": case.name, "here": options.here, **judged(case, said, began, work)}
            asked = [key for key in scanners if "all" in row and key not in row]
            for key in asked:
                theirs = SCANNERS[key](case, work)
                row[key] = None if theirs is None else len(theirs)
                row.update(split(key, case, missed(row["all"], theirs or [])))
            if is_new or asked:
                with LINES.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(case.name, row.get("seconds", ""), row["problem"], *asked, flush=True)
            chosen[case.name] = row
    wrong = show(chosen)
    if not options.only and not options.count:
        marked_page.write(PAGE, BEGIN, END, page_lines(chosen))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
