"""The table of `bench/performance`: what counts as met, and in which direction."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from performance_table import Rounds, table


def cells(took: Rounds) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table(took)[2:]]


@pytest.mark.parametrize(("kata", "verdict"), [([30.0, 31.0, 90.0], "met"), ([20.0, 21.0, 90.0], "missed")])
def test_of_rates_more_is_better(kata: list[float], verdict: str) -> None:
    took = {"image, stat, kata": kata, "image, stat, runc": [100.0, 100.0, 100.0]}
    [(title, value, least, beside, ratio, aim, met)] = cells(took)
    assert title == "stat of files of its image / with runc"
    assert (value, beside, ratio) == (f"{kata[1]} /s", "100.0 /s", f"{kata[1] / 100:.2f}")
    assert float(least) < kata[1]
    assert (aim, met) == ("≥ 0.3", verdict)


@pytest.mark.parametrize(("kata", "verdict"), [([2.9, 2.9], "met"), ([3.1, 3.1], "missed")])
def test_of_times_less_is_better(kata: list[float], verdict: str) -> None:
    [row] = cells({"work, kata": kata, "work, runc": [1.0, 1.0]})
    assert row[1:] == [f"{kata[0]:.2f} s", f"{kata[0]:.2f}", "1.00 s", f"{kata[0]:.2f}", "3", verdict]


def test_what_was_not_measured_has_no_row_and_what_has_no_peer_its_own_aim() -> None:
    assert cells({}) == []
    assert cells({"work, kata": [1.0]}) == []
    [row] = cells({"exec, this": [29.0, 29.0]})
    assert row == ["`kata exec NAME true`", "29.0 ms", "29.0", "", "", "30 ms", "met"]
