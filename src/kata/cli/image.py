"""`kata images`, `pull`, `rmi`."""

from __future__ import annotations

import sys

from kata.cli import records, table
from kata.cli.args import Command, Option
from kata.errors import KataError
from kata.images import changes, store
from kata.images.resolve import resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.cli.args import Arguments

_JSON = Option("--json", "", "print JSON")

COMMANDS = {
    "images": Command(
        "images",
        "",
        "Lists the images in the local store.",
        [Option("-q --quiet", "", "ids only"), Option("--no-trunc", "", "do not shorten ids"), _JSON],
        most=0,
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
    rows = []
    for image in images:
        for name in image.names or ["<none>"]:
            created = f"{table.age(image.created)} ago" if image.created else "unknown"
            rows.append([name, shorten(image.id), image.platform, created, table.human_size(image.size)])
    table.show(["NAME", "IMAGE ID", "PLATFORM", "CREATED", "SIZE"], rows)
    return 0


def _pull(arguments: Arguments) -> int:
    quiet = arguments.flag("quiet")
    for reference in arguments.rest:
        progress = (lambda *_: None) if quiet else None
        image = resolve(reference, pull="always", platform=arguments.value("platform"), progress=progress)
        print(image.id or reference, flush=True)
    return 0


def _rmi(arguments: Arguments) -> int:
    from kata.cli.report import report

    force = arguments.flag("force")
    failures: list[KataError] = []
    for reference in arguments.rest:
        try:
            for line in changes.remove(reference, force, users()):
                sys.stdout.write(f"{line}\n")
        except KataError as error:
            if not (force and error.grpc_code == 5):
                failures.append(error)
    for failure in failures[1:]:
        report(failure)
    if failures:
        raise failures[0]
    return 0


HANDLERS = {"images": _images, "pull": _pull, "rmi": _rmi}
