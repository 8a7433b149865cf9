"""`kata factory` and `kata gc`: templates can be seen and removed on a machine that could start none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kata.cli import main as kata
from kata.engine.factory import pool_counts
from kata.oci_runtime import main as oci


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with neither a guest nor a hypervisor, and its directory of templates, which has a failure in it."""
    directory = tmp_path / "templates"
    directory.mkdir()
    (directory / "0123.failed").write_text("no space")
    configuration = tmp_path / "configuration.toml"
    configuration.write_text(
        f'[hypervisor.qemu]\npath = "/nonexistent"\nkernel = "/nonexistent"\n'
        f'[factory]\nenable_template = false\ntemplate_path = "{directory}"\n'
    )
    monkeypatch.setenv("KATA_CONF_FILE", str(configuration))
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    monkeypatch.delenv("KATA_TEMPLATES", raising=False)
    monkeypatch.delenv("KATA_HYPERVISOR", raising=False)
    return directory


def test_status_and_destroy_need_no_machine(templates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kata.main(["factory", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "directory": str(templates),
        "mode": "off",
        "templates": [],
        "waiting": [],
        "pool": {"made": 0, "taken": 0, "missed": 0},
        "pool_dropped": dict.fromkeys(pool_counts.REASONS, 0),
        "failures": [{"key": "0123", "reason": "no space"}],
        "engine_parents": [],
    }
    assert kata.main(["factory", "destroy"]) == 0
    assert not (templates / "0123.failed").exists()


def test_by_the_oci_command_line(templates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert oci.main(["factory", "status"]) == 0
    assert "no space" in capsys.readouterr().out
    assert oci.main(["factory", "destroy"]) == 0
    assert not (templates / "0123.failed").exists()
    assert oci.main(["factory", "init"]) == 1  # it has neither a hypervisor nor a kernel
    assert "error" in capsys.readouterr().err
    assert oci.main(["factory", "burn"]) == 1
    assert "init" in capsys.readouterr().err


def test_status_says_what_became_of_machines_that_waited(
    templates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (templates.parent / "r").mkdir()
    assert kata.main(["factory", "status"]) == 0
    assert "have waited" not in capsys.readouterr().out
    for name, times in (
        (pool_counts.MADE, 5),
        (pool_counts.TAKEN, 2),
        (pool_counts.MISSED, 7),
        (pool_counts.dropped(pool_counts.MEMORY), 2),
        (pool_counts.dropped(pool_counts.KILLED), 1),
    ):
        pool_counts.count(name, times)
    assert kata.main(["factory", "status"]) == 0
    said = "Of 5 machines that have waited, 2 were used, and 3 dropped (memory 2, killed 1); 7 starts found none.\n"
    assert said in capsys.readouterr().out
    assert kata.main(["info", "--format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    known = [facts[f"MachinesWaiting{name}"] for name in ("Made", "Taken", "Missed", "Dropped")]
    assert known == [5, 2, 7, 3]


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("status", "--memory=1g"),
        ("destroy", "--cpus=2"),
        ("destroy", "--hypervisor=qemu"),
        ("destroy", "--json"),
        ("init", "--json"),
    ],
)
def test_an_option_of_another_verb_is_refused(
    templates: Path, capsys: pytest.CaptureFixture[str], verb: str, option: str
) -> None:
    assert kata.main(["factory", verb, option]) == 125
    assert f"kata factory {verb}: {option.partition('=')[0]} is an option of" in capsys.readouterr().err
    assert (templates / "0123.failed").exists()


def test_gc_reports_what_it_did_though_the_configuration_is_broken(
    templates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration = templates.parent / "configuration.toml"
    configuration.write_text("[factory\n")
    assert kata.main(["gc", "--json"]) == 1
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["machine_templates"] == []
    assert [str(configuration) in line for line in report["failed"]] == [True]
    assert output.err.startswith("error: machine templates: ")
