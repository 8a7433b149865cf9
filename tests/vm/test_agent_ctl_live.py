"""kata-agent-ctl against real agents: in a sandbox, in a machine of its own, as a process of this host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from waiting import PATIENCE, until

from kata import paths
from kata.agent_ctl import methods

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]


def control(
    kata: Kata, *words: str, stdin: bytes = b"", timeout: float = 3 * PATIENCE
) -> subprocess.CompletedProcess[bytes]:
    """Run the tool with a kata's directories."""
    program = ROOT / "src/kata/agent_ctl/__main__.py"
    return subprocess.run(
        ["/usr/bin/python3", "-I", "-S", program, *words],
        input=stdin,
        capture_output=True,
        timeout=timeout,
        env=kata.env,
        check=False,
    )


def ok(kata: Kata, *words: str) -> Any:
    """The same, which has to succeed and to answer in JSON."""
    done = control(kata, *words)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


# ---- a running sandbox ----


@pytest.fixture
def sandbox(shared_kata: Kata, busybox_image: str) -> Iterator[str]:
    """The name of a container that runs."""
    name = f"ctl-{os.getpid()}"
    shared_kata.ok("run", "-d", "--name", name, "--network", "none", busybox_image, "sleep", "10000")
    yield name
    shared_kata.ok("rm", "-f", name)


def test_a_sandbox_by_name(shared_kata: Kata, sandbox: str) -> None:
    identity = json.loads(shared_kata.ok("inspect", sandbox))[0]["id"]
    for name in (sandbox, identity, identity[:8]):
        assert ok(shared_kata, "--sandbox", name, "Check") == {"status": "SERVING"}
    assert ok(shared_kata, "--sandbox", sandbox, "GetGuestDetails")["agent_details"]["init_daemon"] is True
    stats = ok(shared_kata, "--sandbox", sandbox, "StatsContainer", "--container_id", identity)
    assert int(stats["cgroup_stats"]["pids_stats"]["current"]) == 1
    # A process that the engine knows nothing of, its whole life through.
    where = ["--container_id", identity, "--exec_id", "x"]
    process = {"Args": ["cat"], "Env": ["PATH=/bin"], "Cwd": "/", "User": {}}
    ok(shared_kata, "--sandbox", sandbox, "ExecProcess", *where, "--process", json.dumps(process))
    sent = ok(shared_kata, "--sandbox", sandbox, "WriteStdin", *where, "--data", "text:to and fro")
    assert sent == {"len": 10}
    read = control(shared_kata, "--sandbox", sandbox, "-o", "text", "ReadStdout", *where, "--len", "100")
    assert read.stdout == b"to and fro"
    ok(shared_kata, "--sandbox", sandbox, "SignalProcess", *where, "--signal", "9")
    assert ok(shared_kata, "--sandbox", sandbox, "WaitProcess", *where) == {"status": 137}
    refused = control(shared_kata, "--sandbox", sandbox, "WaitProcess", "--container_id", "none")
    assert refused.returncode == 1
    assert refused.stderr.startswith(b"error: WaitProcess: INVALID_ARGUMENT: ")
    near = control(shared_kata, "--sandbox", sandbox.upper(), "Check")
    assert f"did you mean {sandbox}?".encode() in near.stderr
    assert shared_kata.ok("exec", sandbox, "echo", "well") == "well\n"


def test_bench_and_fuzz_of_a_sandbox_leave_it_as_it_was(shared_kata: Kata, sandbox: str) -> None:
    found = ok(shared_kata, "--sandbox", sandbox, "bench", "--calls", "50", "--bytes", "4194304")
    assert found["round_trip"]["calls"] == 50
    assert found["requests"]["bytes"] == found["stdout"]["bytes"] == found["stdin"]["bytes"] == 4 << 20
    report = ok(shared_kata, "--sandbox", sandbox, "fuzz", "--cases", "100", "--seed", "1")
    assert (report["verdict"], report["frames"]) == ("healthy", {})
    assert not methods.CHANGES_MACHINE & set(report["requests"])
    refused = control(shared_kata, "--sandbox", sandbox, "fuzz", "--only", "frames")
    assert b"an engine passes on calls, not frames" in refused.stderr
    assert shared_kata.ok("exec", sandbox, "echo", "well") == "well\n"


def test_a_sandbox_that_does_not_run(shared_kata: Kata, busybox_image: str) -> None:
    name = f"ctl-off-{os.getpid()}"
    shared_kata.ok("create", "--name", name, "--network", "none", busybox_image, "true")
    done = control(shared_kata, "--sandbox", name, "Check")
    shared_kata.ok("rm", name)
    assert done.returncode == 1
    assert done.stderr.decode() == f"error: sandbox {name} is not running\nhint: kata start {name}\n"


# ---- a machine of its own ----


def test_a_throw_away_machine(kata_env: Kata) -> None:
    script = b"""
    GetGuestDetails --mem_block_size
    CreateSandbox {"hostname": "thrown", "sandbox_id": "s", "dns": ["nameserver 192.0.2.1"]}
    ListInterfaces
    bench --calls 20 --bytes 1048576
    output text
    Check
    """
    done = control(kata_env, "--vm", stdin=script)
    assert done.returncode == 0, done.stderr.decode()
    decoder = json.JSONDecoder()
    text = done.stdout.decode()
    values = []
    while text.lstrip().startswith("{"):
        value, end = decoder.raw_decode(text.lstrip())
        values.append(value)
        text = text.lstrip()[end:]
    assert values[0]["agent_details"]["init_daemon"] is True
    assert values[1] == {}
    assert [one["name"] for one in values[2]["Interfaces"]] == ["lo"]
    assert values[3]["target"].startswith("a temporary virtual machine")
    assert text.strip() == "status: SERVING"
    assert kata_env.sandboxes() == []


def test_fuzz_of_a_machine_asks_for_everything(kata_env: Kata) -> None:
    report = ok(kata_env, "--vm", "fuzz", "--cases", "240", "--seed", "11", "--wait", "1")
    assert report["verdict"] == "healthy"
    assert len(report["frames"]) == 21
    assert {"CreateContainer", "UpdateRoutes", "SetGuestDateTime"} <= set(report["requests"])
    assert report["frames"]["right calls all at once"]["OK"] > 10
    assert kata_env.sandboxes() == []


def test_a_machine_that_ends_is_told(kata_env: Kata) -> None:
    done = control(kata_env, "--vm", "-c", "DestroySandbox", "-c", "Check")
    assert done.returncode == 1
    assert b"error: the virtual machine has ended" in done.stderr
    assert kata_env.sandboxes() == []


def test_a_machine_dies_with_the_tool(kata_env: Kata) -> None:
    program = ROOT / "src/kata/agent_ctl/__main__.py"
    tool = subprocess.Popen(
        ["/usr/bin/python3", "-I", "-S", program, "--vm"],
        env=kata_env.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert tool.stdin is not None
    assert tool.stdout is not None
    tool.stdin.write(b"Check\n")
    tool.stdin.flush()
    assert tool.stdout.readline() == b"{\n"
    children = Path(f"/proc/{tool.pid}/task/{tool.pid}/children").read_text().split()
    machines = [pid for pid in children if "qemu" in Path(f"/proc/{pid}/comm").read_text()]
    assert len(machines) == 1
    tool.kill()
    tool.wait()
    tool.stdin.close()
    tool.stdout.close()
    until(lambda: not Path(f"/proc/{machines[0]}").exists(), "the machine is gone")
    assert len(kata_env.sandboxes()) == 1
    kata_env.ok("gc")
    assert kata_env.sandboxes() == []


# ---- a process of this host ----


@pytest.fixture
def host(run_directory: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The agent as an ordinary process: its address and itself."""
    directory = Path(tempfile.mkdtemp(dir=run_directory, prefix="c"))
    address = f"unix://{directory}/s"
    process = subprocess.Popen([paths.agent_binary(), "--server", address, "--log", "critical"])
    until(lambda: (directory / "s").exists(), "its socket")
    yield address, process
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    shutil.rmtree(directory)


def test_an_agent_on_this_host(shared_kata: Kata, host: tuple[str, subprocess.Popen[bytes]]) -> None:
    address = host[0]
    details = ok(shared_kata, "--server", address, "GetGuestDetails")
    assert details["agent_details"]["init_daemon"] is False
    assert ok(shared_kata, "-s", address, "Version")["grpc_version"] == "0.0.1"
    names = [one["name"] for one in ok(shared_kata, "-s", address, "ListInterfaces")["Interfaces"]]
    assert "lo" in names
    found = ok(shared_kata, "-s", address, "bench", "--calls", "200", "--bytes", "8388608")
    assert found["requests"]["bytes"] == 8 << 20


def test_fuzz_of_an_agent_on_this_host(shared_kata: Kata, host: tuple[str, subprocess.Popen[bytes]]) -> None:
    address, process = host
    report = ok(shared_kata, "-s", address, "fuzz", "--cases", "600", "--seed", "1")
    assert report["verdict"] == "healthy"
    assert process.poll() is None
    frames = report["frames"]
    for kind in ("a length above the limit", "an unknown frame type", "another protocol"):
        assert set(frames[kind]) == {"closed"}
    # What is a frame is answered, and at once: not when the next one comes.
    for kind in ("an even stream number", "a frame that is no request"):
        assert frames[kind]["UNIMPLEMENTED"] > 0
    for kind in ("an endless varint", "a field longer than its message", "a name that is not UTF-8"):
        assert set(frames[kind]) == {"INVALID_ARGUMENT"}
