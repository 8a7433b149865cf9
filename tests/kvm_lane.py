"""The lane of tests/kvm: run where KVM works, else in the KVM lab, else skipped with the reason.

In a lab all tests run as one pytest in one machine: booting one per test would cost more than the tests. That
pytest writes each report as a line of JSON; here they take the place of running the test. So selecting, -x, -k
and the summary are as everywhere.

Tests marked ``here`` are about this machine itself and never run in a lab; those marked ``long``, and those whose
names are in a module's ``LONG``, are left out of the short form (``-m "not long"``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from kata import sysio
from kata.hypervisor import kvmprobe

ROOT = Path(__file__).resolve().parent.parent
LANE = ROOT / "tests" / "kvm"
TOOL = ROOT / "tools" / "kvm-lab"
LOGS = ROOT / "build" / "kvm-lab"
REPORTS = "KATA_KVM_REPORTS"
"""Set in the lab: the descriptor that reports are written to."""
IN_LAB = "KVM_LAB"
LAB_TIMEOUT_S = int(os.environ.get("KATA_KVM_TIMEOUT", "7200"))
PATIENCE_S = int(os.environ.get("KATA_KVM_PATIENCE", "300"))
"""For one step of a test in a lab: a guest's boot there takes five to ten seconds, more on a busy machine."""
TEST_TIMEOUT_S = min(6 * PATIENCE_S, LAB_TIMEOUT_S * 2 // 3)
"""For one test. It ends before the lab does, so that its failure is told with what the machines said."""

_lab = pytest.StashKey["Lab"]()
_reports = pytest.StashKey[IO[str]]()
_how = pytest.StashKey[str]()


class Lab:
    """The one lab of a test run: started by the first test that is asked for, ended after the last.

    Args:
        names: Node ids of the tests to run in it, in order.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.lost = ""
        self._process: subprocess.Popen[str] | None = None
        self._waiting: list[dict[str, Any]] = []
        self.said = LOGS / "pytest.log"
        self.console = LOGS / "console.log"

    def _start(self) -> subprocess.Popen[str]:
        # What a session makes when it is missing is made here: in the lab it would take an hour, and be lost.
        guest = Path(os.environ.get("KATA_GUEST_DIR") or ROOT / "build" / "guest")
        if not (guest / "guest.json").exists():
            environment = {**os.environ, "KATA_GUEST_DIR": str(guest)}
            subprocess.run([ROOT / "tools" / "kata", "guest", "build"], check=True, env=environment)
        image = ROOT / "build" / "images" / "busybox"
        if not (image / "index.json").exists():
            subprocess.run([ROOT / "tools" / "make-busybox-image", image], check=True)
        LOGS.mkdir(parents=True, exist_ok=True)
        plugins = ["-p", "pytest_timeout", "-p", "pytest_rerunfailures", "-p", "no:cacheprovider"]
        pytest_argv = [sys.executable, "-m", "pytest", "-v", *plugins, "--reruns", "1", *self.names]
        # Reports leave by standard output; everything that is said goes the other way.
        shell = ["sh", "-c", 'exec "$@" 3>&1 1>&2', "sh", *pytest_argv]
        # The checkout may be edited while its tests run.
        parts = [ROOT / name for name in ("src", "tests", "tools", "pyproject.toml")]
        frozen = [word for path in (*parts, guest, image) for word in ("--freeze", str(path))]
        sysio.preload()
        parent = os.getpid()
        with open(self.said, "w") as said:
            return subprocess.Popen(
                [TOOL, "--timeout", str(LAB_TIMEOUT_S), "--log", str(self.console), *frozen, "--", *shell],
                cwd=ROOT,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "KATA_TEST_"))},
                    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # each costs a second there
                    "KATA_TEST_PATIENCE": str(PATIENCE_S),
                    "KATA_KVM_PATIENCE": str(PATIENCE_S),
                    REPORTS: "3",
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                # A pytest that is killed does not come to its end, where it would end the lab.
                preexec_fn=lambda: sysio.die_with_parent(parent, signal.SIGTERM),
            )

    def reports(self, config: pytest.Config, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """What came of one test."""
        if self._process is None and not self.lost:
            self._process = self._start()
        while not self.lost:
            for data in [data for data in self._waiting if data["nodeid"] == item.nodeid]:
                self._waiting.remove(data)
                report = config.hook.pytest_report_from_serializable(config=config, data=data)
                if report.skipped and isinstance(report.longrepr, list):  # JSON has no tuples
                    report.longrepr = tuple(report.longrepr)
                yield report
                if report.when == "teardown":
                    return
            assert self._process is not None
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if line:
                self._waiting.append(json.loads(line))
            else:
                status = self._process.wait()
                self.lost = f"the lab ended with status {status} before this test had"
        text = f"{self.lost}\n\n{self.tail()}"
        yield pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "setup")
        yield pytest.TestReport(item.nodeid, item.location, {}, "passed", None, "teardown")

    def tail(self) -> str:
        """The last of what its pytest and its console said."""
        parts = []
        for title, path in (("its pytest", self.said), ("its console", self.console)):
            try:
                lines = path.read_text(errors="replace").splitlines()[-60:]
            except FileNotFoundError:
                lines = []
            parts.append(f"---- {title} ({path}) ends with:\n" + "\n".join(lines))
        return "\n".join(parts)

    def close(self, interrupted: bool) -> str:
        """End the lab. Returns what is wrong apart from the tests that were reported, or empty."""
        if self._process is None:
            return ""
        if interrupted:
            self._process.terminate()
        assert self._process.stdout is not None
        self._process.stdout.read()
        self._process.stdout.close()
        status = self._process.wait()
        if interrupted or self.lost or status == 0:
            return ""
        return f"the lab's pytest ended with status {status}\n{self.tail()}"


# ---- choosing ----


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "here: about this very machine; never run in the KVM lab")
    config.addinivalue_line("markers", "long: left out of the lane's short form")
    if REPORTS in os.environ:
        config.stash[_reports] = os.fdopen(int(os.environ[REPORTS]), "w", buffering=1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that a module of this lane collects from elsewhere and leaves out of the short form."""
    if (
        LANE in item.path.parents
        and isinstance(item, pytest.Function)
        and item.originalname in getattr(item.module, "LONG", ())
    ):
        item.add_marker(pytest.mark.long)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Decide how the lane's tests run, after all deselecting."""
    ours = [item for item in items if LANE in item.path.parents]
    if not ours:
        return
    verdict = kvmprobe.probe()
    if verdict.works:
        where = "the KVM lab" if os.environ.get(IN_LAB) else "this machine's KVM"
        config.stash[_how] = f"{where}: {verdict.reason}"
        for item in ours:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))
        return
    elsewhere = [item for item in ours if item.get_closest_marker("here") is None]
    check = subprocess.run([TOOL, "--check"], capture_output=True, text=True, check=False)
    if check.returncode:
        why = f"no KVM here ({verdict.reason}) and no KVM lab ({(check.stdout + check.stderr).strip()})"
        config.stash[_how] = why
        for item in elsewhere:
            item.add_marker(pytest.mark.skip(reason=why))
        return
    config.stash[_how] = f"in the KVM lab, since {verdict.reason}"
    for item in elsewhere:
        item.add_marker(pytest.mark.timeout(0))  # the clock runs in the lab
    if elsewhere:
        config.stash[_lab] = Lab([item.nodeid for item in elsewhere])


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    how = config.stash.get(_how, "")
    return f"tests/kvm: {how}" if how else ""


# ---- outside the lab ----


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    lab = item.config.stash.get(_lab, None)
    if lab is None or item.nodeid not in lab.names:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in lab.reports(item.config, item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    lab = session.config.stash.get(_lab, None)
    if lab is None:
        return
    unfinished = session.shouldstop or session.shouldfail or exitstatus == pytest.ExitCode.INTERRUPTED
    wrong = lab.close(bool(unfinished))
    if wrong and session.testsfailed == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        lab.lost = wrong


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lab = config.stash.get(_lab, None)
    if lab is not None and lab.lost:
        terminalreporter.section("the KVM lab", red=True)
        terminalreporter.line(lab.lost)
    elif lab is not None and terminalreporter.stats.get("failed"):
        terminalreporter.section("the KVM lab")
        terminalreporter.line(lab.tail())


# ---- where the tests run ----


class Reporter:
    """In the lab: passes each report on."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._out = config.stash[_reports]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._out.write(json.dumps(data, default=repr) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    if _reports in session.config.stash:
        session.config.pluginmanager.register(Reporter(session.config), "kvm-lane-reporter")


class Keeper:
    """Holds on to the logs of sandboxes, which remove their directories when they end."""

    NAMES = ("engine.log", "console.log")

    def __init__(self, run_dir: Path, kept: Path) -> None:
        self._sandboxes = run_dir / "sandboxes"
        self.kept = kept
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(0.3):
            self.look()

    def look(self) -> None:
        """Link what is there."""
        try:
            sandboxes = os.listdir(self._sandboxes)
        except FileNotFoundError:
            return
        for sandbox in sandboxes:
            for name in self.NAMES:
                try:
                    os.link(self._sandboxes / sandbox / name, self.kept / f"{sandbox[:12]}.{name}")
                except OSError:
                    continue

    def sections(self, since: float) -> list[tuple[str, str]]:
        """Titles and ends of the logs that were written to since then."""
        self.look()
        found = []
        for path in sorted(self.kept.iterdir()):
            if path.stat().st_mtime >= since:
                lines = path.read_text(errors="replace").splitlines()[-60:]
                found.append((path.name, "\n".join(lines)))
        return found

    def close(self) -> None:
        self._end.set()
        self._thread.join()


_keeper = pytest.StashKey[Keeper]()
_began = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows what the machines said: engine, guest, and the kernel that offers KVM."""
    report = yield
    if LANE in item.path.parents and report.failed:
        keeper = item.config.stash.get(_keeper, None)
        if keeper is not None:
            report.sections += keeper.sections(item.stash.get(_began, 0.0))
        words = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout.splitlines()
        report.sections.append(("kernel log of the machine that offers KVM", "\n".join(words[-40:])))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_began] = time.time()


@pytest.fixture(scope="session")
def kvm_kata(run_directory: Path, guest_assets: Path, pytestconfig: pytest.Config) -> Iterator[Any]:
    """A `Kata` (see conftest) that uses KVM or fails; its sandboxes' logs are kept for failures."""
    from conftest import Kata

    kata = Kata(run_directory / "kvm", guest_assets)
    kata.env["KATA_ACCEL"] = "kvm"
    kata.env["KATA_BOOT_TIMEOUT"] = str(PATIENCE_S)
    kept = run_directory / "kvm-logs"
    kept.mkdir()
    keeper = pytestconfig.stash[_keeper] = Keeper(kata.run_dir, kept)
    yield kata
    left = kata.clear()
    keeper.close()
    del pytestconfig.stash[_keeper]
    assert not left, "left running at the end of the session: " + "; ".join(left)
