"""Finds and reads the configuration files: one value and its origin for each key.

The places are Kata's. One main file is read, the first that is named or exists:

1. the client's: containerd's ``ConfigPath``, ``kata config --config``
2. ``$KATA_CONF_FILE``
3. ``configuration-NAME.toml`` in the directories of 4 and 5, where the hypervisor NAME is asked for (``--hypervisor``,
   ``$KATA_HYPERVISOR``, a pod's annotation)
4. ``/etc/kata-containers/configuration.toml``
5. ``/opt/kata/share/defaults/kata-containers/configuration.toml``

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
HYPERVISOR_VARIABLE = "KATA_HYPERVISOR"
"""Variable that names the hypervisor; it also chooses the table, and so is looked at first."""
ALIASES = {"clh": "cloud-hypervisor", "fc": "firecracker"}
"""Kata's short names of hypervisors, and ours. Tables and files may have either."""
_NAME = "runtime.hypervisor_name"
DEFAULT = "qemu"
"""The hypervisor where nothing says otherwise."""
_LISTS = frozenset({"KATA_GUEST_EXTENSIONS"})
_CACHE_FORMAT = 2


class Configuration:
    """The keys that were set. It has no defaults: these are defined where a value is used.

    Attributes:
        values: ``hypervisor.default_vcpus`` -> (value, origin). The origin is ``FILE:LINE``, ``annotation NAME`` or
            ``environment NAME``.
        files: The files that were read, the main one first.
        notes: Sentences for a log, about settings without effect.
        hypervisors: Those that a pod may choose: that of the files, and each that has a table in them.
    """

    __slots__ = ("files", "hypervisors", "notes", "values")

    def __init__(self) -> None:
        self.values: dict[str, tuple[Any, str]] = {}
        self.files: list[str] = []
        self.notes: list[str] = []
        self.hypervisors: list[str] = [DEFAULT]

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


def canonical(hypervisor: str) -> str:
    """Our name of a hypervisor, given that or the original's short one."""
    return ALIASES.get(hypervisor, hypervisor)


def _spellings(hypervisor: str) -> list[str]:
    return [hypervisor, *(short for short, name in ALIASES.items() if name == hypervisor)]


def main_file(named: str = "", hypervisor: str = "") -> str:
    """Return the path of the main file; empty if there is none.

    Args:
        named: The file that the client names; may be empty.
        hypervisor: The hypervisor that is asked for, whose own file goes before the general one; may be empty.

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
    own = [
        os.path.join(os.path.dirname(place), f"configuration-{name}.toml")
        for place in PLACES
        for name in (_spellings(hypervisor) if hypervisor else ())
    ]
    return next((path for path in (*own, *PLACES) if os.path.isfile(path)), "")


def load(named: str = "", hypervisor: str = "", by: str = "") -> Configuration:
    """Load the configuration.

    Args:
        named: The main file that the client names; may be empty.
        hypervisor: The hypervisor that is asked for; empty for that of the environment, or of the files.
        by: ``--hypervisor``, or the pod's annotation that asks for it. A pod has a choice of those in the files.

    Raises:
        ConfigError: A file cannot be read, is not TOML, or has a key or value that is wrong or refused; or a pod asks
            for a hypervisor that the files do not have.
    """
    if not hypervisor and (hypervisor := os.environ.get(HYPERVISOR_VARIABLE) or ""):
        by = f"environment {HYPERVISOR_VARIABLE}"
    hypervisor = canonical(hypervisor)
    path = main_file(named, hypervisor)
    found = _load(path, hypervisor) if path else Configuration()
    if hypervisor:
        if by.startswith("annotation") and hypervisor not in found.hypervisors:
            raise ConfigError(
                f"{by}: there is no hypervisor {hypervisor!r} in the configuration of this host",
                f"one of: {', '.join(found.hypervisors)}; the host's owner may add [hypervisor.{hypervisor}]",
            )
        found.set(_NAME, hypervisor, by)
    for variable, name in ENVIRONMENT:
        text = os.environ.get(variable)
        if text:
            value = (
                [part.strip() for part in text.split(",") if part.strip()] if variable in _LISTS else text
            )
            found.set(name, int(text) if text.isdecimal() else value, f"environment {variable}")
    return found


def _load(path: str, hypervisor: str) -> Configuration:
    try:
        files = all_files(path)
        signature = [
            _signature(file) for file in [*files, os.path.join(os.path.dirname(__file__), "keys.py")]
        ]
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {error.strerror}: {error.filename}") from None
    if "/" in hypervisor or len(hypervisor) > 64:
        raise ConfigError(f"{hypervisor[:80]!r} is no hypervisor's name")
    cache = os.path.join(
        paths.run_dir(),
        f"configuration.{'-'.join(filter(None, (*map(str, signature[0][1:3]), hypervisor)))}",
    )
    found = _from_cache(cache, signature)
    if found is None:
        found = read(files, hypervisor)
        _to_cache(cache, signature, found)
    return found


def read(files: list[str], hypervisor: str = "") -> Configuration:
    """Parse files, each of which overrides those before it; see `load` for the errors.

    Args:
        files: The main file, and its drop-ins.
        hypervisor: The one whose table is read; empty for the one that the files name.
    """
    found = Configuration()
    found.files = list(files)
    idle: dict[str, Any] = {}
    parsed = [(path, *_parse(path)) for path in files]
    named = [
        str(runtime.get("hypervisor_name") or "")
        for _, _, content in parsed
        if isinstance(runtime := content.get("runtime"), dict)
    ]
    tables = [
        (canonical(name), f"{path}:{_lines(text).get((f'hypervisor.{name}', ''), 1)}")
        for path, text, content in parsed
        if isinstance(content.get("hypervisor"), dict)
        for name, inner in content["hypervisor"].items()
        if isinstance(inner, dict)
    ]
    own = canonical(next((name for name in reversed(named) if name), ""))
    implied, origin = (own, "") if own else _implied(files[0], tables)
    found.hypervisors = sorted({implied or DEFAULT, *(name for name, _ in tables)})
    chosen = hypervisor or implied or DEFAULT
    for path, text, content in parsed:
        for name, value, line in _rows(path, text, content, chosen, found.notes):
            if name == _NAME:
                value = canonical(value)
            found.set(name, value, f"{path}:{line}")
            idle[name] = value
    if origin:
        found.set(_NAME, implied, origin)
    found.notes += without_effect(idle, chosen)
    return found


def _implied(main: str, tables: list[tuple[str, str]]) -> tuple[str, str]:
    """The hypervisor of files in which no ``hypervisor_name`` is: that of their table, or of the main file's name.

    Args:
        main: The main file.
        tables: The hypervisors that have tables, and where these are.

    Returns:
        Its name, and what says so; empty for the default one.

    Raises:
        ConfigError: There are only tables of hypervisors that are not offered, or several without the default's.
    """
    from kata.config import keys

    found: dict[str, str] = {}
    for name, place in tables:
        found.setdefault(name, place)
    offered = [name for name in found if name in keys.HYPERVISORS]
    if DEFAULT in found:
        return "", ""
    if len(offered) == 1:
        return offered[0], found[offered[0]]
    if offered:
        raise ConfigError(
            f"{found[offered[0]]}: there are the tables {', '.join(f'[hypervisor.{name}]' for name in offered)}, and"
            " nothing says which of them is used",
            "[runtime] hypervisor_name names it, or --hypervisor.",
        )
    others = sorted(set(found) & keys.OTHER_HYPERVISORS)
    if others:
        raise ConfigError(
            f"{found[others[0]]}: the hypervisor of [hypervisor.{others[0]}] is not offered",
            "one of: " + ", ".join(f"[hypervisor.{name}]" for name in keys.HYPERVISORS),
        )
    for path in (main, os.path.realpath(main)):
        stem = os.path.basename(path).removeprefix("configuration-").removesuffix(".toml")
        if (name := canonical(stem)) in keys.HYPERVISORS:
            return ("", "") if name == DEFAULT else (name, f"the name of {path}")
    return "", ""


def without_effect(values: dict[str, Any], hypervisor: str = "") -> list[str]:
    """A sentence about those of these keys that have no effect here, if there are any.

    Args:
        values: Value by key.
        hypervisor: The hypervisor that is used; empty for the default one.
    """
    from kata.config import keys

    named = [
        name
        for name, value in values.items()
        if (key := keys.find(name, hypervisor)) is not None and key.is_idle(value)
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
            form, version, kept, values, files, notes, hypervisors = marshal.loads(file.read())
    except (OSError, ValueError, EOFError, TypeError):
        return None
    if (form, version, kept) != (_CACHE_FORMAT, __version__, signature):
        return None
    found = Configuration()
    found.values, found.files, found.notes, found.hypervisors = values, files, notes, hypervisors
    return found


def _to_cache(cache: str, signature: list[tuple[str, int, int, int, int]], found: Configuration) -> None:
    import marshal

    content = (
        *(_CACHE_FORMAT, __version__, signature),
        *(found.values, found.files, found.notes, found.hypervisors),
    )
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
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", "kata config show names the files that are read"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", "kata config check FILE") from None
    return text, content


def _rows(
    path: str, text: str, content: dict[str, Any], hypervisor: str, notes: list[str]
) -> Iterator[tuple[str, Any, int]]:
    """Yield name, value and line of each key in a file; of the hypervisors' tables, only the one that is used."""
    from kata.config import keys

    sections = {f"hypervisor.{name}": "hypervisor" for name in _spellings(hypervisor)}
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
            key = keys.find(f"{section}.{name}", hypervisor)
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
            others = sorted(
                other
                for other, inner in value.items()
                if (known := canonical(other)) != hypervisor
                and (known in keys.HYPERVISORS or known in keys.OTHER_HYPERVISORS)
                and isinstance(inner, dict)
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
