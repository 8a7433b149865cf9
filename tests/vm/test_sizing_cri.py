"""The size of machines under real clients: what was asked for, while they run, and what `kata explain` says of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import containerd_support
import pytest
from conftest import Kata
from containerd_support import Containerd
from test_cri import Cri, clean, running
from waiting import until

from kata.engine.client import EngineClient
from kata.errors import KataError
from kata.hypervisor.qemu import queues
from kata.resources import sizing

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Containerd]:
    with containerd_support.running(run_directory, guest_assets, busybox_image) as one:
        yield one


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed leaves nothing to its next try, or to the tests after it."""
    daemon = request.getfixturevalue("daemon") if "daemon" in request.fixturenames else None
    cri = request.getfixturevalue("cri") if "cri" in request.fixturenames else None
    yield
    if daemon is not None:
        containerd_support.clean(daemon)
    if cri is not None:
        clean(cri)


def kata_of(daemon: Containerd, guest: Path) -> Kata:
    """A `kata` that looks at the daemon's sandboxes."""
    found = Kata(daemon.directory, guest)
    found.env |= {"KATA_RUN_DIR": daemon.env["KATA_RUN_DIR"], "KATA_STATE_DIR": daemon.env["KATA_STATE_DIR"]}
    return found


def explained(kata: Kata, name: str) -> dict[str, Any]:
    return dict(json.loads(kata.ok("explain", "--json", name))[0])


def guest_size(say: str) -> tuple[int, float]:
    """`nproc` and MemTotal in MiB, from the output of `LOOK`."""
    cpus, memory = say.split()[:2]
    return int(cpus), int(memory) / 1024


MORE_MIB = queues.LONG_QUEUES_MIB
"""What a machine has on top with some QEMUs."""


def fits(total: float, asked: int) -> bool:
    """Whether a guest with so many MiB has room for what was asked for, and not much more."""
    least = sizing.total_of(asked * MIB, "small") / MIB
    return least <= total <= least * 1.05 + MORE_MIB


LOOK = ("sh", "-c", "nproc; awk '/MemTotal/ {print $2}' /proc/meminfo")


def test_a_container_has_what_it_asks_for_and_follows_updates(
    daemon: Containerd, guest_assets: Path
) -> None:
    file = daemon.directory / "c.toml"
    file.write_text("[hypervisor.qemu]\ndefault_maxmemory = 2000\n")
    limits = ("--cpus", "0.5", "--memory-limit", str(300 * MIB), "--runtime-config-path", str(file))
    daemon.detached("z1", "sleep", "1000", options=limits)
    kata = kata_of(daemon, guest_assets)
    count = 0

    def look() -> tuple[int, float]:
        nonlocal count
        count += 1
        return guest_size(daemon.ok("task", "exec", "--exec-id", f"l{count}", "z1", *LOOK))

    cpus, memory = look()
    assert cpus == 1
    assert fits(memory, 300)
    found = explained(kata, "z1")
    assert found["asked"]["cpus"] == 0.5
    assert found["asked"]["memory_mib"] == 300
    first = found["memory_mib"]["now"]
    text = kata.ok("explain", "z1")
    assert "max(1, ceil(0.5)) = 1" in text
    assert f"now {first} MiB" in text
    with EngineClient(str(daemon.run_dir / "sandboxes/default.z1/engine.sock")) as engine:
        engine.update("z1", asking(150_000, 900))
    cpus, memory = look()
    assert cpus == 2
    assert fits(memory, 900)
    found = explained(kata, "z1")
    assert (found["cpus"]["now"], found["memory_mib"]["first"]) == (2, first)
    limit = Path(found["host"]["cgroups"]["memory"])
    written = next(
        limit / name for name in ("memory.max", "memory.limit_in_bytes") if (limit / name).exists()
    )
    assert abs(int(written.read_text()) - found["host"]["memory_mib"] * MIB) < MIB

    with EngineClient(str(daemon.run_dir / "sandboxes/default.z1/engine.sock")) as engine:
        engine.update("z1", asking(100_000, 300))
    cpus, memory = look()
    assert cpus == 1
    assert fits(memory, 300)
    daemon.remove("z1")


CGROUP = ("--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:nodev:noexec")
"""The container sees its own control group in the guest."""


class Sized:
    """A running container, and all that says how large it and its machine are."""

    def __init__(self, daemon: Containerd, guest: Path, name: str) -> None:
        self.daemon = daemon
        self.name = name
        self.kata = kata_of(daemon, guest)
        self.engine = EngineClient(str(daemon.run_dir / f"sandboxes/default.{name}/engine.sock"))
        self._count = 0

    def exec(self, *argv: str) -> str:
        self._count += 1
        return self.daemon.ok("task", "exec", "--exec-id", f"x{self._count}", self.name, *argv)

    def limits(self) -> list[str]:
        """Of the container, in the guest: memory and CPUs."""
        return self.exec("sh", "-c", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max").split()

    def host_limits(self) -> dict[str, str]:
        """What the host allows the sandbox: contents of the files."""
        found = {}
        for path in set(explained(self.kata, self.name)["host"]["cgroups"].values()):
            for file in ("memory.max", "memory.limit_in_bytes", "cpu.max", "cpu.cfs_quota_us"):
                if (Path(path) / file).exists():
                    found[file] = (Path(path) / file).read_text().strip()
        return found

    def state(self) -> tuple[Any, ...]:
        """Everything; the memory that the hypervisor happens to hold is not part of it."""
        found = explained(self.kata, self.name)
        found["host"].pop("used_mib")
        return guest_size(self.exec(*LOOK)), self.limits(), self.host_limits(), found


def test_a_limit_below_the_memory_that_a_machine_was_started_with(
    daemon: Containerd, guest_assets: Path
) -> None:
    file = daemon.directory / "below.toml"
    file.write_text("[hypervisor.qemu]\ndefault_maxmemory = 1500\n")
    limits = ("--memory-limit", str(700 * MIB), "--runtime-config-path", str(file))
    daemon.detached("below", "sleep", "1000", options=(*limits, *CGROUP))
    one = Sized(daemon, guest_assets, "below")
    host = one.host_limits()
    with one.engine as engine:
        engine.update("below", asking(100_000, 300))
        (_cpus, memory), (limit, *_), lower, found = one.state()
        assert fits(memory, 300)
        assert int(limit) == 300 * MIB
        assert found["memory_mib"]["returned"] > 300
        shrunk = found["memory_mib"]["now"]
        assert shrunk == found["memory_mib"]["first"] - found["memory_mib"]["returned"]
        for name in host:
            if name.startswith("memory"):
                assert int(host[name]) - int(lower[name]) >= 300 * MIB
        text = one.kata.ok("explain", "below")
        assert f"{found['memory_mib']['returned']} given back by the guest" in text

        engine.update("below", asking(100_000, 1000))
        (_cpus, memory), (limit, *_), _host, found = one.state()
        assert fits(memory, 1000)
        assert int(limit) == 1000 * MIB
        assert found["memory_mib"]["returned"] == 0
        assert found["memory_mib"]["plugged"] > 0
    daemon.remove("below")


def test_an_update_that_cannot_be_met_is_an_error_and_changes_nothing(
    daemon: Containerd, guest_assets: Path
) -> None:
    file = daemon.directory / "unmet.toml"
    file.write_text("[hypervisor.qemu]\ndefault_maxmemory = 900\ndefault_maxvcpus = 2\n")
    options = (
        "--cpus",
        "0.5",
        "--memory-limit",
        str(400 * MIB),
        "--runtime-config-path",
        str(file),
        *CGROUP,
    )
    mount = ("--mount", "type=tmpfs,src=tmpfs,dst=/held,options=size=300m")
    # Something that is used and cannot be taken back.
    hold = "dd if=/dev/zero of=/held/file bs=1M count=200; echo held >/tmp/held; sleep 1000"
    daemon.detached("unmet", "sh", "-c", hold, options=(*options, *mount))
    one = Sized(daemon, guest_assets, "unmet")
    until(lambda: "held" in one.exec("sh", "-c", "cat /tmp/held || true"), "memory is held")
    before = one.state()
    assert before[1] == [str(400 * MIB), "50000", "100000"]
    with one.engine as engine:
        for quota, mib, words in (
            (50_000, 2000, "MiB of memory are needed, and this virtual machine can have 9"),
            (300_000, 400, "3 CPUs are needed, and this virtual machine can have 2"),
            (300_000, 2000, "CPUs are needed"),
            (50_000, 100, r"uses 2\d\d MiB of memory and cannot be limited to 100 MiB"),
            (150_000, 100, "cannot be limited to 100 MiB"),
        ):
            with pytest.raises(KataError, match=words):
                engine.update("unmet", asking(quota, mib))
            assert one.state() == before, f"{quota}, {mib} MiB"
        assert daemon.tasks()["unmet"][1] == "RUNNING"
        engine.update("unmet", asking(150_000, 260))
    assert one.limits() == [str(260 * MIB), "150000", "100000"]
    assert one.state()[0][0] == 2
    daemon.remove("unmet")


def has_word(file: Path, word: str) -> bool:
    return word in file.read_text()


def test_a_cpu_limit_holds_from_the_first_process_on_and_not_for_the_boot(
    daemon: Containerd, guest_assets: Path
) -> None:
    work = (
        "read begin rest </proc/uptime; i=0; while [ $i -lt 12000 ]; do i=$((i+1)); done; read end rest </proc/uptime;"
        " echo took $begin $end; cat /sys/fs/cgroup/cpu.stat; sleep 1000"
    )
    boots = {}
    for name, options in (("free", ()), ("slow", ("--cpus", "0.1"))):
        # Not asked for by an exec, which would use up what the work is given.
        output = daemon.directory / f"{name}.log"
        daemon.detached(name, "sh", "-c", work, options=(*options, *CGROUP, "--log-uri", f"file://{output}"))
        one = Sized(daemon, guest_assets, name)
        with one.engine as engine:
            boots[name] = sum(
                step.duration_ns / 1e9
                for step in engine.timings().timings
                if step.name in ("kernel", "agent start")
            )
        until(partial(has_word, output, "throttled_usec"), "work is done", output.read_text)
        said = output.read_text().split()
        elapsed = float(said[2]) - float(said[1])
        counted = dict(zip(said[3::2], map(int, said[4::2]), strict=False))
        if name == "slow":
            assert counted["nr_throttled"] > 0
            # Its share of the time that it took, from its first instruction on; the kernel hands it out in slices.
            assert counted["usage_usec"] / 1e6 <= elapsed * 0.2 + 0.05, said
            quota = one.host_limits()
            assert quota.get("cpu.max", quota.get("cpu.cfs_quota_us", "")).split()[0] == "200000"
        else:
            assert counted["nr_throttled"] == 0
        daemon.remove(name)
    # A tenth of a processor would make it ten times as long.
    assert boots["slow"] < 3 * boots["free"], boots


def asking(quota: int, mib: int) -> dict[str, Any]:
    """Resources as the runtime specification has them."""
    return {"cpu": {"quota": quota, "period": 100_000}, "memory": {"limit": mib * MIB}}


@pytest.fixture(scope="module")
def cri(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Cri]:
    file = run_directory / "sizing.toml"
    file.write_text(
        "[hypervisor.qemu]\ndefault_memory = 256\nenable_annotations = ['default_vcpus', 'default_memory']\n"
    )
    options = f"""\
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata.options]
ConfigPath = "{file}"
"""
    with running(run_directory, guest_assets, busybox_image, second=False, more=options) as one:
        yield one


def in_container(cri: Cri, container: str) -> tuple[int, float]:
    return guest_size(cri("exec", "-s", container, *LOOK))


def linux(quota: int, mib: int) -> dict[str, Any]:
    """Limits as the CRI has them."""
    return {
        "resources": {"cpu_period": 100_000, "cpu_quota": quota, "memory_limit_in_bytes": mib * MIB},
    }


def test_a_pod_grows_with_its_containers_and_with_updates(cri: Cri, guest_assets: Path) -> None:
    pod = cri.pod()
    kata = kata_of(cri.daemon, guest_assets)
    assert explained(kata, pod[0][:13])["memory_mib"]["now"] == 256
    one = cri.container(pod, "one", "sleep", "1000", linux=linux(70_000, 200))
    assert in_container(cri, one)[0] == 1
    two = cri.container(pod, "two", "sleep", "1000", linux=linux(70_000, 400))
    cpus, memory = in_container(cri, two)
    assert cpus == 2
    assert fits(memory, 600)
    assert in_container(cri, one)[0] == 2, "it is one machine"
    found = explained(kata, two[:13])
    assert sorted(
        one["memory"] // MIB for one in found["asked"]["containers"].values() if one["memory"]
    ) == [200, 400]
    cri("update", "--cpu-period", "100000", "--cpu-quota", "20000", "--memory", str(100 * MIB), two)
    cpus, memory = in_container(cri, two)
    assert cpus == 1
    assert fits(memory, 300)


def test_a_pods_own_figures_and_its_annotations(cri: Cri, guest_assets: Path) -> None:
    sized = cri.pod(**linux(150_000, 400))
    kata = kata_of(cri.daemon, guest_assets)
    asked = explained(kata, sized[0])["asked"]
    assert (asked["cpus"], asked["memory_mib"]) == (1.5, 400)
    assert asked["source"].startswith("the sandbox's annotations")
    box = cri.container(sized, "box", "sleep", "1000", linux=linux(150_000, 400))
    cpus, memory = in_container(cri, box)
    assert cpus == 2
    assert fits(memory, 400)
    free = cri.container(sized, "free", "sleep", "1000", linux={"resources": {"cpuset_cpus": "0-63"}})
    _cpus, memory = in_container(cri, free)
    assert memory > 400 + 240, "what is not limited counts with default_memory, which is 256 MiB here"
    assert "256 MiB (default_memory) for containers without a limit" in kata.ok("explain", sized[0])
    clean(cri)
    prefix = "io.katacontainers.config.hypervisor"
    annotated = cri.pod({f"{prefix}.default_vcpus": "2", f"{prefix}.default_memory": "320"})
    box = cri.container(annotated, "box", "sleep", "1000")
    cpus, memory = in_container(cri, box)
    assert cpus == 2
    assert 290 <= memory <= 320
    clean(cri)
    with pytest.raises(AssertionError, match="machine_type is not allowed on this host: enable_annotations"):
        cri.pod({f"{prefix}.machine_type": "pc"})


TICKS = (
    "sh",
    "-c",
    "nproc; grep -c 'hres_active *: 1' /proc/timer_list; awk '/HPET|LOC|timer/ {print $2 + $3}' /proc/interrupts",
)


def test_every_processor_has_a_precise_timer_and_an_idle_one_rests(cri: Cri) -> None:
    """A machine that may grow has more processors than it runs: that must not cost it its timers."""
    container = cri.container(cri.pod(), "one", "sleep", "1000", linux=linux(70_000, 200))

    def look() -> tuple[int, int, int]:
        cpus, precise, *counts = map(int, cri("exec", "-s", container, *TICKS).split())
        return cpus, precise, sum(counts)

    cpus, precise, before = look()
    assert (cpus, precise) == (1, 1)
    time.sleep(4)
    # At full rate it would have been 1000; what there is comes from the exec itself, mostly.
    assert look()[2] - before < 500
    cri("update", "--cpu-period", "100000", "--cpu-quota", "150000", container)
    assert look()[:2] == (2, 2)
