"""The warm pool: machines that wait for sandboxes, with the real QEMU."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from pool_support import configured
from waiting import until

TOLD = (
    "cat /proc/sys/kernel/random/boot_id; hostname; cat /proc/sys/kernel/random/uuid; date +%s;"
    " cut -d' ' -f28 /proc/self/stat"
)


def configure(kata: Kata, **keys: int) -> None:
    kata.env["KATA_CONF_FILE"] = str(configured(kata.directory / "pool.toml", **keys))


@pytest.fixture
def pool(kata_env: Kata) -> Kata:
    kata_env.env["KATA_TEMPLATES"] = "on"
    configure(kata_env, vm_cache_number=1, vm_cache_least_free=64)
    return kata_env


def waiting(kata: Kata) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(kata.ok("factory", "status", "--json"))["waiting"]
    return found


def one_waiting(kata: Kata) -> dict[str, Any]:
    until(lambda: len(waiting(kata)) == 1, "a machine that waits")
    return waiting(kata)[0]


def directories(kata: Kata) -> list[str]:
    try:
        return sorted(os.listdir(kata.run_dir / "pool"))
    except FileNotFoundError:
        return []


def path_of(kata: Kata, *arguments: str) -> tuple[str, list[str]]:
    """How a machine started, and the words that its container wrote."""
    done = kata.call("run", "--rm", "--network", "none", "--timings", *arguments)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stderr.decode().splitlines()
    return next(line for line in lines if "start:" in line).strip(), done.stdout.decode().split()


def is_there(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_start_takes_the_machine_that_waits(pool: Kata, busybox_image: str) -> None:
    """Each serves one sandbox, of two takers one has it, another one waits afterwards; and no two have a thing in
    common that is a sandbox's own."""
    kata, run = pool, [busybox_image, "sh", "-c", TOLD]
    kata.ok("factory", "init")
    assert waiting(kata) == []
    how, first = path_of(kata, *run)
    assert how == "start: template: none was waiting"
    one = one_waiting(kata)
    assert one["bytes"] > 8 << 20
    assert one["machine_pid"] > 0
    assert f"{one['pid']} " in kata.ok("factory", "status")
    # What is handed over: the machine, its engine, and what the container writes is on its own disk.
    how, second = path_of(kata, *run)
    assert how == "start: pool"
    assert one["name"] not in directories(kata)
    assert not is_there(one["machine_pid"])
    # Two at once: one of them has it.
    one_waiting(kata)
    before = time.time()
    takers = [
        kata.start("run", "--rm", "--network", "none", "--timings", *run, stdin=None) for _ in range(2)
    ]
    said = [first, second]
    hows = []
    for taker in takers:
        out, errors = taker.communicate(timeout=120)
        assert taker.returncode == 0, errors.decode()
        hows.append(next(line for line in errors.decode().splitlines() if "start:" in line).strip())
        said.append(out.decode().split())
    assert hows.count("start: pool") == 1
    assert [how for how in hows if how != "start: pool"] == ["start: template: none was waiting"]
    for words in said[2:]:
        assert before - 2 <= int(words[3]) <= time.time() + 2
    for place, what in ((0, "boot id"), (1, "host name"), (2, "uuid"), (4, "where a process has its stack")):
        assert len({words[place] for words in said}) == 4, (what, said)
    # No more than there may be.
    one = one_waiting(kata)
    time.sleep(1)
    assert len(directories(kata)) == 1
    # Another configuration, environment or size: it is not used.
    configure(kata, vm_cache_number=1, vm_cache_least_free=63)
    how = path_of(kata, busybox_image, "true")[0]
    assert how == "start: template: none was waiting that is like it (1 of other kinds)"
    until(lambda: [other["pid"] for other in waiting(kata)] not in ([], [one["pid"]]), "the new one")
    until(lambda: not is_there(one["pid"]), "the end of the other")
    kata.env["KATA_TEMPLATES"] = "off"
    assert path_of(kata, busybox_image, "true")[0] == "start: cold: templates are switched off"
    kata.env["KATA_TEMPLATES"] = "on"
    one = one_waiting(kata)
    assert "ended 1 machines that waited" in kata.ok("factory", "destroy")
    assert directories(kata) == []
    assert not is_there(one["machine_pid"])
    until(lambda: not is_there(one["pid"]), "its end")


def test_the_machine_is_as_one_that_did_not_wait(pool: Kata, busybox_image: str) -> None:
    """Its disks, console, limits and end; and nothing is left of an engine that is killed."""
    kata = pool
    kata.ok("factory", "init")
    path_of(kata, busybox_image, "true")
    one = one_waiting(kata)
    script = "head -c 30000000 /dev/zero >/big; sync; md5sum /big; df -k / | tail -1; sleep 1000"
    kata.ok("run", "-d", "--name", "ab", "--network", "none", busybox_image, "sh", "-c", script)
    engine = kata.engine_pid("ab")
    assert engine == one["pid"]
    until(lambda: b"overlay" in kata.call("logs", "ab").stdout, "what it writes")
    assert "281ed1d5ae50e8419f9b978aab16de83" not in kata.ok("logs", "ab").split()  # of nothing
    (sandbox,) = kata.sandboxes()
    directory = kata.run_dir / "sandboxes" / sandbox
    assert (directory / "qemu.args").exists()
    title = Path(f"/proc/{one['machine_pid']}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    assert sandbox[:12] in title
    for pid in (engine, one["machine_pid"]):
        assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() != "1000"
    assert kata.ok("exec", "ab", "echo", "hello") == "hello\n"
    # An engine that is killed: its machine ends with it, and gc takes what both have left.
    one_waiting(kata)
    os.kill(engine, signal.SIGKILL)
    until(lambda: not is_there(one["machine_pid"]), "its machine's end")
    assert one["name"] in directories(kata)
    kata.ok("gc")
    assert one["name"] not in directories(kata)
    kata.ok("rm", "-f", "ab")
    kata.ok("factory", "destroy")
    assert directories(kata) == []


def test_one_that_ends_while_it_waits(pool: Kata, busybox_image: str) -> None:
    """Killed, or its machine, or its template gone, or memory short: starts do without, and nothing is left."""
    kata = pool
    kata.ok("factory", "init")
    path_of(kata, busybox_image, "true")
    killed = one_waiting(kata)
    os.kill(killed["pid"], signal.SIGKILL)
    until(lambda: not is_there(killed["machine_pid"]), "its machine's end")
    assert path_of(kata, busybox_image, "true")[0] == "start: template: none was waiting"
    one = one_waiting(kata)
    assert killed["name"] not in directories(kata)  # who fills clears up
    os.kill(one["machine_pid"], signal.SIGKILL)
    until(lambda: not is_there(one["pid"]) and directories(kata) == [], "its engine's end")
    # One that is stopped does not answer: the start goes on without it, and it ends when it goes on.
    path_of(kata, busybox_image, "true")
    one = one_waiting(kata)
    os.kill(one["pid"], signal.SIGSTOP)
    try:
        how = path_of(kata, busybox_image, "true")[0]
        assert how == "start: template: the one that waited did not answer"
    finally:
        os.kill(one["pid"], signal.SIGCONT)
    until(lambda: not is_there(one["pid"]), "its end")
    # A machine that does not answer is not used, and the start says so.
    one = (
        one_waiting(kata) if waiting(kata) else (path_of(kata, busybox_image, "true"), one_waiting(kata))[1]
    )
    os.kill(one["machine_pid"], signal.SIGSTOP)
    how, _ = path_of(kata, busybox_image, "true")
    assert how == "start: template: the machine that waited could not be given to it: it did not answer"
    assert not is_there(one["machine_pid"])
    # Without its template one ends; and where memory is short none waits.
    one = (
        one_waiting(kata) if waiting(kata) else (path_of(kata, busybox_image, "true"), one_waiting(kata))[1]
    )
    template = json.loads(kata.ok("factory", "status", "--json"))["templates"][0]["path"]
    os.rename(template, f"{template}.aside")
    until(lambda: not is_there(one["pid"]) and directories(kata) == [], "its end")
    os.rename(f"{template}.aside", template)
    configure(kata, vm_cache_number=1, vm_cache_least_free=1 << 30)
    path_of(kata, busybox_image, "true")
    time.sleep(2)
    assert waiting(kata) == []
    # What has become of each is counted.
    status = json.loads(kata.ok("factory", "status", "--json"))
    dropped = {reason: times for reason, times in status["pool_dropped"].items() if times}
    assert dropped == {"killed": 1, "machine": 1, "silent": 1, "unfit": 1, "template": 1}
    counts = status["pool"]
    assert (counts["taken"], counts["made"]) == (0, 5)
    assert counts["missed"] >= 5
    kata.ok("factory", "destroy")
