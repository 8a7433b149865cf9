"""Platforms of images, and which of them a machine can run."""

from __future__ import annotations

import os

from kata.errors import UsageError

_MACHINES = {
    "x86_64": ("amd64", ""),
    "i686": ("386", ""),
    "i386": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "ppc64le": ("ppc64le", ""),
    "riscv64": ("riscv64", ""),
    "s390x": ("s390x", ""),
}
_ALIASES = {"x86_64": "amd64", "aarch64": "arm64", "i386": "386"}

_ALSO_RUNS = {"amd64": ("386",)}
"""Architectures whose usual kernels also run programs of others, best first."""


class Platform:
    """An operating system, architecture and variant, named as in Go.

    Args:
        os_name: ``linux``.
        arch: ``amd64``, ``arm64``, ...
        variant: ``v7``, ``v8``, ... or "".
    """

    __slots__ = ("arch", "os", "variant")

    def __init__(self, os_name: str, arch: str, variant: str = "") -> None:
        self.os = os_name
        self.arch = arch
        # As in containerd: arm64 is v8, 32-bit arm is v7, amd64 is v1.
        default = {"arm64": "v8", "arm": "v7"}.get(arch, "")
        self.variant = "" if variant == "v1" and arch == "amd64" else (variant or default)

    def __str__(self) -> str:
        hidden = (self.arch, self.variant) in (("arm64", "v8"),)
        return f"{self.os}/{self.arch}" + (f"/{self.variant}" if self.variant and not hidden else "")

    def rank(self, wanted: Platform) -> int:
        """Rank an image of this platform for the wanted one: 0 is an exact match, higher is worse, -1 does not fit."""
        if self.os != wanted.os:
            return -1
        if self.arch == wanted.arch:
            if self.variant == wanted.variant:
                return 0
            mine, theirs = _level(self), _level(wanted)
            if mine < theirs:
                return 1 + min(theirs - mine, 40)  # an older variant runs on a newer machine
            # A machine's name does not tell its level of amd64, so a higher level is the last choice (see `lacking`).
            return 60 + min(mine - theirs, 30) if self.arch == "amd64" and mine < _NO_LEVEL else -1
        also = _ALSO_RUNS.get(wanted.arch, ())
        return 100 + also.index(self.arch) if self.arch in also else -1


_NO_LEVEL = 1000
_LEVELS = {
    2: "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3",
    3: "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave",
    4: "avx512f avx512bw avx512cd avx512dq avx512vl",
}
"""Features of amd64's levels (x86-64 psABI, "Micro-Architecture Levels") as Linux names them in /proc/cpuinfo."""
_EMULATED_LEVEL = 3
"""Level of the emulated processor: it has all features of level 3, and none of level 4."""


def _level(platform: Platform) -> int:
    digits = platform.variant.removeprefix("v")
    if not digits:
        return 1
    return int(digits) if digits.isdecimal() and len(digits) < 3 else _NO_LEVEL


def lacking(image: Platform, *, emulated: bool) -> list[str]:
    """The processor features that an image needs by its level of amd64 and that a machine here lacks.

    Args:
        image: The image's platform.
        emulated: Whether the machine's processor is emulated.
    """
    level = _level(image) if image.arch == "amd64" else 1
    if emulated:
        have = " ".join(_LEVELS[number] for number in range(2, _EMULATED_LEVEL + 1)).split()
    else:
        try:
            with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
                have = next((line for line in lines if line.startswith("flags")), "").split()
        except OSError:
            have = []
    return [
        name
        for number in range(2, min(level, 4) + 1)
        for name in _LEVELS[number].split()
        if name not in have
    ]


def host() -> Platform:
    """This machine's platform."""
    machine = os.uname().machine
    arch, variant = _MACHINES.get(machine, (machine, ""))
    return Platform("linux", arch, variant)


def parse(text: str) -> Platform:
    """Parse ``OS/ARCH[/VARIANT]`` or ``ARCH``: ``linux/arm64/v8``, ``arm64``, ...

    Raises:
        UsageError: It is malformed.
    """
    parts = text.lower().split("/")
    if len(parts) == 1:
        parts.insert(0, "linux")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise UsageError(f"{text!r} is not a platform", "OS/ARCH[/VARIANT], for example linux/amd64")
    arch = _ALIASES.get(parts[1], parts[1])
    return Platform(parts[0], arch, parts[2] if len(parts) == 3 else "")
