"""When an engine that serves nothing ends: the table of `kata.engine.idle`, and the lease of its client."""

from __future__ import annotations

import os

import pytest

from kata.engine.idle import END, KEEP, WAIT, next_action
from kata.engine.launch import RELEASED, Engine, Lease

HELD, LET_GO, BROKEN = Lease.HELD, Lease.LET_GO, Lease.BROKEN


@pytest.mark.parametrize(
    ("lease", "facts", "action"),
    [
        # The client that started it still answers for it.
        (HELD, "", KEEP),
        (HELD, "containers had", KEEP),
        (HELD, "survives", KEEP),
        # It has let go: without a container, and without a client, there is nobody.
        (LET_GO, "", WAIT),
        (LET_GO, "had", WAIT),
        (LET_GO, "clients", KEEP),
        (LET_GO, "containers had", WAIT),
        (LET_GO, "containers had clients", KEEP),
        (LET_GO, "survives", WAIT),
        (LET_GO, "survives had", WAIT),
        # A client that may restart wants what has ended until it has deleted it.
        (LET_GO, "survives containers had", KEEP),
        (BROKEN, "survives containers had", KEEP),
        # A pod without containers is a pod, once it has been made.
        (LET_GO, "survives pod had", KEEP),
        (BROKEN, "survives pod had", KEEP),
        (LET_GO, "survives pod", WAIT),
        # Nobody was ever told of it.
        (BROKEN, "", END),
        (BROKEN, "survives", END),
        (BROKEN, "survives pod", END),
        (BROKEN, "clients", KEEP),
        (BROKEN, "had", WAIT),
        (BROKEN, "containers", WAIT),
        # Its client has died before Create or in Delete, and asks about a container that there is not.
        (LET_GO, "survives stale", END),
        (HELD, "stale clients", END),
        (LET_GO, "survives stale clients had", END),
        (LET_GO, "survives stale containers had", KEEP),
    ],
)
def test_what_an_idle_engine_does_next(lease: str, facts: str, action: str) -> None:
    words = set(facts.split())
    assert words <= {"clients", "containers", "had", "stale", "survives", "pod"}
    assert action == next_action(
        lease,
        has_clients="clients" in words,
        has_containers="containers" in words,
        had_container="had" in words,
        saw_stale_client="stale" in words,
        survives_clients="survives" in words,
        is_pod="pod" in words,
    )


def test_the_lease_tells_a_client_that_let_go_from_one_that_died() -> None:
    reading, writing = os.pipe()
    engine = Engine(1, "/r", writing)
    lease = Lease(reading)
    assert lease.look() == HELD
    engine.release()
    assert lease.look() == LET_GO
    os.close(reading)
    assert lease.look() == LET_GO  # it does not look again

    reading, writing = os.pipe()
    lease = Lease(reading)
    os.close(writing)
    assert lease.look() == BROKEN
    os.close(reading)

    reading, writing = os.pipe()
    os.write(writing, b"x")
    assert RELEASED != b"x"
    assert Lease(reading).look() == BROKEN
    os.close(reading)
    os.close(writing)
