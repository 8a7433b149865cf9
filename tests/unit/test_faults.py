"""The machinery of tests/faults itself: its stop points and its comparison of hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faults import answers, oci_points, report, stops
from faults.host import difference
from faults.rounds import Record, podman_rounds, point_rounds, random_rounds
from faults.target import Armed
from waiting import until

TESTS = Path(__file__).resolve().parents[1]


def test_an_armed_point_stops_who_reaches_it_until_it_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stops, "_directory", str(tmp_path))
    stops.stop("start.guest")  # not armed: goes on
    armed = Armed(tmp_path / "start.guest")
    went_on = threading.Event()

    def work() -> None:
        stops.stop("start.guest")
        went_on.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not (pid := armed.reached()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert pid == os.getpid()
        assert not went_on.is_set()
    finally:
        armed.release()
        thread.join()
    assert went_on.is_set()


@pytest.mark.parametrize("where", ["shim", "engine", "runtime", "maker", "waiter"])
def test_the_points_find_their_places_in_the_product(where: str) -> None:
    script = f"""
import sys
sys.path[:0] = [{str(TESTS.parent / "src")!r}, {str(TESTS)!r}]
from faults import stops
stops.install("/nonexistent", {where!r})
if {where!r} == "engine":
    stops._install_serving_engine()
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True)


def test_every_point_is_put_somewhere() -> None:
    listed = (TESTS / "faults/stops.py").read_text()
    commands = (TESTS / "faults/oci_points.py").read_text()
    for point in stops.POINTS:
        places = commands if point.where == "runtime" else listed.partition("PARTS = ")[2]
        assert f'"{point.name}"' in places, f"{point.name} is listed and nowhere else"
    assert len(stops.BY_NAME) == len(stops.POINTS) >= 15


def test_each_point_has_its_victims() -> None:
    rounds = {one.key for one in point_rounds(stops.BY_NAME)}
    assert {"create.machine engine", "create.machine hypervisor", "create.machine containerd"} <= rounds
    assert {"pool.confirmed shim", "pool.confirmed waiter"} <= rounds
    assert "pool.taken shim" not in rounds  # it has been told, and has ended
    assert "create.share hypervisor" not in rounds  # there is none yet
    assert "delete.undo hypervisor" not in rounds  # nor any more
    assert {"create.address shim", "clear.request shim"} <= rounds
    assert {"monitor.disk nonsense", "monitor.disk refuse"} <= rounds
    assert "monitor.disk hypervisor" not in rounds
    assert all(
        parts.keys() == {"monitor.start", "monitor.disk", "monitor.disk-taken"}
        for parts in stops.PARTS.values()
    )
    assert answers.KINDS == stops.WRONGLY  # the program between stands alone


def test_the_oci_command_line_has_points_and_victims_of_its_own() -> None:
    rounds = {one.key: one for one in podman_rounds(oci_points.names())}
    assert {
        "create.reserved runtime",
        "create.machine hypervisor",
        "exec.told exec-conmon",
    } <= rounds.keys()
    assert {"create.socket conmon", "delete.half-removed runtime", "run.waits standing"} <= rounds.keys()
    assert "create.reserved engine" not in rounds  # there is none yet
    assert not any(one.victim in ("shim", "containerd", "maker") for one in rounds.values())
    assert rounds["run.ended engine"].scenario == "run"
    assert rounds["create.machine engine"].scenario == "podman"
    assert {"pool.order-received runtime", "pool.taken waiter", "pool.taken conmon"} <= rounds.keys()
    assert "pool.listening conmon" not in rounds  # the container that has it made has ended
    assert rounds["pool.listening waiter"].scenario == "podman-pool"


def test_a_random_round_depends_on_seed_and_number_alone() -> None:
    victims = ["engine", "hypervisor", "containerd"]
    many = random_rounds(7, range(1, 30), victims, ("ctr", "crictl"))
    [one] = random_rounds(7, [12], victims, ("ctr", "crictl"))
    same = many[11]
    assert (one.victim, one.moment, one.scenario) == (same.victim, same.moment, same.scenario)
    assert {round_.scenario for round_ in many} == {"ctr", "crictl"}


def test_difference_of_two_hosts() -> None:
    before = {"mount": ["a", "a", "b"], "link": []}
    assert difference(before, {"mount": ["a", "a", "b"], "link": []}) == []
    assert difference(before, {"mount": ["a", "b"], "link": ["tap0"]}) == [
        "gone: mount a",
        "left: link tap0",
    ]
    assert difference(before, {"mount": ["a", "a", "a", "b"], "link": []}) == ["left: mount a"]


def test_a_page_keeps_what_it_says_of_other_containerds(tmp_path: Path) -> None:
    def record(version: str) -> Record:
        made = Record(tmp_path / version, f"containerd {version}", 7, resume=False)
        made.add("start.guest engine", {"ok": True, "victim": "engine", "became": f"with {version}"})
        made.add(
            "random 1", {"ok": True, "victim": "engine", "scenario": "ctr", "at": "exec", "seconds": 1.0}
        )
        return made

    text = ""
    for version in ("1.10.2", "2.4.2", "1.6.20"):
        text = report.page(record(version), {"ctr": 1.5}, text)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [f"## containerd {version}" for version in ("1.6.20", "1.10.2", "2.4.2")]
    assert report.page(record("1.10.2"), {"ctr": 1.5}, text) == text
    assert text.startswith(report.HEAD)
    for version in ("1.6.20", "1.10.2", "2.4.2"):
        assert text.count(f"with {version}") == 1
    assert text.count("`tools/faults --containerd 2 --points") == 1
    # A run about some points does not take the place of the one before.
    text = report.page(record("1.6.20: 3 of them"), {"ctr": 1.5}, text)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[:3] == [
        "## containerd 1.6.20",
        "## containerd 1.6.20: 3 of them",
        "## containerd 1.10.2",
    ]
    assert text.count("with 1.6.20 |") == 1


def test_the_program_between_passes_on_what_was_not_ordered(tmp_path: Path) -> None:
    """Against a scripted Firecracker's place: a server on the socket that it is told of."""
    real, program, orders = tmp_path / "real", tmp_path / "program", tmp_path / "orders"
    real.write_text(
        "#!/usr/bin/python3 -IS\n"
        "import socket, sys\n"
        "one = socket.socket(socket.AF_UNIX); one.bind(sys.argv[2]); one.listen(8)\n"
        "client = one.accept()[0]\n"
        "while data := client.recv(65536): client.sendall(b'got ' + data.split()[1])\n"
        "sys.exit(7)\n"
    )
    real.chmod(0o755)
    answers.write(program, str(real), orders)
    path = tmp_path / "api"
    with subprocess.Popen([program, "--api-sock", path]) as process, socket.socket(socket.AF_UNIX) as client:
        until(path.exists, "the socket is there")
        client.connect(str(path))

        def ask(request: str) -> str:
            client.sendall(f"{request} HTTP/1.1\r\n\r\n".encode())
            return client.recv(65536).decode()

        assert ask("PATCH /drives/disk0") == "got /drives/disk0"
        orders.write_text("drives refuse\n")
        assert answers.SAID in ask("PATCH /drives/disk0")
        assert ask("GET /") == "got /"
        orders.write_text("/ nonsense\n")
        assert ask("GET /").startswith("SSH")
        assert ask("GET /vm") == "got /vm"
        client.close()
        assert process.wait(30) == 7
