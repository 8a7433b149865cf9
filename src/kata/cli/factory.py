"""`kata factory`: templates of machines, which are made when they are needed anyway."""

from __future__ import annotations

import time

from kata.cli import table, values
from kata.cli.args import Command, Option
from kata.errors import UnsupportedError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.args import Arguments
    from kata.config.files import Configuration
    from kata.hypervisor.base import Capabilities, MachineShape
    from kata.hypervisor.protocols import Monitor
    from kata.settings import MachineSettings

COMMANDS = {
    "factory": Command(
        "factory",
        "init|status|destroy",
        "Makes the template of the machine that 'kata run IMAGE' starts, shows all templates, or removes them.",
        [
            Option("-m --memory", "SIZE", "init: for machines of containers with this limit (none)"),
            Option("--cpus", "N", "init: the same for processors (none)"),
            Option("--hypervisor", "NAME", "init: for machines of this hypervisor (the configured one)"),
            Option("--network", "none|user", "init: for machines with such a network (user)"),
            Option("--json", "", "status: print JSON"),
        ],
        least=1,
        most=1,
        notes="A template is a machine that was booted once and saved: those of its shape go on from it, several\n"
        "times faster. It is made by itself after the first start of such a machine; 'init' does so beforehand.\n"
        "[factory] enable_template = false or KATA_TEMPLATES=off switches them off (docs/templates.md).",
    ),
}


def _factory(arguments: Arguments) -> int:
    verb = arguments.rest[0]
    handlers = {"init": _init, "status": _status, "destroy": _destroy}
    if verb not in handlers:
        raise UsageError(f"kata factory {verb}: not known", "init, status or destroy")
    for option, its_verb in (
        ("memory", "init"),
        ("cpus", "init"),
        ("hypervisor", "init"),
        ("network", "init"),
        ("json", "status"),
    ):
        if verb != its_verb and (arguments.flag(option) or arguments.value(option) is not None):
            raise UsageError(
                f"kata factory {verb}: --{option} is an option of '{its_verb}'",
                f"kata factory {verb}, without it",
            )
    return handlers[verb](arguments)


def directory(conf: Configuration) -> str:
    """Where this configuration has its templates."""
    from kata.engine.factory import template

    return template.root_of(str(conf.get("factory.template_path", "")))


def _configured(arguments: Arguments) -> tuple[MachineSettings, str]:
    """The machine of a container with such limits, and the directory of templates."""
    from kata.config import files
    from kata.engine import machine
    from kata.resources.sizing import ResourceRequest

    name = arguments.value("hypervisor") or ""
    conf = files.load("", name, "--hypervisor" if name else "")
    memory = arguments.value("memory")
    cpus = arguments.value("cpus")
    asked = ResourceRequest(
        values.cpus(cpus) if cpus else None,
        values.container_memory(memory) if memory else None,
        "--cpus and --memory",
    )
    limited = asked.cpus is not None or asked.memory is not None
    described, _ = machine.machine_settings(asked, conf, grows=limited)
    return described, directory(conf)


def _shape(described: MachineSettings, network: str) -> tuple[Monitor, Capabilities, MachineShape]:
    """The machine in which `kata run` has such a container: an image, a disk for what it writes, and a network.

    Raises:
        UsageError: There is no network of this mode, or none that a template could have.
    """
    from kata.cli import session
    from kata.engine.lifecycle import boot
    from kata.hypervisor import registry
    from kata.settings import DiskSettings, SandboxSettings

    monitor = registry.find(described.hypervisor.name)
    hypervisor = described.hypervisor
    can = monitor.capabilities(hypervisor.accel, hypervisor.options, bounces=described.guest.bounces)
    settings = SandboxSettings(
        id="template",
        client=session.client_policy(),
        machine=described,
        disks=[DiskSettings(path="/", readonly=True), DiskSettings(path="/", readonly=False)],
    )
    share = can.shares[-1] if can.shares else ""
    if network not in ("none", "user"):
        raise UsageError(f"kata factory init: --network {network!r} is not known", "none or user")
    nics = min(can.nics, 1) if network == "user" or boot.has_idle_nic(described) else 0
    taps = 0 if "stream" in can.nic_backends else nics
    return monitor, can, boot.shape_of(settings, can, nics=nics, taps=taps, share=share)


def _init(arguments: Arguments) -> int:
    from kata.engine.factory import maker, template

    described, root = _configured(arguments)
    monitor, can, shape = _shape(described, arguments.value("network") or "user")
    reason = template.why_not(monitor, can, shape)
    if reason:
        raise UnsupportedError(f"there can be no template of this machine: {reason}", "docs/templates.md")
    wanted = template.Template(root, template.key_of(monitor, shape))
    began = time.monotonic()
    made = maker.make(wanted, monitor, shape)
    if made:
        print(f"made {wanted.key} ({time.monotonic() - began:.1f} s)")
    else:
        print(f"{wanted.key} is there already")
    return 0


def _status(arguments: Arguments) -> int:
    from kata import paths
    from kata.config import files
    from kata.engine import parent_client
    from kata.engine.factory import maker, pool, pool_counts, template

    conf = files.load()
    root = directory(conf)
    mode = template.mode_of(enabled=conf.get("factory.enable_template", True))
    found, waiting, counts = maker.listed(root), pool.listed(), pool_counts.read()
    failed = maker.failures(root)
    parents = parent_client.listed(paths.run_dir())
    if arguments.flag("json"):
        table.show_json(
            {
                "directory": root,
                "mode": mode,
                "templates": found,
                "waiting": waiting,
                "pool": {name: counts[name] for name in pool_counts.TOTALS},
                "pool_dropped": pool_counts.by_reason(counts),
                "failures": [{"key": key, "reason": reason} for key, reason in failed],
                "engine_parents": parents,
            }
        )
        return 0
    words = {
        "on": "used, and made when they are missing",
        "use": "used, and not made when they are missing",
        "off": "switched off: every machine boots",
    }
    print(f"Templates in {root} are {words[mode]}.")
    if found:
        table.show(["KEY", "SIZE", "MACHINE", "MADE", "USED"], [_row(one) for one in found])
    if waiting:
        print(f"{len(waiting)} machines wait for sandboxes (vm_cache_number):")
        table.show(["PID", "MACHINE PID", "MEMORY", "SINCE"], [_waiting_row(one) for one in waiting])
    if any(counts.values()):
        print(_counted(counts))
    for key, reason in failed:
        print(f"{key} could not be made: {table.printable(reason)}")
    for one in parents:
        print(f"The process {one['pid']} forks engines ({table.human_size(one['bytes'])}).")
    return 0


def _row(one: dict[str, Any]) -> list[str]:
    shape = one["machine"]
    machine = f"{shape.get('vcpus')} CPU, {shape.get('memory_mib')} MiB, {shape.get('accel')}"
    ages = [table.lapse(time.time() - one[name]) for name in ("made", "used")]
    return [one["key"], table.human_size(one["bytes"]), machine, *ages]


def _waiting_row(one: dict[str, Any]) -> list[str]:
    since = table.lapse(time.time() - one["since"])
    return [str(one["pid"]), str(one["machine_pid"]), table.human_size(one["bytes"]), since]


def _counted(counts: dict[str, int]) -> str:
    """What has become of the machines that waited, since the host booted."""
    from kata.engine.factory import pool_counts

    dropped = {reason: number for reason, number in pool_counts.by_reason(counts).items() if number}
    why = f" ({', '.join(f'{reason} {number}' for reason, number in dropped.items())})" if dropped else ""
    made, taken, missed = (counts[name] for name in pool_counts.TOTALS)
    return (
        f"Of {made} machines that have waited, {taken} were used, and {sum(dropped.values())} dropped{why};"
        f" {missed} starts found none."
    )


def _destroy(_arguments: Arguments) -> int:
    from kata import paths
    from kata.config import files
    from kata.engine import parent_client
    from kata.engine.factory import maker, pool

    removed = maker.destroy(directory(files.load()))
    ended = pool.end()
    for key in removed:
        print(f"removed {key}")
    if ended:
        print(f"ended {len(ended)} machines that waited")
    if not removed and not ended:
        print("there are no templates")
    for name in parent_client.end_all(paths.run_dir()):
        print(f"ended {name}")
    return 0


HANDLERS = {"factory": _factory}
