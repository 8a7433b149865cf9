"""A machine that was saved: a directory with the monitor's own files, and one of ours with the machine's shape.

Ours is written last: without it nothing was saved.
"""

from __future__ import annotations

import json
import os

from kata.errors import HypervisorError, SavedMachineError
from kata.hypervisor import root
from kata.hypervisor.access import File, make_directory
from kata.hypervisor.base import MachineShape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kata.hypervisor.access import Access

SHAPE = "machine.json"
UNFINISHED = "unfinished"
"""Name of the directory that a machine is in while it is saved."""
_MAX_SHAPE = 1 << 20


def check(directory: str, files: Sequence[str]) -> None:
    """Before a machine is saved: there is room for it.

    Args:
        directory: Where.
        files: Names of the monitor's files.

    Raises:
        HypervisorError: It is no directory, or there is a machine in it.
    """
    if not os.path.isdir(directory):
        raise HypervisorError(f"cannot save the machine: {directory} is no directory")
    if any(os.path.lexists(os.path.join(directory, name)) for name in (*files, SHAPE, UNFINISHED)):
        raise HypervisorError(f"cannot save the machine: there is one in {directory} already")


def write_shape(directory: str, shape: MachineShape) -> None:
    """Write down what machine was saved.

    Raises:
        HypervisorError: There is no room.
    """
    values = {name: getattr(shape, name) for name in shape.__slots__}
    values["options"] = dict(shape.options)
    path = os.path.join(directory, SHAPE)
    try:
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump(values, file)
        os.replace(path + ".new", path)
    except OSError as error:
        raise HypervisorError(f"cannot write {path}: {error.strerror}") from error


def forget(directory: str, files: Sequence[str]) -> None:
    """Remove what was saved, or the part of it that is there."""
    for name in (SHAPE, SHAPE + ".new", *files):
        try:
            os.unlink(os.path.join(directory, name))
        except FileNotFoundError:
            pass


def open_files(directory: str, names: Sequence[str]) -> dict[str, int]:
    """Open what a monitor has saved, for one that reads it by our descriptors.

    Args:
        directory: Where.
        names: Names of the files.

    Returns:
        Descriptors by these names.

    Raises:
        SavedMachineError: One is missing.
    """
    found: dict[str, int] = {}
    try:
        for name in names:
            found[name] = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        for fd in found.values():
            os.close(fd)
        raise SavedMachineError(
            f"cannot use what was saved in {directory}: {error.filename}: {error.strerror}"
        ) from error
    return found


def check_whole(directory: str, names: Sequence[str]) -> None:
    """See to it that what a monitor has saved is there, before anything is given to one that is to go on from it.

    Raises:
        SavedMachineError: A file is missing, or cannot be read.
    """
    for fd in open_files(directory, names).values():
        os.close(fd)


def files(directory: str, names: Sequence[str]) -> list[File]:
    """The same files, for `kata.hypervisor.access`."""
    return [File(name, os.path.join(directory, name)) for name in names]


class receiving:
    """A context in which a running monitor may save its machine.

    Its user may make files in a directory of its own alone, so there is one for the moment in that which is meant.

    Args:
        directory: Where the machine is to be.
        names: Names of the monitor's files.
        access: What the monitor may open.
        root_directory: Its root; empty if that is the host's.
    """

    def __init__(self, directory: str, names: Sequence[str], access: Access, root_directory: str) -> None:
        self._directory = os.path.abspath(directory)
        self._names = names
        self._user = access.user
        self._place = os.path.join(self._directory, UNFINISHED) if access.user else self._directory
        self._mount = root.shown(root_directory, root.STATE, self._place) if root_directory else None

    def __enter__(self) -> str:
        """Returns the directory, as the monitor has it.

        Raises:
            HostError: It cannot be mounted where the monitor finds it.
            HypervisorError: It cannot be made.
        """
        if self._user:
            make_directory(self._place, self._user)
        try:
            return self._mount.__enter__() if self._mount is not None else self._place
        except BaseException:
            self._remove()
            raise

    def __exit__(self, kind: object, *_error: object) -> None:
        if self._mount is not None:
            self._mount.__exit__()
        if not self._user:
            return
        try:
            for name in self._names if kind is None else ():
                made = os.path.join(self._place, name)
                os.chown(made, 0, 0, follow_symlinks=False)
                os.rename(made, os.path.join(self._directory, name))
        except OSError as error:
            raise HypervisorError(f"cannot save the machine: {name}: {error.strerror}") from error
        finally:
            self._remove()

    def _remove(self) -> None:
        import shutil

        if self._user:
            shutil.rmtree(self._place, ignore_errors=True)


def shape_of(directory: str) -> MachineShape:
    """What machine was saved there.

    Raises:
        SavedMachineError: None was, or not all of it.
    """
    values = document(directory, SHAPE, _MAX_SHAPE)
    try:
        return MachineShape(**values)
    except TypeError:
        raise SavedMachineError(f"{os.path.join(directory, SHAPE)} does not describe a machine") from None


def document(directory: str, name: str, limit: int) -> dict[str, Any]:
    """A JSON document of at most so many bytes.

    Raises:
        SavedMachineError: It is not there, or is none.
    """
    path = os.path.join(directory, name)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
        found = json.loads(content) if len(content) <= limit else None
    except FileNotFoundError:
        raise SavedMachineError(
            f"no machine was saved in {directory}: there is no {name}", "kata run starts a new one"
        ) from None
    except OSError as error:
        raise SavedMachineError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SavedMachineError(f"{path} does not describe a machine")
    return found
