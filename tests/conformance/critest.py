"""cri-tools' conformance suite: which tests it has, and one run of one of them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 600


@dataclass(frozen=True)
class Result:
    """How one test ended.

    Attributes:
        outcome: ``passed``, ``failed`` or ``skipped``.
        message: Why it did not pass.
    """

    outcome: str
    message: str
    seconds: float


def tests(program: Path, work: Path) -> list[str]:
    """The names of all tests, in the suite's own order.

    Raises:
        subprocess.CalledProcessError: The program does not work.
    """
    report = work / "list.json"
    options = ["-ginkgo.dry-run", "-ginkgo.seed=1", f"-ginkgo.json-report={report}"]
    subprocess.run([program, *options], check=True, capture_output=True)
    specs = [_name(spec) for spec in _specs(report)]
    return sorted(name for name in specs if "benchmark" not in name)


def run(program: Path, test: str, handler: str, endpoint: str, around: list[str], work: Path) -> Result:
    """Run one test.

    Args:
        program: critest.
        test: Its name, from `tests`.
        handler: The runtime handler of containerd's CRI plugin.
        endpoint: Its socket, as a URI.
        around: What critest is executed through.
        work: A directory for its report.
    """
    report = work / "report.json"
    report.unlink(missing_ok=True)
    log = work / f"{handler}-{re.sub('[^a-z0-9]+', '-', test.lower())[-100:]}.log"
    command = [
        *around,
        str(program),
        f"-runtime-endpoint={endpoint}",
        f"-image-endpoint={endpoint}",
        f"-runtime-handler={handler}",
        "-ginkgo.no-color",
        f"-ginkgo.json-report={report}",
        f"-ginkgo.focus={re.escape(test)}$",
    ]
    began = time.monotonic()
    with open(log, "wb") as output:
        try:
            subprocess.run(command, stdout=output, stderr=output, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return Result("failed", f"no end within {TIMEOUT_S} s", time.monotonic() - began)
    seconds = time.monotonic() - began
    if not report.exists():
        return Result("failed", log.read_text(errors="replace")[-500:], seconds)
    ran = [spec for spec in _specs(report) if _name(spec) == test and spec["State"] != "skipped"]
    if ran:
        failure = ran[0].get("Failure", {}).get("Message", "")
        passed = ran[0]["State"] == "passed"
        return Result("passed" if passed else "failed", "" if passed else failure, seconds)
    skipped = [spec for spec in _specs(report) if _name(spec) == test]
    reason = skipped[0].get("Failure", {}).get("Message", "") if skipped else "it was not found"
    return Result("skipped" if skipped else "failed", reason, seconds)


def _specs(report: Path) -> list[dict[str, Any]]:
    [suite] = json.loads(report.read_text())
    return [spec for spec in suite["SpecReports"] if spec["LeafNodeType"] == "It"]


def _name(spec: dict[str, Any]) -> str:
    return " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])
