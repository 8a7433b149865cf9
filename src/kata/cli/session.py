"""Starts a container's sandbox for a command, attaches to it, and returns its exit code."""

from __future__ import annotations

import os
import sys
import time

from kata import paths, sysio
from kata.cli import attachment, records
from kata.cli.fifos import Fifos
from kata.cli.pump import Detached, OutputGone
from kata.engine.client import EngineClient
from kata.errors import AlreadyExistsError, KataError, StateError, VMLostError
from kata.suppress import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kata.cli.records import Container
    from kata.engine.launch import Engine
    from kata.proto import sandbox_pb
    from kata.settings import ClientPolicy, DiskSettings, SandboxSettings

IDLE_S = 2.0
"""How long (in seconds) an engine stays without a running container and without a connection."""
SIGNAL_S = 10.0
"""How long (in seconds) to wait until the guest has taken a signal; it is delivered later if the guest is slow."""


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

    Raises:
        VMLostError: The engine has ended under the copy.
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
        fifos = Fifos.of_sandbox(container.id, "main", stdin=stdin, terminal=terminal)
        try:
            client.create(
                container.id,
                container.directory,
                terminal=terminal,
                stdin=fifos.stdin,
                stdout=fifos.stdout,
                stderr=fifos.stderr,
            )
            fifos.connected()
            make_image_volumes(client, container)
            client.start(container.id)
            engine.release()
            if started:
                started()
            running = client.begin_wait(container.id)
        except BaseException:
            fifos.close()
            client.close()
            engine.release()
            raise
    streams = attachment.Attachment(client, container, fifos, running, exec_id="", terminal=terminal)
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
        raise attachment.lost(container, cause)
    return status


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
    attachment.say_gone(gone, what, hint)
    if ends:
        stop(container, attachment.OUTPUT_GONE_S)
    return attachment.gone_code(gone)


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
