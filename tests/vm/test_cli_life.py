"""The life of a container through the `kata` command: paused, changed, stopped, started again, removed."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from cli_support import FOREVER, container, identity_of, names, status
from conftest import Kata
from waiting import until

from kata.hypervisor.qemu import queues
from kata.resources import sizing


def test_pause_and_resume(shared_kata: Kata, busybox_image: str) -> None:
    with container(shared_kata, busybox_image, "pausing"):
        shared_kata.ok("pause", "pausing")
        assert status(shared_kata, "pausing") == "paused"
        assert b"is paused" in shared_kata.call("exec", "pausing", "true").stderr
        shared_kata.ok("resume", "pausing")
        assert shared_kata.ok("exec", "pausing", "echo", "awake") == "awake\n"
        done = shared_kata.call("resume", "pausing")
        assert done.returncode == 125
        assert b"is not paused" in done.stderr
        shared_kata.ok("pause", "pausing")
        shared_kata.ok("stop", "pausing")


LIMITS = (
    "sh",
    "-c",
    "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; nproc;"
    " awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo",
)


def sized(kata: Kata, name: str) -> tuple[Any, ...]:
    """What is recorded of a container's size, and what its engine says of it."""
    record = json.loads(kata.ok("inspect", name))[0]
    found = json.loads(kata.ok("explain", "--json", name))[0]
    found["host"].pop("used_mib")
    spec = kata.state_dir / "containers" / record["id"] / "config.json"
    return record["cpus"], record["memory"], found, json.loads(spec.read_text())["linux"]["resources"]


def fits(total: str, asked: int) -> bool:
    """Whether a guest with so many MiB has room for what was asked for, and not much more."""
    least = sizing.total_of(asked << 20, "small") >> 20
    return least <= int(total) <= least * 1.05 + queues.LONG_QUEUES_MIB


def test_update_changes_limits_and_machine_for_now_and_later(kata_env: Kata, busybox_image: str) -> None:
    kata = kata_env
    mib = 1 << 20
    kata.ok(
        "run", "-d", "--name", "up", "-m", "400m", "--network", "none", busybox_image, "sh", "-c", FOREVER
    )

    def limits() -> list[str]:
        return kata.ok("exec", "up", *LIMITS).split()

    try:
        assert limits()[:4] == [str(400 * mib), "max", "100000", "max"]
        assert kata.ok("update", "-m", "200m", "--cpus", "0.5", "--pids-limit", "55", "up") == "up\n"
        *found, processors, memory = limits()
        assert found == [str(200 * mib), "50000", "100000", "55"]
        assert processors == "1"
        assert fits(memory, 200), "the machine has given memory back"
        kata.ok("update", "-m", "700m", "--pids-limit", "0", "up")
        *found, memory = limits()
        assert found == [str(700 * mib), "50000", "100000", "max", "1"]
        assert fits(memory, 700)
        before = limits(), sized(kata, "up")
        done = kata.call("update", "-m", "900g", "up")
        assert done.returncode == 125
        assert b"this virtual machine can have" in done.stderr
        assert (limits(), sized(kata, "up")) == before
        kata.ok("restart", "-t", "0", "up")
        *found, memory = limits()
        assert found == [str(700 * mib), "50000", "100000", "max", "1"]
        assert fits(memory, 700)
        kata.ok("stop", "-t", "0", "up")
        assert b"in all" in kata.call("update", "-m", "900g", "up").stderr
        kata.ok("update", "-m", "300m", "up")
        kata.ok("start", "up")
        assert limits()[0] == str(300 * mib)
        assert b"no limit to change" in kata.call("update", "up").stderr
    finally:
        kata.call("rm", "-f", "up")


def test_a_limit_for_a_container_that_was_made_without_one(kata_env: Kata, busybox_image: str) -> None:
    """Its machine has no room to grow; what it has it can give back."""
    kata = kata_env
    kata.ok("run", "-d", "--name", "free", "--network", "none", busybox_image, "sh", "-c", FOREVER)
    try:
        kata.ok("update", "-m", "256m", "free")
        assert fits(kata.ok("exec", "free", *LIMITS).split()[-1], 256)
        done = kata.call("update", "--cpus", "2", "free")
        assert b"2 CPUs are needed, and this virtual machine can have 1" in done.stderr
        assert kata.ok("exec", "free", *LIMITS).split()[1] == "max"
    finally:
        kata.call("rm", "-f", "free")


def test_stop_is_graceful_and_start_keeps_the_files(shared_kata: Kata, busybox_image: str) -> None:
    script = "if test -e /kept; then echo again; else echo x > /kept; fi; " + FOREVER
    with container(shared_kata, busybox_image, "stopping", script):
        # A first process that has not set its trap yet is deaf to SIGTERM.
        until(
            lambda: shared_kata.call("exec", "stopping", "test", "-s", "/kept").returncode == 0, "the file"
        )
        assert shared_kata.ok("stop", "stopping") == "stopping\n"
        state = json.loads(shared_kata.ok("inspect", "stopping"))[0]["state"]
        assert (state["status"], state["exit_code"]) == ("exited", 0)
        assert identity_of(shared_kata, "stopping") not in shared_kata.sandboxes()
        shared_kata.ok("start", "stopping")
        assert shared_kata.ok("exec", "stopping", "cat", "/kept") == "x\n"
        until(lambda: shared_kata.ok("logs", "stopping") == "again\n", "the second start's output")
        shared_kata.ok("restart", "-t", "5", "stopping")
        assert status(shared_kata, "stopping") == "running"


def test_stop_kills_what_does_not_listen(shared_kata: Kata, busybox_image: str) -> None:
    with container(shared_kata, busybox_image, "deaf", "trap '' TERM; while :; do sleep 0.2; done"):
        shared_kata.ok("stop", "-t", "1", "deaf")
        assert json.loads(shared_kata.ok("inspect", "deaf"))[0]["state"]["exit_code"] == 137


def test_kill_and_wait(shared_kata: Kata, busybox_image: str) -> None:
    with container(shared_kata, busybox_image, "victim"):
        waiting = shared_kata.start("wait", "victim")
        time.sleep(0.5)
        shared_kata.ok("kill", "victim")
        stdout, stderr = waiting.communicate(timeout=60)
        assert stdout == b"137\n", stderr
        done = shared_kata.call("kill", "victim")
        assert done.returncode == 125
        assert b"is not running" in done.stderr
        identity = identity_of(shared_kata, "victim")
    told = shared_kata.ok("events", "--json", "--filter", f"sandbox={identity}").splitlines()
    found = [json.loads(line) for line in told]
    assert [one["event"] for one in found] == [
        *("sandbox.created", "sandbox.ready", "container.created", "container.started", "container.exited"),
        *("sandbox.ended", "container.deleted"),
    ]
    assert found[4]["exit_code"] == 137


def test_create_start_attach(shared_kata: Kata, busybox_image: str) -> None:
    identity = shared_kata.ok("create", "--name", "made", "-i", busybox_image, "cat").strip()
    try:
        assert identity not in shared_kata.sandboxes()
        assert status(shared_kata, "made") == "created"
        done = shared_kata.call("start", "-a", "-i", "made", stdin=b"through\n")
        assert (done.returncode, done.stdout) == (0, b"through\n")
        shared_kata.ok("start", "made")
        # One that runs is attached to.
        attached = shared_kata.call("start", "-ai", "--sig-proxy=false", identity[:12], stdin=b"later\n")
        assert (attached.returncode, attached.stdout) == (0, b"later\n")
        shared_kata.ok("start", "made")
        attached = shared_kata.call("attach", identity[:12], stdin=b"again\n")
        assert (attached.returncode, attached.stdout) == (0, b"again\n")
    finally:
        shared_kata.ok("rm", "-f", "made")


def test_rm_asks_for_force(shared_kata: Kata, busybox_image: str) -> None:
    with container(shared_kata, busybox_image, "busy"):
        done = shared_kata.call("rm", "busy")
        assert done.returncode == 1
        assert b"kata rm -f busy" in done.stderr
    assert "busy" not in names(shared_kata)
    shared_kata.ok("rm", "-f", "busy")


def test_a_removed_container_s_name_and_port_are_free_at_once(shared_kata: Kata, busybox_image: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ("run", "-d", "--name", "again", "-p", f"127.0.0.1:{port}:80", busybox_image, "sleep", "1000")
    for _ in range(3):
        identity = shared_kata.ok(*command).strip()
        shared_kata.ok("rm", "-f", "again")
        assert identity not in shared_kata.ok("ps", "-a", "-q", "--no-trunc")
        assert not (shared_kata.state_dir / "containers" / identity).exists()
        assert not (shared_kata.run_dir / "sandboxes" / identity).exists()
        deleted = shared_kata.ok("events", "--json", "--filter", "event=container.deleted")
        assert json.loads(deleted.splitlines()[-1])["name"] == "again"


def test_a_detached_container_with_rm_leaves_nothing(shared_kata: Kata, busybox_image: str) -> None:
    identity = shared_kata.ok("run", "-d", "--rm", "--name", "brief", busybox_image, "sleep", "0.3").strip()
    until(lambda: not (shared_kata.state_dir / "containers" / identity).exists(), "the removal")
    until(lambda: identity not in shared_kata.sandboxes(), "the end of the sandbox")
    assert not (shared_kata.state_dir / "names" / "brief").exists()


def test_a_file_that_is_not_true_hides_no_running_container(kata_env: Kata, busybox_image: str) -> None:
    kata_env.ok("run", "-d", "--name", "early", busybox_image, "sleep", "1000")
    path = kata_env.container_dir("early") / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "status": "created"}))
    assert status(kata_env, "early") == "running"
    plain = kata_env.call("rm", "early")
    assert plain.returncode != 0
    assert b"early is running" in plain.stderr
    kata_env.ok("rm", "-f", "early")
    assert kata_env.sandboxes() == []


# ---- images, host ----


def test_images_and_rmi(kata_env: Kata, busybox_image: str) -> None:
    kata_env.ok("pull", busybox_image)
    listed = json.loads(kata_env.ok("images", "--json"))
    assert len(listed) == 1
    headings = ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]
    assert kata_env.ok("images").splitlines()[0].split() == headings
    kata_env.ok("create", "--name", "user", busybox_image, "true")
    done = kata_env.call("rmi", listed[0]["id"][7:19])
    assert done.returncode == 1
    assert b"user" in done.stderr
    kata_env.ok("rm", "user")
    kata_env.ok("rmi", busybox_image)
    assert json.loads(kata_env.ok("images", "--json")) == []


def test_doctor(shared_kata: Kata) -> None:
    found = json.loads(shared_kata.ok("doctor", "--json"))
    assert found["usable"] is True
    assert {"permissions", "kvm", "qemu", "guest", "cgroups"} <= {check["name"] for check in found["checks"]}
    assert "containers can be run" in shared_kata.ok("doctor")


def test_doctor_on_clients(shared_kata: Kata, tmp_path: Path) -> None:
    for name, said in (
        ("containerd", "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1"),
        ("dockerd", "Docker version 20.10.24+dfsg1, build 297e128"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)
    env = {**shared_kata.env, "PATH": f"{tmp_path}:/usr/bin:/bin:/usr/sbin:/sbin"}

    done = subprocess.run(shared_kata.command("doctor", "--json"), env=env, capture_output=True, check=True)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "1.6.20" in found["containerd"]["text"]
    assert found["docker"]["result"] == "warn"
    assert "20.10" in found["docker"]["text"]
    assert "23 or newer" in found["docker"]["hint"]


def test_doctor_fails_where_nothing_can_run(shared_kata: Kata, tmp_path: Path) -> None:
    env = {**shared_kata.env, "KATA_GUEST_DIR": str(tmp_path)}

    done = subprocess.run(shared_kata.command("doctor"), env=env, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"fix: kata guest build" in done.stdout


def test_version(shared_kata: Kata) -> None:
    assert "kata" in json.loads(shared_kata.ok("version", "--json"))


def test_gc_has_nothing_to_do(kata_env: Kata) -> None:
    assert kata_env.ok("gc") == "nothing to remove\n"
