"""Which accelerator a virtual machine gets on this host."""

from __future__ import annotations

import os

from kata.errors import HostError, UsageError
from kata.hypervisor import kvmprobe

VARIABLE = "KATA_ACCEL"


class Accelerator:
    """The accelerator, and why.

    Args:
        accel: ``"kvm"`` or ``"tcg"`` (software emulation).
        reason: One sentence, for the log and the one line that human commands print under emulation.
        probed: What the KVM probe said; None when it was not asked.
    """

    __slots__ = ("accel", "probed", "reason")

    def __init__(self, accel: str, reason: str, probed: kvmprobe.ProbeResult | None) -> None:
        self.accel = accel
        self.reason = reason
        self.probed = probed


def choose(preference: str = "") -> Accelerator:
    """Choose KVM where it really runs a 64-bit guest, otherwise software emulation.

    Args:
        preference: ``"kvm"``, ``"tcg"``, ``"auto"``, or empty for what the variable KATA_ACCEL says.

    Raises:
        HostError: KVM was demanded and does not work here.
        UsageError: There is no such accelerator.
    """
    wanted = preference or os.environ.get(VARIABLE) or "auto"
    if wanted not in ("kvm", "tcg", "auto"):
        raise UsageError(f"there is no accelerator {wanted!r}", "Use kvm, tcg or auto.")
    if wanted == "tcg":
        return Accelerator("tcg", "software emulation was asked for", None)
    probed = kvmprobe.probe()
    if probed.works:
        return Accelerator("kvm", probed.reason, probed)
    if wanted == "kvm":
        raise HostError(f"KVM was asked for and cannot be used: {probed.reason}", probed.hint)
    return Accelerator("tcg", f"using software emulation, which is slower: {probed.reason}", probed)
