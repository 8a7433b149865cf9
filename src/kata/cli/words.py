"""Words that users of Docker and Podman type and kata does not know: what to do instead.

The nearest spelling misleads here: `push` is not meant to be `ps`.
"""

from __future__ import annotations

ALIASES = {"unpause": "resume", "ls": "ps", "list": "ps", "remove": "rm", "delete": "rm"}
"""Other names of commands; ``container X`` is ``X``, too."""

_IMAGES_ELSEWHERE = "build, tag and push with docker, podman, buildah or skopeo; kata runs what they make"
_VOLUMES = "kata run -v DIR:/path shares a directory, -v /path is a volume of one container; none has a name"
COMMANDS = {
    "build": "docker build or podman build, and then kata run docker-archive:FILE",
    "buildx": _IMAGES_ELSEWHERE,
    "tag": _IMAGES_ELSEWHERE,
    "push": _IMAGES_ELSEWHERE,
    "search": "search with docker, podman or skopeo, and kata pull NAME",
    "save": "skopeo copy docker://NAME oci-archive:FILE",
    "load": "kata pull docker-archive:FILE",
    "import": "unpack it into a directory, and kata run rootfs:DIR",
    "export": "kata cp NAME:PATH - > files.tar",
    "commit": "build an image instead; kata cp NAME:PATH - > files.tar copies files",
    "diff": "kata cp NAME:PATH - | tar -t lists files",
    "history": "skopeo inspect docker://NAME shows its layers",
    "image": "kata images, kata pull, kata rmi",
    "login": "docker login or podman login; kata reads ~/.docker/config.json",
    "logout": "docker logout or podman logout; kata reads ~/.docker/config.json",
    "network": "kata run --network user|none; networks between containers are Docker's or CNI's",
    "volume": _VOLUMES,
    "volumes": _VOLUMES,
    "events": "kata wait NAME waits for an end, kata ps -a shows them all",
    "rename": "the name is given with kata run --name, and stays",
    "healthcheck": "kata exec NAME PROGRAM",
    "info": "kata version, kata doctor",
    "system": "kata gc clears away what ended, kata doctor checks the host",
    "prune": "kata gc",
    "pod": "pods come from Kubernetes (CRI): docs/kubernetes.md",
    "kube": "pods come from Kubernetes (CRI): docs/kubernetes.md",
    "play": "pods come from Kubernetes (CRI): docs/kubernetes.md",
    "generate": "run kata run from a systemd unit of your own",
    "secret": "kata run -v FILE:/run/secrets/NAME:ro",
    "manifest": "skopeo inspect --raw docker://NAME",
    "compose": "docker compose with Docker's runtime kata: docs/docker.md",
    "swarm": "kata is a runtime; clusters are Kubernetes': docs/kubernetes.md",
    "service": "kata is a runtime; clusters are Kubernetes': docs/kubernetes.md",
    "stack": "docker compose with Docker's runtime kata: docs/docker.md",
    "context": "kata has no daemon and runs on this machine",
    "mount": "kata cp NAME:PATH DEST copies files out",
    "umount": "kata cp NAME:PATH DEST copies files out",
    "checkpoint": "kata pause NAME freezes a container while the machine is up",
    "completion": "make install puts it in place for bash, zsh and fish",
}
"""Command of Docker or Podman -> what to do instead."""

OPTIONS = {
    "--label": "keep notes elsewhere: the name (--name) is what kata ps shows",
    "--label-file": "keep notes elsewhere: the name (--name) is what kata ps shows",
    "--restart": "restart it by a systemd unit around kata run",
    "--volumes-from": "give both containers the same -v SRC:DST",
    "--add-host": "kata cp FILE NAME:/etc/hosts when it runs",
    "--dns": "kata cp FILE NAME:/etc/resolv.conf when it runs",
    "--dns-search": "kata cp FILE NAME:/etc/resolv.conf when it runs",
    "--dns-option": "kata cp FILE NAME:/etc/resolv.conf when it runs",
    "--init": "the machine's own init takes up orphans; add tini to the image where PID 1 has to",
    "--shm-size": "--tmpfs /dev/shm:size=SIZE",
    "--ulimit": "the command 'ulimit' in a shell of the container",
    "--sysctl": "--privileged, and sysctl inside: it is the machine's own kernel",
    "--device": "devices of the host mean nothing in another kernel; --privileged has the machine's own",
    "--gpus": "devices of the host cannot be handed in by kata run",
    "--group-add": "-u USER:GROUP",
    "--publish-all": "name the ports: -p HOST:GUEST",
    "-P": "name the ports: -p HOST:GUEST",
    "--expose": "-p HOST:GUEST; nothing has to be exposed first",
    "--ip": "the machine's address is its own; -p [IP:]HOST:GUEST chooses the host's side",
    "--mac-address": "the machine's address is its own",
    "--net": "it is called --network, with none or user",
    "--network-alias": "names between containers are Docker's: docs/docker.md",
    "--link": "names between containers are Docker's: docs/docker.md",
    "--pid": "containers share no namespaces across machines",
    "--ipc": "containers share no namespaces across machines",
    "--uts": "containers share no namespaces across machines; -h sets the host name",
    "--userns": "the machine keeps its users apart from the host's",
    "--cgroupns": "the machine has cgroups of its own",
    "--cgroup-parent": "leave it out; kata config shows what is set for the sandbox's cgroup",
    "--security-opt": "--privileged, --cap-add and --cap-drop",
    "--domainname": "-h NAME.DOMAIN",
    "--cidfile": "kata run -d prints the id: kata run -d ... > FILE",
    "--runtime": "it is kata; its configuration: kata config",
    "--log-driver": "kata logs; the log is rotated, 3 files of 10 MiB",
    "--log-opt": "kata logs; the log is rotated, 3 files of 10 MiB",
    "--stop-timeout": "kata stop -t SECONDS",
    "--replace": "kata rm -f NAME first",
    "--secret": "-v FILE:/run/secrets/NAME:ro",
    "--env-host": "-e NAME for each, without a value",
    "--health-cmd": "kata exec NAME PROGRAM",
    "--no-healthcheck": "kata runs no health checks: leave it out",
    "--memory-swap": "the machine has no swap: leave it out",
    "--memory-swappiness": "the machine has no swap: leave it out",
    "--memory-reservation": "-m SIZE",
    "--cpu-shares": "--cpus N",
    "--cpu-quota": "--cpus N",
    "--cpu-period": "--cpus N",
    "--cpuset-cpus": "--cpus N",
    "--sig-proxy": "signals are always passed on: leave it out",
    "--pod": "pods come from Kubernetes (CRI): docs/kubernetes.md",
    "--format": "--json, and jq",
    "--filter": "--json, and jq",
    "--since": "-t shows the times; -n N the last lines",
    "--until": "-t shows the times; -n N the last lines",
    "--all": "name them: $(kata ps -aq)",
}
"""Option of Docker or Podman -> what to write instead."""


def command(argv: list[str]) -> list[str]:
    """A command line with kata's own name of its command, where there is one."""
    if argv[0] == "container" and len(argv) > 1:
        argv = argv[1:]
    return [ALIASES.get(argv[0], argv[0]), *argv[1:]]


def about_command(name: str) -> str:
    """What to do instead of a command that kata has not; empty for a word that nobody has."""
    return COMMANDS.get(name, "")


def about_option(name: str) -> str:
    """What to write instead of an option that kata has not; empty for a word that nobody has."""
    for prefix in ("--health-", "--blkio-", "--device-"):
        if name.startswith(prefix):
            return {"--health-": OPTIONS["--health-cmd"]}.get(
                prefix, "leave it out; limits are --cpus, -m, --pids-limit"
            )
    return OPTIONS.get(name, "") or OPTIONS.get(
        {"-l": "--label", "-a": "--all", "-f": "--filter"}.get(name, ""), ""
    )
