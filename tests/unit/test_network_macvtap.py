"""A guest's network by macvtap, in namespaces of the tests' own. Needs root, and a kernel with macvtap."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from apart import in_network

from kata import journal_undo
from kata.errors import HostError, UnsupportedError
from kata.journal import Journal
from kata.network import rtnetlink
from kata.network.macvtap import NAME, MacvtapPlan

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def links() -> dict[str, str]:
    """Names of the interfaces and their kinds, without the loopback."""
    with rtnetlink.Rtnl() as rtnl:
        return {link.name: link.kind for link in rtnl.links() if not link.flags & rtnetlink.LOOPBACK}


def apart(work: Callable[[MacvtapPlan, Journal], None], directory: Path) -> None:
    """Run something in a network namespace, with the plan of a sandbox whose namespace it is."""

    def run() -> None:
        journal = Journal.create_dir(str(directory), "run", {"client": "kata", "id": "s1"})
        plan = MacvtapPlan("02:00:00:00:00:99", f"/proc/self/task/{threading.get_native_id()}/ns/net")
        plan.journal = journal
        try:
            work(plan, journal)
        finally:
            plan.close_taps()
            journal.close()

    in_network(run)


def veth(*names: str) -> None:
    """Two interfaces that are connected to each other, both up."""
    one, other = names
    ip("link", "add", one, "type", "veth", "peer", "name", other)
    for name in names:
        ip("link", "set", name, "up")


def test_each_interface_gets_a_tap_and_the_journal_takes_it_away(tmp_path: Path) -> None:
    def work(plan: MacvtapPlan, journal: Journal) -> None:
        veth("v0", "v1")
        nics = plan.setup_nics(4)
        assert [nic.mac for nic in nics] == [
            endpoint.source.mac for endpoint in plan.endpoints if endpoint.source
        ]
        assert links() == {"v0": "veth", "v1": "veth", NAME.format(0): "macvtap", NAME.format(1): "macvtap"}
        for nic in nics:
            assert nic.tap_fd is not None
            assert stat.S_ISCHR(os.fstat(nic.tap_fd.raw).st_mode)
            os.get_blocking(nic.tap_fd.raw)
        assert sorted(one["name"] for one in plan.interfaces) == ["v0", "v1"]
        # Nothing has come, and nothing has changed.
        assert plan.rescan() is False
        plan.close_taps()
        assert journal_undo.undo(journal) == []
        assert links() == {"v0": "veth", "v1": "veth"}

    apart(work, tmp_path)


def test_a_namespace_without_an_interface_leads_nowhere(tmp_path: Path) -> None:
    def work(plan: MacvtapPlan, journal: Journal) -> None:
        nics = plan.setup_nics(4)
        assert [(nic.mac, nic.backend) for nic in nics] == [("02:00:00:00:00:99", "")]
        assert plan.setup_nics(0) == []
        assert links() == {}

    apart(work, tmp_path)


def test_more_interfaces_than_a_machine_takes_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    def work(plan: MacvtapPlan, journal: Journal) -> None:
        veth("v0", "v1")
        with pytest.raises(UnsupportedError, match="has 2 interfaces") as refused:
            plan.setup_nics(1)
        assert "1 at most" in refused.value.hint
        assert links() == {"v0": "veth", "v1": "veth"}

    apart(work, tmp_path)


def test_one_that_cannot_have_a_tap_is_named_and_those_before_it_are_taken_back(tmp_path: Path) -> None:
    def work(plan: MacvtapPlan, journal: Journal) -> None:
        veth("v0", "v1")
        # In this mode an interface has one device on it, and this one is taken.
        ip("link", "add", "link", "v1", "name", "other", "type", "macvtap", "mode", "passthru")
        with pytest.raises(HostError, match=r"cannot make a macvtap on v1 \(veth\)") as refused:
            plan.setup_nics(4)
        assert "tcfilter" in refused.value.hint
        assert all(endpoint.fd is None or not endpoint.fd.is_open for endpoint in plan.endpoints)
        assert journal_undo.undo(journal) == []
        assert links() == {"v0": "veth", "v1": "veth", "other": "macvtap"}

    apart(work, tmp_path)


def test_an_interface_that_comes_later_cannot_be_followed(tmp_path: Path) -> None:
    def work(plan: MacvtapPlan, journal: Journal) -> None:
        plan.setup_nics(4)
        veth("v0", "v1")
        with pytest.raises(
            UnsupportedError, match=r"v[01] was attached after the machine's start"
        ) as refused:
            plan.rescan()
        assert "tcfilter" in refused.value.hint
        # While containers run that is no reason to end them.
        plan.rescan(is_running=True)
        assert len(plan.left_out) == 2
        assert "which macvtap cannot follow" in plan.left_out[0]

    apart(work, tmp_path)


def test_a_namespace_that_is_gone_is_named(tmp_path: Path) -> None:
    plan = MacvtapPlan("02:00:00:00:00:99", str(tmp_path / "gone"))
    with pytest.raises(HostError, match=f"cannot enter the network namespace {tmp_path}/gone"):
        plan.setup_nics(1)
