"""The sizing formula."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata.errors import ResourceExhaustedError, UsageError
from kata.resources import sizing

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def _host() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _pretend(monkeypatch)
        yield


def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(sizing, "_meminfo", lambda: {"MemTotal": 16 << 20, "MemAvailable": 8 << 20})


@pytest.mark.parametrize(("asked", "vcpus"), [(None, 1), (0.1, 1), (1.0, 1), (1.01, 2), (2.5, 3), (4.0, 4)])
def test_cpus(asked: float | None, vcpus: int) -> None:
    assert sizing.plan(sizing.ResourceRequest(asked)).vcpus == vcpus


def test_more_cpus_than_there_are() -> None:
    with pytest.raises(UsageError, match=r"4\.5 CPUs were asked for, and this host has 4"):
        sizing.plan(sizing.ResourceRequest(4.5))


def test_nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizing.plan(sizing.ResourceRequest()).memory_mib == 2048
    monkeypatch.setattr(sizing, "_meminfo", lambda: {"MemTotal": 1 << 20, "MemAvailable": 1 << 20})
    assert sizing.plan(sizing.ResourceRequest()).memory_mib == 512, "half of a small host"


def test_more_memory_than_there_is() -> None:
    with pytest.raises(ResourceExhaustedError, match=r"20480 MiB of memory were asked for.*16384 MiB"):
        sizing.plan(sizing.ResourceRequest(None, 20 * GIB))


@given(st.integers(64 * MIB, 15 * GIB), st.sampled_from(["small", "distro"]))
def test_the_guest_gets_what_was_asked(asked: int, kernel: str) -> None:
    # What the kernel was measured to keep: see the module.
    kept = {"small": 19.5, "distro": 47.5}[kernel]
    size = sizing.plan(sizing.ResourceRequest(None, asked), kernel)
    total = size.memory_mib * (1 - 1 / 64 - 1 / 1024) - kept
    least = sizing.total_of(asked, kernel)
    assert total * MIB >= least * 0.999
    if size.memory_mib > sizing.LEAST_MIB[kernel]:
        assert total * MIB <= least * 1.05 + 4 * MIB


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0,1", 2),
        ("0-2", 3),
        ("0-1,1-2,5", 4),
        ("7", 1),
        ("", 0),
        (None, 0),
        ("0-9999999999", 0),
        ("a-b", 0),
    ],
)
def test_without_a_quota_the_set_of_processors_counts(text: object, count: int) -> None:
    asked = sizing.container_request({"cpu": {"cpus": text}})
    assert len(asked.cpuset) == count
    assert sizing.plan(asked).vcpus == max(min(count, 4), 1)
    asked = sizing.container_request({"cpu": {"cpus": text, "quota": 50_000, "period": 100_000}})
    assert sizing.plan(asked).vcpus == 1


def test_more_processors_in_a_set_than_there_are_are_no_error() -> None:
    assert sizing.plan(sizing.container_request({"cpu": {"cpus": "0-63"}})).vcpus == 4


def test_a_least_size() -> None:
    assert sizing.plan(sizing.ResourceRequest(None, 6 * MIB)).memory_mib == sizing.LEAST_MIB["small"]
    assert (
        sizing.plan(sizing.ResourceRequest(None, 6 * MIB), "distro").memory_mib == sizing.LEAST_MIB["distro"]
    )


def test_this_host() -> None:
    assert sizing.host_available_mib() > 0
