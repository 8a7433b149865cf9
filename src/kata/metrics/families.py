"""Every family of metrics: its name, type, labels, description and source, in one place.

Names are those of the original's documentation. docs/metrics.md, which `tools/metrics_table.py` makes of this, says
where the original's code differs, and what is ours.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    OF_MONITOR: dict[str, Definition]
    """The families that kata-monitor adds to those of its sandboxes, by name. Engines do without them."""


class Definition:
    """What a family is.

    Args:
        name: Its name.
        kind: counter, gauge or histogram.
        labels: Names of its labels, in the order in which they are written; without ``le`` and those of the monitor.
        source: Where its figures come from: a key of `SOURCES`.
        help_text: A sentence, with the unit.
    """

    __slots__ = ("help", "kind", "label_names", "labels", "name", "source")

    def __init__(self, name: str, kind: str, labels: str, source: str, help_text: str) -> None:
        self.name = name
        self.kind = kind
        self.label_names = labels
        self.labels = tuple(labels.split(",")) if labels else ()
        self.source = source
        self.help = help_text


SOURCES = {
    "agent": "the agent's GetMetrics: its own /proc/self",
    "guest": "the agent's GetMetrics: the guest's /proc",
    "container": "the agent's StatsContainer: the container's cgroup in the guest",
    "hypervisor": "/proc of the hypervisor's process on the host",
    "firecracker": "what Firecracker writes when it is asked to (docs/metrics.md of its sources)",
    "counters": "what the hypervisor says, where it counts: Cloud Hypervisor and Firecracker",
    "virtiofsd": "/proc of the file server of the share",
    "helper": "/proc of the other helpers (network, logging programs)",
    "shim": "/proc of the engine, which is the shim",
    "engine": "what the engine counts and knows",
    "host": "the sandbox's cgroup on the host; without one, the /proc of its processes",
    "monitor": "kata-monitor",
}

_TABLE = {
    "agent": """
kata_agent_io_stat gauge item What the agent has read and written, as in /proc/PID/io.
kata_agent_proc_stat gauge item Processor time of the agent in clock ticks (1/100 s).
kata_agent_proc_status gauge item Memory of the agent in kB, and its context switches.
kata_agent_process_cpu_seconds_total counter - Processor time of the agent in seconds.
kata_agent_process_max_fds gauge - Limit of open files of the agent.
kata_agent_process_open_fds gauge - Open files of the agent.
kata_agent_process_resident_memory_bytes gauge - Resident memory of the agent in bytes.
kata_agent_process_start_time_seconds gauge - Start of the agent, in seconds since the Epoch.
kata_agent_process_virtual_memory_bytes gauge - Virtual memory of the agent in bytes.
kata_agent_scrape_count counter - How often the agent was asked for its metrics.
kata_agent_threads gauge - Threads of the agent.
kata_agent_total_rss gauge - Resident memory of the agent in bytes.
kata_agent_total_time gauge - Processor time of the agent in seconds.
kata_agent_total_vm gauge - Virtual memory of the agent in bytes.
""",
    "guest": """
kata_guest_cpu_time gauge cpu,item Time of the guest's processors in clock ticks (1/100 s).
kata_guest_diskstat gauge disk,item Disks of the guest: requests, sectors (512 bytes), times in ms.
kata_guest_filesystem_bytes gauge mount,device,item Room of the guest's file systems in bytes.
kata_guest_filesystem_inodes gauge mount,device,item Inodes of the guest's file systems.
kata_guest_load gauge item Load averages of the guest.
kata_guest_meminfo gauge item Memory of the guest in bytes; huge pages in pages.
kata_guest_netdev_stat gauge interface,item Network interfaces of the guest.
kata_guest_tasks gauge item Tasks of the guest that run (cur), and all of them (max).
kata_guest_vm_stat gauge item Counters of the guest's /proc/vmstat.
""",
    "hypervisor": """
kata_hypervisor_fds gauge - Open files of the hypervisor.
kata_hypervisor_io_stat gauge item Bytes and system calls, as in /proc/PID/io.
kata_hypervisor_netdev gauge interface,item Interfaces of the pod's network namespace, in which it is: bytes, packets,
  errors.
kata_hypervisor_proc_stat gauge item Processor time in clock ticks (1/100 s), as in /proc/PID/stat.
kata_hypervisor_proc_status gauge item Memory in kB and context switches, as in /proc/PID/status.
kata_hypervisor_threads gauge - Threads of the hypervisor.
""",
    "virtiofsd": """
kata_virtiofsd_fds gauge - Open files of the file server.
kata_virtiofsd_io_stat gauge item Bytes and system calls, as in /proc/PID/io.
kata_virtiofsd_proc_stat gauge item Processor time in clock ticks (1/100 s), as in /proc/PID/stat.
kata_virtiofsd_proc_status gauge item Memory in kB and context switches, as in /proc/PID/status.
kata_virtiofsd_threads gauge - Threads of the file server.
""",
    "helper": """
kata_helper_cpu_seconds_total counter role,pid Processor time of a helper in seconds.
kata_helper_fds gauge role,pid Open files of a helper.
kata_helper_resident_memory_bytes gauge role,pid Resident memory of a helper in bytes.
""",
    "shim": """
kata_shim_fds gauge - Open files of the engine.
kata_shim_io_stat gauge item Bytes and system calls, as in /proc/PID/io.
kata_shim_netdev gauge interface,item Interfaces of the pod's network namespace, in which it is: bytes, packets,
  errors.
kata_shim_proc_stat gauge item Processor time in clock ticks (1/100 s), as in /proc/PID/stat.
kata_shim_proc_status gauge item Memory in kB and context switches, as in /proc/PID/status.
kata_shim_process_cpu_seconds_total counter - Processor time of the engine in seconds.
kata_shim_process_max_fds gauge - Limit of open files of the engine.
kata_shim_process_open_fds gauge - Open files of the engine.
kata_shim_process_resident_memory_bytes gauge - Resident memory of the engine in bytes.
kata_shim_process_start_time_seconds gauge - Start of the engine, in seconds since the Epoch.
kata_shim_process_virtual_memory_bytes gauge - Virtual memory of the engine in bytes.
kata_shim_process_virtual_memory_max_bytes gauge - Limit of the engine's virtual memory in bytes; -1 without one.
kata_shim_threads gauge - Threads of the engine.
""",
    "firecracker": """
kata_firecracker_api_server gauge item Times of Firecracker's own start, in microseconds.
kata_firecracker_block gauge item What Firecracker has counted of all disks.
kata_firecracker_get_api_requests gauge item Requests to its API that ask for something.
kata_firecracker_i8042 gauge item Accesses to its keyboard's controller.
kata_firecracker_latencies_us gauge item Duration of the latest pause, resume and snapshot, in microseconds.
kata_firecracker_logger gauge item What its log and these figures have missed.
kata_firecracker_mmds gauge item Packets of its metadata service, which is not used here.
kata_firecracker_net gauge item What Firecracker has counted of all network interfaces.
kata_firecracker_patch_api_requests gauge item Requests to its API that change something.
kata_firecracker_put_api_requests gauge item Requests to its API that make something.
kata_firecracker_seccomp gauge item System calls that its filter has stopped.
kata_firecracker_signals gauge item Signals that it has received.
kata_firecracker_uart gauge item Accesses to its serial port.
kata_firecracker_vcpu gauge item What its virtual processors have left the guest for.
kata_firecracker_vmm gauge item Panics of its own.
kata_firecracker_vsock gauge item What Firecracker has counted of the guest's vsock.
""",
    "counters": """
kata_hypervisor_device gauge device,item What the hypervisor has counted of one device (disk0, nic0): bytes, requests,
  microseconds; names of the items are its own.
""",
    "engine": """
kata_container_info gauge container_id,name,image A container's name and image; always 1.
kata_container_oom_kills_total counter container_id Processes of a container that were killed in the guest for want of
  memory.
kata_container_start_time_seconds gauge container_id Start of a container, in seconds since the Epoch.
kata_container_state gauge container_id,state State of a container; always 1.
kata_hypervisor_info gauge name,version,accelerator,channel The hypervisor, its accelerator, and how the agent is
  reached; always 1.
kata_shim_agent_rpc_durations_histogram_milliseconds histogram action Duration of the engine's calls to the agent.
kata_shim_agent_up gauge - Whether the agent has answered this scrape (1) or not (0).
kata_shim_build_info gauge version,python,hypervisor Versions of the engine and of Python, and the hypervisor; always
  1.
kata_shim_containers gauge state Containers by state.
kata_shim_disk_errors_total counter - Requests of the guest's disks that the host could not carry out.
kata_shim_guest_memory_bytes gauge - Memory that the guest was given, in bytes.
kata_shim_guest_memory_returned_bytes gauge - Memory of the guest that takes none of the host's: given back, or never
  touched, in bytes.
kata_shim_guest_samples_dropped gauge - Samples of the guest that this scrape left out: unknown, malformed, repeated,
  or too many.
kata_shim_guest_vcpus gauge - Processors of the guest.
kata_shim_python_gc_collections_total counter generation Runs of the engine's garbage collector.
kata_shim_python_gc_objects_collected_total counter generation Objects that the engine's garbage collector has freed.
kata_shim_python_gc_objects_uncollectable_total counter generation Objects that it could not free.
kata_shim_python_info gauge implementation,version Python, in which the engine is written; always 1.
kata_shim_rpc_durations_histogram_milliseconds histogram action Duration of the calls that the engine has answered.
kata_shim_sandbox_created_seconds gauge - Start of the machine, in seconds since the Epoch.
kata_shim_sandbox_state gauge state State of the sandbox; always 1.
kata_shim_start_phase_duration_seconds histogram phase Duration of each phase of the start, and of all of it (total),
  in seconds: one observation each.
""",
    "host": """
kata_shim_host_cpu_seconds_total counter - Processor time of the whole sandbox on the host, in seconds.
kata_shim_host_memory_bytes gauge - Host memory of the whole sandbox in bytes.
kata_shim_host_memory_limit_bytes gauge - Limit of the sandbox's host memory in bytes.
kata_shim_host_oom_kills_total counter - Processes of the sandbox that the host's kernel has killed for want of
  memory.
kata_shim_pod_overhead_cpu gauge - Processor time beside that of the containers, in percent of one processor, since
  the scrape before; at the first one, since the start. Absent while the guest does not answer.
kata_shim_pod_overhead_memory_in_bytes gauge - Host memory of the sandbox beside that of its containers, in bytes.
  Absent while the guest does not answer.
""",
    "container": """
kata_container_cpu_periods_total counter container_id Periods of a container's processor limit in which it ran.
kata_container_cpu_seconds_total counter container_id,mode Processor time of a container in seconds, by mode (user,
  system).
kata_container_cpu_throttled_periods_total counter container_id Periods in which a container had to wait for its
  processor limit.
kata_container_cpu_throttled_seconds_total counter container_id Time in which a container had to wait for its
  processor limit, in seconds.
kata_container_io_bytes_total counter container_id,device,operation Bytes of a container's disks, by operation (read,
  write).
kata_container_io_operations_total counter container_id,device,operation Requests of a container's disks, by
  operation (read, write).
kata_container_memory_failures_total counter container_id How often a container has met its memory limit.
kata_container_memory_limit_bytes gauge container_id Memory limit of a container in bytes; without one, the guest's
  memory.
kata_container_memory_max_usage_bytes gauge container_id The most memory that a container has had, in bytes.
kata_container_memory_usage_bytes gauge container_id Memory of a container in bytes, with page cache.
kata_container_memory_working_set_bytes gauge container_id Memory of a container in bytes, without page cache that is
  not in use.
kata_container_pids gauge container_id Processes and threads of a container.
kata_container_pids_limit gauge container_id Limit of a container's processes and threads; absent without one.
kata_pod_network_receive_bytes_total counter interface Bytes that the pod has received.
kata_pod_network_receive_dropped_total counter interface Received packets that were dropped.
kata_pod_network_receive_errors_total counter interface Received packets with errors.
kata_pod_network_receive_packets_total counter interface Packets that the pod has received.
kata_pod_network_transmit_bytes_total counter interface Bytes that the pod has sent.
kata_pod_network_transmit_dropped_total counter interface Packets to be sent that were dropped.
kata_pod_network_transmit_errors_total counter interface Sent packets with errors.
kata_pod_network_transmit_packets_total counter interface Packets that the pod has sent.
""",
    "monitor": """
kata_monitor_build_info gauge version The monitor's version; always 1.
kata_monitor_pool_dropped_total counter reason Machines of the warm pool that no sandbox came to use, since the host
  booted: for want of memory, because their template was gone, and so on (docs/templates.md).
kata_monitor_pool_machines gauge - Machines that wait for sandboxes.
kata_monitor_pool_made_total counter - Machines that have come to wait, since the host booted.
kata_monitor_pool_memory_bytes gauge - Host memory of machines that wait, with their engines, in bytes.
kata_monitor_pool_missed_total counter - Starts that could have used a machine that waits, and found none.
kata_monitor_pool_taken_total counter - Machines that have waited, and were used by a start.
kata_monitor_process_cpu_seconds_total counter - Processor time of the monitor in seconds.
kata_monitor_process_max_fds gauge - Limit of open files of the monitor.
kata_monitor_process_open_fds gauge - Open files of the monitor.
kata_monitor_process_resident_memory_bytes gauge - Resident memory of the monitor in bytes.
kata_monitor_process_start_time_seconds gauge - Start of the monitor, in seconds since the Epoch.
kata_monitor_process_virtual_memory_bytes gauge - Virtual memory of the monitor in bytes.
kata_monitor_process_virtual_memory_max_bytes gauge - Limit of the monitor's virtual memory in bytes; -1 for none.
kata_monitor_python_gc_collections_total counter generation Runs of the monitor's garbage collector.
kata_monitor_python_gc_objects_collected_total counter generation Objects that it has freed.
kata_monitor_python_gc_objects_uncollectable_total counter generation Objects that it could not free.
kata_monitor_python_info gauge implementation,version The monitor's interpreter; always 1.
kata_monitor_running_shim_count gauge - Sandboxes of this node.
kata_monitor_sandbox_scrape_seconds gauge - How long this scrape waited for the sandbox's answer, in seconds.
kata_monitor_sandbox_series gauge - Series that this scrape got of the sandbox.
kata_monitor_sandbox_series_dropped gauge reason Series of the sandbox that this scrape left out: too many (limit),
  occurring twice (duplicate), against the rules of their type (invalid), or against what the family is (conflict).
kata_monitor_sandbox_up gauge - Whether this scrape got metrics of the sandbox.
kata_monitor_scrape_count counter - Scrapes of this node.
kata_monitor_scrape_durations_histogram_milliseconds histogram - How long scrapes of all sandboxes took, in
  milliseconds.
kata_monitor_scrape_failed_count counter - Sandboxes that a scrape got no metrics of, added up.
""",
}
"""By source, one family a line: name, type, labels (``-`` for none), description; indented lines go on."""


def _read(sources: Iterable[str]) -> dict[str, Definition]:
    found: dict[str, Definition] = {}
    for source in sources:
        for line in _TABLE[source].replace("\n  ", " ").strip().split("\n"):
            name, kind, labels, text = line.split(" ", 3)
            found[name] = Definition(name, kind, "" if labels == "-" else labels, source, text)
    return found


OF_GUEST = _read(("agent", "guest"))
"""The families that a guest may report, by name."""
DEFINITIONS = OF_GUEST | _read(source for source in _TABLE if source not in ("agent", "guest", "monitor"))
"""The families of a sandbox, by name."""


def __getattr__(name: str) -> dict[str, Definition]:
    if name != "OF_MONITOR":
        raise AttributeError(name)
    return _read(("monitor",))


# The original names a call by the type of its message in the agent's calls, and by its method in its own.
ACTIONS = {
    "Checkpoint": "checkpoint",
    "CloseIO": "close_io",
    "Connect": "connect",
    "Create": "create",
    "Delete": "delete",
    "Exec": "exec",
    "Kill": "kill",
    "Pause": "pause",
    "Pids": "pids",
    "ResizePty": "resize_pty",
    "Resume": "resume",
    "Shutdown": "shutdown",
    "Start": "start",
    "State": "state",
    "Stats": "stats",
    "Update": "update",
    "Wait": "wait",
}
"""The label ``action`` of the Task API's methods."""
