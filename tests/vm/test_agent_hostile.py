"""What a container can reach of the agent and of the host: one test each, in a real guest.

That paths of an image, a mount or a copied file lead nowhere is tested where those are (``test_agent_containers.py``:
symbolic links of an image; ``copyfile.rs``, ``files_tests.rs``, ``runtime/path.rs``); here is the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_support import STATE, Container, Guest, caps, error, mount, namespaces, spec

from kata.images.resolve import resolve
from kata.oci import capabilities
from kata.proto import agent_pb as agent
from kata.proto import oci_pb as oci
from kata.ttrpc.status import ConnectionLost

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(1200)]

EVERYTHING = oci.LinuxDeviceCgroup(Allow=True, Access="rwm", Type="a")


@contextlib.contextmanager
def sandbox(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Guest]:
    guest = Guest(run_directory, guest_assets, busybox_image)
    try:
        guest.health()
        guest.tell("CreateSandbox", agent.CreateSandboxRequest(sandbox_id="s"))
        yield guest
    finally:
        guest.close()


@pytest.fixture
def guest(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Guest]:
    with sandbox(run_directory, guest_assets, busybox_image) as guest:
        yield guest


def test_an_unprivileged_container_cannot_reach_the_agent(guest: Guest) -> None:
    box = Container(guest, "plain", "sleep", "100000", mounts=[mount("/tmp", "tmpfs", "tmpfs")])
    # Its PID: process 1 is the container's own, and signals to everybody reach nobody else.
    assert (
        box.sh("pid", "cat /proc/1/cmdline | tr '\\0' ' '; ls -d /proc/[0-9]* | wc -l")[1].split()[0]
        == "sleep"
    )
    assert box.sh("all", "kill -9 -1; kill -9 1; true")[0] in (0, 137)
    guest.health()
    # Its files: neither its state nor its log nor the sandbox's.
    status, found, _ = box.sh("files", f"ls -a {STATE} /run/kata-containers /run/sandbox-ns 2>/dev/null")
    assert (status != 0, found) == (True, "")
    # Its channel: not there, and not to be made although mknod is allowed.
    status, found, _ = box.sh("ports", "ls /dev/vport* /dev/vsock /dev/hvc* /dev/kmsg /dev/mem 2>/dev/null")
    assert found == ""
    script = (
        "for d in /sys/class/virtio-ports/*/dev; do"
        " IFS=: read major minor <$d; rm -f /tmp/p; mknod /tmp/p c $major $minor || exit 3; echo x >/tmp/p && exit 4;"
        " cat /tmp/p && exit 5; done; [ -n $major ] && echo refused $major"
    )
    status, found, errors = box.sh("mknod", script)
    assert status == 0, (found, errors)
    assert found.startswith("refused ")
    assert "Operation not permitted" in errors
    guest.health()
    box.remove()


def test_a_privileged_container_owns_its_guest_and_gains_nothing_on_the_host(
    guest: Guest, busybox_image: str
) -> None:
    image = Path(resolve(busybox_image).rootfs_path)
    before = hashlib.sha256(image.read_bytes()).digest()
    every = caps(list(capabilities.ALL))
    config = spec(
        "lord",
        "sleep",
        "100000",
        linux={
            "Namespaces": namespaces("mount"),
            "MaskedPaths": [],
            "ReadonlyPaths": [],
            "Resources": oci.LinuxResources(Devices=[EVERYTHING]),
        },
        mounts=[mount("/host-dev", "devtmpfs", "devtmpfs")],
        Capabilities=every,
    )
    box = Container(guest, "lord", config=config)
    # It has the guest's devices, the agent's channel among them.
    assert "/host-dev/vport" in box.sh("one", "ls -d /host-dev/vport*", Capabilities=every)[1]
    # The image's disk is read-only for QEMU as well; whatever root in the guest tries.
    script = (
        "d=/host-dev/vda; echo 0 >/sys/block/vda/ro 2>/dev/null; dd if=/dev/zero of=$d bs=4096 count=16 conv=fsync"
        " && exit 9; exit 0"
    )
    assert box.sh("disk", script, Capabilities=every)[0] == 0
    assert hashlib.sha256(image.read_bytes()).digest() == before
    # The channel has one holder, and that is the agent.
    script = "for p in /host-dev/vport*; do cat $p && exit 9; done; exit 0"
    status, _, errors = box.sh("port", script, Capabilities=every)
    assert status == 0
    assert "busy" in errors.lower()
    # It can bring down its guest. The machine's end is all that the host sees of it.
    script = "echo b >/proc/sysrq-trigger; echo c >/proc/sysrq-trigger"
    with contextlib.suppress(ConnectionLost):  # the machine may be gone before the answer is out
        box.exec("down", "sh", "-c", script, Capabilities=every)
    assert guest.wait_end() == 0
    assert hashlib.sha256(image.read_bytes()).digest() == before


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        f"{STATE}/shared/containers/../../../../etc/shadow",
        f"{STATE}/shared/containers/../../sandbox/x",
        "relative",
    ],
)
def test_copied_files_stay_in_their_directory(guest_module: Guest, path: str) -> None:
    request = agent.CopyFileRequest(path=path, file_size=1, file_mode=0o100644, dir_mode=0o755, data=b"x")
    code, words = error(guest_module.tell, "CopyFile", request)
    assert words, code


def test_copied_links_are_not_followed(guest_module: Guest) -> None:
    shared = f"{STATE}/shared/containers"
    link = agent.CopyFileRequest(
        path=f"{shared}/out", file_mode=0o120777, dir_mode=0o755, data=b"/etc", file_size=4
    )
    guest_module.tell("CopyFile", link)
    through = agent.CopyFileRequest(
        path=f"{shared}/out/made", file_size=1, file_mode=0o100644, dir_mode=0o755, data=b"x"
    )
    assert error(guest_module.tell, "CopyFile", through)[1]


def test_a_container_cannot_take_another_ones_place(guest_module: Guest) -> None:
    for name in ("../x", "a/b", ".", "", "x\0y", "s" * 200):
        assert error(Container, guest_module, name, "true", disks=[])[1]
    outside = oci.Spec(
        Version="1.0.2",
        Process=oci.Process(Args=["/bin/true"], Cwd="/"),
        Root=oci.Root(Path="relative/root"),
        Linux=oci.Linux(),
    )
    assert error(Container, guest_module, "rel", config=outside, disks=[])[1]


@pytest.fixture(scope="module")
def guest_module(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Guest]:
    """One for those tests that leave it as it was."""
    with sandbox(run_directory, guest_assets, busybox_image) as guest:
        yield guest
