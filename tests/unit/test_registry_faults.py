"""Pulling from a registry that asks for tokens, redirects, cuts connections, lies and refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from image_support import sha256, simple_layout
from registry_support import BIG, HELLO, Fake, Handler, basic, certificate_of, content, login, set_up

from kata.errors import ImageError, KataError, RegistryError, ResourceExhaustedError
from kata.images import credentials, registry, store
from kata.images.resolve import resolve


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return set_up(tmp_path, monkeypatch)


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
    assert content(resolve(f"{fake.host}/app:1")) == {"hello"}
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
    assert content(resolve(f"{fake.host}/app:1")) == {"hello"}
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
        resolve(f"{fake.host}/app:1")
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
    assert content(resolve(f"{fake.host}/app:1")) == {"hello"}
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
        resolve(f"{fake.host}/app:1")


@pytest.mark.parametrize("what", ["head", "manifest", "layer", "token"])
def test_a_registry_that_sends_a_byte_now_and_then(
    fake: Fake, state: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Each read is in time; the pull is given up all the same, and what has arrived is kept."""
    if what == "head":
        monkeypatch.setattr(registry, "_ANSWER_S", 0.6)
    fake.add("1", BIG)
    parts = {"manifest": "/manifests/", "layer": sha256(BIG), "token": "/token"}

    def answer(handler: Handler) -> bool:
        if what == "token" and "/manifests/" in handler.path:
            handler.answer(401, WWW_Authenticate=f'Bearer realm="http://{fake.host}/token"')
            return True
        if what != "head" and parts[what] not in handler.path:
            return False
        if what != "head":
            # Only from here on: what came before may have been as slow as this machine is.
            monkeypatch.setattr(registry, "_WINDOW_S", 0.6)
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(BIG)))
            handler.end_headers()
            handler.wfile.write(b" " if what != "layer" else BIG[:5000])
        _trickle(handler, b"HTTP/1.1 200 OK\r\n" * 1000 if what == "head" else b" " * 1000)
        return True

    fake.hook = answer
    words = "did not answer in" if what == "head" else "too slow to wait for"
    with pytest.raises(RegistryError, match=words) as caught:
        resolve(f"{fake.host}/app:1")
    assert caught.value.hint
    assert (what == "layer") == any((state / "pulls").rglob("*/*"))


def _trickle(handler: Handler, data: bytes) -> None:
    """Send it byte by byte, until nobody takes it any more."""
    pause = threading.Event()
    with contextlib.suppress(OSError):
        for byte in data:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            pause.wait(0.05)
    handler.close_connection = True


def test_an_answer_by_tls_that_does_not_begin(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = certificate_of(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    fake.server.socket = context.wrap_socket(fake.server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    def answer(handler: Handler) -> bool:
        _trickle(handler, b"HTTP/1.1 200 OK\r\n" * 1000)
        return True

    one = registry.Registry(fake.host, "app")
    one._base = f"https://{fake.host}"
    fake.add("1")
    one.manifest("1")  # the connection is there, however slow this machine is
    fake.hook = answer
    monkeypatch.setattr(registry, "_ANSWER_S", 0.6)
    with contextlib.closing(one), pytest.raises(RegistryError, match="did not answer in"):
        one.manifest("1")


def test_no_connection_is_held_that_has_ended(fake: Fake) -> None:
    """A pull may take hundreds, when they break and it goes on."""
    fake.add("1", BIG)
    _cut(fake, sha256(BIG), len(BIG) // 40, 30)
    cut = fake.hook
    open_ones = []

    def answer(handler: Handler) -> bool:
        sockets = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                sockets += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        open_ones.append(sockets)
        return cut(handler)

    fake.hook = answer
    assert content(resolve(f"{fake.host}/app:1")) == {"big"}
    assert len(open_ones) > 30
    assert max(open_ones) < min(open_ones) + 15


def test_a_layer_of_a_byte_at_each_attempt(fake: Fake) -> None:
    fake.add("1", BIG)
    _cut(fake, sha256(BIG), 1, 1 << 30)
    with pytest.raises(RegistryError):
        resolve(f"{fake.host}/app:1")
    assert len(fake.requests) < 20


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "[::]",
        "x.localhost.",
        "2130706433",
    ],
)
def test_a_registry_elsewhere_cannot_send_us_to_our_own_services(host: str) -> None:
    far, near = registry.Registry("registry.example", "app"), registry.Registry("127.0.0.1:5000", "app")
    for scheme in ("http", "https"):
        url = f"{scheme}://{host}:5001/x"
        with pytest.raises(RegistryError, match="is this machine"):
            far._redirected("https://registry.example/v2/app/blobs/x", url)
        far._credentials = credentials.Credentials()
        with pytest.raises(RegistryError, match="is this machine"):
            far._token({"realm": url})
    assert (
        near._redirected("http://127.0.0.1:5000/x", "http://localhost:5001/y") == "http://localhost:5001/y"
    )
    assert not registry.leads_here("localhost.example")
    assert not registry.leads_here("192.0.2.1")


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
    assert content(resolve(f"{fake.host}/app:1")) == {"big"}
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
        resolve(f"{fake.host}/app:1")
    kept = [path.stat().st_size for path in (state / "pulls").rglob("*") if path.is_file()]
    assert max(kept) > 100_000
    fake.hook = lambda handler: False
    fake.requests.clear()
    assert content(resolve(f"{fake.host}/app:1")) == {"hello", "big"}
    ranges = [headers.get("range") for path, headers in fake.requests if path.endswith(sha256(BIG))]
    assert ranges == [f"bytes={max(kept)}-"]
    assert not (state / "pulls").exists()


def test_a_wrong_remainder_of_an_interrupted_pull_is_fetched_again(fake: Fake, state: Path) -> None:
    described = fake.add("1", BIG)
    place = state / "pulls" / described["digest"][7:]
    place.mkdir(parents=True)
    (place / sha256(BIG)[7:]).write_bytes(b"nonsense" * 1000)
    assert content(resolve(f"{fake.host}/app:1")) == {"big"}
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
        resolve(f"{fake.host}/app:1")
    assert store.list_images() == []
    assert not list((state / "rootfs").iterdir())


def test_wrong_documents(fake: Fake) -> None:
    described = fake.add()
    config = json.loads(fake.blobs["1"])["config"]["digest"]
    good = fake.blobs[config]
    fake.blobs[config] = good + b" "
    with pytest.raises(ImageError, match="does not have the digest"):
        resolve(f"{fake.host}/app:1")
    fake.blobs[config] = good
    fake.blobs[described["digest"]] += b" "
    with pytest.raises(ImageError, match="does not have the digest"):
        resolve(f"{fake.host}/app@{described['digest']}")
    fake.blobs["1"] = b" " * (9 << 20)
    with pytest.raises(ImageError, match="is larger than"):
        resolve(f"{fake.host}/app:1")
    fake.blobs["1"] = b"<html>a login page</html>"
    with pytest.raises(ImageError, match="is not JSON"):
        resolve(f"{fake.host}/app:1")


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
    assert content(resolve(f"{fake.host}/app:1")) == {"hello"}


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
        resolve(f"{fake.host}/app:1")
    assert caught.value.hint
    assert "because?[31m of that" in caught.value.message


def test_no_space_for_the_layers(fake: Fake, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = fake.add()
    content_ = json.loads(fake.blobs["1"])
    content_["layers"][0]["size"] = 1 << 55
    fake.blobs["1"] = json.dumps(content_).encode()
    with pytest.raises(ImageError, match="which is too much"):
        resolve(f"{fake.host}/app:1")
    monkeypatch.setenv("KATA_IMAGE_MAX_SIZE", str(1 << 60))
    with pytest.raises(ResourceExhaustedError, match="MiB free"):
        resolve(f"{fake.host}/app:1")
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
            resolve(f"{host}/app")
    assert caught.value.hint


def test_proxies(fake: Fake, other: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy is used for other hosts, never for loopback addresses."""
    fake.add()
    monkeypatch.setenv("HTTP_PROXY", f"http://{other.host}")
    monkeypatch.setenv("HTTPS_PROXY", f"http://{other.host}")
    assert content(resolve(f"{fake.host}/app:1")) == {"hello"}
    assert not other.requests
    with pytest.raises(RegistryError, match=r"proxy does not reach registry\.example"):
        resolve("registry.example/app:1")


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
    # A shell that starts a command in the background has it ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            resolve(f"{fake.host}/app:1")
    finally:
        signal.signal(signal.SIGINT, before)
    assert store.list_images() == []
    assert list((state / "pulls").iterdir())
    fake.hook = lambda handler: False
    assert content(resolve(f"{fake.host}/app:1")) == {"big"}


def test_a_pulled_image_and_a_layout_of_it_are_one(fake: Fake, tmp_path: Path) -> None:
    fake.add("1", HELLO, BIG)
    pulled = resolve(f"{fake.host}/app:1")
    layout = simple_layout(tmp_path / "l", HELLO, BIG)
    assert resolve(f"oci:{layout}").id == pulled.id
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
            resolve(f"{fake.host}/app:1")
