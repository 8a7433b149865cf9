"""`kata` with one of the hypervisors, for tests where there is KVM."""

from __future__ import annotations

import copy
from pathlib import Path

from conftest import Kata
from test_monitors import require

from kata.hypervisor import registry

ALONE = ("--network", "none")
FOREVER = "trap 'exit 0' TERM; while :; do sleep 0.5; done"


def with_hypervisor(kata: Kata, name: str, directory: Path, table: str = "") -> Kata:
    """Have kata use a hypervisor, or skip the test where that is not installed.

    Args:
        kata: As it is otherwise.
        name: The hypervisor.
        directory: For its configuration.
        table: Lines of the hypervisor's table.
    """
    require(registry.find(name))
    file = directory / "configuration.toml"
    file.write_text(f"[runtime]\nhypervisor_name = '{name}'\n[hypervisor.{name}]\n{table}\n")
    one = copy.copy(kata)
    one.env = {**kata.env, "KATA_CONF_FILE": str(file)}
    return one
