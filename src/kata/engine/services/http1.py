"""HTTP/1.1 as the management socket speaks it: small, strict, bounded.

What is served is what `curl --unix-socket`, Go's and Python's clients send: requests with or without a body of known
length or in chunks, one after the other on a connection. What is ambiguous is refused (RFC 9112, sections 3, 5 to 7).

Why not a library: `h11` takes 0.46 MB and 9 ms when it is imported, and the engine, which exists once for each sandbox,
may grow by less than 1 MB in all by being scraped; besides, it imports nothing but Python's own library. The readers of
heads and bodies here do no I/O of their own but for what the stream hands them.
"""

from __future__ import annotations

import asyncio
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

MAX_HEAD = 8 * 1024
"""Bytes that a request's line and headers may have together."""
MAX_HEADERS = 64
MAX_BODY = 1 << 20
"""Bytes that a request's body may have, as decoded; a packet filter's rules are the largest."""
MAX_CONNECTIONS = 16
"""Connections that are served at a time."""
MAX_REFUSALS = 64
"""Connections that are told at a time that there are too many; further ones are closed."""
CLIENT_S = 10.0
"""How long a client may take for a request's head, its body, and to read the answer, in seconds each. An idle
connection is kept as long."""
REFUSAL_S = 2.0
"""How long one that is too many may take for its request, in seconds."""
LINGER_S = 1.0
"""How long is read what a client sends after the last answer, in seconds."""
HANDLER_S = 30.0
"""How long an answer may take, in seconds."""

_CHUNK_LINE = 256
_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGITS = frozenset("0123456789")
TEXT = "text/plain; charset=utf-8"

REASONS = {
    101: "Switching Protocols",
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}


class HttpError(Exception):
    """A request that is answered with an error, in plain text.

    Args:
        status: The answer's status.
        text: A sentence, without a newline at its end.
        headers: Further headers of the answer.
    """

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers or {}

    def response(self) -> Response:
        """The answer."""
        return Response((self.text + "\n").encode("utf-8", "replace"), TEXT, self.status, self.headers)


class Request:
    """A request.

    Attributes:
        method: ``GET``, ``PUT``, ...
        path: The target's path, decoded.
        query: The target's parameters, decoded; of several with the same name, the first.
        version: 0 for HTTP/1.0, 1 for HTTP/1.1.
        headers: By their names in lower case; several of the same name joined by a comma.
        body: The body, decoded; set once it has arrived.
    """

    __slots__ = ("body", "headers", "method", "path", "query", "version")

    def __init__(
        self, method: str, path: str, query: dict[str, str], version: int, headers: dict[str, str]
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.version = version
        self.headers = headers
        self.body = b""

    def lists(self, header: str) -> set[str]:
        """The elements of a header that is a list, in lower case."""
        return {item.strip().lower() for item in self.headers.get(header, "").split(",")} - {""}

    @property
    def keeps_alive(self) -> bool:
        """Whether the client wants to use the connection again."""
        return self.version == 1 and "close" not in self.lists("connection")

    def accepts(self, coding: str) -> bool:
        """Whether the client takes an answer in this content coding (RFC 9110, 12.5.3)."""
        for item in self.lists("accept-encoding"):
            name, _, parameter = item.partition(";")
            if name.strip() == coding:
                _, _, weight = parameter.partition("=")
                return not weight or weight.strip().strip("0.") != ""
        return False


class Response:
    """An answer.

    Args:
        body: Its content.
        content_type: What that is.
        status: The status.
        headers: Further headers.
        takes_over: Of status 101: has the connection from the answer on, and returns when it is to be closed.
    """

    __slots__ = ("body", "content_type", "headers", "status", "takes_over")

    def __init__(
        self,
        body: bytes,
        content_type: str = TEXT,
        status: int = 200,
        headers: dict[str, str] | None = None,
        takes_over: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] | None = None,
    ) -> None:
        self.body = body
        self.content_type = content_type
        self.status = status
        self.headers = headers or {}
        self.takes_over = takes_over

    def encode(self, *, head_only: bool, keep_alive: bool) -> bytes:
        """As it is sent.

        Args:
            head_only: It answers a HEAD request.
            keep_alive: The connection stays.
        """
        if self.takes_over is not None:  # such an answer has no content (RFC 9110, 15.2)
            lines = [f"HTTP/1.1 {self.status} {REASONS[self.status]}"]
            lines += [f"{name}: {value}" for name, value in self.headers.items()]
            return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        lines = [
            f"HTTP/1.1 {self.status} {REASONS.get(self.status, 'Unknown')}",
            f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "X-Content-Type-Options: nosniff",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        if not keep_alive:
            lines.append("Connection: close")
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        return head if head_only else head + self.body


# ---- requests ----


def parse_head(data: bytes) -> Request:
    """Read a request's line and headers.

    Args:
        data: Up to and with the empty line.

    Raises:
        HttpError: It is not a request of HTTP/1.0 or 1.1, or an ambiguous one.
    """
    lines = data[:-4].split(b"\r\n")
    if any(byte in line for line in lines for byte in (b"\r", b"\n", b"\0")):
        raise HttpError(400, "lines end with CR LF, and hold neither of them")
    method, target, version = _request_line(lines[0])
    headers = _headers(lines[1:])
    if version == 1 and "host" not in headers:
        raise HttpError(400, "a request of HTTP/1.1 has a Host header")
    path, query = parse_target(target)
    return Request(method, path, query, version, headers)


def _request_line(line: bytes) -> tuple[str, str, int]:
    words = line.split(b" ")
    if len(words) != 3 or not words[0] or not _TOKEN.issuperset(words[0]):
        raise HttpError(400, "the request does not begin with 'METHOD TARGET HTTP/1.1'")
    method, target, version = (word.decode("latin-1") for word in words)
    if not (version.startswith("HTTP/") and len(version) == 8 and version[6] == "."):
        raise HttpError(400, "the request does not begin with 'METHOD TARGET HTTP/1.1'")
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise HttpError(505, "HTTP/1.1 is spoken here")
    return method, target, int(version[7])


def _headers(lines: list[bytes]) -> dict[str, str]:
    if len(lines) > MAX_HEADERS:
        raise HttpError(431, f"at most {MAX_HEADERS} headers are read")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or not _TOKEN.issuperset(name):
            raise HttpError(400, "a header is not 'Name: value'")
        key, text = name.decode("ascii").lower(), value.decode("latin-1").strip(" \t")
        if key not in headers:
            headers[key] = text
        elif key in ("host", "content-length", "transfer-encoding"):
            raise HttpError(400, f"there is more than one {key} header")
        else:
            headers[key] += f", {text}"
    return headers


def parse_target(target: str) -> tuple[str, dict[str, str]]:
    """Decode a request's target: its path and its parameters.

    Raises:
        HttpError: It is malformed.
    """
    if target.lower().startswith("http://"):  # the absolute form, which servers have to take
        target = "/" + target[7:].partition("/")[2]
    if not target.startswith("/") or "#" in target or not target.isascii() or not target.isprintable():
        raise HttpError(400, "the request's target is not a path")
    path, _, query = target.partition("?")
    parameters: dict[str, str] = {}
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name:
            parameters.setdefault(_decode(name.replace("+", " ")), _decode(value.replace("+", " ")))
    return _decode(path), parameters


def _decode(text: str) -> str:
    """Undo percent-encoding."""
    first, *others = text.split("%")
    data = bytearray(first.encode("ascii"))
    for part in others:
        if len(part) < 2 or not _HEX.issuperset(part[:2]):
            raise HttpError(400, "the request's target has a '%' that no two digits follow")
        data.append(int(part[:2], 16))
        data += part[2:].encode("ascii")
    if 0 in data:
        raise HttpError(400, "the request's target has a NUL")
    return data.decode("utf-8", "surrogateescape")


async def read_body(request: Request, reader: asyncio.StreamReader, go_on: Callable[[], None]) -> bytes:
    """Read what follows a request's head.

    Args:
        request: The request.
        reader: Where it comes from.
        go_on: Is called before the first byte is read if the client waits for that (``Expect: 100-continue``).

    Returns:
        The body, decoded.

    Raises:
        HttpError: It is too large, or its length is not clear.
        IncompleteReadError: The client has hung up.
    """
    coding, length = request.headers.get("transfer-encoding"), request.headers.get("content-length")
    if coding is not None and (length is not None or request.version == 0):
        raise HttpError(400, "a body has either a length or chunks, and chunks with HTTP/1.1 only")
    if coding is not None and coding.lower() != "chunked":
        raise HttpError(501, "no transfer coding but 'chunked' is known here")
    if length is not None and (not length or len(length) > 12 or not _DIGITS.issuperset(length)):
        raise HttpError(400, "the content-length is not a number")
    if int(length or 0) > MAX_BODY:
        raise HttpError(413, f"a body may have {MAX_BODY} bytes")
    expected = request.headers.get("expect", "").lower()
    if expected not in ("", "100-continue"):
        raise HttpError(417, "nothing but '100-continue' can be expected")
    if coding is None and not int(length or 0):
        return b""
    if expected and request.version == 1:
        go_on()
    if coding is None:
        return await reader.readexactly(int(length or 0))
    return await _read_chunks(reader)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        size = (await _read_line(reader)).partition(b";")[0].rstrip(b" \t").decode("latin-1")
        if not size or len(size) > 8 or not _HEX.issuperset(size):
            raise HttpError(400, "a chunk does not begin with its size")
        count = int(size, 16)
        if len(body) + count > MAX_BODY:
            raise HttpError(413, f"a body may have {MAX_BODY} bytes")
        if not count:
            break
        body += await reader.readexactly(count)
        if await reader.readexactly(2) != b"\r\n":
            raise HttpError(400, "a chunk is longer than its size")
    for _ in range(MAX_HEADERS):  # trailers, which mean nothing here
        if not await _read_line(reader):
            return bytes(body)
    raise HttpError(431, "there are too many trailers")


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        line = await reader.readuntil(b"\r\n")
    except asyncio.LimitOverrunError:
        line = b" " * (_CHUNK_LINE + 3)
    if len(line) > _CHUNK_LINE + 2:
        raise HttpError(400, "a line of a chunked body is too long")
    return line[:-2]


# ---- connections ----


class HttpServer:
    """Answers requests on connections that it is handed.

    Args:
        handle: Answers one request; may raise `HttpError`.
        log: Is given a sentence when `handle` raises anything else, which is a bug.
        on_idle: Is called when the last connection has ended.
    """

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[Response]],
        log: Callable[[str], None],
        on_idle: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._log = log
        self._on_idle = on_idle
        self._served: set[asyncio.Task[None]] = set()
        self._refused: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._served) + len(self._refused)

    def take(self, sock: socket.socket) -> None:
        """Serve a connection, which is the server's from now on."""
        busy = len(self._served) >= MAX_CONNECTIONS
        group = self._refused if busy else self._served
        if busy and len(group) >= MAX_REFUSALS:
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._connection(sock, busy=busy))
        group.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._served.discard(task)
        self._refused.discard(task)
        if not self.connections:
            self._on_idle()

    async def close(self) -> None:
        """End all connections."""
        tasks = self._served | self._refused
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _connection(self, sock: socket.socket, *, busy: bool) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(MAX_HEAD, loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        sock.setblocking(False)
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
        except BaseException:
            sock.close()
            raise
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        transport.set_write_buffer_limits(0)  # `drain` returns when the kernel has it all
        try:
            while await self._exchange(reader, writer, busy=busy):
                pass
            # Who is still sending would not read the answer if the connection just broke.
            writer.write_eof()
            async with asyncio.timeout(LINGER_S):
                while await reader.read(MAX_HEAD):
                    pass
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # it has gone, or is too slow
        except Exception as error:
            self._log(f"the management socket: {error!r}")
        finally:
            transport.abort()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, busy: bool
    ) -> bool:
        """Read a request and answer it. Returns whether another may follow."""
        keep, head_only = False, False
        try:
            request = await self._read(reader, writer, REFUSAL_S if busy else CLIENT_S)
            if request is None:
                return False
            head_only = request.method == "HEAD"
            if busy:
                raise HttpError(
                    503, f"{MAX_CONNECTIONS} connections are served at a time", {"Retry-After": "1"}
                )
        except HttpError as error:  # where the next request would begin may not be clear
            response = error.response()
        else:
            response, keep = await self._answer(request), request.keeps_alive
        writer.write(response.encode(head_only=head_only, keep_alive=keep))
        async with asyncio.timeout(CLIENT_S):
            await writer.drain()
        if response.takes_over is not None:
            await response.takes_over(reader, writer)
            return False
        return keep

    async def _read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience_s: float
    ) -> Request | None:
        """The next request; None when the client is done."""
        head = b""
        try:
            async with asyncio.timeout(patience_s):
                head = await reader.read(1)
                if not head:
                    return None
                head += await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            raise HttpError(400, "the request is not complete") from None
        except asyncio.LimitOverrunError:
            start = await reader.read(MAX_HEAD)
            if b"\n" in start:
                raise HttpError(431, f"a request's head may have {MAX_HEAD} bytes") from None
            raise HttpError(414, f"a request's line may have {MAX_HEAD} bytes") from None
        except TimeoutError:
            if not head:
                return None  # an idle connection is no mistake
            raise HttpError(408, f"the request did not arrive within {patience_s:g} s") from None
        request = parse_head(head)
        try:
            async with asyncio.timeout(CLIENT_S):
                request.body = await read_body(
                    request, reader, lambda: writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                )
        except TimeoutError:
            raise HttpError(408, f"the body did not arrive within {CLIENT_S:g} s") from None
        except asyncio.IncompleteReadError:
            raise HttpError(400, "the body is not complete") from None
        return request

    async def _answer(self, request: Request) -> Response:
        try:
            async with asyncio.timeout(HANDLER_S):
                return await self._handle(request)
        except HttpError as error:
            return error.response()
        except TimeoutError:
            return HttpError(504, f"there was no answer within {HANDLER_S:g} s").response()
        except Exception as error:
            self._log(f"the management socket: {request.method} {request.path!a}: {error!r}")
            return HttpError(500, "the engine failed to answer; its log says why").response()
