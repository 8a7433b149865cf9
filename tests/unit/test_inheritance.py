"""What our processes take from their caller (descriptors, umask, limits), and what they hand on to their children."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from kata import children, confinement, journal_undo, launcher, paths
from kata.cli.session import client_policy
from kata.engine import launch
from kata.engine.containers import hooks
from kata.engine.hostns import Namespaces
from kata.errors import HostError, UsageError
from kata.journal import Journal
from kata.proto import health_pb
from kata.proto.codec import Methods
from kata.settings import SandboxSettings
from kata.ttrpc import sync_client
from kata.ttrpc.server import Context, Server
from kata.ttrpc.status import ConnectionLost

SOURCE = Path(__file__).resolve().parents[2] / "src"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
CLOSED = ["", "<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"]

LOOK = f"""
import sys
sys.path.append({str(SOURCE)!r})
from kata import launcher
launcher.settle()
import json, os
fd = os.open("/dev/zero", os.O_RDONLY)
streams = [stream is not None for stream in (sys.stdin, sys.stdout, sys.stderr)]
with open(sys.argv[1], "w") as out:
    links = [os.readlink(f"/proc/self/fd/{{n}}") for n in range(3)]
    json.dump([links, fd > 2, streams, os.umask(0)], out)
"""


@pytest.mark.parametrize("closed", CLOSED)
def test_standard_descriptors_are_open_before_anything_else(tmp_path: Path, closed: str) -> None:
    program, said = tmp_path / "look.py", tmp_path / "said"
    program.write_text(LOOK)
    command = ["/usr/bin/python3", "-I", "-S", str(program), str(said)]
    with open("/dev/full", "r+b", buffering=0) as full:
        subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *command],
            stdin=full,
            stdout=full,
            stderr=full,
            check=True,
        )
    links, later, made, _ = json.loads(said.read_text())
    wanted = [closed.find(word) < 0 for word in ("<&-", ">&-", "2>&-")]
    if ">&-" not in closed.replace("2>&-", "").split():
        wanted[1] = True
    assert links == ["/dev/full" if is_open else "/dev/null" for is_open in wanted]
    assert later
    assert made == [True] * 3


@pytest.mark.parametrize(
    "program",
    [
        ["kata/__main__.py", "version", "--json"],
        ["kata/__main__.py", "shim", "-v"],
        ["kata/agent_ctl/__main__.py", "--version"],
    ],
)
def test_every_program_does_its_work_without_standard_descriptors(program: list[str]) -> None:
    command = ["/usr/bin/python3", "-I", "-S", str(SOURCE / program[0]), *program[1:]]
    for closed in (">&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *command],
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (["kata/__main__.py", "no-such-command"], 125),
        (["kata/__main__.py"], 125),
        (["kata/__main__.py", "version"], 0),
        (["kata/__main__.py", "shim", "no-such-command"], 1),
        (["kata/agent_ctl/__main__.py", "no-such-command"], 1),
        (["kata/agent_ctl/__main__.py", "--version"], 0),
    ],
)
def test_the_exit_status_stays_when_nobody_takes_the_messages(program: list[str], status: int) -> None:
    def run(**streams: Any) -> int:
        command = ["/usr/bin/python3", "-I", "-S", str(SOURCE / program[0]), *program[1:]]
        return subprocess.run(command, timeout=60, check=False, **streams).returncode

    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full, os.fdopen(writer, "wb") as gone:
        assert run(stdout=subprocess.DEVNULL, stderr=full) == status
        # Its help on standard error is what `kata` alone was asked for.
        assert run(stdout=subprocess.DEVNULL, stderr=gone) == (141 if len(program) == 1 else status)
        lost = run(stdout=gone, stderr=gone)
        assert lost not in (0, 120)


@pytest.mark.parametrize(
    "program",
    [
        ["kata/__main__.py", "--help"],
        ["kata/__main__.py", "run", "--help"],
        ["kata/__main__.py", "version"],
        ["kata/__main__.py", "shim", "-v"],
        ["kata/agent_ctl/__main__.py", "--help"],
        ["kata/agent_ctl/__main__.py", "--version"],
        ["kata/log_parser/__main__.py", "--help"],
        ["kata/monitor/__main__.py", "--help"],
        ["kata/oci_runtime/__main__.py", "--help"],
    ],
)
def test_output_that_is_lost_is_told(program: list[str]) -> None:
    command = ["/usr/bin/python3", "-I", "-S", str(SOURCE / program[0]), *program[1:]]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, timeout=60, check=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode not in (0, 120)
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.endswith(b"No space left on device\n")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("given", "used"), [("000", 0o022), ("022", 0o022), ("027", 0o027), ("077", 0o077)])
def test_a_umask_only_takes_away(tmp_path: Path, given: str, used: int) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    command = ["/usr/bin/python3", "-I", "-S", str(tmp_path / "look.py"), str(tmp_path / "said")]
    subprocess.run(["/bin/sh", "-c", f'umask {given}; exec "$@"', "sh", *command], check=True)
    assert json.loads((tmp_path / "said").read_text())[3] == used


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_directories_have_the_modes_that_are_asked_for(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        paths.make_dirs(str(tmp_path / "a" / "b" / "c"), 0o700)
        paths.make_dirs(str(tmp_path / "d"), 0o755)
        paths.make_dirs(str(tmp_path / "a" / "b"), 0o755)  # is there: stays as it is
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/b/c", "d")}
    assert modes == {"a": 0o711, "a/b": 0o711, "a/b/c": 0o700, "d": 0o755}
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        paths.make_dirs(str(tmp_path / "file"), 0o700)


# ---- what children get ----


@pytest.fixture
def leaking() -> list[int]:
    """Descriptors of ours that any program would inherit, as an engine's first ones once were."""
    sock = socket.socket(socket.AF_UNIX)
    pipe = os.pipe()
    high = os.dup2(pipe[0], 400)
    found = [sock.detach(), *pipe, high]
    for fd in found:
        os.set_inheritable(fd, True)
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.create_dir(str(tmp_path / "sandboxes"), "a", {"client": "test", "id": "a"})


def _said(fd: int) -> str:
    with open(fd) as file:
        return file.read()


LIST = """
import os
names = (f"/proc/self/fd/{n}" for n in range(1000))
print(*(f"{name.rpartition('/')[2]}={os.readlink(name)}" for name in names if os.path.lexists(name)))
"""


def test_a_child_inherits_what_was_named_and_nothing_else(leaking: list[int], journal: Journal) -> None:
    named = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    for numbers, keywords in (
        ({0, 1, 2, named}, {"pass_fds": [named]}),
        ({0, 1, 2, 3, 4}, {"fds_from_3": [named, named]}),
    ):
        read, write = os.pipe()
        child = children.spawn([sys.executable, "-c", LIST], journal, "lister", stdout=write, **keywords)  # type: ignore[arg-type]
        os.close(write)
        found = dict(word.split("=", 1) for word in _said(read).split() if "=" in word)
        child.wait(10)
        child.close()
        assert set(map(int, found)) == numbers, found
    for fd in (named, *leaking):
        os.close(fd)
    assert journal_undo.undo(journal) == []


@needs_root
def test_what_a_child_is_left_with_survives_the_numbers_it_inherits(journal: Journal) -> None:
    """Its ruleset has a number that one of its descriptors takes."""
    named = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    confined = confinement.monitor(sys.executable, readable=["/usr"])
    assert confined.ruleset is not None
    count = confined.ruleset.raw + 3
    child = children.spawn(
        [sys.executable, "-c", "pass"],
        journal,
        "nothing",
        fds_from_3=[named] * count,
        capabilities=(),
        namespaces=confinement.NAMESPACES,
        confinement=confined,
    )
    child.wait(10)
    child.close()
    os.close(named)
    assert journal_undo.undo(journal) == []


@needs_root
def test_a_hook_inherits_its_standard_descriptors_alone(tmp_path: Path, leaking: list[int]) -> None:
    said = tmp_path / "said"
    script = f"import sys; sys.stdout = open({str(said)!r}, 'w'){LIST}"
    hook = {"path": sys.executable, "args": ["python", "-c", script]}
    hooks.run("poststart", [hook], {"id": "x"}, Namespaces())
    found = dict(word.split("=", 1) for word in said.read_text().split())
    assert {int(n) for n in found if str(said) not in found[n]} == {0, 1, 2}
    for fd in leaking:
        os.close(fd)


# ---- limits ----


def test_a_launch_leaves_the_limits_and_umask_of_its_caller_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = tmp_path / "found"
    engine = f"ulimit -Sn > {found}.new; mv {found}.new {found}"
    monkeypatch.setattr(launcher, "command", lambda: ["/bin/sh", "-c", engine])
    ours, set_umask = os.getpid(), os.umask

    def umask(mask: int) -> int:
        assert os.getpid() != ours
        return set_umask(mask)

    monkeypatch.setattr(os, "umask", umask)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        settings = SandboxSettings(id="s", client=client_policy())
        started = launch.launch(settings, str(tmp_path / "run"))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, before[1])
        with pytest.raises(UsageError):
            launch.launch(SandboxSettings(id="no/id", client=client_policy()), str(tmp_path / "run"))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    started.release()
    until(lambda: found.exists(), "the program has written what it was given", patience_s=10, poll_s=0.01)
    assert int(found.read_text()) == min(before[1], 1 << 16)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_an_engines_socket_is_its_users_alone(tmp_path: Path, umask: int) -> None:
    journal = Journal.create_dir(str(tmp_path), "s", {})
    before = os.umask(umask)
    try:
        os.close(launch.listen(str(tmp_path / "sock"), journal))
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "sock").st_mode) == 0o600


def test_too_few_descriptors_are_said_before_anything_is_made(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        # (As root the hard limit could be raised again: it is whoever set it that is to be told.)
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        launch.raise_file_limit()
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert soft == min(before[1], 1 << 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "from kata.cli.session import client_policy\n"
        "from kata.engine import launch\n"
        "from kata.settings import SandboxSettings\n"
        f"launch.launch(SandboxSettings(id='few', client=client_policy()), {str(tmp_path / 'run')!r})\n"
    )
    for number in (40, 255):
        command = f'ulimit -n {number}; exec "$@"'
        done = subprocess.run(
            ["/bin/sh", "-c", command, "sh", "/usr/bin/python3", "-I", "-S", "-c", program],
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"{HostError.__name__}: the limit of open files is {number} here" in done.stderr
        assert not (tmp_path / "run").exists()


# ---- who may call ----


class Echo:
    async def Echo(self, request: health_pb.CheckRequest, _: Context) -> health_pb.CheckRequest:
        return request


def _call_as(user: int, path: str) -> str:
    """What a process of that user gets that connects and calls."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        word = "failed"
        try:
            os.setresuid(user, user, user)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            client = sync_client.Client(sock)
            request = health_pb.CheckRequest(service="hello")
            word = client.call("test.Echo", "Echo", request, health_pb.CheckRequest, 10.0).service
        except (ConnectionLost, OSError) as error:
            word = f"refused: {type(error).__name__}"
        finally:
            os.write(write, word.encode())
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    return _said(read)


@needs_root
def test_a_server_for_one_user_hangs_up_on_others() -> None:
    table = Methods({"Echo": "@health.CheckRequest @health.CheckRequest"})
    reported: list[Exception] = []

    async def main() -> list[str]:
        server = Server({"test.Echo": (table, Echo())}, lambda _, error: reported.append(error), users={0})
        # A directory that everybody may enter: here it is the check alone that refuses.
        path = f"/tmp/kt-peer-{os.getpid()}.sock"
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        try:
            os.chmod(path, 0o666)
            sock.listen()
            await server.start(sock)
            said = [await asyncio.to_thread(_call_as, user, path) for user in (0, 65534, 0)]
            # Over TCP nobody has credentials.
            tcp = socket.create_server(("127.0.0.1", 0))
            address = tcp.getsockname()
            await server.start(tcp)
            reader, writer = await asyncio.open_connection(*address)
            said.append((await asyncio.wait_for(reader.read(), 10)).decode() or "end")
            writer.close()
            await server.shutdown()
        finally:
            os.unlink(path)
        return said

    first, other, again, over_tcp = asyncio.run(main())
    assert (first, again, over_tcp) == ("hello", "hello", "end")
    assert other.startswith("refused")
    assert str(reported[0]) == "a process of user 65534 has connected, and may not"
    assert len(reported) == 2
