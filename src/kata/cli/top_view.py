"""What `kata top` shows, as lines of a given width, and what keys change of it. Knows no terminal."""

from __future__ import annotations

import time

from kata.cli import live
from kata.cli.screen import BOLD, CYAN, DIM, GREEN, RED, REVERSE, YELLOW, Line, fit, width

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.cli.live import Row

EVENTS = 30
_STATE_COLOURS = {"ready": GREEN, "booting": CYAN, "paused": YELLOW, "failed": RED, "silent": RED}
_STATE_ORDER = ("failed", "silent", "booting", "closing", "ending", "stopped", "paused", "ready")


class Column:
    """A column of the list.

    Attributes:
        title: Its heading.
        key: The key that sorts by it.
        columns: How wide it is.
        value: What is compared; None is always last.
        text: What is shown.
        largest: Whether the largest comes first.
        rank: Which columns are left out first where there is no room: those with the highest.
    """

    __slots__ = ("columns", "key", "largest", "rank", "text", "title", "value")

    def __init__(
        self,
        title: str,
        key: str,
        columns: int,
        value: Callable[[Row], Any],
        text: Callable[[Row], str],
        *,
        largest: bool = True,
        rank: int,
    ) -> None:
        self.title = title
        self.key = key
        self.columns = columns
        self.value = value
        self.text = text
        self.largest = largest
        self.rank = rank


def _client(row: Row) -> str:
    client, namespace = row.document.get("client"), row.document.get("namespace")
    return live.clean(f"{client or '-'}/{namespace}" if namespace else client or "-", 40)


def _pair(row: Row, one: str, other: str) -> str:
    first, second = row.rates[one], row.rates[other]
    if first is None and second is None:
        return "-"
    return f"{live.size(first or 0)} / {live.size(second or 0)}"


def _both(row: Row, one: str, other: str) -> float | None:
    known = [rate for rate in (row.rates[one], row.rates[other]) if rate is not None]
    return sum(known) if known else None


def _cpu(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f}%"


COLUMNS = {
    "name": Column(
        "NAME", "n", 0, lambda row: row.name.lower(), lambda row: row.name, largest=False, rank=0
    ),
    "client": Column("CLIENT", "", 17, _client, _client, largest=False, rank=8),
    "state": Column(
        "STATE",
        "s",
        8,
        lambda row: _STATE_ORDER.index(row.status) if row.status in _STATE_ORDER else len(_STATE_ORDER),
        lambda row: row.status,
        largest=False,
        rank=1,
    ),
    "age": Column("AGE", "a", 12, lambda row: row.created, lambda row: live.age(row.age), rank=7),
    "cpu": Column("CPU", "c", 7, lambda row: row.rates["cpu"], lambda row: _cpu(row.rates["cpu"]), rank=2),
    "memory": Column("MEMORY", "m", 9, lambda row: row.memory, lambda row: live.size(row.memory), rank=3),
    "overhead": Column(
        "OVERHEAD", "o", 9, lambda row: row.overhead, lambda row: live.size(row.overhead), rank=5
    ),
    "returned": Column(
        "GIVEN BACK", "g", 10, lambda row: row.returned, lambda row: live.size(row.returned), rank=9
    ),
    "network": Column(
        "NET IN / OUT /s",
        "t",
        21,
        lambda row: _both(row, "received", "sent"),
        lambda row: _pair(row, "received", "sent"),
        rank=6,
    ),
    "disk": Column(
        "DISK READ / WRITE /s",
        "d",
        21,
        lambda row: _both(row, "read", "written"),
        lambda row: _pair(row, "read", "written"),
        rank=10,
    ),
    "containers": Column(
        "CTRS", "", 4, lambda row: len(row.containers), lambda row: str(len(row.containers)), rank=4
    ),
}
_LEFT = frozenset({"name", "client", "state"})
LEAST_NAME = 16


class View:
    """What is looked at.

    Attributes:
        filter: Words that a sandbox's names have.
        opened: The sandbox that is shown alone, by its directory; empty shows the list.
    """

    def __init__(self) -> None:
        self.filter = ""
        self.opened = ""
        self._rows: list[Row] = []
        self._selected = ""
        self._sort = "cpu"
        self._reverse = False
        self._typing: str | None = None  # the filter before it was changed
        self._top = 0
        self._page = 10
        self._taken = False
        self._events: dict[str, list[dict[str, Any]]] = {}

    # ---- what there is ----

    def take(self, rows: list[Row]) -> None:
        """Take the newest state of all sandboxes."""
        self._rows = rows
        self._taken = self._taken or bool(rows)
        if self.opened and all(row.directory != self.opened for row in rows):
            self.opened, self._top = "", 0  # it has ended

    def sort_by(self, name: str) -> None:
        """Sort by a column of `COLUMNS`; by the same once more turns the order."""
        self._reverse = not self._reverse if name == self._sort and self._taken else False
        self._sort = name

    def chosen(self, rows: list[Row]) -> list[Row]:
        """Those that the filter takes, in their order."""
        column = COLUMNS[self._sort]
        found = sorted(
            (row for row in rows if row.matches(self.filter)), key=lambda row: (row.name, row.directory)
        )
        known = [row for row in found if column.value(row) is not None]
        unknown = [row for row in found if column.value(row) is None]
        known.sort(key=column.value, reverse=column.largest != self._reverse)
        return known + unknown

    @staticmethod
    def cells(row: Row) -> list[str]:
        """A sandbox's texts, one for each of `COLUMNS`."""
        return [column.text(row) for column in COLUMNS.values()]

    # ---- keys ----

    def press(self, key: str) -> bool:
        """A key was pressed; False ends the command."""
        if self._typing is not None:
            self._type(key, self._typing)
            return True
        if key == "q":
            return False
        if self.opened:
            self._press_in_detail(key)
            return True
        if key == "/":
            self._typing = self.filter
        elif key == "escape":
            self.filter = ""
        elif key in ("enter", "right"):
            self.opened, self._top = self._selected, 0
        elif key in (moves := self._moves()):
            self._move(moves[key])
        else:
            for name, column in COLUMNS.items():
                if key == column.key:
                    self.sort_by(name)
        return True

    def _moves(self) -> dict[str, int]:
        far = 1 << 30
        return {
            "up": -1,
            "k": -1,
            "down": 1,
            "j": 1,
            "page up": -self._page,
            "page down": self._page,
            "home": -far,
            "end": far,
        }

    def _move(self, by: int) -> None:
        there = [row.directory for row in self.chosen(self._rows)]
        if there:
            at = there.index(self._selected) if self._selected in there else 0
            self._selected = there[min(max(at + by, 0), len(there) - 1)]

    def _type(self, key: str, before: str) -> None:
        if key in ("enter", "escape"):
            if key == "escape":
                self.filter = before
            self._typing = None
        elif key == "backspace":
            self.filter = self.filter[:-1]
        elif len(key) == 1 and len(self.filter) < 80:
            self.filter += key

    def _press_in_detail(self, key: str) -> None:
        if key in ("escape", "left", "backspace", "enter"):
            self.opened, self._top = "", 0
        elif key in (moves := self._moves()):
            self._top = min(max(self._top + moves[key], 0), 1 << 20)

    # ---- lines ----

    def draw(self, columns: int, rows: int) -> tuple[list[Line], int]:
        """The screen.

        Args:
            columns: How wide it is.
            rows: How many lines it has.

        Returns:
            Its lines, and which of them is selected; -1 for none.
        """
        opened = next((row for row in self._rows if row.directory == self.opened), None)
        if opened is not None:
            return self._detail(opened, columns, rows), -1
        return self._list(columns, rows)

    def _list(self, columns: int, rows: int) -> tuple[list[Line], int]:
        found = self.chosen(self._rows)
        shown = _columns_for(columns)
        room = max(1, rows - 4)
        self._page = room
        there = [row.directory for row in found]
        if self._selected not in there:
            self._selected = there[0] if there else ""
        at = there.index(self._selected) if there else 0
        self._top = min(max(self._top, at - room + 1, 0), at, max(0, len(found) - room))
        trouble = found[at].trouble if found else ""
        lines = [
            self._head(columns),
            self._second(len(found), trouble, columns),
            _headings(shown, columns, self._sort),
        ]
        for row in found[self._top : self._top + room]:
            lines.append(_row_line(row, shown, columns))
        if not found:
            lines.append(Line(self._nothing(), DIM))
        selected = 3 + at - self._top if found else -1
        lines += [Line()] * (rows - 1 - len(lines))
        lines = lines[: max(0, rows - 1)]
        keys = "q ends  arrows move  Enter opens  / filters  n s a c m o g t d sort"
        lines.append(Line(fit(keys, columns), DIM))
        return lines, selected

    def _nothing(self) -> str:
        if self._rows:
            return "no sandbox has these words in its names"
        return "no sandbox is running" if self._taken else "no sandbox has answered yet"

    def _head(self, columns: int) -> Line:
        states: dict[str, int] = {}
        for row in self._rows:
            states[row.status] = states.get(row.status, 0) + 1
        known = ", ".join(f"{count} {state or 'unknown'}" for state, count in sorted(states.items()))
        line = Line("kata top ", BOLD)
        line.add(f"{time.strftime('%H:%M:%S')}  {len(self._rows)} sandboxes{': ' if known else ''}{known}")
        cpu = sum(row.rates["cpu"] or 0 for row in self._rows)
        memory = sum(row.memory or 0 for row in self._rows)
        overhead = sum(row.overhead or 0 for row in self._rows)
        returned = sum(row.returned or 0 for row in self._rows)
        figures = (
            f"  CPU {_cpu(cpu)}  memory {live.size(memory)}  overhead {live.size(overhead)}"
            f"  given back {live.size(returned)}"
        )
        if width(line.plain()) + width(figures) <= columns:
            line.add(figures)
        return line

    def _second(self, count: int, trouble: str, columns: int) -> Line:
        if self._typing is not None:
            return Line("filter: ", BOLD).add(self.filter).add(" ", REVERSE)
        order = f"sorted by {COLUMNS[self._sort].title.lower()}{', turned' if self._reverse else ''}"
        if self.filter:
            order += f"; {count} of {len(self._rows)} with {self.filter!r} (Escape shows all)"
        line = Line(order, DIM)
        if trouble:  # of the selected one
            line.add("  ").add(trouble, RED)
        return line

    # ---- one sandbox ----

    def _detail(self, row: Row, columns: int, rows: int) -> list[Line]:
        body = [*_facts(row), Line(), *_containers(row, columns), *_waterfall(row, columns)]
        body += self._life(row, columns)
        room = max(1, rows - 2)
        self._page = room
        self._top = min(self._top, max(0, len(body) - room))
        lines = [Line(fit(f"{row.name}  {row.id}", columns), BOLD), *body[self._top : self._top + room]]
        lines += [Line()] * (rows - 1 - len(lines))
        lines.append(Line(fit("q ends  Escape goes back  arrows scroll", columns), DIM))
        return lines

    def _life(self, row: Row, columns: int) -> list[Line]:
        from kata import events

        lines = [Line(), Line("EVENTS", BOLD)]
        try:
            found = [one for one in events.read() if one.get("sandbox") == row.id][-EVENTS:]
        except OSError as error:
            return [*lines, Line(f"they cannot be read: {error.strerror}", RED)]
        for one in reversed(found):
            more = " ".join(
                f"{name}={one[name]}" for name in ("exit_code", "oom_killed", "exec", "error") if name in one
            )
            text = f"{str(one['time'])[11:23]}  {one['event']}  {str(one.get('container', ''))[:12]}  {more}"
            bad = one["event"] in ("sandbox.failed", "container.oom", "disk.error")
            lines.append(Line(fit(live.clean(text.rstrip(), 400), columns), *([RED] if bad else [])))
        return lines


def _columns_for(columns: int) -> list[str]:
    """The columns that there is room for, in their order."""
    shown = list(COLUMNS)
    while len(shown) > 1:
        needed = LEAST_NAME + sum(COLUMNS[name].columns + 2 for name in shown if name != "name")
        if needed <= columns:
            break
        shown.remove(max(shown, key=lambda name: COLUMNS[name].rank))
    return shown


def _name_width(shown: list[str], columns: int) -> int:
    return max(0, columns - sum(COLUMNS[name].columns + 2 for name in shown if name != "name"))


def _headings(shown: list[str], columns: int, sort: str) -> Line:
    line = Line()
    for index, name in enumerate(shown):
        column = COLUMNS[name]
        wide = column.columns or _name_width(shown, columns)
        text = fit(column.title, wide, right=name not in _LEFT)
        line.add("  " if index else "", REVERSE)
        line.add(text, REVERSE, *([BOLD] if name == sort else []))
    return line


def _row_line(row: Row, shown: list[str], columns: int) -> Line:
    line = Line()
    for index, name in enumerate(shown):
        column = COLUMNS[name]
        wide = column.columns or _name_width(shown, columns)
        styles = []
        if name == "state" and row.status in _STATE_COLOURS:
            styles = [_STATE_COLOURS[row.status]]
        text = column.text(row)
        line.add("  " if index else "")
        line.add(fit(text, wide, right=name not in _LEFT), *styles)
    return line


def _facts(row: Row) -> list[Line]:
    document = row.document
    hypervisor = live.part(document, "hypervisor")
    guest = live.part(document, "guest")
    lines = []
    if row.trouble:
        lines.append(Line(row.trouble, RED))
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.created)) if row.created else "-"
    kind = " ".join(str(hypervisor.get(name) or "") for name in ("name", "version", "accelerator"))
    total, free = (
        live.number(guest.get("memory_total_bytes")),
        live.number(guest.get("memory_available_bytes")),
    )
    host = live.number(live.part(document, "host").get("memory_bytes"))
    facts = (
        ("State", f"{row.status}, started {started}, {live.age(row.age)} ago"),
        ("Client", _client(row)),
        ("Hypervisor", live.clean(f"{kind}, agent by {hypervisor.get('channel') or '-'}")),
        (
            "Processors",
            f"{live.clean(document.get('vcpus'), 8)} of the guest; {_cpu(row.rates['cpu'])} in use,"
            f" {_cpu(row.rates['container_cpu'])} by containers",
        ),
        (
            "Guest's memory",
            f"{live.size(total)}, {live.size(free)} available, {live.size(row.returned)} given back",
        ),
        ("Host's memory", f"{live.size(host)}, of it overhead {live.size(row.overhead)}"),
        ("Resident", ", ".join(f"{name} {live.size(row.parts[name])}" for name in live.PARTS)),
        ("Network", f"{_pair(row, 'received', 'sent')} a second in / out"),
        ("Disk", f"{_pair(row, 'read', 'written')} a second read / written"),
    )
    return lines + [Line(f"{name:<15} ", DIM).add(text) for name, text in facts]


def _containers(row: Row, columns: int) -> list[Line]:
    lines = [Line("CONTAINERS", BOLD)]
    wide = max(LEAST_NAME, columns - 53)
    heads = ("NAME", "STATE", "CPU", "MEMORY", "LIMIT", "PIDS")
    cells = [heads]
    for one in row.containers[:200]:
        state = str(one.get("state") or "-")
        if state == "stopped" and one.get("exit_code") is not None:
            state = f"exited {one['exit_code']}"
        name = live.clean(one.get("name") or str(one.get("id"))[:12], 80)
        image = live.clean(one.get("image"), 80)
        cells.append(
            (
                f"{name}  {image}".rstrip(),
                live.clean(state, 12),
                _cpu(row.container_rates.get(str(one.get("id")))),
                live.size(live.number(one.get("memory_bytes"))),
                live.size(live.number(one.get("memory_limit_bytes"))),
                live.clean("-" if one.get("pids") is None else one["pids"], 6),
            )
        )
    for index, (name, state, *figures) in enumerate(cells):
        text = fit(name, wide) + "  " + fit(state, 11)
        for figure, room in zip(figures, (7, 9, 9, 6), strict=True):
            text += "  " + fit(figure, room, right=True)
        lines.append(Line(text, *([DIM] if index == 0 else [])))
    return lines


def _waterfall(row: Row, columns: int) -> list[Line]:
    steps = []
    for one in live.items(row.document.get("timings"))[:40]:
        start, lasts = live.number(one.get("start_seconds")), live.number(one.get("duration_seconds"))
        if start is not None and lasts is not None and start >= 0 and lasts >= 0:
            steps.append((live.clean(one.get("name"), 30), start, lasts))
    if not steps:
        return []
    whole = max(start + lasts for _, start, lasts in steps) or 1.0
    room = max(10, columns - 30)
    said = live.part(row.document, "start")
    how = ": ".join(filter(None, (live.clean(said.get(key), 80) for key in ("path", "reason"))))
    lines = [Line(), Line(f"START, {whole:.2f} s" + (f", {how}" if how else ""), BOLD)]
    for name, start, lasts in steps:
        before = min(int(room * start / whole), room - 1)
        long = max(1, min(round(room * lasts / whole), room - before))
        line = Line(f"{fit(name, 19)} {1000 * lasts:6.0f} ms ", DIM)
        lines.append(line.add(" " * before).add("\u2588" * long, CYAN))
    return lines
