"""Machines that go on from templates: `kata run` and `kata factory`, with the real QEMU."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from waiting import until

from kata.guest import manifest

TOLD = (
    "cat /proc/sys/kernel/random/boot_id; hostname; cat /proc/sys/kernel/random/uuid; date +%s;"
    " cut -d' ' -f28 /proc/self/stat; ip link show eth0 | sed -n 's/.*ether \\([^ ]*\\).*/\\1/p';"
    " ip -o -4 address show eth0 | grep -c inet;"
    # AT_RANDOM (getauxval(3)): where the kernel has put what a process's stack canary is made of.
    " at=$(od -An -v -t u8 -w16 /proc/$$/auxv | sed -n 's/^ *25 *//p');"
    " dd if=/proc/$$/mem bs=1 skip=$at count=16 2>/dev/null | od -An -v -t x1 | tr -d ' '"
)


@pytest.fixture
def templates(kata_env: Kata) -> Kata:
    kata_env.env["KATA_TEMPLATES"] = "on"
    return kata_env


def status(kata: Kata) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kata.ok("factory", "status", "--json"))
    return found


def path_of(kata: Kata, *arguments: str) -> str:
    """How a machine started: the first line of ``--timings``."""
    done = kata.call("run", "--rm", "--timings", *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return next(line for line in done.stderr.decode().splitlines() if "start:" in line).strip()


def processes(kata: Kata) -> list[str]:
    """What makes templates for this kata."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            where = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if b"make-template" in words and str(kata.state_dir).encode() in where:
            found.append(pid)
    return found


def is_forked(pid: str) -> bool:
    """Whether one of `processes` is what another one has forked: it boots the machine, and has the same words.

    Raises:
        OSError: It has ended.
    """
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return b"make-template" in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and so on."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid="], check=True, capture_output=True, text=True).stdout
    parents = [tuple(map(int, line.split())) for line in lines.splitlines()]
    found = [pid]
    for one in found:
        found += [child for child, parent in parents if parent == one]
    return found[1:]


def is_there(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_start_makes_the_template_that_the_next_goes_on_from(templates: Kata, busybox_image: str) -> None:
    kata, run = templates, ["--network", "none", busybox_image]
    assert path_of(kata, *run, "true") == "start: cold: there is no template for it yet"
    until(lambda: status(kata)["templates"] or status(kata)["failures"], "a template")
    until(lambda: not processes(kata), "its maker's end")
    (one,) = status(kata)["templates"]
    assert not status(kata)["failures"]
    before = {
        name: (Path(one["path"]) / name).stat().st_mtime_ns for name in ("state", "memory", "machine.json")
    }
    assert all((Path(one["path"]) / name).stat().st_mode & 0o777 == 0o400 for name in before)
    for _ in range(3):
        assert (
            path_of(kata, *run, "sh", "-c", "head -c 50000000 /dev/zero >/big; rm /big") == "start: template"
        )
    assert before == {name: (Path(one["path"]) / name).stat().st_mtime_ns for name in before}
    # Another shape has none yet, and what cannot have one says why.
    kata.env["KATA_TEMPLATES"] = "use"
    assert path_of(kata, "-m", "300m", *run, "true") == "start: cold: there is no template for it yet"
    assert not processes(kata)
    kata.env["KATA_TEMPLATES"] = "off"
    assert path_of(kata, *run, "true") == "start: cold: templates are switched off"


def test_many_cold_starts_have_one_maker_outside_of_them(templates: Kata, busybox_image: str) -> None:
    """What a sandbox has mounted does not stay in use after it by who makes a template."""
    kata = templates
    shared = kata.directory / "shared"
    shared.mkdir()
    run = ["run", "--rm", "--network", "none", "-v", f"{shared}:/mnt", busybox_image, "true"]
    starts = [kata.start(*run) for _ in range(3)]
    makers: dict[str, str] = {}
    while any(start.poll() is None for start in starts) or processes(kata):
        for pid in processes(kata):
            try:
                mounts = Path(f"/proc/{pid}/mountinfo").read_text()
                if not is_forked(pid):
                    makers[pid] = os.readlink(f"/proc/{pid}/ns/mnt")
            except OSError:
                continue  # it has just ended
            assert f"{kata.run_dir}/sandboxes" not in mounts
        time.sleep(0.02)
    assert [start.returncode for start in starts] == [0, 0, 0]
    assert list(makers.values()) == [os.readlink("/proc/self/ns/mnt")]
    assert len(status(kata)["templates"]) == 1


def test_clones_share_nothing_that_is_a_sandboxs_own(templates: Kata, busybox_image: str) -> None:
    """Two from one template: each with a network, and what it draws or is given its own."""
    kata = templates
    kata.ok("factory", "init")
    assert "is there already" in kata.ok("factory", "init")
    before = time.time()
    running = [kata.start("run", "--rm", "--timings", busybox_image, "sh", "-c", TOLD) for _ in range(2)]
    said = []
    for one in running:
        out, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors.decode()
        assert "start: template" in errors.decode()
        said.append(out.decode().split())
    first, second = said
    assert len(first) == len(second) == 8, said
    for place, what in enumerate(("boot id", "host name", "uuid")):
        assert first[place] != second[place], what
    for words in said:
        assert before - 2 <= int(words[3]) <= time.time() + 2
        assert words[6] == "1"  # an address
    assert first[4] != second[4], "where a process has its stack"
    assert first[5] != second[5], "the interface's address"
    assert len(first[7]) == len(second[7]) == 32
    assert first[7] != second[7], "what its stack canary is made of"


def test_a_clone_has_files_of_the_host(templates: Kata, busybox_image: str, guest_assets: Path) -> None:
    """By virtio-fs, whose device cannot be saved: it is plugged in, and the file server reaches the clone's memory."""
    kata, run = templates, ["--network", "none"]
    shared = kata.directory / "shared"
    shared.mkdir()
    for number in range(300):
        (shared / f"in{number}").write_text(f"{number}\n" * 50)
    volume = ["-v", f"{shared}:/mnt"]
    assert (
        path_of(kata, *run, *volume, busybox_image, "true") == "start: cold: there is no template for it yet"
    )
    until(lambda: status(kata)["templates"] or status(kata)["failures"], "a template")
    until(lambda: not processes(kata), "its maker's end")
    assert not status(kata)["failures"]
    script = "cat /mnt/in* | md5sum; for i in 1 2 3 4 5 6 7 8; do head -c 700000 /dev/urandom >/mnt/out$0-$i; done"
    running = [
        kata.start("run", "--rm", "--timings", *run, *volume, busybox_image, "sh", "-c", script, str(number))
        for number in range(2)
    ]
    said = set()
    for one in running:
        out, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors.decode()
        assert "start: template" in errors.decode()
        said.add(out.decode().split()[0])
    whole = b"".join(file.read_bytes() for file in sorted(shared.glob("in*")))
    assert said == {hashlib.md5(whole, usedforsecurity=False).hexdigest()}
    written = [file.read_bytes() for file in shared.glob("out*")]
    assert len(set(written)) == 16
    assert {len(content) for content in written} == {700000}
    told = kata.ok("run", "--rm", *run, *volume, busybox_image, "cat", "/proc/cmdline").split()
    assert ("agent.pci_scan=04/00" in told) == manifest.load(str(guest_assets)).scans_ports


def test_a_clone_on_a_tap_leaves_as_much_to_it(templates: Kata, busybox_image: str) -> None:
    """Checksums and segments of packets: a guest negotiates that once, when it boots."""
    kata, run = templates, ["--network", "tap", busybox_image, "cat", "/sys/class/net/eth0/device/features"]

    def start(path: str) -> str:
        done = kata.call("run", "--rm", "--timings", *run)
        assert done.returncode == 0, done.stderr.decode()
        assert f"start: {path}" in done.stderr.decode()
        return done.stdout.decode()

    booted = start("cold: there is no template for it yet")
    assert booted[0] == "1"  # VIRTIO_NET_F_CSUM
    until(lambda: status(kata)["templates"] or status(kata)["failures"], "a template")
    until(lambda: not processes(kata), "its maker's end")
    assert not status(kata)["failures"]
    assert start("template") == booted


def test_nothing_that_is_broken_is_used(templates: Kata, busybox_image: str) -> None:
    kata, run = templates, ["--network", "none", busybox_image]
    kata.env["KATA_TEMPLATES"] = "use"
    kata.ok("factory", "init", "--network", "none")
    (one,) = status(kata)["templates"]
    state = Path(one["path"]) / "state"
    # What a maker that was killed has left is no template, and goes with the next one or kata gc.
    torn = state.parent.parent / f".making-{'0' * 32}"
    torn.mkdir()
    (torn / "memory").write_bytes(b"x")
    assert str(torn) in kata.ok("gc")
    assert not torn.exists()
    # One that does not load costs one start, which says so; the next one boots.
    state.chmod(0o600)
    state.write_bytes(state.read_bytes()[:1000])
    done = kata.call("run", "--rm", *run, "true")
    assert done.returncode in (125, 137)
    assert "template was removed" in done.stderr.decode()
    assert status(kata)["templates"] == []
    assert "a machine did not go on from it" in path_of(kata, *run, "true")
    # One whose file cannot be opened costs nothing but the time of a boot: nothing was begun with it.
    kata.ok("factory", "init", "--network", "none")
    (one,) = status(kata)["templates"]
    (Path(one["path"]) / "state").unlink()
    said = path_of(kata, *run, "true")
    assert said.startswith("start: cold: its template was of no use: cannot use the machine saved in"), said
    assert status(kata)["templates"] == []
    assert "a machine did not go on from it" in path_of(kata, *run, "true")
    kata.ok("factory", "init", "--network", "none")
    assert path_of(kata, *run, "true") == "start: template"
    assert "removed" in kata.ok("factory", "destroy")
    assert kata.ok("factory", "destroy") == "there are no templates\n"


def test_one_whose_machine_was_killed_is_kept(templates: Kata, busybox_image: str) -> None:
    """Nothing says that another would not go on from it."""
    kata = templates
    kata.ok("factory", "init", "--network", "none")
    run = ["run", "--rm", "--network", "none", busybox_image, "true"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        start = kata.start(*run)
        found: list[int] = []
        while not found:
            assert start.poll() is None
            for sandbox in kata.sandboxes():
                listed = subprocess.run(
                    ["pgrep", "-f", f"machine of {sandbox}"], check=False, capture_output=True
                )
                found += map(int, listed.stdout.split())
        os.kill(found[0], signal.SIGSTOP)  # so that it does not come up before it is killed
        os.kill(found[0], number)
        os.kill(found[0], signal.SIGCONT)
        errors = start.communicate(timeout=120)[1].decode()
        assert start.returncode == 137, errors
        assert "template" not in errors
        assert len(status(kata)["templates"]) == 1
        assert not status(kata)["failures"]
    assert path_of(kata, *run[2:]) == "start: template"


def hypervisor(kata: Kata, start: subprocess.Popen[bytes]) -> int:
    """The hypervisor of the only sandbox, as soon as it is there."""
    while True:
        assert start.poll() is None, start.communicate()[1].decode()
        for sandbox in kata.sandboxes():
            title = f"machine of {sandbox}".encode()
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                try:
                    if title in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return int(pid)
                except OSError:
                    continue


def put_to_sleep(directory: Path, initrd: Path) -> int:
    """Have the agent in a template do nothing but sleep, from where it is on.

    Returns:
        How many pages of its program were found in the guest's memory.
    """
    archive = initrd.read_bytes()
    program = archive[archive.index(b"\x7fELF") :]
    (headers,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    pages = set()
    for number in range(count):
        kind, flags, offset, _, _, length = struct.unpack_from("<IIQQQQ", program, headers + number * size)
        if kind == 1 and flags & 1:  # PT_LOAD, PF_X
            pages |= {program[at : at + 4096] for at in range(offset & ~4095, offset + length - 4096, 4096)}
    # Whatever is called, and wherever something returns to: nothing, up to pause(2), again and again.
    sleep = b"\x90" * (4096 - 9) + b"\xb8\x22\x00\x00\x00\x0f\x05\xeb\xf7"
    memory = directory / "memory"
    memory.chmod(0o600)
    found = 0
    with open(memory, "r+b") as file:
        end, last = 0, memory.stat().st_size
        while end < last:
            try:
                at = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            for place in range(at, end, 4096):
                if os.pread(file.fileno(), 4096, place) in pages:
                    os.pwrite(file.fileno(), sleep, place)
                    found += 1
    return found


def test_a_machine_that_did_not_get_to_run_costs_no_template(templates: Kata, busybox_image: str) -> None:
    """It is waited for longer, and if that is in vain, its template is not why."""
    kata = templates
    kata.ok("factory", "init", "--network", "none")
    kata.env["KATA_BOOT_TIMEOUT"] = "9"
    run = ["run", "--rm", "--timings", "--network", "none", busybox_image, "true"]
    start = kata.start(*run)
    pid = hypervisor(kata, start)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(9.3)  # if it has answered by then, QEMU has 10 s for its answers
    assert start.poll() is None, start.communicate()[1].decode()
    os.kill(pid, signal.SIGCONT)
    errors = start.communicate(timeout=120)[1].decode()
    assert start.returncode == 0, errors
    assert "start: template" in errors
    # One that answers not before it is stopped.
    (one,) = status(kata)["templates"]
    assert put_to_sleep(Path(one["path"]), Path(one["machine"]["initrd"])) > 10
    start = kata.start(*run)
    os.kill(hypervisor(kata, start), signal.SIGSTOP)
    errors = start.communicate(timeout=120)[1].decode()
    assert start.returncode == 125, errors
    assert "of which the host kept its virtual machine from running" in errors
    assert "template" not in errors
    assert "KATA_BOOT_TIMEOUT" in errors
    assert len(status(kata)["templates"]) == 1
    assert not status(kata)["failures"]


def test_one_whose_guest_has_its_time_and_is_silent_goes(templates: Kata, busybox_image: str) -> None:
    kata = templates
    kata.env["KATA_TEMPLATES"] = "use"
    kata.ok("factory", "init", "--network", "none")
    (one,) = status(kata)["templates"]
    assert put_to_sleep(Path(one["path"]), Path(one["machine"]["initrd"])) > 10
    kata.env["KATA_BOOT_TIMEOUT"] = "4"
    run = ["--network", "none", busybox_image, "true"]
    done = kata.call("run", "--rm", *run)
    assert done.returncode == 125
    assert "the agent did not answer within" in done.stderr.decode()
    assert "template was removed" in done.stderr.decode()
    assert status(kata)["templates"] == []
    kata.env["KATA_BOOT_TIMEOUT"] = "60"
    assert "a machine did not go on from it" in path_of(kata, *run)


def test_two_makers_and_a_killed_one(templates: Kata) -> None:
    """Two at once make one template; one that is killed leaves nothing that is used, nor a machine."""
    kata = templates
    makers = [kata.start("factory", "init") for _ in range(2)]
    said = sorted(maker.communicate(timeout=180)[0].decode().split()[0] for maker in makers)
    assert [maker.returncode for maker in makers] == [0, 0]
    assert len(said) == 2
    assert said.count("made") == 1
    kata.ok("factory", "destroy")
    maker = kata.start("factory", "init")
    directory = Path(str(status(kata)["directory"]))
    until(lambda: any(one.name.startswith(".making") for one in directory.iterdir()), "the making")
    until(lambda: len(descendants(maker.pid)) == 2, "its child, and the machine")
    left = descendants(maker.pid)
    maker.kill()
    maker.communicate()
    until(lambda: not any(map(is_there, left)), "their end with it")
    assert status(kata)["templates"] == []
    kata.ok("gc")
    until(lambda: not [one for one in directory.iterdir() if one.name.startswith(".")], "nothing half made")
    assert "made" in kata.ok("factory", "init")


def test_a_full_disk_makes_none(templates: Kata, busybox_image: str) -> None:
    """The reason is kept, and no further start tries."""
    kata = templates
    small = kata.directory / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(small)], check=True)
    try:
        configuration = kata.directory / "configuration.toml"
        configuration.write_text(f'[factory]\ntemplate_path = "{small}"\n')
        kata.env["KATA_CONF_FILE"] = str(configuration)
        done = kata.call("factory", "init")
        assert done.returncode != 0
        assert "MiB free" in done.stderr.decode()
        assert path_of(kata, "--network", "none", busybox_image, "true").startswith(
            "start: cold: there is no"
        )
        until(lambda: status(kata)["failures"], "the reason")
        until(lambda: not processes(kata), "its maker's end")
        assert "MiB free" in path_of(kata, "--network", "none", busybox_image, "true")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_machines_in_a_network_have_a_template(templates: Kata, busybox_image: str) -> None:
    kata = templates
    kata.ok("network", "create", "shared")
    try:
        look = ("--network", "shared", busybox_image, "sh", "-c", "ip -o link; test -d /sys/class/net/eth1")
        assert path_of(kata, *look).startswith("start: cold")
        until(lambda: status(kata)["templates"] or status(kata)["failures"], "a template")
        until(lambda: not processes(kata), "its maker's end")
        assert path_of(kata, *look) == "start: template"
    finally:
        kata.ok("network", "rm", "shared")
