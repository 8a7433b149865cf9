"""Hands an image over to a machine that reads it, as one file that becomes a read-only disk.

The host chooses the image and parses its manifest, which is bounded and verified. The layers are copied by the kernel
(``copy_file_range``, ``sendfile``): not one of their bytes passes through this process. The file::

    KATAINSP  length of the plan (8 bytes, little-endian)  plan (JSON)  ...  layers, each from a multiple of 4 KiB

The plan names the layers of each image, and has its configuration as text, which is parsed in the machine.
"""

from __future__ import annotations

import json
import os
import stat

from kata import sysio
from kata.errors import ImageError, ResourceExhaustedError
from kata.images import changes, manifest, store
from kata.images.reference import LocalImage, Reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    from kata.images.convert import Source
    from kata.images.manifest import Descriptor
    from kata.images.platform import Platform

MAGIC = b"KATAINSP"
_ALIGN = 4096
_MAX_NESTING = 4
_MAX_LAYERS = 1000
_STEP = 64 << 20


class Selection:
    """An image that was chosen for a machine to read.

    Attributes:
        name: What the user called it.
        digest: Of its manifest.
        config: The text of its configuration.
        layers: Its layers, lowest first; empty for a stored image.
        erofs: The file system of a stored image; empty otherwise.
    """

    def __init__(self, name: str, digest: str, config: str) -> None:
        self.name = name
        self.digest = digest
        self.config = config
        self.layers: list[Descriptor] = []
        self.source: Source | None = None
        self.erofs = ""

    def close(self) -> None:
        """Close the image's source."""
        if self.source is not None:
            self.source.close()


def of_stored(name: str, image: store.Image) -> Selection:
    """Select an image of the store, of which there is one file system and no layers any more.

    Raises:
        ImageError: Its configuration is missing or damaged.
    """
    try:
        config = sysio.read_file(store.blob_path(image.id)).decode("utf-8", "replace")
    except OSError as error:
        raise ImageError(
            f"the configuration of {name} cannot be read: {error.strerror}", "pull the image again"
        ) from None
    chosen = Selection(name, image.digest, config)
    chosen.erofs = image.rootfs_path
    return chosen


def of_source(name: str, source: Source, tag: str, wanted: Platform) -> Selection:
    """Select an image of a layout, an archive or a registry.

    Args:
        name: What the user called it.
        source: Where it is; closed with the selection.
        tag: Which image of it.
        wanted: The platform that decides between several.

    Raises:
        ImageError: Its manifest is malformed, or there is no such image.
    """
    top = source.choose(tag, wanted)
    what = f"the manifest of {name}"
    content = manifest.document(source.read(top), what)
    for depth in range(_MAX_NESTING + 1):
        if not manifest.is_index(content):
            break
        if depth == _MAX_NESTING:
            raise ImageError(f"{name}: indexes within indexes", "the image is malformed")
        top = manifest.choose(manifest.listed(content, f"the index of {name}"), wanted, name)
        content = manifest.document(source.read(top), what)
    config_at, layers = manifest.layers(content, what)
    if len(layers) > _MAX_LAYERS:
        raise ImageError(f"{name} has {len(layers)} layers", f"at most {_MAX_LAYERS} are read")
    chosen = Selection(name, top.digest, source.read(config_at).decode("utf-8", "replace"))
    chosen.layers = layers
    chosen.source = source
    return chosen


def write(path: str, chosen: list[Selection], limits: dict[str, int], further: dict[str, Any]) -> None:
    """Write the file for the machine.

    Args:
        path: The file, which does not exist yet.
        chosen: The images. A layer that cannot be opened is described by its error.
        limits: ``bytes``, ``entries`` and ``seconds`` for each image.
        further: More members of the plan.

    Raises:
        ImageError: The layers together are larger than ``limits["bytes"]``.
        HostError: The file cannot be written.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write(fd, chosen, limits, further)
        finally:
            os.close(fd)
    except OSError as error:
        raise changes.storage_error(error) from error


def _write(fd: int, chosen: list[Selection], limits: dict[str, int], further: dict[str, Any]) -> None:
    images: list[dict[str, Any]] = []
    # Offsets are known before the plan's length is, if the layers begin where no plan reaches.
    at = _aligned(sum(4 * len(one.config) + 1000 * len(one.layers) for one in chosen) + _ALIGN)
    first = at
    for number, one in enumerate(chosen):
        described: dict[str, Any] = {"name": one.name, "config": one.config}
        images.append(described)
        if one.erofs:
            described["erofs"] = serial_of(number)
            continue
        described["layers"] = layers = []
        assert one.source is not None
        one.source.prepare(one.layers)
        for layer in one.layers:
            entry: dict[str, Any] = {"digest": layer.digest, "offset": at, "size": 0}
            layers.append(entry)
            try:
                file = one.source.open(layer)
            except ImageError as error:
                entry["problem"] = error.message[:500]
                continue
            with file:
                source, offset, size = _extent(file)
                if at - first + size > limits["bytes"]:
                    raise ImageError(
                        f"the layers of {one.name} have more than {limits['bytes']} bytes",
                        "raise KATA_IMAGE_MAX_SIZE if you trust it",
                    )
                _copy(source, offset, size, fd, at)
            entry["size"] = size
            at = _aligned(at + size)
    plan = json.dumps({**further, "limits": limits, "images": images}).encode()
    if 16 + len(plan) > first:
        raise ImageError("the image's configuration is too large", "the image is malformed")
    os.pwrite(fd, MAGIC + len(plan).to_bytes(8, "little") + plan, 0)
    os.ftruncate(fd, max(at, _aligned(16 + len(plan))))


def serial_of(number: int) -> str:
    """The serial of the disk that has the file system of the image with this number in the plan."""
    return f"image-{number}"


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _extent(file: BinaryIO) -> tuple[int, int, int]:
    """Descriptor, offset and size of an open layer, which is a file or a part of one."""
    part = getattr(getattr(file, "raw", file), "extent", None)
    if part is not None:
        found: tuple[int, int, int] = part
        return found
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("a layer of the image is no regular file", "the layout is malformed")
    return file.fileno(), 0, status.st_size


def _copy(source: int, offset: int, size: int, target: int, at: int) -> None:
    """Copy within the kernel; sharing blocks where the file system can."""
    shares = True
    os.lseek(target, at, os.SEEK_SET)
    while size > 0:
        step = min(size, _STEP)
        try:
            done = (
                os.copy_file_range(source, target, step, offset, at)
                if shares
                else os.sendfile(target, source, offset, step)
            )
        except OSError:
            if not shares:
                raise
            shares = False
            os.lseek(target, at, os.SEEK_SET)
            continue
        if done == 0:
            if shares:  # some file systems have nothing to say of files that others can read
                shares = False
                os.lseek(target, at, os.SEEK_SET)
                continue
            raise ImageError("a layer became shorter while it was copied", "try again")
        offset, at, size = offset + done, at + done, size - done


def spool_input(source: int, target: int, limit: int) -> None:
    """Copy standard input to a file, without looking at it.

    Args:
        source: A pipe or file.
        target: An empty file.
        limit: Bytes after which it is too much.

    Raises:
        ImageError: There is more.
        ResourceExhaustedError: There is no room.
    """
    total = 0
    try:
        while True:
            done = _spooled_step(source, target)
            if not done:
                return
            total += done
            if total > limit:
                raise ImageError(
                    f"standard input has more than {limit} bytes",
                    "raise KATA_IMAGE_MAX_SIZE if you trust it",
                )
    except OSError as error:
        raise ResourceExhaustedError(
            f"the archive on standard input cannot be kept: {error.strerror}",
            "KATA_STATE_DIR moves the store",
        ) from error


def _spooled_step(source: int, target: int) -> int:
    try:
        return os.splice(source, target, 1 << 20)  # a pipe
    except OSError:
        pass
    try:
        return os.sendfile(target, source, None, 1 << 20)  # None: from where it is
    except OSError:
        return _copied_by_hand(source, target)


def _copied_by_hand(source: int, target: int) -> int:
    """For what the kernel cannot copy by itself: a terminal, some sockets."""
    data = os.read(source, 1 << 18)
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return len(data)


__all__ = ["LocalImage", "Reference", "Selection", "of_source", "of_stored", "spool_input", "write"]
