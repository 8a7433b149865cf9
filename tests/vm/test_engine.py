"""The engine with real virtual machines: create, start, exec, kill, delete, and what happens when things die."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_support import Box, descendants, make
from waiting import PATIENCE, alive, until, until_gone

from kata.errors import (
    CommandNotExecutableError,
    CommandNotFoundError,
    GuestAssetError,
    HostError,
    KataError,
    NotFoundError,
    StateError,
    VMLostError,
)
from kata.oci import spec as oci
from kata.settings import DiskSettings, VolumeSettings
from kata.storage import ext4

__all__ = ["make"]
Maker = Callable[..., Box]


@pytest.fixture(scope="module")
def running(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Box]:
    """One sandbox whose container sleeps: for tests that need any container."""
    box = Box(run_directory, guest_assets, busybox_image)
    box.create("sleep", "100000")
    box.client.start(box.id)
    yield box
    box.close()


def gone(box: Box, *pids: int) -> None:
    """Nothing of the sandbox is left on the host."""
    box.wait_gone()
    for pid in pids:
        until_gone(pid)
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(box.directory) not in mounts


# ---- one container ----


@pytest.mark.parametrize(
    ("argv", "status"), [(("true",), 0), (("false",), 1), (("sh", "-c", "exit 42"), 42)]
)
def test_exit_status_comes_from_the_guest(make: Maker, argv: tuple[str, ...], status: int) -> None:
    box = make()
    found, streams = box.run(*argv)
    assert found == status
    assert (streams.stdout, streams.stderr) == (b"", b"")
    assert box.state["exit_code"] == status
    assert box.state["status"] == "stopped"
    gone(box)


def test_output_apart_and_in_the_log(make: Maker) -> None:
    import json

    box = make()
    status, streams = box.run("sh", "-c", "echo out; echo err >&2; printf 'no newline'")
    assert status == 0
    assert streams.stdout == b"out\nno newline"
    assert streams.stderr == b"err\n"
    log = [json.loads(line) for line in (box.container_dir / "log").read_text().splitlines()]
    assert "".join(one["log"] for one in log if one["stream"] == "stdout") == "out\nno newline"
    assert "".join(one["log"] for one in log if one["stream"] == "stderr") == "err\n"


def test_output_after_the_end_of_the_init_is_not_waited_for(make: Maker) -> None:
    """A descendant that keeps the pipe open holds nobody up; what was written before is there."""
    box = make()
    status, streams = box.run("sh", "-c", "echo before; sleep 1000 & exit 3")
    assert status == 3
    assert streams.stdout == b"before\n"


def test_environment_is_what_a_person_expects(make: Maker) -> None:
    box = make(hostname="box")
    script = "hostname; cat /etc/hostname; id -u; pwd; grep box /etc/hosts; test -w / && echo writable"
    status, streams = box.run("sh", "-c", script)
    lines = streams.stdout.decode().splitlines()
    assert status == 0, streams.stderr
    assert lines[:4] == ["box", "box", "0", "/"]
    assert "box" in lines[4]
    assert lines[5] == "writable"


def test_timings_name_every_step(running: Box) -> None:
    ledger = running.client.timings()
    steps = {one.name: one for one in ledger.timings}
    ways = {"cold": {"hypervisor process", "kernel", "agent start"}, "template": {"restore"}}
    assert {"engine", "agent", "root file system", "process"} | ways[ledger.path] <= set(steps)
    assert all(one.duration_ns >= 0 for one in steps.values())


def test_clock_of_the_guest_is_the_hosts(running: Box) -> None:
    before = time.time()
    _, streams = running.exec("clock", "date", "+%s")
    assert before - 2 <= int(streams.stdout) <= time.time() + 2


def test_writable_layer_keeps_what_was_written(make: Maker) -> None:
    """Over two sandboxes on the same disk; the first one is ended the hard way right after the write."""
    first = make()
    assert first.run("sh", "-c", "echo kept > /srv/file; rm /etc/group; mkdir /new")[0] == 0
    disks = first.settings.disks
    second = make(disks=disks)
    status, streams = second.run("sh", "-c", "cat /srv/file; ls -d /new; test ! -e /etc/group")
    assert (status, streams.stdout) == (0, b"kept\n/new\n")


def test_auto_remove_leaves_nothing_at_all(make: Maker) -> None:
    box = make(container={"auto_remove": True})
    assert box.run("true")[0] == 0
    assert not box.container_dir.exists()
    gone(box)


def test_tmpfs_as_writable_layer(make: Maker) -> None:
    box = make()
    lower = box.settings.disks[0]
    box.close()
    box = make(disks=[lower], container={"rootfs": {"upper_slot": None, "upper": "tmpfs"}})
    assert box.run("sh", "-c", "echo x > /file && grep -q tmpfs /proc/mounts")[0] == 0


# ---- what cannot run ----


@pytest.mark.parametrize(
    ("argv", "error", "words"),
    [
        (("no-such-command",), CommandNotFoundError, "executable file not found in $PATH"),
        (("/no/such/file",), CommandNotFoundError, "no such file or directory"),
        (("/etc/passwd",), CommandNotExecutableError, "permission denied"),
    ],
)
def test_command_that_cannot_run(
    make: Maker, argv: tuple[str, ...], error: type[KataError], words: str
) -> None:
    box = make()
    with pytest.raises(error) as caught:
        box.create(*argv)
    assert words in caught.value.message
    assert argv[0] in caught.value.message
    gone(box)


def test_missing_kernel(make: Maker) -> None:
    box = make(machine={"guest": {"kernel": "/nonexistent/vmlinux"}})
    with pytest.raises((GuestAssetError, StateError), match="/nonexistent/vmlinux") as caught:
        box.create("true")
    assert caught.value.hint
    gone(box)


def test_kernel_that_is_none(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(os.urandom(100_000))
    box = make(machine={"guest": {"kernel": str(tmp_path / "kernel")}})
    with pytest.raises(KataError, match="kernel") as caught:
        box.create("true")
    assert caught.value.hint
    gone(box)


def test_disk_that_is_broken(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(os.urandom(1 << 20))
    ext4.make_writable(str(tmp_path / "upper"), 64 << 20)
    disks = [
        DiskSettings(path=str(tmp_path / "disk"), readonly=True),
        DiskSettings(path=str(tmp_path / "upper"), readonly=False),
    ]
    box = make(disks=disks)
    with pytest.raises(KataError, match=r"erofs|lower"):
        box.create("true")
    gone(box)


def test_disk_that_is_missing(make: Maker) -> None:
    box = make(disks=[DiskSettings(path="/nonexistent/disk", readonly=True)])
    with pytest.raises(KataError, match="/nonexistent/disk"):
        box.create("true")
    gone(box)


def test_more_memory_than_there_is(make: Maker) -> None:
    box = make(machine={"size": {"memory_mib": 1 << 30}})
    with pytest.raises(KataError, match="memory"):
        box.create("true")
    gone(box)


# ---- execs ----


def test_execs_are_apart_from_the_init(running: Box) -> None:
    status, streams = running.exec("e1", "sh", "-c", "echo one; echo two >&2; exit 7")
    assert (status, streams.stdout, streams.stderr) == (7, b"one\n", b"two\n")
    with pytest.raises(NotFoundError):
        running.client.state(running.id, "e1")


def test_exec_of_a_missing_command_fails_at_its_start(running: Box) -> None:
    with pytest.raises(CommandNotFoundError, match="executable file not found"):
        running.begin_exec("missing", "no-such-command")
    running.client.delete(running.id, "missing")
    assert running.exec("after", "true")[0] == 0


def test_signals_end_as_128_and_their_number(running: Box) -> None:
    assert running.exec("usr1", "sh", "-c", "kill -USR1 $$; sleep 100")[0] == 128 + signal.SIGUSR1
    running.begin_exec("term", "sleep", "1000")
    running.client.kill(running.id, signal.SIGTERM, "term")
    assert running.client.wait(running.id, "term") == 128 + signal.SIGTERM
    running.client.delete(running.id, "term")


def test_exec_is_killed_alone(running: Box) -> None:
    running.begin_exec("k", "sleep", "1000")
    running.client.kill(running.id, signal.SIGKILL, "k")
    assert running.client.wait(running.id, "k") == 137
    with pytest.raises(NotFoundError, match="process already finished"):
        running.client.kill(running.id, signal.SIGKILL, "k")
    running.client.delete(running.id, "k")
    assert running.client.state(running.id).status == 2


def test_whole_output_of_200_short_processes(running: Box) -> None:
    """Each writes 1 MiB and ends at once; none may come short by a byte."""
    script = "dd if=/dev/zero bs=1048576 count=1 2>/dev/null | tr '\\0' x"
    for number in range(200):
        status, streams = running.exec(f"m{number}", "sh", "-c", script)
        assert status == 0
        assert len(streams.stdout) == 1 << 20, f"process {number}"


def test_processes_side_by_side(running: Box) -> None:
    results: dict[int, tuple[int, bytes]] = {}

    def one(number: int) -> None:
        status, streams = running.exec(f"p{number}", "sh", "-c", f"sleep 1; echo {number}; exit {number}")
        results[number] = (status, streams.stdout)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == {number: (number, b"%d\n" % number) for number in range(20)}


# ---- streams ----


def test_64_mib_through_cat(running: Box) -> None:
    data = os.urandom(1 << 20) * 64
    streams = running.streams(stdin=True)
    running.begin_exec("cat", "cat", streams=streams)
    writer = threading.Thread(target=Path(streams.paths["stdin"]).write_bytes, args=(data,))
    writer.start()
    assert running.client.wait(running.id, "cat") == 0
    streams.join()
    writer.join()
    running.client.delete(running.id, "cat")
    assert hashlib.sha256(streams.stdout).digest() == hashlib.sha256(data).digest()


def test_stdin_that_nobody_gave_is_empty(running: Box) -> None:
    status, streams = running.exec("none", "sh", "-c", "cat; echo end")
    assert (status, streams.stdout) == (0, b"end\n")


def test_terminal(running: Box) -> None:
    streams = running.streams(stdin=True, terminal=True)
    running.begin_exec("tty", "sh", "-c", "read line; echo got $line; stty size", streams=streams)
    running.client.resize(running.id, 33, 111, "tty")
    with open(streams.paths["stdin"], "wb", buffering=0) as stdin:
        stdin.write(b"hello\n")
        assert running.client.wait(running.id, "tty") == 0
    streams.join()
    running.client.delete(running.id, "tty")
    assert b"got hello" in streams.stdout
    assert b"33 111" in streams.stdout


def test_vanished_reader_does_not_hurt(running: Box) -> None:
    streams = running.streams()
    for _, fd in streams._fds:
        os.close(fd)
    streams._fds = []
    with pytest.raises(KataError, match="cannot open the stream"):
        running.begin_exec("gone", "true", streams=streams)
    assert running.exec("there", "true")[0] == 0


def test_attach_to_a_running_container(make: Maker) -> None:
    box = make(container={"open_stdin": True})
    box.create("sh", "-c", "while read line; do echo heard $line; done")
    box.client.start(box.id)
    streams = box.streams(stdin=True)
    paths = {key: value for key, value in streams.paths.items() if key != "terminal"}
    box.client.attach(box.id, **paths)
    streams.collect()
    Path(streams.paths["stdin"]).write_bytes(b"me\n")
    until(lambda: streams.stdout == b"heard me\n", "it has heard", poll_s=0.01)
    box.client.kill(box.id, signal.SIGKILL)
    assert box.client.wait(box.id) == 137
    streams.join()


# ---- pause, update, statistics, files ----


def test_pause_stops_time_for_the_processes(make: Maker) -> None:
    box = make()
    streams = box.streams()
    box.create("sh", "-c", "while true; do echo tick; sleep 0.1; done", streams=streams)
    box.client.start(box.id)
    until(lambda: len(streams.output["stdout"]) >= 20, "it ticks", poll_s=0.01)
    box.client.pause(box.id)
    assert box.client.state(box.id).status == 4
    time.sleep(0.5)
    held = len(streams.output["stdout"])
    time.sleep(1.0)
    assert len(streams.output["stdout"]) == held
    with pytest.raises(StateError, match="paused"):
        box.begin_exec("e", "true")
    box.client.resume(box.id)
    until(lambda: len(streams.output["stdout"]) > held, "it ticks again", poll_s=0.01)
    box.client.kill(box.id, signal.SIGKILL)
    assert box.client.wait(box.id) == 137
    streams.join()


def test_limits_and_statistics(running: Box) -> None:
    from kata.proto import cgroups_v1_pb

    running.client.update(running.id, {"pids": {"limit": 77}, "memory": {"limit": 100 << 20}})
    wrapped = running.client.stats(running.id)
    assert wrapped is not None
    found = cgroups_v1_pb.Metrics.decode(wrapped.value)
    assert found.pids is not None
    assert found.pids.limit == 77
    assert found.memory is not None
    assert found.memory.usage is not None
    assert found.memory.usage.limit == 100 << 20
    assert found.cpu is not None


def test_out_of_memory_is_told(make: Maker) -> None:
    box = make()
    status, _ = box.run("sh", "-c", "tail /dev/zero", memory=16 << 20)
    assert status == 137
    assert box.state["oom_killed"] is True


def test_processes_of_the_guest_and_pids_of_the_host(running: Box) -> None:
    commands = [b" ".join(one.command) for one in running.client.processes(running.id)]
    assert any(b"sleep 100000" in command for command in commands)
    pids = running.client.pids(running.id)
    assert pids == [running.hypervisor_pid()]
    assert pids[0] in descendants(running.engine.pid)


def test_files_of_a_container_without_a_process(make: Maker) -> None:
    import json

    from kata.proto import agentext_pb

    box = make(container={"record_state": False})
    config = oci.build(_request("true"), box.image.config)
    del config["process"]
    (box.container_dir / "config.json").write_text(json.dumps(config))
    box.client.create(box.id, str(box.container_dir))
    read = agentext_pb.ReadFileRequest(container_id=box.id, path=b"/etc/passwd", len=100)
    service = "kata.sandbox.v1.Sandbox"
    assert box.client.call(service, "Read", read, agentext_pb.ReadFileResponse).data.startswith(b"root:")
    with pytest.raises(StateError, match="no process"):
        box.client.start(box.id)
    gone(box)
    assert not (box.container_dir / "state.json").exists()


def _request(*argv: str) -> oci.Request:
    request = oci.Request("box")
    request.command = list(argv)
    return request


# ---- volumes ----


def test_volumes_read_only_and_writable_and_a_single_file(make: Maker, tmp_path: Path) -> None:
    for name in ("ro", "rw"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "single").write_text("alone")
    volumes = [
        (str(tmp_path / "ro"), "/ro", ["rbind", "rprivate", "ro"]),
        (str(tmp_path / "rw"), "/rw", ["rbind", "rprivate", "rw"]),
        (str(tmp_path / "single"), "/etc/single", ["rbind", "rprivate", "rw"]),
    ]
    box = make(
        container={"volumes": [VolumeSettings(source=path, destination=to) for path, to, _ in volumes]}
    )
    script = (
        "cat /ro/file /rw/file /etc/single; echo new > /rw/new; echo more >> /etc/single;"
        " touch /ro/no 2>/dev/null && echo BAD; rm /rw/file; exit 0"
    )
    status, streams = box.run("sh", "-c", script, volumes=volumes)
    assert (status, streams.stdout) == (0, b"rorwalone"), streams.stderr
    assert (tmp_path / "rw" / "new").read_text() == "new\n"
    assert not (tmp_path / "rw" / "file").exists()
    assert (tmp_path / "single").read_text() == "alonemore\n"
    assert sorted(os.listdir(tmp_path / "ro")) == ["file"]
    gone(box)


def test_guest_cannot_plant_anything_beside_its_volumes(make: Maker, tmp_path: Path) -> None:
    """Not even with every capability: the share's root is read-only, its volumes nodev."""
    volumes = [(str(tmp_path), "/data", ["rbind", "rw"])]
    box = make(container={"volumes": [VolumeSettings(source=str(tmp_path), destination="/data")]})
    script = (
        "mkdir /s && mount -t 9p -o trans=virtio kataShared /s || exit 3;"
        "touch /s/evil && echo BAD; ln -s / /s/link && echo BAD;"
        "mknod /data/null c 1 3 && echo x > /data/null; exit 0"
    )
    _, streams = box.run("sh", "-c", script, volumes=volumes, privileged=True)
    assert b"BAD" not in streams.stdout


@pytest.fixture
def foreign_device(tmp_path: Path) -> str:
    """A character device that is not one of those that every guest has: what /dev/mem is."""
    path = tmp_path / "mem"
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 1))
    return str(path)


def test_a_volume_that_is_not_there(make: Maker) -> None:
    refused(make, "/nonexistent/volume")


def test_a_volume_that_is_a_device_of_the_host(make: Maker, foreign_device: str) -> None:
    refused(make, foreign_device)


def refused(make: Maker, source: str) -> None:
    box = make(container={"volumes": [VolumeSettings(source=source, destination="/x")]})
    with pytest.raises(KataError, match=source) as caught:
        box.create("true", volumes=[(source, "/x", ["rbind"])])
    assert caught.value.hint
    gone(box)


# ---- deaths ----


def test_killed_hypervisor_ends_everything_as_137(make: Maker) -> None:
    box = make()
    streams = box.streams()
    box.create("sh", "-c", "echo alive; sleep 1000", streams=streams)
    box.client.start(box.id)
    box.begin_exec("e", "sleep", "1000")
    pid = box.hypervisor_pid()
    until(lambda: streams.stdout, "output", poll_s=0.01)
    os.kill(pid, signal.SIGKILL)
    assert box.client.wait(box.id, "e") == 137
    assert box.client.wait(box.id) == 137
    streams.join()
    assert streams.stdout == b"alive\n"
    assert "virtual machine" in box.client.describe()["error"]
    state = box.state
    assert state["exit_code"] == 137
    assert "signal 9" in state["error"]
    box.client.delete(box.id)
    gone(box, pid)


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3, 0.8, 1.2])
def test_hypervisor_killed_during_the_start(make: Maker, delay: float) -> None:
    box = make()
    deadline = time.monotonic() + PATIENCE
    while not (pid := box.client.describe()["hypervisor_pid"]):
        assert time.monotonic() < deadline
    killer = threading.Timer(delay, os.kill, (pid, signal.SIGKILL))
    killer.start()
    error = ""
    try:
        box.create("sleep", "1000")
        box.client.start(box.id)
    except VMLostError as lost:
        error = lost.message
    else:
        assert box.client.wait(box.id) == 137
        error = box.state["error"]
    assert "virtual machine" in error
    killer.join()
    gone(box, pid)


def test_killed_engine_leaves_nothing_but_its_journal(make: Maker) -> None:
    box = make(network={"mode": "user"})
    box.create("sleep", "1000")
    box.client.start(box.id)
    children = descendants(box.engine.pid)
    assert len(children) >= 2
    os.kill(box.engine.pid, signal.SIGKILL)
    with pytest.raises((VMLostError, HostError)):
        box.client.wait(box.id)
    while alive(box.engine.pid):  # its socket closes a moment before it is gone
        time.sleep(0.01)
    assert box.reconcile() == []
    gone(box, *children)


def test_next_start_clears_up_after_a_killed_engine(make: Maker) -> None:
    from kata.engine.client import EngineClient
    from kata.engine.launch import launch

    box = make()
    box.create("sleep", "1000")
    box.client.start(box.id)
    os.kill(box.engine.pid, signal.SIGKILL)
    while alive(box.engine.pid):
        time.sleep(0.01)
    box.client.close()
    box.engine.release()
    box.engine = launch(box.settings, str(box.run_dir))
    box.client = EngineClient(box.engine.sock_path)
    assert box.run("true")[0] == 0
    gone(box)


def test_engine_that_is_told_to_end_takes_everything_down(make: Maker) -> None:
    box = make()
    box.create("sleep", "1000")
    box.client.start(box.id)
    children = descendants(box.engine.pid)
    os.kill(box.engine.pid, signal.SIGTERM)
    assert box.client.wait(box.id) == 137
    box.client.close()
    gone(box, *children)
    assert "signal 15" in box.state["error"]


def test_door_that_dies_before_it_creates_takes_the_engine_along(make: Maker) -> None:
    box = make()
    box.client.close()
    box.engine.release()
    gone(box)


def test_container_goes_on_without_its_client(make: Maker) -> None:
    from kata.engine.client import EngineClient

    box = make()
    box.create("sh", "-c", "sleep 2; exit 5")
    box.client.start(box.id)
    box.client.close()
    box.engine.release()
    with EngineClient(box.engine.sock_path) as again:
        assert again.state(box.id).status == 2
        assert again.wait(box.id) == 5
    gone(box)
    assert box.state["exit_code"] == 5


def test_panic_of_the_guest_is_named(make: Maker) -> None:
    box = make()
    box.create("sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000", privileged=True)
    box.client.start(box.id)
    assert box.client.wait(box.id) == 137
    error = box.state["error"]
    assert "panic" in error or "ended" in error
    box.client.delete(box.id)
    gone(box)


def test_a_sandbox_has_one_engine(make: Maker) -> None:
    from kata.engine.launch import launch
    from kata.errors import AlreadyExistsError

    box = make()
    with pytest.raises(AlreadyExistsError):
        launch(box.settings, str(box.run_dir))


def test_deaths_at_random_moments_leave_nothing(make: Maker) -> None:
    """Hypervisor, network helper or engine, killed anywhere between launch and the container's end."""
    import random

    seed = int(os.environ.get("KATA_TEST_SEED") or time.time_ns() % 1_000_000)
    chance = random.Random(seed)
    for number in range(int(os.environ.get("KATA_TEST_ROUNDS", "6"))):
        victim = chance.choice(["hypervisor", "engine", "helper"])
        delay = chance.uniform(0.0, 4.0)
        story = f"seed {seed}, round {number}: {victim} killed after {delay:.2f} s"
        box = make(network={"mode": "user"})
        pids: list[int] = []

        def kill(box: Box = box, victim: str = victim, delay: float = delay, pids: list[int] = pids) -> None:
            time.sleep(delay)
            try:
                pids += descendants(box.engine.pid)
                names = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in pids}
                wanted = {"hypervisor": "qemu", "helper": "passt", "engine": ""}[victim]
                found = [pid for name, pid in names.items() if wanted and name.startswith(wanted)]
                os.kill(box.engine.pid if victim == "engine" else found[0], signal.SIGKILL)
            except (OSError, IndexError):
                pass  # it was not there yet, or not any more

        killer = threading.Thread(target=kill)
        killer.start()
        status = -1
        with contextlib.suppress(KataError):
            box.create("sh", "-c", "sleep 1; exit 4")
            box.client.start(box.id)
            status = box.client.wait(box.id)
        killer.join()
        assert status in (-1, 4, 137), story
        box.client.close()
        box.engine.release()
        until_gone(box.engine.pid, story)
        assert box.reconcile() == [], story
        assert list((box.run_dir / "sandboxes").iterdir()) == [], story
        gone(box, *pids)
