"""Uses a distribution's kernel, which is ready in seconds; its drivers are modules in the initrd.

Where there is apt, this is Debian's generic kernel package (the small "cloud" flavour has no 9p, and so no shared
directories without virtiofsd); otherwise it is the host's own kernel.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from typing import Any

from kata.errors import GuestAssetError
from kata.guest import bzimage, kernels, packages, recipe
from kata.guest.modules import Tree, Wanted, parse_list
from kata.guest.progress import Progress

RECIPE_VERSION = 1
"""Part of the cache's key; to be raised when the set of files that are taken from a package changes."""

META_PACKAGE = "linux-image-amd64"

_SMALL = "kata guest build --kernel small"


def obtain(progress: Progress, force: bool = False) -> kernels.Kernel:
    """Return a packaged kernel with the modules that a guest needs.

    Args:
        progress: Reports progress.
        force: Unpack it again even if it is in the cache.

    Raises:
        GuestAssetError: Neither a package nor the host's kernel can be used.
        ResourceExhaustedError: There is not enough space in the cache.
    """
    listed = recipe.read(recipe.MODULES)
    wanted = parse_list(listed, recipe.MODULES)
    if not packages.have_apt():
        return _of_host(wanted, listed, progress, force)
    try:
        package = packages.describe(packages.packaged_kernel(META_PACKAGE))
    except GuestAssetError as error:
        progress.note(f"no packaged kernel ({error.message}); using the host's own")
        try:
            return _of_host(wanted, listed, progress, force)
        except GuestAssetError as other:
            raise GuestAssetError(f"{error.message}; and {other.message}", error.hint) from None
    return _of_package(package, wanted, listed, progress, force)


def _of_package(
    package: packages.Package, wanted: list[Wanted], listed: str, progress: Progress, force: bool
) -> kernels.Kernel:
    def make(work: str) -> dict[str, Any]:
        archive = packages.fetch(package, progress.note)
        opened = os.path.join(work, "package")
        progress.note(f"unpacking {package.name}")
        packages.unpack(archive, opened)
        images = glob.glob(os.path.join(opened, "boot/vmlinuz-*"))
        trees = glob.glob(os.path.join(opened, "lib/modules/*")) + glob.glob(
            os.path.join(opened, "usr/lib/modules/*")
        )
        if len(images) != 1 or len(trees) != 1:
            raise GuestAssetError(
                f"the package {package.name} does not hold one kernel and its modules", _SMALL
            )
        record = _take(images[0], trees[0], wanted, work)
        shutil.rmtree(opened)
        return {**record, "source_package": f"{package.name} {package.version}"}

    return kernels.obtain(_key(package.name, package.version, listed), progress, force, make)


def _of_host(wanted: list[Wanted], listed: str, progress: Progress, force: bool) -> kernels.Kernel:
    release = os.uname().release
    image, tree = f"/boot/vmlinuz-{release}", f"/lib/modules/{release}"
    try:
        stat = os.stat(image)
        with open(image, "rb"):
            pass
    except OSError as error:
        raise GuestAssetError(
            f"the host's kernel {image} cannot be read: {error.strerror}", _SMALL
        ) from None

    def make(work: str) -> dict[str, Any]:
        return {**_take(image, tree, wanted, work), "source_package": f"the host's {image}"}

    return kernels.obtain(_key(release, f"{stat.st_size} {stat.st_mtime_ns}", listed), progress, force, make)


def _key(name: str, version: str, listed: str) -> str:
    parts = (str(RECIPE_VERSION), name, version, listed)
    return "distro-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _take(image: str, tree: str, wanted: list[Wanted], work: str) -> dict[str, Any]:
    """Copy the kernel and the modules into the work directory."""
    with open(image, "rb") as file:
        packed = file.read()
    kernel = bzimage.extract_vmlinux(packed)
    pvh = bzimage.has_pvh_entry(kernel)
    with open(os.path.join(work, kernels.KERNEL), "wb") as file:
        file.write(kernel if pvh else packed)
    modules = Tree(tree).resolve(wanted)
    for path, data in modules:
        target = os.path.join(work, kernels.MODULES, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(data)
    release = os.path.basename(tree)
    return {
        "kind": "distro",
        "boot": "pvh" if pvh else "bzimage",
        "version": release,
        "release": release,
        "config_hash": "",
        "modules": [path for path, _data in modules],
    }
