"""podman with `kata-runtime`: the operations of ``tools/conformance --podman`` that go different ways.

The whole table, beside runc and crun, takes minutes and is docs/podman.md's.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import podman
import podman_page
import podman_support
import pytest
from podman_support import IMAGE
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ROWS = (
    "run -it",
    "a missing command",
    "exec",
    "stop",
    "port",
    "volume",
    "cp",
    "pod",
    "a lost conmon",
    "build",
)


@pytest.fixture(scope="module")
def client(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[podman.Podman]:
    directory = Path(tempfile.mkdtemp(prefix="p", dir=run_directory))
    with podman_support.running(directory, guest_assets, busybox_image) as program:
        yield podman.Podman(program)


@pytest.mark.parametrize("row", ROWS)
def test_podman_does_as_with_runc(client: podman.Podman, row: str) -> None:
    seen = podman.tried(client)[row]("kata")
    assert podman_page.works(row, seen) or podman_page.why(row, seen), seen
    assert client.program.sweep() == []


# ---- machines that crash ----


def kill_machine(program: podman_support.Podman) -> None:
    """Kill the hypervisor of the one sandbox there is, as a crash of the machine."""
    [journal] = program.run_dir.glob("sandboxes/*/journal")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    [number] = [line["n"] for line in lines if line.get("p", {}).get("role") == "qemu"]
    [pid] = [line["made"]["pid"] for line in lines if line.get("n") == number and "made" in line]
    os.kill(pid, signal.SIGKILL)


def state(program: podman_support.Podman, name: str, what: str) -> str:
    """A member of what `podman inspect` says; empty without such a container."""
    said = program("inspect", "--format", what, name, code=None).strip()
    return "" if "no such object" in said else said


def until_it_is(program: podman_support.Podman, name: str, what: str, value: str) -> None:
    """Return when `state` says something."""
    until(lambda: state(program, name, what) == value, f"{name} is {value}", program.diagnosis)


def test_a_crash_is_told_by_events_and_inspect(client: podman.Podman) -> None:
    program = client.program
    program("--runtime", "kata", "run", "-d", "--name", "crashed", IMAGE, "sleep", "1000")
    try:
        kill_machine(program)
        assert program("wait", "crashed").strip() == "137"
        said = state(program, "crashed", "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}")
        assert said == "exited 137 false"
        event = ("events", "--stream=false", "--filter", "container=crashed", "--filter", "event=died")
        [died] = program(*event, "--format", "json").splitlines()
        assert json.loads(died)["ContainerExitCode"] == 137
        program("start", "crashed")
        assert program("exec", "crashed", "echo", "again") == "again\n"
    finally:
        program("rm", "-f", "-t", "0", "crashed")
    assert program.sweep() == []


def test_a_crash_removes_who_was_to_be_removed(client: podman.Podman) -> None:
    program = client.program
    program("--runtime", "kata", "run", "-d", "--rm", "--name", "fleeting", IMAGE, "sleep", "1000")
    try:
        kill_machine(program)
        until(lambda: not program("ps", "-aq").split(), "podman has removed it", program.diagnosis)
    finally:
        program("rm", "-f", "-t", "0", "-i", "fleeting")
    assert program.sweep() == []


@pytest.mark.parametrize(("policy", "starts"), [("on-failure:2", 3), ("always", 2)])
def test_a_crash_restarts_who_was_to_be_restarted(client: podman.Podman, policy: str, starts: int) -> None:
    program = client.program
    options = ("-d", "--restart", policy, "--name", "lasting")
    program("--runtime", "kata", "run", *options, IMAGE, "sleep", "1000")
    try:
        for count in range(1, starts + 1):
            until_it_is(program, "lasting", "{{.State.Status}} {{.RestartCount}}", f"running {count - 1}")
            assert program("exec", "lasting", "echo", "up") == "up\n"
            if count < starts or policy != "always":
                kill_machine(program)
        if policy != "always":
            assert program("wait", "lasting").strip() == "137"
            assert state(program, "lasting", "{{.State.Status}} {{.RestartCount}}") == "exited 2"
    finally:
        program("rm", "-f", "-t", "0", "lasting")
    assert program.sweep() == []


def test_hooks_of_a_directory_run_in_their_order(client: podman.Podman) -> None:
    """`podman --hooks-dir`: those on the host, with the container's state on their standard input."""
    program = client.program
    hooks, told = program.directory / "hooks", program.directory / "told"
    hooks.mkdir()
    script = hooks / "hook"
    script.write_text(f'#!/bin/sh\necho "$1 $(cat)" >>{told}\n')
    script.chmod(0o755)
    stages = ["prestart", "createRuntime", "poststart", "poststop"]
    for stage in stages:
        about = {
            "version": "1.0.0",
            "hook": {"path": str(script), "args": ["hook", stage]},
            "when": {"always": True},
            "stages": [stage],
        }
        (hooks / f"{stage}.json").write_text(json.dumps(about))
    program("--hooks-dir", str(hooks), "--runtime", "kata", "run", "--rm", IMAGE, "true")
    seen = [line.split(" ", 1) for line in told.read_text().splitlines()]
    assert [stage for stage, _ in seen] == stages
    states = [json.loads(text) for _, text in seen]
    assert len({one["id"] for one in states}) == 1
    assert [one["status"] for one in states][-2:] == ["running", "stopped"]
    assert program.sweep() == []
