"""`kata inspect-image`: what is in an image, read in a machine of its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys

from kata.cli import inspect_configuration, inspect_kinds, values
from kata.cli.args import Command, Option
from kata.errors import ImageError, KataError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from kata.cli.args import Arguments
    from kata.cli.inspect_clamav import Signatures
    from kata.cli.records import Container
    from kata.images.handover import Selection
    from kata.images.platform import Platform

_SECONDS = 600
_GRADES = "|".join(inspect_kinds.SEVERITIES)
_NOTES = """\
IMAGE is what 'kata run' takes (a name, oci:DIR, oci-archive:FILE, docker-archive:FILE), or - for an archive on
standard input: 'docker save NAME | kata inspect-image -'.

The image is unpacked and read in a virtual machine without network and with a throw-away disk. An image that is in the
local store already has no layers any more: its file system is read. There is no database of vulnerabilities:
--cyclonedx and --spdx write what tools that have one read.

--clamav takes the scanner from Debian's packages and its signatures from this machine, where freshclam or you have put
them. Every file of every layer is scanned, in the same machine, which gets the memory that the signatures need.

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
            Option("--clamav", "", "have ClamAV scan every file of every layer, too"),
            Option(
                "--clamav-database",
                "DIRECTORY",
                "where ClamAV's signatures are (/var/lib/clamav); the same as --clamav besides",
            ),
            Option("--shell", "", "a shell in the machine instead, with the image read-only at /image"),
            Option(
                "--fail-on",
                "|".join(inspect_kinds.SEVERITIES),
                "exit with 1 if there is such a finding, or a graver one",
            ),
            Option("--platform", "OS/ARCH", "which image of several; this machine's platform if not given"),
            Option("-m --memory", "SIZE", "memory of the machine (1g, and what ClamAV's signatures need)"),
            Option(
                "--timeout", "SECONDS", f"how long the reading may take ({_SECONDS}), and as long the scan"
            ),
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


def _need_platform(chosen: Selection, wanted: Platform) -> None:
    """See that an image is for the platform that was asked for: one that is alone in its archive says so nowhere else.

    Raises:
        ImageError: Its configuration names another one, or none.
    """
    from kata.cli import inspect_configuration
    from kata.images import resolve

    built = inspect_configuration.described(chosen)["image"]["platform"]
    try:
        if resolve.runs_on(built, wanted):
            return
    except KataError:
        built = "no known platform"
    raise ImageError(
        f"{chosen.name} is built for {built}, not for {wanted}", "leave --platform out to read it"
    )


# ---- the report ----


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
        memory = arguments.value("memory")
        self.memory = values.container_memory(memory or "1g")
        self.signatures: Signatures | None = None
        database = arguments.value("clamav_database")
        if database is not None or arguments.flag("clamav"):
            from kata.cli import inspect_clamav

            self.signatures = inspect_clamav.signatures(database or inspect_clamav.DIRECTORY)
            self.memory = inspect_clamav.sized(self.signatures, self.memory, given=memory)
        platform = arguments.value("platform")
        self.platform = platforms.parse(platform) if platform else platforms.host()
        self.is_platform_given = platform is not None
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
        for key, path in self.files.items():
            if path != "-":
                _check_writable(key, path)
        printed = [key for key, path in self.files.items() if path == "-"] + ["json"] * self.json
        if len(printed) > 1:
            raise UsageError(
                f"--{printed[0]} and --{printed[1]} cannot both be printed", "write one to a file"
            )
        reports = self.files or self.json or self.runs or against or self.grade or self.signatures
        if arguments.flag("shell") and reports:
            raise UsageError("--shell makes no report", "leave the other options out")
        limits = limits_from_environment()
        self.bounds = {"bytes": limits.size, "entries": limits.entries, "seconds": self.seconds}

    @property
    def further(self) -> dict[str, int]:
        """What the machine is told besides the images."""
        told: dict[str, int] = {"run_seconds": _RUN_S} if self.runs else {}
        if self.signatures is not None:
            told["clamav_seconds"] = self.seconds
        return told

    @property
    def together(self) -> int:
        """How long all of it may take, in seconds."""
        return self.seconds + sum(self.further.values())


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
        if asked.is_platform_given:
            for one in chosen:
                _need_platform(one, asked.platform)
        scanner = _scanner(asked)
        programs = inspect_machine.tools({"busybox": inspect_machine.busybox()} if shell else None)

        def fill(path: str) -> list[dict[str, Any]]:
            handover.write(path, chosen, asked.bounds, asked.further)
            disks = [{"path": path, "serial": "image"}]
            for number, one in enumerate(chosen):
                if one.erofs:
                    disks.append({"path": one.erofs, "serial": handover.serial_of(number)})
            if asked.signatures is not None:
                from kata.cli import inspect_clamav

                signatures = os.path.join(os.path.dirname(path), "signatures.img")
                inspect_clamav.write_disk(signatures, asked.signatures)
                disks.append({"path": scanner, "serial": "clamav"})
                disks.append({"path": signatures, "serial": "signatures"})
            return disks

        container = inspect_machine.make(
            fill, command, programs=programs, memory=asked.memory, terminal=shell and os.isatty(0)
        )
        return container, chosen


def _scanner(asked: _Asked) -> str:
    """The disk with ClamAV's scanner; empty if it was not asked for."""
    if asked.signatures is None:
        return ""
    from kata.cli import inspect_clamav

    return inspect_clamav.scanner(lambda text: None if asked.quiet else print(text, file=sys.stderr))


def _report(asked: _Asked) -> dict[str, Any]:
    """Have the images read; the document of ``--json``."""
    from kata import __version__
    from kata.cli import inspect_machine, inspect_schema

    container, chosen = _machine(asked, ["/inspector", "report"], shell=False)
    images = [inspect_configuration.described(one) for one in chosen]
    report: dict[str, Any] = {
        "format": 1,
        "tool": f"kata {__version__}",
        **images[0],
        "problem": "",
        "found": None,
    }
    answer = inspect_machine.run(
        container, asked.together, None if asked.quiet else _progress(images[0]["image"]["name"])
    )
    if not answer.problem and answer.status:
        said = answer.errors.decode("utf-8", "replace").strip()[:500]
        answer.problem = f"the inspector failed with status {answer.status}: {said or 'it does not say why'}"
    if not answer.problem:
        try:
            content = inspect_schema.parse(answer.output, len(images), set(asked.further))
        except ImageError as error:
            answer.problem = error.message
        else:
            images = [
                inspect_configuration.described(one, found.pop("masks"))
                for one, found in zip(chosen, content["images"], strict=True)
            ]
            report.update(images[0], found=content["images"][0])
            if "trace" in content:
                report["trace"] = content["trace"]
            if asked.signatures is not None:
                from kata.cli import inspect_clamav

                report["clamav"] = inspect_clamav.reported(asked.signatures, content["clamav"])
                if report["clamav"]["problem"]:
                    answer.problem = f"ClamAV has not seen all of it: {report['clamav']['problem']}"
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
    failed: UsageError | None = None
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
            failed = failed or _unwritable(key, path, error.errno or 0)
    if asked.json:
        table.show_json(report)
    elif not printed:
        inspect_text.show(report)
    if failed is not None:
        raise failed


def _unwritable(key: str, path: str, number: int) -> UsageError:
    return UsageError(f"--{key} {path}: {os.strerror(number)}", "name a file that can be written")


def _check_writable(key: str, path: str) -> None:
    """Find out before minutes of reading whether a file can be written afterwards; it is not made yet.

    Raises:
        UsageError: It cannot.
    """
    if os.path.isdir(path):
        raise _unwritable(key, path, errno.EISDIR)
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory):
        raise _unwritable(key, path, errno.ENOENT)
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
        raise _unwritable(key, path, errno.EACCES)


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
