"""What `kata run` refuses, and what it says when something of the host is missing, damaged or full."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest
from cli_support import needs_root
from conftest import Kata


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["no-such-command"], 127, "executable file not found in $PATH"),
        (["/no/such/file"], 127, "no such file or directory"),
        (["/etc/passwd"], 126, "permission denied"),
        (["/tmp"], 126, "is a directory"),
    ],
)
def test_a_missing_command(
    shared_kata: Kata, busybox_image: str, command: list[str], code: int, words: str
) -> None:
    done = shared_kata.call("run", "--name", "gone", busybox_image, *command)
    assert done.returncode == code
    assert words in done.stderr.decode()
    assert command[0] in done.stderr.decode()
    assert json.loads(shared_kata.ok("ps", "-a", "--json")) == []


BAD = [
    (["run", "--nmae", "x", "IMAGE"], "unknown option --nmae", "--name"),
    (["run"], "too few arguments", "IMAGE"),
    (["run", "oci:/does/not/exist"], "/does/not/exist", ""),
    (["run", "rootfs:/does/not/exist"], "/does/not/exist", ""),
    (["run", "--pull", "never", "nothing-here"], "not in the local store", "kata pull"),
    (["run", "Alpine"], "Alpine", ""),
    (["run", "-m", "12q", "IMAGE"], "-m", "512m"),
    (["run", "-m", "1m", "IMAGE"], "below the minimum", ""),
    (["run", "--cpus", "-1", "IMAGE"], "--cpus", ""),
    (["run", "--storage", "tmpfs", "--storage-size", "32m", "IMAGE"], "--storage tmpfs has none", ""),
    (["run", "-u", "4294967295", "IMAGE", "true"], "must be in range", "/etc/passwd"),
    (["run", "--cpus", "100000", "IMAGE"], "CPU", ""),
    (["run", "-m", "100t", "IMAGE"], "memory", ""),
    (["run", "-v", "/no/such:/data", "IMAGE"], "/no/such", "mkdir"),
    (["run", "-v", "na med:/data", "IMAGE"], "cannot be a volume's name", ""),
    (["run", "-p", "99999:1", "IMAGE"], "99999", "HOST_PORT"),
    (["run", "-p", "1:1", "--network", "none", "IMAGE"], "--network none", ""),
    (["run", "--network", "host", "IMAGE"], "--network 'host'", "user"),
    (["run", "--cap-add", "FLY", "IMAGE"], "FLY", "capabilities(7)"),
    (["run", "--env-file", "/no/such", "IMAGE"], "/no/such", ""),
    (["run", "--name", "a b", "IMAGE"], "a b", ""),
    (["run", "--stop-signal", "SIGNOPE", "IMAGE"], "SIGNOPE", ""),
    (["run", "-w", "relative", "IMAGE"], "relative", "/relative"),
    (["run", "-it", "IMAGE"], "terminal", "-t"),
    (["run", "-u", "nobody-of-that-name", "IMAGE", "true"], "nobody-of-that-name", ""),
    (["start", "nothing"], "no container named 'nothing'", "kata ps -a"),
    (["logs", "nothing"], "no container named 'nothing'", ""),
    (["exec", "nothing", "true"], "no container named 'nothing'", ""),
    (["rm", "nothing"], "no container named 'nothing'", ""),
    (["kill", "-s", "NOPE", "nothing"], "NOPE", ""),
    (["cp", "a", "b"], "CONTAINER:PATH", ""),
    (["guest", "bulid"], "bulid", "build"),
    (["pull", "localhost:1/nothing"], "localhost:1", ""),
    (["rmi", "nothing-here"], "nothing-here", ""),
]


@pytest.mark.parametrize(("argv", "words", "hint"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_gets_one_sentence(
    shared_kata: Kata, busybox_image: str, argv: list[str], words: str, hint: str
) -> None:
    done = shared_kata.call(*[busybox_image if word == "IMAGE" else word for word in argv])
    shown = done.stderr.decode()
    # As in Docker and Podman, removing what is not there is 1.
    assert done.returncode == (1 if argv[0] in ("rm", "rmi") else 125), shown
    assert done.stdout == b""
    assert "fault of its own" not in shown
    error = next(line for line in shown.splitlines() if line.startswith("error:"))
    assert words in error
    assert hint in shown
    assert json.loads(shared_kata.ok("ps", "-a", "--json")) == []
    assert shared_kata.sandboxes() == []


def test_a_name_is_given_once(shared_kata: Kata, busybox_image: str) -> None:
    shared_kata.ok("create", "--name", "one", busybox_image, "true")
    try:
        done = shared_kata.call("create", "--name", "one", busybox_image, "true")
        assert done.returncode == 125
        assert "the name 'one' is taken" in done.stderr.decode()
        assert "kata rm one" in done.stderr.decode()
    finally:
        shared_kata.ok("rm", "one")


def test_a_missing_guest_says_how_to_build_it(shared_kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    env = {**shared_kata.env, "KATA_GUEST_DIR": str(tmp_path)}
    done = subprocess.run(
        shared_kata.command("run", busybox_image, "true"), env=env, capture_output=True, check=False
    )
    assert done.returncode == 125
    assert b"kata guest build" in done.stderr
    assert json.loads(shared_kata.ok("ps", "-a", "--json")) == []


@pytest.mark.parametrize("damage", ["vmlinux is not there", "vmlinux is no kernel", "initrd is empty"])
def test_a_damaged_guest_is_named(
    shared_kata: Kata, busybox_image: str, tmp_path: Path, damage: str
) -> None:
    manifest = json.loads((shared_kata.guest_dir / "guest.json").read_text())
    which = "kernel" if damage.startswith("vmlinux") else "initrd"
    for part in ("kernel", "initrd"):
        name = manifest[part]["path"]
        (tmp_path / name).write_bytes((shared_kata.guest_dir / name).read_bytes())
    target = tmp_path / manifest[which]["path"]
    if "not there" in damage:
        target.unlink()
    else:
        target.write_bytes(b"" if "empty" in damage else b"this is no kernel" * 1000)
    (tmp_path / "guest.json").write_text(json.dumps(manifest))
    env = {**shared_kata.env, "KATA_GUEST_DIR": str(tmp_path)}
    done = subprocess.run(
        shared_kata.command("run", busybox_image, "true"), env=env, capture_output=True, check=False
    )
    assert done.returncode == 125
    assert which in done.stderr.decode()
    assert "kata guest build" in done.stderr.decode()
    assert shared_kata.sandboxes() == []
    assert json.loads(shared_kata.ok("ps", "-a", "--json")) == []


@needs_root
@pytest.mark.parametrize("room", ["1m", "200k"])
def test_a_full_disk_is_named_and_nothing_is_left(
    shared_kata: Kata, busybox_image: str, tmp_path: Path, room: str
) -> None:
    """The state lies on a small file system, mounted where only this command sees it."""
    state = tmp_path / "small"
    state.mkdir()
    script = (
        'mount -t tmpfs -o mode=700,size="$1" none "$2" && shift 2 && "$@"; code=$?;'
        ' find "$0" -type f | wc -l; exit $code'
    )
    done = subprocess.run(
        [
            "unshare",
            "-m",
            "sh",
            "-c",
            script,
            state,
            room,
            state,
            *shared_kata.command("run", busybox_image, "true"),
        ],
        env={**shared_kata.env, "KATA_STATE_DIR": str(state)},
        capture_output=True,
        check=False,
    )
    shown = done.stderr.decode()
    assert done.returncode == 125, shown
    assert "space" in shown.lower()
    assert "hint:" in shown
    assert "fault of its own" not in shown
    assert shared_kata.sandboxes() == []


@needs_root
def test_a_disk_that_becomes_full_under_containers(
    shared_kata: Kata, busybox_image: str, tmp_path: Path
) -> None:
    state = tmp_path / "small"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "none", state], check=True)
    env = {**shared_kata.env, "KATA_STATE_DIR": str(state)}

    def kata(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(shared_kata.command(*arguments), env=env, capture_output=True, check=False)
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == code, f"{arguments}: {said}"
        return said

    def states() -> dict[str, str]:
        return {one["name"]: one["status"] for one in json.loads(kata("ps", "-a", "--json"))}

    def fill() -> None:
        with contextlib.suppress(OSError), open(state / "fill", "ab", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    try:
        # What is not synced is lost for the guest; it is told here, though its exit code is its own.
        script = "dd if=/dev/zero of=/big bs=1M count=40 2>/dev/null; sync; cat /big > /dev/null"
        said = kata("run", "--name", "big", busybox_image, "sh", "-c", script, code=1)
        assert "warning: the host's disk is full: " in said
        assert "rw.img could not be written" in said
        found = json.loads(kata("inspect", "big"))[0]["state"]
        assert (found["status"], found["exit_code"]) == ("exited", 1)
        assert "disk is full" in found["disk_error"]
        kata("rm", "big")
        kata("create", "--name", "new", busybox_image, "sleep", "1000")
        kata("run", "-d", "--name", "old", busybox_image, "sleep", "1000")
        fill()
        said = kata("start", "new", code=125)
        assert "cannot be recorded: No space left on device" in said
        assert states() == {"old": "running", "new": "created"}
        kata("pause", "old")
        assert states()["old"] == "paused"
        kata("kill", "old")
        assert states()["old"] == "exited"
        kata("rm", "old", "new")
        fill()
        kata("rmi", busybox_image)
    finally:
        try:
            for name in states():
                kata("rm", "-f", name)
        finally:
            subprocess.run(["umount", state], check=True)
    assert shared_kata.sandboxes() == []
