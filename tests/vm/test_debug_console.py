"""``kata-runtime exec SANDBOX``: a shell of a sandbox's guest."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Kata
from oci_support import PROGRAM
from terminal import Terminal
from waiting import PATIENCE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_a_shell_of_the_guest(kata_env: Kata, guest_assets: Path, busybox_image: str) -> None:
    kata = kata_env
    kata.env["KATA_GUEST_DIR"] = str(shutil.copytree(guest_assets, kata.directory / "guest"))
    configuration = kata.directory / "kata.toml"
    configuration.write_text("[agent.kata]\ndebug_console_enabled = true\n")

    def made(name: str) -> None:
        kata.ok("run", "-d", "--name", name, "--network", "none", busybox_image, "sleep", "1000")

    def piped(name: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [PROGRAM, "exec", name],
            input=stdin,
            env=kata.env,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )

    made("plain")
    refused = piped("plain")
    assert refused.returncode == 255
    assert b"not enabled when the sandbox was made" in refused.stderr
    assert b"kata exec -it" in refused.stderr
    kata.ok("rm", "-f", "plain")

    kata.env["KATA_CONF_FILE"] = str(configuration)
    made("bare")
    refused = piped("bare")
    assert (refused.returncode, b"its guest has no shell" in refused.stderr) == (255, True), refused.stderr
    assert b"kata guest build --extension shell" in refused.stderr
    kata.ok("rm", "-f", "bare")

    kata.ok("guest", "build", "--extension", "shell")
    made("shelled")
    try:
        with Terminal([str(PROGRAM), "exec", "shelled"], kata.env) as shell:
            shell.expect("guest#")
            # Of the guest, not of the container, which sees its own processes alone.
            shell.typed("cat /proc/1/comm; echo $((6 * 7))-; test -t 0 && echo a terminal\r")
            shell.expect("42-")
            shell.typed("exit\r")
            shell.ended()
            assert "\ninit\n" in shell.said.replace("\r", "")
            assert "\na terminal" in shell.said.replace("\r", "")
        done = piped("shelled", b"echo $((6 * 7))-; yes | head -c 300000 | wc -c\n")
        assert (done.returncode, b"42-" in done.stdout, b"300000" in done.stdout) == (0, True, True), done
        # One that is killed takes its shell with it, and others have theirs.
        with Terminal([str(PROGRAM), "exec", "shelled"], kata.env) as first:
            first.expect("guest#")
            first.typed("sleep 4321 &\r")
            assert b"sleep 4321" in piped("shelled", b"ps | grep '[s]leep 4321'\n").stdout
            first.typed("exec sleep 4322\r")
        wait = b"while ps | grep -q '[s]leep 4322'; do sleep 0.1; done; echo go$((1 + 1))ne\n"
        assert b"go2ne" in piped("shelled", wait).stdout
    finally:
        kata.ok("rm", "-f", "shelled")
