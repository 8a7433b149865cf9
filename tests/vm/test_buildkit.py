"""Docker's BuildKit with `kata-runtime` in runc's place: each ``RUN`` of a Dockerfile has a machine of its own.

dockerd calls the program that ``DOCKER_BUILDKIT_RUNC_COMMAND`` names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_docker
from conftest import ROOT
from test_docker import Docker
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PLUGIN = "libexec/docker/cli-plugins/docker-buildx"


def plugin() -> Path | None:
    """Docker's client plugin that speaks to BuildKit."""
    places = (ROOT / "build/programs/usr", Path("/usr"), Path("/usr/local"))
    return next((place / PLUGIN for place in places if (place / PLUGIN).exists()), None)


@pytest.fixture(scope="module")
def docker(
    run_directory: Path, guest_assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Docker]:
    found = plugin()
    if found is None:
        pytest.skip("needs docker-buildx (tools/setup test unpacks it with Docker)")
    place = tmp_path_factory.mktemp("buildkit")
    plugins = place / "docker/cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-buildx").symlink_to(found)
    program = place / "runtime"
    program.write_text(
        f'#!/bin/sh\necho "$*" >>{place}/calls\nexec {ROOT}/src/kata/oci_runtime/__main__.py "$@"\n'
    )
    program.chmod(0o755)
    given = {
        "DOCKER_BUILDKIT_RUNC_COMMAND": str(program),
        "DOCKER_CONFIG": str(place / "docker"),
        "DOCKER_BUILDKIT": "1",
        "BUILDKIT_PROGRESS": "plain",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        with test_docker.running(run_directory, guest_assets) as one:
            yield one
    assert " run " in (place / "calls").read_text(), "BuildKit has called another runtime"


def build(docker: Docker, directory: Path, text: str, *options: str, code: int | None = 0) -> str:
    """What `docker build` of a Dockerfile says."""
    (directory / "Dockerfile").write_text(text)
    return docker("build", "--progress", "plain", "--no-cache", *options, str(directory), code=code)


def left(docker: Docker) -> list[str]:
    """Machines that are there."""
    return [str(path) for path in docker.containerd.run_dir.glob("sandboxes/*")]


def test_commands_of_a_dockerfile_have_machines_of_their_own(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("given\n")
    text = (
        "FROM bb\nENV X=y\nWORKDIR /work\nCOPY given given\n"
        "RUN uname -r >kernel; echo $X >>kernel; cat given >>kernel\n"
        "RUN --mount=type=tmpfs,target=/there touch /there/x && ls /there >>kernel\n"
        "RUN cat kernel && rm given\n"
    )
    said = build(docker, tmp_path, text, "-t", "made")
    kernel, *rest = docker("run", "--rm", "made", "cat", "kernel").splitlines()
    assert rest == ["y", "given", "x"], said
    assert kernel != os.uname().release
    assert "given" not in docker("run", "--rm", "made", "ls")
    until(lambda: not left(docker), "no machine is left")


def test_a_command_that_fails_has_its_status(docker: Docker, tmp_path: Path) -> None:
    said = build(docker, tmp_path, "FROM bb\nRUN echo before; exit 9\n", code=1)
    assert "before" in said
    assert "exit code: 9" in said
    until(lambda: not left(docker), "no machine is left")


def test_the_hosts_network_is_refused_by_name(docker: Docker, tmp_path: Path) -> None:
    options = ("--network", "host", "--allow", "network.host")
    said = build(docker, tmp_path, "FROM bb\nRUN true\n", *options, code=1)
    assert "network namespace" in said, said
    until(lambda: not left(docker), "no machine is left")
