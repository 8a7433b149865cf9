"""Firecracker's configuration document, the places of its devices, its taps, and its last words."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from apart import in_network

from kata import journal_undo, sysio
from kata.errors import ConfigError, GuestAssetError, HostError, HypervisorError, UnsupportedError
from kata.hypervisor.base import Attachments, Disk, MachineShape, Nic
from kata.hypervisor.firecracker import config, options, process
from kata.hypervisor.firecracker.counters import Counters
from kata.hypervisor.firecracker.monitor import MONITOR
from kata.hypervisor.firecracker.taps import Taps
from kata.journal import Journal


def machine(**changes: Any) -> tuple[MachineShape, Attachments]:
    values = {"kernel": "/k", "initrd": "/i", "parameters": "quiet", "disks": ("readonly", "spare", "spare")}
    shape = MachineShape(**{**values, **changes})
    attachments = Attachments(
        sandbox_id="x",
        run_dir="/run/x",
        disks=[Disk("/root.erofs", readonly=True)],
        nics=[Nic("02::1"), Nic("02::2")],
    )
    return shape, attachments


def document(**changes: Any) -> dict[str, Any]:
    shape, attachments = machine(**changes)
    slots = config.Slots(shape, attachments)
    return config.build(shape, attachments, slots, vsock="/run/x/v", taps={1: "tap1"})


def test_the_document() -> None:
    made = document(memory_mib=256, max_memory_mib=300, vcpus=1, max_vcpus=4)
    assert made["boot-source"] == {
        "kernel_image_path": "/proc/self/fd/3",
        "initrd_path": "/proc/self/fd/4",
        "boot_args": "console=ttyS0 reboot=k maxcpus=1 quiet",
    }
    assert made["machine-config"] == {"vcpu_count": 4, "mem_size_mib": 256}
    assert made["memory-hotplug"]["total_size_mib"] == 128
    assert made["network-interfaces"] == [
        {"iface_id": "nic1", "host_dev_name": "tap1", "guest_mac": "02::2"}
    ]
    assert [(one["path_on_host"], one["is_read_only"]) for one in made["drives"]] == [
        ("/proc/self/fd/8", True),
        ("/proc/self/fd/9", False),
        ("/proc/self/fd/10", True),
    ]
    assert made["drives"][1]["cache_type"] == "Writeback"
    small = document(reclaim=False, console="none")
    assert "balloon" not in small
    assert "memory-hotplug" not in small
    assert "console" not in small["boot-source"]["boot_args"]


def test_where_devices_are() -> None:
    """As the guest's kernel was seen to find them: balloon, disks, interfaces."""
    shape, attachments = machine()
    attachments.nics[1] = Nic("02::2", tap_fd=sysio.Fd(os.open("/dev/null", os.O_RDONLY)))
    slots = config.Slots(shape, attachments)
    assert slots.disk_addresses == ["02", "03", "04"]
    assert slots.nic_addresses == ["", "05"]
    assert config.Slots(machine(reclaim=False)[0], attachments).disk_addresses == ["01", "02", "03"]
    attachments.close()


def test_rate_limits() -> None:
    limits = options.read(
        {
            "rx_rate_limiter_max_rate": 8_000_000,
            "disk_rate_limiter_bw_max_rate": 16_000_000,
            "disk_rate_limiter_bw_one_time_burst": 80,
            "disk_rate_limiter_ops_max_rate": 100,
        },
        str,
    )
    made = document(options=limits)
    assert made["network-interfaces"][0]["rx_rate_limiter"] == {
        "bandwidth": {"size": 1_000_000, "refill_time": 1000}
    }
    assert "tx_rate_limiter" not in made["network-interfaces"][0]
    for drive in made["drives"]:  # also of a disk that comes later
        assert drive["rate_limiter"] == {
            "bandwidth": {"size": 2_000_000, "refill_time": 1000, "one_time_burst": 10},
            "ops": {"size": 100, "refill_time": 1000},
        }


def test_counters_add_up() -> None:
    counters = Counters()
    line = b'{"utc_timestamp_ms":1,"block":{"read_count":2,"read_agg":{"min_us":0}},"latencies_us":{"pause_vm":7}}\n'
    assert not counters.feed(line[:20])
    assert counters.feed(line[20:] + line + b"nonsense\n[]\n")
    assert counters.values() == {"block": {"read_count": 4}, "latencies_us": {"pause_vm": 7}}
    assert counters.feed(b'{"block_disk0":{"read_count":1},"net_nic1":{"tx_count":1}}\n')
    assert counters.values()["disk0"] == {"read_count": 1}
    assert counters.values()["nic1"] == {"tx_count": 1}
    # Whatever it is told, it is bounded.
    assert not counters.feed(b"x" * (300 << 10))
    many = {f"g{group}": {f"n{name}": 1 for name in range(300)} for group in range(100)}
    assert counters.feed(json.dumps(many).encode() + b"\n")
    values = counters.values()
    assert len(values) == 64
    assert max(len(items) for items in values.values()) == 128


def test_last_words() -> None:
    shape, _ = machine()
    kernel = process.explain(1, "x\nRunWithApi error: Kernel Loader: Invalid ELF magic\n", shape)
    assert isinstance(kernel, GuestAssetError)
    assert "kernel /k" in kernel.message
    # As 1.17 was seen to say it: a line of its log, and the error's internal name.
    failed = (
        "Failed to build MicroVM from Json: Block device error: No such file or directory (os error 2) /none"
    )
    said = f"2026-11-28T17:27:11.7 [a:main] RunWithApiError error: {failed}\nError: RunWithApi(BuildFromJson(...))\n"
    assert process.explain(1, said, shape).message.endswith(f": RunWithApiError error: {failed}")
    killed = process.explain(-9, "", shape)
    assert isinstance(killed, HypervisorError)
    assert "out of memory" in killed.hint
    assert process.explain(148, "bad syscall error", shape).message.endswith(": bad syscall error")


def test_programs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MONITOR.PROGRAM.variable, str(tmp_path / "none"))
    shape, attachments = machine()
    journal = Journal.create_dir(str(tmp_path), "box", {})
    with pytest.raises(HostError, match=r"Firecracker is not installed: there is no .*/none"):
        MONITOR.start(shape, attachments, journal)
    [check] = MONITOR.checks({})
    assert not check.ok
    assert check.text == f"{tmp_path}/none is no program that can be executed"
    with pytest.raises(ConfigError, match="a:1: path /none does not exist"):
        options.read({"path": "/none"}, lambda key: "a:1")
    assert options.read({"path": str(tmp_path)}, str) == {"path": str(tmp_path)}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes tap devices in a namespace of its own")
def test_taps_outlast_their_descriptors_until_they_are_removed(tmp_path: Path) -> None:
    def tap(name: str) -> Nic:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002))
        return Nic("02:00:00:00:00:01", tap_fd=sysio.Fd(fd))

    def there() -> set[str]:
        return {
            line.split(":")[0].strip()
            for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
        }

    def scenario() -> None:
        journal = Journal.create_dir(str(tmp_path), "box", {})
        taps = Taps(journal)
        taps.take([tap("tapa"), Nic("02::3"), tap("tapb")], 0)
        assert taps.names == {0: "tapa", 2: "tapb"}
        assert {"tapa", "tapb"} <= there()
        taps.remove()
        assert not {"tapa", "tapb"} & there()
        # Of one that died in between, the journal knows.
        Taps(journal).take([tap("tapc")], 1234)
        assert "tapc" in there()
        with pytest.raises(UnsupportedError, match="this network has none"):
            Taps(journal).take([Nic("02::4", tap_fd=sysio.Fd(os.open("/dev/null", os.O_RDONLY)))], 0)
        assert journal_undo.undo(journal, 10) == []
        assert "tapc" not in there()

    in_network(scenario)
