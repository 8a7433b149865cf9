"""Registry credentials, as stored by ``docker login`` and ``kata login``.

They come from ``$DOCKER_CONFIG/config.json`` (by default ``~/.docker/config.json``): ``credHelpers`` names a helper for
one registry, ``credsStore`` one for all registries, and ``auths`` has the credentials themselves. Helpers are programs
``docker-credential-NAME``.

A broken file or helper does not stop a pull that needs no credentials. It is reported only if the registry refuses.

Sources: Docker command line reference ("Credential stores", "Credential helper protocol").
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from typing import Any

from kata import sysio
from kata.errors import RegistryError

_HUB = "https://index.docker.io/v1/"
_HELPER_TIMEOUT_S = 60


class Credentials:
    """Credentials for a registry; false if there are none.

    Attributes:
        user: User name, or "".
        secret: Password or token, or "".
        identity_token: A token to be exchanged for an access token, or "".
        problem: The error that kept credentials from being found; "" if none are configured.
    """

    __slots__ = ("identity_token", "problem", "secret", "user")

    def __init__(
        self, user: str = "", secret: str = "", identity_token: str = "", problem: str = ""
    ) -> None:
        self.user = user
        self.secret = secret
        self.identity_token = identity_token
        self.problem = problem

    def __bool__(self) -> bool:
        return bool(self.user or self.identity_token)

    def basic(self) -> str:
        """The value of an Authorization header with the scheme Basic."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


def config_path() -> str:
    """Path of the configuration file of ``docker login``."""
    directory = os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
    return os.path.join(directory, "config.json")


def save(host: str, user: str, secret: str) -> str:
    """Keep the credentials for a registry where `find`, Docker and Podman find them.

    Args:
        host: Host name, with a port if it has one; ``docker.io`` for Docker Hub.
        user: User name.
        secret: Password or token.

    Returns:
        Where they are: the name of a helper program, or the path of the file, in which they are not encrypted.

    Raises:
        RegistryError: The helper or the file does not take them.
    """
    config = _read_config()
    key = _keys(host)[0]
    helper = _helper(config, key)
    if helper:
        _tell(helper, "store", json.dumps({"ServerURL": key, "Username": user, "Secret": secret}))
        return f"docker-credential-{helper}"
    auths = config.setdefault("auths", {})
    auths[key] = {"auth": base64.b64encode(f"{user}:{secret}".encode()).decode()}
    return _write_config(config)


def erase(host: str) -> bool:
    """Forget the credentials for a registry.

    Args:
        host: Host name, with a port if it has one; ``docker.io`` for Docker Hub.

    Returns:
        Whether there were any.

    Raises:
        RegistryError: The helper or the file cannot be changed.
    """
    had_any = bool(find(host))
    config = _read_config()
    keys = _keys(host)
    helper = _helper(config, keys[0])
    if helper and had_any:
        _tell(helper, "erase", keys[0])
    auths = config.get("auths")
    if isinstance(auths, dict):
        ours = [key for key in auths if _host(key) in map(_host, keys)]
        for key in ours:
            del auths[key]
        if ours:
            _write_config(config)
    return had_any


def hosts() -> list[str]:
    """The registries that there are credentials for, in the file or by a helper of their own.

    Raises:
        RegistryError: The file cannot be used.
    """
    config = _read_config()
    found = {_host(key) for key in (*config.get("auths", {}), *(config.get("credHelpers") or {}))}
    return sorted({"docker.io" if _host(key) in map(_host, _keys("docker.io")) else key for key in found})


def _keys(host: str) -> list[str]:
    """Under which names a registry's credentials may be kept; the first is Docker's."""
    return [_HUB, "index.docker.io", "docker.io", "registry-1.docker.io"] if host == "docker.io" else [host]


def _helper(config: dict[str, Any], key: str) -> str:
    helpers = config.get("credHelpers")
    found = helpers.get(key) if isinstance(helpers, dict) else None
    name = found or config.get("credsStore") or ""
    if not isinstance(name, str) or "/" in name:
        raise RegistryError(f"{config_path()} names the credential helper {name!r}, which is no name")
    return name


def _read_config() -> dict[str, Any]:
    path = config_path()
    try:
        with open(path, "rb") as file:
            config = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RegistryError(f"{path} cannot be used: {error}", "fix or remove the file") from error
    if not isinstance(config, dict) or not isinstance(config.get("auths", {}), dict):
        raise RegistryError(f"{path} is not what `docker login` writes", "fix or remove the file")
    return config


def _write_config(config: dict[str, Any]) -> str:
    path = config_path()
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        # A link to a file elsewhere stays one.
        sysio.replace_file(os.path.realpath(path), json.dumps(config, indent=8).encode() + b"\n")
    except OSError as error:
        raise RegistryError(f"{path} cannot be written: {error.strerror}", "set DOCKER_CONFIG") from error
    return path


def _tell(helper: str, verb: str, text: str) -> None:
    program = f"docker-credential-{helper}"
    try:
        run = subprocess.run(
            [program, verb], input=text.encode(), capture_output=True, timeout=_HELPER_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RegistryError(
            f"the credential helper {program} failed: {error}", f"install it, or see {config_path()}"
        ) from error
    if run.returncode != 0:
        said = (run.stdout or run.stderr).decode("utf-8", "backslashreplace").strip()[:200]
        raise RegistryError(f"the credential helper {program} failed: {said}", f"see {config_path()}")


def find(host: str) -> Credentials:
    """Find the credentials for a registry.

    Args:
        host: Host name, with a port if it has one; ``docker.io`` for Docker Hub.
    """
    path = config_path()
    try:
        with open(path, "rb") as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return Credentials()
    except (OSError, ValueError) as error:
        return Credentials(problem=f"{path} cannot be used: {error}")
    keys = _keys(host)
    helpers = config.get("credHelpers")
    for key in keys:
        if isinstance(helpers, dict) and isinstance(helpers.get(key), str):
            return _ask(helpers[key], key)
    problem = ""
    store = config.get("credsStore")
    if isinstance(store, str) and store:
        credentials = _ask(store, keys[0])
        if credentials:
            return credentials
        problem = credentials.problem
    auths = config.get("auths")
    if isinstance(auths, dict):
        for key, entry in auths.items():
            if isinstance(entry, dict) and _host(key) in map(_host, keys):
                credentials = _entry(entry)
                if credentials or credentials.problem:
                    return credentials
    return Credentials(problem=problem)


def _host(key: str) -> str:
    """The host in a key of ``auths``, which may have a scheme and a path."""
    return key.partition("://")[2].partition("/")[0] if "://" in key else key.partition("/")[0]


def _entry(entry: dict[str, Any]) -> Credentials:
    token = entry.get("identitytoken")
    user, secret = entry.get("username"), entry.get("password")
    auth = entry.get("auth")
    if isinstance(auth, str) and auth:
        try:
            user, _, secret = base64.b64decode(auth, validate=True).decode().rstrip("\0").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return Credentials(problem=f"an auth entry in {config_path()} is not base64")
    if isinstance(token, str) and token:
        return Credentials(identity_token=token)
    if isinstance(user, str) and user and isinstance(secret, str):
        return Credentials(user, secret)
    return Credentials()


def _ask(helper: str, server: str) -> Credentials:
    program = f"docker-credential-{helper}"
    if "/" in helper:
        return Credentials(
            problem=f"{config_path()} names the credential helper {helper!r}, which is no name"
        )
    try:
        run = subprocess.run(
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=_HELPER_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        return Credentials(problem=f"the credential helper {program} is not installed")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Credentials(problem=f"the credential helper {program} failed: {error}")
    output = run.stdout.decode("utf-8", "backslashreplace").strip()
    if run.returncode != 0:
        if "credentials not found" in output:
            return Credentials()
        output = (output or run.stderr.decode("utf-8", "backslashreplace").strip())[:200]
        return Credentials(problem=f"the credential helper {program} failed: {output}")
    try:
        answer = json.loads(output)
        user, secret = answer["Username"], answer["Secret"]
        if not isinstance(user, str) or not isinstance(secret, str):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        return Credentials(problem=f"the credential helper {program} gave no proper answer")
    if user == "<token>":
        return Credentials(identity_token=secret)
    return Credentials(user, secret)
