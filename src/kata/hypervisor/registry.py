"""The hypervisors that there are, by name; each is imported when it is asked for."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata.hypervisor.protocols import Monitor


def _qemu() -> Monitor:
    from kata.hypervisor.qemu.monitor import MONITOR

    return MONITOR


def _cloud_hypervisor() -> Monitor:
    from kata.hypervisor.cloud_hypervisor.monitor import MONITOR

    return MONITOR


def _firecracker() -> Monitor:
    from kata.hypervisor.firecracker.monitor import MONITOR

    return MONITOR


DEFAULT = "qemu"
"""The one that is used where nothing says otherwise."""
_LOADERS: dict[str, Callable[[], Monitor]] = {
    DEFAULT: _qemu,
    "cloud-hypervisor": _cloud_hypervisor,
    "firecracker": _firecracker,
}


def register(name: str, load: Callable[[], Monitor]) -> None:
    """Offer a further hypervisor, in this process.

    Args:
        name: Its name.
        load: Imports it.
    """
    _LOADERS[name] = load


def names() -> list[str]:
    """The names of all."""
    return sorted(_LOADERS)


def modules() -> list[str]:
    """What every start with the default one imports."""
    names = "acpi command machine monitor process queues saving settings slots template_memory"
    return [f"kata.hypervisor.qemu.{name}" for name in names.split()]


def find(name: str = "") -> Monitor:
    """The hypervisor of this name; the default one without a name.

    Raises:
        ConfigError: There is none.
    """
    load = _LOADERS.get(name or DEFAULT)
    if load is None:
        from kata.errors import ConfigError

        raise ConfigError(f"there is no hypervisor {name!r} here", "one of: " + ", ".join(names()))
    return load()
