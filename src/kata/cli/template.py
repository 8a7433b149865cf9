"""The part of Go's templates that ``--format`` takes, as Docker's and Podman's users write it.

There are: text; ``{{.A.B}}``, ``{{.}}``, ``{{$}}``, ``$name := ...``; strings, numbers, ``true``, ``false``, ``nil``;
``if``/``else if``/``else``, ``range`` (also ``$key, $value :=``), ``with``, ``end``; pipes and parentheses;
``{{-`` and ``-}}``; comments; the functions in `_FUNCTIONS`. There are no ``define``, ``template`` and ``block``.

Data are what JSON can hold, and functions: one that a field holds is called with the words that follow it
(``.Label "key"``), or none.

Source: the documentation of Go's package text/template.
"""

from __future__ import annotations

import json
import re

from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>[+-]?\d+(?:\.\d+)?)"""
    r"""|(?P<path>\$?\w*(?:\.\w+)+|\$\w*|\.)|(?P<mark>:=|[(),|=])|(?P<name>[A-Za-z_]\w*))"""
)
_MOST = 1 << 20
"""Characters of a result: a template is short, and what it is applied to may be a guest's."""
NO_VALUE = "<no value>"
_DEPTH = {("mark", "("): 1, ("mark", ")"): -1}


class _Node:
    """A part of a template: text, an action, or a block with its branches.

    Args:
        kind: ``text``, ``print``, ``if``, ``range``, ``with``.
        tokens: Of the pipeline; the text itself for text.
    """

    __slots__ = ("body", "kind", "other", "tokens")

    def __init__(self, kind: str, tokens: Any) -> None:
        self.kind = kind
        self.tokens = tokens
        self.body: list[_Node] = []
        self.other: list[_Node] = []


class Template:
    """A template that has been read.

    Args:
        text: As the user wrote it.

    Raises:
        UsageError: It is malformed, or has what is not offered.
    """

    __slots__ = ("_nodes", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._nodes = self._parse(text)

    def render(self, data: Any) -> str:
        """Return the text that results from *data*.

        Raises:
            UsageError: It has no such field, or a function cannot take what it is given.
        """
        out: list[str] = []
        _Run(self.text, data).nodes(self._nodes, data, out)
        return "".join(out)

    def fields(self) -> list[str]:
        """The first field of each action that prints one, for the headings of a table."""
        found = []
        for node in self._nodes:
            if node.kind == "print":
                paths = [value for kind, value in node.tokens if kind == "path"]
                found.append(paths[0].lstrip("$.").partition(".")[0] if paths else "")
        return found

    def check_fields(self, known: Sequence[str]) -> None:
        """Refuse a template that prints a field which is not known, before there is anything to apply it to.

        Args:
            known: The fields that there are.

        Raises:
            UsageError: It prints another one.
        """
        for node in self._nodes:
            paths = [word for kind, word in node.tokens if kind == "path"] if node.kind == "print" else []
            for path in paths:
                field = path[1:].partition(".")[0] if path[0] == "." else ""
                if field and field not in known:
                    raise self._error(f"there is no field {field} in {path}; there are {', '.join(known)}")

    def heading(self, names: dict[str, str]) -> str:
        """The line of headings of a table: each action that prints is its field's heading.

        Args:
            names: Field -> heading.
        """
        fields = iter(self.fields())
        return "".join(
            node.tokens if node.kind == "text" else names.get(field := next(fields), field.upper())
            for node in self._nodes
            if node.kind in ("text", "print")
        )

    def _parse(self, text: str) -> list[_Node]:
        root = _Node("root", [])
        stack = [(root, root.body)]
        at, trim = 0, False
        for found in _ACTION.finditer(text):
            before = text[at : found.start()]
            before = before.lstrip() if trim else before
            before = before.rstrip() if found[1] else before
            if before:
                stack[-1][1].append(_Node("text", before))
            at, trim = found.end(), bool(found[3])
            if not found[2].strip().startswith("/*"):
                self._action(found[2].strip(), stack)
        rest = text[at:]
        if "{{" in rest:
            raise self._error("an action is not closed by }}")
        if len(stack) > 1:
            raise self._error("a block has no {{end}}")
        if rest := rest.lstrip() if trim else rest:
            root.body.append(_Node("text", rest))
        return root.body

    def _action(self, text: str, stack: list[tuple[_Node, list[_Node]]]) -> None:
        word, _, rest = text.partition(" ")
        if word in ("if", "range", "with"):
            node = _Node(word, self._tokens(rest))
            stack[-1][1].append(node)
            stack.append((node, node.body))
        elif word == "else":
            if len(stack) < 2:
                raise self._error("{{else}} stands outside of a block")
            node, _ = stack[-1]
            stack[-1] = (node, node.other)
            if rest.startswith("if "):
                # The rest of this block is one of its own, which the same {{end}} ends.
                inner = _Node("elseif", self._tokens(rest[3:]))
                node.other.append(inner)
                stack.append((inner, inner.body))
        elif word == "end":
            if len(stack) < 2:
                raise self._error("{{end}} stands outside of a block")
            while stack.pop()[0].kind == "elseif":
                pass
        elif word in ("define", "template", "block", "break", "continue"):
            raise self._error(f"{{{{{word}}}}} is not offered")
        else:
            stack[-1][1].append(_Node("print", self._tokens(text)))

    def _tokens(self, text: str) -> list[tuple[str, str]]:
        tokens: list[tuple[str, str]] = []
        at = 0
        text = text.strip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise self._error(f"{text[at:]!r} is not understood")
            kind, word = str(found.lastgroup), str(found[str(found.lastgroup)])
            # `(index .Ports 0).HostPort`: a field of what the parentheses give.
            if (
                kind == "path"
                and tokens
                and tokens[-1] == ("mark", ")")
                and text[at] == "."
                and len(word) > 1
            ):
                kind = "field"
            tokens.append((kind, word))
            at = found.end()
        if not tokens:
            raise self._error("an action is empty")
        return tokens

    def _error(self, what: str) -> UsageError:
        return UsageError(
            f"--format {self.text!r}: {what}", "for example --format '{{.ID}}', or --format json"
        )


class _Run:
    """One application of a template."""

    def __init__(self, text: str, root: Any) -> None:
        self._text = text
        self._variables: dict[str, Any] = {"$": root}
        self._length = 0

    def nodes(self, nodes: list[_Node], dot: Any, out: list[str]) -> None:
        for node in nodes:
            if node.kind == "text":
                self._put(node.tokens, out)
            elif node.kind == "print":
                value, is_assigned = self._pipeline(node.tokens, dot)
                if not is_assigned:
                    self._put(shown(value), out)
            elif node.kind == "range":
                self._range(node, dot, out)
            else:
                value, _ = self._pipeline(node.tokens, dot)
                if _true(value):
                    self.nodes(node.body, value if node.kind == "with" else dot, out)
                else:
                    self.nodes(node.other, dot, out)

    def _put(self, text: str, out: list[str]) -> None:
        self._length += len(text)
        if self._length > _MOST:
            raise self._error("the result is too long")
        out.append(text)

    def _range(self, node: _Node, dot: Any, out: list[str]) -> None:
        names, tokens = [], node.tokens
        if ("mark", ":=") in tokens:
            split = tokens.index(("mark", ":="))
            names = [value for kind, value in tokens[:split] if kind == "path"]
            tokens = tokens[split + 1 :]
        value, _ = self._pipeline(tokens, dot)
        if isinstance(value, dict):
            pairs = sorted(value.items())
        elif isinstance(value, list):
            pairs = list(enumerate(value))
        elif value is None:
            pairs = []
        else:
            raise self._error(f"range cannot go over {shown(value)!r}")
        if not pairs:
            self.nodes(node.other, dot, out)
        for key, item in pairs:
            self._variables.update(zip(names, [item] if len(names) == 1 else [key, item], strict=False))
            self.nodes(node.body, item, out)

    def _pipeline(self, tokens: list[tuple[str, str]], dot: Any) -> tuple[Any, bool]:
        """The value of a pipeline, and whether it was assigned to a variable."""
        name = ""
        if len(tokens) > 2 and tokens[1] in (("mark", ":="), ("mark", "=")) and tokens[0][1][:1] == "$":
            name, tokens = tokens[0][1], tokens[2:]
        value: Any = None
        command: list[tuple[str, str]] = []
        depth, is_first = 0, True
        for token in [*tokens, ("mark", "|")]:
            if token == ("mark", "|") and not depth:
                value = self._command(command, dot, [] if is_first else [value])
                command, is_first = [], False
                continue
            depth += _DEPTH.get(token, 0)
            command.append(token)
        if depth:
            raise self._error("the parentheses do not match")
        if name:
            self._variables[name] = value
        return value, bool(name)

    def _command(self, tokens: list[tuple[str, str]], dot: Any, piped: list[Any]) -> Any:
        """The value of a command: an operand, or a function with its operands."""
        if not tokens:
            raise self._error("a command is empty")
        head_kind, head = tokens[0]
        function: Callable[..., Any] | None = None
        if head_kind == "name" and head not in _CONSTANTS:
            function = _FUNCTIONS.get(head)
            if function is None:
                raise self._error(
                    f"there is no function {head!r}; there are {', '.join(sorted(_FUNCTIONS))}"
                )
        elif head_kind == "path":
            value = self._path(head, dot)
            function = value if callable(value) else None
        position = 0 if function is None else 1
        operands: list[Any] = []
        while position < len(tokens):
            value, position = self._operand(tokens, position, dot)
            operands.append(value)
        operands += piped
        if function is None:
            if len(operands) != 1:
                raise self._error("a value cannot be called")
            return operands[0]
        try:
            return function(*operands)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError):
            words = " ".join(text for _, text in tokens)
            raise self._error(f"{words!r} cannot be carried out with what it is given") from None

    def _operand(self, tokens: list[tuple[str, str]], position: int, dot: Any) -> tuple[Any, int]:
        """The value of the operand at a position, and the position after it."""
        kind, text = tokens[position]
        if kind == "string":
            try:
                return text[1:-1] if text[0] == "`" else json.loads(text), position + 1
            except ValueError:
                raise self._error(f"{text} is no string") from None
        if kind == "number":
            return float(text) if "." in text else int(text), position + 1
        if kind == "path":
            value = self._path(text, dot)
            return value() if callable(value) else value, position + 1
        if kind == "name" and text in _CONSTANTS:
            return _CONSTANTS[text], position + 1
        if (kind, text) != ("mark", "("):
            raise self._error(f"{text!r} is out of place")
        depth, end = 1, position + 1
        while end < len(tokens) and depth:
            depth += _DEPTH.get(tokens[end], 0)
            end += 1
        value = self._pipeline(tokens[position + 1 : end - 1], dot)[0]
        if end < len(tokens) and tokens[end][0] == "field":
            return self._path(tokens[end][1], value), end + 1
        return value, end

    def _path(self, text: str, dot: Any) -> Any:
        if text[0] == "$":
            name, *fields = text.split(".")
            if name not in self._variables:
                raise self._error(f"there is no variable {name}")
            value = self._variables[name]
        else:
            value, fields = dot, [field for field in text.split(".") if field]
        for field in fields:
            value = value() if callable(value) else value
            if isinstance(value, FreeKeys):
                value = value.get(field)
            elif isinstance(value, dict) and field in value:
                value = value[field]
            elif value is None:
                raise self._error(f"{text} is a field of what is not there")
            else:
                known = (
                    f"; there are {', '.join(map(str, value))}" if isinstance(value, dict) and value else ""
                )
                raise self._error(f"there is no field {field} in {text}{known[:600]}")
        return value

    def _error(self, what: str) -> UsageError:
        return UsageError(f"--format {self._text!r}: {what}", "--format json shows all there is")


class FreeKeys(dict[str, object]):
    """An object whose keys are the user's, as labels are: one that it has not is no value instead of an error."""


def shown(value: Any) -> str:
    """A value as Go prints it: ``map[a:1]``, ``[a b]``, ``true``."""
    if callable(value):
        value = value()
    if value is None:
        return NO_VALUE
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"map[{' '.join(f'{key}:{shown(item)}' for key, item in sorted(value.items()))}]"
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(shown, value))}]"
    return str(value)


def _true(value: Any) -> bool:
    return bool(value() if callable(value) else value)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else value[key]
    return value


def _printf(form: str, *given: Any) -> str:
    # Of Go's verbs those that have the same meaning in Python, and %v, %q, %t.
    left = list(given)

    def one(found: re.Match[str]) -> str:
        if found[2] == "%":
            return "%"
        value = left.pop(0)
        if found[2] in "vst":
            return f"%{found[1]}s" % shown(value)
        return json.dumps(value) if found[2] == "q" else f"%{found[1]}{found[2]}" % value

    return re.sub(r"%([-+ 0]*\d{0,3}(?:\.\d{1,3})?)([vstqdxXf%])", one, form)


def _escaped(value: Any) -> str:
    """JSON as Go writes it: characters that would be markup in HTML are escaped."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=lambda lazy: lazy())
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _and(*given: Any) -> Any:
    return next((value for value in given if not _true(value)), given[-1])


def _or(*given: Any) -> Any:
    return next((value for value in given if _true(value)), given[-1])


_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "nil": None}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": _and,
    "eq": lambda first, *others: first in others,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "index": _index,
    "join": lambda values, separator: separator.join(map(shown, values)),
    "json": _escaped,
    "le": lambda a, b: a <= b,
    "len": len,
    "lower": str.lower,
    "lt": lambda a, b: a < b,
    "ne": lambda a, b: a != b,
    "not": lambda value: not _true(value),
    "or": _or,
    "pad": lambda text, before, after: (
        f"{' ' * min(before, 100)}{text}{' ' * min(after, 100)}" if text else text
    ),
    "print": lambda *values: "".join(map(shown, values)),
    "printf": _printf,
    "println": lambda *values: " ".join(map(shown, values)) + "\n",
    "slice": lambda value, start=0, end=None: value[start:end],
    "split": lambda text, separator: text.split(separator),
    "title": lambda text: text[:1].upper() + text[1:],
    "truncate": lambda text, length: text[:length],
    "upper": str.upper,
}


def emit(text: str) -> None:
    """Print a line to stdout; on a terminal, characters that control it are escaped."""
    import sys

    from kata.cli import table

    if sys.stdout.isatty():
        text = "\n".join("\t".join(map(table.printable, line.split("\t"))) for line in text.split("\n"))
    sys.stdout.write(text + "\n")


class Rows:
    """How a list is printed with ``--format``: a line for each row.

    Args:
        form: ``json``, ``table``, ``table TEMPLATE`` or a template; backslash-t and -n in it are a tab and a newline.
            Empty, which scripts give, is the same as ``table``.
        headings: Field -> its heading in a table. ``json`` has these fields.
        columns: The fields of the table without a template; all if empty.
        further: Fields that rows have besides those with a heading.

    Raises:
        UsageError: The template is malformed, or prints a field that rows do not have: also where there is no row.
    """

    def __init__(
        self, form: str, headings: dict[str, str], columns: Sequence[str] = (), further: Sequence[str] = ()
    ) -> None:
        self._headings = headings
        self._columns = (columns or list(headings)) if form in ("", "table") else ()
        text = form.replace("\\t", "\t").replace("\\n", "\n")
        self._is_table = text.startswith("table ")
        if self._is_table:
            text = text.removeprefix("table ").lstrip()
        self._template = None if form == "json" or self._columns else Template(text)
        if self._template is not None:
            self._template.check_fields([*headings, *further])

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Print rows: the fields of each; functions without arguments are called where they are asked for."""
        from kata.cli import table

        if self._columns:
            table.show_fields(self._columns, self._headings, rows)
            return
        template = self._template
        if template is None:
            for row in rows:
                plain = {key: row[key]() if callable(row[key]) else row[key] for key in self._headings}
                emit(_escaped(plain))
            return
        if not self._is_table:
            for row in rows:
                emit(template.render(row))
            return
        cells = [template.render(row).split("\t") for row in rows]
        head = template.heading(self._headings).split("\t")
        width = max(map(len, [head, *cells]))
        table.show(head + [""] * (width - len(head)), [row + [""] * (width - len(row)) for row in cells])


def show_rows(
    form: str,
    rows: list[dict[str, Any]],
    headings: dict[str, str],
    columns: Sequence[str] = (),
    further: Sequence[str] = (),
) -> None:
    """Print rows once; see `Rows`."""
    Rows(form, headings, columns, further).show(rows)
