"""The machine in which `kata inspect-image` has an image read: its tools, its disks, and what it is let to say.

It is a container of the `kata` command without a network, whose root file system is a disk with one static program (and
busybox, for a shell). The image is a read-only disk. Everything that the machine says is taken for hostile: it is
bounded in length and time here, and checked by `kata.cli.inspect_schema`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import stat
import tempfile
import time

from kata import paths
from kata.cli import records
from kata.cli.ending import wait_for_engine
from kata.cli.records import PendingContainer
from kata.errors import GuestAssetError, KataError, VMLostError
from kata.images import changes
from kata.storage import whole_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from kata.cli.records import Container

MEMORY = 1 << 30
CPUS = 2.0
SCRATCH = 16 << 30
"""Size of the throw-away disk, a sparse file of which only what is written takes room."""
MAX_REPORT = 6 << 20
_MAX_ERRORS = 4096
_SLACK_S = 60.0
"""How much longer than the program in the machine may take the machine is waited for, in seconds."""
_DIRECTORIES = ("dev", "etc", "image", "mnt", "proc", "run", "sys", "tmp")


def tools(extra: dict[str, bytes] | None = None) -> str:
    """The root file system with the programs for the machine, made when it is needed.

    Args:
        extra: Further programs by name.

    Returns:
        The path of an erofs file in the cache.

    Raises:
        GuestAssetError: The inspector has not been built.
        HostError: The cache cannot be written.
    """
    path = paths.inspector_binary()
    try:
        with open(path, "rb") as file:
            programs = {"inspector": file.read(), **(extra or {})}
    except OSError as error:
        raise GuestAssetError(
            f"the program that reads images cannot be used: {path}: {error.strerror}",
            "tools/setup run builds it",
        ) from None
    digest = hashlib.sha256()
    for name, data in sorted(programs.items()):
        digest.update(name.encode() + len(data).to_bytes(8, "little") + data)
    target = os.path.join(paths.cache_dir(), f"inspector-{digest.hexdigest()[:16]}.erofs")
    if not os.path.exists(target):
        cached(target, {name: (len(data), [data]) for name, data in programs.items()}, _DIRECTORIES)
    return target


def cached(
    target: str, files: Mapping[str, tuple[int, Iterable[bytes]]], directories: Sequence[str] = ()
) -> None:
    """Make a disk of the cache, unless another command is faster; see `write_files`.

    Raises:
        HostError: The cache cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with whole_file.alone(target + ".lock", lambda: None):
            write_files(target, files, directories)
    except FileExistsError:
        pass  # another command was faster
    except OSError as error:
        raise changes.storage_error(error) from error


def write_files(
    target: str, files: Mapping[str, tuple[int, Iterable[bytes]]], directories: Sequence[str] = ()
) -> None:
    """Make a disk (erofs) with some files, all of which may be executed.

    Args:
        target: The disk's file, which is there when it is whole.
        files: Size and content by name.
        directories: Names of directories; ``etc`` has the files that an engine fills.

    Raises:
        FileExistsError: There is such a file already.
        OSError: It cannot be written.
    """
    from kata.storage.erofs import Node, Writer

    spool_directory = os.path.dirname(target)
    digest = hashlib.sha256(repr([(name, size) for name, (size, _) in files.items()]).encode())
    with whole_file.nameless(target) as fd, tempfile.TemporaryFile(dir=spool_directory) as spool:
        writer = Writer(fd, spool.fileno())
        root = Node(stat.S_IFDIR | 0o755)
        assert root.children is not None
        for name in directories:
            root.children[name.encode()] = directory = Node(stat.S_IFDIR | 0o755)
            directory.nlink = 1
            if name == "etc":
                for file_name in (b"hosts", b"hostname", b"resolv.conf"):
                    _add_file(writer, directory, file_name, 0, [], 0o644)
        for name, (size, chunks) in files.items():
            _add_file(writer, root, os.fsencode(name), size, chunks, 0o755)
        writer.finish(root, digest.digest()[:16])
        os.fsync(fd)


def _add_file(writer: Any, parent: Any, name: bytes, size: int, chunks: Iterable[bytes], mode: int) -> None:
    from kata.storage.erofs import Node

    node = Node(stat.S_IFREG | mode)
    node.nlink = 1
    writer.store(node, size, chunks)
    parent.children[name] = node


def busybox() -> bytes:
    """A static busybox for a shell in the machine: this machine's, or that of Debian's package.

    Raises:
        GuestAssetError: Neither can be had.
    """
    from kata.guest import extension, packages

    for path in ("/usr/bin/busybox", "/bin/busybox"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            data = file.read()
            if data.startswith(b"\x7fELF") and not extension.needed(data):
                return data
    if not packages.have_apt():
        raise GuestAssetError(
            "a shell needs a static busybox, and this machine has neither that nor apt",
            "install busybox-static, or its like",
        )
    with tempfile.TemporaryDirectory() as work:
        package = packages.describe("busybox-static")
        packages.unpack(packages.fetch(package, lambda _text: None), work)
        for name in ("usr/bin/busybox", "bin/busybox"):
            with contextlib.suppress(OSError), open(os.path.join(work, name), "rb") as file:
                return file.read()
    raise GuestAssetError("Debian's package busybox-static has no busybox")


class Answer:
    """What came out of a machine.

    Attributes:
        output: Its standard output, at most `MAX_REPORT` bytes.
        errors: The beginning of its standard error.
        status: The program's exit status; None if it did not end by itself.
        problem: Why there is no whole answer; empty if there is.
    """

    __slots__ = ("errors", "output", "problem", "status")

    def __init__(self) -> None:
        self.output = b""
        self.errors = b""
        self.status: int | None = None
        self.problem = ""


def make(
    fill: Callable[[str], list[dict[str, Any]]],
    command: list[str],
    *,
    programs: str,
    terminal: bool = False,
    memory: int = MEMORY,
    scratch: int = SCRATCH,
) -> Container:
    """Make the container of the machine. On an error nothing is left behind.

    Args:
        fill: Writes the image's file to the path that it is given, and returns the machine's disks besides its own
            (``path``, ``serial``).
        command: What runs in it.
        programs: The root file system, from `tools`.
        terminal: Whether it has a terminal.
        memory: Memory of the machine in bytes.
        scratch: Size of its throw-away disk in bytes.

    Raises:
        KataError: The disk cannot be made, or `fill` fails.
    """
    from kata.engine.launch import raise_file_limit
    from kata.oci import spec as oci
    from kata.storage import ext4

    raise_file_limit()
    pending = PendingContainer(None)
    try:
        disks = fill(pending.path("image.img"))
        ext4.make_writable(pending.path("rw.img"), scratch, scratch=True)
        request = oci.Request("inspect")
        request.command = command
        request.privileged = True  # in a machine of its own, which it needs for its disks
        request.terminal = terminal
        request.cpus, request.memory = CPUS, memory
        spec = oci.build(request, {})
        record: dict[str, Any] = {
            "id": pending.id,
            "name": pending.name,
            "created_at": records.now(),
            "image": {"reference": "kata inspect-image", "id": ""},
            "rootfs": {"kind": "erofs", "path": programs},
            "upper": "disk",
            "storage_size": scratch,
            "args": command,
            "hostname": request.hostname,
            "tty": terminal,
            "open_stdin": terminal,
            "stdin_once": terminal,
            "network": "none",
            "ports": [],
            "volumes": [],
            "disk_volumes": [],
            "further_disks": disks,
            "cpus": CPUS,
            "memory": memory,
            "hypervisor": "",
            "auto_remove": True,
            "made_to_run": True,
            "image_volumes": [],
            "stop_signal": "SIGKILL",
            "labels": {},
            "log": {"max_bytes": 1 << 20, "files": 1},
        }
        return pending.commit(record, spec)
    except BaseException:
        pending.discard()
        raise


def run(container: Container, seconds: float, tick: Callable[[float], None] | None = None) -> Answer:
    """Run the machine to its end and collect what it says. Nothing of the container is left afterwards.

    Args:
        container: From `make`.
        seconds: What its program was given to finish.
        tick: Called about once a second with the seconds since the start.

    Returns:
        The answer; a machine that dies, says too much or does not end is a `problem` in it.

    Raises:
        KataError: The machine could not be started.
    """
    from kata.cli import session
    from kata.cli.fifos import Fifos
    from kata.engine.client import EngineClient
    from kata.engine.launch import launch

    settings = session.sandbox_settings(container, time.monotonic_ns())
    assert settings.container is not None
    settings.container.log = None  # what it says goes here, and nowhere else
    answer = Answer()
    try:
        engine = launch(settings)
        try:
            with EngineClient(engine.sock_path) as client:
                directory = os.path.join(paths.sandbox_dir(container.id), "io")
                fifos = Fifos(directory, "main", stdin=False, terminal=False)
                try:
                    client.create(
                        container.id, container.directory, stdout=fifos.stdout, stderr=fifos.stderr
                    )
                    fifos.connected()
                    client.start(container.id)
                    _collect(fifos, answer, seconds + _SLACK_S, tick)
                    _finish(client, container, answer)
                finally:
                    fifos.close()
        finally:
            engine.release()
    finally:
        wait_for_engine(container, tell=True)
        if records.load(container.id) is not None:
            with contextlib.suppress(KataError, OSError):
                records.remove(container)
    return answer


def _collect(fifos: Any, answer: Answer, seconds: float, tick: Callable[[float], None] | None) -> None:
    began = time.monotonic()
    out, errors = bytearray(), bytearray()
    waiting = {fifos.stdout_end.raw: out, fifos.stderr_end.raw: errors}
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting:
        passed = time.monotonic() - began
        if passed > seconds:
            answer.problem = f"it did not end within {seconds:.0f} s"
            break
        if tick is not None:
            tick(passed)
        for fd, _ in poll.poll(1000):
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                continue
            if not data:
                poll.unregister(fd)
                del waiting[fd]
            elif waiting[fd] is errors:
                errors += data[: _MAX_ERRORS - len(errors)]
            else:
                out += data
        if len(out) > MAX_REPORT:
            answer.problem = f"it sent a report of more than {MAX_REPORT >> 20} MiB"
            break
    answer.output, answer.errors = bytes(out[:MAX_REPORT]), bytes(errors)


def _finish(client: Any, container: Container, answer: Answer) -> None:
    """Have the sandbox end, and note how its program did."""
    if answer.problem:
        with contextlib.suppress(KataError):
            client.discard()
        return
    try:
        answer.status = client.wait(container.id, timeout=30.0)
        client.delete(container.id)
    except VMLostError:
        pass
    except KataError as error:
        answer.problem = error.message
        return
    state = container.raw_state()
    lost = str(state.get("error") or "")
    if answer.status is None or lost:
        answer.problem = "its machine was lost: " + (lost or "its engine ended")
    elif answer.status == 137:
        answer.problem = (
            "its program was killed, most likely since it needed more memory than --memory gives it"
        )
