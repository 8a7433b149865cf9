"""The containers of the `kata` command, as files.

A container is a directory, ``$KATA_STATE_DIR/containers/<id>``::

    container.json   the options: written at creation, and by `kata update`
    config.json      the runtime specification: likewise
    state.json       its state, written by the engine
    rw.img, log      its writable layer and its output
    volume-N.img     its volumes on disks of their own
    journal          what has to be undone to remove it

The file ``$KATA_STATE_DIR/names/<name>`` holds the container's id; names are unique because that file is created
exclusively. A container whose engine has died without recording an exit is shown as exited with 137.
"""

from __future__ import annotations

import os
import time

from kata import paths, sysio
from kata.errors import AlreadyExistsError, HostError, JournalError, NotFoundError, StateError, UsageError
from kata.json_text import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.cli.args import Arguments
    from kata.journal import Journal

CREATED, RUNNING, PAUSED, EXITED = "created", "running", "paused", "exited"
_RECORD = "container.json"
_LOST = "its engine ended without recording why: it was killed, or the host went down"


class Container:
    """One container.

    Attributes:
        id: 32 hexadecimal digits.
        record: The content of container.json.
    """

    __slots__ = ("id", "record")

    def __init__(self, identity: str, record: dict[str, Any]) -> None:
        self.id = identity
        self.record = record

    @property
    def directory(self) -> str:
        return paths.container_dir(self.id)

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def socket(self) -> str:
        """Path of the engine's socket, which exists only while the container's sandbox runs."""
        return os.path.join(paths.sandbox_dir(self.id), "engine.sock")

    @property
    def log(self) -> str:
        return os.path.join(self.directory, "log")

    def raw_state(self) -> dict[str, Any]:
        """Return the state that the engine last wrote; an empty dict if there is none."""
        return _read(os.path.join(self.directory, "state.json")) or {}

    def state(self) -> dict[str, Any]:
        """Return the container's state, after checking that its engine is alive.

        Returns:
            ``status`` (created, running, paused, exited), and those of ``started_at``, ``finished_at``,
            ``exit_code``, ``oom_killed``, ``error``, ``pid``, ``engine`` that are known.
        """
        state = self.raw_state()
        status = state.get("status", CREATED)
        if status == "stopped":
            state["status"] = EXITED
        elif status in (RUNNING, PAUSED) or (status == CREATED and state.get("engine")):
            if engine_alive(state):
                state["status"] = status
            elif status == CREATED:
                state = {"status": CREATED}
            else:
                state.update(status=EXITED, exit_code=137, error=state.get("error") or _LOST)
        else:
            state["status"] = CREATED
        if state["status"] in (CREATED, EXITED) and os.path.exists(self.socket):
            # Usually it is about to start or to end; but the disk that holds the record may be full.
            state.update(self._told())
        return state

    def _told(self) -> dict[str, Any]:
        """The container's state from its living engine, if it is running."""
        from kata.engine.client import EngineClient
        from kata.errors import KataError

        try:
            with EngineClient(self.socket) as engine:
                answer = engine.state(self.id, timeout=1.0)
        except (KataError, OSError):
            return {}
        status = {2: RUNNING, 4: PAUSED}.get(answer.status)
        return {"status": status, "pid": answer.pid} if status else {}

    def running(self) -> bool:
        return self.state()["status"] in (RUNNING, PAUSED)

    def need_running(self) -> dict[str, Any]:
        """Return the container's state.

        Raises:
            StateError: It is not running.
        """
        state = self.state()
        if state["status"] not in (RUNNING, PAUSED):
            raise StateError(
                f"container {self.name} is not running: it is {state['status']}", f"kata start {self.name}"
            )
        return state


def engine_alive(state: dict[str, Any]) -> bool:
    """Whether the engine in a state is still running (and its pid was not reused)."""
    engine = state.get("engine") or {}
    try:
        return sysio.process_alive(int(engine["pid"]), int(engine["starttime"]), str(engine["boot_id"]))
    except (KeyError, ValueError):
        return False


def _read(path: str) -> dict[str, Any] | None:
    try:
        content = loads(sysio.read_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON file; an empty dict if it does not exist or is not a JSON object."""
    return _read(path) or {}


def write_json(path: str, content: dict[str, Any]) -> None:
    """Replace a JSON file atomically: a reader sees the old content or the new.

    Args:
        path: Path of the file.
        content: What it is to hold.
    """
    sysio.replace_file(path, dumps(content).encode())


RESTART_UNIT = "KATA_RESTART_UNIT"
"""An environment variable: the container's id in what its unit of systemd runs (`kata.cli.restart`)."""


def _containers_dir() -> str:
    return os.path.join(paths.state_dir(), "containers")


def _names_dir() -> str:
    return os.path.join(paths.state_dir(), "names")


def new_id() -> str:
    """Return a new, unique container id: 32 hexadecimal digits."""
    # No more than 128 bits: the id is part of a socket path, which is limited to 107 bytes.
    return os.urandom(16).hex()


_ADJECTIVES = """
agile bold brisk calm clear cosy deft eager early fair fond fresh gentle glad grand keen kind light
lively lucid mellow mild neat nimble plain polite prompt proud quick quiet ready rosy sharp shy
silent sleek snug solid spry stark steady still stout sunny swift tame tidy trim true vivid warm
wise witty
""".split()  # noqa: SIM905
_NOUNS = """
alder ant aspen badger bay beech birch bison brook cedar cliff clover condor crane creek crow dale
dune elk elm fern finch fjord fox gale gull hare hawk heath heron holly ibis ivy jay kite lark lily
lynx maple marsh mesa mole moss newt oak otter owl pine plover quail raven reed robin sage seal
shore shrew sparrow spruce stoat stork swan tern thrush trout vale vole willow wren yew
""".split()  # noqa: SIM905


def _random_name() -> str:
    bits = int.from_bytes(os.urandom(4), "little")
    return f"{_ADJECTIVES[bits % len(_ADJECTIVES)]}_{_NOUNS[bits // 256 % len(_NOUNS)]}"


def _claim(name: str, identity: str) -> bool:
    try:
        fd = os.open(
            os.path.join(_names_dir(), name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
    except FileExistsError:
        return False
    with os.fdopen(fd, "w") as file:
        file.write(identity)
    return True


class PendingContainer:
    """A container that is being created: a name and a directory, which are removed unless `commit` is called.

    Args:
        name: Its name; None chooses one.
        identity: Its id, of `new_id`; None chooses one.

    Raises:
        AlreadyExistsError: The name is taken.
    """

    def __init__(self, name: str | None, identity: str | None = None) -> None:
        from kata.journal import Journal

        self.id = identity or new_id()
        self.directory = paths.container_dir(self.id)
        paths.make_dirs(_names_dir(), 0o711)
        self._journal = Journal.create_dir(
            _containers_dir(), self.id, {"client": "kata", "kind": "container", "id": self.id}
        )
        self.name = self._take_name(name)

    def _take_name(self, name: str | None) -> str:
        for attempt in range(50):
            wanted = name or _random_name() + (f"_{attempt}" if attempt > 10 else "")
            entry = self._journal.begin("file", path=os.path.join(_names_dir(), wanted))
            if _claim(wanted, self.id):
                self._journal.commit(entry)
                return wanted
            self._journal.mark_gone(entry)
            if name:
                break
        self.discard()
        holder = find_or_none(name or "")
        of = f" by container {holder.id[:12]}" if holder else ""
        raise AlreadyExistsError(
            f"the name {name!r} is taken{of}",
            f"choose another --name, or remove that container: kata rm {name}",
        )

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def make_elsewhere(self, path: str, make: Callable[[], object]) -> None:
        """Have a file made outside of the container's directory, which goes with the container.

        Args:
            path: Where it is.
            make: Makes it.
        """
        entry = self._journal.begin("file", path=path)
        make()
        self._journal.commit(entry)

    def commit(self, record: dict[str, Any], spec: dict[str, Any]) -> Container:
        """Write the container's record and specification. From now on only `remove` removes it.

        Args:
            record: Content of ``container.json``.
            spec: The OCI specification.
        """
        write_json(self.path("config.json"), spec)
        write_json(self.path(_RECORD), record)
        self._journal.retain(_RECORD)
        self._journal.close()
        return Container(self.id, record)

    def discard(self) -> None:
        from kata import journal_undo

        journal_undo.undo(self._journal)


def remove(container: Container) -> None:
    """Remove a container that has no engine: its name, its writable layer, its log.

    Raises:
        JournalError: A part of it could not be removed.
    """
    from kata import journal_undo
    from kata.journal import Journal

    failures = journal_undo.undo(Journal.open(os.path.join(container.directory, "journal")))
    if failures:
        raise JournalError(
            f"container {container.name} could not be removed completely: {failures[0]}", "kata gc"
        )
    from kata import events

    known = {"sandbox": container.id, "container": container.id, "client": "kata", "name": container.name}
    try:
        events.append("container.deleted", known)
    except OSError:
        pass  # nothing fails for want of its record


class DirectoryLock:
    """The lock of what a directory below the state directory holds, held within a `with` statement.

    Args:
        directory: The directory, which is made. The lock is a file beside it, for everything in it has a journal.
        shared: For who only needs that nothing of it disappears.
        mode: Of the directory.

    Raises:
        HostError: The directory cannot be made or written.
    """

    __slots__ = ("_directory", "_fd", "_mode", "_shared")

    def __init__(self, directory: str, *, shared: bool = False, mode: int = 0o711) -> None:
        self._directory = directory
        self._shared = shared
        self._mode = mode

    def __enter__(self) -> None:
        import fcntl

        try:
            paths.make_dirs(self._directory, self._mode)
            self._fd = os.open(f"{self._directory}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(
                f"{self._directory} cannot be written: {error.strerror}", "check KATA_STATE_DIR"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX)
        except BaseException:  # Ctrl-C
            os.close(self._fd)
            raise

    def __exit__(self, *_error: object) -> None:
        os.close(self._fd)


def _held(container: Container) -> tuple[Journal, Container]:
    """Keep others from changing or removing a container, until the journal is closed; and what it is by now.

    Raises:
        NotFoundError: It is gone.
    """
    import fcntl

    from kata.journal import Journal

    gone = NotFoundError(f"container {container.name} is gone", "'kata ps -a' lists them all")
    try:
        journal = Journal.open(os.path.join(container.directory, "journal"))
    except JournalError:
        raise gone from None
    try:
        fcntl.flock(journal.fileno(), fcntl.LOCK_EX)  # who removes the container holds this lock, too
        if (fresh := load(container.id)) is None:
            raise gone
    except BaseException:
        journal.close()
        raise
    return journal, fresh


def change(container: Container, **entries: Any) -> None:
    """Change entries of a container's record, whatever others change of it meanwhile.

    Raises:
        NotFoundError: It is gone.
    """
    journal, fresh = _held(container)
    try:
        write_json(os.path.join(container.directory, _RECORD), {**fresh.record, **entries})
    finally:
        journal.close()


def rename(container: Container, name: str) -> None:
    """Give a container another name.

    Raises:
        AlreadyExistsError: The name is taken.
        NotFoundError: The container is gone.
    """
    journal, fresh = _held(container)
    try:
        former = fresh.name
        if name == former:
            raise AlreadyExistsError(f"container {container.name} has that name already", "choose another")
        new = os.path.join(_names_dir(), name)
        entry = journal.begin("file", path=new)
        if not _claim(name, container.id):
            journal.mark_gone(entry)
            raise AlreadyExistsError(
                f"the name {name!r} is taken", f"choose another, or remove that container: kata rm {name}"
            )
        journal.commit(entry)
        write_json(os.path.join(container.directory, _RECORD), {**fresh.record, "name": name})
        old = os.path.join(_names_dir(), former)
        try:
            os.unlink(old)
        except FileNotFoundError:
            pass
        for one in journal.entries:
            if one.kind == "file" and one.params.get("path") == old:
                journal.mark_gone(one)
    finally:
        journal.close()


def load(identity: str) -> Container | None:
    """The container with exactly this id; None if it does not exist, or is being created or removed."""
    record = _read(os.path.join(paths.container_dir(identity), _RECORD))
    return Container(identity, record) if record else None


def all_containers() -> list[Container]:
    """All containers, the newest first."""
    try:
        found = [load(identity) for identity in os.listdir(_containers_dir())]
    except FileNotFoundError:
        return []
    return sorted((c for c in found if c), key=lambda c: str(c.record.get("created_at", "")), reverse=True)


def latest() -> Container:
    """The container that was made last.

    Raises:
        NotFoundError: There is none at all.
    """
    found = all_containers()
    if not found:
        raise NotFoundError("there is no container, and so no latest one", "kata run IMAGE makes one")
    return found[0]


def named(name: str) -> Container | None:
    """The container with exactly this name, which is not that of a path; None if there is none."""
    try:
        return load(sysio.read_file(os.path.join(_names_dir(), name)).decode().strip())
    except (FileNotFoundError, ValueError):
        return None


def asked_for(arguments: Arguments) -> list[str]:
    """The containers that a command line names: with ``--latest``, the id of the one that was made last.

    Raises:
        UsageError: Others are named beside ``--latest``.
        NotFoundError: There is none at all.
    """
    if not arguments.flag("latest"):
        return arguments.rest
    if arguments.rest:
        raise UsageError(
            f"--latest is about one container, and {arguments.rest[0]!r} is named, too",
            "leave out one of the two",
        )
    return [latest().id]


def find_or_none(reference: str) -> Container | None:
    """Find a container by name, by id, or by an unambiguous beginning of its id; None if there is none.

    Raises:
        UsageError: The beginning of an id is ambiguous.
    """
    if not reference or "/" in reference or reference.startswith("."):
        return None
    if found := named(reference):
        return found
    try:
        matches = [name for name in os.listdir(_containers_dir()) if name.startswith(reference)]
    except FileNotFoundError:
        return None
    if len(matches) > 1:
        raise UsageError(
            f"{reference!r} is the beginning of {len(matches)} container ids",
            "give more digits, or the name",
        )
    return load(matches[0]) if matches else None


def find(reference: str) -> Container:
    """Find a container by name, by id, or by an unambiguous beginning of its id.

    Raises:
        NotFoundError: There is none.
        UsageError: The beginning of an id is ambiguous.
    """
    container = find_or_none(reference)
    if container is None:
        import difflib

        near = difflib.get_close_matches(reference, [c.name for c in all_containers()], 1)
        raise NotFoundError(
            f"no container named {reference!r}",
            f"did you mean {near[0]}?" if near else "'kata ps -a' lists them all",
        )
    return container


def network_names(record: dict[str, Any]) -> list[str]:
    """The names of a container's networks; without one, its network mode.

    Args:
        record: Its container.json.
    """
    return [one["network"] for one in record.get("networks") or ()] or [record["network"]]


def now() -> str:
    """The current time in UTC, as RFC 3339 with nanoseconds."""
    nanoseconds = time.time_ns()
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(nanoseconds // 10**9))
    return f"{seconds}.{nanoseconds % 10**9:09d}Z"


def _is_over(container: Container) -> bool:
    """Whether a ``--rm`` container has ended, or will never start because the `kata run` that made it is dead."""
    status = container.state()["status"]
    if status == EXITED:
        return bool(container.raw_state())
    if status != CREATED or not container.record.get("made_to_run"):
        return False
    if engine_alive(container.raw_state()) or os.path.isdir(paths.sandbox_dir(container.id)):
        return False  # an engine is about to start it, or is ending
    from kata.journal import Journal

    try:
        journal = Journal.open(os.path.join(container.directory, "journal"))
    except JournalError:
        return False
    try:
        return not journal.owner_alive()
    finally:
        journal.close()


def clear_stale() -> list[str]:
    """Remove leftovers: ``--rm`` containers whose engine died, or whose `kata run` died before it had started them,
    and names of containers that are gone.

    Returns:
        A description of each.
    """
    cleared = []
    for container in all_containers():
        if container.record["auto_remove"] and _is_over(container):
            remove(container)
            cleared.append(f"container {container.name}, made with --rm")
    try:
        names = os.listdir(_names_dir())
    except FileNotFoundError:
        return cleared
    for name in names:
        path = os.path.join(_names_dir(), name)
        try:
            with open(path, encoding="ascii") as file:
                identity = file.read().strip()
        except (FileNotFoundError, ValueError):
            continue
        # An empty file is being written. A container that is being created has its directory before its name.
        if identity and not os.path.isdir(paths.container_dir(identity)):
            os.unlink(path)
            cleared.append(f"the name {name} of a container that is gone")
    return cleared
