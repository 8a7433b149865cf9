"""`kata network create`, `connect`, `disconnect`, `ls`, `rm`, `inspect`, `prune`."""

from __future__ import annotations

from kata.cli import networks, objects, records, table
from kata.cli.args import Command, Option
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.cli.args import Arguments

_FIELDS = {
    "ID": "NETWORK ID",
    "Name": "NAME",
    "Driver": "DRIVER",
    "Scope": "SCOPE",
    "Subnet": "SUBNET",
    "Labels": "LABELS",
    "CreatedAt": "CREATED AT",
}
_FILTERS = ("driver", "id", "label", "name")

SUBCOMMANDS = {
    "create": Command(
        "network create",
        "NAME",
        "Makes a network and prints its id.",
        [
            Option(
                "--subnet",
                "ADDRESS/BITS",
                "its addresses, one for each family; chosen if not given",
                many=True,
            ),
            Option(
                "--ip-range",
                "ADDRESS/BITS",
                "a part of its IPv4 addresses, from which containers get theirs",
            ),
            Option(
                "--ipv6",
                "",
                "its containers have IPv6 addresses besides those of IPv4, with the same number",
            ),
            Option("--label", "KEY[=VALUE]", "a label", many=True),
            Option("--internal", "", "who is in no other network has no way out, and publishes no ports"),
            Option("-d --driver", "bridge", "accepted; there is no other"),
            Option("--gateway", "ADDRESS", "refused: the way out is another interface, which has its own"),
        ],
        least=1,
        most=1,
    ),
    "connect": Command(
        "network connect",
        "NETWORK CONTAINER",
        "Puts a container into a network: at once if it runs and was started in one, else from its next start on.",
        [
            Option("--alias", "NAME", "a further name of the container in this network", many=True),
            Option("--ip", "ADDRESS", "its IPv4 address in this network; chosen if not given"),
        ],
        least=2,
        most=2,
    ),
    "disconnect": Command(
        "network disconnect",
        "NETWORK CONTAINER",
        "Takes a container out of a network.",
        [Option("-f --force", "", "no error if it is not in it")],
        least=2,
        most=2,
    ),
    "ls": Command(
        "network ls",
        "",
        "Lists networks.",
        [
            Option("-q --quiet", "", "ids only"),
            Option("-f --filter", "KEY=VALUE", "only those that agree: " + ", ".join(_FILTERS), many=True),
            Option("--format", "TEMPLATE", f"fields: {' '.join(_FIELDS)}; or 'table TEMPLATE', or json"),
            Option("--no-trunc", "", "whole ids"),
        ],
        most=0,
        exclusive=(("quiet", "format"),),
    ),
    "rm": Command(
        "network rm",
        "NETWORK...",
        "Removes networks in which no container is.",
        [Option("-f --force", "", "no error if there is none")],
        least=1,
    ),
    "inspect": Command(
        "network inspect",
        "NETWORK...",
        "Shows networks and who is in them, as a JSON list.",
        [Option("-f --format", "TEMPLATE|json", "print what a Go template picks: '{{.Driver}}'")],
        least=1,
    ),
    "exists": Command(
        "network exists",
        "NETWORK",
        "Ends with 0 if there is such a network, and with 1 if not.",
        least=1,
        most=1,
    ),
    "prune": Command(
        "network prune",
        "",
        "Removes all networks in which no container is.",
        [
            Option("-f --force", "", "do not ask"),
            Option("--filter", "label=KEY[=VALUE]", "only those that agree", many=True),
        ],
        most=0,
    ),
}
"""The commands after ``network``."""

COMMANDS = {
    "network": Command(
        "network",
        "create|connect|disconnect|ls|rm|inspect|exists|prune [ARG...]",
        "Makes, lists and removes networks, in which containers find each other by name.",
        least=1,
        interspersed=False,
        notes=objects.listed(SUBCOMMANDS) + "\n\n"
        "kata run --network NAME puts a new container into one. It is found there by its name, id and aliases.\n"
        "Nothing goes from one network to another. What is outside is reached as without a network.",
    )
}


def _network(arguments: Arguments) -> int:
    return objects.dispatch("network", arguments.rest, SUBCOMMANDS, _HANDLERS)


def _create(arguments: Arguments) -> int:
    from kata.cli.run_options import labels

    if arguments.value("driver") not in (None, "bridge"):
        raise UsageError(f"--driver {arguments.value('driver')!r} is not offered", "leave it out")
    if arguments.value("gateway"):
        raise UsageError(
            "--gateway is not offered: a network with a name leads nowhere, and eth0 is each container's way out",
            "leave it out; --internal is a network without a way out",
        )
    name = networks.check_name(arguments.rest[0], "kata network create")
    found = labels(arguments.many("label"), [])
    with networks.locked():
        record = networks.create(
            name,
            arguments.many("subnet"),
            found,
            internal=arguments.flag("internal"),
            ipv6=arguments.flag("ipv6"),
            ip_range=arguments.value("ip_range") or "",
        )
    print(record["id"])
    return 0


def _connect(arguments: Arguments) -> int:
    network, name = arguments.rest
    aliases = [networks.check_name(alias, "--alias") for alias in arguments.many("alias")]
    with networks.locked():
        networks.connect(network, records.find(name), aliases, arguments.value("ip") or "")
    return 0


def _disconnect(arguments: Arguments) -> int:
    network, name = arguments.rest
    with networks.locked():
        networks.disconnect(network, records.find(name), force=arguments.flag("force"))
    return 0


def _about(record: dict[str, Any]) -> dict[str, Any]:
    """What Docker says of a network."""
    from kata.cli import subnets

    members = {}
    for container in networks.users(record["name"]):
        for one in container.record["networks"]:
            if one["network"] == record["name"]:
                bits = record["subnet"].partition("/")[2]
                address6, bits6 = subnets.address6(record, one["address"])
                members[container.id] = {
                    "Name": container.name,
                    "MacAddress": one["mac"],
                    "IPv4Address": f"{one['address']}/{bits}",
                    "IPv6Address": f"{address6}/{bits6}" if address6 else "",
                }
    config = [{"Subnet": record["subnet"]}]
    if record.get("ip_range"):
        config[0]["IPRange"] = record["ip_range"]
    if "subnet6" in record:
        config.append({"Subnet": record["subnet6"]})
    return {
        "Name": record["name"],
        "Id": record["id"],
        "Created": record["created_at"],
        "Scope": "local",
        "Driver": "bridge",
        "EnableIPv6": "subnet6" in record,
        "IPAM": {"Driver": "default", "Options": {}, "Config": config},
        "Internal": bool(record.get("internal")),
        "Attachable": False,
        "Containers": members,
        "Options": {},
        "Labels": record["labels"],
    }


def _ls(arguments: Arguments) -> int:
    from kata.cli import filters
    from kata.cli.template import show_rows

    wanted = filters.parse(arguments.many("filter"), _FILTERS)
    tests: list[Callable[[dict[str, Any]], bool]] = [
        lambda one: filters.has_labels(one["labels"], wanted.get("label", [])),
        lambda one: "name" not in wanted or any(text in one["name"] for text in wanted["name"]),
        lambda one: "id" not in wanted or any(one["id"].startswith(text) for text in wanted["id"]),
        lambda one: "driver" not in wanted or "bridge" in wanted["driver"],
    ]
    found = [one for one in networks.everything() if all(test(one) for test in tests)]
    digits = 64 if arguments.flag("no_trunc") else 12
    if arguments.flag("quiet"):
        for one in found:
            print(one["id"][:digits])
        return 0
    rows = [
        {
            "ID": one["id"][:digits],
            "Name": one["name"],
            "Driver": "bridge",
            "Scope": "local",
            "Subnet": ", ".join(one[key] for key in ("subnet", "subnet6") if key in one),
            "Labels": table.labels(one["labels"]),
            "CreatedAt": one["created_at"],
        }
        for one in found
    ]
    show_rows(arguments.value("format") or "", rows, _FIELDS, ("ID", "Name", "Driver", "Scope"))
    return 0


def _rm(arguments: Arguments) -> int:
    def act(name: str) -> None:
        with networks.locked():
            networks.remove(name)

    return objects.remove(arguments.rest, act, force=arguments.flag("force"))


def _inspect(arguments: Arguments) -> int:
    from kata.cli.template import FreeKeys

    def free(one: dict[str, Any]) -> dict[str, Any]:
        return {**one, **{key: FreeKeys(one[key]) for key in ("Labels", "Containers", "Options")}}

    return objects.inspect(
        arguments.rest, arguments.value("format"), lambda name: _about(networks.find(name)), free
    )


def _exists(arguments: Arguments) -> int:
    return objects.exists(networks.find, arguments.rest[0])


def _prune(arguments: Arguments) -> int:
    from kata.cli import filters
    from kata.cli.prune import agreed, show_gone

    wanted = filters.parse(arguments.many("filter"), ("label",))
    if not arguments.flag("force") and not agreed(["all networks not used by at least one container"]):
        return 0
    gone: list[str] = []
    with networks.locked():
        for one in networks.everything():
            if networks.users(one["name"]) or not filters.has_labels(one["labels"], wanted.get("label", [])):
                continue
            networks.remove(one["name"])
            gone.append(one["name"])
    show_gone("Networks", gone)
    return 0


_HANDLERS = {
    "create": _create,
    "connect": _connect,
    "disconnect": _disconnect,
    "ls": _ls,
    "rm": _rm,
    "inspect": _inspect,
    "exists": _exists,
    "prune": _prune,
}
HANDLERS = {"network": _network}
