"""`kata run` and `kata create`."""

from __future__ import annotations

import os
import sys
import time

from kata.cli.args import Command, Option
from kata.cli.making import make_container
from kata.errors import ToldToEnd, UsageError
from kata.hypervisor import registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.cli.args import Arguments
    from kata.proto import sandbox_pb

SELDOM = [
    Option("-l --label", "KEY[=VALUE]", "a label, for 'kata ps --json' and 'kata inspect'", many=True),
    Option("--label-file", "FILE", "read labels from a file, one KEY=VALUE a line", many=True),
    Option(
        "--ulimit", "NAME=SOFT[:HARD]", "limit of the command's processes: nofile=1024; -1: none", many=True
    ),
    Option("--sysctl", "NAME=VALUE", "set a parameter of the machine's own kernel", many=True),
    Option("--shm-size", "SIZE", "size of /dev/shm (64m)"),
    Option("--group-add", "GROUP", "a further group of the command, by name or number", many=True),
    Option("--add-host", "NAME:ADDRESS", "add a line to /etc/hosts", many=True),
    Option("--dns", "ADDRESS", "ask this name server instead of the host's", many=True),
    Option("--dns-search", "DOMAIN", "search this domain instead of the host's; '.' for none", many=True),
    Option("--dns-option", "OPTION", "an option of resolv.conf instead of the host's (ndots:2)", many=True),
    Option(
        "--security-opt",
        "OPTION",
        "no-new-privileges, seccomp=unconfined or systempaths=unconfined",
        many=True,
    ),
    Option("--cpu-shares", "N", "weight of its CPU time in the machine (1024)"),
    Option(
        "--memory-reservation", "SIZE", "memory that the machine's kernel leaves to it when that is short"
    ),
    Option("--memory-swap", "SIZE", "the same as -m, since the machine has no swap"),
    Option("--env-host", "", "set the environment variables of this command, too; -e is stronger"),
    Option("--tz", "ZONE|local", "time zone, from the host's files (Europe/Paris)"),
    Option("--stop-timeout", "SECONDS", "how long 'kata stop' waits before SIGKILL (10); -1: no limit"),
    Option("--restart", "no|always|unless-stopped|on-failure[:N]", "have systemd start it again; with -d"),
    Option(
        "--health-cmd", "COMMAND", "a shell command that succeeds if the container is well; 'none' for none"
    ),
    Option("--health-interval", "DURATION", "time between two of these checks (30s)"),
    Option("--health-timeout", "DURATION", "time after which a check has failed (30s)"),
    Option("--health-start-period", "DURATION", "time in which failures do not count (0s)"),
    Option("--health-retries", "N", "how many failures in a row make it unhealthy (3)"),
    Option("--no-healthcheck", "", "leave the image's health check out"),
    Option("--init", "", "have an init of this host as process 1: it reaps processes and passes signals on"),
    Option("--init-path", "FILE", "that one: a program without libraries (catatonit, tini-static)"),
    Option(
        "--device",
        "HOST[:CONTAINER][:rwm]",
        "a device: a disk of the host, or what the guest has itself (/dev/fuse, /dev/net/tun)",
        many=True,
    ),
    Option("--cidfile", "FILE", "write the container's id to a new file"),
    Option("--expose", "PORT[/PROTO]", "a port that -P publishes besides those of the image", many=True),
    Option(
        "--log-opt",
        "max-size=SIZE|max-file=N",
        "when the log is rotated (10m), and how many files (3)",
        many=True,
    ),
    Option("-q --quiet", "", "show no progress when the image is fetched"),
]
"""Options that few containers are given: `kata.cli.run_options` reads them."""
_OPTIONS = [
    Option("-i --interactive", "", "keep standard input open, and connect it"),
    Option("-t --tty", "", "give the command a terminal"),
    Option("--name", "NAME", "the container's name; a random one if not given"),
    Option("--replace", "", "remove a container that has the name, even if it runs"),
    Option(
        "-e --env", "KEY[=VALUE]", "set an environment variable; without VALUE, copy it from here", many=True
    ),
    Option("--env-file", "FILE", "read environment variables from a file, one KEY=VALUE a line", many=True),
    Option(
        "-v --volume",
        "[SRC:]DST[:OPTIONS]",
        "share a directory or file of the host (ro); a SRC without '/' is a volume's name; without SRC, make a volume",
        many=True,
    ),
    Option(
        "--mount",
        "type=volume,[src=NAME,]dst=DST[,...]",
        "a volume on a disk of its own (volume-opt=size=10g); type=bind and type=tmpfs are -v and --tmpfs",
        many=True,
    ),
    Option("--tmpfs", "DST[:OPTIONS]", "mount an empty file system in memory", many=True),
    Option("-w --workdir", "DIR", "the command's working directory"),
    Option("-u --user", "USER[:GROUP]", "run as this user, by name or number"),
    Option("--cpus", "N", "how many CPUs the container may use; the virtual machine gets N rounded up"),
    Option("-m --memory", "SIZE", "how much memory the container may use (512m, 2g)"),
    Option("--pids-limit", "N", "how many processes the container may have; 0 or -1 for no limit"),
    Option(
        "--hypervisor",
        "|".join(registry.names()),
        f"what runs the virtual machine; by default what the configuration says, else {registry.DEFAULT}",
    ),
    Option("--read-only", "", "make the container's root file system read-only"),
    Option("--privileged", "", "all capabilities and devices of the guest, no seccomp; nothing of the host"),
    Option("--cap-add", "CAP", "add a capability, or ALL", many=True),
    Option("--cap-drop", "CAP", "drop a capability, or ALL", many=True),
    Option(
        "--net --network",
        "none|user|tap|NETWORK",
        "'user' (the default): outgoing connections and -p; 'tap': the same through a tap device, as hypervisors"
        " have it that take nothing else; 'none': loopback only; or 'user' and a network of kata network create",
        many=True,
    ),
    Option("--network-alias", "NAME", "a further name of the container in its networks", many=True),
    Option("--ip", "ADDRESS", "the container's IPv4 address in its network"),
    Option(
        "-p --publish",
        "[[IP:]HOST:]GUEST[/PROTO]",
        "make a port of the container reachable on the host; without HOST, at a free port",
        many=True,
    ),
    Option("-P --publish-all", "", "publish every port that the image exposes, on free ports of the host"),
    Option("-h --hostname", "NAME", "the container's host name; the beginning of its id if not given"),
    Option("--entrypoint", "COMMAND", "replace the image's entry point; empty to clear it"),
    Option("--storage-size", "SIZE", "size of the writable layer, a sparse file on the host (10g)"),
    Option(
        "--storage", "disk|tmpfs", "where the writable layer lies: a file on the host, or the guest's memory"
    ),
    Option(
        "--platform",
        "OS/ARCH[/VARIANT]",
        "platform of the image; this machine's if not given",
    ),
    Option("--pull", "missing|always|never", "when to fetch the image (missing)"),
    Option(
        "--stop-signal", "SIGNAL", "first signal of 'kata stop'; by default the image's, otherwise SIGTERM"
    ),
    Option(
        "--systemd",
        "true|false|always",
        "prepare it for systemd: if that is its command (true), never or always",
    ),
    Option("--rm", "", "remove the container when it has ended"),
    *SELDOM,
]

_IMAGES = """\
IMAGE is one of
  NAME[:TAG], HOST:PORT/NAME:TAG   from the local store, or fetched from its registry
  oci:DIR[:TAG]                    an OCI image layout; :@0 is its first image, :@1 the next
  oci-archive:FILE                 the same in a tar file
  docker-archive:FILE              what 'docker save' writes
  rootfs:DIR                       a directory with a root file system; it is never written to

-v takes Docker's and Podman's options: ro and rw; noexec, nosuid, nodev; slave, rslave, shared and rshared (later
mounts of the host below SRC appear in the container); z, Z, cached, delegated, consistent and nocopy have no effect.

--mount type=volume,[src=NAME,]dst=DST[,volume-opt=size=SIZE][,volume-nocopy][,ro] makes a volume, like -v DST and
-v NAME:DST: an ext4 file system in a sparse file (10g) that is a disk of the machine, filled with the image's content
at DST. It is kept when the container is stopped. Without a name it is removed with it; one with a name stays ('kata
volume'), and one container at a time can run with it. A dockerd in the container (--privileged) can use overlay2 on it.

exit status: the command's own; 125 kata itself failed, 126 the command cannot be executed, 127 it was not
found, 128+N signal N ended it, 137 also when the virtual machine died."""
_OUTPUT = (
    "\nWhen the reader of the output is gone (`kata run ... | head -1`), a container with --rm is ended (its stop\n"
    "signal, SIGKILL after 3 seconds); any other goes on. A message says so, and the exit status is 141."
)

COMMANDS = {
    "run": Command(
        "run",
        "IMAGE [COMMAND [ARG...]]",
        "Runs a command in a new container, in a virtual machine of its own.",
        [
            Option("-d --detach", "", "return at once and print the container's id"),
            *_OPTIONS,
            Option(
                "--detach-keys", "KEYS", "keys that detach and leave the container running (ctrl-p,ctrl-q)"
            ),
            Option("--sig-proxy", "true|false", "pass signals on to the container (true)"),
            Option("--timings", "", "at the end, print how long the steps of the start took (to stderr)"),
        ],
        least=1,
        interspersed=False,
        notes=_IMAGES + _OUTPUT,
    ),
    "create": Command(
        "create",
        "IMAGE [COMMAND [ARG...]]",
        "Makes a container without starting it, and prints its id.",
        _OPTIONS,
        least=1,
        interspersed=False,
        notes=_IMAGES,
    ),
}


def _run(arguments: Arguments) -> int:
    started_ns = time.monotonic_ns()
    detach = arguments.flag("detach")
    interactive, tty = arguments.flag("interactive"), arguments.flag("tty")
    if detach and arguments.flag("timings"):
        raise UsageError(
            "--timings reports at the end, which --detach does not wait for", "leave out one of the two"
        )
    if tty and interactive and not detach and not os.isatty(0):
        raise UsageError("-t needs a terminal, and standard input is none", "leave out -t")
    policy = arguments.value("restart")
    if policy is not None and (not detach or arguments.flag("rm")):
        from kata.cli import restart

        if restart.parse(policy) is not None:
            raise UsageError(
                "a container with --restart runs in the background, and stays", "-d, without --rm"
            )
    from kata.cli.pump import detach_keys, passes_signals

    keys = detach_keys(arguments.value("detach_keys"))
    proxy = passes_signals(arguments.value("sig_proxy"))
    auto_remove = arguments.flag("rm")
    undo_when_told_to_end()
    container = make_container(arguments, SELDOM, auto_remove=auto_remove, detach=detach, made_to_run=True)
    try:
        # Imported only here, after bad input was refused.
        from kata.cli import session
    except BaseException:
        from kata.cli.records import remove

        remove(container)
        raise
    if container.record.get("restart"):
        from kata.cli import records, restart

        try:
            restart.start(container)
        except BaseException:
            records.remove(container)
            raise
        print(container.id)
        return 0
    if detach:
        session.start_detached(container, started_ns)
        print(container.id)
        return 0
    report = _print_timings if arguments.flag("timings") else None
    return session.run_attached(
        container,
        started_ns=started_ns,
        stdin=interactive,
        detach_keys=keys,
        proxy_signals=proxy,
        timings=report,
        discard=True,
    )


def undo_when_told_to_end() -> None:
    """Make a signal that ends this command undo what was made so far, as an interrupt does.

    Once the container has started, signals are passed to it instead. A second signal waits until the undoing is done.
    """
    import _signal as signal  # type: ignore[import-not-found]  # without enumerations

    numbers = [
        n for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(n) == signal.SIG_DFL
    ]

    def end(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise ToldToEnd(number)

    for number in numbers:
        signal.signal(number, end)


def _print_timings(ledger: sandbox_pb.TimingsResponse) -> None:
    why = f": {ledger.reason}" if ledger.reason else ""
    sys.stderr.write(f"  start: {ledger.path}{why}\n")
    names = ["  " * bool(entry.part_of) + entry.name for entry in ledger.timings]
    width = max(map(len, names), default=0)
    for name, entry in zip(names, ledger.timings, strict=True):
        sys.stderr.write(
            f"  {name:<{width}}  at {entry.start_ns / 1e6:8.1f} ms   took {entry.duration_ns / 1e6:8.1f} ms\n"
        )


def _create(arguments: Arguments) -> int:
    undo_when_told_to_end()
    container = make_container(arguments, SELDOM, auto_remove=arguments.flag("rm"))
    print(container.id)
    return 0


HANDLERS = {"run": _run, "create": _create}
