"""``exec`` without a command: in the original a shell of a sandbox's guest, its debug console.

The guest of this project has no shell, since its agent is its only program. So the error names what shows the same: a
shell of a container, in the words of whoever made it, and the agent's own calls.
"""

from __future__ import annotations

import os

from kata.errors import KataError, NotFoundError, UsageError
from kata.oci_runtime import records
from kata.oci_runtime.global_options import PROGRAM

_SHELLS = {
    "kata": "kata exec -it {id} sh",
    "oci": f"{PROGRAM} exec -t {{id}} sh",
    "k8s.io": "crictl exec -it CONTAINER sh",
    "moby": "docker exec -it {id} sh",
}
"""Name of a client, or containerd's namespace -> what makes a shell in one of its containers."""


def refusal(root: str, reference: str) -> KataError:
    """The error of an ``exec`` without a command.

    Args:
        root: The directory of the records.
        reference: What was named: a container of the OCI command line, or any sandbox of this host.
    """
    if records.find(root, reference) is not None:
        return UsageError(
            f"exec: no command for container {reference!r}",
            f"a shell of it: {_SHELLS['oci'].format(id=reference)}",
        )
    from kata.cli import sandboxes

    try:
        directory = sandboxes.find(reference)
    except NotFoundError:
        return NotFoundError(
            f"there is no container and no running sandbox {reference!r}",
            f"{PROGRAM} list, kata ps, crictl pods",
        )
    except KataError as error:  # several
        return error
    settings = sandboxes.settings_by_directory().get(directory, {})
    client = settings.get("client") or {}
    namespace = str(client.get("namespace") or "")
    shell = (
        _SHELLS.get(namespace)
        or _SHELLS.get(str(client.get("name")))
        or (f"nerdctl -n {namespace} exec -it {{id}} sh" if namespace else "that of whoever made it")
    )
    name = str(settings.get("id") or os.path.basename(directory))
    return UsageError(
        f"exec: no command, and there is no debug console of sandbox {reference!r}: its guest has no shell",
        f"a shell of its container: {shell.format(id=name)};"
        f" the guest itself, by its agent: kata-agent-ctl --sandbox {name}",
    )
