"""`kata rename`, `tag`, `history`, `load`, `info`: the smaller commands of Docker and Podman."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager

from kata import paths
from kata.cli import records, table
from kata.cli.args import Command, Option
from kata.errors import ImageError, UsageError
from kata.images import changes, store
from kata.images import reference as references

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO, Any

    from kata.cli.args import Arguments

_HISTORY_FIELDS = {
    "ID": "IMAGE",
    "CreatedSince": "CREATED",
    "CreatedBy": "CREATED BY",
    "Size": "SIZE",
    "Comment": "COMMENT",
}
COMMANDS = {
    "rename": Command("rename", "CONTAINER NAME", "Gives a container another name.", least=2, most=2),
    "tag": Command("tag", "IMAGE NAME[:TAG]", "Gives an image a further name.", least=2, most=2),
    "history": Command(
        "history",
        "IMAGE",
        "Shows by which steps an image was made.",
        [
            Option("-q --quiet", "", "ids only"),
            Option("--no-trunc", "", "do not shorten ids and steps"),
            Option(
                "--format", "TEMPLATE", "print a line for each by a Go template, 'table TEMPLATE' or json"
            ),
        ],
        least=1,
        most=1,
        exclusive=(("quiet", "format"),),
        notes="SIZE is that of the layer as it was fetched, packed: the layers themselves are not kept.\n"
        f"fields of --format: {' '.join(_HISTORY_FIELDS)} CreatedAt",
    ),
    "load": Command(
        "load",
        "",
        "Reads images from an archive that 'docker save' or 'podman save' wrote, under the names that it has.",
        [
            Option("-i --input", "FILE", "the archive; standard input if not given"),
            Option("-q --quiet", "", "show no progress"),
        ],
        most=0,
    ),
    "info": Command(
        "info",
        "",
        "Shows how many containers and images there are, and what they run on.",
        [Option("-f --format", "TEMPLATE|json", "print what a Go template picks: '{{.ContainersRunning}}'")],
        most=0,
    ),
}


def _rename(arguments: Arguments) -> int:
    from kata.cli import values

    reference, name = arguments.rest
    records.rename(records.find(reference), values.name(name, "kata rename:", "container"))
    return 0


# ---- images ----


def _tag(arguments: Arguments) -> int:
    source, text = arguments.rest
    if text.partition(":")[0] in references.LOCAL_KINDS:
        raise UsageError(f"{text!r} is no name of an image", "kata tag IMAGE NAME[:TAG]")
    wanted = references.parse_reference(text)
    if wanted.digest:
        raise UsageError(f"{text!r}: a tag cannot have a digest", f"kata tag {source} NAME:TAG")
    give_names(store.find(source), [str(wanted)])
    return 0


def give_names(found: store.Image, names: Iterable[str]) -> None:
    """Give an image further names.

    Args:
        found: The image.
        names: Whole references.

    Raises:
        ImageError: It was removed meanwhile.
    """
    with changes.locked():
        index = store.Index()
        image = store.load(found.id, index)
        if image is None:
            raise ImageError(f"the image {found.id[:12]} was removed meanwhile", "see `kata images`")
        for name in names:
            index.names[name] = {"id": image.id, "origin": "local", "digest": image.digest}
        changes.write_index(index)


def _history(arguments: Arguments) -> int:
    from kata.cli.inspect import image_document

    image = store.find(arguments.rest[0])
    record = store.read_json(store.record_path(image.id)) or {}
    document = image_document(image)
    layers = list(record.get("layers") or ())
    full = arguments.flag("no_trunc")
    identity = image.id if full else store.hex_of(image.id)[:12]
    rows: list[dict[str, Any]] = []
    for step in document.get("history") or ():
        if not isinstance(step, dict):
            continue
        size = 0
        if not step.get("empty_layer") and layers:
            size = int(layers.pop(0)["size"])
        made = " ".join(str(step.get("created_by") or "").split())
        created = str(step.get("created") or "")
        rows.append(
            {
                "ID": "<missing>",
                "CreatedAt": created or "N/A",
                "CreatedSince": f"{table.age(created)} ago"
                if table.seconds_of(created) is not None
                else "N/A",
                "CreatedBy": made if full or len(made) <= 45 else made[:44] + "…",
                "Size": table.human_size(size),
                "Comment": str(step.get("comment") or ""),
            }
        )
    rows.reverse()
    if rows:
        rows[0]["ID"] = identity
    form = arguments.value("format")
    if arguments.flag("quiet"):
        form = "{{.ID}}"
    from kata.cli.template import show_rows

    show_rows(form or "", rows, _HISTORY_FIELDS, further=("CreatedAt",))
    return 0


def _load(arguments: Arguments) -> int:
    path = arguments.value("input")
    if path is not None:
        return _load_file(os.path.abspath(path), arguments.flag("quiet"))
    if sys.stdin.isatty():
        raise UsageError(
            "an archive is expected on standard input, which is a terminal", "kata load -i FILE"
        )
    import shutil

    with spooled() as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        file.flush()
        return _load_file(file.name, arguments.flag("quiet"))


@contextmanager
def spooled() -> Iterator[IO[bytes]]:
    """A file of the image store for an archive that is being read; it is gone afterwards, or with `kata gc`.

    Raises:
        HostError: The store cannot be written.
    """
    import tempfile

    spool = os.path.join(store.directory(), "rootfs")
    try:
        paths.make_dirs(spool, 0o700)
        # With this lock `gc` leaves alone what no image refers to.
        with (
            changes.locked("adding", shared=True),
            tempfile.NamedTemporaryFile(dir=spool, suffix=".tmp") as file,
        ):
            yield file
    except OSError as error:
        raise changes.storage_error(error) from error


def load_file(path: str, *, quiet: bool) -> list[store.Image]:
    """Read all images of an archive, under the names that it gives them.

    Args:
        path: Its path.
        quiet: Show no progress.

    Raises:
        KataError: It is no archive, or an image cannot be read.
    """
    from kata.images.archive import Archive
    from kata.images.resolve import resolve
    from kata.storage.layers import limits_from_environment

    if not os.path.isfile(path):
        raise UsageError(f"{path} is no file", "kata load -i FILE")
    spool = os.path.join(store.directory(), "rootfs")
    try:
        paths.make_dirs(spool, 0o700)
        archive = Archive(path, spool, limits_from_environment().size)
    except OSError as error:
        raise changes.storage_error(error) from error
    try:
        count = archive.count()
    finally:
        archive.close()
    progress = (lambda *_: None) if quiet else None
    images = []
    for place in range(count):
        own = f"docker-archive:{path}:@{place}"
        image = resolve(own, pull="always", progress=progress)
        # It has the names that the archive gives it; that of the file would only be in the way.
        with changes.locked():
            index = store.Index()
            index.names.pop(own, None)
            index.files = {key: one for key, one in index.files.items() if not key.startswith(f"{own} ")}
            changes.write_index(index)
        images.append(image)
    return images


def _load_file(path: str, quiet: bool) -> int:
    for image in load_file(path, quiet=quiet):
        names = [
            name
            for name in store.Index().names_of(image.id)
            if name.partition(":")[0] not in references.LOCAL_KINDS
        ]
        for name in names:
            print(f"Loaded image: {references.familiar(name)}")
        if not names:
            print(f"Loaded image ID: {image.id}")
    return 0


# ---- info ----


def _info(arguments: Arguments) -> int:
    import platform

    import kata
    from kata.engine.factory import pool, pool_counts
    from kata.hypervisor import kvmprobe

    waiting, counts = pool.listed(), pool_counts.read()
    states = [container.state()["status"] for container in records.all_containers()]
    facts: dict[str, Any] = {
        "Containers": len(states),
        "ContainersRunning": states.count(records.RUNNING),
        "ContainersPaused": states.count(records.PAUSED),
        "ContainersStopped": states.count(records.EXITED) + states.count(records.CREATED),
        "Images": len(store.list_images()),
        "ServerVersion": kata.__version__,
        "Driver": "erofs",
        "DefaultRuntime": "kata",
        "CgroupVersion": "2" if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else "1",
        "KernelVersion": platform.release(),
        "OperatingSystem": _system(),
        "OSType": "linux",
        "Architecture": platform.machine(),
        "NCPU": os.cpu_count() or 0,
        "MemTotal": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "Name": platform.node(),
        "DockerRootDir": paths.state_dir(),
        "RunDir": paths.run_dir(),
        "KVM": kvmprobe.probe().works,
        "MachinesWaiting": len(waiting),
        "MachinesWaitingMemory": sum(one["bytes"] for one in waiting),
        "MachinesWaitingMade": counts[pool_counts.MADE],
        "MachinesWaitingTaken": counts[pool_counts.TAKEN],
        "MachinesWaitingMissed": counts[pool_counts.MISSED],
        "MachinesWaitingDropped": sum(pool_counts.by_reason(counts).values()),
    }
    form = arguments.value("format")
    if form == "json":
        import json

        print(json.dumps(facts, separators=(",", ":")))
    elif form:
        from kata.cli.template import Template, emit

        emit(Template(form).render(facts))
    else:
        labels = {
            "Containers": "Containers",
            "ContainersRunning": " Running",
            "ContainersPaused": " Paused",
            "ContainersStopped": " Stopped",
            "Images": "Images",
            "ServerVersion": "Version",
            "Driver": "Image Format",
            "DefaultRuntime": "Default Runtime",
            "CgroupVersion": "Cgroup Version",
            "KernelVersion": "Kernel Version",
            "OperatingSystem": "Operating System",
            "Architecture": "Architecture",
            "NCPU": "CPUs",
            "MemTotal": "Total Memory",
            "Name": "Name",
            "DockerRootDir": "Root Dir",
            "RunDir": "Run Dir",
            "KVM": "KVM",
            **(
                {"MachinesWaiting": "Machines Waiting", "MachinesWaitingMemory": " Memory"}
                if waiting
                else {}
            ),
        }
        for key, label in labels.items():
            value = (
                table.human_size(facts[key])
                if key.startswith("Mem") or key.endswith("Memory")
                else facts[key]
            )
            print(f"{label}: {str(value).lower() if isinstance(value, bool) else value}")
    return 0


def _system() -> str:
    import platform

    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


HANDLERS = {
    "rename": _rename,
    "tag": _tag,
    "history": _history,
    "load": _load,
    "info": _info,
}
