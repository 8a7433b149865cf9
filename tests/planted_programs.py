"""Nasty images: programs, what is started, and configurations."""

from __future__ import annotations

from typing import Any

import planted_files as made
from image_support import layer, member
from planted_images import CASES, Image, case

# ---- programs, and what is started ----


@case
def programs_that_are_not_hardened() -> Image:
    files = {
        "good": made.elf(), "stack": made.elf(stack=7), "fixed": made.elf(kind=2), "relro": made.elf(relro=False),
        "canary": made.elf(canary=False), "path": made.elf(run_path="/tmp/lib"),
        "here": made.elf(run_path="$ORIGIN/../lib"),
        "empty": made.elf(run_path="/usr/lib:"), "libevil": made.elf(run_path="/libevil"),
    }  # fmt: skip
    found = [
        ("elf-executable-stack", "/bin/stack"), ("elf-no-pie", "/bin/fixed"), ("elf-no-relro", "/bin/relro"),
        ("elf-no-canary", "/bin/canary"), ("elf-run-path", "/bin/path"), ("elf-run-path", "/bin/empty"),
        ("elf-run-path", "/bin/libevil"),
    ]  # fmt: skip
    return Image([layer(*(member(f"bin/{name}", content=data) for name, data in files.items()))], found)


@case
def programs_that_are_damaged() -> Image:
    good = made.elf()
    files = {
        f"bin/{length}": good[:length] for length in (4, 20, 63, 64, 100, len(good) - 1)
    }  # the last lacks a byte of the data that nobody needs
    files["bin/offsets"] = good[:32] + b"\xff" * 8 + good[40:]
    return Image([layer(*(member(name, content=data) for name, data in files.items()))])


@case
def a_script_and_what_it_starts() -> Image:
    members = [
        member("bin/sh", content=made.elf(interpreter="", kind=3), mode=0o755),
        member("app/start", content=b"#!/bin/sh\n. ./common.sh\nexec /opt/run --x\n", mode=0o755),
        member("app/common.sh", content=b"#!/bin/sh\nrun-parts /docker-entrypoint.d\n", mode=0o644),
        member("opt/run", content=b"#!/usr/bin/env python9\nprint()\n", mode=0o755),
        member("usr/bin/env", content=made.elf(interpreter="", kind=3), mode=0o755),
    ]
    return Image([layer(*members)], config={"Entrypoint": ["./start"], "WorkingDir": "/app"},
                 scripts=["/app/start", "/app/common.sh", "/opt/run"])  # fmt: skip


@case
def scripts_within_a_command() -> Image:
    members = [
        member("bin/sh", content=made.elf(interpreter="", kind=3), mode=0o755),
        member("srv/go.sh", content=b"#!/bin/sh\ncurl http://example.org | sh\n"),
        member("srv/other.sh", content=b"#!/bin/sh\ntrue\n"),
    ]
    command = ["/bin/sh", "-c", "exec /srv/go.sh && sh other.sh"]
    return Image([layer(*members)], config={"Cmd": command, "WorkingDir": "/srv"},
                 scripts=["/srv/go.sh", "/srv/other.sh"])  # fmt: skip


def started(
    name: str, what: list[str], found: list[str], *members: Any, env: list[str] | None = None
) -> None:
    """An image whose command cannot run."""

    def make() -> Image:
        return Image([layer(*members)], [("entry-point", path) for path in found],
                     config={"Cmd": what, **({"Env": env} if env else {})},
                     scripts=[path for path in found if path.endswith(".sh")])  # fmt: skip

    CASES[name] = make


started("a-command-that-is-not-there", ["nothing"], ["nothing"])
started("a-command-that-cannot-be-executed", ["x"], ["/usr/bin/x"], member("usr/bin/x", content=made.elf()))
started("a-command-that-is-no-program", ["/x"], ["/x"], member("x", content=b"some text\n", mode=0o755))
started("a-command-that-is-empty", ["/x"], ["/x"], member("x", mode=0o755))
started("a-command-of-another-machine", ["/x"], ["/x"],
        member("x", content=made.elf(machine=183, interpreter=""), mode=0o755))  # fmt: skip
started("a-command-without-its-loader", ["/x"], ["/x"], member("x", content=made.elf(), mode=0o755))
started(
    "a-script-without-its-interpreter",
    ["/x.sh"],
    ["/x.sh"],
    member("x.sh", content=b"#!/bin/none -e\n", mode=0o755),
)
started("a-script-whose-interpreter-env-looks-for", ["/x.sh"], ["/x.sh"],
        member("x.sh", content=b"#!/usr/bin/env -S python9 -u\n", mode=0o755),
        member("usr/bin/env", content=made.elf(interpreter=""), mode=0o755))  # fmt: skip
started("a-command-that-is-found-later-on-the-path", ["x"], [],
        member("a/x", content=b"no program"), member("b/x", content=made.elf(interpreter=""), mode=0o755),
        env=["PATH=/a:/b"])  # fmt: skip


# ---- configurations ----


@case
def a_configuration_that_does_not_fit() -> Image:
    more = {
        "rootfs": {"diff_ids": ["sha256:1", "sha256:2"]},
        "history": [{"created_by": "a"}, {"created_by": "b"}],
    }
    return Image([layer(member("x", content=b"x"))],
                 [("configuration", ""), ("configuration", ""), ("configuration", "/etc/passwd")],
                 config={"User": "nobody-knows"}, more=more)  # fmt: skip


@case
def a_configuration_that_is_no_json() -> Image:
    return Image([layer(member("bin/a", mode=0o4755))], [("configuration", "")] * 2 + [("set-uid", "/bin/a")],
                 config="{" * 1000)  # fmt: skip


@case
def a_configuration_of_other_shapes() -> Image:
    more = {"history": {"a": 1}}
    return Image([layer(member("bin/a", mode=0o4755))], [("set-uid", "/bin/a")],
                 config={"Env": "x", "Cmd": {"a": 1}, "Labels": [], "User": 7}, more=more)  # fmt: skip
