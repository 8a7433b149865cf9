"""Where things live on the host, and the environment variables that move them.

========================  =====================  ==============================================
variable                  default                holds
========================  =====================  ==============================================
``KATA_RUN_DIR``          ``/run/kata``          what lives as long as a sandbox
``KATA_STATE_DIR``        ``/var/lib/kata``      images, containers: kept over a reboot
``KATA_GUEST_DIR``        ``$KATA_STATE_DIR/guest``  the guest's kernel and initrd
``KATA_VC_DIR``           ``/run/vc/sbs``        sandboxes, for tools of the other Kata
``KATA_CACHE_DIR``        ``/var/cache/kata``    builds and downloads that can be made again
``KATA_AGENT_BINARY``     what came with kata    the agent that `kata guest build` puts into the guest
``KATA_INSPECTOR_BINARY``  what came with kata    the program that reads images for `kata inspect-image`
========================  =====================  ==============================================

Where ``KATA_RUN_DIR`` is not ``/run/kata``, the default of ``KATA_VC_DIR`` is ``$KATA_RUN_DIR/vc/sbs``.

Plain strings: `pathlib` would be paid for on every container start.
"""

from __future__ import annotations

import os

MAX_SOCKET_PATH = 107
"""Bytes that the path of a unix socket may have: sun_path without its final NUL, unix(7)."""

NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
"""Of names and ids that become parts of paths."""
MAX_NAME = 128
MANAGEMENT_SOCKET = "shim-monitor.sock"
"""Name of an engine's management socket in each of its directories."""
HANDOVER = "handover://"
"""In the place of a path for a process's standard input: what follows is the socket of a process of the host, which has
all its streams and stands for it."""
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_DEFAULT_RUN_DIR = "/run/kata"
FACTORY = "factory"
"""Where in `run_dir` a machine is while it becomes a template."""
POOL = "pool"
"""Where in `run_dir` machines wait for a sandbox; beside it is the file that is locked while one is added."""
NETWORKS = "networks"
"""Where in `run_dir` the namespaces of networks with a name are, and in `state_dir` what is known of them."""
BUILD = "build"
"""Where in `run_dir` and `state_dir` the storage of `kata build` is."""
_OURS = frozenset(
    {
        BUILD,
        "sandboxes",
        FACTORY,
        POOL,
        f"{POOL}.lock",
        NETWORKS,
        "vc",
        "boots",
        "kvm-probe",
        "passt",
        "hypervisor-version",
    }
)
"""What our run directory holds, beside files with a dot in their names and ``noted-*``: no sandbox has a directory of
such a name there."""


def may_be_name(text: str) -> bool:
    """Whether a sandbox, container, volume or network could have this name or id: a letter or digit, then
    `NAME_CHARACTERS`, at most `MAX_NAME` of them. It can be a part of a path below our directories.
    """
    return 0 < len(text) <= MAX_NAME and NAME_CHARACTERS.issuperset(text) and text[0] not in "_.-"


def _place(variable: str, default: str) -> str:
    value = os.environ.get(variable) or default
    return os.path.abspath(value)


def run_dir() -> str:
    """Directory of everything that ends with its sandbox; a tmpfs on most machines."""
    return _place("KATA_RUN_DIR", _DEFAULT_RUN_DIR)


def oci_dir() -> str:
    """Directory in which the OCI command line records its containers, unless ``--root`` says otherwise."""
    return os.path.join(run_dir(), "oci")


def state_dir() -> str:
    """Directory of images and containers."""
    return _place("KATA_STATE_DIR", "/var/lib/kata")


def guest_dir() -> str:
    """Directory of the guest's kernel, initrd and their manifest ``guest.json``."""
    return _place("KATA_GUEST_DIR", os.path.join(state_dir(), "guest"))


def cache_dir() -> str:
    """Directory of kernel builds and downloaded packages."""
    return _place("KATA_CACHE_DIR", "/var/cache/kata")


def make_dirs(path: str, mode: int) -> None:
    """Make a directory of ours, and what is missing above it (mode 0711), with modes that no umask changes.

    Args:
        path: An absolute path; nothing happens where it is a directory already.
        mode: Of the last component.

    Raises:
        OSError: One could not be made.
    """
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    if above != path:
        try:
            make_dirs(above, 0o711)
        except FileExistsError:
            pass  # a file: what follows says so
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        return  # somebody else has been faster
    if mode != 0o700:
        os.chmod(path, mode)


def check_own(*directories: str) -> None:
    """Refuse directories that are another user's: what is in them says which processes end and which files go.

    Args:
        directories: Those of ours that are to be used; they need not exist.

    Raises:
        HostError: One belongs to another user, or all users may write there.
    """
    for path in directories:
        try:
            about = os.stat(path)
        except OSError:
            continue  # it will be made, or whoever needs it says why not
        if about.st_uid != os.geteuid() or about.st_mode & 0o002:
            from kata.errors import HostError

            whose = (
                f"belongs to user {about.st_uid}" if about.st_uid != os.geteuid() else "is open to all users"
            )
            raise HostError(
                f"{path} {whose}, and who writes there would command this user's containers",
                "Use a directory of this user's alone: KATA_RUN_DIR, KATA_STATE_DIR; or run it as that user.",
            )


def sandbox_dir(sandbox_id: str) -> str:
    """Run directory of one sandbox."""
    return os.path.join(run_dir(), "sandboxes", sandbox_id)


def compat_dir(base: str = "") -> str:
    """Directory in which tools of the original look for sandboxes.

    Args:
        base: The run directory; empty is `run_dir`.
    """
    base = base or run_dir()
    return _place(
        "KATA_VC_DIR", "/run/vc/sbs" if base == _DEFAULT_RUN_DIR else os.path.join(base, "vc", "sbs")
    )


def compat_dirs(sandbox_id: str, base: str = "") -> list[str]:
    """Directories of one sandbox in which tools of the original look for its management socket.

    Args:
        sandbox_id: Its id.
        base: As for `compat_dir`.
    """
    found = [os.path.join(compat_dir(base), sandbox_id)]
    ours = sandbox_id in _OURS or "." in sandbox_id or sandbox_id.startswith("noted-")
    if (base or run_dir()) == _DEFAULT_RUN_DIR and not ours:
        found.append(os.path.join(_DEFAULT_RUN_DIR, sandbox_id))  # that of its runtime in Rust
    return found


def container_dir(container_id: str) -> str:
    """State directory of one container of the `kata` command: bundle, record, writable disk, log."""
    return os.path.join(state_dir(), "containers", container_id)


def is_installed() -> bool:
    """Whether this code is an installed package, and not that of a checkout."""
    return os.path.basename(os.path.dirname(_PACKAGE)) in ("site-packages", "dist-packages")


def checkout() -> str:
    """The checkout whose code this is; only where it is not installed."""
    return os.path.dirname(os.path.dirname(_PACKAGE))


def shipped(name: str) -> str:
    """What an installed package has beside the code (``tools/installer.py`` puts it there).

    Args:
        name: ``kata-agent``, ``kata-inspector``, ``recipe`` (by which guests are built), or ``guest`` (one that was
            built; not every installation has it).
    """
    return os.path.join(_PACKAGE, "shipped", name)


def agent_binary() -> str:
    """The agent's program, which becomes PID 1 of the guest; built by ``tools/setup``, or part of an installation.

    ``KATA_AGENT_BINARY`` names another one. Whether the file exists is not looked at.
    """
    return _place("KATA_AGENT_BINARY", _built("agent", "kata-agent"))


def inspector_binary() -> str:
    """The program that reads an image in a guest; likewise, with ``KATA_INSPECTOR_BINARY``."""
    return _place("KATA_INSPECTOR_BINARY", _built("inspector", "kata-inspector"))


def _built(crate: str, program: str) -> str:
    if is_installed():
        return shipped(program)
    return os.path.join(checkout(), crate, "target/x86_64-unknown-linux-gnu/release", program)
