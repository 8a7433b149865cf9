"""Podman's quadlet units under a real systemd: a container with `kata-runtime` is a service.

Quadlet came with Podman 4.4, which Debian 12 has not: it takes the podman of Debian 13 (tools/debian-podman trixie).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from podman_support import IMAGE, ROOT, Podman
from podman_support import running as podman_running
from scripts import write_script
from systemd_support import GENERATORS, Systemd
from systemd_support import running as systemd_running
from waiting import until

from kata.engine.client import EngineClient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LONG = {"test_a_quadlet_is_a_service"}
BASE = ROOT / "build/podman/trixie"
GENERATOR = BASE / "usr/lib/systemd/system-generators/podman-system-generator"


def unit(command: str, *service: str) -> str:
    """A unit whose container executes a command by a shell."""
    lines = (
        *(
            "[Container]",
            f"Image={IMAGE}",
            "GlobalArgs=--runtime kata",
            "Network=none",
            f'Exec=sh -c "{command}"',
        ),
        *("[Service]", *service, "TimeoutStartSec=900"),
    )
    return "\n".join(lines) + "\n"


UNIT = unit("trap 'exit 0' TERM; sleep 1000 & wait", "Restart=on-failure")
ENDS = unit("exit 7")


@pytest.fixture
def podman(guest_assets: Path, busybox_image: str) -> Iterator[Podman]:
    if not GENERATOR.exists():
        pytest.skip("needs Podman 5.4 (tools/debian-podman trixie)")
    directory = Path(
        tempfile.mkdtemp(prefix="kq", dir="/run")
    )  # in memory: overlays can lie there in the lab, too
    try:
        with podman_running(directory, guest_assets, busybox_image, BASE) as one:
            # What comes without a terminal's environment: its own, and no network namespace of the tests.
            one.command = [one.program, "--tmpdir", str(directory / "t")]
            write_script(directory / "bin/podman", one.command, one.env)
            yield one
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def systemd(podman: Podman, run_directory: Path) -> Iterator[Systemd]:
    """With podman's generator, and a unit of each kind."""
    with systemd_running(run_directory) as one:
        units = podman.directory / "quadlet"
        units.mkdir()
        (units / "box.container").write_text(UNIT)
        (units / "ends.container").write_text(ENDS)
        GENERATORS.mkdir(parents=True, exist_ok=True)
        program = GENERATORS / "podman-system-generator"
        given = {"QUADLET_UNIT_DIRS": units, "PODMAN": podman.directory / "bin/podman"}
        write_script(program, [GENERATOR], given)
        try:
            one.call("systemctl", "daemon-reload")
            yield one
        finally:
            try:
                one.call("systemctl", "stop", "box.service", "ends.service")
            finally:
                program.unlink()


def test_a_quadlet_is_a_service(podman: Podman, systemd: Systemd) -> None:
    """It starts, is restarted after its machine was killed, stops, and leaves nothing; its status is the unit's."""

    def is_now(unit: str, state: str) -> None:
        until(
            lambda: systemd.shown(unit, "ActiveState") == state,
            f"{unit} is {state}",
            lambda: (
                systemd.call("sh", "-c", f"systemctl status --no-pager {unit} || true") + podman.diagnosis()
            ),
        )

    def inside(*command: str) -> str:
        return systemd.call(f"{podman.directory}/bin/podman", "exec", "systemd-box", *command).strip()

    def machines() -> list[str]:
        return sorted(path.name for path in podman.run_dir.glob("sandboxes/*"))

    assert f"{podman.directory}/bin/podman --runtime kata run" in systemd.shown("box.service", "ExecStart")
    systemd.call("systemctl", "start", "--no-block", "box.service")
    is_now("box.service", "active")
    assert systemd.shown("box.service", "Type") == "notify"
    main = systemd.shown("box.service", "MainPID")
    assert systemd.call("cat", f"/proc/{main}/comm").strip() == "conmon"
    assert inside("uname", "-r") != os.uname().release
    first = machines()
    assert len(first) == 1

    with EngineClient(str(podman.run_dir / "sandboxes" / first[0] / "engine.sock")) as engine:
        hypervisor = engine.describe()["hypervisor_pid"]
    systemd.call("kill", "-9", str(hypervisor))  # by its number in systemd's namespace
    until(lambda: systemd.shown("box.service", "NRestarts") == "1", "a restart", podman.diagnosis)
    is_now("box.service", "active")
    assert inside("echo", "there") == "there"
    assert len(machines()) == 1
    assert machines() != first

    systemd.call("systemctl", "stop", "box.service")
    is_now("box.service", "inactive")
    until(lambda: not machines(), "no machine is left", podman.diagnosis)
    assert systemd.call(f"{podman.directory}/bin/podman", "ps", "-aq") == ""

    systemd.call("systemctl", "start", "--no-block", "ends.service")
    is_now("ends.service", "failed")
    assert systemd.shown("ends.service", "ExecMainStatus") == "7"
    until(lambda: not machines(), "no machine is left", podman.diagnosis)
