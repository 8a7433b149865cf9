"""The OCI runtime's command line, driven as conmon and Podman drive it: streams, the process on the host, its end."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from oci_support import PROGRAM, Runtime, running
from waiting import PATIENCE, alive, until

from kata import sysio

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

FOREVER = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done"


@pytest.fixture(scope="module")
def runtime(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Runtime]:
    with running(run_directory / "oci", guest_assets, busybox_image) as one:
        yield one


def test_a_container_from_create_to_delete(runtime: Runtime) -> None:
    bundle = runtime.bundle("life", "sh", "-c", f"cat; echo wrong >&2; {FOREVER}")
    monitor = runtime.monitor(bundle, stdin=subprocess.PIPE)
    pid = runtime.pid(bundle, monitor)
    found = json.loads(runtime("state", "life"))
    assert (found["id"], found["pid"], found["status"]) == ("life", pid, "created")
    assert found["bundle"] == str(bundle)

    # The number belongs to a child of the monitor's, in a network namespace that is not the host's.
    assert _parent(pid) == monitor.pid
    assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    # Who looks for the container's files by it finds those, and none of the host's.
    assert Path(f"/proc/{pid}/root/bin/busybox").exists()
    assert not Path(f"/proc/{pid}/root/{runtime.directory}").exists()
    assert [line.split()[1] for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()] == ["/"]
    runtime("start", "life")
    assert monitor.stdin is not None
    assert monitor.stdout is not None
    assert monitor.stderr is not None
    monitor.stdin.write(b"from outside\n")
    monitor.stdin.close()
    assert [monitor.stdout.readline(), monitor.stdout.readline()] == [b"from outside\n", b"ready\n"]
    assert runtime.status("life") == "running"

    # Without an environment, as Podman asks; what runs is not deleted.
    runtime("pause", "life")
    assert runtime.status("life") == "paused"
    refused = runtime.call("exec", "life", "true")  # at once, and its streams are let go of
    assert refused.returncode == 255
    assert b"cannot exec in a paused container" in refused.stderr
    command = [str(PROGRAM), "exec", "--ignore-paused", "life", "echo", "late"]
    with subprocess.Popen(command, env=runtime.env, stdout=subprocess.PIPE) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        runtime("resume", "life")
        assert waiting.communicate(timeout=PATIENCE)[0] == b"late\n"
    refused = runtime.call("delete", "life")
    assert refused.returncode == 1
    assert b"that is not stopped: running" in refused.stderr
    again = runtime.call("create", "--bundle", str(bundle), "life")
    assert again.returncode == 1
    assert b"container with id exists" in again.stderr

    _execs(runtime, pid)
    _figures(runtime, pid)
    _member(runtime, pid)

    # A signal that somebody sends to the process on the host reaches the container.
    os.kill(pid, signal.SIGTERM)
    assert monitor.stdout.read() == b"told\n"
    assert monitor.stderr.read() == b"wrong\n"
    assert monitor.wait(PATIENCE) == 3
    found = json.loads(runtime("state", "life"))
    assert (found["status"], found["pid"]) == ("stopped", 0)
    for number in ("TERM", "0"):
        late = runtime.call("kill", "life", number)
        assert late.returncode == 1
        assert b"container not running" in late.stderr
        runtime("kill", "--all", "life", number)  # nobody is left to be signalled, as with runc
    runtime("delete", "life")
    assert runtime.left() == []


def _execs(runtime: Runtime, pid: int) -> None:
    done = runtime.call(
        "exec",
        "--env",
        "X=y",
        "--cwd",
        "/tmp",
        "life",
        "sh",
        "-c",
        "cat; pwd; echo $X >&2; exit 9",
        input=b"in ",
        stdin=None,
    )
    assert (done.returncode, done.stdout, done.stderr) == (9, b"in /tmp\n", b"y\n")

    none = runtime.call("exec", "life", "no-such-command")
    assert none.returncode != 0
    assert b"executable file not found in $PATH" in none.stderr

    # Killed on the host, an exec is gone in the guest, and its container is not.
    process = runtime.directory / "process.json"
    process.write_text(
        json.dumps(
            {"args": ["sleep", "1234"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
        )
    )
    pid_file = runtime.directory / "exec_pid"
    options = ("--detach", "--pid-file", str(pid_file), "--process", str(process))
    silent = {"capture_output": False, "stdout": subprocess.DEVNULL}  # its streams are the process's
    assert runtime.call("exec", *options, "life", **silent).returncode == 0
    other = int(pid_file.read_text())
    assert os.readlink(f"/proc/{other}/ns/net") == os.readlink(f"/proc/{pid}/ns/net")
    assert _guest_has(runtime, "1234")
    os.kill(other, signal.SIGKILL)
    until(lambda: not _guest_has(runtime, "1234"), "the exec's end")
    assert alive(pid)


def _figures(runtime: Runtime, pid: int) -> None:
    runtime("kill", "life", "0")
    [listed] = json.loads(runtime("list", "--format", "json"))
    assert (listed["id"], listed["pid"], listed["status"]) == ("life", pid, "running")
    assert runtime("list", "-q") == "life\n"
    assert "while :; do" in runtime("ps", "life")
    assert all(isinstance(one, int) for one in json.loads(runtime("ps", "--format", "json", "life")))

    # As Podman has it: its resources deny all devices, and name limits of 0 that stay as they are.
    denied = {"devices": [{"allow": False, "access": "rwm"}], "cpu": {"shares": 0}, "pids": {"limit": 77}}
    changed = runtime.call("update", "--resources=-", "life", input=json.dumps(denied).encode(), stdin=None)
    assert (changed.returncode, changed.stderr) == (0, b"")
    runtime("update", "--memory", str(200 << 20), "life")
    event = json.loads(runtime("events", "--stats", "life"))
    assert (event["type"], event["id"]) == ("stats", "life")
    assert event["data"]["cpu"]["usage"]["total"] > 0
    assert event["data"]["memory"]["usage"]["limit"] == 200 << 20
    assert event["data"]["pids"]["limit"] == 77
    assert runtime.call("exec", "life", "sh", "-c", "echo > /dev/null").returncode == 0


def _member(runtime: Runtime, pid: int) -> None:
    """A container that names another's namespaces runs in its machine, and ends without it."""
    bundle = runtime.bundle("member", "sh", "-c", "cat /proc/sys/kernel/random/boot_id; exit 6")
    config = json.loads((bundle / "config.json").read_text())
    for one in config["linux"]["namespaces"]:
        if one["type"] in ("network", "ipc", "uts"):
            one["path"] = f"/proc/{pid}/ns/{ {'network': 'net'}.get(one['type'], one['type']) }"
    (bundle / "config.json").write_text(json.dumps(config))
    machine = runtime("exec", "life", "cat", "/proc/sys/kernel/random/boot_id").encode()
    done = runtime.call("run", "--bundle", str(bundle), "member")
    assert (done.returncode, done.stdout, done.stderr) == (6, machine, b"")
    assert len(list(runtime.run_dir.glob("sandboxes/*"))) == 1
    assert runtime.status("life") == "running"


def _guest_has(runtime: Runtime, word: str) -> bool:
    listed = runtime("exec", "life", "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    return f"sleep {word}" in listed


def _parent(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[1])


def test_a_terminal_goes_to_the_console_socket(runtime: Runtime) -> None:
    bundle = runtime.bundle(
        "tty", "sh", "-c", "trap 'stty size' WINCH; stty size; read x; stty size; exit 4", terminal=True
    )
    path = runtime.directory / "console"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        monitor = runtime.monitor(bundle, "--console-socket", str(path))
        listener.settimeout(PATIENCE)
        taken, _ = listener.accept()
        with taken:
            _, rights, _, _ = taken.recvmsg(4096, socket.CMSG_SPACE(4))
    [master] = array.array("i", rights[0][2])
    with sysio.Fd(master) as terminal:
        runtime.pid(bundle, monitor)
        _resize(terminal.raw, 33, 99)
        runtime("start", "tty")
        said = b""
        while b"99" not in said and b"0 0" not in said:
            said += os.read(terminal.raw, 1024)
        _resize(terminal.raw, 44, 111)
        until(lambda: b"44 111" in _asked(terminal.raw), "the new size", poll_s=0.3)
    assert monitor.wait(PATIENCE) == 4
    runtime("delete", "tty")


def _resize(terminal: int, rows: int, columns: int) -> None:
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _asked(terminal: int) -> bytes:
    os.write(terminal, b"\n")
    return os.read(terminal, 1024)


def test_what_dies_and_what_is_left(runtime: Runtime) -> None:
    bundle = runtime.bundle("dying", "sh", "-c", FOREVER)
    monitor = runtime.monitor(bundle)
    pid = runtime.pid(bundle, monitor)
    runtime("start", "dying")
    [engine] = [_owner(path) for path in runtime.run_dir.glob("sandboxes/*/journal")]
    os.kill(engine, signal.SIGKILL)

    # Nobody is left who could say how it ended: it was killed.
    assert monitor.wait(PATIENCE) == 137
    assert not alive(pid)
    assert runtime.status("dying") == "stopped"
    runtime("delete", "--force", "dying")
    assert runtime.left() == []
    runtime("delete", "--force", "dying")  # as with runc: it is no error

    # Killed on the host, a container is gone.
    bundle = runtime.bundle("killed", "sh", "-c", FOREVER)
    monitor = runtime.monitor(bundle)
    pid = runtime.pid(bundle, monitor)
    runtime("start", "killed")
    os.kill(pid, signal.SIGKILL)
    assert monitor.wait(PATIENCE) == 137
    until(lambda: runtime.status("killed") == "stopped", "its end in the guest", runtime.logs)
    runtime("delete", "killed")


def _owner(journal: Path) -> int:
    owners = [json.loads(line) for line in journal.read_text().splitlines() if '"owner"' in line]
    return int(owners[-1]["owner"]["pid"])


def test_a_create_that_is_killed_leaves_nothing_that_delete_does_not_remove(runtime: Runtime) -> None:
    bundle = runtime.bundle("half", "sleep", "1000")
    command = [str(PROGRAM), "create", "--bundle", str(bundle), "half"]
    null = subprocess.DEVNULL
    for has_come_to in ("oci/half/state.json", "oci/half/pid.sock", "sandboxes/oci.half/share"):
        create = subprocess.Popen(command, env=runtime.env, stdin=null, stdout=null, stderr=null)
        place = runtime.run_dir / has_come_to
        until(place.exists, has_come_to, runtime.logs, poll_s=0.002)
        create.kill()
        create.wait()
        runtime("delete", "--force", "half")
        assert runtime.left() == []


def test_what_cannot_be_created_leaves_nothing(runtime: Runtime) -> None:
    bundle = runtime.bundle("wrong", "/no/such/command")
    log = runtime.directory / "log"
    done = runtime.call(
        "--log", str(log), "--log-format", "json", "create", "--bundle", str(bundle), "wrong"
    )
    assert done.returncode == 1
    told = json.loads(log.read_text())
    assert told["level"] == "error"
    assert "no such file or directory" in told["msg"]
    for options in (("--no-pivot",), ("--preserve-fds", "1"), ("--console-socket", "/nobody")):
        refused = runtime.call("create", "--bundle", str(bundle), *options, "wrong")
        assert refused.returncode == 1
        assert options[0].encode() in refused.stderr
    for command in ("state", "start", "kill", "delete", "pause", "resume"):
        unknown = runtime.call(command, "wrong")
        assert unknown.returncode == 1
        assert b"does not exist" in unknown.stderr
    assert runtime.left() == []


def test_run_ends_as_its_command_does(runtime: Runtime) -> None:
    bundle = runtime.bundle("whole", "sh", "-c", "cat; exit 42")
    done = runtime.call("run", "--bundle", str(bundle), "whole", input=b"all of it", stdin=None)
    assert (done.returncode, done.stdout) == (42, b"all of it")
    assert runtime.left() == []
