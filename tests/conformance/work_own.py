"""Cases of people's real work: the command of our own, beside Docker's with runc."""

from __future__ import annotations

import io
import subprocess
import tarfile

from waiting import PATIENCE, until
from work_box import Box, free_port


def env_file(box: Box) -> str:
    """`run --env-file` of a file from a Windows editor, with odd separators in its values"""
    file = box.fresh() / "env"
    file.write_bytes(b"\xef\xbb\xbfFIRST=1\nSECOND=two\xe2\x80\xa8words\nTHIRD=a\x0cb\n")
    said = box.person(
        "run", "--rm", "--env-file", str(file), "IMAGE", "sh", "-c", "env | grep -E 'FIRST|SECOND|THIRD'"
    )
    return ascii(" ".join(sorted(said.rpartition("; ")[0].split("\n"))))


def volume_words(box: Box) -> str:
    """`run -v` with words of Docker's and Podman's: cached, delegated, consistent, z"""
    seen = []
    for word in ("cached", "delegated", "consistent", "z", "ro,Z"):
        place = box.fresh()
        seen.append(box.person("run", "--rm", "-v", f"{place}:/v:{word}", "IMAGE", "true").split()[-1])
    return " ".join(seen)


def archive_into(box: Box) -> str:
    """`cp - NAME:DIR` of an archive with a hard link and a fifo"""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        first = tarfile.TarInfo("a")
        first.size = 4
        tar.addfile(first, io.BytesIO(b"data"))
        for name, kind in (("b", tarfile.LNKTYPE), ("f", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a"
            tar.addfile(entry)
    with box.person_running("sleep", "1000") as name:
        copied = box.person("cp", "-", f"{name}:/tmp", stdin=out.getvalue()).split()[-1]
        look = "stat -c %h /tmp/a /tmp/b; test -p /tmp/f && echo fifo"
        return f"status {copied}: {box.person('exec', name, 'sh', '-c', look)}"


def closed_output(box: Box) -> str:
    """`run` with standard output or input closed (>&-, <&-)"""
    seen = []
    for closed in (">&-", "<&-", ">&- <&- 2>&-"):
        seen.append(
            box.shell(f"{box.words('run', '--rm', '-i', 'IMAGE', 'sh', '-c', 'echo x; exit 3')} {closed}")
        )
    return " ".join(seen)


def reader_gone(box: Box) -> str:
    """`run --rm ... yes | head -1` ends"""
    said = box.shell(f"{box.words('run', '--rm', '--name', 'endless', 'IMAGE', 'yes')} | head -n 1")
    try:
        until(
            lambda: "endless" not in box.person("ps", "--no-trunc"), "it has ended", patience_s=PATIENCE / 4
        )
    except AssertionError:
        said += ", goes on for ever"
    finally:
        box.person("rm", "-f", "endless")
    return said


def speaks_first(box: Box) -> str:
    """a server behind `run -p` that speaks before its client does (SSH, SMTP, MySQL)"""
    serve = ("sh", "-c", "while :; do nc -l -p 25 -e echo hello; done")
    port = free_port()
    with box.person_running(*serve, options=("-p", f"127.0.0.1:{port}:25")):
        talk = (
            "import socket,time\nfor n in range(60):\n"
            f" try:\n  s=socket.create_connection(('127.0.0.1',{port}),5); s.settimeout(5)\n"
            "  print(s.recv(9).decode().strip())\n"
            " except OSError: time.sleep(.5); continue\n"
            " break\n"
        )
        around = box.around()
        done = subprocess.run(
            [*around, "/usr/bin/python3", "-c", talk], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or "nothing"
