"""The small parts of the engine: log, states, spec, statistics, health."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import sandbox_support
from hypothesis import given
from hypothesis import strategies as st

from kata import journal_undo
from kata.agent.text import escape_line, last_lines
from kata.engine import boot, machine, process, rootfs, spec, stats, volumes, watch
from kata.engine.logfile import LogFile
from kata.engine.records import StateFile, read_json, rfc3339
from kata.engine.stdio import parse_stdio
from kata.engine.timings import Timings
from kata.errors import (
    AgentTimeoutError,
    ConfigError,
    HostError,
    KataError,
    NotFoundError,
    StateError,
    UsageError,
)
from kata.hypervisor import virtiofsd
from kata.journal import Journal
from kata.oci import spec as oci
from kata.proto import agent_pb, cgroups_v1_pb, cgroups_v2_pb
from kata.settings import RootfsSettings

# ---- log ----


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def content(entries: list[dict[str, str]], stream: str) -> bytes:
    return b"".join(
        base64.b64decode(one["log64"]) if "log64" in one else one["log"].encode()
        for one in entries
        if one["stream"] == stream
    )


@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(max_size=200)), max_size=20))
def test_log_gives_back_every_byte(pieces: list[tuple[str, bytes]]) -> None:
    path = Path(f"/tmp/kt-log-{os.getpid()}")
    try:
        log = LogFile(str(path))
        for stream, data in pieces:
            log.write(stream, data)
        log.close()
        entries = records(path) if path.exists() else []
        for stream in ("stdout", "stderr"):
            assert content(entries, stream) == b"".join(data for name, data in pieces if name == stream)
    finally:
        path.unlink(missing_ok=True)


def test_log_keeps_text_as_text_though_characters_are_cut(tmp_path: Path) -> None:
    text = "grüße, 世界 🎉\n" * 5000
    raw = text.encode()
    log = LogFile(str(tmp_path / "log"))
    for start in range(0, len(raw), 777):
        log.write("stdout", raw[start : start + 777])
    log.close()
    entries = records(tmp_path / "log")
    assert all("log" in one for one in entries)
    assert content(entries, "stdout") == raw


def test_log_is_rotated_and_bounded(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"), max_bytes=10_000, files=3)
    for number in range(2000):
        log.write("stdout", b"line %d\n" % number)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log", "log.1", "log.2"]
    assert all(file.stat().st_size <= 10_000 for file in files)
    kept = b"".join(content(records(file), "stdout") for file in reversed(files))
    expected = b"".join(b"line %d\n" % number for number in range(2000))
    assert expected.endswith(kept)


def test_log_on_a_full_disk_hurts_nobody_and_says_so() -> None:
    complaints: list[str] = []
    log = LogFile("/dev/full", log=complaints.append)
    log.write("stdout", b"lost")
    log.write("stdout", b"lost too")
    log.close()
    assert len(complaints) == 1
    assert "No space left" in complaints[0]


# ---- states and records ----


def a_process(exec_id: str = "") -> process.Process:
    return process.Process("c", exec_id, parse_stdio(False, "", "", ""))


def test_every_transition_that_the_table_lacks_is_refused() -> None:
    async def work() -> None:
        states = (process.CREATED, process.RUNNING, process.PAUSED, process.STOPPED, process.DELETED)
        for start in states:
            for end in states:
                one = a_process()
                one.state = start
                if end in process._NEXT[start]:
                    one.transition(end)
                    assert one.state == end
                else:
                    with pytest.raises(StateError):
                        one.transition(end)

    asyncio.run(work())


def test_requests_in_the_wrong_state_get_the_words_that_clients_parse() -> None:
    async def work() -> None:
        one = a_process()
        one.start(7)
        with pytest.raises(StateError, match="cannot start a running process"):
            one.require_startable()
        with pytest.raises(StateError, match="cannot delete a running process"):
            one.require_deletable()
        assert one.stop(3, 1)
        assert not one.stop(137, 2)
        assert one.exit_status == 3
        with pytest.raises(NotFoundError, match="process already finished"):
            one.require_killable()

    asyncio.run(work())


def test_state_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    state = StateFile(str(path), {"pid": 1, "starttime": 2, "boot_id": "b"})
    state.write(status="running", pid=5)
    state.write(status="stopped", exit_code=4, finished_at=rfc3339(1_700_000_000_000_000_001))
    found = read_json(str(path))
    assert (found["status"], found["pid"], found["exit_code"]) == ("stopped", 5, 4)
    assert found["finished_at"] == "2023-11-14T22:13:20.000000001Z"
    assert os.listdir(tmp_path) == ["state.json"]
    assert read_json(str(tmp_path / "none")) == {}


def test_state_is_recorded_on_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", small], check=True)
    try:
        path = small / "state.json"
        state = StateFile(str(path), {"pid": 1, "starttime": 2, "boot_id": "b"})
        state.write(status="running", pid=5)
        with contextlib.suppress(OSError), open(small / "fill", "wb", buffering=0) as file:
            while file.write(bytes(100)):
                pass
        state.write(status="stopped", exit_code=4)
        assert read_json(str(path))["exit_code"] == 4
        StateFile(str(path), {"pid": 3}).reserve()
        assert read_json(str(path))["exit_code"] == 4  # what another engine said stays until there is news
        # One that has no room yet gets none, and is told so at once; what there is stays as it is.
        other = StateFile(str(small / "other.json"), {"pid": 1})
        with pytest.raises(OSError, match="No space left"):
            other.reserve()
        with pytest.raises(OSError, match="No space left"):
            state.write(error="x" * 4096)
        assert read_json(str(path))["exit_code"] == 4
        assert sorted(os.listdir(small)) == ["fill", "state.json"]
    finally:
        subprocess.run(["umount", small], check=True)


def test_timings_are_relative_and_sorted() -> None:
    timings = Timings(100)
    timings.add("b", 200, 250)
    timings.add("a", 150, 180)
    timings.add("a", 1, 2)
    assert list(timings) == [("a", 50, 30), ("b", 100, 50)]


# ---- text from the guest ----


def test_guest_text_cannot_reach_the_terminal() -> None:
    assert escape_line("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\x0ac\\u202e"
    assert len(escape_line("x" * 10_000_000).encode()) <= 4096
    assert escape_line("ü" * 5000, 100).endswith("...")
    lines = last_lines(b"\xff\x1b]0;evil\x07\r\n" + b"line\n" * 1000)
    assert len(lines) == 20
    assert all(line.isprintable() for line in last_lines(os.urandom(100_000)))


# ---- spec ----


def docker_like() -> dict[str, Any]:
    request = oci.Request("host")
    request.command = ["/bin/true"]
    request.memory, request.cpus, request.pids_limit = 64 << 20, 1.5, 100
    request.volumes = [("/srv/data", "/data", ["rbind", "ro"])]
    return oci.build(request, {"Env": ["A=b"]})


def guest_view(config: dict[str, Any], **changed: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "rootfs": "/r",
        "bundle": "/b",
        "container_type": "single_container",
        "binds": [spec.GuestBind("/guest/data", ["rbind", "ro"])],
        "files": {"/etc/hosts": "/guest/hosts"},
        "cgroups_path": "/c",
        **changed,
    }
    return spec.for_guest(config, **arguments)


def test_spec_keeps_what_the_guest_applies_and_drops_what_is_the_hosts() -> None:
    config = docker_like()
    config["hooks"] = {"prestart": [{"path": "/x"}], "startContainer": [{"path": "/y"}]}
    config["process"]["apparmorProfile"] = "docker-default"
    before = json.dumps(config)
    message = spec.to_message(guest_view(config))
    assert json.dumps(config) == before
    assert message.Root is not None
    assert message.Root.Path == "/r"
    assert message.Process is not None
    assert message.Process.Args == ["/bin/true"]
    assert message.Process.ApparmorProfile == ""
    assert message.Hooks is not None
    assert [hook.Path for hook in message.Hooks.StartContainer] == ["/y"]
    assert not message.Hooks.Prestart
    linux = message.Linux
    assert linux is not None
    assert {one.Type for one in linux.Namespaces} == {"mount", "ipc", "uts", "pid", "cgroup"}
    assert linux.Seccomp is not None
    assert linux.Resources is not None
    assert linux.Resources.Pids is not None
    assert linux.Resources.Pids.Limit == 100
    assert linux.Resources.Memory is not None
    assert linux.Resources.Memory.Limit == 64 << 20
    assert [(rule.Major, rule.Minor) for rule in linux.Resources.Devices] == [(-1, -1)]
    mounts = {mount.destination: mount for mount in message.Mounts}
    assert mounts["/data"].source == "/guest/data"
    assert mounts["/data"].options == ["rbind", "ro"]
    assert mounts["/etc/hosts"].source == "/guest/hosts"
    assert message.Annotations[spec.BUNDLE_ANNOTATION] == "/b"


def test_a_file_that_the_spec_mounts_itself_is_not_doubled() -> None:
    config = docker_like()
    config["mounts"].append(
        {"destination": "/etc/hosts", "type": "bind", "source": "/h", "options": ["bind"]}
    )
    view = guest_view(
        config, binds=[spec.GuestBind("/guest/data", []), spec.GuestBind("/guest/h", ["bind"])]
    )
    assert [m["source"] for m in view["mounts"] if m["destination"] == "/etc/hosts"] == ["/guest/h"]


def test_sysctl_and_annotation_keys_are_not_field_names() -> None:
    config = docker_like()
    config["linux"]["sysctl"] = {"net.core.somaxconn": "5"}
    config["annotations"] = {"umask": "x"}
    message = spec.to_message(guest_view(config))
    assert message.Linux is not None
    assert message.Linux.Sysctl == {"net.core.somaxconn": "5"}
    assert message.Annotations["umask"] == "x"


@pytest.mark.parametrize(
    "change",
    [
        {"process": "x"},
        {"process": {"args": "not a list"}},
        {"process": {"args": ["x"], "user": {"uid": -1}}},
        {"process": {"args": ["x"], "noSuchKey": 1}},
        {"linux": {"resources": {"memory": {"limit": "lots"}}}},
    ],
)
def test_malformed_spec_is_named_not_a_traceback(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        spec.to_message(guest_view({**docker_like(), **change})).encode()
    assert "specification" in caught.value.message


def test_what_cannot_be_carried_is_told() -> None:
    config = docker_like()
    config["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_RT", "priority": 1}
    config["process"]["user"]["umask"] = 0o22
    config["linux"]["resources"]["unified"] = {"memory.high": "1"}
    config["mounts"].append(
        {"destination": "/v", "type": "bind", "source": "/v", "options": ["rbind", "rshared"]}
    )
    throttle = [{"major": 254, "minor": 0, "rate": 1 << 20}]
    config["linux"]["resources"]["blockIO"] = {"weight": 300, "throttleReadBpsDevice": throttle}
    config["linux"]["resources"]["cpu"] = {"shares": 512, "cpus": "0,1", "mems": "0"}
    config["linux"]["resources"]["network"] = {"classID": 5}
    told = {"the I/O priority", "raw cgroup v2 settings", *spec.OF_HOST_SETS.values()}
    told.add(spec.OF_HOST_NETWORK["classID"])
    told.add("limits of bytes read from the host's devices")
    backwards = "mount propagation from the container to the host (the other direction works)"
    assert set(spec.dropped(config)) == told | {backwards}
    # Those of a disk that the container has are carried, by the host's number, and not told.
    of_host = spec.OF_HOST_DEVICES["throttleReadBpsDevice"]
    assert set(spec.dropped(config, {(254, 0)})) == (told | {backwards}) - {of_host}
    assert of_host in set(spec.dropped(config, {(254, 1)}))
    resources = config["linux"]["resources"]
    assert spec.guest_resources(resources)["blockIO"] == {"weight": 300}
    throttle.append({"major": 8, "minor": 0, "rate": 7})
    kept = spec.guest_resources(resources, {(254, 0)})["blockIO"]
    assert kept == {"weight": 300, "throttleReadBpsDevice": throttle[:1]}
    assert of_host in set(spec.dropped(config, {(254, 0)})), "one of two"
    binds = [spec.GuestBind(str(mount["source"]), mount["options"]) for mount in spec.host_binds(config)]
    spec.to_message(guest_view(config, binds=binds))


# ---- root file system ----


def test_erofs_root_has_a_lower_an_upper_and_an_overlay() -> None:
    found = rootfs.storages("c", RootfsSettings(kind="erofs", lower_slot=0, upper_slot=1), ["05", "06"])
    assert [(one.driver, one.source, one.fstype) for one in found] == [
        ("blk", "05", "erofs"),
        ("blk", "06", "ext4"),
        ("overlayfs", "overlay", "overlay"),
    ]
    assert found[2].mount_point == rootfs.path("c")
    assert f"lowerdir={found[0].mount_point}" in found[2].options


@pytest.mark.parametrize(
    "bad", [None, RootfsSettings(kind="zip"), RootfsSettings(kind="erofs", lower_slot=0)]
)
def test_unknown_root_is_refused(bad: RootfsSettings | None) -> None:
    with pytest.raises(ConfigError):
        rootfs.storages("c", bad, ["05", "06"])


# ---- statistics ----


def usage() -> agent_pb.StatsContainerResponse:
    return agent_pb.StatsContainerResponse(
        cgroup_stats=agent_pb.CgroupStats(
            cpu_stats=agent_pb.CpuStats(
                cpu_usage=agent_pb.CpuUsage(
                    total_usage=3_000_000, usage_in_kernelmode=1_000_000, usage_in_usermode=2_000_000
                )
            ),
            memory_stats=agent_pb.MemoryStats(
                cache=5,
                usage=agent_pb.MemoryData(usage=4096, limit=8192, max_usage=5000),
                stats={"anon": 7, "file": 9, "inactive_file": 3},
            ),
            pids_stats=agent_pb.PidsStats(current=2, limit=10),
            blkio_stats=agent_pb.BlkioStats(
                io_service_bytes_recursive=[
                    agent_pb.BlkioStatsEntry(major=254, minor=0, op="Read", value=11),
                    agent_pb.BlkioStatsEntry(major=254, minor=0, op="Write", value=12),
                ]
            ),
        ),
        network_stats=[agent_pb.NetworkStats(name="eth0", rx_bytes=1, tx_bytes=2)],
    )


def test_statistics_in_the_shape_of_v1() -> None:
    wrapped = stats.metrics(usage(), shape_v2=False)
    assert wrapped.type_url == "io.containerd.cgroups.v1.Metrics"
    found = cgroups_v1_pb.Metrics.decode(wrapped.value)
    assert found.memory is not None
    assert (found.memory.rss, found.memory.cache, found.memory.total_inactive_file) == (7, 9, 3)
    assert found.cpu is not None
    assert found.cpu.usage is not None
    assert found.cpu.usage.total == 3_000_000
    assert [(card.name, card.rx_bytes) for card in found.network] == [("eth0", 1)]


def test_statistics_in_the_shape_of_v2() -> None:
    wrapped = stats.metrics(usage(), shape_v2=True)
    assert wrapped.type_url == "io.containerd.cgroups.v2.Metrics"
    found = cgroups_v2_pb.Metrics.decode(wrapped.value)
    assert found.cpu is not None
    assert (found.cpu.usage_usec, found.cpu.user_usec, found.cpu.system_usec) == (3000, 2000, 1000)
    assert found.memory is not None
    assert (found.memory.anon, found.memory.usage_limit) == (7, 8192)
    assert found.io is not None
    assert [(one.rbytes, one.wbytes) for one in found.io.usage] == [(11, 12)]
    assert [(card.name, card.rx_bytes, card.tx_bytes) for card in found.network] == [("eth0", 1, 2)]


# ---- health ----


class DeafAgent:
    """An agent whose health check never comes back."""

    def __init__(self, answers: list[KataError | None]) -> None:
        self.answers = answers
        self.asked = 0

    async def check(self, timeout_s: float) -> None:
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else AgentTimeoutError("silence")
        if answer is not None:
            raise answer


def busy(pid: int) -> watch.CpuTime:
    busy.calls += 1  # type: ignore[attr-defined]
    return watch.CpuTime(busy.calls * 1000, 0, False)  # type: ignore[attr-defined]


busy.calls = 0  # type: ignore[attr-defined]


def test_three_misses_in_a_row_are_a_lost_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "cpu_time", busy)
    miss = AgentTimeoutError("silence")
    agent = DeafAgent([miss, miss, None, miss, miss, miss])
    reason = asyncio.run(watch.watch(agent, 1, 0.0, 0.0))  # type: ignore[arg-type]
    assert "3 health checks" in reason
    assert agent.asked == 6


@pytest.mark.parametrize("why", ["stopped", "starved", "idle"])
def test_a_machine_that_could_not_run_is_not_blamed(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "stopped": lambda pid: watch.CpuTime(busy(pid).ran_ns, 0, True),
        "starved": lambda pid: watch.CpuTime(busy(pid).ran_ns, busy(pid).ran_ns * 100, False),
        "idle": lambda pid: watch.CpuTime(5, 0, False),
    }
    monkeypatch.setattr(watch, "cpu_time", times[why])
    agent = DeafAgent([])

    async def work() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch.watch(agent, 1, 0.0, 0.0), 0.05)  # type: ignore[arg-type]

    asyncio.run(work())
    assert agent.asked > 3


def test_cpu_time_of_a_real_process() -> None:
    before = watch.cpu_time(os.getpid())
    sum(range(2_000_000))
    after = watch.cpu_time(os.getpid())
    assert after.ran_ns > before.ran_ns
    assert not after.stopped
    assert watch.cpu_time(2**22 + 1).ran_ns == 0


def test_the_time_to_boot_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.BOOT_TIMEOUT, raising=False)
    assert machine.boot_timeout() == 0
    monkeypatch.setenv(machine.BOOT_TIMEOUT, "150")
    assert machine.boot_timeout() == 150
    for wrong in ("soon", "-1", "nan", "1.5", "1000000"):
        monkeypatch.setenv(machine.BOOT_TIMEOUT, wrong)
        with pytest.raises(UsageError, match="no number of seconds"):
            machine.boot_timeout()


# ---- the file server ----


def test_each_virtiofsd_is_asked_in_its_own_words() -> None:
    c = virtiofsd.command(virtiofsd.C_PROGRAM, "/share", 7)
    rust = virtiofsd.command(virtiofsd.RUST_PROGRAMS[0], "/share", 7)
    assert "--fd=7" in c
    assert "--fd=7" in rust
    assert c[-1].startswith("source=/share,")
    assert "announce_submounts" in c[-1]
    assert "--shared-dir=/share" in rust
    assert "--announce-submounts" in rust


def test_a_virtiofsd_that_is_asked_for_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtiofsd, "find", lambda configured="": None)
    journal = Journal.create_dir(str(tmp_path / "r"), "sandbox", {})

    noted: list[str] = []

    def server(accel: str, shared_fs: str = "", *, bounces: bool = False) -> object:
        settings = sandbox_support.sandbox("x", "/c", accel=accel, kernel="/k", initrd="/i")
        settings.notes = noted
        assert settings.machine is not None
        settings.machine.share.protocol = shared_fs
        settings.machine.guest.bounces = bounces
        start = boot.Boot(settings, str(tmp_path), journal)
        start.choose_monitor()
        start.machine.share = volumes.Share(str(tmp_path), journal)
        start.prepare_file_server()
        return start.machine.files

    assert server("kvm", shared_fs="virtio-9p") is None
    assert noted == []  # it was asked for
    assert server("kvm") is None
    assert "no virtiofsd" in noted.pop()
    assert server("tcg", shared_fs="virtio-fs") is None
    assert "kernel cannot have virtio-fs" in noted.pop()
    with pytest.raises(HostError, match="no virtiofsd"):
        server("tcg", shared_fs="virtio-fs", bounces=True)
    with pytest.raises(HostError, match="no virtiofsd"):
        server("kvm", shared_fs="virtio-fs")
    assert journal_undo.undo(journal) == []


@pytest.mark.parametrize(
    ("version", "cache"),
    [
        ("6.1.192", "mmap"),
        ("6.3", "mmap"),
        ("6.4.0", "none"),
        ("6.12.117", "none"),
        ("7.0", "none"),
        ("", "none"),
    ],
)
def test_9p_keeps_only_what_the_kernel_keeps_right(version: str, cache: str) -> None:
    assert boot._9p_cache(version) == cache


def test_a_shared_fs_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_SHARED_FS", "nfs")
    with pytest.raises(UsageError, match="nfs"):
        machine.shared_fs()
