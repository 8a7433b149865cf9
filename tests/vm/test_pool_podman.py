"""The warm pool for the OCI command line: `podman run` with `kata-runtime`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import podman_support
import pytest
from podman_support import IMAGE, Podman
from pool_support import Pool, switched_on
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def podman(
    run_directory: Path, guest_assets: Path, busybox_image: str, tmp_path: Path
) -> Iterator[tuple[Podman, Pool]]:
    directory = Path(tempfile.mkdtemp(prefix="p", dir=run_directory))
    conf = tmp_path / "pool.toml"
    environment = {"KATA_CONF_FILE": str(conf)}
    with (
        switched_on(conf),
        podman_support.running(directory, guest_assets, busybox_image, environment=environment) as client,
    ):
        places = {"KATA_STATE_DIR": str(directory / "s"), "KATA_RUN_DIR": str(client.run_dir)}
        pool = Pool(client.run_dir, {**os.environ, **places})
        try:
            yield client, pool
        finally:
            try:
                client("rm", "-f", "-t", "0", "-a", code=None)
            finally:
                pool.end()


def test_a_container_has_the_machine_that_waited(podman: tuple[Podman, Pool], tmp_path: Path) -> None:
    client, pool = podman

    def start() -> None:
        client("--runtime", "kata", "run", "--rm", IMAGE, "true")

    engine = pool.filled(start, client.diagnosis)
    (tmp_path / "file").write_text("of the host")
    serve = "mkdir /w; echo served >/w/f; echo up; exec httpd -f -p 80 -h /w"
    options = ("--name", "web", "--hostname", "guest", "-p", "8098:80", "-v", f"{tmp_path}:/data")
    client("--runtime", "kata", "run", "-d", *options, IMAGE, "sh", "-c", serve)
    sandbox = pool.only()
    assert pool.path_of(sandbox) == "pool", client.diagnosis()
    assert pool.engine_of(sandbox) == engine
    about = json.loads(client("inspect", "web"))[0]
    network = about["NetworkSettings"]
    (bridge,) = network["Networks"].values()
    seen = client("exec", "web", "ip", "-o", "address", "show", "eth0")
    assert f"inet {bridge['IPAddress']}/16" in seen
    assert bridge["MacAddress"] in client("exec", "web", "ip", "-o", "link", "show", "eth0")
    pid = about["State"]["Pid"]
    assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(network["SandboxKey"]).st_ino
    assert client("exec", "web", "sh", "-c", "hostname; cat /data/file").split() == [
        "guest",
        "of",
        "the",
        "host",
    ]
    assert client("exec", "web", "sh", "-c", "echo of the guest >/data/answer; exit 5", code=5) == ""
    assert (tmp_path / "answer").read_text() == "of the guest\n"
    fetch = [*client.around, "curl", "-s", "-m", "5", "http://127.0.0.1:8098/f"]

    def served() -> bool:
        return subprocess.run(fetch, capture_output=True, check=False).stdout == b"served\n"

    until(served, "the port answers", client.diagnosis)
    client("stop", "-t", "0", "web")
    assert client("inspect", "--format", "{{.State.ExitCode}}", "web").strip() == "137"
    client("rm", "web")
    until(lambda: not os.path.exists(f"/proc/{engine}"), "the engine's end")
    # One whose conmon is killed is taken away as another one is.
    engine = pool.filled(start, client.diagnosis)
    client("--runtime", "kata", "run", "-d", "--name", "lost", IMAGE, "sleep", "1000")
    assert pool.engine_of(pool.only()) == engine
    os.kill(int(client("inspect", "--format", "{{.State.ConmonPid}}", "lost")), signal.SIGKILL)
    client("rm", "-f", "-t", "0", "lost", code=None)
    client("rm", "-f", "-t", "0", "-a")
    until(lambda: not os.path.exists(f"/proc/{engine}"), "the engine's end")
    # What waits is no container's, and not in a cgroup of one.
    pool.filled(start, client.diagnosis)
    pool.end()
    assert client.sweep() == []
