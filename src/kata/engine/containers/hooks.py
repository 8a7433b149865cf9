"""Hooks of the runtime specification that run on the host (config.md, "POSIX-platform Hooks").

They run in the host's own mount and network namespace, where the client that wrote them lives, not in the
sandbox's; with the container's state on standard input. So do ``createContainer`` hooks, which the specification puts
into the container's namespaces: those are in the guest, and what the host has of them is the root directory, in which
these hooks start, as with runc. What such a hook writes there the container finds; what it mounts there it does not.

A failing hook fails the creation or the start that it belongs to, as with runc. When the container has ended it changes
nothing any more, and the hooks behind it run.

Blocks: for the helper thread.
"""

from __future__ import annotations

import json
import os
import subprocess

from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from kata.engine.hostns import Namespaces

SAID_BYTES = 2000
HINT = "It is in hooks of the bundle's config.json, put there by the client that made the container."


def state(
    container_id: str, bundle: str, pid: int, status: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The state that a hook gets (runtime.md, "State").

    Args:
        container_id: Its id.
        bundle: Its bundle's path.
        pid: The host process that stands for the container: its network namespace is the container's.
        status: ``creating``, ``created``, ``running`` or ``stopped``.
        config: Its spec.
    """
    return {
        "ociVersion": str(config.get("ociVersion") or "1.0.2"),
        "id": container_id,
        "status": status,
        "pid": pid,
        "bundle": bundle,
        "annotations": dict(config.get("annotations") or {}),
    }


def run(
    kind: str,
    hooks: Sequence[Mapping[str, Any]],
    container: Mapping[str, Any],
    host: Namespaces,
    directory: str = "/",
) -> None:
    """Run the hooks of one kind, one after the other.

    Args:
        kind: Their name in the spec, for errors.
        hooks: The spec's list.
        container: See `state`.
        host: Where they run.
        directory: Their working directory there.

    Raises:
        HostError: One could not be executed, failed, or took longer than it may; in runc's words, which its callers
            read, and with what it wrote to standard error. Those behind it have not run.
    """

    def enter() -> None:
        host.enter()
        os.chdir(directory)

    text = json.dumps(container).encode()
    for number, hook in enumerate(hooks):
        path = str(hook.get("path") or "")
        name = f"error running {kind} hook #{number}: {path}"
        environment = dict(entry.partition("=")[::2] for entry in hook.get("env") or ())
        try:
            done = subprocess.run(
                list(hook.get("args") or [path]),
                executable=path,
                input=text,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=hook.get("timeout") or None,
                preexec_fn=enter,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise HostError(f"{name} took longer than its {hook['timeout']} s", HINT) from None
        except (OSError, subprocess.SubprocessError) as error:
            raise HostError(f"{name} cannot be executed: {error}", HINT) from None
        if done.returncode:
            from kata.agent.text import escape_line

            error_output = escape_line(done.stderr[-SAID_BYTES:].decode(errors="replace").strip())
            raise HostError(
                f"{name} ended with {done.returncode}" + (f": {error_output}" if error_output else ""),
                HINT,
            )
