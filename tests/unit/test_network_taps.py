"""The taps of a machine in a network namespace: who has them open, and when they go. Needs root."""

from __future__ import annotations

import os
import threading

import pytest
from apart import in_network

from kata import sysio
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


def test_a_namespace_that_stays_empty_has_no_tap_until_an_interface_comes() -> None:
    def work() -> None:
        plan = netns.NetnsPlan("02:00:00:00:00:01", "")
        plan.stays_empty = True
        assert plan.setup_nics(4, hotplug=True) == []
        assert (taps(), plan.hotplug_nics, plan.idle()) == ([], 4, [])
        plan.rescan()
        assert (plan.interfaces, plan.take_pending_hotplugs()) == ([], [])
        with sysio.Fd(netns.make_tap("eth0")):
            assert plan.rescan()
            [(index, nic)] = plan.take_pending_hotplugs()
            plan.place(index, "09/00")
            assert (index, taps(), plan.hotplug_nics) == (0, [TAP], 3)
            assert plan.interfaces[0]["devicePath"] == "09/00"
            assert plan.interfaces[0]["hwAddr"] == nic.mac
        assert plan.rescan()  # it has gone
        assert (plan.interfaces, plan.idle()) == ([], ["09/00"])
        nic.close()
        plan.close_taps()
        assert taps() == []

    in_network(work)


@pytest.mark.parametrize("why", ["no plugs", "a namespace of its client's", "a pool"])
def test_a_machine_has_an_interface_for_an_empty_namespace(why: str) -> None:
    def work() -> None:
        here = f"/proc/self/task/{threading.get_native_id()}/ns/net"
        plan = netns.NetnsPlan("02:00:00:00:00:01", here if why.startswith("a namespace") else "")
        plan.stays_empty = True
        plan.keeps_ports = why == "a pool"
        [nic] = plan.setup_nics(4, hotplug=why != "no plugs")
        nic.close()
        plan.close_taps()

    in_network(work)
