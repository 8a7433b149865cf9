"""Filters of system calls (seccomp) for the programs of a sandbox: which calls fail, and how the kernel is told.

A filter is a program in the kernel's older BPF, which sees a call's number and arguments, but nothing that these point
to. `kata.confinement` says who gets which. Those that hand a call over to us are made of the same instructions.

Imported before the hypervisor is started. Sources: the kernel's ``Documentation/userspace-api/seccomp_filter.rst``,
``linux/seccomp.h``, ``linux/filter.h``, ``arch/x86/entry/syscalls/syscall_64.tbl``.
"""

from __future__ import annotations

import ctypes
import os

from kata import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

ALWAYS = (
    *(101, 310, 311, 312, 438, 440),  # ptrace, process_vm_readv, _writev, kcmp, pidfd_getfd, process_madvise
    *(174, 175, 176, 313),  # create_module, init_module, delete_module, finit_module
    *(177, 178),  # get_kernel_syms, query_module
    *(246, 320, 169),  # kexec_load, kexec_file_load, reboot
    *(298, 321, 323),  # perf_event_open, bpf, userfaultfd
    *(248, 249, 250),  # add_key, request_key, keyctl
    *(425, 426, 427),  # io_uring_setup, _enter, _register
    *(134, 136, 139, 154),  # uselib, ustat, sysfs, modify_ldt
    *(156, 180, 212),  # _sysctl, nfsservctl, lookup_dcookie
    *(153, 163, 167, 168),  # vhangup, acct, swapon, swapoff
    *(172, 173, 179, 443),  # iopl, ioperm, quotactl, quotactl_fd
    *(159, 164, 227, 305),  # adjtimex, settimeofday, clock_settime, clock_adjtime
    *(103, 135, 256, 279),  # syslog, personality, migrate_pages, move_pages
    *(300, 301),  # fanotify_init, fanotify_mark
    *(430, 431, 432, 433),  # fsopen, fsconfig, fsmount, fspick
    *(442, 457, 458, 467),  # mount_setattr, statmount, listmount, open_tree_attr
)
"""System calls that no program of a sandbox needs, by their numbers on x86-64."""
SETTING_UP = (
    *(155, 161, 165, 166),  # pivot_root, chroot, mount, umount2
    *(272, 308, 428, 429),  # unshare, setns, open_tree, move_mount
    *(105, 106, 113, 114, 116, 117, 119, 122, 123),  # setuid and its kind
    *(126, 170, 171),  # capset, sethostname, setdomainname
)
"""Those by which virtiofsd and passt confine themselves; a monitor needs none."""
BY_HANDLE = (303, 304)  # name_to_handle_at, open_by_handle_at
NODES = (133, 259)  # mknod, mknodat
SOCKETS = (41, 42, 49)  # socket, connect, bind; a monitor listens on one that it is given
EXECVE = 59
OPENAT, FALLOCATE = 257, 285
_EXECVEAT, _FORK, _VFORK, _CLONE, _CLONE3, _IOCTL, _SOCKET, _SECCOMP = 322, 57, 58, 56, 435, 16, 41, 317
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_CLONE_THREAD = 0x1_0000
_AF_UNIX = 1

ALLOW, NOTIFY, SUCCEED = 0x7FFF_0000, 0x7FC0_0000, 0x0005_0000
"""Answers: the call is made; the process that listens is asked; it has worked, although it is not made."""
_KILL, _EPERM, _ENOSYS = 0x8000_0000, 0x0005_0001, 0x0005_0026
NUMBER, ARCH, ARGUMENTS = 0, 4, 16
"""Where struct seccomp_data has what: the arguments are eight bytes each, the lower half first."""
_LOAD, EQUAL, _ABOVE, _SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
AUDIT_ARCH_X86_64 = 0xC000_003E
_X32 = 0x4000_0000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8


class Code:
    """The instructions of a filter (struct sock_filter), eight bytes each.

    Attributes:
        code: Those so far.
    """

    __slots__ = ("code",)

    def __init__(self) -> None:
        self.code = bytearray()

    def step(self, code: int, value: int, true: int = 0, false: int = 0) -> None:
        """Compare what was loaded.

        Args:
            code: How: `EQUAL` and the like.
            value: With what.
            true: How many of the next instructions are skipped if so.
            false: And if not.
        """
        self.code += code.to_bytes(2, "little") + bytes((true, false)) + value.to_bytes(4, "little")

    def load(self, offset: int) -> None:
        """Load 32 bits of struct seccomp_data."""
        self.step(_LOAD, offset)

    def answer(self, what: int) -> None:
        """Have this call end in one of the answers, `ALLOW` and the like."""
        self.step(_RETURN, what)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _program(code: bytes) -> tuple[_Program, object]:
    """struct sock_fprog, and what has to be kept as long as that is used."""
    buffer = ctypes.create_string_buffer(code, len(code))
    return _Program(len(code) // 8, ctypes.addressof(buffer)), buffer


def install(code: bytes) -> None:
    """Put this thread, and what it starts, below a filter. no_new_privs is set.

    Raises:
        OSError: The kernel refused.
    """
    program, _kept = _program(code)
    sysio.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(program))


def install_with_listener(code: bytes) -> int:
    """The same with a filter that answers `NOTIFY`. Returns the descriptor by which such calls are answered.

    Raises:
        OSError: The kernel refused.
    """
    program, _kept = _program(code)
    mode, flags = ctypes.c_ulong(_SET_MODE_FILTER), ctypes.c_ulong(_NEW_LISTENER)
    return sysio.syscall(_SECCOMP, mode, flags, ctypes.byref(program))


def filter_code(
    denied: Iterable[int], *, secret: int = 0, threads_only: bool = False, unix_only: bool = False
) -> bytes:
    """A seccomp filter: these system calls fail with EPERM, those of 32-bit programs end the process.

    clone3(2), whose flags a filter does not see, is said not to exist: the C library does with clone(2) then.

    Args:
        denied: Numbers of system calls.
        secret: execve(2) is allowed with this as its fifth argument alone, which it has not: once for us, and never
            for the program, to which nobody tells it. 0 does not restrict it.
        threads_only: It may make threads, and neither processes nor namespaces.
        unix_only: Sockets of its own may be unix sockets only.

    Returns:
        Instructions (struct sock_filter); nothing on another architecture than x86-64.
    """
    if os.uname().machine != "x86_64":
        return b""
    out = Code()
    out.load(ARCH)
    out.step(EQUAL, AUDIT_ARCH_X86_64, 1, 0)
    out.answer(_KILL)
    out.load(NUMBER)
    out.step(_ABOVE, _X32, 0, 1)
    out.answer(_KILL)
    # First what is frequent: KVM_RUN is an ioctl(2), and one that is looked at is not in the kernel's own table.
    out.step(EQUAL, _IOCTL, 0, 5)
    out.load(ARGUMENTS + 8)
    out.step(EQUAL, _TIOCSTI, 1, 0)
    out.step(EQUAL, _TIOCLINUX, 0, 1)
    out.answer(_EPERM)
    out.answer(ALLOW)
    out.step(EQUAL, _CLONE3, 0, 1)
    out.answer(_ENOSYS)
    namespaces = (
        sysio.CLONE_NEWNS
        | sysio.CLONE_NEWCGROUP
        | sysio.CLONE_NEWUTS
        | sysio.CLONE_NEWIPC
        | sysio.CLONE_NEWUSER
        | sysio.CLONE_NEWPID
        | sysio.CLONE_NEWNET
    )
    if threads_only:
        out.step(EQUAL, _CLONE, 0, 5)
        out.load(ARGUMENTS)
        out.step(_SET, namespaces, 1, 0)
        out.step(_SET, _CLONE_THREAD, 1, 0)
        out.answer(_EPERM)
        out.answer(ALLOW)
    if secret:
        out.step(EQUAL, EXECVE, 0, 6)
        for half in range(2):
            out.load(ARGUMENTS + 32 + 4 * half)
            # To the refusal behind the second half, or on.
            out.step(EQUAL, secret >> 32 * half & 0xFFFF_FFFF, 0, 3 - 2 * half)
        out.answer(ALLOW)
        out.answer(_EPERM)
    if unix_only:
        out.step(EQUAL, _SOCKET, 0, 4)
        out.load(ARGUMENTS)
        out.step(EQUAL, _AF_UNIX, 0, 1)
        out.answer(ALLOW)
        out.answer(_EPERM)
    more = {_FORK, _VFORK} if threads_only else set()
    if secret:
        more.add(_EXECVEAT)
    numbers = sorted({*denied, *more})
    for index, number in enumerate(numbers):
        out.step(EQUAL, number, len(numbers) - index, 0)
    out.answer(ALLOW)
    out.answer(_EPERM)
    return bytes(out.code)
