"""``tools/kvm-lab``: run a command in the KVM lab."""

from __future__ import annotations

import argparse
import os
import sys

from kata import paths
from kata.errors import KataError
from kata.guest import packages
from kvmlab import assets, machine, session

MARK = "KVM_LAB"
"""Set in the environment of what runs in the lab."""
# What belongs to the caller's session and means nothing in another machine.
_LEFT_OUT = (
    "DBUS_",
    "SSH_",
    "XDG_RUNTIME",
    "XDG_SESSION",
    "NOTIFY_SOCKET",
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
)

_TEXT = """\
Run a command in the KVM lab: an emulated machine with emulated AMD-V, in which a Linux kernel offers a
working /dev/kvm and /dev/vhost-vsock. It sees this machine's files and programs; what it writes is gone
afterwards. Everything in it is ten to thirty times slower than here.

Exit status: the command's; 124 after the deadline; 125 when the lab itself failed."""
_GET = "bring a file or directory back, also when the command fails; DEST is its name here"
_FREEZE = "give the lab a copy of a file or directory as it is now, so that it may be edited during the run"
_NETWORK = "none; an interface that leads nowhere (the default); or this machine's network"


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="kvm-lab",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    size = machine.default_size()
    add = made.add_argument
    add("command", nargs="*", metavar="COMMAND", help="what to run, as words; after -- if it has options")
    add("--shell", action="store_true", help="give the command this terminal; without a command: a shell")
    add("--stdin", action="store_true", help="pass standard input on (it is empty otherwise)")
    add("--timeout", type=_seconds, default=0.0, metavar="S", help="end the command after so many seconds")
    add("--get", action="append", default=[], metavar="PATH[:DEST]", help=_GET)
    add("--freeze", action="append", default=[], metavar="PATH", help=_FREEZE)
    add("--memory", type=int, default=size.memory_mib, metavar="MIB", help="memory of the lab (%(default)s)")
    add(
        "--cpus",
        type=int,
        default=size.cpus,
        metavar="N",
        help="processors of the lab (%(default)s); with more, QEMU up to 7.2 at least may hang now and then",
    )
    add("--modules", action="append", default=[], metavar="NAME,...", help="load more kernel modules")
    add("--network", choices=("none", "isolated", "open"), default="isolated", help=_NETWORK)
    add("-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable")
    add("-C", "--directory", default=os.getcwd(), metavar="DIR", help="where to run the command (here)")
    add("--log", default="", metavar="FILE", help="write the end of the lab's console there")
    add("-v", "--verbose", action="store_true", help="say how long the start took, show the console")
    add("--renew", action="store_true", help="look for a newer kernel package first")
    add("--check", action="store_true", help="only say whether a lab can run here (0) or why not (1)")
    add("--prepare", action="store_true", help="only fetch and make what a lab needs")
    return made


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e7:
        raise ValueError
    return value


def main(arguments: list[str]) -> int:
    """Run the tool; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        return _main(options)
    except KataError as error:
        print(f"kvm-lab: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return session.EXIT_LAB


def _main(options: argparse.Namespace) -> int:
    why_not = machine.obstacle()
    if not why_not and not assets.available() and not packages.have_apt():
        why_not = "there is no apt to fetch the lab's kernel with"
    if options.check:
        print(why_not or "a KVM lab can run here")
        return 1 if why_not else 0
    if why_not:
        print(f"kvm-lab: {why_not}", file=sys.stderr)
        return session.EXIT_LAB
    made = assets.build(lambda text: print(f"kvm-lab: {text}", file=sys.stderr), options.renew)
    if options.prepare:
        return 0
    request = _request(options)
    size = machine.Size(options.memory, options.cpus)
    with machine.Machine(made, size, options.network, options.log) as lab:
        run = session.Session(lab, request)
        try:
            code = run.run()
        except KataError:
            lab.drain_console()
            lab.report()
            raise
        if options.verbose:
            lab.drain_console()
            lab.report()
            print(f"kvm-lab: the command was started after {run.started_after_s:.1f} s", file=sys.stderr)
        elif code == session.EXIT_TIMEOUT:
            lab.drain_console()
            lab.report(20)
    for text in run.missing:
        print(f"kvm-lab: cannot bring back {text}", file=sys.stderr)
    return code or (session.EXIT_LAB if run.missing else 0)


def _request(options: argparse.Namespace) -> session.Request:
    command = options.command or (["bash", "-i"] if options.shell else [])
    if not command:
        parser().error("no command; --shell gives a shell")
    env = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OUT)}
    env |= {"PATH": env.get("PATH") or os.defpath, "HOME": env.get("HOME") or "/root", MARK: "1"}
    for setting in options.env:
        name, equals, value = setting.partition("=")
        if not (name and equals):
            parser().error(f"--env {setting!r} is not NAME=VALUE")
        env[name] = value
    directory = os.path.abspath(options.directory)
    return session.Request(
        command,
        cwd=directory,
        env=env,
        frozen=[os.path.abspath(path) for path in options.freeze],
        # Sparse files in there look full to a lab, and are copied as such.
        fresh=[os.path.join(paths.cache_dir(), "ext4")],
        modules=[name for names in options.modules for name in names.split(",") if name],
        get=[_get(text) for text in options.get],
        terminal=options.shell,
        stdin=options.stdin,
        network=options.network != "none",
        timeout_s=options.timeout,
    )


def _get(text: str) -> tuple[str, str]:
    path, _colon, target = text.partition(":")
    return path, os.path.abspath(target or os.path.basename(path.rstrip("/")))
