"""The taps of a machine in a network namespace: who has them open, and when they go. Needs root."""

from __future__ import annotations

import os
import threading

import pytest
from apart import in_network

from kata.network import netns, rtnetlink

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")

TAP = netns.TAP.format(0)


def taps() -> list[str]:
    with rtnetlink.Rtnl() as rtnl:
        return [link.name for link in rtnl.links() if link.name.endswith("_kata")]


def test_in_a_namespace_of_the_engines_own_a_tap_outlives_the_hypervisor() -> None:
    def work() -> None:
        plan = netns.NetnsPlan("02:00:00:00:00:01", "")
        [nic] = plan.setup_nics(4)
        nic.close()  # as at the end of the hypervisor, which has the only other descriptor
        assert taps() == [TAP]
        plan.close_taps()
        assert taps() == []
        plan.close_taps()

    in_network(work)


def test_in_somebody_elses_namespace_it_goes_with_the_hypervisor() -> None:
    def work() -> None:
        here = f"/proc/self/task/{threading.get_native_id()}/ns/net"
        for _ in range(2):  # the next machine finds none
            plan = netns.NetnsPlan("02:00:00:00:00:01", here)
            [nic] = plan.setup_nics(4)
            assert taps() == [TAP]
            nic.close()
            assert taps() == []

    in_network(work)


def test_the_engine_of_a_machine_that_waited_keeps_the_tap_of_that() -> None:
    def work() -> None:
        spare = netns.SpareTap()
        plan = netns.NetnsPlan("02:00:00:00:00:01", "")
        plan.spare = spare
        plan.setup_nics(4)
        spare.close()
        assert taps() == [TAP]
        plan.close_taps()
        assert taps() == []

    in_network(work)
