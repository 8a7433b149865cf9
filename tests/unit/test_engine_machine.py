"""What the environment says of a machine."""

from __future__ import annotations

import pytest

from kata.engine import machine
from kata.errors import (
    UsageError,
)


def test_the_time_to_boot_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.BOOT_TIMEOUT, raising=False)
    assert machine.boot_timeout() == 0
    monkeypatch.setenv(machine.BOOT_TIMEOUT, "150")
    assert machine.boot_timeout() == 150
    for wrong in ("soon", "-1", "nan", "1.5", "1000000"):
        monkeypatch.setenv(machine.BOOT_TIMEOUT, wrong)
        with pytest.raises(UsageError, match="no number of seconds"):
            machine.boot_timeout()


def test_a_shared_fs_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_SHARED_FS", "nfs")
    with pytest.raises(UsageError, match="nfs"):
        machine.shared_fs()
