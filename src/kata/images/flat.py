"""Images of one layer, in an archive as ``docker save`` writes it.

The store keeps the root file system of an image and not its layers, so an image that is made or written here has one
layer with all its files.

Source: Docker image specification v1.2, "Combined Image JSON + Filesystem Changeset Format".
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile

from kata.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO, Any, BinaryIO


class Layer:
    """An uncompressed layer that is being written to an unnamed file.

    Args:
        directory: Where the file lies until it is closed.
        limit: Its maximum size in bytes.

    Attributes:
        size: Bytes so far.
    """

    def __init__(self, directory: str, limit: int) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self.limit = limit
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append to it.

        Raises:
            ImageError: It would be larger than *limit*.
        """
        self.size += len(data)
        if self.size > self.limit:
            raise ImageError(f"it unpacks to more than {self.limit} bytes", "raise KATA_IMAGE_MAX_SIZE")
        self._digest.update(data)
        self._file.write(data)

    @property
    def diff_id(self) -> str:
        """``sha256:...`` of what was written."""
        return f"sha256:{self._digest.hexdigest()}"

    def reader(self) -> BinaryIO:
        """The file, at its beginning."""
        self._file.flush()
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Give the file up."""
        self._file.close()

    def __enter__(self) -> Layer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def document(
    base: dict[str, Any], config: dict[str, Any], layer: Layer, step: dict[str, Any]
) -> dict[str, Any]:
    """The configuration of an image whose only layer is *layer*.

    Args:
        base: That of the image whose files are in the layer, too; its steps are listed without layers. May be empty.
        config: What containers of it get (``Env``, ``Cmd``, ...).
        layer: Its files.
        step: The step of its history that stands for the layer: ``created``, ``created_by``, ``comment``.
    """
    history = [{**one, "empty_layer": True} for one in base.get("history") or () if isinstance(one, dict)]
    copied = ("author", "variant", "os.version", "os.features")
    kept: dict[str, Any] = {key: base[key] for key in copied if key in base}
    return {
        **kept,
        "architecture": base.get("architecture", ""),
        "os": base.get("os", "linux"),
        "created": step["created"],
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
        "history": [*history, step],
    }


class ArchiveWriter:
    """An archive of images of one layer.

    Args:
        write: Takes the next bytes of it.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        sink: Any = _Sink(write)  # tarfile asks for no more than this of a stream
        self._tar = tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._entries: list[dict[str, Any]] = []
        self._layers: set[str] = set()

    def add(self, names: Sequence[str], made: dict[str, Any], layer: Layer) -> str:
        """Add an image.

        Args:
            names: ``NAME:TAG`` each.
            made: Its configuration, see `document`.
            layer: Its files.

        Returns:
            Its id, ``sha256:...``.
        """
        data = json.dumps(made).encode()
        identity = hashlib.sha256(data).hexdigest()
        self._add(f"{identity}.json", len(data), io.BytesIO(data))
        member = f"{layer.diff_id.removeprefix('sha256:')}/layer.tar"
        if member not in self._layers:
            self._layers.add(member)
            self._add(member, layer.size, layer.reader())
        self._entries.append(
            {"Config": f"{identity}.json", "RepoTags": list(names) or None, "Layers": [member]}
        )
        return f"sha256:{identity}"

    def finish(self) -> None:
        """Write the list of the images, and the end."""
        data = json.dumps(self._entries).encode()
        self._add("manifest.json", len(data), io.BytesIO(data))
        self._tar.close()

    def _add(self, member: str, size: int, content: IO[bytes]) -> None:
        info = tarfile.TarInfo(member)
        info.size = size
        self._tar.addfile(info, content)


class _Sink:
    """What `tarfile` writes a stream to."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.write = write
