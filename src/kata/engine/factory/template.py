"""Which template a machine can go on from, and why it cannot.

A template belongs to the shape of a machine and to everything that went into it: kernel, initrd and extensions, the
monitor's program, the parameters, and this program's own source. Its directory is named by a hash of all that
(`key_of`), so none is ever used for anything else. It appears there whole, by rename(2), or not at all.

On every start: few imports.
"""

from __future__ import annotations

import os
import time

from kata import __version__, confinement, launcher, paths, sysio
from kata.hypervisor import tsc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.errors import KataError
    from kata.hypervisor.base import Capabilities, MachineShape
    from kata.hypervisor.protocols import Monitor

VARIABLE = "KATA_TEMPLATES"
"""Variable that says ``off``, ``use`` (those that are there, and none is made) or ``on``, instead of the
configuration."""
DIRECTORY = "templates"
FORMAT = 1
"""Of what is saved, beside what a key has in it."""
WHOLE = "machine.json"
"""The file that a template has since it was whole."""
FAILED = "failed"
"""What is behind the key in the name of a file with the reason why a template could not be made."""
FAILED_S = 3600.0
"""How long such a reason counts: what was missing may be there again."""
UNSET = ("init_on_free", "page_poison")
"""Names of parameters of a kernel that expects zeroes in memory which it gave to the host and took back. A clone finds
there what its template had."""
_CPU_FIELDS = (b"vendor_id", b"cpu family", b"model\t", b"stepping", b"microcode", b"flags")


class Template:
    """What is known of a machine's template.

    Attributes:
        root: The directory of all.
        key: Its name there; empty where the machine can have none.
        reason: Why the machine boots instead; empty if it does not.
        is_missing: It could be made, and was not yet.
    """

    __slots__ = ("is_missing", "key", "reason", "root")

    def __init__(self, root: str, key: str = "", reason: str = "", *, is_missing: bool = False) -> None:
        self.root = root
        self.key = key
        self.reason = reason
        self.is_missing = is_missing

    @property
    def path(self) -> str:
        """Its directory."""
        return os.path.join(self.root, self.key)


def root_of(configured: str) -> str:
    """The directory of all templates.

    Args:
        configured: ``template_path``; empty is below `kata.paths.state_dir`.
    """
    return configured or os.path.join(paths.state_dir(), DIRECTORY)


def mode_of(*, enabled: bool) -> str:
    """``off``, ``use`` or ``on``."""
    said = os.environ.get(VARIABLE, "")
    return said if said in ("off", "use", "on") else "on" if enabled else "off"


def find(
    root: str, mode: str, monitor: Monitor, capabilities: Capabilities, shape: MachineShape
) -> Template:
    """The template for a machine that is about to start. One that is there counts as used now.

    Args:
        root: See `root_of`.
        mode: See `mode_of`.
        monitor: The hypervisor.
        capabilities: What it can do here.
        shape: What the machine is.
    """
    if mode == "off":
        return Template(root, reason="templates are switched off")
    reason = why_not(monitor, capabilities, shape)
    if reason:
        return Template(root, reason=reason)
    try:
        found = Template(root, key_of(monitor, shape))
    except OSError as error:
        return Template(root, reason=f"{error.filename} cannot be looked at: {error.strerror}")
    try:
        owner = os.stat(found.path).st_uid
        if owner != os.geteuid():
            found.reason = f"{found.path} belongs to the user {owner}"
            return found
        os.stat(os.path.join(found.path, WHOLE))
        os.utime(found.path)
    except OSError:
        why = failure(found)
        found.reason = "there is no template for it" + (f": {why}" if why else " yet")
        found.is_missing = mode == "on" and not why
    return found


def failure(template: Template) -> str:
    """Why a template could lately not be made, or was of no use; empty if nothing is known."""
    try:
        with open(f"{template.path}.{FAILED}", encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mtime < time.time() - FAILED_S:
                return ""
            return file.read(500).strip() or "its maker did not say why"
    except OSError:
        return ""


def why_not(monitor: Monitor, capabilities: Capabilities, shape: MachineShape) -> str:
    """Why machines of a shape can have no template, as a clause; empty if they can."""
    if not capabilities.clones:
        return f"machines of {monitor.title} are not cloned"
    if confinement.is_script(monitor.program(dict(shape.options))):
        return "its hypervisor is a script, of which it cannot be told what it executes"
    if shape.share == "virtio-fs" and not capabilities.hotplug_nics:
        return "it has files of the host by virtio-fs, whose device can neither be saved nor plugged in"
    if shape.prealloc or shape.huge_pages:
        return "its memory is its own from the start (prealloc, huge pages)"
    if shape.shared_memory:
        return "its memory is shared with servers of its disks (enable_vhost_user_store)"
    if shape.host_devices:
        return "it has devices of the host"
    if shape.nics > 1 and shape.nics - shape.taps != 1:
        return "it has several network interfaces of a namespace"
    told = [word for word in shape.parameters.split() if word.partition("=")[0] in UNSET]
    if told and shape.reclaim:
        return f"its kernel relies on memory that it gave away ({told[0]})"
    return ""


def key_of(monitor: Monitor, shape: MachineShape) -> str:
    """The name of the template of a machine.

    Raises:
        OSError: A file that goes into it cannot be looked at.
    """
    host, options = os.uname(), dict(shape.options)
    parts: list[object] = [FORMAT, __version__, monitor.name, host.release, host.version]
    parts += (_identity(monitor.program(options)), _sources(monitor))
    if os.path.isabs(options.get("firmware", "")):
        parts.append(_identity(options["firmware"]))
    for name in shape.__slots__:
        value = getattr(shape, name)
        if name in ("kernel", "initrd"):
            value = _identity(value)
        elif name == "extensions":
            value = [_identity(path) for path in value]
        parts.append((name, value))
    # An emulated guest's time-stamp counter is the host's, and its kernel was told its frequency at the boot.
    parts.append(_processor() if shape.accel == "kvm" else round(tsc.khz(), -3))
    return hashed(repr(parts).encode())


def _identity(path: str) -> tuple[object, ...]:
    status = os.stat(path)
    return (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _sources(monitor: Monitor) -> list[tuple[str, int, int]]:
    """Our own files that decide on a machine: name, size and time of each."""
    package = os.path.join(os.path.dirname(os.path.abspath(launcher.__file__)), "hypervisor")
    found = []
    for directory in (package, os.path.join(package, monitor.name.replace("-", "_"))):
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    status = entry.stat()
                    found.append((entry.path, status.st_size, status.st_mtime_ns))
    return sorted(found)


def _processor() -> bytes:
    """The host's processor, which a machine under KVM has, too."""
    with open("/proc/cpuinfo", "rb") as file:
        first = file.read(16384).partition(b"\n\n")[0]
    return b"\n".join(line for line in first.split(b"\n") if line.startswith(_CPU_FIELDS))


def hashed(data: bytes) -> str:
    """A hash of these bytes, as 32 hexadecimal digits."""
    try:
        from _blake2 import blake2b  # what hashlib has, without OpenSSL's
    except ImportError:
        from hashlib import blake2b
    return blake2b(data, digest_size=16).hexdigest()


def discard(template: Template, why: KataError) -> None:
    """Take a template away that no machine could go on from. For a while none is made anew, and its machines boot."""
    try:
        sysio.replace_file(
            f"{template.path}.{FAILED}", f"a machine did not go on from it: {why.message[:400]}".encode()
        )
    except OSError:
        pass
    aside = os.path.join(template.root, f".broken-{template.key}-{os.getpid()}")
    try:
        os.rename(template.path, aside)
    except OSError:
        return
    import shutil

    shutil.rmtree(aside, ignore_errors=True)
    why.hint = "The machine's template was removed: the next start boots."
