"""The image store of this host: finds stored images by name, without using the network, and lists them.

Below ``$KATA_STATE_DIR/images``:

``index.json``
    ``names`` (full name -> image id, its origin, and the digest that the name stood for), ``digests`` (manifest or
    index digest and platform -> image id) and ``files`` (archive -> image id, with size, time and inode of the file
    when it was read).
``records/<hex>.json``
    One image: its id (the digest of its configuration), platform, configuration, layers, root file system.
``blobs/sha256/<hex>``
    Its manifest and configuration, byte for byte. Layers are not kept: once converted they are not read again.
``rootfs/<hex>.erofs``
    The root file system of a layer chain, shared by all images that have that chain.
``pulls/<hex>/``
    Layers of an interrupted pull, with which the next pull continues; removed by `kata.images.changes.gc`.

Readers take no lock: every file is replaced atomically. To change `index.json`, a process holds ``lock``. While it adds
an image, it holds ``adding`` shared, so that `gc` does not remove files that are not referred to yet.

This module only reads; `kata.images.changes` changes the store, and `kata.images.resolve` finds the image that a user
means and has it fetched.
"""

from __future__ import annotations

import os

from kata import paths
from kata.errors import HostError, ImageError, NotFoundError, UsageError
from kata.images import reference as references
from kata.json_text import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from kata.images.platform import Platform

    Progress = Callable[[str, int, int], None]
    """Called with (what, bytes done, bytes in all or 0)."""


class Image:
    """An image that is ready to be run.

    Attributes:
        id: ``sha256:...`` of the configuration; "" for ``rootfs:DIR``.
        names: Full names, sorted; empty when all of them now stand for other images.
        digest: Digest of its manifest.
        platform: ``linux/amd64``.
        config: The configuration's ``config`` object: Env, Cmd, Entrypoint, WorkingDir, User, ExposedPorts,
            Volumes, StopSignal, Labels, each only if set.
        created: RFC 3339 time, or "".
        size: Bytes of the root file system.
        rootfs_path: The erofs file, or "".
        rootfs_dir: The directory of ``rootfs:DIR``, or "".
    """

    __slots__ = (
        "config",
        "created",
        "digest",
        "id",
        "names",
        "platform",
        "rootfs_dir",
        "rootfs_path",
        "size",
    )

    def __init__(self, record: Mapping[str, Any], names: list[str]) -> None:
        self.id: str = record["id"]
        self.names = names
        self.digest: str = record["digest"]
        self.platform: str = record["platform"]
        self.config: dict[str, Any] = record["config"]
        self.created: str = record["created"]
        self.size: int = record["size"]
        self.rootfs_path: str = rootfs_path(record["chain"]) if record["chain"] else ""
        self.rootfs_dir: str = record.get("rootfs_dir", "")


# ---- places ----


def directory() -> str:
    """Path of the store."""
    return os.path.join(paths.state_dir(), "images")


def rootfs_path(chain: str) -> str:
    """Path of the root file system of a layer chain (``sha256:...``)."""
    return os.path.join(directory(), "rootfs", hex_of(chain) + ".erofs")


def blob_path(digest: str) -> str:
    """Path of a manifest or configuration with this digest."""
    return os.path.join(directory(), "blobs", "sha256", hex_of(digest))


def record_path(image_id: str) -> str:
    """Path of an image's record."""
    return os.path.join(directory(), "records", hex_of(image_id) + ".json")


def hex_of(digest: str) -> str:
    """The hexadecimal digits of a digest, without its algorithm."""
    return digest.partition(":")[2]


# ---- reading ----


class Index:
    """The content of ``index.json``."""

    def __init__(self) -> None:
        content = read_json(os.path.join(directory(), "index.json")) or {}
        self.names: dict[str, dict[str, str]] = content.get("names", {})
        self.digests: dict[str, str] = content.get("digests", {})
        self.files: dict[str, dict[str, Any]] = content.get("files", {})

    def names_of(self, image_id: str) -> list[str]:
        """The names of an image, sorted."""
        return sorted(name for name, entry in self.names.items() if entry["id"] == image_id)


def read_json(path: str) -> Any:
    """Read one of the store's JSON files; None if it does not exist.

    Raises:
        ImageError: It is damaged.
        HostError: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return loads(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        hint = (
            "run kata as root" if isinstance(error, PermissionError) else "check KATA_STATE_DIR and its disk"
        )
        raise HostError(f"the image store cannot be read: {path}: {error.strerror}", hint) from error
    except ValueError as error:
        raise ImageError(
            f"{path} is damaged: {error}", f"remove {directory()} and pull the images again"
        ) from error


def load(image_id: str, index: Index) -> Image | None:
    """The stored image with this id; None if it, or its root file system, is missing or incomplete."""
    record = read_json(record_path(image_id))
    if record is None:
        return None
    image = Image(record, index.names_of(image_id))
    try:
        whole = os.stat(image.rootfs_path).st_size >= image.size  # longer where machines map it
    except OSError:
        whole = False
    return image if whole else None


def digest_key(digest: str, wanted: Platform) -> str:
    """The key in `Index.digests`. It has the platform, since an index may have one image for each platform."""
    return f"{digest} {wanted}"


def file_stamp(path: str) -> list[int]:
    """Values that change when a file does: size, modification time in ns, inode, device."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev]


def by_id(text: str) -> str | None:
    """The id that begins with `text`; None if there is none.

    Raises:
        ImageError: Several ids begin with it.
    """
    prefix = text.removeprefix("sha256:")
    if len(prefix) < 4 or prefix.strip("0123456789abcdef"):
        return None
    found = [image_id for image_id in ids() if hex_of(image_id).startswith(prefix)]
    if len(found) > 1:
        raise ImageError(f"{len(found)} images have ids that begin with {prefix}", "give more digits")
    return found[0] if found else None


def ids() -> list[str]:
    """The ids of all images."""
    try:
        names = os.listdir(os.path.join(directory(), "records"))
    except FileNotFoundError:
        return []
    return ["sha256:" + name[:-5] for name in names if name.endswith(".json") and len(name) == 69]


def find(name_or_id: str) -> Image:
    """Find a stored image by name, or by its id or the beginning of it. Nothing is fetched or converted.

    Raises:
        NotFoundError: There is none.
    """
    index = Index()
    image_id = find_id(name_or_id, index)
    image = load(image_id, index) if image_id else None
    if image is None:
        raise NotFoundError(f"there is no image {name_or_id}", "see `kata images`")
    return image


def find_id(text: str, index: Index) -> str | None:
    """The image id for a name, a digest reference or the beginning of an id; None if there is none."""
    name = canonical(text)
    if name is not None:
        if name in index.names:
            return index.names[name]["id"]
        digest = name.partition("@")[2]
        if digest:
            return next((i for key, i in index.digests.items() if key.startswith(digest + " ")), None)
    return by_id(text)


def canonical(text: str) -> str | None:
    """The full name for an image name, whether or not such an image or file exists; None if it is malformed."""
    kind, _, rest = text.partition(":")
    if kind in references.LOCAL_KINDS:
        return f"{kind}:{os.path.abspath(rest)}"
    try:
        return str(references.parse_reference(text))
    except UsageError:
        return None


def list_images() -> list[Image]:
    """All images, the newest first."""
    index = Index()
    images = [image for image_id in ids() if (image := load(image_id, index)) is not None]
    images.sort(key=lambda image: (image.created, image.id), reverse=True)
    return images
