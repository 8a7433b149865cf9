"""What people's real work asks of a container: each case with runc and with kata, and what came out.

The cases are from bug reports and from workloads that broke on machines like ours. A case is a function that takes a
`Box`, does what a person would do there, and returns what that person would see, without what differs from one time to
the next. `EXPECTED` has what is right; where kata cannot do that, `LIMITS` says what it does instead, and why.

The table goes into docs/clients.md. Its last column is written by a run inside the KVM lab.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import marked_page
import page
import pytest
from test_docker import PROGRAMS
from test_docker import Docker as Dockerd
from work_box import Box
from work_files import (
    appended_by_two,
    appended_log,
    changed_file,
    committed_while_open,
    copied_while_open,
    database_wal,
    killed_after_write,
    locked,
    modern_files,
    nodes_in_root,
    nodes_in_volume,
    one_database,
    removed_while_open,
    top_mode,
    unlinked_file,
    watched_volume,
    written_at_once,
)
from work_image import image
from work_inside import (
    ONE_PROCESSOR,
    cpu_set,
    ipv6_off,
    loop_device,
    no_input,
    open_files,
    out_of_memory,
    read_only_below,
    sparse_mapping,
    whole_memory,
)
from work_life import (
    connected_later,
    exec_beside_cgroups,
    hard_links_copied,
    hosts_uts,
    large_environment,
    names_on_a_network,
    no_network,
    shown_limit,
    silent_guest,
    top_lines,
)
from work_own import archive_into, closed_output, env_file, reader_gone, speaks_first, volume_words

COLUMNS = ("runc", "kata, emulation", "kata, KVM")


BEGIN, END = "<!-- written by tools/conformance -->", "<!-- up to here -->"


CASES: tuple[Callable[[Box], str], ...] = (
    *(changed_file, appended_log, one_database, database_wal, written_at_once, copied_while_open),
    *(committed_while_open, killed_after_write, appended_by_two, nodes_in_root, nodes_in_volume),
    *(removed_while_open, top_mode, unlinked_file, watched_volume, locked, modern_files),
    *(ipv6_off, no_input, open_files, sparse_mapping, out_of_memory, whole_memory, cpu_set, read_only_below),
    *(loop_device, silent_guest, exec_beside_cgroups, names_on_a_network, connected_later, no_network),
    *(hosts_uts, large_environment, top_lines, shown_limit, hard_links_copied),
    *(env_file, volume_words, archive_into, closed_output, reader_gone, speaks_first),
)


EXPECTED: dict[Callable[[Box], str], str] = {
    changed_file: "level=info; status 0, level=debug; status 0, level=debug; status 0",
    appended_log: "one two",
    one_database: "ok, ok, 40 rows",
    database_wal: "wal\n1; status 0",
    written_at_once: "10 lines",
    copied_while_open: "10 lines",
    committed_while_open: "10 lines",
    killed_after_write: "137, 10 lines",
    appended_by_two: "100 lines",
    nodes_in_root: "made; status 0",
    nodes_in_volume: "made; status 0",
    removed_while_open: "b; status 0",
    top_mode: "granted: status 0, revoked: status 1",
    unlinked_file: "131072 0o600 2; status 0",
    watched_volume: "told",
    locked: "refused; status 0",
    modern_files: "fallocate tmpfile exchange nanoseconds; status 0",
    ipv6_off: "1\n0; status 0",
    no_input: "/dev/null; status 0, /dev/null; status 0",
    open_files: "15000; status 0",
    sparse_mapping: "mapped; status 0",
    out_of_memory: "137, OOMKilled true",
    whole_memory: "fits; status 0",
    cpu_set: "2; status 0",
    read_only_below: ".*Read-only file system; status 1",
    loop_device: "lost\\+found; status 0",
    silent_guest: "status 0, soon",
    exec_beside_cgroups: "inside; status 0",
    names_on_a_network: "found",
    connected_later: "2; status 0",
    no_network: "lo; status 0",
    hosts_uts: "the host's",
    large_environment: "4000; status 0",
    top_lines: "fits",
    shown_limit: "what the container sees",
    env_file: r"'FIRST=1 SECOND=two\\u2028words THIRD=a\\x0cb'",
    volume_words: "0 0 0 0 0",
    archive_into: "status 0: 2\n2\nfifo; status 0",
    closed_output: "3 x; status 3 3",
    reader_gone: "y; status 0",
    speaks_first: "hello",
    hard_links_copied: "/d/a 2, out again linked: True, kinds kept: True",
}
"""What is right, as a regular expression."""


LIMITS: dict[Callable[[Box], str], tuple[str, str]] = {
    watched_volume: (
        "not told, file system (fuse.*|UNKNOWN)",
        "no file server tells of the host's changes; programs that see a file system of FUSE's poll",
    ),
    one_database: (
        ".*",
        "locks do not reach from one machine to another (Shared files, above): let one side write at a time",
    ),
    cpu_set: (ONE_PROCESSOR, "not tried: the KVM lab has one processor"),
    locked: ("got it; status 0", "each machine keeps its own locks (Shared files, above)"),
    modern_files: (
        "fallocate no tmpfile exchange nanoseconds; status 0",
        "O_TMPFILE is refused by the file servers; programs fall back",
    ),
}
"""Where kata does otherwise: what is seen then, as a regular expression, and why."""


@dataclass(frozen=True)
class Seen:
    """What came out of one case in one column."""

    case: str
    column: str
    said: str


class Record:
    """What has been seen so far, kept in a file.

    Args:
        path: The file: a JSON object a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, str], str] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                seen = Seen(**json.loads(line))
                self.found[seen.case, seen.column] = seen.said

    def add(self, seen: Seen) -> None:
        """Note one, at once and for good."""
        self.found[seen.case, seen.column] = seen.said
        with open(self.path, "a") as file:
            file.write(json.dumps(asdict(seen)) + "\n")

    def forget(self, text: str, columns: tuple[str, ...]) -> None:
        """Drop what was seen in these columns of the cases whose name contains a text."""
        kept = [
            Seen(case, column, said)
            for (case, column), said in self.found.items()
            if text not in case or column not in columns
        ]
        self.path.unlink(missing_ok=True)
        self.found = {}
        for seen in kept:
            self.add(seen)


def run(guest: Path, record: Record, columns: tuple[str, ...], only: str) -> None:
    """Try what has not been tried.

    Args:
        guest: The guest's directory.
        record: Is added to.
        columns: Which of `COLUMNS`.
        only: Only cases whose name or description contains this.
    """
    todo = [
        (case, column)
        for case in CASES
        for column in columns
        if (case.__name__, column) not in record.found and only in f"{case.__name__} {case.__doc__}"
    ]
    if not todo:
        return
    with _docker(guest) as docker:
        for case, column in todo:
            directory = Path(tempfile.mkdtemp(dir=docker.directory))
            try:
                said = case(Box(docker, column.partition(",")[0], directory))
            except (
                AssertionError,
                subprocess.SubprocessError,
                OSError,
                ValueError,
                LookupError,
                AttributeError,
            ) as error:
                said = f"failed: {type(error).__name__}: {str(error)[:300]}"
            record.add(Seen(case.__name__, column, said))
            print(f"{column}: {verdict(case, column, said)}: {case.__doc__}", flush=True)
            if verdict(case, column, said) != "right":
                print(f"    {said[:600]}", flush=True)


@contextmanager
def _docker(guest: Path) -> Iterator[Dockerd]:
    if shutil.which("dockerd", path=PROGRAMS) is None:
        pytest.skip("needs Docker (tools/setup test unpacks it)")
    # A short path: there are sockets in it.
    directory = Path(tempfile.mkdtemp(prefix="kw", dir=os.environ.get("KATA_WORK_DIR", "/tmp")))
    daemon = Dockerd(directory, guest)
    daemon.netns = daemon.containerd.around[1].rpartition("/")[2]
    (directory / "daemon.json").write_text("{}")
    subprocess.run(["ip", "netns", "add", daemon.netns], check=True)
    try:
        subprocess.run(["ip", "-n", daemon.netns, "link", "set", "lo", "up"], check=True)
        daemon.start()
        daemon("import", "-", "py", stdin=image(python=True))
        daemon("import", "-", "bb", stdin=image(python=False))
        yield daemon
    finally:
        for name in daemon("ps", "-aq", code=None).split():
            daemon("rm", "-f", name, code=None)
        daemon.stop()
        subprocess.run(["ip", "netns", "delete", daemon.netns], check=False)
        shutil.rmtree(directory, ignore_errors=True)


def verdict(case: Callable[[Box], str], column: str, said: str) -> str:
    """What the table says: ``right``, ``differs`` for a reason that is known, or ``wrong``."""
    if re.fullmatch(EXPECTED[case], said, re.DOTALL):
        return "right"
    limit = LIMITS.get(case)
    if column != "runc" and limit and re.fullmatch(limit[0], said, re.DOTALL):
        return "differs"
    return "wrong"


def wrong(found: Mapping[tuple[str, str], str]) -> list[str]:
    """What is neither right nor a limit that is known, with kata."""
    return [
        f"{case.__doc__} ({column}): {said[:200]}"
        for case in CASES
        for column in COLUMNS[1:]
        if (said := found.get((case.__name__, column))) is not None
        and verdict(case, column, said) == "wrong"
    ]


def table(found: Mapping[tuple[str, str], str], before: Iterable[str] = ()) -> list[str]:
    """The table's lines.

    Args:
        found: What was seen.
        before: The table so far: what it says of cases that were not seen here stays.
    """
    told = page.table(before)
    columns = told.get("", [])
    lines = [f"| | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for case in CASES:
        cells = []
        what = str(case.__doc__).replace("|", "\\|")
        kept = dict(zip(columns, told.get(what, []), strict=False))
        for column in COLUMNS:
            said = found.get((case.__name__, column))
            word = kept.get(column, "") if said is None else verdict(case, column, said)
            if said is not None and word == "wrong":
                word = "`" + said.replace("\n", " ").replace("|", "/").replace("`", "'")[:60] + "`"
            elif word == "differs":
                word = LIMITS[case][1]
            cells.append(word)
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def write(path: Path, found: Mapping[tuple[str, str], str]) -> None:
    """Put the table into a page, between its marks; what it has of other cases and columns stays.

    Raises:
        ValueError: The page has no such marks.
    """
    marked_page.write(path, BEGIN, END, table(found, marked_page.lines_of(path, BEGIN, END)))
