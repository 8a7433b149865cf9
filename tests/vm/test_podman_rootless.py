"""podman of an ordinary user with `kata-runtime`: the user namespace is podman's, and so is the network's.

What podman itself does is in test_podman.py; here is what differs where the engine is root of a user namespace only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import podman_support
import pytest
from conftest import ROOT
from scripts import write_script
from waiting import PATIENCE, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which becomes another user")

IMAGE = "localhost/bb"
_SLIRP = Path(shutil.which("slirp4netns") or podman_support.UNPACKED / "usr/bin/slirp4netns")


def host_address() -> str:
    """An address of this host that others could reach it by; empty without one."""
    shown = subprocess.run(
        ["ip", "-j", "-4", "address", "show", "scope", "global"], capture_output=True, check=True
    ).stdout
    return next((one["local"] for link in json.loads(shown) for one in link["addr_info"]), "")


class Podman:
    """A podman of an ordinary user's.

    Args:
        home: The user's home directory.
        guest: The guest's directory, which all may read.

    Attributes:
        user: The user's id.
    """

    def __init__(self, home: Path, guest: Path) -> None:
        self.home = home
        self.base = podman_support.found().resolve()
        binaries = str(self.base / "usr/bin")
        path = f"{binaries}:{os.environ['PATH']}:/usr/sbin:/sbin:{_SLIRP.parent}"
        self._env = {
            **os.environ,
            "PATH": path,
            "AS_USER_HOME": str(home),
        }
        for name in ("KATA_RUN_DIR", "KATA_STATE_DIR", "KATA_GUEST_DIR"):
            self._env.pop(name, None)
        (home / ".config/containers").mkdir(parents=True)
        self._write(binaries, guest)
        subprocess.run(["chmod", "-R", "a+rX", home / ".config"], check=True)
        self.run("true")
        self.user = (home / "run").stat().st_uid
        os.chown(home, self.user, self.user)
        subprocess.run(["chown", "-R", f"{self.user}:{self.user}", home / ".config"], check=True)

    def _write(self, binaries: str, guest: Path) -> None:
        configuration = self.home / ".config/containers"
        runtime = self.home / ".config/kata-runtime"
        program = ROOT / "src/kata/oci_runtime/__main__.py"
        write_script(runtime, [program], {"KATA_GUEST_DIR": guest, "KATA_TEMPLATES": "off"})
        helpers = [str(self.base / where) for where in ("usr/lib/podman", "usr/libexec/podman")]
        (configuration / "containers.conf").write_text(
            f"""\
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "kata"
conmon_path = ["{binaries}/conmon"]
helper_binaries_dir = {json.dumps(helpers)}
[engine.runtimes]
kata = ["{runtime}"]
[network]
network_backend = "netavark"
"""
        )
        (configuration / "storage.conf").write_text('[storage]\ndriver = "overlay"\n')
        (configuration / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    def run(self, *words: str, code: int | None = 0) -> str:
        """Run a program as the user; its output and then its errors, after a look at its exit status."""
        done = subprocess.run(
            [ROOT / "tools/as-user", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=self._env,
            cwd="/",
            check=False,
        )
        said = done.stdout + "".join(
            line for line in done.stderr.splitlines(keepends=True) if "level=warning" not in line
        )
        assert code is None or done.returncode == code, f"{words}: {done.returncode}: {said}\n{self.logs()}"
        return said

    def __call__(self, *arguments: str, code: int | None = 0) -> str:
        """Run podman, as `run`."""
        return self.run("env", "PODMAN_IGNORE_CGROUPSV1_WARNING=1", "podman", *arguments, code=code)

    def logs(self) -> str:
        """What the engines have logged last."""
        return "\n".join(path.read_text()[-3000:] for path in self.sandboxes("*/engine.log"))

    def sandboxes(self, pattern: str = "*") -> list[Path]:
        """What is in the directories of the sandboxes."""
        return sorted((self.home / "run/kata/sandboxes").glob(pattern))

    def processes(self) -> list[tuple[int, str]]:
        """What runs as this user or as one of the user's subordinate ones, by its pid."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if path.stat().st_uid >= 1_800_000_000 and str(self.home) in (path / "cmdline").read_text():
                    found.append((int(path.name), (path / "cmdline").read_text().replace("\0", " ")))
        return found

    def stop(self) -> None:
        """Remove everything; nothing may be left then."""
        self("rm", "-f", "-t", "0", "-a", code=None)
        with suppress(FileNotFoundError, ProcessLookupError):
            # It holds the user namespace for as long as the user is logged in.
            os.kill(int((self.home / "run/libpod/tmp/pause.pid").read_text()), signal.SIGKILL)
        with suppress(AssertionError):
            until(lambda: not self.processes(), "the end of everything", patience_s=10)
        left = [*map(str, self.sandboxes()), *(words for _, words in self.processes())]
        shutil.rmtree(self.home)
        assert not left, f"left behind: {left}"


@pytest.fixture(scope="module")
def podman(guest_assets: Path, busybox_image: str) -> Iterator[Podman]:
    if shutil.which("newuidmap") is None:
        pytest.skip("needs newuidmap (apt-get install uidmap)")
    if not _SLIRP.exists():
        pytest.skip("needs slirp4netns (tools/setup test unpacks Debian's)")
    base = Path(tempfile.mkdtemp(prefix="kup", suffix="d", dir="/tmp"))
    base.chmod(0o711)
    shutil.copytree(guest_assets, base / "guest")
    shutil.copytree(busybox_image.partition(":")[2], base / "image")
    subprocess.run(["chmod", "-R", "a+rX", base / "guest", base / "image"], check=True)
    try:
        one = Podman(base / "home", base / "guest")
        if one.run("test", "-r", str(ROOT / "src/kata/oci_runtime/__main__.py"), code=None):
            pytest.skip("needs a checkout that other users can read")
        try:
            identity = one("pull", "-q", f"oci:{base}/image").split()[-1]
            one("tag", identity, IMAGE)
            yield one
        finally:
            one.stop()
    finally:
        shutil.rmtree(base, ignore_errors=True)


def test_podman_of_an_ordinary_user(podman: Podman) -> None:
    """run, exec, cp, logs, a volume, a published port, stop, rm; the state is the user's."""
    network = "slirp4netns:port_handler=slirp4netns"
    volume = podman.home / "volume"
    volume.mkdir()
    os.chown(volume, podman.user, podman.user)
    serve = "echo page >/tmp/index.html; echo serving; exec httpd -f -p 80 -h /tmp"
    podman(
        *("run", "-d", "--name", "web", "--network", network, "-p", "127.0.0.1:18089:80"),
        *("-v", f"{volume}:/volume", IMAGE, "sh", "-c", serve),
    )
    assert len(podman.sandboxes()) == 1
    assert (
        podman("exec", "web", "sh", "-c", "touch /volume/made && chown 1000:1001 /volume/made; id -u")
        == "0\n"
    )
    made = (volume / "made").stat()
    assert made.st_uid - made.st_gid == -1
    assert made.st_uid > podman.user
    podman("exec", "web", "sh", "-c", "exit 7", code=7)
    until(lambda: "serving" in podman("logs", "web"), "its first words")
    (podman.home / "in").write_text("from outside\n")
    podman("cp", str(podman.home / "in"), "web:/tmp/in")
    fetch = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:18089/in', timeout=5).read())"
    assert "from outside" in podman.run("/usr/bin/python3", "-c", fetch)
    podman("stop", "-t", "0", "web")
    assert "137" in podman("ps", "-a", "--format", "{{.Status}}")
    podman("rm", "web")
    assert podman.sandboxes() == []


def test_the_network_that_podman_5_has_by_default(podman: Podman) -> None:
    """pasta: a published port is at the host's addresses. Connections to its loopback go to the namespace's."""
    if podman("--version").split()[-1].startswith("4."):
        pytest.skip("podman 4 has another one (KATA_TEST_PODMAN names a newer podman)")
    if not (address := host_address()):
        pytest.skip("needs an address of the host other than loopback's")
    serve = "echo page >/tmp/index.html; echo serving; exec httpd -f -p 80 -h /tmp"
    podman("run", "-d", "--name", "web", "-p", "18090:80", IMAGE, "sh", "-c", serve)
    try:
        until(lambda: "serving" in podman("logs", "web"), "its first words")
        fetch = f"import urllib.request as r; print(r.urlopen('http://{address}:18090/', timeout=5).read())"
        assert "page" in podman.run("/usr/bin/python3", "-c", fetch)
    finally:
        podman("rm", "-f", "-t", "0", "web", code=None)


def test_a_pod_of_an_ordinary_user_is_one_machine(podman: Podman) -> None:
    podman(
        *("pod", "create", "--name", "pod", "--network", "none"),
        *("--infra-image", IMAGE, "--infra-command", "sleep 1000"),
    )
    podman("run", "-d", "--pod", "pod", "--name", "member", IMAGE, "sleep", "1000")
    assert len(podman.sandboxes()) == 1
    [engine] = [pid for pid, words in podman.processes() if " engine " in words]
    os.kill(engine, signal.SIGKILL)
    until(
        lambda: "137" in podman("ps", "-a", "--filter", "name=member", "--format", "{{.Status}}"), "its end"
    )
    podman("pod", "rm", "-f", "-t", "0", "pod")
    assert podman.sandboxes() == []
