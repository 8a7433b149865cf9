"""`kata inspect` and `exists`: everything about containers and images as JSON, or what a template picks from it.

A container has the members that tools look for under Docker's names (``State.Status``, ``NetworkSettings.Ports``,
``Mounts``) beside those of its record.

Source: the answers of ``GET /containers/{id}/json`` and ``GET /images/{name}/json`` in the Docker Engine API 1.43.
"""

from __future__ import annotations

import os

from kata.cli import inspect_members, objects, records
from kata.cli.args import Command, Option
from kata.errors import KataError, NotFoundError, UsageError
from kata.json_text import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.args import Arguments
    from kata.cli.records import Container
    from kata.images.store import Image

_TYPES = ("container", "image")
COMMANDS = {
    "inspect": Command(
        "inspect",
        "CONTAINER... | IMAGE...",
        "Shows everything about containers and images as a JSON list.",
        [
            Option("-f --format", "TEMPLATE|json", "print what a Go template picks: '{{.State.Status}}'"),
            Option("--type", "container|image", "look only for one of these; by default, a container first"),
            Option("-l --latest", "", "the container that was made last"),
            Option("--json", "", "print JSON; the default"),
        ],
        notes="A container has Docker's members (Id, State, Config, HostConfig, Mounts, NetworkSettings) beside\n"
        "those of its own record. docs/docker-users.md lists what templates may have.",
        exclusive=(("format", "json"),),
    ),
    "exists": Command(
        "exists",
        "CONTAINER | IMAGE",
        "Ends with 0 if there is such a container or image, and with 1 if not. Nothing is printed.",
        [Option("--type", "container|image", "look only for one of these")],
        least=1,
        most=1,
    ),
}


def _kind(arguments: Arguments) -> str | None:
    kind = arguments.value("type")
    if kind is not None and kind not in _TYPES:
        raise UsageError(f"--type {kind!r} is not offered", "choose one of: container, image")
    return kind


def _exists(arguments: Arguments) -> int:
    kind = _kind(arguments)
    return objects.exists(lambda reference: _found(reference, kind), arguments.rest[0])


def _inspect(arguments: Arguments) -> int:
    kind = _kind(arguments)
    named = records.asked_for(arguments)
    COMMANDS["inspect"].need(named, 1)
    return objects.inspect(named, arguments.value("format"), lambda name: _entry(name, kind), _free)


def _found(reference: str, kind: str | None) -> Container | Image:
    """What a reference names.

    Raises:
        NotFoundError: There is nothing of that name.
    """
    container = None if kind == "image" else records.find_or_none(reference)
    if container is not None:
        return container
    if kind != "container":
        from kata.images import store

        try:
            return store.find(reference)
        except NotFoundError:
            if kind == "image":
                raise
    return records.find(reference)  # whose error names what is near


def _entry(reference: str, kind: str | None) -> dict[str, Any]:
    found = _found(reference, kind)
    return of_container(found) if isinstance(found, records.Container) else of_image(found)


def _free(entry: dict[str, Any]) -> dict[str, Any]:
    """The same for templates: objects with keys of the user's are told from those with keys of ours."""
    from kata.cli.template import FreeKeys

    def free(value: Any, key: str = "") -> Any:
        if isinstance(value, list):
            return [free(item) for item in value]
        if isinstance(value, dict):
            kind = (
                FreeKeys
                if key in ("Labels", "labels", "Ports", "PortBindings", "ExposedPorts", "Volumes")
                else dict
            )
            return kind((name, free(item, name)) for name, item in value.items())
        return value

    changed = free(entry)
    assert isinstance(changed, dict)
    return changed


def of_container(container: Container) -> dict[str, Any]:
    """What `kata inspect` says of a container."""
    state = container.state()
    spec = records.read_json(os.path.join(container.directory, "config.json")) or None
    sandbox = describe(container) if state["status"] in (records.RUNNING, records.PAUSED) else None
    entry = {
        **_as_docker(container, state, spec or {}),
        **container.record,
        "state": state,
        "directory": container.directory,
        "log_path": container.log,
        "spec": spec,
        "start": records.read_json(os.path.join(container.directory, "start.json")) or None,
    }
    if state["status"] in (records.RUNNING, records.PAUSED):
        entry["sandbox"] = sandbox
    return entry


_NEVER = "0001-01-01T00:00:00Z"


def _as_docker(container: Container, state: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    record = container.record
    args = record["args"]
    process = spec.get("process") or {}
    resources = (spec.get("linux") or {}).get("resources") or {}
    status = state["status"]
    runs = status in (records.RUNNING, records.PAUSED)
    bindings: dict[str, list[dict[str, str]]] = {}
    for port in record["ports"]:
        bound = {"HostIp": port["host_ip"], "HostPort": str(port["host_port"])}
        bindings.setdefault(f"{port['guest_port']}/{port['proto']}", []).append(bound)
    return {
        "Id": container.id,
        "Created": record["created_at"],
        "Path": args[0],
        "Args": args[1:],
        "State": {
            "Status": status,
            "Running": runs,
            "Paused": status == records.PAUSED,
            "Restarting": False,
            "OOMKilled": bool(state.get("oom_killed")),
            "Dead": False,
            "Pid": int((state.get("engine") or {}).get("pid") or 0) if runs else 0,
            "ExitCode": int(state.get("exit_code", 137)) if status == records.EXITED else 0,
            "Error": str(state.get("error") or ""),
            "StartedAt": state.get("started_at") or _NEVER,
            "FinishedAt": state.get("finished_at") or _NEVER,
            **_health(container),
        },
        "Image": record["image"]["id"],
        "LogPath": container.log,
        "Name": f"/{container.name}",
        "RestartCount": _restarts(container),
        "Driver": record["rootfs"]["kind"],
        "GraphDriver": {"Data": None, "Name": record["rootfs"]["kind"]},
        "Platform": "linux",
        **inspect_members.top(),
        "HostConfig": {
            **inspect_members.host_config(record, spec),
            "Binds": [
                f"{one['source']}:{one['destination']}{':ro' if one['readonly'] else ''}"
                for one in record["volumes"]
            ],
            "NetworkMode": records.network_names(record)[0],
            "PortBindings": bindings,
            "RestartPolicy": {
                "Name": (record.get("restart") or {}).get("name", "no"),
                "MaximumRetryCount": (record.get("restart") or {}).get("max", 0),
            },
            "AutoRemove": record["auto_remove"],
            "ReadonlyRootfs": bool((spec.get("root") or {}).get("readonly")),
            "Dns": record.get("dns_servers", []),
            "DnsSearch": record.get("dns_searches", []),
            "DnsOptions": record.get("dns_options", []),
            "ExtraHosts": [":".join(reversed(line.split("\t"))) for line in record.get("extra_hosts", [])],
            "GroupAdd": [
                str(one)
                for key in ("additionalGids", "additionalGroups")
                for one in (process.get("user") or {}).get(key, [])
            ],
            "Memory": record["memory"] or 0,
            "MemoryReservation": (resources.get("memory") or {}).get("reservation", 0),
            "NanoCpus": round((record["cpus"] or 0) * 10**9),
            "CpuShares": (resources.get("cpu") or {}).get("shares", 0),
            "PidsLimit": (resources.get("pids") or {}).get("limit"),
            "Ulimits": [
                {
                    "Name": one["type"].removeprefix("RLIMIT_").lower(),
                    "Soft": one["soft"],
                    "Hard": one["hard"],
                }
                for one in process.get("rlimits") or ()
            ],
            "Sysctls": (spec.get("linux") or {}).get("sysctl") or {},
            "Runtime": "kata",
        },
        "Mounts": [
            *(_mount("bind", one["source"], one) for one in record["volumes"]),
            *(
                _mount("volume", _volume_path(container, one), one)
                for one in record.get("disk_volumes") or ()
            ),
        ],
        "Config": {
            **inspect_members.config(),
            "Hostname": record["hostname"],
            "User": _user(process),
            "Tty": record["tty"],
            "OpenStdin": record["open_stdin"],
            "StdinOnce": record["stdin_once"],
            "Env": process.get("env") or [],
            "Cmd": args,
            "Image": record["image"]["reference"],
            "WorkingDir": process.get("cwd") or "",
            "ExposedPorts": {key: {} for key in (*bindings, *record.get("expose", ()))},
            "Labels": dict(sorted(record["labels"].items())),
            "StopSignal": record["stop_signal"],
            "StopTimeout": record.get("stop_timeout"),
        },
        "NetworkSettings": {
            **inspect_members.network_settings(),
            "IPAddress": "",  # the machine's own; what can be reached are the published ports
            "Ports": bindings if runs else {},
            "Networks": _networks(record),
        },
    }


def _user(process: dict[str, Any]) -> str:
    """Who the command runs as, as Docker has it: empty for root."""
    from kata.oci.spec import ROOT

    name = (process.get("user") or {}).get("username", "")
    return "" if name == ROOT else str(name)


def _health(container: Container) -> dict[str, Any]:
    if not container.record.get("health"):
        return {}
    from kata.cli import health

    return {"Health": health.of(container) or {"Status": "starting", "FailingStreak": 0, "Log": []}}


def _restarts(container: Container) -> int:
    if not container.record.get("restart"):
        return 0
    from kata.cli import restart

    return restart.count(container)


def _networks(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The networks with a name; without one, the mode, of which the addresses mean nothing to others."""
    named = {}
    for one in record.get("networks") or ():
        from kata.cli import networks, subnets

        address6, bits = subnets.address6(networks.load(one["network"]) or {}, one["address"])
        named[one["network"]] = {
            "IPAddress": one["address"],
            "GlobalIPv6Address": address6,
            "GlobalIPv6PrefixLen": bits,
            "MacAddress": one["mac"],
            "Aliases": one["aliases"],
        }
    return named or ({record["network"]: {"IPAddress": ""}} if record["network"] != "none" else {})


def _volume_path(container: Container, one: dict[str, Any]) -> str:
    if one.get("volume"):
        from kata.cli import volumes

        return volumes.disk(one["volume"])
    return os.path.join(container.directory, one["name"])


def _mount(kind: str, source: str, one: dict[str, Any]) -> dict[str, Any]:
    return {
        "Type": kind,
        **({"Name": one.get("volume") or one["name"], "Driver": "local"} if kind == "volume" else {}),
        "Source": source,
        "Destination": one["destination"],
        "Mode": "ro" if one["readonly"] else "",
        "RW": not one["readonly"],
        "Propagation": "rprivate" if kind == "bind" else "",
    }


def describe(container: Container) -> dict[str, Any] | None:
    """What a container's engine says of its sandbox; None if it has just ended."""
    from kata.engine.client import EngineClient

    try:
        with EngineClient(container.socket) as engine:
            return engine.describe()
    except (KataError, OSError):
        return None  # it ended after we had read its state


def image_document(image: Image) -> dict[str, Any]:
    """An image's configuration as it was fetched; an empty one if it cannot be read."""
    from kata.images import store

    try:
        with open(store.blob_path(image.id), "rb") as file:
            content = loads(file.read())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def of_image(image: Image) -> dict[str, Any]:
    """What `kata inspect` says of an image."""
    document = image_document(image)
    system, _, processor = image.platform.partition("/")
    processor, _, variant = processor.partition("/")
    rootfs = document.get("rootfs")
    return {
        "Id": image.id,
        "RepoTags": [name for name in image.names if "@" not in name],
        "RepoDigests": sorted({f"{repository(name)}@{image.digest}" for name in image.names}),
        "Parent": "",
        "Comment": str(document.get("comment") or ""),
        "Created": image.created,
        "Author": str(document.get("author") or ""),
        "Config": image.config,
        "Architecture": processor,
        **({"Variant": variant} if variant else {}),
        "Os": system,
        "Size": image.size,
        "GraphDriver": {"Data": {"RootFS": image.rootfs_path}, "Name": "erofs"},
        "RootFS": {
            "Type": "layers",
            "Layers": rootfs.get("diff_ids", []) if isinstance(rootfs, dict) else [],
        },
    }


def repository(name: str) -> str:
    """A full name without its tag or digest."""
    name = name.partition("@")[0]
    head, colon, tag = name.rpartition(":")
    return head if colon and "/" not in tag else name


HANDLERS = {"inspect": _inspect, "exists": _exists}
