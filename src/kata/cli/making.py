"""Makes a container from the command line of `kata run` and `kata create`: what is asked for, checked, and then its
specification, its record and its disks.
"""

from __future__ import annotations

import os
import sys

from kata.cli import values
from kata.cli.records import PendingContainer, new_id, now
from kata.errors import UsageError
from kata.hypervisor import registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kata.cli.args import Arguments, Option
    from kata.cli.mounts import Volume
    from kata.cli.records import Container
    from kata.cli.run_options import IdFile, RunOptions

DEFAULT_STORAGE = 10 << 30
_LOG_BYTES = 10 << 20
_LOG_FILES = 3


def make_container(
    arguments: Arguments,
    seldom: Sequence[Option],
    *,
    auto_remove: bool,
    detach: bool = False,
    made_to_run: bool = False,
) -> Container:
    """Create a container from the command line: resolve the image, write the specification and the disk.

    On an error nothing is left behind.

    Args:
        arguments: The options of `kata run` or `kata create`.
        seldom: Those options that `kata.cli.run_options` reads.
        auto_remove: Remove the container when it has ended (``--rm``).
        detach: The command will not attach to it (``-d``).
        made_to_run: The command will start it at once (`kata run`).

    Raises:
        KataError: An option, the image or the disk is at fault.
    """
    from kata.engine.launch import raise_file_limit
    from kata.images.resolve import resolve
    from kata.oci import spec as oci

    reference, *command = arguments.rest
    choice = _Choice(arguments, seldom)
    raise_file_limit()  # with too few descriptors it would fail half-way, and so would undoing that
    progress = (lambda *_: None) if arguments.flag("quiet") else None
    image = resolve(reference, pull=choice.pull, platform=choice.platform, progress=progress)
    _warn_of_level(image.platform)
    id_path = arguments.value("cidfile")
    id_file = None
    if id_path is not None:
        from kata.cli import run_options

        id_file = run_options.IdFile(id_path)
    pending = None
    try:
        identity = new_id()
        hostname = choice.hostname or identity[:12]
        request = oci.Request(hostname)
        choice.fill(request)
        request.command = command
        spec = oci.build(request, image.config)
        image_volumes = _image_volumes(image.config, spec)
        if image_volumes and request.read_only:
            # If the root file system is not writable, they have to be file systems of their own.
            choice.add_volumes(image_volumes)
            image_volumes = []
            choice.fill(request)
            spec = oci.build(request, image.config)
        default_stop = oci.SYSTEMD_STOP if oci.runs_systemd(request, spec["process"]["args"]) else "SIGTERM"
        volumes = [(volume_file(number), volume) for number, volume in enumerate(choice.disk_volumes)]
        record: dict[str, Any] = {
            "id": identity,
            "name": choice.name or "",
            "created_at": now(),
            "image": {"reference": reference, "id": image.id},
            "rootfs": _rootfs(image),
            "upper": choice.storage,
            "storage_size": choice.storage_size,
            "args": spec["process"]["args"],
            "hostname": hostname,
            "tty": choice.tty,
            "open_stdin": choice.interactive,
            # As in Docker: of a container made without -d, the first client that attaches to stdin also closes it.
            "stdin_once": choice.interactive and not detach,
            "network": choice.network,
            "networks": choice.networks,
            "ports": choice.published(image.config),
            "publish_all": arguments.flag("publish_all"),
            "volumes": [
                {"source": source, "destination": destination, "readonly": "ro" in options}
                for source, destination, options in choice.binds
            ],
            "disk_volumes": [volume.record(name) for name, volume in volumes],
            "cpus": choice.cpus,
            "memory": choice.memory,
            "hypervisor": choice.hypervisor,
            "auto_remove": auto_remove,
            "made_to_run": made_to_run,
            "image_volumes": image_volumes,
            "stop_signal": choice.stop_signal or image.config.get("StopSignal") or default_stop,
            "labels": image.config.get("Labels") or {},
            "log": {"max_bytes": _LOG_BYTES, "files": _LOG_FILES},
        }
        if choice.more is not None:
            choice.more.apply(spec, record)
        if choice.more is not None or image.config.get("Healthcheck"):
            from kata.cli import health

            record["health"] = health.wanted(arguments, image.config)
        if record["networks"]:
            _check_way_in(record["ports"], [name for name, *_ in record["networks"]])
        if arguments.flag("replace"):
            _replace(record, volumes, made_to_run=made_to_run)
        pending = PendingContainer(choice.name, identity)
        record["name"] = pending.name
        return _commit(pending, record, spec, volumes, id_file)
    except BaseException:
        if pending is not None:
            pending.discard()
        if id_file is not None:
            id_file.discard()
        raise


def _replace(record: dict[str, Any], volumes: list[tuple[str, Volume]], *, made_to_run: bool) -> None:
    """Remove the container that has the name of a new one, unless the new one would be refused (``--replace``).

    Args:
        record: Of the new one; its ``networks`` are what was asked for.
        volumes: The new one's.
        made_to_run: It is started at once.

    Raises:
        KataError: The new one cannot be made, or started; or the old one cannot be removed.
    """
    from kata.cli import lifecycle, records

    old = records.named(record["name"])
    if old is None:
        return
    from kata.storage import ext4

    if record["upper"] == "disk":
        ext4.check_size(record["storage_size"])
    for _, volume in volumes:
        ext4.check_size(volume.size, "volume", "volume-opt=size")
    if record["networks"]:
        from kata.cli import networks

        for one in record["networks"]:
            networks.place(*one, but=old.id)
    if made_to_run:
        from kata.cli import session

        session.sandbox_settings(records.Container(record["id"], {**record, "networks": []}), 0)
    lifecycle.remove(old, force=True)


def _check_way_in(ports: list[dict[str, Any]], names: list[str]) -> None:
    """Refuse ports that networks with these names alone could not publish."""
    from kata.cli import networks

    if ports and not networks.leads_outside([{"network": name} for name in names]):
        raise UsageError(
            f"-p has no way in: the network {names[0]} is internal",
            "leave out -p, or give --network another one besides",
        )


def _commit(
    pending: PendingContainer,
    record: dict[str, Any],
    spec: dict[str, Any],
    volumes: list[tuple[str, Volume]],
    id_file: IdFile | None,
) -> Container:
    """Make a container's disks, and record it."""
    from kata.storage import ext4

    # What `kata create` has made can be copied to before it runs: its disk has two machines.
    scratch = record["auto_remove"] and record["made_to_run"]
    if record["upper"] == "disk":
        ext4.make_writable(pending.path("rw.img"), record["storage_size"], scratch=scratch)
    for name, volume in volumes:
        if not volume.name:
            ext4.make_writable(pending.path(name), volume.size, "volume", "volume-opt=size", scratch=scratch)
    if id_file is not None:
        id_file.write(pending.id)
    if record.get("restart"):
        from kata.cli import restart

        restart.write_unit(pending, record["restart"])
    if record["networks"]:
        from kata.cli import networks

        with (
            networks.locked()
        ):  # no address is given twice, and no network removed, before the record is there
            record["networks"] = [networks.place(*one) for one in record["networks"]]
            _check_way_in(record["ports"], [one["network"] for one in record["networks"]])
            return _commit_volumes(pending, record, spec, volumes)
    del record["networks"]
    return _commit_volumes(pending, record, spec, volumes)


def _networks(arguments: Arguments) -> tuple[str, list[tuple[str, list[str], str]]]:
    """The network mode, and for each network with a name that, the aliases and the address that were asked for."""
    modes = ("user", "tap", "none")
    given = [one for one in arguments.many("network") if one]
    named = [one for one in dict.fromkeys(given) if one not in modes]
    aliases, address = arguments.many("network_alias"), arguments.value("ip")
    if not named:
        if aliases or address:
            raise UsageError(
                "--network-alias and --ip need a network with a name",
                "kata network create NAME; --network NAME",
            )
        return (given[-1] if given else "user"), []
    if any(one in ("tap", "none") for one in given):
        raise UsageError(f"--network {named[0]} goes with no {' or '.join(modes[1:])}", "leave that out")
    if address and len(named) > 1:
        raise UsageError("--ip is for a container in one network", "leave it out")
    from kata.cli import networks

    for name in named:
        if name.partition(":")[0] in networks.RESERVED:
            raise UsageError(
                f"--network {name!r} is not offered: a machine has a network of its own",
                "user, tap, none, or a network that kata network create has made",
            )
    for alias in aliases:
        networks.check_name(alias, "--network-alias")
    return "user", [(networks.find(one)["name"], aliases, address or "") for one in named]


def _commit_volumes(
    pending: PendingContainer,
    record: dict[str, Any],
    spec: dict[str, Any],
    volumes: list[tuple[str, Volume]],
) -> Container:
    named = [volume for _, volume in volumes if volume.name]
    if not named:
        return pending.commit(record, spec)
    from kata.cli import volumes as with_names

    with with_names.locked():  # none of them is removed before the record says who has it
        for volume in named:
            with_names.ensure(volume.name, volume.size)
        return pending.commit(record, spec)


def _image_volumes(config: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    """The image's ``Volumes`` at which nothing else is mounted."""
    mounted = {mount["destination"] for mount in spec["mounts"]}
    found = {os.path.normpath("/" + path.lstrip("/")) for path in config.get("Volumes") or {}}
    if len(found) > _MOST_IMAGE_VOLUMES:
        raise UsageError(
            f"the image has {len(found)} volumes; at most {_MOST_IMAGE_VOLUMES} are supported",
            "use another image",
        )
    return sorted(found - mounted - {"/"})


_MOST_IMAGE_VOLUMES = 100


def _runnable(platform: str | None) -> str | None:
    """Check that a machine of this host can run a --platform; returns it."""
    if platform is not None:
        from kata.images import platform as platforms

        asked, here = platforms.parse(platform), platforms.host()
        if asked.rank(here) < 0:
            raise UsageError(
                f"--platform {platform!r}: a machine of this host ({here}) cannot run that",
                f"leave it out, or fetch the image only: kata pull --platform {platform} IMAGE",
            )
    return platform


def _warn_of_level(platform: str) -> None:
    """Warn if an image is built for a level of amd64 that needs features which the processor lacks."""
    if platform.count("/") < 2:
        return
    from kata.hypervisor import accel
    from kata.images import platform as platforms

    emulated = accel.choose().accel == "tcg"
    lacking = platforms.lacking(platforms.parse(platform), emulated=emulated)
    if lacking:
        sys.stderr.write(
            f"warning: the image is built for {platform}, and the processor lacks {' '.join(lacking)}: "
            "its programs may end with an illegal instruction\n"
        )


def _hypervisor(name: str | None) -> str:
    """Check that a --hypervisor can start machines here; returns its name, empty without one."""
    if name is None:
        return ""
    from kata.config import files
    from kata.engine import machine

    name = files.canonical(name)
    if name not in registry.names():
        raise UsageError(
            f"--hypervisor {name!r} is not offered", "choose one of: " + ", ".join(registry.names())
        )
    machine.require_hypervisor(name)
    return name


def _rootfs(image: Any) -> dict[str, str]:
    if image.rootfs_dir:
        return {"kind": "share", "source": image.rootfs_dir}
    return {"kind": "erofs", "path": image.rootfs_path}


def _more(arguments: Arguments, seldom: Sequence[Option]) -> RunOptions | None:
    """Those of *seldom* that are on the command line; None without any."""
    keys = (option.key for option in seldom)
    if not any(arguments.flag(k) or arguments.value(k) is not None or arguments.many(k) for k in keys):
        return None
    from kata.cli.run_options import RunOptions

    return RunOptions(arguments)


class _Choice:
    """The options of `run` and `create`, checked before anything is created."""

    def __init__(self, arguments: Arguments, seldom: Sequence[Option]) -> None:
        a = arguments
        name, hostname, cpus, memory = (
            # Scripts give empty names, which are none to Docker, and its users write 0 for no limit.
            a.value("name") or None,
            a.value("hostname") or None,
            values.limit(a.value("cpus")),
            values.limit(a.value("memory")),
        )
        self.name = None if name is None else values.name(name, "--name", "container")
        if name is None and a.flag("replace"):
            raise UsageError("--replace is about the container with the same name", "--name NAME")
        self.hostname = None if hostname is None else values.hostname(hostname)
        self.cpus = None if cpus is None else values.cpus(cpus)
        self.memory = None if memory is None else values.container_memory(memory)
        pids = a.value("pids_limit")
        self.pids = None if pids is None else values.whole(pids, "--pids-limit", least=-1)
        self.tty, self.interactive = a.flag("tty"), a.flag("interactive")
        self.network, self.networks = _networks(a)
        self.storage = self._one_of(a, "storage", ("disk", "tmpfs"))
        self.pull = self._one_of(a, "pull", ("missing", "always", "never"))
        self.platform = _runnable(a.value("platform"))
        self.ports = [entry for text in a.many("publish") for entry in values.port(text)]
        if (self.ports or a.flag("publish_all")) and self.network == "none":
            raise UsageError("-p needs a network, and --network none has none", "leave out one of the two")
        storage_size = a.value("storage_size")
        if storage_size is not None and self.storage != "disk":
            raise UsageError(
                f"--storage-size is about a file on the host, and --storage {self.storage} has none",
                "leave out one of the two",
            )
        self.storage_size = (
            DEFAULT_STORAGE if storage_size is None else values.size(storage_size, "--storage-size")
        )
        if self.storage_size < 16 << 20:
            raise UsageError(
                f"--storage-size {storage_size!r} is too small for a file system", "at least 16m"
            )
        self.hypervisor = _hypervisor(a.value("hypervisor"))
        self._systemd = self._one_of(a, "systemd", ("true", "false", "always"))
        stop_signal = a.value("stop_signal")
        self.stop_signal = None if stop_signal is None else _signal_name(stop_signal)
        self._env = values.environment(a.many("env"), a.many("env_file"))
        self.binds: list[tuple[str, str, list[str]]] = []
        self.disk_volumes: list[Volume] = []
        self._tmpfs = [values.tmpfs(text) for text in a.many("tmpfs")]
        self.more = _more(a, seldom)
        if self.more is not None:
            self._env = [*self.more.env, *self._env]
        self._read_volumes(a.many("volume"), a.many("mount"))
        self._arguments = a

    def _read_volumes(self, short: list[str], long: list[str]) -> None:
        """Read ``-v`` and ``--mount``."""
        own = [text for text in short if _is_volume(text)]
        self.binds = [values.volume(text) for text in short if text not in own]
        if self.more is not None:
            self.binds += self.more.binds
        if own or long:
            from kata.cli import mounts

            found = mounts.Mounts()
            for text in own:
                found.add_short(text)
            for text in long:
                found.add(text)
            self.binds += found.binds
            self._tmpfs += found.tmpfs
            self.disk_volumes = found.volumes
            mounts.check_number(len(found.volumes))
        destinations = [
            *(volume.destination for volume in self.disk_volumes),
            *(destination for _, destination, _ in self.binds),
            *(destination for destination, _ in self._tmpfs),
        ]
        named = [volume.name for volume in self.disk_volumes if volume.name]
        if len(set(named)) < len(named):
            twice = next(one for one in named if named.count(one) > 1)
            raise UsageError(
                f"the volume {twice} is mounted at two places", "use one place, and directories in it"
            )
        if len(set(destinations)) < len(destinations):
            twice = next(one for one in destinations if destinations.count(one) > 1)
            raise UsageError(f"there are two mounts at {twice}", "leave out one of the two")

    @staticmethod
    def _one_of(arguments: Arguments, key: str, allowed: tuple[str, ...]) -> str:
        """The option's value; the first allowed one if it was not given."""
        value = arguments.value(key)
        if value is not None and value not in allowed:
            raise UsageError(f"--{key} {value!r} is not offered", "choose one of: " + ", ".join(allowed))
        return value or allowed[0]

    def fill(self, request: Any) -> None:
        a = self._arguments
        entrypoint = a.value("entrypoint")
        request.entrypoint = None if entrypoint is None else [entrypoint] if entrypoint else []
        request.env = self._env
        request.workdir = a.value("workdir") or ""
        if request.workdir and not request.workdir.startswith("/"):
            raise UsageError(
                f"--workdir {request.workdir!r} is not absolute", f"--workdir /{request.workdir}"
            )
        request.user = a.value("user") or ""
        request.terminal = self.tty
        request.read_only, request.privileged = a.flag("read_only"), a.flag("privileged")
        request.systemd = self._systemd
        request.cap_add, request.cap_drop = a.many("cap_add"), a.many("cap_drop")
        request.cpus, request.memory, request.pids_limit = self.cpus, self.memory, self.pids
        request.tmpfs = self._tmpfs
        # A source that is not absolute is relative to the bundle, which is the container's directory.
        request.volumes = [
            *self.binds,
            *(
                (volume_file(number), volume.destination, ["rbind", "rprivate", volume.access])
                for number, volume in enumerate(self.disk_volumes)
            ),
        ]

    def published(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """The ports that are published: those of ``-p``, and with ``-P`` what the image exposes.

        Args:
            image: The ``config`` object of its configuration.
        """
        every = self._arguments.flag("publish_all")
        if not every and all(one["host_port"] for one in self.ports):
            return self.ports
        from kata.cli import run_options

        found = [*(image.get("ExposedPorts") or ()), *self._arguments.many("expose")]
        exposed = run_options.exposed_ports(found, self.ports) if every else []
        return run_options.with_host_ports([*self.ports, *exposed])

    def add_volumes(self, destinations: list[str]) -> None:
        """Add volumes on disks of their own, besides those of the options."""
        from kata.cli import mounts

        self.disk_volumes += [mounts.Volume(destination) for destination in destinations]
        mounts.check_number(len(self.disk_volumes), len(destinations))


def _is_volume(text: str) -> bool:
    """Whether a ``-v`` is about a volume: without a source, or with a name as its source."""
    source, colon, _ = text.partition(":")
    if not colon:
        return text.startswith("/")
    return bool(source) and "/" not in source and source not in (".", "..")


def volume_file(number: int) -> str:
    """The name of a volume's file in the container's directory."""
    return f"volume-{number}.img"


def _signal_name(text: str) -> str:
    from kata.cli.signals import number

    number(text)
    return text
