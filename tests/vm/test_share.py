"""Files of the host in the guest by 9p, the only way under software emulation; tests/kvm has the other."""

from __future__ import annotations

import copy
import os

import pytest
from conftest import Kata
from share_cases import (  # noqa: F401 - collected here
    test_files_behave_as_files,
    test_files_of_two_file_systems_stay_apart,
    test_the_owner_of_a_guest_gains_nothing_by_it,
    test_volumes,
)

from kata.hypervisor import accel

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def kata(shared_kata: Kata) -> Kata:
    one = copy.copy(shared_kata)
    one.env = {**shared_kata.env, "KATA_SHARED_FS": "virtio-9p"}
    return one


def test_an_emulated_machine_shares_by_9p_whatever_is_asked(kata_env: Kata, busybox_image: str) -> None:
    if accel.choose().accel != "tcg":
        pytest.skip("this machine has KVM")
    kata_env.env["KATA_SHARED_FS"] = "virtio-fs"
    done = kata_env.call("run", "--rm", "-v", "/etc:/e:ro", busybox_image, "grep", " /e ", "/proc/mounts")
    assert done.stdout.split()[2] == b"9p", done.stderr
    assert b"an emulated machine cannot have virtio-fs" in done.stderr
