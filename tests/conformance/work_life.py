"""Cases of people's real work: the life of a container, and its clients."""

from __future__ import annotations

import os
import re
import signal
import time

from waiting import PATIENCE, until
from work_box import Box, settled


def silent_guest(box: Box) -> str:
    """`docker rm -f` when the container's process on the host is stopped (SIGSTOP)"""
    with box.running() as name:
        os.kill(box.pid(name), signal.SIGSTOP)
        started = time.monotonic()
        said = box.call("rm", "-f", name).rpartition("; ")[2]
        soon = time.monotonic() - started < PATIENCE / 4
        return f"{said}, {'soon' if soon else 'late'}"


def exec_beside_cgroups(box: Box) -> str:
    """exec into a container whose processes have made cgroups of their own"""
    script = (
        "cd /sys/fs/cgroup; if test -e cgroup.subtree_control; then mkdir init; echo 1 > init/cgroup.procs;"
        " echo +memory +pids > cgroup.subtree_control; fi; echo up; sleep 1000"
    )
    options = ("--privileged", "--cgroupns", "private")
    with box.running("sh", "-c", script, image="bb", options=options) as name:
        until(lambda: "up" in box.docker("logs", name), "the cgroups are made")
        return box.exec(name, "echo", "inside")


def names_on_a_network(box: Box) -> str:
    """names of other containers on a network of one's own"""
    network = f"n{os.getpid()}"
    box.docker("network", "create", network)
    try:
        with box.running(image="bb", options=("--network", network, "--network-alias", "api")):
            said = box.run("nslookup", "api", image="bb", options=("--network", network))
            return "found" if re.search(r"Name:\s*api", said) and "status 0" in said else said
    finally:
        box.docker("network", "rm", network, code=None)


def connected_later(box: Box) -> str:
    """`docker network connect` to a running container"""
    network = f"n{os.getpid()}"
    box.docker("network", "create", network)
    try:
        with box.running(image="bb") as name:
            box.docker("network", "connect", network, name)
            count = "ls /sys/class/net | grep -c eth"
            return settled(lambda: box.exec(name, "sh", "-c", count), "2; status 0")
    finally:
        box.docker("network", "rm", network, code=None)


def no_network(box: Box) -> str:
    """the interfaces of a container with --network none"""
    return box.run("ls", "/sys/class/net", image="bb", options=("--network", "none"))


def hosts_uts(box: Box) -> str:
    """the host name with --uts host"""
    said = box.run("hostname", image="bb", options=("--uts", "host"))
    return "the host's" if said.startswith(f"{os.uname().nodename};") else said


def large_environment(box: Box) -> str:
    """4000 variables, as the services of a large Kubernetes namespace make"""
    file = box.fresh() / "env"
    file.write_text("".join(f"SERVICE_{n}_PORT=tcp://10.0.0.1:{n}\n" for n in range(4000)))
    return box.run("sh", "-c", "env | grep -c SERVICE_", image="bb", options=("--env-file", str(file)))


def top_lines(box: Box) -> str:
    """`docker top` shows what a process is, and not pages of arguments"""
    with box.running() as name:
        longest = max(len(line) for line in box.docker("top", name).splitlines())
        return "fits" if longest < 300 else f"lines of {longest} characters"


def shown_limit(box: Box) -> str:
    """`docker stats` of a container without a limit: what it can have"""
    with box.running() as name:
        limit = box.docker("stats", "--no-stream", "--format", "{{.MemUsage}}", name).split("/")[1].strip()
        inside = int(box.docker("exec", name, "sh", "-c", "grep MemTotal /proc/meminfo").split()[1])
        number, unit = re.fullmatch(r"([\d.]+)(\w+)", limit).groups()  # type: ignore[union-attr]
        kib = float(number) * {"KiB": 1, "MiB": 1024, "GiB": 1 << 20}[unit]
        return (
            "what the container sees"
            if abs(kib - inside) < 0.02 * inside
            else f"{limit}, inside {inside} KiB"
        )


def hard_links_copied(box: Box) -> str:
    """`docker cp` of a tree with hard links, fifos and symbolic links into a container and out again"""
    place = box.fresh()
    (place / "d").mkdir()
    (place / "d/a").write_text("data")
    os.link(place / "d/a", place / "d/b")
    os.mkfifo(place / "d/f")
    os.symlink("a", place / "d/c")
    with box.running(image="bb") as name:
        box.docker("cp", str(place / "d"), f"{name}:/d")
        inside = box.exec(name, "stat", "-c", "%n %h", "/d/a", "/d/b").splitlines()
        box.docker("cp", f"{name}:/d", str(place / "out"))
        out = place / "out"
        same = (out / "a").stat().st_ino == (out / "b").stat().st_ino
        kinds = (out / "f").is_fifo() and (out / "c").is_symlink()
        return f"{inside[0]}, out again linked: {same}, kinds kept: {kinds}"
