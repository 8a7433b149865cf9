"""Downloads and unpacks Debian packages without installing them: kernel sources and packaged kernels.

``apt-get`` finds, downloads and authenticates them with the machine's own sources; nothing is added to the
machine's package database.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Callable

from kata import paths
from kata.errors import GuestAssetError, ResourceExhaustedError
from kata.guest.kernels import UNUSED_S

BUILD_PACKAGES = [
    *("bc", "binutils", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "make"),
    *("patch", "perl", "tar", "xz-utils"),
]
"""The Debian packages that are needed to build the small kernel."""

BUILD_PROGRAMS = ["bc", "bison", "flex", "gcc", "ld", "make", "patch", "perl", "strip", "tar", "xz"]
"""Programs of those packages, whose presence is checked before a build starts."""

# The unprivileged user that apt would switch to may not enter the cache; signatures are checked in any case.
_AS_ROOT = ("-o", "APT::Sandbox::User=root")

_URI_LINE = re.compile(
    r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) (?P<kind>[A-Za-z0-9]+):(?P<digest>[0-9a-f]+)$"
)


class Package:
    """One package file as apt would fetch it.

    Attributes:
        name: Package name.
        version: Debian version.
        file: Name of the ``.deb`` file.
        size: Its size in bytes.
        digest: (algorithm as `hashlib` names it, hexadecimal digest).
    """

    __slots__ = ("digest", "file", "name", "size", "version")

    def __init__(self, name: str, version: str, file: str, size: int, digest: tuple[str, str]) -> None:
        self.name = name
        self.version = version
        self.file = file
        self.size = size
        self.digest = digest


def have_apt() -> bool:
    """Whether this machine has apt and dpkg, so that Debian packages can be fetched."""
    return all(shutil.which(program) for program in ("apt-get", "apt-cache", "dpkg-deb"))


def missing_build_programs() -> list[str]:
    """The programs that a kernel build needs and that are not on the PATH."""
    return [program for program in BUILD_PROGRAMS if shutil.which(program) is None]


def newest_source() -> str:
    """The name of the newest ``linux-source-6.*`` package that apt knows.

    Raises:
        GuestAssetError: There is none, or apt fails.
    """
    names = _output(["apt-cache", "pkgnames", "linux-source-6."], "look for kernel sources").split()
    numbered = [
        (int(match[1]), name) for name in names if (match := re.fullmatch(r"linux-source-6\.(\d+)", name))
    ]
    for _minor, name in sorted(numbered, reverse=True):
        if _candidate(name):
            return name
    raise GuestAssetError(
        "apt knows no package linux-source-6.*, from which the small guest kernel is built",
        "apt-get update, or use the distribution's kernel: kata guest build --kernel distro",
    )


def packaged_kernel(meta: str) -> str:
    """The package that a kernel's meta-package stands for today.

    Args:
        meta: For example ``linux-image-amd64``.

    Raises:
        GuestAssetError: apt does not know it, or it depends on no kernel.
    """
    record = _output(["apt-cache", "show", "--no-all-versions", meta], f"look up {meta}")
    for line in record.splitlines():
        if line.startswith("Depends:"):
            for alternative in re.split(r"[,|]", line.partition(":")[2]):
                name = alternative.split("(")[0].strip()
                if name.startswith("linux-image-"):
                    return name
    raise GuestAssetError(f"the package {meta} depends on no kernel package", "apt-get update")


def describe(name: str) -> Package:
    """Return what apt would download for a package.

    Raises:
        GuestAssetError: apt knows no such package, or none that can be downloaded.
    """
    return describe_all([name])[0]


def describe_all(names: list[str]) -> list[Package]:
    """The same of several packages, in one question to apt, in the order of their names here.

    Raises:
        GuestAssetError: apt knows no such package, or none that can be downloaded.
    """
    shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    answer = _output(["apt-get", "download", "--print-uris", *names], f"find the package {shown}")
    found = {}
    for line in answer.splitlines():
        match = _URI_LINE.match(line.strip())
        if match is None:
            continue
        # The file name is name_version_architecture.deb, with the version's odd characters percent-encoded.
        name, version = match["file"].split("_")[:2]
        version = urllib.parse.unquote(version)
        kind = match["kind"].lower().replace("md5sum", "md5")
        found[name] = Package(name, version, match["file"], int(match["size"]), (kind, match["digest"]))
    for name in names:
        if name not in found:
            raise GuestAssetError(f"apt offers no file for the package {name}", "apt-get update")
    return [found[name] for name in names]


def dependencies(name: str) -> list[str]:
    """The packages that one depends on, directly or not, sorted; packages that only a name stands for are left out.

    Raises:
        GuestAssetError: apt fails.
    """
    without = [
        f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    ]
    answer = _output(
        ["apt-cache", "depends", "--recurse", *without, name], f"look up what {name} depends on"
    )
    # A package begins a line, "<name>" stands for one that others provide, "name:i386" is of another architecture.
    found = {line.strip() for line in answer.splitlines() if re.match(r"[a-z0-9][^:]*$", line)}
    return sorted(found - {name})


def fetch(package: Package, note: Callable[[str], None]) -> str:
    """Download a package into the cache, unless it is there already.

    Args:
        package: From `describe`.
        note: Told in a few words what is going on, when something is.

    Returns:
        The path of the ``.deb`` file.

    Raises:
        GuestAssetError: The download failed or what arrived is not what apt announced.
        ResourceExhaustedError: No room for it.
    """
    directory = os.path.join(paths.cache_dir(), "packages")
    os.makedirs(directory, exist_ok=True)
    target = os.path.join(directory, package.file)
    if _matches(target, package):
        os.utime(target, (time.time(), os.stat(target).st_mtime))
        return target
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name.endswith(".deb") and time.time() - os.stat(path).st_atime > UNUSED_S:
            os.unlink(path)
    note(f"downloading {package.name} {package.version} ({package.size / 1e6:.0f} MB)")
    work = os.path.join(directory, f".{os.getpid()}.part")
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    try:
        _output(
            ["apt-get", "-q", *_AS_ROOT, "download", f"{package.name}={package.version}"],
            f"download the package {package.name}",
            directory=work,
        )
        arrived = [os.path.join(work, file) for file in os.listdir(work) if file.endswith(".deb")]
        if len(arrived) != 1 or not _matches(arrived[0], package):
            raise GuestAssetError(
                f"the downloaded {package.file} is not what apt announced", "apt-get update"
            )
        os.rename(arrived[0], target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def unpack(deb: str, directory: str) -> None:
    """Unpack a package's files below a directory.

    Raises:
        GuestAssetError: The package cannot be read.
        ResourceExhaustedError: No room for it.
    """
    os.makedirs(directory, exist_ok=True)
    _output(["dpkg-deb", "-x", deb, directory], f"unpack {os.path.basename(deb)}")


def _matches(path: str, package: Package) -> bool:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != package.size:
                return False
            kind, wanted = package.digest
            return hashlib.file_digest(file, kind).hexdigest() == wanted
    except FileNotFoundError:
        return False


def _candidate(name: str) -> bool:
    policy = _output(["apt-cache", "policy", name], f"look up {name}")
    return re.search(r"^ *Candidate: \d", policy, re.MULTILINE) is not None


def _output(argv: list[str], what: str, directory: str | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            argv,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise GuestAssetError(f"cannot {what}: there is no {argv[0]} on this machine") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if "No space left" in done.stderr:
            raise ResourceExhaustedError(
                f"cannot {what}: no space left in {paths.cache_dir()}", "set KATA_CACHE_DIR to a larger disk"
            )
        why = lines[-1].removeprefix("E: ") if lines else f"{argv[0]} ended with status {done.returncode}"
        raise GuestAssetError(f"cannot {what}: {why}", "check the network and `apt-get update`")
    return done.stdout
