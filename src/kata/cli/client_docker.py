"""Adds the runtime ``kata`` to the configuration file of Docker's daemon, and removes it again.

``daemon.json`` has neither comments nor a directory of drop-ins. One member is inserted into its text; everything else
stays as it was written.

Source: Docker's ``dockerd`` reference, "Daemon configuration file" and "Configure container runtimes".
"""

from __future__ import annotations

import json
import re
import shutil

from kata.cli.client_ask import ask, last_words
from kata.cli.client_edit import Edit, read, remove_backups, text_of
from kata.errors import AlreadyExistsError, ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_PATH = "/etc/docker/daemon.json"
NAME = "kata"
VALUE = {"runtimeType": "io.containerd.kata.v2"}
LEAST = 23
"""The first version of Docker that supports shims as runtimes."""
_WHOLE = '{\n  "runtimes": {\n    "kata": {"runtimeType": "io.containerd.kata.v2"}\n  }\n}\n'
_SPACE = re.compile(r"[ \t\r\n]*")


class Daemon:
    """The installed dockerd; *program* is its path."""

    def __init__(self, program: str) -> None:
        self.program = program

    def check(self, path: str) -> None:
        """Let dockerd validate a configuration file.

        Raises:
            ConfigError: dockerd refuses it.
            HostError: dockerd cannot be asked.
        """
        command = [self.program, "--validate", "--config-file", path]
        done = ask(command)
        if done.returncode:
            raise ConfigError(f"dockerd refuses {path}: {last_words(done)}", f"fix {path} first")


def daemon() -> Daemon:
    """Find dockerd on the PATH.

    Raises:
        HostError: There is none, it cannot be asked, or it does not support shims.
    """
    program = shutil.which("dockerd")
    if not program:
        raise HostError("dockerd is not on the PATH", "PATH=/where/it/is:$PATH kata install docker")
    said = ask([program, "--version"]).stdout
    match = re.search(r"version (\d+)\S*", said)
    if match is None or int(match[1]) < LEAST:
        version = match[0].rstrip(",") if match else said.strip()
        raise HostError(
            f"{program} ({version}) does not support shims as runtimes", f"install Docker {LEAST} or newer"
        )
    return Daemon(program)


def install(path: str) -> list[Edit]:
    """Work out the changes that make ``--runtime kata`` work.

    Args:
        path: dockerd's configuration file; it need not exist.

    Returns:
        The changes; none if the runtime is configured already.

    Raises:
        AlreadyExistsError: There is another runtime of that name.
        ConfigError: The file cannot be read or is not a JSON object.
    """
    raw = read(path)
    if raw is None or not raw.strip():
        return [Edit(path, raw, _WHOLE.encode())]
    text = text_of(raw, path)
    have = runtimes(text, path).get(NAME)
    if have == VALUE:
        return []
    if have is not None:
        raise AlreadyExistsError(
            f"{path} has a runtime {NAME!r} already: {json.dumps(have)}",
            "remove that first; nothing has been changed",
        )
    return [Edit(path, raw, _insert(text).encode())]


def uninstall(path: str) -> list[Edit]:
    """Work out the changes that remove the runtime.

    Raises:
        ConfigError: The file cannot be read or is not a JSON object.
    """
    raw = read(path)
    if raw is None or not raw.strip():
        return []
    text = text_of(raw, path)
    if runtimes(text, path).get(NAME) != VALUE:
        return []
    backup = read(Edit(path, raw, raw).backup)
    if backup is not None and (_insert(backup.decode()) if backup.strip() else _WHOLE) == text:
        return [Edit(path, raw, backup)]
    if text == _WHOLE:
        return [Edit(path, raw, None)]
    return [Edit(path, raw, _remove(text).encode())]


clear_up = remove_backups


def runtimes(text: str, path: str) -> dict[str, Any]:
    """The runtimes in a configuration, by name.

    Args:
        text: Content of the configuration.
        path: Where it came from, for errors.

    Raises:
        ConfigError: It is not JSON, not of the form that Docker expects, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ConfigError(f"{path} has the same key twice", "fix that first; the file is unchanged")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", "fix that first; the file is unchanged") from None
    if not isinstance(found, dict) or not isinstance(found.get("runtimes", {}), dict):
        raise ConfigError(f"{path} is not a JSON object with an object 'runtimes'", "the file is unchanged")
    return dict(found.get("runtimes") or {})


def _insert(text: str) -> str:
    """*text* with our runtime as the first member of ``runtimes``."""
    member = f'"{NAME}": {json.dumps(VALUE)}'
    start = _skip(text, 0)
    spans = _members(text, start)
    if "runtimes" not in spans:
        lead = "\n  " if "\n" in text else ""
        return _put(text, start, f'{lead}"runtimes": {{{member}}}', bool(spans))
    inner = spans["runtimes"][1]
    have = _members(text, inner)
    first = min((span[0] for span in have.values()), default=inner + 1)
    return _put(text, inner, text[inner + 1 : first] + member, bool(have))


def _put(text: str, brace: int, member: str, others: bool) -> str:
    return text[: brace + 1] + member + ("," if others else "") + text[brace + 1 :]


def _remove(text: str) -> str:
    """*text* without our runtime, and without ``runtimes`` if that is then empty."""
    spans = _members(text, _skip(text, 0))
    inner = spans["runtimes"][1]
    have = _members(text, inner)
    if len(have) == 1:
        return _without(text, spans, "runtimes")
    return _without(text, have, NAME)


def _without(text: str, spans: dict[str, tuple[int, int, int]], name: str) -> str:
    """*text* without a member of an object, and without the comma that separates it from another member."""
    begin, _, end = spans[name]
    after = _skip(text, end)
    lead = begin
    while text[lead - 1] in " \t\r\n":
        lead -= 1
    if text[after] == ",":
        return text[:lead] + text[after + 1 :]
    if text[lead - 1] == ",":
        lead -= 1
    return text[:lead] + text[end:]


def _members(text: str, brace: int) -> dict[str, tuple[int, int, int]]:
    """The positions of the members of the object at *brace*: (start of the name, start of the value, its end)."""
    found: dict[str, tuple[int, int, int]] = {}
    decoder = json.JSONDecoder()
    at = _skip(text, brace + 1)
    while text[at] != "}":
        name, after = decoder.raw_decode(text, at)
        value = _skip(text, _skip(text, after) + 1)
        _, end = decoder.raw_decode(text, value)
        found[name] = (at, value, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
