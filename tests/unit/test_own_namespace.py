"""One user namespace for all commands of a user who has networks: who finds whom."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from kata import own_namespace, sysio

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    return tmp_path / "r" / "namespace.lock"


def test_who_has_no_network_shares_nothing(tmp_path: Path) -> None:
    assert not own_namespace.has_networks()
    (tmp_path / "s/networks/front").mkdir(parents=True)
    assert own_namespace.has_networks()


def test_who_has_ended_is_written_down_no_longer(state: Path) -> None:
    boot = sysio.boot_id()
    with own_namespace.Companions() as companions:
        # One that has ended, one of another boot, a pid that is another's by now, and no process at all.
        state.write_text(f"1 1 {boot}\n{os.getpid()} 5 {boot}\n1 2 other\nnonsense\n{'9' * 30} 1 {boot}\n")
        assert not companions.join()
        companions.add()
        companions.add()
    own = sysio.proc_starttime(os.getpid())
    assert state.read_text() == f"{os.getpid()} {own} {boot}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes an ordinary user")
def test_commands_come_into_the_namespace_of_those_that_run(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Of two that start at the same time as well; a third, when these have ended, makes another."""
    script = textwrap.dedent(
        """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from kata import rootless
        rootless.enter()
        print(os.stat("/proc/self/ns/user").st_ino, os.getuid(), bool(rootless.lacks), flush=True)
        sys.stdin.read()
        """
    )
    user = 1_800_000_007
    # Where another user can go, unlike pytest's own directory.
    base = Path(tempfile.mkdtemp(prefix="kt-namespace-", dir="/tmp"))
    request.addfinalizer(lambda: shutil.rmtree(base))
    base.chmod(0o755)
    for name in ("s", "s/networks", "s/networks/front", "r"):
        (base / name).mkdir()
        os.chown(base / name, user, user)
    monkeypatch.setenv("KATA_STATE_DIR", str(base / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(base / "r"))

    def begin() -> subprocess.Popen[str]:
        identity = ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
        return subprocess.Popen(
            ["setpriv", *identity, sys.executable, "-I", "-S", "-c", script, str(ROOT / "src")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    running = [begin(), begin(), begin()]
    try:
        said = []
        for one in running:
            assert one.stdout is not None
            said.append(one.stdout.readline().split())
    finally:
        for one in running:
            one.communicate()
    assert said == [[said[0][0], "0", "True"]] * 3  # no subordinate ids, which it says
    assert int(said[0][0]) != os.stat("/proc/self/ns/user").st_ino
    assert [one.returncode for one in running] == [0, 0, 0]
