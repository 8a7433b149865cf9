"""``kata-log-parser``: its command line."""

from __future__ import annotations

import contextlib
import json
import os
import sys

from kata import __version__
from kata.errors import HostError, UsageError
from kata.launcher import name_output
from kata.log_parser import options, output
from kata.log_parser.merge import Source, merge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TextIO

    from kata.agent_ctl.options import Values
    from kata.log_parser.record import Record

WRONG, FAILED = 1, 2
_STRUCTURED = frozenset({"logfmt", "json"})
_MOST_COMPLAINTS = 1000
"""Complaints that are written; the others are counted."""


class Complaints:
    """What is wrong with the logs, said on standard error.

    Args:
        quiet: Only count it.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self.count = 0

    def __call__(self, file: str, line: int, what: str) -> None:
        """Something is wrong with a line."""
        self.count += 1
        if not self._quiet and self.count <= _MOST_COMPLAINTS:
            sys.stderr.write(f"{output.visible(file)}:{line}: {output.visible(what)}\n")

    def close(self) -> None:
        """Say how many were not said."""
        if not self._quiet and self.count > _MOST_COMPLAINTS:
            sys.stderr.write(f"and {self.count - _MOST_COMPLAINTS} more\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Without the program's name; None takes `sys.argv`.

    Returns:
        The exit status.
    """
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["__complete"]:
        from kata.cli import complete

        return complete.of_program(words[1:], options.OPTIONS, [complete.FILES])
    name_output()
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except BaseException as error:
        from kata.cli.report import exit_status

        return exit_status(error, "kata-log-parser", FAILED)


def _run(words: Sequence[str]) -> int:
    values, files = options.read(words)
    if values.flag("help"):
        sys.stdout.write(options.usage())
        return 0
    if values.flag("version"):
        sys.stdout.write(f"kata-log-parser {__version__}\n")
        return 0
    if values.flag("list-output-formats"):
        sys.stdout.write("\n".join(output.FORMATS) + "\n")
        return 0
    if not files:
        if os.isatty(0):
            raise UsageError("no file is named", "kata-log-parser FILE..., or - for standard input")
        files = ["-"]
    if files.count("-") > 1:
        raise UsageError("standard input (-) is named twice", "once is all that there is to read")
    return _parse(values, files)


def _parse(values: Values, files: list[str]) -> int:
    complaints = Complaints(quiet=values.flag("quiet"))
    check = values.flag("check-only")
    sources = [Source(name, complaints, monotonic=check or values.flag("strict")) for name in files]
    wanted = options.Filter(values)
    with _output(None if check else values.value("output-file")) as out:
        _write(values, merge(sources), wanted, complaints, out)
    complaints.close()
    wrong = bool(complaints.count) and (check or values.flag("strict"))
    if values.flag("error-if-file-empty"):
        for source in sources:
            if not source.lines:
                complaints(source.name, 0, "it is empty")
                wrong = True
    if values.flag("error-if-no-records") and not any(source.records for source in sources):
        sys.stderr.write("there are no records\n")
        wrong = True
    return WRONG if wrong else 0


def _write(
    values: Values, records: Iterator[Record], wanted: options.Filter, complaints: Complaints, out: TextIO
) -> None:
    """Read all records, and write those that are wanted, or what there is to say of them."""
    check = values.flag("check-only")
    complete = not values.flag("ignore-missing-fields") and (check or values.flag("strict"))
    statistics = output.Statistics() if values.flag("statistics") else None
    form = values.value("output-format") or "text"
    write = output.WRITERS[form]
    if form == "csv" and not check and statistics is None:
        out.write(",".join(output.COLUMNS) + "\n")
    for record in records:
        if complete:
            _look_for_fields(record, complaints)
        if not wanted.wants(record):
            continue
        if statistics is not None:
            statistics.add(record)
        elif not check:
            out.write(write(record) + "\n")
    if statistics is not None and not check:
        as_json = form == "json"
        out.write(json.dumps(statistics.to_dict(), indent=2) + "\n" if as_json else statistics.as_text())


def _look_for_fields(record: Record, complaints: Complaints) -> None:
    """Complain of a line of a structured format that does not say when, how severe, or what."""
    if record.format not in _STRUCTURED:
        return
    # An event of the node's says by its name what has happened; it has no level.
    level = record.level or ("-" if "client" in record.fields else "")
    have = (("time", record.time_ns is not None), ("level", level), ("msg", record.message))
    missing = [name for name, there in have if not there]
    if missing:
        complaints(record.file, record.line, f"it lacks {', '.join(missing)}")


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that takes the place of one at *path* when everything has been written.

    What is there and is no file (a device, a pipe) is written to; a link stays, and what it leads to is replaced.

    Raises:
        HostError: The file cannot be made.
        OSError: It cannot be written; an error without a file name gets one.
    """
    try:
        if path is None or path == "-":
            yield sys.stdout
            sys.stdout.flush()
        elif os.path.exists(path) and not os.path.isfile(path):
            with open(path, "w", encoding="utf-8") as file:
                yield file
        else:
            with _replacing(os.path.realpath(path)) as file:
                yield file
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[TextIO]:
    unfinished = f"{path}.{os.getpid()}.part"
    try:
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise HostError(
            f"{path} cannot be written: {error.strerror}",
            "-o names a file in a directory that exists and can be written to",
        ) from None
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
