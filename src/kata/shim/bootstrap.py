"""How containerd and ``start`` talk to each other, which has changed with its versions.

Until 2.2 standard input holds the runtime's options, if anything, and the answer is an address. From 2.3 on it holds a
BootstrapParams and the answer is a BootstrapResult; that the input is one is told by its naming the very container that
the options on the command line name.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.proto.bootstrap_pb import BootstrapParams

TASK_VERSION = 3
"""Of the Task service, for a containerd that knows it: the containers of a pod are then made without asking us for
the address again."""


def params(raw: bytes, namespace: str, container_id: str) -> BootstrapParams | None:
    """What was on standard input, if it is containerd 2.3's.

    Args:
        raw: What was there (`kata.shim.options.given`).
        namespace: As on the command line.
        container_id: The same.
    """
    if not raw:
        return None
    from kata.proto.bootstrap_pb import BootstrapParams
    from kata.proto.wire import DecodeError

    try:
        found = BootstrapParams.decode(raw)
    except DecodeError:
        return None
    return found if (found.namespace, found.instance_id) == (namespace, container_id) else None


def answer(address: str, *, bootstrapped: bool) -> bytes:
    """What ``start`` prints.

    Args:
        address: Where the engine listens, ``unix://...``.
        bootstrapped: containerd gave a BootstrapParams.
    """
    if not bootstrapped:
        return address.encode()
    from kata.proto.bootstrap_pb import BootstrapResult

    return BootstrapResult(version=TASK_VERSION, address=address, protocol="ttrpc").encode()
