"""`kata import`: an image of one layer from a tar file of a root file system, as `docker export` writes it."""

from __future__ import annotations

import json
import os
import sys

from kata.cli import manage, records
from kata.cli.args import Command, Option
from kata.errors import UsageError
from kata.images import platform as platforms
from kata.images import reference as references
from kata.storage import layers_codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any, BinaryIO

    from kata.cli.args import Arguments

COMMANDS = {
    "import": Command(
        "import",
        "FILE|- [NAME[:TAG]]",
        "Makes an image of a tar file with a root file system, and prints its id.",
        [
            Option(
                "-c --change",
                "INSTRUCTION",
                "a line of a Dockerfile: 'CMD [\"/bin/sh\"]', 'ENV A=b'",
                many=True,
            ),
            Option("-m --message", "TEXT", "a comment, for 'kata history'"),
            Option("-q --quiet", "", "show no progress"),
        ],
        least=1,
        most=2,
        notes="The tar file may be packed (gzip, zstd, bzip2, xz). --change takes CMD, ENTRYPOINT, ENV, EXPOSE,\n"
        "LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR.",
    )
}


def changed(instructions: list[str]) -> dict[str, Any]:
    """The ``config`` object of an image after some lines of a Dockerfile.

    Args:
        instructions: Values of ``--change``.

    Raises:
        UsageError: One is malformed, or not among those that are offered.
    """
    config: dict[str, Any] = {}
    for text in instructions:
        name, _, value = text.strip().partition(" ")
        name, value = name.upper(), value.strip()
        if not value:
            raise UsageError(f"--change {text!r} has no value", "for example --change 'CMD [\"/bin/sh\"]'")
        if name in ("CMD", "ENTRYPOINT"):
            config["Cmd" if name == "CMD" else "Entrypoint"] = _command(value, text)
        elif name in ("ENV", "LABEL"):
            key, equals, rest = value.partition("=")
            if not key or not equals or any(c.isspace() for c in key):
                raise UsageError(
                    f"--change {text!r} is not {name} KEY=VALUE", "one variable or label a --change"
                )
            rest = rest[1:-1] if len(rest) > 1 and rest[0] == rest[-1] == '"' else rest
            if name == "ENV":
                config.setdefault("Env", []).append(f"{key}={rest}")
            else:
                config.setdefault("Labels", {})[key] = rest
        elif name in ("EXPOSE", "VOLUME"):
            listed = _command(value, text) if value.startswith("[") else value.split()
            key = "Volumes" if name == "VOLUME" else "ExposedPorts"
            config.setdefault(key, {}).update(
                {one if name == "VOLUME" or "/" in one else f"{one}/tcp": {} for one in listed}
            )
        elif name in ("STOPSIGNAL", "USER", "WORKDIR"):
            config[{"STOPSIGNAL": "StopSignal", "USER": "User", "WORKDIR": "WorkingDir"}[name]] = value
        else:
            raise UsageError(
                f"--change {text!r}: {name} is not offered",
                "one of CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR",
            )
    return config


def _command(value: str, text: str) -> list[str]:
    if not value.startswith("["):
        return ["/bin/sh", "-c", value]
    try:
        words = json.loads(value)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(
            f"--change {text!r}: this is no list of strings in JSON", "--change 'CMD [\"/bin/sh\"]'"
        )
    return words


def _import(arguments: Arguments) -> int:
    source = arguments.rest[0]
    name = ""
    if len(arguments.rest) > 1:
        wanted = references.parse_reference(arguments.rest[1])
        if wanted.digest:
            raise UsageError(f"{arguments.rest[1]!r}: a name to give cannot have a digest", "NAME:TAG")
        name = str(wanted)
    config = changed(arguments.many("change"))
    if source.startswith(("http://", "https://")):
        raise UsageError("kata import fetches nothing", f"curl -L {source} | kata import -")
    if source == "-" and sys.stdin.isatty():
        raise UsageError("a tar file is expected on standard input, which is a terminal", "kata import FILE")
    with manage.spooled() as archive:
        if source == "-":
            _pack(sys.stdin.buffer, archive, name, config, arguments.value("message") or "Imported from -")
        else:
            try:
                file = open(source, "rb")  # noqa: SIM115 - closed below
            except OSError as error:
                raise UsageError(f"{source} cannot be read: {error.strerror}", "kata import FILE") from error
            with file:
                comment = arguments.value("message") or f"Imported from {os.path.basename(source)}"
                _pack(file, archive, name, config, comment)
        archive.flush()
        [image] = manage.load_file(archive.name, quiet=arguments.flag("quiet"))
    print(image.id)
    return 0


def _pack(source: BinaryIO, archive: IO[bytes], name: str, config: dict[str, Any], comment: str) -> None:
    """Write an archive as `docker save` does, with this one layer."""
    from kata.images import flat
    from kata.storage.layers import limits_from_environment

    with flat.Layer(os.path.dirname(archive.name), limits_from_environment().size) as layer:
        for piece in layers_codec.decompressed(source):
            layer.write(piece)
        base = {"architecture": platforms.host().arch}
        made = flat.document(base, config, layer, {"created": records.now(), "comment": comment})
        writer = flat.ArchiveWriter(archive.write)
        writer.add([name] if name else [], made, layer)
        writer.finish()


HANDLERS = {"import": _import}
