"""Make the root file system of a layer chain.

The erofs file has no name until it is complete and on disk, so a crash, a kill or a full disk leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile
from typing import BinaryIO, Protocol

from kata import paths
from kata.errors import ImageError
from kata.images import changes, store
from kata.storage import whole_file
from kata.storage.erofs import Writer
from kata.storage.layers import LayerTree, limits_from_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.images.manifest import Descriptor
    from kata.images.platform import Platform


class Source(Protocol):
    """Where an image comes from: a layout, an archive or a registry."""

    name: str
    """Name of the source, for messages."""
    names: list[str]
    """Further full names that the source gives to the chosen image."""

    def choose(self, tag: str, wanted: Platform) -> Descriptor:
        """Return the descriptor of the manifest or index with a tag."""
        ...

    def read(self, what: Descriptor) -> bytes:
        """Return a manifest or configuration, verified."""
        ...

    def prepare(self, layers: list[Descriptor]) -> None:
        """Start fetching these layers; they will be opened in this order."""
        ...

    def open(self, what: Descriptor) -> BinaryIO:
        """Open a layer. The caller verifies the uncompressed content."""
        ...

    def close(self, keep: bool = False) -> None:
        """Release everything; `keep` leaves what was fetched for the next attempt."""
        ...


def make_rootfs(
    source: Source, layers: list[Descriptor], diff_ids: list[str], chain: str, progress: store.Progress
) -> int:
    """Convert layers into the erofs file of their chain, unless that exists already.

    Args:
        source: Source of the layers.
        layers: The layers, lowest first.
        diff_ids: Digests of the uncompressed layers.
        chain: Chain id; determines the file's name and the file system's UUID.
        progress: Called with ``unpack`` and ``write``, and with ``wait`` while another process converts the same chain.

    Returns:
        The size of the file in bytes.

    Raises:
        ImageError: A layer is damaged, hostile or too large.
        HostError: The file cannot be written.
    """
    path = store.rootfs_path(chain)
    try:
        paths.make_dirs(os.path.dirname(path), 0o700)
        with whole_file.alone(path + ".lock", lambda: progress("wait", 0, 0)):
            if not whole_file.is_whole(path):
                source.prepare(layers)
                _convert(source, layers, diff_ids, chain, path, progress)
            return whole_file.size_of(path)
    except OSError as error:
        raise changes.storage_error(error) from error


def _convert(
    source: Source,
    layers: list[Descriptor],
    diff_ids: list[str],
    chain: str,
    path: str,
    progress: store.Progress,
) -> None:  # fmt: skip
    limits = limits_from_environment()
    total = sum(layer.size for layer in layers)
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        progress("unpack", min(done, total), total)

    with whole_file.nameless(path) as fd, tempfile.TemporaryFile(dir=os.path.dirname(path)) as spool:
        writer = Writer(fd, spool.fileno())
        tree = LayerTree(writer, limits)
        for number, (layer, diff_id) in enumerate(zip(layers, diff_ids, strict=True), 1):
            name = f"{number} of {len(layers)} ({layer.digest[:19]})"
            with source.open(layer) as file:
                found = tree.apply(file, name, tick)
            if found != diff_id:
                raise ImageError(
                    f"{source.name}: layer {name} unpacks to {found}, but its configuration says {diff_id}",
                    "it was damaged or exchanged; fetch the image again",
                )
        tree.add_mount_points()
        writer.finish(tree.root, _uuid(chain), lambda at, of: progress("write", at * 64, of * 64))
        os.fsync(fd)


def _uuid(chain: str) -> bytes:
    """Derive a UUID (version 8, RFC 9562) from the chain id, so that the same layers give the same bytes."""
    raw = bytearray.fromhex(store.hex_of(chain)[:32])
    raw[6] = raw[6] & 0x0F | 0x80
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)
