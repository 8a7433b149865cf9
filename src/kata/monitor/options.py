"""The options of ``kata-monitor``: a table, from which help, manual page and completion are made."""

from __future__ import annotations

from kata.agent_ctl.options import Option, Values, parse, table
from kata.errors import UsageError
from kata.monitor import access

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

LEVELS = {
    "trace": 10,
    "debug": 10,
    "info": 20,
    "warn": 30,
    "warning": 30,
    "error": 40,
    "fatal": 50,
    "panic": 50,
}
"""The original's names of levels -> Python's numbers."""
TIMEOUT_S, PARALLEL, SERIES = 3.0, 64, 10_000

OPTIONS = (
    Option(
        "--listen-address",
        "HOST:PORT",
        f"where to listen ({access.DEFAULT_ADDRESS}); or unix:PATH; beyond loopback only with TLS and a token",
    ),
    Option("--tls-cert", "FILE", "certificate in PEM, its chain behind it; read again when it is replaced"),
    Option("--tls-key", "FILE", "the certificate's key"),
    Option("--token-file", "FILE", "ask for the token in this file, as Bearer or as the password of Basic"),
    Option("--allow-host", "NAME", "a further name under which the monitor is asked on loopback", many=True),
    Option(
        "--runtime-endpoint",
        "PATH",
        "the CRI socket that knows the pods' names (containerd's or CRI-O's, where they usually are); empty for none",
    ),
    Option("--timeout", "SECONDS", f"how long to wait for one sandbox ({TIMEOUT_S:g})"),
    Option("--parallel", "N", f"how many sandboxes are asked at a time ({PARALLEL})"),
    Option(
        "--max-series", "N", f"how many series one sandbox may have ({SERIES}); what is beyond is counted"
    ),
    Option("--log-level", "debug|info|warning|error", "what is told on standard error (info)"),
    Option("-V --version", "", "print the version"),
    Option("-h --help", "", "this"),
)

SUMMARY = "Serves the metrics of all sandboxes of this node to Prometheus, and a page to look at."

NOTES = """\
It runs as root, since the engines' sockets are for root. http://127.0.0.1:8090/ is the page, /metrics is for
Prometheus, /sandboxes, /agent-url?sandbox=ID, /healthz and /api/v1/sandboxes are for others.
SIGHUP reads certificate and token again.
The exit status is 0 after SIGTERM or SIGINT, 1 if it could not start.

examples:
  kata-monitor
  kata-monitor --listen-address unix:/run/kata-monitor.sock
  kata-monitor --listen-address :8090 --tls-cert tls.crt --tls-key tls.key --token-file token
"""


def usage() -> str:
    """The help."""
    rows = table([(option.head, option.text) for option in OPTIONS])
    return f"usage: kata-monitor [OPTION...]\n\n{SUMMARY}\n\noptions:\n{rows}\n\n{NOTES}"


def parsed(argv: Sequence[str]) -> Values:
    """Parse the command line. Long options may have one dash, as the original's have.

    Raises:
        UsageError: It is malformed.
    """
    long = {name[1:] for option in OPTIONS for name in option.names if name.startswith("--")}
    words = [f"-{word}" if word.partition("=")[0] in long else word for word in argv]
    values, _ = parse(OPTIONS, words, whole=True)
    return values


def level(values: Values) -> int:
    """The number of the level of the log.

    Raises:
        UsageError: There is no such level.
    """
    name = values.value("log-level") or "info"
    if name not in LEVELS:
        raise UsageError(f"--log-level: there is no level {name!r}", "one of " + ", ".join(LEVELS))
    return LEVELS[name]
