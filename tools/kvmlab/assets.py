"""The lab's kernel, modules and initrd: made once from Debian's packages, kept in ``$KATA_CACHE_DIR/kvm-lab``.

::

    kvm-lab/<package>_<version>_<recipe>/vmlinux              the kernel, uncompressed: it starts seconds earlier
                                lib/modules/<release>  the part of its modules that a lab may want
                                initrd-<digest>      busybox, the modules that are always there, init.sh, inside.py

Nothing is installed. A lab starts from what is there without asking any server; `build` with ``renew`` looks
for a newer kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kata import paths
from kata.errors import GuestAssetError, HostError
from kata.guest import bzimage, cpio, modules, packages

META_PACKAGE = "linux-image-amd64"
HERE = Path(__file__).resolve().parent
# Part of the modules package: drivers of real hardware are most of its 400 MB, and there is none in a lab.
_KEPT = (
    "arch",
    "block",
    "crypto",
    "drivers/acpi",
    "drivers/block",
    "drivers/char",
    "drivers/crypto/ccp",  # kvm_amd needs it
    "drivers/dax",
    "drivers/firmware",
    "drivers/md",
    "drivers/net",
    "drivers/nvdimm",
    "drivers/vhost",
    "drivers/virtio",
    "fs",
    "lib",
    "net",
    "virt",
)
_DROPPED = (
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/net/wwan",
    "drivers/net/can",
    "drivers/net/usb",
)
# A kernel's directory with another part of the modules is another directory.
_RECIPE = hashlib.sha256(repr((_KEPT, _DROPPED)).encode()).hexdigest()[:8]


class Assets:
    """What a lab boots.

    Attributes:
        kernel: Path of its vmlinux.
        initrd: Path of its initrd.
        release: The kernel's release, as ``uname -r`` in the lab will say.
    """

    __slots__ = ("initrd", "kernel", "release")

    def __init__(self, kernel: Path, initrd: Path, release: str) -> None:
        self.kernel = kernel
        self.initrd = initrd
        self.release = release


def directory() -> Path:
    """Where the lab's files are kept: those of this Debian, whose QEMU can run its kernel.

    (Debian 13's QEMU 10 hangs in the boot of Debian 12's kernel 6.1.192; a cache may be several machines'.)
    """
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "debian")
    return Path(paths.cache_dir(), "kvm-lab", suite)


def available() -> bool:
    """Whether a lab can start without fetching a kernel."""
    return _newest() is not None


def build(note: Callable[[str], None], renew: bool = False) -> Assets:
    """Find the lab's files, and make what is missing.

    Args:
        note: Told in a few words what takes long.
        renew: Ask apt for the newest kernel although there is one.

    Raises:
        GuestAssetError: A package cannot be fetched or is not what it should be.
        HostError: A program for unpacking is missing.
    """
    place = directory()
    place.mkdir(parents=True, exist_ok=True)
    with _lock(place / ".lock"):
        kernel = None if renew else _newest()
        if kernel is None:
            kernel = _fetch_kernel(place, note)
        release = _release(kernel)
        initrd = _initrd(kernel, release, note)
    return Assets(kernel / "vmlinux", initrd, release)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Two first labs at once: one makes the files, the other waits."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _newest() -> Path | None:
    """The kernel that was fetched last; its directory appears by a rename, so it is whole."""
    found = [entry for entry in directory().glob(f"*_{_RECIPE}") if (entry / "vmlinux").exists()]
    return max(found, key=lambda entry: entry.stat().st_mtime, default=None)


def _release(kernel: Path) -> str:
    return next((kernel / "lib/modules").iterdir()).name


def _fetch_kernel(place: Path, note: Callable[[str], None]) -> Path:
    if not packages.have_apt():
        raise HostError(
            "the KVM lab's kernel comes from a Debian package, and this machine has no apt-get and dpkg-deb",
            "Use a Debian machine, or one whose own KVM works (kata doctor).",
        )
    if shutil.which("depmod", path=_SBIN) is None:
        raise HostError("the KVM lab needs depmod for its kernel's modules", "apt-get install kmod")
    package = packages.describe(packages.packaged_kernel(META_PACKAGE))
    target = place / f"{package.name}_{package.version}_{_RECIPE}"
    if (target / "vmlinux").exists():
        os.utime(target)
        return target
    deb = packages.fetch(package, note)
    note(f"unpacking {package.name} for the KVM lab")
    work = Path(tempfile.mkdtemp(prefix=".", dir=place))
    try:
        packages.unpack(deb, str(work / "package"))
        image = next((work / "package/boot").glob("vmlinuz-*"))
        vmlinux = bzimage.extract_vmlinux(image.read_bytes())
        if not bzimage.has_pvh_entry(vmlinux):
            raise GuestAssetError(f"the kernel of {package.name} has no PVH entry point")
        new = work / "new"
        new.mkdir(mode=0o755)
        (new / "vmlinux").write_bytes(vmlinux)
        release = image.name.removeprefix("vmlinuz-")
        # Since Debian 13 the modules lie below /usr.
        tree = next(
            path
            for top in ("lib", "usr/lib")
            if (path := work / "package" / top / "modules" / release).is_dir()
        )
        _copy_modules(tree, new / "lib/modules" / release)
        _run(["depmod", "-b", str(new), release], "depmod")
        os.rename(new, target)
        os.utime(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


_SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"


def _copy_modules(source: Path, target: Path) -> None:
    for part in _KEPT:
        if (source / "kernel" / part).is_dir():
            shutil.copytree(
                source / "kernel" / part,
                target / "kernel" / part,
                ignore=lambda where, names: [
                    name
                    for name in names
                    if os.path.relpath(f"{where}/{name}", source / "kernel") in _DROPPED
                ],
            )
    for file in source.glob("modules.*"):
        shutil.copy2(file, target)


def _run(argv: list[str], what: str) -> None:
    program = shutil.which(argv[0], path=_SBIN) or argv[0]
    done = subprocess.run(
        [program, *argv[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise GuestAssetError(f"{what} failed: {done.stderr.strip()[-300:]}")


def _initrd(kernel: Path, release: str, note: Callable[[str], None]) -> Path:
    busybox = _static_busybox(note)
    listed = (HERE / "modules.list").read_text()
    files = {name: (HERE / name).read_bytes() for name in ("init.sh", "inside.py", "frames.py")}
    tree = kernel / "lib/modules" / release
    digest = hashlib.sha256()
    for part in (busybox, listed.encode(), str(tree).encode(), *files.values()):
        digest.update(hashlib.sha256(part).digest())
    path = kernel / f"initrd-{digest.hexdigest()[:16]}"
    if path.exists():
        return path
    archive = cpio.Archive()
    for name in ("bin", "dev", "lower", "proc", "root", "sys", "upper"):
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox, 0o755)
    archive.symlink("bin/sh", "busybox")
    archive.file("init", files["init.sh"], 0o755)
    archive.file("inside.py", files["inside.py"])
    archive.file("frames.py", files["frames.py"])
    order = []
    wanted = modules.parse_list(listed, str(HERE / "modules.list"))
    for relative, data in modules.Tree(str(tree)).resolve(wanted):
        name = os.path.basename(relative)
        archive.file(f"modules/{name}", data)
        order.append(name)
    archive.file("modules/order", "".join(f"{name}\n" for name in order).encode())
    archive.file("modules/tree", f"{tree}\n".encode())
    aside = path.with_name(f".{path.name}")
    aside.write_bytes(archive.finish())
    os.rename(aside, path)
    # Those of earlier versions of this tool; a lab that is just starting from one has it open or starts again.
    others = sorted(kernel.glob("initrd-*"), key=lambda entry: entry.stat().st_mtime)
    for old in others[:-4]:
        old.unlink(missing_ok=True)
    return path


def _static_busybox(note: Callable[[str], None]) -> bytes:
    """A busybox that needs no libraries: the machine's if it is one, else out of Debian's package."""
    for path in ("/bin/busybox", "/usr/bin/busybox"):
        try:
            data = Path(path).read_bytes()
        except OSError:
            continue
        if _is_static(data):
            return data
    with tempfile.TemporaryDirectory(prefix=".", dir=directory()) as work:
        packages.unpack(packages.fetch(packages.describe("busybox-static"), note), work)
        for relative in ("bin/busybox", "usr/bin/busybox"):
            if Path(work, relative).exists():
                return Path(work, relative).read_bytes()
    raise GuestAssetError(
        "Debian's package busybox-static holds no busybox", "apt-get install busybox-static"
    )


def _is_static(elf: bytes) -> bool:
    """Whether an ELF-64 program asks for no interpreter (its dynamic linker)."""
    if elf[:5] != b"\x7fELF\x02":
        return False
    table = int.from_bytes(elf[32:40], "little")
    size, count = int.from_bytes(elf[54:56], "little"), int.from_bytes(elf[56:58], "little")
    interpreter = 3
    return all(
        int.from_bytes(elf[at : at + 4], "little") != interpreter
        for at in range(table, table + size * count, size)
    )
