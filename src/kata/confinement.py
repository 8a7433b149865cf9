"""What a monitor or helper is left with before it executes its program: user, limits, Landlock, seccomp.

One call for all of them: make a `Confinement` and give it to `kata.children.spawn` (or `SupervisedChild.start`)::

    children.spawn(argv, journal, role, confinement=confinement.monitor(program, ...))

It goes together with the capabilities and namespaces that `spawn` is told. The order in the child: cgroups, namespaces,
own ``/dev``, limits, capabilities and user, no_new_privs, death signal, Landlock, seccomp, execve(2). What a program
restricts by itself (QEMU's ``-sandbox``, the filters of the others) comes on top.

Everything holds from the program's first instruction on; `kata.hypervisor.root` takes the files away later.

The filters of system calls are in `kata.seccomp`. Sources: the kernel's ``Documentation/userspace-api/landlock.rst``,
``linux/landlock.h``, capabilities(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from kata import seccomp, sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Protocol

    class Handover(Protocol):
        """Opens for a program what it opens by name (`kata.hypervisor.qemu.template_memory.Handover`)."""

        def install(self) -> None:
            """In the child, as the last before it executes its program. Raises OSError if the kernel refuses."""

        def serve(self) -> None:
            """In the parent, once the child has executed it."""

        def close(self) -> None:
            """Close what is left. Idempotent."""


FIRST_USER = 1_900_000_000
"""The first of the user ids that sandboxes take by default, where nothing else has any (systemd's ``UIDS-GIDS.md``)."""
VARIABLE = "KATA_FIRST_USER"
"""Variable with another first user id; 0 leaves all programs root's."""
USERS_PER_SANDBOX = 4
OWN_DIRECTORY = "/dev/monitor"
"""Where a monitor with a user of its own sees the directory in which it makes its sockets: by its name on the host it
could not be reached."""
MONITOR, NETWORK = range(2)
"""Which of a sandbox's users is whose."""
SCOPES = 6
"""The version of Landlock that restricts signals and abstract sockets."""
MOST_FILES = 1024
MOST_THREADS = 1024
NAMESPACES = (
    sysio.CLONE_NEWPID | sysio.CLONE_NEWIPC | sysio.CLONE_NEWNS | sysio.CLONE_NEWUTS | sysio.CLONE_NEWCGROUP
)
"""Those that each monitor has of its own. Its network namespace is the sandbox's: clients reach that by its process."""

_NR_CREATE_RULESET, _NR_ADD_RULE, _NR_RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 0x1, 0x2, 0x4, 0x8, 0x4000, 0x8000
REMOVE_FILE, MAKE_FILE, MAKE_SOCK = 0x20, 0x100, 0x200
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | IOCTL_DEV | MAKE_FILE | REMOVE_FILE
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}
_ALL_RIGHTS = 0xFFFF
_NO_NETWORK, _NO_SIGNALS_NOR_SOCKETS = 0x3, 0x3
SYSTEM = (
    *("/usr", "/lib", "/lib64", "/proc", "/sys"),
    *("/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime"),
    *("/etc/nsswitch.conf", "/etc/passwd", "/etc/group"),
    *("/etc/qemu", "/etc/ssl/openssl.cnf", "/etc/gnutls", "/etc/gcrypt", "/etc/crypto-policies"),
)
"""What any program may read until its root directory is taken away: libraries, firmware, what the kernel says."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


class Confinement:
    """What one process gets; made by `monitor` or `helper`, and used up by `kata.children.spawn`.

    Args:
        code: The seccomp filter's instructions; empty on another architecture than x86-64.
        secret: Fifth argument of the only execve(2) that the filter allows; 0 where it allows all.
        user: User and group id; 0 stays root.
        devices: Devices of the host that it opens by name, for a ``/dev`` of its own; empty leaves it the host's.
        directory: A directory that it sees there as `OWN_DIRECTORY`; empty for none.
        binds: Descriptors of files that are in this ``/dev``, and their paths there.
        ruleset: Of Landlock, or None where the kernel has it not.
        limits_files: Whether that restricts files.
        files: How many it may have open; 0 for as many as we.
        locks_memory: It may have all its memory locked, for devices of the host that reach it.
        threads: How many tasks its user may have; 0 for as many as root.
        keeps_groups: It keeps the groups that it has, although it gets a user of its own.

    Attributes:
        handover: Gives the program a descriptor that it would open, if there is one.
    """

    __slots__ = (
        "_code",
        "_secret",
        "binds",
        "devices",
        "directory",
        "files",
        "handover",
        "keeps_groups",
        "limits_files",
        "locks_memory",
        "ruleset",
        "threads",
        "user",
    )

    def __init__(
        self,
        code: bytes,
        secret: int = 0,
        *,
        user: int = 0,
        devices: Sequence[str] = (),
        directory: str = "",
        binds: Sequence[tuple[int, str]] = (),
        ruleset: sysio.Fd | None = None,
        limits_files: bool = True,
        files: int = 0,
        threads: int = 0,
        keeps_groups: bool = False,
    ) -> None:
        self._code = code
        self._secret = secret
        self.user = user
        self.devices = devices
        self.directory = directory
        self.binds = binds
        self.ruleset = ruleset
        self.limits_files = limits_files
        self.files = files
        self.locks_memory = False
        self.threads = threads
        self.keeps_groups = keeps_groups
        self.handover: Handover | None = None

    def close(self) -> None:
        """Close what was for the child alone. Idempotent."""
        if self.handover is not None:
            self.handover.close()
        if self.ruleset is not None:
            self.ruleset.close()

    # ---- in the child ----

    def move_above(self, least: int) -> None:
        """Move the descriptors that the child still needs to numbers from this one on.

        Raises:
            OSError: There are too many.
        """
        import fcntl

        if self.ruleset is not None:
            self.ruleset = sysio.Fd(fcntl.fcntl(self.ruleset.raw, fcntl.F_DUPFD_CLOEXEC, least))
        self.binds = [(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least), path) for fd, path in self.binds]

    def limit(self) -> None:
        """While it is root, after its namespaces were made: its devices and limits.

        Raises:
            OSError: A call failed.
        """
        import resource

        if self.devices:
            self._own_devices()
        if self.locks_memory:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for which, most in ((resource.RLIMIT_NOFILE, self.files), (resource.RLIMIT_NPROC, self.threads)):
            if most:
                hard = resource.getrlimit(which)[1]
                most = most if hard == resource.RLIM_INFINITY else min(most, hard)
                resource.setrlimit(which, (most, most))

    def _own_devices(self) -> None:
        nodes = []
        directory = (
            os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if self.directory else -1
        )
        for path in dict.fromkeys((*DEVICES, *self.devices)):
            try:
                nodes.append((path, os.stat(path)))
            except FileNotFoundError:
                pass  # the program says so
        # A user namespace has no device nodes of its own: it gets those of the host, mounted.
        held = (
            {path: sysio.Fd(os.open(path, os.O_PATH | os.O_CLOEXEC)) for path, _ in nodes}
            if sysio.in_user_namespace()
            else {}
        )
        sysio.mount(
            "tmpfs", "/dev", "tmpfs", sysio.MS_NOSUID | sysio.MS_NOEXEC, "mode=0755,size=4k,nr_inodes=32"
        )
        umask = os.umask(0)
        for path, status in nodes:
            if not stat.S_ISCHR(status.st_mode):
                continue
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            mine = path not in DEVICES
            if sysio.in_user_namespace():
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                sysio.mount(f"/proc/self/fd/{held.pop(path).raw}", path, None, sysio.MS_BIND)
                continue
            os.mknod(path, stat.S_IFCHR | (0o600 if mine else 0o666), status.st_rdev)
            if mine:
                os.chown(path, self.user, self.user)
        if directory >= 0:
            os.mkdir(OWN_DIRECTORY, 0o555)
            sysio.mount(f"/proc/self/fd/{directory}", OWN_DIRECTORY, None, sysio.MS_BIND)
            os.close(directory)
        for fd, path in self.binds:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
            sysio.mount(f"/proc/self/fd/{fd}", path, None, sysio.MS_BIND)
        os.umask(umask)
        if self.ruleset is not None and self.limits_files:
            allow(self.ruleset.raw, "/dev", READ | WRITE_FILE | IOCTL_DEV)

    def seal(self) -> None:
        """As the last but one: Landlock and the filter. no_new_privs is set.

        Raises:
            OSError: The kernel refused.
        """
        if self.ruleset is not None:
            _syscall(_NR_RESTRICT_SELF, self.ruleset.raw, 0)
        if self._code:
            seccomp.install(self._code)
        if self.handover is not None:
            self.handover.install()

    def execute(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """execve(2), the one that the filter allows.

        Raises:
            OSError: Always, if it returns.
        """
        words = [os.fsencode(word) for word in argv]
        pairs = [os.fsencode(f"{name}={value}") for name, value in environment.items()]
        vector = (ctypes.c_char_p * (len(words) + 1))(*words, None)
        variables = (ctypes.c_char_p * (len(pairs) + 1))(*pairs, None)
        _syscall(
            seccomp.EXECVE if self._code else _execve_number(),
            words[0],
            vector,
            variables,
            0,
            self._secret,
        )


def _execve_number() -> int:
    return {"aarch64": 221}.get(os.uname().machine, seccomp.EXECVE)


def _syscall(number: int, *arguments: object) -> int:
    converted = [ctypes.c_ulong(one) if isinstance(one, int) else one for one in arguments]
    return sysio.syscall(number, *converted)


def monitor(
    program: str,
    *,
    user: int | None = None,
    keeps: Iterable[int] = (),
    readable: Iterable[str | int] = (),
    writable: Iterable[str | int] = (),
    devices: Sequence[str] = (),
    sockets_in: str = "",
    shares: str = "",
    any_file: bool = False,
) -> Confinement:
    """The confinement of a monitor.

    Give it to `kata.children.spawn` together with ``capabilities=()`` (or what it needs to serve files) and
    ``namespaces=NAMESPACES``.

    Args:
        program: Its absolute path.
        user: Which user id; None for `user_for`.
        keeps: Its capabilities.
        readable: Paths that it opens by name besides its program and the system's libraries, and descriptors that it
            opens once more by ``/proc/self/fd``.
        writable: The same of what it writes; of a directory what is in it, also what is mounted there later.
        devices: Devices that it opens by name, such as ``/dev/kvm``.
        sockets_in: Directory in which it makes unix sockets; empty: it makes no socket at all. To a user of its own it
            is `OWN_DIRECTORY`.
        shares: Directory whose files it serves; empty for none.
        any_file: It keeps the caller's root directory and opens files by names that are not known yet: Landlock
            restricts none.
    """
    kept = set(keeps)
    script = is_script(program)
    if user is None:
        user = user_for(program, kept)
    denied = {*seccomp.ALWAYS, *seccomp.SETTING_UP, *seccomp.BY_HANDLE}
    if sysio.CAP_MKNOD not in kept:
        denied.update(seccomp.NODES)
    if not sockets_in:
        denied.update(seccomp.SOCKETS)
    secret = 0 if script else 1 | int.from_bytes(os.urandom(8), "little")
    ruleset = None
    if not script:
        own = os.path.dirname(os.path.realpath(program))
        beside = (os.path.join(own, "..", name) for name in ("share", "lib", "libexec"))
        ruleset = landlock(
            [
                *((path, READ) for path in (*SYSTEM, own, *beside, *readable)),
                *((path, WRITE) for path in writable),
                *(((sockets_in, MAKE_SOCK | REMOVE_FILE),) if sockets_in else ()),
                *(((shares, _ALL_RIGHTS),) if shares else ()),
                *((path, READ | WRITE_FILE | IOCTL_DEV) for path in (*DEVICES, *devices)),
            ],
            files=not any_file,
            network=True,
        )
    return Confinement(
        seccomp.filter_code(denied, secret=secret, threads_only=not script, unix_only=bool(sockets_in)),
        secret,
        user=user,
        devices=devices if user else (),
        directory=sockets_in if user else "",
        ruleset=ruleset,
        limits_files=not any_file,
        files=0 if kept else MOST_FILES,
        threads=MOST_THREADS if user else 0,
        keeps_groups=bool(user) and sysio.in_user_namespace() and not all(map(_is_open_to_all, devices)),
    )


def helper(
    *,
    scoped: bool = True,
    user: int = 0,
    devices: Sequence[str] = (),
    binds: Sequence[tuple[int, str]] = (),
) -> Confinement:
    """The confinement of virtiofsd and passt, beneath the one that they make themselves.

    They fork, mount and change their user for that, so the filter and Landlock leave them these: Landlock with rules
    for files would forbid them to mount. Their own filters take the calls away.

    Args:
        scoped: It need not signal, nor connect to abstract sockets of, processes that are not its own descendants.
        user: See `Confinement`.
        devices: See `Confinement`.
        binds: See `Confinement`.
    """
    return Confinement(
        seccomp.filter_code({*seccomp.ALWAYS, *seccomp.BY_HANDLE}),
        user=user,
        devices=devices,
        binds=binds,
        ruleset=landlock([], files=False) if scoped else None,
        limits_files=False,
    )


def user_of(which: int) -> int:
    """The user id for one of this sandbox's processes; 0 where it has to be root's.

    A sandbox has one engine and an engine one process id, so no two sandboxes have the same at one time. In a user
    namespace, which has fewer ids than there may be processes, they are taken by `kata.own_ids`.

    Args:
        which: `MONITOR` or `NETWORK`.
    """
    if os.geteuid() != 0:
        return 0
    try:
        first = int(os.environ.get(VARIABLE, "") or FIRST_USER)
    except ValueError:
        first = FIRST_USER
    if first <= 0:
        return 0
    user = first + USERS_PER_SANDBOX * os.getpid() + which
    if _is_mapped(user):
        return user
    if not sysio.in_user_namespace():
        return 0
    from kata import own_ids

    return own_ids.take(which)


def _is_mapped(user: int) -> bool:
    """Whether the user namespace that we are in has this id, for users and groups."""
    return all(
        any(inside <= user < inside + count for inside, _, count in sysio.id_map(kind))
        for kind in ("uid", "gid")
    )


def is_script(program: str) -> bool:
    """A wrapper, which executes other programs: what these need cannot be told from it."""
    try:
        fd = os.open(program, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 2) == b"#!"
        finally:
            os.close(fd)
    except OSError:
        return False


def user_for(program: str, keeps: Iterable[int] = (), reads: Iterable[str] = ()) -> int:
    """The user id of a sandbox's monitor; 0 where it has to be root's.

    Args:
        program: Its absolute path. A wrapper is root's: what it executes may be for root alone.
        keeps: The capabilities that it is to keep: who has these for others' files needs root's rights to them anyway.
        reads: Files that it opens by name.
    """
    if any(True for _ in keeps) or is_script(program) or not all(map(_is_for_all, (program, *reads))):
        return 0
    return user_of(MONITOR)


def _is_for_all(path: str) -> bool:
    """Whether users that are nobody in particular may read it, and execute it if somebody may."""
    path = os.path.realpath(path)
    try:
        mode = os.stat(path).st_mode
        if not mode & stat.S_IROTH or (mode & stat.S_IXUSR and not mode & stat.S_IXOTH):
            return False
        while path != "/":
            path = os.path.dirname(path)
            if not os.stat(path).st_mode & stat.S_IXOTH:
                return False
    except OSError:
        return False
    return True


def _is_open_to_all(device: str) -> bool:
    """Whether any user may open a device, not only those of a group: that of ``/dev/kvm`` is not one of ours in a user
    namespace, and cannot be given to anybody who has left it.
    """
    try:
        mode = os.stat(device).st_mode
    except OSError:
        return True  # the program says so
    return mode & 0o6 == 0o6


def for_user(fd: int, user: int) -> int:
    """A descriptor that a program of this user can open once more by ``/proc/self/fd``.

    Args:
        fd: An open file; closed if another takes its place.
        user: Of `Confinement`.

    Returns:
        The same, or that of a copy in memory where only others may read the file.

    Raises:
        OSError: It cannot be copied.
    """
    status = os.fstat(fd)
    if not user or status.st_mode & stat.S_IROTH or not stat.S_ISREG(status.st_mode):
        return fd
    copy = os.memfd_create("copy")
    try:
        left = status.st_size
        offset = 0
        while left > 0 and (done := os.sendfile(copy, fd, offset, left)):
            offset += done
            left -= done
    except BaseException:
        os.close(copy)
        raise
    os.close(fd)
    return copy


# ---- Landlock ----


def landlock_version() -> int:
    """Which version of Landlock the kernel has; 0 for none, or switched off."""
    try:
        return _syscall(_NR_CREATE_RULESET, 0, 0, _VERSION)
    except OSError:
        return 0


def landlock(
    rules: Iterable[tuple[str | int, int]], *, files: bool = True, network: bool = False
) -> sysio.Fd | None:
    """Make a ruleset: nothing but what a rule allows, no TCP, no signals to others and no abstract sockets of others.

    Args:
        rules: Each a path or descriptor, and rights to it and what is below; paths that do not exist are left out.
        files: Whether files are restricted.
        network: Whether TCP is.

    Returns:
        None where this kernel has nothing of that.
    """
    version = landlock_version()
    if not version or (not files and version < SCOPES):
        return None
    rights = _RIGHTS.get(version, _ALL_RIGHTS) if files else 0
    attributes = rights.to_bytes(8, "little")
    if version >= 4:
        attributes += (_NO_NETWORK if network else 0).to_bytes(8, "little")
    if version >= SCOPES:
        attributes += _NO_SIGNALS_NOR_SOCKETS.to_bytes(8, "little")
    ruleset = sysio.Fd(_syscall(_NR_CREATE_RULESET, attributes, len(attributes), 0))
    try:
        for path, wanted in rules if files else ():
            allow(ruleset.raw, path, wanted & rights)
    except BaseException:
        ruleset.close()
        raise
    return ruleset


def allow(ruleset: int, path: str | int, rights: int) -> None:
    """Add a rule; nothing happens for a path that does not exist.

    Raises:
        OSError: The kernel refused.
    """
    if isinstance(path, str):
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
    else:
        fd = path
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        version_rights = _RIGHTS.get(landlock_version(), _ALL_RIGHTS)
        rule = (rights & version_rights).to_bytes(8, "little") + fd.to_bytes(4, "little", signed=True)
        _syscall(_NR_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    except OSError as error:
        if error.errno != errno.EBADFD:  # that of files in memory alone, which need no rule
            raise
    finally:
        if isinstance(path, str):
            os.close(fd)
