"""Starts a container's sandbox for a command, attaches to it, and returns its exit code."""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` makes enumerations, for 3 ms
import _thread
import os
import sys
import time

from kata import paths, sysio
from kata.cli import records
from kata.cli.pump import Detached, Fifos, OutputGone, Pump, RawTerminal
from kata.engine.client import EngineClient
from kata.errors import AgentError, AgentTimeoutError, AlreadyExistsError, KataError, StateError, VMLostError
from kata.suppress import suppress
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kata.cli.records import Container
    from kata.engine.launch import Engine
    from kata.proto import sandbox_pb
    from kata.settings import ClientPolicy, DiskSettings, SandboxSettings

IDLE_S = 2.0
"""How long (in seconds) an engine stays without a running container and without a connection."""
SIGNAL_S = 10.0
"""How long (in seconds) to wait until the guest has taken a signal; it is delivered later if the guest is slow."""
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
"""Signals that ask a process to end."""
_MAX_UNANSWERED = 3
"""The command gives up after this many signals of `_ENDING` that the guest has not taken. Docker's number."""
_PROXIED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)
"""Signals that an attached command forwards to the container instead of acting on them, as `docker run` does."""


# ---- starting ----


def sandbox_settings(container: Container, started_ns: int) -> SandboxSettings:
    """Return the engine's settings for a container's sandbox.

    Args:
        container: The container.
        started_ns: When the command began, in nanoseconds of CLOCK_MONOTONIC.

    Raises:
        KataError: See `kata.engine.machine.machine_settings`.
    """
    from kata.config import files
    from kata.engine import machine
    from kata.resources.sizing import ResourceRequest
    from kata.settings import (
        ContainerSettings,
        DiskSettings,
        DiskVolumeSettings,
        HealthSettings,
        LogSettings,
        NetworkSettings,
        PortSettings,
        RootfsSettings,
        SandboxSettings,
        VolumeSettings,
    )

    record = container.record
    asked = ResourceRequest(record["cpus"], record["memory"], "--cpus and --memory")
    # Room to grow costs a few MiB: only a container with limits, which may be changed, gets it.
    limited = asked.cpus is not None or asked.memory is not None
    named = record.get("hypervisor") or ""
    conf = files.load("", named, "--hypervisor" if named else "")
    described, notes = machine.machine_settings(asked, conf, grows=limited)
    for topic, note in notes:
        _print_once(topic, f"note: {note}\n")
    if sysio.in_user_namespace():
        _say_what_ids_lack()
    disks: list[DiskSettings] = []
    rootfs = RootfsSettings(kind=record["rootfs"]["kind"], upper=record["upper"])
    if rootfs.kind == "erofs":
        rootfs.lower_slot = len(disks)
        disks.append(DiskSettings(path=record["rootfs"]["path"], readonly=True, serial="lower"))
    else:
        rootfs.source = record["rootfs"]["source"]
    if rootfs.upper == "disk":
        rootfs.upper_slot = len(disks)
        path = os.path.join(container.directory, "rw.img")
        disks.append(DiskSettings(path=path, readonly=False, serial="upper"))
    disk_volumes = []
    for volume in record.get("disk_volumes") or ():
        name = volume["name"]
        disk_volumes.append(
            DiskVolumeSettings(
                name=name, slot=len(disks), copy=volume["copy"], stays=bool(volume.get("volume"))
            )
        )
        path = os.path.join(container.directory, name)
        if volume.get("volume"):
            from kata.cli import volumes

            path = volumes.disk(volume["volume"])
        disks.append(DiskSettings(path=path, readonly=False))
    for disk in record.get("further_disks") or ():
        disks.append(DiskSettings(path=disk["path"], readonly=True, serial=disk["serial"]))
    in_networks = bool(record.get("networks"))
    servers = record.get("dns_servers", ())
    return SandboxSettings(
        id=container.id,
        client=client_policy(),
        machine=described,
        container=ContainerSettings(
            directory=container.directory,
            rootfs=rootfs,
            volumes=[VolumeSettings.from_plain(one, "volume") for one in record["volumes"]],
            disk_volumes=disk_volumes,
            log=LogSettings.from_plain({"path": container.log, **record["log"]}, "log"),
            open_stdin=record["open_stdin"],
            stdin_once=record["stdin_once"],
            auto_remove=record["auto_remove"],
            extra_hosts=record.get("extra_hosts", ()),
            # In a network with a name the engine asks them, after it has looked for members of that name.
            dns_servers=() if in_networks else servers,
            dns_searches=record.get("dns_searches", ()),
            dns_options=record.get("dns_options", ()),
            health=HealthSettings(**record["health"]) if record.get("health") else None,
        ),
        disks=disks,
        network=NetworkSettings(
            mode=record["network"],
            ports=[PortSettings.from_plain(one, "port") for one in record["ports"]],
            dns=servers if in_networks else (),
        ),
        hostname=record["hostname"],
        request_started_ns=started_ns,
    )


def client_policy() -> ClientPolicy:
    """The client policy of these commands: an engine serves one container, and ends with it."""
    from kata.settings import ClientPolicy

    return ClientPolicy(
        name="kata",
        idle_s=IDLE_S,
        keeps_ended_containers=False,
        ends_when_stale=False,
        sweeps_dead_engines=False,  # kata gc does that
        ends_with_init=True,
        holds_fifos=False,  # the reader is the user's terminal or pipe: it does not come back
        makes_etc_files=True,
        foreign_specs=False,
        keeps_host_mounts=False,
        shares_from_start=False,
        recursive_readonly="always",
        signal_s=SIGNAL_S,
        late_signals_fail=True,
        host_shaped_stats=False,
        all_controllers=False,
    )


def _say_what_ids_lack() -> None:
    from kata import rootless

    if rootless.lacks:
        _print_once(
            "one-id",
            f"note: only this user's own id is mapped: {rootless.lacks}; containers' files in volumes cannot have other"
            " owners (docs/rootless.md)\n",
        )


def _print_once(topic: str, text: str) -> None:
    """Write *text* to stderr once per boot of the host (the run directory is on a tmpfs)."""
    paths.make_dirs(paths.run_dir(), 0o711)
    try:
        os.close(
            os.open(
                os.path.join(paths.run_dir(), f"noted-{topic}"), os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
        )
    except FileExistsError:
        return
    sys.stderr.write(text)
    sys.stderr.flush()


OCCUPIED_S = 10.0
"""How long (in seconds) a start waits for another engine of the same container, which is usually about to end."""


class Occupied(StateError):
    """The container has an engine that belongs to another command and must not be disturbed."""


def _launch(container: Container, settings: SandboxSettings) -> Engine:
    """Start an engine, after waiting for another one of the same container to end.

    Args:
        container: The container.
        settings: The engine's settings.

    Raises:
        Occupied: The other engine does not end: the container is running, or files are being copied.
    """
    from kata.engine.launch import launch

    give_up = time.monotonic() + OCCUPIED_S
    while True:
        try:
            if container.record.get("networks") and settings.network.mode == "user":
                from kata.cli import networks

                with networks.locked():
                    # As it is now: kata network connect may have been faster.
                    container = records.load(container.id) or container
                    settings.network.endpoints = networks.endpoints(container)
                    settings.network.outside = networks.leads_outside(container.record["networks"])
            if not any(one.get("volume") for one in container.record.get("disk_volumes") or ()):
                return launch(settings)
            from kata.cli import volumes

            with volumes.locked():
                volumes.check_free(container)
                return launch(settings)
        except AlreadyExistsError:
            if container.running():
                hint = f"kata stop {container.name}, or kata attach {container.name}"
                raise Occupied(f"container {container.name} is running already", hint) from None
            if time.monotonic() > give_up:
                raise Occupied(occupied(container), "try again when that has ended") from None
        time.sleep(0.05)


def occupied(container: Container) -> str:
    """A sentence that says what an engine is doing with a container that is not running."""
    path = os.path.join(paths.sandbox_dir(container.id), "sandbox.json")
    own = records.read_json(path).get("container")  # the engine may be of another version
    if isinstance(own, dict) and own.get("record_state") is False:
        return f"container {container.name} is open for a copy (kata cp)"
    return f"container {container.name} is being started or ended by its engine"


def _open(container: Container, started_ns: int) -> tuple[Engine, EngineClient]:
    engine = _launch(container, sandbox_settings(container, started_ns))
    try:
        return engine, EngineClient(engine.sock_path)
    except BaseException:
        engine.release()
        raise


def start_detached(container: Container, started_ns: int | None = None, *, discard: bool = True) -> None:
    """Start a container and leave it to its engine.

    Args:
        container: The container.
        started_ns: When the command began (nanoseconds of CLOCK_MONOTONIC), for the timings.
        discard: Remove the container if it cannot be started; false for one that existed before.

    Raises:
        KataError: It could not be started; nothing of its sandbox is left.
    """
    with _rollback_on_failure(container, discard):
        engine, client = _open(container, time.monotonic_ns() if started_ns is None else started_ns)
        with client:
            client.create(container.id, container.directory, terminal=container.record["tty"])
            make_image_volumes(client, container)
            client.start(container.id)
            engine.release()


def make_image_volumes(client: EngineClient, container: Container) -> None:
    """Make the directories that the image declares as ``Volumes`` but does not contain.

    They need no storage of their own: like an anonymous volume, the writable layer belongs to the container alone and
    lives as long as it does. Where the image has files at such a path, they are visible with owner and mode.

    Args:
        client: The container's engine.
        container: A container that has been created in it.

    Raises:
        KataError: A directory cannot be made.
    """
    paths_wanted = container.record.get("image_volumes")
    if not paths_wanted:
        return
    from kata.engine.client import SANDBOX
    from kata.proto import agentext_pb
    from kata.proto.google_pb import Empty

    for path in paths_wanted:
        request = agentext_pb.MkdirRequest(container_id=container.id, path=os.fsencode(path), parents=True)
        client.call(SANDBOX, "Mkdir", request, Empty)


class _rollback_on_failure:
    """Waits for the end of the sandbox after a failed start, and removes the container if it was made for this start.

    If the container has an engine of another command, both are left alone.
    """

    def __init__(self, container: Container, discard: bool) -> None:
        self._container = container
        self._discard = discard

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Occupied):
            return
        _wait_for_engine(self._container, tell=True)
        if self._discard:
            with suppress(KataError, OSError):
                records.remove(self._container)


def booted_for_copy(container: Container) -> Iterator[EngineClient]:
    """Boot a stopped container's sandbox with its root file system mounted and none of its processes, and
    yield its engine once: for `contextlib.contextmanager`, which this module does without.

    The engine gets a specification without a process, which is valid until the container is started.
    """
    import json

    from kata.settings import NetworkSettings

    # Copying files needs no network, and must not take the container's published ports.
    settings = sandbox_settings(container, time.monotonic_ns())
    settings.network = NetworkSettings()
    assert settings.container is not None
    settings.container.auto_remove = settings.container.record_state = False
    settings.container.log = None
    engine = _launch(container, settings)
    try:
        with EngineClient(engine.sock_path) as client:
            bundle = os.path.join(paths.sandbox_dir(container.id), "bundle")
            os.mkdir(bundle, 0o700)
            with open(os.path.join(container.directory, "config.json"), encoding="utf-8") as file:
                spec = json.load(file)
            del spec["process"]
            records.write_json(os.path.join(bundle, "config.json"), spec)
            client.create(container.id, bundle)
            yield client
            client.delete(container.id)
    except VMLostError as error:
        # Most likely `kata rm -f`.
        raise VMLostError(f"the copy was cut short: {error.message}", "kata ps -a") from None
    finally:
        engine.release()
        _wait_for_engine(container)


# ---- attached ----


class Attachment:
    """One process's streams and exit code, connected to this command.

    Args:
        client: The engine; calls may be made from a second thread.
        container: The container.
        exec_id: Id of the process; empty for the container's init.
        terminal: Whether it has a terminal.
        stdin: Whether to forward standard input.
        prefix: File name prefix of this command's fifos, unique in the sandbox.
    """

    def __init__(
        self,
        client: EngineClient,
        container: Container,
        *,
        exec_id: str,
        terminal: bool,
        stdin: bool,
        prefix: str,
    ) -> None:
        self._client = client
        self._container = container
        self._exec_id = exec_id
        self._terminal = terminal
        directory = os.path.join(paths.sandbox_dir(container.id), "io")
        self.fifos = Fifos(directory, prefix, stdin=stdin, terminal=terminal)
        self._outcome: list[int | BaseException] = []
        self._signals_writer: Fd | None = None
        self._unresponsive: KataError | None = None
        self._unanswered = 0  # signals of `_ENDING` that the guest has not taken

    def copy(self, *, detach_keys: bytes = b"", proxy_signals: bool = True) -> int:
        """Copy the streams until the process has ended.

        Args:
            detach_keys: Bytes that, typed on a terminal, detach; empty for none.
            proxy_signals: Forward signals to the process.

        Returns:
            Its exit code.

        Raises:
            Detached: The user detached; the process goes on.
            OutputGone: The output cannot be written any more; the process goes on.
            KataError: The engine or the virtual machine was lost, or the guest takes no signals.
        """
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        _thread.start_new_thread(self._wait, (writer,))
        pump = Pump(
            self.fifos,
            wait_fd=reader,
            ended=self._is_over,
            close_stdin=self._close_stdin,
            detach_keys=detach_keys if self._terminal else b"",
        )
        before: dict[int, Any] = {}
        try:
            if proxy_signals:
                before = self._proxy_signals(writer)
            with self._raw_terminal():
                pump.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._signals_writer is not None:
                self._signals_writer.close()
            self.fifos.close()
            # The writing end stays open: a thread may be about to use it, and this command is about to end.
            os.close(reader)
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _is_over(self) -> bool:
        if self._unresponsive is not None:
            raise self._unresponsive
        return bool(self._outcome)

    def _wait(self, writer: int) -> None:
        try:
            self._outcome.append(self._client.wait(self._container.id, self._exec_id))
        except BaseException as error:
            self._outcome.append(self._lost(error))
        finally:
            with suppress(OSError):
                os.write(writer, b"x")

    def _lost(self, error: BaseException) -> BaseException:
        if not isinstance(error, VMLostError):
            return error
        return lost(self._container, self._container.raw_state().get("error") or "its engine was killed")

    def _close_stdin(self) -> None:
        with suppress(KataError):
            self._client.close_stdin(self._container.id, self._exec_id)

    def _raw_terminal(self) -> RawTerminal | suppress:
        return RawTerminal(self._resize) if self._terminal else suppress()

    def _resize(self, rows: int, columns: int) -> None:
        self._on_new_connection(lambda other: other.resize(self._container.id, rows, columns, self._exec_id))

    def _proxy_signals(self, over: int) -> dict[int, Any]:
        """Forward signals from now on. Returns the handlers that they had."""
        reader, writer = os.pipe()
        self._signals_writer = Fd(writer)
        _thread.start_new_thread(self._send_signals, (reader, over))
        return {number: signal.signal(number, self._forward) for number in _PROXIED}

    def _forward(self, number: int, _frame: object) -> None:
        if number in _ENDING:
            self._unanswered += 1
            if self._unanswered >= _MAX_UNANSWERED:
                raise self._no_answer(number)
        if self._signals_writer is not None:
            os.write(self._signals_writer.raw, bytes((number,)))

    def _send_signals(self, reader: int, over: int) -> None:
        """Send the signals from *reader* to the process, in order. Runs in a thread, since a guest may not answer."""
        while number := os.read(reader, 1):
            try:
                with EngineClient(self._container.socket) as other:
                    other.kill(self._container.id, number[0], self._exec_id)
            except AgentError as error:
                if error.grpc_code != AgentTimeoutError.grpc_code:
                    self._unanswered = 0  # a refusal is an answer
                elif number[0] in _ENDING:
                    self._unresponsive = self._no_answer(number[0])
                    with suppress(OSError):
                        os.write(over, b"x")
            except (KataError, OSError):
                self._unanswered = 0  # it has ended, or cannot be signalled yet
            else:
                self._unanswered = 0
        os.close(reader)

    def _no_answer(self, number: int) -> KataError:
        from kata.cli.signals import name_of

        what = f"its command in {self._container.name}" if self._exec_id else self._container.name
        return KataError(
            f"the guest of container {self._container.name} does not answer, so {what} was not sent"
            f" {name_of(number)} and goes on",
            f"kata kill {self._container.name}, or kata rm -f {self._container.name}, ends it whatever its guest does",
        )

    def _on_new_connection(self, what: Callable[[EngineClient], object]) -> None:
        """Make a call on a new connection: a signal handler may have interrupted a call on the existing one."""
        with suppress(KataError, OSError), EngineClient(self._container.socket) as other:
            what(other)


def run_attached(
    container: Container,
    *,
    started_ns: int | None = None,
    stdin: bool,
    detach_keys: bytes,
    proxy_signals: bool = True,
    timings: Callable[[sandbox_pb.TimingsResponse], None] | None = None,
    discard: bool = False,
    started: Callable[[], None] | None = None,
) -> int:
    """Start a container, stay attached until it ends, and wait until its sandbox is gone.

    Args:
        container: The container.
        started_ns: When the command began (nanoseconds of CLOCK_MONOTONIC), for the timings.
        stdin: Whether to forward standard input.
        detach_keys: Bytes that, typed on a terminal, detach and leave it running.
        proxy_signals: Pass signals on to the container.
        timings: Called with the engine's record of the start.
        discard: Remove the container if it cannot be started.
        started: Called when it runs.

    Returns:
        The container's exit code.
    """
    terminal = bool(container.record["tty"])
    with _rollback_on_failure(container, discard):
        engine, client = _open(container, time.monotonic_ns() if started_ns is None else started_ns)
        streams = Attachment(client, container, exec_id="", terminal=terminal, stdin=stdin, prefix="main")
        try:
            client.create(
                container.id,
                container.directory,
                terminal=terminal,
                stdin=streams.fifos.stdin,
                stdout=streams.fifos.stdout,
                stderr=streams.fifos.stderr,
            )
            streams.fifos.connected()
            make_image_volumes(client, container)
            client.start(container.id)
            engine.release()
            if started:
                started()
        except BaseException:
            streams.fifos.close()
            client.close()
            engine.release()
            raise
    try:
        status = streams.copy(detach_keys=detach_keys, proxy_signals=proxy_signals)
        if timings:
            timings(client.timings())
        cause = end_of(client, container)
    except Detached:
        sys.stderr.write(f"\r\ndetached; it goes on: kata attach {container.name}\r\n")
        return 0
    except OutputGone as gone:
        return without_output(container, gone, ends=bool(container.record["auto_remove"]))
    finally:
        client.close()
        if not container.running():
            _wait_for_engine(container)
    if cause:
        raise lost(container, cause)
    return status


OUTPUT_GONE_S = 3.0
"""Seconds between the stop signal and SIGKILL for a process whose output has lost its reader: in a pipeline, SIGPIPE
would have ended it at once."""


def _wait_for_engine(container: Container, *, tell: bool = False) -> None:
    from kata.cli.ending import wait_for_engine

    wait_for_engine(container, tell=tell)


def without_output(container: Container, gone: OutputGone, *, ends: bool) -> int:
    """Handle the loss of the reader of a container's output.

    Args:
        container: The container.
        gone: The stream that is gone.
        ends: End the container, which was made for this command alone (``--rm``), as SIGPIPE ends a program in a
            pipeline.

    Returns:
        The exit code: 141 as after SIGPIPE, or 125 for any other error in writing.
    """
    from kata.cli.ending import stop

    if ends:
        what = f"container {container.name} was made with --rm and is ended"
        hint = ""
    else:
        what = f"container {container.name} goes on"
        hint = f"kata attach {container.name}, or kata stop {container.name}"
    say_gone(gone, what, hint)
    if ends:
        stop(container, OUTPUT_GONE_S)
    return gone_code(gone)


def say_gone(gone: OutputGone, what: str, hint: str = "") -> None:
    """Print to stderr, if that can still be written, what happens to a process whose output is gone.

    Args:
        gone: Which output, and how it went.
        what: What becomes of the process, as a clause.
        hint: What to do; empty for nothing.
    """
    with suppress(OSError):
        sys.stderr.write(f"{gone.sentence}: {what}\n" + (f"hint: {hint}\n" if hint else ""))
        sys.stderr.flush()


def gone_code(gone: OutputGone) -> int:
    """The exit code of a command whose output is gone."""
    return 128 + int(signal.SIGPIPE) if isinstance(gone.error, BrokenPipeError) else KataError.exit_code


def end_of(client: EngineClient, container: Container) -> str:
    """Have the sandbox of an ended container removed, and wait for that.

    Args:
        client: The container's engine.
        container: The container.

    Returns:
        Why its virtual machine was lost; empty if the container ended by itself.
    """
    try:
        client.delete(container.id)
        # Only now: the container's files are on the host's disk at its end at the latest.
        facts = client.describe()
    except KataError:
        # Another command (`kata rm -f`) was faster; the record is on disk.
        facts = container.raw_state()
    if facts.get("disk_error"):
        sys.stderr.write(f"warning: {facts['disk_error']}\n")
        sys.stderr.flush()
    return str(facts.get("error") or "")


def lost(container: Container, cause: str) -> VMLostError:
    """Make the error for a container whose virtual machine or engine has ended unexpectedly.

    Args:
        container: The container.
        cause: Why it ended, as a clause.
    """
    return VMLostError(f"container {container.name} was lost: {cause}", "kata doctor checks this machine")
