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

from faults import answers, scenarios, stops
from faults import oci_points as oci
from faults.host import Snapshot, difference
from faults.pool import child
from faults.scenario import Scenario, until
from faults.target import Failure, Script, Target

HANG = stops.HANG
VICTIMS = (
    *("engine", "hypervisor", HANG, *stops.WRONGLY, "virtiofsd", "containerd", "shim", "maker"),
    *("runtime", "standing", "conmon", "exec-conmon", "waiter"),
)
"""``shim`` and ``runtime`` are commands, which run when somebody executes them; ``standing`` is the process of the host
that stands for a container (`kata.oci_runtime.pid_process`)."""
_TEMPLATED = ("making", "clone", "pool", "podman-pool")
"""Scenarios whose machines have templates."""
_AROUND_WAITERS = ("shim", "containerd", "runtime", "conmon")
"""Who else there is at the points of a machine that waits: whoever asks for it."""
REACH_S = 90.0
REACH_LIVES = 12.0
"""A point is waited for that long, or for as long as so many undisturbed lives take: machines may have to boot, have
a template made and come to wait before."""
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
        scenario: ``ctr``, ``crictl``; by ctr ``disks`` (with the root file system on disks), ``making`` (a template),
            ``clone`` (from one) or ``pool`` (one that has waited); ``podman``, ``run`` (`kata-runtime run`),
            ``podman-pool`` (by podman, in a machine that has waited).
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
    """A round for each stop point with each victim that there may be at it, with containerd's clients."""
    points = [stops.BY_NAME[name] for name in names]
    return [
        Round(f"{one.name} {victim}", victim, one, scenario=one.scenario)
        for one in points
        for victim in one.victims
    ]


def podman_rounds(names: Iterable[str]) -> list[Round]:
    """The same for the OCI command line: by podman, and what `kata-runtime run` alone comes by."""
    rounds = []
    for name in names:
        one = stops.BY_NAME[name]
        scenario = {"run": "run", "pool": "podman-pool"}.get(one.scenario, "podman")
        rounds += [Round(f"{name} {victim}", victim, one, scenario=scenario) for victim in oci.victims(one)]
    return rounds


def random_rounds(
    seed: int, numbers: Iterable[int], victims: list[str], kinds: tuple[str, ...]
) -> list[Round]:
    """Rounds that depend on seed and number alone (and on what there is on this host), so that one can be repeated
    by itself."""
    rounds = []
    for number in numbers:
        dice = random.Random(f"{seed}:{number}")
        moment, victim = dice.random(), dice.choice(victims)
        scenario = kinds[dice.random() < 0.35 and len(kinds) > 1]
        rounds.append(Round(f"random {number}", victim, None, moment, scenario))
    return rounds


class Runner:
    """Carries rounds out, with a client and surroundings of its own.

    Args:
        make: Makes the target, below a directory; the hypervisor answers wrongly to order, machines have templates.
        layout: An OCI layout of busybox.
    """

    def __init__(self, make: Callable[[Path, bool, bool], Target], layout: Path) -> None:
        self._make = make
        self._layout = layout
        self._target: Target | None = None
        self._before: Snapshot = {}
        self._takes: dict[str, float] = {}
        self._answers_wrongly = False
        self._templates = False
        self._count = 0
        self._waits: Script | None = None

    # ---- the target ----

    def open(self) -> None:
        """Make the target, and have one undisturbed round of each kind: they show how long one takes, and make what
        stays (a bridge)."""
        parent = os.environ.get("KATA_FAULTS_DIR") or "/tmp"
        directory = Path(tempfile.mkdtemp(prefix="kf-", dir=parent))
        self._target = self._make(directory, self._answers_wrongly, self._templates)
        self._target.up(self._layout)
        for kind in self._target.kinds:
            began = time.monotonic()
            script = Script(self._scenario(kind).steps())
            script.start()
            script.join()
            self._takes[kind] = time.monotonic() - began
            bad = [f"{name}: {said}" for name, code, said in script.ended if code and name != "delete"]
            if script.hangs or bad:
                raise Failure(
                    f"an undisturbed round by {kind} failed: {script.hangs or bad[0]}\n{self._said()}"
                )
        self._target.forget()
        self._before = self._settled()

    def close(self) -> None:
        """Take everything back."""
        if self._target is not None:
            self._target.down()
            self._target = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The scenarios of random rounds that are possible here."""
        assert self._target is not None
        return self._target.kinds

    @property
    def title(self) -> str:
        """The client, with its version."""
        assert self._target is not None
        return self._target.title

    @property
    def takes(self) -> dict[str, float]:
        """Seconds of an undisturbed round, by scenario."""
        return self._takes

    def _settled(self) -> Snapshot:
        """A snapshot once two in a row are equal, and no process is left."""
        place = self._running().place
        last = place.snapshot()
        deadline = time.monotonic() + CLEAN_S
        while True:
            time.sleep(0.5)
            now = place.snapshot()
            if now == last and not now["process"]:
                return now
            if time.monotonic() > deadline:
                raise Failure(f"processes are left of undisturbed rounds: {now['process'][:5]}")
            last = now

    def _running(self) -> Target:
        if self._target is None:
            self.open()
        assert self._target is not None
        return self._target

    def _scenario(self, kind: str) -> Scenario:
        assert self._target is not None
        self._count += 1
        return scenarios.make(kind, self._target, f"f{self._count}")

    # ---- one round ----

    def carry_out(self, one: Round) -> dict[str, Any]:
        """One round.

        Returns:
            ``ok``, ``became`` (what became of the task), ``at`` (the client's step), ``seconds``; ``why`` and ``said``
            of a failure. ``ok`` is None where the victim does not exist at that point.
        """
        began = time.monotonic()
        result: dict[str, Any] = {"ok": True, "victim": one.victim, "scenario": one.scenario}
        wanted = (one.victim in stops.WRONGLY, one.scenario in _TEMPLATED)
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
                self._let_go()
                self._clean()
            else:
                result["ok"] = None
        except (Failure, AssertionError) as failure:
            result.update(ok=False, why=str(failure), said=self._said())
            # What is broken now would be blamed on the next rounds.
            self.close()
        finally:
            self._waits = None
        result["seconds"] = round(time.monotonic() - began, 1)
        return result

    def _fault(self, one: Round, scenario: Scenario, result: dict[str, Any]) -> bool:
        if one.victim in stops.WRONGLY:
            return self._wrong_answer(one, scenario, result)
        target = self._running()
        script = Script(scenario.steps())
        armed = target.arm(one.point.name) if one.point is not None else None
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
            if one.victim == HANG and one.point is not None and one.point.name in stops.RUNS:
                self._waits = script
            else:
                script.join()
        if script.hangs:
            raise Failure(script.hangs)
        if pid:
            target.recover(one.victim, one.point)
        return bool(pid)

    def _let_go(self) -> None:
        """Who waited for a command of the container's has ended, since the container is removed."""
        if self._waits is not None:
            self._waits.join(CLEAN_S)
            if self._waits.is_alive() or self._waits.hangs:
                raise Failure(f"the client still waits, and its container is gone: {self._waits.hangs}")

    def _wrong_answer(self, one: Round, scenario: Scenario, result: dict[str, Any]) -> bool:
        """Have a request answered wrongly: who waits for it is told so by name, and nothing hangs."""
        target = self._running()
        assert one.point is not None
        part = stops.PARTS[stops.hypervisor()][one.point.name]
        script = Script(scenario.steps())
        at_the_end = one.point.name == "monitor.disk-taken"
        if not at_the_end:
            target.order(part, one.victim)
        try:
            script.start()
            if at_the_end:
                until(lambda: script.at == "kill" or not script.is_alive(), "a task that is to end")
                target.order(part, one.victim)
            script.join()
        finally:
            target.order()
            script.join()
        result["at"] = script.at
        if script.hangs:
            raise Failure(script.hangs)
        failed = [said for _, code, said in script.ended if code]
        if not at_the_end and not any(answers.SAYS[one.victim] in said for said in failed):
            raise Failure(f"the client was not told that the hypervisor answered wrongly: {script.ended}")
        return True

    def _at_point(self, one: Round, scenario: Scenario, script: Script, reached: Callable[[], int]) -> int:
        """Wait until the point is reached; the victim's pid, 0 if there is none then."""
        target = self._running()
        assert one.point is not None
        if one.point.phase == "clear":
            until(lambda: script.at == "exec" or not script.is_alive(), "a running task")
            script.cancelled = True
            engine = target.find("engine", scenario.sandbox())
            if not engine:
                raise Failure("there is no engine to begin with")
            os.kill(engine, signal.SIGKILL)
        waiting = 0
        deadline = time.monotonic() + max(REACH_S, REACH_LIVES * max(self._takes.values()))
        while not (waiting := reached()):
            if time.monotonic() > deadline or not (
                script.is_alive() or one.point.phase in ("clear", "delete", "template")
            ):
                ended = "; ".join(f"{name}: {code} {said}" for name, code, said in script.ended)
                raise Failure(f"the point {one.point.name} was not reached ({ended})")
            time.sleep(0.005)
        if one.point.where == "waiter" and one.victim not in _AROUND_WAITERS:
            return waiting if one.victim == "waiter" else child(waiting, one.victim)
        if one.point.where != "waiter" and (
            one.victim in ("shim", "maker", "runtime")
            or (one.victim == "engine" and one.point.where == "engine")
        ):
            return waiting
        deadline = time.monotonic() + (VICTIM_S if one.point.where in ("shim", "runtime") else 0.0)
        while not (pid := target.find(one.victim, scenario.sandbox())):
            if time.monotonic() > deadline:
                return 0
            time.sleep(0.01)
        return pid

    def _at_moment(self, one: Round, scenario: Scenario, script: Script) -> int:
        """Wait for the moment; if there is no victim yet then, until there is."""
        target = self._running()
        time.sleep(one.moment * self._takes[one.scenario])
        while script.is_alive():
            scenario.sandbox()
            early = one.victim == "containerd" and script.at == scenario.before_containerd
            pid = 0 if early else target.find(one.victim, scenario.sandbox())
            if pid:
                return pid
            time.sleep(0.01)
        return 0

    def _kill(self, victim: str, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGSTOP if victim == HANG else signal.SIGKILL)
        except ProcessLookupError:
            return  # it has just ended by itself
        self._running().was_killed(victim)

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
    """The results so far with one client, in a file, so that a run can be resumed.

    Args:
        path: The file.
        title: The client, with its version: ``containerd 1.6.20``.
        seed: Of a new run.
        resume: Whether to go on with the run in the file.
    """

    def __init__(self, path: Path, title: str, seed: int, *, resume: bool) -> None:
        self._path = path
        self.title = title
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
