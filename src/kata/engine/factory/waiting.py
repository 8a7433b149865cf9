"""A machine that waits for a sandbox, and its engine to be: the process that `kata.engine.factory.pool.fill` starts.

It lets a machine go on from its template, loads what an engine loads, and waits. Whoever connects first has it
(`kata.engine.factory.pool.take`): then it is that sandbox's engine, with all that an engine has been started with, in
the sandbox's directory; what the machine has on the host stays in a directory and journal of its own, which go when the
sandbox ends. A machine serves one sandbox, once.

It ends instead, with its machine, when the host gets short of memory, when its template is gone or is no longer that of
such machines, when its machine ends, or when it is told to.
"""

from __future__ import annotations

import _socket
import marshal
import os
import time

from kata import paths, sysio
from kata.engine.factory import host_memory, pool, pool_counts
from kata.engine.factory import template as templates
from kata.engine.factory.waiting_machine import END_S, Surroundings, Waiting
from kata.engine.launch import LIFETIME_FD, LISTEN_FD
from kata.errors import KataError
from kata.journal import Journal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine.factory.template import Template
    from kata.hypervisor.base import Capabilities, MachineShape
    from kata.hypervisor.protocols import Machine, Monitor, Started

LOOK_S = 2.0
"""How often it looks whether it is to go on waiting."""
READY_S = 60.0
CALM_S = 30.0
"""How long it lets starts go first, before it makes a machine all the same."""
_LARGEST_ORDER = 4 << 20
_RIGHTS = 6


def main() -> int:
    """The process that waits.

    Returns:
        The exit status: 0 also where there was nothing to do.
    """
    with open(pool.PLACEHOLDERS, "rb") as file:
        needs, root, key, name, plain, most, free_mib, nice, file_server = marshal.loads(
            file.read(_LARGEST_ORDER)
        )
    for number in range(pool.PLACEHOLDERS):
        os.set_inheritable(number, number < 3)
    before = _set_oom_score("1000")  # the first thing to do without
    lock = pool.lock()
    if lock is None:
        return 0
    from kata import journal_undo
    from kata.engine.lifecycle import boot_slots

    boot_slots.wait_for_calm(CALM_S)
    base = pool.directory()
    pool.count_killed()
    journal_undo.reconcile_sandboxes(base, paths.POOL)
    prefix = pool.name_of(needs, os.environ, nice)
    cgroups = host_memory.cgroups()
    if host_memory.shortage(free_mib, cgroups) or not _has_room(prefix, most):
        return 0
    from kata.hypervisor import registry
    from kata.hypervisor.base import MachineShape

    monitor = registry.find(name)
    wanted = templates.Template(root, key)
    one = Keeper(
        wanted, monitor, MachineShape(**plain), lambda: host_memory.shortage(free_mib, cgroups), before
    )
    try:
        one.start(f"{prefix}-{os.getpid()}", file_server)
    except (KataError, OSError):
        pool_counts.count(pool_counts.dropped(pool_counts.FAILED))
        one.end()
        return 1

    def filled() -> None:
        """The next one, if there are too few."""
        lock.close()
        if _has_room(prefix, most, makes_room=False):
            with _suppressed():
                pool.fill(
                    *(needs, wanted, monitor, one.shape, most, free_mib),
                    *(one.around.leave, nice, file_server),
                )

    one.serve(filled, nice)
    return 0


def _set_oom_score(score: str) -> str:
    """Set this process's OOM score (proc(5)), as far as it may. Returns what it was; empty where that is not known."""
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
            before = file.read()
            file.seek(0)
            file.write(score)
            return before
    except OSError:
        return ""


def _has_room(prefix: str, most: int, *, makes_room: bool = True) -> bool:
    """Whether another one may wait; if need be, the one of another kind that has waited longest is ended."""
    waiting = pool.listed()
    if len(waiting) < most:
        return True
    others = sorted((one["since"], one["name"]) for one in waiting if not one["name"].startswith(prefix))
    return bool(makes_room and others and pool.end([others[0][1]]))


def _inline() -> ThreadPoolExecutor:
    """What carries out at once what is given to it: a process that is to change its namespaces has no threads."""
    from concurrent.futures import Future, ThreadPoolExecutor

    class Inline(ThreadPoolExecutor):
        def submit(self, work: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
            done: Future[Any] = Future()
            try:
                done.set_result(work(*arguments, **named))
            except Exception as error:
                done.set_exception(error)
            return done

    return Inline(1)


class _suppressed:
    """contextlib.suppress(OSError), without its import."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> bool:
        return kind is not None and issubclass(kind, OSError)


class Keeper:
    """One machine that waits.

    Args:
        template: Its template.
        monitor: Its hypervisor.
        shape: What it is.
        shortage: Says why nothing should wait now; empty if something may.
        oom_score: That of an engine.

    Attributes:
        why: Why it ends, if nobody takes it: one of `kata.engine.factory.pool_counts.REASONS`.
        shape: As given.
        around: What the machine has beside its monitor.
    """

    def __init__(
        self,
        template: Template,
        monitor: Monitor,
        shape: MachineShape,
        shortage: Callable[[], str],
        oom_score: str,
    ) -> None:
        self.why = pool_counts.FAILED
        self._oom_score = oom_score
        self.shape = shape
        self.around = Surroundings()
        self._template = template
        self._monitor = monitor
        self._shortage = shortage
        self._capabilities: Capabilities | None = None
        self._journal: Journal | None = None
        self._started: Started | None = None
        self._listener: _socket.socket | None = None
        self._asked: _socket.socket | None = None
        self._place = ""

    def start(self, name: str, file_server: tuple[str, str] | None = None) -> None:
        """Let the machine go on from its template.

        Args:
            name: Of its directory.
            file_server: See `kata.engine.factory.pool.fill`.

        Raises:
            KataError: It does not.
            OSError: The host refuses something.
        """
        from kata.engine.lifecycle import volumes
        from kata.hypervisor.base import Attachments, Nic, random_mac

        base = pool.directory()
        self._journal = Journal.create_dir(base, name, {"client": paths.POOL, "id": name})
        self._place = os.path.join(base, name)
        volumes.own_namespace()
        around, nics = self.around, [Nic(random_mac()) for _ in range(self.shape.nics)]
        if self.shape.taps:
            from kata.network.netns import SpareTap

            around.spare = SpareTap()
            nics[0].tap_fd = around.spare.fd
        if file_server is not None:
            from kata.hypervisor.virtiofsd import FileServer

            program, cache = file_server
            around.share = volumes.Share(self._place, self._journal)
            around.share.prepare()
            around.files = FileServer(program, around.share.path, self._place, self._journal, cache)
        attachments = Attachments(
            sandbox_id=name,
            run_dir=self._place,
            nics=nics,
            share_dir=around.share.path if around.share is not None else "",
            share_server=around.files,
        )
        self._started = self._monitor.restore(self._template.path, attachments, self._journal, self.shape)
        if around.files is not None:
            around.files.start()
        self._started.complete()

    def end(self) -> None:
        """End the machine, and leave nothing. Blocks."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._started is not None:
            self._started.kill()
            self._started.status(END_S)
            self._started = None
        self.around.stop()
        if self._journal is not None:
            from kata import journal_undo

            journal_undo.undo(self._journal)
            self._journal.close()
            self._journal = None

    def serve(self, on_ready: Any, nice: int) -> None:
        """Wait, and become the engine of a sandbox, or end.

        Args:
            on_ready: Is called when it waits.
            nice: Of an engine.
        """
        import sys

        sys.modules["ssl"] = None  # type: ignore[assignment]  # as in an engine
        from kata import deferred

        deferred.defer()
        deferred.defer_parts()
        import asyncio
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        asyncio.run(self._serve(on_ready, nice))

    async def _serve(self, on_ready: Any, nice: int) -> None:
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        assert self._journal is not None
        assert self._started is not None
        from kata import children
        from kata.engine.factory import warm_up

        loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(2)
        loop.set_default_executor(threads)
        vm = self._monitor.adopt(self._started, self._journal, os.path.join(self._place, "console.log"))
        order: _Order | None = None
        try:
            agent = await asyncio.wait_for(self._agent(vm), READY_S)
            _load()
            await warm_up.run(agent, self._started.share_tag if self.around.share is not None else "")
            await agent.reseed(os.urandom(512))
            # There is little to do from here on; and then, who has asked waits.
            children.set_session_priority("self", 0)
            for pid in (os.getpid(), self._started.pid, *self.around.helpers()):
                _prioritize(pid, nice)
            self._listen()
            pool_counts.count(pool_counts.MADE)
            on_ready()
            order = await self._wait(vm, threads)
        except (KataError, OSError, TimeoutError):
            pass
        finally:
            if order is None:
                pool_counts.count(pool_counts.dropped(self.why))
                await vm.stop()
                vm.close()
                self.end()
            if self._asked is not None:
                self._asked.close()  # who has told it to end waits for that
        if order is not None:
            waiting = Waiting(
                *(self._started, vm, agent, self.shape, self._template.key, self._journal),
                self.around,
            )
            if self._oom_score:
                _set_oom_score(self._oom_score)
            await _become(order, waiting)

    async def _agent(self, vm: Machine) -> AgentClient:
        """The agent of a machine that is ready, and has randomness of its own."""
        from kata.agent.client import AgentClient
        from kata.ttrpc.client import Client

        await vm.confined()
        agent = AgentClient(await Client.connect(await vm.channel.connect()))
        await agent.check(READY_S)
        await agent.reseed(os.urandom(512))
        await agent.set_time(time.time_ns())
        return agent

    def _listen(self) -> None:
        assert self._journal is not None
        path = os.path.join(self._place, pool.SOCKET_NAME)
        entry = self._journal.begin("socket", path=path)
        self._listener = _socket.socket(
            _socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        )
        with sysio.SocketName(path) as name:
            self._listener.bind(name)
        self._listener.listen(1)
        self._journal.commit(entry)

    async def _wait(self, vm: Machine, threads: ThreadPoolExecutor) -> _Order | None:
        """Return what the first has handed over who connects; None when it is to end (`why`)."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        assert self._listener is not None
        loop = asyncio.get_running_loop()
        came = asyncio.Event()
        loop.add_reader(self._listener.fileno(), came.set)
        ended = asyncio.ensure_future(vm.wait())
        try:
            while not came.is_set():
                waits = asyncio.ensure_future(came.wait())
                await asyncio.wait({waits, ended}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                waits.cancel()
                if ended.done() or self.around.have_ended():
                    self.why = pool_counts.MACHINE
                    return None
                if not came.is_set() and self._is_over():
                    return None
        finally:
            loop.remove_reader(self._listener.fileno())
        number, _ = self._listener._accept()  # type: ignore[attr-defined]
        # Nobody else: a machine serves one sandbox.
        self._listener.close()
        self._listener = None
        os.unlink(os.path.join(self._place, pool.SOCKET_NAME))
        self._asked = sock = _socket.socket(fileno=number)
        self.why = pool_counts.SILENT
        order = _Order()
        try:
            sock.settimeout(pool.PATIENCE_S)
            if not order.receive(sock):
                if order.word == pool.END:
                    self.why = pool_counts.TOLD
                return None
            threads.shutdown()  # no other thread, for the change of namespaces
            loop.set_default_executor(_inline())
            sock.send(str(os.getpid()).encode())
            if sock.recv(8) == pool.CONFIRM:
                return order
        except OSError:
            pass
        order.close()
        loop.set_default_executor(ThreadPoolExecutor(2))  # an end may block
        return None

    def _is_over(self) -> bool:
        """Whether it is to wait no more: then that is `why`."""
        if self._shortage():
            self.why = pool_counts.MEMORY
            return True
        self.why = pool_counts.TEMPLATE
        try:
            os.stat(os.path.join(self._template.path, templates.WHOLE))
            os.stat(os.path.join(self._place, pool.SOCKET_NAME))
            return templates.key_of(self._monitor, self.shape) != self._template.key
        except OSError:
            return True


class _Order:
    """What a launcher hands over."""

    __slots__ = ("environment", "fds", "place", "plain", "word")

    def __init__(self) -> None:
        self.word = b""
        self.fds: list[int] = []
        self.place = ""
        self.environment: dict[str, str] = {}
        self.plain: dict[str, Any] = {}

    def receive(self, sock: _socket.socket) -> bool:
        """Take it in. Returns whether it is one; otherwise this process is to end."""
        self.word, messages, _, _ = sock.recvmsg(
            16, _socket.CMSG_SPACE(4 * _RIGHTS), _socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in messages:
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
                self.fds += [
                    int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data) - 3, 4)
                ]
        if self.word != pool.TAKE or len(self.fds) != _RIGHTS:
            self.close()
            return False
        with open(self.fds.pop(), "rb") as file:
            file.seek(0)
            self.place, self.environment, self.plain = marshal.loads(file.read(_LARGEST_ORDER))
        return True

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


def _prioritize(pid: int, nice: int) -> None:
    """Give all threads of a process the priority that a sandbox's have."""
    for task in os.listdir(f"/proc/{pid}/task"):
        with _suppressed():
            os.setpriority(os.PRIO_PROCESS, int(task), nice)


async def _become(order: _Order, waiting: Waiting) -> None:
    """Be the engine of a sandbox, to its end."""
    from kata.engine import main as engine

    entered_ns = time.monotonic_ns()
    for number, fd in enumerate(order.fds):
        os.dup2(fd, number, inheritable=number < LISTEN_FD)
    order.close()
    assert (LISTEN_FD, LIFETIME_FD) == (3, 4)
    os.environ.clear()
    os.environ.update(order.environment)
    waiting.go_home()
    await engine.serve_with(order.place, order.plain, waiting, entered_ns)


def _load() -> None:
    """What an engine loads while its machine boots, and before that."""
    from kata import journal_undo  # noqa: F401
    from kata.agent import dial  # noqa: F401
    from kata.engine import hostns, signals  # noqa: F401
    from kata.engine import main as engine  # noqa: F401
    from kata.engine.containers import hostroot, snapshot_root  # noqa: F401
    from kata.engine.forwarding import forward, relay  # noqa: F401
    from kata.engine.lifecycle import guest_setup, idle, sandbox, teardown  # noqa: F401
    from kata.engine.services import events, sandbox_service, task_service  # noqa: F401
    from kata.engine.services.management_socket import ManagementSocket  # noqa: F401
    from kata.network import plan, sk_lookup  # noqa: F401
    from kata.proto import sandbox_pb, task_pb, types_pb  # noqa: F401
    from kata.resources import host_cgroup, oom_score, systemd_scope  # noqa: F401
    from kata.ttrpc.server import Server  # noqa: F401
