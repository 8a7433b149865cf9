"""The agent's container runtime in a real guest, over virtio-serial, without an engine."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_support import (
    MIB,
    PRIVILEGED,
    STATE,
    Background,
    Container,
    Guest,
    caps,
    error,
    mount,
    namespaces,
    spec,
)
from waiting import PATIENCE

from kata.proto import agent_pb as agent
from kata.proto import agentext_pb as ext
from kata.proto import oci_pb as oci
from kata.ttrpc.status import (
    ALREADY_EXISTS,
    DEADLINE_EXCEEDED,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    NOT_FOUND,
    PERMISSION_DENIED,
    UNAVAILABLE,
)

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(1200)]

ALICE = oci.User(UID=1000, GID=1000)


@pytest.fixture(scope="module")
def guest(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Guest]:
    guest = Guest(run_directory, guest_assets, busybox_image)
    try:
        guest.health()
        guest.tell("CreateSandbox", agent.CreateSandboxRequest(sandbox_id="s", dns=["nameserver 192.0.2.1"]))
        yield guest
    finally:
        guest.close()


@pytest.fixture(scope="module")
def box(guest: Guest) -> Iterator[Container]:
    """A container that ends with 42 when it is asked to."""
    box = Container(
        guest,
        "box",
        "sh",
        "-c",
        'trap "exit 42" TERM; while :; do sleep 0.1; done',
        mounts=[mount("/tmp", "tmpfs", "tmpfs", "nosuid", "mode=1777")],
    )
    yield box
    box.remove()


# ---- what cannot be created leaves nothing ----


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["nope"], NOT_FOUND, 'exec: "nope": executable file not found in $PATH'),
        (["/bin/nope"], NOT_FOUND, 'exec: "/bin/nope": stat /bin/nope: no such file or directory'),
        (["/etc/passwd"], PERMISSION_DENIED, 'exec: "/etc/passwd": permission denied'),
        (["/etc"], PERMISSION_DENIED, 'exec: "/etc": is a directory'),
    ],
)
def test_a_missing_command_fails_the_create_in_runcs_words(
    guest: Guest, box: Container, argv: list[str], code: int, words: str
) -> None:
    assert error(Container, guest, "bad", *argv) == (code, words)
    assert error(box.exec, "bad", *argv) == (code, words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"User": oci.User(Username="nobody-knows")}, "unable to find user nobody-knows"),
        ({"mounts": [mount("/data", "bind", "/nonexistent", "bind")]}, "/nonexistent"),
        ({"mounts": [mount("/proc/self/attr", "tmpfs", "tmpfs")]}, "inside /proc"),
        ({"mounts": [mount("/proc", "tmpfs", "tmpfs")]}, "not procfs"),
        ({"mounts": [mount("/", "tmpfs", "tmpfs")]}, "the root itself"),
        ({"mounts": [mount("/x", "nofs", "nofs")]}, "no file system"),
        ({"linux": {"Sysctl": {"kernel.nonsense": "1"}}}, "kernel.nonsense"),
        ({"linux": {"Namespaces": namespaces("time")}}, "time"),
        ({"linux": {"RootfsPropagation": "sideways"}}, "sideways"),
        ({"Rlimits": [oci.POSIXRlimit(Type="RLIMIT_MAGIC")]}, "RLIMIT_MAGIC"),
        ({"Cwd": "/etc/passwd"}, "/etc/passwd"),
    ],
)
def test_a_wrong_spec_is_named_and_leaves_nothing(
    guest: Guest, fields: dict[str, object], words: str
) -> None:
    code, message = error(Container, guest, "bad", "true", **fields)
    assert words in message
    # The name is free, and nothing of the container is mounted.
    again = Container(guest, "bad", "true")
    assert again.wait() == 0
    again.remove()
    assert code


def test_a_create_that_takes_too_long_is_given_up(guest: Guest) -> None:
    # A disk that never comes: the agent would wait for seconds.
    missing = agent.Storage(driver="blk", source="1e", fstype="erofs", mount_point=f"{STATE}/late/lower")
    request = agent.CreateContainerRequest(container_id="late", storages=[missing], OCI=spec("late", "true"))
    assert error(guest.tell, "CreateContainer", request, 0.3)[0] == DEADLINE_EXCEEDED
    # What it has begun is undone behind the answer; then the name is free.
    deadline = time.monotonic() + PATIENCE
    while (failed := error(guest.tell, "CreateContainer", request))[0] == ALREADY_EXISTS:
        assert time.monotonic() < deadline
    assert "1e" in failed[1]


def test_names_are_checked(guest: Guest, box: Container) -> None:
    assert error(Container, guest, "../x", "true")[0] == INVALID_ARGUMENT
    assert error(Container, guest, "box", "true")[0] == ALREADY_EXISTS
    assert error(Container(guest, "x", "true", start=False).exec, "../x", "true")[0] == INVALID_ARGUMENT
    guest.tell("RemoveContainer", agent.RemoveContainerRequest(container_id="x"))
    unknown = error(guest.tell, "StartContainer", agent.StartContainerRequest(container_id="none"))
    assert unknown[0] == INVALID_ARGUMENT
    assert error(box.wait, "none")[0] == NOT_FOUND


def test_what_is_no_program_fails_the_start(box: Container) -> None:
    assert box.sh("junk", "printf 'junk\\n\\000' >/bin/junk; chmod 755 /bin/junk")[0] == 0
    assert error(box.exec, "e", "/bin/junk") == (PERMISSION_DENIED, "exec /bin/junk: exec format error")
    assert error(box.exec, "e", "true", Cwd="/not/there")[1].startswith('chdir to cwd ("/not/there")')
    # Neither has taken the name.
    assert box.run("e", "echo", "fine") == (0, "fine\n", "")


# ---- processes ----


def test_streams_are_apart_and_the_exit_code_stays(box: Container) -> None:
    assert box.sh("apart", "echo out; echo err >&2; exit 3") == (3, "out\n", "err\n")
    assert box.wait("apart") == 3
    assert box.read("apart") == b""
    running = box.exec("taken", "sleep", "1000")
    assert error(box.exec, "taken", "true")[0] == ALREADY_EXISTS
    box.kill(9, running)
    assert box.wait("taken") == 137


def test_users_and_groups(box: Container) -> None:
    setup = (
        "echo ann:x:1000:100::/home/ann:/bin/sh >>/etc/passwd; echo crew:x:77:ann >>/etc/group;"
        "echo users:x:100: >>/etc/group"
    )
    assert box.sh("setup", setup)[0] == 0
    by_name = agent.StringUser(uid="ann")
    show = "id -u; id -g; id -G; echo $HOME"
    assert box.sh("n", show, string_user=by_name)[1] == "1000\n100\n100 77\n/home/ann\n"
    assert box.sh("m", show, User=oci.User(Username="ann:crew"))[1] == "1000\n77\n77\n/home/ann\n"
    numbers = oci.User(UID=5, GID=6, AdditionalGids=[7, 8])
    assert box.sh("u", show, User=numbers)[1] == "5\n6\n6 7 8\n/\n"
    # The streams are the user's: they can be opened again.
    assert box.sh("o", "echo x >/dev/stdout; echo y >/dev/stderr", User=ALICE) == (0, "x\n", "y\n")


def test_capabilities_limits_and_the_rest_of_a_process(box: Container) -> None:
    show = "grep -E '^(Cap|NoNew)' /proc/self/status | cut -f2; ulimit -n; umask"
    none = box.sh("c0", show, Capabilities=None, User=ALICE)[1].split()
    assert none[:5] == ["0000000000000000"] * 5
    kill = ["CAP_KILL"]
    ambient = oci.LinuxCapabilities(
        Bounding=kill, Effective=kill, Permitted=kill, Inheritable=kill, Ambient=kill
    )
    limits = [oci.POSIXRlimit(Type="RLIMIT_NOFILE", Soft=99, Hard=100)]
    found = box.sh("c1", show, Capabilities=ambient, User=ALICE, NoNewPrivileges=True, Rlimits=limits)[1]
    assert found.split() == ["0000000000000020"] * 5 + ["1", "99", "0022"]
    assert box.sh("c2", "cat /proc/self/oom_score_adj", OOMScoreAdj=321)[1] == "321\n"


def test_nothing_of_the_agents_leaks_in(box: Container) -> None:
    status, output, _ = box.sh("fds", "ls /proc/self/fd; ls -l /proc/1/exe; cat /proc/self/cgroup")
    # 3 is the listing itself.
    assert output.split()[:4] == ["0", "1", "2", "3"]
    assert "/bin/busybox" in output
    assert output.endswith("0::/\n")
    assert status == 0


def test_signals_are_delivered_as_they_are(guest: Guest, box: Container) -> None:
    box.exec("term", "sleep", "1000")
    box.kill(15, "term")
    assert box.wait("term") == 143
    assert error(box.kill, 15, "term")[0] == NOT_FOUND
    assert error(box.kill, 99, "term")[0] == INVALID_ARGUMENT
    other = Container(guest, "other", "sh", "-c", 'trap "exit 7" TERM; echo ok; while :; do sleep 0.1; done')
    assert other.read_some() == b"ok\n"
    other.kill(15)
    assert other.wait() == 7
    other.remove()


def test_the_end_of_init_ends_the_rest(guest: Guest) -> None:
    whole = Container(guest, "whole", "sh", "-c", "sleep 1000 & sleep 1000")
    whole.exec("more", "sleep", "1000")
    waiting = Background(whole.wait, "more")
    whole.kill(9)
    assert whole.wait() == 137
    assert waiting.result() == 137
    assert error(whole.exec, "late", "true")[0] == FAILED_PRECONDITION
    assert whole.read() == b""
    whole.remove()
    # Once more is no error; for the agent it is gone.
    whole.remove()
    assert error(whole.wait)[0] == INVALID_ARGUMENT


def test_a_container_may_die_before_its_start_and_be_removed_while_it_runs(guest: Guest) -> None:
    early = Container(guest, "early", "sleep", "1000", start=False)
    early.kill(9)
    assert early.wait() == 137
    assert error(early.start)[0] == FAILED_PRECONDITION
    early.remove()
    late = Container(guest, "late", "sleep", "1000")
    waiting = Background(late.wait)
    late.remove()
    assert waiting.result() == 137


def test_start_hooks_run_inside(guest: Guest) -> None:
    write = oci.Hook(Path="/bin/sh", Args=["sh", "-c", "cat >/tmp/state"])
    good = Container(
        guest,
        "hooked",
        "cat",
        "/tmp/state",
        mounts=[mount("/tmp", "tmpfs", "tmpfs")],
        hooks=oci.Hooks(StartContainer=[write]),
    )
    assert b'"id":"hooked"' in good.read()
    good.remove()
    fails = oci.Hooks(StartContainer=[oci.Hook(Path="/bin/false")])
    bad = Container(guest, "hooked", "true", start=False, hooks=fails)
    assert "error running startContainer hook #0: /bin/false: exit status 1" in error(bad.start)[1]
    bad.remove()


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_start_hooks_have_the_filter_and_capabilities_of_the_program(
    guest: Guest, no_new_privileges: bool
) -> None:
    deny = oci.LinuxSyscall(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_KILL")
    # Who waits for the hooks is not under the filter.
    waits = oci.LinuxSyscall(Names=["wait4"], Action="SCMP_ACT_ERRNO")
    profile = oci.LinuxSeccomp(DefaultAction="SCMP_ACT_ALLOW", Syscalls=[deny, waits])

    def container(script: str, **changes: Any) -> Container:
        hooks = oci.Hooks(StartContainer=[oci.Hook(Path="/bin/sh", Args=["sh", "-c", script])])
        return Container(
            guest,
            "confined",
            "cat",
            "/tmp/seen",
            linux={"Seccomp": profile},
            mounts=[mount("/tmp", "tmpfs", "tmpfs")],
            hooks=hooks,
            NoNewPrivileges=no_new_privileges,
            **changes,
        )

    seen = container(
        "while read -r what value; do case $what in CapEff:|Seccomp:) echo $value; esac; done"
        " </proc/self/status >/tmp/seen"
    )
    assert seen.read() == b"00000000a80425fb\n2\n"
    seen.remove()
    ended = container("exec mkdir /tmp/x", start=False)
    said = "error running startContainer hook #0: /bin/sh: signal: bad system call"
    assert said in error(ended.start)[1]
    ended.remove()


# ---- streams ----


def test_two_hundred_short_processes_lose_no_byte(box: Container) -> None:
    for number in range(200):
        box.exec(f"short{number}", "head", "-c", str(MIB), "/dev/zero")
        assert len(box.read(f"short{number}")) == MIB, number
        assert box.wait(f"short{number}") == 0


def test_standard_input_comes_back_whole(box: Container) -> None:
    box.exec("cat", "cat")
    piece = os.urandom(MIB)
    sent, got = hashlib.sha256(), hashlib.sha256()

    def read() -> int:
        total = 0
        while data := box.read_some("cat"):
            got.update(data)
            total += len(data)
        return total

    reader = Background(read)
    for _ in range(64):
        sent.update(piece)
        assert box.write(piece, "cat") == MIB
    box.close_stdin("cat")
    assert reader.result() == 64 * MIB
    assert got.digest() == sent.digest()
    assert box.wait("cat") == 0


def test_a_write_waits_for_its_reader_and_holds_nobody_up(guest: Guest, box: Container) -> None:
    box.exec("slow", "sh", "-c", "read x; sleep 1; cat >/dev/null")
    writing = Background(box.write, b"go\n" + bytes(3 * MIB), "slow")
    guest.health()
    assert writing.result() == 3 * MIB + 3
    box.close_stdin("slow")
    assert box.wait("slow") == 0
    box.exec("deaf", "true")
    assert box.wait("deaf") == 0
    assert error(box.write, b"x", "deaf")[0] in (NOT_FOUND, FAILED_PRECONDITION)


def test_a_child_that_keeps_the_pipe_does_not_keep_its_reader(box: Container) -> None:
    assert box.sh("daemon", "echo start; (sleep 1000; echo late) & echo end")[:2] == (0, "start\nend\n")


def test_blocked_calls_hold_nobody_up_and_end_at_their_deadline(guest: Guest, box: Container) -> None:
    box.exec("quiet", "sleep", "1000")
    waiting = [Background(box.wait, "quiet") for _ in range(50)]
    reading = [Background(box.read_some, "quiet") for _ in range(50)]
    guest.health()
    assert error(box.wait, "quiet", 0.2)[0] == DEADLINE_EXCEEDED
    box.kill(9, "quiet")
    assert {call.result() for call in waiting} == {137}
    assert {call.result() for call in reading} == {b""}


# ---- terminals ----


def test_a_terminal_of_the_containers_own(guest: Guest, box: Container) -> None:
    size = oci.Box(Height=33, Width=77)
    box.exec("tty", "sh", Terminal=True, ConsoleSize=size)
    box.write(b"stty size; tty; exit 5\n", "tty")
    output = box.read("tty")
    assert b"33 77" in output
    assert b"/dev/pts/" in output
    assert box.wait("tty") == 5
    assert box.read("tty", errors=True) == b""
    screen = Container(guest, "screen", "sh", Terminal=True, ConsoleSize=size)
    screen.write(b"echo shown >/dev/console; exit 6\n")
    assert b"shown\r\n" in screen.read().split(b"/dev/console", 1)[1]
    assert screen.wait() == 6
    screen.remove()


def test_a_terminal_is_resized_and_ended(guest: Guest, box: Container) -> None:
    # The read of busybox 1.37 ends with a signal; that of 1.35 goes on.
    script = 'trap "stty size" WINCH; echo go; until read x; do :; done; read y; echo end'
    box.exec("win", "sh", "-c", script, Terminal=True)
    output = b""
    while b"go" not in output:
        output += box.read_some("win")
    resize = agent.TtyWinResizeRequest(container_id="box", exec_id="win", row=40, column=100)
    guest.tell("TtyWinResize", resize)
    box.write(b"a\n", "win")
    while b"40 100" not in output:
        output += box.read_some("win")
    box.close_stdin("win")
    assert b"end" in box.read("win")
    assert error(guest.tell, "TtyWinResize", agent.TtyWinResizeRequest(container_id="box"))[0] == UNAVAILABLE


# ---- isolation ----


def test_paths_are_masked_and_read_only(guest: Guest) -> None:
    box = Container(
        guest,
        "masked",
        "sh",
        "-c",
        "wc -c </proc/meminfo; ls /sys/class | wc -l; echo 1 >/proc/sys/kernel/panic; mount -t tmpfs x /tmp",
        linux={"MaskedPaths": ["/proc/meminfo", "/sys/class", "/not/there"]},
    )
    assert box.read() == b"0\n0\n"
    errors = box.read(errors=True)
    assert b"Read-only" in errors
    assert b"permission denied" in errors
    box.remove()


def test_symlinks_of_the_image_do_not_lead_mounts_out(guest: Guest) -> None:
    # The writable layer of the first container becomes the second one's image, with links in it.
    first = Container(guest, "image", "sleep", "1000")
    assert (
        first.sh("l", "ln -s /../../../../run /out; ln -s ../../../../../run /up; ln -s /loop /loop")[0] == 0
    )
    shared = f"{STATE}/image/rootfs"
    mounts = [mount(f"/{name}/made", "tmpfs", "tmpfs") for name in ("out", "up")]
    config = oci.Spec(
        Version="1.0.2",
        Process=oci.Process(Args=["/bin/busybox", "ls", "-d", "/run/made"], Cwd="/"),
        Root=oci.Root(Path=shared),
        Mounts=mounts,
        Linux=oci.Linux(),
    )
    second = Container(guest, "second", config=config, disks=[])
    assert second.read() == b"/run/made\n"
    second.remove()
    # Seen from the first one: the mount point was made below its own root.
    assert first.sh("s", "ls /run")[1].split() == ["made"]
    config.Mounts = [mount("/loop/x", "tmpfs", "tmpfs")]
    assert "symbolic links" in error(Container, guest, "second", config=config, disks=[])[1]
    first.remove()


def test_devices_are_what_the_spec_allows(guest: Guest) -> None:
    device = oci.LinuxDevice(Path="/dev/nothing", Type="c", Major=1, Minor=3, FileMode=0o640, UID=5, GID=6)
    log = oci.LinuxDevice(Path="/dev/log", Type="c", Major=1, Minor=11, FileMode=0o666)
    script = (
        "stat -c %a:%u:%g:%t:%T /dev/nothing; mknod /tmp/disk b 254 0; head -c 1 /tmp/disk;"
        "ls -l /dev/ptmx | grep -c pts/ptmx; head -c 4 /dev/urandom | wc -c;"
        "(: </dev/log) && echo reads; (: >/dev/log) && echo writes"
    )
    none = oci.LinuxDeviceCgroup(Allow=False, Access="rwm", Major=-1, Minor=-1)
    reads = oci.LinuxDeviceCgroup(Allow=True, Access="r", Type="c", Major=1, Minor=11)
    for rules, may in (([], b"reads\nwrites\n"), ([none], b""), ([none, reads], b"reads\n")):
        box = Container(
            guest,
            "dev",
            "sh",
            "-c",
            script,
            linux={"Devices": [device, log], "Resources": oci.LinuxResources(Devices=rules)},
            mounts=[mount("/tmp", "tmpfs", "tmpfs")],
        )
        assert box.read() == b"640:5:6:1:3\n1\n4\n" + may
        assert b"Operation not permitted" in box.read(errors=True)
        box.remove()


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_the_system_call_filter_holds_for_all_processes(guest: Guest, no_new_privileges: bool) -> None:
    deny = oci.LinuxSyscall(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO", errnoret=1)
    profile = oci.LinuxSeccomp(
        DefaultAction="SCMP_ACT_ALLOW", Architectures=["SCMP_ARCH_X86_64"], Syscalls=[deny]
    )
    script = "mkdir /tmp/x; grep -E '^(CapEff|Seccomp):' /proc/self/status | cut -f2"
    box = Container(
        guest,
        "filter",
        "sleep",
        "1000",
        linux={"Seccomp": profile},
        NoNewPrivileges=no_new_privileges,
        User=ALICE,
    )
    for user, effective in ((ALICE, "0" * 16), (oci.User(), "00000000a80425fb")):
        found = box.sh(f"u{user.UID}", script, User=user, NoNewPrivileges=no_new_privileges)
        assert found[1] == f"{effective}\n2\n"
        assert "not permitted" in found[2]
    box.remove()


def test_what_a_profile_does_not_name_ends_with_its_default_error(guest: Guest) -> None:
    """A profile as Podman's: calls that it does not name are as if the kernel had none of them."""
    names = "execve brk mmap munmap mprotect arch_prctl read write open openat close stat fstat lstat getuid exit_group"
    known = oci.LinuxSyscall(Names=[*names.split(), "openat2"], Action="SCMP_ACT_ALLOW")
    for number, words in ((None, b"Operation not permitted"), (38, b"Function not implemented")):
        profile = oci.LinuxSeccomp(DefaultAction="SCMP_ACT_ERRNO", Syscalls=[known], DefaultErrnoRet=number)
        box = Container(guest, "default", "mkdir", "/x", linux={"Seccomp": profile}, NoNewPrivileges=True)
        assert words in box.read(errors=True)
        box.remove()


def test_a_user_namespace(guest: Guest) -> None:
    mapping = [oci.LinuxIDMapping(HostID=100000, ContainerID=0, Size=65536)]
    box = Container(
        guest,
        "mapped",
        "sleep",
        "1000",
        linux={
            "Namespaces": namespaces("pid", "mount", "ipc", "uts", "cgroup", "user"),
            "UIDMappings": mapping,
            "GIDMappings": mapping,
        },
        mounts=[mount("/tmp", "tmpfs", "tmpfs")],
    )
    status, output, _ = box.sh(
        "e", "cat /proc/self/uid_map; id -u; echo x >/dev/null; touch /tmp/f; stat -c %u /tmp/f"
    )
    assert status == 0
    assert output.split() == ["0", "100000", "65536", "0", "0"]
    box.remove()


def test_mount_options_and_propagation(guest: Guest) -> None:
    lower = f"{STATE}/opts/lower"
    box = Container(
        guest,
        "opts",
        "sh",
        "-c",
        "grep -E ' /(a|b|c|etc) ' /proc/self/mountinfo | cut -d' ' -f5,6,7; cat /etc/passwd; touch /x; hostname; pwd;"
        "cat /proc/sys/kernel/shmmax",
        readonly=True,
        hostname="named",
        Cwd="/made/for/it",
        linux={"Sysctl": {"kernel.shmmax": "12345678"}, "RootfsPropagation": "private"},
        mounts=[
            mount("/a", "bind", lower, "rbind", "rro", "rslave"),
            mount("/b", "bind", f"{lower}/etc/passwd", "bind", "ro", "nosuid", "noexec"),
            mount("/c", "tmpfs", "tmpfs", "ro", "size=1m", "shared"),
            mount("/etc", "tmpfs", "tmpfs", "tmpcopyup", "nodev"),
        ],
    )
    output = box.read().decode().splitlines()
    assert output[0].startswith("/a ro,")
    assert output[1].startswith("/b ro,nosuid,noexec")
    assert output[2].startswith("/c ro,")
    assert "shared:" in output[2]
    assert output[3].startswith("/etc rw,nodev")
    assert output[4].startswith("root:")
    assert output[-3:] == ["named", "/made/for/it", "12345678"]
    assert b"Read-only" in box.read(errors=True)
    box.remove()


# ---- resources ----


def test_limits_pausing_and_statistics(guest: Guest, box: Container) -> None:
    limits = oci.LinuxResources(
        Memory=oci.LinuxMemory(Limit=48 * MIB, Swap=48 * MIB), Pids=oci.LinuxPids(Limit=60)
    )
    guest.tell("UpdateContainer", agent.UpdateContainerRequest(container_id="box", resources=limits))
    group = "/sys/fs/cgroup"
    assert box.sh("max", f"cat {group}/memory.max {group}/pids.max")[1] == f"{48 * MIB}\n60\n"
    guest.tell("PauseContainer", agent.PauseContainerRequest(container_id="box"))
    assert error(box.exec, "cold", "true") == (FAILED_PRECONDITION, 'container "box" is paused')
    guest.tell("ResumeContainer", agent.ResumeContainerRequest(container_id="box"))
    request = agent.StatsContainerRequest(container_id="box")
    stats = guest.ask("StatsContainer", request, agent.StatsContainerResponse).cgroup_stats
    assert stats is not None
    assert stats.memory_stats is not None
    assert stats.memory_stats.usage is not None
    assert stats.pids_stats is not None
    assert stats.memory_stats.usage.limit == 48 * MIB
    assert stats.pids_stats.current > 0


def test_a_kill_for_lack_of_memory_is_told(guest: Guest) -> None:
    small = oci.LinuxResources(Memory=oci.LinuxMemory(Limit=8 * MIB, Swap=8 * MIB))
    told = Background(guest.ask, "GetOOMEvent", agent.GetOOMEventRequest(), agent.OOMEvent)
    hungry = Container(guest, "hungry", "sh", "-c", "tail /dev/zero", linux={"Resources": small})
    assert hungry.wait() == 137
    assert told.result().container_id == "hungry"
    request = agent.StatsContainerRequest(container_id="hungry")
    stats = guest.ask("StatsContainer", request, agent.StatsContainerResponse).cgroup_stats
    assert stats is not None
    assert stats.memory_stats is not None
    assert stats.memory_stats.stats["oom_kill"] >= 1
    hungry.remove()


def test_a_paused_container_can_be_killed(guest: Guest) -> None:
    frozen = Container(guest, "frozen", "sleep", "1000")
    guest.tell("PauseContainer", agent.PauseContainerRequest(container_id="frozen"))
    frozen.kill(9)
    assert frozen.wait() == 137
    frozen.remove()


# ---- extensions, and the end ----


def test_files_and_processes_of_a_container(guest: Guest, box: Container) -> None:
    assert box.sh("file", "echo hello >/tmp/file")[0] == 0
    stat = ext.StatFileRequest(container_id="box", path=b"/tmp/file")
    info = guest.client.call("kata.agent.v1.Files", "Stat", stat, ext.FileInfo)
    assert (info.name, info.size) == (b"file", 6)
    read = ext.ReadFileRequest(container_id="box", path=b"/tmp/file", len=100)
    assert guest.client.call("kata.agent.v1.Files", "Read", read, ext.ReadFileResponse).data == b"hello\n"
    listed = guest.client.call(
        "kata.agent.v1.Processes",
        "List",
        ext.ListProcessesRequest(container_id="box"),
        ext.ListProcessesResponse,
    )
    assert any(process.command[:1] == [b"sh"] for process in listed.processes)
    times = guest.client.call("kata.agent.v1.Boot", "Times", ext.BootTimesRequest(), ext.BootTimesResponse)
    assert 0 < times.kernel_ns < times.ready_ns


def test_files_of_a_stopped_container(guest: Guest) -> None:
    done = Container(guest, "done", "sh", "-c", "echo kept >/file")
    assert done.wait() == 0
    read = ext.ReadFileRequest(container_id="done", path=b"/file", len=100)
    assert guest.client.call("kata.agent.v1.Files", "Read", read, ext.ReadFileResponse).data == b"kept\n"
    done.remove()


def test_what_is_not_there_is_said(guest: Guest) -> None:
    # This guest's initrd has no programs but the agent.
    code, words = error(guest.tell, "GetIPTables", agent.GetIPTablesRequest())
    assert (code, "--extension" in words) == (FAILED_PRECONDITION, True)
    assert error(guest.tell, "SetPolicy", agent.SetPolicyRequest(policy="package x"))[0] == INVALID_ARGUMENT
    details = guest.ask("GetGuestDetails", agent.GuestDetailsRequest(), agent.GuestDetailsResponse)
    assert details.agent_details
    assert {"kata.files", "kata.processes", "kata.boot"} <= set(details.agent_details.extra_features)


def test_the_agent_stays_small(guest: Guest) -> None:
    watcher = Container(
        guest,
        "watcher",
        "sleep",
        "1000",
        mounts=[mount("/guest", "bind", "/proc", "rbind")],
        linux={"MaskedPaths": [], "ReadonlyPaths": []},
        Capabilities=caps(PRIVILEGED),
    )

    def anonymous(name: str) -> int:
        # By a process that is still there when the agent is idle again.
        script = "sleep 3; grep ^Anonymous: /guest/1/smaps_rollup"
        return int(watcher.sh(name, script, Capabilities=caps(PRIVILEGED))[1].split()[1])

    before = anonymous("before")
    for number in range(100):
        assert watcher.run(f"x{number}", "true")[0] == 0
    after = anonymous("after")
    assert before <= 300
    assert after - before <= 16
    watcher.remove()


def test_the_end_of_the_sandbox_is_the_end_of_the_machine(
    run_directory: Path, guest_assets: Path, busybox_image: str
) -> None:
    guest = Guest(run_directory, guest_assets, busybox_image)
    try:
        guest.tell("CreateSandbox", agent.CreateSandboxRequest(hostname="pod", sandbox_pidns=True))
        one = Container(guest, "one", "sh", "-c", "(sleep 1001 &) ; exec sleep 1002", hostname="")
        two = Container(guest, "two", "sleep", "1003", hostname="")
        show = "hostname; ps | grep -c 'sleep [1]00'; readlink /proc/self/ns/ipc"
        seen = two.sh("e", show)[1].split()
        assert seen[:2] == ["pod", "3"]
        assert one.sh("e", show)[1].split() == seen
        # The processes of a dead init end with it, also in a namespace that lives on.
        one.kill(9)
        assert one.wait() == 137
        one.remove()
        assert two.sh("f", "ps | grep -c 'sleep [1]00'")[1] == "1\n"
        guest.tell("DestroySandbox", agent.DestroySandboxRequest())
        assert guest.wait_end() == 0
        assert "Power down" in guest.read_console() or "reboot" in guest.read_console()
    finally:
        guest.close()
