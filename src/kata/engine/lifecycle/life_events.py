"""What an engine writes of its sandbox to the node's events (`kata.events`), and to its own log.

What happens to tasks comes from the events that containerd is told, in their order, whoever the client is; the rest
from the sandbox's states.
"""

from __future__ import annotations

import os

from kata import events
from kata.engine.containers.described import described
from kata.engine.lifecycle.sandbox_state import SandboxState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.engine.log import EngineLog
    from kata.errors import KataError
    from kata.settings import SandboxSettings

_OF_STATE = {
    SandboxState.READY: "sandbox.ready",
    SandboxState.FAILED: "sandbox.failed",
    SandboxState.STOPPED: "sandbox.stopped",
}
_FAULTS = frozenset({"sandbox.failed", "container.oom", "disk.error"})
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
        settings: The sandbox's.
        run_dir: The sandbox's directory; the events are in the one above that of all sandboxes.
        log: The engine's, which has a line for each event.
    """

    __slots__ = ("_directory", "_failed", "_log", "_settings")

    def __init__(self, settings: SandboxSettings, run_dir: str, log: EngineLog) -> None:
        self._settings = settings
        self._directory = os.path.dirname(os.path.dirname(run_dir))
        self._log = log
        self._failed = False

    def record(self, event: str, **members: Any) -> None:
        """Write an event. Nothing that happens fails for want of its record; that there is none is said once.

        Args:
            event: What has happened.
            members: What else is known of it, as values of JSON.
        """
        client = self._settings.client
        known = {
            "sandbox": self._settings.id,
            "container": members.pop("container", None),
            "client": client.name,
            "namespace": client.namespace,
        }
        level = "warning" if event in _FAULTS else "info"
        self._log.write(event, level, event=event, **({"container": known["container"]} | members))
        try:
            events.append(event, known | members, self._directory)
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._log.write(
                    f"events of this sandbox are not recorded: {error.strerror}: {self._directory}"
                )
            self._failed = True

    def entered(self, state: SandboxState, reason: KataError | None) -> None:
        """The sandbox has gone to a state."""
        event = _OF_STATE.get(state)
        if state is SandboxState.BOOTING:
            known: dict[str, Any] = {}
            if self._settings.machine is not None:
                size = self._settings.machine.size
                known = {"vcpus": size.vcpus, "memory_mib": size.memory_mib}
            self.record("sandbox.created", **self._names(self._settings.id, {}), **known)
        elif event is not None:
            self.record(event, error=reason.message if reason is not None else None)

    def ended(self, journal: str) -> None:
        """The sandbox has ended.

        Args:
            journal: Path of its journal. Where that is still there, something could not be undone: whoever does that
                writes the sandbox's end.
        """
        if not os.path.lexists(journal):
            self.record("sandbox.ended")

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
        elif event is not None:
            known: dict[str, Any] = {}
            if topic == "/tasks/create" and container is not None:
                known = self._names(container.id, container.config)
            self.record(event, container=identity, exec=getattr(message, "exec_id", None), **known)

    def _names(self, container_id: str, config: Mapping[str, Any]) -> dict[str, Any]:
        about = described(self._settings, container_id, config)
        return {"name": about["name"], "image": about["image"]}
