"""Machines that go on from templates (`tests/vm/test_templates.py`) under KVM."""

from __future__ import annotations

import pytest
from test_templates import (  # noqa: F401
    templates,
    test_a_clone_has_files_of_the_host,
    test_clones_share_nothing_that_is_a_sandboxs_own,
)

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
