"""Networks with a name, in which containers find each other by name.

What is known of a network is a directory, ``$KATA_STATE_DIR/networks/<name>``::

    network.json   its id, labels, subnet, time of creation
    journal        what has to be undone to remove it

What there is of it on the host until the next reboot is another, ``$KATA_RUN_DIR/networks/<id>``: the members' files,
and the record once more, with the commands that have its namespace open (`kata.network.held`). That is made when the
first container is started, and ends with the last. A container has its address from when it is made, so that none
changes.
"""

from __future__ import annotations

import os

from kata import paths
from kata.cli import records, values
from kata.errors import AlreadyExistsError, HostError, JournalError, NotFoundError, StateError, UsageError
from kata.journal import Journal
from kata.network import held, members

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kata.settings import EndpointSettings
    from kata.sysio import Fd

_RECORD = "network.json"
RESERVED = ("user", "tap", "none", "host", "bridge", "default", "container")
"""Words that `kata run --network` or Docker's users mean something else by."""
MOST = 3
"""Networks that a container can be in: a machine has four interfaces, one of them for what is outside."""


def directory() -> str:
    """The directory of what is known of all networks."""
    return os.path.join(paths.state_dir(), paths.NETWORKS)


def runtime_dir(record: dict[str, Any]) -> str:
    """The directory of what there is of a network until the next reboot."""
    return os.path.join(paths.run_dir(), paths.NETWORKS, record["id"])


def check_name(name: str, given: str) -> str:
    """Check a network's name; see `values.name`.

    Args:
        name: The name.
        given: The option or argument as the user wrote it, for errors.

    Raises:
        UsageError: It cannot be one.
    """
    values.name(name, f"{given}:", "network", least=1)
    if name in RESERVED:
        raise UsageError(f"{given}: {name!r} means something else to --network", "choose another name")
    return name


def locked() -> records.DirectoryLock:
    """The lock of all networks and of the addresses in them; see `records.DirectoryLock`."""
    return records.DirectoryLock(directory())


def load(name: str) -> dict[str, Any] | None:
    """A network's record; None if there is none of that name."""
    return records.read_json(os.path.join(directory(), name, _RECORD)) or None


def find(reference: str) -> dict[str, Any]:
    """A network's record, by its name or the beginning of its id.

    Raises:
        NotFoundError: There is none.
        UsageError: There are several.
    """
    found = load(reference) if paths.may_be_name(reference) else None
    if found is not None:
        return found
    matching = [one for one in everything() if reference and one["id"].startswith(reference)]
    if len(matching) > 1:
        raise UsageError(f"{reference!r} is the beginning of several networks", "give its name")
    if not matching:
        raise NotFoundError(
            f"there is no network {reference!r}", f"kata network ls, or kata network create {reference}"
        )
    return matching[0]


def everything() -> list[dict[str, Any]]:
    """The records of all networks, by name."""
    try:
        names = sorted(os.listdir(directory()))
    except FileNotFoundError:
        return []
    return [found for name in names if (found := load(name)) is not None]


def create(
    name: str,
    given: Sequence[str] = (),
    labels: dict[str, str] | None = None,
    *,
    internal: bool = False,
    ipv6: bool = False,
    ip_range: str = "",
) -> dict[str, Any]:
    """Make a network. The caller holds the lock.

    Args:
        name: Its name, checked.
        given: Its subnets, ``10.1.2.0/24`` and one of IPv6; what is not given is chosen.
        labels: Its labels.
        internal: Who is in no other network has no way out.
        ipv6: It has IPv6 addresses, too.
        ip_range: A part of its IPv4 subnet from which addresses are chosen; empty is the whole.

    Returns:
        Its record.

    Raises:
        AlreadyExistsError: There is one of that name.
        UsageError: A subnet is malformed, or another network's.
    """
    if load(name) is not None:
        raise AlreadyExistsError(f"there is a network {name!r} already", f"kata network inspect {name}")
    from kata.cli import subnets

    chosen = subnets.choose(given, everything(), ipv6=ipv6, ip_range=ip_range)
    meta = {"client": "kata", "kind": "network", "id": name}
    try:
        journal = Journal.create_dir(directory(), name, meta)
    except AlreadyExistsError:
        # Who holds the lock is alone, so another process has died while it made or removed it.
        _clear(os.path.join(directory(), name), name)
        journal = Journal.create_dir(directory(), name, meta)
    record = {
        "name": name,
        "id": os.urandom(32).hex(),
        "created_at": records.now(),
        "labels": labels or {},
        **chosen,
        "internal": internal,
    }
    try:
        records.write_json(os.path.join(directory(), name, _RECORD), record)
        journal.retain(_RECORD)
        journal.close()
    except BaseException:
        from kata import journal_undo

        journal_undo.undo(journal)
        raise
    return record


def users(name: str) -> list[records.Container]:
    """The containers that have a place in a network."""
    return [
        one
        for one in records.all_containers()
        if any(place["network"] == name for place in one.record.get("networks") or ())
    ]


def place(name: str, aliases: list[str], address: str, *, but: str = "") -> dict[str, Any]:
    """Choose a new container's place in a network. The caller holds the lock until the container's record is there.

    Args:
        name: The network.
        aliases: Names besides the container's.
        address: The address that was asked for; empty chooses.
        but: The id of a container whose place is about to be free.

    Returns:
        An element of the record's ``networks``.

    Raises:
        NotFoundError: There is no such network.
        UsageError: The address is taken, or not of the network; or there is none left.
    """
    import ipaddress

    from kata.hypervisor.base import random_mac

    record = find(name)
    subnet = ipaddress.IPv4Network(record["subnet"])
    taken = {
        one["address"]
        for container in users(record["name"])
        for one in container.record["networks"]
        if one["network"] == record["name"] and container.id != but
    }
    if address:
        try:
            wanted = ipaddress.IPv4Address(address)
        except ValueError:
            raise UsageError(
                f"--ip {address!r} is not an IPv4 address", f"one of {record['subnet']}"
            ) from None
        if wanted not in subnet or wanted in (subnet[0], subnet[1], subnet[-1]) or str(wanted) in taken:
            raise UsageError(
                f"--ip {address} is taken, or no member's address in {record['subnet']} (network {record['name']})",
                f"kata network inspect {record['name']}",
            )
        chosen = str(wanted)
    else:
        from kata.cli import subnets

        chosen = next((one for one in subnets.addresses(record) if one not in taken), "")
        if not chosen:
            raise UsageError(
                f"the network {record['name']} has no address left ({record.get('ip_range') or record['subnet']})",
                "kata network create --subnet, with a shorter prefix",
            )
    return {"network": record["name"], "address": chosen, "mac": random_mac(), "aliases": aliases}


def endpoints(container: records.Container) -> list[EndpointSettings]:
    """What an engine is told of a container's networks. The caller holds the lock.

    Raises:
        StateError: A network is gone, or has been made anew with another subnet.
        HostError: A network cannot be made on this host.
    """
    return [_endpoint(container, one) for one in container.record.get("networks") or ()]


def _endpoint(container: records.Container, one: dict[str, Any]) -> EndpointSettings:
    """One of `endpoints`; *one* is an element of the record's ``networks``."""
    import ipaddress

    from kata.settings import EndpointSettings

    record = load(one["network"])
    subnet = ipaddress.IPv4Network(record["subnet"]) if record is not None else None
    if record is None or subnet is None or ipaddress.IPv4Address(one["address"]) not in subnet:
        raise StateError(
            f"the network {one['network']} of container {container.name} is gone",
            f"kata network disconnect {one['network']} {container.name}",
        )
    from kata.cli import subnets

    holder = _hold(record)
    address6, prefix6 = subnets.address6(record, one["address"])
    return EndpointSettings(
        network=one["network"],
        path=runtime_dir(record),
        namespace=holder.path,
        address=one["address"],
        prefix=subnet.prefixlen,
        address6=address6,
        prefix6=prefix6,
        mac=one["mac"],
        names=[container.name, container.id[:12], container.id, *one["aliases"]],
    )


def leads_outside(places: list[dict[str, Any]]) -> bool:
    """Whether a container with these places (a record's ``networks``) has a way out."""
    return not places or any(not (load(one["network"]) or {}).get("internal") for one in places)


def connect(reference: str, container: records.Container, aliases: list[str], address: str) -> None:
    """Put a container into a further network; one that runs, at once. The caller holds the lock.

    Args:
        reference: The network's name or id.
        container: The container.
        aliases: See `place`.
        address: See `place`.

    Raises:
        AlreadyExistsError: It is in that network.
        StateError: What is asked for is not for a machine that runs.
        UnsupportedError: Its network mode is another, or its machine has no interface left.
    """
    from kata.errors import UnsupportedError

    name, places = find(reference)["name"], list(container.record.get("networks") or ())
    if any(one["network"] == name for one in places):
        raise AlreadyExistsError(
            f"container {container.name} is in the network {name} already", f"kata network inspect {name}"
        )
    if container.record["network"] != "user":
        raise UnsupportedError(
            f"container {container.name} has --network {container.record['network']}, to which no other is added",
            f"kata run --network {name}",
        )
    if len(places) == MOST:
        raise UnsupportedError(
            f"container {container.name} is in {MOST} networks, and its machine has no further interface",
            f"kata network disconnect {places[0]['network']} {container.name}",
        )
    more = [*places, place(name, aliases, address)]
    if not leads_outside(more) and container.record["ports"]:
        raise StateError(
            f"container {container.name} publishes ports, and in the network {name} alone, which is internal, it"
            " could not",
            "a network that is not internal first",
        )
    if not container.running():
        _keep(container, more)
        return
    if not places:
        raise StateError(
            f"container {container.name} was started without a network with a name, so its machine has no interface"
            " for one",
            f"kata stop {container.name}; kata network connect {name} {container.name}; kata start {container.name}",
        )
    _check_way_out(container, places, more)
    from kata.engine.client import EngineClient

    endpoint = _endpoint(container, more[-1])
    with EngineClient(container.socket) as engine:
        engine.connect_network(endpoint)
    _keep(container, more)


def disconnect(reference: str, container: records.Container, *, force: bool = False) -> None:
    """Take a container out of a network; one that runs, at once. The caller holds the lock.

    Args:
        reference: The network's name or id. The network may be gone.
        container: The container.
        force: It is no error if the container is not in the network, as in Podman.

    Raises:
        NotFoundError: It is not in that network, or there is no such network.
        StateError: What is asked for is not for a machine that runs.
    """
    places = list(container.record.get("networks") or ())
    name = reference if any(one["network"] == reference for one in places) else find(reference)["name"]
    kept = [one for one in places if one["network"] != name]
    if kept == places:
        if force:
            return
        raise NotFoundError(
            f"container {container.name} is not in the network {name}",
            f"kata inspect -f '{{{{json .NetworkSettings.Networks}}}}' {container.name}",
        )
    if not kept and not leads_outside(places):
        raise StateError(
            f"container {container.name} is in internal networks alone: without {name} it would get a way out",
            f"kata network connect OTHER {container.name} first, or kata rm {container.name}",
        )
    if not leads_outside(kept) and container.record["ports"]:
        raise StateError(
            f"container {container.name} publishes ports, and in internal networks alone it could not",
            f"kata network connect OTHER {container.name} first, to one that is not internal",
        )
    if container.running():
        _check_way_out(container, places, kept)
        from kata.engine.client import EngineClient

        with EngineClient(container.socket) as engine:
            try:
                engine.disconnect_network(name)
            except NotFoundError:
                pass  # it has left already, and only the record does not say so
    _keep(container, kept)


def _check_way_out(
    container: records.Container, before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    """A machine has its way out from its start to its end, or none. Without any network it has one."""
    if after and leads_outside(before) != leads_outside(after):
        raise StateError(
            f"container {container.name} would {'lose its' if leads_outside(before) else 'get a'} way out, which"
            " cannot be while it runs",
            f"kata stop {container.name} first",
        )


def _keep(container: records.Container, places: list[dict[str, Any]]) -> None:
    records.change(container, networks=places)


_held: dict[str, Fd] = {}
"""The namespaces that this command has open, by the network's id. They stay so until it ends: it does not know how far
an engine that it has started has got."""


def let_go() -> None:
    """Hold no namespace any longer."""
    while _held:
        _held.popitem()[1].close()


def _hold(record: dict[str, Any]) -> held.Holder:
    """Have a network's namespace open in this process; make it if nobody has it. The caller holds the lock.

    Raises:
        HostError: It cannot be made; or who has it is out of reach.
    """
    path = runtime_dir(record)
    known = records.read_json(os.path.join(path, _RECORD))
    holders = [found for one in known.get("holders") or () if (found := held.Holder.read(one)) is not None]
    namespace = _held.get(record["id"])
    if namespace is None:
        members_have = [one.holder for one in members.living(path) if one.holder is not None]
        try:
            namespace = held.open_any([*members_have, *holders])
        except PermissionError as error:
            raise HostError(
                f"the network {record['name']} is in another user namespace, where who is in it was started from",
                f"try again; if that fails, stop the containers that kata network inspect {record['name']} shows",
            ) from error
        if namespace is None:
            namespace, known, holders = _make(record), record, []
        _held[record["id"]] = namespace
    own = held.Holder.own(namespace)
    kept = [one for one in holders if one.pid != own.pid and one.alive()]
    plain = [one.plain for one in [*kept, own]]
    records.write_json(os.path.join(path, _RECORD), {**known, "holders": plain})
    return own


def _make(record: dict[str, Any]) -> Fd:
    """Make a network's namespace, and its directory unless there is one from before."""
    from kata import journal_undo

    path = runtime_dir(record)
    if os.path.isdir(
        path
    ):  # whose members have ended; or from before a reboot, or of a process that was killed
        _clear(path, record["name"])
    try:
        namespace = held.make()
    except OSError as error:
        raise HostError(
            f"cannot make the network {record['name']}: {error.strerror}",
            "It needs a kernel with network namespaces and bridges (modprobe bridge).",
        ) from error
    meta = {"client": "kata", "kind": "network", "id": record["name"]}
    try:
        journal = Journal.create_dir(os.path.dirname(path), record["id"], meta)
        try:
            os.mkdir(members.directory(path), 0o700)
            records.write_json(os.path.join(path, _RECORD), record)
            journal.retain(_RECORD)
            journal.close()
        except BaseException:
            journal_undo.undo(journal)
            raise
    except BaseException:
        namespace.close()
        raise
    return namespace


def _clear(path: str, name: str) -> None:
    """Remove one directory of a network, or what is left of it.

    Raises:
        JournalError: It could not be removed completely.
    """
    from kata import journal_undo

    failures = journal_undo.undo(Journal.open(os.path.join(path, "journal")))
    if failures:
        raise JournalError(f"the network {name} could not be removed completely: {failures[0]}", "kata gc")


def remove(name: str) -> None:
    """Remove a network. The caller holds the lock.

    Raises:
        NotFoundError: There is none of that name.
        StateError: A container is in it.
        JournalError: It could not be removed completely.
    """
    record = find(name)
    if holders := users(record["name"]):
        raise StateError(
            f"the container {holders[0].name} is in the network {record['name']}",
            f"kata rm {holders[0].name}",
        )
    namespace = _held.pop(record["id"], None)
    if namespace is not None:
        namespace.close()
    if os.path.isdir(runtime_dir(record)):
        _clear(runtime_dir(record), record["name"])
    _clear(os.path.join(directory(), record["name"]), record["name"])
