"""Writes docs/metrics.md: the families of metrics, from the registry in kata.metrics.families.

Usage: metrics_table.py [--check]; with --check it writes nothing, and exits with 1 where the page differs.
"""

from __future__ import annotations

import sys

from made_page import ROOT, write_or_check

sys.path.insert(0, str(ROOT / "src"))

from kata.metrics import families

PAGE = ROOT / "docs" / "metrics.md"
HEAD = """# Metrics

What Prometheus can know of a sandbox. Names, types and labels are those of Kata Containers 2.0 to 4.1, so that its dashboards and
alerts go on working; what is marked **ours** is not there. Nothing is measured unless somebody asks.

* One sandbox: `kata metrics NAME`, or `curl --unix-socket $KATA_RUN_DIR/sandboxes/ID/shim-monitor.sock http://x/metrics`.
* All sandboxes of a node: [kata-monitor](monitor.md), which adds `sandbox_id`, and with a CRI `cri_uid`, `cri_name` and
  `cri_namespace`, to each series.

An engine answers within 3 seconds. A guest that does not answer by then (it boots, is paused, hangs or has ended) has no
figures, `kata_shim_agent_up` is 0, and everything else is there. What a guest says of itself is taken where it is a valid sample
of a family below with just its labels; anything else is left out and counted (`kata_shim_guest_samples_dropped`). From a guest are at
most 1536 series of a family and 4096 in all; a label's value has at most 256 characters; at most 128 containers of a sandbox are shown.

A sandbox with one container and one processor has about 750 series in 90 families (64 kB, packed 8 kB): 290 from the guest, 210 of them
`vm_stat`, `meminfo`, `diskstat` and `netdev_stat`, and 300 for the buckets of its histograms. Each further container adds about 25, each
processor 10, each disk 17. Who does not need the guest's takes a part: `?filter_family=kata_container,kata_shim,kata_hypervisor,kata_pod`
of kata-monitor leaves 450. A scrape costs the engine 4 ms of processor time and, once, 0.9 MB of memory; what the guest spends on its
part comes on top. However full it is, and whatever its guest says, a sandbox has at most some 10 000 series.

This page is made of `src/kata/metrics/families.py` by `tools/metrics_table.py`; change it there.
"""

GROUPS = (
    (
        "Containers",
        ("kata_container_", "kata_pod_"),
        "From the containers' cgroups in the guest. All of these are **ours**. The containers of a pod share its network, so network figures"
        " are the pod's.",
    ),
    (
        "The engine (shim), and the sandbox as a whole",
        ("kata_shim_",),
        "`action` of the engine's calls is that of the original; that of calls to the agent is the type of the request. Sums and counts of"
        " `kata_shim_start_phase_duration_seconds` are of one start, so add them up over sandboxes. `kata_shim_python_*`,"
        " `kata_shim_build_info`, and what tells of agent, sandbox, start, disks, host and guest is **ours**.",
    ),
    (
        "The hypervisor",
        ("kata_hypervisor_",),
        "`kata_hypervisor_info` and `kata_hypervisor_device` are **ours**. Without a network namespace of the pod's (`kata run`) there is no `netdev`: that would be the host's traffic.",
    ),
    (
        "Firecracker",
        ("kata_firecracker_",),
        "Where that is the hypervisor. The items are those that its version has, sums since its start. Those of one disk or network"
        " interface are in `kata_hypervisor_device`.",
    ),
    (
        "The file server of the share, and other helpers",
        ("kata_virtiofsd_", "kata_helper_"),
        "Where a sandbox has them. `kata_helper_*` is **ours**: `role` is `passt` (network) or `logger` (a logging program), of which there may"
        " be one for each container: `pid` tells them apart.",
    ),
    ("The agent", ("kata_agent_",), "The process in the guest that makes the containers."),
    ("The guest", ("kata_guest_",), "What the guest's kernel says of itself."),
    (
        "kata-monitor",
        ("kata_monitor_",),
        "Of the node's monitor itself; `kata_monitor_sandbox_*`, `kata_monitor_build_info` and `kata_monitor_python_*` are **ours**. Those about a sandbox have its `sandbox_id` and `cri_*` as well.",
    ),
)

DIFFERENCES = """## How the original's names are meant here

| name | |
|---|---|
| `go_*` (as `kata_shim_go_*`, `kata_monitor_go_*`) | absent: there is no Go. Python's counterparts are `kata_shim_process_*`, `kata_shim_python_*`, `kata_monitor_process_*`, `kata_monitor_python_*` |
| `item` of `kata_shim_io_stat`, `kata_hypervisor_io_stat`, `kata_virtiofsd_io_stat` | both spellings of its two runtimes: `readbytes` and `read_bytes`, `writebytes` and `write_bytes`, `cancelledwritebytes` and `cancelled_write_bytes` |
| `item` of `kata_agent_io_stat` | `cancelled_write_bytes` (its code) and `cancelled_write_byte` (its document) |
| `kata_shim_pod_overhead_cpu`, `..._memory_in_bytes` | right at the first scrape, where the original shows 0 (issue 2767 there): the first value is the mean since the start |
| `kata_shim_netdev` | documented there and never made; here the interfaces of the pod's network namespace, in which engine and hypervisor are |
| `le` of histograms | always with a point (`1.0`), as Prometheus 3 stores it; ask with `histogram_quantile`, not with `le="1"` |
| `kata_firecracker_rtc` | of machines of another architecture |
| `kata_hypervisor_{scrape_count,vcpu,seccomp,signals}` | of Dragonball alone |

"""

QUERIES = (
    (
        "Processor time of each container, in processors",
        "sum by (sandbox_id, container_id) (rate(kata_container_cpu_seconds_total[1m]))",
    ),
    (
        "With its name",
        "sum by (sandbox_id, container_id) (rate(kata_container_cpu_seconds_total[1m]))"
        "\n  * on (sandbox_id, container_id) group_left (name) kata_container_info",
    ),
    (
        "Of each pod of Kubernetes",
        "sum by (cri_namespace, cri_name) (rate(kata_container_cpu_seconds_total[1m]))",
    ),
    ("Memory of the containers of a node", "sum(kata_container_memory_working_set_bytes)"),
    (
        "What the machines take on the host beside the memory of their containers",
        "sum(kata_shim_pod_overhead_memory_in_bytes)",
    ),
    (
        "Processor time that a sandbox takes beside that of its containers, in percent of one processor",
        "kata_shim_pod_overhead_cpu",
    ),
    (
        "What of a sandbox's memory on the host is its guest's",
        "(kata_shim_guest_memory_bytes - kata_shim_guest_memory_returned_bytes) / kata_shim_host_memory_bytes",
    ),
    ("Memory of guests that takes none of the host", "sum(kata_shim_guest_memory_returned_bytes)"),
    (
        "Containers near their memory limit",
        "kata_container_memory_working_set_bytes / kata_container_memory_limit_bytes > bool 0.9",
    ),
    (
        "Containers in which something was killed for want of memory",
        "increase(kata_container_oom_kills_total[1h])",
    ),
    (
        "How much of its time a container waits for its processor limit",
        "rate(kata_container_cpu_throttled_seconds_total[5m])",
    ),
    (
        "How long 95 % of the starts took, of the sandboxes that run",
        'histogram_quantile(0.95, sum by (le) (kata_shim_start_phase_duration_seconds_bucket{phase="total"}))',
    ),
    (
        "Where the time of starts goes",
        "sum by (phase) (kata_shim_start_phase_duration_seconds_sum) / sum by (phase) (kata_shim_start_phase_duration_seconds_count)",
    ),
    (
        "How long the agent takes to answer, by call",
        "histogram_quantile(0.9, sum by (action, le) (rate(kata_shim_agent_rpc_durations_histogram_milliseconds_bucket[5m])))",
    ),
    (
        "Bytes a second that a pod sends",
        'sum by (sandbox_id) (rate(kata_pod_network_transmit_bytes_total{interface!="lo"}[1m]))',
    ),
    (
        "Bytes a second that a container writes to its disks",
        'sum by (sandbox_id, container_id) (rate(kata_container_io_bytes_total{operation="write"}[1m]))',
    ),
    (
        "Sandboxes that give no metrics, since their engines are dead or stuck",
        "kata_monitor_sandbox_up == bool 0",
    ),
    ("Sandboxes whose guest does not answer", "kata_shim_agent_up == bool 0"),
    ("Requests of disks that the host could not carry out", "increase(kata_shim_disk_errors_total[1h])"),
)


def rows(prefixes: tuple[str, ...]) -> list[str]:
    """The rows of a table about families whose names begin so."""
    lines = ["| family | type | labels | | source |", "|---|---|---|---|---|"]
    for name, one in sorted({**families.DEFINITIONS, **families.OF_MONITOR}.items()):
        if name.startswith(prefixes):
            labels = " ".join(f"`{label}`" for label in one.labels)
            lines.append(f"| `{name}` | {one.kind} | {labels} | {one.help} | {one.source} |")
    return lines


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, prefixes, about in GROUPS:
        lines += [f"## {title}", "", about, "", *rows(prefixes), ""]
    lines += ["Sources:", ""]
    lines += [f"* {name}: {text}" for name, text in families.SOURCES.items()]
    lines += ["", DIFFERENCES, "## Common questions", ""]
    for question, query in QUERIES:
        lines += [f"{question}:", "", "```promql", query, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
