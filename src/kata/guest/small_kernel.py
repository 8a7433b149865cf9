"""Builds the small guest kernel from Debian's ``linux-source`` package.

Monolithic, with what a container host needs and nothing else (``guest/kernel.config``), kept as the uncompressed
ELF file: it is entered directly (PVH), and there is nothing to decompress in the guest.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections import deque
from typing import Any

from kata.errors import GuestAssetError, ResourceExhaustedError
from kata.guest import bzimage, kernels, packages, recipe
from kata.guest.progress import Progress

RECIPE_VERSION = 1
"""Part of the cache's key; to be raised when a change of the steps below changes the result."""

_USUAL_STEPS = 2450
"""Number of lines that make prints in a whole build, until it is known from an earlier build."""

_ROOM = 3 << 30
"""Space, in bytes, for sources and objects during a build."""

_HINT_FAILED = "the distribution's kernel needs no build: kata guest build --kernel distro"

# Sources of drivers that no guest has, half of the tree. Their Kconfig files stay: others refer to them.
_LEFT_OUT = (
    "*/Documentation/*.rst",
    "*/Documentation/*.yaml",
    "*/drivers/gpu/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/drivers/staging/*.[ch]",
    "*/sound/*.[ch]",
    "*/arch/arm/*.dts*",
    "*/arch/arm64/*.dts*",
    "*/tools/testing/*.[ch]",
)


def key_of(source: packages.Package, rules: list[recipe.Rule], patches: list[tuple[str, str]]) -> str:
    """The key of the kernel in the cache, derived from all its inputs without comments."""
    changes = [diff[diff.find("--- a/") :] for _name, diff in patches]
    lines = [f"{rule} {rule.since}" for rule in rules]
    parts = (str(RECIPE_VERSION), source.name, source.version, *lines, *changes)
    return "small-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def find_source() -> packages.Package:
    """The newest kernel source that apt offers.

    Raises:
        GuestAssetError: There is no apt, or no such package.
    """
    if not packages.have_apt():
        raise GuestAssetError(
            "the small guest kernel is built from a Debian package, and this machine has no apt",
            "kata guest build --kernel distro",
        )
    return packages.describe(packages.newest_source())


def cached() -> kernels.Kernel | None:
    """The small kernel that `obtain` would return without a build; None if it has to be built."""
    try:
        return kernels.find(key_of(find_source(), _rules(), recipe.patches()))
    except GuestAssetError:
        return None


def obtain(progress: Progress, force: bool = False) -> kernels.Kernel:
    """The small kernel, from the cache or built now, which takes minutes.

    Args:
        progress: Told what is going on.
        force: Build it although it is in the cache.

    Raises:
        GuestAssetError: It cannot be built; says why, with the end of the build's output.
        ResourceExhaustedError: Too little room in the cache.
    """
    source = find_source()
    rules = _rules()
    patches = recipe.patches()

    def make(work: str) -> dict[str, Any]:
        return _build(source, rules, patches, work, progress)

    return kernels.obtain(key_of(source, rules, patches), progress, force, make)


def _rules() -> list[recipe.Rule]:
    return recipe.parse(recipe.read(recipe.CONFIGURATION))


def _build(
    source: packages.Package,
    rules: list[recipe.Rule],
    patches: list[tuple[str, str]],
    work: str,
    progress: Progress,
) -> dict[str, Any]:
    missing = packages.missing_build_programs()
    if missing:
        raise GuestAssetError(
            f"building a kernel needs programs that are not installed: {', '.join(missing)}",
            f"apt-get install {' '.join(packages.BUILD_PACKAGES)}",
        )
    free = shutil.disk_usage(work).free
    if free < _ROOM:
        raise ResourceExhaustedError(
            f"building a kernel needs {_ROOM >> 30} GiB in {kernels.directory()}, and {free >> 20} MiB are free",
            "set KATA_CACHE_DIR to a larger disk, or: kata guest build --kernel distro",
        )
    began = time.monotonic()
    archive = packages.fetch(source, progress.note)
    tree = _unpack(archive, work, progress)
    log = os.path.join(work, "build.log")
    version = _version(tree)
    applied = [name for name, diff in patches if _patch(tree, name, diff, progress)]
    applicable_rules = recipe.applicable(rules, version)
    seed = os.path.join(work, "wanted.config")
    with open(seed, "w", encoding="utf-8") as file:
        file.write(recipe.render(applicable_rules))
    environment = _environment(archive, seed)
    _make(["allnoconfig"], tree, environment, log, None, 0)
    with open(os.path.join(tree, ".config"), encoding="utf-8") as file:
        result = file.read()
    lost = recipe.broken(applicable_rules, result)
    if lost:
        raise GuestAssetError(
            f"{source.name} {source.version} does not take these lines of {recipe.CONFIGURATION}: "
            + ", ".join(map(str, lost)),
            "an option that they depend on is off, or they have another name in this version",
        )
    progress.start(f"building Linux {version[0]}.{version[1]}")
    try:
        steps = _make(["vmlinux"], tree, environment, log, progress, _expected_steps())
    finally:
        progress.stop()
    built = os.path.join(tree, "vmlinux")
    release = _first_line(os.path.join(tree, "include", "config", "kernel.release"))
    _run(["strip", "--strip-all", "-o", os.path.join(work, kernels.KERNEL), built], "strip the kernel")
    with open(os.path.join(work, kernels.KERNEL), "rb") as image:
        if not bzimage.has_pvh_entry(image.read()):
            raise GuestAssetError("the kernel that was built has no PVH entry", _HINT_FAILED)
    shutil.copyfile(os.path.join(tree, ".config"), os.path.join(work, "config"))
    shutil.rmtree(os.path.dirname(tree))
    os.unlink(seed)
    return {
        "kind": "small",
        "boot": "pvh",
        "version": release,
        "release": release,
        "config_hash": hashlib.sha256(result.encode()).hexdigest()[:16],
        "source_package": f"{source.name} {source.version}",
        "patches": applied,
        "steps": steps,
        "seconds": round(time.monotonic() - began),
    }


def _unpack(archive: str, work: str, progress: Progress) -> str:
    """Unpack the package and the sources in it. Returns the path of the source tree."""
    progress.note("unpacking the kernel's sources")
    opened = os.path.join(work, "package")
    packages.unpack(archive, opened)
    found = glob.glob(os.path.join(opened, "usr/src/linux-source-*.tar.xz"))
    if len(found) != 1:
        raise GuestAssetError(f"{os.path.basename(archive)} holds no kernel sources where they are expected")
    sources = os.path.join(work, "source")
    os.mkdir(sources)
    leave_out = [f"--exclude={pattern}" for pattern in _LEFT_OUT]
    _run(["tar", "-C", sources, *leave_out, "-xJf", found[0]], "unpack the kernel's sources")
    shutil.rmtree(opened)
    trees = os.listdir(sources)
    if len(trees) != 1:
        raise GuestAssetError(f"{os.path.basename(found[0])} is not one source tree")
    return os.path.join(sources, trees[0])


def _patch(tree: str, name: str, diff: str, progress: Progress) -> bool:
    """Apply a patch. One that does not fit this version is skipped, since all patches only save time."""
    command = [
        "patch",
        "-p1",
        "--forward",
        "--force",
        "--quiet",
        "--no-backup-if-mismatch",
        "--reject-file=-",
    ]
    for options in (["--dry-run"], []):
        done = subprocess.run(
            [*command, *options], cwd=tree, input=diff, capture_output=True, text=True, check=False
        )
        if done.returncode:
            progress.note(f"{name} does not fit this kernel and is left out")
            return False
    return True


def _version(tree: str) -> tuple[int, int]:
    with open(os.path.join(tree, "Makefile"), encoding="utf-8") as file:
        head = file.read(2000)
    numbers = [re.search(rf"^{name} = (\d+)$", head, re.MULTILINE) for name in ("VERSION", "PATCHLEVEL")]
    if not all(numbers):
        raise GuestAssetError("the kernel's Makefile does not say which version it is")
    major, minor = (int(match[1]) for match in numbers if match)
    return major, minor


def _environment(archive: str, seed: str) -> dict[str, str]:
    """The environment of make: nothing of ours (we may be run by a make), and no facts about this machine."""
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": "/",
        "LC_ALL": "C",
        "KCONFIG_ALLCONFIG": seed,
        "KBUILD_BUILD_USER": "kata",
        "KBUILD_BUILD_HOST": "guest",
        "KBUILD_BUILD_VERSION": "1",
        "KBUILD_BUILD_TIMESTAMP": time.strftime("%Y-%m-%d", time.gmtime(os.stat(archive).st_mtime)),
    }


def _make(
    goals: list[str],
    tree: str,
    environment: dict[str, str],
    log: str,
    progress: Progress | None,
    expected: int,
) -> int:
    """Run make in the tree, its output going to the log; the number of lines that it printed.

    Raises:
        GuestAssetError: It failed; the end of its output is in the message.
    """
    jobs = len(os.sched_getaffinity(0))
    command = ["nice", "make", f"-j{jobs}", "ARCH=x86_64", *goals]
    tail: deque[str] = deque(maxlen=12)
    lines = 0
    with open(log, "a", encoding="utf-8") as file:
        child = subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that all compilers of an interrupted build can be ended
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                file.write(line)
                tail.append(line.rstrip())
                lines += 1
                if progress is not None:
                    progress.update(min(lines / expected, 0.99))
            status = child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
    if status:
        kept = _keep_log(log)
        shown = "\n".join(f"  | {line}" for line in tail)
        raise GuestAssetError(
            f"make {' '.join(goals)} failed with status {status} (log: {kept})\n{shown}", _HINT_FAILED
        )
    return lines


def _keep_log(log: str) -> str:
    """Move the log of a failed build out of its work directory, which is removed afterwards."""
    kept = os.path.join(kernels.directory(), "failed-build.log")
    shutil.copyfile(log, kept)
    return kept


def _expected_steps() -> int:
    """The number of lines that an earlier build printed."""
    newest: tuple[float, int] = (0.0, _USUAL_STEPS)
    for place in glob.glob(os.path.join(kernels.directory(), "small-*")):
        kernel = kernels.find(os.path.basename(place))
        if kernel is not None and isinstance(kernel.record.get("steps"), int):
            newest = max(newest, (os.stat(place).st_mtime, kernel.record["steps"]))
    return max(newest[1], 1)


def _first_line(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().strip()


def _run(argv: list[str], what: str) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines()
        if "No space left" in done.stderr:
            raise ResourceExhaustedError(
                f"cannot {what}: no space left", "set KATA_CACHE_DIR to a larger disk"
            )
        raise GuestAssetError(
            f"cannot {what}: {why[-1] if why else f'{argv[0]} ended with {done.returncode}'}"
        )
