"""`kata images`, `pull`, `rmi`."""

from __future__ import annotations

import sys

from kata.cli import records, table
from kata.cli.args import Command, Option
from kata.errors import KataError
from kata.images import changes, store
from kata.images import reference as references
from kata.images.resolve import resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.cli.args import Arguments

_JSON = Option("--json", "", "print JSON")

_FIELDS = {
    "Repository": "REPOSITORY",
    "Tag": "TAG",
    "Digest": "DIGEST",
    "ID": "IMAGE ID",
    "CreatedSince": "CREATED",
    "CreatedAt": "CREATED AT",
    "Size": "SIZE",
    "Platform": "PLATFORM",
    "Containers": "CONTAINERS",
    "SharedSize": "SHARED SIZE",
    "VirtualSize": "VIRTUAL SIZE",
}
"""The fields of --format, with the headings of its tables."""
_COLUMNS = ("Repository", "Tag", "ID", "CreatedSince", "Size")
_COLUMNS_WITH_DIGESTS = ("Repository", "Tag", "Digest", *_COLUMNS[2:])
_NOTES = f"""\
filters: before, dangling, label, reference (a pattern), since, until
fields of --format: {" ".join(_FIELDS)}

docs/docker-users.md says what templates may have."""

COMMANDS = {
    "images": Command(
        "images",
        "[NAME[:TAG]]",
        "Lists the images in the local store.",
        [
            Option("-q --quiet", "", "ids only"),
            Option("--no-trunc", "", "do not shorten ids"),
            Option("-f --filter", "KEY=VALUE", "only those that agree: reference=*alpine*", many=True),
            Option(
                "--format", "TEMPLATE", "print a line for each by a Go template, 'table TEMPLATE' or json"
            ),
            Option("--digests", "", "show the digests of the manifests, too"),
            Option("-a --all", "", "accepted; all are always shown"),
            _JSON,
        ],
        most=1,
        notes=_NOTES,
        exclusive=(("quiet", "format", "json"),),
    ),
    "pull": Command(
        "pull",
        "IMAGE...",
        "Fetches images from their registry (or converts an archive) into the local store.",
        [
            Option("--platform", "OS/ARCH", "a platform other than this machine's, e.g. linux/arm64"),
            Option("-q --quiet", "", "no progress, only the ids"),
        ],
        least=1,
        notes="Credentials are those of 'docker login': ~/.docker/config.json and its helpers.\n"
        "Plain HTTP is used for loopback addresses only.",
    ),
    "rmi": Command(
        "rmi",
        "IMAGE...",
        "Removes images, unless a container uses them.",
        [Option("-f --force", "", "remove all names of an image; no error if there is none")],
        least=1,
    ),
}


def users() -> dict[str, list[str]]:
    """The names of the containers that were made from each image, by the image's id."""
    found: dict[str, list[str]] = {}
    for container in records.all_containers():
        found.setdefault(container.record["image"]["id"], []).append(container.name)
    return found


def _images(arguments: Arguments) -> int:
    images = store.list_images()
    asked = [f"reference={name}" for name in arguments.rest] + arguments.many("filter")
    if asked:
        from kata.cli.filters import images as filtered

        images = filtered(images, asked)
    if arguments.flag("json"):
        table.show_json(
            [
                {
                    "id": image.id,
                    "names": image.names,
                    "digest": image.digest,
                    "platform": image.platform,
                    "created": image.created,
                    "size": image.size,
                }
                for image in images
            ]
        )
        return 0
    full = arguments.flag("no_trunc")

    def shorten(digest: str) -> str:
        return digest if full else digest.removeprefix("sha256:")[:12]

    if arguments.flag("quiet"):
        for image in images:
            print(shorten(image.id))
        return 0
    from functools import cache

    from kata.cli.template import show_rows

    in_use = cache(users)
    columns = _COLUMNS_WITH_DIGESTS if arguments.flag("digests") else _COLUMNS
    rows = [row for image in images for row in _fields(image, shorten, in_use)]
    show_rows(arguments.value("format") or "", rows, _FIELDS, columns)
    return 0


def _fields(
    image: store.Image, shorten: Callable[[str], str], in_use: Callable[[], dict[str, list[str]]]
) -> list[dict[str, Any]]:
    """What --format may ask for, for each name of an image; *in_use* is as `users`."""
    rows = []
    for name in image.names or ["<none>"]:
        bare, _, digest = name.partition("@")
        head, colon, tag = bare.rpartition(":")
        if not colon or "/" in tag:
            head, tag = bare, "<none>"
        rows.append(
            {
                "Repository": references.familiar(head),
                "Tag": tag,
                "Digest": digest or image.digest,
                "ID": shorten(image.id),
                "CreatedSince": f"{table.age(image.created)} ago" if image.created else "N/A",
                "CreatedAt": image.created or "N/A",
                "Size": table.human_size(image.size),
                "Platform": image.platform,
                "Containers": lambda: str(len(in_use().get(image.id, ()))),
                "SharedSize": "N/A",
                "VirtualSize": table.human_size(image.size),
            }
        )
    return rows


def _pull(arguments: Arguments) -> int:
    quiet = arguments.flag("quiet")
    for reference in arguments.rest:
        progress = (lambda *_: None) if quiet else None
        image = resolve(reference, pull="always", platform=arguments.value("platform"), progress=progress)
        print(image.id or reference, flush=True)
    return 0


def _rmi(arguments: Arguments) -> int:
    from kata.cli.report import REMOVING, raise_failures

    force = arguments.flag("force")
    failures: list[KataError] = []
    for reference in arguments.rest:
        try:
            for line in changes.remove(reference, force, users()):
                sys.stdout.write(f"{line}\n")
        except KataError as error:
            if not (force and error.grpc_code == 5):
                failures.append(error)
    raise_failures(failures, REMOVING)
    return 0


HANDLERS = {"images": _images, "pull": _pull, "rmi": _rmi}
