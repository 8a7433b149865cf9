"""The client of the management socket, and the commands that use it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from managed_engine import Managed, create_with_volume, head, make_fixture, managed_fixture  # noqa: F401 - fixtures

from kata import management as client
from kata.cli.main import main as kata
from kata.engine.launch import listen
from kata.engine.services import management
from kata.errors import HostError, NotFoundError, UnsupportedError
from kata.journal import Journal
from kata.oci_runtime import commands
from kata.oci_runtime import main as oci_runtime
from kata.proto import agent_pb, csi_pb


@pytest.fixture
def known(make: Callable[..., Managed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Managed:
    """An engine that commands find."""
    managed = make(client={"ends_with_init": False})
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "sandboxes").symlink_to("r")
    (Path(managed.engine.run_dir) / "sandbox.json").write_text('{"id": "c1"}')
    return managed


def test_the_client(known: Managed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, headers, body = client.get(known.path, "/metrics")
    assert (status, headers["content-type"]) == (200, management.METRICS_TEXT)
    assert int(headers["content-length"]) == len(body)
    with pytest.raises(NotFoundError, match="there is no '/x' here"):
        client.content(known.path, "GET", "/x")
    with pytest.raises(UnsupportedError) as caught:
        client.content(known.path, "GET", "/agent-url")
    assert caught.value.hint == "kata-agent-ctl --sandbox c1"
    with pytest.raises(NotFoundError, match="no engine is running"):
        client.get(str(tmp_path / "none"), "/metrics")
    monkeypatch.setattr(client, "MAX_ANSWER", 100)
    with pytest.raises(HostError, match="longer than 100 bytes"):
        client.get(known.path, "/metrics")


def test_the_client_does_not_wait_for_ever(tmp_path: Path) -> None:
    path = str(tmp_path / ("d" * 100) / "sock")
    os.mkdir(os.path.dirname(path))
    with socket.socket(fileno=listen(path, Journal.create_dir(str(tmp_path), "j", {}))) as listener:
        with pytest.raises(HostError, match=r"did not answer /metrics within 0\.3 s") as late:
            client.get(path, "/metrics", 0.3)
        assert f"{os.path.dirname(path)}/engine.log" in late.value.hint

        def trickle() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    peer.sendall(b"x")
                    time.sleep(0.05)

        listener.accept()[0].close()
        thread = threading.Thread(target=trickle)
        thread.start()
        began = time.monotonic()
        with pytest.raises(HostError, match="did not answer"):
            client.get(path, "/metrics", 0.5)
        assert time.monotonic() - began < 3
        thread.join()
    with pytest.raises(HostError, match="cannot reach"):
        client.get(path, "/metrics", 0.5)


def test_kata_metrics(known: Managed, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["c1"], ["c"], []):
        assert kata(["metrics", *arguments]) == 0
        assert "kata_shim_threads " in capsys.readouterr().out
    assert kata(["metrics", "nobody"]) == 125
    assert "hint: kata ps" in capsys.readouterr().err
    (Path(known.engine.run_dir) / "sandbox.json").unlink()
    assert kata(["metrics"]) == 125
    assert "no sandbox is running" in capsys.readouterr().err


def test_kata_runtime(known: Managed, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    engine, double = known.engine, known.engine.double

    async def get(request: Any, context: Any) -> agent_pb.GetIPTablesResponse:
        return agent_pb.GetIPTablesResponse(data=b"*nat\x1b[2J\n" if request.is_ipv6 else b"*filter\n")

    async def put(request: Any, context: Any) -> agent_pb.SetIPTablesResponse:
        double.requests["SetIPTables"] = request
        return agent_pb.SetIPTablesResponse()

    async def stats(request: Any, context: Any) -> csi_pb.VolumeStatsResponse:
        return csi_pb.VolumeStatsResponse(usage=[csi_pb.VolumeUsage(total=9)])

    double.GetIPTables, double.SetIPTables, double.GetVolumeStats = get, put, stats  # type: ignore[attr-defined]
    create_with_volume(engine)

    def run(*argv: str) -> tuple[int, str]:
        status = oci_runtime.main(argv)
        output = capsys.readouterr()
        return status, output.out + output.err

    assert run("metrics", "c1")[1].startswith("# HELP ")
    assert run("iptables", "get", "--sandbox-id", "c1") == (0, "*filter\n")
    assert run("iptables", "get", "--sandbox-id", "c1", "--v6") == (0, "*nat\\x1b[2J\n")
    (tmp_path / "rules").write_bytes(b"*filter\nCOMMIT\n")
    assert run("iptables", "set", "--sandbox-id", "c1", str(tmp_path / "rules")) == (0, "")
    assert double.requests["SetIPTables"].data == b"*filter\nCOMMIT\n"
    assert '"total": 9' in run("direct-volume", "stats", "--volume-path", "/dev/null")[1]
    for argv, words in (
        (("direct-volume", "stats", "--volume-path", "/none"), "no running sandbox has the volume"),
        (("direct-volume", "stats", "--volume-path", "/dev/null", "--size", "1"), "for 'resize' only"),
        (("direct-volume", "resize", "--volume-path", "/dev/null"), "for 'resize' only"),
        (("direct-volume", "add"), "mountInfo.json are not known"),
        (("iptables", "get"), "--sandbox-id ID"),
        (("iptables", "set", "--sandbox-id", "c1"), "get, or set FILE"),
        (("iptables", "set", "--sandbox-id", "c1", "/none"), "No such file or directory: /none"),
        (("metrics", "x"), "no running sandbox"),
        (("metrics", ""), "the name of a sandbox is empty"),
        (("create", "c1"), "a bundle is a directory"),
        (("exec", "c1"), "no debug console of sandbox 'c1'"),
        (("exec", "c1", "true"), "does not exist"),
        (("checkpoint", "c1"), "stop the container and start it again"),
        (("mertics",), "unknown command"),
        (("metrics", "--loud"), "kata-runtime metrics: unknown option"),
    ):
        status, output = run(*argv)
        assert (status, words in output, "hint: " in output or "/none" in output) == (
            255 if argv[0] == "exec" else 1,  # a command in the container may end with 1 itself
            True,
            True,
        ), (argv, output)
    assert run("version")[0] == 0
    assert run("--help")[0] == 0
    assert commands.complete([], "me") == [("metrics", commands.COMMANDS["metrics"].summary)]
    assert [word for word, _ in commands.complete(["iptables"], "--")] == [
        "--sandbox-id",
        "--v6",
        "--help",
    ]
    assert [word for word, _ in commands.complete(["direct-volume"], "")] == ["stats", "resize"]
