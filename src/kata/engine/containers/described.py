"""What a client calls a container: name, image, labels."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.settings import SandboxSettings

_POD_NAME = "io.kubernetes.pod.name"
_POD = {
    "io.kubernetes.cri.sandbox-name": _POD_NAME,
    "io.kubernetes.cri.sandbox-namespace": "io.kubernetes.pod.namespace",
    "io.kubernetes.cri.sandbox-uid": "io.kubernetes.pod.uid",
    _POD_NAME: _POD_NAME,
    "io.kubernetes.pod.namespace": "io.kubernetes.pod.namespace",
    "io.kubernetes.pod.uid": "io.kubernetes.pod.uid",
}
"""What containerd and CRI-O say of a container's pod, and by which labels Kubernetes knows it."""
_PAUSE = ("", "POD")
"""What they call the container that stands for the pod: it gets the pod's name."""


def described(settings: SandboxSettings, container_id: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A container's ``name``, ``image`` and ``labels``, as far as its client has said them.

    Args:
        settings: The sandbox's.
        container_id: Its id.
        config: Its specification.

    Returns:
        Those three; texts of a client's, neither bounded nor escaped.
    """
    annotations = config.get("annotations") or {}
    own = settings.container
    if own is not None and container_id == settings.id:
        record = _record(os.path.join(own.directory, "container.json"))
        return {
            "name": str(record.get("name", "")),
            "image": str((record.get("image") or {}).get("reference", "")),
            "labels": record.get("labels") or {},
        }
    pod = {label: str(annotations[name]) for name, label in _POD.items() if name in annotations}
    name = str(
        annotations.get("io.kubernetes.cri.container-name")
        or annotations.get("io.kubernetes.container.name")
        or annotations.get("nerdctl/name")
        or ""
    )
    if name in _PAUSE:
        name = pod.get(_POD_NAME, "")
    return {
        "name": name,
        "image": str(
            annotations.get("io.kubernetes.cri.image-name")
            or annotations.get("io.kubernetes.cri-o.ImageName")
            or ""
        ),
        "labels": pod,
    }


def _record(path: str) -> dict[str, Any]:
    import json

    try:
        with open(path, "rb") as file:
            record = json.loads(file.read(1 << 20))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
