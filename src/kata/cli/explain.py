"""`kata explain`: shows the size of a sandbox's machine and the formula behind it, with its numbers."""

from __future__ import annotations

from kata.cli import sandboxes, table
from kata.cli.args import Command, Option
from kata.resources import sizing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.args import Arguments

COMMANDS = {
    "explain": Command(
        "explain",
        "ID",
        "Explains the size of a running sandbox: the request, the formula, and what it costs this host.",
        [Option("--json", "", "print JSON")],
        least=1,
        most=1,
        notes="ID is a container of 'kata', or a container or pod of containerd, Docker or Kubernetes;\n"
        "an unambiguous beginning of an id is enough.",
    ),
}


def find(reference: str) -> dict[str, Any]:
    """Find a sandbox and ask its engine to describe it.

    Args:
        reference: Name or id of a container or pod, or the beginning of an id.

    Returns:
        The engine's description.

    Raises:
        NotFoundError: No running sandbox matches.
        UsageError: The beginning of an id is ambiguous.
        KataError: Its engine does not answer.
    """
    return sandboxes.describe(sandboxes.find(reference))


def explain(facts: dict[str, Any]) -> dict[str, Any]:
    """Fill the formula with the numbers of one sandbox.

    Args:
        facts: Its engine's description.
    """
    size: dict[str, Any] = facts["sizing"]
    accel = facts["accelerator"]
    kernel = size["kernel"]
    asked_mib = None if size["memory"] is None else -(-size["memory"] // sizing.MIB)
    machine_mib = facts["memory_mib"]
    host_mib = sizing.host_memory(machine_mib + size["besides_mib"], size["host_overhead_mib"]) // sizing.MIB
    return {
        "id": facts["id"],
        "client": facts["client"],
        "accelerator": accel,
        "asked": {
            "cpus": size["cpus"],
            "memory_mib": asked_mib,
            "source": size["source"] if size["cpus"] or size["memory"] else "",
            "pod": size["pod"],
            "containers": size["containers"],
        },
        "cpus": {"now": facts["vcpus"], "first": size["first_vcpus"], "most": size["max_vcpus"]},
        "memory_mib": {
            "now": machine_mib,
            "first": size["first_memory_mib"],
            "plugged": size["plugged_mib"],
            "returned": size["returned_mib"],
            "fixed": size["fixed_memory"],
            "most": size["max_memory_mib"],
            "kernel": kernel,
            "beside": 0 if size["memory"] is None else _beside(size["memory"], kernel),
            "unlimited": size["unlimited"],
            "default": size["default_memory_mib"],
            "kernel_fixed": sizing.KERNEL_MIB[kernel],
            "kernel_growing": sizing.GROWING_PART,
            "least": sizing.LEAST_MIB[kernel],
        },
        "host": {
            "memory_mib": host_mib,
            "cpus": sizing.host_cpus(facts["vcpus"]),
            "overhead_memory_mib": host_mib - machine_mib,
            "overhead_cpus": sizing.HOST_CPUS,
            "cgroups": facts["host_cgroups"],
            "used_mib": (facts.get("hypervisor_usage") or {}).get("rss_bytes", 0) // sizing.MIB,
        },
    }


def _beside(asked: int, kernel: str) -> int:
    """Memory (MiB) that a guest uses besides its containers, if those request *asked* bytes."""
    return -(-(sizing.total_of(asked, kernel) - asked) // sizing.MIB)


def _lines(facts: dict[str, Any]) -> list[str]:
    asked, cpus, memory, host = facts["asked"], facts["cpus"], facts["memory_mib"], facts["host"]
    lines = [f"sandbox {facts['id']} (client {facts['client']}, {facts['accelerator']})", "", "asked for"]
    lines.append(f"  CPUs    {'nothing' if asked['cpus'] is None else format(asked['cpus'], 'g')}")
    lines.append(
        f"  memory  {'nothing' if asked['memory_mib'] is None else str(asked['memory_mib']) + ' MiB'}"
    )
    if asked["source"]:
        lines.append(f"  by      {asked['source']}")
    if any(asked["pod"].values()) or len(asked["containers"]) > 1:
        lines.append(f"  the pod as a whole       {_asked(asked['pod'])}")
        lines += [
            f"  container {name[:12]:<12}   {_asked(one)}" for name, one in asked["containers"].items()
        ]
        lines.append("  The pod's figure counts, and at least the sum of its containers'.")
    lines += ["", "CPUs = requested CPUs, rounded up; default_vcpus without a request"]
    if asked["cpus"] is None:
        lines.append(f"  {cpus['now']} (as it was started)")
    else:
        lines.append(f"  max(1, ceil({asked['cpus']:g})) = {sizing.cpus_of(asked['cpus'])}")
    lines.append(f"  now {cpus['now']}, at most {cpus['most']}")
    lines += [
        "",
        "memory = (request + what the guest uses besides containers + fixed part of the kernel) / (1 - growing part of"
        " the kernel), rounded up; default_memory without a request",
    ]
    needed = memory["first"]
    if asked["memory_mib"] is None:
        lines.append(f"  {needed} MiB (as it was started)")
    else:
        needed = sizing.memory_of(asked["memory_mib"] * sizing.MIB, memory["kernel"])
        lines.append(
            f"  max({memory['least']}, ({asked['memory_mib']} + {memory['beside']} + {memory['kernel_fixed']})"
            f" / (1 - {memory['kernel_growing']:.4f})) = {needed} MiB"
        )
        if memory["unlimited"]:
            lines.append(
                f"  plus, as far as there is room, {memory['default']} MiB (default_memory) for containers without"
                f" a limit: {', '.join(name[:12] for name in memory['unlimited'])}"
            )
            needed += memory["default"]
    lines.append(
        f"  now {memory['now']} MiB: {memory['first']} at the start, {memory['plugged']} plugged,"
        f" {memory['returned']} given back by the guest; at most {memory['most']} MiB"
    )
    lines += [f"  {line}" for line in _why_larger(memory, needed)]
    lines += [
        "",
        "on the host = the machine and its overhead (limits of its cgroup)",
        f"  memory  {memory['now']} + {host['overhead_memory_mib']} = {host['memory_mib']} MiB"
        f" (the hypervisor holds {host['used_mib']} MiB)",
        f"  CPUs    {cpus['now']} + {host['overhead_cpus']:g} = {host['cpus']:g}",
    ]
    lines += [f"  {name:<7} {path}" for name, path in host["cgroups"].items()]
    return lines


def _why_larger(memory: dict[str, Any], needed: int) -> list[str]:
    """Why the machine has more memory than the formula says."""
    if memory["now"] <= needed * (1 + sizing.SLACK):
        return []
    if memory["returned"]:
        return [
            "The rest is what the guest's kernel reserves for the memory that it was started with, and what it could"
            " not give back."
        ]
    if memory["fixed"]:
        return ["It keeps the size that it was started with; limits are enforced in the guest."]
    return [
        "It keeps this size until the next update; it can shrink if every container has a limit then. Limits are"
        " enforced in the guest."
    ]


def _asked(one: dict[str, Any]) -> str:
    cpus = "no CPUs" if one["cpus"] is None else f"{one['cpus']:g} CPUs"
    memory = "no memory" if one["memory"] is None else f"{one['memory'] / sizing.MIB:g} MiB"
    return f"{cpus}, {memory}"


def _explain(arguments: Arguments) -> int:
    found = explain(find(arguments.rest[0]))
    if arguments.flag("json"):
        table.show_json([found])
        return 0
    print("\n".join(table.printable(line) for line in _lines(found)))
    return 0


HANDLERS = {"explain": _explain}
