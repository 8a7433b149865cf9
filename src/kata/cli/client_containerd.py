"""Registers the runtime class handler ``kata`` with containerd's CRI plugin, and removes it again.

containerd 2 merges imported configuration files (``imports``) table by table, so the handler gets a file of its own.
In containerd 1.x a plugin's section in an imported file replaces the whole section, so there (and where nothing is
imported) a marked block is appended to the main file. containerd 1.x also drops its default handler (runc) as soon as a
file names any handler; in that case runc is written as well. The result is checked with ``containerd config dump``:
it has to show the handler, and otherwise be unchanged.

Source: containerd's ``docs/man/containerd-config.toml.5.md`` and ``docs/cri/config.md``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib

from kata.cli.client_ask import ask, last_words
from kata.cli.client_edit import Edit, read, remove_backups, text_of
from kata.errors import AlreadyExistsError, ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_PATH = "/etc/containerd/config.toml"
HANDLER = "kata"
RUNTIME_TYPE = "io.containerd.kata.v2"
DROP_IN = "kata.toml"
_BEGIN = "# begin: kata's runtime class handler, by `kata install containerd`"
_END = "# end: `kata uninstall containerd` takes out what is between these lines"
_JOINED = " (the line before had no end)"
_MADE = " (this file was made for it)"
_MADE_DIRECTORY = " (this directory was made for it)"
_SECTIONS = {
    1: "plugins.cri",
    2: 'plugins."io.containerd.grpc.v1.cri"',
    3: 'plugins."io.containerd.cri.v1.runtime"',
}
"""Name of the CRI plugin's section, by version of the configuration file; later versions are like 3."""
_DROP_IN_VERSION = 3


class Daemon:
    """The installed containerd.

    Attributes:
        program: Path of the program.
        version: (major, minor).
    """

    def __init__(self, program: str, version: tuple[int, int]) -> None:
        self.program = program
        self.version = version

    def dump(self, path: str) -> dict[str, Any]:
        """Return the configuration that containerd would run with, given the file *path*.

        Raises:
            ConfigError: containerd cannot read the file.
            HostError: containerd cannot be asked.
        """
        command = [self.program, "--config", path, "config", "dump"]
        if not os.path.exists(path):
            command = [self.program, "config", "default"]  # 1.x refuses the name of a missing file
        done = ask(command)
        if done.returncode:
            raise ConfigError(f"containerd cannot read {path}: {last_words(done)}", f"fix {path} first")
        return tomllib.loads(done.stdout)


def daemon() -> Daemon:
    """Find containerd on the PATH.

    Raises:
        HostError: There is none, it cannot be asked, or it does not report its version.
    """
    program = shutil.which("containerd")
    if not program:
        raise HostError(
            "containerd is not on the PATH, so its configuration cannot be checked",
            "PATH=/where/it/is:$PATH kata install containerd",
        )
    said = ask([program, "--version"]).stdout
    match = re.search(r"\bv?(\d+)\.(\d+)\.", said)
    if match is None:
        raise HostError(f"{program} --version does not name a version: {said.strip()!r}")
    return Daemon(program, (int(match[1]), int(match[2])))


def install(path: str) -> tuple[list[Edit], Daemon]:
    """Work out the changes that register the handler.

    Args:
        path: containerd's configuration file; it need not exist.

    Returns:
        The changes (none if the handler is registered already), and the daemon for `check`.

    Raises:
        AlreadyExistsError: There is another handler of that name.
        ConfigError: A file cannot be read or changed.
        HostError: There is no containerd.
    """
    containerd = daemon()
    path = os.path.abspath(path)
    raw = read(path)
    text = text_of(raw, path) if raw is not None else ""
    config = _parse(text, path)
    drop_in = _drop_in(config, path) if containerd.version >= (2, 0) and raw is not None else ""
    old = {name: read(name) for name in (path, drop_in) if name}
    cut = {name: _cut(text_of(data, name), name) for name, data in old.items() if data is not None}
    ours = [name for name, remains in cut.items() if remains != old[name]]
    known = handlers(containerd.dump(path))
    if not ours and (handler := known.get(HANDLER)) is not None:
        raise AlreadyExistsError(
            f"containerd's CRI has a handler {HANDLER!r} already, of runtime_type"
            f" {handler.get('runtime_type', '')!r}: {path} or a file that it imports",
            "remove that first; nothing has been changed",
        )
    contents: dict[str, bytes | None] = {name: cut.get(name) for name in old}
    if drop_in:
        made = "" if os.path.isdir(os.path.dirname(drop_in)) else _MADE_DIRECTORY
        if (before := old[drop_in]) is not None:
            if drop_in not in ours:
                raise AlreadyExistsError(f"{drop_in} is there, and not ours", "nothing has been changed")
            made = _MADE_DIRECTORY if _MADE_DIRECTORY.encode() in before else ""
        contents[drop_in] = f"{_BEGIN}{made}\nversion = {_DROP_IN_VERSION}\n\n{_table(3)}{_END}\n".encode()
    else:
        without_ours = contents.get(path)
        kept = without_ours.decode() if without_ours is not None else ""
        written = _parse(kept, path)
        version = int(written.get("version") or 1)
        note = ""
        if without_ours is None:
            version = _DROP_IN_VERSION if containerd.version >= (2, 0) else 2
            note = _MADE
        elif kept and not kept.endswith("\n"):
            note = _JOINED
        head = f"version = {version}\n\n" if without_ours is None else ""
        defaults = ""
        if containerd.version < (2, 0):
            missing = {name: known[name] for name in known if name not in (HANDLER, *handlers(written))}
            defaults = "".join(_toml(_table_name(version, name), value) for name, value in missing.items())
        block = f"{_BEGIN}{note}\n{head}{_table(version)}{defaults}{_END}\n"
        contents[path] = (kept + ("\n" if note == _JOINED else "") + block).encode()
        try:
            _parse(kept + "\n" + block, path)
        except ConfigError:
            raise ConfigError(
                f"{path} holds the CRI plugin's runtimes in a form to which no table can be added",
                f"write it there by hand: runtime_type = {RUNTIME_TYPE!r}; nothing has been changed",
            ) from None
    return [Edit(name, old[name], data) for name, data in contents.items() if data != old[name]], containerd


def uninstall(path: str) -> list[Edit]:
    """Work out the changes that remove everything that `install` wrote.

    Raises:
        ConfigError: A file cannot be read.
    """
    path = os.path.abspath(path)
    raw = read(path)
    if raw is None:
        return []
    text = text_of(raw, path)
    drop_in = _drop_in(_parse(text, path), path)
    edits = []
    for name in (path, drop_in):
        data = read(name) if name else None
        if data is not None and (remains := _cut(text_of(data, name), name)) != data:
            edits.append(Edit(name, data, remains))
    return edits


def is_installed(path: str) -> bool:
    """Whether a configuration, or our file that it imports, has the handler. A quick check for `kata doctor`."""
    try:
        config = _parse(text_of(read(path) or b"", path), path)
    except ConfigError:
        return False
    drop_in = _drop_in(config, path)
    return HANDLER in handlers(config) or (bool(drop_in) and os.path.exists(drop_in))


def check(found: Daemon, path: str, before: dict[str, Any]) -> None:
    """Check that containerd sees the handler, and that nothing else has changed.

    Args:
        found: The daemon.
        path: Its configuration file.
        before: Its dump from before the change.

    Raises:
        ConfigError: The check failed; the caller undoes the change.
    """
    after = found.dump(path)
    handler = handlers(after).get(HANDLER)
    if handler is None or handler.get("runtime_type") != RUNTIME_TYPE:
        raise ConfigError(f"containerd does not see the handler {HANDLER!r} that was written for {path}")
    for dump in (before, after):
        handlers(dump).pop(HANDLER, None)
        # The list of imported files may differ, and nothing else.
        dump.pop("imports", None)
    if before != after:
        names = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
        raise ConfigError(
            f"more than the handler {HANDLER!r} would change for containerd: {', '.join(names)}"
        )


def clear_up(edits: list[Edit]) -> list[str]:
    """Clean up after `uninstall`: remove backups of files that are in their original state, and directories we made.

    Returns:
        Sentences about what is left.
    """
    return remove_backups(edits, _MADE_DIRECTORY)


def handlers(dump: dict[str, Any]) -> dict[str, Any]:
    """The CRI plugin's handlers in a dump or a configuration, by name."""
    plugins = dump.get("plugins") or {}
    found: dict[str, Any] = {}
    for name in ("cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"):
        runtimes = ((plugins.get(name) or {}).get("containerd") or {}).get("runtimes")
        if runtimes:
            found = runtimes
    return found


def _table_name(version: int, handler: str) -> str:
    return f"{_SECTIONS[min(max(version, 1), 3)]}.containerd.runtimes.{handler}"


def _toml(name: str, table: dict[str, Any]) -> str:
    """Write a table whose values are strings, numbers, booleans, lists of strings, and such tables."""
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    # The JSON form of these values is valid TOML.
    lines = [f"  {key} = {json.dumps(value)}\n" for key, value in table.items() if key not in inner]
    more = [_toml(f"{name}.{key}", value) for key, value in inner.items()]
    return "".join([f"[{name}]\n", *lines, *more])


def _table(version: int) -> str:
    return (
        f"[{_table_name(version, HANDLER)}]\n"
        f'  runtime_type = "{RUNTIME_TYPE}"\n'
        '  pod_annotations = ["io.katacontainers.*"]\n'
        "  privileged_without_host_devices = true\n"
        "  privileged_without_host_devices_all_devices_allowed = true\n"  # the guest's; 1.6 takes no notice
    )


def _drop_in(config: dict[str, Any], path: str) -> str:
    """Path of a file of ours that the configuration would import; empty if it imports no directory."""
    for pattern in config.get("imports") or ():
        directory, name = os.path.split(str(pattern))
        if name == "*.toml" and "*" not in directory:
            return os.path.join(os.path.dirname(path), directory, DROP_IN)
    return ""


def _parse(text: str, path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}", "fix that first; the file is unchanged") from None


def _cut(text: str, path: str) -> bytes | None:
    """Return *text* without our block; None if we made the file and it holds nothing else.

    Raises:
        ConfigError: The end of the block is missing.
    """
    start = text.find(_BEGIN)
    if start < 0:
        return text.encode()
    end = text.find(_END + "\n", start)
    if end < 0:
        raise ConfigError(
            f"{path}: the line {_BEGIN!r} is there without the one that ends the block",
            "remove the block by hand",
        )
    first = text[start : text.index("\n", start)]
    before, after = text[:start], text[end + len(_END) + 1 :]
    if first.endswith(_JOINED) and before.endswith("\n") and not after:
        before = before[:-1]
    whole = before + after
    made = first.endswith((_MADE, _MADE_DIRECTORY)) or os.path.basename(path) == DROP_IN
    return None if made and not whole.strip() else whole.encode()
