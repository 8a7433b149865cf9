"""Pulling from Debian's docker-registry on loopback: images, platforms, policies, credentials, TLS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from image_support import INDEX, Blobs, image
from registry_support import BIG, HELLO, DockerRegistry, basic, certificate_of, content, login, set_up

from kata.errors import ImageError, NotFoundError, RegistryError
from kata.images import store
from kata.images.resolve import resolve


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return set_up(tmp_path, monkeypatch)


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
    made = resolve(name, progress=lambda *step: told.append(step))
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
    made = resolve(name)
    assert made.config == {"Cmd": ["amd64"]}
    assert resolve(f"{name}@{index['digest']}", pull="never").id == made.id
    assert store.find(f"{name}@{inner[1]['digest']}").id == made.id
    by_digest = resolve(f"{name}@{inner[1]['digest']}", pull="always")
    assert by_digest.id == made.id
    other = resolve(name, platform="linux/arm64")
    assert other.platform == "linux/arm64"
    assert resolve(name).platform == "linux/amd64"
    with pytest.raises(ImageError, match="not offered for linux/riscv64"):
        resolve(name, platform="riscv64")


def test_a_platform_that_was_asked_for_is_the_one_that_runs(docker_registry: DockerRegistry) -> None:
    """Whatever of that name is stored, and would run here as well."""
    blobs = Blobs()
    inner = [
        image(blobs, [HELLO], arch=arch, config={"Cmd": [arch, variant]},
              platform={"os": "linux", "architecture": arch, **({"variant": variant} if variant else {})})
        for arch, variant in (("386", ""), ("amd64", ""), ("amd64", "v2"))
    ]  # fmt: skip
    index = blobs.put_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": inner}, INDEX)
    docker_registry.push("levels", "latest", blobs, index, inner)
    docker_registry.push("old", "latest", blobs, inner[0], [])
    name, old = f"{docker_registry.host}/levels", f"{docker_registry.host}/old"
    x86, amd64, v2 = (
        resolve(name, platform=wanted) for wanted in ("linux/386", "linux/amd64", "linux/amd64/v2")
    )
    commands = [["386", ""], ["amd64", ""], ["amd64", "v2"]]
    assert [each.config["Cmd"] for each in (x86, amd64, v2)] == commands
    # All are there: none is fetched again, whichever the name stands for.
    for wanted, command in zip(("linux/386", "linux/amd64", "linux/amd64/v2"), commands, strict=True):
        for asked in (name, f"{name}@{index['digest']}"):
            assert resolve(asked, platform=wanted, pull="never").config["Cmd"] == command
    # Without one asked for, what is stored and runs here is good.
    assert resolve(name, pull="never").id == v2.id
    with pytest.raises(NotFoundError, match="not in the local store for linux/arm64") as caught:
        resolve(name, platform="linux/arm64", pull="never")
    assert caught.value.hint == f"kata pull --platform linux/arm64 {name}:latest"
    # The best that a registry has for a platform is asked for once.
    assert resolve(old, platform="linux/amd64").id == x86.id
    assert resolve(old, platform="linux/amd64", pull="never").id == x86.id
    # An id is one image.
    assert resolve(v2.id, platform="linux/amd64").id == v2.id
    with pytest.raises(ImageError, match="is built for linux/386, not for linux/arm64"):
        resolve(x86.id[:20], platform="linux/arm64")


def test_pull_policies(docker_registry: DockerRegistry) -> None:
    blobs = Blobs()
    docker_registry.push("moving", "1", blobs, image(blobs, [HELLO], config={"Cmd": ["old"]}), [])
    name = f"{docker_registry.host}/moving:1"
    old = resolve(name)
    docker_registry.push("moving", "1", blobs, image(blobs, [HELLO], config={"Cmd": ["new"]}), [])
    assert resolve(name).id == old.id
    assert resolve(name, pull="never").id == old.id
    told: list[Any] = []
    new = resolve(name, pull="always", progress=lambda *step: told.append(step))
    assert new.config == {"Cmd": ["new"]}
    assert not told  # the layers are there already
    assert store.find(old.id).names == []


def test_missing_names(docker_registry: DockerRegistry) -> None:
    with pytest.raises(RegistryError, match=rf"no image {docker_registry.host}/team/gone:latest") as caught:
        resolve(f"{docker_registry.host}/team/gone")
    assert caught.value.hint
    with pytest.raises(RegistryError, match=r"no image .*@sha256:0"):
        resolve(f"{docker_registry.host}/team/gone@sha256:{'0' * 64}")


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
        resolve(name)
    assert f"kata login {private_registry.host}" in caught.value.hint
    login(tmp_path, {"auths": {private_registry.host: {"auth": basic("user", "wrong")}}})
    with pytest.raises(RegistryError, match="does not let this account"):
        resolve(name)
    login(tmp_path, {"auths": {f"http://{private_registry.host}/v2/": {"auth": basic("user", "secret")}}})
    assert content(resolve(name)) == {"hello"}


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
        resolve(name)
    _helper(tmp_path, monkeypatch, "echo 'vault sealed' >&2; exit 3")
    with pytest.raises(RegistryError, match="failed: vault sealed"):
        resolve(name)
    _helper(tmp_path, monkeypatch, "echo 'credentials not found in native keychain'; exit 1")
    with pytest.raises(RegistryError, match="is not public"):
        resolve(name)
    _helper(tmp_path, monkeypatch, "echo nonsense")
    with pytest.raises(RegistryError, match="no proper answer"):
        resolve(name)
    answer = '{"ServerURL":"x","Username":"user","Secret":"secret"}'
    _helper(tmp_path, monkeypatch, f"""[ "$1 $(cat)" = "get {private_registry.host}" ] && echo '{answer}'""")
    assert content(resolve(name)) == {"hello"}


@pytest.mark.parametrize("text", ["{", "[]", '{"auths":{"HOST":{"auth":"%%%"}}}'])
def test_a_broken_docker_configuration_is_told(
    private_registry: DockerRegistry, tmp_path: Path, text: str
) -> None:
    login(tmp_path, {})
    (tmp_path / "docker" / "config.json").write_text(text.replace("HOST", private_registry.host))
    with pytest.raises(RegistryError, match=r"is not public, and .*(cannot be used|not base64)"):
        resolve(f"{private_registry.host}/team/app:1")


def test_tls_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = certificate_of(tmp_path)
    plain = DockerRegistry(tmp_path / "r")
    blobs = Blobs()
    plain.push("app", "1", blobs, image(blobs, [HELLO]), [])
    plain.stop()
    running = DockerRegistry(tmp_path / "r", tls=(certificate, key))
    try:
        with pytest.raises(RegistryError, match="is not trusted") as caught:
            resolve(f"{running.host}/app:1")
        assert "certs.d" in caught.value.hint
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert content(resolve(f"{running.host}/app:1")) == {"hello"}
    finally:
        running.stop()
