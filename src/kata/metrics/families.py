"""Every family of metrics: its name, type, labels, description and source, in one place.

Names are those of the original's documentation (docs/metrics.md says where its code differs); what it has not is marked
there as ours. docs/metrics.md is generated from this (`tools/metrics_table.py`).
"""

from __future__ import annotations


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
    "virtiofsd": "/proc of the file server of the share",
    "helper": "/proc of the other helpers (network, logging programs)",
    "shim": "/proc of the engine, which is the shim",
    "engine": "what the engine counts and knows",
    "host": "the sandbox's cgroup on the host; without one, the /proc of its processes",
    "monitor": "kata-monitor",
}

_STATUS = "Memory in kB and context switches, as in /proc/PID/status."
_STAT = "Processor time in clock ticks (1/100 s), as in /proc/PID/stat."
_IO = "Bytes and system calls, as in /proc/PID/io."
_NET = (
    "Interfaces of the process's network namespace: bytes, packets, errors; none where that is the host's."
)

_ROWS: tuple[tuple[str, str, str, str, str], ...] = (
    # ---- the agent ----
    ("kata_agent_io_stat", "gauge", "item", "agent", "What the agent has read and written (/proc/PID/io)."),
    (
        "kata_agent_proc_stat",
        "gauge",
        "item",
        "agent",
        "Processor time of the agent in clock ticks (1/100 s).",
    ),
    (
        "kata_agent_proc_status",
        "gauge",
        "item",
        "agent",
        "Memory of the agent in kB, and its context switches.",
    ),
    (
        "kata_agent_process_cpu_seconds_total",
        "counter",
        "",
        "agent",
        "Processor time of the agent in seconds.",
    ),
    ("kata_agent_process_max_fds", "gauge", "", "agent", "Limit of open files of the agent."),
    ("kata_agent_process_open_fds", "gauge", "", "agent", "Open files of the agent."),
    (
        "kata_agent_process_resident_memory_bytes",
        "gauge",
        "",
        "agent",
        "Resident memory of the agent in bytes.",
    ),
    (
        "kata_agent_process_start_time_seconds",
        "gauge",
        "",
        "agent",
        "Start of the agent, in seconds since the Epoch.",
    ),
    (
        "kata_agent_process_virtual_memory_bytes",
        "gauge",
        "",
        "agent",
        "Virtual memory of the agent in bytes.",
    ),
    ("kata_agent_scrape_count", "counter", "", "agent", "How often the agent was asked for its metrics."),
    ("kata_agent_threads", "gauge", "", "agent", "Threads of the agent."),
    ("kata_agent_total_rss", "gauge", "", "agent", "Resident memory of the agent in bytes."),
    ("kata_agent_total_time", "gauge", "", "agent", "Processor time of the agent in seconds."),
    ("kata_agent_total_vm", "gauge", "", "agent", "Virtual memory of the agent in bytes."),
    # ---- the guest ----
    (
        "kata_guest_cpu_time",
        "gauge",
        "cpu,item",
        "guest",
        "Time of the guest's processors in clock ticks (1/100 s).",
    ),
    (
        "kata_guest_diskstat",
        "gauge",
        "disk,item",
        "guest",
        "Disks of the guest: requests, sectors (512 bytes), times in ms.",
    ),
    (
        "kata_guest_filesystem_bytes",
        "gauge",
        "mount,device,item",
        "guest",
        "Room of the guest's file systems in bytes.",
    ),
    (
        "kata_guest_filesystem_inodes",
        "gauge",
        "mount,device,item",
        "guest",
        "Inodes of the guest's file systems.",
    ),
    ("kata_guest_load", "gauge", "item", "guest", "Load averages of the guest."),
    ("kata_guest_meminfo", "gauge", "item", "guest", "Memory of the guest in bytes; huge pages in pages."),
    ("kata_guest_netdev_stat", "gauge", "interface,item", "guest", "Network interfaces of the guest."),
    (
        "kata_guest_tasks",
        "gauge",
        "item",
        "guest",
        "Tasks of the guest that run (cur), and all of them (max).",
    ),
    ("kata_guest_vm_stat", "gauge", "item", "guest", "Counters of the guest's /proc/vmstat."),
    # ---- the hypervisor ----
    ("kata_hypervisor_fds", "gauge", "", "hypervisor", "Open files of the hypervisor."),
    ("kata_hypervisor_io_stat", "gauge", "item", "hypervisor", _IO),
    ("kata_hypervisor_netdev", "gauge", "interface,item", "hypervisor", _NET),
    ("kata_hypervisor_proc_stat", "gauge", "item", "hypervisor", _STAT),
    ("kata_hypervisor_proc_status", "gauge", "item", "hypervisor", _STATUS),
    ("kata_hypervisor_threads", "gauge", "", "hypervisor", "Threads of the hypervisor."),
    (
        "kata_hypervisor_info",
        "gauge",
        "name,accelerator,channel",
        "engine",
        "The hypervisor, its accelerator, and how the agent is reached; always 1.",
    ),
    # ---- the file server ----
    ("kata_virtiofsd_fds", "gauge", "", "virtiofsd", "Open files of the file server."),
    ("kata_virtiofsd_io_stat", "gauge", "item", "virtiofsd", _IO),
    ("kata_virtiofsd_proc_stat", "gauge", "item", "virtiofsd", _STAT),
    ("kata_virtiofsd_proc_status", "gauge", "item", "virtiofsd", _STATUS),
    ("kata_virtiofsd_threads", "gauge", "", "virtiofsd", "Threads of the file server."),
    # ---- the engine ----
    (
        "kata_shim_agent_rpc_durations_histogram_milliseconds",
        "histogram",
        "action",
        "engine",
        "Duration of the engine's calls to the agent.",
    ),
    ("kata_shim_fds", "gauge", "", "shim", "Open files of the engine."),
    ("kata_shim_io_stat", "gauge", "item", "shim", _IO),
    ("kata_shim_netdev", "gauge", "interface,item", "shim", _NET),
    (
        "kata_shim_pod_overhead_cpu",
        "gauge",
        "",
        "host",
        "Processor time beside that of the containers, in percent of one processor, since the scrape before; "
        "at the first one, since the start.",
    ),
    (
        "kata_shim_pod_overhead_memory_in_bytes",
        "gauge",
        "",
        "host",
        "Host memory of the sandbox beside that of its containers, in bytes.",
    ),
    ("kata_shim_proc_stat", "gauge", "item", "shim", _STAT),
    ("kata_shim_proc_status", "gauge", "item", "shim", _STATUS),
    (
        "kata_shim_rpc_durations_histogram_milliseconds",
        "histogram",
        "action",
        "engine",
        "Duration of the calls that the engine has answered.",
    ),
    ("kata_shim_threads", "gauge", "", "shim", "Threads of the engine."),
    (
        "kata_shim_process_cpu_seconds_total",
        "counter",
        "",
        "shim",
        "Processor time of the engine in seconds.",
    ),
    ("kata_shim_process_max_fds", "gauge", "", "shim", "Limit of open files of the engine."),
    ("kata_shim_process_open_fds", "gauge", "", "shim", "Open files of the engine."),
    (
        "kata_shim_process_resident_memory_bytes",
        "gauge",
        "",
        "shim",
        "Resident memory of the engine in bytes.",
    ),
    (
        "kata_shim_process_start_time_seconds",
        "gauge",
        "",
        "shim",
        "Start of the engine, in seconds since the Epoch.",
    ),
    (
        "kata_shim_process_virtual_memory_bytes",
        "gauge",
        "",
        "shim",
        "Virtual memory of the engine in bytes.",
    ),
    (
        "kata_shim_python_gc_collections_total",
        "counter",
        "generation",
        "engine",
        "Runs of the engine's garbage collector.",
    ),
    (
        "kata_shim_build_info",
        "gauge",
        "version,python",
        "engine",
        "Versions of the engine and of Python; always 1.",
    ),
    (
        "kata_shim_agent_up",
        "gauge",
        "",
        "engine",
        "Whether the agent has answered this scrape (1) or not (0).",
    ),
    (
        "kata_shim_guest_samples_dropped",
        "gauge",
        "",
        "engine",
        "Samples of the guest that this scrape left out: unknown, malformed, repeated, or too many.",
    ),
    ("kata_shim_sandbox_state", "gauge", "state", "engine", "State of the sandbox; always 1."),
    (
        "kata_shim_sandbox_created_seconds",
        "gauge",
        "",
        "engine",
        "Start of the machine, in seconds since the Epoch.",
    ),
    ("kata_shim_containers", "gauge", "state", "engine", "Containers by state."),
    (
        "kata_shim_start_phase_duration_seconds",
        "histogram",
        "phase",
        "engine",
        "Duration of each phase of the start, and of all of it (total), in seconds: one observation each.",
    ),
    (
        "kata_shim_disk_errors_total",
        "counter",
        "",
        "engine",
        "Requests of the guest's disks that the host could not carry out.",
    ),
    (
        "kata_shim_host_cpu_seconds_total",
        "counter",
        "",
        "host",
        "Processor time of the whole sandbox on the host, in seconds.",
    ),
    ("kata_shim_host_memory_bytes", "gauge", "", "host", "Host memory of the whole sandbox in bytes."),
    (
        "kata_shim_host_memory_limit_bytes",
        "gauge",
        "",
        "host",
        "Limit of the sandbox's host memory in bytes.",
    ),
    (
        "kata_shim_host_oom_kills_total",
        "counter",
        "",
        "host",
        "Processes of the sandbox that the host's kernel has killed for want of memory.",
    ),
    ("kata_shim_guest_vcpus", "gauge", "", "engine", "Processors of the guest."),
    ("kata_shim_guest_memory_bytes", "gauge", "", "engine", "Memory that the guest was given, in bytes."),
    (
        "kata_shim_guest_memory_returned_bytes",
        "gauge",
        "",
        "engine",
        "Memory of the guest that takes none of the host: given back, or never touched, in bytes.",
    ),
    # ---- other helpers ----
    ("kata_helper_cpu_seconds_total", "counter", "role", "helper", "Processor time of a helper in seconds."),
    ("kata_helper_fds", "gauge", "role", "helper", "Open files of a helper."),
    (
        "kata_helper_resident_memory_bytes",
        "gauge",
        "role",
        "helper",
        "Resident memory of a helper in bytes.",
    ),
    # ---- containers ----
    (
        "kata_container_info",
        "gauge",
        "container_id,name,image",
        "engine",
        "A container's name and image; always 1.",
    ),
    ("kata_container_state", "gauge", "container_id,state", "engine", "State of a container; always 1."),
    (
        "kata_container_start_time_seconds",
        "gauge",
        "container_id",
        "engine",
        "Start of a container, in seconds since the Epoch.",
    ),
    (
        "kata_container_cpu_seconds_total",
        "counter",
        "container_id,mode",
        "container",
        "Processor time of a container in seconds, by mode (user, system).",
    ),
    (
        "kata_container_cpu_periods_total",
        "counter",
        "container_id",
        "container",
        "Periods of a container's processor limit in which it ran.",
    ),
    (
        "kata_container_cpu_throttled_periods_total",
        "counter",
        "container_id",
        "container",
        "Periods in which a container had to wait for its processor limit.",
    ),
    (
        "kata_container_cpu_throttled_seconds_total",
        "counter",
        "container_id",
        "container",
        "Time in which a container had to wait for its processor limit, in seconds.",
    ),
    (
        "kata_container_memory_usage_bytes",
        "gauge",
        "container_id",
        "container",
        "Memory of a container in bytes, with page cache.",
    ),
    (
        "kata_container_memory_working_set_bytes",
        "gauge",
        "container_id",
        "container",
        "Memory of a container in bytes, without page cache that is not in use.",
    ),
    (
        "kata_container_memory_max_usage_bytes",
        "gauge",
        "container_id",
        "container",
        "The most memory that a container has had, in bytes.",
    ),
    (
        "kata_container_memory_limit_bytes",
        "gauge",
        "container_id",
        "container",
        "Memory limit of a container in bytes; absent without one.",
    ),
    (
        "kata_container_memory_failures_total",
        "counter",
        "container_id",
        "container",
        "How often a container has met its memory limit.",
    ),
    (
        "kata_container_oom_kills_total",
        "counter",
        "container_id",
        "container",
        "Processes of a container that the guest's kernel has killed for want of memory.",
    ),
    ("kata_container_pids", "gauge", "container_id", "container", "Processes and threads of a container."),
    (
        "kata_container_pids_limit",
        "gauge",
        "container_id",
        "container",
        "Limit of a container's processes and threads; absent without one.",
    ),
    (
        "kata_container_io_bytes_total",
        "counter",
        "container_id,device,operation",
        "container",
        "Bytes of a container's disks, by operation (read, write).",
    ),
    (
        "kata_container_io_operations_total",
        "counter",
        "container_id,device,operation",
        "container",
        "Requests of a container's disks, by operation (read, write).",
    ),
    (
        "kata_pod_network_receive_bytes_total",
        "counter",
        "interface",
        "container",
        "Bytes that the pod has received.",
    ),
    (
        "kata_pod_network_receive_packets_total",
        "counter",
        "interface",
        "container",
        "Packets that the pod has received.",
    ),
    (
        "kata_pod_network_receive_errors_total",
        "counter",
        "interface",
        "container",
        "Received packets with errors.",
    ),
    (
        "kata_pod_network_receive_dropped_total",
        "counter",
        "interface",
        "container",
        "Received packets that were dropped.",
    ),
    (
        "kata_pod_network_transmit_bytes_total",
        "counter",
        "interface",
        "container",
        "Bytes that the pod has sent.",
    ),
    (
        "kata_pod_network_transmit_packets_total",
        "counter",
        "interface",
        "container",
        "Packets that the pod has sent.",
    ),
    (
        "kata_pod_network_transmit_errors_total",
        "counter",
        "interface",
        "container",
        "Sent packets with errors.",
    ),
    (
        "kata_pod_network_transmit_dropped_total",
        "counter",
        "interface",
        "container",
        "Packets to be sent that were dropped.",
    ),
)

DEFINITIONS = {row[0]: Definition(*row) for row in _ROWS}
"""The families of a sandbox, by name."""
OF_GUEST = {name: one for name, one in DEFINITIONS.items() if one.source in ("agent", "guest")}
"""Those that a guest may report."""

_MONITOR_ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("running_shim_count", "gauge", "", "Sandboxes of this node."),
    ("scrape_count", "counter", "", "Scrapes of this node."),
    ("scrape_failed_count", "counter", "", "Sandboxes that a scrape got no metrics of, added up."),
    (
        "scrape_durations_histogram_milliseconds",
        "histogram",
        "",
        "How long scrapes of all sandboxes took, in milliseconds.",
    ),
    ("build_info", "gauge", "version", "The monitor's version; always 1."),
    ("sandbox_up", "gauge", "", "Whether this scrape got metrics of the sandbox."),
    (
        "sandbox_scrape_seconds",
        "gauge",
        "",
        "How long this scrape waited for the sandbox's answer, in seconds.",
    ),
    ("sandbox_series", "gauge", "", "Series that this scrape got of the sandbox."),
    (
        "sandbox_series_dropped",
        "gauge",
        "reason",
        "Series of the sandbox that this scrape left out: too many (limit), occurring twice (duplicate), against the "
        "rules of their type (invalid), or against what the family is (conflict).",
    ),
    ("process_cpu_seconds_total", "counter", "", "Processor time of the monitor in seconds."),
    ("process_max_fds", "gauge", "", "Limit of open files of the monitor."),
    ("process_open_fds", "gauge", "", "Open files of the monitor."),
    ("process_resident_memory_bytes", "gauge", "", "Resident memory of the monitor in bytes."),
    ("process_start_time_seconds", "gauge", "", "Start of the monitor, in seconds since the Epoch."),
    ("process_virtual_memory_bytes", "gauge", "", "Virtual memory of the monitor in bytes."),
    (
        "process_virtual_memory_max_bytes",
        "gauge",
        "",
        "Limit of the monitor's virtual memory in bytes; -1 for none.",
    ),
    ("python_info", "gauge", "implementation,version", "The monitor's interpreter; always 1."),
    ("python_gc_collections_total", "counter", "generation", "Runs of the monitor's garbage collector."),
    ("python_gc_objects_collected_total", "counter", "generation", "Objects that it has freed."),
    ("python_gc_objects_uncollectable_total", "counter", "generation", "Objects that it could not free."),
)
OF_MONITOR = {
    f"kata_monitor_{name}": Definition(f"kata_monitor_{name}", kind, labels, "monitor", text)
    for name, kind, labels, text in _MONITOR_ROWS
}
"""Those of kata-monitor itself, by name. Those about a sandbox have its labels (``sandbox_id`` and the pod's), too."""

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
