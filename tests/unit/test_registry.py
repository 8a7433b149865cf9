"""Pulling: from Debian's docker-registry on loopback, and from a registry of our own that misbehaves."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from image_support import (
    INDEX,
    MANIFEST,
    Blobs,
    Erofs,
    image,
    layer,
    member,
    sha256,
    simple_layout,
)

from kata.errors import ImageError, KataError, RegistryError, ResourceExhaustedError
from kata.images import platform, registry, store

HELLO = layer(member("hello", content=b"hello\n"))
BIG = layer(member("big", content=os.urandom(3 << 20)))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory and a home without credentials; waiting between attempts takes no time."""
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(platform, "host", lambda: platform.Platform("linux", "amd64"))
    monkeypatch.setattr(registry.time, "sleep", lambda seconds: None)
    return tmp_path / "state" / "images"


def content(made: store.Image) -> set[str]:
    return set(Erofs(Path(made.rootfs_path)).tree()) - {""}


def login(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "docker").mkdir(exist_ok=True)
    (tmp_path / "docker" / "config.json").write_text(json.dumps(config))


def basic(user: str, secret: str) -> str:
    return base64.b64encode(f"{user}:{secret}".encode()).decode()


# ---- Debian's docker-registry ----


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
        program = shutil.which("docker-registry")
        if not program:
            pytest.skip("needs docker-registry (apt-get install docker-registry)")
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


@pytest.fixture(scope="module")
def docker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    running = DockerRegistry(tmp_path_factory.mktemp("registry"))
    yield running
    running.stop()


@pytest.mark.parametrize("how", ["plain", "gzip", "zstd"])
def test_pull(docker_registry: DockerRegistry, state: Path, how: str) -> None:
    blobs = Blobs()
    docker_registry.push(
        "team/app", how, blobs, image(blobs, [HELLO, BIG], how=how, config={"Cmd": [how]}), []
    )
    told: list[tuple[str, int, int]] = []
    name = f"{docker_registry.host}/team/app:{how}"
    made = store.resolve(name, progress=lambda *step: told.append(step))
    assert content(made) == {"hello", "big"}
    assert (made.names, made.config) == ([name], {"Cmd": [how]})
    pulled = [step for step in told if step[0] == "pull"]
    assert max(done for _, done, _ in pulled) == pulled[0][2]
    assert not (state / "pulls").exists()
    assert not [path for path in state.rglob("*") if path.suffix in (".tmp", ".lock")]


def test_pull_by_platform_and_digest(docker_registry: DockerRegistry) -> None:
    blobs = Blobs()
    inner = [
        image(
            blobs, [HELLO], arch=arch, config={"Cmd": [arch]}, platform={"os": "linux", "architecture": arch}
        )
        for arch in ("arm64", "amd64")
    ]
    index = blobs.put_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": inner}, INDEX)
    docker_registry.push("multi", "latest", blobs, index, inner)
    name = f"{docker_registry.host}/multi"
    made = store.resolve(name)
    assert made.config == {"Cmd": ["amd64"]}
    assert store.resolve(f"{name}@{index['digest']}", pull="never").id == made.id
    assert store.find(f"{name}@{inner[1]['digest']}").id == made.id
    by_digest = store.resolve(f"{name}@{inner[1]['digest']}", pull="always")
    assert by_digest.id == made.id
    other = store.resolve(name, platform="linux/arm64")
    assert other.platform == "linux/arm64"
    assert store.resolve(name).platform == "linux/amd64"
    with pytest.raises(ImageError, match="not offered for linux/riscv64"):
        store.resolve(name, platform="riscv64")


def test_pull_policies(docker_registry: DockerRegistry) -> None:
    blobs = Blobs()
    docker_registry.push("moving", "1", blobs, image(blobs, [HELLO], config={"Cmd": ["old"]}), [])
    name = f"{docker_registry.host}/moving:1"
    old = store.resolve(name)
    docker_registry.push("moving", "1", blobs, image(blobs, [HELLO], config={"Cmd": ["new"]}), [])
    assert store.resolve(name).id == old.id
    assert store.resolve(name, pull="never").id == old.id
    told: list[Any] = []
    new = store.resolve(name, pull="always", progress=lambda *step: told.append(step))
    assert new.config == {"Cmd": ["new"]}
    assert not told  # the layers are there already
    assert store.find(old.id).names == []


def test_missing_names(docker_registry: DockerRegistry) -> None:
    with pytest.raises(RegistryError, match=rf"no image {docker_registry.host}/team/gone:latest") as caught:
        store.resolve(f"{docker_registry.host}/team/gone")
    assert caught.value.hint
    with pytest.raises(RegistryError, match=r"no image .*@sha256:0"):
        store.resolve(f"{docker_registry.host}/team/gone@sha256:{'0' * 64}")


# The password is "secret".
HTPASSWD = "user:$2b$04$4iIvxADJtJ10IFIzuRWYPeCtzchRKje71aUof5.cE30pJuK31h6j.\n"


@pytest.fixture(scope="module")
def private_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    directory = tmp_path_factory.mktemp("private")
    open_one = DockerRegistry(directory)
    blobs = Blobs()
    open_one.push("team/app", "1", blobs, image(blobs, [HELLO]), [])
    open_one.stop()
    (directory / "htpasswd").write_text(HTPASSWD)
    running = DockerRegistry(
        directory, {"auth": {"htpasswd": {"realm": "r", "path": str(directory / "htpasswd")}}}
    )
    yield running
    running.stop()


def test_credentials_of_docker_login(private_registry: DockerRegistry, tmp_path: Path) -> None:
    name = f"{private_registry.host}/team/app:1"
    with pytest.raises(RegistryError, match="is not public") as caught:
        store.resolve(name)
    assert f"docker login {private_registry.host}" in caught.value.hint
    login(tmp_path, {"auths": {private_registry.host: {"auth": basic("user", "wrong")}}})
    with pytest.raises(RegistryError, match="does not let this account"):
        store.resolve(name)
    login(tmp_path, {"auths": {f"http://{private_registry.host}/v2/": {"auth": basic("user", "secret")}}})
    assert content(store.resolve(name)) == {"hello"}


def _helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "bin" / "docker-credential-test"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
def test_credential_helpers(
    private_registry: DockerRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    name = f"{private_registry.host}/team/app:1"
    login(tmp_path, {key: {private_registry.host: "test"} if key == "credHelpers" else "test"})
    with pytest.raises(RegistryError, match="docker-credential-test is not installed"):
        store.resolve(name)
    _helper(tmp_path, monkeypatch, "echo 'vault sealed' >&2; exit 3")
    with pytest.raises(RegistryError, match="failed: vault sealed"):
        store.resolve(name)
    _helper(tmp_path, monkeypatch, "echo 'credentials not found in native keychain'; exit 1")
    with pytest.raises(RegistryError, match="is not public"):
        store.resolve(name)
    _helper(tmp_path, monkeypatch, "echo nonsense")
    with pytest.raises(RegistryError, match="no proper answer"):
        store.resolve(name)
    answer = '{"ServerURL":"x","Username":"user","Secret":"secret"}'
    _helper(tmp_path, monkeypatch, f"""[ "$1 $(cat)" = "get {private_registry.host}" ] && echo '{answer}'""")
    assert content(store.resolve(name)) == {"hello"}


@pytest.mark.parametrize("text", ["{", "[]", '{"auths":{"HOST":{"auth":"%%%"}}}'])
def test_a_broken_docker_configuration_is_told(
    private_registry: DockerRegistry, tmp_path: Path, text: str
) -> None:
    login(tmp_path, {})
    (tmp_path / "docker" / "config.json").write_text(text.replace("HOST", private_registry.host))
    with pytest.raises(RegistryError, match=r"is not public, and .*(cannot be used|not base64)"):
        store.resolve(f"{private_registry.host}/team/app:1")


def test_tls_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl, for a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate),
        "-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    plain = DockerRegistry(tmp_path / "r")
    blobs = Blobs()
    plain.push("app", "1", blobs, image(blobs, [HELLO]), [])
    plain.stop()
    running = DockerRegistry(tmp_path / "r", tls=(certificate, key))
    try:
        with pytest.raises(RegistryError, match="is not trusted") as caught:
            store.resolve(f"{running.host}/app:1")
        assert "certs.d" in caught.value.hint
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert content(store.resolve(f"{running.host}/app:1")) == {"hello"}
    finally:
        running.stop()


# ---- a registry that misbehaves ----


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


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.stop()


@pytest.fixture
def other() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.stop()


def test_anonymous_tokens(fake: Fake, other: Fake) -> None:
    """The token server is another one; what it asks for is passed on, and its token is used for all requests."""
    fake.add()

    def registry_asks(handler: Handler) -> bool:
        if handler.headers.get("Authorization") == "Bearer t0ken":
            return False
        challenge = (
            f'Bearer realm="http://{other.host}/token?a=b",service="the service",scope="repository:app:pull"'
        )
        handler.answer(401, b"{}", WWW_Authenticate=challenge)
        return True

    def token_server(handler: Handler) -> bool:
        handler.answer(200, b'{"token":"t0ken","expires_in":300}')
        return True

    fake.hook, other.hook = registry_asks, token_server
    assert content(store.resolve(f"{fake.host}/app:1")) == {"hello"}
    [(path, _)] = other.requests
    assert urllib.parse.parse_qs(path.partition("?")[2]) == {
        "a": ["b"], "scope": ["repository:app:pull"], "service": ["the service"],
    }  # fmt: skip
    assert "authorization" not in other.requests[0][1]
    assert len([1 for _, headers in fake.requests if "authorization" not in headers]) == 1


@pytest.mark.parametrize("kind", ["basic", "identity"])
def test_tokens_for_credentials(fake: Fake, tmp_path: Path, kind: str) -> None:
    fake.add()
    entry = (
        {"auth": basic("user", "pass:word")}
        if kind == "basic"
        else {"auth": basic("x", ""), "identitytoken": "id"}
    )
    login(tmp_path, {"auths": {fake.host: entry}})
    seen: list[Any] = []

    def answer(handler: Handler) -> bool:
        if handler.path.startswith("/token"):
            seen.append((handler.command, handler.headers.get("Authorization"), handler.body))
            handler.answer(200, b'{"access_token":"t"}')
            return True
        if handler.headers.get("Authorization") == "Bearer t":
            return False
        handler.answer(401, WWW_Authenticate=f'Bearer realm="http://{fake.host}/token",service=s')
        return True

    fake.hook = answer
    assert content(store.resolve(f"{fake.host}/app:1")) == {"hello"}
    if kind == "basic":
        assert seen == [("GET", f"Basic {basic('user', 'pass:word')}", b"")]
    else:
        assert seen[0][0] == "POST"
        assert b"grant_type=refresh_token" in seen[0][2]
        assert b"refresh_token=id" in seen[0][2]


@pytest.mark.parametrize(
    ("challenge", "words"),
    [
        ('Bearer realm="http://auth.example/token"', "not https"),
        ('Bearer realm="nonsense"', "not https"),
        ("Negotiate", "is not public"),
        ("", "is not public"),
        ('Bearer realm="http://HOST/token"', "no proper token"),
        ('Bearer realm="http://HOST/denied"', "is not public: go away"),
        ('Bearer realm="http://HOST/html"', "not JSON"),
    ],
)
def test_bad_challenges(fake: Fake, challenge: str, words: str) -> None:
    def answer(handler: Handler) -> bool:
        if handler.path.startswith("/token"):
            handler.answer(200, b'{"token":"a\\nb"}')
        elif handler.path.startswith("/denied"):
            handler.answer(403, b'{"errors":[{"message":"go away"}]}')
        elif handler.path.startswith("/html"):
            handler.answer(200, b"<html>")
        else:
            handler.answer(401, WWW_Authenticate=challenge.replace("HOST", fake.host))
        return True

    fake.hook = answer
    with pytest.raises(ImageError, match=words) as caught:
        store.resolve(f"{fake.host}/app:1")
    assert caught.value.hint


def test_redirected_blobs_do_not_carry_the_authorisation(fake: Fake, other: Fake, tmp_path: Path) -> None:
    fake.add()
    other.blobs = dict(fake.blobs)
    login(tmp_path, {"auths": {fake.host: {"username": "u", "password": "p"}}})

    def answer(handler: Handler) -> bool:
        if "Authorization" not in handler.headers:
            handler.answer(401, WWW_Authenticate="Basic realm=x")
            return True
        if "/blobs/" in handler.path:
            handler.answer(307, Location=f"http://{other.host}/storage/{handler.path.rpartition('/')[2]}")
            return True
        return False

    fake.hook = answer
    assert content(store.resolve(f"{fake.host}/app:1")) == {"hello"}
    assert len(other.requests) == 2
    assert not any("authorization" in headers for _, headers in other.requests)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://storage.example/x", "which is not https"),
        ("/v2/app/blobs/x", "in a circle"),
        ("file:///x", "not https"),
    ],
)
def test_bad_redirects(fake: Fake, location: str, words: str) -> None:
    fake.add()

    def answer(handler: Handler) -> bool:
        if "/blobs/" in handler.path:
            handler.answer(302, Location=location)
            return True
        return False

    fake.hook = answer
    with pytest.raises(RegistryError, match=words):
        store.resolve(f"{fake.host}/app:1")


def _cut(fake: Fake, digest: str, after: int, times: int) -> None:
    """Let the connection break within a blob."""
    left = [times]

    def answer(handler: Handler) -> bool:
        if not handler.path.endswith(digest) or not left[0]:
            return False
        left[0] -= 1
        data = fake.blobs[digest]
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        handler.send_response(206 if wanted else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.wfile.write(data[start : start + after])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        return True

    fake.hook = answer


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_broke(fake: Fake, ranges: bool) -> None:
    fake.add("1", BIG)
    fake.ranges = ranges
    _cut(fake, sha256(BIG), 1 << 20, 1)
    assert content(store.resolve(f"{fake.host}/app:1")) == {"big"}
    asked = [headers.get("range") for path, headers in fake.requests if path.endswith(sha256(BIG))]
    assert len(asked) == 2
    assert asked[0] is None
    assert asked[1] is not None
    assert re.fullmatch(r"bytes=\d+-", asked[1])


def test_an_interrupted_pull_goes_on_the_next_time(fake: Fake, state: Path) -> None:
    fake.add("1", HELLO, BIG)
    served = [0]

    def answer(handler: Handler) -> bool:
        if not handler.path.endswith(sha256(BIG)):
            return False
        served[0] += 1
        if served[0] == 1:
            data = fake.blobs[sha256(BIG)]
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: 1 << 20])
            handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        return True

    fake.hook = answer
    with pytest.raises(RegistryError, match="cannot be reached"):
        store.resolve(f"{fake.host}/app:1")
    kept = [path.stat().st_size for path in (state / "pulls").rglob("*") if path.is_file()]
    assert max(kept) > 100_000
    fake.hook = lambda handler: False
    fake.requests.clear()
    assert content(store.resolve(f"{fake.host}/app:1")) == {"hello", "big"}
    ranges = [headers.get("range") for path, headers in fake.requests if path.endswith(sha256(BIG))]
    assert ranges == [f"bytes={max(kept)}-"]
    assert not (state / "pulls").exists()


def test_a_wrong_remainder_of_an_interrupted_pull_is_fetched_again(fake: Fake, state: Path) -> None:
    described = fake.add("1", BIG)
    place = state / "pulls" / described["digest"][7:]
    place.mkdir(parents=True)
    (place / sha256(BIG)[7:]).write_bytes(b"nonsense" * 1000)
    assert content(store.resolve(f"{fake.host}/app:1")) == {"big"}
    (place.parent).mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[:-1] + b"!", "arrived with another content"),
        (lambda data: data + b"more", "is longer than its manifest says"),
    ],
)
def test_wrong_layers(fake: Fake, state: Path, spoil: Callable[[bytes], bytes], words: str) -> None:
    fake.add("1", BIG)
    fake.blobs[sha256(BIG)] = spoil(BIG)
    with pytest.raises(ImageError, match=words):
        store.resolve(f"{fake.host}/app:1")
    assert store.list_images() == []
    assert not list((state / "rootfs").iterdir())


def test_wrong_documents(fake: Fake) -> None:
    described = fake.add()
    config = json.loads(fake.blobs["1"])["config"]["digest"]
    good = fake.blobs[config]
    fake.blobs[config] = good + b" "
    with pytest.raises(ImageError, match="does not have the digest"):
        store.resolve(f"{fake.host}/app:1")
    fake.blobs[config] = good
    fake.blobs[described["digest"]] += b" "
    with pytest.raises(ImageError, match="does not have the digest"):
        store.resolve(f"{fake.host}/app@{described['digest']}")
    fake.blobs["1"] = b" " * (9 << 20)
    with pytest.raises(ImageError, match="is larger than"):
        store.resolve(f"{fake.host}/app:1")
    fake.blobs["1"] = b"<html>a login page</html>"
    with pytest.raises(ImageError, match="is not JSON"):
        store.resolve(f"{fake.host}/app:1")


def test_passing_failures_are_tried_again(fake: Fake) -> None:
    fake.add()
    seen: dict[str, int] = {}

    def answer(handler: Handler) -> bool:
        seen[handler.path] = seen.get(handler.path, 0) + 1
        if seen[handler.path] > 2:
            return False
        handler.answer((503, 429)[seen[handler.path] - 1], Retry_After="1")
        return True

    fake.hook = answer
    assert content(store.resolve(f"{fake.host}/app:1")) == {"hello"}


@pytest.mark.parametrize(
    ("status", "words"),
    [(500, "answered 500"), (429, "too many requests"), (418, "answered 418"), (403, "not public")],
)
def test_lasting_failures(fake: Fake, status: int, words: str) -> None:
    def answer(handler: Handler) -> bool:
        handler.answer(status, b'{"errors":[{"code":"X","message":"because\\u001b[31m of that"}]}')
        return True

    fake.hook = answer
    with pytest.raises(RegistryError, match=words) as caught:
        store.resolve(f"{fake.host}/app:1")
    assert caught.value.hint
    assert "because?[31m of that" in caught.value.message


def test_no_space_for_the_layers(fake: Fake, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = fake.add()
    content_ = json.loads(fake.blobs["1"])
    content_["layers"][0]["size"] = 1 << 55
    fake.blobs["1"] = json.dumps(content_).encode()
    with pytest.raises(ImageError, match="which is too much"):
        store.resolve(f"{fake.host}/app:1")
    monkeypatch.setenv("KATA_IMAGE_MAX_SIZE", str(1 << 60))
    with pytest.raises(ResourceExhaustedError, match="MiB free"):
        store.resolve(f"{fake.host}/app:1")
    assert described
    assert not (state / "pulls").exists()


# ---- reaching it ----


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1", True), ("127.9.8.7:1", True), ("[::1]:5000", True),
        ("localhost.example", False), ("127.0.0.1.example:5000", False), ("10.0.0.1:5000", False), ("[fe80::1]", False),
        ("docker.io", False), ("2130706433", False),
    ],
)  # fmt: skip
def test_plain_http_is_for_loopback_only(host: str, local: bool) -> None:
    assert registry.is_loopback(host) is local
    connection = registry.Registry(host, "x")
    assert connection._base.startswith("http://" if local else "https://")
    connection.close()


def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(RegistryError, match=r"cannot be reached: .*refused") as caught:
            store.resolve(f"{host}/app")
    assert caught.value.hint


def test_proxies(fake: Fake, other: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy is used for other hosts, never for loopback addresses."""
    fake.add()
    monkeypatch.setenv("HTTP_PROXY", f"http://{other.host}")
    monkeypatch.setenv("HTTPS_PROXY", f"http://{other.host}")
    assert content(store.resolve(f"{fake.host}/app:1")) == {"hello"}
    assert not other.requests
    with pytest.raises(RegistryError, match=r"proxy does not reach registry\.example"):
        store.resolve("registry.example/app:1")


def test_ctrl_c_stops_and_keeps_what_has_arrived(fake: Fake, state: Path) -> None:
    fake.add("1", BIG)
    waiting = threading.Event()

    def answer(handler: Handler) -> bool:
        if not handler.path.endswith(sha256(BIG)):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BIG)))
        handler.end_headers()
        handler.wfile.write(BIG[: 1 << 20])
        handler.wfile.flush()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # it waits for the layer
        waiting.wait(10)
        return True

    fake.hook = answer
    threading.Timer(1.5, waiting.set).start()
    with pytest.raises(KeyboardInterrupt):
        store.resolve(f"{fake.host}/app:1")
    assert store.list_images() == []
    assert list((state / "pulls").iterdir())
    fake.hook = lambda handler: False
    assert content(store.resolve(f"{fake.host}/app:1")) == {"big"}


def test_a_pulled_image_and_a_layout_of_it_are_one(fake: Fake, tmp_path: Path) -> None:
    fake.add("1", HELLO, BIG)
    pulled = store.resolve(f"{fake.host}/app:1")
    layout = simple_layout(tmp_path / "l", HELLO, BIG)
    assert store.resolve(f"oci:{layout}").id == pulled.id
    assert len(store.find(pulled.id).names) == 2


def test_errors_are_all_ours(fake: Fake) -> None:
    """Whatever bytes a registry sends as a manifest: an error of ours, no traceback."""
    for data in (
        b"",
        b"null",
        b"{}",
        b'{"manifests":5}',
        b'{"schemaVersion":2,"layers":[]}',
        b'{"layers":{}}',
        b"\xff",
    ):
        fake.blobs["1"] = data
        with pytest.raises(KataError):
            store.resolve(f"{fake.host}/app:1")
