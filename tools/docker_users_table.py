"""Writes docs/docker-users.md: commands and options of Docker and Podman, and what `kata` has for each.

Usage: docker_users_table.py [--check | --renew]; with --check it writes nothing, and exits with 1 where the page
differs. With --renew it first asks the help of the `docker` and `podman` on PATH for their commands and options, and
keeps them in tools/docker_words.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module

from made_page import ROOT, write_or_check

sys.path.insert(0, str(ROOT / "src"))

from kata.cli import words
from kata.cli.main import COMMANDS

PAGE = ROOT / "docs" / "docker-users.md"
WORDS = ROOT / "tools" / "docker_words.json"
CLIENTS = ("docker", "podman")
HEAD = """# For people who come from Docker and Podman

`kata` takes their commands and options where a container in a machine of its own can have them; what it has not is
answered with what to do instead, and exits with 125. This page is made of the sources by `tools/docker_users_table.py`,
and of the help of the versions named in the tables; change it there.

## What differs

* Errors of `kata` itself exit with 125, those of usage included; what cannot be removed (`rm`, `rmi`, `volume rm`,
  `network rm`) with 1. For all else Docker exits with 1 and Podman with 125.
* Container ids have 32 digits.
* `kata run -d` prints the whole id, as they do. Progress and hints go to stderr.
* `--memory-swap` can only be the same as `-m`: the machine has no swap.
  `--cpuset-cpus` means nothing to a machine with processors of its own: `--cpus N` is how many it has.
* A network with a name is for the containers of `kata run`; the host is no member of it, and `eth0` in the container is
  the way out, `eth1` the network ([networks](networks.md)).
* A volume with a name is a disk: one running container at a time has it (what containers share is a directory,
  `-v ./DIR:/path`), its size is set when it is made (10 GiB, sparse), and `Mountpoint` is its file. `volume-nocopy`,
  filling from the image and `kata volume prune` are as in Docker.
* The layers of an image are not kept when it is fetched, only their outcome. So `commit`, `save` and `push` make
  an image of one layer with all files; its configuration is the same, its id another one.
* `--init` needs a program of this host without libraries (`apt-get install catatonit`, or `tini-static`).
* `-P` chooses the ports when the container is made, not at each start.
* `NetworkSettings.IPAddress` is empty: the machine's address is not one that the host can reach; ports are published.
* `--security-opt` takes `no-new-privileges`, `seccomp=unconfined`, `systempaths=unconfined`, and what asks for no
  AppArmor or SELinux, since the guest's kernel has neither.

## Templates

`--format` of `ps`, `images` and `inspect` takes this part of Go's templates: `{{.A.B}}`, `{{.}}`, `{{$}}`, variables
(`{{$x := ...}}`), strings, numbers, `true`, `false`, `nil`; `if`, `else if`, `else`, `range` (also with
`$key, $value :=`), `with`, `end`; pipes, parentheses, `{{-` and `-}}`, comments; and the functions
FUNCTIONS.
There are no `define`, `template` and `block`. `ps` and `images` take `table TEMPLATE` and `json` (one object a line);
`inspect` takes `json`. A field that is not there is an error that lists those that are; labels and ports that are not
there are `<no value>`.

"""


def commands_of(client: str) -> dict[str, list[str]]:
    """The commands of `docker` or `podman` -> their options, from their help."""

    def help_of(*arguments: str) -> str:
        return subprocess.run(
            [client, *arguments, "--help"], capture_output=True, text=True, check=True
        ).stdout

    found = {}
    for line in help_of().splitlines():
        entry = re.fullmatch(r"  ([a-z][a-z-]*)\*? {2,}\S.*", line)
        if entry and entry[1] != "help":
            text = help_of(entry[1])
            found[entry[1]] = [
                name
                for option in re.findall(r"^ +((?:-\w, )?--[a-z][a-z0-9-]*)", text, re.MULTILINE)
                for name in option.split(", ")
                if name not in ("--help",)
            ]
    return found


def renew() -> None:
    """Ask both clients, and keep what they say."""
    kept = {}
    for client in CLIENTS:
        version = subprocess.run([client, "--version"], capture_output=True, text=True, check=True).stdout
        kept[client] = {"version": re.search(r"\d+[\d.]*\d", version)[0], "commands": commands_of(client)}  # type: ignore[index]
    WORDS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def has(command: str, option: str) -> bool:
    """Whether a command of kata has an option."""
    grammar = import_module(f"kata.cli.{COMMANDS[command][0]}").COMMANDS[command]
    return any(option in one.names for one in grammar.options)


def row(command: str, option: str) -> str:
    """What kata has for an option of a command that it has: ``yes``, or what to do instead."""
    if has(command, option):
        return "yes"
    return words.about_option(command, option)


def page() -> str:
    """The whole page."""
    from kata.cli import template

    known = json.loads(WORDS.read_text())
    functions = ", ".join(f"`{name}`" for name in sorted(template._FUNCTIONS))
    lines = [HEAD.replace("FUNCTIONS", functions)]
    versions = " and ".join(f"{client.capitalize()} {known[client]['version']}" for client in CLIENTS)
    lines += [f"## Commands of {versions}", "", "| command | docker | podman | kata |", "|---|---|---|---|"]
    both = [known[client]["commands"] for client in CLIENTS]
    shared = []
    for name in sorted({*both[0], *both[1]}):
        own = words.command([name])[0]
        if own in COMMANDS:
            said = "yes" if own == name else f"`{own}`"
            shared.append((name, own))
        else:
            group = "yes, as a group of commands" if name in words.GROUPS else "no"
            said = escaped(words.about_command(name)) or group
        marks = " | ".join("yes" if name in theirs else "" for theirs in both)
        lines.append(f"| `{name}` | {marks} | {said} |")
    for name, own in shared:
        options = sorted(
            {option for theirs in both for option in theirs.get(name, ()) if option.startswith("--")}
        )
        if not options:
            continue
        lines += [
            "",
            f"## Options of `{name}`",
            "",
            "| option | docker | podman | kata |",
            "|---|---|---|---|",
        ]
        for option in options:
            marks = " | ".join("yes" if option in theirs.get(name, ()) else "" for theirs in both)
            lines.append(f"| `{option}` | {marks} | {escaped(row(own, option)) or 'no'} |")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """A text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    if "--renew" in sys.argv[1:]:
        renew()
    sys.exit(write_or_check(PAGE, page()))
