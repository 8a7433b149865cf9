"""Ten ordinary images for `kata inspect-image`, made of Debian's packages and of what this checkout has built.

What is right to say of each is found out here by other means: Python's tarfile, dpkg-query, rpm, importlib, Go's tool.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import planted_files as made
from image_support import layer, member
from planted_images import Finding, Image, Package, write

from kata.guest import packages

ROOT = Path(__file__).resolve().parents[2]
GO = ROOT / ".venv/bin/go"
PROGRAMS = Path(os.environ.get("KATA_CACHE_DIR", "/var/cache/kata")) / "programs"
SUITE = "bookworm"
LARGE = "python3,perl,git,openssl,curl,gdb-minimal,binutils,vim-tiny,python3-pip,python3-numpy"


class Ordinary(NamedTuple):
    """An image that nobody made to be nasty.

    Attributes:
        layout: Its OCI layout.
        findings: What its attributes are; of other kinds, only grave ones count as wrong.
        packages: Those of the kinds that are in `known`.
        known: Kinds of packages of which `packages` is the whole truth.
    """

    layout: Path
    findings: list[Finding]
    packages: list[Package]
    known: frozenset[str]


JUDGED = frozenset({"set-uid", "set-gid", "world-writable", "device-node", "special-file"})


def attributes(archive: Path) -> list[Finding]:
    """What tarfile says of modes and kinds."""
    names: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(archive) as tar:
        for one in tar:
            names["/" + one.name.removeprefix("./").strip("/")] = one
    found: list[Finding] = []
    for name, one in names.items():
        info = one
        if one.islnk():
            info = names["/" + one.linkname.removeprefix("./").strip("/")]
        if info.isreg():
            found += [("set-uid", name)] if info.mode & 0o4000 else []
            found += [("set-gid", name)] if info.mode & 0o2000 else []
            found += [("world-writable", name)] if info.mode & 0o002 else []
        elif info.isdir() and info.mode & 0o1002 == 0o002:
            found.append(("world-writable", name))
        elif info.ischr() or info.isblk():
            found.append(("device-node", name))
        elif info.isfifo():
            found.append(("special-file", name))
    return found


def packed(tree: Path, target: Path) -> Path:
    """A directory as an archive that belongs to root."""
    subprocess.run(
        ["tar", "-C", tree, "--owner=0", "--group=0", "--sort=name", "-cf", target, "."], check=True
    )
    return target


def made_of(
    archive: Path, layout: Path, found: list[Package], known: set[str], command: str = ""
) -> Ordinary:
    config = {"Cmd": [command]} if command else {}
    write(Image([archive.read_bytes()], config=config), layout)
    return Ordinary(layout, attributes(archive), found, frozenset(known))


def unpacked(tree: Path, *names: str) -> list[Path]:
    """Debian packages below a directory; their files."""
    files = []
    for name in names:
        path = packages.fetch(packages.describe(name), print)
        subprocess.run(["dpkg-deb", "-x", path, tree], check=True)
        files.append(Path(path))
    return files


def dpkg_says(status: Path) -> list[Package]:
    done = subprocess.run(
        ["dpkg-query", f"--admindir={status.parent}", "-W", "-f", "${db:Status-Abbrev} ${Package} ${Version}\n"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line.split() for line in done.stdout.splitlines()]
    return [("deb", row[1], row[2]) for row in rows if row[0].startswith("ii")]


def bootstrapped(work: Path, layout: Path, include: str = "") -> Ordinary:
    archive = work / "debian.tar"
    options = ["--variant=minbase", *([f"--include={include}"] if include else [])]
    command = ["mmdebstrap", *options, SUITE, str(archive)]
    subprocess.run(command, check=True)
    (work / "var/lib/dpkg").mkdir(parents=True)
    with tarfile.open(archive) as tar:
        status = tar.extractfile("./var/lib/dpkg/status")
        assert status is not None
        (work / "var/lib/dpkg/status").write_bytes(status.read())
    found = dpkg_says(work / "var/lib/dpkg/status")
    return made_of(archive, layout, found, {"deb"}, "/bin/bash")


def debian(work: Path, layout: Path) -> Ordinary:
    return bootstrapped(work, layout)


def debian_large(work: Path, layout: Path) -> Ordinary:
    return bootstrapped(work, layout, LARGE)


def distroless(work: Path, layout: Path) -> Ordinary:
    found = []
    for path in unpacked(work / "tree", "base-files", "libc6", "tzdata", "openssl", "ca-certificates"):
        text = subprocess.run(["dpkg-deb", "-f", path], capture_output=True, text=True, check=True).stdout
        fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line and line[0] != " ")
        target = work / "tree/var/lib/dpkg/status.d" / fields["Package"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        found.append(("deb", fields["Package"], fields["Version"]))
    return made_of(packed(work / "tree", work / "x.tar"), layout, found, {"deb"}, "/usr/bin/openssl")


def static(work: Path, layout: Path) -> Ordinary:
    (work / "x.tar").write_bytes(layer(member("busybox", content=busybox(), mode=0o755)))
    return made_of(
        work / "x.tar", layout, [], {"deb", "rpm", "apk", "pypi", "npm", "golang", "maven"}, "/busybox"
    )


def busybox() -> bytes:
    return Path("/usr/bin/busybox").resolve().read_bytes()


def alpine_like(work: Path, layout: Path) -> Ordinary:
    applets = subprocess.run(
        ["busybox", "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    names = {
        "musl": "1.2.5-r0",
        "busybox": "1.36.1-r29",
        "alpine-keys": "2.4-r1",
        "ssl_client": "1.36.1-r29",
    }
    members = [
        member("bin/busybox", content=busybox(), mode=0o755),
        *(member(f"bin/{name}", "symlink", link="/bin/busybox") for name in applets if name != "busybox"),
        member("lib/apk/db/installed", content="".join(made.apk(*one) for one in names.items()).encode()),
        member("etc/os-release", content=b'ID=alpine\nVERSION_ID=3.20.1\nPRETTY_NAME="Alpine Linux"\n'),
        member("etc/passwd", content=b"root:x:0:0:root:/root:/bin/sh\n"),
        member("tmp", "dir", mode=0o1777),
    ]
    (work / "x.tar").write_bytes(layer(*members))
    found = [("apk", *one) for one in names.items()]
    return made_of(work / "x.tar", layout, found, {"apk"}, "/bin/sh")


def fedora_like(work: Path, layout: Path) -> Ordinary:
    """A database that rpm itself has written."""
    tree = work / "tree"
    for name in ("first", "second", "third"):
        spec = work / f"{name}.spec"
        spec.write_text(
            f"Name: {name}\nVersion: 1.{len(name)}\nRelease: 3.fc40\nSummary: x\nLicense: MIT\nBuildArch: noarch\n"
            "%description\nx\n%files\n"
        )
        subprocess.run(["rpmbuild", "-bb", "--define", f"_topdir {work}/rpm", spec], check=True)
    common = ["--root", str(tree), "--dbpath", "/usr/lib/sysimage/rpm"]
    tree.mkdir()
    subprocess.run(["rpm", *common, "--initdb"], check=True)
    files = list((work / "rpm/RPMS").rglob("*.rpm"))
    subprocess.run(["rpm", *common, "-i", "--nodeps", "--justdb", "--nosignature", *files], check=True)
    done = subprocess.run(
        ["rpm", *common, "-qa", "--qf", "%{NAME} %{VERSION}-%{RELEASE}\n"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line.split() for line in done.stdout.splitlines()]
    found = [("rpm", row[0], row[1]) for row in rows]
    return made_of(packed(tree, work / "x.tar"), layout, found, {"rpm"})


def python_like(work: Path, layout: Path) -> Ordinary:
    [source] = (ROOT / ".venv/lib").glob("python3.*/site-packages")
    target = work / "tree/usr/lib/python3/site-packages"
    target.mkdir(parents=True)
    for one in importlib.metadata.distributions(path=[str(source)]):
        files = [source / file for file in one.files or [] if ".." not in file.parts]
        if sum(file.stat().st_size for file in files if file.exists()) > 4 << 20:
            continue
        for file in files:
            if file.exists():
                (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / file.relative_to(source))
    found = [
        ("pypi", one.metadata["Name"], one.version)
        for one in importlib.metadata.distributions(path=[str(target)])
    ]
    return made_of(packed(work / "tree", work / "x.tar"), layout, found, {"pypi"})


def node_like(work: Path, layout: Path) -> Ordinary:
    unpacked(
        work / "tree", "node-semver", "node-debug", "node-ms", "node-yallist", "node-lru-cache", "node-glob"
    )
    found = []
    for path in (work / "tree").rglob("package.json"):
        content = json.loads(path.read_text())
        if path.is_file() and not path.is_symlink() and content.get("name") and content.get("version"):
            found.append(("npm", content["name"], content["version"]))
    return made_of(packed(work / "tree", work / "x.tar"), layout, found, {"npm"})


def go_like(work: Path, layout: Path) -> Ordinary:
    target = work / "tree/usr/bin"
    target.mkdir(parents=True)
    found: list[Package] = []
    for path in [*PROGRAMS.glob("cri-tools-*/crictl"), *PROGRAMS.glob("nerdctl-*/nerdctl")]:
        shutil.copyfile(path, target / path.name)
        done = subprocess.run([GO, "version", "-m", path], capture_output=True, text=True, check=True)
        first, *lines = done.stdout.splitlines()
        found.append(("golang", "stdlib", first.split()[1]))
        for fields in (line.split() for line in lines):
            if fields[0] in ("mod", "dep"):
                found.append(("golang", fields[1], fields[2]))
            elif fields[0] == "=>":
                found[-1] = ("golang", fields[1], fields[2])
    return made_of(packed(work / "tree", work / "x.tar"), layout, found, {"golang"})


def java_like(work: Path, layout: Path) -> Ordinary:
    names = ("libcommons-lang3-java", "libcommons-io-java", "libguava-java", "libslf4j-java", "libgoogle-gson-java", "libjackson2-core-java")  # fmt: skip # noqa: E501
    unpacked(work / "tree", *names)
    return made_of(packed(work / "tree", work / "x.tar"), layout, [], set())


MAKERS: dict[str, Callable[[Path, Path], Ordinary]] = {
    "debian": debian, "debian-large": debian_large, "distroless": distroless, "static": static,
    "alpine-like": alpine_like, "fedora-like": fedora_like, "python": python_like, "node": node_like, "go": go_like,
    "java": java_like,
}  # fmt: skip


def ordinary(name: str, cache: Path) -> Ordinary:
    """Make an image, or take the one of an earlier run."""
    layout, facts = cache / name, cache / f"{name}.json"
    if not facts.exists():
        shutil.rmtree(layout, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            one = MAKERS[name](Path(work), layout)
        content = {"findings": one.findings, "packages": one.packages, "known": sorted(one.known)}
        facts.write_text(json.dumps(content))
    content = json.loads(facts.read_text())
    return Ordinary(
        layout, [(a, b) for a, b in content["findings"]], [(a, b, c) for a, b, c in content["packages"]],
        frozenset(content["known"]),
    )  # fmt: skip


def stored_layers(layout: Path) -> list[Path]:
    """The layers of an OCI layout with one image as they are stored, lowest first."""

    def blob(digest: str) -> Path:
        return layout / "blobs/sha256" / digest[7:]

    top = json.loads((layout / "index.json").read_text())["manifests"][0]
    manifest = json.loads(blob(top["digest"]).read_text())
    return [blob(one["digest"]) for one in manifest["layers"]]
