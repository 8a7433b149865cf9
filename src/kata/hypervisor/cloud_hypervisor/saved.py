"""A machine that Cloud Hypervisor has saved, and what of it is another's when it goes on.

Beside the monitor's own files (docs/snapshot_restore.md of its sources: ``config.json``, ``state.json``,
``memory-ranges``) there is one of ours with the machine's shape, written last: without it nothing was saved.
The monitor's description names files and descriptors of the machine that was saved; what it is restored from is a
directory of the new monitor with a description that names the new ones, and links to the rest. A disk or a share that
the saved machine did not have is plugged in as soon as it goes on.

Every machine that goes on gets a copy of the memory: of what is no hole in the file, which is little where the machine
was started to be saved (`kata.hypervisor.cloud_hypervisor.command`). The monitor could map the file privately as a
memory zone instead; but then it gives no memory back, since it punches holes into the file of a zone.
"""

from __future__ import annotations

import json
import os

from kata.errors import HypervisorError
from kata.hypervisor import rust_vmm, saved
from kata.hypervisor.access import make_directory
from kata.hypervisor.cloud_hypervisor import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.hypervisor.base import Attachments, MachineShape
    from kata.hypervisor.rust_vmm import MonitorUser

CONFIG = "config.json"
LARGE = ("state.json", "memory-ranges")
FILES = (CONFIG, *LARGE)
RESTORED = "restored"
"""Name of the directory that a machine is restored from, in the monitor's."""
_MAX_CONFIG = 4 << 20


def prepare(
    directory: str, shape: MachineShape, attachments: Attachments, own: MonitorUser, fds: Mapping[str, int]
) -> tuple[str, list[tuple[str, dict[str, object]]]]:
    """Make what the monitor restores a machine from.

    Args:
        directory: What it was saved into.
        shape: The machine that was saved.
        attachments: What it is connected to from now on.
        own: As whom the monitor runs.
        fds: Descriptors that the monitor inherits: ``disk0`` and so on, and those of `LARGE`.

    Returns:
        The value of the monitor's option ``--restore``, and requests that plug in what the saved machine did not have:
        the path and the body of each.

    Raises:
        HypervisorError: What was saved is incomplete, or had other devices.
    """
    config = saved.document(directory, CONFIG, _MAX_CONFIG)
    # It opens them, and does not read them: the guest has them in its memory.
    config["payload"] = {**_table(config.get("payload")), "kernel": os.devnull, "initramfs": os.devnull}
    config["vsock"] = {**_table(config.get("vsock")), "socket": f"{own.seen}/{rust_vmm.VSOCK_SOCKET}"}
    if config.get("fs"):
        raise HypervisorError(f"the machine in {directory} has a share, whose server is gone")
    late: list[tuple[str, dict[str, object]]] = []
    shares = attachments.share_server is not None
    config["memory"] = {**_table(config.get("memory")), "shared": shares or shape.shared_memory}
    missing = {f"disk{index}": disk for index, disk in enumerate(attachments.disks) if disk is not None}
    for disk in _list(config.get("disks")):
        name = str(disk.get("id"))
        if missing.pop(name, None) is None:
            raise HypervisorError(f"the machine in {directory} has a {name}, and it was given none")
        disk["path"] = rust_vmm.file(fds[name])
    taps = {f"nic{index}": nic.tap_fd for index, nic in enumerate(attachments.nics) if nic.tap_fd}
    given = []
    for nic in _list(config.get("net")):
        name = str(nic.get("id"))
        tap = taps.pop(name, None)
        if tap is None:
            raise HypervisorError(f"the machine in {directory} has a {name}, and it was given none")
        given.append(f"{name}@[{tap.raw}]")
    if taps:
        raise HypervisorError(f"the machine in {directory} has no {', '.join(taps)}")
    for index, added in enumerate(attachments.disks):
        if added is not None and f"disk{index}" in missing:
            path = rust_vmm.file(fds[f"disk{index}"])
            late.append(("vm.add-disk", command.disk_config(index, added, path)))
    if shares:
        late.append(("vm.add-fs", command.share_config(own.seen)))
    target = os.path.join(own.directory, RESTORED)
    make_directory(target, own.access.user)
    try:
        with open(os.path.join(target, CONFIG), "w", encoding="utf-8") as file:
            own.access.give(file.fileno())
            json.dump(config, file)
        for name in LARGE:
            os.symlink(rust_vmm.file(fds[name]), os.path.join(target, name))
    except OSError as error:
        raise HypervisorError(
            f"cannot use what was saved in {directory}: {error.filename}: {error.strerror}"
        ) from error
    nets = f",net_fds=[{','.join(given)}]" if given else ""
    return f"source_url=file://{own.seen}/{RESTORED},resume=on{nets}", late


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
