"""A drop-in of our own in a client's directory of configuration files: written, and removed as it was written.

Podman and CRI-O have such directories, so nobody else's file is changed. The first line says whose the file is, and
whether the directory was made for it.
"""

from __future__ import annotations

import os

from kata.cli.client_edit import Edit, read, remove_backups, text_of
from kata.errors import AlreadyExistsError, ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_MADE_DIRECTORY = ", and the directory that was made for it"


def mark(client: str) -> str:
    """What a drop-in for a client begins with."""
    return f"# Written by `kata install {client}`. `kata uninstall {client}` removes it"


def head(client: str, *, made_directory: bool) -> str:
    """The first line of a drop-in.

    Args:
        client: As `kata install` calls it.
        made_directory: Its directory was made for it, and goes with it.
    """
    return f"{mark(client)}{_MADE_DIRECTORY if made_directory else ''}.\n"


def install(path: str, client: str, content: Callable[[bool], str]) -> list[Edit]:
    """Work out the change that writes a drop-in.

    Args:
        path: The file; it need not exist.
        client: As `kata install` calls it.
        content: Takes whether the directory was made for the file, and gives what is to be in it.

    Returns:
        The change; none if it is there already.

    Raises:
        AlreadyExistsError: There is a file of that name that is not ours.
        ConfigError: The file cannot be read.
    """
    raw = read(path)
    made = not os.path.isdir(os.path.dirname(path))
    if raw is not None:
        if not is_ours(raw, path, client):
            raise AlreadyExistsError(
                f"{path} is there, and not by `kata install`", "remove it first; nothing has been changed"
            )
        made = _MADE_DIRECTORY.encode() in raw
    wanted = content(made).encode()
    return [] if raw == wanted else [Edit(path, raw, wanted)]


def uninstall(path: str, client: str, content: Callable[[bool], str]) -> list[Edit]:
    """Work out the change that removes a drop-in.

    Args:
        path: The file.
        client: As `kata install` calls it.
        content: Gives what was written, with the programs that the file names now.

    Raises:
        ConfigError: The file cannot be read, or has been changed since it was written.
    """
    raw = read(path)
    if raw is None or not is_ours(raw, path, client):
        return []
    if raw != content(_MADE_DIRECTORY.encode() in raw).encode():
        raise ConfigError(
            f"{path} has been changed since `kata install` wrote it", f"look at it, then: rm {path}"
        )
    return [Edit(path, raw, None)]


def clear_up(edits: list[Edit]) -> list[str]:
    """Clean up after `uninstall`; see `client_edit.remove_backups`.

    Args:
        edits: The changes, made.

    Returns:
        Sentences about what is left.
    """
    return remove_backups(edits, _MADE_DIRECTORY)


def is_ours(raw: bytes, path: str, client: str) -> bool:
    """Whether a file's content was written by `install`.

    Raises:
        ConfigError: It is no text.
    """
    return text_of(raw, path).startswith(mark(client))
