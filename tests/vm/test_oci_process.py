"""What the OCI runtime's command line makes of a process and of hooks, where callers expect what runc does."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oci_support import PROGRAM, Runtime, running
from waiting import PATIENCE

from kata import sysio

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


@pytest.fixture(scope="module")
def runtime(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Runtime]:
    with running(run_directory / "ocip", guest_assets, busybox_image) as one:
        yield one


def _change(bundle: Path, **members: Any) -> None:
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**config, **members}))


def test_a_process_has_its_umask_and_the_capabilities_that_can_be_given(runtime: Runtime) -> None:
    show = "umask; grep -E '^Cap(Inh|Prm|Amb)' /proc/self/status | cut -f2"
    chown, both = ["CAP_CHOWN"], ["CAP_CHOWN", "CAP_KILL"]
    sets = {
        "bounding": both,
        "permitted": both,
        "effective": [*both, "CAP_NET_RAW"],  # is not permitted
        "inheritable": [*chown, "CAP_NO_SUCH"],
        "ambient": both,  # one of them is not inheritable: buildah asks for such
    }
    user = {"uid": 1000, "gid": 1000, "umask": 0o27}
    bundle = runtime.bundle("umask", "sh", "-c", show, user=user, capabilities=sets)
    done = runtime.call("run", "--bundle", str(bundle), "umask")
    inheritable, permitted, ambient = (
        f"{1:016x}",
        f"{1:016x}",
        f"{1:016x}",
    )  # execve keeps the ambient ones alone
    assert done.stdout.decode().split() == ["0027", inheritable, permitted, ambient], done.stderr


def test_hooks_run_where_and_when_they_should(runtime: Runtime) -> None:
    bundle = runtime.bundle(
        "hooks", "sh", "-c", "cat /hooked >&2; cat /state; exit 4", env=["PATH=/bin", "X=y"]
    )
    seen = runtime.directory / "seen"
    seen.mkdir()

    def on_host(kind: str) -> dict[str, Any]:
        script = (
            f"cat >{seen}/{kind}; echo {kind} >>{seen}/order; [ {kind} != createContainer ] || pwd >hooked"
        )
        return {"path": "/bin/sh", "args": ["sh", "-c", script], "timeout": 20}

    hooks: dict[str, Any] = {kind: [on_host(kind)] for kind in KINDS if kind != "startContainer"}
    in_guest = 'read -r state; echo "$X $state" >/state'
    hooks["startContainer"] = [{"path": "/bin/sh", "args": ["sh", "-c", in_guest]}]
    # One that fails when all is over changes nothing for the others.
    hooks["poststop"].insert(0, {"path": "/bin/false"})
    _change(bundle, hooks=hooks, annotations={"a": "b"}, root={"path": str(runtime.rootfs)})
    monitor = runtime.monitor(bundle)
    pid = runtime.pid(bundle, monitor)
    assert (seen / "order").read_text().split() == list(KINDS[:3])
    runtime("start", "hooks")
    assert (seen / "order").read_text().split() == [*KINDS[:3], "poststart"]
    output, errors = monitor.communicate()
    assert errors.decode() == f"{runtime.rootfs}\n"  # where it started is the root that the container has
    word, _, state = output.decode().partition(" ")
    assert (word, json.loads(state)["status"], monitor.returncode) == ("y", "created", 4)
    runtime("delete", "hooks")
    assert (seen / "order").read_text().split() == [*KINDS[:3], *KINDS[4:]]
    for kind, status in zip(
        (*KINDS[:3], *KINDS[4:]), (*["creating"] * 3, "running", "stopped"), strict=True
    ):
        found = json.loads((seen / kind).read_text())
        expected = {"id": "hooks", "status": status, "pid": pid if status != "stopped" else 0}
        assert found.items() >= {**expected, "bundle": str(bundle), "annotations": {"a": "b"}}.items(), kind


@pytest.mark.parametrize("kind", ["createRuntime", "startContainer", "poststart"])
def test_a_hook_that_fails_ends_what_it_belongs_to(runtime: Runtime, kind: str) -> None:
    bundle = runtime.bundle(f"fails-{kind}", "sleep", "1000")
    _change(bundle, hooks={kind: [{"path": "/bin/true"}, {"path": "/bin/false"}]})
    done = runtime.call("run", "--bundle", str(bundle), bundle.name)
    assert done.returncode == 1
    assert f"error running {kind} hook #1: /bin/false" in done.stderr.decode()
    assert runtime.left() == []


def test_who_waits_is_the_other_end_of_a_terminal(runtime: Runtime) -> None:
    script = "tty; stty size; read -r x; echo got $x; exit 5"
    bundle = runtime.bundle("own", "sh", "-c", script, terminal=True)
    master, slave = os.openpty()
    with sysio.Fd(master) as terminal, sysio.Fd(slave) as end:
        fcntl.ioctl(end.raw, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
        with subprocess.Popen(
            [PROGRAM, "run", "--bundle", str(bundle), "own"],
            env=runtime.env,
            stdin=end.raw,
            stdout=end.raw,
            stderr=end.raw,
        ) as run:
            end.close()
            said = b""
            while b"33 99" not in said:
                said += os.read(terminal.raw, 1024)
            assert b"/dev/" in said
            inside = runtime.call("exec", "--tty", "own", "sh", "-c", "tty; exit 7", input=b"", stdin=None)
            assert (inside.returncode, inside.stdout[:5]) == (7, b"/dev/"), inside.stderr
            os.write(terminal.raw, b"word\r")
            while b"got word" not in said:
                said += os.read(terminal.raw, 1024)
            assert run.wait(PATIENCE) == 5
    # Without anybody who could take it, a terminal is refused.
    refused = runtime.call("run", "--detach", "--bundle", str(bundle), "own")
    assert refused.returncode == 1
    assert b"--console-socket" in refused.stderr


def test_streams_are_what_the_caller_has_given(runtime: Runtime) -> None:
    """Files, and pipes: what nobody reads holds the process up, and the end of its input comes after the last byte."""
    given, taken = runtime.directory / "given", runtime.directory / "taken"
    content = b"".join(b"%d\n" % number for number in range(60_000))
    given.write_bytes(content)
    bundle = runtime.bundle("files", "sh", "-c", "cat; echo end >&2; exit 6")
    with given.open("rb") as stdin, taken.open("wb") as out:
        options = ("run", "--bundle", str(bundle), "files")
        done = runtime.call(*options, stdin=stdin, capture_output=False, stdout=out, stderr=out)
    assert (done.returncode, taken.read_bytes()) == (6, content + b"end\n")

    size = 16_000_000
    script = f"head -c {size} /dev/zero; touch /dev/shm/written; cat; exit 8"
    bundle = runtime.bundle("pipes", "sh", "-c", script)
    with subprocess.Popen(
        [PROGRAM, "run", "--bundle", str(bundle), "pipes"],
        env=runtime.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        first = run.stdout.read(1)
        time.sleep(3)
        held_up = runtime.call("exec", "pipes", "test", "-e", "/dev/shm/written")
        assert (held_up.returncode, held_up.stderr) == (1, b"")
        assert first + run.stdout.read(size - 1) == bytes(size)
        run.stdin.write(content[:60_000])
        run.stdin.close()
        assert run.stdout.read() == content[:60_000]
        assert run.wait(PATIENCE) == 8
    assert runtime.left() == []
