"""kata-log-parser: formats, merging, checks, output, and that memory is bounded whatever it reads."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata.engine import log as engine_log
from kata.log_parser import formats, options, output
from kata.log_parser.main import main
from kata.log_parser.record import Record, parse_time, stamp

PROGRAM = Path(__file__).resolve().parents[2] / "tools/kata-log-parser"
NOW = 1795863700.0  # 2026-11-28T11:01:40Z


def call(*words: object, stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), *map(str, words)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, **options)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


# ---- formats ----


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            'time="2026-01-02T03:04:05.123456789+01:00" level=warning msg="a \\"b\\" c\\n"'
            " sandbox=abc pid=7 source=virtcontainers",
            ("2026-01-02T02:04:05.123456789Z", "warning", "abc", "virtcontainers", 'a "b" c', {"pid": "7"}, "logfmt"),
        ),
        (
            '{"msg":"m","level":"DEBG","ts":"2026-01-02T03:04:05.5Z","pid":"1","name":"kata-agent","sandbox":"s"}',
            ("2026-01-02T03:04:05.500000000Z", "debug", "s", "kata-agent", "m", {"pid": "1"}, "json"),
        ),
        (
            '{"ts":1767323045.000250,"level":"ERRO","source":"agent","msg":"no"}',
            ("2026-01-02T03:04:05.000250000Z", "error", "", "agent", "no", {}, "json"),
        ),
        (
            '{"time":"2026-01-02T03:04:05.000000001Z","event":"container.exited","sandbox":"s",'
            '"exit_code":3,"oom_killed":false}',
            ("2026-01-02T03:04:05.000000001Z", "", "s", "", "container.exited",
             {"exit_code": "3", "oom_killed": "false"}, "json"),
        ),
        (
            "2026-01-02T03:04:05Z the guest is up",
            ("2026-01-02T03:04:05.000000000Z", "", "", "", "the guest is up", {}, "text"),
        ),
        (
            "2026-01-02T03:04:05Z kata abc: words",
            ("2026-01-02T03:04:05.000000000Z", "", "abc", "", "words", {}, "text"),
        ),
        (
            "2026-01-02T03:04:05Z kata abc: debug: console: words",
            ("2026-01-02T03:04:05.000000000Z", "debug", "abc", "console", "words", {}, "text"),
        ),
        ("[   12.345678] Linux version", (None, "", "", "kernel", "Linux version", {"uptime": "12.345678"}, "kernel")),
        (
            "Nov 28 11:00:03 node kata[12]: words: more",
            ("2026-11-28T11:00:03.000000000Z", "", "", "kata", "words: more", {"host": "node", "pid": "12"}, "short"),
        ),
        (
            "Dec 31 23:00:00 node kata: last year's",
            ("2025-12-31T23:00:00.000000000Z", "", "", "kata", "last year's", {"host": "node"}, "short"),
        ),
        (
            '2026-11-28T11:00:03+0000 node containerd[9]: time="2026-11-28T11:00:02Z" level=error msg="x y"'
            " namespace=k8s.io",
            ("2026-11-28T11:00:02.000000000Z", "error", "", "containerd", "x y",
             {"namespace": "k8s.io", "host": "node", "pid": "9"}, "short"),
        ),
        (
            json.dumps({"__REALTIME_TIMESTAMP": "1767323045000001", "MESSAGE": list(b"caf\xe9"), "PRIORITY": "4",
                        "SYSLOG_IDENTIFIER": "kata", "_PID": "3"}),
            ("2026-01-02T03:04:05.000001000Z", "warning", "", "kata", "caf\\xe9", {"pid": "3"}, "journal"),
        ),
        (
            json.dumps({"__REALTIME_TIMESTAMP": "1", "_COMM": "containerd",
                        "MESSAGE": 'time="2026-01-02T03:04:05Z" level=info msg=in sandbox=s'}),
            ("2026-01-02T03:04:05.000000000Z", "info", "s", "containerd", "in", {}, "journal"),
        ),
    ],
)  # fmt: skip
def test_each_format_is_taken_apart(line: str, expected: tuple[Any, ...]) -> None:
    got = formats.parse(line, NOW)
    when = stamp(got.time_ns) if got.time_ns is not None else None
    assert (when, got.level, got.sandbox, got.source, got.message, got.fields, got.format) == expected


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("what is this", "none of the formats"),
        ('{"a":', "begins as JSON"),
        ("{" * 5000, "begins as JSON"),
        ('time="2026-01-02T03:04:05Z level=info', "does not end"),
        ("time=2026-01-02T03:04:05Z rubbish level=info", "column 27"),
        ('a=b"c', "quotation mark"),
        ("time=yesterday level=info msg=x", "is no time"),
        ("time=2026-13-45T03:04:05Z msg=x", "is no time"),
        ('{"__REALTIME_TIMESTAMP":"-1"}', "no number"),
        ('{"MESSAGE":[1,2,999]}', "neither text nor bytes"),
        (" ".join(f"k{n}=v" for n in range(100)), "more than 64 fields"),
        ("Feb 30 11:00:03 node kata[12]: words", "no such time"),
    ],
)
def test_what_has_no_format_is_named(line: str, why: str) -> None:
    with pytest.raises(formats.Malformed, match=why):
        formats.parse(line, NOW)


@given(
    st.text(max_size=300)
    | st.binary(max_size=300).map(lambda data: data.decode("utf-8", "backslashreplace"))
)
def test_no_line_is_more_than_malformed(line: str) -> None:
    try:
        record = formats.parse(line, NOW)
    except formats.Malformed:
        return
    for write in output.WRITERS.values():
        assert "\n" not in write(record)
    assert output.as_text(record).isprintable()


@given(
    st.text(max_size=60),
    st.dictionaries(st.text(alphabet="abcxyz_", min_size=1, max_size=5), st.text(max_size=20)),
)
def test_what_is_written_as_logfmt_is_read_again(message: str, fields: dict[str, str]) -> None:
    record = Record(message, "logfmt", 1_767_323_045_000_000_001)
    record.fields = {f"f_{name}": value for name, value in fields.items()}
    again = formats.parse(output.as_logfmt(record))
    assert again.message.rstrip("\n") == message.rstrip("\n")
    assert {name: again.fields[name] for name in record.fields} == record.fields
    assert again.time_ns == record.time_ns


def test_times() -> None:
    assert parse_time("2026-01-02 03:04:05,250") == 1_767_323_045_250_000_000
    assert parse_time("2026-01-02T03:04:05.1234567891Z") == 1_767_323_045_123_456_789
    assert parse_time("1767323045") == 1_767_323_045_000_000_000
    for wrong in ("", "now", "2026-01-02T25:00:00Z", "1e5", "-1", "\u0661"):
        assert parse_time(wrong) is None, wrong


@pytest.mark.parametrize("form", engine_log.FORMATS)
def test_what_an_engine_writes_is_read(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    log = engine_log.EngineLog("box")
    log.form = form
    log.set_level("debug")
    log.write('it said "x=y"', "debug", "agent", container="c1")
    log.write("it goes on", "info", pid=7)
    first, second = (formats.parse(line) for line in written.getvalue().splitlines())
    assert (first.level, first.source) == ("debug", "agent")
    assert first.message.startswith('it said "x=y"')
    assert second.message.startswith("it goes on")
    if form != "text":
        assert (first.sandbox, first.fields, second.fields) == ("box", {"container": "c1"}, {"pid": "7"})


# ---- merging and filters ----


def write_logs(tmp_path: Path) -> list[Path]:
    """Three logs of a thousand lines each, in three formats, their times interleaved and slightly shuffled."""
    shuffled = random.Random(5)
    paths = []
    for index, form in enumerate(("logfmt", "json", "text")):
        times = [1_767_323_045_000_000_000 + (number * 3 + index) * 10**9 for number in range(1000)]
        for number in range(0, 990, 7):
            other = number + shuffled.randrange(8)
            times[number], times[other] = times[other], times[number]
        lines = []
        for number, at in enumerate(times):
            words = f"{form} {at}"
            lines.append(
                f'time="{stamp(at)}" level={"error" if number % 10 == 0 else "debug"} msg="{words}" sandbox=abc{index}'
                if form == "logfmt"
                else json.dumps({"ts": stamp(at), "level": "INFO", "msg": words, "sandbox": "default.other"})
                if form == "json"
                else f"{stamp(at)} {words}"
            )
        paths.append(tmp_path / f"{form}.log")
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


def test_logs_are_merged_by_time(tmp_path: Path) -> None:
    paths = write_logs(tmp_path)
    done = call("-f", "json", *paths)
    assert (done.returncode, done.stderr) == (0, "")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 3000
    assert [record["time"] for record in records] == sorted(record["time"] for record in records)
    for record in records[::50]:  # each stands where it says
        assert record["msg"] in Path(record["file"]).read_text().splitlines()[record["line"] - 1]
    # The same through standard input, as one stream after another: too far apart to be sorted, which is said.
    joined = b"".join(path.read_bytes() for path in paths)
    piped = call("--quiet", "-f", "json", "-", stdin=joined)
    assert len(piped.stdout.splitlines()) == 3000
    assert call("--strict", "-", stdin=joined).returncode == 1


def test_filters(tmp_path: Path) -> None:
    paths = write_logs(tmp_path)

    def count(*words: str) -> int:
        done = call("-f", "json", *words, *paths)
        assert done.returncode == 0, done.stderr
        return len(done.stdout.splitlines())

    assert count("--sandbox", "abc") == 1000
    assert count("--sandbox", "oth") == 1000  # an id within a namespace
    assert count("--level", "error") == 100
    assert count("--level", "info", "--sandbox", "default.other") == 1000
    assert count("--since", "2026-01-02T03:14:05Z", "--until", "2026-01-02T03:14:15Z") == 10
    assert count("--since", "10m") == 0
    for words in (
        ["--level", "x"],
        ["--since", "x"],
        ["--nonsense"],
        ["-f"],
        ["-f", "xml"],
        [tmp_path / "none"],
    ):
        done = call(*words, *([] if words[0] == "-f" and len(words) == 1 else paths))
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")


def test_an_engines_traceback_stays_together_and_its_sandbox_is_known(tmp_path: Path) -> None:
    directory = tmp_path / "sandboxes" / "f00"
    directory.mkdir(parents=True)
    (directory / "engine.log").write_text(
        "2026-01-02T03:04:05Z Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    raise ValueError\nValueError\n\n2026-01-02T03:04:06Z on it goes\n'
    )
    done = call("-f", "json", "--sandbox", "f00", directory / "engine.log")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == ""
    assert [record["line"] for record in records] == [1, 2, 3, 4, 6]
    assert {record["sandbox"] for record in records} == {"f00"}
    assert len({record["time"] for record in records[:4]}) == 1


# ---- checks ----


def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(
        'time="2026-01-02T03:04:05Z" level=info msg=good pid=1\n'
        'time="2026-01-02T03:04:07Z" level=info pid=1\n'
        "rubbish \x1b[31m\n"
        'time="2026-01-02T03:04:06Z" level=info msg=late pid=1\n' + "x" * 70_000 + "\n"
        "2026-01-02T03:04:09Z no level, and none needed"
    )
    done = call("--check-only", log)
    assert done.returncode == 1
    assert done.stdout == ""
    assert sorted(done.stderr.splitlines()) == [
        f"{log}:2: it lacks msg",
        f"{log}:3: it is of none of the formats",
        f"{log}:4: it is 1.000000 s earlier than the one before",
        f"{log}:5: it is longer than 64 KiB",
    ]
    assert "it lacks" not in call("--check-only", "--ignore-missing-fields", log).stderr
    assert call(log).returncode == 0
    assert len(call(log).stdout.splitlines()) == 4
    assert call("--strict", "-q", log).returncode == 1
    good = tmp_path / "good.log"
    good.write_text('time="2026-01-02T03:04:05Z" level=info msg=good\n')
    assert (call("--check-only", "--strict", good).returncode, call("--check-only", good).stderr) == (0, "")


def test_empty_logs(tmp_path: Path) -> None:
    empty = tmp_path / "empty.log"
    empty.touch()
    assert call(empty).returncode == 0
    done = call("--error-if-file-empty", empty)
    assert (done.returncode, done.stderr) == (1, f"{empty}:0: it is empty\n")
    rubbish = tmp_path / "rubbish.log"
    rubbish.write_text("rubbish\n")
    assert call("--error-if-file-empty", rubbish).returncode == 0
    assert call("-q", "--error-if-no-records", rubbish).returncode == 1


# ---- output ----


def test_output_cannot_control_a_terminal_or_forge_a_line(tmp_path: Path) -> None:
    evil = "a\x1b]0;x\x07\r\n2026-01-02T03:04:05Z forged \u202e\x9b31m"
    log = tmp_path / "evil.log"
    log.write_text(
        json.dumps({"ts": "2026-01-02T03:04:05Z", "msg": evil, "level": "info", "k\n": evil, "source": evil})
        + "\n"
    )
    for form in output.FORMATS:
        done = call("-f", form, log)
        lines = done.stdout.splitlines()
        assert len(lines) == (2 if form == "csv" else 1), form
        assert all(line.isprintable() for line in lines), form
    assert json.loads(call("-f", "json", log).stdout)["msg"] == evil.rstrip("\n")
    rows = list(csv.DictReader(io.StringIO(call("-f", "csv", log).stdout)))
    assert list(rows[0]) == list(output.COLUMNS)
    assert rows[0]["line"] == "1"


def test_statistics_and_files(tmp_path: Path) -> None:
    paths = write_logs(tmp_path)
    found = json.loads(call("--statistics", "-f", "json", *paths).stdout)
    assert found["records"] == 3000
    assert found["levels"] == {"-": 1000, "debug": 900, "info": 1000, "error": 100}
    assert found["formats"] == {"json": 1000, "logfmt": 1000, "text": 1000}
    assert found["seconds"] == 2999
    assert found["longest_gap_seconds"] == 1
    assert "1000  abc0" in call("--statistics", paths[0]).stdout
    target = tmp_path / "out.csv"
    assert call("-f", "csv", paths[0], "-o", target).returncode == 0
    assert len(target.read_text().splitlines()) == 1001
    assert call("-o", target / "x", paths[0]).returncode == 2
    assert call("-o", target, paths[0], tmp_path / "none").returncode == 2
    assert len(target.read_text().splitlines()) == 1001
    assert not list(tmp_path.glob("*.part"))


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    """A device or a pipe is written to and stays what it is, as does a link."""
    line = b"time=2026-01-02T03:04:05Z level=info msg=words\n"
    pipe, link, real = tmp_path / "pipe", tmp_path / "link", tmp_path / "real"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert call("-o", pipe, "-", stdin=line).returncode == 0
        assert b"words" in os.read(reader, 4096)
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    real.write_text("old")
    link.symlink_to(real)
    assert call("-o", link, "-", stdin=line).returncode == 0
    assert link.is_symlink()
    assert "words" in real.read_text()
    done = call("-o", tmp_path, "-", stdin=line)
    assert (done.returncode, "Is a directory" in done.stderr) == (2, True)


def test_an_error_names_the_file_that_was_given(tmp_path: Path) -> None:
    line = b"time=2026-01-02T03:04:05Z level=info msg=words\n"
    target = tmp_path / "none" / "out"
    done = call("-o", target, "-", stdin=line)
    assert done.returncode == 2
    first, hint = done.stderr.splitlines()
    assert first == f"error: {target} cannot be written: No such file or directory"
    assert hint.startswith("hint: -o names ")
    assert "No space left on device: /dev/full\n" in call("-o", "/dev/full", "-", stdin=line).stderr
    script = f"{PROGRAM} - >/dev/full"
    told = subprocess.run(["/bin/sh", "-c", script], input=line, capture_output=True, check=False)
    assert told.returncode == 2
    assert told.stderr == b"error: standard output cannot be written: No space left on device\n"


def test_a_byte_order_mark_is_left_out() -> None:
    line = b"\xef\xbb\xbftime=2026-01-02T03:04:05Z level=info msg=words\n"
    done = call("-f", "json", "--strict", "-", stdin=line)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["msg"] == "words"


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A log of 100 MB, half of it lines as long as lines may be, with 48 MiB of address space beside Python's own."""
    big = tmp_path / "big.log"
    short = b'time="2026-01-02T03:04:05Z" level=info msg="words of a line" sandbox=abc\n'
    long = b'time="2026-01-02T03:04:05Z" level=info msg="' + b"y" * 60_000 + b'"\n'
    with open(big, "wb") as file:
        for _ in range(80):
            file.write(short * 1000 + long * 10)
        file.write(b"z" * (40 << 20) + b"\n" + short)
    assert big.stat().st_size > 90_000_000
    script = f"ulimit -v 110000; exec {PROGRAM} --statistics -q -f json {big} {big}"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    assert json.loads(done.stdout)["records"] == 2 * (80 * 1010 + 1)


def test_it_ends_with_its_reader(tmp_path: Path) -> None:
    paths = write_logs(tmp_path)
    line = f"{PROGRAM} {paths[0]} {paths[1]} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=False)
    assert done.stdout.count(b"\n") == 1
    assert done.stderr == b""


def test_help_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option.head in shown for option in options.OPTIONS)
    assert main(["--list-output-formats"]) == 0
    assert capsys.readouterr().out.split() == list(output.FORMATS)
    assert main(["__complete", "line", "kata-log-parser --output-f"]) == 0
    assert "--output-format" in capsys.readouterr().out
    assert main(["__complete", "line", "kata-log-parser -f "]) == 0
    assert capsys.readouterr().out.split() == ["text", "logfmt", "json", "csv"]
