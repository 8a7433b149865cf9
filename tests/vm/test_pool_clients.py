"""The warm pool for what has a network and files of the host: `kata run` as it is by default, and containerd's ctr."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Kata
from containerd_support import Containerd, clean, running
from pool_support import Pool, switched_on
from test_pool import configure, directories, is_there, one_waiting
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def how_of(kata: Kata, *arguments: str) -> tuple[str, list[str]]:
    """How a machine started, and the lines that its container wrote."""
    done = kata.call("run", "--rm", "--timings", *arguments)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stderr.decode().splitlines()
    return next(line for line in lines if "start:" in line).strip(), done.stdout.decode().splitlines()


def test_a_network_and_volumes(kata_env: Kata, busybox_image: str, tmp_path: Path) -> None:
    """A machine that waited has the network and the volumes of its sandbox, as any other; and what cannot use it says
    so."""
    kata = kata_env
    kata.env["KATA_TEMPLATES"] = "on"
    configure(kata, vm_cache_number=1, vm_cache_least_free=64)
    (tmp_path / "word").write_text("of the host\n")
    kata.ok("factory", "init")
    look = (
        "ip -o addr show eth0 | grep -c 10.0.2.15; ip route | grep -c ^default; cat /etc/resolv.conf | wc -l"
    )
    how, first = how_of(kata, busybox_image, "sh", "-c", look)
    assert how == "start: template: none was waiting"
    one_waiting(kata)
    how, second = how_of(kata, busybox_image, "sh", "-c", look)
    assert (how, second) == ("start: pool", first)
    assert first[:2] == ["1", "1"]
    # Its helper carries packets, both ways.
    one = one_waiting(kata)
    kata.ok(
        *("run", "-d", "--name", "ab", "-p", "127.0.0.1:38099:8000", busybox_image),
        *("sh", "-c", "mkdir /w; echo served >/w/index.html; httpd -f -p 8000 -h /w"),
    )
    assert kata.engine_pid("ab") == one["pid"]

    def fetched() -> bool:
        done = subprocess.run(
            ["curl", "-s", "-m", "5", "http://127.0.0.1:38099/"], capture_output=True, check=False
        )
        return done.stdout == b"served\n"

    until(fetched, "what the container serves")
    kata.ok("rm", "-f", "ab")
    # Volumes are another kind of machine, with another template.
    volume = ("-v", f"{tmp_path}:/data")
    until(
        lambda: how_of(kata, *volume, busybox_image, "true")[0].startswith("start: template"), "a template"
    )
    until(lambda: how_of(kata, *volume, busybox_image, "true")[0] == "start: pool", "one with files")
    one_waiting(kata)
    script = "cat /data/word; echo of the guest >/data/answer; grep -c ' /data ' /proc/mounts; ls /data"
    how, lines = how_of(kata, *volume, busybox_image, "sh", "-c", script)
    assert (how, lines) == ("start: pool", ["of the host", "1", "answer", "word"])
    assert (tmp_path / "answer").read_text() == "of the guest\n"
    kata.ok("factory", "destroy")
    until(lambda: directories(kata) == [], "the end of all")


@pytest.fixture
def daemon(
    run_directory: Path, guest_assets: Path, busybox_image: str, tmp_path: Path
) -> Iterator[Containerd]:
    with (
        switched_on(tmp_path / "pool.toml"),
        running(run_directory, guest_assets, busybox_image) as one,
    ):
        try:
            yield one
        finally:
            try:
                clean(one)
            finally:
                pool_of(one).end()


def pool_of(daemon: Containerd) -> Pool:
    return Pool(daemon.run_dir, daemon.env)


def fill(daemon: Containerd) -> int:
    """Have one wait; its process."""

    def start() -> None:
        daemon.run("filler", "true")
        until(lambda: not daemon.sandboxes(), "its end")

    return pool_of(daemon).filled(start, daemon.diagnosis)


def test_containers_of_containerd(daemon: Containerd) -> None:
    """A task has the machine that waited, with its root file system live, and the network of a namespace that its
    client has made; nothing is left of it."""
    engine = fill(daemon)
    daemon.detached("ab", "sh", "-c", "echo in the guest >/made; sleep 1000")
    assert daemon.engine_pid("default.ab") == engine
    assert pool_of(daemon).path_of("default.ab") == "pool"
    upper = Path(
        daemon.ok("snapshot", "mounts", "/nowhere", "ab")
        .partition("upperdir=")[2]
        .partition(",")[0]
        .split()[0]
    )
    until(lambda: (upper / "made").exists(), "what it wrote, on the host")
    (upper / "from-host").write_text("live\n")
    assert daemon.ok("task", "exec", "--exec-id", "x", "ab", "cat", "/from-host") == "live\n"
    assert daemon.ok("task", "exec", "--exec-id", "x", "ab", "ls", "/sys/class/net") == "lo\n"
    # The helpers are in the sandbox's cgroup, as those that an engine starts.
    files = [
        int(pid)
        for pid in Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
        if "virtiofsd" in Path(f"/proc/{pid}/comm").read_text()
    ]
    for pid in files:
        assert Path(f"/proc/{pid}/cgroup").read_text() == Path(f"/proc/{engine}/cgroup").read_text()
        assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)
    assert files
    daemon.remove("ab")
    until(lambda: not is_there(engine), "its engine's end")
    # A namespace that is there before.
    engine = fill(daemon)
    name = f"pool{os.getpid()}"
    away = (
        f"{name}o"  # with both ends of a veth it would have two interfaces, which no machine that waits has
    )
    for one in (name, away):
        subprocess.run(["ip", "netns", "add", one], check=True)
    try:
        inside = ["ip", "-n", name]
        veth = ("link", "add", "eth0", "type", "veth", "peer", "name", "other", "netns", away)
        subprocess.run([*inside, *veth], check=True)
        for words in ("addr add 10.9.8.7/24 dev eth0", "link set eth0 up"):
            subprocess.run([*inside, *words.split()], check=True)
        namespace = f"network:/run/netns/{name}"
        daemon.detached("ab", "sleep", "1000", options=("--with-ns", namespace))
        assert daemon.engine_pid("default.ab") == engine
        assert pool_of(daemon).path_of("default.ab") == "pool"
        pid = daemon.tasks()["ab"][0]
        assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(f"/run/netns/{name}").st_ino
        seen = daemon.ok("task", "exec", "--exec-id", "x", "ab", "ip", "-o", "addr", "show", "eth0")
        assert "10.9.8.7/24" in seen
        links = subprocess.run([*inside, "-br", "link"], capture_output=True, text=True, check=True).stdout
        assert "tap0_kata" in links
        daemon.remove("ab")
        until(lambda: not is_there(engine), "its engine's end")
        links = subprocess.run([*inside, "-br", "link"], capture_output=True, text=True, check=True).stdout
        assert "tap" not in links
        for kind in ("qdisc", "filter"):
            left = subprocess.run(
                ["tc", "-n", name, kind, "show", "dev", "eth0", *(["ingress"] if kind == "filter" else [])],
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            assert not {"ingress", "mirred"} & set(left.split())
    finally:
        for one in (name, away):
            subprocess.run(["ip", "netns", "del", one], check=False)
