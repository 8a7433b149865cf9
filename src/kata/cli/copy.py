"""`kata cp`: files and trees between the host and a container, running or not.

The agent reads and writes only below the container's root, whatever symbolic links the container has made. On the host,
nothing is written outside the destination: names from the guest are checked, and its symbolic links are created but
never followed. For a container that is not running, its machine is booted for the copy, without the container's
command.
"""

from __future__ import annotations

import contextlib
import errno
import lzma
import os
import posixpath
import stat
import sys
import tarfile
import time
import zlib

from kata import sysio
from kata.cli import records
from kata.cli.args import Command, Option
from kata.cli.mounted_root import mounted_root
from kata.engine.client import SANDBOX, EngineClient
from kata.errors import GuestProtocolError, HostError, KataError, NotFoundError, UnsupportedError, UsageError
from kata.proto import agentext_pb
from kata.proto.google_pb import Empty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

    from kata.cli.args import Arguments
    from kata.cli.records import Container

_PIECE = 1 << 20
_WARNINGS = 20
_PERMISSION_DENIED = 7
_SOCKET = "it is a socket, which is useless without its process"

COMMANDS = {
    "cp": Command(
        "cp",
        "CONTAINER:PATH DEST | SRC CONTAINER:PATH",
        "Copies files and directories between a container and the host.",
        [
            Option("-a --archive", "", "keep owners (uid and gid)"),
            Option("-L --follow-link", "", "if SRC is a symbolic link, copy its target"),
            Option("-q --quiet", "", "accepted; no progress is shown"),
        ],
        least=2,
        most=2,
        notes="As with 'docker cp', a directory is copied into an existing directory DEST, or becomes DEST; with\n"
        "SRC/. only its content is copied. '-' as DEST or SRC is a tar stream. The container may be running or\n"
        "stopped. Hard links, fifos and devices are copied as such. Sockets are left out, and so are devices when\n"
        "copying to the host; the exit status is then 1.",
    )
}


def _split(text: str) -> tuple[str, str] | None:
    """Split ``CONTAINER:PATH`` into its two parts; None for a path of the host, which has a / before any colon."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or name in (".", ".."):
        return None
    return name, path or "/"


def _cp(arguments: Arguments) -> int:
    source, destination = arguments.rest
    outward, inward = _split(source), _split(destination)
    if (outward is None) == (inward is None):
        raise UsageError(
            "kata cp: one of the two has to be CONTAINER:PATH, the other a path of the host",
            "kata cp ./file web:/etc/app.conf",
        )
    archive, follow = arguments.flag("archive"), arguments.flag("follow_link")
    name, inner = outward or inward or ("", "")
    container = records.find(name)
    inner_path = posixpath.join("/", inner)
    with mounted_root(container) as files:
        guest = _Guest(files, container, in_memory=[] if container.running() else _tmpfs_mounts(container))
        if outward:
            if destination == "-":
                _to_tar(guest, inner_path, sys.stdout.buffer, follow)
            else:
                _out(guest, inner_path, destination, owners=archive, follow=follow)
        elif source == "-":
            _from_tar(guest, sys.stdin.buffer, inner_path)
        else:
            _in(guest, source, inner_path, owners=archive, follow=follow)
        if guest.written_into and container.running():  # the machine of one that does not run ends in order
            guest.sync(guest.written_into)
    if guest.left_out:
        sys.stderr.write(f"error: not copied: {guest.left_out} of the files\n")
        return 1
    return 0


def _tmpfs_mounts(container: Container) -> list[str]:
    """Where a container has file systems that do not outlive its machine."""
    import json

    with open(os.path.join(container.directory, "config.json"), encoding="utf-8") as file:
        mounts = json.load(file).get("mounts") or ()
    return [str(one["destination"]) for one in mounts if one.get("type") in ("tmpfs", "ramfs")]


class _Guest:
    """The container's files. Every error message names the path.

    Args:
        engine: Answers for them.
        container: The container.
        in_memory: Mount points below which nothing is to be made, since it would be lost.
    """

    def __init__(self, engine: EngineClient, container: Container, in_memory: list[str]) -> None:
        self._engine = engine
        self._id = container.id
        self._name = container.name
        self.left_out = 0
        self.written_into = ""
        """The directory into which was copied."""
        self.outside: dict[tuple[int, int], str] = {}
        """Device and inode number of files with several links -> path of the first copied link."""
        self._in_memory: dict[int, str] = {}
        self._devices: dict[str, int] = {}
        """Of directories in which something is to be made: the file system's device number."""
        for mount in in_memory:
            info = self.stat(mount, follow=True)
            if info is not None:
                self._in_memory[info.device] = mount

    def leave_out(self, what: str, why: str) -> None:
        """Report that a file cannot be copied; the exit status will be 1."""
        self.left_out += 1
        if self.left_out <= _WARNINGS:
            shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in what[:300])
            sys.stderr.write(f"warning: {shown} is not copied: {why}\n")

    def is_kept(self, path: str) -> bool:
        """Whether what is made at *path* is there when the container runs next; if not, it is reported as left out."""
        if not self._in_memory:
            return True
        parent = posixpath.dirname(path)
        if parent not in self._devices:
            info = self.stat(parent, follow=True)
            self._devices[parent] = info.device if info is not None else 0
        mount = self._in_memory.get(self._devices[parent])
        if mount is not None:
            self.leave_out(path, f"{mount} is a tmpfs, which is empty when the container is started")
        return mount is None

    def stat(self, path: str, *, follow: bool) -> agentext_pb.FileInfo | None:
        """Return the attributes of *path*, or None if it does not exist."""
        request = agentext_pb.StatFileRequest(container_id=self._id, path=os.fsencode(path), follow=follow)
        try:
            return self._engine.call(SANDBOX, "Stat", request, agentext_pb.FileInfo)
        except KataError as error:
            if error.grpc_code == NotFoundError.grpc_code:
                return None
            raise

    def need(self, path: str, *, follow: bool) -> agentext_pb.FileInfo:
        """See `stat`.

        Raises:
            NotFoundError: There is nothing.
        """
        found = self.stat(path, follow=follow)
        if found is None:
            raise NotFoundError(
                f"{self._name}:{path} does not exist", f"kata exec {self._name} ls {posixpath.dirname(path)}"
            )
        return found

    def entries(self, path: str) -> Iterator[agentext_pb.FileInfo]:
        """Yield a directory's entries, sorted by name.

        Raises:
            GuestProtocolError: The guest lists what can be no names, or lists without end.
        """
        after = b""
        while True:
            request = agentext_pb.ListFilesRequest(
                container_id=self._id, path=os.fsencode(path), after=after
            )
            answer = self._engine.call(SANDBOX, "List", request, agentext_pb.ListFilesResponse)
            for info in answer.entries:
                if (
                    info.name in (b"", b".", b"..")
                    or b"/" in info.name
                    or b"\0" in info.name
                    or info.name <= after
                ):
                    raise GuestProtocolError(
                        f"the guest listed an impossible file name in {self._name}:{path}"
                    )
                after = info.name
                yield info
            if not answer.more:
                return
            if not answer.entries:
                raise GuestProtocolError(f"the guest's listing of {self._name}:{path} does not end")

    def entries_to_copy(self, path: str, whole: bool) -> Iterator[agentext_pb.FileInfo]:
        """What is copied of a directory.

        Args:
            path: Of the directory.
            whole: It was asked for itself. Otherwise, what the kernel shows at /proc and /sys is no content: it changes
                under the copying, and pretends to have terabytes.
        """
        return self.entries(path) if whole or path not in ("/proc", "/sys") else iter(())

    def read(self, path: str, size: int) -> Iterator[bytes]:
        """Yield the file's content, at most *size* bytes (its size when it was examined).

        Raises:
            GuestProtocolError: The guest sends more than it was asked for.
        """
        offset = 0
        while offset < size:
            wanted = min(_PIECE, size - offset)
            request = agentext_pb.ReadFileRequest(
                container_id=self._id, path=os.fsencode(path), offset=offset, len=wanted
            )
            data = self._engine.call(SANDBOX, "Read", request, agentext_pb.ReadFileResponse).data
            if not data:
                return
            if len(data) > wanted:
                raise GuestProtocolError(f"the guest sent more of {self._name}:{path} than was asked for")
            offset += len(data)
            yield data

    def write(self, path: str, content: BinaryIO, **attributes: int | None) -> None:
        """Write a new file with this content.

        A symbolic link or a fifo in its place is replaced, not followed, and only when the new file is complete.

        Raises:
            HostError: What is in its place cannot be replaced.
        """
        here = self.stat(path, follow=False)
        if here is None or stat.S_ISREG(here.mode):
            self._write(path, content, attributes)
            return
        aside = posixpath.join(posixpath.dirname(path), f".kata-{os.urandom(6).hex()}")
        try:
            self._write(aside, content, attributes)
            refusal = self.link(path, aside)
        except BaseException:
            with contextlib.suppress(KataError):  # it may not have come to be
                self._remove(aside)
            raise
        self._remove(aside)
        if refusal:
            raise HostError(f"what is at {self._name}:{path} cannot be replaced: {refusal}")

    def _write(self, path: str, content: BinaryIO, attributes: dict[str, int | None]) -> None:
        offset = 0
        while True:
            data = content.read(_PIECE)
            if not data and offset:
                return
            request = agentext_pb.WriteFileRequest(
                container_id=self._id,
                path=os.fsencode(path),
                offset=offset,
                data=data,
                truncate=offset == 0,
                **attributes,
            )
            self._engine.call(SANDBOX, "Write", request, Empty)
            offset += len(data)
            if not data:
                return

    def mkdir(self, path: str, **attributes: int | None) -> None:
        """Make the directory, or set the attributes of an existing one."""
        request = agentext_pb.MkdirRequest(
            container_id=self._id, path=os.fsencode(path), parents=True, **attributes
        )
        self._engine.call(SANDBOX, "Mkdir", request, Empty)

    def symlink(self, path: str, target: bytes, **attributes: int | None) -> None:
        """Make a symbolic link. As with `link` and `node`, an existing file is replaced only if that succeeds."""
        request = agentext_pb.SymlinkRequest(
            container_id=self._id, path=os.fsencode(path), target=target, replace=True, **attributes
        )
        self._engine.call(SANDBOX, "Symlink", request, Empty)

    def link(self, path: str, target: str) -> str:
        """Make a further hard link to a copied file. An existing link to it stays.

        Returns:
            The reason why the link cannot be made, for example across file systems; empty on success.
        """
        request = agentext_pb.LinkRequest(
            container_id=self._id, path=os.fsencode(path), target=os.fsencode(target), replace=True
        )
        try:
            self._engine.call(SANDBOX, "Link", request, Empty)
        except KataError as error:
            if error.grpc_code != _PERMISSION_DENIED:
                raise
            return error.message
        return ""

    def node(self, path: str, mode: int, rdev: int, **attributes: int | None) -> None:
        """Make a fifo or device."""
        request = agentext_pb.NodeRequest(
            container_id=self._id,
            path=os.fsencode(path),
            mode=mode,
            rdev=rdev,
            replace=True,
            **attributes,
        )
        self._engine.call(SANDBOX, "Node", request, Empty)

    def sync(self, directory: str) -> None:
        """Return when what was copied into *directory* is on the host's disk, as far as its file system has one."""
        request = agentext_pb.SyncFilesRequest(container_id=self._id, path=os.fsencode(directory))
        try:
            self._engine.call(SANDBOX, "Sync", request, Empty)
        except KataError as error:
            if error.grpc_code != UnsupportedError.grpc_code:  # an older guest's agent
                raise

    def _remove(self, path: str) -> None:
        request = agentext_pb.RemoveFileRequest(container_id=self._id, path=os.fsencode(path))
        self._engine.call(SANDBOX, "Remove", request, Empty)


# ---- out of the container ----


def _out(guest: _Guest, source: str, destination: str, *, owners: bool, follow: bool) -> None:
    content_only = source.endswith("/.")
    path = posixpath.normpath(source)
    info = guest.need(path, follow=follow or content_only)
    is_directory = stat.S_ISDIR(info.mode)
    _refuse_device(destination)
    if os.path.isdir(destination) and not content_only:
        destination = os.path.join(destination, posixpath.basename(path) or "rootfs")
    elif destination.endswith("/") and not is_directory:
        raise UsageError(f"the directory {destination} does not exist", f"mkdir -p {destination}")
    parent = os.path.dirname(os.path.abspath(destination))
    if not os.path.isdir(parent):
        raise UsageError(f"the directory {parent} does not exist", f"mkdir -p {parent}")
    if is_directory and os.path.lexists(destination) and not os.path.isdir(destination):
        raise UsageError(f"a directory cannot be copied over the file {destination}")
    _out_entry(guest, path, info, destination, owners)


def _refuse_device(destination: str) -> None:
    """Leave /dev/null, /dev/stdout and the like alone: a copy would replace them, or change their modes."""
    with contextlib.suppress(OSError):
        mode = os.stat(destination).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UsageError(
                f"{destination} is neither a file nor a directory",
                "DEST - writes a tar stream: kata cp NAME:PATH - | tar -xO",
            )


def _out_entry(
    guest: _Guest, path: str, info: Any, destination: str, owners: bool, *, whole: bool = True
) -> None:
    kind = stat.S_IFMT(info.mode)
    first = guest.outside.get((info.device, info.number)) if info.links > 1 else None
    if first and first != destination and kind != stat.S_IFDIR and _linked(first, destination):
        return
    if kind == stat.S_IFDIR and os.path.islink(destination):
        os.unlink(destination)  # writing through the link would change another directory
    if kind == stat.S_IFDIR:
        os.makedirs(destination, exist_ok=True)
        for entry in guest.entries_to_copy(path, whole):
            name = os.fsdecode(entry.name)
            below = posixpath.join(path, name)
            _out_entry(guest, below, entry, os.path.join(destination, name), owners, whole=False)
    elif kind == stat.S_IFLNK:
        _replace(destination, lambda aside: os.symlink(info.link_target, os.fsencode(aside)))
    elif kind == stat.S_IFREG:
        _write_file(destination, guest.read(path, info.size))
    elif kind == stat.S_IFIFO:
        _replace(destination, lambda aside: os.mkfifo(aside, 0o600))
    elif kind == stat.S_IFSOCK:
        guest.leave_out(path, _SOCKET)
        return
    else:
        # On the host, that number is another device.
        guest.leave_out(path, "it is a device of the container's machine; a tar stream (DEST -) can hold it")
        return
    if info.links > 1 and kind != stat.S_IFDIR:
        guest.outside[info.device, info.number] = destination
    if owners:
        os.chown(destination, info.uid, info.gid, follow_symlinks=False)
    if kind != stat.S_IFLNK:
        os.chmod(destination, stat.S_IMODE(info.mode) & 0o1777)
        os.utime(destination, ns=(time.time_ns(), info.mtime_ns))


def _linked(first: str, destination: str) -> bool:
    """Make a further hard link to a copied file. Returns whether the host's file systems allow it."""
    try:
        _replace(destination, lambda aside: os.link(first, aside, follow_symlinks=False))
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
            raise
        return False
    return True


def _write_file(destination: str, pieces: Iterator[bytes]) -> None:
    """Write a file of the host; what is there and is none is replaced by it, and neither followed nor opened."""

    def write(path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            for data in pieces:
                file.write(data)

    if os.path.lexists(destination) and not stat.S_ISREG(os.lstat(destination).st_mode):
        _replace(destination, write)
    else:
        write(destination)


def _replace(destination: str, make: Callable[[str], None]) -> None:
    """Call *make* with a temporary name, and then move the result to *destination*."""
    aside = os.path.join(os.path.dirname(destination), f".kata-{os.urandom(6).hex()}")
    try:
        make(aside)
        os.replace(aside, destination)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)  # rename(2) does nothing if both names are links to the same file


def _to_tar(guest: _Guest, source: str, out: BinaryIO, follow: bool) -> None:
    path = posixpath.normpath(source)
    info = guest.need(path, follow=follow)
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        _tar_entry(guest, path, info, posixpath.basename(path) or ".", tar)


def _tar_entry(
    guest: _Guest, path: str, info: Any, name: str, tar: tarfile.TarFile, *, whole: bool = True
) -> None:
    member = tarfile.TarInfo(name)
    member.mode, member.uid, member.gid = stat.S_IMODE(info.mode), info.uid, info.gid
    member.mtime = info.mtime_ns // 10**9
    kind = stat.S_IFMT(info.mode)
    if kind == stat.S_IFDIR:
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
        for entry in guest.entries_to_copy(path, whole):
            below = os.fsdecode(entry.name)
            _tar_entry(guest, posixpath.join(path, below), entry, f"{name}/{below}", tar, whole=False)
    elif info.links > 1 and (first := guest.outside.get((info.device, info.number))):
        member.type, member.linkname = tarfile.LNKTYPE, first
        tar.addfile(member)
    elif kind == stat.S_IFLNK:
        member.type, member.linkname = tarfile.SYMTYPE, os.fsdecode(info.link_target)
        tar.addfile(member)
    elif kind == stat.S_IFREG:
        member.size = info.size
        tar.addfile(member, _Reader(guest.read(path, info.size), info.size))
    elif kind in _NODES:
        member.type = _NODES[kind]
        if kind != stat.S_IFIFO:
            member.devmajor, member.devminor = os.major(info.rdev), os.minor(info.rdev)
        tar.addfile(member)
    else:
        guest.leave_out(path, _SOCKET)
        return
    if info.links > 1 and kind != stat.S_IFDIR:
        guest.outside.setdefault((info.device, info.number), name)


_NODES = {
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


class _Reader:
    """A file object of exactly *size* bytes; if the file shrank while it was read, it is padded with zeros."""

    def __init__(self, pieces: Iterator[bytes], size: int) -> None:
        self._pieces = pieces
        self._left = size
        self._held = b""

    def read(self, count: int = -1) -> bytes:
        wanted = self._left if count < 0 else min(count, self._left)
        while len(self._held) < wanted:
            piece = next(self._pieces, None)
            if piece is None:
                self._held += bytes(wanted - len(self._held))
                break
            self._held += piece
        out, self._held = self._held[:wanted], self._held[wanted:]
        self._left -= len(out)
        return out


# ---- into the container ----


def _in(guest: _Guest, source: str, destination: str, *, owners: bool, follow: bool) -> None:
    content_only = source.endswith("/.") or source == "."
    host = os.path.normpath(source)
    try:
        status = os.stat(host) if follow or content_only else os.lstat(host)
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}", "check the path") from None
    target = guest.stat(posixpath.normpath(destination), follow=True)
    path = posixpath.normpath(destination)
    if target is not None and stat.S_ISDIR(target.mode):
        if not content_only:
            path = posixpath.join(path, os.path.basename(os.path.abspath(host)))
    elif destination.endswith("/") and not stat.S_ISDIR(status.st_mode):
        raise UsageError(
            f"the container has no directory {destination}", "leave out the last /, or make it first"
        )
    elif target is not None and stat.S_ISDIR(status.st_mode):
        raise UsageError(f"a directory cannot be copied over the file {destination} of the container")
    parent = posixpath.dirname(path)
    above = guest.stat(parent, follow=True)
    if above is None or not stat.S_ISDIR(above.mode):
        raise UsageError(f"the container has no directory {parent}", f"kata exec ... mkdir -p {parent}")
    _in_entry(guest, host, status, path, owners, follows=follow or content_only)
    guest.written_into = path if stat.S_ISDIR(status.st_mode) else parent


def _in_entry(
    guest: _Guest,
    host: str,
    status: os.stat_result,
    path: str,
    owners: bool,
    *,
    directory: int | None = None,
    follows: bool = False,
) -> None:
    """Copy one entry of a host's directory, with what is below it. Whoever may write there can have put something else
    in its place since it was looked at: what is opened then is no other user's link to files that only we may read.

    Args:
        guest: The container.
        host: Its path on the host.
        status: Its status.
        path: Where it is to be.
        owners: Its owner is kept.
        directory: The directory that it is in; None is the working directory, and *host* leads there.
        follows: A link is followed.
    """
    uid, gid = (status.st_uid, status.st_gid) if owners else (0, 0)
    if not guest.is_kept(path):
        return
    name = host if directory is None else os.path.basename(host)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follows else os.O_NOFOLLOW)
    if stat.S_ISDIR(status.st_mode):
        guest.mkdir(path, mode=stat.S_IMODE(status.st_mode), uid=uid, gid=gid)
        with sysio.Fd(os.open(name, flags | os.O_DIRECTORY, dir_fd=directory)) as opened:
            with os.scandir(opened.raw) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            for entry in found:
                _in_entry(
                    guest,
                    os.path.join(host, entry.name),
                    entry.stat(follow_symlinks=False),
                    posixpath.join(path, entry.name),
                    owners,
                    directory=opened.raw,
                )
        return
    key = status.st_dev, status.st_ino
    if status.st_nlink > 1 and (first := guest.outside.get(key)) and not guest.link(path, first):
        return
    if stat.S_ISLNK(status.st_mode):
        guest.symlink(path, os.fsencode(os.readlink(name, dir_fd=directory)), uid=uid, gid=gid)
    elif stat.S_ISREG(status.st_mode):
        with os.fdopen(os.open(name, flags, dir_fd=directory), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{host} has become something else while it was copied", "copy it again")
            guest.write(
                path, file, mode=stat.S_IMODE(status.st_mode), uid=uid, gid=gid, mtime_ns=status.st_mtime_ns
            )
    elif stat.S_IFMT(status.st_mode) in _NODES:
        guest.node(path, status.st_mode, status.st_rdev, uid=uid, gid=gid)
    else:
        guest.leave_out(host, _SOCKET)
        return
    if status.st_nlink > 1:
        guest.outside.setdefault(key, path)


def _from_tar(guest: _Guest, stream: BinaryIO, destination: str) -> None:
    base = posixpath.normpath(destination)
    info = guest.need(base, follow=True)
    if not stat.S_ISDIR(info.mode):
        raise UsageError(
            f"{destination} is not a directory in the container", "a tar stream is unpacked into a directory"
        )
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                _from_tar_member(guest, tar, member, base)
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, zlib.error, lzma.LZMAError) as error:
        raise UsageError(f"standard input is not a complete tar stream: {error}") from None
    guest.written_into = base


def _from_tar_member(guest: _Guest, tar: tarfile.TarFile, member: tarfile.TarInfo, base: str) -> None:
    # The agent resolves paths inside the container's root, so even ".." cannot lead out of it.
    path = _below(base, member.name)
    if not 0 <= member.uid < _NOBODY or not 0 <= member.gid < _NOBODY:
        raise ValueError(f"{member.name!r} has the owner {member.uid}:{member.gid}")
    owner = {"uid": member.uid, "gid": member.gid}
    mode = member.mode & 0o7777
    if not guest.is_kept(path):
        return
    if member.isdir():
        guest.mkdir(path, mode=mode, **owner)
        return
    if not (member.issym() or member.isfile() or member.islnk() or member.type in _NODE_TYPES):
        guest.leave_out(member.name, f"its type {member.type!r} is unknown")
        return
    parent = posixpath.dirname(path)
    if guest.stat(parent, follow=True) is None:  # an archive need not contain the directories of its files
        guest.mkdir(parent)
    if member.issym():
        guest.symlink(path, os.fsencode(member.linkname), **owner)
    elif member.islnk():
        refusal = guest.link(path, _below(base, member.linkname))
        if refusal:
            guest.leave_out(member.name, f"it cannot be a link to {member.linkname}: {refusal}")
    elif member.isfile():
        content: Any = tar.extractfile(member)
        limit = (1 << 63) - 1
        mtime_ns = max(-limit, min(limit, int(member.mtime * 10**9)))
        guest.write(path, content, mode=mode, mtime_ns=mtime_ns, **owner)
    else:
        rdev = 0 if member.isfifo() else os.makedev(member.devmajor, member.devminor)
        guest.node(path, _NODE_TYPES[member.type] | mode, rdev, **owner)


_NODE_TYPES = {kind: mode for mode, kind in _NODES.items()}
_NOBODY = (1 << 32) - 1
"""The id that means "unchanged" to chown(2); ids of users and groups are below it."""


def _below(base: str, name: str) -> str:
    return posixpath.join(base, posixpath.normpath(name.lstrip("/")))


HANDLERS = {"cp": _cp}
