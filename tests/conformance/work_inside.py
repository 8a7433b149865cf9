"""Cases of people's real work: what a container finds inside."""

from __future__ import annotations

import os
import subprocess

from work_box import Box, python

ONE_PROCESSOR = "one processor"


def ipv6_off(box: Box) -> str:
    """IPv6 on Docker's default bridge, which has none"""
    show = "cat /proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip -6 addr show eth0 | grep -c inet6; true"
    return box.run("sh", "-c", show, image="bb")


def no_input(box: Box) -> str:
    """standard input of a process without -i, in run and exec"""
    with box.running() as name:
        script = ("readlink", "/proc/self/fd/0")
        return f"{box.run(*script)}, {box.exec(name, *script)}"


def open_files(box: Box) -> str:
    """raising the limit of open files as an ordinary process may"""
    return box.run("sh", "-c", "ulimit -n 15000 && ulimit -n")


def sparse_mapping(box: Box) -> str:
    """a sparse mapping of 400 MiB in a container of 256 MiB"""
    code = "import mmap; m=mmap.mmap(-1,400<<20,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS); m[0]=1; print('mapped')"
    return box.run(*python(code), options=("-m", "256m"))


def out_of_memory(box: Box) -> str:
    """300 MiB in a container of 100 MiB"""
    with box.running(
        *python("x=bytearray(300<<20)"), options=("-m", "100m", "--memory-swap", "100m")
    ) as name:
        code = box.docker("wait", name).strip()
        return f"{code}, OOMKilled {box.docker('inspect', '--format', '{{.State.OOMKilled}}', name).strip()}"


def whole_memory(box: Box) -> str:
    """240 MiB of one process in a container of 256 MiB"""
    code = "x=bytearray(240<<20)\nfor n in range(0,len(x),4096): x[n]=1\nprint('fits')"
    return box.run(*python(code), options=("-m", "256m", "--memory-swap", "256m"))


def cpu_set(box: Box) -> str:
    """--cpuset-cpus 0,1 gives two processors"""
    if os.cpu_count() == 1:
        return ONE_PROCESSOR
    return box.run("nproc", image="bb", options=("--cpuset-cpus", "0,1"))


def read_only_below(box: Box) -> str:
    """a mount below a read-only volume"""
    place = box.fresh()
    (place / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place / "sub")], check=True)
    try:
        return box.run("touch", "/v/sub/x", image="bb", options=("-v", f"{place}:/v:ro"))
    finally:
        subprocess.run(["umount", str(place / "sub")], check=True)


def loop_device(box: Box) -> str:
    """mount -o loop in a privileged container"""
    script = (
        "dd if=/dev/zero of=/i bs=1M count=4 2>/dev/null; mke2fs -F /i >/dev/null 2>&1; mkdir /m;"
        " mount -o loop /i /m && ls /m"
    )
    return box.run("sh", "-c", script, image="bb", options=("--privileged",))
