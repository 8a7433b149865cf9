"""`kata build`: a RUN in a machine, the image in our store, and what a failure and Ctrl-C leave."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from cli_support import needs_root
from conftest import Kata
from podman_support import Podman, found
from waiting import PATIENCE, until

from kata import mount_table

pytestmark = needs_root


@pytest.fixture
def builder(kata_env: Kata) -> Iterator[Kata]:
    """kata, with a podman on its PATH that has its settings in a directory of its own."""
    directory = Path(tempfile.mkdtemp(prefix="kb", dir="/tmp"))
    below = f"{kata_env.state_dir}/"
    try:
        podman = Podman(directory, kata_env.guest_dir, found())
        kata_env.env.update(
            {name: value for name, value in podman.env.items() if not name.startswith("KATA")}
        )
        yield kata_env
        assert [mount.target for mount in mount_table.mounts() if mount.target.startswith(below)] == []
        assert list((kata_env.run_dir / "sandboxes").glob("*")) == []
    finally:
        for mount in reversed(mount_table.mounts()):
            if mount.target.startswith(below):
                subprocess.run(["umount", "-l", mount.target], check=False)
        shutil.rmtree(directory)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    shutil.copy(shutil.which("busybox") or "/bin/busybox", tmp_path / "sh")
    return tmp_path


def _file(context: Path, *lines: str) -> None:
    (context / "Dockerfile").write_text(
        "FROM scratch\nCOPY sh /bin/sh\n" + "".join(f"{line}\n" for line in lines)
    )


def test_run_is_in_a_machine_and_the_image_in_the_store(builder: Kata, context: Path) -> None:
    kata = builder
    host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    _file(
        context,
        "ARG WORD",
        "RUN read b < /proc/sys/kernel/random/boot_id; echo $WORD $b > /made",
        'CMD ["sh"]',
    )
    identity = kata.ok(
        "build", "-q", "--network", "none", "-t", "made:1", "--build-arg", "WORD=hello", str(context)
    ).strip()
    assert identity.partition(":")[2][:12] in kata.ok("images", "-q", "made:1")
    [word, boot] = kata.ok(
        "run", "--rm", "--network", "none", "made:1", "sh", "-c", "read a < /made; echo $a"
    ).split()
    assert word == "hello"
    assert boot != host


def test_what_fails_or_is_interrupted_leaves_nothing(builder: Kata, context: Path) -> None:
    kata = builder
    _file(context, "RUN exit 9")
    failed = kata.call("build", "--network", "none", "-t", "made:2", str(context))
    assert failed.returncode == 125
    assert b"could not build the image" in failed.stderr
    _file(context, "RUN echo it runs; while :; do sleep 1; done")
    words = kata.command("build", "--network", "none", "-t", "made:3", str(context))
    with subprocess.Popen(
        words,
        env=kata.env,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # who runs the tests may ignore it
    ) as child:
        try:
            until(lambda: list((kata.run_dir / "sandboxes").glob("*")), "the machine of RUN")
            os.killpg(child.pid, signal.SIGINT)
            child.communicate(timeout=PATIENCE)
        finally:
            child.kill()
    assert child.returncode != 0
    assert kata.ok("images", "-q") == ""
