"""Adds the handlers ``kata`` and ``kata-oci`` to CRI-O's configuration, and removes them again.

The first is a runtime of type "vm": CRI-O speaks to the shim. The second is one of type "oci": a conmon for each
container executes `kata-runtime`.

CRI-O has a directory of drop-ins, so both are in a file of its own.

Source: crio.conf(5), "CRIO.RUNTIME.RUNTIMES TABLE"; crio.conf.d(5).
"""

from __future__ import annotations

import os
import shutil
import tomllib

from kata.cli import client_drop_in, client_podman
from kata.cli.client_ask import ask, last_words
from kata.cli.client_edit import Edit, read
from kata.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_PATH = "/etc/crio/crio.conf.d/50-kata.conf"
CLIENT = "crio"
HANDLER, OCI_HANDLER = "kata", "kata-oci"
SHIM = "containerd-shim-kata-v2"
_SHIM_ROOT, _OCI_ROOT = "/run/vc", "/run/kata/oci"
"""The second is where `kata-runtime list` looks when it is not told."""
_WHERE = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin"


def crio() -> str:
    """Find CRI-O on the PATH.

    Returns:
        The path of the program.

    Raises:
        HostError: There is none.
    """
    program = shutil.which("crio")
    if not program:
        raise HostError("crio is not on the PATH", "install CRI-O: https://cri-o.io")
    return program


def shim_program() -> str:
    """Where the shim is installed, by the name that CRI-O wants it to have.

    Raises:
        HostError: It is not.
    """
    found = shutil.which(SHIM, path=_WHERE) or shutil.which(SHIM)
    if not found:
        raise HostError(f"{SHIM} is in none of {_WHERE.replace(':', ', ')}", "make install")
    return os.path.abspath(found)


def check(program: str, path: str) -> None:
    """Have CRI-O read its configuration, and look for both handlers in it.

    Args:
        program: The path of ``crio``.
        path: The drop-in. Its directory is read, and the system's configuration too if it is there.

    Raises:
        ConfigError: CRI-O cannot read it, or has other programs for the handlers.
        HostError: CRI-O cannot be asked.
    """
    wanted = programs(path)
    main = os.path.join(os.path.dirname(os.path.dirname(path)), "crio.conf")
    given = ["--config", main if os.path.exists(main) else "", "--config-dir", os.path.dirname(path)]
    done = ask([program, *given, "config"])
    if done.returncode:
        raise ConfigError(f"CRI-O refuses its configuration with {path}: {last_words(done)}", "crio config")
    found = _programs(done.stdout)
    if found != wanted:
        raise ConfigError(
            f"CRI-O takes {found} for the programs of its handlers, not {wanted}",
            f"grep -r kata {os.path.dirname(path)}: a later file has a handler of that name",
        )


def install(path: str) -> list[Edit]:
    """Work out the change that makes both handlers known; see `client_drop_in.install`.

    Raises:
        AlreadyExistsError, ConfigError: Those of `client_drop_in.install`.
        HostError: There are no programs to name.
    """
    return client_drop_in.install(
        path, CLIENT, lambda made: _content(shim_program(), client_podman.runtime_program(), made)
    )


def uninstall(path: str) -> list[Edit]:
    """Work out the change that removes the handlers; see `client_drop_in.uninstall`."""
    return client_drop_in.uninstall(path, CLIENT, lambda made: _content(*programs(path), made))


clear_up = client_drop_in.clear_up


def programs(path: str) -> tuple[str, str]:
    """The shim and the runtime that a drop-in names; each is empty if it names none, or cannot be read.

    Args:
        path: The drop-in.
    """
    try:
        return _programs((read(path) or b"").decode())
    except (ConfigError, UnicodeDecodeError):
        return "", ""


def _programs(text: str) -> tuple[str, str]:
    try:
        table: Any = tomllib.loads(text)["crio"]["runtime"]["runtimes"]
        shim, runtime = (str(table.get(one, {}).get("runtime_path", "")) for one in (HANDLER, OCI_HANDLER))
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", ""
    return shim, runtime


def _content(shim: str, runtime: str, made_directory: bool) -> str:
    import json

    top = client_drop_in.head(CLIENT, made_directory=made_directory)
    return f"""\
{top}\
[crio.runtime.runtimes.{HANDLER}]
runtime_type = "vm"
runtime_path = {json.dumps(shim)}
runtime_root = "{_SHIM_ROOT}"
privileged_without_host_devices = true

[crio.runtime.runtimes.{OCI_HANDLER}]
runtime_type = "oci"
runtime_path = {json.dumps(runtime)}
runtime_root = "{_OCI_ROOT}"
privileged_without_host_devices = true
"""
