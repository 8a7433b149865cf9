"""How QEMU gets a file as the guest's memory that it must not be able to write: that of a template.

Many machines map one file, each a private copy of what it changes. For that a file that is open for reading is enough
(mmap(2), MAP_PRIVATE), but QEMU insists on opening it for writing by its name (``file_ram_open`` in its
``softmmu/physmem.c``; ``rom=off`` spares that from 8.2 on, and the return of memory with it). One that was taken over
could then write what all others see. So its call of open(2) is answered by us, with the descriptor that it is to have:
a seccomp filter hands just this call over (``SECCOMP_RET_USER_NOTIF``), and a thread of ours waits for it.

The guest gives memory back (`kata.hypervisor.base.MachineShape.reclaim`), which QEMU does by punching a hole into that
file first, and giving up where that fails (``ram_block_discard_range``). The same filter says that it worked. What the
guest sees in such a page afterwards is what the template had in it: for a page that was free, that is as good.

Sources: the kernel's ``Documentation/userspace-api/seccomp_filter.rst`` ("Userspace Notification"),
``linux/seccomp.h``.
"""

from __future__ import annotations

import _socket
import _thread
import errno
import fcntl
import os
import select

from kata import seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.sysio import Fd

NUMBER = 1000
"""The descriptor that QEMU gets, by which the filter knows it; below `kata.confinement.MOST_FILES`."""
PATIENCE_MS = 30_000
_RECEIVE, _SEND, _ADD_FD = 0xC050_2100, 0xC018_2101, 0x4018_2103
_CONTINUE, _AT_NUMBER, _AND_ANSWER = 1, 1, 2
_NOTICE_BYTES, _PATH_AT = 80, 40
"""Of struct seccomp_notif: its size, and where the call's second argument is in it."""
_LONGEST_PATH = 64


def _code() -> bytes:
    """The filter: open(2) with exactly ``O_RDWR``, as QEMU opens memory and nothing else, and fallocate(2) of it."""
    code = seccomp.Code()
    code.load(seccomp.ARCH)
    code.step(seccomp.EQUAL, seccomp.AUDIT_ARCH_X86_64, 0, 8)
    code.load(seccomp.NUMBER)
    code.step(seccomp.EQUAL, seccomp.OPENAT, 0, 3)
    code.load(seccomp.ARGUMENTS + 8 * 2)
    code.step(seccomp.EQUAL, os.O_RDWR, 0, 4)
    code.answer(seccomp.NOTIFY)
    code.step(seccomp.EQUAL, seccomp.FALLOCATE, 0, 2)
    code.load(seccomp.ARGUMENTS)
    code.step(seccomp.EQUAL, NUMBER, 1, 0)
    code.answer(seccomp.ALLOW)
    code.answer(seccomp.SUCCEED)
    return bytes(code.code)


class Handover:
    """Gives one QEMU its memory.

    Args:
        memory: The file, open for reading; a copy of this descriptor is kept until QEMU has it.
        path: The name by which QEMU opens it.
    """

    __slots__ = ("_memory", "_ours", "_path", "_theirs")

    def __init__(self, memory: Fd, path: str) -> None:
        self._memory = os.dup(memory.raw)
        self._path = os.fsencode(path)
        self._ours, self._theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_DGRAM)

    def install(self) -> None:
        """In the child, after its last filter of another kind: have its opening of the memory handed over.

        Raises:
            OSError: The kernel refused.
        """
        listener = seccomp.install_with_listener(_code())
        self._theirs.sendmsg(
            [b"x"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, listener.to_bytes(4, "little"))]
        )

    def serve(self) -> None:
        """In the parent, once the child has executed QEMU: answer it, in a thread that ends with that.

        Raises:
            OSError: No descriptor or no thread can be had.
        """
        self._ours.setblocking(False)
        _, messages, _, _ = self._ours.recvmsg(1, _socket.CMSG_SPACE(4))
        if not messages:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        listener = int.from_bytes(messages[0][2][:4], "little")
        os.set_inheritable(listener, False)
        try:
            _thread.start_new_thread(_answer, (listener, self._memory, self._path))
        except RuntimeError as error:
            os.close(listener)
            raise OSError(errno.EAGAIN, "no thread can be started") from error
        self._memory = -1

    def close(self) -> None:
        """Close what is left. Idempotent."""
        self._ours.close()
        self._theirs.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


def _answer(listener: int, memory: int, path: bytes) -> None:
    try:
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        # It is told by a hang-up when QEMU has ended.
        while any(events & select.POLLIN for _, events in poller.poll(PATIENCE_MS)):
            notice = bytearray(_NOTICE_BYTES)
            fcntl.ioctl(listener, _RECEIVE, notice, True)
            identity = bytes(notice[:8])
            if _opens(notice, path):
                answer = _words(_AT_NUMBER | _AND_ANSWER, memory, NUMBER, os.O_CLOEXEC)
                fcntl.ioctl(listener, _ADD_FD, identity + answer)
                return
            fcntl.ioctl(listener, _SEND, identity + bytes(12) + _words(_CONTINUE))
    except OSError:
        pass  # QEMU has ended, and says why
    finally:
        # From here on whatever it opens in this way fails (ENOSYS).
        os.close(listener)
        os.close(memory)


def _words(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "little") for value in values)


def _opens(notice: bytes | bytearray, path: bytes) -> bool:
    """Whether this call opens the memory. What is read here may change: who gets the memory for it is harmed alone."""
    pid = int.from_bytes(notice[8:12], "little")
    address = int.from_bytes(notice[_PATH_AT : _PATH_AT + 8], "little")
    try:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, _LONGEST_PATH, address).partition(b"\0")[0] == path
        finally:
            os.close(fd)
    except OSError:
        return True  # where no process may read another
