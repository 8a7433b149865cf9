"""Nasty images: package databases that are whole, broken or hidden."""

from __future__ import annotations

import planted_files as made
from image_support import layer, member
from planted_images import Image, case

DEBS = [("deb", name, "1.0-1") for name in ("bash", "sudo", "libc6")]
STATUS = "".join(made.deb(name) for _, name, _ in DEBS).encode()


@case
def dpkg_whole() -> Image:
    text = STATUS.decode() + made.deb("gone", status="deinstall ok config-files")
    return Image([layer(member("var/lib/dpkg/status", content=text.encode()))], packages=DEBS)


@case
def dpkg_broken() -> Image:
    return Image([layer(member("var/lib/dpkg/status", content=b"\xff\xfe\x00garbage\n" * 50))],
                 [("bad-database", "/var/lib/dpkg/status")])  # fmt: skip


@case
def dpkg_in_parts() -> Image:
    members = [
        member(f"var/lib/dpkg/status.d/{name}", content=f"Package: {name}\nVersion: {version}\n".encode())
        for _, name, version in DEBS
    ]
    return Image(
        [layer(*members, member("var/lib/dpkg/status.d/bash.md5sums", content=b"Package: no\n"))],
        packages=DEBS,
    )


@case
def dpkg_taken_away() -> Image:
    first = layer(member("var/lib/dpkg/status", content=STATUS))
    second = layer(member("var/lib/dpkg/.wh.status"))
    return Image(
        [first, second], [("hidden-database", "/var/lib/dpkg/status")], hidden=["/var/lib/dpkg/status"]
    )


@case
def dpkg_emptied() -> Image:
    members = [
        member(f"var/lib/dpkg/info/{name}.list", content=b"/.\n") for name in ("bash", "sudo", "libc6:amd64")
    ]
    return Image([layer(*members, member("var/lib/dpkg/status", content=made.deb("bash").encode()))],
                 [("bad-database", "/var/lib/dpkg/status")], DEBS[:1])  # fmt: skip


@case
def databases_behind_links() -> Image:
    data = layer(
        member("opt/.cache/x", content=STATUS), member("var/lib/dpkg", "symlink", link="/opt/.cache"),
        member("opt/.cache/status", "symlink", link="x"), member("opt/notes", content=STATUS),
        member("lib", "symlink", link="usr/lib"), member("usr/lib/apk/db", "symlink", link="/srv/a"),
        member("srv/a/installed", content=made.apk("musl").encode()),
    )  # fmt: skip
    return Image([data], packages=[*DEBS, ("apk", "musl", "1.0-r0")])


@case
def a_second_root() -> Image:
    data = layer(
        member("var/lib/machines/x/var/lib/dpkg/status", content=STATUS),
        member("opt/root/lib/apk/db/installed", content=made.apk("musl").encode()),
    )
    return Image([data], packages=[*DEBS, ("apk", "musl", "1.0-r0")])


@case
def apk_whole_and_broken() -> Image:
    good = (made.apk("musl", "1.2.5-r0") + made.apk("busybox")).encode()
    first = layer(member("lib/apk/db/installed", content=good))
    second = layer(member("usr/lib/apk/db/installed", content=b"no paragraph\n"))
    return Image([first, second], [("bad-database", "/usr/lib/apk/db/installed")],
                 [("apk", "musl", "1.2.5-r0"), ("apk", "busybox", "1.0-r0")])  # fmt: skip


RPMS = [made.rpm_header(f"package-{number}", "1.0", f"{number}.fc40") for number in range(60)]
LARGE = "large" + "x" * 50
RPM_NAMES = [("rpm", f"package-{number}", f"1.0-{number}.fc40") for number in range(60)]


@case
def rpm_in_sqlite() -> Image:
    large = made.rpm_header(LARGE, "1" * 200, "1", epoch=2) + bytes(20_000)
    key = made.rpm_header("gpg-pubkey", "1", "1")
    database = made.rpm_sqlite(*RPMS, large, key)
    return Image([layer(member("var/lib/rpm/rpmdb.sqlite", content=database))],
                 packages=[*RPM_NAMES, ("rpm", "gpg-pubkey", "1-1"), ("rpm", LARGE, f"2:{'1' * 200}-1")])  # fmt: skip


@case
def rpm_broken() -> Image:
    database = made.rpm_sqlite(*RPMS)
    return Image([layer(member("usr/lib/sysimage/rpm/rpmdb.sqlite", content=database[: len(database) // 2]))],
                 [("bad-database", "/usr/lib/sysimage/rpm/rpmdb.sqlite")])  # fmt: skip


@case
def rpm_in_ndb() -> Image:
    return Image(
        [layer(member("usr/lib/sysimage/rpm/Packages.db", content=made.rpm_ndb(*RPMS)))], packages=RPM_NAMES
    )


@case
def python_packages() -> Image:
    base = "usr/lib/python3/site-packages"
    files = {
        f"{base}/requests-2.31.0.dist-info/METADATA": "Name: requests\nVersion: 2.31.0\n\nText\n",
        f"{base}/old.egg-info": "Name: old\nVersion: 1.0\n",
        f"{base}/other.egg-info/PKG-INFO": "Name: other\nVersion: 2.0\n",
        f"{base}/broken.dist-info/METADATA": "\x00\x01\x02",
        "opt/.venv/lib/x-3.dist-info/METADATA": "Name: x\r\nVersion: 3\r\n\r\nName: no\n",
    }
    return Image(
        [layer(*(member(name, content=text.encode()) for name, text in files.items()))],
        packages=[
            ("pypi", "requests", "2.31.0"),
            ("pypi", "old", "1.0"),
            ("pypi", "other", "2.0"),
            ("pypi", "x", "3"),
        ],
    )


@case
def npm_packages() -> Image:
    files = {
        "app/node_modules/a/package.json": '{"name": "a", "version": "1.0.0", "license": "MIT"}',
        "app/node_modules/@s/b/package.json": '\ufeff{"name": "@s/b", "version": "2.0.0"}',
        "app/node_modules/a/node_modules/c/package.json": '{"version": "3.0.0", "name": "c", "dependencies": {}}',
        "app/node_modules/d/package.json": '{"name": "d", "version"',
        "app/node_modules/e/package.json": '{"name": "e"}',
        "app/node_modules/f/package.json": "[" * 100_000,
    }
    return Image(
        [layer(*(member(name, content=text.encode()) for name, text in files.items()))],
        packages=[("npm", "a", "1.0.0"), ("npm", "@s/b", "2.0.0"), ("npm", "c", "3.0.0")],
    )


MODULES = "path\tx\nmod\texample.org/x\tv1.0.0\th1:\ndep\ta.org/b\tv2.0.0\n=>\tc.org/d\tv3.0.0\n"
GO = [("golang", "example.org/x", "v1.0.0"), ("golang", "c.org/d", "v3.0.0")]


@case
def go_programs() -> Image:
    record = made.go_record(MODULES)
    files = {
        "bin/new": made.elf(data=record),
        "bin/far": made.elf(data=bytes(3 << 20) + record),
        "bin/old": made.old_go_program(MODULES),
        "bin/windows.exe": b"MZ" + bytes(1022) + record,
    }
    stdlib = [("golang", "stdlib", "go1.22.3")] * 3 + [("golang", "stdlib", "go1.16.5")]
    return Image([layer(*(member(name, content=data) for name, data in files.items()))],
                 [("elf-no-pie", "/bin/old")], GO * 4 + stdlib)  # fmt: skip


@case
def java_archives() -> Image:
    inner = made.jar(made.pom("org.x", "inner", "1.2") | made.MANIFEST)
    shaded = made.pom("org.x", "one", "1") | made.pom("org.x", "two", "2")
    files = {
        "opt/app-9.war": made.jar({**made.MANIFEST, "WEB-INF/lib/inner-1.2.jar": inner, "META-INF/x": b""}),
        "opt/hidden.bin": made.jar(made.MANIFEST | made.pom("org.x", "hidden", "3")),
        "opt/start.jar": made.jar(
            made.MANIFEST | made.pom("org.x", "start", "4"), before=b"#!/bin/sh\nexit\n"
        ),
        "opt/shaded-7.jar": made.jar(made.MANIFEST | shaded),
        "opt/broken.jar": b"PK\3\4" + bytes(100),
        "opt/CAPITALS-1.0.JAR": made.jar(made.MANIFEST),
        "opt/notes.zip": made.jar({"readme.txt": b"x"}),
    }
    names = [("org.x:inner", "1.2"), ("app", "9"), ("org.x:hidden", "3"), ("org.x:start", "4"), ("org.x:one", "1"),
             ("org.x:two", "2"), ("shaded", "7"), ("CAPITALS", "1.0")]  # fmt: skip
    return Image(
        [layer(*(member(name, content=data) for name, data in files.items()))],
        [("bad-database", "/opt/broken.jar")], [("maven", *name) for name in names],
    )  # fmt: skip
