"""How fast the host's time-stamp counter runs, as the host's kernel found out.

Under software emulation the guest's counter is the host's. A guest that is told its frequency need not measure
it against an emulated timer, which takes 15 to 150 ms and goes wrong on a busy host. Two places tell: perf's
page for user-space clocks, and KVM (also one that cannot run a guest).

Source: perf_event_open(2), struct perf_event_mmap_page; the kernel's ``Documentation/virt/kvm/api.rst``
(KVM_GET_TSC_KHZ) and ``Documentation/admin-guide/kernel-parameters.txt`` (tsc_early_khz).
"""

from __future__ import annotations

import os

from kata import sysio

_PERF_TYPE_SOFTWARE = 1
_PERF_COUNT_SW_DUMMY = 9
_CAP_USER_TIME = 1 << 3
_KVM_CREATE_VM = 0xAE01
_KVM_CREATE_VCPU = 0xAE41
_KVM_GET_TSC_KHZ = 0xAEA3


def khz() -> int:
    """The counter's frequency in kHz; 0 when nobody says. Takes less than a millisecond."""
    return _from_perf() or _from_kvm()


def _from_perf() -> int:
    import mmap

    try:
        fd = _perf_event_open(_PERF_TYPE_SOFTWARE, _PERF_COUNT_SW_DUMMY)
    except OSError:
        return 0
    try:
        with mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ) as page:
            # It changes only with the processor's clock source: no need for the sequence lock around it.
            capabilities = int.from_bytes(page[40:48], "little")
            shift = int.from_bytes(page[50:52], "little")
            multiplier = int.from_bytes(page[52:56], "little")
    except (OSError, ValueError):
        return 0
    finally:
        os.close(fd)
    # Nanoseconds are (ticks * multiplier) >> shift.
    return (1_000_000 << shift) // multiplier if capabilities & _CAP_USER_TIME and multiplier else 0


def _from_kvm() -> int:
    from fcntl import ioctl

    opened: list[int] = []
    try:
        opened.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        for request in (_KVM_CREATE_VM, _KVM_CREATE_VCPU):
            opened.append(ioctl(opened[-1], request, 0))
        return max(0, ioctl(opened[-1], _KVM_GET_TSC_KHZ, 0))
    except OSError:
        return 0
    finally:
        for fd in reversed(opened):
            os.close(fd)


def _perf_event_open(kind: int, config: int) -> int:
    """perf_event_open(2): a disabled event of this process, on any processor. Returns its descriptor."""
    import ctypes

    number = sysio.number_of("perf_event_open(2)", {"x86_64": 298, "aarch64": 241})
    size = 112
    disabled, user_only = 1 << 0, 1 << 5 | 1 << 6  # disabled; exclude_kernel, exclude_hv
    attributes = (
        kind.to_bytes(4, "little")
        + size.to_bytes(4, "little")
        + config.to_bytes(8, "little")
        + bytes(24)
        + (disabled | user_only).to_bytes(8, "little")
    )
    buffer = ctypes.create_string_buffer(attributes.ljust(size, b"\0"), size)
    return sysio.syscall(number, buffer, 0, -1, -1, ctypes.c_ulong(8))  # closed on exec
