"""Ordinary users: their containers, and what they cannot reach."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, Kata
from waiting import PATIENCE, until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which becomes other users"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)"),
]

FIRST, SECOND = 1_800_000_001, 1_800_000_002


class User:
    """An ordinary user who has no name, no home but this directory, and no privileges.

    Args:
        uid: The user's and group's id.
        directory: The home, which is made.
        program: Path of kata's ``__main__.py``.
        guest: Directory of the guest.
    """

    def __init__(self, uid: int, directory: Path, program: Path, guest: Path) -> None:
        self.uid = uid
        self.directory = directory
        self._program = program
        self.runtime = directory / "runtime"
        for path in (directory, self.runtime):
            path.mkdir(mode=0o700)
            os.chown(path, uid, uid)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "KATA_GUEST_DIR": str(guest),
            "KATA_TEMPLATES": "off",
        }

    def call(
        self, *arguments: str, around: Sequence[str] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of kata, by a program *around* it."""
        identity = ["--reuid", str(self.uid), "--regid", str(self.uid), "--clear-groups", "--no-new-privs"]
        return subprocess.run(
            [*around, "setpriv", *identity, "/usr/bin/python3", "-I", "-S", str(self._program), *arguments],
            env={**self.env, **env},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def ok(self, *arguments: str) -> str:
        """The output of a command that succeeds."""
        done = self.call(*arguments)
        assert done.returncode == 0, f"kata {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def processes(self) -> list[str]:
        """What runs as this user."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if path.stat().st_uid == self.uid:
                    found.append((path / "cmdline").read_text().replace("\0", " "))
            except FileNotFoundError:
                continue
        return found


def hung_up_on(uid: int, sock: Path) -> bool:
    """Whether who listens on a socket hangs up on a user, instead of answering: a ttRPC request of no known method."""
    talk = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(sys.argv[1]);"
        " s.sendall(bytes([0, 0, 0, 0, 0, 0, 0, 1, 1, 0])); sys.exit(s.recv(1) == b'')"
    )
    identity = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    done = subprocess.run(
        ["setpriv", *identity, "/usr/bin/python3", "-I", "-c", talk, str(sock)],
        capture_output=True,
        text=True,
        check=False,
    )
    # Either end of the connection may be quicker.
    return (done.returncode == 1 and not done.stderr) or "Reset" in done.stderr or "Broken" in done.stderr


@pytest.fixture
def users(guest_assets: Path, busybox_image: str) -> Iterator[tuple[User, User, str]]:
    """Two users, and an image that both can read, as this checkout may be where they cannot go."""
    base = Path(tempfile.mkdtemp(prefix="kata-users-", dir="/tmp"))
    try:
        base.chmod(0o755)
        shutil.copytree(ROOT / "src", base / "src", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(guest_assets, base / "guest")
        shutil.copytree(busybox_image.partition(":")[2], base / "image")
        subprocess.run(["chmod", "-R", "a+rX", base], check=True)
        program = base / "src/kata/__main__.py"
        first, second = (User(uid, base / str(uid), program, base / "guest") for uid in (FIRST, SECOND))
        try:
            yield first, second, f"oci:{base}/image"
        finally:
            for user in (first, second):
                if ids := user.ok("ps", "-aq").split():
                    user.ok("rm", "-f", *ids)
        left = [line for user in (first, second) for line in user.processes()]
        assert not left, f"left running: {left}"
    finally:
        shutil.rmtree(base)


def test_an_ordinary_user_runs_containers(
    users: tuple[User, User, str], kata_env: Kata, busybox_image: str
) -> None:
    user, other, image = users
    none = ("--network", "none")
    assert user.ok("run", "--rm", *none, image, "sh", "-c", "id -u; hostname >/dev/null") == "0\n"
    assert user.call("run", "--rm", *none, image, "sh", "-c", "exit 3").returncode == 3

    shared = user.directory / "shared"
    shared.mkdir()
    os.chown(shared, user.uid, user.uid)
    user.ok("run", "-d", "--name", "one", *none, "-v", f"{shared}:/shared", image, "sleep", "1000")
    assert "one" in user.ok("ps")
    assert user.ok("exec", "one", "sh", "-c", "echo made >/shared/file; cat /shared/file") == "made\n"
    assert (shared / "file").stat().st_uid == user.uid

    # Nobody else reaches it, nor it others: what lies there belongs to the user alone.
    theirs = {
        "KATA_RUN_DIR": str(user.runtime / "kata"),
        "KATA_STATE_DIR": str(user.directory / ".local/share/kata"),
    }
    refused = other.call("exec", "one", "true", **theirs)
    assert refused.returncode == 125
    assert "Permission denied" in refused.stderr or "no container" in refused.stderr
    roots = {"KATA_RUN_DIR": str(kata_env.run_dir), "KATA_STATE_DIR": str(kata_env.state_dir)}
    kata_env.ok("create", "--name", "roots", busybox_image, "true")
    refused = user.call("start", "roots", **roots)
    assert refused.returncode == 125
    assert "Permission denied" in refused.stderr or "no container" in refused.stderr
    engines = [line for line in user.processes() if " engine " in line]
    assert len(engines) == 1
    [sandbox] = (user.runtime / "kata/sandboxes").iterdir()
    sock = sandbox / "engine.sock"
    for path in sock.parents[: len(sock.relative_to(user.directory).parts)]:
        path.chmod(path.stat().st_mode | 0o111)
    sock.chmod(0o777)  # so that nothing but the engine's own look at its caller is left
    for uid in (other.uid, 0):
        assert hung_up_on(uid, sock), f"the engine answers user {uid}"
    refusals = [line for line in (sandbox / "engine.log").read_text().splitlines() if "and may not" in line]
    assert len(refusals) == 2
    assert user.ok("exec", "one", "echo", "goes on") == "goes on\n"

    # Root's commands, told to look there, do nothing of what is written there.
    root = {**kata_env.env, **theirs}
    program = user.directory.parent / "src/kata"
    for words in (("ps", "-a"), ("gc",), ("rm", "-f", "one"), ("--root", str(user.runtime), "list")):
        path = program / ("oci_runtime/__main__.py" if words[0] == "--root" else "__main__.py")
        argv = ["/usr/bin/python3", "-I", "-S", str(path), *words]
        done = subprocess.run(argv, env=root, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert f"belongs to user {user.uid}, and who writes there" in done.stderr, done.stderr
    assert "one" in user.ok("ps")

    user.ok("stop", "-t", "1", "one")
    user.ok("rm", "one")
    until(lambda: not user.processes(), lambda: f"the end of {user.processes()}")
    assert list((user.runtime / "kata/sandboxes").iterdir()) == []


def test_what_ordinary_users_are_refused(users: tuple[User, User, str]) -> None:
    user, _, image = users
    refused = user.call("run", "--rm", "-p", "53:53/udp", image, "true")
    assert refused.returncode == 125
    assert "cannot publish port 53->53/udp: Permission denied" in refused.stderr
    refused = user.call("install", "containerd")
    assert "has to run as root" in refused.stderr
    assert f"user {user.uid} in a user namespace" in user.call("doctor").stdout
    # Without a runtime directory there is one below /tmp, unless somebody has made it before.
    fallback = Path(f"/tmp/kata-{user.uid}")
    try:
        assert user.call("ps", XDG_RUNTIME_DIR="").returncode == 0
        assert fallback.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(fallback)
        fallback.mkdir(mode=0o777)
        refused = user.call("ps", XDG_RUNTIME_DIR="")
        assert f"{fallback} is not a directory that is this user's alone" in refused.stderr
    finally:
        shutil.rmtree(fallback, ignore_errors=True)
    until(lambda: not user.processes(), lambda: f"the end of {user.processes()}")


@pytest.fixture
def with_ids(guest_assets: Path, busybox_image: str) -> Iterator[tuple[Callable[..., str], Path, str]]:
    """kata of a user who has subordinate ids, its home, and an image."""
    if shutil.which("newuidmap") is None:
        pytest.skip("needs newuidmap (apt-get install uidmap)")
    base = Path(tempfile.mkdtemp(prefix="kata-user-", dir="/tmp"))
    base.chmod(0o711)
    home = base / "home"
    shutil.copytree(ROOT / "src", base / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(guest_assets, base / "guest")
    shutil.copytree(busybox_image.partition(":")[2], base / "image")
    subprocess.run(["chmod", "-R", "a+rX", base / "src", base / "guest", base / "image"], check=True)
    env = {"PATH": os.environ["PATH"], "AS_USER_HOME": str(home), "KATA_GUEST_DIR": str(base / "guest")}

    def kata(*arguments: str, templates: str = "off") -> str:
        program = ("/usr/bin/python3", "-I", "-S", str(base / "src/kata/__main__.py"))
        done = subprocess.run(
            [ROOT / "tools/as-user", *program, *arguments],
            env={**env, "KATA_TEMPLATES": templates},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        yield kata, home, f"oci:{base}/image"
    finally:
        if ids := kata("ps", "-aq").split():
            kata("rm", "-f", *ids)
        shutil.rmtree(base)


def test_a_users_subordinate_ids(with_ids: tuple[Callable[..., str], Path, str]) -> None:
    """Files in volumes have the owners that the container gives them, and the hypervisor has an id of its own."""
    kata, home, image = with_ids
    assert "in a user namespace, with subordinate ids" in kata("doctor")
    user = home.stat().st_uid
    shared = home / "shared"
    shared.mkdir()
    os.chown(shared, user, user)
    none = ("--network", "none")
    script = "touch /shared/file; chown 5:6 /shared/file; stat -c %u:%g /shared/file; id -u"
    assert kata("run", "--rm", *none, "-v", f"{shared}:/shared", image, "sh", "-c", script) == "5:6\n0\n"
    made = (shared / "file").stat()
    assert made.st_gid - made.st_uid == 1
    first = made.st_uid - 4
    assert first > user
    kata("run", "-d", "--name", "one", *none, image, "sleep", "1000")
    [engine] = _children_of(1, str(home))
    [machine] = _children_of(engine)
    assert Path(f"/proc/{machine}").stat().st_uid > first + 60000
    os.kill(engine, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{machine}/exe").exists(), "the machine ends with its engine")
    assert "Exited (137)" in kata("ps", "-a")
    kata("rm", "one")


def test_images_volumes_and_templates_are_a_users_too(
    with_ids: tuple[Callable[..., str], Path, str],
) -> None:
    kata, home, image = with_ids
    none = ("--network", "none")
    kata("pull", image)
    kata("volume", "create", "data")
    script = "echo kept >/data/file; touch /made; chown 5:6 /made"
    kata("run", "--name", "one", *none, "-v", "data:/data", image, "sh", "-c", script)
    kata("commit", "one", "mine:1")
    kata("rm", "one")
    look = "cat /data/file; stat -c %u:%g /made"
    assert kata("run", "--rm", *none, "-v", "data:/data", "mine:1", "sh", "-c", look) == "kept\n5:6\n"
    kata("volume", "rm", "data")
    kata("rmi", "mine:1")
    assert str(home / ".local/share/kata") in kata("info")
    kata("factory", "init", *none, templates="")
    said = kata("run", "--rm", *none, image, "echo", "from a template", templates="")
    assert said == "from a template\n"
    assert "removed" in kata("factory", "destroy", templates="")
    assert not list((home / "run/kata/sandboxes").iterdir())


def _children_of(parent: int, words: str = "") -> list[int]:
    """The processes of a parent, in whose command lines some words are."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            of_parent = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if of_parent and words in (path / "cmdline").read_text():
                found.append(int(path.name))
    return found


@pytest.fixture
def outside(users: tuple[User, User, str], tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A host's network, and a server in another one that it leads to; each says who it is at port 8000.

    Gives the first's name, and what has to be around a command there, so that it has a /dev/net/tun for all users.
    """
    user, _, _ = users
    host, beyond = f"kur{os.getpid()}h", f"kur{os.getpid()}b"
    tun = user.directory.parent / "tun"
    os.mknod(tun, 0o666 | stat.S_IFCHR, os.makedev(10, 200))
    tun.chmod(0o666)
    script = f"""
        ip netns add {host} && ip netns add {beyond}
        ip -n {host} link add out type veth peer name in netns {beyond}
        ip -n {host} address add 10.77.0.1/24 dev out
        ip -n {beyond} address add 10.77.0.2/24 dev in
        for name in {host} {beyond}; do ip -n $name link set lo up; done
        ip -n {host} link set out up && ip -n {beyond} link set in up
        ip -n {host} route add default via 10.77.0.2
    """
    servers = []
    try:
        subprocess.run(["sh", "-ec", script], check=True)
        for name, address in ((beyond, "10.77.0.2"), (host, "127.0.0.1"), (host, "10.77.0.1")):
            page = tmp_path / address
            page.mkdir()
            (page / "who").write_text(f"{address}\n")
            server = [
                sys.executable,
                "-m",
                "http.server",
                "--bind",
                address,
                "--directory",
                str(page),
                "8000",
            ]
            servers.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *server], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            )
        around = [
            "ip",
            "netns",
            "exec",
            host,
            "sh",
            "-ec",
            f'mount --bind {tun} /dev/net/tun; exec "$@"',
            "sh",
        ]
        yield host, around
    finally:
        for one in servers:
            one.kill()
            one.communicate()
        for name in (host, beyond):
            subprocess.run(["ip", "netns", "delete", name], check=False)


ANSWERS_BY_UDP = r"""
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
int main(int count, char **words) {
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(atoi(words[1]))}, whose;
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    char data[64];
    if (bind(fd, (void *)&own, sizeof own)) return 1;
    for (;;) {
        socklen_t size = sizeof whose;
        if (recvfrom(fd, data, sizeof data, 0, (void *)&whose, &size) > 0)
            sendto(fd, words[1], strlen(words[1]), 0, (void *)&whose, size);
    }
}
"""
"""A program that answers each datagram with the number of its port."""


@pytest.mark.skipif(shutil.which("pasta") is None, reason="needs pasta (apt-get install passt)")
def test_an_ordinary_users_network(users: tuple[User, User, str], outside: tuple[str, list[str]]) -> None:
    """It leads outside and not to what listens on the host's loopback; ports are published."""
    user, _, image = users
    host, around = outside
    look = "for a in 10.77.0.2 127.0.0.1 10.77.0.1 10.0.2.2; do timeout 1 wget -qO- http://$a:8000/who; done; true"
    shown = user.call("run", "--rm", image, "sh", "-c", look, around=around)
    assert (shown.returncode, shown.stdout) == (0, "10.77.0.2\n"), shown.stderr
    answering = user.directory.parent / "answering"
    answering.mkdir()
    compiler = ["gcc", "-static", "-x", "c", "-o", str(answering / "udp"), "-"]
    subprocess.run(compiler, input=ANSWERS_BY_UDP, text=True, check=True)
    serve = (
        "echo published > /tmp/index.html; httpd -p 80 -h /tmp; /answering/udp 54 & exec /answering/udp 53"
    )
    options = (
        "-p",
        "8080:80",
        "-p",
        "5353:53/udp",
        "-p",
        "10.77.0.1:5354:54/udp",
        "-v",
        f"{answering}:/answering",
    )
    started = user.call("run", "-d", "--name", "web", *options, image, "sh", "-c", serve, around=around)
    assert started.returncode == 0, started.stderr
    fetch = (
        "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8080/', timeout=5).read().decode())"
    )

    def fetched() -> str:
        argv = ["ip", "netns", "exec", host, sys.executable, "-c", fetch]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()

    until(lambda: fetched() == "published", "an answer at the published port", poll_s=0.2)
    ask = (
        "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2);"
        " s.sendto(b'?', ('10.77.0.1', int(sys.argv[1]))); print(s.recv(99).decode())"
    )

    def answers(port: int, inside: str) -> bool:
        argv = ["ip", "netns", "exec", f"{host[:-1]}b", sys.executable, "-c", ask, str(port)]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip() == inside

    for published in ((5353, "53"), (5354, "54")):
        until(partial(answers, *published), f"an answer by UDP: {published}", poll_s=0.2)
    user.ok("rm", "-f", "web")
    until(lambda: not user.processes(), lambda: f"the end of {user.processes()}")


OF_THE_LANE = (
    "test_cli_run.py::test_a_terminal_is_a_terminal",
    "test_cli_run.py::test_limits",
    "test_cli_run.py::test_volumes_of_an_image",
    "test_cli_life.py::test_stop_is_graceful_and_start_keeps_the_files",
    "test_cli_cp.py::test_cp_does_not_follow_a_containers_links_out",
    "test_cli_networks.py::test_names_isolation_and_what_a_killed_engine_leaves",
    "test_cli_networks.py::test_containers_that_start_at_the_same_time_meet",
)
"""A part of what `make test-user` runs."""


def test_the_tests_of_the_command_line_as_an_ordinary_user() -> None:
    if shutil.which("newuidmap") is None:
        pytest.skip("needs newuidmap (apt-get install uidmap)")
    as_user = str(ROOT / "tools/as-user")
    if subprocess.run([as_user, "test", "-r", str(ROOT / "src/kata/__main__.py")], check=False).returncode:
        pytest.skip("needs a checkout that other users can read")
    tests = [str(ROOT / "tests/vm" / name) for name in OF_THE_LANE]
    base = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
    base.chmod(0o1777)
    options = ["-p", "no:cacheprovider", "-q", f"--basetemp={base}/t"]
    try:
        done = subprocess.run(
            [as_user, sys.executable, "-m", "pytest", *options, *tests],
            cwd=ROOT,
            # Without CI: that says of a run that all new processes are its own, and tests run beside this one.
            env={name: os.environ[name] for name in ("PATH", "KATA_TEST_PATIENCE") if name in os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(base)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(OF_THE_LANE)} passed" in done.stdout
