"""`kata df` (``docker system df``): what images, containers, volumes and builds take on the disk."""

from __future__ import annotations

import os

from kata import paths
from kata.cli import on_disk, records, table, volumes
from kata.cli.args import Command, Option
from kata.images import store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.args import Arguments

_FIELDS = {
    "Type": "TYPE",
    "TotalCount": "TOTAL",
    "Active": "ACTIVE",
    "Size": "SIZE",
    "Reclaimable": "RECLAIMABLE",
}
COMMANDS = {
    "df": Command(
        "df",
        "",
        "Shows what images, containers, volumes and builds take on the disk, and how much of it nothing uses.",
        [Option("--format", "TEMPLATE", f"fields: {' '.join(_FIELDS)}; or 'table TEMPLATE', or json")],
        most=0,
        notes="What is not used is removed by 'kata prune -a' and 'kata volume prune -a'. The build cache is what\n"
        "'kata build' keeps in $KATA_STATE_DIR/build: that directory may be removed while no build runs.",
    )
}


def _row(kind: str, files: dict[str, list[str]], active: set[str]) -> dict[str, Any]:
    """A row of the table.

    Args:
        kind: What it is of.
        files: The files of each thing.
        active: Which of them are used.
    """
    size = on_disk.taken(path for paths in files.values() for path in paths)
    kept = on_disk.taken(path for key in active for path in files.get(key, ()))
    share = f" ({100 * (size - kept) // size}%)" if size else ""
    return {
        "Type": kind,
        "TotalCount": len(files),
        "Active": len(active & files.keys()),
        "Size": table.human_size(size),
        "Reclaimable": f"{table.human_size(size - kept)}{share}",
    }


def _df(arguments: Arguments) -> int:
    from kata.cli.template import show_rows

    containers = records.all_containers()
    running = {one.id for one in containers if one.state()["status"] in (records.RUNNING, records.PAUSED)}
    images = {one.id: [one.rootfs_path] for one in store.list_images()}
    built = os.path.join(paths.state_dir(), paths.BUILD)
    rows = [
        _row("Images", images, {one.record["image"]["id"] for one in containers}),
        _row("Containers", {one.id: on_disk.files_in(one.directory) for one in containers}, running),
        _row(
            "Local Volumes",
            {one["name"]: [volumes.disk(one["name"])] for one in volumes.everything()},
            set(volumes.users()),
        ),
        _row("Build Cache", {built: on_disk.files_below(built)} if os.path.isdir(built) else {}, set()),
    ]
    show_rows(arguments.value("format") or "", rows, _FIELDS)
    return 0


HANDLERS = {"df": _df}
