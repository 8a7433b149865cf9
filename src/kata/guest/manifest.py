"""Reads ``guest.json``, which names the kernel and initrd of virtual machines.

Every container start reads it, so this module imports and checks no more than necessary.
"""

from __future__ import annotations

import os

from kata import paths
from kata.errors import GuestAssetError
from kata.json_text import loads

NAME = "guest.json"
FORMAT = 1
BOUNCE_PATCH = "virtio-fs-by-bounce-pages.patch"
_BUILD = "kata guest build"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


SHELL = "shell"
"""The extension (see `kata.guest.extension`) that has the debug console's shell."""


class Guest:
    """The guest of a directory.

    Attributes:
        directory: Where it is.
        kernel: Path of the kernel.
        initrd: Path of the initrd.
        kernel_kind: ``"small"`` (built here) or ``"distro"`` (a distribution's).
        kernel_version: For example ``6.12.117``.
        agent_version: Version of the agent.
        bounces: Whether the kernel lets a virtio-fs device use bounce pages, without which an emulated machine cannot
            have one (``guest/virtio-fs-by-bounce-pages.patch``).
        scans_ports: Whether the agent finds a share that is plugged into a port, where nothing announces that
            (`agent/src/pci_scan.rs`).
        content: The whole manifest.
    """

    __slots__ = (
        "agent_version",
        "bounces",
        "content",
        "directory",
        "initrd",
        "kernel",
        "kernel_kind",
        "kernel_version",
        "scans_ports",
    )

    def __init__(self, directory: str, content: dict[str, Any]) -> None:
        kernel, initrd = content["kernel"], content["initrd"]
        self.directory = directory
        self.content = content
        self.kernel = os.path.join(directory, kernel["path"])
        self.initrd = os.path.join(directory, initrd["path"])
        self.kernel_kind: str = kernel["kind"]
        self.kernel_version: str = kernel["version"]
        self.agent_version: str = initrd["agent_version"]
        self.bounces = BOUNCE_PATCH in kernel.get("patches", ())
        self.scans_ports = initrd.get("scans_ports") is True

    def has_extension(self, name: str) -> bool:
        """Whether the guest was built with an extension."""
        return name in self.content.get("extensions", {})

    def extension(self, name: str) -> str:
        """Path of an extension (see `kata.guest.extension`) that was built with the guest.

        Raises:
            GuestAssetError: It was not built, or no longer exists.
        """
        facts = self.content.get("extensions", {}).get(name)
        build = f"{_BUILD} --extension {name}"
        if facts is None:
            raise GuestAssetError(f"the guest was built without the extension {name!r}", build)
        path = os.path.join(os.path.dirname(self.initrd), facts["path"])
        try:
            whole = os.stat(path).st_size == facts["size"]
        except OSError:
            whole = False
        if not whole:
            raise GuestAssetError(f"the guest's extension {path} is not there as it was built", build)
        return path


def installed() -> Guest:
    """The guest of this machine: the one that `kata guest build` has made, or else the one that came with kata.

    Raises:
        GuestAssetError: There is neither, or it is incomplete.
    """
    directory = paths.guest_dir()
    if not os.environ.get("KATA_GUEST_DIR") and not os.path.exists(os.path.join(directory, NAME)):
        came_along = paths.shipped("guest")
        if os.path.exists(os.path.join(came_along, NAME)):
            directory = came_along
    return load(directory)


def load(directory: str) -> Guest:
    """Read the manifest, and check that the two files exist with their recorded sizes.

    Args:
        directory: The guest directory.

    Raises:
        GuestAssetError: No guest was built, or it is incomplete.
    """
    path = os.path.join(directory, NAME)
    try:
        with open(path, "rb") as file:
            content = loads(file.read())
    except FileNotFoundError:
        raise GuestAssetError(f"there is no guest to boot: {path} does not exist", _BUILD) from None
    except OSError as error:
        raise GuestAssetError(f"cannot read the guest's manifest {path}: {error.strerror}", _BUILD) from None
    except ValueError:
        raise GuestAssetError(
            f"the guest's manifest {path} is not valid JSON", f"{_BUILD} --force"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise GuestAssetError(f"the guest's manifest {path} was written by another version of kata", _BUILD)
    try:
        guest = Guest(directory, content)
        sizes = (
            ("kernel", guest.kernel, content["kernel"]["size"]),
            ("initrd", guest.initrd, content["initrd"]["size"]),
        )
    except (KeyError, TypeError):
        raise GuestAssetError(f"the guest's manifest {path} is incomplete", f"{_BUILD} --force") from None
    for which, file_path, size in sizes:
        try:
            actual_size = os.stat(file_path).st_size
        except OSError as error:
            raise GuestAssetError(
                f"the guest's {which} {file_path} cannot be used: {error.strerror}", _BUILD
            ) from None
        if actual_size != size:
            raise GuestAssetError(
                f"the guest's {which} {file_path} is damaged: it has {actual_size} bytes and was built with {size}",
                f"{_BUILD} --force",
            )
    return guest
