"""A podman of the tests' own: containers with this checkout's `kata-runtime`, with runc and with crun.

Everything of it is below one directory, and its networks are in a network namespace that goes with it. The runtimes are
scripts: podman calls a runtime without the caller's environment, most commands without a PATH even.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts import write_script
from waiting import PATIENCE, until

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = ROOT / "build/programs/podman"
"""Debian's packages, where podman is not installed (tools/setup)."""
IMAGE = "localhost/bb"
RUNTIME = ROOT / "src/kata/oci_runtime/__main__.py"
RUNTIMES = ("runc", "crun", "kata")
GATEWAY = "10.88.0.1"
"""Of the network that containers have when none is named."""
_CGROUPS = Path("/sys/fs/cgroup")
_FIXED = (Path("/run/containers"), Path("/etc/cni"))
"""What it writes outside of the directory that it is given."""
_HYBRID = _CGROUPS / "unified"
_RUNTIME_DIRS = ("/usr/lib/podman", "/usr/libexec/podman", "/usr/local/lib/podman")


class Podman:
    """A podman with storage, networks, containers of its own.

    Args:
        directory: Made by the caller, with a short path: sockets are below it.
        guest: The guest's directory.
        base: Where podman's packages are unpacked; ``/`` where they are installed.
        program: What takes the place of `kata-runtime`; this checkout's if None.
        environment: What it gets besides.

    Attributes:
        env: The environment in which podman runs.
        command: podman, with all that keeps it to the directory.
        around: What is to be put before a command that has to see the published ports.
    """

    def __init__(
        self,
        directory: Path,
        guest: Path,
        base: Path | None = None,
        *,
        program: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.run_dir = directory / "k"
        self._storage = str(directory / "st/overlay")
        self.netns = f"kt{os.getpid()}p{directory.name[-4:]}"
        self.around = ["nsenter", f"--net=/run/netns/{self.netns}"]
        self.base = (base or found()).resolve()
        binaries = str(self.base / "usr/bin")
        self.program = shutil.which("podman", path=binaries) or ""
        home = directory / "home"
        (home / ".config/containers").mkdir(parents=True)
        (home / ".config/containers/policy.json").write_text(
            '{"default": [{"type": "insecureAcceptAnything"}]}'
        )
        self.env = {
            "HOME": str(home),
            "PATH": f"{binaries}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
            "CONTAINERS_CONF": str(directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(directory / "registries.conf"),
            **{name: value for name, value in os.environ.items() if name.startswith("KATA_TEST")},
        }
        self.command = [*self.around, self.program, "--tmpdir", str(directory / "t")]
        self._before = _cgroups()
        self._makes = [path for path in _FIXED if not path.exists()]
        self._write(binaries, guest, program or RUNTIME, environment or {})

    def _write(self, binaries: str, guest: Path, program: Path, environment: Mapping[str, str]) -> None:
        directory = self.directory
        runtimes = directory / "bin"
        runtimes.mkdir()
        kata = {
            "KATA_RUN_DIR": self.run_dir,
            "KATA_STATE_DIR": directory / "s",
            "KATA_GUEST_DIR": guest,
            **{
                name: value
                for name, value in os.environ.items()
                if name in ("KATA_TEMPLATES", "KATA_TEST_RUN", "KATA_TEST_PATIENCE", "KATA_QEMU")
            },
            **environment,
        }
        write_script(runtimes / "kata-runtime", [program], kata)
        for name in ("runc", "crun"):
            write_script(runtimes / name, [shutil.which(name, path=self.env["PATH"])], {})
        if (_HYBRID / "cgroup.controllers").exists() and (
            _HYBRID / "cgroup.controllers"
        ).read_text().strip():
            # crun knows no host whose version 2 has controllers beside those of version 1.
            alone = f'umount {_HYBRID}; exec {shutil.which("crun", path=self.env["PATH"])} "$@"'
            unshare = ["unshare", "--mount", "--propagation", "slave"]
            write_script(runtimes / "crun", [*unshare, "sh", "-c", alone, "crun"], {})
        names = {"runc": "runc", "crun": "crun", "kata": "kata-runtime"}
        listed = "".join(f'{name} = ["{runtimes / file}"]\n' for name, file in names.items())
        limits = [
            f'"{name}={soft}:{hard}"'
            for name, which in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
            for soft, hard in [[min(4096, limit) for limit in resource.getrlimit(which)]]
        ]
        helpers = [str(self.base / where.lstrip("/")) for where in _RUNTIME_DIRS]
        (directory / "containers.conf").write_text(
            f"""\
[containers]
# As root, podman asks for more than this machine may give.
default_ulimits = [{", ".join(limits)}]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "kata"
conmon_path = ["{shutil.which("conmon", path=binaries)}"]
helper_binaries_dir = {json.dumps(helpers)}
init_path = "{self.base}/usr/bin/catatonit"
volume_path = "{directory}/v"
[engine.runtimes]
{listed}
[network]
network_backend = "netavark"
network_config_dir = "{directory}/n"
firewall_driver = "iptables"
"""
        )
        (directory / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/st"\nrunroot = "{directory}/ru"\n'
        )
        (directory / "registries.conf").write_text("unqualified-search-registries = []\n")

    def start(self, image: str) -> None:
        """Make the network namespace, and give podman an image of busybox.

        Args:
            image: ``oci:DIR``.
        """
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        subprocess.run(["ip", "-n", self.netns, "link", "set", "lo", "up"], check=True)
        identity = self("pull", "-q", image).split()[-1]
        self("tag", identity, IMAGE)

    def run_command(self, runtime: str, *options: str) -> list[str]:
        """The argument vector of ``podman run --rm`` with a runtime; image and command are to be added."""
        return [*self.command, "--runtime", runtime, "run", "--rm", *options]

    def __call__(self, *arguments: str, stdin: bytes = b"", code: int | None = 0) -> str:
        """Run podman; its output and then its errors, after a look at its exit status."""
        done = subprocess.run(
            [*self.command, *arguments],
            input=stdin,
            capture_output=True,
            timeout=PATIENCE,
            env=self.env,
            cwd=self.directory,
            check=False,
        )
        said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
        assert code is None or done.returncode == code, (
            f"podman {' '.join(arguments)}: {done.returncode}: {said}\n{self.diagnosis()}"
        )
        return said

    def diagnosis(self) -> str:
        """What the engines have logged last."""
        logs = sorted(self.run_dir.glob("sandboxes/*/engine.log"))
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs[-3:])

    def stop(self) -> list[str]:
        """Remove everything.

        Returns:
            What was left after podman's own removal, a line for each; it is gone as well now.
        """
        self("pod", "rm", "-f", "-t", "0", "-a", code=None)
        self("rm", "-f", "-t", "0", "-a", code=None)
        self("network", "prune", "-f", code=None)
        left = self.sweep()
        for mount in sorted(self._mounts(), key=len, reverse=True):
            # podman keeps that of its storage until the host's next boot.
            subprocess.run(["umount", "-l", mount], check=False)
        subprocess.run(["ip", "netns", "delete", self.netns], check=False)
        _remove_cgroups(self._cgroups())
        for path in (self.directory, *self._makes):
            shutil.rmtree(path, ignore_errors=True)
        return left

    def sweep(self, patience_s: float = 10) -> list[str]:
        """Take away what containers have left that are gone.

        Args:
            patience_s: How long it may take until they have left nothing.

        Returns:
            A line for each thing that was there after that time.
        """
        with suppress(AssertionError):
            until(lambda: not self.left(), "all is gone", patience_s=patience_s)
        left = self.left()
        if left:
            for pid in self._processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for mount in sorted(self._mounts(), key=len, reverse=True):
                if mount != self._storage:
                    subprocess.run(["umount", "-l", mount], check=False)
            _remove_cgroups({path for path in self._cgroups() if not _is_podmans(path)})
        return left

    def left(self) -> list[str]:
        """What containers have left on the host; nothing while there are none."""
        found = [f"mount {mount}" for mount in self._mounts() if mount != self._storage]
        found += [f"process {pid}: {_words(pid)}" for pid in self._processes()]
        found += [f"cgroup {path}" for path in self._cgroups() if not _is_podmans(path)]
        for name in os.listdir("/run/netns"):
            if name.startswith("netns-") and self._is_mine(name):
                found.append(f"network namespace {name}")
        found += [f"sandbox {path.name}" for path in self.run_dir.glob("sandboxes/*")]
        found += [f"container {path.name}" for path in self.directory.glob("s/containers/*")]
        return found

    def _is_mine(self, netns: str) -> bool:
        # A container's namespace is named in its specification, which is gone when it is.
        for path in self.directory.glob("st/overlay-containers/*/userdata/config.json"):
            if netns in path.read_text():
                return True
        return False

    def _cgroups(self) -> set[str]:
        """Cgroups that are new, and no other podman's: all of them have one parent."""
        try:
            events = (self.directory / "t/events/events.log").read_text(errors="replace")
        except FileNotFoundError:
            return set()
        return {
            path
            for path in _cgroups() - self._before
            if not (named := re.search("[0-9a-f]{64}", path)) or named[0] in events
        }

    def _mounts(self) -> list[str]:
        with open("/proc/self/mountinfo") as file:
            places = [line.split()[4] for line in file]
        return [place for place in places if place.startswith(f"{self.directory}/")]

    def _processes(self) -> list[int]:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [pid for pid in pids if f"{self.directory}/" in _words(pid) and pid != os.getpid()]


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")[:2000]
    except OSError:
        return ""


def _cgroups() -> set[str]:
    found = set()
    # CRI-O and podman make plain directories for hierarchies that are not mounted here: no cgroups, in a tmpfs.
    for tree in filter(os.path.ismount, (_CGROUPS, *_CGROUPS.glob("*/"))):
        found |= {path for path, _, _ in os.walk(tree / "libpod_parent")}
    return found


def _is_podmans(cgroup: str) -> bool:
    """Whether a cgroup is one that podman itself makes and keeps, whatever the runtime."""
    inner = cgroup.partition("/libpod_parent")[2]
    # The pods' are left in the hierarchies that podman does not limit anything in.
    is_pods = re.fullmatch(r"/[0-9a-f]{64}", inner) and cgroup.split("/")[4] in ("systemd", "unified")
    return inner in ("", "/conmon") or bool(is_pods)


def _remove_cgroups(found: set[str]) -> None:
    for cgroup in sorted(found, key=len, reverse=True):
        for _ in range(50):  # its last process may just be ending
            try:
                os.rmdir(cgroup)
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.1)
            else:
                break


def installed() -> Path | None:
    """Where podman's packages are; None where they are nowhere. KATA_TEST_PODMAN names the first place to look."""
    places = [UNPACKED, Path("/")]
    if chosen := os.environ.get("KATA_TEST_PODMAN"):
        places.insert(0, Path(chosen))
    for base in places:
        if (base / "usr/bin/podman").exists() and (base / "usr/bin/conmon").exists():
            return base
    return None


def found() -> Path:
    """Where podman's packages are; skips the test where they are nowhere."""
    base = installed()
    if base is None:
        import pytest  # benchmarks do without

        raise pytest.skip.Exception("needs podman and conmon (tools/setup test unpacks Debian's)")
    return base


@contextmanager
def running(
    directory: Path,
    guest: Path,
    image: str,
    base: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Podman]:
    """A podman that is ready; it has to have left nothing behind when it is removed.

    Args:
        directory: Made by the caller.
        guest: The guest's directory.
        image: ``oci:DIR`` of busybox.
        base: As `Podman` has it.
        environment: As `Podman` has it; the tests' own of the same name comes first.
    """
    one = Podman(directory, guest, base, environment=environment)
    left: list[str] = []
    try:
        one.start(image)
        yield one
    finally:
        left = one.stop()
    assert not left, f"podman's containers left behind: {left}"
