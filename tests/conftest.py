"""What all tests share: a kata of their own, guest and image, and the check that nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import leftovers
import pytest
from waiting import PATIENCE

pytest_plugins = ["kvm_lane"]

ROOT = Path(__file__).resolve().parent.parent
"""Seconds after which a call of `kata` in a test is hopeless. Generous: slow machines are no failure."""


class Kata:
    """A kata with directories of its own, and how to call it.

    Args:
        directory: A short path; sockets below it have at most 107 bytes.
        guest: The directory with kernel and initrd.
    """

    def __init__(self, directory: Path, guest: Path | None) -> None:
        self.directory = directory
        self.run_dir = directory / "r"
        self.state_dir = directory / "s"
        self.guest_dir = guest or directory / "g"
        self.env = {
            **os.environ,
            "KATA_RUN_DIR": str(self.run_dir),
            "KATA_STATE_DIR": str(self.state_dir),
            "KATA_GUEST_DIR": str(self.guest_dir),
        }

    def command(self, *arguments: str) -> list[str]:
        """The argv that runs `kata` with these arguments, as the installed program would."""
        return ["/usr/bin/python3", "-I", "-S", str(ROOT / "src" / "kata" / "__main__.py"), *arguments]

    def call(
        self, *arguments: str, stdin: bytes = b"", timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `kata` to its end; its streams are captured."""
        return subprocess.run(
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            timeout=timeout,
            env=self.env,
            check=False,
        )

    def ok(self, *arguments: str, stdin: bytes = b"", timeout: float = PATIENCE) -> str:
        """Run `kata`, which has to end with 0, and return its standard output."""
        done = self.call(*arguments, stdin=stdin, timeout=timeout)
        assert done.returncode == 0, f"kata {' '.join(arguments)}: {done.returncode}: {done.stderr.decode()}"
        return done.stdout.decode()

    def start(self, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
        """Start `kata` without waiting, its streams as pipes unless *options* for Popen say otherwise."""
        pipes: dict[str, object] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(self.command(*arguments), env=self.env, **{**pipes, **options})  # type: ignore[call-overload, no-any-return]

    def sandboxes(self) -> list[str]:
        """Ids of the sandboxes that have a run directory."""
        try:
            return sorted(os.listdir(self.run_dir / "sandboxes"))
        except FileNotFoundError:
            return []

    def engine_pid(self, container: str) -> int:
        """Pid of the engine of a container."""
        state = json.loads((self.container_dir(container) / "state.json").read_text())
        return int(state["engine"]["pid"])

    def container_dir(self, container: str) -> Path:
        """State directory of a container, by name or id."""
        identity = json.loads(self.ok("inspect", container))[0]["id"]
        return self.state_dir / "containers" / str(identity)

    def clear(self) -> list[str]:
        """Remove all containers. Returns what was still running or could not be removed."""
        left = [f"sandbox {name}" for name in self.sandboxes()]
        containers = self.state_dir / "containers"
        if containers.is_dir():
            for identity in sorted(os.listdir(containers)):
                done = self.call("rm", "-f", identity)
                if done.returncode:
                    left.append(f"container {identity}: {done.stderr.decode().strip()}")
        if self.sandboxes():
            self.call("gc")
            left += [f"sandbox {name}, even after kata gc" for name in self.sandboxes()]
        return left


# ---- the run as a whole ----

_RETRY_LINES = 30
"""How much of a failure is shown that a later try did not have."""

_run_directory = pytest.StashKey[Path]()
_before = pytest.StashKey[dict[leftovers.Thing, str]]()
_left = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        # One of several processes of a run (pytest -n): the first one looks for what all of them left.
        directory = Path("/tmp") / os.environ[leftovers.MARK] / worker
        directory.mkdir()
    else:
        config.stash[_before] = leftovers.snapshot()
        # Not pytest's own base directory, whose name is too long for the sockets below it.
        directory = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
        os.environ[leftovers.MARK] = directory.name
    config.stash[_run_directory] = directory
    # A start that has no template makes one afterwards: that is for the tests which are about it.
    os.environ.setdefault("KATA_TEMPLATES", "off")
    for name in ("KATA_RUN_DIR", "KATA_STATE_DIR"):
        # A test that forgets to use `kata_env` does not touch a user's containers either.
        os.environ[name] = str(directory / name.split("_")[1].lower())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first, whatever the order of the arguments: quick, and their failures explain more."""
    items.sort(key=lambda item: ("/tests/kvm/" in str(item.path), "/tests/vm/" in str(item.path)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    directory = session.config.stash[_run_directory]
    shutil.rmtree(directory, ignore_errors=True)
    if _before not in session.config.stash:
        return
    ours = leftovers.Ours(str(directory), f"{leftovers.MARK}={directory.name}")
    left = leftovers.left_since(session.config.stash[_before], ours, leftovers.is_ours_alone())
    session.config.stash[_left] = left
    if left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _write_results_of_hypervisors(terminalreporter: pytest.TerminalReporter, target: str) -> None:
    """For `tools/hypervisors_table.py`: what came of each test that every hypervisor has to pass; of the others in the
    lane with machines, in which module it is.
    """
    from kata.hypervisor import accel, registry

    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            test, _, parameter = report.nodeid.rpartition("::")[2].rstrip("]").partition("[")
            name, _, machine = parameter.partition(":")
            if outcome == "passed" and report.when != "call":
                continue
            if name not in registry.names():
                if "tests/vm/" in report.nodeid:
                    module = report.nodeid.partition("::")[0].rpartition("/")[2]
                    version = registry.find(registry.DEFAULT).version({})
                    result = "failed" if outcome == "error" else outcome
                    rows.append(
                        {
                            "module": module,
                            "version": version,
                            "test": f"{test} {parameter}",
                            "outcome": result,
                        }
                    )
                continue
            monitor = registry.find(name)
            # Those of the lane with KVM run where it works, if not here.
            accelerator = "kvm" if "tests/kvm/" in report.nodeid else accel.choose().accel
            rows.append(
                {
                    "title": f"{monitor.title} {machine}".strip(),
                    "accelerator": accelerator if accelerator in monitor.accelerators else "kvm",
                    "version": monitor.version({}),
                    "test": test,
                    "outcome": "failed" if outcome == "error" else outcome,
                    "reason": report.longrepr[2].removeprefix("Skipped: ") if outcome == "skipped" else "",
                }
            )
    Path(target).write_text("".join(json.dumps(row) + "\n" for row in rows))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = os.environ.get("KATA_MONITOR_RESULTS")
    if results:
        _write_results_of_hypervisors(terminalreporter, results)
    left = config.stash.get(_left, [])
    if left:
        terminalreporter.section("left behind by the tests", red=True)
        for line in left:
            terminalreporter.line(line)
    retried = terminalreporter.stats.get("rerun", [])
    if retried:
        # A race that a second try hides is still a race: its first failure is what explains it.
        terminalreporter.section("tried again, because of", yellow=True)
        for report in retried:
            terminalreporter.line(f"{report.nodeid} ({report.when})")
            for line in report.longreprtext.splitlines()[-_RETRY_LINES:]:
                terminalreporter.line(f"    {line}")
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section(f"{sum(reasons.values())} skipped, because")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5} {reason}")
    target = os.environ.get("KATA_TEST_REPORT")
    if target:
        stats = {
            name: len(
                [report for report in terminalreporter.stats.get(name, []) if getattr(report, "count", True)]
            )
            for name in ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
        }
        Path(target).write_text(json.dumps({**stats, "left": left, "reasons": reasons}))


# ---- fixtures ----


@pytest.fixture(scope="session")
def run_directory(pytestconfig: pytest.Config) -> Path:
    """A directory with a short path for this run; it is removed at the end."""
    return pytestconfig.stash[_run_directory]


@pytest.fixture(scope="session")
def guest_assets() -> Path:
    """Directory of a built guest: the one `make test` prepared, else the checkout's, built when missing."""
    directory = Path(os.environ.get("KATA_GUEST_DIR") or ROOT / "build" / "guest")
    if not (directory / "guest.json").exists():
        _tool("guest", "build", KATA_GUEST_DIR=str(directory))
    return directory


@pytest.fixture(scope="session")
def busybox_image() -> str:
    """An image reference, ``oci:DIR``, of Debian's busybox with its usual links; built when missing."""
    directory = ROOT / "build" / "images" / "busybox"
    if not (directory / "index.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [ROOT / "tools" / "make-busybox-image", directory], check=True, stdout=subprocess.DEVNULL
        )
    return f"oci:{directory}"


def _tool(*arguments: str, **environment: str) -> None:
    """Run the checkout's kata for something that a session needs once."""
    subprocess.run([ROOT / "tools" / "kata", *arguments], check=True, env={**os.environ, **environment})


@pytest.fixture(scope="session")
def shared_kata(run_directory: Path, guest_assets: Path) -> Iterator[Kata]:
    """One kata for the whole session: its image store is filled once. Tests remove their own containers."""
    kata = Kata(run_directory / "all", guest_assets)
    yield kata
    left = kata.clear()
    assert not left, "left running at the end of the session: " + "; ".join(left)


@pytest.fixture
def kata_env(run_directory: Path, guest_assets: Path) -> Iterator[Kata]:
    """A kata of the test's own, empty; a sandbox that is still there afterwards fails the test."""
    kata = Kata(Path(tempfile.mkdtemp(dir=run_directory, prefix="")), guest_assets)
    yield kata
    left = kata.clear()
    shutil.rmtree(kata.directory)
    assert not left, "still there after the test: " + "; ".join(left)
