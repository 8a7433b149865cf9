"""The engine process: ``... engine RUN_DIR``, started by `kata.engine.launch`.

The order of things is the point: the hypervisor is executed before asyncio and the rest of the engine are
imported, so that the virtual machine boots while Python loads.
"""

from __future__ import annotations

import os
import sys
import time

from kata.engine.launch import LIFETIME_FD, LISTEN_FD, SETTINGS_FD, Lease
from kata.engine.lifecycle import boot
from kata.engine.lifecycle.booted_machine import BootedMachine
from kata.errors import KataError
from kata.journal import FILE_NAME, Journal
from kata.settings import SandboxSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.engine.factory.waiting_machine import Waiting
    from kata.engine.lifecycle.sandbox import Sandbox
    from kata.engine.services.events import Publisher
    from kata.engine.services.trace import SandboxTrace
    from kata.ttrpc.server import Server

CLIENTS_S = 10.0
"""How long an engine that has nothing left to do waits for its clients to hang up."""
IDLE_POLL_S = 0.25
SWEEP_S = 2.0
"""When an engine looks for what dead ones have left, if it has not ended before: not while its own machine boots."""
EVENTS_S = 5.0
"""How long an engine waits at its end for containerd to take the last events."""


def main(*, forked: bool = False) -> int:
    """Run the engine of one sandbox to its end.

    Args:
        forked: This process was forked off the parent of engines (`kata.engine.parent`).

    Returns:
        The exit status: 0, whatever became of the container; 1 if the settings make no sense.
    """
    import marshal

    entered_ns = time.monotonic_ns()
    run_dir = sys.argv[2]
    for fd in (LISTEN_FD, LIFETIME_FD, SETTINGS_FD):  # ours alone, not our children's
        os.set_inheritable(fd, False)
    lease = Lease()
    if lease.look() == Lease.BROKEN:
        # Whoever comes next for this sandbox undoes what our client has made, maybe just now.
        return 0
    with open(SETTINGS_FD, "rb") as file:
        plain = marshal.loads(file.read())
    try:
        settings = SandboxSettings.from_plain(plain)
    except KataError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")  # into the engine's log
        return 1
    journal = Journal.attach(os.path.join(run_dir, FILE_NAME))
    journal.set_owner(os.getpid())
    machine = BootedMachine()
    failed: KataError | None = None
    if settings.machine is not None:  # otherwise CreateSandbox describes it, and starts it
        try:
            machine = boot.power_on(settings, run_dir, journal)
        except KataError as error:
            failed = error  # the Create call reports it
    powered_ns = time.monotonic_ns()
    # Nothing here speaks TLS, and asyncio does without: 4 MB and 10 ms less.
    sys.modules["ssl"] = None  # type: ignore[assignment]
    from kata import deferred

    deferred.defer()
    deferred.defer_parts()
    import asyncio
    import signal

    # As it is outside Python, until the loop has its own way (`call_on_signals`): asyncio then installs none.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    asyncio.run(_serve(settings, run_dir, journal, machine, failed, lease, (entered_ns, powered_ns), forked))
    return 0


async def serve_with(run_dir: str, plain: dict[str, Any], waiting: Waiting, entered_ns: int) -> None:
    """Be the engine of one sandbox to its end, in a process that waited for it with a machine.

    Args:
        run_dir: The sandbox's directory.
        plain: Its settings, as plain values.
        waiting: The machine.
        entered_ns: When that began, by CLOCK_MONOTONIC.
    """
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from kata.engine.factory import pool_counts

    lease = Lease()
    failed: KataError | None = None
    machine = BootedMachine()
    try:
        if lease.look() == Lease.BROKEN:
            waiting.discard()
            return
        settings = SandboxSettings.from_plain(plain)
        journal = Journal.attach(os.path.join(run_dir, FILE_NAME))
        journal.set_owner(os.getpid())
        console = os.path.join(run_dir, boot.CONSOLE_NAME)
        wired = settings.network.mode == "user"
        await waiting.give(boot.disks_of(settings), run_dir, settings.id, console, wired=wired)
    except BaseException:
        waiting.discard()
        raise
    try:
        machine = boot.power_on(settings, run_dir, journal, waiting)
    except KataError as error:
        failed = error  # the Create call reports it
        waiting.discard()
    waiting.release()
    used = machine.waiting is not None
    pool_counts.count(pool_counts.TAKEN if used else pool_counts.dropped(pool_counts.UNFIT))
    # From here on there may be threads, which have the namespaces that this one has now.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())
    await _serve(
        settings, run_dir, journal, machine, failed, lease, (entered_ns, time.monotonic_ns()), False
    )


async def _serve(
    settings: SandboxSettings,
    run_dir: str,
    journal: Journal,
    machine: BootedMachine,
    failed: KataError | None,
    lease: Lease,
    times_ns: tuple[int, int],
    forked: bool,
) -> None:
    import asyncio
    import signal
    import socket
    from functools import partial

    from kata.engine.lifecycle.sandbox import Sandbox
    from kata.engine.services import sandbox_service, task_service
    from kata.engine.services.management_socket import ManagementSocket
    from kata.engine.signals import call_on_signals
    from kata.proto import sandbox_pb, task_pb
    from kata.ttrpc.server import Server

    sandbox = Sandbox(settings, run_dir, journal, machine, failed)
    entered_ns, powered_ns = times_ns
    launched_ns = settings.launched_ns or entered_ns
    sandbox.timings.came_by(launched_ns, entered_ns, settings.not_forked, forked=forked)
    sandbox.timings.add("load engine", powered_ns)
    publisher = _publisher(settings, sandbox)
    if not sandbox.is_pod:
        sandbox.start(sandbox.timings.origin_ns, powered_ns)
    tasks = (task_pb.SERVICES[task_service.SERVICE], task_service.TaskService(sandbox))
    services = {
        task_service.SERVICE: tasks,
        task_service.SERVICE_3: tasks,
        sandbox_service.SERVICE: (
            sandbox_pb.SERVICES[sandbox_service.SERVICE],
            sandbox_service.SandboxService(sandbox),
        ),
    }

    if sandbox.is_pod:
        from kata.engine.services import pod_service
        from kata.proto import podsandbox_pb

        methods = podsandbox_pb.SERVICES[pod_service.SERVICE]
        services[pod_service.SERVICE] = (methods, pod_service.PodService(sandbox))

    def bug(context: object, error: BaseException) -> None:
        import traceback

        sandbox.tasks.log("".join(traceback.format_exception(error)))

    # Whoever may call may have any path of the host mounted: nobody but our own user, and root.
    server = Server(services, on_error=bug, users={0, os.geteuid()}, on_answer=sandbox.calls.add)

    def on_trace(trace: SandboxTrace) -> None:
        server.trace = trace.call

    sandbox.on_trace = on_trace  # of a pod, once it is described
    if sandbox.trace is not None:
        on_trace(sandbox.trace)
    await server.start(socket.socket(fileno=LISTEN_FD))
    management = ManagementSocket(sandbox)
    management.listen()
    loop = asyncio.get_running_loop()
    call_on_signals((signal.SIGTERM, signal.SIGINT), partial(_on_terminate, sandbox))
    sandbox.tasks.create_task(_end_when_idle(sandbox, server, lease, settings.client.idle_s))
    sweeping = sandbox.tasks.create_task(_sweep(sandbox)) if settings.client.sweeps_dead_engines else None
    await sandbox.ended.wait()
    if publisher is not None:
        await publisher.close(EVENTS_S)
    freeing = loop.run_in_executor(None, sandbox.free_space)
    # Its files are gone; connections that are open still get their answers.
    # A client whose state is stale learns that there is nothing here when we hang up.
    give_up = loop.time() + (0 if sandbox.saw_stale_client else CLIENTS_S)
    while server.connections and loop.time() < give_up:
        await asyncio.sleep(0.01)
    await management.close()
    await sandbox.drain_output()
    await asyncio.gather(freeing, server.shutdown(1.0))
    if sandbox.trace is not None:
        await sandbox.trace.close()
    if sweeping is not None:
        await asyncio.wait([sweeping])


async def _sweep(sandbox: Sandbox) -> None:
    """Undo what killed engines of the same client have left, as `kata gc` does.

    containerd does not always have it done: where an engine dies while its first Create is under way, containerd 1.6
    may remove the bundle before it starts the shim's delete in it, which then does not run. And podman has nothing
    deleted of a container whose monitor was killed: its record stays.
    """
    import asyncio
    import contextlib

    from kata.engine import oci_records
    from kata.journal_undo import reconcile_sandboxes

    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(sandbox.ended.wait(), SWEEP_S)
    client = sandbox.settings.client.name
    report = await asyncio.to_thread(reconcile_sandboxes, os.path.dirname(sandbox.run_dir), client)
    records = await asyncio.to_thread(oci_records.sweep)
    undone = [*report.undone, *records]
    for line in (*(f"cleared up after {what}" for what in undone), *report.failures):
        sandbox.tasks.log(line)


def _publisher(settings: SandboxSettings, sandbox: Sandbox) -> Publisher | None:
    client = settings.client
    if not client.events_address:
        return None
    from kata.engine.services.events import Publisher

    publisher = Publisher(client.events_address, client.namespace, sandbox.tasks.log)
    sandbox.forward_event = publisher.publish
    return publisher


def _on_terminate(sandbox: Sandbox, number: int) -> None:
    sandbox.runtime.fail(f"the engine was told to end by signal {number}")
    sandbox.end()


async def _end_when_idle(sandbox: Sandbox, server: Server, lease: Lease, patience_s: float) -> None:
    """End a sandbox that nobody can want any more, as `kata.engine.lifecycle.idle` decides.

    Args:
        sandbox: The engine's.
        server: Knows whether a client is connected.
        lease: Of the client that started the engine.
        patience_s: How long it stays when nobody seems to want it, in seconds.
    """
    import asyncio

    from kata.engine.lifecycle import idle

    loop = asyncio.get_running_loop()
    idle_since_s: float | None = None
    while not sandbox.is_ending:
        living = [one for one in sandbox.containers.values() if one.init.alive]
        if living:
            idle_since_s = None
            await asyncio.wait([asyncio.ensure_future(one.init.ended.wait()) for one in living])
            continue
        action = idle.next_action(
            lease.look(),
            has_clients=bool(server.connections),
            has_containers=bool(sandbox.containers),
            had_container=sandbox.had_container,
            saw_stale_client=sandbox.saw_stale_client,
            survives_clients=sandbox.client.keeps_ended_containers,
            is_pod=sandbox.is_pod,
        )
        if action == idle.KEEP:
            idle_since_s = None
        elif action == idle.WAIT and idle_since_s is None:
            idle_since_s = loop.time()
        elif action == idle.END or loop.time() - (idle_since_s or 0.0) >= patience_s:
            sandbox.end()
        await asyncio.sleep(IDLE_POLL_S)
