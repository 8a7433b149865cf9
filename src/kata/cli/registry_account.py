"""`kata login`, `logout` and `push`: accounts at registries, and images that are sent there."""

from __future__ import annotations

import os
import sys

from kata.cli.args import Command, Option
from kata.errors import ImageError, UnsupportedError, UsageError
from kata.images import reference as references

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from kata.cli.args import Arguments
    from kata.images.flat import Layer
    from kata.images.registry import Registry

_STEP = 1 << 20
_LARGEST_SECRET = 64 << 10
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
COMMANDS = {
    "login": Command(
        "login",
        "[REGISTRY]",
        "Logs in to a registry, and keeps the credentials.",
        [
            Option("-u --username", "NAME", "the account; it is asked for if not given"),
            Option("-p --password", "SECRET", "its password; others can read it in the list of processes"),
            Option("--password-stdin", "", "read the password from standard input"),
        ],
        most=1,
        notes="REGISTRY is HOST[:PORT], Docker Hub without one. The credentials are kept as 'docker login' keeps\n"
        "them: by the credential helper that ~/.docker/config.json names, otherwise in that file, not encrypted.",
    ),
    "logout": Command(
        "logout",
        "[REGISTRY]",
        "Forgets the credentials for a registry.",
        [Option("-a --all", "", "those for all registries")],
        most=1,
    ),
    "push": Command(
        "push",
        "IMAGE[:TAG] [NAME[:TAG]]",
        "Sends an image to a registry.",
        [Option("-q --quiet", "", "print nothing but the name that it has at the registry")],
        least=1,
        most=2,
        notes="It is sent under its own name, or as NAME. Its layers are not kept when it is fetched: it is sent\n"
        "with one layer that has all its files, so its digest is another one.",
    ),
}


def _host_of(arguments: Arguments) -> str:
    """The registry that a command is about."""
    if not arguments.rest:
        return "docker.io"
    text = arguments.rest[0]
    host = text.removeprefix("https://").removeprefix("http://").removesuffix("/v1/").rstrip("/")
    if host in ("index.docker.io", "registry-1.docker.io"):
        return "docker.io"
    if not host or "/" in host or any(c.isspace() for c in host):
        raise UsageError(f"{text!r} is no registry", "HOST or HOST:PORT")
    return host


# ---- accounts ----


def _login(arguments: Arguments) -> int:
    from kata.images import credentials
    from kata.images.registry import Registry

    host = _host_of(arguments)
    user, secret = arguments.value("username"), arguments.value("password")
    from_stdin = arguments.flag("password_stdin")
    if from_stdin and secret is not None:
        raise UsageError("--password and --password-stdin exclude each other", "leave out one of the two")
    if from_stdin and user is None:
        raise UsageError("--password-stdin needs the account", f"kata login -u NAME --password-stdin {host}")
    if not from_stdin and secret is None and not sys.stdin.isatty():
        raise UsageError(
            "standard input is no terminal to ask for a password", "kata login -u NAME --password-stdin"
        )
    if user is None:
        sys.stderr.write(f"Username for {host}: ")
        sys.stderr.flush()
        user = sys.stdin.readline().strip()
    if from_stdin:
        secret = sys.stdin.read(_LARGEST_SECRET + 1).removesuffix("\n").removesuffix("\r")
    elif secret is None:
        import getpass

        secret = getpass.getpass("Password: ")
    else:
        sys.stderr.write(
            "warning: others can read --password in the list of processes; --password-stdin is safe\n"
        )
    if not user or ":" in user or not secret or len(secret) > _LARGEST_SECRET:
        raise UsageError("an account needs a name without ':' and a password", "kata login -u NAME")
    registry = Registry(host, "", credentials.Credentials(user, secret))
    try:
        registry.check_login()
    finally:
        registry.close()
    place = credentials.save(host, user, secret)
    if place.startswith("/"):
        sys.stderr.write(f"warning: the password is in {place}, where it is not encrypted\n")
    print("Login Succeeded")
    return 0


def _logout(arguments: Arguments) -> int:
    from kata.images import credentials

    if arguments.flag("all"):
        if arguments.rest:
            raise UsageError("--all is about all registries", "leave out the registry")
        hosts = credentials.hosts()
    else:
        hosts = [_host_of(arguments)]
    for host in hosts:
        if credentials.erase(host):
            print(f"Removing login credentials for {host}")
        else:
            print(f"Not logged in to {host}")
    return 0


# ---- push ----


def _push(arguments: Arguments) -> int:
    from kata.cli import export
    from kata.images import flat, store
    from kata.images.registry import Registry
    from kata.storage.layers import limits_from_environment

    source = arguments.rest[0]
    name = arguments.rest[-1]
    if name.partition(":")[0] in references.LOCAL_KINDS:
        raise UsageError(f"{name!r} is no name at a registry", f"kata push {source} HOST/NAME:TAG")
    target = references.parse_reference(name.removeprefix("docker://"))
    if target.digest:
        raise UsageError(f"{name!r}: an image is sent under a tag, and not a digest", "NAME:TAG")
    image = store.find(source)
    if image.rootfs_dir:
        raise UnsupportedError(
            f"{source} is a directory, and no image", "kata import makes one of a tar file"
        )
    quiet = arguments.flag("quiet")

    def tell(text: str) -> None:
        if not quiet:
            sys.stderr.write(f"{text}\n")

    registry = Registry(target.host, target.path)
    try:
        directory = os.path.join(store.directory(), "rootfs")
        with flat.Layer(directory, limits_from_environment().size) as layer:
            tell(f"The push refers to repository [{target.repository}]")
            made = export.flatten(image, layer, "kata push")
            digest = _send(directory, registry, target.tag, made, layer, tell)
    finally:
        registry.close()
    print(target.familiar() if quiet else f"{target.tag}: digest: {digest}")
    return 0


def _send(
    directory: str,
    registry: Registry,
    tag: str,
    made: dict[str, object],
    layer: Layer,
    tell: Callable[[str], None],
) -> str:
    """Send the layer and the configuration, if they are not there, and the manifest; its digest."""
    import hashlib
    import json
    import tempfile

    config = json.dumps(made).encode()
    config_digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    with tempfile.TemporaryFile(dir=directory) as packed:
        layer_digest, size = _pack(layer.reader(), packed)
        if registry.has_blob(layer_digest):
            tell(f"{layer_digest[7:19]}: Layer already exists")
        else:
            registry.upload(layer_digest, size, lambda: _pieces(packed))
            tell(f"{layer_digest[7:19]}: Pushed ({size} bytes)")
    if not registry.has_blob(config_digest):
        registry.upload(config_digest, len(config), lambda: [config])
    document = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "config": {"mediaType": _CONFIG_TYPE, "digest": config_digest, "size": len(config)},
        "layers": [{"mediaType": _LAYER_TYPE, "digest": layer_digest, "size": size}],
    }
    return registry.put_manifest(tag, _MANIFEST_TYPE, json.dumps(document).encode())


def _pack(source: BinaryIO, packed: BinaryIO) -> tuple[str, int]:
    """Compress a layer with gzip; the digest of the outcome, and its size in bytes."""
    import hashlib
    import zlib

    digest = hashlib.sha256()
    packer = zlib.compressobj(
        6, zlib.DEFLATED, 31
    )  # without a time in the header: the same layer has one digest
    try:
        while piece := source.read(_STEP):
            data = packer.compress(piece)
            digest.update(data)
            packed.write(data)
        data = packer.flush()
        digest.update(data)
        packed.write(data)
        packed.flush()
    except OSError as error:
        raise ImageError(f"the layer cannot be packed: {error.strerror}", "make space") from error
    return f"sha256:{digest.hexdigest()}", packed.tell()


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while piece := file.read(_STEP):
        yield piece


HANDLERS = {"login": _login, "logout": _logout, "push": _push}
