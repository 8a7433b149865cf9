"""`kata exec` and `kata attach`."""

from __future__ import annotations

import os
import sys

from kata.cli import records
from kata.cli.args import Command, Option
from kata.cli.fifos import Fifos
from kata.errors import KataError, StateError, UsageError, VMLostError
from kata.json_text import loads
from kata.suppress import suppress
from kata.sysio import SIGKILL, SIGPIPE, read_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.args import Arguments
    from kata.cli.pump import OutputGone
    from kata.cli.records import Container
    from kata.engine.client import EngineClient

COMMANDS = {
    "exec": Command(
        "exec",
        "CONTAINER COMMAND [ARG...]",
        "Runs a further command in a running container.",
        [
            Option("-i --interactive", "", "connect standard input; with -d, as in Docker, it stays empty"),
            Option("-t --tty", "", "give the command a terminal"),
            Option("-d --detach", "", "return at once"),
            Option(
                "-e --env",
                "KEY[=VALUE]",
                "set an environment variable; without VALUE, copy it from this environment",
                many=True,
            ),
            Option(
                "--env-file",
                "FILE",
                "read environment variables from a file, one KEY=VALUE a line",
                many=True,
            ),
            Option("-w --workdir", "DIR", "the command's working directory"),
            Option("-u --user", "USER[:GROUP]", "run as this user, by name or number"),
            Option("--privileged", "", "all capabilities of the guest"),
            Option(
                "--detach-keys", "KEYS", "keys that detach and leave the command running (ctrl-p,ctrl-q)"
            ),
        ],
        least=2,
        interspersed=False,
        notes="exit status: the command's own; 126 it cannot be executed, 127 it was not found, 128+N signal N.\n"
        "When the reader of the output is gone, the command is ended (SIGPIPE, then SIGKILL); exit status 141.",
    ),
    "attach": Command(
        "attach",
        "CONTAINER",
        "Connects to a running container's standard streams, and ends with its exit code.",
        [
            Option("--no-stdin", "", "do not connect standard input"),
            Option("--sig-proxy", "true|false", "pass signals on to the container (true)"),
            Option(
                "--detach-keys", "KEYS", "keys that detach and leave the container running (ctrl-p,ctrl-q)"
            ),
        ],
        least=1,
        most=1,
    ),
}


def _process(container: Container, arguments: Arguments) -> dict[str, Any]:
    """The runtime-spec ``process`` of an exec: the container's, changed by the command line's options."""
    process: dict[str, Any] = loads(read_file(os.path.join(container.directory, "config.json")))["process"]
    process["terminal"] = arguments.flag("tty")
    process["args"] = arguments.rest[1:]
    process.pop("consoleSize", None)
    merged = dict(entry.partition("=")[::2] for entry in process["env"])
    if process["terminal"]:
        merged.setdefault("TERM", "xterm")
    assignments, files = arguments.many("env"), arguments.many("env_file")
    if assignments or files:
        from kata.cli import values

        merged.update(entry.partition("=")[::2] for entry in values.environment(assignments, files))
    process["env"] = [f"{key}={value}" for key, value in merged.items()]
    workdir = arguments.value("workdir")
    if workdir:
        if not workdir.startswith("/"):
            raise UsageError(f"--workdir {workdir!r} is not absolute", f"--workdir /{workdir}")
        process["cwd"] = workdir
    user = arguments.value("user") or None  # scripts give empty ones, which are none to Docker
    if user is not None:
        # The groups of --group-add are every process's, as in Docker.
        kept = {key: own for key, own in process["user"].items() if key.startswith("additional")}
        process["user"] = {"uid": 0, "gid": 0, "username": user, **kept}
    if user is not None or arguments.flag("privileged"):
        from kata.oci import capabilities
        from kata.oci.spec import capability_sets

        granted = (
            sorted(capabilities.ALL)
            if arguments.flag("privileged")
            else process["capabilities"].get("bounding", [])
        )
        process["capabilities"] = capability_sets(granted, process["user"].get("username") or "")
    return process


def _exec(arguments: Arguments) -> int:
    from kata.engine.client import EngineClient

    container = records.find(arguments.rest[0])
    keys = _detach_keys(arguments)
    tty, detach = arguments.flag("tty"), arguments.flag("detach")
    interactive = arguments.flag("interactive") and not detach
    if tty and interactive and not os.isatty(0):
        raise UsageError("-t needs a terminal, and standard input is none", "leave out -t")
    state = container.need_running()
    if state["status"] == records.PAUSED:
        raise StateError(f"container {container.name} is paused", f"kata resume {container.name}")
    process = _process(container, arguments)
    exec_id = os.urandom(16).hex()
    try:
        with EngineClient(container.socket) as client:
            if detach:
                client.exec(container.id, exec_id, process, terminal=tty)
                client.start(container.id, exec_id)
                return 0
            fifos = Fifos.of_sandbox(container.id, exec_id, stdin=interactive, terminal=tty)
            try:
                running = client.run(
                    container.id,
                    exec_id,
                    process,
                    terminal=tty,
                    stdin=fifos.stdin,
                    stdout=fifos.stdout,
                    stderr=fifos.stderr,
                )
                # What carries the streams is loaded while the guest makes the process.
                from kata.cli import attachment, pump

                if keys is None:
                    keys = pump.detach_keys(None)
                running.started()
                fifos.connected()
            except BaseException:
                fifos.close()
                raise
            streams = attachment.Attachment(client, container, fifos, running, exec_id=exec_id, terminal=tty)
            try:
                status = streams.copy(detach_keys=keys)
            except pump.Detached:
                sys.stderr.write("\r\ndetached; the command goes on\r\n")
                return 0
            except pump.OutputGone as gone:
                return _end_without_output(client, container, exec_id, gone)
            if status == 137 and (cause := client.describe().get("error")):
                raise attachment.lost(container, cause)
            client.begin_delete(container.id, exec_id)
            return status
    except VMLostError as error:
        cause = container.raw_state().get("error") or error.message
        raise VMLostError(
            f"container {container.name} ended while the command was running: {cause}"
        ) from None


def _detach_keys(arguments: Arguments) -> bytes | None:
    """What ``--detach-keys`` says; None where it is not given."""
    text = arguments.value("detach_keys")
    if text is None:
        return None
    from kata.cli import pump

    return pump.detach_keys(text)


def _end_without_output(client: EngineClient, container: Container, exec_id: str, gone: OutputGone) -> int:
    """End a command whose output has no reader, as the kernel ends a process that writes to a closed pipe."""
    from kata.cli import attachment

    attachment.say_gone(gone, "the command is ended")
    for number in (SIGPIPE, SIGKILL):
        with suppress(KataError):
            client.kill(container.id, number, exec_id, timeout=attachment.OUTPUT_GONE_S)
            client.wait(container.id, exec_id, timeout=attachment.OUTPUT_GONE_S)
            break
    with suppress(KataError):
        client.delete(container.id, exec_id)
    return attachment.gone_code(gone)


def _attach(arguments: Arguments) -> int:
    from kata.cli.pump import detach_keys, passes_signals

    container = records.find(arguments.rest[0])
    keys = detach_keys(arguments.value("detach_keys"))
    return attach(
        container,
        stdin=not arguments.flag("no_stdin"),
        detach_keys=keys,
        proxy_signals=passes_signals(arguments.value("sig_proxy")),
    )


def attach(container: Container, *, stdin: bool, detach_keys: bytes, proxy_signals: bool = True) -> int:
    """Take part in a running container's streams until it ends.

    Args:
        container: The container.
        stdin: Connect standard input, too, if the container keeps its own open.
        detach_keys: Bytes that, typed on a terminal, end this command and leave the container running.
        proxy_signals: Pass signals on to the container, unless it has a terminal.

    Returns:
        Its exit code; 0 after the detach keys.

    Raises:
        StateError: It is not running, or paused.
        VMLostError: Its machine was lost.
    """
    from kata.cli import attachment
    from kata.cli.ending import wait_for_engine
    from kata.cli.pump import Detached, OutputGone
    from kata.engine.client import EngineClient

    state = container.need_running()
    if state["status"] == records.PAUSED:
        raise StateError(f"container {container.name} is paused", f"kata resume {container.name}")
    tty = bool(container.record["tty"])
    stdin = stdin and container.record["open_stdin"]
    if tty and stdin and not os.isatty(0):
        raise UsageError(
            f"container {container.name} has a terminal, and standard input is none",
            f"kata attach --no-stdin {container.name}",
        )
    with EngineClient(container.socket) as client:
        fifos = Fifos.of_sandbox(container.id, f"attach-{os.urandom(4).hex()}", stdin=stdin, terminal=tty)
        try:
            client.attach(container.id, "", stdin=fifos.stdin, stdout=fifos.stdout, stderr=fifos.stderr)
            fifos.connected()
            running = client.begin_wait(container.id)
        except BaseException:
            fifos.close()
            raise
        streams = attachment.Attachment(client, container, fifos, running, exec_id="", terminal=tty)
        try:
            status = streams.copy(detach_keys=detach_keys, proxy_signals=proxy_signals and not tty)
        except Detached:
            sys.stderr.write(f"\r\ndetached; it goes on: kata attach {container.name}\r\n")
            return 0
        except OutputGone as gone:
            from kata.cli import session

            return session.without_output(container, gone, ends=False)
        cause = client.describe().get("error")
    wait_for_engine(container)
    if cause:
        raise attachment.lost(container, cause)
    return status


HANDLERS = {"exec": _exec, "attach": _attach}
__all__ = ["COMMANDS", "HANDLERS"]
