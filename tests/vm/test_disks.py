"""Disks of the host in a guest: devices of a specification, and root file systems that are on disks."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from containerd_support import IMAGE, RUNTIME, SECOND, Containerd, clean, running
from waiting import until

from kata.engine.client import EngineClient
from kata.hypervisor import accel

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BLOCKFILE = """\
[plugins."io.containerd.snapshotter.v1.blockfile"]
root_path = "{directory}/blockfile"
scratch_file = "{scratch}"
fs_type = "ext4"
mount_options = []
"""


@pytest.fixture(scope="module")
def daemon(
    run_directory: Path, guest_assets: Path, busybox_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Containerd]:
    scratch = tmp_path_factory.mktemp("blockfile") / "scratch"
    with scratch.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", scratch], check=True)
    # Debian 12's containerd is older than the blockfile snapshotter.
    second = (SECOND / "containerd").exists()
    plugins = BLOCKFILE.replace("{scratch}", str(scratch))
    with running(run_directory, guest_assets, busybox_image, second=second, plugins=plugins) as one:
        yield one


@pytest.fixture(autouse=True)
def _clean(daemon: Containerd) -> Iterator[None]:
    """A test that failed leaves nothing to its next try, or to the tests after it."""
    yield
    clean(daemon)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A block device of 8 MiB."""
    image = tmp_path / "device"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    made = subprocess.run(
        ["losetup", "--find", "--show", image], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"needs loop devices: {made.stderr.strip()}")
    node = made.stdout.strip()
    try:
        yield node
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)


def test_a_device_of_the_host(daemon: Containerd, device: str) -> None:
    script = f"echo from the guest | dd of={device} conv=fsync 2>/dev/null; cat /sys/class/block/*/size"
    done = daemon.run("one", "sh", "-c", script, options=("--device", device))
    assert done.returncode == 0, done.stderr
    assert str((8 << 20) // 512) in done.stdout.decode().split()
    assert Path(device).read_bytes()[:15] == b"from the guest\n"


def test_of_the_hosts_disks_the_sandbox_may_open_its_own(daemon: Containerd, device: str) -> None:
    daemon.detached("held", "sleep", "1000", options=("--device", device))
    with EngineClient(str(daemon.run_dir / "sandboxes/default.held/engine.sock")) as engine:
        groups = engine.describe()["host_cgroups"]
    other = Path(device).stat().st_rdev
    # From within the sandbox's cgroup. The other disk is a number without a driver: what is asked first are the rules.
    node = daemon.directory / "other-disk"
    os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(os.major(other), 250))
    script = 'for i in $1; do echo $$ >"$i/cgroup.procs"; done; for i in $2; do true <"$i" && echo "$i"; done; true'
    leaves = " ".join(sorted({groups[name] for name in ("memory", "devices") if name in groups}))
    done = subprocess.run(
        ["sh", "-c", script, "sh", leaves, f"{device} /dev/null {node}"],
        capture_output=True,
        text=True,
        check=False,
    )
    node.unlink()
    assert done.stdout.split() == [device, "/dev/null"], done.stderr
    assert "Operation not permitted" in done.stderr
    daemon.remove("held")


def test_limits_of_a_device_hold_in_the_guest(daemon: Containerd, device: str) -> None:
    """By its number there; those of a disk that the container has not are named in the log."""
    about = os.stat(device).st_rdev
    numbers = {"major": os.major(about), "minor": os.minor(about)}
    spec = daemon.spec({})
    spec["linux"]["namespaces"].append({"type": "cgroup"})
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"})
    spec["linux"]["devices"] = [{"path": "/dev/disk", "type": "b", **numbers}]
    spec["linux"]["resources"] = {
        "devices": [
            {"allow": False, "access": "rwm"},
            {"allow": True, "type": "b", **numbers, "access": "rwm"},
        ],
        "blockIO": {
            "throttleReadBpsDevice": [{**numbers, "rate": 2 << 20}],
            "throttleWriteIOPSDevice": [{**numbers, "rate": 100}, {"major": 8, "minor": 250, "rate": 5}],
        },
    }
    daemon.run_spec("limited", spec)
    script = "b=/bin/busybox; $b ls -l /dev/disk; $b cat /sys/fs/cgroup/io.max"
    inside = ("task", "exec", "--exec-id", "e", "limited", "/bin/busybox")
    shown = daemon.ok(*inside, "sh", "-c", script).split()
    there = f"{shown[4].rstrip(',')}:{shown[5]}"
    assert shown[10:] == [there, "rbps=2097152", "wbps=max", "riops=max", "wiops=100"]
    began = time.monotonic()
    daemon.ok(*inside, "dd", "if=/dev/disk", "of=/dev/null", "bs=1M")
    assert time.monotonic() - began > 2  # 8 MiB
    log = (daemon.run_dir / "sandboxes/default.limited/engine.log").read_text()
    assert "limits of writes to the host's devices cannot be carried into the guest" in log
    assert "limits of bytes read from the host's devices" not in log
    daemon.remove("limited")


def test_a_device_that_is_not_there(daemon: Containerd, device: str) -> None:
    spec = daemon.spec({})
    spec["linux"]["devices"] = [{"path": "/dev/none", "type": "b", "major": 259, "minor": 4000}]
    path = daemon.directory / "none.json"
    path.write_text(json.dumps(spec))
    done = daemon.ctr("run", "--rm", "--runtime", RUNTIME, "--config", str(path), "none")
    assert done.returncode != 0
    assert b"no block device 259:4000" in done.stderr


def test_a_device_as_a_volume(daemon: Containerd, device: str) -> None:
    """Kubernetes' hostPath of the types BlockDevice and CharDevice, `docker -v /dev/null:...`."""
    mounts = [
        *("--mount", f"type=bind,src={device},dst=/dev/volume,options=rbind:rw"),
        *("--mount", "type=bind,src=/dev/null,dst=/etc/hidden,options=rbind:ro"),
        *("--mount", "type=bind,src=/dev/zero,dst=/dev/nothing,options=rbind:rw"),
    ]
    script = (
        "echo as a volume | dd of=/dev/volume conv=fsync 2>/dev/null; wc -c </etc/hidden;"
        " head -c 3 /dev/nothing | od -An -tx1; ls -l /etc/hidden /dev/nothing"
    )
    done = daemon.run("one", "sh", "-c", script, options=("--privileged", *mounts))
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode()
    assert shown.split()[:4] == ["0", "00", "00", "00"]
    assert [line.split()[4:6] for line in shown.splitlines()[2:]] == [["1,", "5"], ["1,", "3"]]
    assert Path(device).read_bytes()[:12] == b"as a volume\n"


def test_devices_that_the_guest_has_itself(daemon: Containerd) -> None:
    nodes = [word for node in ("fuse", "net/tun") for word in ("--device", f"/dev/{node}")]
    script = "exec 3<>/dev/fuse 4<>/dev/net/tun && ls -l /dev/fuse /dev/net/tun"
    done = daemon.run("one", "sh", "-c", script, options=tuple(nodes))
    assert done.returncode == 0, done.stderr
    assert [line.split()[4:6] for line in done.stdout.decode().splitlines()] == [
        ["10,", "229"],
        ["10,", "200"],
    ]


@pytest.mark.parametrize(
    ("volume", "said"),
    [
        (
            "device",
            "cannot give the container the device /dev/vcs9: the character device 7:9 is this host's",
        ),
        ("bind", "it is the character device 7:9 of this host, and the container runs on another kernel"),
        ("fifo", "it is a fifo of this host"),
    ],
)
def test_what_only_the_host_has_is_refused_by_name(
    daemon: Containerd, tmp_path: Path, volume: str, said: str
) -> None:
    spec = daemon.spec({})
    path = tmp_path / volume
    if volume == "device":
        spec["linux"]["devices"] = [{"path": "/dev/vcs9", "type": "c", "major": 7, "minor": 9}]
    else:
        mount = {"type": "bind", "source": str(path), "destination": "/dev/it", "options": ["rbind"]}
        spec["mounts"].append(mount)
    if volume == "bind":
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(7, 9))
    elif volume == "fifo":
        os.mkfifo(path)
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    done = daemon.ctr("run", "--rm", "--runtime", RUNTIME, "--config", str(file), "refused")
    assert done.returncode != 0
    assert said in done.stderr.decode()


def test_a_root_file_system_on_a_disk(daemon: Containerd) -> None:
    plugins = daemon.ok("plugins", "ls")
    if not any("blockfile" in line and "ok" in line.split() for line in plugins.splitlines()):
        pytest.skip("needs a containerd with the blockfile snapshotter (1.7 or newer)")
    options = ("run", "--rm", "--runtime", RUNTIME, "--snapshotter", "blockfile")
    shown = daemon.ok(
        *options, IMAGE, "one", "sh", "-c", "echo kept > /made; cat /made; grep ' / ' /proc/mounts"
    )
    kept, mount = shown.splitlines()
    assert kept == "kept"
    assert " ext4 rw" in mount
    assert "/dev/vd" in mount


def test_a_root_of_erofs_layers(daemon: Containerd) -> None:
    """containerd mounts the layers when it has started the shim, where the engine cannot see them."""
    plugins = daemon.ok("plugins", "ls")
    if not any(
        line.split()[1:4:2] == ["erofs", "ok"] and "snapshotter" in line for line in plugins.splitlines()
    ):
        pytest.skip(
            "needs a containerd with the erofs snapshotter (2.1 or newer) and erofs in the host's kernel"
        )
    options = ("--runtime", RUNTIME, "--snapshotter", "erofs")
    script = "rm /bin/arch && echo kept > /made; exec sleep 1000"
    daemon.ok("run", "-d", *options, IMAGE, "one", "sh", "-c", script)

    def seen() -> str:
        exec_id = f"e{time.monotonic_ns()}"
        look = ("sh", "-c", "cat /made; ls /bin/arch /bin/sh")
        return daemon.ctr("task", "exec", "--exec-id", exec_id, "one", *look).stdout.decode()

    until(lambda: seen() == "kept\n/bin/sh\n", "the container has written", daemon.diagnosis)
    # What it writes is in the snapshot, on the host.
    uppers = daemon.directory.glob("root/io.containerd.snapshotter.v1.erofs/snapshots/*/fs/made")
    assert [path.read_text() for path in uppers] == ["kept\n"]
    assert [
        line for line in Path("/proc/self/mounts").read_text().splitlines() if "/task/default/one/" in line
    ] == []
    daemon.ok("task", "kill", "-s", "KILL", "one")
    until(lambda: daemon.tasks()["one"][1] == "STOPPED", "the task has ended")
    daemon.remove("one")


def test_a_vhost_user_device_needs_kvm(daemon: Containerd, tmp_path: Path) -> None:
    """Its server writes into the guest's memory, of which emulation is not told (tests/kvm has the rest)."""
    if accel.choose().accel == "kvm":
        pytest.skip("this machine has KVM: tests/kvm runs such disks")
    for kind in ("devices", "sockets"):
        (tmp_path / "store/block" / kind).mkdir(parents=True)
    node = tmp_path / "store/block/devices/mine"
    os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(241, 7))
    config = tmp_path / "configuration.toml"
    config.write_text(
        f'[hypervisor.qemu]\nenable_vhost_user_store = true\nvhost_user_store_path = "{tmp_path}/store"\n'
    )
    path = tmp_path / "store/block/sockets/mine"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        options = ("--runtime-config-path", str(config), "--device", str(node))
        refused = daemon.run("one", "true", options=options)
    assert refused.returncode != 0
    words = f"a machine of this sandbox's hypervisor cannot be given the vhost-user device {path}"
    assert words.encode() in refused.stderr


def test_devices_of_the_host_are_refused_by_name_where_they_cannot_be(
    daemon: Containerd, tmp_path: Path
) -> None:
    """(VFIO.) Whether or not the machine was to start with them, which this one's hypervisor or host cannot."""
    spec = daemon.spec({})
    spec["linux"]["devices"] = [{"path": "/dev/vfio/99999999", "type": "c", "major": 511, "minor": 0}]
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec))
    config = tmp_path / "configuration.toml"
    works = accel.choose().accel == "kvm"
    for port, words in (
        ("no-port", "cannot pass /dev/vfio/99999999 through to the machine"),
        (
            "root-port",
            "IOMMU" if works else "QEMU cannot give a machine devices of the host (/dev/vfio/99999999)",
        ),
    ):
        config.write_text(f'[hypervisor.qemu]\ncold_plug_vfio = "{port}"\n')
        options = ("--runtime-config-path", str(config), "--config", str(path))
        done = daemon.ctr("run", "--rm", "--runtime", RUNTIME, *options, "given")
        assert done.returncode != 0
        assert words in done.stderr.decode()
        until(lambda: not daemon.sandboxes(), "no sandbox is left", daemon.diagnosis)
