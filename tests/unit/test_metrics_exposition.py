"""kata.metrics.exposition: what is written is valid, and what is read is valid or refused."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kata.metrics import exposition, families
from kata.metrics.exposition import MalformedError, known_samples, parse
from kata.metrics.histogram import Durations

ROOT = Path(__file__).resolve().parents[2]
GUEST = families.OF_GUEST


def taken(text: str) -> list[str]:
    return [line for lines in known_samples(text, GUEST)[0].values() for line in lines]


def test_a_guests_own_words_are_taken() -> None:
    good = [
        "kata_agent_threads 1",
        'kata_guest_cpu_time{cpu="0",item="user"} 12',
        'kata_guest_load{item="load1"} 0.25',
        'kata_guest_filesystem_bytes{mount="/a b",device="/dev/vda",item="used"} 4096',
        'kata_guest_netdev_stat{interface="a\\"b\\\\",item="recv_bytes"} 7',
        "kata_agent_process_max_fds +Inf",
    ]
    assert taken("# HELP kata_agent_threads x\n# TYPE kata_agent_threads gauge\n" + "\n".join(good)) == good


@pytest.mark.parametrize(
    "line",
    [
        "kata_agent_threads  1",
        "kata_agent_threads 1 1700000000",
        "kata_agent_threads NaN",
        "kata_agent_threads 1e400",
        'kata_agent_threads{a="b"} 1',
        "kata_shim_threads 1",
        "up 1",
        'kata_guest_load{item="a"',
        'kata_guest_load{item="a",} 1',
        'kata_guest_load{item="a"item="b"} 1',
        'kata_guest_load{items="a"} 1',
        'kata_guest_load{item="\x1b[2J"} 1',
        'kata_guest_load{item="\u202eabc"} 1',
        f'kata_guest_load{{item="{"x" * 300}"}} 1',
        "kata_agent_threads 1\r",
        f"kata_agent_threads {'9' * 5000}",
        f'kata_guest_load{{item="{"x" * 3_000_000}"}} 1',
        "kata_guest_load{" + 'item="x",' * 100_000 + "} 1",
    ],
)
def test_what_a_guest_may_not_say_is_left_out(line: str) -> None:
    assert known_samples(line, GUEST)[1] == 1
    assert taken(line) == []


def test_types_that_a_guest_names_are_no_samples() -> None:
    found = known_samples("# TYPE kata_agent_threads counter\n\n# HELP x y\n", GUEST)
    assert found == ({}, 0)


def test_a_series_occurs_once_and_a_family_is_bounded() -> None:
    assert taken("kata_agent_threads 1\nkata_agent_threads 2\n") == ["kata_agent_threads 1"]
    many = "".join(f'kata_guest_vm_stat{{item="k{number}"}} 1\n' for number in range(10_000))
    assert len(taken(many)) == exposition.MAX_FAMILY_SAMPLES
    names = [name for name, one in GUEST.items() if one.label_names == "item"]
    many = "".join(f'{name}{{item="k{number}"}} 1\n' for name in names for number in range(1000))
    found, dropped = known_samples(many, GUEST)
    assert sum(map(len, found.values())) == exposition.MAX_GUEST_SAMPLES
    assert dropped == len(names) * 1000 - exposition.MAX_GUEST_SAMPLES


def test_lines_without_end_cost_little() -> None:
    began = time.process_time()
    for text in ("\n" * (4 << 20), "x\n" * (2 << 20), 'a{b="' + "\\" * (4 << 20), '"' * (4 << 20)):
        tracemalloc.start()
        known_samples(text, GUEST)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    assert time.process_time() - began < 20


@given(st.text(alphabet='kat_guesload{}="\\,item 019.e+-\n#', max_size=200))
def test_whatever_a_guest_says_stays_valid(text: str) -> None:
    for line in taken(f'kata_guest_load{{item="{text}"}} 1\n{text}'):
        (family,) = text_string_to_metric_families(line + "\n")
        assert family.name in GUEST


LABEL = st.text(max_size=40)


@given(st.lists(LABEL, max_size=5), st.floats(allow_nan=False))
def test_what_is_written_is_read_back_by_others_and_by_us(values: list[str], number: float) -> None:
    text = exposition.Text(families.DEFINITIONS)
    for value in dict.fromkeys(exposition.escape(value) for value in values):
        text.lines("kata_helper_fds").append(
            f'kata_helper_fds{{role="{value}"}} {exposition.number(number)}'
        )
    theirs = [
        (sample.labels["role"], sample.value)
        for family in text_string_to_metric_families(text.text())
        for sample in family.samples
    ]
    ours = [(labels[0][1], value) for one in parse(text.text().encode()) for _, labels, value in one.samples]
    assert ours == theirs
    assert len(ours) == len({exposition.escape(value) for value in values})


def test_a_histogram_is_whole() -> None:
    durations = Durations()
    for milliseconds in (0.2, 1, 1.5, 2, 511, 512, 513, 90_000):
        durations.add("State", int(milliseconds * 1e6))
    durations.add("Nonsense", 1)
    text = exposition.Text(families.DEFINITIONS)
    name = "kata_shim_rpc_durations_histogram_milliseconds"
    durations.write(text, name, families.ACTIONS.get)
    (family,) = text_string_to_metric_families(text.text())
    assert family.type == "histogram"
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if "le" in sample.labels}
    assert (buckets["1.0"], buckets["2.0"], buckets["256.0"], buckets["512.0"], buckets["+Inf"]) == (
        2,
        4,
        4,
        6,
        8,
    )
    count = next(sample.value for sample in family.samples if sample.name.endswith("_count"))
    assert count == 8
    assert {sample.labels["action"] for sample in family.samples} == {"state"}


def test_calls_of_one_label_are_added_up() -> None:
    durations = Durations()
    durations.add("ReadStdout", 3_000_000)
    durations.add("ReadStderr", 500_000_000)
    text = exposition.Text(families.DEFINITIONS)
    name = "kata_shim_rpc_durations_histogram_milliseconds"
    for _ in range(2):  # writing changes nothing
        text = exposition.Text(families.DEFINITIONS)
        durations.write(text, name, lambda _: "read")
    assert f'{name}_count{{action="read"}} 2\n' in text.text()
    assert f'{name}_sum{{action="read"}} 503.0\n' in text.text()
    assert f'{name}_bucket{{action="read",le="4.0"}} 1\n' in text.text()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\xff 1\n", "UTF-8"),
        (b"a b\n", "line 1 is no sample"),
        (b'a{b="c} 1\n', "line 1"),
        (b'a{b="c",b="d"} 1\n', "twice"),
        (b"# TYPE a unknown\na 1\n", "no type"),
        (b"a 1\n# TYPE a counter\n", "too late"),
        (b"\n" * 60_000, "lines"),
        (b"x" * (5 << 20), "bytes"),
        (b"a{" + b",".join(b'l%d="x"' % n for n in range(20)) + b"} 1\n", "labels"),
    ],
)
def test_a_text_that_is_no_exposition_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(MalformedError, match=words):
        parse(body)


def test_families_are_put_together() -> None:
    body = b"# HELP a first\\nline\n# TYPE a histogram\n"
    body += b'a_bucket{le="+Inf"} 1\na_sum 2\na_count 1\nb 3 1700\n# TYPE c gauge\nc 4\n'
    found = parse(body)
    assert [(one.name, one.type, len(one.samples)) for one in found] == [
        ("a", "histogram", 3),
        ("b", "untyped", 1),
        ("c", "gauge", 1),
    ]
    assert found[0].help == "first\nline"


def test_the_registry_is_sound() -> None:
    for name, one in families.DEFINITIONS.items():
        assert one.kind in ("counter", "gauge", "histogram")
        assert one.source in families.SOURCES
        assert one.help.endswith(".") or one.help.endswith(")."), name
        assert len(one.labels) <= 4


def test_the_page_is_made_of_the_registry() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "metrics_table.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), "run tools/metrics_table.py"
