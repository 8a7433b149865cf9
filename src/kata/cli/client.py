"""`kata install` and `kata uninstall`: they register kata with containerd, Docker, Podman or CRI-O."""

from __future__ import annotations

import os
import shutil
import sys

from kata.cli import client_containerd, client_crio, client_docker, client_podman
from kata.cli.args import Command, Option
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata.cli.args import Arguments
    from kata.cli.client_edit import Edit

_OPTIONS = [
    Option("--config", "PATH", "its configuration file (/etc/containerd/config.toml, /etc/docker/daemon.json,"
           f" {client_podman.DEFAULT_PATH}, {client_crio.DEFAULT_PATH})"),
    Option("-n --dry-run", "", "show the difference, and change nothing"),
]  # fmt: skip
COMMANDS = {
    "install": Command(
        "install",
        "containerd|docker|podman|crio",
        "Registers kata with a client on this machine: as the handler 'kata' of containerd's CRI plugin (Kubernetes),"
        " as the runtime 'kata' of Docker or Podman, or as CRI-O's handlers 'kata' (type vm)"
        " and 'kata-oci' (type oci).",
        _OPTIONS,
        least=1,
        most=1,
        notes="A copy of the original file is kept beside it (.before-kata). The result is checked with `containerd"
        " config dump`,\n`dockerd --validate`, `podman info` or `crio config`, and the change is undone if that fails."
        " No client is restarted.",
    ),
    "uninstall": Command(
        "uninstall",
        "containerd|docker|podman|crio",
        "Undoes what `kata install` wrote, byte for byte.",
        _OPTIONS,
        least=1,
        most=1,
    ),
}


_CLIENTS = {
    "containerd": client_containerd,
    "docker": client_docker,
    "podman": client_podman,
    "crio": client_crio,
}
SHIM = "containerd-shim-kata-v2"
_WHERE_SERVICES_LOOK = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
"""systemd's PATH of services (DEFAULT_PATH in src/basic/path-util.h)."""


def _look_for_shim() -> None:
    """Warn if the client would not find the shim: containerd and dockerd do not report that when they start."""
    if shutil.which(SHIM, path=_WHERE_SERVICES_LOOK) is None:
        other = shutil.which(SHIM, path=os.environ.get("PATH"))
        _say(
            f"warning: {SHIM} is in none of {_WHERE_SERVICES_LOOK.replace(':', ', ')}, where systemd services"
            " look for it: containers would fail to start\n"
            + (f"hint: ln -s {other} /usr/local/bin/" if other else "hint: make install")
        )


def _client(arguments: Arguments) -> str:
    name = arguments.rest[0]
    if name not in _CLIENTS:
        raise UsageError(f"unknown client {name!r}", "containerd, docker, podman or crio")
    return name


def _install(arguments: Arguments) -> int:
    name = _client(arguments)
    if name == "docker":
        return _install_docker(arguments)
    if name == "podman":
        return _install_podman(arguments)
    if name == "crio":
        return _install_crio(arguments)
    path = arguments.value("config") or client_containerd.DEFAULT_PATH
    edits, daemon = client_containerd.install(path)
    if not edits:
        _say(f"containerd's CRI has the handler {client_containerd.HANDLER!r} already, from {path}")
        return 0
    before = daemon.dump(path)
    return _carry_out(
        arguments,
        edits,
        lambda: client_containerd.check(daemon, path, before),
        "Then: systemctl restart containerd; and in a cluster a RuntimeClass with `handler: kata`.",
    )


def _install_docker(arguments: Arguments) -> int:
    path = arguments.value("config") or client_docker.DEFAULT_PATH
    daemon = client_docker.daemon()
    edits = client_docker.install(path)
    if not edits:
        _say(f"Docker has the runtime {client_docker.NAME!r} already, from {path}")
        return 0
    then = "Then: systemctl reload docker; docker run --runtime kata ..."
    return _carry_out(arguments, edits, lambda: daemon.check(path), then)


def _install_podman(arguments: Arguments) -> int:
    path = arguments.value("config") or client_podman.DEFAULT_PATH
    program = client_podman.podman()
    edits = client_podman.install(path)
    runtime = client_podman.runtime_program()
    if not edits:
        _say(f"Podman has the runtime {client_podman.NAME!r} already, from {path}: {runtime}")
        return 0
    if _shown(arguments, edits):
        return 0
    _apply_checked(edits, lambda: program.check(os.path.realpath(path), runtime))
    _say_written(edits)
    _say("Then: podman --runtime kata run ...")
    return 0


def _install_crio(arguments: Arguments) -> int:
    path = arguments.value("config") or client_crio.DEFAULT_PATH
    program = client_crio.crio()
    edits = client_crio.install(path)
    if not edits:
        _say(
            f"CRI-O has the handlers {client_crio.HANDLER!r} and {client_crio.OCI_HANDLER!r} already, from {path}"
        )
        return 0
    if _shown(arguments, edits):
        return 0
    _apply_checked(edits, lambda: client_crio.check(program, os.path.realpath(path)))
    _say_written(edits)
    _say("Then: systemctl restart crio; and a RuntimeClass with `handler: kata`, or `handler: kata-oci`.")
    return 0


def _carry_out(arguments: Arguments, edits: list[Edit], check: Callable[[], None], then: str) -> int:
    if _shown(arguments, edits):
        return 0
    _apply_checked(edits, check)
    _say_written(edits)
    _look_for_shim()
    _say(then)
    return 0


def _apply_checked(edits: list[Edit], check: Callable[[], None]) -> None:
    """Make the edits, and undo them if *check* fails."""
    _apply(edits)
    try:
        check()
    except BaseException:
        for edit in reversed(edits):
            edit.revert()
        raise


def _uninstall(arguments: Arguments) -> int:
    module = _CLIENTS[_client(arguments)]
    path = arguments.value("config") or module.DEFAULT_PATH
    edits = module.uninstall(path)
    if not edits:
        _say(f"nothing of kata is in {path}")
        return 0
    if _shown(arguments, edits):
        return 0
    for edit in edits:
        edit.apply()
    _say_written(edits)
    for line in module.clear_up(edits):
        _say(line)
    return 0


def _shown(arguments: Arguments, edits: list[Edit]) -> bool:
    if not arguments.flag("dry_run"):
        return False
    for edit in edits:
        sys.stdout.write(edit.diff())
    return True


def _apply(edits: list[Edit]) -> None:
    done: list[Edit] = []
    try:
        for edit in edits:
            edit.apply(keep_backup=True)
            done.append(edit)
    except BaseException:
        for edit in reversed(done):
            edit.revert()
        raise


def _say_written(edits: list[Edit]) -> None:
    for edit in edits:
        word = "removed" if edit.after is None else "changed" if edit.before is not None else "wrote"
        _say(f"{word} {edit.path}")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


HANDLERS = {"install": _install, "uninstall": _uninstall}
