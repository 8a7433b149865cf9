"""A machine that was saved: a directory with the monitor's own files, and one of ours with the machine's shape.

Ours is written last: without it nothing was saved.
"""

from __future__ import annotations

import json
import os

from kata.errors import HypervisorError
from kata.hypervisor.base import MachineShape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

SHAPE = "machine.json"
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
    if any(os.path.lexists(os.path.join(directory, name)) for name in (*files, SHAPE)):
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


def shape_of(directory: str) -> MachineShape:
    """What machine was saved there.

    Raises:
        HypervisorError: None was, or not all of it.
    """
    values = document(directory, SHAPE, _MAX_SHAPE)
    try:
        return MachineShape(**values)
    except TypeError:
        raise HypervisorError(f"{os.path.join(directory, SHAPE)} does not describe a machine") from None


def document(directory: str, name: str, limit: int) -> dict[str, Any]:
    """A JSON document of at most so many bytes.

    Raises:
        HypervisorError: It is not there, or is none.
    """
    path = os.path.join(directory, name)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
        found = json.loads(content) if len(content) <= limit else None
    except FileNotFoundError:
        raise HypervisorError(
            f"no machine was saved in {directory}: there is no {name}", "kata run starts a new one"
        ) from None
    except OSError as error:
        raise HypervisorError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise HypervisorError(f"{path} does not describe a machine")
    return found
