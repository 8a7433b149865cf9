"""What stands in front of a command of ``kata-runtime``, and where its errors are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kata.errors import KataError, NotFoundError, UsageError
from kata.oci_runtime import container_commands
from kata.oci_runtime import main as oci_runtime
from kata.oci_runtime.global_options import GlobalOptions


def test_options_come_in_both_forms_and_the_command_is_left() -> None:
    options = GlobalOptions()

    rest = options.take(
        [
            "--log-format=json",
            "--log",
            "/tmp/log",
            "--root=/r",
            "--systemd-cgroup",
            "--debug",
            "kill",
            "x",
            "--all",
        ]
    )

    assert rest == ["kill", "x", "--all"]
    assert (options.log, options.log_format, options.state_root) == ("/tmp/log", "json", "/r")
    assert options.systemd_cgroup
    assert options.debug


def test_containers_are_recorded_below_the_run_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", "/run/elsewhere")

    assert GlobalOptions().state_root == "/run/elsewhere/oci"


@pytest.mark.parametrize("argv", [["--log"], ["--log-format", "xml", "state", "x"], ["--debug=x", "list"]])
def test_what_makes_no_sense_is_refused(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        GlobalOptions().take(argv)


def test_an_error_is_a_line_of_json_in_the_callers_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "oci-log"

    status = oci_runtime.main(["--log-format=json", f"--log={log}", "no-such-command"])

    assert status == 1
    told = json.loads(log.read_text())
    assert told["level"] == "error"
    assert "no-such-command" in told["msg"]
    assert "no-such-command" in capsys.readouterr().err


def test_without_a_form_the_log_has_lines_of_text(tmp_path: Path) -> None:
    options = GlobalOptions()
    options.log = str(tmp_path / "log")

    options.record(NotFoundError('container "x" does not exist'))

    assert 'level=error msg="container \\"x\\" does not exist"' in (tmp_path / "log").read_text()


def test_who_is_root_is_not_said_by_an_option() -> None:
    for value in ("auto", "true", "false"):
        assert GlobalOptions().take([f"--rootless={value}", "--rootless", value, "list"]) == ["list"]
    with pytest.raises(UsageError, match="--rootless 'perhaps' is not known"):
        GlobalOptions().take(["--rootless", "perhaps", "list"])


@pytest.mark.parametrize(
    "line",
    [
        "state x",
        "start x",
        "kill x",
        "kill x 9",
        "kill --all x KILL",
        "kill x TERM -a",
        "delete x",
        "delete --force x",
        "delete -f x",
        "delete x y",
        "delete",
        "state --all x",
        "kill x 9 9",
        "kill -- x",
        "delete --force=true x",
        "delete -fx y",
        "delete --help",
        "list",
        "",
    ],
)
def test_what_is_read_at_once_is_what_the_grammar_reads(line: str) -> None:
    argv = line.split()

    found = oci_runtime.plain(argv)

    if found is None:
        return  # the grammar reads it
    meant = container_commands.COMMANDS[argv[0]].parse(argv[1:])
    assert found.rest == meant.rest
    for key in ("all", "force"):
        assert found.flag(key) == (key in meant and meant.flag(key))


@pytest.mark.parametrize(
    "line", ["state x", "start x", "kill x 9", "kill --all x 9", "delete --force x", "delete x"]
)
def test_what_podman_executes_is_read_at_once(line: str) -> None:
    assert oci_runtime.plain(line.split()) is not None


@pytest.mark.parametrize("line", ["delete x y", "delete", "state --all x", "kill x 9 9"])
def test_mistakes_are_left_to_the_grammar(line: str) -> None:
    argv = line.split()

    assert oci_runtime.plain(argv) is None
    with pytest.raises(KataError):
        container_commands.COMMANDS[argv[0]].parse(argv[1:])


@pytest.mark.parametrize(("command", "status"), [("exec", 255), ("state", 1), ("start", 1)])
def test_a_failure_of_exec_is_no_status_of_a_process(
    command: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path))
    assert oci_runtime.main([command, "nobody", *(["true"] if command == "exec" else [])]) == status


def test_with_debug_the_end_of_a_command_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "oci-log"

    oci_runtime.main(["--log", str(log), "--log-format", "json", "--debug", "version"])
    oci_runtime.main(["--log", str(log), "version"])

    [line] = log.read_text().splitlines()
    told = json.loads(line)
    assert told["level"] == "debug"
    assert told["msg"].startswith("kata-runtime version: status 0 after ")
    assert "level=debug" not in capsys.readouterr().err
    oci_runtime.main(["--debug", "no-such-command"])
    assert 'level=debug msg="kata-runtime no-such-command: status 1 after ' in capsys.readouterr().err
