"""What the environment says of a machine."""

from __future__ import annotations

import pytest

from kata.config import files
from kata.engine import machine
from kata.errors import ConfigError, UsageError


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


def test_a_switch_in_the_environment_says_yes_or_no(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "runtime.enable_tracing"

    def switched(text: str) -> bool:
        monkeypatch.setenv("KATA_TRACING", text)
        return machine._switch(files.load(), name)

    assert all(map(switched, ("1", "true", "True", "yes")))
    assert not any(map(switched, ("0", "false", "FALSE", "no", "")))
    with pytest.raises(ConfigError, match="environment KATA_TRACING"):
        switched("maybe")
