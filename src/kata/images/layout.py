"""OCI image layouts in a directory.

Source: OCI image specification, ``image-layout.md``.
"""

from __future__ import annotations

import os
import stat

from kata.errors import ImageError
from kata.images import manifest, reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    from kata.images.manifest import Descriptor
    from kata.images.platform import Platform

_REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"
"""Annotation by containerd and Docker 25: the image's name with registry and tag."""


class Layout:
    """An image layout: a source of images for `kata.images.acquire`.

    Args:
        path: The directory.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = f"oci:{path}"
        self.names: list[str] = []

    def choose(self, tag: str, wanted: Platform) -> Descriptor:
        """Choose the entry of ``index.json`` with a tag: a manifest, or an index of several platforms.

        Args:
            tag: The tag; "" for the only image, or ``latest``.
            wanted: The platform, which decides between images with the same tag.

        Raises:
            ImageError: The layout is malformed, or has no such image.
        """
        listed = manifest.listed(self._index(), f"{self.name}/index.json")
        return choose_tagged(listed, tag, wanted, self.name)

    def _index(self) -> dict[str, Any]:
        path = os.path.join(self.path, "index.json")
        try:
            with open(path, "rb") as file:
                return manifest.document(file.read(manifest.MAX_DOCUMENT), path)
        except FileNotFoundError:
            hint = "use rootfs:DIR for a directory that is a root file system"
            raise ImageError(f"{self.path} is not an OCI image layout: it has no index.json", hint) from None
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error

    def read(self, what: Descriptor) -> bytes:
        """Return a manifest or configuration, verified.

        Raises:
            ImageError: It is missing or damaged.
        """
        with self.open(what) as file:
            data = read_limited(file, f"{self.name}, {what.digest}")
        manifest.verify(data, what.digest, f"{self.name}: the blob {what.digest}")
        return data

    def open(self, what: Descriptor) -> BinaryIO:
        """Open a blob; it is not verified.

        Raises:
            ImageError: It is missing.
        """
        algorithm, _, digits = what.digest.partition(":")
        path = os.path.join(self.path, "blobs", algorithm, digits)
        try:
            # A named pipe among the blobs would be waited for without O_NONBLOCK.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            file = open(fd, "rb")  # noqa: SIM115 - the caller closes it
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.close()
                raise ImageError(f"{path} is no regular file", "export the image again")
            return file
        except FileNotFoundError:
            raise ImageError(
                f"{self.name}: the blob {what.digest} is missing", "export the image again"
            ) from None
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error

    def prepare(self, layers: list[Descriptor]) -> None:
        """Do nothing: there is nothing to fetch."""

    def close(self, keep: bool = False) -> None:
        """Do nothing: no file is held open."""


def read_limited(file: BinaryIO, what: str) -> bytes:
    """Read a small document completely.

    Args:
        file: The open file.
        what: Its name, for errors.

    Raises:
        ImageError: It is larger than a manifest or configuration may be.
    """
    data = file.read(manifest.MAX_DOCUMENT + 1)
    if len(data) > manifest.MAX_DOCUMENT:
        raise ImageError(f"{what} is larger than {manifest.MAX_DOCUMENT} bytes", "the image is malformed")
    return data


def choose_tagged(listed: list[Descriptor], tag: str, wanted: Platform, name: str) -> Descriptor:
    """Choose the entry of a layout's index with a tag; see `Layout.choose`.

    Raises:
        ImageError: There is none, or there are several.
    """
    if not listed:
        raise ImageError(f"{name} holds no image", "export the image again")
    place = place_of(tag)
    if place is not None and place < len(listed):
        return listed[place]
    images = [item for item in listed if not manifest.is_attestation(item)] or listed
    if tag:
        tagged = [item for item in images if tag in _tags(item)]
    else:
        groups = {min(_tags(item), default="") for item in images}
        single = len(groups) == 1 or len({item.digest for item in images}) == 1
        tagged = images if single else [item for item in images if "latest" in _tags(item)]
    if len({item.digest for item in tagged}) == 1:
        return tagged[0]
    known = sorted({item.annotations.get(_REF_NAME, "") for item in images} - {""})
    hint = which(known, len(listed), name)
    if not tagged:
        what = f"no image {called(tag)}" if tag else "several images and none is tagged latest"
        raise ImageError(f"{name} holds {what}", hint)
    chosen = manifest.choose(tagged, wanted, name)
    if any(
        item.digest != chosen.digest and manifest.fitness(item, wanted) == manifest.fitness(chosen, wanted)
        for item in tagged
    ):
        what = f"the tag {tag}" if tag else "the same name" if known else "no name"
        raise ImageError(f"{name} holds several images with {what}", hint)
    return chosen


def place_of(tag: str) -> int | None:
    """The position in the index for ``@0``, ``@1``, ... (as in skopeo's ``oci:DIR:@0``); None for a tag."""
    digits = tag[1:]
    return int(digits) if tag.startswith("@") and digits.isdecimal() and len(digits) < 6 else None


def called(tag: str) -> str:
    """Describe how a missing image was requested, for errors."""
    return f"at the place {tag}" if place_of(tag) is not None else f"with the tag {tag}"


def which(known: list[str], count: int, name: str) -> str:
    """The hint for a choice between several images.

    Args:
        known: Their tags.
        count: Number of images.
        name: Name of the archive or layout.
    """
    places = f"by its place: {name}:@0" + (f" to :@{count - 1}" if count > 1 else "")
    if not known:
        return f"choose one {places}"
    return "name one of: " + ", ".join(map(manifest.shown, known[:20])) + f"; or {places}"


def _tags(item: Descriptor) -> set[str]:
    """The accepted names of an entry: its full name, the short form of that, and its tag."""
    found = set()
    for key in (_REF_NAME, FULL_NAME):
        value = item.annotations.get(key)
        if value:
            found |= {value, value.rpartition(":")[2], reference.familiar(value)}
    return found
