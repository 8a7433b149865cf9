"""OOM scores: when the host runs out of memory, the machine is killed first, and not the engine, which reports it.

An engine is as protected as containerd's own shims. The hypervisor and its helpers have the highest score of the
containers in the machine; by these scores Kubernetes defines which pods are killed first.

Source: proc(5), ``/proc/pid/oom_score_adj``; lowering needs CAP_SYS_RESOURCE.
"""

from __future__ import annotations

import os

ENGINE = -998
_MOST = 1000


def protect_engine() -> bool:
    """Lower this process's score, unless it is as low already. Returns whether it is now."""
    try:
        return _get(os.getpid()) <= ENGINE or _set(os.getpid(), ENGINE)
    except OSError:
        return False


def set_machine(score: int) -> bool:
    """Set the score of all children of this process: hypervisor and helpers.

    Args:
        score: The score. It is clamped to the valid range, and kept above this process's own score.

    Returns:
        Whether all children have it.
    """
    me = os.getpid()
    try:
        # If our own score could not be lowered, theirs is raised.
        score = min(_MOST, max(score, min(_get(me), _MOST) + 1))
        with open(f"/proc/{me}/task/{me}/children", encoding="ascii") as file:
            children = [int(word) for word in file.read().split()]
    except OSError:
        return False
    done = [_set(pid, score) for pid in children]
    return all(done)


def _get(pid: int) -> int:
    with open(f"/proc/{pid}/oom_score_adj", encoding="ascii") as file:
        return int(file.read())


def _set(pid: int, score: int) -> bool:
    try:
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # it has ended
    try:
        os.write(fd, str(score).encode())
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
