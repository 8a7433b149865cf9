"""Images that are made to be nasty, and what `kata inspect-image` is to say of each: no more, and no less.

A case is a function that returns an `Image`. Findings are compared as (kind, path), packages as (kind, name, version).
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from image_support import compress
from planted_files import END

Finding = tuple[str, str]
Package = tuple[str, str, str]


class Stored(NamedTuple):
    """A layer as it is stored, the media type's ending, and the digest that the manifest gives if it is a lie."""

    data: bytes
    how: str = "gzip"
    digest: str = ""


class Image(NamedTuple):
    """An image and what is right to say of it.

    Attributes:
        layers: Archives, or layers as they are stored.
        findings: Kind and path of each.
        packages: Kind, name and version of each.
        config: The configuration's ``config``; a string for the whole text of one.
        hidden: Paths that later layers hide.
        scripts: Paths of the scripts that are started.
        more: Further members of the configuration.
        missing: Numbers of layers whose blob is not there.
        text: Strings that no report may have.
    """

    layers: list[bytes | Stored]
    findings: list[Finding] = []
    packages: list[Package] = []
    config: dict[str, Any] | str = {}
    hidden: list[str] = []
    scripts: list[str] = []
    more: dict[str, Any] = {}
    missing: tuple[int, ...] = ()
    text: tuple[str, ...] = ()


CASES: dict[str, Callable[[], Image]] = {}
"""By name; `cases` has those of all modules."""


LARGE = {"a-bomb"}
"""Those that take seconds to make and to read: cases of ``make inspect-suite`` alone."""


def case(function: Callable[[], Image]) -> Callable[[], Image]:
    CASES[function.__name__.replace("_", "-")] = function
    return function


def write(image: Image, directory: Path) -> Path:
    """Write an OCI layout of the image."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str, digest: str = "") -> dict[str, Any]:
        digest = digest or "sha256:" + hashlib.sha256(data).hexdigest()
        (blobs / digest[7:]).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    layers, diff_ids = [], []
    for number, one in enumerate(image.layers):
        stored = one if isinstance(one, Stored) else Stored(compress(one, "gzip"))
        ending = f"+{stored.how}" if stored.how else ""
        layers.append(put(stored.data, f"application/vnd.oci.image.layer.v1.tar{ending}", stored.digest))
        plain = stored.data if isinstance(one, Stored) else one
        diff_ids.append("sha256:" + hashlib.sha256(plain).hexdigest())
        if number in image.missing:
            (blobs / layers[-1]["digest"][7:]).unlink()
    content: dict[str, Any] = {
        "architecture": "amd64", "os": "linux", "config": image.config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids}, **image.more,
    }  # fmt: skip
    text = image.config if isinstance(image.config, str) else json.dumps(content)
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(text.encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    }
    top = put(json.dumps(manifest).encode(), manifest["mediaType"])
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    return directory


def raw(*members: bytes) -> bytes:
    """An archive of members that were made by hand."""
    return b"".join(members) + END


def cases(*, large: bool = True) -> dict[str, Callable[[], Image]]:
    """All images by name; without *large*, those that take seconds are left out."""
    for module in ("planted_contents", "planted_archives", "planted_packages", "planted_programs"):
        importlib.import_module(module)
    return {name: make for name, make in CASES.items() if large or name not in LARGE}
