"""The guest's clock when the host's is set, under KVM. A host's clock is set only in the KVM lab."""

from __future__ import annotations

import os
import time

import pytest
from conftest import Kata
from waiting import PATIENCE, until


def test_a_guest_follows_when_the_hosts_clock_is_set(kvm_kata: Kata, busybox_image: str) -> None:
    """Both ways, and by a time that is no multiple of the interval at which it is looked at."""
    if "KVM_LAB" not in os.environ:
        pytest.skip("sets the clock of the host, which only happens in the KVM lab: tools/kvm-lab")
    kvm_kata.ok("run", "-d", "--name", "clockbox", "--network", "none", busybox_image, "sleep", "100000")
    try:

        def right() -> bool:
            before = int(time.time())
            guest = int(kvm_kata.ok("exec", "clockbox", "date", "+%s"))
            return before <= guest <= time.time()

        until(right, "the right time in the guest", patience_s=PATIENCE)
        for jump in (4000, -3000):
            time.clock_settime(time.CLOCK_REALTIME, time.time() + jump)
            began = time.monotonic()
            until(right, "the right time in the guest", patience_s=PATIENCE)
            assert time.monotonic() - began < 25  # sooner than at the next look, which is after 30 s
    finally:
        kvm_kata.ok("rm", "-f", "clockbox")
