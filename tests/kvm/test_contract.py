"""The suite of every hypervisor (`tests/vm/test_monitors*.py`) where there is KVM: QEMU, and those that need it."""

from __future__ import annotations

import pytest
from hypervisor_lab import lab_fixture  # noqa: F401
from test_monitors import (  # noqa: F401
    test_a_machine_from_its_start_to_an_orderly_end,
    test_a_machine_uses_more_processors_and_fewer,
    test_a_monitor_that_dies_ends_everything_at_once,
    test_a_monitor_that_hangs_is_ended_all_the_same,
    test_a_program_that_talks_nonsense_is_named_and_quoted,
    test_machines_that_start_with_taps,
    test_what_cannot_start_leaves_nothing,
)
from test_monitors_saved import (  # noqa: F401
    test_a_saved_machine_goes_on_where_it_was,
    test_clones_share_what_was_saved_and_cannot_change_it,
)

pytestmark = [pytest.mark.timeout(900)]

LONG = {
    "test_a_machine_uses_more_processors_and_fewer",
    "test_a_monitor_that_dies_ends_everything_at_once",
    "test_a_monitor_that_hangs_is_ended_all_the_same",
    "test_a_program_that_talks_nonsense_is_named_and_quoted",
    "test_clones_share_what_was_saved_and_cannot_change_it",
    "test_machines_that_start_with_taps",
    "test_what_cannot_start_leaves_nothing",
}
"""The lane with emulated machines runs these in every test run."""
