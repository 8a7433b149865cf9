"""Registry credentials, as stored by ``docker login``.

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
    keys = [_HUB, "index.docker.io", "docker.io", "registry-1.docker.io"] if host == "docker.io" else [host]
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
