"""What a container sees of the host: the bind mounts of its spec, and what each becomes in the guest.

Most are shown live through the sandbox's share. Some kinds are not, because a share cannot be what they are:

* ``/dev/shm`` of a pod, and a Kubernetes volume in memory (``emptyDir`` with ``medium: Memory``), are memory that
  processes map together, which takes one kernel: they become a tmpfs of the guest, of the same size, which lives as
  long as the sandbox. Nothing is lost by that, since only the pod's containers use them.
* Kubernetes' volumes whose content changes under a running container (ConfigMaps, secrets, projected tokens and the
  downward API) are copied by the agent whenever they do, so that whoever watches them there hears of it (inotify).
* A file system image among the container's disks (``kata run --mount type=volume``) is a directory of that disk.
* In a machine without a share what is small and read-only is copied (`kata.engine.containers.copies`).
* Device nodes map to the guest's own or are refused (`kata.engine.containers.nodes`); fifos are refused. A unix socket
  becomes one in the guest whose connections are carried to the host's (`kata.engine.forwarding.sockets`).

Sources: a kubelet's directory (``pods/UID/volumes/kubernetes.io~KIND/NAME``, ``pods/UID/volume-subpaths``);
runtime-spec config.md, "Mounts"; mount_namespaces(7).
"""

from __future__ import annotations

import os
import re
import stat

from kata import mount_table
from kata.engine.containers import copies, nodes, rootfs, spec
from kata.engine.lifecycle.volumes import absent
from kata.errors import ConfigError, HostError
from kata.proto.agent_pb import Storage
from kata.settings import RootfsSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from kata.engine.access import MachineAccess
    from kata.engine.forwarding import sockets
    from kata.engine.hostns import Namespaces
    from kata.engine.tasks import Tasks
    from kata.settings import DiskVolumeSettings, SandboxSettings

_SANDBOX = f"{spec.GUEST_RUN}/sandbox"
"""Storages below it are made once and last as long as the sandbox; the agent knows this path, too."""
_CHANGING = re.compile(r"/kubernetes\.io~(configmap|secret|projected|downward-api)/[^/]+/?$")
_IN_MEMORY = "/kubernetes.io~empty-dir/"
_FOLLOWS = frozenset({"slave", "rslave", "shared", "rshared"})
_VOLUME = "kata.volume."
"""Beginning of the driver options that tell our agent what belongs into a volume (``agent/src/volume_disk.rs``)."""
_RECURSIVELY_READONLY = "rro"
"""containerd's namespace for Docker's containers."""
_NO_SHARE = (
    "Use a snapshotter whose snapshots are disks (devmapper, blockfile), or a hypervisor and a configuration with a"
    " share (kata config show --origin: hypervisor_name, shared_fs)."
)


class ContainerMounts:
    """What one container sees of the host. Blocks: for the helper thread.

    Args:
        settings: The sandbox's.
        runtime: The machine, with its share.
        tasks: The engine's.
        forwarding: Gives the state that all forwarded sockets of the sandbox have in common.
        container_id: The container.

    Attributes:
        storages: What the agent is to mount for the container's binds, in this order.
        copies: What is to be written in the guest before the container is made, for want of a share.
        relay: Carries connections to the sockets among them; None without one.
    """

    __slots__ = (
        "_container_id",
        "_forwarding",
        "_names",
        "_runtime",
        "_settings",
        "_shallow",
        "_tasks",
        "copies",
        "relay",
        "storages",
    )

    def __init__(
        self,
        settings: SandboxSettings,
        runtime: MachineAccess,
        tasks: Tasks,
        forwarding: Callable[[], sockets.SocketForwardingState],
        container_id: str,
    ) -> None:
        self._settings = settings
        self._runtime = runtime
        self._tasks = tasks
        self._forwarding = forwarding
        self._container_id = container_id
        self._names: list[str] = []
        self._shallow: dict[str, spec.GuestBind] = {}  # read-only, but maybe not what is mounted below them
        self.storages: list[Storage] = []
        self.copies: list[copies.Copy] = []
        self.relay: sockets.Relay | None = None

    def add_all(self, config: dict[str, Any], root: rootfs.Rootfs | None) -> list[spec.GuestBind]:
        """Bind the sources of the spec's bind mounts, and a root directory of the host, below the share.

        Args:
            config: The spec.
            root: What the container's root file system is made of.

        Returns:
            What each of `spec.host_binds` is in the guest.

        Raises:
            KataError: A source cannot be shared.
        """
        binds = spec.host_binds(config)
        here = MountTable() if binds else MountTable([])
        guest_binds = [self._of_guest(mount, here) for mount in binds]
        to_be_shared = [number for number, bind in enumerate(guest_binds) if bind is None]
        trees = self._trees([str(binds[number].get("source") or "") for number in to_be_shared], here)
        try:
            for number, tree in zip(to_be_shared, trees, strict=True):
                guest_binds[number] = self._shown(binds[number], tree)
        finally:
            for tree in trees:
                if isinstance(tree, int):
                    os.close(tree)
        directory = rootfs.shared_directory(root)
        if directory:
            share = self._runtime.machine.share
            if share is None:
                raise ConfigError(
                    f"cannot share the root file system {directory}: the sandbox was started without a share",
                    _NO_SHARE,
                )
            name = rootfs.share_name(self._container_id)
            root_tree: int | OSError | None = None
            if isinstance(root, rootfs.HostDirectory):
                layered = False
                # CRI-O mounts the roots of its containers itself, where no other mount namespace gets to see it.
                if root.mounted_by_host:
                    [root_tree] = self._trees([directory], MountTable())
            else:
                layered = isinstance(root, RootfsSettings) and (
                    root.upper_slot is not None or bool(root.upper)
                )
            if isinstance(root_tree, OSError):
                raise absent(directory, root_tree)
            try:
                self._names.append(share.add(directory, name, readonly=layered, tree=root_tree))
            finally:
                if root_tree is not None:
                    os.close(root_tree)
        self._identify()
        return [bind for bind in guest_binds if bind is not None]

    def add_file(self, name: str, content: bytes) -> None:
        """Show the guest a small file, writable, below its share directory."""
        assert self._runtime.machine.share is not None
        self._names.append(self._runtime.machine.share.add_file(name, content))

    def remove_all(self) -> None:
        """Take everything back."""
        if self._runtime.machine.share is not None:
            for name in reversed(self._names):
                self._runtime.machine.share.remove(name)
        self._names.clear()

    # ---- shown live ----

    def _trees(self, sources: Sequence[str], here: MountTable) -> list[int | OSError | None]:
        """For each source whose mounts we may not see as the host does a copy of what the host sees, else None."""
        host = self._runtime.machine.host
        found: list[int | OSError | None] = [None] * len(sources)
        # One that a person started this very moment has the same mounts.
        wanted = [n for n, source in enumerate(sources) if host is not None and not here.is_live(source)]
        if host is None or not wanted:
            return found
        try:
            trees = host.open_trees([sources[number] for number in wanted])
        except OSError as error:
            raise HostError(f"cannot look at the volumes on the host: {error.strerror}") from error
        for number, tree in zip(wanted, trees, strict=True):
            found[number] = tree
        return found

    def _shown(self, mount: dict[str, Any], tree: int | OSError | None) -> spec.GuestBind:
        source, options = str(mount.get("source") or ""), list(mount.get("options") or ())
        if isinstance(tree, int):
            about = os.fstat(tree)
            if stat.S_ISSOCK(about.st_mode):
                return self._socket(source, options, about, self._runtime.machine.host)
        share = self._runtime.machine.share
        if isinstance(tree, OSError):
            raise absent(source, tree)
        if share is None:
            return self._copied(mount, tree)
        readonly = _RECURSIVELY_READONLY in options or "ro" in options
        policy = self._settings.client.recursive_readonly
        recursive = readonly and (
            _RECURSIVELY_READONLY in options
            or policy == "always"
            or (policy == "rbind" and "rbind" in options)
        )
        base = os.path.basename(source.rstrip("/")) or "root"
        name = share.add(
            source,
            f"{self._container_id}-{os.urandom(8).hex()}-{base}",
            readonly=readonly,
            tree=tree,
            follows=not _FOLLOWS.isdisjoint(options),
            whole=recursive,
        )
        self._names.append(name)
        place = f"{spec.GUEST_SHARE}/{name}"
        if _CHANGING.search(source):
            copy = f"{spec.GUEST_RUN}/{self._container_id}/followed/{len(self.storages)}"
            self.storages.append(
                Storage(driver="watchable-bind", source=place, fstype="bind", mount_point=copy)
            )
            return spec.GuestBind(copy, options)
        bind = spec.GuestBind(place, options)
        if readonly and not recursive:
            self._shallow[name] = bind
        return bind

    def _copied(self, mount: dict[str, Any], tree: int | None) -> spec.GuestBind:
        """What is mounted as it is now, where nothing is shared."""
        source, options = str(mount.get("source") or ""), list(mount.get("options") or ())
        base = os.path.basename(source.rstrip("/")) or "root"
        place = f"{spec.GUEST_SHARE}/{self._container_id}-{os.urandom(8).hex()}-{base}"
        readonly = _RECURSIVELY_READONLY in options or "ro" in options
        try:
            self.copies += copies.gather(
                source if tree is None else f"/proc/self/fd/{tree}",
                place,
                str(mount.get("destination")),
                readonly=readonly,
                named=source,
            )
        except OSError as error:
            raise absent(source, error) from None
        return spec.GuestBind(place, options)

    def _identify(self) -> None:
        if self._runtime.machine.share is not None:
            for name in self._runtime.machine.share.identify(self._shallow):
                # In the guest a bind is one mount: read-only there would be the mounts below it, too. The host keeps
                # the guest from writing where it must not.
                bind = self._shallow[name]
                bind.options = [option for option in bind.options if option != "ro"]
        self._shallow.clear()

    # ---- what the guest has itself ----

    def _of_guest(self, mount: dict[str, Any], here: MountTable) -> spec.GuestBind | None:
        """What of the guest's own stands for a mount; None where the host's is shared."""
        source, options = str(mount.get("source") or ""), list(mount.get("options") or ())
        container = self._settings.container
        for volume in container.disk_volumes if container is not None else ():
            if source == volume.name:
                return self._on_disk(volume, str(mount.get("destination")), options)
        try:
            about = os.stat(source)
        except OSError:
            return self._in_memory(mount, here)  # told when it is shared
        node = nodes.guest_path(about)
        if node:
            return spec.GuestBind(node, options)
        if stat.S_ISSOCK(about.st_mode) and (self._runtime.machine.host is None or here.is_live(source)):
            return self._socket(source, options, about, None)
        return self._in_memory(mount, here)

    def _on_disk(self, volume: DiskVolumeSettings, destination: str, options: list[str]) -> spec.GuestBind:
        """The directory of a disk that is one of the container's volumes; the agent makes it at the first mount."""
        place = f"{spec.GUEST_RUN}/{self._container_id}/volumes/{volume.slot}"
        about = [f"{_VOLUME}root={rootfs.path(self._container_id)}", f"{_VOLUME}path={destination}"]
        if not volume.copy:
            about.append(f"{_VOLUME}empty")
        self.storages.append(
            Storage(
                driver="blk",
                source=self._runtime.machine.disk_addresses[volume.slot],
                fstype="ext4",
                # What is deleted there frees space on the host, too.
                options=["discard"],
                driver_options=about,
                mount_point=place,
            )
        )
        return spec.GuestBind(f"{place}/data", options)

    def _socket(
        self, source: str, options: list[str], about: os.stat_result, host: Namespaces | None
    ) -> spec.GuestBind:
        """The guest's socket that stands for one of the host's."""
        from kata.engine.forwarding import sockets

        forwarding = self._forwarding()
        if self.relay is None:
            self.relay = sockets.Relay(self._runtime, self._tasks, forwarding.room)
        one = sockets.UnixSocket(source, about, forwarding.number(), host)
        self.relay.add(one)
        return spec.GuestBind(one.place, options)

    def _in_memory(self, mount: dict[str, Any], here: MountTable) -> spec.GuestBind | None:
        """The tmpfs that stands for one of the host's; None for any other mount."""
        source, options = str(mount.get("source") or ""), list(mount.get("options") or ())
        is_shm = os.path.normpath(str(mount.get("destination"))) == "/dev/shm"
        if not (is_shm or "/volume-subpaths/" in source or _IN_MEMORY in source):
            return None
        real = os.path.realpath(source)
        at = here.holding(real)
        if at is None or at.fstype != "tmpfs":
            return None
        volume = here.volumes_in_memory.get(at.device)
        if volume is not None:
            inner = os.path.normpath(f"{at.root}/{os.path.relpath(real, at.target)}").lstrip("/")
            place = f"{_SANDBOX}/ephemeral/{at.device.replace(':', '-')}"
            self.storages.append(_tmpfs(volume.target, place))
            if inner:
                mode = stat.S_IMODE(os.stat(real).st_mode)
                place = f"{place}/{inner}"
                self.storages.append(Storage(driver="local", options=[f"mode={mode:o}"], mount_point=place))
            return spec.GuestBind(place, options)
        if is_shm and at.target == real:
            self.storages.append(_tmpfs(real, f"{_SANDBOX}/shm"))
            return spec.GuestBind(f"{_SANDBOX}/shm", options)
        return None


def _tmpfs(like: str, mount_point: str) -> Storage:
    about, size = os.stat(like), os.statvfs(like)
    options = [
        *("nosuid", "nodev"),
        f"mode={stat.S_IMODE(about.st_mode):o}",
        f"uid={about.st_uid}",
        f"gid={about.st_gid}",
    ]
    if size.f_blocks:
        options.append(f"size={size.f_blocks * size.f_frsize}")
    return Storage(
        driver="ephemeral", source="tmpfs", fstype="tmpfs", options=options, mount_point=mount_point
    )


class MountTable:
    """The mounts of our namespace, for many questions.

    Args:
        mounts: The kernel's list; without it as it is now.

    Attributes:
        volumes_in_memory: The whole volumes of Kubernetes that are in memory, by their device.
    """

    __slots__ = ("_by_target", "volumes_in_memory")

    def __init__(self, mounts: list[mount_table.MountInfo] | None = None) -> None:
        mounts = mount_table.mounts() if mounts is None else mounts
        # Of two at one place the later one is uppermost.
        self._by_target = {entry.target: entry for entry in mounts}
        self.volumes_in_memory: dict[str, mount_table.MountInfo] = {}
        for entry in mounts:
            if _IN_MEMORY in entry.target and entry.root == "/":
                self.volumes_in_memory.setdefault(entry.device, entry)

    def holding(self, path: str) -> mount_table.MountInfo | None:
        """The mount that an absolute path without symbolic links is on."""
        while (found := self._by_target.get(path)) is None and path != "/":
            path = os.path.dirname(path)
        return found

    def is_live(self, source: str) -> bool:
        """Whether what the host mounts at or above a path, or has mounted there, appears in our mount namespace."""
        at = self.holding(os.path.realpath(source))
        return at is not None and "master:" in at.propagation
