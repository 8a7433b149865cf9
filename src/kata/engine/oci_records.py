"""What the OCI command line has left below its ``--root`` directories, for `kata gc`.

`kata.oci_runtime.records` writes a directory with ``state.json`` for each container, and its caller has it deleted. One
whose caller was killed stays. Directories other than the usual one are known by links to them.
"""

from __future__ import annotations

import os
import stat

from kata import paths, sysio
from kata.json_text import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ROOTS = "oci-roots"
_STATE = "state.json"
_MAX_BYTES = 1 << 20


def register(root: str) -> None:
    """Remember a ``--root`` directory. One that cannot be remembered is not known to `sweep`.

    Args:
        root: Its absolute path.
    """
    if root == paths.oci_dir():
        return
    import zlib

    directory = os.path.join(paths.run_dir(), _ROOTS)
    link = os.path.join(directory, f"{zlib.crc32(os.fsencode(root)):08x}")
    try:
        os.symlink(root, link)
    except FileExistsError:
        pass
    except FileNotFoundError:
        paths.make_dirs(directory, 0o700)
        try:
            os.symlink(root, link)
        except OSError:
            pass
    except OSError:
        pass


def sweep() -> list[str]:
    """Remove the records of containers of which nothing else is left: no engine, no process, no bundle.

    Returns:
        A line for each.
    """
    links = os.path.join(paths.run_dir(), _ROOTS)
    found = _sweep_root(paths.oci_dir())
    for name in _names(links):
        link = os.path.join(links, name)
        try:
            root = os.readlink(link)
        except OSError:
            continue
        found += _sweep_root(root)
        if not _names(root):
            try:
                os.unlink(link)
            except OSError:
                pass
    return found


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _sweep_root(root: str) -> list[str]:
    """Remove what is stale below one. Only what this user alone could have put there is touched."""
    try:
        top = sysio.Fd(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError:
        return []
    found = []
    with top:
        status = os.fstat(top.raw)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return []
        for name in sorted(os.listdir(top.raw)):
            try:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                with sysio.Fd(os.open(name, flags, dir_fd=top.raw)) as directory:
                    if not _is_stale(directory.raw):
                        continue
                    for file in os.listdir(directory.raw):
                        os.unlink(file, dir_fd=directory.raw)
                os.rmdir(name, dir_fd=top.raw)
            except OSError:
                continue  # it is no record, or has just been deleted
            found.append(f"the record of container {name}")
    return found


def _is_stale(directory: int) -> bool:
    """Whether nobody can want a record any more."""
    try:
        with sysio.Fd(os.open(_STATE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)) as file:
            kept: Any = loads(os.read(file.raw, _MAX_BYTES))
    except FileNotFoundError:
        return _is_free(directory)
    except (OSError, ValueError):
        return False
    if not isinstance(kept, dict):
        return False
    bundle, sandbox = kept.get("bundle"), kept.get("sandbox")
    pid, started = kept.get("pid"), kept.get("started")
    if not (isinstance(bundle, str) and isinstance(sandbox, str) and bundle and sandbox):
        return False
    if os.path.isdir(sandbox) or os.path.exists(os.path.join(bundle, "config.json")):
        return False
    return not (isinstance(pid, int) and pid and sysio.proc_starttime(pid) == started)


def _is_free(directory: int) -> bool:
    """Whether the ``create`` that made a directory, and has recorded nothing in it, was killed."""
    import fcntl

    if any(not name.endswith((".sock", ".tmp")) for name in os.listdir(directory)):
        return False  # it is none of ours
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
