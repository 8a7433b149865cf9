"""The sandbox's place in the host's cgroups, with this host's own hierarchies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata import journal_undo, mount_table
from kata.errors import JournalError
from kata.hypervisor import registry
from kata.journal import FILE_NAME, Journal
from kata.resources import host_cgroup, sizing

MIB = 1 << 20
LIMITS = host_cgroup.Limits(64 * MIB, 1.5)
USER = 1_800_000_001
SOURCE = str(Path(__file__).resolve().parents[2] / "src")


def hierarchies() -> list[host_cgroup.Hierarchy]:
    return host_cgroup.hierarchies()


pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or {name for one in hierarchies() for name in one.controllers} != {"memory", "cpu", "pids"},
    reason="needs root, and mounted cgroups with memory, cpu and pids",
)


class Made:
    """A sandbox's leaves and its journal."""

    def __init__(
        self, base: Path, name: str, limits: host_cgroup.Limits = LIMITS, directory: str = ""
    ) -> None:
        self.name = f"t{os.getpid()}-{name}"
        self.journal = Journal.create_dir(str(base), self.name + directory, {})
        self.cgroup = host_cgroup.HostCgroup()
        self.cgroup.make(self.journal, host_cgroup.place_of("", self.name), limits)

    def again(self, base: Path, limits: host_cgroup.Limits = LIMITS) -> Made:
        """Another sandbox that is told to use the same place."""
        count = len(list(base.iterdir()))
        return Made(base, self.name.partition("-")[2], limits, f"-{count}")


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    one = Made(tmp_path, "one")
    yield one
    assert journal_undo.undo(one.journal) == []


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"])


def members(path: str) -> list[int]:
    return [int(line) for line in Path(path, "cgroup.procs").read_text().split()]


def test_leaves_have_the_limits(made: Made) -> None:
    assert made.cgroup.warnings == []
    assert set(made.cgroup.paths) == {"memory", "cpu", "pids"}
    for one in hierarchies():
        for controller in one.controllers:
            path = Path(made.cgroup.paths[controller])
            assert path == Path(one.top, "kata", made.name)
            for file, content in LIMITS.files(one.version, controller):
                assert (path / file).read_text().strip() == content
    assert LIMITS.files(2, "memory") == [("memory.max", str(64 * MIB))]
    assert LIMITS.files(2, "cpu") == [("cpu.max", "150000 100000")]
    assert LIMITS.files(2, "pids") == LIMITS.files(1, "pids") == [("pids.max", "2048")]


def test_processes_are_moved_and_end_with_the_leaf(made: Made) -> None:
    process = sleeper()
    gone = subprocess.Popen(["true"])
    gone.wait()
    made.cgroup.join([process.pid, gone.pid])
    assert made.cgroup.warnings == []
    for path in made.cgroup.paths.values():
        assert members(path) == [process.pid]
    # As it is after the engine's death: somebody else undoes, from the file alone.
    journal_undo.undo(Journal.open(made.journal.path))
    assert process.wait(10) == -9
    assert not any(os.path.exists(path) for path in made.cgroup.paths.values())


def test_the_limit_on_memory_is_the_kernels(made: Made) -> None:
    assert made.cgroup.oom_kills() == 0
    eater = subprocess.Popen(
        [sys.executable, "-c", "input(); data = b'x' * (300 << 20); print(len(data))"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    made.cgroup.join([eater.pid])
    out, _ = eater.communicate(b"\n", 60)
    assert (eater.returncode, out) == (-9, b"")
    assert made.cgroup.oom_kills() == 1


def test_who_leaves_can_remove_what_it_was_in(tmp_path: Path) -> None:
    program = f"""
import os, sys
sys.path.insert(0, {SOURCE!r})
from kata import journal_undo
from kata.journal import Journal
from kata.resources import host_cgroup
before = open("/proc/self/cgroup").read()
journal = Journal.create_dir({str(tmp_path)!r}, "t{os.getpid()}-self", {{}})
cgroup = host_cgroup.HostCgroup()
cgroup.make(journal, "kata/t{os.getpid()}-self", host_cgroup.Limits(256 << 20, 1))
cgroup.join([os.getpid()])
inside = open("/proc/self/cgroup").read()
assert inside.count("/kata/t{os.getpid()}-self\\n") == len(set(cgroup.paths.values())), inside
cgroup.leave()
assert open("/proc/self/cgroup").read() == before
assert journal_undo.undo(journal) == []
assert not any(os.path.exists(path) for path in cgroup.paths.values())
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_parent_goes_with_the_last_and_not_before(tmp_path: Path) -> None:
    # A parent of our own: other sandboxes of this machine may be in the usual one.
    top = next(one.top for one in hierarchies() if "memory" in one.controllers)
    parent = f"{top}/kata-test-{os.getpid()}"
    os.mkdir(parent)
    journals = []
    for name in ("first", "second"):
        journal = Journal.create_dir(str(tmp_path), name, {})
        entry = journal.begin("cgroup", path=f"{parent}/{name}", parents=[parent])
        os.mkdir(f"{parent}/{name}")
        journal.commit(entry)
        journals.append(journal)
    assert journal_undo.undo(journals[0]) == []
    assert os.path.isdir(f"{parent}/second")
    assert journal_undo.undo(journals[1]) == []
    assert not os.path.exists(parent)


def test_many_come_and_go_at_once(tmp_path: Path) -> None:
    wrong: list[str] = []

    def come_and_go(number: int) -> None:
        for turn in range(40):
            one = Made(tmp_path, f"{number}-{turn}")
            wrong.extend(one.cgroup.warnings)
            wrong.extend(journal_undo.undo(one.journal))

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_host_that_allows_nothing_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "no-cgroup"
    top.write_text("")
    closed = host_cgroup.Hierarchy(1, str(top), str(top), ["memory"])
    monkeypatch.setattr(host_cgroup, "hierarchies", lambda: [closed])
    one = Made(tmp_path, "none")
    assert one.cgroup.paths == {}
    assert [words.partition(":")[0] for words in one.cgroup.warnings] == [
        "no limit on the host's memory",
        "no limit on the host's cpu",
        "no limit on the host's pids",
    ]
    one.cgroup.join([os.getpid()])
    one.cgroup.leave()
    assert one.cgroup.oom_kills() == 0
    assert journal_undo.undo(one.journal) == []
    with pytest.raises(JournalError):
        Journal.open(str(tmp_path / one.name / FILE_NAME))


@pytest.fixture
def delegated() -> Iterator[list[host_cgroup.Hierarchy]]:
    """A cgroup in each hierarchy that is `USER`'s, as systemd makes them, with one below for its processes."""
    name = f"kata-test-{os.getpid()}"
    given = []
    try:
        for one in hierarchies():
            if one.version == 2:
                host_cgroup._hand_down(one.top, one.controllers)
            inside = host_cgroup.Hierarchy(
                one.version, one.top, f"{one.top}/{name}/session", one.controllers
            )
            os.makedirs(inside.own)
            for place in (Path(inside.own).parent, Path(inside.own)):
                for path in (place, *place.glob("cgroup.*"), *place.glob("tasks")):
                    os.chown(path, USER, USER)
            given.append(inside)
        yield given
    finally:
        for inside in given:
            os.rmdir(inside.own)
            os.rmdir(os.path.dirname(inside.own))


def test_an_ordinary_users_leaves_are_where_cgroups_are_delegated(
    tmp_path: Path, delegated: list[host_cgroup.Hierarchy]
) -> None:
    tmp_path.chmod(0o777)
    for path in tmp_path.parents[:3]:
        path.chmod(path.stat().st_mode | 0o011)
    # The sources are loaded by root: the checkout may be where others cannot go.
    program = f"""
import os, sys
sys.path.insert(0, {SOURCE!r})
from kata import children, journal_undo, mount_table, sysio
from kata.journal import Journal
from kata.resources import device_rules, host_cgroup, systemd_scope
sysio.preload()
for own in {[one.own for one in delegated]!r}:
    open(own + "/cgroup.procs", "w").write("0")
os.setgroups([])
os.setresgid({USER}, {USER}, {USER})
os.setresuid({USER}, {USER}, {USER})
journal = Journal.create_dir({str(tmp_path)!r}, "user", {{}})
cgroup = host_cgroup.HostCgroup()
cgroup.make(journal, "kata/one", host_cgroup.Limits(256 << 20, 1))
cgroup.join([os.getpid()])
wrong = [words for words in cgroup.warnings if "devices" not in words]  # those are closed by root alone
assert not wrong, wrong
for one in host_cgroup.hierarchies():
    parent = os.path.dirname(one.base)
    assert parent == one.top, (one.base, one.top)
for controller, path in cgroup.paths.items():
    assert path.endswith("/kata-test-{os.getpid()}/kata/one"), path
    assert str(os.getpid()) in open(path + "/cgroup.procs").read().split()
cgroup.leave()
assert journal_undo.undo(journal) == []
assert not any(os.path.exists(os.path.dirname(path)) for path in cgroup.paths.values())
print(sorted(cgroup.paths))
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "['cpu', 'memory', 'pids']\n"), done.stderr


def test_with_version_2_processes_have_to_be_movable(tmp_path: Path) -> None:
    own = tmp_path / "user.slice/session"
    own.mkdir(parents=True)
    for place in (tmp_path, own.parent, own):
        (place / "cgroup.procs").touch()
    assert host_cgroup.Hierarchy(2, str(tmp_path), str(own), []).base == str(tmp_path)
    (tmp_path / "cgroup.procs").unlink()
    assert host_cgroup.Hierarchy(2, str(tmp_path), str(own), []).base == str(own.parent)
    (own.parent / "cgroup.procs").unlink()
    assert host_cgroup.Hierarchy(2, str(tmp_path), str(own), []).base == str(own)
    assert host_cgroup.Hierarchy(1, str(tmp_path), str(own), []).base == str(tmp_path)
    assert host_cgroup.Hierarchy(2, str(tmp_path), "/elsewhere", []).base == str(tmp_path)


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("/", "/", ""),
        ("/a/b", "/", "/a/b"),
        ("/docker/1", "/docker/1", ""),
        ("/docker/1/x", "/docker/1", "/x"),
        ("/docker/11", "/docker/1", "/docker/11"),
    ],
)
def test_paths_below_a_mount(path: str, root: str, below: str) -> None:
    assert host_cgroup._below(path, root) == below


def test_the_mounts_that_were_found_are_cgroups() -> None:
    kinds = {mount.target: mount for mount in mount_table.mounts()}
    for one in hierarchies():
        assert kinds[one.top].fstype == ("cgroup2" if one.version == 2 else "cgroup")
        assert os.getpid() in members(one.own)


@pytest.mark.parametrize("accel", ["kvm", "tcg"])
def test_the_limit_is_the_machine_and_what_it_takes_to_run_it(accel: str) -> None:
    overhead = registry.find().host_overhead_mib(accel)
    small, large = sizing.host_memory(64, overhead), sizing.host_memory(65536, overhead)
    assert small > 64 * MIB + 200 * MIB
    assert 65536 * MIB * 1.03 < large < 65536 * MIB * 1.04
    assert sizing.host_cpus(2) == 3


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("", "kata/x"),
        ("/", "kata/x"),
        ("/kubepods/burstable/pod1/abc", "kubepods/burstable/pod1/abc"),
        ("default/abc", "default/abc"),
        ("/../../etc", "etc"),
        ("system.slice:docker:abc", "system.slice/docker-abc.scope"),
        (":cri-containerd:abc", "system.slice/cri-containerd-abc.scope"),
        ("-.slice:p:abc", "p-abc.scope"),
        (
            "kubepods-besteffort-pod1_2.slice:cri-containerd:abc",
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice/cri-containerd-abc.scope",
        ),
    ],
)
def test_where_a_specification_wants_the_leaf(path: str, place: str) -> None:
    assert host_cgroup.place_of(path, "x") == place


def test_a_pods_place_has_every_controller_and_leaves_what_was_there(tmp_path: Path) -> None:
    top = next(one.top for one in hierarchies() if "memory" in one.controllers)
    pods = f"kata-test-{os.getpid()}"
    os.mkdir(f"{top}/{pods}")  # as the kubelet has made it
    try:
        journal = Journal.create_dir(str(tmp_path), "pod", {})
        cgroup = host_cgroup.HostCgroup()
        cgroup.make(journal, f"{pods}/pod1/leaf", LIMITS, all_controllers=True)
        assert cgroup.warnings == []
        controllers = {name for _, names, _ in host_cgroup.others() for name in names}
        assert set(cgroup.paths) == {"memory", "cpu", "pids"} | controllers
        assert all(path.endswith(f"/{pods}/pod1/leaf") for path in cgroup.paths.values())
        program = "import sys; sys.stdin.read(1); open('/dev/null'); open('/dev/urandom'); open(sys.argv[1])"
        # A device that no machine needs: the kernel's log.
        process = subprocess.Popen([sys.executable, "-c", program, "/dev/kmsg"], stdin=subprocess.PIPE)
        cgroup.join([process.pid])
        assert cgroup.warnings == []
        for path in set(cgroup.paths.values()):
            assert members(path) == [process.pid]
        process.communicate(b"x", 60)
        assert (process.returncode != 0) == ("devices" in controllers)
        assert journal_undo.undo(journal) == []
        assert not any(os.path.exists(os.path.dirname(path)) for path in cgroup.paths.values())
        # Where nobody had made the pods' own cgroup it went with the leaf; where somebody had, it is still there.
        assert os.path.isdir(f"{top}/{pods}")
    finally:
        os.rmdir(f"{top}/{pods}")


def test_a_leaf_that_nobody_uses_is_replaced_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Made(tmp_path, "same")
    try:
        for path in first.cgroup.paths.values():
            assert members(path) == []
        second = first.again(tmp_path)
        assert (second.cgroup.paths, len(second.cgroup.warnings)) == ({}, len(host_cgroup.CONTROLLERS))
        assert journal_undo.undo(second.journal) == []
        monkeypatch.setattr(host_cgroup, "_NOBODYS_S", 0)
        process = sleeper()
        first.cgroup.join([process.pid])
        third = first.again(tmp_path)
        assert third.cgroup.paths == {}
        assert "with 1 process in it" in third.cgroup.warnings[0]
        assert journal_undo.undo(third.journal) == []
        assert process.poll() is None
        process.kill()
        process.wait()
        fourth = first.again(tmp_path, host_cgroup.Limits(32 * MIB, 1))
        assert fourth.cgroup.warnings == []
        assert set(fourth.cgroup.paths) == {"memory", "cpu", "pids"}
        assert journal_undo.undo(fourth.journal) == []
        assert not any(os.path.exists(path) for path in first.cgroup.paths.values())
    finally:
        journal_undo.undo(first.journal)


@pytest.mark.parametrize("version", [1, 2])
def test_limits_change_with_the_machine(tmp_path: Path, version: int) -> None:
    cgroup = host_cgroup.HostCgroup()
    cgroup.paths = {"memory": str(tmp_path), "cpu": str(tmp_path), "devices": str(tmp_path / "none")}
    cgroup._versions = {"memory": version, "cpu": version}
    for file in ("memory.max", "memory.limit_in_bytes", "cpu.max", "cpu.cfs_period_us", "cpu.cfs_quota_us"):
        (tmp_path / file).touch()
    assert cgroup.limit(host_cgroup.Limits(1 << 30, 2.5)) == []
    memory = "memory.max" if version == 2 else "memory.limit_in_bytes"
    assert (tmp_path / memory).read_text() == str(1 << 30)
    cpu = (tmp_path / "cpu.max").read_text() if version == 2 else (tmp_path / "cpu.cfs_quota_us").read_text()
    assert cpu.split()[0] == "250000"
    cgroup.paths["memory"] = "/no/such/place"
    assert "cannot change the limit on the host's memory" in cgroup.limit(host_cgroup.Limits(1, 1))[0]
