"""Parses the names of images that users write, and normalises them as Docker does.

=========================  ============================================================
``oci:DIR[:TAG]``          an OCI image layout in a directory; ``:@0`` is its first image, ``:@1`` the next
``oci-archive:FILE[:TAG]`` the same in a tar file
``docker-archive:FILE[:TAG]``  what ``docker save`` writes
``rootfs:DIR``             a directory that is the root file system
anything else              a registry reference: ``alpine`` is ``docker.io/library/alpine:latest``
=========================  ============================================================

Sources: OCI distribution specification (name and tag grammar), Docker's ``distribution/reference``.
On the hot path: imports only modules that `json` imports as well.
"""

from __future__ import annotations

import os
import re

from kata.errors import ImageError, UsageError

LOCAL_KINDS = ("oci", "oci-archive", "docker-archive", "rootfs")

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


class Reference:
    """A registry reference.

    Attributes:
        host: Registry, with its port if one is given; ``docker.io`` for Docker Hub.
        path: Repository.
        tag: Tag, or "" when only a digest is given.
        digest: ``sha256:...`` or "".
    """

    __slots__ = ("digest", "host", "path", "tag")

    def __init__(self, host: str, path: str, tag: str, digest: str) -> None:
        self.host = host
        self.path = path
        self.tag = tag
        self.digest = digest

    @property
    def repository(self) -> str:
        """``docker.io/library/alpine``."""
        return f"{self.host}/{self.path}"

    def __str__(self) -> str:
        """The full name: ``docker.io/library/alpine:latest``, or with ``@digest`` (then without the tag)."""
        if self.digest:
            return f"{self.repository}@{self.digest}"
        return f"{self.repository}:{self.tag}"

    def familiar(self) -> str:
        """The usual short form: ``alpine:latest``."""
        return familiar(str(self))


class LocalImage:
    """An image in a file or directory.

    Attributes:
        kind: One of `LOCAL_KINDS`.
        path: Absolute path.
        tag: Tag, or "" when none is given.
    """

    __slots__ = ("kind", "path", "tag")

    def __init__(self, kind: str, path: str, tag: str) -> None:
        self.kind = kind
        self.path = path
        self.tag = tag

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" + (f":{self.tag}" if self.tag else "")


def parse(text: str) -> Reference | LocalImage:
    """Parse an IMAGE argument.

    Args:
        text: The argument as written.

    Raises:
        UsageError: It is malformed.
        ImageError: The file or directory does not exist.
    """
    kind, colon, rest = text.partition(":")
    if colon and kind in LOCAL_KINDS:
        return _local(kind, rest)
    if kind in _OTHER_TRANSPORTS and ("-" in kind or rest.startswith(("/", "."))):
        name = rest.removeprefix("//").rpartition("]")[2] or "IMAGE"
        raise UsageError(
            f"{kind}: is a word of skopeo's and Podman's that kata does not know",
            _OTHER_TRANSPORTS[kind].format(name=name[:200]),
        )
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        raise UsageError(f"{text!r} is a path, and its kind is not said", _which_kind(text))
    try:
        return parse_reference(text)
    except UsageError as error:
        if os.path.exists(text):
            raise UsageError(error.message, _which_kind(text)) from None
        raise


_OTHER_TRANSPORTS = {
    "docker-daemon": "docker save {name} -o image.tar, and then docker-archive:image.tar",
    "containers-storage": "podman save --format oci-archive {name} -o image.tar, and then oci-archive:image.tar",
    "docker": "leave the prefix out: {name}",
    "dir": "skopeo copy dir:{name} oci:DIR, and then oci:DIR",
    "ostree": "skopeo copy ostree:{name} oci:DIR, and then oci:DIR",
    "sif": "skopeo copy sif:{name} oci:DIR, and then oci:DIR",
}
"""Hints for other prefixes of containers-transports(5). ``docker:dind`` and ``dir:5000/x`` are image names, though."""


def hint_for_path(text: str) -> str:
    """What to write instead of *text* if a file or directory of that name was meant; empty if there is none.

    For when there is no image of that name: ``alpine`` may well be a directory here as well.
    """
    return f"{text[:200]!r} is also a path here: {_which_kind(text)}" if os.path.exists(text) else ""


def _which_kind(path: str) -> str:
    """The hint for a path without a prefix, depending on what the path is."""
    shown = path if len(path) <= 200 else "FILE"
    if os.path.isdir(path):
        kind = "oci" if os.path.exists(os.path.join(path, "oci-layout")) else "rootfs"
        return f"write {kind}:{shown}"
    if not os.path.exists(path):
        return (
            f"nothing is there (the path is relative to {os.getcwd()}); "
            "images in files have a prefix, such as oci-archive:FILE"
        )
    from kata.images import peek

    kind = peek.kind_of(path)
    if kind == peek.PACKED:  # either prefix takes both kinds
        return f"write docker-archive:{shown} or oci-archive:{shown}, if it is an image"
    if kind in (peek.OCI, peek.DOCKER):
        return f"write {kind}:{shown}"
    if kind == peek.TAR:
        return f"is it a root file system? unpack it: mkdir root && tar -xf {shown} -C root, and then rootfs:root"
    return "it is no image archive; images in files are oci-archive:FILE and docker-archive:FILE"


def _local(kind: str, rest: str) -> LocalImage:
    wanted = os.path.isdir if kind in ("oci", "rootfs") else os.path.isfile
    what = "directory" if kind in ("oci", "rootfs") else "file"
    if not rest:
        raise UsageError(f"{kind}: names no {what}", f"write {kind}:{what.upper()}")
    if wanted(rest):
        return LocalImage(kind, os.path.abspath(rest), "")
    if kind != "rootfs":
        at = rest.rfind(":")
        while at > 0:  # a path and a tag may contain colons: the longest path that exists wins
            if wanted(rest[:at]):
                tag = rest[at + 1 :]
                if not tag:
                    raise UsageError(
                        f"{kind}:{rest} ends with a colon but names no tag", "add the tag, or drop ':'"
                    )
                return LocalImage(kind, os.path.abspath(rest[:at]), tag)
            at = rest.rfind(":", 0, at)
    if os.path.exists(rest):
        other = "is not a directory" if what == "directory" else "is not a file"
        hint = "use oci: for a directory, oci-archive: or docker-archive: for a tar file"
        raise ImageError(f"{rest} {other}, which {kind}: needs", hint)
    where = "" if os.path.isabs(rest) else f"; it is relative to {os.getcwd()}"
    raise ImageError(f"{kind}:{rest}: there is no such {what}", f"check the path{where}")


def parse_reference(text: str) -> Reference:
    """Parse a registry reference, and fill in Docker's defaults.

    Raises:
        UsageError: It is malformed.
    """
    shown = repr(text if len(text) <= 300 else text[:300] + "...")
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise UsageError(
            f"{shown} is not an image reference: {digest!r} is no digest", "NAME@sha256:<64 hex digits>"
        )
    head, slash, tail = rest.partition("/")
    if slash and (head == "localhost" or "." in head or ":" in head or head != head.lower()):
        host, rest = head, tail
    else:
        host = "docker.io"
    path, colon, tag = rest.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise UsageError(
            f"{shown} is not an image reference: {tag!r} is no tag",
            "a tag is letters, digits, '_', '.' and '-'",
        )
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = "docker.io"
    if not _HOST.fullmatch(host):
        raise UsageError(
            f"{shown} is not an image reference: {host!r} is no registry", "HOST[:PORT]/NAME[:TAG]"
        )
    if not _PATH.fullmatch(path) or len(path) > 255:
        hint = (
            "image names are lower case"
            if path.lower() != path
            else "for example: alpine, ghcr.io/team/app:1.2"
        )
        raise UsageError(f"{shown} is not an image reference: {path!r} is no repository name", hint)
    if host == "docker.io" and "/" not in path:
        path = "library/" + path
    return Reference(host, path, tag or ("" if digest else "latest"), digest)


def familiar(name: str) -> str:
    """The usual short form of a full name: without ``docker.io/library/``."""
    for prefix in ("docker.io/library/", "docker.io/"):
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name
