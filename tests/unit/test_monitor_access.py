"""Where kata-monitor listens, and whom it answers."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import subprocess
from functools import partial
from pathlib import Path

import pytest

from kata.cli.complete import of_options
from kata.errors import HostError, UsageError
from kata.monitor import access, options
from kata.monitor.access import Address, Secrets
from kata.monitor.main import main

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def token(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("127.0.0.1:8090", True),
        ("127.9.9.9:1", True),
        ("[::1]:8090", True),
        ("localhost:8090", True),
        ("unix:/run/x.sock", True),
        ("unix:///run/x.sock", True),
        (":8090", False),
        ("0.0.0.0:8090", False),
        ("[::]:8090", False),
        ("192.0.2.1:8090", False),
        ("[2001:db8::1]:8090", False),
    ],
)
def test_beyond_loopback_only_with_tls_and_a_token(
    text: str, local: bool, token: str, tmp_path: Path
) -> None:
    address = Address(text)
    assert address.local == local
    certificate, key = make_certificate(tmp_path)
    access.check(address, Secrets(certificate, key, token))
    for secrets in (Secrets(), Secrets(certificate, key), Secrets("", "", token)):
        if local:
            access.check(address, secrets)
        else:
            with pytest.raises(UsageError) as raised:
                access.check(address, secrets)
            assert "--" in raised.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8090",
        "localhost",
        "example.org:80",
        "127.0.0.1:x",
        "127.0.0.1:70000",
        "unix:x",
        "[::1:80",
        "1:2:3:80",
    ],
)
def test_an_address_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--listen-address={text}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --listen-address")
    assert "\nhint: HOST:PORT" in error


def make_certificate(directory: Path) -> tuple[str, str]:
    """A certificate of its own for localhost, and its key."""
    certificate, key = directory / "tls.crt", directory / "tls.key"
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*request, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return str(certificate), str(key)


def test_a_token_is_taken_as_bearer_and_as_a_password(token: str) -> None:
    secrets = Secrets(token=token)
    right = base64.b64encode(f"anybody:{TOKEN}".encode()).decode()
    for good in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Basic {right}"):
        assert secrets.admits(good)
    wrong = base64.b64encode(f"{TOKEN}:".encode()).decode()
    for bad in (
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        TOKEN,
        f"Basic {wrong}",
        "Basic %",
    ):
        assert not secrets.admits(bad)
    assert not Secrets().admits("Bearer "), "no token is no empty token"


def test_files_that_are_replaced_are_read_again(token: str, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    secrets = Secrets(certificate, key, token)
    fresh = tmp_path / "fresh"
    fresh.write_text("f" * 40)
    os.replace(fresh, token)
    assert secrets.refresh() == ""
    assert secrets.admits("Bearer " + "f" * 40)
    assert not secrets.admits(f"Bearer {TOKEN}")
    Path(token).write_text("short")
    assert "not one line" in secrets.refresh()
    assert secrets.admits("Bearer " + "f" * 40), "what was read before goes on to count"
    Path(key).write_text("nonsense")
    Path(token).write_text("g" * 40)
    assert "PEM" in secrets.refresh() or certificate in secrets.refresh()


@pytest.mark.parametrize("content", [b"", b"short", b"two\nlines of a file, no token", b"x" * 5000, None])
def test_a_token_that_is_none_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="--token-file"):
        Secrets(token=str(path))


def test_certificate_and_key_belong_together(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    with pytest.raises(UsageError, match="go together"):
        Secrets(certificate)
    with pytest.raises(UsageError, match="--tls-cert"):
        Secrets(certificate, str(tmp_path / "none"))
    with pytest.raises(UsageError, match="--tls-cert"):
        Secrets(key, certificate)
    made = Secrets(certificate, key)
    assert made.tls is not None
    assert made.tls.minimum_version == ssl.TLSVersion.TLSv1_2


def test_the_name_in_a_header() -> None:
    for header, name in [
        ("localhost:8090", "localhost"),
        ("LOCALHOST", "localhost"),
        ("127.0.0.1:8090", "127.0.0.1"),
        ("[::1]:8090", "::1"),
        ("evil.example:8090", "evil.example"),
        ("", ""),
    ]:
        assert access.host_of(header) == name
    assert access.names_of(Address("127.0.0.2:1"), ["Metrics.Local"]) == {
        *("localhost", "127.0.0.1", "::1", "127.0.0.2", "metrics.local")
    }


def test_only_a_socket_that_nobody_listens_on_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    access.clear_socket(str(path))
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        one.listen(1)
        with pytest.raises(HostError, match="already"):
            access.clear_socket(str(path))
    access.clear_socket(str(path))
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(HostError, match="no socket"):
        access.clear_socket(str(path))
    assert path.read_text() == "precious"


# ---- the command line ----


def test_options_are_the_original_s_with_one_dash_too() -> None:
    values = options.parsed(
        ["-listen-address=127.0.0.1:1", "--log-level", "warn", "-runtime-endpoint", "/x"]
    )
    assert values.value("listen-address") == "127.0.0.1:1"
    assert options.level(values) == 30
    assert values.value("runtime-endpoint") == "/x"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["word"],
        ["--log-level", "loud"],
        ["--timeout", "-1"],
        ["--parallel", "0"],
        ["--max-series", "x"],
        ["--tls-cert"],
        ["--listen-address", "0.0.0.0:8090"],
        ["--runtime-endpoint", "containerd.sock"],
    ],
)
def test_what_is_wrong_with_the_options_is_said(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_completion_offers_the_options_and_their_values() -> None:
    complete = partial(of_options, options.OPTIONS)
    assert ("--listen-address", dict(complete([], "--listen"))["--listen-address"]) in complete([], "--l")
    assert [text for text, _ in complete(["--log-level"], "w")] == ["warning"]
    assert complete(["--log-level=x", "--tls-cert"], "") == [(":files", "")]
    assert [text for text, _ in complete([], "--log-level=e")] == ["--log-level=error"]
