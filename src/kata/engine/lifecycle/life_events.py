"""What an engine writes of its sandbox to the node's events (`kata.events`), and to its own log.

What happens to tasks comes from the events that containerd is told, in their order, whoever the client is; the rest
from the sandbox's states.
"""

from __future__ import annotations

import os

from kata import events
from kata.engine.lifecycle.sandbox_state import SandboxState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.errors import KataError

_OF_STATE = {
    SandboxState.BOOTING: "sandbox.created",
    SandboxState.READY: "sandbox.ready",
    SandboxState.FAILED: "sandbox.failed",
    SandboxState.STOPPED: "sandbox.stopped",
    SandboxState.ENDED: "sandbox.ended",
}
_OF_TASK = {
    "/tasks/create": "container.created",
    "/tasks/start": "container.started",
    "/tasks/oom": "container.oom",
    "/tasks/paused": "container.paused",
    "/tasks/resumed": "container.resumed",
    "/tasks/exec-started": "exec.started",
}


class LifeEvents:
    """The events of one sandbox.

    Args:
        sandbox_id: Its id.
        client: Name of its client.
        namespace: containerd's namespace; empty without one.
        run_dir: The sandbox's directory; the events are in the one above that of all sandboxes.
        log: Is given a sentence.
    """

    __slots__ = ("_client", "_directory", "_failed", "_id", "_log", "_namespace")

    def __init__(
        self, sandbox_id: str, client: str, namespace: str, run_dir: str, log: Callable[[str], None]
    ) -> None:
        self._id = sandbox_id
        self._directory = os.path.dirname(os.path.dirname(run_dir))
        self._client = client
        self._namespace = namespace
        self._log = log
        self._failed = False

    def record(self, event: str, **members: Any) -> None:
        """Write an event. Nothing that happens fails for want of its record; that there is none is said once.

        Args:
            event: What has happened.
            members: What else is known of it, as values of JSON.
        """
        known = {
            "sandbox": self._id,
            "container": members.pop("container", None),
            "client": self._client,
            "namespace": self._namespace,
        }
        try:
            events.append(event, known | members, self._directory)
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._log(f"events of this sandbox are not recorded: {error.strerror}: {self._directory}")
            self._failed = True

    def entered(self, state: SandboxState, reason: KataError | None) -> None:
        """The sandbox has gone to a state."""
        event = _OF_STATE.get(state)
        if event is not None:
            self.record(event, error=reason.message if reason is not None else None)

    def of_task(self, topic: str, message: Any, container: Any = None) -> None:
        """Something has happened to a task.

        Args:
            topic: containerd's topic.
            message: The event that belongs to it.
            container: The container, where it is known: its process says whether it ended for want of memory.
        """
        identity = message.container_id
        event = _OF_TASK.get(topic)
        if topic == "/tasks/exit":
            of_exec = message.id != identity
            members: dict[str, Any] = {"exit_code": message.exit_status}
            if of_exec:
                members["exec"] = message.id
            elif container is not None:
                members["oom_killed"] = container.init.oom_killed
                members["error"] = container.init.error
            self.record("exec.exited" if of_exec else "container.exited", container=identity, **members)
        elif topic == "/tasks/delete":
            if message.id in ("", identity):
                self.record("container.deleted", container=identity)
        elif event is not None:
            self.record(event, container=identity, exec=getattr(message, "exec_id", None))
