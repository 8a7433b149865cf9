"""`kata volume create`, `ls`, `rm`, `inspect`, `prune`."""

from __future__ import annotations

import os

from kata.cli import objects, on_disk, table, values, volumes
from kata.cli.args import Command, Option
from kata.cli.mounts import DEFAULT_SIZE
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.cli.args import Arguments

_FIELDS = {
    "Driver": "DRIVER",
    "Name": "VOLUME NAME",
    "Labels": "LABELS",
    "Mountpoint": "MOUNTPOINT",
    "Size": "SIZE",
}
_FILTERS = ("dangling", "driver", "label", "name")

SUBCOMMANDS = {
    "create": Command(
        "volume create",
        "[NAME]",
        "Makes a volume and prints its name; one that is there is kept as it is.",
        [
            Option("-o --opt", "size=SIZE", "size of its file system, a sparse file (10g)", many=True),
            Option("--label", "KEY[=VALUE]", "a label", many=True),
            Option("-d --driver", "local", "accepted; there is no other"),
        ],
        most=1,
    ),
    "ls": Command(
        "volume ls",
        "",
        "Lists volumes.",
        [
            Option("-q --quiet", "", "names only"),
            Option("-f --filter", "KEY=VALUE", "only those that agree: " + ", ".join(_FILTERS), many=True),
            Option("--format", "TEMPLATE", f"fields: {' '.join(_FIELDS)}; or 'table TEMPLATE', or json"),
        ],
        most=0,
        exclusive=(("quiet", "format"),),
    ),
    "rm": Command(
        "volume rm",
        "VOLUME...",
        "Removes volumes that no container has.",
        [Option("-f --force", "", "no error if there is none")],
        least=1,
    ),
    "inspect": Command(
        "volume inspect",
        "VOLUME...",
        "Shows volumes as a JSON list.",
        [Option("-f --format", "TEMPLATE|json", "print what a Go template picks: '{{.Mountpoint}}'")],
        least=1,
    ),
    "exists": Command(
        "volume exists",
        "VOLUME",
        "Ends with 0 if there is such a volume, and with 1 if not.",
        least=1,
        most=1,
    ),
    "prune": Command(
        "volume prune",
        "",
        "Removes volumes that no container has: those without a name.",
        [
            Option("-f --force", "", "do not ask"),
            Option("-a --all", "", "also those with a name"),
            Option("--filter", "label=KEY[=VALUE]", "only those that agree", many=True),
        ],
        most=0,
    ),
}
"""The commands after ``volume``."""

COMMANDS = {
    "volume": Command(
        "volume",
        "create|ls|rm|inspect|exists|prune [ARG...]",
        "Makes, lists and removes volumes with a name, which outlive their containers.",
        least=1,
        interspersed=False,
        notes=objects.listed(SUBCOMMANDS) + "\n\n"
        "A volume is an ext4 file system in a sparse file that is a disk of its container's machine. It is filled\n"
        "with the image's content when it is first mounted. One container at a time can run with it.",
    )
}


def _volume(arguments: Arguments) -> int:
    return objects.dispatch("volume", arguments.rest, SUBCOMMANDS, _HANDLERS)


def _create(arguments: Arguments) -> int:
    from kata.cli.run_options import labels

    if arguments.value("driver") not in (None, "local"):
        raise UsageError(f"--driver {arguments.value('driver')!r} is not offered", "leave it out")
    size = DEFAULT_SIZE
    for text in arguments.many("opt"):
        key, _, value = text.partition("=")
        if key != "size":
            raise UsageError(
                f"--opt {text!r}: a volume has no option {key!r}", "its one option is --opt size=10g"
            )
        size = values.size(value, "--opt size")
    found = labels(arguments.many("label"), [])
    name = arguments.rest[0] if arguments.rest else ""
    if name:
        volumes.check_name(name, "kata volume create")
    chosen = name or os.urandom(32).hex()
    with volumes.locked():
        volumes.ensure(chosen, size, labels=found, anonymous=not name)
    print(chosen)
    return 0


def _about(record: dict[str, Any]) -> dict[str, Any]:
    """What Docker says of a volume."""
    return {
        "CreatedAt": record["created_at"],
        "Driver": "local",
        "Labels": record["labels"],
        "Mountpoint": volumes.disk(record["name"]),
        "Name": record["name"],
        "Options": {"size": str(record["size"])},
        "Scope": "local",
    }


def _ls(arguments: Arguments) -> int:
    from kata.cli import filters
    from kata.cli.template import show_rows

    wanted = filters.parse(arguments.many("filter"), _FILTERS)
    for value in wanted.get("dangling", ()):
        if value.lower() not in ("true", "false", "1", "0"):
            raise UsageError(
                f"--filter dangling={value} is neither true nor false", "--filter dangling=true"
            )
    used = volumes.users()
    tests: list[Callable[[dict[str, Any]], bool]] = [
        lambda one: filters.has_labels(one["labels"], wanted.get("label", [])),
        lambda one: "name" not in wanted or any(text in one["name"] for text in wanted["name"]),
        lambda one: "driver" not in wanted or "local" in wanted["driver"],
        lambda one: all(
            (one["name"] not in used) == (text.lower() in ("true", "1"))
            for text in wanted.get("dangling", ())
        ),
    ]
    found = [one for one in volumes.everything() if all(test(one) for test in tests)]
    if arguments.flag("quiet"):
        for one in found:
            print(one["name"])
        return 0
    rows = [
        {
            **_about(one),
            "Labels": table.labels(one["labels"]),
            "Size": table.human_size(on_disk.taken([volumes.disk(one["name"])])),
        }
        for one in found
    ]
    show_rows(arguments.value("format") or "", rows, _FIELDS, ("Driver", "Name"))
    return 0


def _rm(arguments: Arguments) -> int:
    def act(name: str) -> None:
        with volumes.locked():
            volumes.remove(name)

    return objects.remove(arguments.rest, act, force=arguments.flag("force"))


def _inspect(arguments: Arguments) -> int:
    from kata.cli.template import FreeKeys

    return objects.inspect(
        arguments.rest,
        arguments.value("format"),
        lambda name: _about(volumes.find(name)),
        lambda one: {**one, "Labels": FreeKeys(one["Labels"])},
    )


def _exists(arguments: Arguments) -> int:
    return objects.exists(volumes.find, arguments.rest[0])


def _prune(arguments: Arguments) -> int:
    from kata.cli import filters
    from kata.cli.prune import agreed, show_gone

    everything = arguments.flag("all")
    wanted = filters.parse(arguments.many("filter"), ("label",))
    what = "all local volumes" if everything else "anonymous local volumes"
    if not arguments.flag("force") and not agreed([f"{what} not used by at least one container"]):
        return 0
    gone: list[str] = []
    freed = 0
    with volumes.locked():
        used = volumes.users()
        for one in volumes.everything():
            if one["name"] in used or not (everything or one["anonymous"]):
                continue
            if filters.has_labels(one["labels"], wanted.get("label", [])):
                freed += volumes.remove(one["name"])
                gone.append(one["name"])
    show_gone("Volumes", gone)
    print(f"Total reclaimed space: {table.human_size(freed)}")
    return 0


_HANDLERS = {
    "create": _create,
    "ls": _ls,
    "rm": _rm,
    "inspect": _inspect,
    "exists": _exists,
    "prune": _prune,
}
HANDLERS = {"volume": _volume}
