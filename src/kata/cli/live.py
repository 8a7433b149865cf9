"""What all sandboxes of this host do, from their engines' state documents: for `kata top` and `kata stats`.

One that is slow or dead delays no other: each is asked in a thread, and the rest is shown meanwhile. What is shown
of two documents is as on the monitor's page (`kata.monitor.page`).
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import unicodedata

from kata import management, paths
from kata.cli import sandboxes
from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    Document = dict[str, Any]

ASK_S = 5.0
"""How long an engine may take to answer, in seconds."""
MAX_THREADS = 16
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
PARTS = ("guest", "hypervisor", "engine", "helpers")
"""What a sandbox consists of on the host: its guest's memory, the hypervisor without that, the engine, and file server,
network and logging programs."""
COUNTERS = ("cpu", "container_cpu", "received", "sent", "read", "written")


def clean(value: object, most: int = 200) -> str:
    """A text that may be the guest's or a client's, as one line that is safe to print.

    What cannot be seen, moves the cursor or turns other text around is written out by its number.

    Args:
        value: The text; None is empty.
        most: Characters that are taken at most.
    """
    text = "" if value is None else str(value)
    if len(text) > most:
        text = text[: most - 1] + "\u2026"
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in _HIDDEN else c for c in text)


def size(value: float | None) -> str:
    """Bytes with a unit and three digits; ``-`` where it is not known."""
    if value is None:
        return "-"
    unit = 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.{0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2}f} {_UNITS[unit]}"


def age(seconds: float | None) -> str:
    """How long, in its two largest units."""
    if seconds is None:
        return "-"
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= length or (unit == "s" and not parts):
            parts.append(f"{left // length} {unit}")
            left %= length
    return " ".join(parts[:2])


def number(value: object) -> float | None:
    """A number of a document; None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def items(value: object) -> list[dict[str, Any]]:
    """A list of objects of a document."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object of a document."""
    found = document.get(name)
    return found if isinstance(found, dict) else {}


def _sum(values: Iterable[object]) -> float | None:
    known = [one for one in map(number, values) if one is not None]
    return sum(known) if known else None


class Row:
    """A sandbox.

    Args:
        directory: Its run directory.
        document: Its newest state document; of one that has not answered an empty one.
        before: What was known of it before.
        problem: Why it has not answered.

    Attributes:
        containers: Those of the document.
        rates: By the names of `COUNTERS`, a second; None where it is not known (yet).
        container_rates: CPU of each container by its id, in processors.
        parts: Memory of the host that each part of it has resident, in bytes, by the names of `PARTS`; None where it is
            not known. Pages that processes share count in each.
        status: Its state, or ``silent``.
    """

    def __init__(
        self, directory: str, document: Document, before: Row | None = None, problem: str = ""
    ) -> None:
        self.directory = directory
        self.document = document
        self.problem = problem
        self.id = str(document.get("id") or os.path.basename(directory))
        self.containers = items(document.get("containers"))
        network = [one for one in items(document.get("network")) if one.get("interface") != "lo"]
        containers = self.containers
        self.counters = {
            "cpu": number(part(document, "host").get("cpu_seconds")),
            "container_cpu": _sum(one.get("cpu_seconds") for one in containers),
            "received": _sum(one.get("received_bytes") for one in network),
            "sent": _sum(one.get("sent_bytes") for one in network),
            "read": _sum(one.get("read_bytes") for one in containers),
            "written": _sum(one.get("written_bytes") for one in containers),
        }
        self.at = number(document.get("time")) or 0.0
        seconds = self.at - before.at if before is not None and before.at else 0.0
        old = before.counters if before is not None else {}
        self.rates = {name: _rate(self.counters[name], old.get(name), seconds) for name in COUNTERS}
        was = {one.get("id"): one for one in before.containers} if before is not None else {}
        self.container_rates = {
            str(one.get("id")): _rate(
                number(one.get("cpu_seconds")),
                number(was.get(one.get("id"), {}).get("cpu_seconds")),
                seconds,
            )
            for one in containers
        }
        self.memory = _sum(one.get("memory_bytes") for one in containers)
        self.overhead = number(part(document, "overhead").get("memory_bytes"))
        self.returned = number(part(document, "guest").get("memory_returned_bytes"))
        self.parts = _parts(document)
        self.created = number(document.get("created")) or None
        paused = bool(containers) and all(one.get("state") == "paused" for one in containers)
        self.status = "silent" if problem else "paused" if paused else clean(document.get("state"), 20)

    @property
    def name(self) -> str:
        """What people call it: its own name, or those of its containers, or its id."""
        names = [str(one.get("name")) for one in self.containers if one.get("name")]
        return clean(self.document.get("name") or ", ".join(names) or self.id[:12], 120)

    @property
    def age(self) -> float | None:
        """Seconds since its start."""
        return time.time() - self.created if self.created else None

    @property
    def trouble(self) -> str:
        """The worst of what is wrong with it; empty if nothing is."""
        if self.problem:
            return clean(self.problem)
        if self.document.get("error"):
            return clean(self.document["error"])
        if self.document.get("disk_error"):
            return clean(self.document["disk_error"])
        for one in self.containers:
            if number(one.get("oom_kills")):
                return f"{clean(one.get('name') or one.get('id'), 60)}: out of memory"
        return ""

    def matches(self, words: str) -> bool:
        """Whether each of some words is somewhere in its names."""
        text = [self.id, self.name, self.status, self.document.get("client"), self.document.get("namespace")]
        for one in self.containers:
            text += [one.get("id"), one.get("name"), one.get("image"), one.get("state")]
        whole = "\n".join(str(one) for one in text if one).lower()
        return all(word in whole for word in words.lower().split())

    def to_json(self) -> Document:
        """The document, with what follows from two of them."""
        rates = {f"{name}_per_second": rate for name, rate in self.rates.items()}
        of_self = {"id": self.id, "problem": self.problem, "rates": rates, "memory_parts": self.parts}
        return {**self.document, **of_self}


def _parts(document: Document) -> dict[str, float | None]:
    """See `Row.parts`. Of a hypervisor whose guest's memory is not known, that is in its own."""
    held: dict[str, float] = {}
    for one in items(part(document, "host").get("processes")):
        role = str(one.get("role"))
        name = role if role in PARTS else "helpers"
        held[name] = held.get(name, 0.0) + (number(one.get("rss_bytes")) or 0.0)
    if held:
        held.setdefault("helpers", 0.0)
    guest = number(part(document, "guest").get("memory_resident_bytes"))
    if guest is not None and "hypervisor" in held:
        held |= {"guest": guest, "hypervisor": max(0.0, held["hypervisor"] - guest)}
    return {name: held.get(name) for name in PARTS}


def _rate(now: float | None, before: float | None, seconds: float) -> float | None:
    if now is None or before is None or seconds <= 0 or now < before:
        return None
    return (now - before) / seconds


def ask(directory: str) -> Document:
    """The state document of a sandbox.

    Raises:
        KataError: It has none to give.
        OSError: It cannot be asked.
    """
    socket = os.path.join(directory, paths.MANAGEMENT_SOCKET)
    status, _, content = management.get(socket, "/kata/v1/state", ASK_S)
    text = content.decode("utf-8", "replace")
    if status != 200:
        raise KataError(text.partition("\n")[0] or f"its engine answers {status}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise KataError("its engine answers what is no document")
    return found


class Sampler:
    """Asks the sandboxes of this host again and again.

    Args:
        ask: Asks one, by its run directory.
        list_directories: Lists the run directories.
        wake: Is called, in another thread, when an answer has come.

    Attributes:
        rows: The sandboxes that have been heard of, by their run directories.
    """

    def __init__(
        self,
        ask: Callable[[str], Document] = ask,
        list_directories: Callable[[], Iterable[str]] = sandboxes.settings_by_directory,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.rows: dict[str, Row] = {}
        self._ask = ask
        self._list = list_directories
        self._wake = wake
        self._asked: set[str] = set()
        self._questions: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[str, Document, str]] = queue.SimpleQueue()
        self._threads = 0

    def begin(self) -> None:
        """Ask all that are not being asked; forget those that are gone."""
        there = list(self._list())
        for directory in [one for one in self.rows if one not in there]:
            del self.rows[directory]
        for directory in there:
            if directory not in self._asked:
                self._asked.add(directory)
                self._questions.put(directory)
        while self._threads < min(MAX_THREADS, len(self._asked)):
            self._threads += 1
            # Daemons: one that waits for an engine does not keep the command from ending.
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            directory = self._questions.get()
            document, problem = {}, ""
            try:
                document = self._ask(directory)
            except KataError as error:
                problem = error.message
            except OSError as error:
                problem = error.strerror or str(error)
            self._answers.put((directory, document, problem))
            self._wake()

    def take(self) -> bool:
        """Take the answers that have come; whether there are any."""
        news = False
        while not self._answers.empty():
            directory, document, problem = self._answers.get()
            self._asked.discard(directory)
            if problem and not os.path.isdir(directory):
                continue  # it has ended
            before = self.rows.get(directory)
            if problem and before is not None:
                document = before.document  # the last that is known
            self.rows[directory] = Row(directory, document, before, problem)
            news = True
        return news

    def sample(self, patience_s: float = ASK_S) -> None:
        """Ask all, and wait for their answers, or as long as `patience_s` seconds.

        Who gave no answer the last time is asked again, but not waited for.
        """
        self.begin()
        silent = {directory for directory, row in self.rows.items() if row.problem}
        give_up = time.monotonic() + patience_s
        while self._asked - silent and time.monotonic() < give_up:
            if not self.take():
                time.sleep(0.005)
        self.take()
