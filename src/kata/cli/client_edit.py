"""Edits other programs' configuration files: atomically, with a backup, and with a diff to show."""

from __future__ import annotations

import difflib
import os

from kata import sysio
from kata.errors import ConfigError, HostError

BACKUP = ".before-kata"
"""Suffix of a file's backup: its content before the first change."""


class Edit:
    """The change of one file.

    Args:
        path: The file. A symbolic link is followed: its target is changed.
        before: Its present bytes; None if it does not exist.
        after: Its new bytes; None removes the file.
    """

    def __init__(self, path: str, before: bytes | None, after: bytes | None) -> None:
        self.path = os.path.realpath(path)
        self.before = before
        self.after = after
        self._made: list[str] = []

    @property
    def backup(self) -> str:
        """Path of the backup."""
        return self.path + BACKUP

    def diff(self) -> str:
        """The unified difference, as ``diff -u`` prints it."""
        old, new = (_lines(data) for data in (self.before, self.after))
        was, becomes = (self.path if data is not None else os.devnull for data in (self.before, self.after))
        shown = []
        for line in difflib.unified_diff(old, new, was, becomes):
            shown.append(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n")
        return "".join(shown)

    def apply(self, *, keep_backup: bool = False) -> None:
        """Make the change.

        Args:
            keep_backup: Write a backup first, unless there is one already.

        Raises:
            HostError: The file cannot be written; it is unchanged.
        """
        try:
            if keep_backup and self.before is not None and not os.path.exists(self.backup):
                _replace(self.backup, self.before, self.path)
            if self.after is None:
                os.unlink(self.path)
            else:
                self._make_directories(os.path.dirname(self.path))
                _replace(self.path, self.after, self.path)
        except OSError as error:
            raise HostError(
                f"cannot change {error.filename or self.path}: {error.strerror}", "the file is unchanged"
            ) from None

    def _make_directories(self, directory: str) -> None:
        if not os.path.isdir(directory):
            self._make_directories(os.path.dirname(directory))
            os.mkdir(directory, 0o755)
            self._made.append(directory)

    def revert(self) -> None:
        """Undo the change, and remove the backup and the directories that were made for it.

        Raises:
            HostError: The file cannot be written.
        """
        Edit(self.path, self.after, self.before).apply()
        remove_backup(self.path)
        for directory in reversed(self._made):
            os.rmdir(directory)


def remove_backup(path: str) -> None:
    """Remove the backup of a file that is in its original state."""
    try:
        os.unlink(os.path.realpath(path) + BACKUP)
    except FileNotFoundError:
        pass


def read(path: str) -> bytes | None:
    """Read a file; None if it does not exist.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", "name another one with --config"
        ) from None


def remove_backups(edits: list[Edit], made_directory: str = "") -> list[str]:
    """Clean up after `uninstall`: remove the backups of files that are in their original state, and directories.

    Args:
        edits: The changes, made.
        made_directory: What a file contains whose directory was made for it; that goes, too, if it is empty.

    Returns:
        Sentences about what is left.
    """
    for edit in edits:
        if made_directory and edit.after is None and made_directory.encode() in (edit.before or b""):
            try:
                os.rmdir(os.path.dirname(edit.path))
            except OSError:
                pass  # others have put something there
    said = []
    for edit in edits:
        backup = read(edit.backup)
        if backup is not None and backup == edit.after:
            remove_backup(edit.path)
        elif backup is not None:
            said.append(f"{edit.backup} stays: {edit.path} has been changed by others since it was made")
    return said


def text_of(data: bytes, path: str) -> str:
    """Decode *data*, the content of the file *path*.

    Args:
        data: Content of a file.
        path: Its path, for errors.

    Raises:
        ConfigError: It is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: {error}", "fix that first; the file is unchanged"
        ) from None


def _lines(data: bytes | None) -> list[str]:
    return (data or b"").decode(errors="replace").splitlines(keepends=True)


def _replace(path: str, data: bytes, like: str) -> None:
    """Replace a file by *data* atomically, with the mode and owner of the file *like* if that exists."""
    try:
        status = os.stat(like)
    except FileNotFoundError:
        sysio.replace_file(path, data, mode=0o644, fsync=True)
    else:
        owner = (status.st_uid, status.st_gid)
        sysio.replace_file(path, data, mode=status.st_mode & 0o7777, owner=owner, fsync=True)
