"""Many sandboxes' metrics put together: valid for parsers that are not ours, whatever the sandboxes say."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monitor_support import exposition as honest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as classic
from prometheus_client.samples import Sample

from kata.metrics import exposition
from kata.monitor import merge
from kata.monitor.expose import chunks


def one(text: str, sandbox: str, most: int = 1000, wanted: Iterable[str] = ()) -> merge.Contribution:
    labels = [("sandbox_id", sandbox), ("cri_name", f"pod {sandbox}")] if sandbox else []
    return merge.contribution(exposition.parse(text.encode()), labels, most, tuple(wanted))


def both(*contributions: merge.Contribution, types: dict[str, str] | None = None) -> tuple[str, str]:
    """The text format and OpenMetrics, each after another program's parser has read it."""
    merged = merge.Merged(contributions, types or {})
    text = b"".join(chunks(merged.text(), "")).decode()
    modern = b"".join(chunks(merged.openmetrics(), merge.EOF)).decode()
    lines = [line for line in text.splitlines() if line[0] != "#"]
    assert lines == [line for line in modern.splitlines() if line[0] != "#"], "one name for both formats"
    found = samples(openmetrics.text_string_to_metric_families(modern))  # type: ignore[no-untyped-call]
    assert len(samples(classic(text))) == len(found) == len(lines)
    keys = [(s.name, frozenset(s.labels.items())) for s in found]
    assert len(keys) == len(set(keys)), "a series occurs twice"
    heads = re.findall(r"^# (\w+ \S+)", text, re.M)
    assert len(heads) == len(set(heads)), "a family has two heads"
    return text, modern


def samples(families: Iterable[object]) -> list[Sample]:
    return [sample for family in families for sample in family.samples]  # type: ignore[attr-defined]


def test_families_occur_once_with_their_sandboxes_labels() -> None:
    text, modern = both(one(honest(1, 3), "a"), one(honest(2, 3), "b"))
    assert text.count("# TYPE kata_guest_load gauge\n") == 1
    assert 'kata_guest_load{sandbox_id="a",cri_name="pod a",item="load1"} 1.25\n' in text
    assert 'kata_guest_load{sandbox_id="b",cri_name="pod b",item="load1"} 2.25\n' in text
    # Counters that OpenMetrics would have otherwise keep their names: of no type there.
    assert "# TYPE kata_agent_scrape_count counter\n" in text
    assert "# TYPE kata_agent_scrape_count unknown\n" in modern
    assert "# TYPE kata_agent_process_cpu_seconds counter\n" in modern
    for said in text, modern:
        assert 'kata_agent_process_cpu_seconds_total{sandbox_id="b",cri_name="pod b"} 2\n' in said
        assert ',action="create",le="1.0"} 1\n' in said
        assert ',action="create",le="+Inf"} 4\n' in said
    assert modern.endswith("\n# EOF\n")
    assert modern.count("# EOF") == 1


def test_without_labels_a_sandbox_speaks_for_itself() -> None:
    text, _ = both(one(honest(3, 2), ""))
    assert "kata_agent_scrape_count 7\n" in text
    assert 'kata_guest_load{item="load1"} 3.25\n' in text


def test_a_sandbox_can_not_speak_for_another_nor_for_the_monitor() -> None:
    liar = one(
        'kata_guest_load{sandbox_id="a",cri_uid="x",item="load1"} 666\n'
        "# TYPE kata_monitor_scrape summary\nkata_monitor_scrape_count 3\nkata_monitor_scrape_sum 3\n",
        "liar",
    )
    text, _ = both(liar)
    assert text.splitlines()[2:] == [
        'kata_guest_load{sandbox_id="liar",cri_name="pod liar",item="load1"} 666'
    ]
    assert liar.dropped == {merge.CONFLICT: 2}


def test_a_wrong_type_takes_away_only_the_liar_s() -> None:
    liars = [
        one("# TYPE kata_guest_load counter\nkata_guest_load 5\n", f"liar{number}") for number in range(5)
    ]
    text, _ = both(*liars, one(honest(1, 1), "a"), types={"kata_guest_load": "gauge"})
    assert "# TYPE kata_guest_load gauge\n" in text
    assert "liar" not in text
    assert all(liar.dropped == {merge.CONFLICT: 1} for liar in liars)
    # Of a family that nobody knows, most decide.
    text, _ = both(liars[0], one(honest(1, 1), "a"), one(honest(2, 1), "b"))
    assert "# TYPE kata_guest_load gauge\n" in text
    assert "liar" not in text


def test_names_that_clash_with_a_histogram_s_are_left_out() -> None:
    name = "kata_shim_rpc_durations_histogram_milliseconds"
    liar = one(f"# TYPE {name}_count gauge\n{name}_count 5\n", "liar")
    text, _ = both(liar, one(honest(1, 1), "a"), types={name: "histogram"})
    assert "liar" not in text
    assert f"# TYPE {name} histogram\n" in text


def test_a_counter_and_a_gauge_of_nearly_the_same_name_live_together() -> None:
    _, modern = both(one("# TYPE x gauge\nx 1\n# TYPE x_total counter\nx_total 2\n", "a"))
    assert "# TYPE x gauge\n" in modern
    assert "# TYPE x_total unknown\n" in modern


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("# TYPE x counter\nx -1\n", 0),
        ("# TYPE x_total counter\nx_total -1\n", 0),
        ("# TYPE x_total counter\nx_total NaN\n", 0),
        ("# TYPE x gauge\nx NaN\n", 1),
        ("# TYPE x gauge\nx -Inf\n", 1),
        ('# TYPE x histogram\nx_bucket{le="1"} 1\nx_sum 1\nx_count 1\n', 0),
        ('# TYPE x histogram\nx_bucket{le="1"} 2\nx_bucket{le="+Inf"} 1\nx_sum 1\nx_count 1\n', 0),
        ('# TYPE x histogram\nx_bucket{le="+Inf"} 1\nx_bucket{le="1"} 1\nx_sum 1\nx_count 1\n', 4),
        ('# TYPE x histogram\nx_bucket{le="+Inf"} 1\nx_sum 1\nx_count 2\n', 0),
        ('# TYPE x histogram\nx_bucket{le="+Inf"} 1\nx_count 1\n', 0),
        ('# TYPE x histogram\nx_bucket{le="NaN"} 1\nx_bucket{le="+Inf"} 1\nx_sum 1\nx_count 1\n', 0),
        (
            '# TYPE x histogram\nx_bucket{le="1"} 1\nx_bucket{le="NaN"} 1\nx_bucket{le="nan"} 1\n'
            'x_bucket{le="+Inf"} 1\nx_sum 1\nx_count 1\n',
            0,
        ),
        ('# TYPE x summary\nx{quantile="0.5"} 1\nx_sum 1\nx_count 2\n', 3),
        ('# TYPE x summary\nx{quantile="7"} 1\nx_sum 1\nx_count 2\n', 0),
    ],
)
def test_what_breaks_the_rules_of_its_type_is_left_out(text: str, kept: int) -> None:
    try:
        said = one(text, "a")
    except exposition.MalformedError:
        assert kept == 0
        return
    both(said)
    assert said.series == kept
    assert bool(said.dropped) == (kept == 0)


def test_a_sandbox_may_have_only_so_many_series() -> None:
    many = "".join(f'x{{item="{number}"}} 1\n' for number in range(50))
    said = one(f"# TYPE x gauge\n{many}" + honest(1, 5), "a", most=20)
    assert said.series == 20
    assert said.dropped[merge.LIMIT] >= 30
    both(said)


def test_only_the_families_that_are_asked_for() -> None:
    said = one(honest(1, 3), "a", wanted=["kata_guest_l", "kata_agent_scrape"])
    assert sorted(said.pieces) == ["kata_agent_scrape_count", "kata_guest_load"]


def test_hostile_values_of_labels_are_escaped_and_bounded() -> None:
    labels = [("a", '\n# EOF\n"} 1\nx 2'), ("b", "\x1b[31m\x00"), ("c", "ä" * 5000)]
    family = exposition.Family("x", "gauge", 'Of "x"\nand y \\', [("x", labels, 1.0)])
    said = merge.contribution([family], [("sandbox_id", 'a"\n')], 10)
    text, modern = both(said)
    for whole in (text, modern):
        assert "\x1b" not in whole
        assert len(whole) < 1000
    assert samples(classic(text))[0].labels["a"] == '\\x0a# EOF\\x0a"} 1\\x0ax 2'


NAMES = st.sampled_from(
    ["x", "y", "x_total", "x_count", "x_sum", "x_bucket", "x_created", "kata_monitor_x", "y_info"]
)
VALUES = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-5, 1 << 60).map(float)
LABELS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "le", "quantile", "sandbox_id"]),
        st.text(max_size=20) | st.sampled_from("01"),
    ),
    max_size=3,
    unique_by=lambda pair: pair[0],
)


@st.composite
def families(draw: st.DrawFn) -> list[exposition.Family]:
    """What a parser may hand over that lets everything through but broken syntax."""
    found = []
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        kind = draw(st.sampled_from(["counter", "gauge", "histogram", "summary", "untyped"]))
        endings = {"histogram": ["_bucket", "_sum", "_count"], "summary": ["", "_sum", "_count"]}.get(
            kind, [""]
        )
        rows = draw(st.lists(st.tuples(st.sampled_from(endings), LABELS, VALUES), max_size=6))
        found.append(
            exposition.Family(
                name, kind, draw(st.text(max_size=30)), [(name + end, pairs, v) for end, pairs, v in rows]
            )
        )
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(families(), max_size=4))
def test_whatever_sandboxes_say_the_whole_is_valid(said: list[list[exposition.Family]]) -> None:
    parts = [
        merge.contribution(one, [("sandbox_id", f"sandbox {number}")], 10) for number, one in enumerate(said)
    ]
    both(*parts)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (tools/setup test unpacks it)")
def test_promtool_has_nothing_to_say_against_it(tmp_path: Path) -> None:
    text, _ = both(one(honest(1, 3), "a"), one(honest(2, 3), "b"))
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text.encode(), capture_output=True, check=False
    )
    # It finds fault with the original's names, which is 3; what it cannot read is 1.
    assert done.returncode in (0, 3), done.stderr.decode()


def test_numbers_are_written_so_that_they_read_the_same() -> None:
    for value in (0.0, 1.0, -1.5, 1e300, 123456789012345678.0, 5e-324, math.inf, -math.inf):
        assert float(merge.number(value)) == value
    assert math.isnan(float(merge.number(math.nan)))
    assert merge.bound(1.0) == "1.0"
