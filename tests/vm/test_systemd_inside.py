"""systemd as the first process of an ordinary, unprivileged container."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Kata
from waiting import until

SYSTEMD = Path("/lib/systemd/systemd")
UNIT = """\
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/busybox touch /run/was-here
MemoryMax=20M
"""
TARGET = "[Unit]\nDescription=All\nDefaultDependencies=no\nWants=hello.service\nAfter=hello.service\n"
SHUTDOWN = ("halt.target", "shutdown.target", "umount.target", "final.target", "systemd-halt.service")
INSIDE = """
systemctl is-active hello.service
cat /proc/1/cgroup
cat /sys/fs/cgroup/system.slice/hello.service/memory.max 2>/dev/null || echo gone
if echo max > /sys/fs/cgroup/memory.max; then exit 1; fi
"""


def with_libraries(root: Path, *programs: str) -> None:
    """Copy programs of the host, and what they are linked with, to the same places below a directory."""
    libraries = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    for path in {*programs, *re.findall(r"(/[^ :]+) \(0x", libraries)}:
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


@pytest.mark.skipif(not SYSTEMD.exists(), reason="needs systemd (apt-get install systemd)")
def test_systemd_runs_without_privileges(shared_kata: Kata, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for directory in ("sbin", "bin", "etc/systemd/system", "var/log", "proc", "sys", "dev", "run", "tmp"):
        (root / directory).mkdir(parents=True)
    systemctl = shutil.which("systemctl")
    assert systemctl is not None
    shutdown = SYSTEMD.with_name("systemd-shutdown")
    with_libraries(root, str(SYSTEMD), str(shutdown), systemctl, "/bin/busybox")
    (root / "lib/systemd/system").mkdir()
    for unit in SHUTDOWN:
        shutil.copy(SYSTEMD.parent / "system" / unit, root / "lib/systemd/system")
    (root / "sbin/init").symlink_to(SYSTEMD)
    for name in ("sh", "cat"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/machine-id").touch()
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/systemd/system/hello.service").write_text(UNIT)
    (root / "etc/systemd/system/default.target").write_text(TARGET)
    options = ("-d", "--name", "sd", "-m", "200m")
    shared_kata.ok("run", *options, f"rootfs:{root}", "/sbin/init", timeout=60)
    try:
        until(
            lambda: (
                not shared_kata.call("exec", "sd", "/bin/busybox", "test", "-e", "/run/was-here").returncode
            ),
            lambda: str(shared_kata.call("logs", "sd")),
            patience_s=60,
        )
        said = shared_kata.call("exec", "sd", "sh", "-c", INSIDE)
        assert said.returncode == 0, said
        assert said.stdout.decode().split() == ["active", "0::/init.scope", "gone"]
        # It shuts down by its own signal, and in its own time.
        shared_kata.ok("stop", "-t", "60", "sd")
        assert shared_kata.ok("wait", "sd").strip() == "0"
    finally:
        shared_kata.ok("rm", "-f", "sd")
    assert not os.path.exists(shared_kata.state_dir / "names" / "sd")
