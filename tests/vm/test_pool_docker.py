"""The warm pool for Docker's containers, in its bridge."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_docker
from containerd_support import RUNTIME
from pool_support import Pool, switched_on
from test_docker import Docker
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def docker(
    run_directory: Path, guest_assets: Path, busybox_image: str, tmp_path: Path
) -> Iterator[tuple[Docker, Pool]]:
    with (
        switched_on(tmp_path / "pool.toml"),
        test_docker.running(run_directory, guest_assets) as one,
    ):
        pool = Pool(one.containerd.run_dir, one.containerd.env)
        try:
            yield one, pool
        finally:
            try:
                test_docker.clean(one)
            finally:
                pool.end()


def links(client: Docker) -> set[str]:
    """The interfaces of the network namespace in which dockerd is."""
    done = subprocess.run(["ip", "-j", "-n", client.netns, "link"], capture_output=True, check=True)
    return {one["ifname"] for one in json.loads(done.stdout)}


def test_a_container_has_the_machine_that_waited(docker: tuple[Docker, Pool], tmp_path: Path) -> None:
    client, pool = docker

    def start() -> None:
        client.run("--rm", "bb", "true")
        until(lambda: not client.containerd.sandboxes(), "its end", client.containerd.diagnosis)

    engine = pool.filled(start, client.containerd.diagnosis)
    before = links(client)
    (tmp_path / "file").write_text("of the host")
    serve = "echo up; while :; do echo -e 'HTTP/1.0 200 OK\\r\\n\\r\\nserved' | nc -l -p 80 >/dev/null; done"
    options = ("--name", "web", "--hostname", "guest", "-p", "8099:80", "-v", f"{tmp_path}:/data")
    client.run("-d", *options, "bb", "sh", "-c", serve)
    pid = client("inspect", "--format", "{{.State.Pid}}", "web").strip()
    sandbox = pool.only()
    assert pool.path_of(sandbox) == "pool", client.containerd.diagnosis()
    assert pool.engine_of(sandbox) == engine
    # The network that Docker has wired, in the namespace of the process that it has for the container.
    network = json.loads(client("inspect", "--format", "{{json .NetworkSettings}}", "web"))
    (bridge,) = network["Networks"].values()
    seen = client("exec", "web", "ip", "-o", "address", "show", "eth0")
    assert f"inet {bridge['IPAddress']}/24" in seen
    assert bridge["MacAddress"] in client("exec", "web", "ip", "-o", "link", "show", "eth0")
    assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(network["SandboxKey"]).st_ino
    assert client("exec", "web", "cat", "/etc/hostname", "/data/file").split() == [
        "guest",
        "of",
        "the",
        "host",
    ]
    assert client("exec", "web", "sh", "-c", "echo of the guest >/data/answer; exit 5", code=5) == ""
    assert (tmp_path / "answer").read_text() == "of the guest\n"
    assert client("exec", "-i", "web", "cat", stdin=b"through") == "through"
    fetch = (
        "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8099/', timeout=5).read())"
    )
    command = [*client.containerd.around, "python3", "-c", fetch]
    until(
        lambda: b"served" in subprocess.run(command, capture_output=True, check=False).stdout,
        "the port answers",
    )
    assert client("logs", "web") == "up\n"
    # Its end is Docker's, and leaves nothing.
    client("stop", "-t", "0", "web")
    assert client("inspect", "--format", "{{.State.ExitCode}}", "web").strip() == "137"
    client("rm", "web")
    until(lambda: not os.path.exists(f"/proc/{engine}"), "the engine's end")
    assert not client.containerd.sandboxes()
    assert links(client) <= before
    # A limit makes it another machine, and the start says so.
    engine = pool.filled(start, client.containerd.diagnosis)
    client("run", "--runtime", RUNTIME, "-d", "--name", "large", "-m", "700m", "bb", "sleep", "1000")
    path = pool.path_of(pool.only())
    assert path in (
        "cold: there is no template for it yet",
        "template: none was waiting that is like it (1 of other kinds)",
    )
    assert pool.status()["pool"]["taken"] == 1
