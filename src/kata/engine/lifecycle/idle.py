"""When an engine has nothing left to do, and ends by itself.

What follows from the lease of the client that started it (`kata.engine.launch.Lease`) and from what the sandbox is
doing is one pure function, `next_action`.
"""

from __future__ import annotations

from kata.engine.launch import Lease

KEEP = "keep"
"""Somebody may still want the sandbox."""
WAIT = "wait"
"""Nobody seems to want it: end it when that has been so for long enough."""
END = "end"
"""Nobody can want it: end it now."""


def next_action(
    lease: str,
    *,
    has_clients: bool,
    has_containers: bool,
    had_container: bool,
    saw_stale_client: bool,
    survives_clients: bool,
    is_pod: bool,
) -> str:
    """What an engine without a living container does next.

    Args:
        lease: `Lease.HELD`, `RELEASED` or `BROKEN`.
        has_clients: A client is connected.
        has_containers: There are containers, which have ended.
        had_container: There has been one, or CreateSandbox has made the pod's machine.
        saw_stale_client: A client has asked about a container though there is none: it was killed before Create, or in
            the midst of Delete, and takes the engine for a task since it is back.
        survives_clients: The client may restart and come back (containerd): what has ended counts as wanted until it is
            deleted.
        is_pod: The sandbox is a pod of the Sandbox API, which exists without containers.

    Returns:
        KEEP, WAIT or END.
    """
    if not has_containers:
        unknown = lease == Lease.BROKEN and not had_container and not has_clients
        if unknown or saw_stale_client:
            return END
    may_be_wanted = survives_clients and (has_containers or (is_pod and had_container))
    if has_clients or may_be_wanted or lease == Lease.HELD:
        return KEEP
    return WAIT
