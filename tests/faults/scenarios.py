"""The scenarios: with ctr and with crictl here, with podman and `kata-runtime` in `faults.podman_scenarios`."""

from __future__ import annotations

import contextlib
import json
import stat
import subprocess
import time
from collections.abc import Callable
from typing import cast

from containerd_support import IMAGE, RUNTIME

from faults.daemon import BUSYBOX, Daemon
from faults.podman import PodmanTarget
from faults.podman_scenarios import ByPodman, Direct
from faults.scenario import CRASHES, Scenario, Step, until
from faults.target import Failure, Target

FORGET_S = 30.0
"""How long containerd may go on saying that there is a task. It does while it clears up after an engine; and when it
was killed before it had a task made, it connects to what the shim has started (1.6; 1.7 asks whether there is a task),
until that engine ends, for which it waits ten seconds for its clients to hang up (`kata.engine.main`)."""
MAKER_S = 3.0
"""Within that, a machine that is up has started the process that makes its template."""


class Ctr:
    """One container by ctr, in a network namespace that is wired.

    Args:
        daemon: Whose client it is.
        name: The container's.
    """

    before_containerd = ""
    """The step before whose end containerd itself is not killed."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon = daemon
        self.name = name

    def steps(self) -> list[Step]:
        """The client's calls, in order."""
        ctr = self._daemon.in_ctr
        return [
            ("create and start", lambda: self._run()),
            ("exec", lambda: ctr("task", "exec", "--exec-id", "e1", self.name, "echo", "here", check=False)),
            ("kill", lambda: ctr("task", "kill", "-s", "KILL", self.name, check=False)),
            ("delete", lambda: self._delete()),
        ]

    def _run(self) -> subprocess.CompletedProcess[str]:
        network = f"network:/run/netns/{self._daemon.inner}"
        options = ("-d", "--runtime", RUNTIME, "--with-ns", network)
        return self._daemon.in_ctr("run", *options, IMAGE, self.name, "sleep", "1000", check=False)

    def _delete(self) -> subprocess.CompletedProcess[str]:
        with contextlib.suppress(Failure):  # whatever it is, the checks look at it
            until(lambda: self._daemon.task_states().get(self.name) != "RUNNING", "the end of a killed task")
        return self._daemon.in_ctr("task", "rm", self.name, check=False)

    def sandbox(self) -> str:
        """Name of the sandbox's run directory, whether it exists or not."""
        return f"{self._daemon.token}.{self.name}"

    def check(self, victim: str) -> str:
        """What has to hold, up to and with the removal; returns in a word what became of the task.

        Raises:
            Failure: It does not.
        """
        daemon = self._daemon
        state = daemon.task_states().get(self.name, "absent")
        if victim in CRASHES:
            until(
                lambda: daemon.task_states().get(self.name) != "RUNNING",
                f"the end of a task without {victim}",
            )
            state = daemon.task_states().get(self.name, "absent")
        if (
            state == "RUNNING" and victim != "hang"
        ):  # nothing tells a guest that stands still from one that is busy
            done = daemon.in_ctr(
                "task", "exec", "--exec-id", "again", self.name, "echo", "alive", check=False
            )
            if done.stdout != "alive\n":
                raise Failure(f"the task is said to run, and does not: {done.stderr.strip()}")
        if state in ("STOPPED", "absent") and victim in CRASHES:
            self._told()
        self._remove_task()
        self._again(victim)
        self._remove_task()
        if self.name in daemon.in_ctr("container", "ls", "-q").stdout.split():
            daemon.in_ctr("container", "rm", self.name)
        return state.lower()

    def _told(self) -> None:
        """Who was told of a start is told of the end."""
        if "start" in self._daemon.topics(self.name):
            until(lambda: "exit" in self._daemon.topics(self.name), "the event of the end")

    def _remove_task(self) -> None:
        if self.name in self._daemon.task_states():
            done = self._daemon.in_ctr("task", "rm", "-f", self.name, check=False)
            if self.name in self._daemon.task_states():
                raise Failure(f"`ctr task rm -f` did not remove the task: {done.stderr.strip()}")

    def _again(self, victim: str) -> None:
        """The same once more: nothing that is left stands in its way."""
        daemon = self._daemon
        deadline = time.monotonic() + FORGET_S
        while True:
            if self.name in daemon.in_ctr("container", "ls", "-q").stdout.split():
                done = daemon.in_ctr("task", "start", "-d", self.name, check=False)
            else:
                if victim == "containerd":
                    # Killed between the two, it leaves its client's snapshot without a container: its own affair.
                    daemon.in_ctr("snapshot", "rm", self.name, check=False)
                done = self._run()
            if "already exists" not in done.stderr or time.monotonic() > deadline:
                break
            time.sleep(0.1)
            self._remove_task()  # the call that was under way when containerd was killed is carried out all the same
        if done.returncode:
            raise Failure(f"the second attempt failed: {done.stderr.strip()}")
        state = daemon.task_states().get(self.name)
        if state != "RUNNING":
            raise Failure(f"the second attempt is {state}")


class Disks(Ctr):
    """The same container with its root file system on disks, which it writes to."""

    _OPTION = ("--annotation", "io.katacontainers.config.runtime.rootfs_upper_layer=block")
    _SCRIPT = "rm /etc/passwd; echo 1 >/written; echo ready; exec sleep 1000"

    def _run(self) -> subprocess.CompletedProcess[str]:
        network = f"network:/run/netns/{self._daemon.inner}"
        options = ("-d", "--runtime", RUNTIME, "--with-ns", network, *self._OPTION)
        return self._daemon.in_ctr("run", *options, IMAGE, self.name, "sh", "-c", self._SCRIPT, check=False)

    def check(self, victim: str) -> str:
        """As for `Ctr`; and the snapshot has all that was written, or nothing, and never a disk's file."""
        snapshots = self._daemon.directory / "root/io.containerd.snapshotter.v1.overlayfs/snapshots"
        result = super().check(victim)
        if found := list(snapshots.glob("*/fs/.kata*")):
            raise Failure(f"the writable disk's file is left: {found[0]}")
        for written in snapshots.glob("*/fs/written"):
            whiteout = written.parent / "etc/passwd"
            if not stat.S_ISCHR(whiteout.lstat().st_mode) or written.read_text() != "1\n":
                raise Failure(f"{written.parent} has not all that the container has written")
        return result


class Making(Ctr):
    """The same container, for whose machine a template is made; none of it is left in the end."""

    def steps(self) -> list[Step]:
        """As for `Ctr`, once the template is there."""
        self._daemon.run_kata("factory", "destroy")
        start, *others = super().steps()
        return [start, ("wait for the template", self._wait), *others]

    def _wait(self) -> subprocess.CompletedProcess[str]:
        with contextlib.suppress(Failure):  # it may have come and gone, or be dead
            until(
                lambda: self._daemon.makes_template() or bool(self._daemon.template()),
                "who makes the template",
                patience_s=MAKER_S,
            )
        until(lambda: not self._daemon.makes_template(), "the end of who makes the template")
        made = bool(self._daemon.template())
        return subprocess.CompletedProcess([], 0 if made else 1, "", "" if made else "there is no template")

    def check(self, victim: str) -> str:
        """As for `Ctr`; and the next container gets a template that machines go on from, after whatever happened."""
        result = super().check(victim)
        if not self._daemon.template():
            self._daemon.run_kata(
                "factory", "destroy"
            )  # forgets a failure, after which none is made for an hour
            self._again(victim)
            if self._wait().returncode:
                raise Failure(
                    f"no template was made afterwards: {self._daemon.run_kata('factory', 'status').stdout}"
                )
            self._remove_task()
        self._again(victim)
        listed = self._daemon.run_kata("factory", "status").stdout
        if self._daemon.template() not in listed:
            raise Failure(f"the template is not listed: {listed}")
        self._remove_task()
        if self.name in self._daemon.in_ctr("container", "ls", "-q").stdout.split():
            self._daemon.in_ctr("container", "rm", self.name)
        self._daemon.run_kata("factory", "destroy")
        self._daemon.run_kata("gc")
        return result


class Clone(Ctr):
    """The same container in a machine that goes on from a template."""

    def steps(self) -> list[Step]:
        """As for `Ctr`; the template is there before."""
        if not self._daemon.template():
            self._daemon.run_kata("factory", "destroy")  # also what is known of failures
            maker = Making(self._daemon, f"{self.name}m")
            self._daemon.seen.add(maker.sandbox())
            for name, step in maker.steps():
                done = step()
                if done.returncode:
                    raise Failure(f"no template was made: {name}: {done.stderr}")
            self._daemon.in_ctr("container", "rm", maker.name)
        return super().steps()


class Pod:
    """One pod with one container, by crictl.

    Args:
        daemon: Whose client it is.
        name: The pod's.
    """

    before_containerd = "run the pod"
    # A containerd that dies within RunPodSandbox forgets the network namespace that it has just made, whatever
    # the runtime.

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon = daemon
        self.name = name
        self._pod = ""
        self._container = ""
        self._known = set(daemon.sandboxes())

    def steps(self) -> list[Step]:
        """The client's calls, in order."""
        crictl = self._daemon.crictl
        return [
            ("run the pod", lambda: self._run_pod(0)),
            ("create", lambda: self._create()),
            ("start", lambda: crictl("start", self._container, check=False)),
            ("exec", lambda: crictl("exec", "-s", self._container, "echo", "here", check=False)),
            ("stop the pod", lambda: crictl("stopp", self._pod, check=False)),
            ("remove the pod", lambda: crictl("rmp", self._pod, check=False)),
        ]

    def _write(self, name: str, content: object) -> str:
        path = self._daemon.directory / f"{name}.json"
        path.write_text(json.dumps(content))
        return str(path)

    def _run_pod(self, attempt: int) -> subprocess.CompletedProcess[str]:
        metadata = {"name": self.name, "uid": self.name, "namespace": "faults", "attempt": attempt}
        path = self._write("pod", {"metadata": metadata, "hostname": self.name, "linux": {}})
        done = self._daemon.crictl("runp", "--runtime", "kata", path, check=False)
        self._pod = done.stdout.strip()
        return done

    def _create(self) -> subprocess.CompletedProcess[str]:
        command = ["sleep", "1000"]
        config = {"metadata": {"name": "one"}, "image": {"image": BUSYBOX}, "command": command, "linux": {}}
        path = self._write("container", config)
        pod = str(self._daemon.directory / "pod.json")
        done = self._daemon.crictl("create", self._pod, path, pod, check=False)
        self._container = done.stdout.strip()
        return done

    def sandbox(self) -> str:
        """Name of the sandbox's run directory; empty until it is there."""
        name = self._daemon.newest_sandbox(self._known)
        if name:
            self._daemon.seen.add(name)
        return name

    def check(self, victim: str) -> str:
        """As `Ctr.check`."""
        daemon = self._daemon
        pods = daemon.crictl("pods", "-q").stdout.split()
        daemon.seen.update(pods)
        state = "absent"
        if pods:
            if victim in CRASHES:
                until(
                    lambda: not self._list("ps", "--state", "Running"),
                    f"the end of containers without {victim}",
                )
                until(
                    lambda: not self._list("pods", "--state", "ready"), f"the end of a pod without {victim}"
                )
            state = "ready" if self._list("pods", "--state", "ready") else "notready"
            running = self._list("ps", "--state", "Running")
            if running and victim != "hang":
                done = daemon.crictl("exec", "-s", running[0], "echo", "alive", check=False)
                if done.stdout.strip() != "alive":  # crictl adds empty lines
                    raise Failure(f"the container is said to run, and does not: {done.stderr.strip()}")
        done = self._run_pod(1)
        if done.returncode:
            raise Failure(f"the second attempt failed: {done.stderr.strip()}")
        for pod in daemon.crictl("pods", "-q").stdout.split():
            daemon.seen.add(pod)
            daemon.crictl("rmp", "-f", pod)
        return state

    def _list(self, *arguments: str) -> list[str]:
        return self._daemon.crictl(*arguments, "-q").stdout.split()


def make(kind: str, target: Target, name: str) -> Scenario:
    """A scenario.

    Args:
        kind: Which one; ``ctr`` and others of containerd's, ``podman``, ``run``, ``podman-pool``.
        target: Where; the one of that kind.
        name: Of the container or pod.
    """
    from faults.pool import ByPodmanFromPool, Pool  # which are made of these here

    by_podman: dict[str, Callable[[PodmanTarget, str], Scenario]] = {
        "podman": ByPodman,
        "run": Direct,
        "podman-pool": ByPodmanFromPool,
    }
    if kind in by_podman:
        return by_podman[kind](cast(PodmanTarget, target), name)
    by_containerd: dict[str, Callable[[Daemon, str], Scenario]] = {
        "ctr": Ctr,
        "crictl": Pod,
        "disks": Disks,
        "making": Making,
        "clone": Clone,
        "pool": Pool,
    }
    return by_containerd[kind](cast(Daemon, target), name)
