"""Health checks of `kata run`, in a machine."""

from __future__ import annotations

import json

from cli_support import container, identity_of
from conftest import Kata
from waiting import until


def test_a_container_becomes_ill_and_well_again(shared_kata: Kata, busybox_image: str) -> None:
    kata = shared_kata
    options = (
        "--health-cmd", "cat /tmp/well && echo $MINE", "--health-interval", "200ms", "--health-retries", "2",
        "--network", "none", "-e", "MINE=yes",
    )  # fmt: skip

    def is_now(status: str) -> None:
        until(
            lambda: kata.ok("inspect", "-f", "{{.State.Health.Status}}", "checked").strip() == status,
            f"the container to be {status}",
        )

    with container(kata, busybox_image, "checked", "touch /tmp/well; while :; do sleep 1; done", *options):
        is_now("healthy")
        assert "(healthy)" in kata.ok("ps", "--filter", "name=checked")
        assert kata.ok("ps", "-q", "--filter", "health=healthy", "--filter", "name=checked")
        log = json.loads(kata.ok("inspect", "-f", "{{json .State.Health.Log}}", "checked"))
        assert (log[-1]["ExitCode"], log[-1]["Output"]) == (0, "yes\n")
        kata.ok("healthcheck", "run", "checked")
        kata.ok("exec", "checked", "rm", "/tmp/well")
        is_now("unhealthy")
        assert kata.call("healthcheck", "run", "checked").returncode == 1
        assert not kata.ok("ps", "-q", "--filter", "health=healthy", "--filter", "name=checked")
        kata.ok("exec", "checked", "touch", "/tmp/well")
        is_now("healthy")
        identity = identity_of(kata, "checked")
    lines = kata.ok("events", "--json", "--filter", "event=container.health").splitlines()
    told = [one["health"] for one in map(json.loads, lines) if one["container"] == identity]
    assert told == ["healthy", "unhealthy", "healthy"]
