"""The guest's initrd with the archives behind it that are asked for: Linux unpacks one after the other."""

from __future__ import annotations

import os

from kata.errors import GuestAssetError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.hypervisor.base import MachineShape

NAME = "initrd"


def whole(shape: MachineShape, run_dir: str) -> str:
    """The path of the one file that the monitor is to load.

    Args:
        shape: The machine's.
        run_dir: The sandbox's directory: an initrd that has to be put together is written there, and goes with it.

    Raises:
        GuestAssetError: An archive cannot be read, or there is no room.
    """
    if not shape.extensions:
        return shape.initrd
    path = os.path.join(run_dir, NAME)
    try:
        with open(path, "wb") as target:
            for part in (shape.initrd, *shape.extensions):
                with open(part, "rb") as source:
                    data = source.read()
                target.write(data + bytes(-len(data) % 512))
    except OSError as error:
        raise GuestAssetError(
            f"cannot put the guest's initrd together: {error.filename or path}: {error.strerror}",
            "kata guest build; the sandbox's directory needs room for it (KATA_RUN_DIR)",
        ) from None
    return path
