"""When an engine that serves nothing ends: the table of `kata.engine.lifecycle.idle`, and the lease of its client."""

from __future__ import annotations

import os

import pytest

from kata.engine.launch import RELEASE_BYTE, Engine, Lease
from kata.engine.lifecycle.idle import END, KEEP, WAIT, next_action

HELD, RELEASED, BROKEN = Lease.HELD, Lease.RELEASED, Lease.BROKEN


@pytest.mark.parametrize(
    ("lease", "facts", "action"),
    [
        # The client that started it still answers for it.
        (HELD, "", KEEP),
        (HELD, "containers had", KEEP),
        (HELD, "survives", KEEP),
        # It has let go: without a container, and without a client, there is nobody.
        (RELEASED, "", WAIT),
        (RELEASED, "had", WAIT),
        (RELEASED, "clients", KEEP),
        (RELEASED, "containers had", WAIT),
        (RELEASED, "containers had clients", KEEP),
        (RELEASED, "survives", WAIT),
        (RELEASED, "survives had", WAIT),
        # A client that may restart wants what has ended until it has deleted it.
        (RELEASED, "survives containers had", KEEP),
        (BROKEN, "survives containers had", KEEP),
        # A pod without containers is a pod, once it has been made.
        (RELEASED, "survives pod had", KEEP),
        (BROKEN, "survives pod had", KEEP),
        (RELEASED, "survives pod", WAIT),
        # Nobody was ever told of it.
        (BROKEN, "", END),
        (BROKEN, "survives", END),
        (BROKEN, "survives pod", END),
        (BROKEN, "clients", KEEP),
        (BROKEN, "had", WAIT),
        (BROKEN, "containers", WAIT),
        # Its client has died before Create or in Delete, and asks about a container that there is not.
        (RELEASED, "survives stale", END),
        (HELD, "stale clients", END),
        (RELEASED, "survives stale clients had", END),
        (RELEASED, "survives stale containers had", KEEP),
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
    assert lease.look() == RELEASED
    os.close(reading)
    assert lease.look() == RELEASED  # it does not look again

    reading, writing = os.pipe()
    lease = Lease(reading)
    os.close(writing)
    assert lease.look() == BROKEN
    os.close(reading)

    reading, writing = os.pipe()
    os.write(writing, b"x")
    assert RELEASE_BYTE != b"x"
    assert Lease(reading).look() == BROKEN
    os.close(reading)
    os.close(writing)
