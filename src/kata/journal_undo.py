"""Undoes journals, and reconciles journals with the state of the host.

A resource is undone only if it has the identity in the journal, which is chosen so that no other can have it:

=============  =====================================================================
kind           identity
=============  =====================================================================
process        pid, start time, boot id
file, socket   device and inode
directory      device and inode; then its tree, never across a mount, never through a symlink
content        the same of somebody else's directory, which stays and is emptied
cgroup         device and inode; processes still in it are killed
netns          device and inode of the namespace that is bind-mounted at the path
mount          mount namespace, mount id and device at the target
tap            inode of the network namespace and interface index
redirect       the same; it is the ingress qdisc of that interface
driver         boot id, and that the device's driver_override is still ours
=============  =====================================================================

If the maker died between intent and identity, a path is taken for ours only if nothing was there when the intent was
recorded, and a mount only if target, source and type match. A process cannot exist then, because our children wait
until their identity is on disk before they exec (`kata.children`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from kata import journal as journals
from kata import paths, sysio
from kata.errors import JournalError, KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_END_GRACE_S = 1.0
_TERM_GRACE_S = 1.0
_POLL_S = 0.01
_MOST_HELD = 64
"""Removed files that wait for their space to be freed, in one list."""


def end_and_undo(directory: str, grace_s: float, kill_s: float, undo_s: float = 4.0) -> list[str] | None:
    """End the process that a journal belongs to, if it still runs, and undo what it has made. Blocks.

    Args:
        directory: Where the journal is.
        grace_s: Seconds that the process may take to end after SIGTERM.
        kill_s: Seconds that it may take after SIGKILL.
        undo_s: Seconds for everything that is undone.

    Returns:
        As of `undo`; None where there is no journal, since the process has ended as it should.
    """
    try:
        journal = journals.Journal.open(os.path.join(directory, journals.FILE_NAME))
    except JournalError:
        return None
    try:
        if not journal.signal_owner(sysio.SIGTERM, grace_s):
            journal.signal_owner(sysio.SIGKILL, kill_s)
        return undo(journal, undo_s)
    finally:
        journal.close()


def undo(
    journal: journals.Journal, deadline_s: float = 4.0, held: list[sysio.Fd] | None = None
) -> list[str]:
    """Undo everything in reverse order, then remove the journal and the directory that belongs to it.

    The identity of each resource is checked first. One that is gone, or no longer ours, counts as undone. After a crash
    at any point, any process may call this again. It blocks for about `deadline_s` at most, so an event loop has to
    call it in a thread.

    Args:
        journal: An open journal; it is read again before anything is undone.
        deadline_s: Seconds for everything together.
        held: Is given descriptors of files that were removed from the journal's directory. Their space is free when
            these are closed, which may take long (a disk image of many parts, on a file system that discards): for
            who has somebody waiting, and closes them afterwards.

    Returns:
        A sentence for each resource that could not be undone; if there are any, the journal stays.
    """
    deadline = time.monotonic() + deadline_s
    if not _lock(journal, deadline):
        return [f"another process has been undoing {journal.path} for {deadline_s:g} s"]
    try:
        if _vanished(journal):
            return []
        journal.reload()
        was_killed = not journal.owner_alive()
        journal.begin_removal()
        failures = []
        for entry in reversed(journal.entries):
            if entry.gone:
                continue
            try:
                problem = _undo_entry(entry, deadline)
            except OSError as error:
                problem = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
            except (KeyError, ValueError, TypeError) as error:
                problem = f"its entry in the journal is damaged ({error!r})"
            if problem:
                failures.append(f"cannot undo {_describe(entry)}: {problem}")
            else:
                _forget(journal, entry)
        if not failures:
            _remove_journal(journal, deadline, failures, held)
            if was_killed and _is_of_sandbox(journal):
                from kata import events

                events.engine_was_killed(os.path.dirname(journal.path), journal.meta)
        return failures
    finally:
        if journal.fileno() >= 0:
            fcntl.flock(journal.fileno(), fcntl.LOCK_UN)


def _is_of_sandbox(journal: journals.Journal) -> bool:
    above = os.path.dirname(os.path.dirname(journal.path))
    return os.path.basename(above) == "sandboxes" and bool(journal.meta.get("id"))


def _forget(journal: journals.Journal, entry: journals.Entry) -> None:
    try:
        journal.mark_gone(entry)
    except JournalError:
        pass  # the disk is full; undoing goes on and may free space. Undone again, the resource is found gone


def _lock(journal: journals.Journal, deadline: float) -> bool:
    # Undoing by two processes at the same time (an engine and a `kata gc`) would race with each other's checks.
    while True:
        try:
            fcntl.flock(journal.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)


def _vanished(journal: journals.Journal) -> bool:
    """Whether the open file is no longer the one at its path: another process has finished the work."""
    held = os.fstat(journal.fileno())
    try:
        there = os.lstat(journal.path)
    except FileNotFoundError:
        return True
    return (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino)


def _remove_journal(
    journal: journals.Journal, deadline: float, failures: list[str], held: list[sysio.Fd] | None
) -> None:
    directory, name = os.path.split(journal.path)
    own = journal.own_dir
    if own is not None:
        # The journal is removed last, so that after a crash it still names the rest.
        problem = _remove_tree(directory, own, deadline, spare=name, held=held)
        if problem:
            failures.append(f"cannot remove {directory}: {problem}")
            return
        # Without its journal, the directory is marked for removal by its name.
        aside = os.path.join(os.path.dirname(directory), journals.unfinished_name())
        os.rename(directory, aside)
        directory = aside
    os.unlink(os.path.join(directory, name))
    journal.close()
    if own is not None:
        try:
            os.rmdir(directory)
        except OSError as error:
            failures.append(f"cannot remove {directory}: {error.strerror}")


def _describe(entry: journals.Entry) -> str:
    params, identity = entry.params, entry.identity or {}
    what = params.get("role") or params.get("path") or params.get("target") or params.get("name") or ""
    pid = f" (pid {identity['pid']})" if "pid" in identity else ""
    return f"{entry.kind} {what}{pid}"


def _undo_entry(entry: journals.Entry, deadline: float) -> str:
    handlers: dict[str, Callable[[dict[str, Any], dict[str, Any] | None, float], str]] = {
        "process": _undo_process,
        "file": _undo_file,
        "socket": _undo_file,
        "directory": _undo_directory,
        "content": _undo_content,
        "mount": _undo_mount,
        "cgroup": _undo_cgroup,
        "netns": _undo_netns,
        "tap": _undo_tap,
        "redirect": _undo_redirect,
        "driver": _undo_driver,
        "access": _undo_access,
    }
    handler = handlers.get(entry.kind)
    if handler is None:
        return "this version does not know that kind"
    return handler(entry.params, entry.identity, deadline)


# ---- processes ----


def _undo_process(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    if identity is None or identity["boot"] != sysio.boot_id():
        return ""
    pid = int(identity["pid"])
    if pid == os.getpid():
        return ""  # an engine that undoes its own journal will end by itself
    return _end_process(pid, int(identity["start"]), params.get("signal", "KILL"), deadline)


def _end_process(pid: int, start: int | None, way: str, deadline: float) -> str:
    try:
        pidfd = sysio.pidfd_open(pid)
    except ProcessLookupError:
        return ""
    try:
        # The start time proves the identity only while the descriptor holds on to the process.
        if start is not None and sysio.proc_starttime(pid) != start:
            return ""
        steps = [(0, _END_GRACE_S), (sysio.SIGTERM, _TERM_GRACE_S), (sysio.SIGKILL, float("inf"))]
        steps = steps[("WAIT", "TERM", "KILL").index(way) :]
        for number, patience in steps:
            if sysio.pidfd_wait(pidfd, 0):
                return ""
            try:
                sysio.pidfd_send_signal(pidfd, number)
            except ProcessLookupError:
                return ""
            if sysio.pidfd_wait(pidfd, max(0.0, min(patience, deadline - time.monotonic()))):
                return ""
        return "it was killed and has not ended"
    finally:
        os.close(pidfd)


# ---- files and trees ----


def _is_ours(status: os.stat_result, params: dict[str, Any], identity: dict[str, Any] | None) -> bool:
    if identity is None:
        return bool(params.get("absent"))
    return (status.st_dev, status.st_ino) == (identity["dev"], identity["ino"])


def _undo_file(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    try:
        status = os.lstat(params["path"])
        if not stat.S_ISDIR(status.st_mode) and _is_ours(status, params, identity):
            os.unlink(params["path"])
    except FileNotFoundError:
        pass
    return ""


def _undo_directory(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    path = params["path"]
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return ""
    if not stat.S_ISDIR(status.st_mode) or not _is_ours(status, params, identity):
        return ""
    return _remove_tree(path, (status.st_dev, status.st_ino), deadline)


def _undo_content(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    if identity is None:
        return ""  # nothing was put into it before its identity was known
    return _remove_tree(params["path"], (identity["dev"], identity["ino"]), deadline, keep=True)


def _remove_tree(
    path: str,
    identity: tuple[int, int],
    deadline: float,
    spare: str = "",
    *,
    keep: bool = False,
    held: list[sysio.Fd] | None = None,
) -> str:
    """Remove a directory and its content; with `spare`, everything but that entry and the directory itself; with
    `keep`, only the content. For `held` see `undo`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != identity:
            return ""
        problem = empty(fd, path, deadline, spare, held)
    finally:
        os.close(fd)
    if problem or spare or keep:
        return problem
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass
    return ""


OUT_OF_TIME = "out of time"


def empty(fd: int, path: str, deadline: float, spare: str = "", held: list[sysio.Fd] | None = None) -> str:
    """Remove the content of a directory, by descriptors only: no link is followed, no mount entered.

    However deep it is, a few descriptors are enough: whoever filled it may have made it deeper than we may open files.

    Args:
        fd: Descriptor of the directory.
        path: Its path, for messages.
        deadline: When to give up, by CLOCK_MONOTONIC.
        spare: A name that stays.
        held: See `undo`.

    Returns:
        The problem, `OUT_OF_TIME` for one; empty on success.
    """
    # An explicit stack: a tree may be deeper than Python's recursion limit.
    stack = [(os.fstat(fd), path, [name for name in os.listdir(fd) if name != spare])]
    here = os.dup(fd)
    try:
        while True:
            _, where, names = stack[-1]
            if not names:
                if len(stack) == 1:
                    return ""
                stack.pop()
                above = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
                os.close(here)
                here = above
                if not os.path.samestat(os.fstat(here), stack[-1][0]):
                    return f"{where} was moved meanwhile"
                os.rmdir(os.path.basename(where), dir_fd=here)
                continue
            if time.monotonic() > deadline:
                return OUT_OF_TIME
            name = names.pop()
            full = os.path.join(where, name)
            try:
                if not stat.S_ISDIR(os.stat(name, dir_fd=here, follow_symlinks=False).st_mode):
                    if held is not None and len(held) < _MOST_HELD:
                        _hold(here, name, held)
                    os.unlink(name, dir_fd=here)
                    continue
                below = sysio.openat2(
                    here,
                    name,
                    os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW,
                    resolve=sysio.RESOLVE_BENEATH | sysio.RESOLVE_NO_SYMLINKS | sysio.RESOLVE_NO_XDEV,
                )
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.EBUSY):
                    return f"something is mounted on {full}"
                return f"{full}: {error.strerror}"
            os.close(here)
            here = below
            stack.append((os.fstat(here), full, os.listdir(here)))
    finally:
        os.close(here)


def _hold(directory: int, name: str, held: list[sysio.Fd]) -> None:
    """Keep a file that is about to be removed there, without a name, until its descriptor is closed."""
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return  # its space is freed at once, then
    held.append(sysio.Fd(fd))


# ---- mounts, namespaces, cgroups, interfaces ----


def _undo_mount(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    if identity is not None and identity["ns"] != sysio.namespace_inode("mnt"):
        # It was made in an engine's own mount namespace, which has ended with its processes.
        return ""
    from kata import mount_table

    for entry in reversed(mount_table.mounts()):
        if entry.target != params["target"]:
            continue
        if identity is not None:
            ours = (entry.mount_id, entry.device) == (identity["id"], identity["dev"])
        elif params["fstype"] == "none":  # a bind mount: its source is a path, not that of the file system
            ours = bool(params["source"]) and entry.root.endswith(os.path.basename(params["source"]))
        else:
            ours = (entry.source, entry.fstype) == (params["source"], params["fstype"])
        if ours:
            sysio.umount2(params["target"], sysio.MNT_DETACH | sysio.UMOUNT_NOFOLLOW)
        return ""  # only the topmost mount at the target can be ours
    return ""


def _undo_netns(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    path = params["path"]
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ""
    from kata import mount_table

    bound = mount_table.mount_at(os.path.realpath(path))
    if bound is not None and bound.fstype == "nsfs" and _is_ours(status, params, identity):
        sysio.umount2(path, sysio.MNT_DETACH | sysio.UMOUNT_NOFOLLOW)
        os.unlink(path)
    elif bound is None and params.get("absent") and stat.S_ISREG(status.st_mode) and not status.st_size:
        os.unlink(path)  # the empty file at which the namespace was (to be) bind-mounted
    return ""


def _undo_cgroup(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    problem = _undo_one_cgroup(params, identity, deadline)
    for parent in params.get("parents") or () if not problem else ():
        try:
            os.rmdir(parent)
        except OSError:
            break  # other cgroups are below it, or it was removed with the last of them
    return problem


def _undo_one_cgroup(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    path = params["path"]
    if not os.path.lexists(path) and params.get("inside"):
        # It was made through a mount in its engine's namespace only; the hierarchy is the same in any other mount.
        from kata import mount_table

        mounted = next(
            (m.target for m in mount_table.mounts() if m.fstype == "cgroup2" and m.root == "/"), ""
        )
        if mounted:
            return _remove_cgroup(mounted + params["inside"], params, identity, deadline)
        return _remove_hidden_cgroup(params, identity, deadline)
    return _remove_cgroup(path, params, identity, deadline)


def _remove_hidden_cgroup(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    import tempfile

    place = tempfile.mkdtemp(prefix="kata-cgroup2-")
    try:
        sysio.mount("cgroup2", place, "cgroup2")
        try:
            return _remove_cgroup(place + params["inside"], params, identity, deadline)
        finally:
            sysio.umount2(place, sysio.MNT_DETACH | sysio.UMOUNT_NOFOLLOW)
    finally:
        os.rmdir(place)


def _remove_cgroup(
    path: str, params: dict[str, Any], identity: dict[str, Any] | None, deadline: float
) -> str:
    try:
        if not _same_cgroup(os.lstat(path), params, identity):
            return ""
    except FileNotFoundError:
        return ""
    while True:
        busy = False
        for directory, _, _ in os.walk(path, topdown=False):
            _kill_cgroup(directory)
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                busy = True
        if not busy:
            return ""
        if time.monotonic() > deadline:
            return "processes in it do not end"
        time.sleep(_POLL_S)


def _same_cgroup(status: os.stat_result, params: dict[str, Any], identity: dict[str, Any] | None) -> bool:
    # The device number of a cgroup file system lives as long as its mounts; the inode identifies the cgroup.
    if identity is None or not params.get("inside"):
        return _is_ours(status, params, identity)
    return bool(status.st_ino == identity["ino"])


def _kill_cgroup(directory: str) -> None:
    try:
        with open(os.path.join(directory, "cgroup.procs"), encoding="ascii") as lines:
            pids = [int(line) for line in lines]
    except OSError:
        return
    for pid in pids:
        # All processes in the cgroup belong to the sandbox. An engine that undoes its own journal must not kill itself.
        if pid and pid != os.getpid():
            try:
                pidfd = sysio.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                sysio.pidfd_send_signal(pidfd, sysio.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(pidfd)


def _undo_tap(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    if identity is None:
        # A tap is made persistent only after its identity is on disk; until then it disappears with its maker.
        return ""
    return _in_network(params, identity, lambda: _delete_link(params["name"], int(identity["ifindex"])))


def _undo_redirect(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    if identity is None:
        return ""  # the identity is recorded before the qdisc is made; without it, ours cannot be told from others
    return _in_network(params, identity, lambda: _delete_ingress(params["name"], int(identity["ifindex"])))


def _undo_driver(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    from kata import pci_driver

    device, former = params["path"], params["former"]
    if identity is not None and identity["boot"] != sysio.boot_id():
        return ""
    try:
        if pci_driver.override(device) != params["driver"]:
            return ""
        pci_driver.give(device, "", probe=bool(former))
    except FileNotFoundError:
        return ""  # the device was taken out
    now = pci_driver.of(device)
    return "" if now == former else f"it has the driver {now or 'of nobody'} now, and had {former or 'none'}"


def _undo_access(params: dict[str, Any], identity: dict[str, Any] | None, deadline: float) -> str:
    if identity is None:
        return ""  # it is recorded before the list is changed
    from kata import acl

    acl.take_out(params["path"], int(params["user"]), identity)
    return ""


def _in_network(params: dict[str, Any], identity: dict[str, Any], work: Callable[[], str]) -> str:
    """Do something in the network namespace that an identity names, if it is still there."""
    if identity["netns"] == sysio.namespace_inode("net", "thread-self"):
        return work()
    path = params.get("netns")
    try:
        if not path or os.stat(path).st_ino != identity["netns"]:
            return ""  # the namespace is gone, and everything in it
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""

    def there() -> str:
        sysio.setns(fd, sysio.CLONE_NEWNET)
        return work()

    from kata import threads

    try:
        return threads.aside(there)
    except OSError as error:
        return str(error.strerror)
    finally:
        os.close(fd)


def _delete_link(name: str, ifindex: int) -> str:
    """Delete an interface (RTM_DELLINK), if name and index belong together."""
    # ifinfomsg: family, type, index, flags, which of them
    return _rtnetlink(name, ifindex, 17, struct.pack("=BxHiII", 0, 0, ifindex, 0, 0), (errno.ENODEV,))


def _delete_ingress(name: str, ifindex: int) -> str:
    """Delete the ingress qdisc of an interface (RTM_DELQDISC), if name and index belong together."""
    # tcmsg: family, index, handle, parent (TC_H_INGRESS), info
    body = struct.pack("=BxHiIII", 0, 0, ifindex, 0xFFFF0000, 0xFFFFFFF1, 0)
    return _rtnetlink(name, ifindex, 37, body, (errno.ENOENT, errno.EINVAL, errno.ENODEV))


def _rtnetlink(name: str, ifindex: int, kind: int, body: bytes, gone: tuple[int, ...]) -> str:
    """Send one request, rtnetlink(7), if the interface is ours; the errors in *gone* mean that nothing is there."""
    import socket

    try:
        if socket.if_nametoindex(name) != ifindex:
            return ""
    except OSError:
        return ""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
        netlink.settimeout(2)
        # nlmsghdr: length, type, NLM_F_REQUEST | NLM_F_ACK, sequence, port
        netlink.send(struct.pack("=IHHII", 16 + len(body), kind, 5, 1, 0) + body)
        number = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
    return "" if number in (0, *gone) else os.strerror(number)


# ---- reconciling ----


class Report:
    """The result of `reconcile`."""

    __slots__ = ("failures", "left", "undone")

    def __init__(self) -> None:
        self.undone: list[str] = []
        """Directories of journals that were undone, and unfinished ones that were removed."""
        self.failures: list[str] = []
        """A sentence for each resource that could not be undone."""
        self.left: list[tuple[str, str]] = []
        """Directory and reason for each that was left alone: its owner runs, it is retained, or it is not ours."""


def reconcile(run_dir: str, state_dir: str, deadline_s: float = 4.0) -> Report:
    """Undo every journal below ``run_dir/sandboxes``, ``run_dir/factory``, ``run_dir/pool``, ``state_dir/containers``,
    ``state_dir/volumes`` and the ``networks`` of both whose owner is dead.

    A journal whose owner is running is left alone, even while it is being created; so is a retained one (a container
    exists until it is removed). Directories without a journal are not ours, and are only reported.

    Args:
        run_dir: See `kata.paths.run_dir`.
        state_dir: See `kata.paths.state_dir`.
        deadline_s: Seconds for each journal.

    Returns:
        The report; nothing is raised for a single bad journal.
    """
    report = Report()
    for base in (
        os.path.join(run_dir, "sandboxes"),
        os.path.join(run_dir, paths.FACTORY),
        os.path.join(run_dir, paths.POOL),
        os.path.join(state_dir, "containers"),
        os.path.join(state_dir, "volumes"),
        os.path.join(run_dir, paths.NETWORKS),
        os.path.join(state_dir, paths.NETWORKS),
    ):
        try:
            names = sorted(os.listdir(base))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            directory = os.path.join(base, name)
            if name.startswith(journals.NEW_PREFIX):
                _reconcile_unfinished(directory, name, deadline_s, report)
            elif os.path.lexists(os.path.join(directory, journals.FILE_NAME)):
                _reconcile_one(directory, deadline_s, report)
            elif os.path.lexists(directory):
                report.left.append((directory, "it has no journal"))
    return report


def reconcile_sandboxes(base: str, client: str, deadline_s: float = 4.0) -> Report:
    """Undo the journals of dead owners as `reconcile` does, but only those of one client's sandboxes.

    Args:
        base: The directory that holds the sandboxes' directories.
        client: Name of the client, as in the journals' ``meta``.
        deadline_s: Seconds for each journal.

    Returns:
        The report, without sandboxes whose owner is running.
    """
    report = Report()
    for path in journals.find(base):
        try:
            journal = journals.Journal.open(path)
        except KataError:
            continue  # it has just been removed
        ours = journal.meta.get("client") == client and not journal.owner_alive()
        journal.close()
        if ours:
            _reconcile_one(os.path.dirname(path), deadline_s, report)
    return report


def _reconcile_one(directory: str, deadline_s: float, report: Report) -> None:
    try:
        journal = journals.Journal.open(os.path.join(directory, journals.FILE_NAME))
    except KataError as error:
        if os.path.lexists(os.path.join(directory, journals.FILE_NAME)):
            report.failures.append(error.message)
        return
    try:
        if journal.outlives_owner():
            report.left.append((directory, "it is kept"))
        elif journal.owner_alive():
            report.left.append((directory, "its owner is alive"))
        else:
            failures = undo(journal, deadline_s)
            report.failures.extend(failures)
            if not failures:
                report.undone.append(directory)
    except (JournalError, OSError) as error:
        report.failures.append(f"cannot undo {directory}: {error}")
    finally:
        journal.close()


def _reconcile_unfinished(directory: str, name: str, deadline_s: float, report: Report) -> None:
    """Handle a directory whose journal is being created, or whose creator died (`Journal.create_dir`)."""
    try:
        pid, start, boot, _ = name[len(journals.NEW_PREFIX) :].split("-")
        same_boot = sysio.boot_id().startswith(boot)
        alive = same_boot and sysio.process_alive(int(pid), int(start), sysio.boot_id())
    except ValueError:
        report.left.append((directory, "it is not ours"))
        return
    if alive:
        report.left.append((directory, "it is being set up"))
        return
    try:
        status = os.lstat(directory)
        problem = _remove_tree(directory, (status.st_dev, status.st_ino), time.monotonic() + deadline_s)
    except FileNotFoundError:
        return
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        report.failures.append(f"cannot remove {directory}: {problem}")
    else:
        report.undone.append(directory)
