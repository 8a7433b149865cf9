"""System calls that Python 3.11 does not offer, atomic file replacement, and facts about processes from ``/proc``.

It is imported before a hypervisor is started and by commands that live for milliseconds, so it imports no expensive
module; `ctypes` is imported, and the C library opened, by the first call that needs them (`c_library`).

All calls raise `OSError` with errno and, where there is one, the path. Sources: the manual pages named in
each docstring (section 2 and 5 of Linux man-pages).
"""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes
    from collections.abc import Iterable, Sequence

PR_SET_PDEATHSIG = 1
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_SET_THP_DISABLE = 41
PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
SECUREBITS = 0xEF
"""All but keep_caps, and all locked: NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE (``linux/securebits.h``)."""

CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12
CAP_SYS_CHROOT = 18
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24
CAP_MKNOD = 27
CAP_SETFCAP = 31
_CAPABILITY_VERSION_3 = 0x2008_0522

CLONE_FS = 0x0000_0200

CLONE_NEWNS = 0x0002_0000
CLONE_NEWCGROUP = 0x0200_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOSYMFOLLOW = 0x100
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 0x4_0000
MS_SLAVE = 0x8_0000
MS_SHARED = 0x10_0000

MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

SIGKILL = 9
SIGPIPE = 13
SIGTERM = 15

AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4

# These numbers are the same on every architecture (they came after the tables were unified).
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_CLOSE_RANGE = 436
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442
_NR_PROCESS_MRELEASE = 448
_CLOSE_RANGE_CLOEXEC = 4


class Fd:
    """Owns a file descriptor. As a context manager it closes the descriptor, unless that was given away.

    Args:
        number: The descriptor, of which it takes ownership.
    """

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def raw(self) -> int:
        """The descriptor, which is still owned by this object.

        Raises:
            ValueError: It was closed or given away.
        """
        if self._number < 0:
            raise ValueError("the descriptor was closed or given away")
        return self._number

    def fileno(self) -> int:
        """The descriptor, for functions that take objects with a `fileno` method."""
        return self.raw

    @property
    def is_open(self) -> bool:
        """Whether the descriptor was neither closed nor given away."""
        return self._number >= 0

    def detach(self) -> int:
        """Transfer ownership of the descriptor to the caller, who has to close it.

        Raises:
            ValueError: It was closed or given away before.
        """
        number = self.raw
        self._number = -1
        return number

    def close(self) -> None:
        """Close the descriptor, if this object still owns it. Idempotent."""
        if self._number >= 0:
            number, self._number = self._number, -1
            os.close(number)

    def __enter__(self) -> Fd:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


_libc: ctypes.CDLL | None = None


def c_library() -> ctypes.CDLL:
    """The C library; after the first call, `ctypes` is a name of this module."""
    global _libc, ctypes
    if _libc is None:
        import ctypes

        _libc = ctypes.CDLL(None, use_errno=True)
    return _libc


def give_back_memory() -> None:
    """Give memory that was freed back to the kernel, malloc_trim(3), in some 0.1 ms; after something that takes much of
    it and is seldom. A C library without this function does nothing.
    """
    trim = getattr(c_library(), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def check(result: int, path: str | None = None) -> int:
    """What a function of the C library has returned.

    Args:
        result: That; negative if it has failed.
        path: The file that it was about, for the error.

    Raises:
        OSError: It has failed, with its errno.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def syscall(number: int, *arguments: object) -> int:
    """syscall(2): a system call that the C library has no function for.

    Args:
        number: Its number on this architecture.
        arguments: Values of ctypes, or bytes and None for pointers.
    """
    return check(c_library().syscall(ctypes.c_long(number), *arguments))


def number_of(name: str, numbers: dict[str, int]) -> int:
    """The number of a system call here.

    Args:
        name: For the error: ``bpf(2)``.
        numbers: By the names of machines (uname(2)).

    Raises:
        OSError: It is not known for this architecture (ENOSYS).
    """
    machine = os.uname().machine
    if machine not in numbers:
        raise OSError(errno.ENOSYS, f"{name} is not known for {machine}")
    return numbers[machine]


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2) with integer arguments."""
    libc, u = c_library(), ctypes.c_ulong
    return check(libc.prctl(option, u(arg2), u(arg3), u(arg4), u(arg5)))


def preload() -> None:
    """Open the C library now, so that a forked child need not do so between fork and exec."""
    c_library()


def die_with_parent(parent_pid: int, signal_number: int = SIGKILL) -> None:
    """Make the kernel send this process a signal when its parent *thread* ends; for use after fork.

    A change of credentials clears the setting, so it has to come after that. It refers to the thread that forked, so
    that thread must live as long as the parent process (prctl(2), PR_SET_PDEATHSIG).

    Args:
        parent_pid: The pid of the parent, taken before the fork.
        signal_number: The signal.

    Raises:
        ProcessLookupError: The parent ended before the setting took effect.
    """
    prctl(PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent_pid:
        raise ProcessLookupError(errno.ESRCH, "the parent process has ended")


def keep_capabilities(kept: Iterable[int], user: int = 0, *, keeps_groups: bool = False) -> None:
    """Drop all other capabilities, for this process and for programs that it executes (capabilities(7)).

    They cannot be regained by exec: they are removed from the bounding set (where that is permitted), the ambient and
    the inheritable set, and no_new_privs is set, without which root would get the whole bounding set at exec. Where
    none is kept, the user id 0 means nothing for capabilities any more, and that is locked (securebits).

    Args:
        kept: CAP_* numbers of those to keep; capabilities that this process does not have are ignored.
        user: User and group id to change to, with no other groups; 0 for none.
        keeps_groups: Keep the other groups.
    """
    mask = sum(1 << number for number in set(kept))
    for number in range(64):
        try:
            if prctl(PR_CAPBSET_READ, number) and not mask >> number & 1:
                prctl(PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EPERM:
                break  # without CAP_SETPCAP; no_new_privs suffices
            if error.errno != errno.EINVAL:  # EINVAL: the kernel has no capability with that number
                raise
            break
    prctl(PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if not mask:
        try:
            prctl(PR_SET_SECUREBITS, SECUREBITS)
        except OSError as error:
            if error.errno != errno.EPERM:  # as above
                raise
    if user:
        if not keeps_groups:
            os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    libc = c_library()
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (
        ctypes.c_uint32 * 6
    )()  # effective, permitted, inheritable: first the lower 32 bits, then the higher ones
    check(libc.capget(header, sets))
    for half in range(2):
        permitted = sets[3 * half + 1] & mask >> 32 * half & 0xFFFF_FFFF
        sets[3 * half], sets[3 * half + 1], sets[3 * half + 2] = permitted, permitted, 0
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    check(libc.capset(header, sets))


def write_all(fd: int, data: bytes) -> None:
    """Write all of *data*. When a disk becomes full, the first write is short and only the next one fails."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_existing(path: str, content: str) -> None:
    """Write to a file that is there, as those of /proc and of cgroups are: in one write(2), which the kernel acts on.

    Raises:
        OSError: It is not there, or the kernel refused; with the path.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def replace_file(
    path: str, data: bytes, *, mode: int = 0o600, owner: tuple[int, int] | None = None, fsync: bool = False
) -> None:
    """Replace a file atomically: a reader sees the old content or the new, even after a crash.

    The data is written to a file beside it, whose name ends in ``.tmp`` and which is then renamed. On an error the old
    file is unchanged.

    Args:
        path: The file; it need not exist.
        data: Its whole new content.
        mode: Its permission bits, regardless of the umask.
        owner: User and group id; None for this process's.
        fsync: Wait until the content is on the disk, so that it survives a power failure.

    Raises:
        OSError: It cannot be written, or the disk is full.
    """
    aside = f"{path}.{os.urandom(6).hex()}.tmp"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            if owner is not None:
                os.fchown(fd, *owner)
            if mode != 0o600:
                os.fchmod(fd, mode)
            write_all(fd, data)
            if fsync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(aside, path)
    except BaseException:
        try:
            os.unlink(aside)
        except OSError:
            pass
        raise


def overwrite_file(path: str, data: bytes) -> bool:
    """Overwrite a file in place, padded with spaces to its length, when the disk has no room for a second file.

    It is for JSON, to which spaces can be appended. A reader that uses `read_file` never sees a mixture of old and new
    content, but a crash of the host meanwhile may leave one.

    Args:
        path: The file.
        data: Its new content.

    Returns:
        False if the file does not exist, is shorter than *data*, or could not be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        size = os.fstat(fd).st_size
        if size < len(data):
            return False
        _lock(fd, exclusive=True)
        if os.pwrite(fd, data.ljust(size), 0) != size:
            return False
        os.fsync(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def read_file(path: str) -> bytes:
    """Read a file that is written by `replace_file` and `overwrite_file`; never a mixture of old and new content.

    Raises:
        OSError: It does not exist, or cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(fd, exclusive=False)
        pieces = []
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def _lock(fd: int, *, exclusive: bool) -> None:
    """Lock the file with flock(2) while it is open, or give up after a while: its holder may have been stopped."""
    import fcntl
    import time

    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    for _ in range(500):
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                return  # a file system without locks
            time.sleep(0.002)


class SocketName:
    """A short name for a unix socket whose path may be longer than `kata.paths.MAX_SOCKET_PATH`.

    The name goes through a descriptor of the directory. It is valid for bind(2) and connect(2) within the context.

    Raises:
        OSError: The directory does not exist.
    """

    __slots__ = ("_directory", "_path")

    def __init__(self, path: str) -> None:
        self._path = path
        self._directory = -1

    def __enter__(self) -> str:
        above, name = os.path.split(self._path)
        self._directory = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._directory}/{name}"

    def __exit__(self, *_error: object) -> None:
        os.close(self._directory)


def adopt_orphans(yes: bool) -> None:
    """Whether this process is the new parent of orphaned descendants (PR_SET_CHILD_SUBREAPER)."""
    prctl(PR_SET_CHILD_SUBREAPER, int(yes))


def reset_signals() -> None:
    """Restore the default dispositions of signals that Python ignores, since exec would pass that on (signal(7))."""
    for number in (13, 25):  # SIGPIPE, SIGXFSZ
        c_library().signal(number, None)


def close_on_exec_from(first: int) -> None:
    """Mark all descriptors from *first* on as close-on-exec (close_range(2); one by one before Linux 5.11)."""
    try:
        libc, u = c_library(), ctypes.c_uint
        number = ctypes.c_long(_NR_CLOSE_RANGE)
        check(libc.syscall(number, u(first), u(0xFFFF_FFFF), _CLOSE_RANGE_CLOEXEC))
    except OSError:
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd >= first:
                try:
                    os.set_inheritable(fd, False)
                except OSError:
                    pass  # that of the listing itself


def take_descriptors(fds: Sequence[int], kept: int = -1) -> None:
    """Have these descriptors as 0, 1, ... in this process, and no others but *kept*."""
    # Out of the way of the numbers they are to get.
    for number, fd in enumerate([dup_above(fd, len(fds)) for fd in fds]):
        os.dup2(fd, number)
    # Descriptors that a shell left open for our caller would be held as long as the sandbox lives.
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd >= len(fds) and fd != kept:
            try:
                os.close(fd)
            except OSError:
                pass  # that of the listing


def dup_above(fd: int, minimum: int) -> int:
    """The same open file by a descriptor of at least *minimum*, which is closed on exec."""
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, minimum)


def setns(fd: int, kind: int = 0) -> None:
    """setns(2): move this thread into the namespace behind `fd`; `kind` is a CLONE_NEW* or 0 for any."""
    check(c_library().setns(fd, kind))


def id_map(kind: str) -> list[tuple[int, int, int]]:
    """The ids of the user namespace that this process is in: for each range its first id inside, its first outside, and
    how many there are. Source: user_namespaces(7).

    Args:
        kind: ``uid`` or ``gid``.
    """
    found = []
    for line in read_file(f"/proc/self/{kind}_map").splitlines():
        inside, outside, count = map(int, line.split())
        found.append((inside, outside, count))
    return found


_foreign: bool | None = None


def in_user_namespace() -> bool:
    """Whether this process is in a user namespace other than the host's first one, where "root" is an ordinary user of
    the host (user_namespaces(7)): it makes no device nodes, and cannot go back into namespaces that are not its own.
    """
    global _foreign
    if _foreign is None:
        try:
            with open("/proc/self/uid_map", "rb") as file:
                _foreign = file.read().split() != [b"0", b"0", b"4294967295"]
        except FileNotFoundError:  # a kernel without them
            _foreign = False
    return _foreign


def unshare(flags: int) -> None:
    """unshare(2) with CLONE_NEW* flags."""
    check(c_library().unshare(flags))


def mount(
    source: str | None, target: str, fstype: str | None = None, flags: int = 0, data: str = ""
) -> None:
    """mount(2). Strings are passed to the kernel as they are; None is passed as a null pointer."""
    check(
        c_library().mount(
            None if source is None else os.fsencode(source),
            os.fsencode(target),
            None if fstype is None else fstype.encode(),
            ctypes.c_ulong(flags),
            os.fsencode(data) if data else None,
        ),
        target,
    )


def pivot_root(new_root: str) -> None:
    """Make a mount the root of this thread's mount namespace, and detach the old root (pivot_root(2), NOTES).

    In all processes of the namespace, a root or working directory that was the old root becomes the new one.
    """
    os.chdir(new_root)
    numbers = {"x86_64": 155, "aarch64": 41}
    number = numbers.get(os.uname().machine, 41)
    check(c_library().syscall(ctypes.c_long(number), b".", b"."), new_root)
    umount2(".", MNT_DETACH)


def umount2(target: str, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2)."""
    check(c_library().umount2(os.fsencode(target), flags), target)


def open_tree(path: str) -> int:
    """open_tree(2): copy the mount at a path and all mounts below it, detached. Returns a descriptor of the copy."""
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    return check(c_library().syscall(ctypes.c_long(_NR_OPEN_TREE), AT_FDCWD, os.fsencode(path), flags), path)


def move_mount(tree: int, target: str) -> None:
    """move_mount(2): attach a copy made by `open_tree`, possibly in another mount namespace."""
    libc, number = c_library(), ctypes.c_long(_NR_MOVE_MOUNT)
    check(libc.syscall(number, tree, b"", AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH), target)


def mount_setattr(target: str, attributes: int, *, recursive: bool) -> None:
    """mount_setattr(2): set attributes of a mount; its other attributes are unchanged.

    Args:
        target: Path of the mount; a symbolic link at its end is not followed.
        attributes: MOUNT_ATTR_* flags.
        recursive: Also set them for all mounts below it; on an error none is changed.

    Raises:
        OSError: ENOSYS before Linux 5.12.
    """
    libc = c_library()
    wanted = _u64s(attributes, 0, 0, 0)  # struct mount_attr
    flags = ctypes.c_uint(_AT_SYMLINK_NOFOLLOW | (_AT_RECURSIVE if recursive else 0))
    number, size = ctypes.c_long(_NR_MOUNT_SETATTR), ctypes.c_size_t(len(wanted))
    check(libc.syscall(number, AT_FDCWD, os.fsencode(target), flags, wanted, size), target)


def _u64s(*values: int) -> bytes:
    """A struct of 64-bit members."""
    return b"".join(value.to_bytes(8, sys.byteorder) for value in values)


def openat2(dirfd: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2).

    Args:
        dirfd: Descriptor of the directory at which the path starts.
        path: Relative path (or absolute below RESOLVE_IN_ROOT).
        flags: O_* flags; O_CLOEXEC is added.
        mode: Permission bits if the file is created, otherwise 0.
        resolve: RESOLVE_* flags.

    Returns:
        The new descriptor.
    """
    libc = c_library()
    how = _u64s(flags | os.O_CLOEXEC, mode, resolve)  # struct open_how
    number, size = ctypes.c_long(_NR_OPENAT2), ctypes.c_size_t(len(how))
    return check(libc.syscall(number, dirfd, os.fsencode(path), how, size), path)


_STATX_BTIME = 0x800


def disk_bytes(status: os.stat_result) -> int:
    """What a file takes on its disk, less than its size where it has holes: stat(2) counts 512 bytes, always."""
    return status.st_blocks * 512


def birth_ns(path: str) -> int:
    """When a file was made, in nanoseconds of the epoch (statx(2)); 0 where its file system does not say."""
    libc = c_library()
    found = ctypes.create_string_buffer(256)  # struct statx: stx_mask is at 0, stx_btime at 80
    check(libc.statx(AT_FDCWD, os.fsencode(path), _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, found), path)

    def member(at: int, size: int) -> int:
        return int.from_bytes(found.raw[at : at + size], sys.byteorder, signed=size == 8)

    return member(80, 8) * 10**9 + member(88, 4) if member(0, 4) & _STATX_BTIME else 0


# ---- processes ----


def pidfd_open(pid: int) -> int:
    """pidfd_open(2); ProcessLookupError when there is no such process."""
    return os.pidfd_open(pid)


def pidfd_send_signal(pidfd: int, signal_number: int) -> None:
    """pidfd_send_signal(2), without importing `signal` (and with it `enum`)."""
    import _signal  # type: ignore[import-not-found]

    _signal.pidfd_send_signal(pidfd, signal_number)


def process_mrelease(pidfd: int) -> None:
    """process_mrelease(2), Linux 5.15: have the memory of a process that was killed freed by this thread, beside the
    process's own end, which is the sooner for it. Blocks for as long as that takes: milliseconds for a hundred MB.
    """
    import ctypes

    syscall(_NR_PROCESS_MRELEASE, ctypes.c_int(pidfd), ctypes.c_uint(0))


def pidfd_wait(pidfd: int, timeout_s: float) -> bool:
    """Wait at most `timeout_s` seconds until the process has ended (or is a zombie). Returns whether it has."""
    return readable(pidfd, timeout_s)


def readable(fd: int, timeout_s: float) -> bool:
    """Wait at most `timeout_s` seconds until a read would not block, at the end of a pipe, too. Returns whether."""
    import select

    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0, int(timeout_s * 1000))))


EXEC_TIMEOUT_S = 60.0
"""How long a process that was forked may take until it executes its program, in seconds."""


def read_exec_status(fd: int) -> bytes:
    """Read what a process that was forked says before it executes its program, which closes its end.

    Raises:
        TimeoutError: It has not got so far in `EXEC_TIMEOUT_S`, as when somebody has stopped it.
    """
    if not readable(fd, EXEC_TIMEOUT_S):
        raise TimeoutError(errno.ETIMEDOUT, f"it was not executed within {EXEC_TIMEOUT_S:.0f} s")
    return os.read(fd, 64)


def proc_starttime(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc(5), stat field 22); None if it does not exist.

    Together with the boot id, this tells a process from a later one with the same pid. A zombie still exists: its pid
    is not reused.
    """
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        text = os.read(fd, 4096)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
    # The command name is in parentheses, and may itself contain spaces and parentheses.
    return int(text[text.rindex(b")") + 2 :].split()[19])


def set_command_line(pid: int, text: str) -> bytes:
    """Change the command line of a process that ps(1) and top(1) show (``/proc/PID/cmdline``).

    This overwrites the process's memory, so it must not need its arguments any more, and we must be allowed to trace
    it.

    Args:
        pid: The process.
        text: The new text; it is cut to the length of the arguments.

    Returns:
        The previous command line: its arguments, each with a terminating zero.

    Raises:
        OSError: The process has ended, or its memory may not be written.
    """
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        before = file.read()
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b") ")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end: 48 and 49 in proc(5)
    room = end - start - 2
    if room > 0:
        # If the last byte is not zero, the kernel shows a single string from the beginning (fs/proc/base.c).
        shown = text.encode()[:room]
        memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(memory, shown + bytes(end - start - 1 - len(shown)) + b"\1", start)
        finally:
            os.close(memory)
    return before


_boot_id = ""


def boot_id() -> str:
    """The kernel's random id of this boot (``/proc/sys/kernel/random/boot_id``), 36 characters."""
    global _boot_id
    if not _boot_id:
        fd = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _boot_id = os.read(fd, 64).decode("ascii").strip()
        finally:
            os.close(fd)
    return _boot_id


def process_alive(pid: int, starttime: int, boot: str) -> bool:
    """Whether the process with this pid, start time and boot id is still running (a zombie is not)."""
    if boot != boot_id() or proc_starttime(pid) != starttime:
        return False
    try:
        pidfd = pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Check the start time again, now that the descriptor holds on to the process.
        return proc_starttime(pid) == starttime and not pidfd_wait(pidfd, 0)
    finally:
        os.close(pidfd)


def namespace_inode(kind: str, pid: int | str = "self") -> int:
    """Inode of a namespace of a process; `kind` is a name in ``/proc/PID/ns`` (mnt, net, ...)."""
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


def address_of(buffer: object) -> int:
    """Address of a writable buffer (an `mmap.mmap`); the buffer must be kept alive, and cannot be closed
    while the process lives.
    """
    c_library()
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))  # type: ignore[arg-type]


def clock_change_timer() -> int:
    """timerfd_create(2): a descriptor that is readable once the system's clock has been set, or the system has slept.

    A read then fails with ECANCELED, and it waits for the next time. Returns the descriptor.
    """
    wall_clock, absolute, cancel_on_set, far_s = 0, 1, 2, 1 << 40
    fd = check(c_library().timerfd_create(wall_clock, os.O_CLOEXEC | os.O_NONBLOCK))
    when = _u64s(0, 0, far_s, 0)  # struct itimerspec: it_interval, it_value
    try:
        check(c_library().timerfd_settime(fd, absolute | cancel_on_set, when, None))
    except OSError:
        os.close(fd)
        raise
    return fd
