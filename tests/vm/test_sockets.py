"""Unix sockets of the host as volumes of containerd's containers."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import Kata
from containerd_support import IMAGE, RUNTIME, Containerd, clean_fixture, daemon_fixture  # noqa: F401 - fixtures
from socket_support import Service, answer, client
from waiting import PATIENCE, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def _mounts(source: Path, programs: Path, *options: str) -> tuple[str, ...]:
    flags = ":".join(("rbind", *options))
    return (
        *("--mount", f"type=bind,src={source},dst=/run/x.sock,options={flags}"),
        *("--mount", f"type=bind,src={programs},dst=/programs,options=rbind:ro"),
    )


def _exec(daemon: Containerd, *command: str, question: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    words = [daemon.ctr_program, "--address", str(daemon.socket), "task", "exec", "--exec-id", "x", "one"]
    return subprocess.run(
        [*words, *command],
        env=daemon.env,
        input=question,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_container_talks_to_a_service_of_its_host(daemon: Containerd, tmp_path: Path) -> None:
    programs = client(tmp_path).parent
    path, ask = tmp_path / "x.sock", ("/programs/unix-client", "/run/x.sock")
    question = os.urandom(1 << 20) * 3
    with Service(path, 0o600):
        # A socket on a read-only mount takes connections, as anywhere on Linux.
        made = daemon.ctr(
            *("run", "-d", "--runtime", RUNTIME, *_mounts(path, programs, "ro")),
            IMAGE,
            "one",
            "sleep",
            "1000",
        )
        assert made.returncode == 0, made.stderr.decode() + daemon.diagnosis()
        done = _exec(daemon, *ask, question=question)
        assert done.stdout == answer(question), done.stderr.decode() + daemon.diagnosis()
        # Its mode and owner are those on the host.
        assert _exec(daemon, "ls", "-ln", "/run/x.sock").stdout.split()[:4] == [
            b"srw-------",
            b"1",
            b"0",
            b"0",
        ]
        other = _exec(daemon, "su", "-s", "/bin/sh", "nobody", "-c", " ".join(ask))
        assert (other.returncode, other.stdout) != (0, answer(b"")), other
    done = _exec(daemon, *ask, question=b"anybody?")
    assert (done.stdout, done.returncode) in ((b"", 0), (b"Broken pipe\n", 2), (b"", 3)), done
    with Service(path):
        assert _exec(daemon, *ask, question=b"again").stdout == answer(b"again")


def test_its_end_ends_its_connections(daemon: Containerd, tmp_path: Path) -> None:
    programs = client(tmp_path).parent
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE)
        script = "sleep 1000 | /programs/unix-client /run/x.sock"
        made = daemon.ctr(
            *("run", "-d", "--runtime", RUNTIME, *_mounts(path, programs)), IMAGE, "one", "sh", "-c", script
        )
        assert made.returncode == 0, made.stderr.decode() + daemon.diagnosis()
        connection, _ = listener.accept()
        connection.settimeout(PATIENCE)
        daemon.ok("task", "kill", "-s", "KILL", "one")
        with connection:
            assert connection.recv(1) == b""
        until(lambda: daemon.tasks()["one"][1] == "STOPPED", "the task has ended", daemon.diagnosis)


def test_a_persons_container_has_one_as_well(kata_env: Kata, busybox_image: str, tmp_path: Path) -> None:
    programs = client(tmp_path).parent
    with Service(tmp_path / "x.sock") as service:
        volumes = ("-v", f"{service.path}:/run/x.sock:ro", "-v", f"{programs}:/programs:ro")
        done = kata_env.call(
            "run", "--rm", *volumes, busybox_image, "/programs/unix-client", "/run/x.sock", stdin=b""
        )
        assert done.stdout == answer(b""), done.stderr.decode()
