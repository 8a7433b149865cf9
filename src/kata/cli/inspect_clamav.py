"""ClamAV for `kata inspect-image`: its scanner and its signatures as disks of the machine, and what is known of both.

Signatures are the host's own files, as freshclam or the user has put them into a directory. They are checked before a
machine is made, as far as that can be done without the scanner: that there are some, and that none is cut short.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tarfile
import time
import zlib

from kata import paths
from kata.cli import inspect_machine
from kata.errors import GuestAssetError, KataError, UsageError
from kata.images import changes
from kata.storage import whole_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

DIRECTORY = "/var/lib/clamav"
"""Where freshclam keeps what it fetches."""
OLD_S = 7 * 86400
"""Signatures that have not changed for so long, in seconds, are called old. Official ones change every day."""

_HEADER = 512
_BLOCK = 512
"""Bytes of a block of an archive (POSIX.1-2017 pax, ustar)."""
_SIGNED = (".cvd", ".cld")
"""An archive of signature files behind a header: packed and signed as fetched, or unpacked by freshclam's updates."""
_PLAIN = (
    ".hdb", ".hsb", ".hdu", ".hsu", ".mdb", ".msb", ".mdu", ".msu", ".imp", ".ndb", ".ndu", ".ldb", ".ldu", ".sdb",
    ".cdb", ".zmd", ".rmd", ".idb", ".crb", ".pdb", ".gdb", ".wdb", ".fp", ".sfp", ".ign", ".ign2", ".ftm", ".pwdb",
    ".yar", ".yara", ".cat", ".cbc",
)  # fmt: skip
"""Names of single files that clamscan reads (libclamav/others.h, `CLI_DBEXT`)."""
_NO_SIGNATURES = (".fp", ".sfp", ".ign", ".ign2", ".ftm", ".cfg", ".pwdb", ".cat")
"""Of those, what only says what is to be left alone."""
_HASHES = (".hdb", ".hsb", ".hdu", ".hsu", ".mdb", ".msb", ".mdu", ".msu", ".imp", ".fp", ".sfp")
_GROWS = {".cvd": 8, ".cld": 4, **dict.fromkeys(_HASHES, 4)}
"""How many times its size a database may need in memory. Measured with ClamAV 1.4.6: 2.2 for hashes, 19 for patterns
(``.ndb``). Official ones, which are mostly hashes, are said to need 1.3 GB for 230 MB."""
_GROWS_OTHERS = 24
_BASE = 256 << 20
"""Memory for the scanner without its signatures, and for what it unpacks, in bytes."""
_LEAST = 256 << 20
"""Memory for what reads the image."""
_STEP = 1 << 20


class Database:
    """One file of signatures.

    Attributes:
        name: File name.
        path: Where it is.
        size: Its size in bytes.
        version: Of an official database; 0 for others.
        signatures: How many it says that it has; 0 if it does not.
        made: When it was made (an official one) or last changed, in seconds since 1970.
    """

    __slots__ = ("made", "name", "path", "signatures", "size", "version")

    def __init__(self, path: str, size: int, made: float) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self.size = size
        self.made = made
        self.version = self.signatures = 0

    @property
    def memory(self) -> int:
        """Bytes of memory that the scanner may need for it."""
        return self.size * _GROWS.get(os.path.splitext(self.name)[1], _GROWS_OTHERS)


class Signatures:
    """The signatures of a directory.

    Attributes:
        directory: Where they are.
        databases: Its files.
    """

    def __init__(self, directory: str, databases: list[Database]) -> None:
        self.directory = directory
        self.databases = databases

    @property
    def memory(self) -> int:
        """Bytes of memory that the scanner may need."""
        return _BASE + sum(one.memory for one in self.databases)

    def described(self, now: float) -> dict[str, Any]:
        """What the report says of them.

        Args:
            now: The time, in seconds since 1970.
        """
        newest = max(one.made for one in self.databases)
        return {
            "directory": self.directory,
            "newest": _date(newest),
            "age_days": max(0, int((now - newest) // 86400)),
            "old": now - newest > OLD_S,
            "databases": [
                {
                    "name": one.name,
                    "version": one.version,
                    "signatures": one.signatures,
                    "made": _date(one.made),
                }
                for one in self.databases
            ],
        }


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# ---- signatures ----


def signatures(directory: str) -> Signatures:
    """Find and check the signatures of a directory.

    Raises:
        UsageError: There are none, or one cannot be read or is not whole.
    """
    hint = "freshclam fetches them; --clamav-database names another directory"
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UsageError(
            f"ClamAV's signatures cannot be read: {directory}: {error.strerror}", hint
        ) from None
    found = []
    for name in names:
        if name.endswith(_SIGNED + _PLAIN) and not name.startswith("."):
            path = os.path.join(directory, name)
            try:
                found.append(_checked(path))
            except OSError as error:
                raise UsageError(
                    f"the signatures {path} cannot be read: {error.strerror}",
                    "an ordinary user needs the right to read them",
                ) from None
    if not any(not one.name.endswith(_NO_SIGNATURES) for one in found):
        raise UsageError(f"there are no signatures of ClamAV in {directory}", hint)
    return Signatures(directory, found)


def _checked(path: str) -> Database:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is no regular file", "name a directory with signatures of ClamAV only")
        if status.st_size == 0:
            raise _torn(path, "it is empty")
        found = Database(path, status.st_size, status.st_mtime)
        if path.endswith(_SIGNED):
            _check_signed(found, file)
    return found


def _check_signed(found: Database, file: BinaryIO) -> None:
    """Read the header of an official database, and see whether what follows is whole.

    The header is text between colons: ``ClamAV-VDB``, time of its making, version, number of signatures, level of
    functions, MD5 of what follows, signature of that, who made it, and seconds since 1970 (libclamav/cvd.c).
    """
    fields = file.read(_HEADER).decode("latin-1").rstrip().split(":")
    try:
        if fields[0] != "ClamAV-VDB":
            raise ValueError
        found.version, found.signatures = int(fields[2]), int(fields[3])
        digest = fields[5]
        if len(fields) > 8:
            found.made = int(fields[8])
    except (ValueError, IndexError):
        raise _torn(found.path, "it does not begin as one") from None
    if found.name.endswith(".cvd"):
        read = hashlib.md5(usedforsecurity=False)
        while data := file.read(_STEP):
            read.update(data)
        if read.hexdigest() != digest:
            raise _torn(found.path, "its content is not what its header says")
        return
    content: BinaryIO = file
    if file.read(2) == b"\x1f\x8b":
        content = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
    file.seek(_HEADER)
    try:
        _walk(content, _HEADER if content is file else 0)
    except (tarfile.HeaderError, EOFError, OSError, zlib.error):
        raise _torn(found.path, "it is cut short, or damaged") from None


def _walk(file: BinaryIO, at: int) -> None:
    """Go through an archive to its end, which may be that of the file: freshclam writes no blocks of zeros there.

    `tarfile` takes a damaged header for the end of an archive.

    Raises:
        tarfile.HeaderError: A header is damaged, or there is none.
        EOFError: A member is cut short.
    """
    count = 0
    while (block := file.read(_BLOCK)) and (count == 0 or any(block)):
        member = tarfile.TarInfo.frombuf(block, "latin-1", "surrogateescape")
        at += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
        if member.size and (file.seek(at - 1) != at - 1 or not file.read(1)):
            raise EOFError
        count += 1
    if count == 0:
        raise EOFError


def _torn(path: str, why: str) -> KataError:
    return UsageError(
        f"{path} is no whole database of ClamAV: {why}",
        "remove it and fetch it again (freshclam), or name another directory: --clamav-database",
    )


def write_disk(path: str, chosen: Signatures) -> None:
    """Make the disk of a machine that has the signatures.

    Raises:
        UsageError: A file has become another one since it was checked.
        HostError: The disk cannot be written.
    """

    def chunks(one: Database) -> Iterator[bytes]:
        left = one.size
        with open(one.path, "rb") as file:
            while left:
                data = file.read(min(left, _STEP))
                if not data:
                    raise _torn(one.path, "it became shorter while it was read")
                left -= len(data)
                yield data

    files = {one.name: (one.size, chunks(one)) for one in chosen.databases}
    try:
        inspect_machine.write_files(path, files)
    except OSError as error:
        raise changes.storage_error(error) from error


def sized(chosen: Signatures, memory: int, *, given: str | None) -> int:
    """Memory of a machine that scans, in bytes.

    Args:
        chosen: The signatures.
        memory: Of a machine without them, in bytes.
        given: What the user has asked for; None if nothing.

    Raises:
        UsageError: That is too little.
    """
    if given is None:
        return memory + chosen.memory
    least = chosen.memory + _LEAST
    if memory < least:
        raise UsageError(
            f"--memory {given} is too little for ClamAV: its signatures in {chosen.directory} may need"
            f" {chosen.memory >> 20} MiB",
            f"--memory {-(-least >> 20)}m, or leave it out",
        )
    return memory


def reported(chosen: Signatures, said: dict[str, Any]) -> dict[str, Any]:
    """What the report says of the scan.

    Args:
        chosen: The signatures.
        said: What the machine says of it, checked.
    """
    return {**chosen.described(time.time()), **said}


def line(scan: dict[str, Any]) -> str:
    """What was scanned and by which signatures, in a line without text from the image.

    Args:
        scan: From `reported`.
    """
    age = f"{scan['age_days']} days old" if scan["age_days"] else "of today"
    renew = "; old: freshclam renews them" if scan["old"] else ""
    return (
        f"{scan['files']} files by ClamAV, with {scan['signatures']} signatures, the newest of"
        f" {scan['newest'][:10]} ({age}{renew})"
    )


# ---- the scanner ----


def scanner(note: Callable[[str], None]) -> str:
    """The disk with the scanner, made of Debian's packages when there is none of their version yet.

    Args:
        note: Told of downloads.

    Returns:
        The path of an erofs file in the cache.

    Raises:
        GuestAssetError: The packages cannot be had, and were never.
        HostError: The cache cannot be written.
    """
    from kata.guest import clamav

    directory = paths.cache_dir()
    try:
        package = clamav.offered()
    except GuestAssetError:
        made = _made_before(directory)
        if made is None:
            raise
        return made
    target = os.path.join(directory, f"{_PREFIX}{package.version.replace('/', '_')}.erofs")
    if not whole_file.is_whole(target):
        files = clamav.collect(package, note)
        inspect_machine.cached(target, {name: (len(data), [data]) for name, data in files.items()})
    return target


_PREFIX = "clamav-"


def _made_before(directory: str) -> str | None:
    """The newest disk of an earlier run, for a machine whose apt does not know the package any more."""
    try:
        names = [
            name for name in os.listdir(directory) if name.startswith(_PREFIX) and name.endswith(".erofs")
        ]
    except OSError:
        return None
    made = [path for name in names if whole_file.is_whole(path := os.path.join(directory, name))]
    return max(made, key=os.path.getmtime, default=None)
