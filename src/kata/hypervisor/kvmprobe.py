"""Whether ``/dev/kvm`` really runs a 64-bit guest: not whether it opens.

There are machines (some nested clouds, some sandboxes) whose KVM opens, creates virtual machines and then
hangs, aborts, or emulates the guest's kernel one instruction at a time (a page-table-only KVM whose guest
has to know about it), so that an ordinary kernel never seems to get anywhere. So a tiny guest is run: it
starts in real mode, as a machine's firmware does, builds its way into 64-bit long mode itself, counts to
thirty thousand a few times (ten microseconds each on a processor, tens of milliseconds in such an emulation; of
processor time, and the best one counts, so that a loaded host does not matter), calculates with 64-bit numbers,
writes memory through its page tables, says so on an I/O port and halts. It runs in a child process under a
deadline, because a guest that hangs must not hang us.

The answer is kept for this boot, kernel and device in ``$KATA_RUN_DIR/kvm-probe``: a start pays a file read.
Source: the kernel's ``Documentation/virt/kvm/api.rst``; layouts from ``asm/kvm.h`` for x86-64.
"""

from __future__ import annotations

import os

from kata import host_cache, paths, sysio

DEVICE = "/dev/kvm"
WORKS = "works"
OPENS_ONLY = "opens only"
NO_PERMISSION = "no permission"
ABSENT = "absent"

DEADLINE_S = 5.0
SLOW_S = 0.010
"""Processor time for one count that no processor needs."""
_COUNT, _ROUNDS, _PATIENCE = 30_000, 8, 4
_EMULATED = "emulated"

_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_GET_VCPU_MMAP_SIZE = 0xAE04
_KVM_CREATE_VCPU = 0xAE41
_KVM_SET_USER_MEMORY_REGION = 0x4020AE46
_KVM_SET_TSS_ADDR = 0xAE47
_KVM_SET_IDENTITY_MAP_ADDR = 0x4008AE48
_KVM_GET_SUPPORTED_CPUID = 0xC008AE05
_KVM_SET_CPUID2 = 0x4008AE90
_KVM_RUN = 0xAE80
_KVM_GET_REGS = 0x8090AE81
_KVM_SET_REGS = 0x4090AE82
_KVM_GET_SREGS = 0x8138AE83
_KVM_SET_SREGS = 0x4138AE84

_EXIT_IO = 2
_EXIT_HLT = 5
_EXITS = {
    0: "unknown",
    6: "an access outside memory",
    8: "a triple fault",
    9: "a refused entry",
    17: "an internal error",
}

_CODE, _GDT, _PML4, _PDPT, _PD, _RESULT, _MEMORY = 0x1000, 0x1800, 0x2000, 0x3000, 0x4000, 0x5000, 0x200000
_PORT = 0x3F8
_SEED = 0x123456789ABCDEF0
_EXPECTED = (_SEED * 3) & 0xFFFFFFFFFFFFFFFF


class ProbeResult:
    """What was found.

    Args:
        state: `WORKS`, `OPENS_ONLY`, `NO_PERMISSION` or `ABSENT`.
        reason: Why, in words for a user.
        hint: What mends it, or empty.
    """

    __slots__ = ("hint", "reason", "state")

    def __init__(self, state: str, reason: str, hint: str = "") -> None:
        self.state = state
        self.reason = reason
        self.hint = hint

    @property
    def works(self) -> bool:
        """Whether a machine may be started with KVM."""
        return self.state == WORKS

    def __repr__(self) -> str:
        return f"<ProbeResult {self.state}: {self.reason}>"


def probe(use_cache: bool = True) -> ProbeResult:
    """The verdict on this host's KVM.

    Args:
        use_cache: Take the answer of an earlier probe of the same boot, kernel and device.
    """
    try:
        status = os.stat(DEVICE)
    except OSError:
        return ProbeResult(
            ABSENT,
            f"there is no {DEVICE}: no hardware virtualisation here, or its module is not loaded",
            "modprobe kvm_intel (or kvm_amd); in a cloud or a VM, enable nested virtualisation",
        )
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return ProbeResult(
            NO_PERMISSION, f"{DEVICE} may not be opened by this user", "Run as root, or join the group kvm."
        )
    if os.uname().machine != "x86_64":
        return ProbeResult(OPENS_ONLY, f"only x86-64 hosts are supported, this is {os.uname().machine}")
    key = f"1 {sysio.boot_id()} {os.uname().release} {status.st_rdev} {status.st_ino}"
    path = os.path.join(paths.run_dir(), "kvm-probe")
    cached = host_cache.read(path, key) if use_cache else []
    if len(cached) == 3 and cached[0] in (WORKS, OPENS_ONLY):
        return ProbeResult(*cached)
    verdict = _run_probe(DEADLINE_S)
    host_cache.write(path, key, verdict.state, verdict.reason, verdict.hint)
    return verdict


_NESTED_HINT = (
    "If this is itself a virtual machine, have nested virtualisation enabled; software emulation is used."
)


def _run_probe(deadline_s: float) -> ProbeResult:
    sysio.preload()
    read_end, write_end = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            sysio.die_with_parent(parent)
            try:
                word = _guest()
            except OSError as error:
                word = f"failed {error.strerror or error}"
            except Exception as error:
                word = f"failed {error!r}"  # a bug of ours must not look like a silent machine
            os.write(write_end, word.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    pidfd = sysio.pidfd_open(pid)
    try:
        finished = sysio.pidfd_wait(pidfd, deadline_s)
        if not finished:
            sysio.pidfd_send_signal(pidfd, sysio.SIGKILL)
            # A processor that is stuck in the kernel may not even be killable: it is left behind, then.
            if sysio.pidfd_wait(pidfd, 1.0):
                os.waitpid(pid, 0)
            return ProbeResult(
                OPENS_ONLY,
                f"{DEVICE} opens, but a 64-bit guest hangs (stopped after {deadline_s:g} s)",
                _NESTED_HINT,
            )
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        word = os.read(read_end, 4096).decode()
    finally:
        os.close(pidfd)
        os.close(read_end)
    if word == "ok":
        return ProbeResult(WORKS, "KVM runs a 64-bit guest")
    if word == _EMULATED:
        pvm = " (the module kvm_pvm)" if os.path.exists("/sys/module/kvm_pvm") else ""
        return ProbeResult(
            OPENS_ONLY,
            f"{DEVICE} opens, but cannot run a 64-bit guest: this KVM{pvm} emulates its kernel one "
            "instruction at a time",
            _NESTED_HINT,
        )
    reason = word.removeprefix("failed ") or f"the probe ended with status {status}"
    return ProbeResult(OPENS_ONLY, f"{DEVICE} opens, but cannot run a 64-bit guest: {reason}", _NESTED_HINT)


def _program() -> bytes:
    """The guest's code for address 0x1000: sixteen-bit at first, sixty-four-bit at its end."""
    le4 = _u32
    start = b"".join(
        (
            b"\xfa",  # cli
            b"\x0f\x01\x16" + _GDT.to_bytes(2, "little"),  # lgdt [gdt]
            b"\x0f\x20\xe0\x66\x83\xc8\x20\x0f\x22\xe0",  # cr4 |= PAE
            b"\x66\xb8" + le4(_PML4) + b"\x0f\x22\xd8",  # cr3 = pml4
            b"\x66\xb9" + le4(0xC0000080) + b"\x0f\x32",  # rdmsr EFER
            b"\x66\x0d" + le4(0x100) + b"\x0f\x30",  # EFER |= LME; wrmsr
            b"\x0f\x20\xc0\x66\x0d" + le4(0x80000001) + b"\x0f\x22\xc0",  # cr0 |= PG | PE
        )
    )
    jump_length = 8
    long_mode = _CODE + len(start) + jump_length
    jump = b"\x66\xea" + le4(long_mode) + b"\x08\x00"  # jmp 08:long_mode
    body = b"".join(
        (
            b"\x66\xb8\x10\x00\x8e\xd8\x8e\xd0\x8e\xc0",  # ds = ss = es = 0x10
            b"\x48\xbb" + _SEED.to_bytes(8, "little"),  # rbx = seed
            b"\x41\xb9" + le4(_ROUNDS),  # r9 = rounds
            b"\xb9" + le4(_COUNT) + b"\xff\xc9\x75\xfc",  # ecx = count; do --ecx while not zero
            b"\x66\xba" + _PORT.to_bytes(2, "little") + b"\xb0\x54\xee",  # out 0x3f8, 'T'
            b"\x41\xff\xc9\x75\xeb",  # if --r9 is not zero: count again
            b"\x4c\x8d\x04\x5b",  # r8 = rbx + rbx * 2
            b"\x4c\x89\x04\x25" + le4(_RESULT),  # [result] = r8
            b"\xb9" + le4(0xC0000080) + b"\x0f\x32",  # rdmsr EFER
            b"\x89\x04\x25" + le4(_RESULT + 8),  # [result + 8] = eax
            b"\x66\xba" + _PORT.to_bytes(2, "little") + b"\xb0\x4b\xee",  # out 0x3f8, 'K'
            b"\xf4",  # hlt
        )
    )
    return start + jump + body


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _guest() -> str:  # noqa: PLR0915
    """Run the guest; in the child. Returns ``"ok"``, `_EMULATED` or ``"failed <why>"``."""
    import mmap
    import struct
    import time
    from fcntl import ioctl

    kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    version = ioctl(kvm, _KVM_GET_API_VERSION, 0)
    if version != 12:
        return f"failed its interface has version {version}, not 12"
    vm = ioctl(kvm, _KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, _MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[_PML4 : _PML4 + 8] = (_PDPT | 3).to_bytes(8, "little")
    memory[_PDPT : _PDPT + 8] = (_PD | 3).to_bytes(8, "little")
    memory[_PD : _PD + 8] = (0x83).to_bytes(8, "little")  # one page of 2 MiB, present, writable
    # Descriptor: limit, base; then null, 64-bit code, data.
    table = struct.pack("<QQQ", 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF)
    memory[_GDT : _GDT + 6] = struct.pack("<HI", len(table) - 1, _GDT + 8)
    memory[_GDT + 8 : _GDT + 8 + len(table)] = table
    program = _program()
    memory[_CODE : _CODE + len(program)] = program
    try:
        # Intel's processors want room for these two when they run real mode.
        ioctl(vm, _KVM_SET_IDENTITY_MAP_ADDR, struct.pack("<Q", 0x7FFBC000))
        ioctl(vm, _KVM_SET_TSS_ADDR, 0x7FFBD000)
    except OSError:
        pass  # AMD's do not
    region = struct.pack("<IIQQQ", 0, 0, 0, _MEMORY, sysio.address_of(memory))
    ioctl(vm, _KVM_SET_USER_MEMORY_REGION, region)
    vcpu = ioctl(vm, _KVM_CREATE_VCPU, 0)
    # A guest's processor has long mode only if its CPUID says so.
    cpuid = bytearray(struct.pack("<II", 256, 0) + bytes(256 * 40))
    ioctl(kvm, _KVM_GET_SUPPORTED_CPUID, cpuid)
    ioctl(vcpu, _KVM_SET_CPUID2, cpuid)
    run = mmap.mmap(vcpu, ioctl(kvm, _KVM_GET_VCPU_MMAP_SIZE, 0))
    sregs = bytearray(312)
    ioctl(vcpu, _KVM_GET_SREGS, sregs)
    struct.pack_into("<Q", sregs, 0, 0)  # cs.base
    struct.pack_into("<H", sregs, 12, 0)  # cs.selector
    ioctl(vcpu, _KVM_SET_SREGS, sregs)
    ioctl(vcpu, _KVM_SET_REGS, struct.pack("<18Q", *([0] * 16), _CODE, 2))
    output, ticks = b"", []
    last = time.process_time()
    while True:
        try:
            ioctl(vcpu, _KVM_RUN, 0)
        except InterruptedError:
            continue
        reason = struct.unpack_from("<I", run, 8)[0]
        if reason == _EXIT_IO:
            direction, size, port, count, offset = struct.unpack_from("<BBHIQ", run, 32)
            if (direction, size, port, count) != (1, 1, _PORT, 1) or output:
                return "failed the guest used a wrong I/O port"
            output = run[offset : offset + 1]
            if output == b"T":
                output = b""
                now = time.process_time()
                ticks.append(now - last)
                last = now
                if len(ticks) == _PATIENCE and min(ticks) > SLOW_S:
                    return _EMULATED
        elif reason == _EXIT_HLT:
            break
        else:
            return f"failed it ended with {_EXITS.get(reason, f'exit reason {reason}')}"
    regs = struct.unpack("<18Q", ioctl(vcpu, _KVM_GET_REGS, bytes(144)))
    result, efer = struct.unpack_from("<QI", memory, _RESULT)
    if output != b"K" or regs[8] != _EXPECTED or result != _EXPECTED:
        return "failed it calculated a wrong result"
    if not efer & 0x400:
        return "failed it did not reach long mode"
    return "ok"
