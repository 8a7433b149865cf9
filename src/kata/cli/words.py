"""Hints for commands and options of Docker and Podman that kata does not have.

For these, the command with the nearest spelling would be a misleading hint: `push` is not meant to be `ps`.
"""

from __future__ import annotations

ALIASES = {"unpause": "resume", "ls": "ps", "list": "ps", "remove": "rm", "delete": "rm"}
"""Aliases of commands. ``container X`` is an alias of ``X``."""
GROUPS = {
    "container": {
        "prune": "prune container",
        "inspect": "inspect --type container",
        "exists": "exists --type container",
    },
    "image": {
        "ls": "images",
        "list": "images",
        "rm": "rmi",
        "remove": "rmi",
        "inspect": "inspect --type image",
        "prune": "prune image",
        "exists": "exists --type image",
    },
    "system": {"prune": "prune system"},
    "builder": {"prune": "prune build"},
}
"""Groups of commands -> those in them that are called otherwise here; the others are commands of the same name."""

_IMAGES_ELSEWHERE = "kata build builds for this machine; kata runs what docker, podman or buildah make"
COMMANDS = {
    "buildx": _IMAGES_ELSEWHERE,
    "search": "search with docker, podman or skopeo, and kata pull NAME",
    "image": "kata images, kata pull, kata rmi",
    "volumes": "kata volume ls",
    "system": "kata info, kata prune, kata events; kata gc removes what crashes left behind",
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
    "builder": "kata build, and kata prune build; or docker build and kata run docker-archive:FILE",
    "init": "the command is PID 1 of the container: put tini or dumb-init into the image if it has to reap",
    "machine": "each container has a machine of its own; kata explain NAME shows its size",
    "node": "kata is a runtime; clusters are Kubernetes': docs/kubernetes.md",
    "plugin": "kata has no plugins",
    "trust": "pull by digest: kata pull NAME@sha256:DIGEST",
    "unmount": "kata cp NAME:PATH DEST copies files out",
    "unshare": "run kata as root",
    "untag": "kata rmi NAME:TAG removes one name of an image",
    "completion": "make install puts it in place for bash, zsh and fish",
}
"""Hint for each command of Docker or Podman that kata does not have."""

_RUN = "run create"
_MANY = "start restart stop kill rm pause resume wait"
OPTIONS: dict[str, dict[str, str]] = {
    "build": {
        "--rm --force-rm": "nothing of a build is left in any case",
        "--layers": "steps are kept for the next build; --no-cache does without",
        "--isolation --runtime-flag": "each RUN is in a machine of its own",
        "--compress --disable-content-trust": "leave it out",
        (
            "--cgroup-parent --cgroupns --ipc --pid --userns --userns-gid-map --userns-gid-map-group "
            "--userns-uid-map --userns-uid-map-user --uts"
        ): "a machine shares no namespaces with the host",
        (
            "--add-host --all-platforms --annotation --arch --authfile --build-context --cache-from "
            "--cache-to --cache-ttl --cap-add --cap-drop --cert-dir --cpp-flag --cpu-period --cpu-quota "
            "--cpu-shares --cpuset-cpus --cpuset-mems --creds --decryption-key --device "
            "--disable-compression --dns --dns-option --dns-search --env --format --from --hooks-dir "
            "--http-proxy --identity-label --ignorefile --jobs --logfile --logsplit --manifest --memory "
            "--memory-swap --no-hosts --omit-history --os --os-feature --os-version --output --platform "
            "--retry --retry-delay --secret --security-opt --shm-size --sign-by --skip-unused-stages "
            "--squash --squash-all --ssh --stdin --timestamp --tls-verify --ulimit --unsetenv --variant "
            "--volume"
        ): "podman can build with kata, too, and kata load takes the image: docs/builders.md",
    },
    _RUN: {
        "--volumes-from": "give both containers the same -v SRC:DST",
        "--device-cgroup-rule": "--device HOST:CONTAINER:rwm",
        "--gpus": "kata run cannot pass devices of the host into a container",
        "--mac-address": "the machine's address is its own",
        "--link": "kata network create NAME, and --network NAME with both containers",
        "--pid --ipc": "containers share no namespaces across machines",
        "--uts": "containers share no namespaces across machines; -h sets the host name",
        "--userns": "the machine keeps its users apart from the host's",
        "--cgroupns": "the machine has cgroups of its own",
        "--cgroup-parent": "leave it out; kata config show has what is set for the sandbox's cgroup",
        "--domainname": "-h NAME.DOMAIN",
        "--runtime": "the runtime is kata; kata config show has its configuration",
        "--log-driver": "kata logs; --log-opt max-size=SIZE says when the log is rotated",
        "--secret": "-v FILE:/run/secrets/NAME:ro",
        "--pod": "pods come from Kubernetes (CRI): docs/kubernetes.md",
        "--health-*": "leave it out: --health-cmd and --health-start-period do it",
        "--device-* --blkio-*": "leave it out; limits are --cpus, -m, --pids-limit",
        "--os --arch --variant": "--platform OS/ARCH[/VARIANT]",
        "--volume-driver": "leave it out: the one driver is a disk of the machine",
        "--storage-opt": "--storage-size SIZE",
        "--image-volume": "leave it out: they are in the writable layer, or on disks with --read-only",
        "--read-only-tmpfs": "--tmpfs /run --tmpfs /tmp",
        "--rootfs": "kata run rootfs:DIR",
        "--rmi": "kata rmi IMAGE afterwards",
        "--unsetenv --unsetenv-all": "-e NAME= makes it empty",
        "--http-proxy": "-e HTTP_PROXY for each, without a value",
        "--umask": "the command 'umask' in a shell of the container",
        "--timeout": "kata stop NAME when it is time; timeout(1) sends its signal to the container, too",
        "--pidfile --conmon-pidfile": "kata inspect NAME has the engine's",
        "--no-hosts": "kata cp FILE NAME:/etc/hosts when it runs",
        "--ip6": "in a network with IPv6 the address ends as the one of --ip does: docs/networks.md",
        "--link-local-ip": "the machine's address is its own; -p [IP:]HOST:GUEST chooses the host's side",
        "--oom-score-adj --oom-kill-disable": "leave it out: the kernel that kills is the machine's own",
        "--kernel-memory": "-m SIZE",
        "--annotation": "--label KEY=VALUE keeps notes",
        "--isolation --disable-content-trust": "leave it out",
        "--authfile --creds --cert-dir --tls-verify": "kata login, or DOCKER_CONFIG=DIR for another file",
        "--cgroups --cgroup-conf": "leave it out; limits are --cpus, -m, --pids-limit",
        "--chrootdirs": "leave it out: /etc/hosts and /etc/resolv.conf are made for the container's root",
        "--cpu-count --cpu-percent --io-maxbandwidth --io-maxiops": "leave it out; limits are --cpus, -m, --pids-limit",
        "--cpu-rt-period --cpu-rt-runtime": "--cap-add SYS_NICE, and chrt in the container",
        "--env-merge": "-e NAME=VALUE",
        "--gidmap --uidmap --subgidname --subuidname": "the machine keeps its users apart from the host's",
        "--hostuser --passwd --passwd-entry": "users are the image's: -u USER takes numbers that it does not know",
        "--init-ctr --pod-id-file": "pods come from Kubernetes (CRI): docs/kubernetes.md",
        "--personality": "setarch in the container",
        "--preserve-fds --preserve-fd": "descriptors of the host mean nothing in another kernel",
        "--requires": "start the other container first",
        "--sdnotify": "leave it out: kata run without -d ends with its container",
        "--seccomp-policy": "--security-opt seccomp=unconfined, or the default profile",
        "--use-api-socket": "-v /var/run/docker.sock:/var/run/docker.sock",
    },
    f"{_RUN} update": {
        "--memory-swappiness": "the machine has no swap: leave it out",
        "--cpu-quota --cpu-period --cpuset-cpus --cpuset-mems": "--cpus N: the machine has processors of its own",
    },
    "run": {"--attach -a": "without -d its output is attached, with -i its input"},
    "create": {"--attach -a": "kata start -a NAME attaches its output"},
    "update": {
        "--memory-reservation": "-m SIZE",
        "--cpu-shares -c": "--cpus N",
        "--restart": "make it anew with kata run -d --restart POLICY",
        "--blkio-* --device-* --cpu-rt-*": "leave it out; limits are --cpus, -m, --pids-limit",
    },
    "exec attach top": {"--latest -l": "name it: $(kata ps -aq | head -1)"},
    _MANY: {
        "--filter": "name them: $(kata ps -aq --filter KEY=VALUE)",
    },
    "rm": {
        "--link": "names between containers are Docker's: docs/docker.md",
        "--time -t": "kata stop -t SECONDS NAME first",
    },
    "stop restart": {
        "--signal -s": "kata kill -s SIGNAL NAME, or kata run --stop-signal SIGNAL",
        "--timeout": "-t SECONDS",
    },
    "stop rm kill pause resume": {"--cidfile": "name it: $(cat FILE)"},
    "stop rm": {
        "--depend": "leave it out",
    },
    "restart": {"--running": "name them: $(kata ps -q)", "--cidfile": "name it: $(cat FILE)"},
    "start": {
        "--checkpoint --checkpoint-dir": "kata pause NAME freezes a container while the machine is up",
    },
    "events": {
        "--format": "--json, and jq",
        "--no-trunc": "leave it out",
        "--until": "--json, and jq for the time",
    },
    "exec": {"--preserve-fds --preserve-fd": "descriptors of the host mean nothing in another kernel"},
    "history": {
        "--human -H": "leave it out",
        "--platform": "an image is of one platform here: leave it out",
    },
    "save": {
        "--format --compress": "leave it out: it is what 'docker save' writes",
        "--multi-image-archive -m --uncompressed": "leave it out: several images are one archive",
        "--platform": "an image is of one platform here: leave it out",
    },
    "commit": {
        "--no-pause": "--pause=false",
        "--format -f": "leave it out: images are kept in one form",
        "--iidfile": "kata commit NAME > FILE",
        "--include-volumes": "kata cp NAME:PATH DEST copies what is in a volume",
        "--squash -s --config": "leave it out: the image has one layer",
    },
    "push": {
        "--all-tags -a": "name each: kata push NAME:TAG",
        "--platform": "an image is of one platform here: leave it out",
        "--authfile --creds --cert-dir --tls-verify": "kata login, or DOCKER_CONFIG=DIR for another file",
        "--digestfile": "kata push NAME | sed 's/.*digest: //' > FILE",
        "--disable-content-trust --compress --compression-format --format -f": "leave it out",
        "--remove-signatures --sign-*": "cosign signs what is at a registry",
    },
    "login logout": {"--authfile --cert-dir --tls-verify": "DOCKER_CONFIG=DIR for another file"},
    "login": {"--get-login --verbose -v": "leave it out"},
    "diff": {"--latest -l": "name it: $(kata ps -aq | head -1)"},
    "load import": {"--platform": "leave it out: it is this machine's"},
    "import": {"--os --arch --variant": "leave it out: it is this machine's"},
    "wait": {
        "--all -a": "name them: $(kata ps -aq)",
        "--condition --interval -i": "leave it out: it waits for the end",
    },
    "top port logs": {"--format": "--json, and jq"},
    "inspect": {
        "--size -s": "leave it out: kata ps --format '{{.Size}}' shows what a container has written",
    },
    "ps": {
        "--external --ns --pod -p --sync": "leave it out",
        "--noheading": "--format '{{.ID}} {{.Names}}'",
        "--sort": "the newest are first; sort --format's lines with sort(1)",
        "--watch -w": "kata top",
    },
    "port": {
        "--all -a": "name each: kata ps shows them all",
        "--latest -l": "name it: $(kata ps -q | head -1)",
    },
    "cp": {"--overwrite": "leave it out: a file may replace a file"},
    "stats": {
        "--all -a": "only running containers have figures: leave it out",
        "--no-reset": "leave it out",
        "--latest -l": "name it: $(kata ps -q | head -1)",
    },
    "logs": {"--color --names": "leave it out"},
    "rmi": {
        "--all -a": "name them: $(kata images -q)",
        "--ignore -i": "--force",
        "--no-prune --platform": "leave it out: layers are not images of their own here",
    },
    "images": {
        "--tree": "leave it out: an image is of one platform here",
        "--history": "kata history IMAGE",
        "--noheading -n": "--format '{{.Repository}} {{.Tag}} {{.ID}}'",
        "--sort": "the newest are first; sort --format's lines with sort(1)",
    },
    "pull": {
        "--all-tags -a": "name each: kata pull NAME:TAG",
        "--os --arch --variant": "--platform OS/ARCH",
        "--authfile --creds --cert-dir --tls-verify": "kata login, or DOCKER_CONFIG=DIR for another file",
        "--disable-content-trust": "leave it out",
    },
}
"""Hints for options of Docker or Podman that kata's commands do not have: by commands, then by options.

An option that ends in ``*`` is a prefix. An option in a hint that names no command belongs to the same command.
"""
OF_SUBCOMMANDS: dict[str, dict[str, str]] = {
    "network create": {
        "--ipv4": "a network has IPv4 in any case, and with --ipv6 both: docs/networks.md",
        "--opt -o --attachable --scope --ingress --disable-dns --ipam-opt": "leave it out",
        "--aux-address": "--ip-range ADDRESS/BITS, from which containers get theirs",
        "--config-from --config-only --ipam-driver --route --interface-name": "leave it out: it is a bridge",
        "--dns": "kata run --dns ADDRESS",
    },
    "network connect": {
        "--ip6 --link-local-ip": "in a network with IPv6 the address ends as the one of --ip does",
        "--mac-address": "the machine's address is its own",
        "--driver-opt --gw-priority --link": "leave it out",
    },
    "volume create": {
        "--availability --group --limit-bytes --required-bytes --scope --secret --sharing": "leave it out",
    },
}
"""The same for the commands of groups: by their whole name."""


def command(argv: list[str]) -> list[str]:
    """Replace an alias in a command line by kata's own name of the command."""
    if argv[0] in GROUPS and len(argv) > 1 and argv[1][:1] != "-":
        own = GROUPS[argv[0]].get(argv[1])
        if own is not None:
            return [*own.split(), *argv[2:]]
        argv = argv[1:]
    return [ALIASES.get(argv[0], argv[0]), *argv[1:]]


def about_command(name: str) -> str:
    """The hint for a command of Docker or Podman that kata does not have; empty for any other word."""
    return COMMANDS.get(name, "")


def about_option(command: str, name: str) -> str:
    """The hint for an option of Docker or Podman that a command of kata does not have; empty for any other option.

    Args:
        command: The command's name.
        name: The option, with its dashes.
    """
    prefixed = ""
    tables = [table for commands, table in OPTIONS.items() if command in commands.split()]
    for table in (*tables, OF_SUBCOMMANDS.get(command, {})):
        for names, text in table.items():
            for one in names.split():
                if name == one:
                    return text
                if one.endswith("*") and name.startswith(one[:-1]):
                    prefixed = text
    return prefixed
