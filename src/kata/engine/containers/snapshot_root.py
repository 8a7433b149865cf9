"""A root file system of an overlay snapshot that the guest has as disks, and not through the share.

The snapshot's read-only layers are one cached erofs image (`kata.storage.layer_images`), a disk that the machine has
once, whichever of its containers use it. What the container writes is on a second disk: a sparse file in the snapshot's
upper directory, so that whoever measures a snapshot sees what it takes. When the container's first process has ended,
the agent reads out what was written, and it is put into that directory (`kata.storage.upper`); the file goes when the
container is removed.

Where that cannot be, the root file system is shared live (`kata.engine.containers.hostroot`), with the reason in the
log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

from kata import children, launcher, paths, sysio
from kata.agent.client import LAYERS
from kata.agent.text import escape_line
from kata.engine.containers import rootfs, spec
from kata.engine.containers.attached_disks import AttachedDisks
from kata.errors import GuestProtocolError, KataError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine.access import MachineAccess
    from kata.engine.hostns import Namespaces
    from kata.engine.tasks import Tasks
    from kata.journal import Entry, Journal
    from kata.proto.task_pb import Mount
    from kata.settings import SnapshotSettings

IMAGE_S = 30.0
"""How long a container waits for the image of its layers, in seconds; it starts by the share then, and the image is for
the next one."""
IMAGE_MOST_S = 600.0
"""The same where there is no share."""
TRIM_S = 30.0
"""How often it is looked whether a disk has grown, in seconds."""
_TRIM_BYTES = 16 << 20
"""By so much, for its guest to be asked what of it is not used."""
DISK_NAME = ".kata-writable-layer.img"
_KNOWN_OPTIONS = frozenset(
    {"rw", "index=off", "index=on", "metacopy=off", "redirect_dir=off", "xino=off", "xino=on", "xino=auto", "volatile"}
)  # fmt: skip
"""Options of an overlay, beside its directories, that change nothing of what it shows."""
_MIB = 1 << 20
_INODE_RATIO = 4096
"""The guest's disk has no more than one file for so many bytes."""
_READ_S = 60.0
_BACK_FREE_S = 20.0
_BACK_MOST_S = 600.0
_BACK_BYTES_PER_S = 1 << 20
_BACK_ENTRIES_PER_S = 200
"""What the guest has written takes at most as long as this says: a slow one is given up."""
_DISCARD_S = 5.0
"""Of the helper thread's time at once; longer than the names of a directory take to read, however many there are."""


class Layers:
    """The directories of an overlay.

    Args:
        lower: The read-only ones, the highest first.
        upper: The writable one.
    """

    __slots__ = ("lower", "upper")

    def __init__(self, lower: list[str], upper: str) -> None:
        self.lower = lower
        self.upper = upper


def layers_of(mounts: Sequence[Mount]) -> Layers | str:
    """The directories of a root file system; or why it cannot be made of disks."""
    if len(mounts) != 1 or mounts[0].type != "overlay" or mounts[0].target:
        return "it is no overlay"
    lower: list[str] = []
    upper = ""
    for option in mounts[0].options:
        key, _, value = option.partition("=")
        if key == "lowerdir" and "\\" not in value:
            lower = value.split(":")
        elif key == "upperdir":
            upper = value
        elif key != "workdir" and option not in _KNOWN_OPTIONS:
            return f"it is mounted with {option}"
    if not (lower and upper and all(path.startswith("/") for path in (*lower, upper))):
        return "it is not made of directories to read and one to write to"
    return Layers(lower, upper)


def is_wanted(upper_layer: str, config: Mapping[str, Any]) -> bool:
    """Whether a container's root file system is to be on disks.

    Args:
        upper_layer: As configured: ``live``, ``block``, or ``auto``, which is ``block`` for containers of Kubernetes'
            pods, where nobody looks from the host.
        config: Its specification.
    """
    if spec.container_type(config) == "pod_sandbox":
        return False  # it runs one program, and is the first: nothing would be won
    if upper_layer == "auto":
        return spec.container_type(config) == "pod_container" and not spec.created_by_crio(config)
    return upper_layer == "block"


class LayerDisks:
    """The layer images of a sandbox: what makes them, and the disks that its machine has of them.

    Args:
        runtime: The machine.
        tasks: The engine's.
        journal: The sandbox's.
    """

    def __init__(self, runtime: MachineAccess, tasks: Tasks, journal: Journal) -> None:
        self._runtime = runtime
        self._tasks = tasks
        self._journal = journal
        self._lock = asyncio.Lock()
        self._disks: dict[str, tuple[AttachedDisks, str]] = {}
        self._users: dict[str, int] = {}
        self._makers: dict[tuple[str, ...], asyncio.Task[str]] = {}

    async def image(self, lower: Sequence[str], most_mib: int, patience_s: float = IMAGE_S) -> str:
        """The image of these layers; it is made if need be, which goes on when nobody waits any more.

        Args:
            lower: Directories, the highest first.
            most_mib: What all images of the host may take.
            patience_s: How long to wait.

        Returns:
            Its path.

        Raises:
            KataError: It cannot be made, or not in time.
        """
        found = await self._tasks.run_blocking(_find, lower)
        if found:
            return found
        layers = tuple(lower)
        if layers not in self._makers:
            self._makers[layers] = self._tasks.create_task(self._make(layers, most_mib))
        maker = self._makers[layers]
        try:
            problem = await asyncio.wait_for(asyncio.shield(maker), patience_s)
        except TimeoutError:
            raise KataError(f"its image is not ready after {patience_s:g} s") from None
        found = "" if problem else await self._tasks.run_blocking(_find, lower)
        if not found:
            raise KataError(problem or "its image is gone")
        return found

    async def _make(self, layers: tuple[str, ...], most_mib: int) -> str:
        """Have a child make it; what went wrong, or nothing."""
        child = children.SupervisedChild("the program that makes images of layers")
        ended = asyncio.Event()
        argv = [*launcher.command(), "layer-image", str(most_mib * _MIB), *layers]
        environment = {**children.ENVIRONMENT, "KATA_STATE_DIR": paths.state_dir()}
        try:
            child.start(argv, self._journal, "layer-image", env=environment)
            child.on_exit(ended.set)
            await ended.wait()
            return child.failure() if child.poll() else ""
        except OSError as error:
            return f"no program can be started: {error.strerror}"
        finally:
            child.unwatch()
            child.kill()
            child.close()
            del self._makers[layers]

    async def take(self, path: str) -> str:
        """Have an image as a disk; its address in the guest.

        Raises:
            KataError: The machine has no room for it, or is gone.
        """
        async with self._lock:
            if path not in self._disks:
                disk = AttachedDisks(self._runtime, self._tasks)
                try:
                    address = await disk.insert(path, readonly=True)
                except BaseException:
                    await disk.remove_all()  # who is cancelled leaves it on its way into the machine
                    raise
                self._disks[path] = (disk, address)
                self._users[path] = 0
            self._users[path] += 1
            return self._disks[path][1]

    async def give_back(self, path: str) -> None:
        """One container less uses it; the guest has let go of it."""
        async with self._lock:
            self._users[path] -= 1
            if not self._users[path]:
                await self._disks.pop(path)[0].remove_all()
                del self._users[path]


def _find(lower: Sequence[str]) -> str:
    """The image, if there is one. Blocks.

    Raises:
        KataError: There can be none of these layers.
    """
    from kata.storage import layer_images

    try:
        identities = layer_images.identify(lower)
    except OSError as error:
        raise KataError(f"a layer cannot be read: {error.strerror}") from None
    if not identities:
        raise KataError("its layers' file system does not say when a directory was made")
    return layer_images.find(layer_images.key_of(identities))


class SnapshotRoot:
    """The root file system of one container.

    Args:
        container_id: The container.
        runtime: The machine.
        tasks: The engine's.
        journal: The sandbox's.
        disks: The sandbox's images.
        settings: What is configured.
    """

    def __init__(
        self,
        container_id: str,
        runtime: MachineAccess,
        tasks: Tasks,
        journal: Journal,
        disks: LayerDisks,
        settings: SnapshotSettings,
    ) -> None:
        self._id = container_id
        self._runtime = runtime
        self._tasks = tasks
        self._journal = journal
        self._disks = disks
        self._settings = settings
        self._upper = AttachedDisks(runtime, tasks)
        self._directory = ""
        self._image = ""
        self._entry: Entry | None = (
            None  # while there is something in the directory that has to go if we die
        )
        self._file: Entry | None = None  # the disk's file, when that alone has to
        self._is_ended = False
        self._trimming: asyncio.Task[None] | None = None

    async def make(
        self, mounts: Sequence[Mount], *, is_only_way: bool = False
    ) -> rootfs.LayerDisksRoot | None:
        """Make it of disks; None, with a line in the log, where that cannot be. Nothing is left then.

        Args:
            mounts: What the client would have mounted.
            is_only_way: The machine has no share: no image is given up for taking long, and what fails is an error.

        Raises:
            UnsupportedError: It cannot be, and there is no other way.
        """
        try:
            return await self._make(mounts, IMAGE_MOST_S if is_only_way else IMAGE_S)
        except KataError as error:
            await self.remove()
            if is_only_way:
                raise UnsupportedError(
                    "the root file system cannot be shared with a machine that has no share, nor be made of disks: "
                    + error.message,
                    "Take a hypervisor that shares directories (docs/hypervisors.md).",
                ) from error
            self._tasks.log(
                f"container {self._id}: its root file system is shared live: {escape_line(error.message)}",
                "info",
            )
            return None
        except BaseException:
            await self.remove()
            raise

    async def _make(self, mounts: Sequence[Mount], patience_s: float) -> rootfs.LayerDisksRoot:
        layers = layers_of(mounts)
        if isinstance(layers, str):
            raise KataError(layers)
        await self._tasks.run_blocking(_require_plain, layers, self._runtime.machine.host)
        image = await self._disks.image(layers.lower, self._settings.images_mib, patience_s)
        agent = await self._runtime.ready()
        if LAYERS not in agent.features:
            raise KataError("the guest's agent cannot give back what is written to a disk")
        capabilities = self._runtime.machine.capabilities
        if capabilities is not None and not capabilities.attach_disk:
            raise KataError("its machine can be given no disk while it runs")
        lower = await self._disks.take(image)
        self._image = image
        await self._tasks.run_blocking(self._make_disk, layers.upper)
        upper = await self._upper.insert(self._disk_path, readonly=False, ephemeral=True)
        self._trimming = self._tasks.create_task(self._trim(agent))
        return rootfs.LayerDisksRoot(lower, upper)

    async def _trim(self, agent: AgentClient) -> None:
        """While it runs, have what the container deletes no longer be counted."""
        seen = 0
        while True:
            await asyncio.sleep(TRIM_S)
            try:
                if sysio.disk_bytes(os.stat(self._disk_path)) < seen + _TRIM_BYTES:
                    continue
                await agent.trim_layer(rootfs.upper_path(self._id))
                seen = sysio.disk_bytes(os.stat(self._disk_path))
            except (KataError, OSError):
                return  # its disk cannot be told, or is gone

    @property
    def _disk_path(self) -> str:
        return os.path.join(self._directory, DISK_NAME)

    def _make_disk(self, directory: str) -> None:
        from kata.storage import ext4

        entry = self._journal.begin("content", path=directory)
        self._journal.commit(entry)
        self._entry = entry
        self._directory = directory
        ext4.make_writable(
            self._disk_path,
            self._settings.upper_mib * _MIB,
            "writable layer",
            "rootfs_upper_layer_size",
            scratch=True,
            directories=False,
        )

    # ---- the end ----

    async def carry_back(self, config: Mapping[str, Any]) -> None:
        """Put what the container has written into the snapshot's upper directory: all of it or, with a line in the log,
        nothing. Once; does not raise.

        Args:
            config: The container's specification.
        """
        if not self._directory or self._is_ended:
            return
        self._is_ended = True
        self._stop_trimming()
        try:
            await self._carry_back(_capabilities(config))
        except (KataError, OSError) as error:
            why = error.message if isinstance(error, KataError) else str(error)
            self._tasks.log(f"container {self._id}: what it has written is lost: {escape_line(why, 512)}")
            self._tasks.log(await self._discard() or "the upper directory is empty", "debug")

    async def _carry_back(self, capabilities: frozenset[str]) -> None:
        from kata.storage.upper import UpperLayer

        agent = self._runtime.living_agent
        if agent is None:
            raise KataError("its virtual machine has gone")
        with contextlib.suppress(KataError):  # nobody is left, usually
            await agent.signal_all(self._id, sysio.SIGKILL)
        size = self._settings.upper_mib * _MIB
        directory = sysio.Fd(os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        layer = UpperLayer(
            directory.raw,
            most_bytes=size,
            most_entries=size // _INODE_RATIO,
            capabilities=capabilities,
        )

        def close() -> None:
            layer.close()
            directory.close()

        try:
            await self._read_out(agent, layer.add, lambda: (layer.bytes, layer.entries))
            await self._tasks.run_blocking(layer.finish)
        finally:
            # By the helper thread, which is still at work with them where this was cancelled.
            await self._tasks.run_blocking(close)
        if layer.dropped:
            self._tasks.log(
                f"container {self._id}: {layer.dropped} devices or attributes that it has made are left out"
            )
        await self._tasks.run_blocking(self._keep)

    async def _read_out(self, agent: AgentClient, add: Any, so_far: Any) -> None:
        """Take part for part; the next one is on its way while one is written."""
        began = time.monotonic()
        source = f"{rootfs.upper_path(self._id)}"
        asked = asyncio.ensure_future(agent.read_layer(source, b"", _READ_S))
        try:
            while True:
                answer = await asked
                if answer.next:
                    asked = asyncio.ensure_future(agent.read_layer(source, answer.next, _READ_S))
                await self._tasks.run_blocking(add, answer.parts)
                if not answer.next:
                    return
                if not answer.parts:
                    raise GuestProtocolError("the guest has sent nothing, and more is to come")
                took_bytes, took_entries = so_far()
                allowed_s = (
                    _BACK_FREE_S + took_bytes / _BACK_BYTES_PER_S + took_entries / _BACK_ENTRIES_PER_S
                )
                if time.monotonic() - began > min(allowed_s, _BACK_MOST_S):
                    raise KataError(
                        f"the guest is too slow: {took_bytes} bytes in {time.monotonic() - began:.0f} s"
                    )
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    def _keep(self) -> None:
        """What has been carried back stays, whatever becomes of us; the disk's file still goes."""
        assert self._entry is not None
        self._file = self._journal.begin("file", path=self._disk_path)
        self._journal.commit(self._file)
        self._journal.mark_gone(self._entry)
        self._entry = None

    async def _discard(self) -> str:
        """Remove what has been carried back so far. The problem; empty on success.

        It may be millions of files: the helper thread has time for others in between.
        """
        from kata import journal_undo

        deadline = time.monotonic() + _BACK_MOST_S
        problem = journal_undo.OUT_OF_TIME
        while problem == journal_undo.OUT_OF_TIME and time.monotonic() < deadline:
            problem = await self._tasks.run_blocking(self._discard_some)
        return problem

    def _discard_some(self) -> str:
        from kata import journal_undo

        try:
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            return str(error)
        with sysio.Fd(fd) as directory:
            return journal_undo.empty(
                directory.raw, self._directory, time.monotonic() + _DISCARD_S, DISK_NAME
            )

    def _stop_trimming(self) -> None:
        if self._trimming is not None:
            self._trimming.cancel()
            self._trimming = None

    async def remove(self) -> None:
        """Take the disks out of the machine, when the guest has let go of them, and remove the writable one's file."""
        self._stop_trimming()
        await self._upper.remove_all()
        if self._image:
            image, self._image = self._image, ""
            await self._disks.give_back(image)
        if self._directory:
            await self._tasks.run_blocking(self._remove_disk)

    def _remove_disk(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._disk_path)
        for entry in (self._entry, self._file):
            if entry is not None:
                self._journal.mark_gone(entry)
        self._entry = self._file = None
        self._directory = ""


def _require_plain(layers: Layers, host: Namespaces | None) -> None:
    """Check that these are the host's directories, and no mounts, and that nothing has been written yet. Blocks.

    Raises:
        KataError: It is not so.
    """
    paths = [*layers.lower, layers.upper]
    try:
        for path in paths:
            if os.stat(path).st_dev != os.stat(os.path.dirname(os.path.realpath(path))).st_dev:
                raise KataError("its layers are mounts of the host")
        if os.listdir(layers.upper):
            raise KataError("something has been written to it before")
        # What the host has mounted since we have a mount namespace of our own may not be seen here.
        if host is not None and not host.are_seen_here(paths):
            raise KataError("its layers are mounts that only the host sees")
    except OSError as error:
        raise KataError(f"its directories cannot be read: {error.strerror}") from None


def _capabilities(config: Mapping[str, Any]) -> frozenset[str]:
    """What a container's processes may have had."""
    given = (config.get("process") or {}).get("capabilities") or {}
    return frozenset(str(name) for name in given.get("bounding") or ())
