"""``delete``: clear up after a sandbox whose engine is dead, or cannot be reached."""

from __future__ import annotations

import os
import time

from kata.engine.launch import check_id
from kata.errors import HostError
from kata.paths import sandbox_dir
from kata.shim.names import directory_name, required

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

KILLED = 137
GRACE_S, KILL_S, UNDO_S = 1.0, 0.5, 2.5
"""Together less than the 5 s after which containerd kills this command and leaves the bundle where it is."""


def delete(values: Mapping[str, str]) -> bytes:
    """Undo what the journal of the container's own sandbox names; a pod's sandbox is not its containers' to end.

    Args:
        values: The options.

    Returns:
        The DeleteResponse in wire format.

    Raises:
        HostError: Something could not be undone; a second call tries again.
    """
    namespace, container_id = required(values, "namespace"), check_id(required(values, "id"))
    directory = sandbox_dir(directory_name(namespace, container_id))
    if os.path.isdir(directory):  # otherwise it ended as it should
        from kata import journal_undo

        left = journal_undo.end_and_undo(directory, GRACE_S, KILL_S, UNDO_S)
        if left:
            raise HostError(f"sandbox {container_id} left something behind: {left[0]}", "kata gc")
    from kata.proto.google_pb import Timestamp
    from kata.proto.task_pb import DeleteResponse

    now = time.time_ns()
    return DeleteResponse(
        exit_status=KILLED, exited_at=Timestamp(seconds=now // 10**9, nanos=now % 10**9)
    ).encode()
