"""The stop points of the OCI command line: those of `kata-runtime` itself, and who there is at which one."""

from __future__ import annotations

import functools
from typing import Any

from faults import stops
from faults.stops import Point

_NOT_BY_PODMAN = (
    *("create.address", "create.image", "create.disk-intended", "create.disk", "create.redirect-intended"),
    *(
        "create.root-intended",
        "create.root",
        "delete.part",
        "delete.carried",
        "clear.request",
        "clear.undone",
    ),
)
"""Points of engine and shim that nobody reaches here: podman has mounted the root file system, nothing is on disks, and
there is no shim. (Redirections are made by tc alone in podman's networks.)"""


def names() -> list[str]:
    """The points of a container by podman, and of `kata-runtime run`."""
    shared = (one for one in stops.POINTS if one.scenario == "ctr" and one.where in ("engine", "shim"))
    own = (one.name for one in stops.POINTS if one.where in ("runtime", "waiter"))
    return [*own, *(one.name for one in shared if one.name not in _NOT_BY_PODMAN)]


def victims(point: Point) -> list[str]:
    """Who there is at a point and can be killed.

    Args:
        point: One of `names`.
    """
    if point.scenario == "run":
        return ["runtime", "engine", "hypervisor", "standing"]
    if point.where == "waiter":
        return _of_pool(point)
    if point.phase == "exec":
        found = ["runtime"] if point.where == "runtime" else []
        conmon = [] if point.name == "exec.ended" else ["exec-conmon"]
        return [*found, "engine", "hypervisor", stops.HANG, "standing", "conmon", *conmon]
    if point.where in ("runtime", "shim"):
        return _of_commands(point)
    names_of_all = [one.name for one in stops.POINTS]
    place = names_of_all.index(point.name)
    found = ["engine"]
    if names_of_all.index("create.machine-gate") <= place < names_of_all.index("delete.machine"):
        found += ["hypervisor", stops.HANG]
    if names_of_all.index("create.request") <= place < names_of_all.index("delete.ended"):
        found.append("standing")
    if place < names_of_all.index("delete.ended"):
        found.append("conmon")
    return found


def _of_pool(point: Point) -> list[str]:
    found = ["waiter", "hypervisor", stops.HANG, "virtiofsd"]
    if point.name in stops.ASKED:
        found.append("runtime")
    return found if point.name in ("pool.restored", "pool.listening") else [*found, "conmon"]


def _of_commands(point: Point) -> list[str]:
    early = ("create.reserved", "create.recorded", "create.directory", "create.socket")
    if point.name in early:
        return ["runtime", "conmon"]
    if point.name in ("delete.in-engine", "delete.removing", "delete.half-removed", "delete.removed"):
        return ["runtime"]  # the engine has ended, or is about to
    if point.name == "delete.asked":
        return ["runtime", "engine", "hypervisor"]
    found = ["runtime", "engine", "hypervisor", "conmon"]
    if point.name not in ("create.engine", "create.standing"):
        found.append("standing")
    return found


def install() -> None:
    """Put the points of `kata-runtime` in. What it starts an engine with has those of the shim as well."""
    from kata.engine.client import EngineClient
    from kata.engine.launch import Engine
    from kata.oci_runtime import containers, creation, records, standing

    around = stops.put_around
    around(records.Record, "reserve", after="create.reserved")
    around(creation, "_launch", before="create.recorded")
    around(EngineClient, "create", "create.asked", "create.told")
    around(standing, "take_root", after="create.entered")
    around(Engine, "release", after="create.released")
    around(EngineClient, "exec", "exec.asked", "exec.told")
    around(EngineClient, "kill", "delete.kill-asked", "delete.kill-told")
    around(containers, "delete", before="delete.asked")
    around(containers, "_delete_in", after="delete.in-engine")
    around(creation, "_wait_for_child", "run.waits", "run.ended")
    _standing(creation)
    _numbered(creation)
    _starts(EngineClient)
    _removal(records.Record)


def _standing(creation: Any) -> None:
    stand = creation._stand

    @functools.wraps(stand)
    def stood(record: Any, exec_id: str, *more: Any, **options: Any) -> Any:
        stands = stand(record, exec_id, *more, **options)
        stops.stop("exec.standing" if exec_id else "create.standing")
        return stands

    creation._stand = stood


def _numbered(creation: Any) -> None:
    write = creation._write_pid

    @functools.wraps(write)
    def written(path: str | None, pid: int) -> None:
        write(path, pid)
        stops.stop("exec.numbered" if path and "exec" in path.rpartition("/")[2] else "create.numbered")

    creation._write_pid = written


def _starts(client: Any) -> None:
    start = client.start

    @functools.wraps(start)
    def started(self: Any, container_id: str, exec_id: str = "") -> Any:
        if not exec_id:
            stops.stop("start.asked")
        answer = start(self, container_id, exec_id)
        stops.stop("exec.start-told" if exec_id else "start.told")
        return answer

    client.start = started


def _removal(record: Any) -> None:
    """Also between the record and its directory: the files go first."""
    import os

    remove, rmdir = record.remove, os.rmdir

    def half_removed(path: Any, **options: Any) -> None:
        stops.stop("delete.half-removed")
        rmdir(path, **options)

    @functools.wraps(remove)
    def removed(self: Any) -> None:
        stops.stop("delete.removing")
        os.rmdir = half_removed
        try:
            remove(self)
        finally:
            os.rmdir = rmdir
        stops.stop("delete.removed")

    record.remove = removed
