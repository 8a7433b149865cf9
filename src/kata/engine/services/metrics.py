"""A sandbox's metrics as Prometheus reads them. `kata.metrics.families` says which, docs/metrics.md what they mean."""

from __future__ import annotations

import gc
import resource
import sys

import kata
from kata.agent.client import AGENT
from kata.engine.containers.described import described
from kata.engine.services import figures
from kata.metrics import exposition, families, procfs
from kata.metrics.overhead import Overhead
from kata.proto import agent_pb, agentext_pb, health_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.engine.lifecycle.sandbox import Sandbox
    from kata.engine.services.figures import Figures
    from kata.metrics.exposition import Text
    from kata.metrics.procfs import ProcessFigures

NO_LIMIT = 1 << 62
"""A limit from here on is none: the kernel's largest number of pages, in bytes."""
MAX_CARDS = 64
PHASE_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STATES = ("created", "running", "paused", "stopped")
_PREFIX = {"engine": "kata_shim", "hypervisor": "kata_hypervisor", "virtiofsd": "kata_virtiofsd"}


async def collect(sandbox: Sandbox) -> str:
    """All metrics of a sandbox.

    Returns:
        Prometheus' text format, without labels that tell the sandbox: kata-monitor adds those.
    """
    found = await figures.look(sandbox)
    text = exposition.Text(families.DEFINITIONS)
    _guest(text, found)
    network = sandbox.machine.network
    for one in found.processes:
        _process(text, one)
        # Otherwise they are in a network that is not the sandbox's alone: the host's, as a rule.
        if one.role in ("engine", "hypervisor") and network is not None and network.external_netns:
            _interfaces(text, one)
    _counters(text, sandbox.settings.described().hypervisor.name, found)
    _engine(text, sandbox)
    _host(text, sandbox, found)
    _containers(text, sandbox, found)
    return text.text()


_AS_CODED = 'kata_agent_io_stat{item="cancelled_write_bytes"}'
_AS_DOCUMENTED = 'kata_agent_io_stat{item="cancelled_write_byte"}'


def _guest(text: Text, found: Figures) -> None:
    """What the guest says, as far as it makes sense."""
    text.add("kata_shim_agent_up", int(found.guest_text is not None))
    if found.guest_text is None:
        return
    known, dropped = exposition.known_samples(found.guest_text, families.OF_GUEST)
    for name, lines in known.items():
        text.lines(name).extend(lines)
    input_output = known.get("kata_agent_io_stat", ())
    if not any(line.startswith(_AS_DOCUMENTED) for line in input_output):
        text.lines("kata_agent_io_stat").extend(
            _AS_DOCUMENTED + line.removeprefix(_AS_CODED)
            for line in input_output
            if line.startswith(_AS_CODED)
        )
    text.add("kata_shim_guest_samples_dropped", dropped)


def _process(text: Text, one: ProcessFigures) -> None:
    prefix = _PREFIX.get(one.role)
    if prefix is None:
        role = exposition.labels_text(role=one.role, pid=str(one.pid))
        text.add("kata_helper_cpu_seconds_total", one.cpu_s, role)
        text.add("kata_helper_resident_memory_bytes", one.resident_bytes, role)
        opened = one.open_files()
        if opened is not None:
            text.add("kata_helper_fds", opened, role)
        return
    text.add(f"{prefix}_threads", one.threads)
    text.items(f"{prefix}_proc_stat", one.stat)
    text.items(f"{prefix}_proc_status", one.status)
    text.items(f"{prefix}_io_stat", one.io)
    opened = one.open_files()
    if opened is not None:
        text.add(f"{prefix}_fds", opened)
    if one.role == "engine":
        text.add("kata_shim_process_cpu_seconds_total", one.cpu_s)
        text.add("kata_shim_process_max_fds", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        text.add("kata_shim_process_open_fds", opened or 0)
        text.add("kata_shim_process_resident_memory_bytes", one.resident_bytes)
        text.add("kata_shim_process_virtual_memory_bytes", one.virtual_bytes)
        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        text.add(
            "kata_shim_process_virtual_memory_max_bytes", -1 if most == resource.RLIM_INFINITY else most
        )
        text.add("kata_shim_process_start_time_seconds", one.started_s)


def _counters(text: Text, name: str, found: Figures) -> None:
    """What the hypervisor has counted: in families of its own where it has some, else by device."""
    for part, values in found.counters.items():
        # It may be another's by now, and these are words of its own.
        known = {item: value for item, value in values.items() if _is_word(item)}
        family = f"kata_{name.replace('-', '_')}_{part}"
        if family in families.DEFINITIONS:
            text.items(family, known)
        elif part.rstrip("0123456789") in ("disk", "nic") and _is_word(part):
            text.items("kata_hypervisor_device", known, f'device="{part}",')


def _is_word(text: str) -> bool:
    return len(text) <= 64 and text.isascii() and text.isidentifier()


def _interfaces(text: Text, one: ProcessFigures) -> None:
    found = {exposition.escape(name): items for name, items in procfs.interfaces(one.pid)}
    for name, items in found.items():
        text.items(f"{_PREFIX[one.role]}_netdev", items, f'interface="{name}",')


def _engine(text: Text, sandbox: Sandbox) -> None:
    """What the engine knows and has counted."""
    runtime, settings = sandbox.runtime, sandbox.settings.machine
    hypervisor = runtime.machine.monitor.name if runtime.machine.monitor is not None else ""
    python = sys.version.partition(" ")[0]
    labels = exposition.labels_text(version=kata.__version__, python=python, hypervisor=hypervisor)
    text.add("kata_shim_build_info", 1, labels)
    if runtime.vm is not None and settings is not None:
        labels = exposition.labels_text(
            name=hypervisor,
            version=runtime.vm.version,
            accelerator=settings.hypervisor.accel,
            channel=runtime.vm.channel.kind,
        )
        text.add("kata_hypervisor_info", 1, labels)
    labels = exposition.labels_text(implementation=sys.implementation.name, version=python)
    text.add("kata_shim_python_info", 1, labels)
    for generation, counts in enumerate(gc.get_stats()):
        labels = exposition.labels_text(generation=str(generation))
        text.add("kata_shim_python_gc_collections_total", counts["collections"], labels)
        text.add("kata_shim_python_gc_objects_collected_total", counts["collected"], labels)
        text.add("kata_shim_python_gc_objects_uncollectable_total", counts["uncollectable"], labels)
    text.add("kata_shim_sandbox_state", 1, exposition.labels_text(state=sandbox.life.state.value))
    if sandbox.life.created_ns:
        text.add("kata_shim_sandbox_created_seconds", sandbox.life.created_ns / 1e9)
    states = [str(one.init.state) for one in sandbox.containers.values()]
    for state in _STATES:
        text.add("kata_shim_containers", states.count(state), exposition.labels_text(state=state))
    sandbox.calls.write(text, "kata_shim_rpc_durations_histogram_milliseconds", families.ACTIONS.get)
    runtime.agent_calls.write(text, "kata_shim_agent_rpc_durations_histogram_milliseconds", _request_name)
    text.add("kata_shim_disk_errors_total", runtime.disk_errors)
    text.add("kata_shim_guest_vcpus", sandbox.resizer.vcpus)
    text.add("kata_shim_guest_memory_bytes", sandbox.resizer.memory_mib << 20)
    _start(text, sandbox)


_AGENTS = agent_pb.SERVICES | health_pb.SERVICES | agentext_pb.SERVICES


def _request_name(call: str) -> str:
    """The type of the request of a call to the agent; empty for one that a client has made up."""
    service, _, method = call.rpartition("/")
    table = _AGENTS.get(service or AGENT)
    return table.request_name(method) if table is not None else ""


def _start(text: Text, sandbox: Sandbox) -> None:
    """The phases of the start, each a histogram with one observation."""
    phases = {name: duration / 1e9 for name, _, duration in sandbox.timings}
    if not phases:
        return
    started = [one.init.started_at_ns for one in sandbox.containers.values() if one.init.started_at_ns]
    if started:
        phases["total"] = max(start + duration for _, start, duration in sandbox.timings) / 1e9
    name = "kata_shim_start_phase_duration_seconds"
    lines = text.lines(name)
    for phase, seconds in phases.items():
        label = f'phase="{exposition.escape(phase)}"'
        for bound in PHASE_BOUNDS_S:
            lines.append(f'{name}_bucket{{{label},le="{bound}"}} {int(seconds <= bound)}')
        lines.append(f'{name}_bucket{{{label},le="+Inf"}} 1')
        lines.append(f"{name}_sum{{{label}}} {seconds!r}")
        lines.append(f"{name}_count{{{label}}} 1")


def _host(text: Text, sandbox: Sandbox, found: Figures) -> None:
    """What the sandbox takes on the host, and what of that is overhead."""
    text.add("kata_shim_host_cpu_seconds_total", found.cpu_s)
    text.add("kata_shim_host_memory_bytes", found.memory_bytes)
    cgroup = sandbox.machine.cgroup
    if cgroup is not None:
        text.add("kata_shim_host_oom_kills_total", cgroup.oom_kills())
        limit = _memory_limit(cgroup.paths.get("memory", ""))
        if limit:
            text.add("kata_shim_host_memory_limit_bytes", limit)
    if found.is_whole:  # otherwise what the containers take would seem to be overhead
        if sandbox.overhead is None:
            sandbox.overhead = Overhead(sandbox.life.created_ns / 1e9)
        percent = sandbox.overhead.cpu_percent(found.at_s, found.cpu_s, container_cpu_s(found))
        text.add("kata_shim_pod_overhead_cpu", percent)
        text.add(
            "kata_shim_pod_overhead_memory_in_bytes", max(0, found.memory_bytes - container_memory(found))
        )
    if found.returned_bytes is not None:
        text.add("kata_shim_guest_memory_returned_bytes", found.returned_bytes)


def _memory_limit(directory: str) -> int:
    """The limit of a memory cgroup in bytes; 0 for none."""
    for file in ("memory.max", "memory.limit_in_bytes"):
        words = procfs.read(f"{directory}/{file}").split() if directory else []
        if words and words[0].isdigit() and int(words[0]) < NO_LIMIT:
            return int(words[0])
    return 0


def container_cpu_s(found: Figures) -> dict[str, float]:
    """Processor time of each container in seconds, as the guest says."""
    used = {}
    for container, answer in found.containers.items():
        cpu = answer.cgroup_stats.cpu_stats if answer.cgroup_stats is not None else None
        if cpu is not None and cpu.cpu_usage is not None:
            used[container] = cpu.cpu_usage.total_usage / 1e9
    return used


def container_memory(found: Figures) -> int:
    """Memory of all containers together in bytes, as the guest says."""
    total = 0
    for answer in found.containers.values():
        memory = answer.cgroup_stats.memory_stats if answer.cgroup_stats is not None else None
        if memory is not None and memory.usage is not None:
            total += memory.usage.usage
    return total


# ---- containers ----


def _containers(text: Text, sandbox: Sandbox, found: Figures) -> None:
    for container in list(sandbox.containers.values())[: figures.MAX_CONTAINERS]:
        about = described(sandbox.settings, container.id, container.config)
        labels = exposition.labels_text(container_id=container.id, name=about["name"], image=about["image"])
        text.add("kata_container_info", 1, labels)
        labels = exposition.labels_text(container_id=container.id, state=str(container.init.state))
        text.add("kata_container_state", 1, labels)
        identity = exposition.labels_text(container_id=container.id)
        text.add("kata_container_oom_kills_total", container.oom_kills, identity)
        if container.init.started_at_ns:
            text.add("kata_container_start_time_seconds", container.init.started_at_ns / 1e9, identity)
        answer = found.containers.get(container.id)
        if answer is not None and answer.cgroup_stats is not None:
            _cpu(text, container.id, identity, answer.cgroup_stats.cpu_stats)
            _memory(text, identity, answer.cgroup_stats.memory_stats)
            pids = answer.cgroup_stats.pids_stats
            if pids is not None:
                text.add("kata_container_pids", pids.current, identity)
                if 0 < pids.limit < NO_LIMIT:
                    text.add("kata_container_pids_limit", pids.limit, identity)
            _io(text, container.id, answer.cgroup_stats.blkio_stats)
    # The containers of a pod share its network, so any of them tells of it.
    answer = next(iter(found.containers.values()), None)
    cards = answer.network_stats[:MAX_CARDS] if answer is not None else ()
    for name, card in {exposition.escape(card.name): card for card in cards}.items():
        _network(text, f'{{interface="{name}"}}', card)


def _cpu(text: Text, container_id: str, identity: str, cpu: agent_pb.CpuStats | None) -> None:
    if cpu is None:
        return
    if cpu.cpu_usage is not None:
        for mode, used_ns in (
            ("user", cpu.cpu_usage.usage_in_usermode),
            ("system", cpu.cpu_usage.usage_in_kernelmode),
        ):
            labels = exposition.labels_text(container_id=container_id, mode=mode)
            text.add("kata_container_cpu_seconds_total", used_ns / 1e9, labels)
    throttled = cpu.throttling_data
    if throttled is not None:
        text.add("kata_container_cpu_periods_total", throttled.periods, identity)
        text.add("kata_container_cpu_throttled_periods_total", throttled.throttled_periods, identity)
        text.add("kata_container_cpu_throttled_seconds_total", throttled.throttled_time / 1e9, identity)


def _memory(text: Text, identity: str, memory: agent_pb.MemoryStats | None) -> None:
    if memory is None:
        return
    if memory.usage is not None:
        text.add("kata_container_memory_usage_bytes", memory.usage.usage, identity)
        text.add("kata_container_memory_working_set_bytes", working_set(memory), identity)
        text.add("kata_container_memory_max_usage_bytes", memory.usage.max_usage, identity)
        text.add("kata_container_memory_failures_total", memory.usage.failcnt, identity)
        if 0 < memory.usage.limit < NO_LIMIT:
            text.add("kata_container_memory_limit_bytes", memory.usage.limit, identity)


def working_set(memory: agent_pb.MemoryStats) -> int:
    """Memory of a container in bytes less the page cache that can be reclaimed at once, as `docker stats` has it."""
    usage = memory.usage.usage if memory.usage is not None else 0
    return max(0, usage - memory.stats.get("inactive_file", 0))


def _io(text: Text, container_id: str, blkio: agent_pb.BlkioStats | None) -> None:
    if blkio is None:
        return
    for name, entries in (
        ("kata_container_io_bytes_total", blkio.io_service_bytes_recursive),
        ("kata_container_io_operations_total", blkio.io_serviced_recursive),
    ):
        sums: dict[tuple[str, str], int] = {}
        for one in entries[:256]:
            operation = one.op.lower()
            if operation in ("read", "write"):
                key = (f"{one.major}:{one.minor}", operation)
                sums[key] = sums.get(key, 0) + one.value
        room = exposition.MAX_FAMILY_SAMPLES - len(text.lines(name))
        for (device, operation), value in list(sums.items())[: max(0, room)]:
            labels = exposition.labels_text(container_id=container_id, device=device, operation=operation)
            text.add(name, value, labels)


def _network(text: Text, labels: str, card: agent_pb.NetworkStats) -> None:
    for ours, theirs in (("receive", "rx"), ("transmit", "tx")):
        for what in ("bytes", "packets", "errors", "dropped"):
            text.add(f"kata_pod_network_{ours}_{what}_total", getattr(card, f"{theirs}_{what}"), labels)
