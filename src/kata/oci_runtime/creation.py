"""``create``, ``run`` and ``exec``: what makes a process, and the one that stands for it on the host."""

from __future__ import annotations

import os
import time

from kata import paths, sysio
from kata.errors import ConfigError, KataError, NotFoundError, UnsupportedError, UsageError
from kata.oci_runtime import containers, records, standing
from kata.oci_runtime.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.cli.args import Arguments
    from kata.engine.client import EngineClient
    from kata.engine.launch import Engine
    from kata.oci_runtime.foreground import Foreground
    from kata.oci_runtime.global_options import GlobalOptions
    from kata.oci_runtime.standing import Standing
    from kata.settings import ClientPolicy, SandboxSettings

_MAX_BYTES = 16 << 20
_NAMESPACE = "oci"
IDLE_S = 60.0
"""How long an engine stays that never got a container."""
SIGNAL_S = 2.0
RESUMED_S = 0.05
"""How often it is asked whether a container that is paused goes on, in seconds."""
ENDING_S = 5.0
"""How long an engine of the same container may take to end: its ``delete`` may have been killed."""


def _create(arguments: Arguments, options: GlobalOptions) -> int:
    create(arguments, options, orphan=True)
    return 0


def _run(arguments: Arguments, options: GlobalOptions) -> int:
    detached = arguments.flag("detach")
    record, stands = create(arguments, options, orphan=detached)
    try:
        with containers.engine_of(record) as engine:
            engine.start(record.id)
        if detached:
            return 0
        status = _wait_for_child(record.pid, stands.terminal)
    except BaseException:
        containers.delete(options.state_root, record, force=True)
        raise
    if not arguments.flag("keep"):
        containers.delete(options.state_root, record, force=True)
    return status


def create(arguments: Arguments, options: GlobalOptions, *, orphan: bool) -> tuple[Record, Standing]:
    """Create a container.

    Args:
        arguments: Of ``create`` or ``run``.
        options: Those in front of the command.
        orphan: Whoever adopts orphans is to be the parent of the process that stands for it. Otherwise this process
            is, and the other end of its terminal if nobody else takes that.

    Returns:
        Its record, and that process.

    Raises:
        KataError: It could not be created; nothing of it is left.
    """
    began_ns = time.monotonic_ns()
    from kata.engine import oci_records
    from kata.engine.containers import spec
    from kata.engine.launch import check_id
    from kata.shim.start import network_namespace

    _refuse(arguments)
    root, container_id = options.state_root, check_id(arguments.rest[0])
    bundle = os.path.abspath(arguments.value("bundle") or ".")
    config = _object(os.path.join(bundle, "config.json"), "a bundle is a directory with config.json in it")
    spec.resolve_sources(config, bundle)
    terminal = bool((config.get("process") or {}).get("terminal"))
    console = _console(arguments, terminal, needs_one=orphan)
    pod = _pod(root, config)
    if pod is None:
        spec.refuse_foreign(config)
    network = network_namespace(config)
    record = Record(root, container_id)
    held = record.reserve()
    oci_records.register(root)
    engine: Engine | None = None
    try:
        record.bundle = bundle
        record.rootfs = os.path.join(bundle, str((config.get("root") or {}).get("path") or "rootfs"))
        record.annotations = config.get("annotations") or {}
        if pod is None:
            record.sandbox = sandbox_directory(root, container_id)
            record.write()
            engine = _launch(record, config, began_ns)
        else:
            record.sandbox = pod.sandbox
            record.write()
        stands = _stand(record, "", network, console, terminal=terminal, orphan=orphan)
        record.pid, record.started = stands.pid, sysio.proc_starttime(stands.pid) or 0
        record.write()
        with containers.engine_of(record) as client:
            client.create(container_id, bundle, terminal=terminal, stdin=paths.HANDOVER + stands.path)
        standing.take_root(stands.pid, record.rootfs, config.get("mounts") or ())
        _write_pid(arguments.value("pid_file"), stands.pid)
        if engine is not None:
            engine.release()
        stands.let_go()  # the last: until then it dies with this process, and the container with it
    except BaseException:
        try:
            containers.delete(root, record, force=True)
        except KataError:
            pass  # the reason is in the error that is told
        raise
    finally:
        held.close()
    return record, stands


def _refuse(arguments: Arguments) -> None:
    """Refuse what cannot be done.

    Raises:
        UnsupportedError: It was asked for.
    """
    if arguments.value("preserve_fds") not in (None, "0"):
        raise UnsupportedError(
            "--preserve-fds: a container in a virtual machine cannot have open files of the host",
            "Mount what it needs: files, directories and sockets of the host can be.",
        )
    if "no_pivot" in arguments and arguments.flag("no_pivot"):
        raise UnsupportedError(
            "--no-pivot: the root directory of a container is changed by pivot_root, in its virtual machine",
            "Leave it out: what the host's root is on does not matter there.",
        )


def _object(path: str, hint: str, *, is_file: bool = True) -> dict[str, Any]:
    """A JSON object in a file.

    Args:
        path: The file.
        hint: What to do where there is none.
        is_file: It has to be a file; otherwise the caller may write it while it is read.

    Raises:
        NotFoundError: There is no such file.
        ConfigError: It is not one, or too large.
    """
    from kata import given_paths
    from kata.json_text import loads

    try:
        if is_file:
            raw = given_paths.read(path, _MAX_BYTES + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {(error.strerror or '').lower()}", hint) from None
    try:
        found = loads(raw) if len(raw) <= _MAX_BYTES else None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object of at most {_MAX_BYTES >> 20} MiB")
    return found


def _console(arguments: Arguments, terminal: bool, *, needs_one: bool) -> str:
    """The console socket that was given.

    Raises:
        UsageError: There is one without a terminal, or the other way round.
    """
    console = arguments.value("console_socket") or ""
    if console and not terminal:
        raise UsageError("--console-socket is for a process with a terminal", "leave --console-socket out")
    if terminal and needs_one and not console:
        raise UsageError(
            "the process has a terminal, and nobody to take its other end", "--console-socket PATH"
        )
    return console


def _pod(root: str, config: Mapping[str, Any]) -> Record | None:
    """The container whose machine a new one belongs in: one whose namespaces it names, by the process that stands for
    it, or the one that CRI-O's and Podman's annotation names. None if it has a machine of its own, as in a pod of
    Podman's without an infra container (``--infra=false``, podman-compose): Podman 4.3 names the pod itself there,
    which is no container.

    Raises:
        NotFoundError: The annotation names one that there is not.
    """
    for namespace in (config.get("linux") or {}).get("namespaces") or ():
        parts = str(namespace.get("path") or "").split("/")
        if len(parts) == 5 and parts[1] == "proc" and parts[3] == "ns" and parts[2].isdecimal():
            found = records.of_pid(root, int(parts[2]))
            if found is not None:
                return found
    from kata.engine.containers import spec

    named = spec.pod_of(config)
    if not named:
        return None
    if (config.get("annotations") or {}).get("io.container.manager") == "libpod":
        return records.find(root, named)
    return records.require(root, named)


def sandbox_directory(root: str, container_id: str) -> str:
    """The run directory of a container's own sandbox: an id is unique only below its root."""
    import zlib

    from kata.shim.names import directory_name

    own = root == paths.oci_dir()
    namespace = _NAMESPACE if own else f"{_NAMESPACE}{zlib.crc32(os.fsencode(root)):08x}"
    return paths.sandbox_dir(directory_name(namespace, container_id))


def _launch(record: Record, config: Mapping[str, Any], began_ns: int) -> Engine:
    from kata.engine.launch import launch

    settings = sandbox_settings(record.id, config, began_ns)
    return launch(settings, name=os.path.basename(record.sandbox), patience_s=ENDING_S)


def sandbox_settings(container_id: str, config: Mapping[str, Any], began_ns: int) -> SandboxSettings:
    """What the engine has to know.

    Args:
        container_id: The sandbox's first container.
        config: Its specification.
        began_ns: When the command began, by CLOCK_MONOTONIC.

    Raises:
        KataError: What `machine.machine_settings` raises, and about annotations.
    """
    from kata.config import annotations
    from kata.engine import machine
    from kata.engine.containers import spec
    from kata.resources import sizing
    from kata.settings import NetworkSettings, SandboxSettings
    from kata.shim.start import network_namespace

    conf = annotations.load("", config.get("annotations") or {})
    described, notes = machine.machine_settings(sizing.request_of(config), conf, grows=True)
    path = network_namespace(config)
    return SandboxSettings(
        id=container_id,
        client=client_policy(),
        machine=described,
        notes=[note for _, note in notes],
        all_disk_slots=True,
        host_devices=machine.host_devices(conf, config),
        # A new one is empty: there is nothing in it that the guest could have.
        network=machine.network_settings(conf, path) if path else NetworkSettings(),
        cgroups_path=str((config.get("linux") or {}).get("cgroupsPath") or ""),
        oom_score_adj=spec.oom_score_adj(config),
        request_started_ns=began_ns,
    )


def client_policy() -> ClientPolicy:
    """What callers of an OCI runtime expect of an engine."""
    from kata.settings import ClientPolicy

    return ClientPolicy(
        name=_NAMESPACE,
        idle_s=IDLE_S,
        keeps_ended_containers=True,
        ends_when_stale=False,
        sweeps_dead_engines=True,  # podman forgets a container whose monitor was killed
        ends_with_init=False,
        holds_fifos=False,
        makes_etc_files=False,
        foreign_specs=True,
        keeps_host_mounts=True,
        shares_from_start=True,
        recursive_readonly="never",
        signal_s=SIGNAL_S,
        late_signals_fail=False,
        host_shaped_stats=False,
        all_controllers=True,
        namespace=_NAMESPACE,
    )


def _stand(
    record: Record, exec_id: str, network: str, console: str, *, terminal: bool, orphan: bool
) -> Standing:
    """Start the process that stands for a container, or for an exec."""
    path, own = record.socket_path(exec_id), not exec_id
    if not terminal:
        return standing.start(path, network, (0, 1, 2), terminal=False, orphan=orphan, own_mounts=own)
    if not console:
        from kata.oci_runtime.foreground import Foreground

        ours = Foreground()
        streams = (ours.slave.raw,) * 3
        stands = standing.start(path, network, streams, terminal=True, orphan=orphan, own_mounts=own)
        stands.terminal = ours
        return stands
    from kata.engine.standard_streams.stdio import send_terminal

    with sysio.Fd(send_terminal(console)) as slave:
        streams = (slave.raw,) * 3
        return standing.start(path, network, streams, terminal=True, orphan=orphan, own_mounts=own)


def _write_pid(path: str | None, pid: int) -> None:
    if path:
        sysio.replace_file(path, str(pid).encode(), mode=0o644)


def _wait_for_child(pid: int, terminal: Foreground | None) -> int:
    """Wait for the process that stands for another, passing on the signals that this one gets, and what is written to
    its terminal or comes from there.

    Returns:
        Its exit status; 128 and the number of a signal that ended it.
    """
    import signal

    def forward(number: int, _frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    for number in (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):
        signal.signal(number, forward)
    if terminal is not None:
        with terminal:
            terminal.copy(pid)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status >= 0 else 128 - status


# ---- exec ----


def _exec(arguments: Arguments, options: GlobalOptions) -> int:
    if len(arguments.rest) == 1 and not arguments.value("process"):
        from kata.oci_runtime import debug_console

        return debug_console.run(options.state_root, arguments.rest[0])
    record = records.require(options.state_root, arguments.rest[0])
    _refuse(arguments)
    if arguments.flag("ignore_paused"):  # as with runc, whose process is in the frozen cgroup meanwhile
        while containers.status_of(record) == containers.PAUSED:
            time.sleep(RESUMED_S)
    process = _process(arguments, record)
    terminal = bool(process.get("terminal"))
    detached = arguments.flag("detach")
    console = _console(arguments, terminal, needs_one=detached)
    exec_id = f"exec-{os.getpid()}-{time.monotonic_ns() & 0xFFFF_FFFF:x}"
    with containers.engine_of(record) as engine:
        network = f"/proc/{record.pid}/ns/net"
        stands = _stand(record, exec_id, network, console, terminal=terminal, orphan=detached)
        try:
            engine.exec(record.id, exec_id, process, terminal=terminal, stdin=paths.HANDOVER + stands.path)
            _start_exec(engine, record, exec_id)
            _write_pid(arguments.value("pid_file"), stands.pid)
            stands.let_go()
        finally:
            stands.abandon()
    return 0 if detached else _wait_for_child(stands.pid, stands.terminal)


def _start_exec(engine: EngineClient, record: Record, exec_id: str) -> None:
    try:
        engine.start(record.id, exec_id)
    except KataError:
        try:
            engine.delete(record.id, exec_id)
        except KataError:
            pass  # the reason of the first is told
        raise


def _process(arguments: Arguments, record: Record) -> dict[str, Any]:
    """The process to run, as an object of the specification."""
    command = arguments.rest[1:]
    if path := arguments.value("process"):
        if command:
            raise UsageError("exec: --process has the command already", "leave the command out")
        process = _object(
            path, "--process FILE has a process as an object of the specification", is_file=False
        )
        process["terminal"] = bool(process.get("terminal")) or arguments.flag("tty")
        return process
    config = _object(os.path.join(record.bundle, "config.json"), "its bundle has gone")
    process = dict(config.get("process") or {})
    process["args"] = command
    process["terminal"] = arguments.flag("tty")
    process["cwd"] = arguments.value("cwd") or process.get("cwd") or "/"
    process["env"] = [*(process.get("env") or ()), *arguments.many("env")]
    if arguments.flag("no_new_privs"):
        process["noNewPrivileges"] = True
    process["user"] = _user(arguments, process.get("user") or {})
    if added := arguments.many("cap"):
        sets = dict(process.get("capabilities") or {})
        for name in ("bounding", "effective", "permitted"):
            sets[name] = sorted({*(sets.get(name) or ()), *added})
        process["capabilities"] = sets
    return process


def _user(arguments: Arguments, user: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(user)
    text = arguments.value("user")
    groups = arguments.many("additional_gids")
    numbers = [*(text.split(":") if text else ()), *groups]
    if any(not (one.isascii() and one.isdigit() and int(one) < 1 << 32) for one in numbers):
        raise UsageError(f"exec: {text or groups[0]!r} is no number of a user or group", "--user UID[:GID]")
    if text:
        uid, _, gid = text.partition(":")
        found["uid"] = int(uid)
        if gid:
            found["gid"] = int(gid)
    if groups:
        found["additionalGids"] = [*(found.get("additionalGids") or ()), *map(int, groups)]
    return found


HANDLERS = {"create": _create, "run": _run, "exec": _exec}
