"""The default seccomp profile.

The sandbox has a kernel of its own, so this filter does not protect the host. It protects the agent from the container,
and keeps programs in the container away from kernel interfaces that ordinary programs do not use. It is an allow-list:
system calls newer than this file are refused. Calls are grouped by purpose; those that need a capability are allowed
only with that capability.

A refused call fails with EPERM, as with Docker. Without CAP_SYS_ADMIN, ``clone3`` fails with ENOSYS, so that libc falls
back to ``clone``: a filter cannot read the flags of ``clone3``, which are in memory.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FILES = """
access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2
fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64
fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync
ftruncate ftruncate64 futimesat getcwd getdents getdents64 getxattr getxattrat inotify_add_watch inotify_init
inotify_init1 inotify_rm_watch ioctl lchown lchown32 lgetxattr link linkat listxattr listxattrat llistxattr
_llseek lremovexattr lseek lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat
open openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv
removexattr removexattrat rename renameat renameat2 rmdir sendfile sendfile64 setxattr setxattrat splice stat
stat64 statfs statfs64 statx symlink symlinkat sync sync_file_range syncfs tee truncate truncate64 umask
unlink unlinkat utime utimensat utimensat_time64 utimes vmsplice write writev fanotify_mark cachestat
landlock_add_rule landlock_create_ruleset landlock_restrict_self
"""

_MEMORY = """
brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2
mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease
remap_file_pages
"""

_PROCESSES = """
alarm arch_prctl capget capset execve execveat exit exit_group fork futex futex_requeue futex_time64
futex_wait futex_waitv futex_wake get_robust_list get_thread_area getcpu getegid getegid32 geteuid geteuid32
getgid getgid32 getgroups getgroups32 getpgid getpgrp getpid getppid getpriority getresgid getresgid32
getresuid getresuid32 getrlimit getrusage getsid gettid getuid getuid32 ioprio_get ioprio_set kill modify_ldt
nanosleep pause pidfd_open pidfd_send_signal prctl prlimit64 ptrace process_vm_readv process_vm_writev
restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield
seccomp set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid
setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32
setresuid setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32 sigaltstack sigprocmask sigreturn
tgkill time times tkill ugetrlimit uretprobe vfork wait4 waitid waitpid getitimer
"""

_TIME = """
adjtimex clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
clock_nanosleep clock_nanosleep_time64 gettimeofday timer_create timer_delete timer_getoverrun timer_gettime
timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime
timerfd_settime64
"""

_WAITING = """
epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
eventfd2 io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit _newselect
poll ppoll ppoll_time64 pselect6 pselect6_time64 select signal signalfd signalfd4
"""

_SOCKETS_AND_IPC = """
accept accept4 bind connect getpeername getsockname getsockopt ipc listen mq_getsetattr mq_notify mq_open
mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd
pipe pipe2 recv recvfrom recvmmsg recvmmsg_time64 recvmsg semctl semget semop semtimedop semtimedop_time64
send sendmmsg sendmsg sendto setsockopt shmat shmctl shmdt shmget shutdown socketcall socketpair
"""

_SYSTEM = "getrandom sysinfo uname"

_BY_CAPABILITY = {
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_SYS_ADMIN": (
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick listmount lookup_dcookie mount"
        " mount_setattr move_mount open_tree open_tree_attr perf_event_open pivot_root quotactl quotactl_fd"
        " setdomainname sethostname setns statmount swapoff swapon syslog umount umount2 unshare"
    ),
    "CAP_SYS_BOOT": "kexec_file_load kexec_load reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYS_NICE": ("get_mempolicy mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node"),
    "CAP_SYSLOG": "syslog",
    "CAP_BPF": "bpf",
    "CAP_PERFMON": "perf_event_open",
}

_NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEW{CGROUP,UTS,IPC,USER,PID,NET} and CLONE_NEWNS: the clone flags that make a namespace."""

_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""PER_LINUX, PER_LINUX32, both with UNAME26, and the query for the current one."""

_AF_VSOCK = 40
_AF_MAX = 46
"""Source: Linux's include/linux/socket.h, since 5.15."""
_EPERM = 1
_ENOSYS = 38


def _allow(names: list[str], *args: dict[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ALLOW"}
    if args:
        rule["args"] = list(args)
    return rule


def default_profile(capabilities: list[str]) -> dict[str, Any]:
    """The filter for a container that holds *capabilities*.

    Args:
        capabilities: Kernel names of the container's bounding set.

    Returns:
        ``linux.seccomp`` of the runtime spec.
    """
    held = set(capabilities)
    names = " ".join((_FILES, _MEMORY, _PROCESSES, _TIME, _WAITING, _SOCKETS_AND_IPC, _SYSTEM)).split()
    for capability, calls in _BY_CAPABILITY.items():
        if capability in held:
            names.extend(calls.split())
    rules = [_allow(sorted(set(names)))]
    rules += [
        _allow(["personality"], {"index": 0, "value": value, "op": "SCMP_CMP_EQ"})
        for value in _PERSONALITIES
    ]
    # The agent listens on vsock, which a container must not reach (vsock loopback included). "Not equal" and "greater"
    # would not do: the filter compares 64 bits but the kernel uses 32, so 1 << 32 | AF_VSOCK would pass. Nor would two
    # conditions on one argument in one rule: runtimes take these for alternatives.
    rules.append(_allow(["socket"], {"index": 0, "value": _AF_VSOCK, "op": "SCMP_CMP_LT"}))
    rules += [
        _allow(["socket"], {"index": 0, "value": family, "op": "SCMP_CMP_EQ"})
        for family in range(_AF_VSOCK + 1, _AF_MAX)
    ]
    if "CAP_SYS_ADMIN" not in held:
        rules.append(
            _allow(
                ["clone"],
                {"index": 0, "value": _NAMESPACE_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"},
            )
        )
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _EPERM,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    }
