"""`kata export`, `diff`, `commit` and `save`: what is in a container or an image, as a tar stream, a list or an image.

The files are read by the agent in the machine, whose kernel has mounted them; the host looks into no file system. For a
container that does not run, and for images, a machine is booted for it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from kata.cli import records
from kata.cli.args import Command, Option
from kata.cli.mounted_root import mounted_root
from kata.engine.client import SANDBOX, EngineClient
from kata.errors import GuestProtocolError, HostError, StateError, UnsupportedError, UsageError
from kata.proto import agentext_pb, sandbox_pb
from kata.storage import layer_tar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kata.cli.args import Arguments
    from kata.cli.records import Container
    from kata.images.flat import Layer
    from kata.images.store import Image

_READ_S = 120.0
_MOST_NAMES = 256 << 20
"""Bytes of paths that `kata diff` keeps, twice."""
COMMANDS = {
    "export": Command(
        "export",
        "CONTAINER",
        "Writes the files of a container as a tar stream.",
        [Option("-o --output", "FILE", "write it to a file instead of standard output")],
        least=1,
        most=1,
        notes="What is mounted in the container (volumes, /proc, /sys) is not in it. The container may be running or\n"
        "not; one that runs goes on meanwhile ('kata pause' keeps its files as they are).",
    ),
    "diff": Command(
        "diff",
        "CONTAINER",
        "Lists what a container has changed in its root file system.",
        [Option("--format", "json", "print a JSON object instead of lines")],
        least=1,
        most=1,
        notes="A: added, C: changed, D: deleted. A directory is changed if something in it is.",
    ),
    "commit": Command(
        "commit",
        "CONTAINER [NAME[:TAG]]",
        "Makes an image of a container's files, and prints its id.",
        [
            Option("-a --author", "TEXT", "who made it"),
            Option(
                "-c --change",
                "INSTRUCTION",
                "a line of a Dockerfile: 'CMD [\"/bin/sh\"]', 'ENV A=b'",
                many=True,
            ),
            Option("-m --message", "TEXT", "a comment, for 'kata history'"),
            Option(
                "-p --pause",
                "",
                "freeze the container meanwhile, which is the default; --pause=false does not",
            ),
            Option("-q --quiet", "", "show no progress"),
        ],
        least=1,
        most=2,
        notes="The image has one layer with all files: those of the container's image, too. Its command, environment\n"
        "and working directory are the container's. What is mounted in the container (volumes) is not in it.",
    ),
    "save": Command(
        "save",
        "IMAGE...",
        "Writes images as an archive that 'docker load', 'podman load' and 'kata load' read.",
        [
            Option("-o --output", "FILE", "write it to a file instead of standard output"),
            Option("-q --quiet", "", "show no progress"),
        ],
        least=1,
        notes="Each image has one layer there, with all its files, since the layers that it was fetched in are\n"
        "not kept: so its id is another one.",
    ),
}


# ---- reading ----


def parts_of(
    engine: EngineClient, container_id: str, layer: str, *, without_data: bool = False
) -> Iterator[list[agentext_pb.LayerPart]]:
    """Read a container's files.

    Args:
        engine: The engine of a container whose root file system is mounted.
        container_id: The container.
        layer: ``root``, ``image`` or ``written``, see ``kata.sandbox.v1.ReadLayerRequest``.
        without_data: Files without their content.

    Yields:
        What comes in one answer.

    Raises:
        KataError: They cannot be read.
    """
    position = b""
    while True:
        request = sandbox_pb.ReadLayerRequest(
            id=container_id, layer=layer, next=position, without_data=without_data
        )
        answer = engine.call(SANDBOX, "ReadLayer", request, agentext_pb.ReadLayerResponse, _READ_S)
        yield answer.parts
        position = answer.next
        if not position:
            return
        if not answer.parts:
            raise GuestProtocolError("the guest has sent nothing of a layer, and more is to come")


def _write_tar(
    engine: EngineClient,
    container: Container,
    write: Callable[[bytes | memoryview], object],
    most_bytes: int | None = None,
) -> None:
    tar = layer_tar.LayerTar(write, most_bytes)
    for parts in parts_of(engine, container.id, "root"):
        tar.add(parts)
    tar.finish()
    if tar.sockets:
        sys.stderr.write(
            f"note: {tar.sockets} sockets are left out, which are useless without their processes\n"
        )


@contextlib.contextmanager
def _output(path: str | None, what: str) -> Iterator[Callable[[bytes | memoryview], object]]:
    """What writes to a new file, which is there only if all went well, or to standard output.

    Raises:
        UsageError: Standard output is a terminal.
        HostError: The file cannot be written.
    """
    if path is None:
        if sys.stdout.isatty():
            raise UsageError(f"standard output is a terminal, and {what} is none for it", "-o FILE")
        yield sys.stdout.buffer.write
        sys.stdout.buffer.flush()
        return
    if os.path.lexists(path) and not os.path.isfile(path):  # /dev/null, /dev/stdout, a fifo
        try:
            file = open(path, "wb")  # noqa: SIM115 - closed below
        except OSError as error:
            raise HostError(f"{path} cannot be written: {error.strerror}", "-o FILE") from error
        with file:
            yield file.write
        return
    aside = f"{path}.{os.urandom(4).hex()}.part"
    try:
        with open(aside, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            yield file.write
        os.replace(aside, path)
    except OSError as error:
        if error.filename not in (aside, path, None) or isinstance(error, BrokenPipeError):
            raise
        raise HostError(f"{path} cannot be written: {error.strerror}", "-o FILE") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)


# ---- export and diff ----


def _export(arguments: Arguments) -> int:
    container = records.find(arguments.rest[0])
    with (
        _output(arguments.value("output"), "a tar stream") as write,
        mounted_root(container) as engine,
    ):
        _write_tar(engine, container, write)
    return 0


def _diff(arguments: Arguments) -> int:
    form = arguments.value("format")
    if form not in (None, "json"):
        raise UsageError(f"--format {form!r} is not offered", "--format json, or none")
    container = records.find(arguments.rest[0])
    with mounted_root(container) as engine:
        changes = _changes(engine, container)
    if form == "json":
        import json

        names = {"A": "added", "C": "changed", "D": "deleted"}
        listed: dict[str, list[str]] = {}
        for kind, path in changes:
            listed.setdefault(names[kind], []).append(path)
        print(json.dumps(listed))
        return 0
    for kind, path in changes:
        # A name may hold a line break, or what a terminal takes for a command.
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)
        print(f"{kind} {shown}")
    return 0


def _changes(engine: EngineClient, container: Container) -> list[tuple[str, str]]:
    """(A, C or D; path) of what the writable layer has, ordered by path."""
    written: dict[bytes, int] = {}  # -> 0: gone, otherwise its mode
    kept = 0
    for parts in parts_of(engine, container.id, "written", without_data=True):
        for part in parts:
            if part.entry is None or not part.entry.path:
                continue
            layer_tar.check_path(part.entry.path)
            gone = stat.S_ISCHR(part.entry.mode) and part.entry.rdev == 0
            written[part.entry.path] = 0 if gone else part.entry.mode
            kept += len(part.entry.path)
            if kept > _MOST_NAMES:
                raise UnsupportedError(
                    "the container has changed too much to list", "kata export NAME | tar -t"
                )
    known: set[bytes] = set()
    for parts in parts_of(engine, container.id, "image", without_data=True):
        known.update(
            part.entry.path for part in parts if part.entry is not None and part.entry.path in written
        )
    points = _mount_points(container)
    found = []
    for path, mode in written.items():
        if path not in known and (mode == 0 or path in points):
            continue  # a whiteout of nothing; a place for a mount, which starting it has made
        if path in points and stat.S_ISDIR(mode):
            continue
        found.append(("D" if mode == 0 else "C" if path in known else "A", "/" + os.fsdecode(path)))
    return sorted(found, key=lambda change: change[1].split("/"))


def _mount_points(container: Container) -> set[bytes]:
    """Where something is mounted in a container, and the directories above, relative to its root."""
    spec = records.read_json(os.path.join(container.directory, "config.json"))
    points: set[bytes] = set()
    for mount in spec.get("mounts") or ():
        path = os.fsencode(os.path.normpath(str(mount["destination"])).strip("/"))
        while path:
            points.add(path)
            path = path.rpartition(b"/")[0]
    return points


# ---- commit ----


def _commit(arguments: Arguments) -> int:
    from kata.cli import import_image, inspect, manage
    from kata.images import flat, store
    from kata.images import reference as references
    from kata.storage.layers import limits_from_environment

    container = records.find(arguments.rest[0])
    name = ""
    if len(arguments.rest) > 1:
        wanted = references.parse_reference(arguments.rest[1])
        if wanted.digest:
            raise UsageError(f"{arguments.rest[1]!r}: a name to give cannot have a digest", "NAME:TAG")
        name = str(wanted)
    changed = import_image.changed(arguments.many("change"))
    base = {}
    image = store.load(container.record["image"]["id"], store.Index())
    if image is not None:
        base = inspect.image_document(image)
    config = _config_of(container, base.get("config") or {}, changed)
    limit = limits_from_environment().size
    with manage.spooled() as archive, flat.Layer(os.path.dirname(archive.name), limit) as layer:
        with mounted_root(container) as engine, _frozen(engine, container, arguments):
            _write_tar(engine, container, layer.write, limit)
        step = {
            "created": records.now(),
            "created_by": " ".join(container.record["args"]),
            "comment": arguments.value("message") or "",
        }
        if arguments.value("author"):
            step["author"] = base["author"] = arguments.value("author") or ""
        base.setdefault("architecture", _architecture())
        writer = flat.ArchiveWriter(archive.write)
        writer.add([name] if name else [], flat.document(base, config, layer, step), layer)
        writer.finish()
        archive.flush()
        [made] = manage.load_file(archive.name, quiet=arguments.flag("quiet"))
    print(made.id)
    return 0


def _architecture() -> str:
    from kata.images import platform

    return platform.host().arch


def _config_of(container: Container, base: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """What containers of the image that is made of *container* get: what it has, but for what ``--change`` says."""
    spec = records.read_json(os.path.join(container.directory, "config.json"))
    process = spec.get("process") or {}
    record = container.record
    config = {
        **base,
        "Env": process.get("env") or [],
        "WorkingDir": process.get("cwd") or "/",
        "Labels": record["labels"],
        "StopSignal": record["stop_signal"],
    }
    entrypoint = base.get("Entrypoint") or []
    if entrypoint and record["args"][: len(entrypoint)] == entrypoint:
        config["Cmd"] = record["args"][len(entrypoint) :]
    else:
        config.pop("Entrypoint", None)
        config["Cmd"] = record["args"]
    merged = {name.partition("=")[0]: name for name in [*config["Env"], *changed.pop("Env", [])]}
    config["Env"] = list(merged.values())
    config["Labels"] = {**config["Labels"], **changed.pop("Labels", {})}
    for key in ("ExposedPorts", "Volumes"):
        if key in changed:
            config[key] = {**(config.get(key) or {}), **changed.pop(key)}
    return {**config, **changed}


@contextlib.contextmanager
def _frozen(engine: EngineClient, container: Container, arguments: Arguments) -> Iterator[None]:
    """The container's processes stand still meanwhile, unless they do already or --pause=false was given."""
    if not arguments.flag("pause", True) or container.state()["status"] != records.RUNNING:
        yield
        return
    try:
        engine.pause(container.id)
    except StateError:  # it has just ended, or another command was faster
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(StateError):
            engine.resume(container.id)


# ---- save ----


def _save(arguments: Arguments) -> int:
    from kata.images import flat, store
    from kata.images import reference as references
    from kata.storage.layers import limits_from_environment

    images: dict[str, tuple[Image, list[str]]] = {}
    for reference in arguments.rest:
        image = store.find(reference)
        if image.rootfs_dir:
            raise UnsupportedError(
                f"{reference} is a directory, and no image", f"tar -C {image.rootfs_dir} -c ."
            )
        names = images.setdefault(image.id, (image, []))[1]
        named = [name for name in image.names if name.partition(":")[0] not in references.LOCAL_KINDS]
        if not store.hex_of(image.id).startswith(reference.removeprefix("sha256:")):
            asked = str(references.parse_reference(reference))
            named = [name for name in named if name == asked] or named
        names += [references.familiar(name) for name in named if "@" not in name]
    limit = limits_from_environment().size
    directory = os.path.join(store.directory(), "rootfs")
    with _output(arguments.value("output"), "an archive") as write:
        writer = flat.ArchiveWriter(write)
        for image, names in images.values():
            with flat.Layer(directory, limit) as layer:
                writer.add(sorted(set(names)), flatten(image, layer, "kata save"), layer)
        writer.finish()
    return 0


def flatten(image: Image, layer: Layer, by: str) -> dict[str, Any]:
    """Read all files of an image into one layer, in a machine that is booted for it.

    Args:
        image: The image.
        layer: It is written to.
        by: The command that does it, for the image's history.

    Returns:
        The configuration of an image with this layer alone.

    Raises:
        KataError: They cannot be read, or are too many.
    """
    from kata.cli import inspect
    from kata.images import flat

    with _container_of(image) as container, mounted_root(container) as engine:
        _write_tar(engine, container, layer.write, layer.limit)
    step = {"created": image.created or records.now(), "created_by": by, "comment": "all layers as one"}
    return flat.document(inspect.image_document(image), image.config, layer, step)


@contextlib.contextmanager
def _container_of(image: Image) -> Iterator[Container]:
    """A container of an image that is never started, and gone afterwards."""
    from kata.cli import making, run

    asked = run.COMMANDS["create"].parse(
        ["--network=none", "--storage=tmpfs", "--pull=never", image.id, "/"]
    )
    container = making.make_container(asked, run.SELDOM, auto_remove=False, made_to_run=True)
    try:
        yield container
    finally:
        records.remove(container)


HANDLERS = {"export": _export, "diff": _diff, "commit": _commit, "save": _save}
