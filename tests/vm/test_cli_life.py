"""The life of a container through the `kata` command: detached, looked at, stopped, started again, removed, lost."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from waiting import until

from kata.engine.lifecycle.boot_slots import BootSlot
from kata.hypervisor.qemu import root as qemu_root
from kata.resources import sizing

FOREVER = "trap 'exit 0' TERM; while :; do sleep 0.2; done"


@pytest.fixture(scope="module")
def box(shared_kata: Kata, busybox_image: str) -> Iterator[str]:
    """A running container that several tests look at."""
    shared_kata.ok(
        "run",
        "-d",
        "--name",
        "box",
        "-e",
        "MINE=1",
        "-e",
        "PASSWORD=dont-look-5x7",
        busybox_image,
        "sh",
        "-c",
        f"echo first; echo second >&2; {FOREVER}",
    )
    until(lambda: b"second" in shared_kata.call("logs", "box").stderr, "its first words")
    yield "box"
    shared_kata.ok("rm", "-f", "box")


@contextlib.contextmanager
def container(kata: Kata, image: str, name: str, script: str = FOREVER, *options: str) -> Iterator[str]:
    kata.ok("run", "-d", "--name", name, *options, image, "sh", "-c", script)
    try:
        yield name
    finally:
        kata.ok("rm", "-f", name)


def status(kata: Kata, name: str) -> str:
    return str(json.loads(kata.ok("inspect", name))[0]["state"]["status"])


def identity_of(kata: Kata, name: str) -> str:
    return str(json.loads(kata.ok("inspect", name))[0]["id"])


def names(kata: Kata) -> list[str]:
    return [entry["name"] for entry in json.loads(kata.ok("ps", "-a", "--json"))]


# ---- looking ----


def test_ps_lists_it(shared_kata: Kata, box: str) -> None:
    listed = {entry["name"]: entry for entry in json.loads(shared_kata.ok("ps", "--json"))}
    assert listed[box]["status"] == "running"
    shown = shared_kata.ok("ps")
    assert shown.splitlines()[0].split()[:2] == ["CONTAINER", "ID"]
    assert "Up " in shown
    assert shared_kata.ok("ps", "-q").strip() == listed[box]["id"][:12]


def test_an_id_may_be_shortened(shared_kata: Kata, box: str) -> None:
    identity = json.loads(shared_kata.ok("inspect", box))[0]["id"]
    assert json.loads(shared_kata.ok("inspect", identity[:8]))[0]["name"] == box


def test_logs(shared_kata: Kata, box: str) -> None:
    done = shared_kata.call("logs", box)
    assert done.stdout == b"first\n"
    assert done.stderr == b"second\n"
    assert b"T" in shared_kata.call("logs", "-t", box).stdout.split()[0]
    records = [json.loads(line) for line in shared_kata.ok("logs", "--json", box).splitlines()]
    assert {record["stream"] for record in records} == {"stdout", "stderr"}
    assert sum(len(stream) for stream in (shared_kata.call("logs", "--tail", "0", box).stdout,)) == 0


def test_logs_follow_to_the_end(shared_kata: Kata, busybox_image: str) -> None:
    with container(shared_kata, busybox_image, "counter", "for i in 1 2 3 4 5; do echo $i; sleep 0.3; done"):
        assert shared_kata.ok("logs", "-f", "counter").split() == ["1", "2", "3", "4", "5"]
        assert shared_kata.ok("logs", "--tail", "2", "counter").split() == ["4", "5"]


def test_top_shows_the_guests_processes(shared_kata: Kata, box: str) -> None:
    processes = json.loads(shared_kata.ok("top", "--json", box))
    assert any("while :" in " ".join(process["command"]) for process in processes)
    assert shared_kata.ok("top", box).startswith("PID")


def test_inspect_tells_the_sandbox(shared_kata: Kata, box: str) -> None:
    found = json.loads(shared_kata.ok("inspect", box))[0]
    assert found["spec"]["process"]["args"][0] == "sh"
    assert found["sandbox"]["accelerator"] in ("kvm", "tcg")
    pid = found["state"]["pid"]
    assert "qemu" in Path(f"/proc/{pid}/comm").read_text()


def test_debug_bundle(shared_kata: Kata, box: str, tmp_path: Path) -> None:
    """All of a running sandbox but its secrets."""
    target = tmp_path / "box.tar.gz"
    said = shared_kata.ok("debug", "bundle", box, "-o", str(target))
    with tarfile.open(target) as archive:
        files = {
            member.name.partition("/")[2]: file.read()
            for member in archive.getmembers()
            if (file := archive.extractfile(member)) is not None
        }
    assert json.loads(files["manifest.json"])["problems"] == [], said
    whole = b"".join(files.values())
    for secret in (b"dont-look-5x7", b"trap 'exit 0'", b"echo first"):
        assert secret not in whole, [name for name, data in files.items() if secret in data]
    assert json.loads(files["config.json"])["process"]["args"] == "<3 removed>"
    described = json.loads(files["description.json"])
    roles = {one["pid"]: one["role"] for one in json.loads(files["processes.json"])}
    assert roles[described["engine_pid"]] == "engine"
    assert described["hypervisor_pid"] in roles
    assert json.loads(files["figures.json"])["id"] == described["id"]
    assert {"boot", "agent"} & {one["name"] for one in json.loads(files["timings.json"])}
    assert "container.started" in {event["event"] for event in json.loads(files["events.json"])}
    assert b"\n-machine\n" in files["hypervisor.args.txt"]
    assert set(described["host_cgroups"].values()) == set(json.loads(files["cgroups.json"]))


def test_the_level_of_a_running_engines_log(shared_kata: Kata, box: str) -> None:
    log = shared_kata.run_dir / "sandboxes" / identity_of(shared_kata, box) / "engine.log"
    shared_kata.ok("debug", "level", box, "debug")
    shared_kata.ok("exec", box, "true")
    until(lambda: " debug: " in log.read_text(), "lines that are not there otherwise")
    shared_kata.ok("debug", "level", box, "info")
    before = log.read_text().count(" debug: ")
    shared_kata.ok("exec", box, "true")
    assert log.read_text().count(" debug: ") == before


def test_stats(shared_kata: Kata, box: str) -> None:
    row = json.loads(shared_kata.ok("stats", "--json", "--interval", "0.3", box))[0]
    assert row["memory_bytes"] > 0
    total = shared_kata.ok("exec", box, "sed", "-n", "s/^MemTotal: *\\([0-9]*\\) kB/\\1/p", "/proc/meminfo")
    assert row["memory_limit_bytes"] == int(total) * 1024, (
        "without a limit of its own it has that of the machine"
    )
    assert row["pids"] >= 1
    assert shared_kata.ok("stats", "--no-stream", "--interval", "0.1", box).splitlines()[1].split()[1] == box
    assert row["client"] == "kata"
    assert 0 < row["overhead_bytes"] < 1 << 30
    shown = json.loads(shared_kata.ok("top", "--json", "--interval", "0.3", "--filter", box))
    assert [(one["name"], one["state"], one["problem"]) for one in shown] == [(box, "ready", "")]
    assert shown[0]["rates"]["cpu_per_second"] is not None
    assert shown[0]["timings"]


def test_the_log_of_the_engine_and_its_level(shared_kata: Kata, box: str) -> None:
    shared_kata.ok("debug", "level", box, "info")
    shared_kata.ok("exec", box, "true")
    said = shared_kata.ok("logs", "--engine", box)
    assert "sandbox.ready" in said
    assert f"container.started container={identity_of(shared_kata, box)}" in said
    shared_kata.ok("debug", "level", box, "debug")
    shared_kata.ok("exec", box, "true")
    shared_kata.ok("debug", "level", box, "info")
    shared_kata.ok("exec", box, "true")
    lines = shared_kata.ok("logs", "--engine", box).removeprefix(said).splitlines()
    debug = [line for line in lines if " debug: " in line]
    assert sum("the agent answered ExecProcess" in line for line in debug) == 1
    assert sum("the engine answered Exec " in line for line in debug) == 1
    assert '"msg":"kata-agent ' in shared_kata.ok("logs", "--guest", box)


# ---- exec ----


def test_exec(shared_kata: Kata, box: str) -> None:
    done = shared_kata.call(
        "exec", "-e", "B=2", "-w", "/tmp", box, "sh", "-c", "echo $MINE$B $PWD; echo e >&2; exit 5"
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, b"12 /tmp\n", b"e\n")
    assert shared_kata.ok("exec", "-i", box, "cat", stdin=b"in and out") == "in and out"
    assert shared_kata.ok("exec", "-u", "7:8", box, "id", "-u").strip() == "7"


def test_exec_of_what_is_not_there(shared_kata: Kata, box: str) -> None:
    done = shared_kata.call("exec", box, "no-such-command")
    assert done.returncode == 127
    assert b"executable file not found in $PATH" in done.stderr
    assert shared_kata.call("exec", box, "/etc/passwd").returncode == 126


def test_exec_returns_though_a_child_keeps_the_streams(shared_kata: Kata, box: str) -> None:
    assert shared_kata.ok("exec", box, "sh", "-c", "sleep 300 & echo started", timeout=60) == "started\n"


def test_a_detached_exec(shared_kata: Kata, box: str) -> None:
    shared_kata.ok("exec", "-d", box, "sh", "-c", "echo x > /tmp/detached")
    until(lambda: shared_kata.call("exec", box, "test", "-e", "/tmp/detached").returncode == 0, "the file")


def test_two_hundred_execs_lose_no_byte(shared_kata: Kata, box: str) -> None:
    script = "yes 0123456789abcde | head -c 1048576"
    expected = hashlib.sha256(b"0123456789abcde\n" * 65536).hexdigest()

    def once(_: int) -> str:
        done = shared_kata.call("exec", box, "sh", "-c", script)
        assert done.returncode == 0, done.stderr
        return hashlib.sha256(done.stdout).hexdigest()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(once, range(200))) == {expected}


# ---- network ----


def _fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        return str(answer.read().decode())


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _hear(address: str, port: int) -> bytes:
    """What a server says to a client that says nothing; empty while there is none."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 10) as client:
        client.settimeout(10)
        return client.recv(100)
    return b""


def test_a_published_port_is_reachable(shared_kata: Kata, busybox_image: str) -> None:
    port, banner, private = _free_ports(3)
    script = (
        "mkdir /www; echo from the guest > /www/index.html; httpd -p 80 -h /www;"
        " (while :; do nc -l -s 127.0.0.1 -p 26 -e echo private; done) &"
        " while :; do nc -l -p 25 -e echo hello; done"
    )
    published = (f"127.0.0.1:{port}:80", f"{banner}:25", f"127.0.0.1:{private}:26")
    options = [word for one in published for word in ("-p", one)]
    with container(shared_kata, busybox_image, "web", script, *options):

        def served() -> bool:
            with contextlib.suppress(OSError):
                return _fetch(port) == "from the guest\n"
            return False

        until(served, "the page")
        assert shared_kata.ok("port", "web", "80") == f"127.0.0.1:{port}\n"
        assert f"80/tcp -> 127.0.0.1:{port}\n" in shared_kata.ok("port", "web")
        # A server may speak first. (passt of Debian 12 would let it wait for its client.)
        addresses = ["127.0.0.1"]
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            addresses.append("::1")
        for address in addresses:
            assert until(partial(_hear, address, banner), f"the banner at {address}") == b"hello\n"
        # What listens on the guest's loopback alone is not published.
        assert _hear("127.0.0.1", private) == b""
        taken = shared_kata.call("run", "--rm", "-p", f"127.0.0.1:{port}:80", busybox_image, "true")
        assert taken.returncode == 125
        assert str(port) in taken.stderr.decode()
        assert b"fault of its own" not in taken.stderr


def test_the_hosts_loopback_is_out_of_reach(shared_kata: Kata, busybox_image: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as secret:
        port = secret.getsockname()[1]
        script = (
            "gateway=$(ip route | awk '/default/{print $3}'); echo gateway $gateway;"
            f" for a in 127.0.0.1 10.0.2.2 $gateway; do nc -w 2 $a {port} </dev/null && echo reached $a; done; true"
        )
        shown = shared_kata.ok("run", "--rm", busybox_image, "sh", "-c", script)
        assert "gateway" in shown
        assert "reached" not in shown
        secret.settimeout(0.1)
        with pytest.raises(TimeoutError):
            secret.accept()


def test_without_a_network_there_is_loopback_only(shared_kata: Kata, busybox_image: str) -> None:
    shown = shared_kata.ok("run", "--rm", "--network", "none", busybox_image, "ip", "-o", "link")
    # The machine has its spare interface, which leads nowhere.
    flags = {
        line.split(":")[1].strip(): line.partition("<")[2].partition(">")[0] for line in shown.splitlines()
    }
    assert "UP" in flags.pop("lo").split(",")
    assert all("UP" not in given.split(",") for given in flags.values()), shown


# ---- verbs ----


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
    return least <= int(total) <= least * 1.05 + qemu_root.LONG_QUEUES_MIB


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
        attached = shared_kata.call("attach", identity[:12], stdin=b"later\n")
        assert (attached.returncode, attached.stdout) == (0, b"later\n")
    finally:
        shared_kata.ok("rm", "-f", "made")


def test_rm_asks_for_force(shared_kata: Kata, busybox_image: str) -> None:
    with container(shared_kata, busybox_image, "busy"):
        done = shared_kata.call("rm", "busy")
        assert done.returncode == 125
        assert b"kata rm -f busy" in done.stderr
    assert "busy" not in names(shared_kata)
    shared_kata.ok("rm", "-f", "busy")


def test_a_detached_container_with_rm_leaves_nothing(shared_kata: Kata, busybox_image: str) -> None:
    identity = shared_kata.ok("run", "-d", "--rm", "--name", "brief", busybox_image, "sleep", "0.3").strip()
    until(lambda: not (shared_kata.state_dir / "containers" / identity).exists(), "the removal")
    until(lambda: identity not in shared_kata.sandboxes(), "the end of the sandbox")
    assert not (shared_kata.state_dir / "names" / "brief").exists()


def _copy_every_kind(kata: Kata, here: Path, there: str) -> None:
    """Into the container and out again, as files and as a tar stream: nothing is lost in silence."""
    source = here / "source"
    source.mkdir(parents=True)
    (source / "a").write_text("data")
    os.link(source / "a", source / "b")
    os.symlink("a", source / "c")
    os.mkfifo(source / "fifo", 0o640)
    os.mknod(source / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (source / "null").chmod(0o666)
    kata.ok("cp", "-a", str(source), f"copies:{there}")
    script = f"cd {there}; stat -c '%n %F %h %a' *; stat -c %t:%T null; ls -i a b | awk '{{print $1}}' | uniq | wc -l"
    lines = kata.ok("exec", "copies", "sh", "-c", script).splitlines()
    assert "a regular file 2 644" in lines
    assert "fifo fifo 1 640" in lines
    assert "null character special file 1 666" in lines
    assert lines[-2:] == ["1:3", "1"]
    out = kata.call("cp", f"copies:{there}", str(here / "out"))
    assert out.returncode == 1
    assert b"null is not copied: it is a device" in out.stderr
    assert (here / "out" / "a").stat().st_ino == (here / "out" / "b").stat().st_ino
    assert stat.S_ISFIFO((here / "out" / "fifo").stat().st_mode)
    assert not (here / "out" / "null").exists()
    stream = kata.call("cp", f"copies:{there}", "-").stdout
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        members = {member.name.rpartition("/")[2]: member for member in tar}
    assert [members[name].type for name in ("a", "b", "c", "fifo", "null")] == [
        tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE,
    ]  # fmt: skip
    # Back in: the archive names no directory for the last of its files, and ends with what nobody knows.
    extra = io.BytesIO()
    with tarfile.open(fileobj=extra, mode="w") as tar:
        for name, kind, target in (("n/x", tarfile.REGTYPE, ""), ("n/y", tarfile.LNKTYPE, "n/x")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    kata.ok("cp", "-", f"copies:{there}", stdin=extra.getvalue())
    again = kata.call("cp", "-", f"copies:{there}", stdin=stream)
    assert (again.returncode, again.stderr) == (0, b"")
    shutil.rmtree(here / "out")
    assert kata.call("cp", f"copies:{there}", str(here / "out")).returncode == 1
    names = here / "out"
    for one, other in (("n/x", "n/y"), ("a", "b"), (f"{there[5:]}/a", f"{there[5:]}/b")):
        assert (names / one).stat().st_ino == (names / other).stat().st_ino
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here / "socket"))
        left = kata.call("cp", str(here / "socket"), f"copies:{there}/socket")
    assert left.returncode == 1
    assert b"socket is not copied" in left.stderr
    everything = kata.call("cp", "copies:/", "-")
    assert (everything.returncode, everything.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(everything.stdout)) as tar:
        found = set(tar.getnames())
    assert {"./proc", "./sys", "./etc/passwd", f".{there}/b"} <= found
    assert not [name for name in found if name.startswith(("./proc/", "./sys/"))], (
        "the kernel's are left out"
    )


def _copy_links_across_mounts(kata: Kata, here: Path) -> None:
    """A name that a file cannot have costs nothing that was there; what has the content is copied."""
    kata.ok("exec", "copies", "sh", "-c", "echo precious > /dev/shm/kept")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, kind, target in (
            ("tmp/first", tarfile.REGTYPE, ""),
            ("dev/shm/kept", tarfile.LNKTYPE, "tmp/first"),
            ("tmp/last", tarfile.LNKTYPE, "tmp/first"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    done = kata.call("cp", "-", "copies:/", stdin=archive.getvalue())
    assert done.returncode == 1
    assert b"dev/shm/kept is not copied: it cannot be a link to tmp/first" in done.stderr
    script = "cat /dev/shm/kept; stat -c %h /tmp/last; ls -A /dev/shm"
    assert kata.ok("exec", "copies", "sh", "-c", script).split() == ["precious", "2", "kept"]
    tree = here / "tree"
    for directory in ("tmp", "dev/shm"):
        (tree / directory).mkdir(parents=True)
    (tree / "dev/shm/kept").write_text("new")
    os.link(tree / "dev/shm/kept", tree / "tmp/same")
    kata.ok("cp", f"{tree}/.", "copies:/")
    assert kata.ok("exec", "copies", "cat", "/dev/shm/kept", "/tmp/same") == "newnew"


def test_cp_in_and_out_running_and_stopped(shared_kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "big").write_bytes(os.urandom(3 << 20))
    (tree / "script").write_text("#!/bin/sh\n")
    (tree / "script").chmod(0o755)
    (tree / "link").symlink_to("below/big")
    with container(shared_kata, busybox_image, "copies"):
        for run in ("running", "stopped"):
            if run == "stopped":
                shared_kata.ok("stop", "copies")
            shared_kata.ok("cp", str(tree), f"copies:/in-{run}")
            back = tmp_path / f"back-{run}"
            shared_kata.ok("cp", f"copies:/in-{run}", str(back))
            assert (back / "below" / "big").read_bytes() == (tree / "below" / "big").read_bytes()
            assert os.readlink(back / "link") == "below/big"
            assert (back / "script").stat().st_mode & 0o777 == 0o755
            single = tmp_path / f"single-{run}"
            shared_kata.ok("cp", "copies:/etc/passwd", str(single))
            assert single.read_text().startswith("root:")
            archive = shared_kata.call("cp", f"copies:/in-{run}/below", "-").stdout
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                assert tar.getnames() == ["below", "below/big"]
            if run == "running":
                _copy_every_kind(shared_kata, tmp_path / "kinds", "/tmp/kinds")
                _copy_links_across_mounts(shared_kata, tmp_path / "links")
            else:
                lost = shared_kata.call("cp", str(tree / "script"), "copies:/dev/shm/script")
                assert (lost.returncode, b"/dev/shm is a tmpfs" in lost.stderr) == (1, True)
            missing = shared_kata.call("cp", "copies:/nothing", str(tmp_path))
            assert missing.returncode == 125
            assert b"/nothing does not exist" in missing.stderr
        assert status(shared_kata, "copies") == "exited"
        shared_kata.ok("start", "copies")
        assert shared_kata.ok("exec", "copies", "stat", "-c", "%a", "/in-stopped/script") == "755\n"
        # What was copied outlives its machine, also one that dies the moment that the command has ended.
        shared_kata.ok("cp", str(tree), "copies:/kept")
        shared_kata.ok("cp", "-", "copies:/kept", stdin=_tar({"more": b"from a stream"}))
        os.kill(vm_pid(shared_kata, "copies"), signal.SIGKILL)
        until(lambda: status(shared_kata, "copies") == "exited", "the container has ended")
        shared_kata.ok("start", "copies")
        said = shared_kata.ok("exec", "copies", "cat", "/kept/script", "/kept/more")
        assert said == "#!/bin/sh\nfrom a stream"


def test_a_copy_is_not_disturbed(shared_kata: Kata, busybox_image: str) -> None:
    def copying() -> Any:
        process = shared_kata.start("cp", "-", "open:/", stdin=subprocess.PIPE)
        until(lambda: identity in shared_kata.sandboxes(), "the copy's sandbox")
        return process

    identity = shared_kata.ok("create", "--name", "open", busybox_image, "sh", "-c", FOREVER).strip()
    try:
        copy = copying()
        with ThreadPoolExecutor(2) as threads:
            start = threads.submit(shared_kata.call, "start", "open")
            removal = threads.submit(shared_kata.call, "rm", "open").result()
        for done in (start.result(), removal):
            assert done.returncode == 125
            assert b"container open is open for a copy (kata cp)" in done.stderr
        _, said = copy.communicate(_tar({"one": b"1"}), timeout=60)
        assert copy.returncode == 0, said
        # A shorter one is waited for, and of several starts at once one is the start.
        copy = copying()
        with ThreadPoolExecutor(3) as threads:
            starts = [threads.submit(shared_kata.call, "start", "open") for _ in range(2)]
            time.sleep(1)
            assert copy.communicate(_tar({"two": b"2"}), timeout=60) == (b"", b"")
            for one in starts:
                assert one.result().returncode == 0, one.result().stderr
        assert shared_kata.ok("exec", "open", "cat", "/one", "/two") == "12"
        shared_kata.ok("stop", "open")
        copy = copying()
        shared_kata.ok("rm", "-f", "open")
        _, said = copy.communicate(_tar({"three": b"3"}), timeout=60)
        assert b"the copy was cut short" in said
        assert copy.returncode == 137
    finally:
        shared_kata.ok("rm", "-f", "open")


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_cp_does_not_follow_a_containers_links_out(
    shared_kata: Kata, busybox_image: str, tmp_path: Path
) -> None:
    script = "mkdir /trap; ln -s /etc/shadow /trap/link; ln -s ../../../../../.. /trap/up; " + FOREVER
    with container(shared_kata, busybox_image, "trap", script):
        until(
            lambda: shared_kata.call("exec", "trap", "test", "-L", "/trap/up").returncode == 0, "the links"
        )
        shared_kata.ok("cp", "trap:/trap", str(tmp_path / "trap"))
        assert (tmp_path / "trap" / "link").is_symlink()
        secret = tmp_path / "file"
        secret.write_text("mine")
        # "up" leads to the container's own root, whatever lies above the sandbox.
        shared_kata.ok("cp", str(secret), "trap:/trap/up/landed")
        assert shared_kata.ok("exec", "trap", "cat", "/landed") == "mine"
        assert not Path("/landed").exists()


# ---- a virtual machine that dies ----


def vm_pid(kata: Kata, name: str) -> int:
    return int(json.loads(kata.ok("inspect", name))[0]["state"]["pid"])


def test_a_killed_machine_is_told_and_leaves_nothing(shared_kata: Kata, busybox_image: str) -> None:
    ticks = "while :; do echo tick; sleep 0.2; done"
    shared_kata.ok("run", "-d", "--name", "lost", busybox_image, "sh", "-c", ticks)
    try:
        waiting = shared_kata.start("wait", "lost")
        executing = shared_kata.start("exec", "lost", "sh", "-c", "echo up; sleep 1000")
        attached = shared_kata.start("attach", "lost")
        for process, word in ((executing, b"up\n"), (attached, b"tick\n")):
            assert process.stdout is not None
            assert process.stdout.readline() == word
        os.kill(vm_pid(shared_kata, "lost"), signal.SIGKILL)
        stdout, stderr = waiting.communicate(timeout=30)
        assert stdout == b"137\n", stderr
        for process in (executing, attached):
            _, stderr = process.communicate(timeout=30)
            assert process.returncode == 137, stderr
            assert b"lost" in stderr
            assert b"error:" in stderr
        state = json.loads(shared_kata.ok("inspect", "lost"))[0]["state"]
        assert (state["status"], state["exit_code"]) == ("exited", 137)
        assert state["error"]
        identity = identity_of(shared_kata, "lost")
        until(lambda: identity not in shared_kata.sandboxes(), "the end of the sandbox")
        shared_kata.ok("start", "lost")
        assert status(shared_kata, "lost") == "running"
    finally:
        shared_kata.ok("rm", "-f", "lost")


def _has_taken_signals(pid: int) -> bool:
    """Whether a process has none before it, and its main thread, which handles them, waits for something else again."""
    for _ in range(2):
        text = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines())
        if (
            int(fields["ShdPnd"], 16)
            or int(fields["SigPnd"], 16)
            or not fields["State"].strip().startswith("S")
        ):
            return False
        time.sleep(0.05)
    return True


def test_a_silent_guest_has_no_say_in_its_end(kata_env: Kata, busybox_image: str) -> None:
    """QEMU is stopped, as a guest is that answers nothing (tests/unit/test_silent_guest.py has every call)."""

    def timed(*arguments: str) -> float:
        began = time.monotonic()
        kata_env.ok(*arguments)
        return time.monotonic() - began

    kata_env.ok("run", "-d", "--name", "mute", busybox_image, "sleep", "1000")
    try:
        impatient = kata_env.start("exec", "mute", "sh", "-c", "echo up; sleep 1000")
        asked = kata_env.start("exec", "mute", "sh", "-c", "echo up; sleep 1000")
        for process in (impatient, asked):
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        os.kill(vm_pid(kata_env, "mute"), signal.SIGSTOP)
        asked.terminate()
        for _ in range(2):
            impatient.send_signal(signal.SIGINT)
            until(lambda: _has_taken_signals(impatient.pid), "the signal was taken")
        impatient.send_signal(signal.SIGINT)
        _, said = impatient.communicate(timeout=30)
        assert impatient.returncode == 125
        assert b"was not sent SIGINT and goes on" in said
        assert b"rm -f mute" in said
        late = kata_env.call("kill", "-s", "TERM", "mute")
        assert late.returncode == 125
        assert b"has not taken signal 15" in late.stderr
        _, said = asked.communicate(timeout=30)
        assert asked.returncode == 125
        assert b"was not sent SIGTERM and goes on" in said
        assert status(kata_env, "mute") == "running"
        assert timed("kill", "mute") < 8
        state = json.loads(kata_env.ok("inspect", "mute"))[0]["state"]
        assert (state["status"], state["exit_code"]) == ("exited", 137)
        assert "its guest did not answer within 4 s" in state["error"]
        kata_env.ok("start", "mute")
        os.kill(vm_pid(kata_env, "mute"), signal.SIGSTOP)
        assert timed("rm", "-f", "mute") < 8
    finally:
        kata_env.ok("rm", "-f", "mute")
    assert kata_env.sandboxes() == []


def test_nobody_reads_the_output(kata_env: Kata, busybox_image: str) -> None:
    def head(*arguments: str) -> tuple[int, str]:
        process = kata_env.start(*arguments)
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read().decode()
        return process.wait(60), said

    code, said = head("run", "--rm", "--name", "brief", busybox_image, "yes")
    assert (code, "brief was made with --rm and is ended" in said) == (141, True), said
    assert names(kata_env) == []
    assert kata_env.sandboxes() == []
    # Slow enough to be seen, and not to fill the log.
    code, said = head(
        "run", "--name", "stays", busybox_image, "sh", "-c", "while :; do echo y; sleep 0.1; done"
    )
    try:
        assert (code, "stays goes on" in said) == (141, True), said
        assert status(kata_env, "stays") == "running"
        for script in ("yes", "trap '' PIPE; while :; do echo y; sleep 0.1; done"):
            code, said = head("exec", "stays", "sh", "-c", script)
            assert (code, "the command is ended" in said) == (141, True), said
        shown = kata_env.ok("top", "stays")
        assert "yes" not in shown
        assert "PIPE" not in shown
        code, said = head("attach", "stays")
        assert (code, "stays goes on" in said) == (141, True), said
        with open("/dev/full", "wb") as full:
            for arguments in (("ps",), ("exec", "stays", "echo", "y"), ("inspect", "stays")):
                done = subprocess.run(
                    kata_env.command(*arguments),
                    env=kata_env.env,
                    stdout=full,
                    stderr=subprocess.PIPE,
                    check=False,
                )
                assert done.returncode == 125
                assert done.stderr.startswith(
                    b"error: standard output cannot be written: No space left on device"
                ) or (
                    b"standard output cannot be written: No space left on device: the command is ended"
                    in done.stderr
                )
                assert done.stderr.count(b"\n") == 1
    finally:
        kata_env.ok("rm", "-f", "stays")


def test_a_machine_killed_under_an_attached_run(kata_env: Kata, busybox_image: str) -> None:
    process = kata_env.start(
        "run", "--rm", "--name", "killed", busybox_image, "sh", "-c", "echo up; sleep 1000"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    os.kill(vm_pid(kata_env, "killed"), signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 137
    assert b"virtual machine" in stderr
    assert kata_env.sandboxes() == []
    assert names(kata_env) == []


def test_a_start_that_waits_for_a_boot_slot_and_is_given_up(
    kata_env: Kata, busybox_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(kata_env.run_dir))
    others = [BootSlot(print) for _ in range(len(os.sched_getaffinity(0)) + 1)]
    assert all(slot.is_held for slot in others)
    # Whoever runs the tests in the background may have Ctrl-C ignored.
    process = kata_env.start(
        "run",
        *("--rm", "--name", "patient", busybox_image, "true"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until(kata_env.sandboxes, "a sandbox")
    time.sleep(1)
    assert not _hypervisor_of(kata_env)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert kata_env.sandboxes() == []
    assert names(kata_env) == []
    process = kata_env.start("run", "--rm", busybox_image, "echo", "at last")
    others.pop().end()
    assert process.communicate(timeout=30)[0] == b"at last\n"
    for slot in others:
        slot.end()


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.5, 0.9, 1.3])
def test_a_machine_killed_during_its_start(kata_env: Kata, busybox_image: str, delay: float) -> None:
    process = kata_env.start("run", "--rm", "--name", "early", busybox_image, "sleep", "1000")
    until(lambda: _hypervisor_of(kata_env), "a hypervisor")
    victim = _hypervisor_of(kata_env)
    time.sleep(delay)
    os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode in (125, 137), stderr
    assert b"error:" in stderr
    assert b"fault of its own" not in stderr
    assert kata_env.sandboxes() == []
    assert names(kata_env) == []


def _hypervisor_of(kata: Kata) -> int:
    """Pid of the hypervisor of this kata's only sandbox, as its journal has it; 0 while there is none."""
    for sandbox in kata.sandboxes():
        with contextlib.suppress(OSError):
            lines = (kata.run_dir / "sandboxes" / sandbox / "journal").read_text().splitlines()
            for pid in (json.loads(line).get("made", {}).get("pid", 0) for line in lines):
                if pid and "qemu" in Path(f"/proc/{pid}/comm").read_text():
                    return int(pid)
    return 0


def test_a_killed_engine_takes_its_machine_along(shared_kata: Kata, busybox_image: str) -> None:
    shared_kata.ok("run", "-d", "--name", "headless", busybox_image, "sleep", "1000")
    try:
        pid, engine = vm_pid(shared_kata, "headless"), shared_kata.engine_pid("headless")
        os.kill(engine, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the machine")
        state = json.loads(shared_kata.ok("inspect", "headless"))[0]["state"]
        assert (state["status"], state["exit_code"]) == ("exited", 137)
        shared_kata.ok("gc")
        identity = identity_of(shared_kata, "headless")
        assert identity not in shared_kata.sandboxes()
        told = shared_kata.ok("events", "--json", "--filter", f"sandbox={identity}").splitlines()
        assert json.loads(told[-1])["error"] == "its engine was killed"
        shared_kata.ok("start", "headless")
    finally:
        shared_kata.ok("rm", "-f", "headless")


# ---- images, host ----


def test_images_and_rmi(kata_env: Kata, busybox_image: str) -> None:
    kata_env.ok("pull", busybox_image)
    listed = json.loads(kata_env.ok("images", "--json"))
    assert len(listed) == 1
    assert kata_env.ok("images").startswith("NAME")
    kata_env.ok("create", "--name", "user", busybox_image, "true")
    done = kata_env.call("rmi", listed[0]["id"][7:19])
    assert done.returncode == 125
    assert b"user" in done.stderr
    kata_env.ok("rm", "user")
    kata_env.ok("rmi", busybox_image)
    assert json.loads(kata_env.ok("images", "--json")) == []


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
    import subprocess

    done = subprocess.run(shared_kata.command("doctor", "--json"), env=env, capture_output=True, check=True)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "1.6.20" in found["containerd"]["text"]
    assert found["docker"]["result"] == "warn"
    assert "20.10" in found["docker"]["text"]
    assert "23 or newer" in found["docker"]["hint"]


def test_doctor_fails_where_nothing_can_run(shared_kata: Kata, tmp_path: Path) -> None:
    env = {**shared_kata.env, "KATA_GUEST_DIR": str(tmp_path)}
    import subprocess

    done = subprocess.run(shared_kata.command("doctor"), env=env, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"fix: kata guest build" in done.stdout


def test_version(shared_kata: Kata) -> None:
    assert "kata" in json.loads(shared_kata.ok("version", "--json"))


def test_gc_has_nothing_to_do(kata_env: Kata) -> None:
    assert kata_env.ok("gc") == "nothing to remove\n"
