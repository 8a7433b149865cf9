"""``kata-runtime spec``: writes a specification to begin a bundle with, as ``runc spec`` does.

It runs ``sh`` on a terminal in a root file system ``rootfs`` that cannot be written to. Capabilities, mounts, masked
and read-only paths are those of `kata run`.

Source: runc-spec(8); runtime-spec ``config.md`` and ``config-linux.md``.
"""

from __future__ import annotations

import os

from kata.errors import AlreadyExistsError, NotFoundError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.args import Arguments

FILE = "config.json"
HOSTNAME = "kata"
_OPEN_FILES = 1024


def specification() -> dict[str, Any]:
    """The content of the file: everything that somebody may want to change is in it."""
    from kata.oci import spec

    request = spec.Request(HOSTNAME)
    request.command = ["sh"]
    request.terminal = True
    request.read_only = True
    made = spec.build(request, {})
    # A profile would be most of the file. Callers that want one write their own.
    del made["linux"]["seccomp"]
    process = made["process"]
    del process["user"]["username"]  # other runtimes take numbers alone
    process["env"] = [f"PATH={spec.DEFAULT_PATH}", "TERM=xterm"]
    process["noNewPrivileges"] = True
    process["rlimits"] = [{"type": "RLIMIT_NOFILE", "hard": _OPEN_FILES, "soft": _OPEN_FILES}]
    return made


def write(bundle: str) -> None:
    """Write the file.

    Args:
        bundle: The directory; empty for the working directory.

    Raises:
        AlreadyExistsError: There is such a file, or something else of that name.
        NotFoundError: There is no such directory.
    """
    import json

    path = os.path.join(bundle, FILE)
    text = json.dumps(specification(), indent="\t") + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise AlreadyExistsError(
            f"{path} exists; it is left as it is", "remove it first, or name another directory by --bundle"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no directory {bundle!r}", f"mkdir -p {bundle}/rootfs") from None
    try:
        with open(descriptor, "w") as file:
            file.write(text)
    except BaseException:
        os.unlink(path)
        raise


def command(arguments: Arguments) -> int:
    """Carry the command out.

    Raises:
        UnsupportedError: ``--rootless`` was given.
    """
    if arguments.flag("rootless"):
        raise UnsupportedError(
            "kata-runtime spec --rootless: a container has no need of a user namespace on the host,"
            " since root in its machine is nobody outside",
            "leave --rootless out: the specification serves every user",
        )
    write(arguments.value("bundle") or "")
    return 0
