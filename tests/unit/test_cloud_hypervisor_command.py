"""Cloud Hypervisor's command line, its options, and the sentences for what it says when it fails."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kata.errors import ConfigError, GuestAssetError, HypervisorError, KataError, ResourceExhaustedError
from kata.hypervisor import registry
from kata.hypervisor import saved as machines
from kata.hypervisor.base import Attachments, Disk, MachineShape, Nic
from kata.hypervisor.cloud_hypervisor import command, saved, slots
from kata.hypervisor.cloud_hypervisor.process import explain
from kata.hypervisor.rust_vmm import MONITOR_DIR, MonitorUser
from kata.hypervisor.virtiofsd import FileServer
from kata.journal import Journal
from kata.sysio import Fd

FDS = {"api": 10, "events": 11, "kernel": 12, "initrd": 13, "disk0": 14, "disk2": 16}


def shape(**changes: Any) -> MachineShape:
    return MachineShape(
        **{"kernel": "/k", "initrd": "/i", "parameters": "quiet", "memory_mib": 256, **changes}
    )


def attached(**changes: Any) -> Attachments:
    return Attachments(**{"sandbox_id": "x", "run_dir": "/run/x", **changes})


def built(made: MachineShape, attachments: Attachments) -> dict[str, list[str]]:
    """The arguments by option."""
    found: dict[str, list[str]] = {}
    program, *rest = command.build("/bin/ch", made, attachments, "/run/x", FDS)
    assert program == "/bin/ch"
    for word in rest:
        if word.startswith("--"):
            found[word] = values = []
        else:
            values.append(word)
    return found


def test_a_machine_names_no_file_of_the_hosts() -> None:
    disks = [Disk("/secret/a.img", readonly=True, serial="s"), None, Disk("/secret/b.img", readonly=False)]
    nics = [Nic("02:00:00:00:00:01", tap_fd=Fd(99)), Nic("02:00:00:00:00:02")]
    found = built(shape(), attached(disks=disks, nics=nics))
    nics[0].tap_fd = None  # no descriptor of this process is that
    assert found == {
        "--api-socket": ["fd=10"],
        "--event-monitor": ["fd=11"],
        "--kernel": ["/proc/self/fd/12"],
        "--initramfs": ["/proc/self/fd/13"],
        "--cmdline": ["console=ttyS0 quiet"],
        "--cpus": ["boot=1"],
        "--memory": ["size=256M,shared=off"],
        "--serial": ["tty"],
        "--console": ["off"],
        "--rng": ["src=/dev/urandom"],
        "--vsock": ["cid=3,socket=/run/x/vsock.sock,id=vsock,pci_device_id=8"],
        "--balloon": ["size=0,free_page_reporting=on"],
        # The type always: a guessed one loses writes to the first sector.
        "--disk": [
            "id=disk0,path=/proc/self/fd/14,image_type=raw,readonly=on,pci_device_id=10,serial=s",
            "id=disk2,path=/proc/self/fd/16,image_type=raw,readonly=off,pci_device_id=12",
        ],
        # One that leads nowhere is not there.
        "--net": ["id=nic0,mac=02:00:00:00:00:01,pci_device_id=24,num_queues=2,fd=[99]"],
    }


def test_what_is_asked_for_later_has_its_place_at_the_start() -> None:
    found = built(
        shape(vcpus=2, max_vcpus=4, max_memory_mib=600, console="virtio", prealloc=True, reclaim=False),
        attached(),
    )
    assert found["--cpus"] == ["boot=4"]
    assert found["--cmdline"] == ["console=hvc0 maxcpus=2 quiet"]
    # Whole sections of the guest's kernel.
    assert found["--memory"] == [
        "size=256M,shared=off,hotplug_method=virtio-mem,hotplug_size=384M,prefault=on"
    ]
    assert (found["--serial"], found["--console"]) == (["off"], ["tty"])
    assert "--balloon" not in found
    assert built(shape(console="none"), attached())["--cmdline"] == ["quiet"]


def test_places_do_not_overlap() -> None:
    numbers = [slots.VSOCK, slots.SHARE, *slots.DISKS, *slots.NICS]
    assert len(set(numbers)) == len(numbers)
    # Below them there is room for what we name no number for, above them none on the bus.
    assert min(numbers) >= 6
    assert max(numbers) < 32
    assert slots.path(slots.DISKS[0]) == "0a"


CHAIN = """\
cloud-hypervisor:   0.018719s: <main> ERROR:cloud-hypervisor/src/lib.rs:24 -- Fatal error: {log}
Error: Cloud Hypervisor exited with the following chain of errors:
{chain}
"""


def said(*sentences: str) -> str:
    chain = "\n".join(f"  {number}: {sentence}" for number, sentence in enumerate(sentences))
    return CHAIN.format(log="VmBoot(VmBoot(X))", chain=chain)


@pytest.mark.parametrize(
    ("words", "status", "kind", "expected"),
    [
        (
            said("Error booting VM", "Cannot load the kernel into memory", "Kernel Loader: Invalid bzImage"),
            1,
            GuestAssetError,
            "cannot load the guest's kernel /k .*Error booting VM: Cannot load",
        ),
        (
            said("Error booting VM", "Cannot open initramfs file", "No such file or directory (os error 2)"),
            1,
            GuestAssetError,
            "cannot load the initrd /i",
        ),
        (
            said("Error booting VM", "Cannot create memory", "Cannot allocate memory (os error 12)"),
            1,
            ResourceExhaustedError,
            "cannot give the virtual machine its 256 MiB",
        ),
        (
            said("Error booting VM", "Error from device manager", "Cannot open disk path", "No such file"),
            1,
            HypervisorError,
            "ended with status 1: Error booting VM: Error from device manager: Cannot open disk path: No such",
        ),
        ("error: unexpected argument '--event' found\n\nFor more information, try '--help'.\n", 2,
            HypervisorError, "status 2: error: unexpected argument '--event' found"),
        ("what am I doing here\n", 3, HypervisorError, "status 3: what am I doing here"),
        ("", -9, HypervisorError, "killed by signal 9"),
    ],
)  # fmt: skip
def test_why_it_ended_is_said(words: str, status: int, kind: type[KataError], expected: str) -> None:
    error = explain(status, words, shape())
    assert type(error) is kind
    assert error.hint
    import re

    assert re.search(expected, error.message), error.message


def test_options_are_checked(tmp_path: Path) -> None:
    monitor = registry.find("cloud-hypervisor")
    assert monitor.options({}, str) == {}
    assert monitor.options({"path": str(tmp_path)}, str) == {"path": str(tmp_path)}
    with pytest.raises(ConfigError, match="path /no/such does not exist"):
        monitor.options({"path": "/no/such"}, lambda key: f"file:{key}")
    can = monitor.capabilities("kvm", {})
    assert (can.nic_backends, can.shares, can.snapshot) == (("tap",), ("virtio-fs",), True)
    assert monitor.accelerators == ("kvm",)


def test_a_saved_machine_names_what_is_the_new_ones(tmp_path: Path) -> None:
    place, run_dir = tmp_path / "saved", tmp_path / "run"
    place.mkdir()
    run_dir.mkdir()
    config = {
        "memory": {"size": 256 << 20, "shared": True},
        "payload": {"kernel": "/proc/self/fd/9", "initramfs": "/proc/self/fd/10", "cmdline": "quiet"},
        "disks": [{"id": "disk0", "path": "/proc/self/fd/11", "readonly": True}],
        "net": [{"id": "nic1", "fds": [12]}],
        "vsock": {"id": "vsock", "cid": 3, "socket": "/old/vsock.sock"},
    }
    (place / "config.json").write_text(json.dumps(config))
    for name in saved.LARGE:
        (place / name).write_text(name)
    machines.write_shape(str(place), shape(options={"path": "/p"}))
    assert machines.shape_of(str(place)) == shape(options={"path": "/p"})
    nic = Nic("02:00:00:00:00:01", tap_fd=Fd(77))
    attachments = attached(
        run_dir=str(run_dir), disks=[Disk("/d", True)], nics=[Nic("02:00:00:00:00:02"), nic]
    )
    given = machines.open_files(str(place), saved.LARGE)
    own = MonitorUser("/p", attachments, [], {}, Journal.create_dir(str(tmp_path), "box", {}), "")
    option, late = saved.prepare(str(place), shape(), attachments, own, {"disk0": 40, **given})
    assert late == []
    target = run_dir / MONITOR_DIR / saved.RESTORED
    assert option == f"source_url=file://{target},resume=on,net_fds=[nic1@[77]]"
    made = json.loads((target / "config.json").read_text())
    assert made["disks"][0]["path"] == "/proc/self/fd/40"
    assert made["vsock"] == {"id": "vsock", "cid": 3, "socket": f"{run_dir}/{MONITOR_DIR}/vsock.sock"}
    assert made["payload"] == {"kernel": "/dev/null", "initramfs": "/dev/null", "cmdline": "quiet"}
    assert (target / "state.json").read_text() == "state.json"
    assert made["memory"] == {"size": 256 << 20, "shared": False}
    # A template's has no disk and no share: they are plugged in.
    shutil.rmtree(target)
    del config["disks"]
    (place / "config.json").write_text(json.dumps(config))
    attachments.share_server = FileServer(
        "/d", "/s", str(run_dir), Journal.create_dir(str(tmp_path), "srv", {})
    )
    _, late = saved.prepare(str(place), shape(), attachments, own, {"disk0": 40, **given})
    attachments.share_server.hide()
    attachments.share_server.close_socket()
    assert [(path, body["id"]) for path, body in late] == [("vm.add-disk", "disk0"), ("vm.add-fs", "share")]
    assert late[0][1]["path"] == "/proc/self/fd/40"
    assert late[1][1]["socket"] == f"{run_dir}/{MONITOR_DIR}/share.sock"
    assert json.loads((target / "config.json").read_text())["memory"]["shared"] is True
    nic.tap_fd = None
    for fd in given.values():
        os.close(fd)
    machines.forget(str(place), saved.FILES)
    assert list(place.iterdir()) == []
