"""Finds and reads the configuration files: one value and its origin for each key.

The places are Kata's. One main file is read, the first that is named or exists:

1. the client's: containerd's ``ConfigPath``, ``kata config --config``
2. ``$KATA_CONF_FILE``
3. ``/etc/kata-containers/configuration.toml``
4. ``/opt/kata/share/defaults/kata-containers/configuration.toml``

and then ``config.d/*.toml`` beside it (or beside its target, if it is a link), in the order of their names: each file
overrides those before it. Without any file only the defaults apply, and finding that out costs two system calls:
neither the parser nor the table of keys is loaded.

The result of parsing is cached in the run directory, together with the size and time of each file: loading the TOML
parser and its regular expressions on every start would be expensive.
"""

from __future__ import annotations

import os

from kata import __version__, paths, sysio
from kata.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

VARIABLE = "KATA_CONF_FILE"
PLACES = (
    "/etc/kata-containers/configuration.toml",
    "/opt/kata/share/defaults/kata-containers/configuration.toml",
)
DROP_INS = "config.d"
ENVIRONMENT = (
    ("KATA_ACCEL", "hypervisor.accelerator"),
    ("KATA_BOOT_TIMEOUT", "agent.dial_timeout"),
    ("KATA_GUEST_EXTENSIONS", "agent.guest_extensions"),
    ("KATA_SHARED_FS", "hypervisor.shared_fs"),
    ("KATA_TRACING", "runtime.enable_tracing"),
    ("KATA_AGENT_TRACING", "agent.enable_tracing"),
)
"""Variables that override the files, and the keys that they set; the user of a value checks for them."""
_LISTS = frozenset({"KATA_GUEST_EXTENSIONS"})
_CACHE_FORMAT = 1


class Configuration:
    """The keys that were set. It has no defaults: these are defined where a value is used.

    Attributes:
        values: ``hypervisor.default_vcpus`` -> (value, origin). The origin is ``FILE:LINE``, ``annotation NAME`` or
            ``environment NAME``.
        files: The files that were read, the main one first.
        notes: Sentences for a log, about settings without effect.
    """

    __slots__ = ("files", "notes", "values")

    def __init__(self) -> None:
        self.values: dict[str, tuple[Any, str]] = {}
        self.files: list[str] = []
        self.notes: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, or *default*."""
        found = self.values.get(name)
        return default if found is None else found[0]

    def origin(self, name: str) -> str:
        """Where a key was set; ``default`` if it was not."""
        found = self.values.get(name)
        return "default" if found is None else found[1]

    def set(self, name: str, value: Any, origin: str) -> None:
        """Set a key, overriding an earlier value."""
        self.values[name] = (value, origin)


def main_file(named: str = "") -> str:
    """Return the path of the main file; empty if there is none.

    Args:
        named: The file that the client names; may be empty.

    Raises:
        ConfigError: The file that was named does not exist.
    """
    chosen, by = (named, "the client") if named else (os.environ.get(VARIABLE) or "", VARIABLE)
    if chosen:
        if not os.path.isfile(chosen):
            raise ConfigError(
                f"the configuration file {chosen} does not exist; it was named by {by}",
                "containerd: ConfigPath in the runtime's options",
            )
        return chosen
    return next((path for path in PLACES if os.path.isfile(path)), "")


def load(named: str = "") -> Configuration:
    """Load the configuration.

    Args:
        named: The main file that the client names; may be empty.

    Raises:
        ConfigError: A file cannot be read, is not TOML, or has a key or value that is wrong or refused.
    """
    path = main_file(named)
    found = _load(path) if path else Configuration()
    for variable, name in ENVIRONMENT:
        text = os.environ.get(variable)
        if text:
            value = (
                [part.strip() for part in text.split(",") if part.strip()] if variable in _LISTS else text
            )
            found.set(name, int(text) if text.isdecimal() else value, f"environment {variable}")
    return found


def _load(path: str) -> Configuration:
    try:
        files = all_files(path)
        signature = [
            _signature(file) for file in [*files, os.path.join(os.path.dirname(__file__), "keys.py")]
        ]
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {error.strerror}: {error.filename}") from None
    cache = os.path.join(paths.run_dir(), f"configuration.{signature[0][1]}-{signature[0][2]}")
    found = _from_cache(cache, signature)
    if found is None:
        found = read(files)
        _to_cache(cache, signature, found)
    return found


def read(files: list[str]) -> Configuration:
    """Parse files, each of which overrides those before it; see `load` for the errors."""
    found = Configuration()
    found.files = list(files)
    idle: dict[str, Any] = {}
    parsed = [(path, *_parse(path)) for path in files]
    named = [
        str(runtime.get("hypervisor_name") or "")
        for _, _, content in parsed
        if isinstance(runtime := content.get("runtime"), dict)
    ]
    hypervisor = next((name for name in reversed(named) if name), "")
    for path, text, content in parsed:
        for name, value, line in _rows(path, text, content, hypervisor, found.notes):
            found.set(name, value, f"{path}:{line}")
            idle[name] = value
    found.notes += without_effect(idle)
    return found


def without_effect(values: dict[str, Any]) -> list[str]:
    """A sentence about those of these keys that have no effect here, if there are any."""
    from kata.config import keys

    named = [
        name
        for name, value in values.items()
        if (key := keys.KEYS[name]).status == keys.IDLE and not key.means_nothing(value)
    ]
    if not named:
        return []
    listed = ", ".join(name.partition(".")[2] for name in sorted(named))
    return [
        f"settings without effect here: {listed} ('kata config check' and docs/configuration.md say why)"
    ]


def all_files(path: str) -> list[str]:
    """The main file and its drop-ins."""
    directory = os.path.join(os.path.dirname(os.path.realpath(path)), DROP_INS)
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    return [path, *(os.path.join(directory, name) for name in names if name.endswith(".toml"))]


def _signature(path: str) -> tuple[str, int, int, int, int]:
    state = os.stat(path)
    return path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _from_cache(cache: str, signature: list[tuple[str, int, int, int, int]]) -> Configuration | None:
    import marshal

    try:
        with open(cache, "rb") as file:
            form, version, kept, values, files, notes = marshal.loads(file.read())
    except (OSError, ValueError, EOFError, TypeError):
        return None
    if (form, version, kept) != (_CACHE_FORMAT, __version__, signature):
        return None
    found = Configuration()
    found.values, found.files, found.notes = values, files, notes
    return found


def _to_cache(cache: str, signature: list[tuple[str, int, int, int, int]], found: Configuration) -> None:
    import marshal

    content = (_CACHE_FORMAT, __version__, signature, found.values, found.files, found.notes)
    try:
        paths.make_dirs(os.path.dirname(cache), 0o711)
        sysio.replace_file(cache, marshal.dumps(content))
    except (OSError, ValueError):
        pass  # it is parsed again next time


def _parse(path: str) -> tuple[str, dict[str, Any]]:
    """Read a file. Returns its text, and its content as parsed."""
    import tomllib

    try:
        with open(path, "rb") as file:
            text = file.read().decode()
        content = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", "kata config check FILE") from None
    return text, content


def _rows(
    path: str, text: str, content: dict[str, Any], hypervisor: str, notes: list[str]
) -> Iterator[tuple[str, Any, int]]:
    """Yield name, value and line of each key in a file; of the hypervisors' tables, only the one that is used."""
    from kata.config import keys

    hypervisor = hypervisor or keys.HYPERVISOR
    sections = {f"hypervisor.{hypervisor}": "hypervisor"}
    sections |= {spelt: key for key, spelt in keys.SECTIONS.items() if key != "hypervisor"}
    lines = _lines(text)
    for table, pairs in _tables(path, content, lines, hypervisor, notes):
        section = sections.get(table, "")
        if not section:
            raise keys.unknown_table(f"{path}:{lines.get((table, ''), 1)}", table)
        for name, value in pairs.items():
            # A table of its own has its header's line.
            line = lines.get((table, name)) or lines.get((f"{table}.{name}", "")) or 1
            where = f"{path}:{line}"
            key = keys.KEYS.get(f"{section}.{name}")
            if key is None:
                raise keys.unknown(where, table, name)
            yield key.full_name, key.check(value, where), line


def _tables(
    path: str,
    content: dict[str, Any],
    lines: dict[tuple[str, str], int],
    hypervisor: str,
    notes: list[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the tables with keys, by their dotted names."""
    from kata.config import keys

    for name, value in content.items():
        if not isinstance(value, dict):
            raise keys.unknown(f"{path}:{lines.get(('', name), 1)}", "", name)
        if name not in ("hypervisor", "agent"):
            yield name, value
            continue
        if name == "hypervisor":
            others = sorted(set(value) & (keys.OTHER_HYPERVISORS | {keys.HYPERVISOR}) - {hypervisor})
            if others and hypervisor not in value:
                line = lines.get((f"hypervisor.{others[0]}", ""), 1)
                raise ConfigError(
                    f"{path}:{line}: the hypervisor of [hypervisor.{others[0]}] is not offered",
                    f"The table that is used is [hypervisor.{hypervisor}].",
                )
            notes += [f"{path}: [hypervisor.{other}] is not used: {hypervisor} is" for other in others]
            value = {key: inner for key, inner in value.items() if key not in others}
        for key, inner in value.items():
            if not isinstance(inner, dict):
                raise keys.unknown(f"{path}:{lines.get((name, key), 1)}", name, key)
            yield f"{name}.{key}", inner


def _lines(text: str) -> dict[tuple[str, str], int]:
    """Find the line number of each (table, key); a table's header has the key ``""``.

    The parser does not report lines, so the text is searched for lines that begin like a header or an assignment. In a
    multi-line string this may find a wrong line; that affects only the line in messages, never a value.
    """
    found: dict[tuple[str, str], int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line.startswith("["):
            table = line.strip("[").partition("]")[0].replace('"', "").replace(" ", "")
            found.setdefault((table, ""), number)
        elif "=" in line and not line.startswith("#"):
            found[table, line.partition("=")[0].strip().strip("\"'")] = number
    return found
