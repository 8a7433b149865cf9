"""`kata export`, `diff`, `commit`, `save`, and `run --init` and `--device`, in machines."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from cli_support import FOREVER, container
from conftest import ROOT, Kata

CHANGE = (
    "mkdir -p /new/below; echo one > /new/file; ln /new/file /new/again; ln -s /new/file /link;"
    " dd if=/dev/null of=/new/sparse bs=1M seek=3 2>/dev/null; echo end >> /new/sparse;"
    " rm /etc/group; echo more >> /etc/passwd; chmod 4755 /new/file; mkfifo /new/fifo"
)


def names(stream: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        return {member.name: member for member in tar}


def test_diff_export_and_commit(shared_kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    kata = shared_kata
    script = f"{CHANGE}; echo volume > /data/hidden; {FOREVER}"
    with container(
        kata, busybox_image, "box", script, "-v", "/data", "-e", "MINE=yes", "-w", "/new", "--label", "a=b"
    ):
        kata.ok("exec", "box", "sh", "-c", "until test -e /data/hidden; do sleep 0.1; done")
        changes = kata.ok("diff", "box").splitlines()
        assert changes == [
            "C /etc", "D /etc/group", "C /etc/passwd", "A /link", "A /new", "A /new/again", "A /new/below",
            "A /new/fifo", "A /new/file", "A /new/sparse",
        ]  # fmt: skip
        listed = json.loads(kata.ok("diff", "--format", "json", "box"))
        assert listed["deleted"] == ["/etc/group"]

        exported = kata.call("export", "box")
        assert (exported.returncode, exported.stderr) == (0, b"")
        found = names(exported.stdout)
        assert {"bin/busybox", "new/file", "etc/passwd", "proc", "data"} <= set(found)
        assert not {"etc/group", "data/hidden", "proc/1"} & set(found), "what is mounted is not in it"
        assert found["new/file"].mode == 0o4755
        links = {found[name].type for name in ("new/file", "new/again")}
        assert links == {tarfile.REGTYPE, tarfile.LNKTYPE}
        assert found["new/sparse"].size == (3 << 20) + 4

        made = kata.ok(
            "commit", "-m", "as it is", "-a", "Somebody", "-c", "ENV ADDED=1", "box", "mine:1"
        ).strip()
        image = json.loads(kata.ok("inspect", "--type", "image", "mine:1"))[0]
        assert (image["Id"], image["Author"]) == (made, "Somebody")
        assert {"MINE=yes", "ADDED=1"} <= set(image["Config"]["Env"])
        assert image["Config"]["Labels"]["a"] == "b"
        assert "as it is" in kata.ok("history", "mine:1")
        assert kata.ok("exec", "box", "cat", "/new/file") == "one\n", "it goes on"
    told = (
        "pwd; cat /new/file /link; stat -c %a /new/file; echo $MINE$ADDED; test -e /etc/group || echo gone;"
        " tail -c4 /new/sparse"
    )
    ran = kata.ok("run", "--rm", "--network", "none", "mine:1", "sh", "-c", told)
    assert ran.splitlines() == ["/new", "one", "one", "4755", "yes1", "gone", "end"]
    # An image goes out and comes in again: the files are the same, and so is what its containers get.
    archive = tmp_path / "image.tar"
    kata.ok("save", "-o", str(archive), "mine:1")
    kata.ok("rmi", "mine:1")
    assert kata.ok("load", "-q", "-i", str(archive)) == "Loaded image: mine:1\n"
    again = kata.ok("run", "--rm", "--network", "none", "mine:1", "sh", "-c", told)
    assert again == ran
    if shutil.which("skopeo"):
        seen = subprocess.run(
            ["skopeo", "inspect", "--config", f"docker-archive:{archive}"], capture_output=True, check=True
        )
        assert "MINE=yes" in json.loads(seen.stdout)["config"]["Env"]
    kata.ok("rmi", "mine:1")


def test_a_container_that_does_not_run(shared_kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    kata = shared_kata
    kata.ok("run", "--name", "done", "--network", "none", busybox_image, "sh", "-c", "echo kept > /kept")
    try:
        assert kata.ok("diff", "done") == "A /kept\n"
        out = tmp_path / "out.tar"
        kata.ok("export", "-o", str(out), "done")
        with tarfile.open(out) as tar:
            content = tar.extractfile("kept")
            assert content is not None
            assert content.read() == b"kept\n"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tar"]
        refused = kata.call("export", "-o", str(tmp_path / "no/such/dir.tar"), "done")
        assert refused.returncode == 125
        assert b"cannot be written" in refused.stderr
    finally:
        kata.ok("rm", "done")


def test_init_and_devices(shared_kata: Kata, busybox_image: str) -> None:
    program = ROOT / "build/programs/podman/usr/bin/catatonit"
    if not program.exists():
        pytest.skip("needs catatonit (tools/setup test unpacks it)")
    out = shared_kata.ok(
        "run", "--rm", "--network", "none", "--init-path", str(program), "--device", "/dev/fuse:/dev/mine:rw",
        busybox_image, "sh", "-c",
        "cat /proc/1/comm; stat -c '%F %t:%T' /dev/mine; (sleep 0.2 &); sleep 0.6; ps -o stat | grep -c Z || :",
    )  # fmt: skip
    lines = out.splitlines()
    assert lines == ["init", "character special file a:e5", "0"]
