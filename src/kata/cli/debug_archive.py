"""The archive that `kata debug bundle` writes: bounded, private, complete or not there at all."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import stat
import sys
import tarfile
import time

from kata import __version__
from kata.errors import HostError, KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.debug_keep import Masker

MOST_BYTES = 32 << 20
"""Bytes of everything in the archive together, before it is compressed."""
_MANIFEST_ROOM = 256 << 10
FORMAT = 1


def read_tail(path: str, limit: int) -> tuple[bytes, bool]:
    """The end of a regular file that nobody else can exchange for another one while we read.

    Args:
        path: The file; it is not opened if it is a link, a fifo or a device.
        limit: Bytes to read at most.

    Returns:
        The bytes, and whether there were more before them.

    Raises:
        OSError: It cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(0, "not a regular file", path)
        if state.st_size > limit:
            file.seek(-limit, os.SEEK_END)
        return file.read(limit), state.st_size > limit


class Bundle:
    """What goes into an archive.

    Args:
        masker: What takes secrets out of every part.
        about: What the archive is about, for its manifest: JSON values.
        directory: The directory that all of its files are in.
    """

    def __init__(self, masker: Masker, about: dict[str, Any], directory: str) -> None:
        self._masker = masker
        self._about = about
        self._directory = directory
        self._parts: dict[str, tuple[Any, str, str]] = {}
        self._problems: list[dict[str, str]] = []

    def add(self, name: str, content: Any, source: str, note: str = "") -> None:
        """Add a part.

        Args:
            name: Its file name; ``.json`` for JSON values, otherwise *content* is text.
            content: JSON values that have been through `Masker.keep`, or text.
            source: Where it comes from, for the manifest.
            note: What else there is to say.
        """
        self._parts[name] = (content, source, note)

    def problem(self, what: str, why: BaseException | str) -> None:
        """Put it on record that something could not be collected.

        Args:
            what: Name of the thing.
            why: What kept it from being collected.
        """
        if isinstance(why, KataError):
            text = why.message
        elif isinstance(why, OSError):
            text = why.strerror or str(why)
        else:
            text = str(why) or type(why).__name__
        self._problems.append({"what": what, "why": text})

    @property
    def problems(self) -> list[dict[str, str]]:
        """What could not be collected: ``what`` and ``why`` of each."""
        return self._problems

    def rendered(self) -> list[tuple[str, bytes]]:
        """All files, the manifest first, with secrets taken out: name and content."""
        files: list[tuple[str, bytes]] = []
        listed = []
        left = MOST_BYTES - _MANIFEST_ROOM
        for name in sorted(self._parts):
            content, source, note = self._parts[name]
            if name.endswith(".json"):
                data = (json.dumps(self._masker.document(content), indent=1) + "\n").encode()
            else:
                data = self._masker.text(content).encode("utf-8", "backslashreplace")
            if len(data) > left:
                # Of a log, its end says most; of a document, a part would be of no use.
                data = b"" if name.endswith(".json") or not left else data[-left:]
                note = f"{note}; cut to fit" if note else "cut to fit"
            left -= len(data)
            files.append((name, data))
            digest = hashlib.sha256(data).hexdigest()
            listed.append(
                {"name": name, "bytes": len(data), "sha256": digest, "source": source, "note": note}
            )
        manifest = {
            "format": FORMAT,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "made_by": f"kata {__version__}",
            "about": self._about,
            "files": listed,
            "problems": self._problems,
        }
        text = json.dumps(self._masker.document(manifest), indent=1) + "\n"
        return [("manifest.json", text.encode()), *files]

    def write(self, target: str) -> list[tuple[str, int]]:
        """Write the archive.

        Args:
            target: Its path, at which there must be nothing; ``-`` is standard output.

        Returns:
            Names and sizes of its files.

        Raises:
            HostError: It cannot be written; nothing is left of it.
        """
        files = self.rendered()
        if target == "-":
            self._pack(files, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            self._write_file(files, target)
        return [(name, len(data)) for name, data in files]

    def _write_file(self, files: list[tuple[str, bytes]], target: str) -> None:
        # Under a name of its own first: who finds the archive finds all of it. A link, since a rename would replace.
        unfinished = f"{target}.{os.getpid()}.part"
        try:
            fd = os.open(
                unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            try:
                os.fchmod(fd, 0o600)
                with os.fdopen(fd, "wb") as file:
                    self._pack(files, file)
                os.link(unfinished, target)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished)
        except FileExistsError:
            raise HostError(
                f"{target} exists already", "give another path (-o FILE), or remove that one"
            ) from None
        except OSError as error:
            raise HostError(
                f"cannot write {target}: {error.strerror}", "give another path: -o FILE"
            ) from None

    def _pack(self, files: list[tuple[str, bytes]], out: Any) -> None:
        now = int(time.time())
        with (
            gzip.GzipFile("", "wb", 6, out, mtime=now) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for name, data in files:
                entry = tarfile.TarInfo(f"{self._directory}/{name}")
                entry.size, entry.mode, entry.mtime = len(data), 0o600, now
                archive.addfile(entry, io.BytesIO(data))
