"""Images in tar files: OCI layouts, and what ``docker save`` and ``podman save`` write.

The archive is read in place: one pass over the headers finds its members. Its content tells whether it is an OCI layout
or in Docker's own format; Docker 25 and later write both.

Sources: OCI image specification, ``image-layout.md``; Docker image specification v1.2, "Combined Image JSON
+ Filesystem Changeset Format".
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import tempfile
from typing import Any, BinaryIO

from kata.errors import ImageError, UsageError
from kata.images import layout, manifest, reference
from kata.images.manifest import Descriptor
from kata.storage import layers_codec, layers_tar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kata.images.platform import Platform

_MAX_MEMBERS = 100_000
_MAX_NAMES = 16 << 20
"""Bound for the bytes of all members' names and link targets; usual ones have about a hundred bytes each."""
_HINT = "export the image again"


class Archive:
    """An archive: a source of images for `kata.images.acquire`.

    Args:
        path: The tar file; one that is compressed (gzip, zstd, bzip2, xz) is decompressed to an unnamed file first.
        spool: Directory for that file.
        limit: Its maximum size in bytes.
        tick: Called with (bytes done, total bytes) during decompression.

    Raises:
        ImageError: It is not an image archive.
        OSError: There is no space for the decompressed file.
    """

    def __init__(
        self, path: str, spool: str, limit: int, tick: Callable[[int, int], None] | None = None
    ) -> None:
        self.path = path
        self.name = path
        try:
            self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise ImageError(
                f"{path} cannot be read: {error.strerror}", "check the path and its permissions"
            ) from error
        try:
            if layers_codec.kind_of(os.pread(self._file.fileno(), 6, 0)) != "plain":
                self._file = self._undo(spool, limit, tick)
            self._members = _members(self._file, path)
        except BaseException:
            self._file.close()
            raise
        self._layers: dict[str, str] = {}
        self._made: dict[str, bytes] = {}
        self.names: list[str] = []
        """Full names of the chosen image according to the archive."""

    def _undo(self, spool: str, limit: int, tick: Callable[[int, int], None] | None) -> BinaryIO:
        total = os.fstat(self._file.fileno()).st_size
        read = 0

        def count(size: int) -> None:
            nonlocal read
            read += size
            if tick is not None:
                tick(read, total)

        plain = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115 - becomes self._file
        with self._file as packed:
            try:
                for piece in layers_codec.decompressed(packed, count):
                    plain.write(piece)
                    if plain.tell() > limit:
                        raise ImageError(
                            f"{self.path} unpacks to more than {limit} bytes", "raise KATA_IMAGE_MAX_SIZE"
                        )
            except ImageError as error:
                plain.close()
                raise ImageError(f"{self.path}: {error.message}", error.hint) from error
            except BaseException:
                plain.close()
                raise
        return plain

    # ---- as a source ----

    def choose(self, tag: str, wanted: Platform) -> Descriptor:
        """Choose the image with a tag; see `kata.images.layout.Layout.choose`.

        Raises:
            ImageError: The archive is malformed, or has no such image.
        """
        if "index.json" in self._members:
            index = manifest.document(self._read("index.json"), f"{self.path}: index.json")
            listed = manifest.listed(index, f"{self.path}: index.json")
            if listed or "manifest.json" not in self._members:
                chosen = layout.choose_tagged(listed, tag, wanted, self.path)
                name = _full_name(chosen.annotations.get(layout.FULL_NAME, ""))
                self.names = [name] if name else []
                return chosen
        if "manifest.json" in self._members:
            return self._choose_docker(tag)
        if "repositories" in self._members:
            raise ImageError(
                f"{self.path} was written by a Docker older than 1.10", "save it with a newer Docker"
            )
        if any(name.startswith(("bin/", "etc/", "usr/")) for name in self._members):
            hint = "unpack it and use rootfs:DIR"
            raise ImageError(f"{self.path} is not an image archive but a root file system", hint)
        raise ImageError(
            f"{self.path} is not an image archive: it has neither index.json nor manifest.json", _HINT
        )

    def read(self, what: Descriptor) -> bytes:
        """Return a manifest or configuration, verified.

        Raises:
            ImageError: It is missing or damaged.
        """
        if what.digest in self._made:
            return self._made[what.digest]
        data = self._read(self._name_of(what))
        manifest.verify(data, what.digest, f"{self.path}: the blob {what.digest}")
        return data

    def open(self, what: Descriptor) -> BinaryIO:
        """Open a layer; it is not verified.

        Raises:
            ImageError: It is missing.
        """
        return self._open(self._name_of(what))

    def prepare(self, layers: list[Descriptor]) -> None:
        """Do nothing: there is nothing to fetch."""

    def close(self, keep: bool = False) -> None:
        """Close the archive."""
        self._file.close()

    def count(self) -> int:
        """How many images there are; each can be chosen by its place, ``@0`` being the first.

        Raises:
            ImageError: The archive is malformed.
        """
        if "index.json" in self._members:
            index = manifest.document(self._read("index.json"), f"{self.path}: index.json")
            listed = manifest.listed(index, f"{self.path}: index.json")
            if listed or "manifest.json" not in self._members:
                return len(listed)
        return len(self._docker_images())

    # ---- Docker's own form ----

    def _choose_docker(self, tag: str) -> Descriptor:
        """Choose an image from manifest.json, and convert its entry to an OCI manifest."""
        chosen = self._choose_named(self._docker_images(), tag)
        config_name, layer_names = chosen.get("Config"), chosen.get("Layers")
        if layer_names is None:
            layer_names = []
        if (
            not isinstance(config_name, str)
            or not isinstance(layer_names, list)
            or not all(isinstance(name, str) for name in layer_names)
        ):
            raise ImageError(f"{self.path}: manifest.json names no configuration or layers", _HINT)
        self.names = [name for text in _repo_tags(chosen) if (name := _full_name(text))]
        data = self._read(config_name)
        config = manifest.configuration(data, f"{self.path}: {_shown(config_name)}")
        if len(config.diff_ids) != len(layer_names):
            raise ImageError(f"{self.path}: the image has {len(layer_names)} layers, its configuration "
                             f"{len(config.diff_ids)}", _HINT)  # fmt: skip
        digest = manifest.digest_of(data)
        self._layers = {
            diff_id: _clean(name) for diff_id, name in zip(config.diff_ids, layer_names, strict=True)
        }
        made = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": manifest.MANIFEST_TYPES[0],
                "config": {"mediaType": manifest.CONFIG_TYPES[0], "digest": digest, "size": len(data)},
                "layers": [
                    {
                        "mediaType": "application/vnd.oci.image.layer.v1.tar",
                        "digest": diff_id,
                        "size": self._find(name)[1],
                    }
                    for diff_id, name in zip(config.diff_ids, layer_names, strict=True)
                ],
            },
            separators=(",", ":"),
        ).encode()
        made_digest = manifest.digest_of(made)
        self._made = {digest: data, made_digest: made}
        return Descriptor(made_digest, len(made), manifest.MANIFEST_TYPES[0])

    def _docker_images(self) -> list[dict[str, Any]]:
        """The entries of manifest.json."""
        try:
            images = json.loads(self._read("manifest.json"))
        except (ValueError, RecursionError):
            raise ImageError(f"{self.path}: manifest.json is not JSON", _HINT) from None
        if (
            not isinstance(images, list)
            or not images
            or not all(isinstance(image, dict) for image in images)
        ):
            raise ImageError(f"{self.path}: manifest.json lists no images", _HINT)
        return images

    def _choose_named(self, images: list[dict[str, Any]], tag: str) -> dict[str, Any]:
        place = layout.place_of(tag)
        if place is not None and place < len(images):
            return images[place]
        if not tag and all(_same_image(image, images[0]) for image in images):
            return images[0]
        wanted = tag or "latest"
        for image in images:
            for text in _repo_tags(image):
                if wanted in (text, text.rpartition(":")[2]) or _full_name(text) == _full_name(wanted):
                    return image
        known = [text for image in images for text in _repo_tags(image)]
        what = f"no image {layout.called(tag)}" if tag else f"{len(images)} images and none is tagged latest"
        raise ImageError(f"{self.path} holds {what}", layout.which(known, len(images), self.path))

    # ---- members ----

    def _name_of(self, what: Descriptor) -> str:
        if what.digest in self._layers:
            return self._layers[what.digest]
        return "blobs/" + what.digest.replace(":", "/")

    def _read(self, name: str) -> bytes:
        with self._open(name) as file:
            return layout.read_limited(file, f"{self.path}: {_shown(name)}")

    def _open(self, name: str) -> BinaryIO:
        offset, size = self._find(name)
        return io.BufferedReader(_Part(self._file.fileno(), offset, size), buffer_size=1 << 16)

    def _find(self, name: str) -> tuple[int, int]:
        seen = set()
        name = _clean(name)
        while True:
            member = self._members.get(name)
            if member is None or name in seen:
                raise ImageError(f"{self.path}: {_shown(name)} is missing", _HINT)
            if not isinstance(member, str):
                return member
            seen.add(name)  # Docker before 25 stored a layer that occurs twice as a symbolic link
            name = _clean(posixpath.join(posixpath.dirname(name), member))


class _Part(io.RawIOBase):
    """A part of a file. Several parts may be read at the same time, in any thread."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd = fd
        self._at = offset
        self._end = offset + size

    @property
    def extent(self) -> tuple[int, int, int]:
        """Descriptor of the file, and offset and size of what is left of the part."""
        return self._fd, self._at, self._end - self._at

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._end - self._at]
        done = os.preadv(self._fd, [view], self._at) if view else 0
        self._at += done
        return done


class _Seekable:
    """A plain tar file for `layers_tar.Reader`, which seeks instead of reading what is skipped."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def pieces(self, size: int) -> Iterator[bytes]:
        while size and (piece := self._file.read(min(size, 1 << 18))):
            size -= len(piece)
            yield piece

    def skip(self, size: int) -> int:
        at = self._file.tell()
        end = min(at + size, self._size)
        self._file.seek(end)
        return end - at


def _members(file: BinaryIO, path: str) -> dict[str, tuple[int, int] | str]:
    """The members of a tar file by name: (offset, size), or the target of a link."""
    file.seek(0)
    reader = layers_tar.Reader(_Seekable(file))
    found: dict[str, tuple[int, int] | str] = {}
    room = _MAX_NAMES
    try:
        while (entry := reader.next()) is not None:
            room -= len(entry.name) + len(entry.link)
            if room < 0:
                raise ImageError(f"its members have names of more than {_MAX_NAMES} bytes", _HINT)
            name = _clean(entry.name.decode("utf-8", "surrogateescape"))
            if len(found) >= _MAX_MEMBERS:
                raise ImageError(f"it has more than {_MAX_MEMBERS} members", _HINT)
            if entry.type == layers_tar.FILE and entry.sparse is None:
                found[name] = (file.tell(), entry.size)
            elif entry.type == layers_tar.SYMLINK:
                found[name] = entry.link.decode("utf-8", "surrogateescape")
            elif entry.type == layers_tar.LINK:
                found[name] = "/" + _clean(entry.link.decode("utf-8", "surrogateescape"))
    except ImageError as error:
        raise ImageError(f"{path} is not a usable tar archive: {error.message}", error.hint) from error
    return found


def _shown(name: str) -> str:
    """A member's name, safe for a message: names in JSON and tar headers need not be valid text."""
    return layers_tar.text(name.encode("utf-8", "surrogatepass"))


def _clean(name: str) -> str:
    """A member's name without ``./``, ``..`` and a leading slash."""
    return posixpath.normpath("/" + name).lstrip("/")


def _same_image(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("Config", "Layers"))


def _repo_tags(image: dict[str, Any]) -> list[str]:
    tags = image.get("RepoTags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _full_name(text: str) -> str:
    try:
        return str(reference.parse_reference(text))
    except UsageError:
        return ""
