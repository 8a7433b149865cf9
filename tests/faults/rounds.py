"""Rounds of faults: at every stop point with every victim, then at random moments; what came of it, and how it is
repeated."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from faults import answers, stops
from faults.daemon import Daemon, Failure, Script
from faults.host import Snapshot, difference
from faults.scenarios import Clone, Ctr, Disks, Making, Pod, until

HANG = "hang"
"""A hypervisor that is not killed: it stands still (SIGSTOP), and answers nothing any more."""
VICTIMS = ("engine", "hypervisor", HANG, *stops.WRONGLY, "virtiofsd", "containerd", "shim", "maker")
REACH_S = 90.0
CLEAN_S = 90.0
"""How long the host may take to be as before. An engine without a container or a client ends after a minute."""
VICTIM_S = 15.0
EARLIEST = 0.05


class Round:
    """One fault.

    Attributes:
        key: What it is called in the state file.
        victim: Who is killed.
        point: At which stop point; None at a random moment.
        moment: Random rounds: the moment, as a part of what an undisturbed round takes.
        scenario: ``ctr``, ``crictl``; by ctr ``disks`` (with the root file system on disks), ``making`` (a template)
            or ``clone`` (from one).
    """

    def __init__(
        self, key: str, victim: str, point: stops.Point | None, moment: float = 0.0, scenario: str = "ctr"
    ) -> None:
        self.key = key
        self.victim = victim
        self.point = point
        self.moment = moment
        self.scenario = scenario


def point_rounds(names: Iterable[str]) -> list[Round]:
    """A round for each stop point with each victim that there may be at it."""
    points = [stops.BY_NAME[name] for name in names]
    return [
        Round(f"{one.name} {victim}", victim, one, scenario=one.scenario)
        for one in points
        for victim in one.victims
    ]


def random_rounds(seed: int, numbers: Iterable[int], victims: list[str], *, pods: bool) -> list[Round]:
    """Rounds that depend on seed and number alone (and on what there is on this host), so that one can be repeated
    by itself."""
    rounds = []
    for number in numbers:
        dice = random.Random(f"{seed}:{number}")
        moment, victim = dice.random(), dice.choice(victims)
        scenario = "crictl" if dice.random() < 0.35 and pods else "ctr"
        rounds.append(Round(f"random {number}", victim, None, moment, scenario))
    return rounds


class Runner:
    """Carries rounds out, in a containerd of its own.

    Args:
        guest: The guest's directory.
        layout: An OCI layout of busybox.
        second: Whether that is containerd 2 and not this machine's.
    """

    def __init__(self, guest: Path, layout: Path, *, second: bool) -> None:
        self._guest = guest
        self._second = second
        self._layout = layout
        self._daemon: Daemon | None = None
        self._before: Snapshot = {}
        self._takes: dict[str, float] = {}
        self._answers_wrongly = False
        self._templates = False
        self._count = 0

    # ---- the daemon ----

    def open(self) -> None:
        """Start the daemon, and have one undisturbed round of each kind: they show how long one takes, and make what
        stays (a bridge)."""
        parent = os.environ.get("KATA_FAULTS_DIR") or "/tmp"
        directory = Path(tempfile.mkdtemp(prefix="kf-", dir=parent))
        self._daemon = Daemon(
            directory,
            self._guest,
            second=self._second,
            wrong_answers=self._answers_wrongly,
            templates=self._templates,
        )
        self._daemon.up(self._layout)
        self._daemon.listen()
        for scenario in ("ctr", "crictl") if self._daemon.has_pods else ("ctr",):
            began = time.monotonic()
            script = Script(self._scenario(scenario).steps())
            script.start()
            script.join()
            self._takes[scenario] = time.monotonic() - began
            bad = [f"{name}: {said}" for name, code, said in script.ended if code and name != "delete"]
            if script.hangs or bad:
                raise Failure(
                    f"an undisturbed round by {scenario} failed: {script.hangs or bad[0]}\n{self._said()}"
                )
        self._forget_containers()
        self._before = self._settled()

    def close(self) -> None:
        """Take everything back."""
        if self._daemon is not None:
            self._daemon.down()
            self._daemon = None

    @property
    def has_pods(self) -> bool:
        """Whether rounds by crictl are possible here."""
        assert self._daemon is not None
        return self._daemon.has_pods

    @property
    def containerd(self) -> str:
        """What the daemon calls itself."""
        assert self._daemon is not None
        return self._daemon.version

    @property
    def takes(self) -> dict[str, float]:
        """Seconds of an undisturbed round, by scenario."""
        return self._takes

    def _forget_containers(self) -> None:
        daemon = self._running()
        for name in daemon.in_ctr("container", "ls", "-q").stdout.split():
            daemon.in_ctr("container", "rm", name)

    def _settled(self) -> Snapshot:
        """A snapshot once two in a row are equal."""
        place = self._running().place
        last = place.snapshot()
        while True:
            time.sleep(0.5)
            now = place.snapshot()
            if now == last:
                return now
            last = now

    def _running(self) -> Daemon:
        if self._daemon is None:
            self.open()
        assert self._daemon is not None
        return self._daemon

    def _scenario(self, kind: str) -> Ctr | Pod:
        assert self._daemon is not None
        self._count += 1
        name = f"f{self._count}"
        scenarios: dict[str, type[Ctr | Pod]] = {
            "crictl": Pod,
            "disks": Disks,
            "making": Making,
            "clone": Clone,
        }
        return scenarios.get(kind, Ctr)(self._daemon, name)

    # ---- one round ----

    def carry_out(self, one: Round) -> dict[str, Any]:
        """One round.

        Returns:
            ``ok``, ``became`` (what became of the task), ``at`` (the client's step), ``seconds``; ``why`` and ``said``
            of a failure. ``ok`` is None where the victim does not exist at that point.
        """
        began = time.monotonic()
        result: dict[str, Any] = {"ok": True, "victim": one.victim, "scenario": one.scenario}
        wanted = (one.victim in stops.WRONGLY, one.scenario in ("making", "clone"))
        if wanted != (self._answers_wrongly, self._templates):
            self.close()
            self._answers_wrongly, self._templates = wanted
        self._running()
        scenario = self._scenario(one.scenario)
        try:
            while not (killed := self._fault(one, scenario, result)):
                scenario.check("")
                self._clean()
                if one.point is not None or one.moment < EARLIEST:
                    break
                # The client was quicker than the undisturbed one that the moment was measured by.
                one.moment /= 2
                scenario = self._scenario(one.scenario)
            result["moment"] = one.moment
            if killed:
                result["became"] = scenario.check(one.victim)
                self._clean()
            else:
                result["ok"] = None
        except (Failure, AssertionError) as failure:
            result.update(ok=False, why=str(failure), said=self._said())
            # What is broken now would be blamed on the next rounds.
            self.close()
        result["seconds"] = round(time.monotonic() - began, 1)
        return result

    def _fault(self, one: Round, scenario: Ctr | Pod, result: dict[str, Any]) -> bool:
        if one.victim in stops.WRONGLY:
            return self._wrong_answer(one, scenario, result)
        daemon = self._running()
        script = Script(scenario.steps())
        armed = daemon.arm(one.point.name) if one.point is not None else None
        try:
            script.start()
            if one.point is None:
                pid = self._at_moment(one, scenario, script)
            else:
                assert armed is not None
                pid = self._at_point(one, scenario, script, armed.reached)
            result["at"] = script.at
            script.cancelled = True
            if pid:
                self._kill(one.victim, pid)
        finally:
            if armed is not None:
                armed.release()
            script.cancelled = True
            script.join()
        if script.hangs:
            raise Failure(script.hangs)
        clearing = one.victim == "shim" and one.point is not None and one.point.phase == "clear"
        if pid and (one.victim == "containerd" or clearing):
            # containerd has the clearing up done once; if that fails, again when it is started the next time.
            daemon.stop_listening()
            daemon.stop()
            daemon.start()
            daemon.listen()
        return bool(pid)

    def _wrong_answer(self, one: Round, scenario: Ctr | Pod, result: dict[str, Any]) -> bool:
        """Have a request answered wrongly: who waits for it is told so by name, and nothing hangs."""
        daemon = self._running()
        assert one.point is not None
        part = stops.PARTS[stops.hypervisor()][one.point.name]
        script = Script(scenario.steps())
        at_the_end = one.point.name == "monitor.disk-taken"
        if not at_the_end:
            daemon.order(part, one.victim)
        try:
            script.start()
            if at_the_end:
                until(lambda: script.at == "kill" or not script.is_alive(), "a task that is to end")
                daemon.order(part, one.victim)
            script.join()
        finally:
            daemon.order()
            script.join()
        result["at"] = script.at
        if script.hangs:
            raise Failure(script.hangs)
        failed = [said for _, code, said in script.ended if code]
        if not at_the_end and not any(answers.SAYS[one.victim] in said for said in failed):
            raise Failure(f"the client was not told that the hypervisor answered wrongly: {script.ended}")
        return True

    def _at_point(self, one: Round, scenario: Ctr | Pod, script: Script, reached: Callable[[], int]) -> int:
        """Wait until the point is reached; the victim's pid, 0 if there is none then."""
        daemon = self._running()
        assert one.point is not None
        if one.point.phase == "clear":
            until(lambda: script.at == "exec" or not script.is_alive(), "a running task")
            script.cancelled = True
            engine = daemon.find("engine", scenario.sandbox())
            if not engine:
                raise Failure("there is no engine to begin with")
            os.kill(engine, signal.SIGKILL)
        waiting = 0
        deadline = time.monotonic() + REACH_S
        while not (waiting := reached()):
            if time.monotonic() > deadline or not (
                script.is_alive() or one.point.phase in ("clear", "delete", "template")
            ):
                ended = "; ".join(f"{name}: {code} {said}" for name, code, said in script.ended)
                raise Failure(f"the point {one.point.name} was not reached ({ended})")
            time.sleep(0.005)
        if one.victim in ("shim", "maker") or (one.victim == "engine" and one.point.where == "engine"):
            return waiting
        deadline = time.monotonic() + (VICTIM_S if one.point.where == "shim" else 0.0)
        while not (pid := daemon.find(one.victim, scenario.sandbox())):
            if time.monotonic() > deadline:
                return 0
            time.sleep(0.01)
        return pid

    def _at_moment(self, one: Round, scenario: Ctr | Pod, script: Script) -> int:
        """Wait for the moment; if there is no victim yet then, until there is."""
        daemon = self._running()
        time.sleep(one.moment * self._takes[one.scenario])
        while script.is_alive():
            scenario.sandbox()
            early = one.victim == "containerd" and script.at == scenario.before_containerd
            pid = 0 if early else daemon.find(one.victim, scenario.sandbox())
            if pid:
                return pid
            time.sleep(0.01)
        return 0

    def _kill(self, victim: str, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGSTOP if victim == HANG else signal.SIGKILL)
        except ProcessLookupError:
            return  # it has just ended by itself
        if victim == "containerd":
            self._running().killed()

    def _clean(self) -> None:
        """The host is as it was.

        Raises:
            Failure: It is not, with what differs.
        """
        place = self._running().place
        deadline = time.monotonic() + CLEAN_S
        while different := difference(self._before, place.snapshot()):
            if time.monotonic() > deadline:
                raise Failure("the host is not as before: " + "; ".join(different[:20]))
            time.sleep(0.2)

    def _said(self) -> str:
        try:
            return self._running().diagnosis()[-6000:]
        except (OSError, Failure) as error:
            return f"(no logs: {error})"


class Record:
    """The results so far with one containerd, in a file, so that a run can be resumed.

    Args:
        path: The file.
        containerd: Its version.
        seed: Of a new run.
        resume: Whether to go on with the run in the file.
    """

    def __init__(self, path: Path, containerd: str, seed: int, *, resume: bool) -> None:
        self._path = path
        self.containerd = containerd
        self.seed = seed
        self.began = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        self.results: dict[str, dict[str, Any]] = {}
        if resume and path.exists():
            content = json.loads(path.read_text())
            self.seed, self.began, self.results = content["seed"], content["began"], content["results"]

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Take a result down."""
        self.results[key] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".new")
        aside.write_text(
            json.dumps({"seed": self.seed, "began": self.began, "results": self.results}, indent=1)
        )
        aside.replace(self._path)


def run(rounds: list[Round], runner: Runner, record: Record, say: Callable[[str], None]) -> list[str]:
    """Carry out the rounds that are not recorded yet; the keys of those that failed."""
    failed = []
    for number, one in enumerate(rounds, 1):
        if one.key in record.results and record.results[one.key]["ok"] is not False:
            continue
        result = runner.carry_out(one)
        record.add(one.key, result)
        word = {True: "ok", False: "FAILED", None: "no such victim there"}[result["ok"]]
        at = (
            ""
            if one.point
            else f" {one.scenario}, kill {one.victim} at {one.moment:.3f} ({result.get('at')})"
        )
        say(
            f"  {number:3}/{len(rounds)} {one.key}{at}: {word}"
            f" {result.get('became', '')} ({result['seconds']:.1f} s)"
        )
        if result["ok"] is False:
            failed.append(one.key)
            say(f"      {result['why']}")
            sys.stdout.flush()
    return failed
