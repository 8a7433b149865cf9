"""Running as an ordinary user: a user namespace of one's own, in which everything goes on as it does for root.

The namespace maps one id: the user is root in it, and nobody else is there (user_namespaces(7)). So no set-uid program
and no entry in ``/etc/subuid`` is needed; images need no more, since their files' owners are in file systems that the
guest reads. What is left out by it: the hypervisor has no user of its own, and limits need a delegated cgroup.

Each command makes a namespace of its own. Engines are reached over their sockets, which belong to the user, and whose
other end the kernel names by the user's id in the engine's namespace: 0 there, as for the user's other commands.

Imported only where the user is not root.
"""

from __future__ import annotations

import os
import stat

from kata import sysio
from kata.errors import HostError

user: int | None = None
"""The user's id outside, once `enter` has returned."""
refusal: HostError | None = None
"""Why it could not, for `kata doctor`."""
_SYSTEM_GUEST = "/var/lib/kata/guest"
_MANIFEST = "guest.json"
_HINT = (
    "The host has to allow it: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone (Debian),"
    " kernel.apparmor_restrict_unprivileged_userns (Ubuntu). Or run it as root."
)


def settle() -> None:
    """Set the variables of `kata.paths` that are not set to places of the user's own (the XDG Base Directory
    Specification).

    Raises:
        HostError: The directory for what lives as long as a sandbox cannot be made, or is somebody else's.
    """
    home = os.environ.get("HOME") or "/"
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(home, ".local/share")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    os.environ.setdefault("KATA_STATE_DIR", os.path.join(data, "kata"))
    os.environ.setdefault("KATA_CACHE_DIR", os.path.join(cache, "kata"))
    if "KATA_RUN_DIR" not in os.environ:
        os.environ["KATA_RUN_DIR"] = os.path.join(_runtime_dir(), "kata")
    own = os.path.join(os.environ["KATA_STATE_DIR"], "guest")
    if not os.path.exists(os.path.join(own, _MANIFEST)) and os.access(
        os.path.join(_SYSTEM_GUEST, _MANIFEST), os.R_OK
    ):
        os.environ.setdefault("KATA_GUEST_DIR", _SYSTEM_GUEST)


def _runtime_dir() -> str:
    """``$XDG_RUNTIME_DIR``; without it a directory below ``/tmp`` that nobody else can enter."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given:
        return given
    path = f"/tmp/kata-{os.geteuid()}"  # the name is no secret: what is there is checked
    try:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        found = os.lstat(path)
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}", "Set XDG_RUNTIME_DIR.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise HostError(
            f"{path} is not a directory that is this user's alone",
            "Remove it, or set XDG_RUNTIME_DIR to a directory of yours with mode 0700.",
        )
    return path


def enter() -> None:
    """Go into a new user namespace, as its root, and into a new mount namespace. This process has one thread.

    Raises:
        HostError: The host does not let this user make one.
    """
    global user, refusal
    own_user, group = os.geteuid(), os.getegid()
    try:
        sysio.unshare(sysio.CLONE_NEWUSER | sysio.CLONE_NEWNS)
        _write("/proc/self/setgroups", "deny")  # before gid_map, or the user may not write it
        _write("/proc/self/uid_map", f"0 {own_user} 1")
        _write("/proc/self/gid_map", f"0 {group} 1")
        sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_SLAVE)
    except OSError as error:
        refusal = HostError(f"cannot make a user namespace for user {own_user}: {error.strerror}", _HINT)
        raise refusal from error
    user = own_user


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
