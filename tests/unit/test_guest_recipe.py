"""The small kernel's configuration: its syntax, and that what a build drops is noticed."""

from __future__ import annotations

import pytest

from kata.errors import GuestAssetError
from kata.guest import recipe
from kata.guest.modules import parse_list


def test_the_lists_of_this_checkout_are_well_formed() -> None:
    rules = recipe.parse(recipe.read(recipe.CONFIGURATION))
    options = [option for rule in rules for option, _value in rule.alternatives]
    assert len(options) == len(set(options)), "an option is named twice"
    assert "CONFIG_PVH" in options
    assert parse_list(recipe.read(recipe.MODULES), recipe.MODULES)


def test_a_missing_list_is_named() -> None:
    with pytest.raises(GuestAssetError, match="nonesuch"):
        recipe.read("nonesuch.config")


@pytest.mark.parametrize(
    "line",
    [
        "A=y",
        "CONFIG_A",
        "CONFIG_A=m",
        "CONFIG_A=yes",
        "CONFIG_A=y  # a remark",
        "CONFIG_A=y | B=y",
        "CONFIG_A=y |",
    ],
)
def test_malformed_lines_are_refused(line: str) -> None:
    with pytest.raises(GuestAssetError, match="line 2"):
        recipe.parse(f"# remark\n{line}\n")


def test_a_line_ends_with_a_newline_and_with_nothing_else() -> None:
    """A remark may hold a form feed, or any of what `str.splitlines` breaks lines at."""
    remark = "# first\x0c second\x0b third\x85 fourth\u2028 fifth\x1c sixth"
    assert [str(rule) for rule in recipe.parse(f"{remark}\nCONFIG_A=y\n")] == ["CONFIG_A=y"]
    assert [one.name for one in parse_list(f"{remark}\nvirtio_pci\n", "list")] == ["virtio_pci"]
    rules = recipe.parse("CONFIG_A=y\n")
    assert recipe.broken(rules, f"{remark} CONFIG_A=y\n") == rules


def test_what_a_build_dropped_is_found() -> None:
    rules = recipe.parse(
        'CONFIG_A=y\nCONFIG_B=n\nCONFIG_C=y | CONFIG_D=y\nCONFIG_E="x"\nCONFIG_F=64\nCONFIG_G=y  # from 6.10\n'
    )
    kept = 'CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=y\nCONFIG_E="x"\nCONFIG_F=64\n'
    old = recipe.applicable(rules, (6, 9))
    assert recipe.broken(old, kept) == []
    assert [str(rule) for rule in recipe.broken(recipe.applicable(rules, (6, 10)), kept)] == ["CONFIG_G=y"]
    lost = 'CONFIG_B=y\nCONFIG_E="y"\nCONFIG_F=63\n'
    assert [str(rule) for rule in recipe.broken(old, lost)] == [
        "CONFIG_A=y",
        "CONFIG_B=n",
        "CONFIG_C=y or CONFIG_D=y",
        'CONFIG_E="x"',
        "CONFIG_F=64",
    ]


def test_both_names_of_an_option_are_offered_to_the_kernel() -> None:
    rules = recipe.parse("CONFIG_A=y | CONFIG_B=y\nCONFIG_C=n\n")
    assert recipe.render(rules) == "CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\n"
