"""Machines and engines that die under the `kata` command, guests that are silent, outputs that nobody reads."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_support import identity_of, names, status, vm_pid
from conftest import Kata
from waiting import until

from kata.engine.lifecycle.boot_slots import BootSlot


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
