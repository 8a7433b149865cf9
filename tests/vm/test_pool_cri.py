"""The warm pool for pods, as Kubernetes makes them: crictl, containerd's CRI plugin, CNI's bridge."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cni_support import forwarded
from pool_support import Pool, switched_on
from test_cri import Cri, clean, running
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LOOK = "cat /proc/sys/kernel/random/boot_id; hostname; cat /sys/class/net/eth0/address; ip -o -4 address show eth0"
LIMITED = {"resources": {"memory_limit_in_bytes": 64 << 20}}


@pytest.fixture
def cri(
    run_directory: Path, guest_assets: Path, busybox_image: str, tmp_path: Path
) -> Iterator[tuple[Cri, Pool]]:
    with (
        switched_on(tmp_path / "pool.toml"),
        running(run_directory, guest_assets, busybox_image) as one,
    ):
        pool = Pool(one.daemon.run_dir, one.daemon.env)
        try:
            yield one, pool
        finally:
            try:
                clean(one)
            finally:
                pool.end()


def test_a_pod_has_the_machine_that_waited(cri: tuple[Cri, Pool]) -> None:
    client, pool = cri

    def start() -> None:
        pod = client.pod()
        client.container(pod, "one", "sleep", "1000")
        clean(client)

    engine = pool.filled(start, client.daemon.diagnosis)
    # What a pod may not have is refused before anybody is asked.
    path = client.daemon.directory / "host.json"
    linux = {"security_context": {"namespace_options": {"network": 2}}}
    path.write_text(json.dumps({"metadata": {"name": "h", "uid": "h", "namespace": "test"}, "linux": linux}))
    client("runp", "--runtime", "kata", str(path), code=1)
    assert pool.those_waiting() == [engine]

    pod = client.pod()
    sandbox = pool.only()
    assert pool.path_of(sandbox) == "pool", client.daemon.diagnosis()
    assert pool.engine_of(sandbox) == engine
    serve = "mkdir /w; echo served >/w/f; httpd -p 8081 -h /w; exec httpd -f -p 127.0.0.1:8080 -h /w"
    one = client.container(pod, "one", "sh", "-c", serve, linux=LIMITED)
    two = client.container(pod, "two", "sleep", "1000")
    assert pool.only() == sandbox
    # It has the pod's names and addresses, in both containers.
    told, other = (client("exec", "-s", each, "sh", "-c", LOOK).split() for each in (one, two))
    assert told == other
    about = json.loads(client("inspectp", pod[0]))
    boot_id, name, mac, *_ = told
    address = about["status"]["network"]["ip"]
    assert name == f"p{client.count}"
    assert f"{address}/24" in told
    process = about["info"]["pid"]
    inside = ["nsenter", f"--net=/proc/{process}/ns/net"]
    link = subprocess.run(
        [*inside, "ip", "-j", "link", "show", "eth0"], capture_output=True, text=True, check=True
    )
    assert json.loads(link.stdout)[0]["address"] == mac
    # Who stands for the containers is in the pod's network namespace; the limit is that of one of them.
    for each in (one, two):
        pid = json.loads(client("inspect", each))["info"]["pid"]
        assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(f"/proc/{process}/ns/net").st_ino
    memory = [client("exec", "-s", each, "cat", "/sys/fs/cgroup/memory.max").strip() for each in (one, two)]
    assert memory == [str(64 << 20), "max"]
    # Packets both ways: the node's to the pod, and crictl's to what listens on loopback there.
    outside = ["nsenter", f"--net=/run/netns/{client.netns}"]
    ask = [*outside, "curl", "-s", "-m", "20", f"http://{address}:8081/f"]
    until(
        lambda: subprocess.run(ask, capture_output=True, check=False).stdout == b"served\n", "the pod's port"
    )
    request = b"GET /f HTTP/1.0\r\n\r\n"

    def served() -> bool:
        endpoint = f"unix://{client.daemon.socket}"
        answer = forwarded(endpoint, outside, pod[0], 8080, request, more=client.daemon.diagnosis)
        return answer.endswith(b"served\n")

    until(served, "what listens in the pod", client.daemon.diagnosis)
    # A container that ends does so alone, and says how.
    three = client.container(pod, "three", "sh", "-c", "exit 7")
    until(lambda: client.status(three)["state"] == "CONTAINER_EXITED", "its end")
    assert client.status(three)["exitCode"] == 7
    clean(client)
    until(lambda: not os.path.exists(f"/proc/{engine}"), "the engine's end")
    # The next one has another machine, with nothing of this one's.
    engine = pool.filled(start, client.daemon.diagnosis)
    pod = client.pod()
    assert pool.engine_of(pool.only()) == engine
    one = client.container(pod, "one", "sleep", "1000")
    assert client("exec", "-s", one, "cat", "/proc/sys/kernel/random/boot_id").strip() != boot_id
    status = pool.status()
    assert status["pool"]["taken"] == 2
    assert sum(status["pool_dropped"].values()) == 0
