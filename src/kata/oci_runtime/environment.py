"""``kata-runtime env``: what sandboxes would be made of on this host, with the member names of the original's command.

Scripts and reports of faults read it, so a member that the original has and that has a meaning here has the same name,
place and type. The others are left out: the names of options that nobody reads would say something untrue.

Source: Kata Containers' ``kata-runtime env`` and ``kata-runtime env --json``, format 1.0.27.
"""

from __future__ import annotations

import os
import sys

from kata import __version__
from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.cli.args import Arguments
    from kata.config.files import Configuration

FORMAT = "1.0.27"
"""The original's version of this document, whose names are used."""


def environment() -> dict[str, Any]:
    """The document: sections -> members.

    Raises:
        ConfigError: The configuration cannot be read, or one of its values makes no sense.
    """
    from kata.config import files

    conf = files.load()
    return {
        "Kernel": _kernel(conf),
        "Meta": {"Version": FORMAT},
        "Initrd": {"Path": _guest(conf, "initrd")},
        "Hypervisor": _hypervisor(conf),
        "Runtime": _runtime(conf),
        "Host": _host(),
        "Agent": {
            "Debug": bool(conf.get("agent.enable_debug", False)),
            "Trace": bool(conf.get("agent.enable_tracing", False)),
        },
    }


def _guest(conf: Configuration, which: str) -> str:
    """The path of the guest's kernel or initrd; empty while there is none."""
    from kata.guest import manifest

    if named := conf.get(f"hypervisor.{which}", ""):
        return str(named)
    try:
        return str(getattr(manifest.installed(), which))
    except KataError:  # kata doctor tells the reason
        return ""


def _kernel(conf: Configuration) -> dict[str, Any]:
    return {
        "Path": _guest(conf, "kernel"),
        "Parameters": str(conf.get("hypervisor.kernel_params", "")).strip(),
    }


def _hypervisor(conf: Configuration) -> dict[str, Any]:
    from kata.cli import host
    from kata.config import keys
    from kata.hypervisor import virtiofsd

    chosen = next(one for one in host.hypervisors() if one["chosen"])
    shares = chosen["capabilities"]["shares"]
    wanted = str(conf.get("hypervisor.shared_fs", ""))
    server = str(conf.get("hypervisor.virtio_fs_daemon", "")) or virtiofsd.find() or ""
    found = {
        "Name": chosen["name"],
        "Path": chosen["program"],
        "Version": chosen["version"],
        "Accelerator": chosen["accelerator"],
        "SharedFS": wanted or next(iter(shares), "none"),
        "VirtioFSDaemon": server,
        "Debug": bool(conf.get("hypervisor.enable_debug", False)),
    }
    for member, name in (("MachineType", "hypervisor.machine_type"), ("Msize9p", "hypervisor.msize_9p")):
        key = keys.find(name, chosen["name"])
        if key is not None and key.status == keys.ACTS:
            value = conf.get(name, None) or key.default.strip("`")
            found[member] = int(value) if key.kind == keys.INT else str(value)
    found["SecurityInfo"] = {
        "Rootless": os.geteuid() != 0,
        "EnableAnnotations": [
            str(name) for name in conf.get("hypervisor.enable_annotations", keys.DEFAULT_ANNOTATIONS)
        ],
    }
    return found


def _runtime(conf: Configuration) -> dict[str, Any]:
    from kata.oci import OCI_VERSION

    numbers = [int(part) if part.isdigit() else 0 for part in (*__version__.split("."), "0", "0")[:3]]
    return {
        "Path": os.path.realpath(sys.argv[0] or "kata-runtime"),
        "Debug": bool(conf.get("runtime.enable_debug", False)),
        "Trace": bool(conf.get("runtime.enable_tracing", False)),
        "DisableGuestSeccomp": bool(conf.get("runtime.disable_guest_seccomp", False)),
        "DisableNewNetNs": bool(conf.get("runtime.disable_new_netns", False)),
        "Config": {"Path": conf.files[0] if conf.files else ""},
        "Version": {
            "OCI": OCI_VERSION,
            "Version": {
                "Semver": __version__,
                **dict(zip(("Major", "Minor", "Patch"), numbers, strict=True)),
            },
        },
    }


def _host() -> dict[str, Any]:
    from kata.hypervisor import kvmprobe

    system = os.uname()
    release = _assignments("/etc/os-release")
    processor = _fields("/proc/cpuinfo")
    memory = _fields("/proc/meminfo")
    return {
        "Kernel": system.release,
        "Architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(system.machine, system.machine),
        "VMContainerCapable": kvmprobe.probe().works,
        "SupportVSocks": os.access("/dev/vhost-vsock", os.R_OK | os.W_OK),
        "Distro": {"Name": release.get("NAME", ""), "Version": release.get("VERSION_ID", "")},
        "CPU": {
            "Vendor": processor.get("vendor_id", ""),
            "Model": processor.get("model name", ""),
            "CPUs": os.cpu_count() or 1,
        },
        "Memory": {
            name: int(memory.get(field, "0").split()[0])
            for name, field in (("Total", "MemTotal"), ("Free", "MemFree"), ("Available", "MemAvailable"))
        },
    }


def _fields(path: str) -> dict[str, str]:
    """The first value of each ``name: value`` line of a file of the kernel."""
    found: dict[str, str] = {}
    for line in _lines(path):
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _assignments(path: str) -> dict[str, str]:
    """The assignments of os-release(5)."""
    import shlex

    found = {}
    for line in _lines(path):
        name, equals, value = line.partition("=")
        if equals and not name.startswith("#"):
            try:
                found[name.strip()] = "".join(shlex.split(value))
            except ValueError:  # a quotation that does not end
                continue
    return found


def _lines(path: str) -> list[str]:
    try:
        with open(path, errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []


def toml(content: Mapping[str, Any], name: str = "") -> str:
    """Write nested tables of strings, numbers, switches and lists of strings as TOML.

    Args:
        content: What is written.
        name: The table's name, with those around it; empty for the document.
    """
    import json

    # A basic string of TOML has JSON's escapes, but for the delete character.
    own = [
        f"  {key} = {json.dumps(value).replace(chr(127), chr(92) + 'u007f')}\n"
        for key, value in content.items()
        if not isinstance(value, dict)
    ]
    inner = [
        toml(value, f"{name}.{key}" if name else key)
        for key, value in content.items()
        if isinstance(value, dict)
    ]
    return "".join([f"[{name}]\n" if name else "", *own, *(["\n"] if own else []), *inner])


def command(arguments: Arguments) -> int:
    """Carry the command out."""
    import json

    found = environment()
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if arguments.flag("json") else toml(found))
    return 0
