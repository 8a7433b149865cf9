"""Reads the recipe of a guest: the small kernel's configuration and patches, a packaged kernel's modules.

They lie in ``guest/`` of a checkout, and in ``shipped/recipe/`` of an installed package.
"""

from __future__ import annotations

import os
import re

from kata import paths
from kata.errors import GuestAssetError

CONFIGURATION = "kernel.config"
MODULES = "modules.list"

_SINCE = re.compile(r"^from (\d+)\.(\d+)$")
_OPTION = re.compile(r'^(CONFIG_[A-Z0-9_a-z]+)=(y|n|-?\d+|0x[0-9a-f]+|"[^"]*")$')


def read(name: str) -> str:
    """One of the lists.

    Raises:
        GuestAssetError: It is not where kata was installed.
    """
    path = os.path.join(_directory(), name)
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise GuestAssetError(
            f"cannot read {path}, which says how a guest is made: {error.strerror}", "install kata again"
        ) from None


def patches() -> list[tuple[str, str]]:
    """Changes to the kernel's sources: (file name, unified diff), in the order of their names.

    Raises:
        GuestAssetError: The directory is not there.
    """
    try:
        names = sorted(name for name in os.listdir(_directory()) if name.endswith(".patch"))
    except OSError as error:
        raise GuestAssetError(
            f"cannot read {_directory()}: {error.strerror}", "install kata again"
        ) from None
    return [(name, read(name)) for name in names]


def _directory() -> str:
    return paths.shipped("recipe") if paths.is_installed() else os.path.join(paths.checkout(), "guest")


class Rule:
    """One line of the configuration.

    Attributes:
        alternatives: (option, value) pairs of which one must hold.
        since: The first kernel version to which it applies, as (major, minor).
    """

    __slots__ = ("alternatives", "since")

    def __init__(self, alternatives: list[tuple[str, str]], since: tuple[int, int]) -> None:
        self.alternatives = alternatives
        self.since = since

    def __str__(self) -> str:
        return " or ".join(f"{option}={value}" for option, value in self.alternatives)


def parse(text: str) -> list[Rule]:
    """Read a configuration; its syntax is described at its top.

    Raises:
        GuestAssetError: A line is malformed.
    """
    rules = []
    for number, line in enumerate(text.split("\n"), 1):
        body, _hash, comment = line.partition("#")
        if not body.strip():
            continue
        matches = [_OPTION.match(part.strip()) for part in body.split("|")]
        since = _SINCE.match(comment.strip())
        if not all(matches) or (comment and not since):
            raise GuestAssetError(
                f"{CONFIGURATION}, line {number}: not an option with a value: {line.strip()!r}"
            )
        alternatives = [(match[1], match[2]) for match in matches if match]
        rules.append(Rule(alternatives, (int(since[1]), int(since[2])) if since else (0, 0)))
    return rules


def applicable(rules: list[Rule], version: tuple[int, int]) -> list[Rule]:
    """The rules that hold for a kernel version, given as (major, minor)."""
    return [rule for rule in rules if rule.since <= version]


def render(rules: list[Rule]) -> str:
    """What ``make allnoconfig`` takes as KCONFIG_ALLCONFIG; names unknown to a version are harmless there."""
    return "".join(f"{option}={value}\n" for rule in rules for option, value in rule.alternatives)


def broken(rules: list[Rule], configuration: str) -> list[Rule]:
    """Return the rules that a finished ``.config`` violates.

    An option vanishes without a word when something that it depends on is off.
    """
    options = {}
    for line in configuration.split("\n"):
        option, equals, value = line.partition("=")
        if equals and option.startswith("CONFIG_"):
            options[option] = value
    return [
        rule
        for rule in rules
        if not any(options.get(option, "n") == value for option, value in rule.alternatives)
    ]
