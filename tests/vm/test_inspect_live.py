"""`kata inspect-image` with machines: what was planted in an image is found, and nothing of it happens on the host."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from image_support import docker_save, layer, member, simple_layout

from kata.guest import packages

SUDO = "Package: sudo\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1.9.13p3-1\n\n"


def inspected(kata: Kata, image: str, *options: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(kata.ok("inspect-image", "--json", "-q", *options, image))
    assert document["problem"] == ""
    return document


def findings(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(one["kind"], one["path"]) for one in document["found"]["findings"]}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a bit of everything, in two layers."""
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + "Ab1+" * 60 + "\n-----END RSA PRIVATE KEY-----\n"
    first = layer(
        member("etc/passwd", content=b"root:x:0:0::/:/bin/sh\ntoor::0:0::/:/bin/sh\n"),
        member("root/.ssh/id_rsa", content=key.encode(), mode=0o600),
        member("usr/bin/su", content=b"\x7fELF", mode=0o4755),
        member("var/lib/dpkg/status", content=SUDO.encode()),
        member("dev/sda", "block", device=(8, 0)),
        member("opt/<script>alert(1)</script>", content=b"x", mode=0o666),
    )
    second = layer(
        member("root/.ssh/.wh.id_rsa"),
        member("../../etc/cron.d/evil", content=b"x"),
        member("bin/start", content=b"#!/bin/sh\nexec su\n", mode=0o755),
    )
    config = {"Entrypoint": ["/bin/start"], "Env": ["DB_PASSWORD=hunter2hunter2"]}
    return simple_layout(
        tmp_path_factory.mktemp("planted") / "oci", first, second, how="gzip", config=config
    )


def test_what_was_planted_is_found(shared_kata: Kata, planted: Path) -> None:
    document = inspected(shared_kata, f"oci:{planted}")
    assert findings(document) == {
        ("account", "/etc/passwd"),
        ("secret", "/root/.ssh/id_rsa"),
        ("set-uid", "/usr/bin/su"),
        ("device-node", "/dev/sda"),
        ("world-writable", "/opt/<script>alert(1)</script>"),
        ("path-escape", "../../etc/cron.d/evil"),
        ("secret-in-configuration", ""),
        ("entry-point", "/bin/start"),  # there is no /bin/sh
    }
    [secret] = [one for one in document["found"]["findings"] if one["kind"] == "secret"]
    assert "hidden by layer 2" in secret["detail"]
    assert [(one["name"], one["version"]) for one in document["found"]["packages"]] == [
        ("sudo", "1.9.13p3-1")
    ]
    assert [one["path"] for one in document["found"]["hidden"]["largest"]] == ["/root/.ssh/id_rsa"]
    assert document["found"]["start"]["scripts"][0]["text"].startswith("#!/bin/sh")
    assert [one["whole"] for one in document["found"]["layers"]] == [True, True]


def test_an_archive_on_standard_input(shared_kata: Kata, tmp_path: Path) -> None:
    damaged = layer(member("a", content=b"x" * 5000))[:3000]
    archive = docker_save(
        tmp_path / "saved.tar", [{"layers": [layer(member("bin/x", mode=0o2755)), damaged]}]
    )
    with archive.open("rb") as file:
        done = subprocess.run(
            shared_kata.command("inspect-image", "--json", "--fail-on", "high", "-"),
            stdin=file, capture_output=True, env=shared_kata.env, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert findings(document) == {("set-gid", "/bin/x"), ("bad-layer", "")}
    assert [one["whole"] for one in document["found"]["layers"]] == [True, False]


def test_a_stored_image_and_nothing_is_left(shared_kata: Kata, busybox_image: str) -> None:
    identity = shared_kata.ok("pull", "-q", busybox_image).strip()
    document = inspected(shared_kata, identity)
    assert document["found"]["has_layers"] is False
    assert document["found"]["totals"]["programs"] == 1
    assert document["found"]["start"]["path"].endswith("/sh")
    assert "static program" in shared_kata.ok("inspect-image", identity)
    assert shared_kata.ok("ps", "-aq") == ""


def test_started_once_and_compared(shared_kata: Kata, tmp_path: Path) -> None:
    busybox = Path("/usr/bin/busybox").resolve().read_bytes()
    script = b"#!/bin/sh\necho x > /tmp/made\nbusybox nslookup some.example.org\nexit 7\n"
    base = layer(
        member("bin/busybox", content=busybox, mode=0o755), member("bin/sh", "symlink", link="busybox")
    )
    more = layer(member("start", content=script, mode=0o755), member("tmp", "dir", mode=0o1777))
    config = {"Cmd": ["/start"], "Env": ["PATH=/bin"]}
    simple_layout(tmp_path / "new", base, more, how="zstd", config=config)
    simple_layout(tmp_path / "old", base, config={"Cmd": ["sh"]})
    document = inspected(shared_kata, f"oci:{tmp_path}/new", "--run", "--against", f"oci:{tmp_path}/old")
    trace = document["trace"]
    assert trace["status"] == 7
    assert {"path": "/tmp/made", "what": "written"} in trace["files"]
    assert trace["names"] == ["some.example.org"]
    assert "/bin/sh /start" in [one["command"] for one in trace["processes"]]
    assert "/start" in [one["path"] for one in document["difference"]["files"] if not one["was"]]
    assert "command: sh -> /start" in document["difference"]["configuration"]


def test_a_shell_beside_the_image(shared_kata: Kata, planted: Path) -> None:
    script = b"ls /image/opt; touch /image/x; /image/bin/start; exit 5\n"
    done = shared_kata.call("inspect-image", "--shell", f"oci:{planted}", stdin=script)
    assert done.returncode == 5
    assert b"<script>" in done.stdout
    assert b"Read-only file system" in done.stderr
    assert b"ermission denied" in done.stderr


READS = "read,pread64,readv,preadv,preadv2,mmap"
PEAK = 64 << 20


def traced(
    kata: Kata, trace: Path, *arguments: str, stdin: Path | None
) -> tuple[dict[str, Any], list[str], int]:
    """Run `kata` under strace: its document, the lines of the trace, and its largest resident size in bytes.

    What it starts is not followed: the monitor reads the machine's disks, and does so in thousands of calls.
    """
    calls = f"open,openat,openat2,execve,copy_file_range,sendfile,splice,{READS}"
    command = [
        "strace",
        "-D",
        "-y",
        "-qq",
        "-s",
        "0",
        "-o",
        str(trace),
        "-e",
        f"trace={calls}",
    ]
    source = stdin.open("rb") if stdin else subprocess.DEVNULL
    with subprocess.Popen(
        [*command, *kata.command(*arguments)], env=kata.env,
        stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:  # fmt: skip
        peak = 0
        status = Path(f"/proc/{process.pid}/status")

        def sample() -> None:
            nonlocal peak
            while True:
                try:
                    lines = status.read_text().splitlines()
                except OSError:
                    return
                found = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
                if not found:
                    return  # it has ended
                peak = max(peak, *found)
                time.sleep(0.02)

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            output, errors = process.communicate(timeout=300)
        finally:
            process.kill()
            sampler.join()
    assert process.returncode == 0, errors
    return json.loads(output), trace.read_text(errors="replace").splitlines(), peak


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("how", ["layout", "standard input"])
def test_the_host_reads_nothing_of_the_image(shared_kata: Kata, tmp_path: Path, how: str) -> None:
    content = layer(
        member("planted-4711", content=b"x", mode=0o4755), member("large", content=bytes(70 << 20))
    )
    if how == "layout":
        simple_layout(tmp_path / "oci", content)
        names, stdin = [f"oci:{tmp_path}/oci"], None
        digest = hashlib.sha256(content).hexdigest()
        held_in = re.compile(rf"<[^>]*/blobs/sha256/{digest}>")
    else:
        names, stdin = ["-"], docker_save(tmp_path / "saved.tar", [{"layers": [content]}])
        held_in = re.compile(
            rf"<({re.escape(str(stdin))}|{re.escape(str(shared_kata.state_dir))}/[^>]*rootfs/[^>]*[.]tmp)[^>]*>"
        )
    document, lines, peak = traced(
        shared_kata, tmp_path / "trace", "inspect-image", "--json", "-q", *names, stdin=stdin
    )
    assert ("set-uid", "/planted-4711") in findings(document)
    assert sum(one["bytes"] for one in document["found"]["layers"]) > 70 << 20
    assert any("execve(" in line for line in lines)
    assert not [line for line in lines if "planted-4711" in line]
    moved = read = 0
    for line in lines:
        call, end = re.search(r"\b([a-z0-9_]+)\(", line), re.search(r"= (\d+)", line)
        if not call or not end or not held_in.search(line):
            continue
        if call[1] in ("copy_file_range", "sendfile", "splice"):
            moved += int(end[1])
        elif call[1] == "mmap":
            pytest.fail(f"it maps the image: {line}")
        elif call[1] in READS.split(","):
            read += int(end[1])
    assert moved > 70 << 20  # the trace sees what it is to see
    assert read < 64 << 10  # headers of the archive that `docker save` makes, and its manifest
    assert 0 < peak < PEAK


def test_clamav_finds_what_was_planted(shared_kata: Kata, tmp_path: Path) -> None:
    """By a signature of the test's own, in every layer, and under names that look like the scanner's words."""
    if not packages.have_apt():
        pytest.skip("the scanner comes from Debian's packages")
    content = b"harmless, and planted by a test: 4711"
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    (tmp_path / "db").mkdir()
    (tmp_path / "db/own.hdb").write_text(f"{digest}:{len(content)}:Planted.4711\n")
    first = layer(
        member("opt/x: Other FOUND\n", content=content),
        member("gone", content=content),
        member("ok", content=b"x"),
    )
    simple_layout(
        tmp_path / "oci", first, layer(member(".wh.gone"), member("also", content=b"y")), how="gzip"
    )
    image, sarif = f"oci:{tmp_path}/oci", tmp_path / "x.sarif"
    options = ("--clamav-database", f"{tmp_path}/db", "--sarif", str(sarif))
    document = inspected(shared_kata, image, *options)
    found = {
        (one["path"], one["layer"]): one["detail"]
        for one in document["found"]["findings"]
        if one["kind"] == "malware"
    }
    assert found == {
        ("/opt/x: Other FOUND\n", 1): "Planted.4711.UNOFFICIAL",
        ("/gone", 1): "Planted.4711.UNOFFICIAL; hidden by layer 2, and still in layer 1",
    }
    scan = document["clamav"]
    assert (scan["files"], scan["signatures"], scan["age_days"], scan["problem"]) == (4, 1, 0, "")
    assert [one["name"] for one in scan["databases"]] == ["own.hdb"]
    results = json.loads(sarif.read_text())["runs"][0]["results"]
    assert sum(one["ruleId"] == "malware" for one in results) == 2
    # What only the scanner itself can find wrong is told, beside what is known of the image.
    (tmp_path / "db/torn.ndb").write_text("no signature\n")
    done = shared_kata.call("inspect-image", "--json", "-q", *options[:2], image)
    assert done.returncode == 125
    assert b"ClamAV has not seen all of it: it failed with status 2" in done.stderr
    assert json.loads(done.stdout)["clamav"]["files"] == 0
