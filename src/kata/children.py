"""Starts the programs of a sandbox: hypervisor, file server, network helper, loggers.

Each child is in the journal, with its identity, before it executes anything: it waits behind a gate until its parent
has recorded its pid and start time, and exits if the parent dies before that. It is killed when the thread that started
it ends. It has its own process group, a minimal environment, no core dumps and only the descriptors that it was given.
Usable before (and without) asyncio; importing `subprocess` alone would cost 8 ms.
"""

from __future__ import annotations

import _thread
import errno
import os

from kata import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, NoReturn

    from kata.confinement import Confinement
    from kata.journal import Entry, Journal

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
LOWEST = 19
"""The lowest priority, as a nice value."""
SESSION = 5
"""That of a session which lets others go first: a third of what they get."""
_STAGES = ("set up", "execute")


_F_SETPIPE_SZ = 1031


class StderrTail:
    """The standard error of a program, bounded; it never blocks the program.

    The pipe is non-blocking: output that does not fit is dropped. Of what was read, the beginning and the end are kept,
    so the last message of a program that dies is there unless it wrote too much just before.

    Attributes:
        reader: Readable when there is new output (`read`).
    """

    KEEP = 4 << 10

    __slots__ = ("_head", "_tail", "_writer", "reader")

    def __init__(self) -> None:
        import fcntl

        self.reader, self._writer = map(sysio.Fd, os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        try:
            fcntl.fcntl(self._writer.raw, _F_SETPIPE_SZ, 16 << 10)
        except OSError:
            pass  # over the user's pipe budget (pipe(7), pipe-user-pages-soft): it holds less
        self._head = b""
        self._tail = b""

    @property
    def write_fd(self) -> int:
        """The writing end, for the program."""
        return self._writer.raw

    def started(self) -> None:
        """Close our copy of the writing end, after the program was started."""
        self._writer.close()

    def read(self) -> bytes:
        """Read and return new output. After the program's end `reader` is closed."""
        new = b""
        while self.reader.is_open:
            try:
                data = os.read(self.reader.raw, 65536)
            except BlockingIOError:
                break
            if not data:
                self.reader.close()
                break
            new += data
        room = self.KEEP - len(self._head)
        self._head += new[:room]
        self._tail = (self._tail + new[room:])[-self.KEEP :]
        return new

    def text(self) -> str:
        """The kept output: at most twenty lines, with control characters escaped."""
        self.read()
        lines = (self._head + self._tail).decode("utf-8", "replace").removesuffix("\n").split("\n")[-20:]
        return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)

    def close(self) -> None:
        """Close the descriptors that are open."""
        self.started()
        self.reader.close()


class Child:
    """A program that was started. When it ends, `pidfd` becomes readable, and `poll` returns its status."""

    __slots__ = ("_journal", "_pidfd", "_status", "entry", "pid", "role")

    def __init__(self, pid: int, pidfd: int, role: str, journal: Journal, entry: Entry) -> None:
        self.pid = pid
        self._pidfd = sysio.Fd(pidfd)
        self.role = role
        self.entry = entry
        self._journal = journal
        self._status: int | None = None

    @property
    def pidfd(self) -> int:
        """Readable when it has ended, until `close`."""
        return self._pidfd.raw

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return not self._pidfd.is_open

    def poll(self) -> int | None:
        """Reap the program if it has ended.

        Returns:
            None while it runs; then its exit code, or minus the number of the signal that ended it.
        """
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
                self._journal.mark_gone(self.entry)
        return self._status

    def wait(self, timeout_s: float) -> int | None:
        """Wait at most `timeout_s` seconds for its end, blocking. Returns what `poll` returns."""
        if self._status is None:
            sysio.pidfd_wait(self.pidfd, timeout_s)
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens if the program has ended."""
        if self._status is None:
            try:
                sysio.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass

    def kill(self) -> None:
        """Send SIGKILL; nothing happens if the program has ended."""
        self.send_signal(sysio.SIGKILL)

    def close(self) -> None:
        """Close the pidfd; only after the program was reaped."""
        self._pidfd.close()


class SupervisedChild:
    """A helper program of a sandbox (file server, network, logging program): started, watched, explained and ended.

    Everything but `on_exit` and `unwatch` works without an event loop, so a helper can be started before there is one.

    Args:
        label: Its name in messages: ``"the user network (passt)"``.

    Attributes:
        label: Its name in messages.
    """

    __slots__ = ("_child", "_ended_by_us", "_loop", "_tail", "label")

    def __init__(self, label: str) -> None:
        self.label = label
        self._child: Child | None = None
        self._tail: StderrTail | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended_by_us = False

    def start(
        self, argv: Sequence[str], journal: Journal, role: str, *, with_stdout: bool = True, **how: Any
    ) -> None:
        """Start the program; its standard error is kept for `failure`. Only in the main thread.

        Args:
            argv: Its absolute path, and its arguments.
            journal: The sandbox's journal.
            role: A word for the journal.
            with_stdout: Keep its standard output as well.
            how: Further arguments of `spawn`.

        Raises:
            OSError: It could not be executed.
        """
        tail = StderrTail()
        if with_stdout:
            how["stdout"] = tail.write_fd
        try:
            self._child = spawn(argv, journal, role, stderr=tail.write_fd, **how)
        except BaseException:
            tail.close()
            raise
        tail.started()
        self._tail = tail

    @property
    def pid(self) -> int:
        """Its process id; 0 if it was not started."""
        return self._child.pid if self._child is not None else 0

    def poll(self) -> int | None:
        """Its status, as from `Child.poll`; None if it was not started or is running."""
        return self._child.poll() if self._child is not None else None

    def wait(self, timeout_s: float) -> int | None:
        """Wait at most `timeout_s` seconds for its end, blocking. Returns what `poll` returns."""
        return self._child.wait(timeout_s) if self._child is not None else None

    def said(self) -> str:
        """The end of its output: at most twenty lines, escaped."""
        return self._tail.text().strip() if self._tail is not None else ""

    def failure(self) -> str:
        """A sentence about an unexpected end; empty before its start, while it runs, and after `dismiss`."""
        status = self.poll()
        if status is None or self._ended_by_us:
            return ""
        said = self.said()
        return f"{self.label} {ending(status)}" + (f": {said}" if said else "")

    def on_exit(self, callback: Callable[[], object]) -> None:
        """Make the running event loop call *callback* once when the program has ended, for any reason.

        Args:
            callback: Called unless `unwatch` was called before.
        """
        import asyncio

        if self._child is None or self._child.is_closed:
            return
        self._loop = asyncio.get_running_loop()

        def ended() -> None:
            if self.poll() is not None:
                self.unwatch()
                callback()

        self._loop.add_reader(self._child.pidfd, ended)

    def unwatch(self) -> None:
        """Stop watching for its end. To be called in the event loop, before `stop` or `close`."""
        if self._loop is not None and self._child is not None and not self._child.is_closed:
            self._loop.remove_reader(self._child.pidfd)
        self._loop = None

    def dismiss(self) -> None:
        """Ask it to end (SIGTERM). From then on its end is not a failure."""
        self._ended_by_us = True
        if self._child is not None:
            self._child.send_signal(sysio.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, without waiting."""
        if self._child is not None:
            self._child.kill()

    def stop(self, patience_s: float = 0.0, killed_s: float = 1.0) -> None:
        """End the program and close its descriptors. Idempotent; blocks.

        Args:
            patience_s: Seconds that it has to end by itself before it is killed.
            killed_s: Seconds to wait for its end after it was killed.
        """
        if self._child is not None and self._child.wait(patience_s) is None:
            self._child.kill()
            self._child.wait(killed_s)
        self.close()

    def close(self) -> None:
        """Close the descriptors, except the pidfd of a running program, which is needed to kill it."""
        if self._child is not None and self._child.poll() is not None:
            self._child.close()
        if self._tail is not None:
            self._tail.read()  # `failure` may still be asked for
            self._tail.close()


def ending(status: int) -> str:
    """Describe a status from `Child.poll`."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def spawn(
    argv: Sequence[str],
    journal: Journal,
    role: str,
    *,
    pass_fds: Sequence[int] = (),
    fds_from_3: Sequence[int] = (),
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    terminate_first: bool = False,
    cgroups: Sequence[str] = (),
    survives_parent: bool = False,
    disable_thp: bool = False,
    capabilities: Iterable[int] | None = None,
    namespaces: int = 0,
    confinement: Confinement | None = None,
) -> Child:
    """Start a program as a child that is killed when this process ends.

    Only in the main thread: the parent-death signal is sent when the *thread* that forked ends.

    Args:
        argv: The program's absolute path, and its arguments.
        journal: The journal in which it is recorded, as a ``process``.
        role: A word for messages: "virtiofsd", "passt".
        pass_fds: Descriptors that it inherits, with the same numbers.
        fds_from_3: Descriptors that it inherits as 3, 4 and so on; excludes `pass_fds`.
        stdout: Descriptor for its standard output; None for /dev/null.
        stderr: Descriptor for its standard error; None for /dev/null.
        env: Its whole environment; None for a minimal one.
        terminate_first: Undoing the journal sends TERM before KILL.
        cgroups: Directories of cgroups that it joins before it executes the program.
        survives_parent: It ends by itself after us: it gets no death signal, and undoing the journal waits for it.
        disable_thp: It gets no transparent huge pages, even if it asks for them (prctl(2), PR_SET_THP_DISABLE).
        capabilities: The capabilities that it keeps; it can never regain others. None for all of ours.
        namespaces: CLONE_NEW* flags of new namespaces. In a new PID namespace it is process 1, so signals without a
            handler are ignored, except SIGKILL and SIGSTOP. Later mounts of ours appear in its mount namespace.
        confinement: What else it is left with; used up. With a user of its own, `capabilities` must be given.

    Returns:
        The running child; the program was executed when this returns.

    Raises:
        OSError: It could not be executed; `strerror` says why. Its entry in the journal is marked as gone.
        TimeoutError: It did not get so far, as when somebody has stopped it; it is killed then.
        RuntimeError: Not called from the main thread.
    """
    if _thread.get_native_id() != os.getpid():
        raise RuntimeError("children are started by the main thread only: their death signal follows it")
    # Imported now, for the child's use after the fork.
    import fcntl  # noqa: F401
    import resource  # noqa: F401
    import select  # noqa: F401

    sysio.preload()
    entry = journal.begin(
        "process", role=role, signal="WAIT" if survives_parent else "TERM" if terminate_first else "KILL"
    )
    gate_read, gate_write = map(sysio.Fd, os.pipe())
    # Closed by a successful exec; otherwise it carries the error.
    exec_status_read, exec_status_write = map(sysio.Fd, os.pipe())
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    pid = 0
    try:
        pid = _fork(namespaces & sysio.CLONE_NEWPID)
        if pid == 0:
            gate_write.close()
            _exec_child(
                argv,
                ENVIRONMENT if env is None else env,
                gate_read.raw,
                exec_status_write.raw,
                (null, null if stdout is None else stdout, null if stderr is None else stderr),
                pass_fds=pass_fds,
                fds_from_3=fds_from_3,
                cgroups=cgroups,
                survives_parent=survives_parent,
                disable_thp=disable_thp,
                capabilities=capabilities,
                namespaces=namespaces & ~sysio.CLONE_NEWPID,
                confinement=confinement,
            )
        pidfd = sysio.pidfd_open(pid)
        try:
            journal.commit(entry, pid=pid)
            os.write(gate_write.raw, b"x")
            exec_status_write.close()
            word = sysio.read_exec_status(exec_status_read.raw)
            if word:
                number = int(word[1:])
                raise OSError(number, f"cannot {_STAGES[word[0]]} {argv[0]}: {os.strerror(number)}", argv[0])
            if confinement is not None and confinement.handover is not None:
                confinement.handover.serve()
        except BaseException:
            # It may have executed its program already, and wait for us.
            sysio.pidfd_send_signal(pidfd, sysio.SIGKILL)
            os.close(pidfd)
            raise
    except BaseException:
        if pid > 0:
            gate_write.close()  # a child still behind the gate ends
            os.waitpid(pid, 0)
        journal.mark_gone(entry)
        raise
    finally:
        os.close(null)
        if confinement is not None:
            confinement.close()
        for end in (gate_read, gate_write, exec_status_read, exec_status_write):
            end.close()
    return Child(pid, pidfd, role, journal, entry)


def in_background(
    argv: Sequence[str],
    environment: Mapping[str, str],
    fds: Sequence[int],
    prepare: Callable[[], object] = int,
) -> None:
    """Execute a program that belongs to nobody here: init is its parent, and it has a session of its own.

    Args:
        argv: The program's absolute path, and its arguments.
        environment: Its whole environment.
        fds: Its descriptors, from 0 on; it gets no others.
        prepare: Is called in the new process first.

    Raises:
        OSError: There can be no further process.
    """
    sysio.preload()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                prepare()
                sysio.take_descriptors(fds)
                os.chdir("/")
                sysio.reset_signals()
                os.execve(argv[0], list(argv), dict(environment))
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def let_others_go_first() -> None:
    """Have this process run when nothing else wants to. For what `in_background` calls first.

    Where the scheduler puts each session into a group of its own (autogroup, sched(7)), a priority counts within the
    session alone, and the session has one as well: not the lowest, with which it would never get done on a busy host.
    """
    os.nice(LOWEST)
    set_session_priority("self", SESSION)


def set_session_priority(process: str, nice: int) -> None:
    """Give a process's session a priority, where sessions have one.

    Args:
        process: Its name in /proc: a pid or ``self``.
        nice: From -20 to 19.
    """
    try:
        with open(f"/proc/{process}/autogroup", "w", encoding="ascii") as file:
            file.write(str(nice))
    except OSError:
        pass  # this kernel has no such groups, or refuses to change one twice in a moment


def _exec_child(
    argv: Sequence[str],
    environment: Mapping[str, str],
    gate: int,
    status: int,
    stdio: tuple[int, int, int],
    *,
    pass_fds: Sequence[int],
    fds_from_3: Sequence[int],
    cgroups: Sequence[str],
    survives_parent: bool,
    disable_thp: bool,
    capabilities: Iterable[int] | None,
    namespaces: int,
    confinement: Confinement | None,
) -> NoReturn:
    """Run the child of `spawn`, from its fork to its exec.

    Args:
        argv: The program.
        environment: Its whole environment.
        gate: Delivers a byte when the child is in the journal; end of file means that the parent has ended.
        status: Closed by a successful exec; otherwise the stage and errno of the error are written to it.
        stdio: Descriptors for its standard streams.
        pass_fds: See `spawn`.
        fds_from_3: See `spawn`.
        cgroups: See `spawn`.
        survives_parent: See `spawn`.
        disable_thp: See `spawn`.
        capabilities: See `spawn`.
        namespaces: CLONE_NEW* flags of the namespaces to unshare.
        confinement: See `spawn`.
    """
    import resource

    stage = 0
    try:
        if not os.read(gate, 1):
            os._exit(1)  # the parent ended before it had recorded us
        os.setpgid(0, 0)
        for number, fd in enumerate(stdio):
            os.dup2(fd, number)
        sysio.close_on_exec_from(3)  # including descriptors that we have inherited ourselves
        for fd in pass_fds:
            os.set_inheritable(fd, True)
        if fds_from_3:
            gate, status = _move_to_3(fds_from_3, gate, status, confinement)
        for cgroup in cgroups:
            sysio.write_existing(f"{cgroup}/cgroup.procs", "0")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if disable_thp:
            sysio.prctl(sysio.PR_SET_THP_DISABLE, 1)
        _restrict(namespaces, capabilities, confinement)
        if not survives_parent:
            sysio.prctl(sysio.PR_SET_PDEATHSIG, sysio.SIGKILL)
            # In a new PID namespace, the parent has no pid by which to tell whether it has ended.
            if sysio.pidfd_wait(gate, 0):
                os._exit(1)
        if confinement is not None:
            confinement.seal()
        stage = 1
        if confinement is not None:
            confinement.execute(argv, environment)
        os.execve(argv[0], list(argv), environment)
    except OSError as error:
        os.write(status, bytes((stage,)) + str(error.errno or errno.EIO).encode())
    finally:
        os._exit(127)


def _restrict(namespaces: int, capabilities: Iterable[int] | None, confinement: Confinement | None) -> None:
    if namespaces:
        _unshare(namespaces)
    if confinement is not None:
        confinement.limit()
    os.chdir("/")
    os.umask(0o077)
    sysio.reset_signals()
    if capabilities is not None:
        user, keeps_groups = (
            (confinement.user, confinement.keeps_groups) if confinement is not None else (0, False)
        )
        sysio.keep_capabilities(capabilities, user, keeps_groups=keeps_groups)


def _move_to_3(
    fds: Sequence[int], gate: int, status: int, confinement: Confinement | None
) -> tuple[int, int]:
    """Move descriptors to 3 and above for a program. Returns the new numbers of `gate` and `status`."""
    import fcntl

    # First move all of them out of that range, since their present numbers may be in it.
    above = 3 + len(fds)
    status = fcntl.fcntl(status, fcntl.F_DUPFD_CLOEXEC, above)
    gate = fcntl.fcntl(gate, fcntl.F_DUPFD_CLOEXEC, above)
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in fds]
    if confinement is not None:
        confinement.move_above(above)
    for number, fd in enumerate(aside, 3):
        os.dup2(fd, number)
    return gate, status


def _fork_by_another() -> int:
    """Fork a child with a PID namespace of its own, where this process could not go back to its own namespace.

    A process in between makes the namespace and ends. The child then is ours, since we are its subreaper.

    Raises:
        OSError: The namespace could not be made.
    """
    sysio.adopt_orphans(True)
    read, write = map(sysio.Fd, os.pipe())
    between = os.fork()
    if between == 0:
        try:
            sysio.unshare(sysio.CLONE_NEWPID)
            pid = os.fork()
            if pid == 0:
                # Until the one in between has ended, our parent is not the one whose end we are to follow.
                write.close()
                os.read(read.raw, 1)
                read.close()
                return 0
            os.write(write.raw, f"+{pid}".encode())
        except OSError as error:
            os.write(write.raw, f"-{error.errno or errno.EIO}".encode())
        finally:
            if os.getpid() != 1:
                os._exit(0)
    try:
        word = os.read(read.raw, 16)
        os.waitpid(between, 0)
    finally:
        # What else is left without a parent later is init's, which reaps it.
        sysio.adopt_orphans(False)
        read.close()
        write.close()
    number = int(word or b"-5")
    if number < 0:
        raise OSError(-number, f"cannot make a PID namespace: {os.strerror(-number)}")
    return number


def _fork(new_pid_namespace: int) -> int:
    if not new_pid_namespace:
        return os.fork()
    if sysio.in_user_namespace():
        return _fork_by_another()
    ours = os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        sysio.unshare(sysio.CLONE_NEWPID)
        pid: int | None = None
        try:
            pid = os.fork()
        finally:
            if pid != 0:
                try:
                    sysio.setns(ours, sysio.CLONE_NEWPID)  # for later children
                except OSError as error:
                    if pid is not None:
                        # It is waiting at its gate, and the caller would not get to know it. All later children would
                        # be in its namespace, which ends with its first process.
                        os.kill(pid, sysio.SIGKILL)
                        os.waitpid(pid, 0)
                    why = f"cannot go back to its own PID namespace: {error.strerror}"
                    raise OSError(error.errno, why) from error
    finally:
        os.close(ours)
    return pid


def _unshare(namespaces: int) -> None:
    sysio.unshare(namespaces)
    if namespaces & sysio.CLONE_NEWNS:
        sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_SLAVE)
        if not _root_is_replaceable():
            sysio.mount("/", "/", None, sysio.MS_BIND | sysio.MS_REC)
            os.chroot("/..")  # the mount that is on top there now


def _root_is_replaceable() -> bool:
    """Whether pivot_root(2) can replace the root directory, which must be a mount and not an initramfs."""
    fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = b""
        while piece := os.read(fd, 1 << 16):
            text += piece
    finally:
        os.close(fd)
    roots = [line for line in text.split(b"\n") if b" / " in line and line.split(b" ", 5)[4] == b"/"]
    return bool(roots) and b" - rootfs " not in roots[-1]


def socketpair() -> tuple[int, int]:
    """Return two connected stream sockets, close-on-exec, without the cost of `import socket` (5 ms)."""
    import _socket

    one, other = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
    return one.detach(), other.detach()


def find_program(name: str, extra: Sequence[str] = ()) -> str | None:
    """Return the absolute path of a program on the fixed search path (not the caller's PATH); None if there is none."""
    for directory in (*ENVIRONMENT["PATH"].split(":"), *extra):
        path = os.path.join(directory, name)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return None


def output_of(argv: Sequence[str]) -> bytes:
    """Run a program that ends by itself (``--help``), blocking, and return its standard output and error.

    Raises:
        OSError: It cannot be executed.
    """
    read_end, write_end = map(sysio.Fd, os.pipe2(os.O_CLOEXEC))
    with read_end, write_end:
        pid = os.posix_spawn(
            argv[0],
            list(argv),
            ENVIRONMENT,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, write_end.raw, 1),
                (os.POSIX_SPAWN_DUP2, write_end.raw, 2),
            ],
        )
        write_end.close()
        said = b""
        while piece := os.read(read_end.raw, 65536):
            said += piece
        os.waitpid(pid, 0)
    return said


def version_of(program: str) -> str:
    """The first line of what a program says to ``--version``; ``unknown`` where it says nothing, or cannot be run."""
    try:
        lines = output_of([program, "--version"])[:200].decode(errors="replace").splitlines()
    except OSError:
        lines = []
    return lines[0] if lines else "unknown"
