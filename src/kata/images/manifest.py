"""Checks manifests, indexes and configurations, and chooses between manifests.

All of these are untrusted input, so every field is checked before it is used.

Sources: OCI image specification (``manifest.md``, ``image-index.md``, ``config.md``); Docker's
``image/spec`` 1.2 and registry "Image Manifest Version 2, Schema 2", which have the same fields.
"""

from __future__ import annotations

import json
import re

from kata.errors import ImageError
from kata.images.platform import Platform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_DOCUMENT = 8 << 20
"""Maximum size of a manifest or configuration, in bytes; registries accept 4 MiB."""
_MAX_LAYERS = 1000

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)")
_PLATFORM = re.compile(r"[A-Za-z0-9_.-]{0,40}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HINT = "the image is malformed; have it built or pushed again"


class Descriptor:
    """A reference to a blob: digest, size and type.

    Attributes:
        digest: ``sha256:...``.
        size: Bytes.
        media_type: May be "".
        platform: Platform of a manifest in an index; None if it has none.
        annotations: Its annotations.
    """

    __slots__ = ("annotations", "digest", "media_type", "platform", "size")

    def __init__(
        self, digest: str, size: int, media_type: str = "", platform: Platform | None = None,
        annotations: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.digest = digest
        self.size = size
        self.media_type = media_type
        self.platform = platform
        self.annotations = annotations or {}


class Config:
    """The parts of an image's configuration that are used.

    Attributes:
        platform: The platform that it is built for.
        created: RFC 3339 time, or "".
        config: Env, Cmd, Entrypoint, ... with the types checked.
        diff_ids: Digests of the uncompressed layers, lowest first.
    """

    __slots__ = ("config", "created", "diff_ids", "platform")

    def __init__(
        self, platform: Platform, created: str, config: dict[str, Any], diff_ids: list[str]
    ) -> None:
        self.platform = platform
        self.created = created
        self.config = config
        self.diff_ids = diff_ids


def shown(text: str) -> str:
    """A string from an image, made safe for an error message."""
    return "".join(char if char.isprintable() else "?" for char in text[:100])


def document(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: The document.
        what: Its name, for errors.

    Raises:
        ImageError: It is not a JSON object.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise ImageError(f"{what} is not JSON", _HINT) from None
    if not isinstance(content, dict):
        raise ImageError(f"{what} is not a JSON object", _HINT)
    return content


def digest_of(data: bytes) -> str:
    """The digest of some bytes: ``sha256:...``."""
    import hashlib  # not above: finding a stored image needs this module, but no digest

    return "sha256:" + hashlib.sha256(data).hexdigest()


def verify(data: bytes, digest: str, what: str) -> None:
    """Check a document against the digest by which it was requested.

    Raises:
        ImageError: They differ.
    """
    import hashlib

    algorithm, _, _ = digest.partition(":")
    if algorithm not in ("sha256", "sha512"):
        raise ImageError(f"{what} has a digest of the unknown kind {algorithm[:20]!r}", _HINT)
    if f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}" != digest:
        raise ImageError(
            f"{what} does not have the digest {digest}: it was damaged or exchanged", "fetch it again"
        )


def descriptor(content: Any, what: str) -> Descriptor:
    """Check a descriptor.

    Raises:
        ImageError: It is malformed.
    """
    if not isinstance(content, dict):
        raise ImageError(f"{what} has no proper descriptor", _HINT)
    digest, size = content.get("digest"), content.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ImageError(f"{what} has the digest {str(digest)[:100]!r}, which is not a sha256", _HINT)
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ImageError(f"{what} has no proper size", _HINT)
    media_type = content.get("mediaType")
    given = content.get("platform")
    annotations = content.get("annotations")
    return Descriptor(
        digest,
        size,
        media_type if isinstance(media_type, str) else "",
        _platform(given) if isinstance(given, dict) else None,
        {k: v for k, v in annotations.items() if isinstance(v, str)}
        if isinstance(annotations, dict)
        else None,
    )


def _platform(content: dict[str, Any]) -> Platform:
    fields = [content.get(key) for key in ("os", "architecture", "variant")]
    os_name, arch, variant = (
        field if isinstance(field, str) and _PLATFORM.fullmatch(field) else "" for field in fields
    )
    return Platform(os_name or "linux", arch or "amd64", variant)


def is_index(content: dict[str, Any]) -> bool:
    """Whether a document is an index rather than a manifest."""
    return content.get("mediaType") in INDEX_TYPES or (
        "manifests" in content and "layers" not in content and "config" not in content
    )


def listed(content: dict[str, Any], what: str) -> list[Descriptor]:
    """Return the descriptors of an index.

    Raises:
        ImageError: It is malformed.
    """
    manifests = content.get("manifests")
    if not isinstance(manifests, list):
        raise ImageError(f"{what} lists no manifests", _HINT)
    if len(manifests) > _MAX_LAYERS:
        raise ImageError(
            f"{what} lists {len(manifests)} manifests; at most {_MAX_LAYERS} are taken",
            "use an index of fewer images",
        )
    found = [descriptor(item, f"{what}, manifest {number}") for number, item in enumerate(manifests)]
    for item in found:
        item.media_type = item.media_type or MANIFEST_TYPES[0]
    return found


def is_attestation(item: Descriptor) -> bool:
    """Whether an entry of an index describes an image instead of being one."""
    return "vnd.docker.reference.type" in item.annotations


def fitness(item: Descriptor, wanted: Platform) -> int:
    """Rank an entry of an index for a platform; see `Platform.rank`."""
    if item.platform is None:
        return 50  # unknown; the configuration will tell
    return -1 if is_attestation(item) else item.platform.rank(wanted)


def choose(candidates: list[Descriptor], wanted: Platform, what: str) -> Descriptor:
    """Choose the manifest of an index that fits a platform best.

    Raises:
        ImageError: None fits.
    """
    best: tuple[int, Descriptor] | None = None
    for item in candidates:
        rank = fitness(item, wanted)
        if rank >= 0 and (best is None or rank < best[0]):
            best = (rank, item)
    if best is None:
        offered = sorted(
            {str(item.platform) for item in candidates if item.platform and item.platform.os != "unknown"}
        )
        raise ImageError(
            f"{what} is not offered for {wanted}, only for: {', '.join(offered)[:500] or 'nothing'}",
            "choose an image that is built for this machine",
        )
    return best[1]


def layers(content: dict[str, Any], what: str) -> tuple[Descriptor, list[Descriptor]]:
    """Return the configuration and the layers of a manifest.

    Raises:
        ImageError: It is malformed, too old, or not a container image's.
    """
    if content.get("schemaVersion") == 1 or "fsLayers" in content:
        raise ImageError(
            f"{what} is a schema 1 manifest, which was given up in 2017",
            "have the image pushed again by a newer tool",
        )
    given = content.get("layers")
    if content.get("schemaVersion") != 2 or not isinstance(given, list):
        raise ImageError(f"{what} is not an image manifest", _HINT)
    if len(given) > _MAX_LAYERS:
        raise ImageError(
            f"{what} names {len(given)} layers; at most {_MAX_LAYERS} are taken",
            "have the image built with fewer layers",
        )
    config = descriptor(content.get("config"), f"{what}, configuration")
    if config.media_type and config.media_type not in CONFIG_TYPES:
        raise ImageError(
            f"{what} is not a container image but {config.media_type[:100]!r}",
            "name an image that can be run",
        )
    found = [descriptor(item, f"{what}, layer {number}") for number, item in enumerate(given, 1)]
    for number, layer in enumerate(found, 1):
        if layer.media_type.endswith("+encrypted"):
            raise ImageError(f"{what}, layer {number} is encrypted", "use the image's unencrypted form")
    return config, found


_STRINGS = ("User", "WorkingDir", "StopSignal")
_LISTS = ("Env", "Cmd", "Entrypoint")
_OBJECTS = ("ExposedPorts", "Volumes", "Labels")


def configuration(data: bytes, what: str) -> Config:
    """Parse and check an image configuration.

    Raises:
        ImageError: It is malformed.
    """
    content = document(data, what)
    rootfs = content.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if diff_ids is None:
        diff_ids = []
    if not isinstance(diff_ids, list) or not all(
        isinstance(d, str) and _DIGEST.fullmatch(d) for d in diff_ids
    ):
        raise ImageError(f"{what} has no proper list of layers (rootfs.diff_ids)", _HINT)
    run_defaults = content.get("config")
    if run_defaults is None:
        run_defaults = {}
    if not isinstance(run_defaults, dict):
        raise ImageError(f"{what} has a config that is not an object", _HINT)
    kept: dict[str, Any] = {}
    for key, value in run_defaults.items():
        if value is None:
            continue
        wrong = (
            (key in _STRINGS and not isinstance(value, str))
            or (key in _LISTS and not (isinstance(value, list) and all(isinstance(v, str) for v in value)))
            or (key in _OBJECTS and not isinstance(value, dict))
        )
        if wrong:
            raise ImageError(f"{what} has a config.{key} of the wrong type", _HINT)
        if key in _STRINGS + _LISTS + _OBJECTS:
            if not _is_text(value):
                raise ImageError(f"{what} has a config.{key} that is not text", _HINT)
            kept[key] = value
    if not all(isinstance(value, str) for value in kept.get("Labels", {}).values()):
        raise ImageError(f"{what} has a label that is not a string", _HINT)
    created = content.get("created")
    if not isinstance(created, str) or not _TIME.fullmatch(created):
        created = ""
    return Config(_platform(content), created, kept, diff_ids)


def _is_text(value: Any) -> bool:
    """Whether all strings of a value are valid text: without lone surrogates and NUL."""
    if isinstance(value, dict):
        value = [*value, *(item for item in value.values() if isinstance(item, str))]
    whole = value if isinstance(value, str) else "".join(value)
    try:
        whole.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in whole


def chain_id(diff_ids: list[str]) -> str:
    """Compute the digest that identifies a stack of layers (OCI image specification, "Layer ChainID")."""
    if not diff_ids:
        return digest_of(b"")
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = digest_of(f"{chain} {diff_id}".encode())
    return chain
