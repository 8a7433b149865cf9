"""What callers of an OCI runtime put in front of a command: where its state is, and where errors are told.

The options, and the two forms of an error, are those that runc has: Podman and CRI-O read the text of an error from
the file that they name by ``--log``.

Source: runc(8), "Global options"; https://github.com/opencontainers/runtime-tools/blob/master/docs/command-line-interface.md.
"""

from __future__ import annotations

import os
import sys
import time

from kata import paths
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.errors import KataError

PROGRAM = "kata-runtime"
_WITH_VALUE = frozenset({"root", "log", "log-format", "rootless", "criu"})
_FLAGS = frozenset({"systemd-cgroup", "debug"})
HELP = """\
global options, in front of a command of a container:
  --root DIR              where containers are recorded ($KATA_RUN_DIR/oci)
  --log FILE              append errors to this file, too
  --log-format text|json  in which form
  --systemd-cgroup        changes nothing: the form of cgroupsPath says whose it is
  --debug                 tell how the command ended where errors are told; [runtime] enable_debug has more
  --criu PATH             is accepted, and changes nothing
  --rootless auto|true|false  is accepted, and changes nothing: the user whose command it is says it
"""


class GlobalOptions:
    """The options in front of a command.

    Attributes:
        root: The directory in which containers are recorded.
        log: The file that errors are appended to; empty for none.
        log_format: ``text`` or ``json``.
        systemd_cgroup: ``cgroupsPath`` is one of systemd's; its form says so by itself.
        debug: Tell the end of a command, too.
    """

    __slots__ = ("debug", "log", "log_format", "root", "systemd_cgroup")

    def __init__(self) -> None:
        self.root = ""
        self.log = ""
        self.log_format = "text"
        self.systemd_cgroup = False
        self.debug = False

    @property
    def state_root(self) -> str:
        """The directory in which containers are recorded: an absolute path."""
        return os.path.abspath(self.root) if self.root else paths.oci_dir()

    def take(self, argv: Sequence[str]) -> list[str]:
        """Read the options in front of a command: ``--name value`` or ``--name=value``.

        Args:
            argv: The command line without the program's name.

        Returns:
            The rest, which begins with the command, or with an option that is not one of these.

        Raises:
            UsageError: An option lacks its value, or the value makes no sense. What was read before is kept, so that
                the error is told where the caller reads it.
        """
        rest = list(argv)
        while rest and rest[0].startswith("--"):
            name, equals, value = rest[0][2:].partition("=")
            if name in _FLAGS:
                if equals and value not in ("true", "false"):
                    raise UsageError(f"--{name} takes no value", "kata-runtime --help")
                setattr(self, name.replace("-", "_"), value != "false")
            elif name in _WITH_VALUE:
                if not equals:
                    if len(rest) < 2:
                        raise UsageError(f"option --{name} needs a value", "kata-runtime --help")
                    value = rest.pop(1)
                self._set(name, value)
            else:
                break
            rest.pop(0)
        return rest

    def _set(self, name: str, value: str) -> None:
        if name == "log-format":
            if value not in ("text", "json"):
                raise UsageError(f"there is no log format {value!r}", "--log-format text, or json")
            self.log_format = value
        elif name == "rootless" and value not in ("auto", "true", "false"):
            raise UsageError(f"--rootless {value!r} is not known", "auto, true or false")
        elif name in ("root", "log"):
            setattr(self, name, value)

    def record(self, error: KataError) -> None:
        """Append an error to the caller's log, if it has named one. A log that cannot be written changes nothing."""
        if self.log:
            self._append(self._line("error", error.message, hint=error.hint))

    def record_end(self, argv: Sequence[str], status: int, seconds: float) -> None:
        """With ``--debug``, tell how a command ended, in the caller's log or on standard error, as runc does.

        Args:
            argv: The command and what follows it.
            status: What it ends with.
            seconds: How long it took.
        """
        if self.debug:
            told = f"{PROGRAM} {' '.join(argv)}: status {status} after {seconds:.3f} s"
            line = self._line("debug", told)
            if self.log:
                self._append(line)
            else:
                sys.stderr.write(f"{line}\n")

    def _line(self, level: str, message: str, **more: str) -> str:
        from kata.json_text import dumps

        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self.log_format == "json":
            return dumps({"level": level, "msg": message, **more, "time": now})
        return f'time="{now}" level={level} msg={dumps(message)}'

    def _append(self, line: str) -> None:
        from kata import given_paths

        try:
            fd = given_paths.open_written(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(fd, line.encode() + b"\n")
            finally:
                os.close(fd)
        except OSError as problem:
            sys.stderr.write(f"error: cannot write the log {self.log}: {problem.strerror}\n")
