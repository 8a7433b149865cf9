"""Prometheus' text format 0.0.4: written by engines, and read from those who may lie.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/. Prometheus drops a whole scrape for one wrong
word, so what a guest or an engine says is never passed through as it is: `parse` accepts valid text within bounds, and
`known_samples` takes of a guest's text those lines that it understands.

Imported by engines at their first scrape: no typing, no dataclasses.
"""

from __future__ import annotations

import functools
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kata.metrics.families import Definition

    Label = tuple[str, str]
    Sample = tuple[str, list[Label], float]

TYPES = ("counter", "gauge", "histogram", "summary", "untyped")
MAX_BYTES = 4 << 20
MAX_LINES = 50_000
MAX_FAMILY_SAMPLES = 1536
"""Of a guest; with 128 processors there are 1290 of its `kata_guest_cpu_time`."""
MAX_GUEST_SAMPLES = 4096
MAX_GUEST_CHARS = 1 << 20
MAX_GUEST_LINE_CHARS = 1024
MAX_LABELS = 16
MAX_LINE_CHARS = 1 << 16
MAX_VALUE_CHARS = 256
"""Maximum length of a label's value in a guest's text, as it is written there."""

_NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
_NUMBER = r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[Ii]nf(?:inity)?|[Nn]a[Nn])"
# What agents write: no spaces between labels, no timestamps, no NaN, at most three labels. For a line all of whose
# characters can be seen: a set with those that cannot would be compiled into 200 kB. One match that takes a line apart:
# most of the time of a scrape is spent here.
_SEEN = r'[^"\\]*'
_GUEST_LABEL = rf'([a-z]+)="{_SEEN}(?:\\["\\n]{_SEEN})*"'
_PLAIN = re.compile(
    rf"([a-z][a-z0-9_]*)(?:\{{{_GUEST_LABEL}(?:,{_GUEST_LABEL}(?:,{_GUEST_LABEL})?)?\}})? "
    r"(?:-?\d{1,24}(?:\.\d{1,9})?(?:[eE][+-]?\d{1,2})?|\+Inf)",
    re.ASCII,
)
_GUEST_VALUES = re.compile(r'="((?:[^"\\]|\\.)*)"')


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """A sample, a label in it, a comment, an escaped character. Compiled when something is read: engines only write."""
    return (
        re.compile(rf"({_NAME})(?:\{{(.*)\}})?[ \t]+({_NUMBER})(?:[ \t]+-?\d{{1,19}})?[ \t]*", re.ASCII),
        re.compile(rf"\s*{_LABEL}\s*(,|$)", re.ASCII),
        re.compile(rf"#[ \t]+(HELP|TYPE)[ \t]+({_NAME})(?:[ \t]+(.*))?", re.ASCII),
        re.compile(r"\\(.)"),
    )


class MalformedError(ValueError):
    """A text is no exposition, or exceeds a bound. The message says where."""


class Family:
    """A family as it was read.

    Args:
        name: Its name.
        kind: One of `TYPES`.
        help_text: Its description; empty without one.
        samples: Name (with ``_bucket``, ``_sum`` or ``_count`` where the type has them), labels, value.
    """

    __slots__ = ("help", "name", "samples", "type")

    def __init__(self, name: str, kind: str, help_text: str, samples: list[Sample]) -> None:
        self.name = name
        self.type = kind
        self.help = help_text
        self.samples = samples

    def __repr__(self) -> str:
        return f"<Family {self.name} {self.type}, {len(self.samples)} samples>"


def parse(body: bytes) -> list[Family]:
    """Read a whole exposition.

    Args:
        body: The text, UTF-8.

    Returns:
        Its families, each once, in the order in which they begin. Timestamps are left out.

    Raises:
        MalformedError: It is not valid, or larger than `MAX_BYTES`, `MAX_LINES` or `MAX_LABELS` allow. Whether series
            occur twice and histograms add up is for the caller to check.
    """
    if len(body) > MAX_BYTES:
        raise MalformedError(f"it has more than {MAX_BYTES} bytes")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"it is no UTF-8 at byte {error.start}") from None
    if text.count("\n") > MAX_LINES:
        raise MalformedError(f"it has more than {MAX_LINES} lines")
    sample, *_ = _patterns()
    families: dict[str, Family] = {}
    current: Family | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        if len(line) > MAX_LINE_CHARS:
            raise MalformedError(f"line {number} has more than {MAX_LINE_CHARS} characters")
        if line.startswith("#"):
            current = _comment(line, number, families) or current
            continue
        match = sample.fullmatch(line)
        if match is None:
            raise MalformedError(f"line {number} is no sample")
        name, labels, value = match.groups()
        if current is None or (name != current.name and not _belongs(name, current)):
            current = _family_of(name, families)
        current.samples.append((name, _labels(labels, number), float(value)))
    return list(families.values())


_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}


def _belongs(name: str, family: Family) -> bool:
    suffixes = _SUFFIXES.get(family.type)
    if suffixes is None:
        return name == family.name
    return name.startswith(family.name) and name[len(family.name) :] in suffixes


def _family_of(name: str, families: dict[str, Family]) -> Family:
    for suffix in ("", "_bucket", "_sum", "_count"):
        base = name.removesuffix(suffix) if suffix else name
        family = families.get(base)
        if family is not None and _belongs(name, family):
            return family
    return families.setdefault(name, Family(name, "untyped", "", []))


def _comment(line: str, number: int, families: dict[str, Family]) -> Family | None:
    match = _patterns()[2].fullmatch(line)
    if match is None:
        return None
    keyword, name, rest = match[1], match[2], match[3] or ""
    family = families.setdefault(name, Family(name, "untyped", "", []))
    if keyword == "HELP":
        family.help = _unescape(rest)
        return family
    kind = rest.strip()
    if kind not in TYPES:
        raise MalformedError(f"line {number} names no type")
    if family.samples or family.type not in ("untyped", kind):
        raise MalformedError(f"line {number} gives {name} a type too late")
    family.type = kind
    return family


def _labels(text: str, number: int) -> list[Label]:
    if not text:
        return []
    try:
        return list(_pairs(text) if len(text) <= _SHORT_CHARS else _pairs.__wrapped__(text))
    except MalformedError as error:
        raise MalformedError(f"line {number} has {error}") from None


_SHORT_CHARS = 160
"""Labels up to here are remembered: those of one sandbox are those of all others, and of the scrape before."""


@functools.lru_cache(4096)
def _pairs(text: str) -> tuple[Label, ...]:
    labels: list[Label] = []
    at = 0
    pair = _patterns()[1]
    while at < len(text):
        match = pair.match(text, at)
        if match is None:
            raise MalformedError("a label that is none")
        labels.append((match[1], _unescape(match[2])))
        at = match.end()
    if len(labels) > MAX_LABELS:
        raise MalformedError(f"more than {MAX_LABELS} labels")
    if len({name for name, _ in labels}) != len(labels):
        raise MalformedError("a label twice")
    return tuple(labels)


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    return _patterns()[3].sub(lambda match: "\n" if match[1] == "n" else match[1], text)


# ---- writing ----


def escape(value: str, most: int = MAX_VALUE_CHARS) -> str:
    """The value of a label as the format writes it: bounded, control characters replaced."""
    if len(value) > most:
        value = value[: most - 1] + "\u2026"
    if not value.isprintable():
        value = "".join(char if char.isprintable() else "\ufffd" for char in value)
    if "\\" in value or '"' in value:
        value = value.replace("\\", "\\\\").replace('"', '\\"')
    return value


def labels_text(**labels: str) -> str:
    """Labels as the format writes them, with their braces."""
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in labels.items()) + "}"


class Text:
    """A text being written: each family once, in the order in which it was begun.

    Args:
        definitions: The families that may be in it, by name.
    """

    __slots__ = ("_definitions", "_families")

    def __init__(self, definitions: Mapping[str, Definition]) -> None:
        self._definitions = definitions
        self._families: dict[str, list[str]] = {}

    def lines(self, name: str) -> list[str]:
        """The lines of a family, to which the caller appends whole samples."""
        found = self._families.get(name)
        if found is None:
            self._definitions[name]  # an unknown family is a KeyError here and not at its end
            found = self._families[name] = []
        return found

    def add(self, name: str, value: float, labels: str = "") -> None:
        """Add one sample.

        Args:
            name: Of the family.
            value: Its value.
            labels: As `labels_text` makes them; empty for none.
        """
        self.lines(name).append(f"{name}{labels} {number(value)}")

    def items(self, name: str, values: Mapping[str, float], labels: str = "") -> None:
        """Add samples that differ in the label ``item``.

        Args:
            name: Of the family.
            values: Value by item; the items are names of ours.
            labels: Labels before ``item``, each with a comma after it: ``cpu="0",``.
        """
        self.lines(name).extend(
            f'{name}{{{labels}item="{item}"}} {number(value)}' for item, value in values.items()
        )

    def text(self) -> str:
        """All of it."""
        out = []
        for name, lines in self._families.items():
            if lines:
                definition = self._definitions[name]
                out.append(f"# HELP {name} {definition.help}\n# TYPE {name} {definition.kind}")
                out += lines
        out.append("")
        return "\n".join(out)


def number(value: float) -> str:
    """A value as the format writes it."""
    if isinstance(value, int):
        return str(value)
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def known_samples(text: str, definitions: Mapping[str, Definition]) -> tuple[dict[str, list[str]], int]:
    """Take from a guest's text the samples of families that are known, and drop everything else.

    Args:
        text: What the guest says; what is beyond `MAX_GUEST_CHARS` is not looked at.
        definitions: The families that a guest may report, by name.

    Returns:
        Whole lines by family: valid samples with just the labels of their family, of which none occurs twice, at most
        `MAX_FAMILY_SAMPLES` of a family and `MAX_GUEST_SAMPLES` in all. And the number of samples that were dropped.
    """
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    dropped = 0
    last, definition, lines = "", None, []
    wanted: tuple[str | None, ...] = ()
    for line in _lines(text):
        if not line or line[0] == "#":
            continue
        match = None
        if len(line) <= MAX_GUEST_LINE_CHARS and line.isprintable():
            match = _PLAIN.fullmatch(line)
        if match is None:
            dropped += 1
            continue
        name, first, second, third = match.groups()
        if name != last:
            last, definition = name, definitions.get(name)
            if definition is not None:
                lines = found.setdefault(name, [])
                wanted = (*definition.labels, None, None, None)[:3]
        series = line[: line.rfind(" ")]
        if (
            definition is None
            or (first, second, third) != wanted
            or len(lines) >= MAX_FAMILY_SAMPLES
            or len(seen) >= MAX_GUEST_SAMPLES
            or series in seen
            or (
                len(line) > MAX_VALUE_CHARS
                and max(map(len, _GUEST_VALUES.findall(line)), default=0) > MAX_VALUE_CHARS
            )
        ):
            dropped += 1
            continue
        seen.add(series)
        lines.append(line)
    return found, dropped


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, one after the other: all of them at once may be very many."""
    at, end = 0, min(len(text), MAX_GUEST_CHARS)
    while at < end:
        next_end = text.find("\n", at)
        if next_end < 0:
            next_end = len(text)
        yield text[at : min(next_end, at + MAX_GUEST_LINE_CHARS + 1)]
        at = next_end + 1
