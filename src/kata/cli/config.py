"""`kata config`: shows the configuration and where it comes from, and checks a file."""

from __future__ import annotations

from kata.cli import table
from kata.cli.args import Command, Option
from kata.config import annotations as pod
from kata.config import files, keys
from kata.engine.machine import SECRET
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.args import Arguments
    from kata.config.files import Configuration
    from kata.config.keys import Key

COMMANDS = {
    "config": Command(
        "config",
        "show|check [FILE]",
        "Shows the configuration that a sandbox would be started with, or checks a configuration file.",
        [
            Option(
                "--origin", "", "'show': where each value was set: file and line, annotation, or default"
            ),
            Option("--config", "FILE", "'show': the configuration file, like containerd's ConfigPath"),
            Option("--annotation", "NAME=VALUE", "'show': apply this annotation of a pod", many=True),
            Option("--json", "", "print JSON"),
        ],
        least=1,
        most=2,
        notes="Files: --config, $KATA_CONF_FILE, " + ", ".join(files.PLACES) + ": the first of them,\n"
        "and then config.d/*.toml beside it. docs/configuration.md describes every key.\n"
        "'check' reads only FILE (or, without it, all files that would be read), fails on errors, and lists keys that\n"
        "are accepted but have no effect.",
    ),
}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str | list | dict) else str(value)


def _annotations(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--annotation {text!r} is not NAME=VALUE")
        found[name] = value
    return found


def _row(key: Key, conf: Configuration) -> dict[str, Any]:
    is_set = key.full_name in conf.values
    value = conf.get(key.full_name)
    if value and key.full_name in SECRET:
        value = "(not shown)"
    return {
        "table": key.table,
        "key": key.name,
        "value": value if is_set else None,
        "default": key.default,
        "origin": conf.origin(key.full_name),
        "effect": key.acts(value),
        "reason": "" if key.acts(value) else key.text,
    }


def _show(arguments: Arguments) -> int:
    if len(arguments.rest) > 1:
        raise UsageError("'kata config show' takes no argument", "the file is an option: --config FILE")
    conf = pod.load(arguments.value("config") or "", _annotations(arguments.many("annotation")))
    hypervisor = str(conf.get("runtime.hypervisor_name", ""))
    rows = [
        _row(key, conf)
        for name in keys.KEYS
        if (key := keys.find(name, hypervisor)) is not None
        and (key.status == keys.ACTS or name in conf.values)
    ]
    if arguments.flag("json"):
        table.show_json([{"files": conf.files, "settings": rows}])
        return 0
    for path in conf.files:
        print(f"# {path}")
    if not conf.files:
        print("# no configuration file; defaults")
    current = ""
    for row in rows:
        if row["table"] != current:
            current = row["table"]
            print(f"\n[{current}]")
        shown = (
            _text(row["value"])
            if row["value"] is not None
            else row["default"].replace("`", "") or "(nothing)"
        )
        line = f"{row['key']} = {shown}" if row["value"] is not None else f"# {row['key']}: {shown}"
        comments = [row["origin"]] if arguments.flag("origin") else []
        if row["reason"] and row["value"] is not None and not row["effect"]:
            comments.append(f"no effect: {row['reason']}")
        print(f"{line:<48}  # {'; '.join(comments)}" if comments else line)
    return 0


def _check(arguments: Arguments) -> int:
    for name in ("origin", "config", "annotation"):
        if arguments.many(name) or arguments.value(name) or arguments.flag(name):
            raise UsageError(f"--{name} belongs to 'kata config show'")
    if len(arguments.rest) > 1:
        conf = files.read([arguments.rest[1]])
    else:
        path = files.main_file()
        if not path:
            raise UsageError(
                "there is no configuration file to check",
                "kata config check FILE; places: " + ", ".join(files.PLACES),
            )
        conf = files.read(files.all_files(path))
    hypervisor = str(conf.get("runtime.hypervisor_name", ""))
    rows = [_row(key, conf) for name in conf.values if (key := keys.find(name, hypervisor)) is not None]
    idle = [row for row in rows if not row["effect"]]
    if arguments.flag("json"):
        table.show_json([{"files": conf.files, "settings": rows}])
        return 0
    for row in idle:
        print(f"{row['origin']}: [{row['table']}] {row['key']}: accepted, has no effect: {row['reason']}")
    # The remaining sentences are about several keys; single ones were listed above.
    of_keys = files.without_effect({name: conf.get(name) for name in conf.values}, hypervisor)
    for note in conf.notes:
        if note not in of_keys:
            print(note)
    print(f"{', '.join(conf.files)}: {len(rows)} keys, {len(rows) - len(idle)} in effect")
    return 0


def _config(arguments: Arguments) -> int:
    action = arguments.rest[0]
    if action not in ("show", "check"):
        raise UsageError(
            f"there is no 'kata config {action}'", "kata config show, or kata config check FILE"
        )
    return _show(arguments) if action == "show" else _check(arguments)


HANDLERS = {"config": _config}
