"""ClamAV's scanner for a machine: ``clamscan`` and its libraries, out of Debian's packages that are not installed."""

from __future__ import annotations

import os
import re
import shutil

from kata import paths
from kata.errors import GuestAssetError
from kata.guest import extension, packages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = "clamscan"
LOADER = extension.LOADER
_PACKAGE = "clamav"
_LIBRARY = re.compile(r"libclamav\d+\w*")
"""The package with the scanner's own library, whose name has its version. It needs all others that the program needs;
the program's package itself depends on what fetches signatures, and so on half of a system."""


def offered() -> packages.Package:
    """The scanner's package, as apt offers it now.

    Raises:
        GuestAssetError: This machine has no apt, or apt does not know the package.
    """
    if not packages.have_apt():
        raise GuestAssetError(
            "ClamAV's scanner comes from Debian's packages, and this machine has no apt",
            "leave --clamav out, or run this on Debian or Ubuntu",
        )
    return packages.describe(_PACKAGE)


def collect(package: packages.Package, note: Callable[[str], None]) -> dict[str, bytes]:
    """The scanner, the loader and every library that it needs.

    Args:
        package: From `offered`.
        note: Told of downloads.

    Returns:
        Content by file name. All belong into one directory: the loader is told where the libraries are.

    Raises:
        GuestAssetError: A package cannot be had, or they do not have what the program needs.
        ResourceExhaustedError: There is not enough space for the packages.
    """
    work = os.path.join(paths.cache_dir(), f"{_PACKAGE}.{os.getpid()}")
    try:
        for one in (package, *packages.describe_all(_libraries())):
            packages.unpack(packages.fetch(one, note), work)
        files = extension.files_below(work, PROGRAM)
        contents: dict[str, bytes] = {}
        if not all(extension.take(name, files, contents) for name in (PROGRAM, LOADER)):
            raise GuestAssetError(f"Debian's packages do not hold {PROGRAM} with all its libraries")
        return contents
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _libraries() -> list[str]:
    own = [name for name in packages.dependencies(_PACKAGE) if _LIBRARY.fullmatch(name)]
    if not own:
        raise GuestAssetError(f"the package {_PACKAGE} depends on no libclamav", "apt-get update")
    return own + [name for name in packages.dependencies(own[0]) if name.startswith(("lib", "zlib"))]
