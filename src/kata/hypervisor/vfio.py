"""Devices of the host that a machine could be given as they are (VFIO): may this one be, and what is in the way?

An IOMMU keeps a device's accesses to memory within one machine, and it can keep apart groups of devices only. So all of
a group's devices go to one machine, or to drivers that do nothing with them; bridges stay with the host.

Nothing here loads a driver or starts anything. `take` is undone by the journal (kind ``driver``), also by whoever finds
that its maker was killed.

Sources: the kernel's ``Documentation/driver-api/vfio.rst`` and ``Documentation/ABI/testing/sysfs-bus-pci``
(driver_override, drivers_probe).
"""

from __future__ import annotations

import errno
import os
import stat

from kata import mount_table, pci_driver
from kata.errors import HostError, NotFoundError, StateError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kata.journal import Journal

DRIVER = "vfio-pci"
NODES = "/dev/vfio"
CONTAINER = f"{NODES}/vfio"
MOST = 4
"""Devices that a machine can be given."""
_UNBOUND = ("", DRIVER, "pci-stub")
"""Drivers of a device that nobody uses on the host."""
_BRIDGE = "0x06"
"""Class of bridges (PCI Code and ID Assignment Specification, base class 06h)."""
_MOST_PATHS = 100_000
_SYS = "/sys"
_NO_IOMMU = (
    "Turn on VT-d or AMD-Vi in the firmware, and start the host's kernel with intel_iommu=on iommu=pt, or amd_iommu=on."
    " In a virtual machine its own hypervisor has to offer an IOMMU."
)
_LOAD = f"modprobe {DRIVER}"


class Member:
    """A device of a group.

    Args:
        address: Its PCI address: ``0000:3b:00.0``.
        kind: Its class, as sysfs has it: ``0x020000``.
        driver: The host's driver; empty without one.
        uses: What the host does with it, as sentences' ends: ``the network interface eth0, which is up``.
    """

    __slots__ = ("address", "driver", "kind", "uses")

    def __init__(self, address: str, kind: str, driver: str, uses: Sequence[str]) -> None:
        self.address = address
        self.kind = kind
        self.driver = driver
        self.uses = tuple(uses)

    @property
    def is_bridge(self) -> bool:
        """Whether it leads to other devices: it stays the host's."""
        return self.kind.startswith(_BRIDGE)


class Group:
    """The devices that an IOMMU cannot keep apart.

    Args:
        number: The group's; ``/dev/vfio/NUMBER`` stands for it once its devices have the driver `DRIVER`.
        members: All of them, by address.
    """

    __slots__ = ("members", "number")

    def __init__(self, number: int, members: Sequence[Member]) -> None:
        self.number = number
        self.members = tuple(members)

    def taken(self) -> list[Member]:
        """Those that a machine gets: all but bridges."""
        return [one for one in self.members if not one.is_bridge]

    def obstacles(self) -> list[str]:
        """Why the host cannot do without them: a sentence for each use. Empty if it can."""
        return [f"{one.address} is {use}" for one in self.taken() for use in one.uses]

    def unready(self) -> list[str]:
        """Whose driver is another than `DRIVER`: a sentence for each."""
        return [
            f"{one.address} has the driver {one.driver}" if one.driver else f"{one.address} has no driver"
            for one in self.taken()
            if one.driver != DRIVER
        ]


class Given:
    """The devices of the host that a machine is given.

    Attributes:
        addresses: Their PCI addresses.
        nodes: What its monitor opens for them.
    """

    __slots__ = ("addresses", "nodes")

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.nodes: list[str] = []

    def numbers(self) -> list[tuple[int, int]]:
        """Major and minor numbers of the nodes, as far as they are there."""
        found = []
        for path in self.nodes:
            try:
                about = os.stat(path).st_rdev
            except OSError:
                continue  # the monitor says so
            found.append((os.major(about), os.minor(about)))
        return found


def give(numbers: Iterable[int], journal: Journal, sys: str = _SYS) -> Given:
    """Set aside all devices of some groups for one machine.

    Args:
        numbers: The groups'.
        journal: Undoes it.
        sys: Where sysfs is mounted.

    Raises:
        KataError: There is no such group, its devices cannot be set aside, or they are too many. The journal has what
            was done until then.
    """
    given = Given()
    found = [group(number, sys) for number in numbers]
    given.addresses = [one.address for each in found for one in each.taken()]
    if len(given.addresses) > MOST:
        raise UnsupportedError(
            f"a machine can be given {MOST} devices of the host, and its groups have {len(given.addresses)}",
            "Fewer groups, or those of devices that have one each.",
        )
    for each in found:
        take(each, journal, sys)
    given.nodes = [CONTAINER, *(f"{NODES}/{each.number}" for each in found)]
    return given


def number_of(path: str) -> int | None:
    """The group that a device node stands for; None if it is no group's."""
    number = path.removeprefix(f"{NODES}/")
    return int(number) if number != path and number.isdecimal() and len(number) < 10 else None


def groups(sys: str = _SYS) -> list[int]:
    """The numbers of this host's groups.

    Args:
        sys: Where sysfs is mounted.

    Raises:
        HostError: It has no IOMMU, or it is off.
    """
    try:
        found = sorted(int(name) for name in os.listdir(f"{sys}/kernel/iommu_groups") if name.isdecimal())
    except OSError:
        found = []
    if not found:
        raise HostError("this host has no IOMMU, or it is off", _NO_IOMMU)
    return found


def group(number: int, sys: str = _SYS) -> Group:
    """A group by its number.

    Args:
        number: As in ``/dev/vfio/NUMBER``.
        sys: Where sysfs is mounted.

    Raises:
        HostError: This host has no IOMMU, or it is off.
        NotFoundError: There is no such group.
    """
    if number not in groups(sys):
        raise NotFoundError(
            f"there is no IOMMU group {number} on this host",
            f"ls {sys}/kernel/iommu_groups shows those that there are",
        )
    addresses = sorted(os.listdir(f"{sys}/kernel/iommu_groups/{number}/devices"))
    return Group(number, [_member(f"{sys}/bus/pci/devices/{address}", address) for address in addresses])


def require(wanted: Group) -> None:
    """Return if the devices of a group may be given to a machine as they are now.

    Raises:
        StateError: The host uses one, or one has another driver; all reasons are in it.
    """
    obstacles = wanted.obstacles()
    if obstacles:
        raise StateError(
            f"the devices of IOMMU group {wanted.number} are needed by the host: {'; '.join(obstacles)}",
            "A group goes to a machine as a whole; another slot may have a group for itself.",
        )
    unready = wanted.unready()
    if unready:
        raise StateError(
            f"the devices of IOMMU group {wanted.number} are not all set aside: {'; '.join(unready)}",
            f"driverctl set-override ADDRESS {DRIVER} sets a device aside.",
        )


def take(wanted: Group, journal: Journal, sys: str = _SYS) -> None:
    """Give a group's devices the driver `DRIVER`, each by its ``driver_override``: no other device gets it.

    Those that have it already stay as they are, also when this is undone.

    Args:
        wanted: The group.
        journal: Undoes it.
        sys: Where sysfs is mounted.

    Raises:
        StateError: The host uses one of them; nothing was changed then.
        HostError: The driver is not loaded, or would not have a device. The journal has what was done until then.
    """
    if wanted.obstacles():
        require(wanted)
    if not os.path.isdir(f"{sys}/bus/pci/drivers/{DRIVER}"):
        raise HostError(f"the host's kernel has no driver {DRIVER} at the moment", _LOAD)
    for one in wanted.taken():
        if one.driver == DRIVER:
            continue
        device = f"{sys}/bus/pci/devices/{one.address}"
        entry = journal.begin("driver", path=device, driver=DRIVER, former=one.driver)
        try:
            pci_driver.give(device, DRIVER)
        except OSError as error:
            raise HostError(
                f"cannot give {one.address} the driver {DRIVER}: {error.strerror}",
                f"dmesg says what {DRIVER} or {one.driver or 'the kernel'} had against it.",
            ) from error
        if pci_driver.of(device) != DRIVER:
            raise HostError(f"{DRIVER} would not have the device {one.address}", "dmesg says why.")
        journal.commit(entry)


# ---- what the host does with a device ----


def _member(device: str, address: str) -> Member:
    return Member(address, _text(f"{device}/class"), pci_driver.of(device), _uses(device))


def _uses(device: str) -> list[str]:
    if pci_driver.of(device) in _UNBOUND:
        return []
    found = []
    try:
        below = _below(device)
    except OverflowError:
        return ["more than can be looked at: there are too many directories below it in sysfs"]
    for kind, name, path in below:
        if kind == "net":
            if _is_up(path):
                found.append(f"the network interface {name}, which is up")
        else:
            found += [f"the disk {name}, which {use}" for use in _uses_of_disk(path)]
    return found


def _below(device: str) -> list[tuple[str, str, str]]:
    """Network interfaces and disks of a device: what it is, its name, its directory in sysfs.

    Raises:
        OverflowError: There are too many directories to look at all of them.
    """
    found, left = [], _MOST_PATHS
    waiting = [device]
    while waiting:
        place = waiting.pop()
        left -= 1
        if left < 0:
            raise OverflowError
        try:
            with os.scandir(place) as entries:
                names = [one.name for one in entries if one.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        kind = os.path.basename(place)
        for name in names:
            path = f"{place}/{name}"
            if kind == "net":
                found.append(("net", name, path))
            elif kind == "block" or (os.path.exists(f"{path}/queue") and os.path.exists(f"{path}/dev")):
                found.append(("block", name, path))  # an NVMe namespace is below no directory of that name
            elif name not in ("power", "queue", "msi_irqs", "trace"):
                waiting.append(path)
    return sorted(found)


def _is_up(interface: str) -> bool:
    try:
        return bool(int(_text(f"{interface}/flags") or "0", 16) & 1)  # IFF_UP
    except ValueError:
        return True


def _uses_of_disk(disk: str) -> list[str]:
    """What is done with a disk or its partitions."""
    parts = [disk]
    try:
        parts += sorted(
            f"{disk}/{name}" for name in os.listdir(disk) if os.path.exists(f"{disk}/{name}/partition")
        )
    except OSError:
        pass
    numbers = {_text(f"{part}/dev") for part in parts}
    found = [f"is mounted at {one.target}" for one in _host_mounts() if one.device in numbers]
    names = {f"/dev/{os.path.basename(part)}" for part in parts}
    try:
        with open("/proc/swaps", encoding="utf-8", errors="replace") as lines:
            found += [
                f"is swap space ({line.split()[0]})"
                for line in lines
                if line.split()[:1] and line.split()[0] in names
            ]
    except OSError:
        pass
    for part in parts:
        try:
            found += [f"belongs to {holder}" for holder in sorted(os.listdir(f"{part}/holders"))]
        except OSError:
            continue
    return found or [f"is in use (/dev/{os.path.basename(part)})" for part in parts if _is_claimed(part)]


def _is_claimed(part: str) -> bool:
    """Whether the host's kernel has a disk or partition in use: the file systems of Btrfs and ZFS have numbers of their
    own where they are mounted, and not the disk's. Source: open(2), O_EXCL.
    """
    node, number = f"/dev/{os.path.basename(part)}", _text(f"{part}/dev")
    try:
        about = os.stat(node)
        if stat.S_ISBLK(about.st_mode) and number == f"{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}":
            os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _host_mounts() -> list[mount_table.MountInfo]:
    try:
        return mount_table.mounts(1)  # this process may have a mount namespace of its own
    except OSError:
        return mount_table.mounts()


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(4096).strip()
    except OSError:
        return ""
