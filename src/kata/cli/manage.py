"""`kata rename`, `tag`, `history`, `load`, `info`, `prune`: the smaller commands of Docker and Podman."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager

from kata import paths
from kata.cli import records, table
from kata.cli.args import Command, Option
from kata.errors import ImageError, KataError, UsageError
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
_KINDS = ("container", "image", "build", "system")
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
    "prune": Command(
        "prune",
        "[container|image|build|system]",
        "Removes what is not used: containers that do not run, images without a name.",
        [
            Option("-f --force", "", "do not ask"),
            Option(
                "-a --all",
                "",
                "also images that have a name and that no container uses; of 'system' also what 'build' is",
            ),
            Option("--filter", "label=KEY[=VALUE]|until=TIME", "only those that agree", many=True),
        ],
        most=1,
        notes="Without a kind, or with 'system', it is containers and images. 'build' is what 'kata build' keeps\n"
        "for the next build: base images and steps, all of them, so --filter leaves it alone. What crashes have\n"
        "left behind is removed by 'kata gc'.",
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


# ---- prune ----

_WARNINGS = {
    "container": "all stopped containers",
    "image": "all dangling images",
    "images": "all images without at least one container associated to them",
    "build": "all build cache",
}


def _prune(arguments: Arguments) -> int:
    kind = arguments.rest[0] if arguments.rest else "system"
    if kind not in _KINDS:
        raise UsageError(f"there is no kind {kind!r}", "one of " + ", ".join(_KINDS))
    everything = arguments.flag("all")
    if everything and kind == "container":
        raise UsageError("--all is about images", "leave it out")
    from kata.cli import filters

    wanted = filters.parse(arguments.many("filter"), ("label", "until"))
    limit = min((filters.moment(text, "--filter until") for text in wanted.get("until", ())), default=None)
    both = kind == "system"
    if kind == "build" and wanted:
        raise UsageError("--filter is about containers and images", "leave it out")
    builds = kind == "build" or (both and everything and not wanted)
    if not arguments.flag("force") and not agreed(
        [
            *([_WARNINGS["container"]] if kind == "container" or both else []),
            *([_WARNINGS["images" if everything else "image"]] if kind == "image" or both else []),
            *([_WARNINGS["build"]] if builds else []),
        ]
    ):
        return 0
    freed = 0
    failures: list[KataError] = []
    if kind == "container" or both:
        gone, size, failures = _prune_containers(wanted.get("label", []), limit)
        show_gone("Containers", gone)
        freed += size
    if kind == "image" or both:
        gone, size, more = _prune_images(wanted.get("label", []), limit, everything)
        show_gone("Images", gone)
        freed += size
        failures += more
    if builds:
        from kata.cli import build

        freed += build.remove_kept()
    print(f"Total reclaimed space: {table.human_size(freed)}")
    sys.stdout.flush()
    from kata.cli.report import raise_failures

    raise_failures(failures)
    return 0


def agreed(what: list[str]) -> bool:
    """Ask whether to go on, as Docker asks.

    Args:
        what: What will be removed.
    """
    listed = what[0] if len(what) == 1 else "\n" + "\n".join(f"  - {one}" for one in what)
    sys.stdout.write(f"WARNING! This will remove {listed}{'.' if len(what) == 1 else ''}\n")
    sys.stdout.write("Are you sure you want to continue? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def show_gone(what: str, gone: list[str]) -> None:
    """Print what was removed, as Docker prints it.

    Args:
        what: Its kind, in the plural.
        gone: A line for each.
    """
    if gone:
        print("\n".join([f"Deleted {what}:", *gone, ""]))


def _prune_containers(labels: list[str], limit: float | None) -> tuple[list[str], int, list[KataError]]:
    from kata.cli import filters, on_disk
    from kata.cli.ending import wait_for_engine

    gone, freed = [], 0
    failures: list[KataError] = []
    for container in records.all_containers():
        record = container.record
        if container.state()["status"] not in (records.CREATED, records.EXITED):
            continue
        if not filters.has_labels(record["labels"], labels):
            continue
        if limit is not None and not filters.is_older(record["created_at"], limit):
            continue
        if record.get("made_to_run") and container.state()["status"] == records.CREATED:
            continue  # a `kata run` is about to start it; kata gc knows whether that is dead
        try:
            if not wait_for_engine(container):
                continue
            size = on_disk.taken(on_disk.files_in(container.directory))
            records.remove(container)
        except KataError as error:
            failures.append(error)
        except OSError:
            continue  # another command was faster
        else:
            gone.append(container.id)
            freed += size
    return gone, freed, failures


def _prune_images(
    labels: list[str], limit: float | None, everything: bool
) -> tuple[list[str], int, list[KataError]]:
    from kata.cli import filters
    from kata.cli.image import users

    gone, freed = [], 0
    failures: list[KataError] = []
    in_use = users()
    for image in store.list_images():
        if image.id in in_use or (image.names and not everything):
            continue
        if not filters.has_labels(image.config.get("Labels") or {}, labels):
            continue
        if limit is not None and not filters.is_older(image.created, limit):
            continue
        try:
            lines = changes.remove(image.id, True, in_use)
        except KataError as error:
            failures.append(error)
            continue
        gone += [line[0].lower() + line[1:] for line in lines]
        if not os.path.exists(image.rootfs_path):  # otherwise another image shares it
            freed += image.size
    return gone, freed, failures


HANDLERS = {
    "rename": _rename,
    "tag": _tag,
    "history": _history,
    "load": _load,
    "info": _info,
    "prune": _prune,
}
