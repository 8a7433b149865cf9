"""`kata start`, `restart`, `stop`, `kill`, `rm`, `pause`, `resume`, `wait`."""

from __future__ import annotations

import math
import os
import time

from kata.cli import objects, records, signals
from kata.cli.args import Command, Option
from kata.cli.ending import ENDED, stop, wait_for_engine
from kata.cli.report import REMOVING
from kata.engine.client import EngineClient
from kata.errors import JournalError, KataError, StateError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata.cli.args import Arguments
    from kata.cli.records import Container

_GRACE = 10
_LONGEST = 1e6
"""Seconds that a container gets at most: 11 days, which is what -1 means, too."""

_ALL = "-a --all"
_LATEST = Option("-l --latest", "", "the container that was made last")
_ONE_WAY = (("all", "latest"),)
_IGNORE = Option("-i --ignore", "", "no error for those that are not there")
COMMANDS = {
    "start": Command(
        "start",
        "CONTAINER...",
        "Starts containers that are created or have ended, and prints their names.",
        [
            Option("-a --attach", "", "stay, show the output and end with the container's exit code"),
            Option("-i --interactive", "", "also connect standard input (implies --attach)"),
            Option("--all", "", "all containers that do not run"),
            _LATEST,
            Option("--sig-proxy", "true|false", "pass signals on to the container (true)"),
            Option(
                "--detach-keys", "KEYS", "keys that detach and leave the container running (ctrl-p,ctrl-q)"
            ),
        ],
        exclusive=_ONE_WAY,
        notes="With --attach or --interactive, a container that runs already is attached to, as in Docker.",
    ),
    "restart": Command(
        "restart",
        "CONTAINER...",
        "Stops containers if they run, and starts them.",
        [
            Option(
                "-t --time",
                "SECONDS",
                f"how long to wait between SIGTERM and SIGKILL ({_GRACE}); -1: no limit",
            ),
            Option(_ALL, "", "all containers"),
            _LATEST,
        ],
        exclusive=_ONE_WAY,
    ),
    "stop": Command(
        "stop",
        "CONTAINER...",
        "Stops containers: the stop signal, and SIGKILL when that has not ended them.",
        [
            Option(
                "-t --time",
                "SECONDS",
                f"how long to wait between the two ({_GRACE}); 0 kills at once; -1: no limit",
            ),
            Option(_ALL, "", "all containers that run"),
            _LATEST,
            _IGNORE,
        ],
        exclusive=_ONE_WAY,
    ),
    "kill": Command(
        "kill",
        "CONTAINER...",
        "Sends a signal to the first process of containers; after SIGKILL waits for their end.",
        [
            Option("-s --signal", "SIGNAL", "name or number (KILL)"),
            Option(_ALL, "", "all containers that run"),
            _LATEST,
        ],
        exclusive=_ONE_WAY,
    ),
    "rm": Command(
        "rm",
        "CONTAINER...",
        "Removes containers: their writable layer, volumes, log and name.",
        [
            Option("-f --force", "", "kill them first if they run; no error if there is none"),
            Option("-v --volumes", "", "accepted; volumes are always removed with their container"),
            Option(_ALL, "", "all containers"),
            _LATEST,
            _IGNORE,
        ],
        exclusive=_ONE_WAY,
    ),
    "pause": Command(
        "pause",
        "CONTAINER...",
        "Freezes all processes of containers.",
        [Option(_ALL, "", "all that run"), _LATEST],
        exclusive=_ONE_WAY,
    ),
    "resume": Command(
        "resume",
        "CONTAINER...",
        "Resumes paused containers.",
        [Option(_ALL, "", "all that are paused"), _LATEST],
        exclusive=_ONE_WAY,
    ),
    "wait": Command(
        "wait", "CONTAINER...", "Waits until containers end and prints their exit codes.", [_LATEST]
    ),
}


def each(references: list[str], act: Callable[[Container], str | None], exit_code: int | None = None) -> int:
    """Call *act* for several containers. It goes on after a failure and raises the first one at the end.

    Args:
        references: Names or ids of containers, as the user wrote them.
        act: Does it to one. What it returns is printed; the reference itself if it returns None.
        exit_code: See `report.raise_failures`.
    """

    def act_on(reference: str) -> str:
        shown = act(records.find(reference))
        return reference if shown is None else shown

    return objects.each(references, act_on, exit_code)


_ENDING = (signals.number("KILL"), signals.number("TERM"), signals.number("INT"), signals.number("QUIT"))
_ANY = (records.CREATED, records.RUNNING, records.PAUSED, records.EXITED)


def _chosen(arguments: Arguments, command: str, states: tuple[str, ...] = (records.RUNNING,)) -> list[str]:
    """The containers that a command line names; with ``--all``, the ids of those in one of these states."""
    if "all" not in arguments or not arguments.flag("all"):
        named = records.asked_for(arguments)
        COMMANDS[command].need(named, 1)
        if "ignore" in arguments and arguments.flag("ignore"):
            return [text for text in named if records.find_or_none(text) is not None]
        return named
    if arguments.rest:
        raise UsageError(
            "--all is about all containers, and some are named, too", "leave out one of the two"
        )
    return [one.id for one in records.all_containers() if one.state()["status"] in states]


# ---- start ----


def _start(arguments: Arguments) -> int:
    from kata.cli import session
    from kata.cli.pump import detach_keys, passes_signals

    chosen = _chosen(arguments, "start", (records.CREATED, records.EXITED))
    interactive = arguments.flag("interactive")
    keys = detach_keys(arguments.value("detach_keys"))
    proxy = passes_signals(arguments.value("sig_proxy"))
    if interactive or arguments.flag("attach"):
        if len(chosen) != 1:
            raise UsageError("only one container can be attached to", "start the others without -a")
        container = records.find(chosen[0])
        is_up = container.state()["status"] in (records.RUNNING, records.PAUSED)
        if container.record.get("restart") and os.environ.get(records.RESTART_UNIT) == container.id:
            from kata.cli import restart

            if is_up:
                raise StateError(f"container {container.name} is running already", "systemctl stop its unit")
            return restart.attend(container)
        if is_up:  # as in Docker, it is no error that there is nothing to start
            from kata.cli import execute

            return execute.attach(container, stdin=interactive, detach_keys=keys, proxy_signals=proxy)
        return session.run_attached(
            container,
            stdin=interactive and container.record["open_stdin"],
            detach_keys=keys,
            proxy_signals=proxy,
        )

    def act(container: Container) -> None:
        # Docker's `start` of a running container is a success that does nothing.
        if container.running():
            return
        if _is_restarted(container):
            from kata.cli import restart

            restart.start(container)
            return
        try:
            session.start_detached(container, discard=False)
        except session.Occupied:
            if not container.running():  # otherwise another command has started it
                raise

    return each(chosen, act)


# ---- stop ----


def _grace(arguments: Arguments) -> float | None:
    """The seconds of ``--time``; None without it."""
    text = arguments.value("time")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (0 <= seconds <= _LONGEST or seconds == -1):
        raise UsageError(f"--time {text!r} is not a number of seconds", "-t 10, or -1 for no limit")
    return seconds


def _patience(container: Container, asked: float | None) -> float:
    """How many seconds a container gets: of ``--time``, else of its ``--stop-timeout``."""
    seconds = float(container.record.get("stop_timeout", _GRACE)) if asked is None else asked
    return _LONGEST if seconds == -1 else seconds


def _stop(arguments: Arguments) -> int:
    grace = _grace(arguments)
    chosen = _chosen(arguments, "stop", (records.RUNNING, records.PAUSED))
    return each(chosen, lambda container: _stop_by_hand(container, _patience(container, grace)))


def _is_restarted(container: Container) -> bool:
    """Whether a unit of systemd starts the container; false for what that unit itself runs."""
    return bool(container.record.get("restart")) and os.environ.get(records.RESTART_UNIT) != container.id


def _stop_by_hand(container: Container, grace_s: float) -> None:
    if _is_restarted(container):
        from kata.cli import restart

        restart.mark_stopped(container)
    stop(container, grace_s)


def _restart(arguments: Arguments) -> int:
    grace = _grace(arguments)

    def act(container: Container) -> None:
        _stop_by_hand(container, _patience(container, grace))
        if records.load(container.id) is None:
            raise StateError(
                f"container {container.name} was made with --rm and is gone now that it has stopped"
            )
        if _is_restarted(container):
            from kata.cli import restart

            restart.start(container)
            return
        from kata.cli import session

        session.start_detached(container, discard=False)

    return each(_chosen(arguments, "restart", _ANY), act)


# ---- kill, rm ----


def _kill(arguments: Arguments) -> int:
    number = signals.number(arguments.value("signal") or "KILL")

    def act(container: Container) -> None:
        container.need_running()
        if _is_restarted(container) and number in _ENDING:
            from kata.cli import restart

            restart.mark_stopped(container)  # as in Docker
        if number == signals.number("KILL"):
            stop(container, 0)  # waits for the end, as Docker and Podman do after SIGKILL
            return
        try:
            with EngineClient(container.socket) as engine:
                engine.kill(container.id, number)
        except ENDED:
            raise StateError(
                f"container {container.name} has just ended", f"kata ps -a | grep {container.name}"
            ) from None

    return each(_chosen(arguments, "kill"), act)


def remove(container: Container, force: bool) -> None:
    """Remove a container.

    Args:
        container: The container.
        force: Kill it first if it runs.

    Raises:
        StateError: It runs, or its engine does not end.
    """
    status = container.state()["status"]
    if _is_restarted(container) and (force or status not in (records.RUNNING, records.PAUSED)):
        from kata.cli import restart

        restart.forget(container)  # it may be about to be started once more
        status = container.state()["status"]
    if status in (records.RUNNING, records.PAUSED):
        if not force:
            raise StateError(
                f"container {container.name} is {status}",
                f"kata stop {container.name}, or kata rm -f {container.name}",
            )
        stop(container, 0, force=True)
    if not wait_for_engine(container, tell=force):
        from kata.cli import session

        raise StateError(session.occupied(container), f"try again, or kata rm -f {container.name}")
    if os.path.lexists(container.directory):  # mostly its engine has removed it
        try:
            records.remove(container)
        except JournalError:
            if os.path.lexists(container.directory):  # otherwise somebody else was quicker
                raise
    if _is_restarted(container):
        from kata.cli import restart

        restart.reload()


def _rm(arguments: Arguments) -> int:
    force = arguments.flag("force")
    references = _chosen(arguments, "rm", _ANY)
    if force:
        references = [reference for reference in references if records.find_or_none(reference) is not None]
    return each(references, lambda container: remove(container, force), REMOVING)


# ---- pause, resume, wait ----


def _pause(arguments: Arguments) -> int:
    def act(container: Container) -> None:
        if container.need_running()["status"] == records.PAUSED:
            raise StateError(
                f"container {container.name} is paused already", f"kata resume {container.name}"
            )
        with EngineClient(container.socket) as engine:
            engine.pause(container.id)

    return each(_chosen(arguments, "pause"), act)


def _resume(arguments: Arguments) -> int:
    def act(container: Container) -> None:
        if container.need_running()["status"] != records.PAUSED:
            raise StateError(f"container {container.name} is not paused", f"kata pause {container.name}")
        with EngineClient(container.socket) as engine:
            engine.resume(container.id)

    return each(_chosen(arguments, "resume", (records.PAUSED,)), act)


def wait(container: Container) -> int:
    """Wait until a container ends.

    Returns:
        Its exit code.

    Raises:
        StateError: It was never started, or it was removed together with its exit code.
    """
    while container.running():
        try:
            with EngineClient(container.socket) as engine:
                return engine.wait(container.id)
        except KataError:
            # The record on disk has the exit code; it is written before the engine ends.
            time.sleep(0.02)
            if records.load(container.id) is None:
                raise StateError(f"container {container.name} was removed when it ended (--rm)") from None
    state = container.state()
    if state["status"] == records.CREATED:
        raise StateError(f"container {container.name} was never started", f"kata start {container.name}")
    return int(state.get("exit_code", 137))


def _wait(arguments: Arguments) -> int:
    return each(_chosen(arguments, "wait"), lambda container: str(wait(container)))


HANDLERS = {
    "start": _start,
    "restart": _restart,
    "stop": _stop,
    "kill": _kill,
    "rm": _rm,
    "pause": _pause,
    "resume": _resume,
    "wait": _wait,
}
