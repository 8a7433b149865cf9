"""vhost-vsock: a context id (CID) for a guest, which no other guest has.

The kernel keeps CIDs apart: setting one that is in use fails, so an id is drawn at random and the kernel
asked until it agrees. The id is taken for as long as the descriptor is open, which is then the
monitor's to inherit; so nothing is left over when it ends. Source: ``linux/vhost.h``, the kernel's
``drivers/vhost/vsock.c``.
"""

from __future__ import annotations

import errno
import os

from kata.errors import HostError
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

DEVICE = "/dev/vhost-vsock"
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
_FIRST_CID = 3  # 0 to 2 mean hypervisor, local and host
_LAST_CID = 0x7FFFFFFF
_TRIES = 64
_RETRY_S = 0.01
# A guest without a listener answers with a reset; one whose driver is not there yet does not answer, and the
# kernel gives up after two seconds; which error that is depends on how far the device has come.
NOT_YET = (
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ETIMEDOUT,
    errno.ENODEV,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.EPIPE,
)


class Vsock:
    """A vhost-vsock device: an open ``/dev/vhost-vsock`` on which the CID is already ours."""

    __slots__ = ("cid", "fd")

    def __init__(self, cid: int, fd: Fd) -> None:
        self.cid = cid
        self.fd = fd


def usable() -> str:
    """Empty if guests can have vsock on this host, else why not."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {DEVICE} (modprobe vhost_vsock)"
    except OSError as error:
        return f"{DEVICE} cannot be opened: {error.strerror}"
    return ""


def allocate() -> Vsock | None:
    """Open the device and take a CID.

    Returns:
        The CID and its descriptor; None where the host has no such device.

    Raises:
        HostError: The device is there but gives no CID.
    """
    from fcntl import ioctl

    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for _ in range(_TRIES):
            cid = _FIRST_CID + int.from_bytes(os.urandom(4), "little") % (_LAST_CID - _FIRST_CID)
            try:
                ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, cid.to_bytes(8, "little"))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise HostError(f"{DEVICE} gives no context id: {error.strerror}") from error
            return Vsock(cid, Fd(fd))
        raise HostError(f"{DEVICE} gives no context id: {_TRIES} random ones were all in use")
    except BaseException:
        os.close(fd)
        raise


async def connect(cid: int, port: int) -> socket.socket:
    """A connection to a guest that may still be booting: tries until somebody listens there.

    The caller bounds the time, and ends this when the machine ends.

    Args:
        cid: The guest's.
        port: Its port.

    Returns:
        The connected, non-blocking socket; it is the caller's.

    Raises:
        HostError: This host cannot make such connections.
    """
    import asyncio
    import socket

    loop = asyncio.get_running_loop()
    while True:
        try:
            sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise HostError(f"cannot open a vsock: {error.strerror}", "modprobe vhost_vsock") from error
        try:
            await loop.sock_connect(sock, (cid, port))
        except OSError as error:
            sock.close()
            if error.errno not in NOT_YET:
                raise HostError(
                    f"cannot connect to the guest's vsock port {port}: {error.strerror}"
                ) from error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
        await asyncio.sleep(_RETRY_S)
