"""Making templates, and what becomes of them.

One is made at a time, in a process of its own (`launch`), which has the lowest priority: it boots a machine without
anything of a sandbox's, waits for its agent, leaves it, and saves the machine. What was made appears by rename(2), with
its content on the disk before; a maker that is killed leaves a directory that the next one removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import marshal
import os
import shutil
import time

from kata import launcher, paths, sysio
from kata.engine.factory import template as templates
from kata.errors import AgentTimeoutError, HostError, HypervisorError, KataError, StarvedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kata.engine.factory.template import Template
    from kata.hypervisor.base import MachineShape
    from kata.hypervisor.protocols import Machine, Monitor, Started
    from kata.journal import Journal

COMMAND = "make-template"
MOST = 8
"""Templates that are kept; the one that was used longest ago goes first."""
UNUSED_S = 14 * 86400.0
"""One that was not used for so long goes when another is made, or with ``kata gc``."""
JUST_USED_S = 60.0
"""One that was used since may be just being opened."""
LEAST_FREE = 512 << 20
"""Bytes that the file system has to have free for one to be made."""
READY_S = 120.0
STARVED_S = 60.0
"""How long none is made anew after one that an overloaded host kept from being made."""
QUIET_S = 0.3
"""How long the guest has after the last call: it learns that nobody is connected, and has done what it put off."""
_LOCK = "lock"
_LOCK_FD = 3
"""Of the process that `launch` starts: it has had the lock since before it was executed."""
_STARVED = 3
"""Exit status of the process that boots and saves the machine: the host's load kept it from that."""
_HEXADECIMAL = frozenset("0123456789abcdef")
_MAKING = ".making-"
OURS = (_MAKING, ".gone-", ".broken-")
"""Beginnings of the names of what is half made, or on its way out; the directory may have other things in it."""


# ---- from an engine ----


def launch(wanted: Template, monitor: Monitor, shape: MachineShape, leave: Callable[[], object]) -> None:
    """Start a process that makes a template, and return at once. It belongs to nobody here.

    Args:
        wanted: Which.
        monitor: The hypervisor.
        shape: What the machine is.
        leave: Is called in the new process: takes it out of what is the caller's sandbox's.

    Raises:
        OSError: It could not be started.
    """
    with _locked(wanted.root, waits=False) as lock:
        # Of many starts at once the first has it made: the lock is the new process's from here on.
        if lock is not None and not _is_there(wanted) and not templates.failure(wanted):
            _launch(wanted, monitor, shape, leave, lock)


def _launch(
    wanted: Template, monitor: Monitor, shape: MachineShape, leave: Callable[[], object], lock: int
) -> None:
    plain = {name: getattr(shape, name) for name in shape.__slots__}
    order = marshal.dumps((wanted.root, wanted.key, monitor.name, {**plain, "options": dict(shape.options)}))
    argv = [*launcher.command(), COMMAND]
    read, write = os.pipe()
    if len(order) > 4096:
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, len(order))
    os.write(write, order)
    os.close(write)

    from kata import children

    def prepare() -> None:
        leave()
        os.nice(children.LOWEST)

    with sysio.Fd(read), sysio.Fd(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) as null:
        children.in_background(argv, os.environ, (read, null.raw, null.raw, lock), prepare)


def main() -> int:
    """The process that `launch` starts.

    Returns:
        The exit status: 0 also where there was nothing to do.
    """
    with open(0, "rb") as order:
        root, key, name, plain = marshal.loads(order.read(1 << 20))
    # When the host has no memory left, a template is the first thing to do without.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    os.set_inheritable(_LOCK_FD, False)
    sysio.unshare(sysio.CLONE_NEWNET)  # not the sandbox's
    from kata.hypervisor import registry
    from kata.hypervisor.base import MachineShape

    wanted = templates.Template(root, key)
    monitor = registry.find(name)
    try:
        make(wanted, monitor, MachineShape(**plain), lock=_LOCK_FD)
    except StarvedError as error:
        write_failure(wanted, error, STARVED_S)
        return 1
    except KataError as error:
        write_failure(wanted, error)
        return 1
    return 0


# ---- making ----


def make(wanted: Template, monitor: Monitor, shape: MachineShape, *, lock: int | None = None) -> bool:
    """Make a template.

    Args:
        wanted: Which.
        monitor: The hypervisor.
        shape: What the machine is.
        lock: A descriptor that has the lock; None waits for it while another one is made.

    Returns:
        Whether it was made; it may be there already.

    Raises:
        KataError: It could not be. Nothing is left of it.
    """
    try:
        with _locked(wanted.root, waits=True) if lock is None else contextlib.nullcontext():
            if _is_there(wanted):
                return False
            _make(wanted, monitor, shape)
            return True
    except OSError as error:
        raise HostError(
            f"cannot make a template: {error.strerror}: {error.filename or wanted.path}"
        ) from error


def _is_there(wanted: Template) -> bool:
    return os.path.exists(os.path.join(wanted.path, templates.WHOLE))


def _make(wanted: Template, monitor: Monitor, shape: MachineShape) -> None:
    clear(wanted.root, room_for=1)
    _check_room(wanted.root)
    making = os.path.join(wanted.root, f"{_MAKING}{wanted.key}")
    os.mkdir(making, 0o700)
    try:
        _in_a_child(monitor, shape, making)
        if templates.key_of(monitor, shape) != wanted.key:
            raise HostError("the guest or the hypervisor changed while a template was made")
        _to_disk(making)
        os.rename(making, wanted.path)
        _sync(wanted.root)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{wanted.path}.{templates.FAILED}")


def write_failure(wanted: Template, error: KataError, counts_s: float = templates.FAILED_S) -> None:
    """Have engines know why there is no template, so that not each of them tries.

    Args:
        wanted: Which.
        error: Why.
        counts_s: For how long.
    """
    path = f"{wanted.path}.{templates.FAILED}"
    with contextlib.suppress(OSError):
        paths.make_dirs(wanted.root, 0o711)
        sysio.replace_file(path, error.message[:500].encode())
        if counts_s < templates.FAILED_S:
            since = time.time() - (templates.FAILED_S - counts_s)
            os.utime(path, (since, since))


def _in_a_child(monitor: Monitor, shape: MachineShape, directory: str) -> None:
    """Boot and save the machine, in a process whose namespaces end with it."""
    read, write = os.pipe()
    maker = os.getpid()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sysio.die_with_parent(maker)
            os.close(read)
            status, words = _outcome(monitor, shape, directory)
            os.write(write, words[:4000])
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        words = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        kind = StarvedError if status == _STARVED else HypervisorError
        raise kind(f"cannot make a template: {words.decode('utf-8', 'replace') or 'its process was killed'}")


def _outcome(monitor: Monitor, shape: MachineShape, directory: str) -> tuple[int, bytes]:
    """Boot and save the machine. Returns an exit status, and what went wrong: 0 and nothing if it was saved."""
    try:
        _boot(monitor, shape, directory)
    except KataError as error:
        return _STARVED if isinstance(error, StarvedError) else 1, error.message.encode()
    except BaseException as error:
        return 1, repr(error).encode()
    return 0, b""


def _boot(monitor: Monitor, shape: MachineShape, directory: str) -> None:
    from kata import journal_undo
    from kata.engine.lifecycle import boot_slots, volumes
    from kata.hypervisor.base import Attachments, Nic, random_mac
    from kata.journal import Journal

    name = f"template-{os.getpid()}"
    slot = boot_slots.BootSlot(lambda _words: None)
    journal = Journal.create_dir(
        os.path.join(paths.run_dir(), paths.FACTORY), name, {"client": "factory", "id": name}
    )
    try:
        volumes.own_namespace()
        sysio.unshare(sysio.CLONE_NEWNET)
        attachments = Attachments(
            sandbox_id=name,
            run_dir=os.path.dirname(journal.path),
            nics=[
                Nic(random_mac(), tap_fd=_tap(number) if number >= shape.nics - shape.taps else None)
                for number in range(shape.nics)
            ],
            saves_into=directory,
        )
        started = monitor.start(shape, attachments, journal)
        asyncio.run(_save(monitor, started, journal, directory, rehearses=shape.accel == "tcg"))
    finally:
        left = journal_undo.undo(journal)
        journal.close()
        slot.end()
    if left:
        raise HostError(f"making a template left something behind: {left[0]}")


def _tap(number: int) -> sysio.Fd:
    """A tap that leads nowhere: what a guest leaves to its interface it negotiates once, when it boots. There it
    also learns how large its packets may ever be, where the hypervisor tells it that of the tap.
    """
    import socket

    from kata.network import netns, rtnetlink
    from kata.network.user import MTU

    name = f"template{number}"
    fd = sysio.Fd(netns.make_tap(name))
    with rtnetlink.Rtnl() as rtnl:
        rtnl.bring_up(socket.if_nametoindex(name), MTU)
    return fd


async def _save(
    monitor: Monitor, started: Started, journal: Journal, directory: str, *, rehearses: bool
) -> None:
    from kata.agent.client import AgentClient
    from kata.engine.factory import warm_up
    from kata.engine.lifecycle import watch
    from kata.ttrpc.client import Client

    machine: Machine = monitor.adopt(started, journal)
    ended = asyncio.ensure_future(machine.wait())

    async def prepare() -> None:
        await machine.confined()
        agent = AgentClient(await Client.connect(await machine.channel.connect()))
        try:
            await agent.check(None)
            if rehearses:
                await warm_up.run(agent, "")
        finally:
            agent.close()
        await asyncio.sleep(QUIET_S)
        await machine.pause()
        await machine.save(directory)

    preparing = asyncio.ensure_future(prepare())
    try:
        # Of all processes this one and its machine have the lowest priority.
        patience = watch.Patience(machine.pid, READY_S)
        await patience.wait(ended, preparing, what="get ready to be saved")
        if preparing.done():
            try:
                await preparing
            except AgentTimeoutError as error:  # of one of the calls
                if patience.starved_s > patience.counted_s:
                    raise StarvedError(error.message) from error
                raise
        else:
            raise ended.result().error or HypervisorError("the machine ended")
    finally:
        preparing.cancel()
        await machine.stop()
        machine.close()


def _to_disk(directory: str) -> None:
    """Give what was saved to root, and have it on the disk."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        os.chown(path, os.geteuid(), os.getegid())
        os.chmod(path, 0o400)
        _sync(path)
    _sync(directory)


def _sync(path: str) -> None:
    """fsync(2) of a file or directory by its name."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- keeping ----


@contextlib.contextmanager
def _locked(root: str, *, waits: bool) -> Iterator[int | None]:
    """Be the only one who makes or removes templates.

    Gives the descriptor that has the lock until its last copy is closed; None where another one has it, and nobody
    waits.
    """
    paths.make_dirs(root, 0o711)
    fd = os.open(os.path.join(root, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield fd
    finally:
        os.close(fd)


def listed(root: str) -> list[dict[str, Any]]:
    """All templates, the one that was used last first.

    Returns:
        Of each ``key``, ``path``, ``bytes`` (on the disk), ``made`` and ``used`` (seconds since 1970), and ``machine``
        (its shape).
    """
    from kata.hypervisor import saved

    found = []
    for name in _names(root):
        path = os.path.join(root, name)
        try:
            machine = saved.document(path, templates.WHOLE, 1 << 20)
            found.append(
                {
                    "key": name,
                    "path": path,
                    "bytes": sum(sysio.disk_bytes(one.stat()) for one in os.scandir(path)),
                    "made": os.stat(os.path.join(path, templates.WHOLE)).st_mtime,
                    "used": os.stat(path).st_mtime,
                    "machine": machine,
                }
            )
        except (OSError, KataError):
            continue  # it is just being removed
    return sorted(found, key=lambda one: -one["used"])


def failures(root: str) -> list[tuple[str, str]]:
    """Keys for which no template could be made, with the reasons."""
    found = []
    for name in _entries(root):
        key, _, kind = name.partition(".")
        if key and kind == templates.FAILED:
            try:
                with open(os.path.join(root, name), encoding="utf-8") as file:
                    found.append((key, file.read(500)))
            except OSError:
                continue
    return found


def sweep(root: str) -> list[str]:
    """Remove what was left half made, and templates that were not used for long; see `clear`.

    Returns:
        What was removed. Nothing while one is being made.
    """
    if not os.path.isdir(root):
        return []
    with _locked(root, waits=False) as lock:
        return [] if lock is None else clear(root)


def destroy(root: str) -> list[str]:
    """Remove all templates, once no other is being made. Machines that went on from one keep what they have of it.

    Returns:
        Their keys.
    """
    if not os.path.isdir(root):
        return []
    with _locked(root, waits=True):
        clear(root)
        removed = _names(root)
        for name in removed:
            _remove(root, name)
        for key, _ in failures(root):
            os.unlink(os.path.join(root, f"{key}.{templates.FAILED}"))
    return removed


def clear(root: str, *, room_for: int = 0) -> list[str]:
    """With the lock: remove what is half made or broken, what was not used for long, and what is too much.

    Args:
        root: The directory of all.
        room_for: How many are to be made.

    Returns:
        What was removed.
    """
    now = time.time()
    gone = []
    for name in _entries(root):
        if name.startswith(OURS):
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)
            gone.append(os.path.join(root, name))
        elif name.partition(".")[2].startswith(templates.FAILED) and _is_older(
            root, name, templates.FAILED_S
        ):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(root, name))
    kept = listed(root)
    for place, one in enumerate(kept):
        idle = now - one["used"]
        if idle > UNUSED_S or (place >= MOST - room_for and idle > JUST_USED_S):
            _remove(root, one["key"])
            gone.append(one["path"])
    return gone


def _is_older(root: str, name: str, age_s: float) -> bool:
    try:
        return os.stat(os.path.join(root, name)).st_mtime < time.time() - age_s
    except OSError:
        return False


def _remove(root: str, key: str) -> None:
    aside = os.path.join(root, f".gone-{key}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(os.path.join(root, key), aside)
    shutil.rmtree(aside, ignore_errors=True)


def _entries(root: str) -> list[str]:
    try:
        return sorted(os.listdir(root))
    except FileNotFoundError:
        return []


def _names(root: str) -> list[str]:
    return [
        name
        for name in _entries(root)
        if len(name) == 32 and _HEXADECIMAL.issuperset(name) and os.path.isdir(os.path.join(root, name))
    ]


def _check_room(root: str) -> None:
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    if free < LEAST_FREE:
        raise HostError(
            f"{root} has {free >> 20} MiB free, and a template is made with {LEAST_FREE >> 20} at least",
            "Free some, or set template_path in [factory].",
        )
