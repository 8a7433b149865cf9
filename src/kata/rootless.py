"""Running as an ordinary user: a user namespace of one's own, in which everything goes on as it does for root.

The user is root in it. Where the host gives the user further ids (/etc/subuid, /etc/subgid) and the programs that map
them (newuidmap, newgidmap: Debian's package ``uidmap``), these are its other users, from 1 on: hypervisors get users of
their own then, and files in volumes keep their owners. Elsewhere one id is mapped, and nobody else is there. Images
need no more in any case, since their files' owners are in file systems that the guest reads.

Each command makes a namespace of its own, with the same ids; users who have networks with names have one for all of
their commands and engines (`kata.own_namespace`). Engines are reached over their sockets, which belong to the user, and
whose other end the kernel names by the user's id in the engine's namespace: 0 there, as for the user's other commands.

Podman has made such a namespace already when it calls ``kata-runtime``: `settle_inside`.

Imported only where the user is not root, or not the host's.

Sources: user_namespaces(7), newuidmap(1), subuid(5).
"""

from __future__ import annotations

import os
import stat

from kata import children, own_namespace, sysio
from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    _Ranges = Sequence[tuple[int, int]]
    """Subordinate ids: the first of each range on the host, and how many there are."""

user: int | None = None
"""The user's id outside, once `enter` has returned."""
refusal: HostError | None = None
"""Why it could not, for `kata doctor`."""
lacks = ""
"""Why the namespace has one id only; empty where it has more. Once `enter` has returned."""
_SYSTEM_GUEST = "/var/lib/kata/guest"
_MANIFEST = "guest.json"
_ONE_ID = "those of this user's containers that run were started so"
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
    _settle(os.geteuid())


def settle_inside() -> None:
    """The same for a process that is root in a user namespace, such as Podman makes one for an ordinary user. Where the
    host's ``/run`` is that root's, too, as in a container with users of its own, nothing is set.

    Raises:
        HostError: As for `settle`.
    """
    if not os.access("/run/kata" if os.path.isdir("/run/kata") else "/run", os.W_OK):
        _settle(next((outside for inside, outside, _ in sysio.id_map("uid") if inside == 0), 0))


def _settle(own_user: int) -> None:
    home = os.environ.get("HOME") or _home(own_user)
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(home, ".local/share")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    os.environ.setdefault("KATA_STATE_DIR", os.path.join(data, "kata"))
    os.environ.setdefault("KATA_CACHE_DIR", os.path.join(cache, "kata"))
    if "KATA_RUN_DIR" not in os.environ:
        os.environ["KATA_RUN_DIR"] = os.path.join(_runtime_dir(own_user), "kata")
    own = os.path.join(os.environ["KATA_STATE_DIR"], "guest")
    if not os.path.exists(os.path.join(own, _MANIFEST)) and os.access(
        os.path.join(_SYSTEM_GUEST, _MANIFEST), os.R_OK
    ):
        os.environ.setdefault("KATA_GUEST_DIR", _SYSTEM_GUEST)


def _home(own_user: int) -> str:
    """The home directory of a user whose environment names none."""
    import pwd

    try:
        return pwd.getpwuid(own_user).pw_dir
    except KeyError:
        return "/"


def _runtime_dir(own_user: int) -> str:
    """``$XDG_RUNTIME_DIR``; without it a directory below ``/tmp`` that nobody else can enter."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given:
        return given
    path = f"/tmp/kata-{own_user}"  # the name is no secret: what is there is checked
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
    """Go into a user namespace, as its root, and into a new mount namespace. This process has one thread.

    The user namespace is a new one, or that of this user's networks.

    Raises:
        HostError: The host does not let this user make one.
    """
    global user, refusal, lacks
    own_user = os.geteuid()
    try:
        if own_namespace.has_networks():
            with own_namespace.Companions() as companions:
                if companions.join():
                    lacks = _ONE_ID if len(sysio.id_map("uid")) == 1 else ""
                else:
                    _make()
                companions.add()
        else:
            _make()
        sysio.unshare(sysio.CLONE_NEWNS)
        sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_SLAVE)
    except OSError as error:
        refusal = HostError(f"cannot make a user namespace for user {own_user}: {error.strerror}", _HINT)
        raise refusal from error
    user = own_user


def _make() -> None:
    """Make a user namespace, and go into it.

    Raises:
        OSError: The host does not let this user.
    """
    global lacks
    own_user, group = os.geteuid(), os.getegid()
    mapping = _Mapping(own_user, group)
    try:
        sysio.unshare(sysio.CLONE_NEWUSER)
        lacks = mapping.make()
        if not sysio.read_file("/proc/self/gid_map").strip():
            sysio.write_existing(
                "/proc/self/setgroups", "deny"
            )  # before gid_map, or the user may not write it
            sysio.write_existing("/proc/self/gid_map", f"0 {group} 1")
        if not sysio.read_file("/proc/self/uid_map").strip():
            sysio.write_existing("/proc/self/uid_map", f"0 {own_user} 1")
    finally:
        mapping.close()


class _Mapping:
    """Has the ids mapped of a user namespace that this process is about to make. Whoever does that is outside, so
    there is a child of ours, made before.

    Args:
        own_user: The user.
        group: The user's group.
    """

    def __init__(self, own_user: int, group: int) -> None:
        self._go: sysio.Fd | None = None
        self._said: sysio.Fd | None = None
        self._child = 0
        self._lacks = ""
        lists = []
        for kind, own in (("uid", own_user), ("gid", group)):
            program = children.find_program(f"new{kind}map")
            ranges = subordinate(f"/etc/sub{kind}", own_user)
            if program is None:
                self._lacks = f"new{kind}map is not installed (apt-get install uidmap)"
            elif not ranges:
                self._lacks = f"/etc/sub{kind} has no ids for user {own_user} (usermod --add-sub{kind}s)"
            else:
                words = [program, str(os.getpid()), "0", str(own), "1"]
                inside = 1
                for first, count in ranges:
                    words += [str(inside), str(first), str(count)]
                    inside += count
                lists.append(words)
        if not self._lacks:
            self._fork(lists)

    def _fork(self, lists: Sequence[Sequence[str]]) -> None:
        go_read, go_write = map(sysio.Fd, os.pipe2(os.O_CLOEXEC))
        said_read, said_write = map(sysio.Fd, os.pipe2(os.O_CLOEXEC))
        self._child = os.fork()
        if self._child == 0:
            try:
                go_write.close()
                if os.read(go_read.raw, 1):
                    _execute(lists, said_write.raw)
            finally:
                os._exit(0)
        go_read.close()
        said_write.close()
        self._go, self._said = go_write, said_read

    def make(self) -> str:
        """Have them mapped, now that the namespace is there.

        Returns:
            Why they are not; empty where they are.
        """
        if self._go is None or self._said is None:
            return self._lacks
        os.write(self._go.raw, b"x")
        said = b""
        while piece := os.read(self._said.raw, 4096):
            said += piece
        return said.decode(errors="replace").strip()[:500]

    def close(self) -> None:
        """End the child."""
        for end in (self._go, self._said):
            if end is not None:
                end.close()
        if self._child:
            os.waitpid(self._child, 0)


def _execute(lists: Sequence[Sequence[str]], said: int) -> None:
    """Run programs at the same time. What one that fails has to say goes to *said*, and no more of the others."""
    started = []
    for words in lists:
        actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, 0, 1)]
        pid = os.posix_spawn(
            words[0],
            list(words),
            children.ENVIRONMENT,
            file_actions=[*actions, (os.POSIX_SPAWN_DUP2, said, 2)],
        )
        started.append((pid, words[0]))
    for pid, program in started:
        if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            os.write(said, f"\n{program} ended with {status}".encode())


def subordinate(path: str, own_user: int) -> _Ranges:
    """The ids that a file like ``/etc/subuid`` gives a user. Source: subuid(5).

    Args:
        path: The file; it need not exist.
        own_user: The user's id: a line may have this or the name.
    """
    try:
        with open(path, "rb") as file:
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    names = {str(own_user)}
    import pwd

    try:
        names.add(pwd.getpwuid(own_user).pw_name)
    except KeyError:
        pass
    found = []
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        first, _, count = numbers.partition(":")
        if name in names and first.isdecimal() and count.isdecimal() and int(count):
            found.append((int(first), int(count)))
    return found
