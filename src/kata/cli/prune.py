"""`kata prune`, and what the other commands of that name share with it."""

from __future__ import annotations

import os
import sys

from kata.cli import records, table
from kata.cli.args import Command, Option
from kata.errors import KataError, UsageError
from kata.images import changes, store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.cli.args import Arguments

_KINDS = ("container", "image", "build", "system")
COMMANDS = {
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


HANDLERS = {"prune": _prune}
