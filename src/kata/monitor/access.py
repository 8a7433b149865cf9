"""Where the monitor listens, and whom it answers.

On loopback and on a unix socket everybody who can connect is answered; over TCP only under a name that means this
machine, so that a web page cannot reach it through a name of its own that it has pointed here (DNS rebinding). Beyond
loopback there is TLS and a token, both or the monitor does not start.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
import re
import ssl

from kata import sysio
from kata.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

DEFAULT_ADDRESS = "127.0.0.1:8090"
MIN_TOKEN_BYTES = 16
_MAX_TOKEN_BYTES = 4096
_UNIX = "unix:"


class Address:
    """Where to listen.

    Args:
        text: ``HOST:PORT``, ``[IPV6]:PORT``, ``:PORT`` (all addresses), or ``unix:PATH``.

    Attributes:
        path: Of the unix socket; empty for TCP.
        host: An IP address, or ``localhost``; empty for all addresses.
        port: The port; 0 has the kernel choose one.

    Raises:
        UsageError: It is none of these.
    """

    __slots__ = ("host", "path", "port", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.path, self.host, self.port = "", "", 0
        hint = f"HOST:PORT like {DEFAULT_ADDRESS}, or unix:PATH"
        if text.startswith(_UNIX):
            self.path = text.removeprefix(_UNIX)
            if self.path.startswith("//"):
                self.path = self.path[2:]
            if not self.path.startswith("/"):
                raise UsageError(f"--listen-address: {text!r} is not an absolute path", hint)
            return
        host, colon, port = text.rpartition(":")
        if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 0xFFFF:
            raise UsageError(f"--listen-address: {text!r} has no port from 0 to 65535", hint)
        self.port = int(port)
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        if host not in ("", "localhost"):
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise UsageError(f"--listen-address: {host!r} is not an IP address", hint) from None
        self.host = host

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        if self.path or self.host == "localhost":
            return True
        return bool(self.host) and ipaddress.ip_address(self.host).is_loopback


class Secrets:
    """Certificate, key and token, from files that may be replaced while the monitor runs.

    Args:
        certificate: The certificate's file (PEM, its chain behind it); empty for none.
        key: The file of its key.
        token: The file of the token; empty for none.

    Attributes:
        tls: For the server; absent without a certificate.

    Raises:
        UsageError: A file cannot be used.
    """

    def __init__(self, certificate: str = "", key: str = "", token: str = "") -> None:
        self._certificate, self._key, self._token = certificate, key, token
        self.tls: ssl.SSLContext | None = None
        self._read: dict[str, tuple[int, int, int]] = {}
        self._expected = b""
        if bool(certificate) != bool(key):
            raise UsageError("--tls-cert and --tls-key go together", "give both, or neither")
        if certificate:
            self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load()

    @property
    def has_token(self) -> bool:
        """Whether a token is asked for."""
        return bool(self._token)

    def refresh(self) -> str:
        """Read the files that have been replaced.

        Returns:
            What went wrong, as a sentence; the former content goes on to count.
        """
        try:
            self._load()
        except UsageError as error:
            return error.message
        return ""

    def admits(self, authorization: str) -> bool:
        """Whether a request's header ``Authorization`` has the token: as Bearer, or as the password of Basic, which
        browsers ask for.
        """
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                given = ""
        elif scheme.lower() != "bearer":
            given = ""
        # Compared whatever was given, and in a time that does not depend on how much of it is right.
        return hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._expected) and bool(given)

    def _load(self) -> None:
        if self._token and self._changed(self._token):
            self._expected = _token(self._token)
            self._remember(self._token)
        if self.tls is not None and (self._changed(self._certificate) or self._changed(self._key)):
            try:
                self.tls.load_cert_chain(self._certificate, self._key)
            except (OSError, ssl.SSLError) as error:
                why = getattr(error, "strerror", None) or str(error)
                raise UsageError(
                    f"--tls-cert {self._certificate}, --tls-key {self._key}: {why}",
                    "both in PEM, the key without a passphrase, and belonging together",
                ) from error
            self._remember(self._certificate)
            self._remember(self._key)

    def _changed(self, path: str) -> bool:
        return self._read.get(path) != _identity(path)

    def _remember(self, path: str) -> None:
        self._read[path] = _identity(path)


def _identity(path: str) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


def _token(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            token = file.read(_MAX_TOKEN_BYTES + 1).strip()
    except OSError as error:
        raise UsageError(f"--token-file {path}: {error.strerror}") from error
    if not MIN_TOKEN_BYTES <= len(token) <= _MAX_TOKEN_BYTES or b"\n" in token:
        raise UsageError(
            f"--token-file {path}: not one line of {MIN_TOKEN_BYTES} to {_MAX_TOKEN_BYTES} bytes",
            f"openssl rand -hex 32 > {path}",
        )
    return token


def check(address: Address, secrets: Secrets) -> None:
    """Whether the monitor may listen there.

    Raises:
        UsageError: Others could reach it, and it has no TLS or no token.
    """
    if address.local or (secrets.tls is not None and secrets.has_token):
        return
    missing = " and ".join(
        name
        for name, there in (
            ("--tls-cert with --tls-key", secrets.tls is not None),
            ("--token-file", secrets.has_token),
        )
        if not there
    )
    raise UsageError(
        f"{address.text} can be reached from other machines, to whom the figures, logs and consoles of all "
        "sandboxes are not to be shown",
        f"{missing}; or listen on {DEFAULT_ADDRESS}",
    )


def names_of(address: Address, more: Iterable[str] = ()) -> frozenset[str]:
    """The names under which a browser may ask a monitor on loopback."""
    return frozenset(
        {"localhost", "127.0.0.1", "::1", address.host.lower(), *(one.lower() for one in more)} - {""}
    )


def host_of(header: str) -> str:
    """The name in a header ``Host``, without its port."""
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def clear_socket(path: str) -> None:
    """Remove a unix socket that nobody listens on any more.

    Raises:
        HostError: Somebody does, or it is no socket.
    """
    import socket
    import stat

    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise HostError(f"{path} is there and no socket", "choose another path, or remove it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe, sysio.SocketName(path) as name:
        probe.settimeout(1.0)
        try:
            probe.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            os.unlink(path)
            return
        except OSError:
            pass
    raise HostError(f"somebody listens on {path} already", "is another kata-monitor running?")
