"""Many sandboxes' metrics as one exposition that is valid whatever they say.

The engines' answers contain what guests measure, and a guest may lie. Prometheus drops a whole scrape for one wrong
word, so one sandbox could take the figures of all others away. Therefore nothing is passed through: each answer is
parsed (`kata.metrics.exposition`), checked by its types' rules, cut at a number of series, given the labels that tell
its sandbox, and written anew. A family occurs once, with the type that its definition or else most sandboxes give it;
what contradicts that is left out and counted.

Formats: Prometheus' text format 0.0.4, and OpenMetrics 1.0
(https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md). In the second one a counter has to
be called ``..._total``; one that is not is of type ``unknown`` there, so that a series has the same name in both.
"""

from __future__ import annotations

import functools
import itertools
import math

from kata.agent.text import escape_line
from kata.metrics.exposition import Family

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    Label = tuple[str, str]

MAX_LABEL_BYTES = 256
"""Maximum length of a label's value."""
MAX_HELP_BYTES = 512
"""Maximum length of a family's description."""
OWN_PREFIX = "kata_monitor_"
"""Families that only the monitor itself may have."""
OWN_LABELS = ("sandbox_id", "cri_uid", "cri_name", "cri_namespace")
"""Labels that only the monitor may give."""

# Why a series was left out, as in the metric that counts them.
LIMIT, DUPLICATE, INVALID, CONFLICT = "limit", "duplicate", "invalid", "conflict"


class Piece:
    """What one sandbox contributes to one family.

    Attributes:
        type: As the sandbox says.
        help: As the sandbox says.
        text: Its samples, a line each, with the labels of the sandbox.
        series: The number of lines.
    """

    __slots__ = ("help", "series", "text", "type")

    def __init__(self, kind: str, help_text: str, lines: list[str]) -> None:
        self.type = kind
        self.help = help_text
        self.text = "".join(lines)
        self.series = len(lines)


class Contribution:
    """What one sandbox contributes.

    Attributes:
        pieces: By family.
        dropped: How many series were left out, by reason.
        reserved: Labels of which the samples' own are left out.
    """

    __slots__ = ("dropped", "pieces", "reserved")

    def __init__(self, reserved: tuple[str, ...] = OWN_LABELS) -> None:
        self.reserved = reserved
        self.pieces: dict[str, Piece] = {}
        self.dropped: dict[str, int] = {}

    @property
    def series(self) -> int:
        return sum(piece.series for piece in self.pieces.values())

    @property
    def size(self) -> int:
        """Characters of all samples."""
        return sum(len(piece.text) for piece in self.pieces.values())

    def drop(self, reason: str, count: int) -> None:
        """Count series that are left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count


def escape_value(text: str) -> str:
    """A label's value as both formats write it: bounded, and visible throughout."""
    if not text.isprintable() or len(text) > MAX_LABEL_BYTES // 4:
        text = escape_line(text, MAX_LABEL_BYTES)
    if "\\" in text or '"' in text:
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    return text


def labels_text(labels: Iterable[Label]) -> str:
    """``name="value",...`` of labels with a value."""
    return ",".join(f'{name}="{escape_value(value)}"' for name, value in labels if value)


def number(value: float) -> str:
    """A value as both formats write it."""
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)


def bound(value: float) -> str:
    """The value of ``le`` or ``quantile``: always with a point, as Prometheus 3 stores it, so that a query finds it in
    every version.
    """
    return "+Inf" if value == math.inf else repr(value)


def contribution(
    families: Iterable[Family],
    labels: Sequence[Label],
    most: int,
    wanted: Sequence[str] = (),
    *,
    own: bool = False,
) -> Contribution:
    """Check and write what one sandbox says.

    Args:
        families: As parsed.
        labels: Those that tell the sandbox.
        most: Maximum number of series.
        wanted: Beginnings of the names of the families to take; empty takes all.
        own: They are the monitor's own.
    """
    found = Contribution(() if own else OWN_LABELS)
    told = labels_text(labels)
    room = most
    for family in families:
        if wanted and not family.name.startswith(tuple(wanted)):
            continue
        count = len(family.samples)
        if not own and family.name.startswith(OWN_PREFIX):
            found.drop(CONFLICT, count)
            continue
        if family.name in found.pieces:  # in two places: the parser has put them together, or refused
            found.drop(DUPLICATE, count)
            continue
        lines = _WRITERS.get(family.type, _plain)(family, told, found)
        if len(lines) > room:
            # A histogram cut in the middle would be none.
            kept = [] if family.type in ("histogram", "summary") else lines[:room]
            found.drop(LIMIT, len(lines) - len(kept))
            lines = kept
        room -= len(lines)
        if lines:
            found.pieces[family.name] = Piece(family.type, family.help, lines)
    return found


def _key(name: str, told: str, labels: Sequence[Label], without: tuple[str, ...]) -> str:
    """A series' name and labels, as they are written: those that tell the sandbox, and its own but *without*."""
    text = ""
    if labels:
        short = sum([len(label) + len(value) for label, value in labels]) <= _SHORT_CHARS
        text = (_own_text if short else _own_text.__wrapped__)(tuple(labels), without)
    inside = f"{told},{text}" if told and text else told or text
    return f"{name}{{{inside}}}" if inside else name


_SHORT_CHARS = 160
"""Labels up to here are remembered: most of a sandbox are those of all others, and of the scrape before."""


@functools.lru_cache(4096)
def _own_text(labels: tuple[Label, ...], without: tuple[str, ...]) -> str:
    return labels_text(pair for pair in sorted(labels) if pair[0] not in without)


def _plain(family: Family, told: str, found: Contribution) -> list[str]:
    """Counters, gauges and values of no type: one line for each series."""
    counts = family.type == "counter"
    series: dict[str, float] = {}
    for name, labels, value in family.samples:
        if counts and not value >= 0.0:  # nor NaN
            found.drop(INVALID, 1)
            continue
        key = _key(name, told, labels, found.reserved)
        if key in series:
            found.drop(DUPLICATE, 1)
        else:
            series[key] = value
    return [f"{key} {number(value)}\n" for key, value in series.items()]


class _Group:
    """A histogram or summary: the samples that differ in ``le`` or ``quantile`` alone."""

    __slots__ = ("count", "extra", "marks", "sum")

    def __init__(self) -> None:
        self.marks: dict[float, float] = {}  # le or quantile -> value
        self.count = self.sum = math.nan
        self.extra = 0  # samples that occur twice or make no sense


def _groups(family: Family, told: str, mark: str, reserved: tuple[str, ...]) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    for name, labels, value in family.samples:
        key = _key("", told, labels, (mark, *reserved))
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group()
        part = name[len(family.name) :]
        if part == "_count":
            group.count = value
        elif part == "_sum":
            group.sum = value
        else:
            try:
                where = float(dict(labels)[mark])
            except (KeyError, ValueError):
                group.extra += 1
                continue
            if where in group.marks:
                group.extra += 1
            group.marks[where] = value
    return groups


def _with(key: str, more: str) -> str:
    return f"{key[:-1]},{more}}}" if key else f"{{{more}}}"


def _histogram(family: Family, told: str, found: Contribution) -> list[str]:
    lines: list[str] = []
    for key, group in _groups(family, told, "le", found.reserved).items():
        order = sorted(group.marks)
        values = [group.marks[where] for where in order]
        whole = (
            not group.extra
            and order
            and order[-1] == math.inf
            and all(where >= 0.0 for where in order)  # nor NaN, of which there may be several
            and values[0] >= 0.0
            and all(low <= high for low, high in itertools.pairwise(values))
            and all(map(float.is_integer, values))  # which leaves out infinite ones, too
            and group.count == values[-1]
            and group.sum >= 0.0
        )
        if not whole or len(order) > 64:
            found.drop(INVALID, len(order) + 2)
            continue
        for where, value in zip(order, values, strict=True):
            le = f'le="{bound(where)}"'
            lines.append(f"{family.name}_bucket{_with(key, le)} {number(value)}\n")
        lines.append(f"{family.name}_sum{key} {number(group.sum)}\n")
        lines.append(f"{family.name}_count{key} {number(group.count)}\n")
    return lines


def _summary(family: Family, told: str, found: Contribution) -> list[str]:
    lines: list[str] = []
    for key, group in _groups(family, told, "quantile", found.reserved).items():
        order = sorted(group.marks)
        whole = (
            not group.extra
            and all(0.0 <= where <= 1.0 for where in order)
            and not any(value < 0.0 for value in group.marks.values())
            and group.count >= 0.0
            and group.count.is_integer()
            and group.sum >= 0.0
        )
        if not whole or len(order) > 64:
            found.drop(INVALID, len(order) + 2)
            continue
        for where in order:
            quantile = f'quantile="{bound(where)}"'
            lines.append(f"{family.name}{_with(key, quantile)} {number(group.marks[where])}\n")
        lines.append(f"{family.name}_sum{key} {number(group.sum)}\n")
        lines.append(f"{family.name}_count{key} {number(group.count)}\n")
    return lines


_WRITERS = {"histogram": _histogram, "summary": _summary}
_SUFFIXES = {
    "histogram": ("_bucket", "_sum", "_count", "_created"),
    "summary": ("_sum", "_count", "_created"),
}


# ---- together ----


class Merged:
    """All contributions, put together.

    Args:
        contributions: By sandbox.
        types: The types of families that are known, by name.
    """

    def __init__(self, contributions: Sequence[Contribution], types: Mapping[str, str]) -> None:
        votes: dict[str, dict[str, int]] = {}
        for one in contributions:
            for name, piece in one.pieces.items():
                kinds = votes.setdefault(name, {})
                kinds[piece.type] = kinds.get(piece.type, 0) + 1
        self._types = {}
        weight: dict[str, tuple[bool, int]] = {}
        for name, kinds in votes.items():
            kind = types.get(name, "")
            if kind not in kinds:
                kind = min(kinds, key=lambda one: (-kinds[one], one))
            self._types[name] = kind
            weight[name] = (name not in types, -kinds[kind])
        taken: set[str] = set()
        for name in sorted(self._types, key=lambda one: (weight[one], one)):
            claimed = {name, *(name + suffix for suffix in _SUFFIXES.get(self._types[name], ()))}
            if claimed & taken:
                del self._types[name]
            else:
                taken |= claimed
        self._taken = taken
        self._pieces: dict[str, list[Piece]] = {name: [] for name in sorted(self._types)}
        for one in contributions:
            for name, piece in one.pieces.items():
                if self._types.get(name) == piece.type:
                    self._pieces[name].append(piece)
                else:
                    one.drop(CONFLICT, piece.series)

    def add(self, own: Contribution) -> None:
        """Add the monitor's own families, whose names nobody else has."""
        for name, piece in own.pieces.items():
            self._types[name] = piece.type
            self._pieces[name] = [piece]

    def text(self) -> Iterator[str]:
        """The text format, 0.0.4, in parts of one family each."""
        for name, pieces in self._pieces.items():
            help_text = _help(pieces)
            yield (
                f"# HELP {name} {help_text}\n# TYPE {name} {self._types[name]}\n"
                + "".join(piece.text for piece in pieces)
            )

    def openmetrics(self) -> Iterator[str]:
        """OpenMetrics 1.0, without its end (`EOF`), in parts of one family each."""
        taken = set(self._taken)
        for name, pieces in self._pieces.items():
            kind, called = self._types[name], name
            if kind == "counter":
                base = name.removesuffix("_total")
                if base != name and not {base, f"{base}_created"} & taken:
                    called = base
                    taken.add(base)
                else:
                    kind = "unknown"
            elif kind == "untyped":
                kind = "unknown"
            help_text = _help(pieces).replace('"', '\\"')
            head = f"# TYPE {called} {kind}\n# HELP {called} {help_text}\n"
            yield head + "".join(piece.text for piece in pieces)


def _help(pieces: Sequence[Piece]) -> str:
    text = next(
        (piece.help for piece in pieces if piece.help), "Reported by sandboxes, without a description."
    )
    return escape_line(text, MAX_HELP_BYTES).replace("\\", "\\\\")


EOF = "# EOF\n"
"""How OpenMetrics ends; without it, Prometheus takes the answer for cut off."""
