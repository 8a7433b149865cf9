"""What the registry tests share: Debian's docker-registry, and a registry that answers as a test decides."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_support import MANIFEST, MOUNT_POINTS, Blobs, Erofs, image, layer, member

from kata.images import platform, store

HELLO = layer(member("hello", content=b"hello\n"))
BIG = layer(member("big", content=os.urandom(3 << 20)))


def set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory and a home without credentials; waiting between attempts takes no time.

    Returns:
        The image store's directory.
    """
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(platform, "host", lambda: platform.Platform("linux", "amd64"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return tmp_path / "state" / "images"


def content(made: store.Image) -> set[str]:
    return set(Erofs(Path(made.rootfs_path)).tree()) - {"", *MOUNT_POINTS}


def login(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "docker").mkdir(exist_ok=True)
    (tmp_path / "docker" / "config.json").write_text(json.dumps(config))


def basic(user: str, secret: str) -> str:
    return base64.b64encode(f"{user}:{secret}".encode()).decode()


def certificate_of(directory: Path) -> tuple[Path, Path]:
    """Make a key and a certificate for 127.0.0.1, and skip the test where nothing can."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl, for a certificate (apt-get install openssl)")
    key, certificate = directory / "key.pem", directory / "cert.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate),
        "-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return key, certificate


class DockerRegistry:
    """A running docker-registry.

    Args:
        directory: For its configuration and data.
        more: Further parts of its configuration (JSON is YAML).
        tls: Certificate and key.
    """

    def __init__(
        self, directory: Path, more: dict[str, Any] | None = None, tls: tuple[Path, Path] | None = None
    ) -> None:
        unpacked = (
            Path(__file__).resolve().parents[2] / "build" / "programs" / "usr" / "bin"
        )  # by tools/setup
        program = shutil.which("docker-registry", path=f"{unpacked}:{os.environ['PATH']}")
        if not program:
            pytest.skip("needs docker-registry (tools/setup test unpacks it)")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.host = f"127.0.0.1:{port}"
        self._port = port
        self._tls = tls
        http_part: dict[str, Any] = {"addr": self.host}
        if tls:
            http_part["tls"] = {"certificate": str(tls[0]), "key": str(tls[1])}
        config = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
            "http": http_part,
            **(more or {}),
        }
        directory.mkdir(exist_ok=True)
        (directory / "config.yml").write_text(json.dumps(config))
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [program, "serve", str(directory / "config.yml")], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError((directory / "log").read_text()[-2000:]) from None
                threading.Event().wait(0.05)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def _call(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/octet-stream"
    ) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request(method, path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        said = answer.read()
        connection.close()
        assert answer.status < 300, (answer.status, said)
        return answer.headers.get("Location", "")

    def push(
        self, name: str, tag: str, blobs: Blobs, top: dict[str, Any], inner: list[dict[str, Any]]
    ) -> None:
        """Push all blobs, the manifests `inner`, and `top` under a tag."""
        documents = {each["digest"] for each in [top, *inner]}
        for digest, data in blobs.items():
            if digest not in documents:
                where = re.sub(r"^http://[^/]*", "", self._call("POST", f"/v2/{name}/blobs/uploads/"))
                self._call("PUT", f"{where}&digest={digest}", data)
        for each in inner:
            self._call(
                "PUT", f"/v2/{name}/manifests/{each['digest']}", blobs[each["digest"]], each["mediaType"]
            )
        self._call("PUT", f"/v2/{name}/manifests/{tag}", blobs[top["digest"]], top["mediaType"])


class Fake:
    """A server whose answers a test decides.

    Attributes:
        blobs: What it holds, by digest; tags are further keys.
        requests: (path, headers) of every request.
        hook: Called before the usual answer; returns True when it has answered itself.
    """

    def __init__(self) -> None:
        fake = self
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.hook: Callable[[Handler], bool] = lambda handler: False
        self.ranges = True

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            body = b""

            def do_GET(self) -> None:
                fake.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                if not fake.hook(self):  # type: ignore[arg-type]
                    fake.usual(self)  # type: ignore[arg-type]

            def do_POST(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.do_GET()

            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def usual(self, handler: Handler) -> None:
        name = handler.path.rpartition("/")[2]
        data = self.blobs.get(name)
        if data is None:
            handler.answer(404, b'{"errors":[{"message":"unknown"}]}')
            return
        kind = MANIFEST if "/manifests/" in handler.path else "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if wanted and self.ranges:
            start = int(wanted[1])
            extent = f"bytes {start}-{len(data) - 1}/{len(data)}"
            handler.answer(206, data[start:], Content_Type=kind, Content_Range=extent)
        else:
            handler.answer(200, data, Content_Type=kind)

    def add(self, tag: str = "1", *layers: bytes, **more: Any) -> dict[str, Any]:
        """Take in an image; returns its manifest's descriptor."""
        blobs = Blobs()
        described = image(blobs, layers or [HELLO], **more)
        self.blobs |= blobs
        self.blobs[tag] = blobs[described["digest"]]
        return described

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    """For the annotations: what `Fake` makes has these."""

    body: bytes

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None: ...
