"""A registry as a source of images: three layers are fetched at a time, while earlier ones are unpacked."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
from functools import partial
from typing import BinaryIO

from kata import paths
from kata.errors import ImageError, KataError, RegistryError, ResourceExhaustedError
from kata.images import changes, manifest, store
from kata.images.manifest import Descriptor
from kata.images.progress import LAYER
from kata.images.registry import Registry
from kata.storage.layers import limits_from_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.images.platform import Platform
    from kata.images.reference import Reference

_AT_ONCE = 3


class RegistrySource:
    """An image in a registry; see `kata.images.convert.Source`.

    Args:
        reference: Reference of the image.
        progress: Called with ``pull`` and, for each layer, ``layer DIGEST``.
    """

    def __init__(self, reference: Reference, progress: store.Progress) -> None:
        self.name = reference.familiar()
        self.names: list[str] = []
        self._reference = reference
        self._progress = progress
        self._registry = Registry(reference.host, reference.path)
        self._documents: dict[str, bytes] = {}
        self._directory = ""
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._total = 0
        self._waiting: queue.SimpleQueue[Descriptor] = queue.SimpleQueue()
        self._arrived: dict[str, threading.Event] = {}
        self._failed: dict[str, BaseException] = {}
        self._threads: list[threading.Thread] = []

    def choose(self, tag: str, wanted: Platform) -> Descriptor:
        """Return the descriptor of the reference's manifest or index."""
        digest, data, kind = self._registry.manifest(self._reference.digest or self._reference.tag)
        self._documents[digest] = data
        return Descriptor(digest, len(data), kind)

    def read(self, what: Descriptor) -> bytes:
        """Return a manifest or configuration, verified."""
        data = self._documents.get(what.digest)
        if data is None:
            if what.media_type in manifest.MANIFEST_TYPES + manifest.INDEX_TYPES:
                _, data, _ = self._registry.manifest(what.digest)
            else:
                data = self._registry.blob(what)
            self._documents[what.digest] = data
        if not self._directory:
            self._directory = os.path.join(store.directory(), "pulls", store.hex_of(what.digest))
        return data

    def prepare(self, layers: list[Descriptor]) -> None:
        """Start fetching the layers.

        Raises:
            ImageError: They are larger than an image may be.
            ResourceExhaustedError: They are larger than the disk has room.
        """
        different = {layer.digest: layer for layer in layers}
        self._total = sum(layer.size for layer in different.values())
        if self._total > limits_from_environment().size:
            raise ImageError(
                f"{self.name} has {self._total} bytes of layers, which is too much",
                "raise KATA_IMAGE_MAX_SIZE if you trust it",
            )
        paths.make_dirs(self._directory, 0o700)
        free = os.statvfs(self._directory)
        if free.f_bavail * free.f_frsize < self._total:
            raise ResourceExhaustedError(
                f"{self.name} needs {self._total >> 20} MiB for its layers alone, and {self._directory} has "
                f"{free.f_bavail * free.f_frsize >> 20} MiB free",
                "free some space, or `kata gc`",
            )
        for layer in different.values():
            self._done[layer.digest] = 0
            self._arrived[layer.digest] = threading.Event()
            self._waiting.put(layer)
            self._tick(layer, 0)
        for number in range(min(_AT_ONCE, len(different))):
            thread = threading.Thread(target=self._fetch, daemon=True, name=f"pull-{number}")
            thread.start()
            self._threads.append(thread)

    def open(self, what: Descriptor) -> BinaryIO:
        """Wait until a layer has arrived, and open it."""
        self._arrived[what.digest].wait()
        error = self._failed.get(what.digest)
        if error is not None:
            raise error
        return open(self._path(what), "rb")

    def close(self, keep: bool = False) -> None:
        """Stop fetching.

        Args:
            keep: Leave the layers that have arrived for the next attempt, instead of removing them.
        """
        self._registry.close()
        until = time.monotonic() + 1
        for thread in self._threads:  # a thread whose registry does not answer ends with the process
            thread.join(max(0, until - time.monotonic()))
        if self._directory and not keep:
            shutil.rmtree(self._directory, ignore_errors=True)
            try:
                os.rmdir(os.path.dirname(self._directory))
            except OSError:
                pass  # there are none, or another pull is under way

    # ---- in the threads ----

    def _fetch(self) -> None:
        while not self._registry.closed:
            try:
                layer = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._registry.download(layer, self._path(layer), partial(self._tick, layer))
            except BaseException as error:
                self._failed[layer.digest] = self._named(error)
            self._arrived[layer.digest].set()

    def _named(self, error: BaseException) -> BaseException:
        if isinstance(error, KataError):
            return error
        if isinstance(error, OSError):
            return changes.storage_error(error)
        return RegistryError(f"{self.name} cannot be fetched: {error}", "try again")

    def _path(self, layer: Descriptor) -> str:
        return os.path.join(self._directory, store.hex_of(layer.digest))

    def _tick(self, layer: Descriptor, size: int) -> None:
        with self._lock:
            self._done[layer.digest] += size
            self._progress(LAYER + store.hex_of(layer.digest), self._done[layer.digest], layer.size)
            self._progress("pull", sum(self._done.values()), self._total)
