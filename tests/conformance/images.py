"""The images that critest asks registries for, made of this machine's programs.

Same names and tags, same users, the same behaviour where a test looks: Debian's busybox (static), with ``ipcs`` and
``pgrep``, for the busybox images, Debian's nginx on top of it, a stand-in for Apache that says what Apache would. What
cannot be had so is the one image that is asked for by the digest of somebody else's build.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KUBERNETES = "registry.k8s.io/e2e-test-images"
STAGING = "gcr.io/k8s-staging-cri-tools"
PAUSE = "registry.k8s.io/pause:3.9"

_USERS = (
    "root:x:0:0:root:/root:/bin/sh\n"
    "www-data:x:33:33:www-data:/var/www:/bin/false\n"
    "default-user:x:1000:1000::/home/default-user:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"
)
_GROUPS = (
    "root:x:0:\nwww-data:x:33:\nusers:x:100:\ndefault-user:x:1000:\n"
    "group-defined-in-image:x:50000:default-user\nnogroup:x:65534:\n"
)
_NGINX_CONF = """\
worker_processes 1;
pid /var/run/nginx.pid;
error_log stderr;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
    server {{ listen {port}; root /srv; }}
}}
"""
# Prints what the image of the same name prints: whom a set-user-ID program runs as.
_NONEWPRIVS = """\
#include <stdio.h>
#include <unistd.h>
int main(void) { printf("Effective uid: %d\\n", geteuid()); return 0; }
"""


@dataclass
class Image:
    """One image.

    Attributes:
        files: What its own layer adds to busybox's: path -> (mode, content; None for a directory).
        links: Symbolic links in it.
        config: ``config`` of its configuration.
    """

    config: dict[str, Any]
    files: dict[str, tuple[int, bytes | None]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)


def wanted(work: Path) -> dict[str, Image]:
    """Every image by its name with tag.

    Args:
        work: An empty directory for what has to be compiled.

    Raises:
        RuntimeError: nginx or the compiler is missing.
    """
    path = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/"}
    shell = {**path, "Cmd": ["sh"]}
    etc: dict[str, tuple[int, bytes | None]] = {
        "etc/passwd": (0o644, _USERS.encode()),
        "etc/group": (0o644, _GROUPS.encode()),
    }
    tools = etc | _program("ipcs") | _program("pgrep")  # which Debian's busybox lacks
    page: tuple[int, bytes | None] = (0o644, b"<h1>It works</h1>\n")
    found = {
        f"{KUBERNETES}/busybox:1.29-2": Image(shell, tools),
        f"{KUBERNETES}/nonewprivs:1.3": Image(
            {**path, "Cmd": ["/nonewprivs"]}, etc | {"nonewprivs": (0o4755, _compiled(work, _NONEWPRIVS))}
        ),
        f"{KUBERNETES}/httpd:2.4.39-4": Image(
            {
                **path,
                "Cmd": ["sh", "-c", "echo 'stand-in for: httpd -D FOREGROUND'; exec httpd -f -p 80 -h /srv"],
            },
            etc | {"srv/index.html": page},
        ),
        PAUSE: Image({**path, "Cmd": ["tail", "-f", "/dev/null"]}),
        f"{STAGING}/test-image-predefined-group:latest": Image({**shell, "User": "1000"}, etc),
    }
    nginx = etc | tools | _program("nginx") | {"srv/index.html": page, "var/log/nginx": (0o755, None)}
    for name, port in ((f"{KUBERNETES}/nginx:1.14-2", 80), (f"{STAGING}/hostnet-nginx-amd64:latest", 12003)):
        conf = {"etc/nginx.conf": (0o644, _NGINX_CONF.format(port=port).encode())}
        command = ["nginx", "-c", "/etc/nginx.conf", "-g", "daemon off;"]
        found[name] = Image({**path, "Cmd": command}, nginx | conf, {"var/run": "../run"})
    for user, name in (
        ("1002", "uid"),
        ("www-data", "username"),
        ("1003:users", "uid-group"),
        ("www-data:100", "username-group"),
    ):
        found[f"{STAGING}/test-image-user-{name}:latest"] = Image({**shell, "User": user}, etc)
    tags = ["latest:latest", "tag:test", "tag:all", "1:latest", "2:latest", "3:latest"]
    for name in [*tags, *(f"tags:{number}" for number in (1, 2, 3))]:
        # The three tags of one repository are one image, all others differ.
        mark = "tags" if name.startswith("tags:") else name
        found[f"{STAGING}/test-image-{name}"] = Image(
            shell, {mark.replace(":", "-"): (0o644, mark.encode())}
        )
    return found


def write(image: Image, base: Path, target: Path) -> None:
    """Write an image as an OCI layout: the base's layer, and its own on top.

    Args:
        image: What it is to be.
        base: The layout of busybox (``tools/make-busybox-image``).
        target: The layout's directory; it must not exist.
    """
    shutil.copytree(base, target)
    blobs = target / "blobs/sha256"
    index = json.loads((target / "index.json").read_text())
    [entry] = index["manifests"]
    manifest = json.loads((blobs / entry["digest"].removeprefix("sha256:")).read_text())
    config = json.loads((blobs / manifest["config"]["digest"].removeprefix("sha256:")).read_text())
    if image.files or image.links:
        layer = _blob(blobs, _archive(image))
        manifest["layers"].append({"mediaType": "application/vnd.oci.image.layer.v1.tar", **layer})
        config["rootfs"]["diff_ids"].append(layer["digest"])
        config["history"].append({"created_by": "the conformance tests"})
    config["config"] = image.config
    manifest["config"].update(_blob(blobs, json.dumps(config, sort_keys=True).encode()))
    entry.update(_blob(blobs, json.dumps(manifest, sort_keys=True).encode()))
    (target / "index.json").write_text(json.dumps(index))


def _blob(blobs: Path, data: bytes) -> dict[str, Any]:
    name = hashlib.sha256(data).hexdigest()
    (blobs / name).write_bytes(data)
    return {"digest": f"sha256:{name}", "size": len(data)}


def _archive(image: Image) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for parent in _parents([*image.files, *image.links]):
            _add(tar, parent, 0o755, None)
        for name, (mode, content) in sorted(image.files.items()):
            _add(tar, name, mode, content)
        for name, target in sorted(image.links.items()):
            link = tarfile.TarInfo(name)
            link.type, link.linkname, link.mode = tarfile.SYMTYPE, target, 0o777
            tar.addfile(link)
    return out.getvalue()


def _parents(names: Iterable[str]) -> list[str]:
    return sorted({str(parent) for name in names for parent in Path(name).parents if str(parent) != "."})


def _add(tar: tarfile.TarFile, name: str, mode: int, content: bytes | None) -> None:
    info = tarfile.TarInfo(name)
    info.mode = mode
    if content is None:
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    else:
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _program(name: str) -> dict[str, tuple[int, bytes | None]]:
    """A program of this machine and the libraries that it is linked with."""
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is missing: make conformance's set-up unpacks it from Debian's package")
    said = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+) \(0x", said)
    found: dict[str, tuple[int, bytes | None]] = {f"usr/bin/{name}": (0o755, Path(path).read_bytes())}
    for library in libraries:
        found[library.lstrip("/")] = (0o755, Path(library).read_bytes())
    return found


def _compiled(work: Path, source: str) -> bytes:
    (work / "program.c").write_text(source)
    subprocess.run(["gcc", "-static", "-Os", "-s", "-o", work / "program", work / "program.c"], check=True)
    return (work / "program").read_bytes()
