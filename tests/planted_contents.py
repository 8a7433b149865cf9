"""Nasty images: modes, accounts, whiteouts, secrets and names."""

from __future__ import annotations

import json
import struct

import planted_files as made
from image_support import layer, member
from planted_files import TOKENS, entry, pem
from planted_images import Image, case, raw

# ---- attributes ----


@case
def set_uid() -> Image:
    members = [member(f"bin/{mode:o}", mode=mode) for mode in (0o4755, 0o2755, 0o6755, 0o755)]
    found = [
        ("set-uid", "/bin/4755"),
        ("set-gid", "/bin/2755"),
        ("set-uid", "/bin/6755"),
        ("set-gid", "/bin/6755"),
    ]
    return Image([layer(*members, member("srv", "dir", mode=0o2755))], found)


@case
def set_uid_by_a_later_layer() -> Image:
    first = layer(member("bin/a", content=b"x"), member("bin/b", content=b"x", mode=0o4755))
    second = layer(member("bin/a", content=b"x", mode=0o4755), member("bin/.wh.b"))
    return Image([first, second], [("set-uid", "/bin/a")], hidden=["/bin/a", "/bin/b"])


@case
def set_uid_under_a_second_name() -> Image:
    first = layer(member("bin/a", content=b"x", mode=0o4755))
    second = layer(member("usr/share/doc/b", "link", link="bin/a"))
    return Image([first, second], [("set-uid", "/bin/a"), ("set-uid", "/usr/share/doc/b")])


@case
def capabilities() -> Image:
    net_raw = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    rooted = struct.pack("<IIIIII", 0x03000001, 1 << 21, 0, 0, 0, 1000)
    values = {"ping": net_raw, "rooted": rooted, "odd": b"\1\0\0\2"}
    members = [
        entry(f"bin/{name}", records={"SCHILY.xattr.security.capability": value}, mode=0o755)
        for name, value in values.items()
    ]
    return Image([raw(*members)], [("file-capability", f"/bin/{name}") for name in values])


@case
def world_writable() -> Image:
    members = [
        member("etc/cron", content=b"x", mode=0o666), member("srv", "dir", mode=0o777),
        member("tmp", "dir", mode=0o1777), member("link", "symlink", link="tmp", mode=0o777),
        member("etc/group-writable", mode=0o664),
    ]  # fmt: skip
    return Image([layer(*members)], [("world-writable", "/etc/cron"), ("world-writable", "/srv")])


@case
def device_nodes() -> Image:
    members = [
        member("dev/sda", "block", device=(8, 0)), member("opt/.m", "char", device=(1, 1)),
        member("run/pipe", "fifo"),
    ]  # fmt: skip
    return Image(
        [layer(*members)],
        [("device-node", "/dev/sda"), ("device-node", "/opt/.m"), ("special-file", "/run/pipe")],
    )


@case
def accounts() -> Image:
    members = {
        "etc/passwd": b"root:x:0:0::/:/bin/sh\ntoor:x:0:0::/:/bin/sh\nguest::1000:1000::/:/bin/sh\n",
        "etc/shadow": b"root:*:1:\nme:$6$abc$def:1:\n",
        "etc/ld.so.preload": b"/opt/hook.so\n",
        "root/.ssh/authorized_keys": b"ssh-ed25519 AAAAC3Nza me@example.org\n",
        "etc/sudoers.d/me": b"# comment NOPASSWD\nme ALL=(ALL) NOPASSWD: ALL\n",
    }
    found = [
        ("account", "/etc/passwd"), ("account", "/etc/passwd"), ("account", "/etc/shadow"),
        ("preload", "/etc/ld.so.preload"), ("account", "/root/.ssh/authorized_keys"), ("account", "/etc/sudoers.d/me"),
    ]  # fmt: skip
    return Image([layer(*(member(name, content=data) for name, data in members.items()))], found)


# ---- whiteouts ----


@case
def whiteouts_as_they_should_be() -> Image:
    first = layer(*(member(f"d/{name}", content=b"x") for name in "ab"), member("e/f", content=b"x"))
    second = layer(member("d/.wh.a"), member(".wh.e"))
    third = layer(member("d", "dir"), member("d/new", content=b"x"), member("d/.wh..wh..opq"))
    return Image([first, second, third], hidden=["/d/a", "/d/b", "/e/f"])


@case
def odd_whiteouts() -> Image:
    first = layer(member("a", content=b"x"), member("d/b", content=b"x"))
    second = layer(
        member(".wh.nothing"), member(".wh.a", content=b"text"), member("nowhere/.wh.x"), member(".wh..wh.plnk", "dir"),
        member(".wh."), member("d/.wh..."), member("d/c", content=b"x"), member("d/.wh.c"),
    )  # fmt: skip
    paths = (
        "/.wh.nothing",
        "/.wh.a",
        "/nowhere/.wh.x",
        "/.wh..wh.plnk",
        "/.wh..wh.plnk",
        "/.wh.",
        "/d/.wh...",
        "/d/.wh.c",
    )
    return Image([first, second], [("odd-whiteout", path) for path in paths], hidden=["/a"])


@case
def opaque_in_the_lowest_layer() -> Image:
    data = layer(member("d/a", content=b"x"), member("d/.wh..wh..opq"))
    return Image([data], [("odd-whiteout", "/d/.wh..wh..opq")])


@case
def opaque_over_directories_that_are_listed_again() -> Image:
    first = layer(member("d/sub/old", content=b"x"), member("d/other/old", content=b"x"))
    second = layer(
        member("d", "dir"), member("d/sub", "dir"), member("d/sub/new", content=b"x", mode=0o4755),
        member("d/.wh..wh..opq"),
    )  # fmt: skip
    return Image([first, second], [("set-uid", "/d/sub/new")], hidden=["/d/sub/old", "/d/other/old"])


@case
def a_whiteout_behind_what_its_layer_has_below() -> Image:
    first = layer(member("d/sub/old", content=b"x", mode=0o4755))
    second = layer(member("d/sub/new", content=b"x", mode=0o4755), member("d/.wh.sub"))
    return Image([first, second], [("set-uid", "/d/sub/new")], hidden=["/d/sub/old"])


@case
def overlay_whiteouts() -> Image:
    first = layer(member("bin/su", content=b"x", mode=0o4755), member("d/x", content=b"x"))
    second = raw(
        entry("bin/su", kind=b"3"),
        entry("d/", kind=b"5", records={"SCHILY.xattr.trusted.overlay.opaque": b"y"}),
    )
    return Image([first, second], [("odd-whiteout", "/bin/su"), ("odd-whiteout", "/d")], hidden=["/bin/su"])


@case
def the_same_name_twice() -> Image:
    data = layer(
        member("etc/key", content=pem()), member("etc/key", content=b"harmless"),
        member("bin/x", content=b"x", mode=0o755), member("bin/x", content=b"x", mode=0o4755),
    )  # fmt: skip
    found = [
        ("odd-member", "/etc/key"),
        ("odd-member", "/bin/x"),
        ("secret", "/etc/key"),
        ("set-uid", "/bin/x"),
    ]
    return Image([data], found, hidden=["/etc/key", "/bin/x"])


# ---- secrets ----


@case
def private_keys() -> Image:
    kinds = ["RSA PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY", "PRIVATE KEY", "ENCRYPTED PRIVATE KEY",
             "DSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK"]  # fmt: skip
    files = {f"srv/{number}": pem(kind) for number, kind in enumerate(kinds)}
    files["srv/service.json"] = json.dumps({"private_key": pem("PRIVATE KEY").decode()}).encode()
    putty = "PuTTY-User-Key-" + "File-2: ssh-rsa\nEncryption: none\nPrivate-" + "Lines: 14\nAAAB\n"
    files["srv/key.ppk"] = putty.encode()
    return Image(
        [layer(*(member(name, content=data) for name, data in files.items()))],
        [("secret", f"/{name}") for name in files], text=(made.BODY,),
    )  # fmt: skip


@case
def tokens() -> Image:
    files = [member(f"srv/{name}", content=f"x = {text}\n".encode()) for name, text in TOKENS.items()]
    return Image(
        [layer(*files)],
        [("secret", f"/srv/{name}") for name in TOKENS],
        text=tuple(t[:30] for t in TOKENS.values()),
    )


@case
def passwords_in_settings() -> Image:
    value = made.BODY[:16]
    files = {
        "app/.env": f"DEBUG=1\nDB_PASSWORD={value}\n",
        "app/min.json": '{"user":"me","password":"' + value + '","x":1}',
        "root/.npmrc": f"//registry.example.org/:_authToken={value}\n",
        "root/.netrc": f"machine example.org login me password {value}\n",
        "root/.git-credentials": f"https://me:{value}@git.example.org\n",
        "root/.docker/config.json": '{"auths":{"r.example.org":{"auth":"' + value + '"}}}',
        "app/wp-config.php": f"define('DB_PASSWORD', '{value}');",
        "app/db.xml": f"<a><password>{value}</password></a>",
        "root/.bash_history": f"ls\nexport API_KEY={value}\n",
        "app/run.sh": f"#!/bin/sh\ncurl --token {value} http://example.org\n",
        "root/.aws/credentials": f"[default]\naws_secret_access_key = {value}\n",
        "app/database.yml": f"production:\n  url: postgres://me:{value}@db/x\n",
        "app/application.properties": f"spring.datasource.password={value}\n",
        "root/.kube/config.yaml": f"    client-key-data: {value}\n",
    }
    return Image(
        [layer(*(member(name, content=text.encode()) for name, text in files.items()))],
        [("secret", f"/{name}") for name in files], text=(value,),
    )  # fmt: skip


@case
def what_only_looks_like_secrets() -> Image:
    dashes = "-" * 5
    files = {
        "app/.env": "DB_PASSWORD=${DB_PASSWORD}\nTOKEN=\nSECRET=changeme\nSECRET_FILE=/run/secrets/token1\n",
        "app/code.py": f"if line.startswith('{dashes}BEGIN RSA PRIVATE KEY{dashes}'):\n    pass\n",
        "app/cert.pem": f"{dashes}BEGIN CERTIFICATE{dashes}\n{made.BODY * 8}\n{dashes}END CERTIFICATE{dashes}\n",
        "app/key.pub": f"{dashes}BEGIN PUBLIC KEY{dashes}\n{made.BODY * 8}\n{dashes}END PUBLIC KEY{dashes}\n",
        "app/readme.md": "http://user:password@example.org and AK" + "IAAAAAAAAAAAAAAAAA and sk-" + "ant-\n",
        "app/settings.json": '{"password": "{{ .Values.password1 }}", "tokens": 12345678901234}\n',
        "usr/share/doc/x.conf": f"password={made.BODY[:16]}\n",
    }
    library = made.elf(interpreter="", data=pem())
    members = [member(name, content=text.encode()) for name, text in files.items()]
    return Image([layer(*members, member("usr/lib/libtls.so", content=library))])


@case
def secrets_where_few_look() -> Image:
    key = TOKENS["aws"].encode()
    files = {
        "var/log/end-of-a-long.log": b"some line of a log\n" * 200_000 + b"key " + key + b"\n",
        "srv/data.sqlite": b"SQLite format 3\0" + bytes(5000) + b" " + key + bytes(90_000),
        "srv/program": made.elf(data=b" " + key + b" "),
        "srv/wide.txt": ("\ufeffpassword=" + made.BODY[:16] + "\r\n").encode("utf-16-le"),
        "srv/one-line.js": b"x" * 100_000 + b' = "' + key + b'";' + b"y" * 200_000,
    }
    return Image(
        [layer(*(member(name, content=data) for name, data in files.items()))],
        [("secret", f"/{name}") for name in files],
    )


@case
def a_secret_that_was_removed() -> Image:
    first = layer(
        member("root/.ssh/id_rsa", content=pem()), member("root/token", content=TOKENS["npm"].encode())
    )
    second = layer(member("root/.ssh/.wh.id_rsa"), member("root/token", content=b"none any more"))
    return Image(
        [first, second], [("secret", "/root/.ssh/id_rsa"), ("secret", "/root/token")],
        hidden=["/root/.ssh/id_rsa", "/root/token"],
    )  # fmt: skip


@case
def secrets_in_the_configuration() -> Image:
    value = made.BODY[:16]
    config = {
        "Env": [f"DB_PASSWORD={value}", f"OTHER={TOKENS['aws']}", "HOME=/root"],
        "Labels": {"note": f"token={value}1"},
        "Cmd": ["/bin/x", f"--password={value}2"],
    }
    history = [
        {"created_by": f"RUN curl -H 'Authorization: Bearer {TOKENS['github-p']}' https://example.org"}
    ]
    return Image(
        [layer(member("bin/x", content=made.elf(interpreter="", kind=3), mode=0o755))],
        [("secret-in-configuration", "")] * 5, config=config, more={"history": history},
        text=(value, TOKENS["aws"], TOKENS["github-p"]),
    )  # fmt: skip


# ---- names ----


@case
def markup_in_names() -> Image:
    good = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "&lt;b&gt;",
        "a b",
        "{{x}}",
        "'+1+'",
    ]
    odd = [
        b"new\nline",
        b"\x1b]0;title\x07",
        "turned\u202eround".encode(),
        "zero\u200bwidth".encode(),
        b"no\xffutf8",
    ]
    shown = ["new\nline", "\x1b]0;title\x07", "turned\u202eround", "zero\u200bwidth", "no\\xffutf8"]
    members = [entry(b"srv/" + name.encode().replace(b"/", b"_"), b"x", mode=0o666) for name in good]
    members += [entry(b"srv/" + name, b"x") for name in odd]
    return Image(
        [raw(*members)],
        [("world-writable", "/srv/" + name.replace("/", "_")) for name in good]
        + [("odd-name", "/srv/" + name) for name in shown],
    )


@case
def names_that_are_too_long() -> Image:
    deep, deeper, wide = "d/" * 1000 + "file", "e/" * 3000 + "file", "n" * 300
    members = [
        entry("x", b"x", records={"path": name.encode()}, mode=0o4755) for name in (deep, deeper, wide)
    ]

    def shown(name: str) -> str:
        return name if len(name) <= 500 else name[:500] + "..."

    return Image(
        [raw(*members)],
        [("set-uid", shown("/" + deep)), ("odd-name", shown(deeper)), ("odd-name", shown(wide))],
    )
