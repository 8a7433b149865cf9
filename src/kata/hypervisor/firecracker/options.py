"""What of the configuration is Firecracker's alone."""

from __future__ import annotations

from kata.hypervisor.rust_vmm import read_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def read(configuration: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
    """Its options. See `kata.hypervisor.protocols.Monitor.options` for arguments, result and errors."""
    limits = {key: int(configuration[key]) for key in LIMITS if configuration.get(key)}
    return read_path(configuration, origin) | limits


LIMITS = (
    *("rx_rate_limiter_max_rate", "tx_rate_limiter_max_rate"),
    *("disk_rate_limiter_bw_max_rate", "disk_rate_limiter_bw_one_time_burst"),
    *("disk_rate_limiter_ops_max_rate", "disk_rate_limiter_ops_one_time_burst"),
)
"""Keys that limit each network interface (bits per second) and each disk (bits and operations per second)."""
