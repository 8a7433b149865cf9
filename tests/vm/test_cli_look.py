"""What the `kata` command shows of a running container, and what it executes there."""

from __future__ import annotations

import hashlib
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cli_support import box, container, identity_of
from conftest import Kata
from waiting import until

__all__ = ["box"]


def test_ps_lists_it(shared_kata: Kata, box: str) -> None:
    listed = {entry["name"]: entry for entry in json.loads(shared_kata.ok("ps", "--json"))}
    assert listed[box]["status"] == "running"
    shown = shared_kata.ok("ps")
    assert shown.splitlines()[0].split()[:2] == ["CONTAINER", "ID"]
    assert "Up " in shown
    assert shared_kata.ok("ps", "-q").strip() == listed[box]["id"][:12]


def test_an_id_may_be_shortened(shared_kata: Kata, box: str) -> None:
    identity = json.loads(shared_kata.ok("inspect", box))[0]["id"]
    assert json.loads(shared_kata.ok("inspect", identity[:8]))[0]["name"] == box


def test_logs(shared_kata: Kata, box: str) -> None:
    done = shared_kata.call("logs", box)
    assert done.stdout == b"first\n"
    assert done.stderr == b"second\n"
    assert b"T" in shared_kata.call("logs", "-t", box).stdout.split()[0]
    records = [json.loads(line) for line in shared_kata.ok("logs", "--json", box).splitlines()]
    assert {record["stream"] for record in records} == {"stdout", "stderr"}
    assert sum(len(stream) for stream in (shared_kata.call("logs", "--tail", "0", box).stdout,)) == 0


def test_logs_follow_to_the_end(shared_kata: Kata, busybox_image: str) -> None:
    with container(shared_kata, busybox_image, "counter", "for i in 1 2 3 4 5; do echo $i; sleep 0.3; done"):
        assert shared_kata.ok("logs", "-f", "counter").split() == ["1", "2", "3", "4", "5"]
        assert shared_kata.ok("logs", "--tail", "2", "counter").split() == ["4", "5"]


def test_top_shows_the_guests_processes(shared_kata: Kata, box: str) -> None:
    processes = json.loads(shared_kata.ok("top", "--json", box))
    assert any("while :" in " ".join(process["command"]) for process in processes)
    assert shared_kata.ok("top", box).startswith("PID")


def test_inspect_tells_the_sandbox(shared_kata: Kata, box: str) -> None:
    found = json.loads(shared_kata.ok("inspect", box))[0]
    assert found["spec"]["process"]["args"][0] == "sh"
    assert found["sandbox"]["accelerator"] in ("kvm", "tcg")
    pid = found["state"]["pid"]
    assert "qemu" in Path(f"/proc/{pid}/comm").read_text()


def test_templates_and_filters(shared_kata: Kata, box: str, busybox_image: str) -> None:
    """What scripts for Docker ask for, of a container and its image."""
    kata = shared_kata
    [found] = json.loads(kata.ok("inspect", box))
    assert kata.ok("inspect", "-f", "{{.Id}} {{.Name}} {{.State.Status}} {{.State.Running}}", box) == (
        f"{found['id']} /{box} running true\n"
    )
    assert kata.ok("inspect", "--format", "{{json .Config.Cmd}}", box) == (
        json.dumps(found["args"], separators=(",", ":")).replace(">", "\\u003e").replace("&", "\\u0026")
        + "\n"
    )
    assert kata.ok("ps", "--format", "{{.Names}}\\t{{.State}}\\t{{.ID}}", "-f", f"name=^{box}$") == (
        f"{box}\trunning\t{found['id'][:12]}\n"
    )
    assert kata.ok("ps", "-aq", "--no-trunc", "--filter", f"id={found['id'][:6]}").split() == [found["id"]]
    assert kata.ok("ps", "-q", "--filter", "status=exited", "--filter", f"name={box}") == ""
    assert kata.ok("ps", "-lq", "--no-trunc").split()[0]
    assert kata.ok("ps", "--format", "table {{.Names}}", "-f", f"name={box}").split() == ["NAMES", box]
    [image] = json.loads(kata.ok("inspect", "--type", "image", found["Image"]))
    assert image["Id"] == found["Image"]
    assert image["RootFS"]["Layers"]
    ids = kata.ok("images", "--format", "{{.ID}}", "--no-trunc").split()
    assert found["Image"] in ids
    assert json.loads(kata.ok("images", "--format", "json").splitlines()[0])["Repository"]
    done = kata.call("inspect", "-f", "{{.State.Statsu}}", box)
    assert (done.returncode, b"no field Statsu" in done.stderr) == (125, True)
    done = kata.call("inspect", "nosuchthing")
    assert (done.returncode, done.stdout) == (125, b"[]\n")
    assert kata.ok("logs", "--since", "2026-01-01T00:00:00Z", box) == "first\n"
    assert kata.ok("logs", "--until", "2020-01-01T00:00:00Z", box) == ""
    assert kata.call("logs", "--since", "yesterday", box).returncode == 125


def test_debug_bundle(shared_kata: Kata, box: str, tmp_path: Path) -> None:
    """All of a running sandbox but its secrets."""
    target = tmp_path / "box.tar.gz"
    said = shared_kata.ok("debug", "bundle", box, "-o", str(target))
    with tarfile.open(target) as archive:
        files = {
            member.name.partition("/")[2]: file.read()
            for member in archive.getmembers()
            if (file := archive.extractfile(member)) is not None
        }
    assert json.loads(files["manifest.json"])["problems"] == [], said
    whole = b"".join(files.values())
    for secret in (b"dont-look-5x7", b"trap 'exit 0'", b"echo first"):
        assert secret not in whole, [name for name, data in files.items() if secret in data]
    assert json.loads(files["config.json"])["process"]["args"] == "<3 removed>"
    described = json.loads(files["description.json"])
    roles = {one["pid"]: one["role"] for one in json.loads(files["processes.json"])}
    assert roles[described["engine_pid"]] == "engine"
    assert described["hypervisor_pid"] in roles
    assert json.loads(files["figures.json"])["id"] == described["id"]
    assert {"boot", "agent"} & {one["name"] for one in json.loads(files["timings.json"])}
    assert "container.started" in {event["event"] for event in json.loads(files["events.json"])}
    assert b"\n-machine\n" in files["hypervisor.args.txt"]
    assert set(described["host_cgroups"].values()) == set(json.loads(files["cgroups.json"]))


def test_stats(shared_kata: Kata, box: str) -> None:
    row = json.loads(shared_kata.ok("stats", "--json", "--interval", "0.3", box))[0]
    assert row["memory_bytes"] > 0
    total = shared_kata.ok("exec", box, "sed", "-n", "s/^MemTotal: *\\([0-9]*\\) kB/\\1/p", "/proc/meminfo")
    assert row["memory_limit_bytes"] == int(total) * 1024, (
        "without a limit of its own it has that of the machine"
    )
    assert row["pids"] >= 1
    assert shared_kata.ok("stats", "--no-stream", "--interval", "0.1", box).splitlines()[1].split()[1] == box
    assert row["client"] == "kata"
    assert 0 < row["overhead_bytes"] < 1 << 30
    parts = row["memory_parts"]
    assert all(8 << 20 < parts[name] < 1 << 30 for name in ("guest", "hypervisor", "engine"))
    assert parts["helpers"] > 0  # the network's
    shown = shared_kata.ok("stats", "--no-stream", "--interval", "0.1", "--format", "{{.GuestMem}}", box)
    assert "MiB" in shown
    shown = json.loads(shared_kata.ok("top", "--json", "--interval", "0.3", "--filter", box))
    assert [(one["name"], one["state"], one["problem"]) for one in shown] == [(box, "ready", "")]
    assert shown[0]["rates"]["cpu_per_second"] is not None
    assert shown[0]["timings"]


def test_the_log_of_the_engine_and_its_level(shared_kata: Kata, box: str) -> None:
    shared_kata.ok("debug", "level", box, "info")
    shared_kata.ok("exec", box, "true")
    said = shared_kata.ok("logs", "--engine", box)
    assert "sandbox.ready" in said
    assert f"container.started container={identity_of(shared_kata, box)}" in said
    log = shared_kata.run_dir / "sandboxes" / identity_of(shared_kata, box) / "engine.log"
    shared_kata.ok("debug", "level", box, "debug")
    shared_kata.ok("exec", box, "true")
    until(lambda: " debug: " in log.read_text(), "lines that are not there otherwise")
    shared_kata.ok("debug", "level", box, "info")
    before = log.read_text().count(" debug: ")
    shared_kata.ok("exec", box, "true")
    assert log.read_text().count(" debug: ") == before
    lines = shared_kata.ok("logs", "--engine", box).removeprefix(said).splitlines()
    debug = [line for line in lines if " debug: " in line]
    assert sum("the agent answered ExecProcess" in line for line in debug) == 1
    assert sum("the engine answered Exec " in line for line in debug) == 1
    assert '"msg":"kata-agent ' in shared_kata.ok("logs", "--guest", box)


# ---- exec ----


def test_exec(shared_kata: Kata, box: str) -> None:
    done = shared_kata.call(
        "exec", "-e", "B=2", "-w", "/tmp", box, "sh", "-c", "echo $MINE$B $PWD; echo e >&2; exit 5"
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, b"12 /tmp\n", b"e\n")
    assert shared_kata.ok("exec", "-i", box, "cat", stdin=b"in and out") == "in and out"
    groups = ("grep", "Groups", "/proc/self/status")
    as_another = shared_kata.ok("exec", "-u", "7:8", box, "sh", "-c", f"id -u; {' '.join(groups)}")
    assert as_another.split() == ["7", "Groups:", "8"]
    # As in Docker: root is in its own group, and in those that the image's file has it in.
    assert shared_kata.ok("exec", box, *groups).split() == ["Groups:", "0"]
    shared_kata.ok("exec", box, "sh", "-c", "echo mail:x:8:root >>/etc/group")
    assert shared_kata.ok("exec", "-u", "root", box, *groups).split() == ["Groups:", "0", "8"]


def test_exec_of_what_is_not_there(shared_kata: Kata, box: str) -> None:
    for word in ("no-such-command", ""):
        done = shared_kata.call("exec", "-u", "", "-w", "", box, word)
        assert done.returncode == 127
        assert b"executable file not found in $PATH" in done.stderr
    assert shared_kata.call("exec", box, "/etc/passwd").returncode == 126


def test_exec_returns_though_a_child_keeps_the_streams(shared_kata: Kata, box: str) -> None:
    assert shared_kata.ok("exec", box, "sh", "-c", "sleep 300 & echo started", timeout=60) == "started\n"


def test_a_detached_exec(shared_kata: Kata, box: str) -> None:
    shared_kata.ok("exec", "-d", box, "sh", "-c", "echo x > /tmp/detached")
    until(lambda: shared_kata.call("exec", box, "test", "-e", "/tmp/detached").returncode == 0, "the file")


def test_two_hundred_execs_lose_no_byte(shared_kata: Kata, box: str) -> None:
    script = "yes 0123456789abcde | head -c 1048576"
    expected = hashlib.sha256(b"0123456789abcde\n" * 65536).hexdigest()

    def once(_: int) -> str:
        done = shared_kata.call("exec", box, "sh", "-c", script)
        assert done.returncode == 0, done.stderr
        return hashlib.sha256(done.stdout).hexdigest()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(once, range(200))) == {expected}
