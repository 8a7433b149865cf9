"""`kata run` against real virtual machines: exit codes, streams, options."""

from __future__ import annotations

import array
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from waiting import Reader, until

from kata.hypervisor import kvmprobe


def run(kata: Kata, image: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    *options, script = arguments
    return kata.call("run", "--rm", *options, image, "sh", "-c", script, stdin=stdin)


def out(kata: Kata, image: str, *arguments: str) -> str:
    done = run(kata, image, *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


# ---- exit codes and streams ----


def test_the_guest_has_a_kernel_of_its_own(shared_kata: Kata, busybox_image: str) -> None:
    version = out(shared_kata, busybox_image, "uname -r").strip()
    assert version
    assert version != platform.release()


@pytest.mark.parametrize("code", [1, 125, 255])
def test_the_exit_code_is_the_commands_own(shared_kata: Kata, busybox_image: str, code: int) -> None:
    assert run(shared_kata, busybox_image, f"exit {code}").returncode == code


def test_a_signal_is_128_plus_its_number(shared_kata: Kata, busybox_image: str) -> None:
    # The first process of a pid namespace ignores what it does not handle, so a child is killed.
    assert run(shared_kata, busybox_image, "sh -c 'kill -9 $$'; exit $?").returncode == 137


def test_stdout_and_stderr_stay_apart(shared_kata: Kata, busybox_image: str) -> None:
    done = run(shared_kata, busybox_image, "printf 'a\\0b'; printf 'c\\nd' >&2")
    assert done.stdout == b"a\0b"
    assert done.stderr.endswith(b"c\nd")


def test_output_is_complete_when_the_command_ends_at_once(shared_kata: Kata, busybox_image: str) -> None:
    done = run(shared_kata, busybox_image, "yes 0123456789abcde | head -c 1048576")
    assert done.returncode == 0
    assert done.stdout == b"0123456789abcde\n" * 65536


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-"])
def test_closed_standard_descriptors_are_null_devices(
    shared_kata: Kata, busybox_image: str, closed: str
) -> None:
    """No connection takes their numbers: neither is the output sent to the engine, nor are answers of its read."""
    script = "cat; echo out; echo err >&2; exit 7"
    command = shared_kata.command("run", "--rm", "-i", busybox_image, "sh", "-c", script)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command],
        input=b"in\n",
        env=shared_kata.env,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == (b"in\nout\n" if closed == "2>&-" else b"")
    assert done.stderr.endswith(b"err\n") == (closed != "2>&-")
    assert shared_kata.sandboxes() == []
    assert json.loads(shared_kata.ok("ps", "-a", "--json")) == []


def _modes(directory: Path) -> dict[str, int]:
    """Modes of what lies below a directory, by path; the random parts of the names left out."""
    found = {}
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            name = re.sub(r"[0-9a-f]{12,}|(?<=names/)\w+", "X", str(path.relative_to(directory)))
            found[name] = stat.S_IMODE(path.stat().st_mode)
    return found


def test_the_callers_umask_and_limits_leave_no_trace(
    run_directory: Path, guest_assets: Path, busybox_image: str
) -> None:
    found = []
    for umask in ("000", "077"):
        kata = Kata(run_directory / f"umask{umask}", guest_assets)
        command = kata.command("run", "-d", busybox_image, "sleep", "600")
        try:
            # Too few descriptors are refused before anything is made.
            few = ["sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *command]
            done = subprocess.run(few, env=kata.env, capture_output=True, check=False)
            assert (done.returncode, kata.directory.exists()) == (125, False), done.stderr
            assert b"hint: raise it in the shell ('ulimit -n" in done.stderr
            limited = ["sh", "-c", f'umask {umask}; ulimit -Sn 100; exec "$@"', "sh", *command]
            name = subprocess.run(limited, env=kata.env, capture_output=True, check=True).stdout.decode()
            limits = Path(f"/proc/{kata.engine_pid(name.strip())}/limits").read_text()
            assert int(re.findall(r"Max open files\s+(\d+)", limits)[0]) >= 256
            modes = {**_modes(kata.state_dir), **{f"run/{k}": v for k, v in _modes(kata.run_dir).items()}}
            assert [name for name, mode in modes.items() if mode & 0o022] == []
            found.append(modes)
        finally:
            kata.clear()
            shutil.rmtree(kata.directory, ignore_errors=True)
    assert found[0] == found[1]


def test_a_slow_reader_loses_nothing(shared_kata: Kata, busybox_image: str) -> None:
    """Three megabytes fit into no pipe: the container has long wanted to end when the reader begins."""
    process = shared_kata.start(
        "run", "--rm", busybox_image, "sh", "-c", "yes 0123456789abcde | head -c 3145728"
    )
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    full = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
    waiting = array.array("i", [0])

    def is_full() -> bool:
        fcntl.ioctl(pipe, termios.FIONREAD, waiting)
        return waiting[0] == full

    until(is_full, "our pipe is full")
    time.sleep(1)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert len(stdout) == 3145728


def test_a_quarter_gigabyte_passes_through_unharmed(shared_kata: Kata, busybox_image: str) -> None:
    block = os.urandom(1 << 20)
    count = 256
    expected = hashlib.sha256()
    for _ in range(count):
        expected.update(block)
    process = shared_kata.start("run", "--rm", "-i", busybox_image, "cat")
    assert process.stdin is not None
    assert process.stdout is not None

    def feed() -> None:
        assert process.stdin is not None
        for _ in range(count):
            process.stdin.write(block)
        process.stdin.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    seen, length = hashlib.sha256(), 0
    while data := process.stdout.read(1 << 20):
        seen.update(data)
        length += len(data)
    feeder.join()
    assert process.wait(timeout=60) == 0
    assert length == count << 20
    assert seen.hexdigest() == expected.hexdigest()
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()


def test_without_i_the_commands_stdin_is_empty(shared_kata: Kata, busybox_image: str) -> None:
    done = run(shared_kata, busybox_image, "cat; echo end", stdin=b"not for you")
    assert done.stdout == b"end\n"


def test_what_a_process_finds_that_nobody_has_set(shared_kata: Kata, busybox_image: str) -> None:
    """Nothing to read where nobody writes; limits and sizes as on a host, in a machine as small as its container."""
    asked = (
        "vm/overcommit_memory",
        "vm/max_map_count",
        "kernel/pid_max",
        "fs/nr_open",
        "kernel/threads-max",
    )
    look = (
        "readlink /proc/self/fd/0; stat -c %u /dev/null; ulimit -n; ulimit -Hn; ulimit -n 200000 && ulimit -n;"
        f" ulimit -u; cd /proc/sys; cat {' '.join(asked)}"
    )
    expected = ["/dev/null", "0", "1024", "1048576", "200000", "unlimited"]
    expected += ["1", "1048576", "4194304", "1073741816", "1048576"]
    options = ("-m", "64m", "-u", "1000", "--name", "finds")
    assert shared_kata.ok("run", "-d", *options, busybox_image, "sh", "-c", f"{look}; sleep 1000")
    try:
        assert shared_kata.ok("exec", "finds", "sh", "-c", look).splitlines() == expected
        assert shared_kata.ok("logs", "finds").splitlines() == expected
        # A link or a pipe in its place is not followed, and holds nobody up.
        replace = "rm /dev/null && mkfifo /dev/null; exit 0"
        shared_kata.ok("exec", "-u", "0", "finds", "sh", "-c", replace)
        assert shared_kata.ok("exec", "finds", "cat", timeout=60) == ""
    finally:
        shared_kata.ok("rm", "-f", "finds")


def test_a_process_beside_groups_of_the_containers_own(shared_kata: Kata, busybox_image: str) -> None:
    """systemd as PID 1 and nested engines make groups with controllers: their parent takes no process any more."""
    groups = (
        "cd /sys/fs/cgroup; mkdir init; echo 1 > init/cgroup.procs; echo +memory +pids > cgroup.subtree_control;"
        " echo made; sleep 1000"
    )
    options = ("--privileged", "--name", "grouped", "--pids-limit", "50")
    shared_kata.ok("run", "-d", *options, busybox_image, "sh", "-c", groups)
    try:
        until(lambda: "made" in shared_kata.ok("logs", "grouped"), "the groups are made")
        assert shared_kata.ok("exec", "grouped", "cat", "/proc/self/cgroup") == "0::/init\n"
        assert shared_kata.ok("exec", "grouped", "cat", "/sys/fs/cgroup/pids.max") == "50\n"
    finally:
        shared_kata.ok("rm", "-f", "grouped")


def test_a_closed_stdin_of_the_command_does_not_hang_us(shared_kata: Kata, busybox_image: str) -> None:
    done = run(shared_kata, busybox_image, "-i", "head -c 3", stdin=b"x" * (4 << 20))
    assert done.returncode == 0
    assert done.stdout == b"xxx"


def test_a_terminal_is_a_terminal(shared_kata: Kata, busybox_image: str) -> None:
    controller, terminal = os.openpty()
    os.set_blocking(controller, False)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    process = shared_kata.start(
        "run", "--rm", "-it", busybox_image, "sh", stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    terminal_shows = Reader(controller).until
    terminal_shows(b"# ")
    os.write(controller, b"stty size; tty; test -t 0 && echo in-$((40+2))\n")
    terminal_shows(b"33 77")
    terminal_shows(b"/dev/pts/")
    terminal_shows(b"in-42")
    # Ctrl-C reaches the foreground process inside, not us.
    os.write(controller, b"sleep 1000\n")
    time.sleep(1)
    os.write(controller, b"\x03")
    os.write(controller, b"echo still-$((1+1))\n")
    terminal_shows(b"still-2")
    os.write(controller, b"exit 7\n")
    assert process.wait(timeout=60) == 7
    os.close(controller)


def test_signals_are_passed_on(shared_kata: Kata, busybox_image: str) -> None:
    process = shared_kata.start(
        "run",
        "--rm",
        busybox_image,
        "sh",
        "-c",
        "trap 'echo got it; exit 9' TERM; echo ready; while :; do sleep 0.1; done",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    stdout, _ = process.communicate(timeout=60)
    assert stdout == b"got it\n"
    assert process.returncode == 9


# ---- options ----


def test_environment_directory_user_and_host_name(shared_kata: Kata, busybox_image: str) -> None:
    shown = out(
        shared_kata, busybox_image, "-e", "A=1 2", "-w", "/tmp", "-u", "1000:2000", "-h", "box",
        'echo "$A|$PWD|$(id -u):$(id -g)|$(hostname)|$HOSTNAME"',
    )  # fmt: skip
    assert shown == "1 2|/tmp|1000:2000|box|box\n"


def test_the_image_says_what_to_run(shared_kata: Kata, busybox_image: str) -> None:
    done = shared_kata.call("run", "--rm", "-i", busybox_image, stdin=b"echo from the shell\n")
    assert done.stdout == b"from the shell\n"


def test_entrypoint_replaces_the_images(shared_kata: Kata, busybox_image: str) -> None:
    assert shared_kata.ok("run", "--rm", "--entrypoint", "/bin/echo", busybox_image, "a", "b") == "a b\n"


def test_a_read_only_root_with_a_writable_tmpfs(shared_kata: Kata, busybox_image: str) -> None:
    shown = out(
        shared_kata, busybox_image, "--read-only", "--tmpfs", "/scratch:size=1m",
        "touch /x 2>&1 | grep -c Read-only; touch /scratch/x && df -m /scratch | tail -1 | awk '{print $2}'",
    )  # fmt: skip
    assert shown.split() == ["1", "1"]


def test_capabilities(shared_kata: Kata, busybox_image: str) -> None:
    script = "grep CapEff /proc/self/status | cut -f2"
    default = int(out(shared_kata, busybox_image, script), 16)
    assert default == 0xA80425FB  # Docker's default set
    assert (
        int(out(shared_kata, busybox_image, "--cap-drop", "ALL", "--cap-add", "net_admin", script), 16)
        == 1 << 12
    )


_LINES_OF_INTEREST = """
mkdir -p /full && mount -t tmpfs none /full && dd if=/dev/zero of=/full/x bs=1M count=64 2>/dev/null
rm /full/x; sleep 4
echo $(cat /sys/devices/system/clockevents/clockevent0/current_device) acpi $(dmesg | grep -c 'ACPI: DSDT.*BOCHS')
cd /sys/bus/virtio/drivers/virtio_balloon && name=$(ls -d virtio*) && grep -w $name /proc/interrupts
"""


@pytest.mark.skipif(kvmprobe.probe().works, reason="is about emulated machines, and this machine has KVM")
def test_a_machine_with_little_of_acpi_ticks_and_gives_memory_back(
    shared_kata: Kata, busybox_image: str
) -> None:
    first, *lines = out(shared_kata, busybox_image, "--privileged", _LINES_OF_INTEREST).splitlines()
    assert re.fullmatch(r"hpet\d* acpi 0", first)
    # Pages that the host is told of are acknowledged by interrupts; with QEMU 7.2, not message signalled ones.
    assert sum(int(line.split()[1]) for line in lines) > 0, lines


def test_privileged_owns_its_guest_only(shared_kata: Kata, busybox_image: str) -> None:
    shown = out(
        shared_kata, busybox_image, "--privileged",
        "mkdir /m && mount -t tmpfs none /m && echo mounted; grep Seccomp: /proc/self/status",
    )  # fmt: skip
    assert shown.split() == ["mounted", "Seccomp:", "0"]


_TRIED = {
    "loop device": "mke2fs -F /i && mount -o loop /i /m && ls -d /m/lost+found && umount /m",
    "nine loop devices": "mknod /dev/loop8 b 7 8 && for n in 0 1 2 3 4 5 6 7 8; do losetup -f /i || exit; done;"
    " losetup /dev/loop8 && for n in 0 1 2 3 4 5 6 7 8; do losetup -d /dev/loop$n || exit; done",
    "overlay": "mount -t tmpfs t /t && mkdir /t/u /t/w"
    " && mount -t overlay -o lowerdir=/bin,upperdir=/t/u,workdir=/t/w o /m && ls /m/sh",
    "tun": "exec 3<>/dev/net/tun",
    "fuse": "exec 3<>/dev/fuse",
    "kernel log": "echo here > /dev/kmsg && dmesg | grep here",
    "bridge": "ip link add kt0 type bridge",
    "veth": "ip link add kt1 type veth peer name kt2",
    "vxlan": "ip link add kt3 type vxlan id 1 dstport 4789",
    "dummy": "ip link add kt4 type dummy",
    "macvlan": "ip link add kt5 link kt4 type macvlan",
    "vlan": "ip link add kt6 link kt4 type vlan id 5",
    "namespaces": "unshare -m -u -i -n -p -f --mount-proc sh -c 'ps | grep -c .'",
    "user namespace": "unshare -U -r true",
    "cgroup": "mkdir /sys/fs/cgroup/kt && echo $$ > /sys/fs/cgroup/kt/cgroup.procs",
    "sysctl": "echo 1 > /proc/sys/net/ipv4/ip_forward",
}
"""What docs/clients.md promises a privileged container."""


def test_what_a_privileged_container_can_do(shared_kata: Kata, busybox_image: str) -> None:
    script = "mkdir /m /t; dd if=/dev/zero of=/i bs=1M count=4 2>/dev/null\n" + "\n".join(
        f'({command}) >/out 2>&1 || echo "{what}: $(cat /out)"' for what, command in _TRIED.items()
    )
    # Beside it: on the user network nobody may say who the router is.
    script += "\necho tried; cat /proc/sys/net/ipv6/conf/eth0/accept_ra"
    assert out(shared_kata, busybox_image, "--privileged", "--network", "user", script) == "tried\n0\n"


def test_the_default_profile_confines(shared_kata: Kata, busybox_image: str) -> None:
    shown = out(
        shared_kata, busybox_image,
        "grep Seccomp: /proc/self/status; mount -t tmpfs none /mnt 2>/dev/null && echo mounted;"
        " echo 1 > /proc/sys/kernel/sysrq && echo written; cat /proc/kcore | wc -c;"
        " mknod /tmp/d b 254 0 && cat /tmp/d || echo refused",
    )  # fmt: skip
    lines = shown.splitlines()
    assert lines[0].split() == ["Seccomp:", "2"]
    assert "mounted" not in lines
    assert "written" not in lines
    assert lines[-2:] == ["0", "refused"]


def test_limits(shared_kata: Kata, busybox_image: str) -> None:
    shown = out(
        shared_kata, busybox_image, "--cpus", "1.5", "-m", "128m", "--pids-limit", "17",
        "nproc; cd /sys/fs/cgroup; cat cpu.max memory.max pids.max; awk '/MemTotal/{print $2}' /proc/meminfo",
    )  # fmt: skip
    nproc, quota, memory, pids, total = shown.splitlines()
    assert nproc == "2"
    assert quota == "150000 100000"
    assert int(memory) == 128 << 20
    assert pids == "17"
    assert int(total) * 1024 >= 128 << 20


def test_a_fork_bomb_stays_in_its_limit(shared_kata: Kata, busybox_image: str) -> None:
    done = run(
        shared_kata,
        busybox_image,
        "--pids-limit",
        "8",
        "for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; wait",
    )
    assert b"fork" in done.stderr.lower()


def test_out_of_memory_is_told(shared_kata: Kata, busybox_image: str) -> None:
    shared_kata.ok(
        "run", "-d", "--name", "eater", "-m", "32m", busybox_image, "sh", "-c", "exec tail /dev/zero"
    )
    try:
        assert shared_kata.ok("wait", "eater") == "137\n"
        state = json.loads(shared_kata.ok("inspect", "eater"))[0]["state"]
        assert state["oom_killed"] is True
    finally:
        shared_kata.ok("rm", "-f", "eater")


def test_a_plain_directory_is_a_root_file_system_that_stays_as_it_is(
    shared_kata: Kata, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin" / "busybox").chmod(0o755)
    (root / "bin" / "sh").symlink_to("busybox")
    shown = shared_kata.ok(
        "run", "--rm", f"rootfs:{root}", "/bin/sh", "-c", "echo new > /made; /bin/busybox cat /made"
    )
    assert shown == "new\n"
    assert sorted(os.listdir(root)) == ["bin"]


def test_the_storage_size_is_a_limit(shared_kata: Kata, busybox_image: str) -> None:
    done = run(
        shared_kata, busybox_image, "--storage-size", "32m", "dd if=/dev/zero of=/big bs=1M count=64 2>&1"
    )
    assert done.returncode != 0
    assert b"No space left" in done.stdout


def test_a_writable_layer_in_memory(shared_kata: Kata, busybox_image: str) -> None:
    shown = out(shared_kata, busybox_image, "--storage", "tmpfs", "echo x > /made && cat /made")
    assert shown == "x\n"


def test_timings_tell_where_the_start_went(shared_kata: Kata, busybox_image: str) -> None:
    done = run(shared_kata, busybox_image, "--timings", "true")
    assert done.returncode == 0
    shown = done.stderr.decode()
    for step in ("engine", "client", "start monitor", "agent", "root file system", "process"):
        assert step in shown, shown
    path = next(line for line in shown.splitlines() if line.startswith("  start: "))
    assert ("  restore " if path == "  start: template" else "  kernel ") in shown, shown


def test_the_start_ledger_is_there_while_it_runs_and_after(shared_kata: Kata, busybox_image: str) -> None:
    shared_kata.ok("run", "-d", "--name", "ledger", busybox_image, "sleep", "1000")
    try:
        (running,) = json.loads(shared_kata.ok("inspect", "ledger"))
        shared_kata.ok("kill", "ledger")
        shared_kata.ok("wait", "ledger")
        (ended,) = json.loads(shared_kata.ok("inspect", "ledger"))
    finally:
        shared_kata.ok("rm", "-f", "ledger")
    for start in (running["start"], running["sandbox"]["start"], ended["start"]):
        assert start["path"] in ("cold", "template")
        steps = {one["name"]: one for one in start["steps"]}
        assert {"engine", "load engine", "agent", "root file system", "process"} <= set(steps)
        assert steps["interpreter"]["part_of"] == "engine"
        assert 0 < steps["client"]["duration_seconds"] <= steps["engine"]["duration_seconds"]
    assert ended["start"] == running["start"]


def _with_config(source: Path, target: Path, **config: Any) -> str:
    """A copy of an image layout whose configuration says more."""
    shutil.copytree(source, target)
    blobs = target / "blobs" / "sha256"

    def put(content: Any) -> dict[str, Any]:
        data = json.dumps(content).encode()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    index = json.loads((target / "index.json").read_text())
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    content = json.loads((blobs / manifest["config"]["digest"][7:]).read_text())
    content["config"] = {**content.get("config", {}), **config}
    manifest["config"] |= put(content)
    index["manifests"] = [{**index["manifests"][0], **put(manifest)}]
    (target / "index.json").write_text(json.dumps(index))
    return f"oci:{target}"


def test_volumes_of_an_image(shared_kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    """Their directories are there, and what the image has at such a path, with owner and mode."""
    volumes: dict[str, Any] = {"/data/deep": {}, "/etc": {}, "/given/": {}}
    image = _with_config(Path(busybox_image.partition(":")[2]), tmp_path / "layout", Volumes=volumes)
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "file").write_text("mine\n")
    script = "test -f /etc/passwd; cat /given/file; stat -c '%U %a' /data/deep; echo x > /data/deep/file"
    mount = f"{tmp_path}/given:/given:cached,rslave"
    said = shared_kata.ok("run", "--rm", "-v", mount, image, "sh", "-ec", script)
    assert said.splitlines() == ["mine", "root 755"]
    # In a read-only container they can be written to all the same, as disks of their own.
    mount = f"{tmp_path}/given:/given:ro"
    said = shared_kata.ok(
        "run", "--name", "locked", "--read-only", "-v", mount, image, "sh", "-ec", f"{script}; echo >/etc/x"
    )
    assert said.splitlines() == ["mine", "root 755"]
    shared_kata.ok("rm", "-v", "locked")


def test_options_of_docker_that_end_in_the_guest(
    shared_kata: Kata, busybox_image: str, tmp_path: Path
) -> None:
    """One machine for all of them: limits, names, groups, security, time zone, environment, the id's file."""
    script = (
        "ulimit -Sn; ulimit -Hn; df -k /dev/shm | tail -1 | awk '{print $2}'; grep Groups /proc/self/status;"
        " grep -c '192.0.2.7.db$' /etc/hosts; cat /etc/resolv.conf; cat /proc/sys/net/core/somaxconn;"
        " awk '/NoNewPrivs|^Seccomp:/{print $2}' /proc/self/status; echo $FROM_HOST; date -d @0 +%H;"
        " cat /sys/fs/cgroup/cpu.weight; cat /sys/fs/cgroup/memory.low"
    )
    id_file = tmp_path / "id"
    options = [
        *(
            "--ulimit",
            "nofile=100:200",
            "--shm-size",
            "1m",
            "--group-add",
            "77",
            "--group-add",
            "users",
            "--add-host",
            "db:192.0.2.7",
        ),
        *("--dns", "192.0.2.53", "--dns-search", "example.org", "--dns-option", "ndots:2"),
        *("--sysctl", "net.core.somaxconn=123", "--security-opt", "no-new-privileges", "--security-opt"),
        *("seccomp=unconfined", "--tz", "Asia/Tokyo", "--env-host", "--cpu-shares", "2048"),
        *("--memory-reservation", "16m", "--label", "kind=test", "--cidfile", str(id_file), "-q"),
    ]
    command = shared_kata.command("run", "--name", "all", *options, busybox_image, "sh", "-c", script)
    env = {**shared_kata.env, "FROM_HOST": "yes"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    try:
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[:3] == ["100", "200", "1024"]
        assert lines[3].split() == ["Groups:", "0", "77", "100"]
        assert lines[4] == "1"
        assert sorted(lines[5:8]) == ["nameserver 192.0.2.53", "options ndots:2", "search example.org"]
        assert lines[8:] == ["123", "1", "0", "yes", "09", "174", str(16 << 20)]
        [found] = json.loads(shared_kata.ok("inspect", "all"))
        assert found["labels"]["kind"] == "test"
        assert found["id"] == id_file.read_text()
        again = shared_kata.call("run", "--rm", "--cidfile", str(id_file), busybox_image, "true")
        assert again.returncode == 125
        assert b"is there already" in again.stderr
    finally:
        shared_kata.call("rm", "-f", "all")
