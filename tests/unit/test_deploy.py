"""What is in deploy/ for Prometheus and Grafana, checked by their own tools; tests/vm/test_prometheus.py runs it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_support as support
import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from kata.metrics import families

HERE = Path(__file__).resolve().parent
CONFIGURATION = support.ROOT / "deploy/prometheus/prometheus.yml"
RUNBOOK = support.ROOT / "docs/alerts.md"


def promtool(*arguments: str) -> str:
    program = shutil.which("promtool", path=support.PROGRAMS)
    if program is None:
        pytest.skip("needs promtool (tools/setup test unpacks it)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_rules_and_configuration_are_valid() -> None:
    assert "12 rules found" in promtool("check", "rules", str(support.RULES))
    assert "is valid" in promtool("check", "config", str(CONFIGURATION))


def test_alerts_come_when_they_should() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(HERE / "alerts.test.yml"))


def test_every_alert_is_tested_and_has_its_runbook() -> None:
    rules = support.RULES.read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert re.findall(r"runbook: docs/alerts.md#(\w+)", rules) == [name.lower() for name in alerts]
    assert re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE) == alerts
    tested = (HERE / "alerts.test.yml").read_text()
    for name in alerts:
        assert re.search(rf"alertname: {name}\n +exp_alerts", tested), name


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """What of a document is not in another one."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{path}.{key}")
            elif value is not None:
                yield f"{path}.{key}"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif given != kept:
        yield f"{path}: {given!r} became {kept!r}"


def read_by_grafana(board: dict[str, Any]) -> dict[str, Any]:
    """A dashboard as Grafana's own library understands it; what it does not know is gone."""
    plugins.register_default_plugins()
    again: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board)))
    return again


def test_the_dashboard_has_the_shape_that_grafana_reads() -> None:
    board = json.loads(support.DASHBOARD.read_text())
    assert list(lost(board, read_by_grafana(board))) == []
    wrong = json.loads(support.DASHBOARD.read_text())
    wrong["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"
    assert list(lost(wrong, read_by_grafana(wrong))) == [".panels[1].fieldConfig.defaults.unitt"]


def test_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    panels = json.loads(support.DASHBOARD.read_text())["panels"]
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def families_in(text: str) -> set[str]:
    """Families that queries ask for; a histogram's series have its name and an ending."""
    names = set(re.findall(r"\bkata_\w+", re.sub(r'"[^"]*"', "", text)))
    parts = {f"{name}_bucket": name for name, one in families.DEFINITIONS.items() if one.kind == "histogram"}
    return {parts.get(name, name) for name in names if not name.startswith("kata_monitor_")}


def test_queries_ask_for_families_that_there_are() -> None:
    rules = re.sub(
        r"^ *(#|summary:|description:|runbook:).*$", "", support.RULES.read_text(), flags=re.MULTILINE
    )
    asked = families_in(rules)
    assert "kata_shim_agent_up" in asked
    for _, query in support.dashboard_queries():
        asked |= families_in(query)
    assert asked <= set(families.DEFINITIONS)
