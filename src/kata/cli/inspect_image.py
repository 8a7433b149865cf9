"""`kata inspect-image`: what is in an image, read in a machine of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys

from kata.cli import inspect_kinds, values
from kata.cli.args import Command, Option
from kata.errors import ImageError, KataError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from kata.cli.args import Arguments
    from kata.cli.records import Container
    from kata.images.handover import Selection
    from kata.images.platform import Platform

_SECONDS = 600
_GRADES = "|".join(inspect_kinds.SEVERITIES)
_NOTES = """\
IMAGE is what 'kata run' takes (a name, oci:DIR, oci-archive:FILE, docker-archive:FILE), or - for an archive on
standard input: 'docker save NAME | kata inspect-image -'.

The image is unpacked and read in a virtual machine without network and with a throw-away disk. An image that is in the
local store already has no layers any more: its file system is read. Neither a virus scanner (ClamAV) nor a database of
vulnerabilities is in it: --cyclonedx and --spdx write what tools that have one read.

exit status: 0 there is a report, 1 --fail-on was met, 125 there is none, or not a whole one."""

COMMANDS = {
    "inspect-image": Command(
        "inspect-image",
        "IMAGE|-",
        "Reads an image in a machine of its own, and reports what is in it.",
        [
            Option("--json", "", "print the report as JSON"),
            Option("--html", "FILE", "also write it as one HTML file; '-' prints it instead of the text"),
            Option("--sarif", "FILE", "also write the findings as SARIF 2.1.0, for CI"),
            Option("--cyclonedx", "FILE", "also write the packages as CycloneDX 1.5"),
            Option("--spdx", "FILE", "also write the packages as SPDX 2.3"),
            Option("--against", "IMAGE", "an older image, to report what has changed since"),
            Option("--run", "", "start the image's command once, without network, and report what it does"),
            Option("--shell", "", "a shell in the machine instead, with the image read-only at /image"),
            Option(
                "--fail-on",
                "|".join(inspect_kinds.SEVERITIES),
                "exit with 1 if there is such a finding, or a graver one",
            ),
            Option("--platform", "OS/ARCH", "which image of several; this machine's platform if not given"),
            Option("-m --memory", "SIZE", "memory of the machine (1g)"),
            Option("--timeout", "SECONDS", f"how long the reading may take ({_SECONDS})"),
            Option("-q --quiet", "", "show no progress"),
        ],
        least=1,
        most=1,
        notes=_NOTES,
    )
}


# ---- which image ----


@contextlib.contextmanager
def _selected(name: str, platform: Platform, *, quiet: bool) -> Iterator[Selection]:
    """Choose the image that a user names, without reading its layers.

    Raises:
        KataError: There is no such image, or its manifest cannot be used.
    """
    from kata.cli import manage
    from kata.images import handover
    from kata.images.archive import Archive
    from kata.storage.layers import limits_from_environment

    limit = limits_from_environment().size
    with contextlib.ExitStack() as stack:
        if name == "-":
            if os.isatty(0):
                raise UsageError(
                    "an archive is expected on standard input, which is a terminal",
                    "docker save NAME | kata inspect-image -",
                )
            spool = stack.enter_context(manage.spooled())
            handover.spool_input(0, spool.fileno(), limit)
            source = Archive(spool.name, os.path.dirname(spool.name), limit)
            chosen = handover.of_source("standard input", source, "", platform)
        else:
            chosen = _named(name, platform, limit, quiet=quiet)
        stack.callback(chosen.close)
        yield chosen


def _named(name: str, platform: Platform, limit: int, *, quiet: bool) -> Selection:
    from kata import paths
    from kata.images import handover, resolve, store
    from kata.images import reference as references
    from kata.images.archive import Archive
    from kata.images.convert import Source
    from kata.images.layout import Layout
    from kata.images.progress import Terminal
    from kata.images.pull import RegistrySource

    parsed = None if name.startswith("sha256:") else references.parse(name)
    if isinstance(parsed, references.LocalImage):
        if parsed.kind == "rootfs":
            raise UsageError(
                "a directory of the host is no image that can be handed over",
                f"tar -C {parsed.path} -c . | kata import - NAME, then kata inspect-image NAME",
            )
        source: Source
        if parsed.kind == "oci":
            source = Layout(parsed.path)
        else:
            spool = os.path.join(store.directory(), "rootfs")
            paths.make_dirs(spool, 0o700)
            source = Archive(parsed.path, spool, limit)
        return _or_closed(name, source, parsed.tag, platform)
    try:
        image = store.find(name)
    except KataError:
        if parsed is None:
            raise
        with Terminal(parsed.familiar()) as terminal:
            source = RegistrySource(parsed, (lambda *_: None) if quiet else terminal)
            return _or_closed(parsed.familiar(), source, "", platform)
    if not resolve.runs_on(image.platform, platform):
        raise ImageError(
            f"the stored image {name} is built for {image.platform}",
            f"kata inspect-image --platform {image.platform} {name}",
        )
    return handover.of_stored(name, image)


def _or_closed(name: str, source: Any, tag: str, platform: Platform) -> Selection:
    from kata.images import handover

    try:
        return handover.of_source(name, source, tag, platform)
    except BaseException:
        source.close()
        raise


# ---- the report ----


_READ = 4000
"""Characters of a string in which masks are looked for: all that is shown, and where a mask of it ends."""
_WHOLE = 1000
"""A mask of this many characters is the beginning of one: the machine sends no more."""


def _pattern(masks: list[str]) -> re.Pattern[str] | None:
    """What finds any of `masks`. Of long ones the beginning is enough, and takes the rest of the string with it."""
    import re

    wanted = sorted({mask for mask in masks if len(mask) >= 6}, key=len, reverse=True)
    parts = [
        re.escape(mask) if len(mask) < _WHOLE else re.escape(mask[:_WHOLE]) + "(?s:.*)" for mask in wanted
    ]
    return re.compile("|".join(parts)) if parts else None


def _masked(value: Any, pattern: re.Pattern[str]) -> Any:
    """A configuration without what is to be hidden. One pass: what takes a mask's place is not looked at again."""
    if isinstance(value, str):
        return pattern.sub(lambda match: _short(match[0]), value[:_READ])
    if isinstance(value, list):
        return [_masked(one, pattern) for one in value]
    if isinstance(value, dict):
        return {key: _masked(one, pattern) for key, one in value.items()}
    return value


def _short(secret: str) -> str:
    return f"{secret[:4]}... ({len(secret)} characters)"


def _texts(value: object, most: int = 200) -> list[str]:
    """Strings of a list, or keys of an object, of an image's configuration."""
    found = list(value) if isinstance(value, (list, dict)) else []
    return [str(one)[:1000] for one in found[:most]]


def described(chosen: Selection, masks: list[str] | None = None) -> dict[str, Any]:
    """What the configuration says, as far as the report shows it.

    Args:
        chosen: The image.
        masks: Strings to hide, from the machine that has read the image.

    Returns:
        ``image``, ``configuration`` and ``history``.
    """
    try:
        config = json.loads(chosen.config)
    except (ValueError, RecursionError):
        config = {}
    pattern = _pattern(masks or [])
    if pattern is not None:
        config = _masked(config, pattern)
    if not isinstance(config, dict):
        config = {}
    inner = config.get("config")
    if not isinstance(inner, dict):
        inner = {}
    history = config.get("history")

    def text(content: dict[str, Any], key: str, most: int = 1000) -> str:
        value = content.get(key)
        return value[:most] if isinstance(value, str) else ""

    labels = inner.get("Labels")
    platform = "/".join(part for key in ("os", "architecture", "variant") if (part := text(config, key, 50)))
    return {
        "image": {
            "name": chosen.name,
            "digest": chosen.digest,
            "platform": platform,
            "created": text(config, "created", 100),
        },
        "configuration": {
            "user": text(inner, "User"),
            "working_directory": text(inner, "WorkingDir"),
            "stop_signal": text(inner, "StopSignal"),
            "entrypoint": _texts(inner.get("Entrypoint")),
            "command": _texts(inner.get("Cmd")),
            "environment": _redacted(_texts(inner.get("Env"))),
            "ports": _texts(inner.get("ExposedPorts")),
            "volumes": _texts(inner.get("Volumes")),
            "labels": [
                f"{key[:200]}={str(value)[:500]}" for key, value in list(labels.items())[:200]
            ] if isinstance(labels, dict) else [],
        },
        "history": [
            {
                "by": text(step, "created_by"),
                "created": text(step, "created", 100),
                "empty": step.get("empty_layer") is True,
            }
            for step in (history if isinstance(history, list) else [])[:500]
            if isinstance(step, dict)
        ],
    }  # fmt: skip


_SECRET_WORDS = ("PASSWORD", "PASSWD", "SECRET", "TOKEN", "APIKEY", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY")
_MASKED = re.compile(r".{4}\.\.\. \(\d+ characters\)", re.DOTALL)
"""What `_short` makes of a secret."""


def _redacted(variables: list[str]) -> list[str]:
    shown = []
    for one in variables:
        key, _, value = one.partition("=")
        hide = len(value) >= 6 and any(word in key.upper() for word in _SECRET_WORDS)
        # What the machine has masked is no secret any more.
        shown.append(f"{key}={_short(value)}" if hide and not _MASKED.fullmatch(value) else one)
    return shown


class _Asked:
    """The options, checked before anything is made."""

    def __init__(self, arguments: Arguments) -> None:
        from kata.images import platform as platforms
        from kata.storage.layers import limits_from_environment

        self.grade = arguments.value("fail_on")
        if self.grade is not None and self.grade not in inspect_kinds.SEVERITIES:
            raise UsageError(
                f"--fail-on {self.grade!r} is not offered", f"one of {_GRADES.replace('|', ', ')}"
            )
        self.seconds = values.whole(arguments.value("timeout") or str(_SECONDS), "--timeout", least=1)
        self.memory = values.container_memory(arguments.value("memory") or "1g")
        platform = arguments.value("platform")
        self.platform = platforms.parse(platform) if platform else platforms.host()
        self.quiet = arguments.flag("quiet")
        self.json = arguments.flag("json")
        self.names = [arguments.rest[0]]
        against = arguments.value("against")
        if against is not None:
            self.names.append(against)
        if self.names.count("-") > 1:
            raise UsageError("both images cannot come on standard input", "save one of them to a file")
        self.runs = arguments.flag("run")
        self.files = {key: path for key in _FORMATS if (path := arguments.value(key)) is not None}
        printed = [key for key, path in self.files.items() if path == "-"] + ["json"] * self.json
        if len(printed) > 1:
            raise UsageError(
                f"--{printed[0]} and --{printed[1]} cannot both be printed", "write one to a file"
            )
        if arguments.flag("shell") and (self.files or self.json or self.runs or against or self.grade):
            raise UsageError("--shell makes no report", "leave the other options out")
        limits = limits_from_environment()
        self.bounds = {"bytes": limits.size, "entries": limits.entries, "seconds": self.seconds}


_FORMATS = ("html", "sarif", "cyclonedx", "spdx")
_RUN_S = 30
"""How long --run lets the image's command go on, in seconds of the machine."""


def _machine(asked: _Asked, command: list[str], *, shell: bool) -> tuple[Container, list[Selection]]:
    """Choose the images and make the machine for them; it, and the images, whose sources are closed."""
    from kata.cli import inspect_machine
    from kata.images import handover

    with contextlib.ExitStack() as stack:
        chosen = [
            stack.enter_context(_selected(name, asked.platform, quiet=asked.quiet)) for name in asked.names
        ]
        programs = inspect_machine.tools({"busybox": inspect_machine.busybox()} if shell else None)

        def fill(path: str) -> list[dict[str, Any]]:
            handover.write(path, chosen, asked.bounds, {"run_seconds": _RUN_S} if asked.runs else {})
            disks = [{"path": path, "serial": "image"}]
            for number, one in enumerate(chosen):
                if one.erofs:
                    disks.append({"path": one.erofs, "serial": handover.serial_of(number)})
            return disks

        container = inspect_machine.make(
            fill, command, programs=programs, memory=asked.memory, terminal=shell and os.isatty(0)
        )
        return container, chosen


def _report(asked: _Asked) -> dict[str, Any]:
    """Have the images read; the document of ``--json``."""
    from kata import __version__
    from kata.cli import inspect_machine, inspect_schema

    container, chosen = _machine(asked, ["/inspector", "report"], shell=False)
    images = [described(one) for one in chosen]
    report: dict[str, Any] = {
        "format": 1,
        "tool": f"kata {__version__}",
        **images[0],
        "problem": "",
        "found": None,
    }
    seconds = asked.seconds + (_RUN_S if asked.runs else 0)
    answer = inspect_machine.run(
        container, seconds, None if asked.quiet else _progress(images[0]["image"]["name"])
    )
    if not answer.problem and answer.status:
        said = answer.errors.decode("utf-8", "replace").strip()[:500]
        answer.problem = f"the inspector failed with status {answer.status}: {said or 'it does not say why'}"
    if not answer.problem:
        try:
            content = inspect_schema.parse(answer.output, len(images))
        except ImageError as error:
            answer.problem = error.message
        else:
            images = [
                described(one, found.pop("masks"))
                for one, found in zip(chosen, content["images"], strict=True)
            ]
            report.update(images[0], found=content["images"][0])
            if "trace" in content:
                report["trace"] = content["trace"]
            if len(images) > 1:
                changes = _changes(images[1], images[0])
                report["against"] = images[1]["image"]
                report["difference"] = {"configuration": changes, **content.get("difference", {})}
    report["problem"] = answer.problem
    return report


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two configurations, a line each."""
    found = []
    for key, was in old["configuration"].items():
        now = new["configuration"][key]
        if isinstance(was, str):
            if was != now:
                found.append(f"{key}: {was or '-'} -> {now or '-'}")
        elif key in ("entrypoint", "command"):
            if was != now:
                found.append(f"{key}: {' '.join(was) or '-'} -> {' '.join(now) or '-'}")
        else:
            found += [f"{key}: without {one}" for one in was if one not in now]
            found += [f"{key}: with {one}" for one in now if one not in was]
    return found


def _inspect(arguments: Arguments) -> int:
    from kata.cli import table
    from kata.cli.run import undo_when_told_to_end

    asked = _Asked(arguments)
    undo_when_told_to_end()
    if arguments.flag("shell"):
        from kata.cli import session

        if asked.names[0] == "-":
            raise UsageError("a shell needs standard input, and the image comes there", "save it to a file")
        container, _ = _machine(asked, ["/inspector", "shell"], shell=True)
        return session.run_attached(container, stdin=True, detach_keys=b"", discard=True)
    report = _report(asked)
    _show(report, asked)
    if report["problem"]:
        raise ImageError(
            f"the image {table.printable(report['image']['name'])} could not be read: "
            + table.printable(report["problem"]),
            "it may be made to do this; --memory and --timeout give the machine more",
        )
    return 1 if asked.grade is not None and _fails(report["found"], asked.grade) else 0


def _show(report: dict[str, Any], asked: _Asked) -> None:
    """Print the report, and write it to the files that were asked for."""
    from kata.cli import inspect_html, inspect_sbom, inspect_text, table

    printed = False
    for key, path in asked.files.items():
        if report["found"] is None and key != "html":
            continue  # a list of no packages would be taken for the truth
        if key == "html":
            text = inspect_html.page(report)
        else:
            make = {
                "sarif": inspect_sbom.sarif,
                "cyclonedx": inspect_sbom.cyclonedx,
                "spdx": inspect_sbom.spdx,
            }[key]
            text = json.dumps(make(report), indent=1) + "\n"
        if path == "-":
            sys.stdout.write(text)
            printed = True
            continue
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(
                f"--{key} {path}: {error.strerror}", "name a file that can be written"
            ) from error
    if asked.json:
        table.show_json(report)
    elif not printed:
        inspect_text.show(report)


def _fails(found: dict[str, Any], grade: str) -> bool:
    worst = inspect_kinds.SEVERITIES.index(grade)
    return any(
        count and inspect_kinds.SEVERITIES.index(inspect_kinds.severity(kind)) <= worst
        for kind, count in found["counts"].items()
    )


def _progress(name: str) -> Any:
    """Shows on a terminal how long it takes, from the second second on."""
    if not sys.stderr.isatty():
        return None
    from kata.cli.table import printable

    title = printable(name)[:60]

    def tick(passed: float) -> None:
        if passed > 1:
            sys.stderr.write(f"\r{title}: read in a machine, {passed:.0f} s\033[K")
            sys.stderr.flush()

    return tick


HANDLERS = {"inspect-image": _inspect}
