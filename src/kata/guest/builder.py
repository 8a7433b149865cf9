"""`kata guest build` and `kata guest info`: builds a guest, installs it, and shows what is installed.

The names of kernel and initrd contain a digest, and the manifest that lists them is replaced last, atomically: a
sandbox that is just starting finds either the old pair or the new one, and a running one keeps the files that it was
booted with.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

from kata import paths
from kata.errors import GuestAssetError, HostError, UsageError
from kata.guest import distro_kernel, extension, initrd, kernels, manifest, small_kernel
from kata.guest.progress import Progress, for_stderr

KINDS = ("auto", "small", "distro")

_RETIRED_S = 3600
"""How long (in seconds) a replaced kernel or initrd is kept, for a start that has read the old manifest."""


def build(
    kernel: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
    extensions: Sequence[str] = (),
) -> dict[str, Any]:
    """Build a guest and install it in the guest directory. Steps whose result exists already are skipped.

    Args:
        kernel: ``small``, ``distro``, or ``auto``: the small kernel if it needs no build, even if the installed one is
            no longer the newest; otherwise the distribution's.
        force: Build even what is in the cache.
        progress: Reports progress; by default on standard error.
        extensions: Extensions to build, see `kata.guest.extension`. Those that are installed stay.

    Returns:
        The manifest.

    Raises:
        UsageError: There is no such kind of kernel.
        GuestAssetError: The agent is missing, or the kernel cannot be made.
        ResourceExhaustedError: There is not enough space.
        HostError: The guest directory cannot be written.
    """
    if kernel not in KINDS:
        raise UsageError(f"there is no guest kernel {kernel!r}", f"choose one of: {', '.join(KINDS)}")
    progress = progress or for_stderr()
    agent_path = paths.agent_binary()
    agent = _read_agent(agent_path)
    obtained = _kernel(kernel, force, progress)
    made = [extension.build(name, progress) for name in extensions]
    directory = paths.guest_dir()
    try:
        paths.make_dirs(directory, 0o755)
        with _locked(directory, progress):
            return _install(directory, obtained, agent, agent_path, made, force, progress)
    except OSError as error:
        raise HostError(
            f"cannot install the guest in {directory}: {error.strerror}",
            "set KATA_GUEST_DIR, or become root",
        ) from None


def info() -> dict[str, Any]:
    """Return the manifest of the installed guest, and its directory.

    Raises:
        GuestAssetError: No guest is installed, or it is incomplete.
    """
    guest = manifest.installed()
    return {"directory": guest.directory, **guest.content}


def _kernel(kind: str, force: bool, progress: Progress) -> kernels.Kernel:
    if kind == "auto":
        found = small_kernel.cached() or _installed_small()
        if found is not None and not force:
            return found
        kind = "distro" if found is None else "small"
    if kind == "small":
        return small_kernel.obtain(progress, force)
    return distro_kernel.obtain(progress, force)


def _installed_small() -> kernels.Kernel | None:
    try:
        guest = manifest.installed()
    except GuestAssetError:
        return None
    if guest.kernel_kind != "small":
        return None
    facts = guest.content["kernel"]
    return kernels.Kernel(guest.directory, {**facts, "release": facts["version"]}, facts["path"])


def _installed_extensions(directory: str) -> dict[str, Any]:
    try:
        return dict(manifest.load(directory).content.get("extensions", {}))
    except GuestAssetError:
        return {}


def _read_agent(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            agent = file.read()
    except OSError as error:
        raise GuestAssetError(
            f"cannot read the guest's agent {path}: {error.strerror}",
            "tools/setup run builds it; KATA_AGENT_BINARY names another one",
        ) from None
    initrd.check_agent(agent, path)
    return agent


def _install(
    directory: str,
    kernel: kernels.Kernel,
    agent: bytes,
    agent_path: str,
    made: list[extension.Extension],
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    record = kernel.record
    modules = kernel.modules()
    image = initrd.build(agent, modules, record["release"])
    image_digest = hashlib.sha256(image).hexdigest()
    content: dict[str, Any] = {
        "format": manifest.FORMAT,
        "kernel": {
            "kind": record["kind"],
            "path": f"vmlinux-{record['sha256'][:16]}",
            "version": record["version"],
            "boot": record["boot"],
            "size": record["size"],
            "sha256": record["sha256"],
            "config_hash": record["config_hash"],
            "source_package": record["source_package"],
            "patches": record.get("patches", []),
        },
        "initrd": {
            "path": f"initrd-{image_digest[:16]}",
            "size": len(image),
            "sha256": image_digest,
            "agent_version": initrd.agent_version(agent),
            "scans_ports": initrd.scans_ports(agent),
            "agent_sha256": hashlib.sha256(agent).hexdigest(),
            "agent_path": agent_path,
            "modules": [os.path.basename(path).removesuffix(".ko") for path, _data in modules],
        },
    }
    extensions = _installed_extensions(directory)
    for one in made:
        extensions[one.name] = {
            "path": f"extension-{one.name}-{one.digest[:16]}",
            "size": len(one.image),
            "sha256": one.digest,
            "packages": one.sources,
        }
    if extensions:
        content["extensions"] = extensions
    named = f"Linux {record['version']} ({record['kind']}), agent {content['initrd']['agent_version']}"
    with contextlib.suppress(GuestAssetError):
        there = dict(manifest.load(directory).content)
        if not force and {**there, "built_at": None} == {**content, "built_at": None}:
            progress.note(f"the guest is up to date: {named}")
            return there
    content["built_at"] = (
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    )
    target = os.path.join(directory, content["kernel"]["path"])
    if target != kernel.path:
        _place(target, kernel.path)
    _place(os.path.join(directory, content["initrd"]["path"]), image)
    for one in made:
        _place(os.path.join(directory, extensions[one.name]["path"]), one.image)
    _place(os.path.join(directory, manifest.NAME), (json.dumps(content, indent=1) + "\n").encode())
    current = {facts["path"] for facts in (content["kernel"], content["initrd"], *extensions.values())}
    _retire(directory, current)
    progress.note(f"installed the guest in {directory}: {named}")
    return content


def _place(target: str, content: str | bytes) -> None:
    """Write a file atomically: the given bytes, or a copy of the file with the given path."""
    work = f"{target}.{os.getpid()}.part"
    try:
        if isinstance(content, str):
            shutil.copyfile(content, work)
        else:
            with open(work, "wb") as file:
                file.write(content)
        os.chmod(work, 0o644)
        with open(work, "rb") as file:
            os.fsync(file.fileno())
        os.rename(work, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(work)
        raise


def _retire(directory: str, current: set[str]) -> None:
    """Remove files of earlier builds, some time after they were replaced."""
    now = time.time()
    retired = os.path.join(directory, ".retired.json")
    try:
        with open(retired, encoding="utf-8") as file:
            since = {str(name): float(when) for name, when in json.load(file).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        since = {}
    kept = {}
    for name in os.listdir(directory):
        if not name.startswith(("vmlinux-", "initrd-", "extension-")) or name in current:
            continue
        kept[name] = since.get(name, now)
        if now - kept[name] > _RETIRED_S:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))
            del kept[name]
    if kept or since:
        _place(retired, json.dumps(kept).encode())


@contextlib.contextmanager
def _locked(directory: str, progress: Progress) -> Iterator[None]:
    path = os.path.join(directory, ".lock")
    with kernels.lock_held(path, lambda: progress.note("another build installs its guest; waiting for it")):
        yield
