"""A client for registries: manifests and blobs, authorisation, redirects, retries.

Plain HTTP is used only for loopback addresses. An Authorization header is sent only to the host that it is meant for.
All data from a registry is bounded, and its messages are escaped before they are printed.

Sources: OCI distribution specification 1.1; Docker registry token authentication ("Token Authentication
Specification", "OAuth2 token"); RFC 9110 (ranges, retries), RFC 7235 (challenges).
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
import weakref
from typing import Any
from urllib.parse import urljoin

import httpx

from kata import __version__
from kata.errors import ImageError, RegistryError
from kata.images import credentials, manifest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kata.images.manifest import Descriptor

_TIMEOUT = httpx.Timeout(30.0, connect=15.0)
_ANSWER_S = 60.0
"""Timeout, in seconds, for connecting and receiving the head of the response."""
_WINDOW_S = 60.0
_LEAST_RATE = 1024
"""Minimum rate of a body in each window, in bytes per second: otherwise single bytes could hold up a pull for ever."""
_LEAST_UPLOAD_RATE = 16 << 10
"""Bytes per second that are expected of an upload, beside `_ANSWER_S` for the answer."""
_LEAST_PROGRESS = 16 << 10
"""Bytes of a layer that an attempt has to fetch in order not to count as a failure."""
_WORDS_S = 5.0
"""Timeout, in seconds, for reading a registry's error message."""
_ATTEMPTS = 5
_REDIRECTS = 5
_LONGEST_WAIT_S = 30.0
_STEP = 256 << 10
_LARGEST_TOKEN = 1 << 20
_ACCEPT = ", ".join((*manifest.MANIFEST_TYPES, *manifest.INDEX_TYPES))
_CA_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_CHALLENGE = re.compile(r'([A-Za-z_]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


def is_loopback(host: str) -> bool:
    """Whether a host (with or without port) is a literal name or address of this machine's loopback."""
    name = host
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        name = host.partition(":")[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def leads_here(host: str) -> bool:
    """Whether a host (without port) may be this machine, in any notation; names are not resolved."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))  # 127.1, 0x7f000001
        except (OSError, ValueError):
            return False
    mapped = getattr(address, "ipv4_mapped", None)
    return any(each.is_loopback or each.is_unspecified for each in (address, mapped) if each is not None)


class _Pace:
    """Checks that data arrives fast enough. Call `add` as soon as any arrives, without httpx's buffering to a size."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._since = time.monotonic()
        self._bytes = 0

    def add(self, size: int) -> None:
        """Count received bytes.

        Raises:
            RegistryError: Too few have arrived during a whole window.
        """
        self._bytes += size
        passed = time.monotonic() - self._since
        if passed < _WINDOW_S:
            return
        if self._bytes < passed * _LEAST_RATE:
            raise RegistryError(
                f"{self._host} sent {self._bytes} bytes in {passed:.0f} s, which is too slow to wait for",
                "check the network, and pull again: the part that has arrived is kept",
            )
        self._since += passed
        self._bytes = 0


class Registry:
    """A connection to one repository of a registry; may be used by several threads.

    Args:
        host: Host of the registry, as in a reference.
        repository: Path of the repository in the registry; "" if only `check_login` is called.
        account: The credentials; by default those that are stored.
    """

    def __init__(self, host: str, repository: str, account: credentials.Credentials | None = None) -> None:
        self.host = host
        self.repository = repository
        self._local = is_loopback(host)
        self._base = f"http://{host}" if self._local else f"https://{host}"
        if host == "docker.io":
            self._base = "https://registry-1.docker.io"
        self._authorization = ""
        self._credentials = account
        self.closed = False
        self._writes = False
        self._slow = False
        self._connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        # No proxy for loopback addresses, which it cannot reach; Go's tools do the same.
        self._http = httpx.Client(
            timeout=_TIMEOUT, trust_env=not self._local, verify=_tls(host), follow_redirects=False,
            headers={"User-Agent": f"kata/{__version__}", "Accept-Encoding": "identity"},
        )  # fmt: skip

    def close(self) -> None:
        """Close all connections; calls in progress fail."""
        self.closed = True
        self._http.close()

    # ---- what is there ----

    def manifest(self, reference: str) -> tuple[str, bytes, str]:
        """Fetch a manifest or index.

        Args:
            reference: Tag or digest.

        Returns:
            Digest, content (verified if requested by digest), media type.

        Raises:
            RegistryError: It cannot be fetched.
            ImageError: It does not have its digest.
        """
        data, headers = self._document(f"manifests/{reference}", {"Accept": _ACCEPT})
        digest = manifest.digest_of(data)
        if ":" in reference:
            manifest.verify(data, reference, f"the manifest of {self.host}/{self.repository}")
            digest = reference
        return digest, data, headers.get("content-type", "").partition(";")[0].strip()

    def blob(self, what: Descriptor) -> bytes:
        """Fetch a configuration.

        Raises:
            RegistryError: It cannot be fetched.
            ImageError: It does not have its digest.
        """
        data, _ = self._document(f"blobs/{what.digest}", {})
        manifest.verify(data, what.digest, f"the blob {what.digest} of {self.host}/{self.repository}")
        return data

    def _document(self, path: str, headers: dict[str, str]) -> tuple[bytes, httpx.Headers]:
        data = bytearray()

        def collect(response: httpx.Response) -> httpx.Headers:
            data.clear()
            pace = _Pace(self.host)
            for piece in response.iter_raw():
                data.extend(piece)
                pace.add(len(piece))
                if len(data) > manifest.MAX_DOCUMENT:
                    raise ImageError(
                        f"{self.host}/{self.repository}: {path} is larger than {manifest.MAX_DOCUMENT} bytes",
                        "the image is malformed",
                    )
            return response.headers

        answer = self._retry(path, lambda: self._get(path, headers, collect))
        return bytes(data), answer

    def download(self, what: Descriptor, path: str, tick: Callable[[int], None]) -> None:
        """Fetch a layer into a file and verify it. A part that the file holds already is not fetched again.

        Args:
            what: The layer.
            path: The file. On an error it keeps the part that has arrived, unless the content is wrong.
            tick: Called with the number of bytes that were added, or (negative) discarded.

        Raises:
            RegistryError: It cannot be fetched.
            ImageError: It does not have its digest.
            OSError: The file cannot be written.
        """
        with open(path, "ab+", buffering=0) as file:
            state = _Download(what, file, tick)

            def attempt() -> None:
                while state.at < what.size:
                    before = state.at
                    headers = {"Range": f"bytes={before}-"} if before else {}
                    self._get(
                        f"blobs/{what.digest}", headers, lambda response: self._receive(response, state)
                    )
                    if state.at <= before:
                        raise httpx.RemoteProtocolError("the answer was empty")

            resumed = state.at > 0
            self._retry(f"blobs/{what.digest}", attempt, lambda: state.at)
            if (
                not state.right() and resumed
            ):  # the part fetched earlier may be wrong: fetch the whole layer once more
                state.restart()
                self._retry(f"blobs/{what.digest}", attempt, lambda: state.at)
            if not state.right():
                state.restart()
                raise ImageError(
                    f"{self.host}/{self.repository}: the layer {what.digest} arrived with another content",
                    "the registry or a proxy in between is at fault; try again later",
                )

    # ---- what is put there ----

    def has_blob(self, digest: str) -> bool:
        """Whether the repository has a layer or a configuration already.

        Raises:
            RegistryError: That cannot be asked.
        """
        self._writes = True  # nobody else asks
        path = f"blobs/{digest}"

        def attempt() -> bool:
            try:
                self._exchange("HEAD", self._url(path), {}, lambda _: None)
            except _Failed as error:
                # Some registries have no word for "not there" but "not allowed", until there is something.
                if error.status == 404:
                    return False
                raise
            return True

        return bool(self._retry(path, attempt))

    def upload(self, digest: str, size: int, content: Callable[[], Iterable[bytes]]) -> None:
        """Send a layer or a configuration, in one piece.

        Args:
            digest: Its ``sha256:...``.
            size: Bytes of it.
            content: Returns them, for each attempt anew.

        Raises:
            RegistryError: It cannot be sent.
        """
        self._writes = True
        octets = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}

        def attempt() -> None:
            place = self._exchange("POST", self._url("blobs/uploads/"), {"Content-Length": "0"}, _location)
            target = httpx.URL(self._redirected(self._url("blobs/uploads/"), place))
            self._exchange(
                "PUT",
                str(target.copy_merge_params({"digest": digest})),
                octets,
                lambda _: None,
                content,
                _ANSWER_S + size / _LEAST_UPLOAD_RATE,
            )

        self._retry(f"blobs/{digest}", attempt)

    def put_manifest(self, reference: str, media_type: str, data: bytes) -> str:
        """Give an image its name. All blobs that the manifest names are there.

        Args:
            reference: The tag.
            media_type: What kind of manifest it is.
            data: Its content.

        Returns:
            Its digest.

        Raises:
            RegistryError: The registry does not take it.
        """
        self._writes = True
        headers = {"Content-Type": media_type, "Content-Length": str(len(data))}
        path = f"manifests/{reference}"
        self._retry(
            path,
            lambda: self._exchange("PUT", self._url(path), headers, lambda _: None, lambda: [data]),
        )
        return manifest.digest_of(data)

    def check_login(self) -> None:
        """Ask the registry whether it lets this account in.

        Raises:
            RegistryError: It does not, or cannot be asked.
        """
        self._retry("", lambda: self._exchange("GET", f"{self._base}/v2/", {}, lambda _: None))

    def _receive(self, response: httpx.Response, state: _Download) -> None:
        if state.at and response.status_code != 206:
            state.restart()
        pace = _Pace(self.host)
        for piece in response.iter_raw():
            if self.closed:
                raise RegistryError("the pull was stopped", "pull again")
            state.add(piece)
            pace.add(len(piece))

    # ---- requests ----

    def _get(self, path: str, headers: dict[str, str], receive: Callable[[httpx.Response], Any]) -> Any:
        """Fetch something, with authorisation and redirects. An error response raises `_Failed`."""
        return self._exchange("GET", self._url(path), headers, receive)

    def _url(self, path: str) -> str:
        return f"{self._base}/v2/{self.repository}/{path}"

    def _exchange(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        receive: Callable[[httpx.Response], Any],
        content: Callable[[], Iterable[bytes]] | None = None,
        patience_s: float | None = None,
    ) -> Any:
        """Make a request, with authorisation and redirects. An error response raises `_Failed`.

        Args:
            method: GET, HEAD, POST or PUT.
            url: Where to.
            headers: Beside those of the authorisation.
            receive: Called with the response, whose body has not been read yet; its result is returned.
            content: Returns what is sent, once for each attempt; ``Content-Length`` is among the headers then.
            patience_s: How long to wait, at most, for the head of a response; by default `_ANSWER_S`.
        """
        authorised = False
        for _ in range(_REDIRECTS + 3):
            sent = dict(headers)
            used = self._authorization
            if used and httpx.URL(url).netloc == httpx.URL(self._base).netloc:
                sent["Authorization"] = used
            body = content() if content is not None else None
            request = self._http.build_request(method, url, headers=sent, content=body)
            with self._answer(request, patience_s) as response:
                status = response.status_code
                if status == 416 and "Range" in headers:
                    headers = {key: value for key, value in headers.items() if key != "Range"}
                    continue
                if status in (200, 201, 202, 204, 206):
                    return receive(response)
                if status in (301, 302, 303, 307, 308):
                    url = self._redirected(url, response.headers.get("location", ""))
                    continue
                if status == 401 and not authorised and url.startswith(self._base + "/"):
                    self._authorise(response.headers.get_list("www-authenticate"), used)
                    authorised = True
                    continue
                if status == 400 and url.startswith("http:") and b"HTTPS" in _beginning(response):
                    # A loopback registry with TLS: "client sent an HTTP request to an HTTPS server".
                    self._base = f"https://{self.host}"
                    url = url.replace("http:", "https:", 1)
                    continue
                raise _Failed(status, _said(response), response.headers.get("retry-after", ""))
        raise RegistryError(f"{self.host} redirects in a circle", "try another registry, or later")

    @contextlib.contextmanager
    def _answer(self, request: httpx.Request, patience_s: float | None = None) -> Iterator[httpx.Response]:
        """Send a request and wait, for a limited time, for the head of its response."""
        request.extensions = {**request.extensions, "trace": self._note_connection}
        watch = threading.Timer(_ANSWER_S if patience_s is None else patience_s, self._give_up)
        watch.daemon = True
        watch.start()
        try:
            response = self._http.send(request, stream=True)
        finally:
            watch.cancel()
        with contextlib.closing(response):
            yield response

    def _note_connection(self, event: str, info: dict[str, Any]) -> None:
        """Keep track of open connections, so that another thread can interrupt requests that wait for them."""
        # With TLS, the first socket hands its descriptor over to another one.
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            if connection is not None:
                with self._lock:
                    self._connections.add(connection)

    def _give_up(self) -> None:
        """End all connections, because the head of a response is not complete in time although bytes arrive."""
        self._slow = True
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    # Not SSLSocket.shutdown, which drops the TLS object that another thread is reading from.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def _redirected(self, url: str, location: str) -> str:
        target = httpx.URL(urljoin(url, location))
        self._check_target(target, "redirects to")
        return str(target)

    def _check_target(self, target: httpx.URL, what: str) -> None:
        """Refuse targets to which a registry must not send us: plain HTTP, or this machine's own services."""
        if not self._local and leads_here(target.host):
            raise RegistryError(
                f"{self.host} {what} {str(target)[:200]!r}, which is this machine",
                "a registry elsewhere has no business here: do not use it",
            )
        if target.scheme != "https" and not (
            target.scheme == "http" and is_loopback(target.netloc.decode())
        ):
            raise RegistryError(
                f"{self.host} {what} {str(target)[:200]!r}, which is not https",
                "use a registry that is configured correctly",
            )

    def _retry(self, path: str, call: Callable[[], Any], progress: Callable[[], int] = lambda: 0) -> Any:
        """Repeat a call after transient errors: up to `_ATTEMPTS` times in a row without progress."""
        attempt = 0
        while True:
            before = progress()
            try:
                return call()
            except _Failed as error:
                wait = _wait(attempt, error.retry_after)
                if attempt + 1 >= _ATTEMPTS or error.status not in (408, 429, 500, 502, 503, 504):
                    raise self._explain(error, path) from None
            except httpx.HTTPError as error:
                if self._slow:
                    raise RegistryError(
                        f"{self.host} did not answer in {_ANSWER_S:.0f} s",
                        "check the network, and try again",
                    ) from None
                wait = _wait(attempt, "")
                if attempt + 1 >= _ATTEMPTS or self.closed or _hopeless(error):
                    raise self._unreachable(error) from error
            except httpx.InvalidURL as error:
                raise RegistryError(f"{self.host} sent an invalid URL: {error}", "try later") from error
            attempt = 1 if progress() - before >= _LEAST_PROGRESS else attempt + 1
            time.sleep(wait)

    # ---- authorisation ----

    def _authorise(self, challenges: list[str], used: str) -> None:
        """Handle a 401: fetch a token, or send the credentials themselves from now on."""
        if self._authorization != used:
            return  # another thread has just done it
        if self._credentials is None:
            self._credentials = credentials.find(self.host)
        for challenge in challenges:
            kind, _, rest = challenge.strip().partition(" ")
            if kind.lower() == "bearer":
                fields = {m[1].lower(): m[2] or m[3] or "" for m in _CHALLENGE.finditer(rest)}
                self._authorization = "Bearer " + self._token(fields)
                return
            if kind.lower() == "basic" and self._credentials.user:
                self._authorization = self._credentials.basic()
                return
        raise _Failed(401, "", "")

    def _token(self, fields: dict[str, str]) -> str:
        realm = fields.get("realm", "")
        url = httpx.URL(realm)
        self._check_target(url, "wants a token from")
        assert self._credentials is not None
        query = {
            "scope": fields.get("scope") or (f"repository:{self.repository}:pull" if self.repository else "")
        }
        if fields.get("service"):
            query["service"] = fields["service"]
        if self._credentials.identity_token:
            query |= {
                "grant_type": "refresh_token", "client_id": "kata",
                "refresh_token": self._credentials.identity_token,
            }  # fmt: skip
            request = self._http.build_request("POST", url, data=query)
        else:
            headers = {"Authorization": self._credentials.basic()} if self._credentials.user else {}
            request = self._http.build_request("GET", url.copy_merge_params(query), headers=headers)
        with self._answer(request) as response:
            if response.status_code != 200:
                raise _Failed(response.status_code, _said(response), response.headers.get("retry-after", ""))
            data = b""
            pace = _Pace(self.host)
            for piece in response.iter_raw():
                data += piece
                pace.add(len(piece))
                if len(data) > _LARGEST_TOKEN:
                    break
        content = manifest.document(data[:_LARGEST_TOKEN], f"the token of {url.host}")
        token = content.get("token") or content.get("access_token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise RegistryError(f"{url.host} sent no proper token", "try again later")
        return token

    # ---- errors ----

    def _explain(self, error: _Failed, path: str) -> RegistryError:
        what = f"{self.host}/{self.repository}"
        its_words = f": {error.said}" if error.said else ""
        if error.status in (401, 403):
            found = self._credentials
            if found is not None and found.problem:
                return RegistryError(f"{what} is not public, and {found.problem}", f"kata login {self.host}")
            if found:
                if not self.repository:
                    return RegistryError(f"{self.host} does not know this account{its_words}", "check both")
                wanted = "write to" if self._writes else "read"
                return RegistryError(
                    f"{self.host} does not let this account {wanted} {self.repository}{its_words}",
                    f"check the name, or log in as another user: kata login {self.host}",
                )
            if self._writes:
                return RegistryError(
                    f"{self.host} lets only accounts write to {self.repository}{its_words}",
                    f"kata login {self.host}",
                )
            return RegistryError(
                f"{what} does not exist or is not public{its_words}",
                f"check the name; if it is private, kata login {self.host} (kata reads {credentials.config_path()})",
            )
        if error.status == 404:
            kind, _, name = path.partition("/")
            if kind == "manifests":
                joined = "@" if ":" in name else ":"
                return RegistryError(f"there is no image {what}{joined}{name}", "check the name and the tag")
            return RegistryError(
                f"{what} lacks {name}, which its manifest names", "have the image pushed again"
            )
        if error.status == 429:
            return RegistryError(
                f"{self.host} refuses: too many requests{its_words}",
                f"wait, or kata login {self.host} for a higher limit",
            )
        return RegistryError(
            f"{self.host} answered {error.status} to {path[:100]}{its_words}", "try again later"
        )

    def _unreachable(self, error: httpx.HTTPError) -> RegistryError:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return RegistryError(
                    f"the certificate of {self.host} is not trusted: {cause.verify_message}",
                    f"add its authority to the system, or as /etc/docker/certs.d/{self.host}/ca.crt",
                )
            if isinstance(cause, ssl.SSLError):
                return RegistryError(
                    f"no TLS connection to {self.host}: {cause.reason or cause}",
                    "plain HTTP is spoken to loopback addresses only",
                )
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx.TimeoutException):
            return RegistryError(f"{self.host} does not answer in time", "check the network, and try again")
        if isinstance(error, httpx.ProxyError):
            return RegistryError(
                f"the proxy does not reach {self.host}: {error}", "check HTTPS_PROXY and NO_PROXY"
            )
        said = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
        return RegistryError(
            f"{self.host} cannot be reached: {said[:200]}", "check the name, the network and HTTPS_PROXY"
        )


class _Failed(Exception):
    """An error response."""

    def __init__(self, status: int, said: str, retry_after: str) -> None:
        super().__init__(status)
        self.status = status
        self.said = said
        self.retry_after = retry_after


class _Download:
    """A layer that is being fetched into a file."""

    def __init__(self, what: Descriptor, file: Any, tick: Callable[[int], None]) -> None:
        self._what = what
        self._file = file
        self._tick = tick
        self._hash = hashlib.sha256()
        self.at = 0
        file.seek(0)
        while piece := file.read(_STEP):
            self._hash.update(piece)
            self.at += len(piece)
        tick(self.at)
        if self.at > what.size:
            self.restart()

    def restart(self) -> None:
        """Start again with an empty file."""
        self._file.truncate(0)
        self._tick(-self.at)
        self._hash = hashlib.sha256()
        self.at = 0

    def add(self, piece: bytes) -> None:
        """Append received data.

        Raises:
            ImageError: It is more than there should be.
        """
        if self.at + len(piece) > self._what.size:
            self.restart()
            raise ImageError(
                f"the layer {self._what.digest} is longer than its manifest says",
                "have the image pushed again",
            )
        view = memoryview(piece)
        while view:
            view = view[self._file.write(view) :]
        self._hash.update(piece)
        self.at += len(piece)
        self._tick(len(piece))

    def right(self) -> bool:
        """Whether the layer is complete and has its digest."""
        return self.at == self._what.size and "sha256:" + self._hash.hexdigest() == self._what.digest


def _tls(host: str) -> ssl.SSLContext:
    """The TLS context: the system's certificate authorities, and Docker's certificates for this registry."""
    context = ssl.create_default_context()
    for path in _CA_FILES:
        if os.path.exists(path):
            context.load_verify_locations(path)
            break
    else:
        import certifi

        context.load_verify_locations(certifi.where())
    directory = f"/etc/docker/certs.d/{host}"
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return context
    for name in names:
        path = os.path.join(directory, name)
        try:
            if name.endswith(".crt"):
                context.load_verify_locations(path)
            elif name.endswith(".cert"):
                context.load_cert_chain(path, path.removesuffix(".cert") + ".key")
        except OSError as error:
            raise RegistryError(f"{path} cannot be used: {error}", "fix or remove the file") from error
    return context


def _location(response: httpx.Response) -> str:
    """Where an upload is to go."""
    return str(response.headers.get("location", ""))


def _wait(attempt: int, retry_after: str) -> float:
    if retry_after.isdigit():
        return min(float(retry_after), _LONGEST_WAIT_S)
    return min(0.25 * float(1 << attempt), _LONGEST_WAIT_S)


def _hopeless(error: httpx.HTTPError) -> bool:
    """Whether retrying is useless: the name is unknown, the connection was refused, the certificate is wrong."""
    if not isinstance(error, httpx.ConnectError):
        return isinstance(error, httpx.UnsupportedProtocol)
    text = str(error)
    return any(
        word in text for word in ("refused", "CERTIFICATE", "SSL", "not known", "No address", "No route")
    )


def _beginning(response: httpx.Response) -> bytes:
    """The first bytes of a response."""
    data = b""
    until = time.monotonic() + _WORDS_S
    try:
        for piece in response.iter_raw():
            data += piece
            if len(data) >= 4096 or time.monotonic() > until:
                break
    except (httpx.HTTPError, httpx.StreamError):
        pass
    return data[:4096]


def _said(response: httpx.Response) -> str:
    """The registry's error message, escaped and shortened."""
    try:
        first = json.loads(_beginning(response))["errors"][0]
        text = str(first.get("message") or first.get("code") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return ""
    return "".join(char if char.isprintable() else "?" for char in text)[:200]
