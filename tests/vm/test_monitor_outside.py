"""The proof of the seam: a monitor that the product does not know (`scripted_monitor`) serves a whole ``kata run``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scripted_monitor
from conftest import Kata

from kata.errors import UnsupportedError
from kata.hypervisor.base import Attachments, Nic
from kata.sysio import Fd

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]


class ScriptedKata(Kata):
    """kata with the scripted monitor offered."""

    def command(self, *arguments: str) -> list[str]:
        return ["/usr/bin/python3", "-I", "-S", scripted_monitor.__file__, *arguments]


@pytest.fixture
def scripted(run_directory: Path, guest_assets: Path) -> Any:
    kata = ScriptedKata(run_directory / f"scr{os.urandom(2).hex()}", guest_assets)
    kata.directory.mkdir()
    file = kata.directory / "configuration.toml"
    file.write_text(f"[runtime]\nhypervisor_name = '{scripted_monitor.NAME}'\n")
    kata.env["KATA_CONF_FILE"] = str(file)
    yield kata
    left = kata.clear()
    shutil.rmtree(kata.directory)
    assert not left


def test_a_monitor_from_outside_serves_kata_run(scripted: ScriptedKata, busybox_image: str) -> None:
    run = ("run", "--network", "none")
    assert scripted.ok(*run, "--rm", busybox_image, "echo", "from a scripted machine").strip() == (
        "from a scripted machine"
    )
    done = scripted.call(*run, "--rm", "-i", busybox_image, "sh", "-c", "cat; exit 7", stdin=b"through")
    assert (done.returncode, done.stdout) == (7, b"through")
    scripted.ok(*run, "-d", "--name", "box", busybox_image, "sleep", "1000")
    assert scripted.ok("exec", "box", "cat", "/proc/1/comm").strip() == "sleep"
    [shown] = json.loads(scripted.ok("inspect", "box"))
    found = shown["sandbox"]
    assert found["agent_channel"] == "unix"
    assert found["hypervisor"]["name"] == scripted_monitor.NAME
    assert found["hypervisor"]["capabilities"] == {
        **scripted_monitor.MONITOR.capabilities("tcg", {}).to_plain(),
        "shares": [],
        "pause": False,
    }
    scripted.ok("rm", "-f", "box")
    assert scripted.sandboxes() == []
    # What it cannot do is said by name, before anything is made.
    refused = scripted.call("run", "--rm", busybox_image, "true")
    assert refused.returncode == 125
    assert b"The scripted monitor cannot connect a machine to a network of the mode 'user'" in refused.stderr
    refused = scripted.call(*run, "--rm", "-v", f"{scripted.directory}:/v", busybox_image, "true")
    assert f"cannot mount {scripted.directory} writable".encode() in refused.stderr
    assert scripted.sandboxes() == []
    bare = scripted.directory / "bare"
    bare.mkdir()
    refused = scripted.call(*run, "--rm", f"rootfs:{bare}", "true")
    assert f"the root file system {bare} is a directory".encode() in refused.stderr
    # What is small and read-only is copied, and a person is told so once.
    (bare / "key").write_text("copied\n")
    shown = scripted.ok(*run, "--rm", "-v", f"{bare}:/v:ro", busybox_image, "cat", "/v/key")
    assert shown == "copied\n"
    # And without this program there is no such hypervisor.
    plain = subprocess.run(
        Kata.command(scripted, *run, "--rm", busybox_image, "true"),
        env=scripted.env,
        capture_output=True,
        check=False,
    )
    assert plain.returncode == 125
    assert b"there is no hypervisor 'scripted' here" in plain.stderr


def test_the_monitor_of_the_tests_is_the_interpreters_own() -> None:
    """It runs as kata does: isolated, and without site-packages."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", scripted_monitor.__file__, "version", "--json"],
        capture_output=True,
        check=True,
    )
    assert b'"kata"' in done.stdout


def test_a_monitor_that_saves_nothing_restores_nothing() -> None:
    """By name, and what it was given for it is closed."""
    monitor = scripted_monitor.MONITOR
    assert not monitor.capabilities("tcg", {}).snapshot
    reading, writing = os.pipe()
    os.close(writing)
    tap = Fd(reading)
    attachments = Attachments(sandbox_id="x", run_dir="/", nics=[Nic("02:00:00:00:00:01", tap_fd=tap)])
    made: Any = None  # no journal: nothing may be made
    with pytest.raises(UnsupportedError, match=f"^{monitor.title} cannot restore .*/no/such") as refused:
        monitor.restore("/no/such", attachments, made)
    assert refused.value.hint
    assert not tap.is_open
