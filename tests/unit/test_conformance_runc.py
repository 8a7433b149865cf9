"""What is read of bats's output, and of its files."""

from __future__ import annotations

import runc_suite
from oci_suite import Result

TAP = """\
1..4
ok 1 runc create
not ok 2 runc update --cpu-quota [cgroup v1]
# (from function `fail' in file helpers.bash, line 335,
#  in test file update.bats, line 33)
#   `[ "$status" -eq 0 ]' failed
# runc create (status=1):
# error: it cannot
ok 3 checkpoint # skip test requires criu
ok 4 # is a name # skip
"""


def test_outcomes_and_what_was_said_about_them() -> None:
    assert list(runc_suite.parse(TAP)) == [
        ("runc create", "passed", ()),
        (
            "runc update --cpu-quota [cgroup v1]",
            "failed",
            ('`[ "$status" -eq 0 ]\' failed', "runc create (status=1):", "error: it cannot"),
        ),
        ("checkpoint", "skipped", ("test requires criu",)),
        ("# is a name", "skipped", ()),
    ]


def test_names_of_a_file() -> None:
    assert runc_suite.planned('setup() {\n}\n@test "runc "quoted" one" {\n}\n  @test "no" {\n') == [
        'runc "quoted" one'
    ]


def test_counts_are_of_one_file_each_and_a_known_reason_stands_in_the_table() -> None:
    found = {
        ("start: a", "runc"): Result("passed", (), 0.0),
        ("start: a", "kata"): Result("failed", ("no | such",), 0.0),
        ("start_hello: b", "runc"): Result("skipped", (), 0.0),
        ("start_hello: b", "kata"): Result("passed", (), 0.0),
    }
    lines = runc_suite.section(found, "Versions.")
    assert "| all | 1 of 1 | 1 of 2 | 1 |" in lines
    assert "| start | 1 of 1 | 0 of 1 |  |" in lines
    assert "| start_hello | 0 of 0 | 1 of 1 | 1 |" in lines
    assert "| start: a | passed | failed | not known: no \\| such |" in lines
    assert runc_suite.unexplained(found) == ["start: a"]
