"""HTTP requests and answers of the management socket, by plain bytes."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from managed_engine import Managed, create_with_volume, head, make_fixture, managed_fixture  # noqa: F401 - fixtures

from kata.engine.services import http1
from kata.engine.services.http1 import HttpError, Request, Response, parse_head


def refusal(data: bytes) -> int:
    with pytest.raises(HttpError) as caught:
        parse_head(data)
    return caught.value.status


def test_a_head_is_read() -> None:
    request = parse_head(
        head(
            "GET /a%20b?x=1&y=%2Fz+z&x=2&n HTTP/1.1",
            "Host: h",
            "Accept-Encoding: br, gzip;q=0.5",
            "A: 1",
            "a:2",
        )
    )
    assert (request.method, request.path, request.version) == ("GET", "/a b", 1)
    assert request.query == {"x": "1", "y": "/z z", "n": ""}
    assert request.headers["a"] == "1, 2"
    assert request.accepts("gzip")
    assert request.keeps_alive
    old = parse_head(head("GET http://h/metrics?q HTTP/1.0", "Accept-Encoding: gzip;q=0"))
    assert (old.path, old.keeps_alive, old.accepts("gzip")) == ("/metrics", False, False)
    assert not parse_head(head("GET / HTTP/1.1", "Host:", "Connection: Keep-Alive, Close")).keeps_alive


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["GET /", "Host: h"], 400),
        (["GET  / HTTP/1.1", "Host: h"], 400),
        (["G(T / HTTP/1.1", "Host: h"], 400),
        (["GET / HTTP/1.1"], 400),
        (["GET / HTTP/2.0", "Host: h"], 505),
        (["GET / HTTP/1.10", "Host: h"], 400),
        (["GET relative HTTP/1.1", "Host: h"], 400),
        (["GET /# HTTP/1.1", "Host: h"], 400),
        (["GET /%0 HTTP/1.1", "Host: h"], 400),
        (["GET /%00 HTTP/1.1", "Host: h"], 400),
        (["GET /\xe4 HTTP/1.1", "Host: h"], 400),
        (["GET / HTTP/1.1", "Host: h", "Host: h"], 400),
        (["GET / HTTP/1.1", "Host: h", "Content-Length: 1", "Content-Length: 1"], 400),
        (["GET / HTTP/1.1", "Host: h", " folded"], 400),
        (["GET / HTTP/1.1", "Host: h", "A : b"], 400),
        (["GET / HTTP/1.1", "Host: h", "A: b\nc: d"], 400),
        (["GET / HTTP/1.1", "Host: h", *(f"A{n}: b" for n in range(64))], 431),
    ],
)
def test_what_is_not_a_request_is_refused(lines: list[str], status: int) -> None:
    assert refusal(head(*lines)) == status


PIECES = (
    *(
        b"GET",
        b"PUT",
        b" ",
        b"/",
        b"?",
        b"&",
        b"=",
        b"%",
        b"%41",
        b"+",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"\r\n",
        b"\n",
    ),
    *(
        b"Host: h",
        b"Content-Length: ",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b":",
        b"5",
        b"\0",
    ),
    *(
        b"Accept-Encoding: gzip;q=",
        b"http://",
        b"\xff",
        b"Connection: close",
        b"4\r\nbody\r\n",
        b"0\r\n\r\n",
    ),
)


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=25))
def test_whatever_is_sent_is_a_request_or_refused(pieces: list[bytes]) -> None:
    """And nothing else: no other exception, no endless loop, no more than there is."""

    async def read(request: Request, data: bytes) -> None:
        reader = asyncio.StreamReader(http1.MAX_HEAD)
        reader.feed_data(data)
        reader.feed_eof()
        request.body = await http1.read_body(request, reader, lambda: None)
        assert len(request.body) <= len(data)

    whole = b"".join(pieces)
    head_, _, rest = whole.partition(b"\r\n\r\n")
    with contextlib.suppress(HttpError, asyncio.IncompleteReadError):
        request = parse_head(head_ + b"\r\n\r\n")
        assert request.path.startswith("/")
        request.accepts("gzip")
        asyncio.run(read(request, rest))


def body_of(headers: dict[str, str], data: bytes, version: int = 1) -> bytes:
    async def read() -> bytes:
        reader = asyncio.StreamReader(http1.MAX_HEAD)
        reader.feed_data(data)
        reader.feed_eof()
        return await http1.read_body(Request("PUT", "/", {}, version, headers), reader, lambda: None)

    return asyncio.run(read())


def test_bodies_are_read() -> None:
    assert body_of({}, b"next") == b""
    assert body_of({"content-length": "4"}, b"bodynext") == b"body"
    chunks = b"4;x=y\r\nbody\r\n00A \r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nnext"
    assert body_of({"transfer-encoding": "Chunked"}, chunks) == b"body0123456789"


@pytest.mark.parametrize(
    ("headers", "data", "status"),
    [
        ({"content-length": "-1"}, b"", 400),
        ({"content-length": "0x4"}, b"", 400),
        ({"content-length": "4", "transfer-encoding": "chunked"}, b"", 400),
        ({"transfer-encoding": "gzip, chunked"}, b"", 501),
        ({"content-length": str(http1.MAX_BODY + 1)}, b"", 413),
        ({"transfer-encoding": "chunked"}, b"-4\r\nbody\r\n", 400),
        ({"transfer-encoding": "chunked"}, b"2\r\nbody\r\n", 400),
        ({"transfer-encoding": "chunked"}, b"0" * 300 + b"\r\n", 400),
        ({"transfer-encoding": "chunked"}, b"0" * 20000 + b"\r\n", 400),
        ({"transfer-encoding": "chunked"}, b"100001\r\n", 413),
        ({"transfer-encoding": "chunked"}, b"0\r\n" + b"A: b\r\n" * 65, 431),
        ({"content-length": "1", "expect": "a miracle"}, b"", 417),
    ],
)
def test_bodies_that_are_not_clear_are_refused(headers: dict[str, str], data: bytes, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        body_of(headers, data)
    assert caught.value.status == status


def test_answers_name_their_length() -> None:
    text = Response(b"abc", http1.TEXT).encode(head_only=True, keep_alive=False)
    assert text.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nContent-Length: 3\r\n" in text
    assert text.endswith(b"Connection: close\r\n\r\n")
