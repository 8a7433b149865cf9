"""`kata login`, `logout` and `push` with Debian's docker-registry."""

from __future__ import annotations

import contextlib
import io
import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from image_support import Blobs, image
from registry_support import HELLO, DockerRegistry, basic, content, login, set_up

from kata.cli import export, main
from kata.images import store
from kata.images.resolve import resolve

# The password is "secret".
HTPASSWD = "user:$2b$04$4iIvxADJtJ10IFIzuRWYPeCtzchRKje71aUof5.cE30pJuK31h6j.\n"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return set_up(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    directory = tmp_path_factory.mktemp("private")
    (directory / "htpasswd").write_text(HTPASSWD)
    running = DockerRegistry(
        directory, {"auth": {"htpasswd": {"realm": "r", "path": str(directory / "htpasswd")}}}
    )
    yield running
    running.stop()


def stdin(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main.main(list(words)) == status
    out = capsys.readouterr()
    return out.out if status == 0 else out.err


def stored(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "docker/config.json").read_text())
    return found


def test_login_and_logout(
    private: DockerRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    login(tmp_path, {"psFormat": "x", "auths": {"elsewhere:1": {"auth": basic("a", "b")}}})
    stdin(monkeypatch, "wrong\n")
    refused = said(capsys, "login", "-u", "user", "--password-stdin", private.host, status=125)
    assert "does not know this account" in refused
    assert list(stored(tmp_path)["auths"]) == ["elsewhere:1"], "what was refused is not kept"
    stdin(monkeypatch, "secret\n")
    assert said(capsys, "login", "-u", "user", "--password-stdin", private.host) == "Login Succeeded\n"
    config = stored(tmp_path)
    assert config["psFormat"] == "x"
    assert config["auths"][private.host] == {"auth": basic("user", "secret")}
    assert stat.S_IMODE((tmp_path / "docker/config.json").stat().st_mode) == 0o600
    assert said(capsys, "logout", private.host) == f"Removing login credentials for {private.host}\n"
    assert said(capsys, "logout", private.host) == f"Not logged in to {private.host}\n"
    assert list(stored(tmp_path)["auths"]) == ["elsewhere:1"]
    assert said(capsys, "logout", "--all") == "Removing login credentials for elsewhere:1\n"
    assert stored(tmp_path) == {"psFormat": "x", "auths": {}}


def test_a_credential_helper_keeps_them(
    private: DockerRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "kept"
    helper = tmp_path / "bin/docker-credential-box"
    helper.parent.mkdir()
    helper.write_text(
        f"#!/bin/sh\ncase $1 in store) cat > {kept};; erase) rm {kept};;\n"
        f"get) cat {kept} 2>/dev/null || {{ echo credentials not found; exit 1; }};; esac\n"
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(helper.parent), prepend=":")
    login(tmp_path, {"credsStore": "box"})
    stdin(monkeypatch, "secret")
    said(capsys, "login", "-u", "user", "--password-stdin", private.host)
    assert json.loads(kept.read_text()) == {
        "ServerURL": private.host,
        "Username": "user",
        "Secret": "secret",
    }
    assert stored(tmp_path) == {"credsStore": "box"}
    assert "Removing" in said(capsys, "logout", private.host)
    assert not kept.exists()


def test_usage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "")
    for words, expected in (
        (["login", "a/b"], "is no registry"),
        (["login", "h:1"], "is no terminal"),
        (["login", "--password-stdin", "h:1"], "needs the account"),
        (["login", "-u", "x", "-p", "y", "--password-stdin", "h:1"], "exclude each other"),
        (["login", "-u", "a:b", "-p", "y", "h:1"], "without ':'"),
        (["push", "nothing-there"], "nothing-there"),
        (["push", "oci:x"], "is no name at a registry"),
        (["push", "a", f"b@sha256:{'0' * 64}"], "under a tag"),
    ):
        assert expected in said(capsys, *words, status=125), words


@pytest.fixture
def open_one(tmp_path: Path) -> Iterator[DockerRegistry]:
    running = DockerRegistry(tmp_path / "open")
    yield running
    running.stop()


@pytest.fixture
def flattened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the guest would read of an image is a file: the machine is not what is tested here."""
    asked = []

    def write(engine: Any, container: Any, out: Any, most_bytes: int | None = None) -> None:
        asked.append(container)
        out(HELLO)

    monkeypatch.setattr(export, "_write_tar", write)
    monkeypatch.setattr(export, "_container_of", lambda image: contextlib.nullcontext(SimpleNamespace()))
    monkeypatch.setattr(export, "mounted_root", lambda container: contextlib.nullcontext())
    return asked


def test_push(
    private: DockerRegistry,
    open_one: DockerRegistry,
    tmp_path: Path,
    flattened: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    blobs = Blobs()
    open_one.push("team/app", "1", blobs, image(blobs, [HELLO], config={"Cmd": ["x"]}), [])
    name = f"{open_one.host}/team/app:1"
    fetched = resolve(name)
    pushed = f"{private.host}/mine/app:2"
    assert "lets only accounts write" in said(capsys, "push", name, pushed, status=125)
    login(tmp_path, {"auths": {private.host: {"auth": basic("user", "secret")}}})
    out = said(capsys, "push", name, pushed)
    assert out.startswith("2: digest: sha256:")
    digest = out.split()[-1]
    assert said(capsys, "push", "-q", name, pushed).strip() == pushed
    # The hint for podman's --digestfile, on what it is printed of.
    hint = "kata push NAME | sed 's/.*digest: //' > FILE"
    assert hint in said(capsys, "push", "--digestfile", "x", name, status=125)
    only = subprocess.run(["sed", "s/.*digest: //"], input=out, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", only.stdout)
    again = resolve(pushed)
    assert content(again) == {"hello"}
    assert (again.config, again.digest) == (fetched.config, digest)
    assert again.id != fetched.id
    assert len(flattened) == 3
    assert not [path for path in (Path(store.directory()) / "rootfs").iterdir() if path.suffix != ".erofs"]
