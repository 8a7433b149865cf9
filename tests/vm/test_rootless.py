"""Ordinary users: their containers, and what they cannot reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Kata
from waiting import PATIENCE, until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which becomes other users"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)"),
]

FIRST, SECOND = 1_800_000_001, 1_800_000_002


class User:
    """An ordinary user who has no name, no home but this directory, and no privileges.

    Args:
        uid: The user's and group's id.
        directory: The home, which is made.
        program: Path of kata's ``__main__.py``.
        guest: Directory of the guest.
    """

    def __init__(self, uid: int, directory: Path, program: Path, guest: Path) -> None:
        self.uid = uid
        self.directory = directory
        self._program = program
        self.runtime = directory / "runtime"
        for path in (directory, self.runtime):
            path.mkdir(mode=0o700)
            os.chown(path, uid, uid)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "KATA_GUEST_DIR": str(guest),
            "KATA_TEMPLATES": "off",
        }

    def call(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command of kata."""
        identity = ["--reuid", str(self.uid), "--regid", str(self.uid), "--clear-groups", "--no-new-privs"]
        return subprocess.run(
            ["setpriv", *identity, "/usr/bin/python3", "-I", "-S", str(self._program), *arguments],
            env={**self.env, **env},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def ok(self, *arguments: str) -> str:
        """The output of a command that succeeds."""
        done = self.call(*arguments)
        assert done.returncode == 0, f"kata {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def processes(self) -> list[str]:
        """What runs as this user."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if path.stat().st_uid == self.uid:
                    found.append((path / "cmdline").read_text().replace("\0", " "))
            except FileNotFoundError:
                continue
        return found


@pytest.fixture
def users(guest_assets: Path, busybox_image: str) -> Iterator[tuple[User, User, str]]:
    """Two users, and an image that both can read, as this checkout may be where they cannot go."""
    base = Path(tempfile.mkdtemp(prefix="kata-users-", dir="/tmp"))
    try:
        base.chmod(0o755)
        shutil.copytree(ROOT / "src", base / "src", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(guest_assets, base / "guest")
        shutil.copytree(busybox_image.partition(":")[2], base / "image")
        subprocess.run(["chmod", "-R", "a+rX", base], check=True)
        program = base / "src/kata/__main__.py"
        first, second = (User(uid, base / str(uid), program, base / "guest") for uid in (FIRST, SECOND))
        try:
            yield first, second, f"oci:{base}/image"
        finally:
            for user in (first, second):
                if ids := user.ok("ps", "-aq").split():
                    user.ok("rm", "-f", *ids)
        left = [line for user in (first, second) for line in user.processes()]
        assert not left, f"left running: {left}"
    finally:
        shutil.rmtree(base)


def test_an_ordinary_user_runs_containers(
    users: tuple[User, User, str], kata_env: Kata, busybox_image: str
) -> None:
    user, other, image = users
    none = ("--network", "none")
    assert user.ok("run", "--rm", *none, image, "sh", "-c", "id -u; hostname >/dev/null") == "0\n"
    assert user.call("run", "--rm", *none, image, "sh", "-c", "exit 3").returncode == 3

    shared = user.directory / "shared"
    shared.mkdir()
    os.chown(shared, user.uid, user.uid)
    user.ok("run", "-d", "--name", "one", *none, "-v", f"{shared}:/shared", image, "sleep", "1000")
    assert "one" in user.ok("ps")
    assert user.ok("exec", "one", "sh", "-c", "echo made >/shared/file; cat /shared/file") == "made\n"
    assert (shared / "file").stat().st_uid == user.uid

    # Nobody else reaches it, nor it others: what lies there belongs to the user alone.
    theirs = {
        "KATA_RUN_DIR": str(user.runtime / "kata"),
        "KATA_STATE_DIR": str(user.directory / ".local/share/kata"),
    }
    refused = other.call("exec", "one", "true", **theirs)
    assert refused.returncode == 125
    assert "Permission denied" in refused.stderr or "no container" in refused.stderr
    roots = {"KATA_RUN_DIR": str(kata_env.run_dir), "KATA_STATE_DIR": str(kata_env.state_dir)}
    kata_env.ok("create", "--name", "roots", busybox_image, "true")
    refused = user.call("start", "roots", **roots)
    assert refused.returncode == 125
    assert "Permission denied" in refused.stderr or "no container" in refused.stderr
    engines = [line for line in user.processes() if " engine " in line]
    assert len(engines) == 1

    user.ok("stop", "-t", "1", "one")
    user.ok("rm", "one")
    until(lambda: not user.processes(), lambda: f"the end of {user.processes()}")
    assert list((user.runtime / "kata/sandboxes").iterdir()) == []


def test_what_ordinary_users_are_refused(users: tuple[User, User, str]) -> None:
    user, _, image = users
    refused = user.call("run", "--rm", image, "true")
    assert refused.returncode == 125
    assert "hint: Ordinary users have no user network" in refused.stderr
    refused = user.call("install", "containerd")
    assert "has to run as root" in refused.stderr
    assert f"user {user.uid} in a user namespace" in user.call("doctor").stdout
    # Without a runtime directory there is one below /tmp, unless somebody has made it before.
    fallback = Path(f"/tmp/kata-{user.uid}")
    try:
        assert user.call("ps", XDG_RUNTIME_DIR="").returncode == 0
        assert fallback.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(fallback)
        fallback.mkdir(mode=0o777)
        refused = user.call("ps", XDG_RUNTIME_DIR="")
        assert f"{fallback} is not a directory that is this user's alone" in refused.stderr
    finally:
        shutil.rmtree(fallback, ignore_errors=True)
    until(lambda: not user.processes(), lambda: f"the end of {user.processes()}")
