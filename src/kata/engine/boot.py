"""How a sandbox comes up, from top to bottom.

`power_on` runs before anything heavy is imported: the virtual machine boots while Python loads the rest of
the engine. `bring_up` then waits for the agent and tells the guest what it has to know.
"""

from __future__ import annotations

import os
import time

from kata import children
from kata.engine import turns, volumes
from kata.errors import GuestAssetError, HostError, KataError
from kata.hypervisor.qemu import command as qemu_command
from kata.hypervisor.qemu import process as qemu_process
from kata.hypervisor.qemu import root as qemu_root
from kata.hypervisor.qemu import slots
from kata.hypervisor.settings import Disk, Nic, VMSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine import hostns
    from kata.engine.sandbox import Sandbox
    from kata.hypervisor import virtiofsd
    from kata.journal import Journal
    from kata.network.user import NetworkPlan
    from kata.resources.host_cgroup import HostCgroup
    from kata.settings import GuestSettings, SandboxSettings

READY_S = 60.0
"""How long a guest may take to answer; it takes a second, but a host may be busy, or itself an emulated machine.
The sandbox's settings may say otherwise (`kata.settings.GuestSettings`)."""
KERNEL_PARAMETERS = (
    "quiet",  # a console line costs an emulated guest a third of a millisecond
    "panic=-1",  # a guest that panics ends its machine at once, with its reason on the console
    "net.ifnames=0",
    "dummy.numdummies=0",  # the driver would put an interface into every guest
    "cgroup_no_v1=all",
    "pci=lastbus=0",  # there is one bus: look for no others
    "tsc=reliable",
    "no_timer_check",
    "noreplace-smp",
    "rcupdate.rcu_expedited=1",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    "i8042.noaux",
    "i8042.nopnp",
)
TURN_S = 1.0
"""How long a machine that is up keeps its turn for a first container."""
CONSOLE_NAME = "console.log"
# Not nosuid: an image's sudo and ping work as they do elsewhere. (What the host exports is nosuid for the host itself.)
SHARE_MOUNT_OPTIONS = {
    "9p": ["trans=virtio", "version=9p2000.L", "nodev"],
    "virtio-fs": ["nodev"],
}
SHARE_MSIZE = 512000
SEED_BYTES = 512


class Machine:
    """What `power_on` made.

    Attributes:
        cgroup: Its leaves in the host's cgroups, once there is a process to be put into them.
        files: The file server of the share, if the share is served by one.
        host: The host's namespaces, for hooks that a client's specification may have.
        network: The network, if the sandbox has one.
        process: The hypervisor's process.
        share: The share, if the sandbox has one.
        ready_ns: When there was nothing more to do but wait for a turn.
        started_ns: When the hypervisor was started.
        turn: The permission to boot, until the first container runs.
    """

    __slots__ = (
        "cgroup",
        "files",
        "host",
        "network",
        "process",
        "ready_ns",
        "share",
        "started_ns",
        "turn",
    )

    def __init__(self) -> None:
        self.cgroup: HostCgroup | None = None
        self.files: virtiofsd.FileServer | None = None
        self.host: hostns.Namespaces | None = None
        self.network: NetworkPlan | None = None
        self.process: qemu_process.QemuProcess | None = None
        self.share: volumes.Share | None = None
        self.ready_ns = 0
        self.started_ns = 0
        self.turn: turns.Turn | None = None

    def end_turn(self) -> None:
        """Let the next machine boot."""
        if self.turn is not None:
            self.turn.end()


def needs_share(settings: SandboxSettings) -> bool:
    """Whether anything of the host is to be seen in the guest."""
    if settings.described().share.disabled:  # who needs it is told so
        return False
    own = settings.container
    return settings.client.shares_from_start or (
        own is not None and (bool(own.volumes) or (own.rootfs is not None and own.rootfs.kind == "share"))
    )


def power_on(settings: SandboxSettings, run_dir: str, journal: Journal, machine: Machine) -> None:
    """Start the hypervisor and its helpers.

    Args:
        settings: The sandbox's.
        run_dir: Its directory.
        journal: Its journal.
        machine: Is filled in, as far as it gets.

    Raises:
        KataError: Something is missing on this host.
    """
    # Every machine has all its plugs, used or not: one shape for all starts, and for what comes later.
    if settings.client.keeps_host_mounts:
        from kata.engine import hostns

        machine.host = hostns.Namespaces()
    volumes.own_namespace()
    share = volumes.Share(run_dir, journal)
    share.prepare()
    if needs_share(settings):
        machine.share = share
    nics = [Nic(spare_mac())]
    if settings.network.mode != "none":
        from kata.network.plan import plan

        machine.network = plan(settings.network)
        machine.network.journal = journal
        nics = [machine.network.setup_nic(), *machine.network.more_nics]
    if machine.share is not None:
        machine.files = file_server(settings, share.path, run_dir, journal)
    vm = vm_settings(settings, share.path, run_dir, *nics, files=machine.files)
    if machine.network is not None:
        if "q35" not in vm.machine:
            machine.network.late_nics = 0  # the ports are PCI Express', which QEMU's other machines have not
        vm.late_nics = machine.network.late_nics
    if vm.accel == "kvm":
        # Under emulation the serial port is the faster of the two.
        from kata.hypervisor import vsock

        vm.vsock = vsock.allocate()
    # (There is a device for a share even where nothing is ever shown through it.)
    vm.serves_files = machine.share is not None and vm.share_fd < 0
    vm.root = qemu_root.prepare(run_dir, journal, serves_files=vm.serves_files)
    machine.ready_ns = time.monotonic_ns()
    machine.turn = turns.Turn(settings.notes.append)
    machine.started_ns = time.monotonic_ns()
    machine.process = qemu_process.spawn(vm, journal)
    pids = (machine.process.pid, os.getpid())
    machine.cgroup = limit(settings, os.path.basename(run_dir), vm, journal, pids)
    # Helpers are born into our cgroups.
    if machine.files is not None:
        machine.files.start()
    if machine.network is not None:
        machine.network.start(journal, settings.id)
    from kata.resources import oom_score

    oom_score.protect_engine()
    oom_score.set_machine(settings.oom_score_adj)


BY_9P = "files of the host are shared by 9p, which is slow and lacks much (docs/clients.md)"


def file_server(
    settings: SandboxSettings, directory: str, run_dir: str, journal: Journal
) -> virtiofsd.FileServer | None:
    """What serves the share by virtio-fs, not yet started; None where the hypervisor itself shall do so, by 9p.

    That is noted for the log, unless it was asked for.

    An emulated machine can have one if its guest's kernel is ready for it (`kata.hypervisor.qemu.command.bounces`).

    Raises:
        HostError: virtio-fs was asked for, and there is no virtiofsd.
        HypervisorError: The socket cannot be made.
    """
    from kata.hypervisor import virtiofsd  # most machines share nothing

    described, notes = settings.described(), settings.notes
    share = described.share
    if share.protocol == "virtio-9p":
        return None
    if described.hypervisor.accel == "tcg" and not described.guest.bounces:
        notes.append(f"{BY_9P}: the guest's kernel cannot have virtio-fs in an emulated machine")
        return None
    program = virtiofsd.find(share.daemon)
    if program is None:
        if share.protocol:
            raise HostError(
                f"there is no virtiofsd on this host, and {share.protocol} needs it",
                "apt-get install virtiofsd",
            )
        notes.append(f"{BY_9P}: this host has no virtiofsd")
        return None
    return virtiofsd.FileServer(program, directory, run_dir, journal, share.cache or "auto")


def limit(
    settings: SandboxSettings, name: str, vm: VMSettings, journal: Journal, pids: tuple[int, ...]
) -> HostCgroup:
    """Put processes of a sandbox into cgroups with the limits that belong to its size.

    Args:
        settings: The sandbox's.
        name: Of its cgroup where its specification names none.
        vm: How large the machine is.
        journal: The sandbox's.
        pids: The processes.
    """
    from kata.resources import host_cgroup, sizing, systemd_scope

    limits = host_cgroup.Limits(sizing.host_memory(vm.memory_mib, vm.accel), sizing.host_cpus(vm.vcpus))
    cgroup = host_cgroup.HostCgroup()
    cgroup.make(
        journal,
        host_cgroup.place_of(settings.cgroups_path, name),
        limits,
        all_controllers=settings.client.all_controllers,
        unit=systemd_scope.unit_of(settings.cgroups_path),
    )
    cgroup.join(pids)
    return cgroup


def spare_mac() -> str:
    """A random, locally administered address for the interface that leads nowhere."""
    return "02:6b:" + ":".join(f"{byte:02x}" for byte in os.urandom(4))


def _initrd(guest: GuestSettings, run_dir: str) -> str:
    """The initrd, with the archives behind it that are asked for: Linux unpacks one after the other."""
    if not guest.extensions:
        return guest.initrd
    # In the sandbox's own directory, which goes with it.
    whole = os.path.join(run_dir, "initrd")
    try:
        with open(whole, "wb") as target:
            for part in (guest.initrd, *guest.extensions):
                with open(part, "rb") as source:
                    data = source.read()
                target.write(data + bytes(-len(data) % 512))
    except OSError as error:
        raise GuestAssetError(
            f"cannot put the guest's initrd together: {error.filename or whole}: {error.strerror}",
            "kata guest build; the sandbox's directory needs room for it (KATA_RUN_DIR)",
        ) from None
    return whole


def vm_settings(
    settings: SandboxSettings,
    share_dir: str,
    run_dir: str,
    nic: Nic,
    *more_nics: Nic,
    files: virtiofsd.FileServer | None = None,
) -> VMSettings:
    """The virtual machine that *settings* describe, with a file server for its share if there is one."""
    described = settings.described()
    hypervisor, guest, size = described.hypervisor, described.guest, described.size
    # What bounce pages and long queues take is the machine's, and not its containers'.
    more_mib = qemu_command.BOUNCE_MIB if files is not None and hypervisor.accel == "tcg" else 0
    binary = hypervisor.path or children.find_program(qemu_process.PROGRAM) or ""
    more_mib += qemu_root.queues_mib(binary)
    disks: list[Disk | None] = [
        None if disk is None else Disk(disk.path, disk.readonly, disk.serial, disk.ephemeral)
        for disk in settings.disks
    ]
    return VMSettings(
        name=f"kata-{settings.id[:40]}",
        run_dir=run_dir,
        kernel=guest.kernel,
        initrd=_initrd(guest, run_dir),
        cmdline=_cmdline(guest),
        accel=hypervisor.accel,
        binary=binary,
        machine=hypervisor.machine or "q35",
        firmware=hypervisor.firmware or "qboot.rom",
        console=hypervisor.console or "serial",
        machine_options=hypervisor.machine_options,
        cpu_features=hypervisor.cpu_features,
        entropy=hypervisor.entropy,
        prealloc=hypervisor.prealloc,
        reclaim=hypervisor.reclaim,
        sandbox=hypervisor.seccomp,
        vcpus=size.vcpus,
        max_vcpus=size.max_vcpus,
        max_memory_mib=size.max_memory_mib + more_mib if size.max_memory_mib else 0,
        memory_mib=size.memory_mib + more_mib,
        disks=disks,
        disk_slots=max(settings.disk_slots, slots.FEWEST_DISKS, len(disks)),
        share_dir=share_dir,
        share_fd=-1 if files is None else files.fd,
        title=f"kata: machine of {settings.id}",
        nic=nic,
        more_nics=more_nics,
    )


def _cmdline(guest: GuestSettings) -> str:
    """The kernel's parameters: ours, and behind them, so that they prevail, those of the configuration."""
    words = KERNEL_PARAMETERS[1:] if guest.verbose else KERNEL_PARAMETERS
    return " ".join((*words, guest.cmdline)).strip()


# ---- from here on the event loop runs ----


async def bring_up(sandbox: Sandbox) -> AgentClient:
    """Wait for the agent and set the guest up, all at once where one thing does not need the other.

    Returns:
        The agent, ready for CreateContainer. The network may still be on its way (`Sandbox.network_up`).

    Raises:
        KataError: With the last step that was reached, whether the machine lives, and what its console said.
    """
    import asyncio

    step = _Step()
    try:
        return await _bring_up(sandbox, step)
    except KataError as error:
        raise explain(sandbox, step.name, error) from error
    finally:
        # Its first container's start ends the turn, for which a client may take its time.
        asyncio.get_running_loop().call_later(TURN_S, sandbox.machine.end_turn)


class _Step:
    __slots__ = ("name",)

    def __init__(self) -> None:
        self.name = "starting the hypervisor"


async def _bring_up(sandbox: Sandbox, step: _Step) -> AgentClient:
    import asyncio

    # What only the end needs is loaded now, while there is nothing to do but wait.
    from kata import journal_undo  # noqa: F401
    from kata.proto import agent_pb, types_pb  # noqa: F401

    settings, timings = sandbox.settings, sandbox.timings
    step.name = "waiting for the agent in the guest"
    described = settings.described()
    ready_s = described.guest.ready_s or READY_S
    agent = await sandbox.connect_agent(ready_s)
    await _healthy(agent, sandbox.life.exit_reason, ready_s)
    answered_ns = time.monotonic_ns()

    step.name = "setting up the guest"
    storages = []
    if sandbox.share is not None:
        from kata.engine.spec import GUEST_SHARE

        kind = "9p" if sandbox.machine.files is None else "virtio-fs"
        more = []
        if kind == "9p":
            more = [
                f"msize={described.share.msize or SHARE_MSIZE}",
                f"cache={_9p_cache(described.guest.kernel_version)}",
            ]
        storages.append(
            agent_pb.Storage(
                driver=kind,
                source=slots.SHARE_TAG,
                fstype=kind.replace("-", ""),
                options=[*SHARE_MOUNT_OPTIONS[kind], *more],
                mount_point=GUEST_SHARE,
            )
        )
    request = agent_pb.CreateSandboxRequest(
        # A container without a name of its own has the host's, as with a runtime that shares the host's kernel.
        hostname=settings.hostname or os.uname().nodename,
        dns=sandbox.dns,
        storages=storages,
        sandbox_id=sandbox.id,
        kernel_modules=[
            agent_pb.KernelModule(name=name, parameters=parameters)
            for name, *parameters in described.guest.modules
        ],
    )
    learned = asyncio.ensure_future(agent.negotiate_features())
    sandbox.network_services.configured = asyncio.ensure_future(_configure_network(sandbox, agent, learned))
    # A start that never comes does not ask how it went.
    sandbox.network_services.configured.add_done_callback(lambda task: task.cancelled() or task.exception())
    assert sandbox.vm is not None
    await sandbox.race_vm_exit(
        asyncio.gather(
            sandbox.vm.confined(),
            agent.create_sandbox(request),
            learned,
            agent.set_time(time.time_ns()),
            agent.reseed(os.urandom(SEED_BYTES)),
        )
    )
    sandbox.create_task(_guest_times(sandbox, agent, answered_ns))
    timings.add("agent", answered_ns)
    return agent


def _9p_cache(kernel_version: str) -> str:
    """What a guest keeps of files that it has by 9p (the kernel's Documentation/filesystems/9p.rst).

    Until Linux 6.4 ``mmap`` keeps what is mapped and nothing else. From then on it is a cache with write-back that
    nothing invalidates: what others change is not seen, and what is written arrives late or, when the machine is
    killed, never. Without a cache all that is right, and shared writable mappings are refused.
    """
    numbers = [int(part) for part in kernel_version.split(".")[:2] if part.isdecimal()]
    return "mmap" if len(numbers) == 2 and numbers < [6, 4] else "none"


async def _healthy(agent: AgentClient, lost: asyncio.Future[KataError], timeout_s: float) -> None:
    """Return when the agent serves.

    On a serial channel the question waits in the pipe until the guest's driver takes it: one call is enough,
    no polling, and the answer comes the moment that the agent can give it.
    """
    import asyncio

    check = asyncio.ensure_future(agent.check(timeout_s))
    both: set[asyncio.Future[Any]] = {check, lost}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            raise lost.result()
        await check
    finally:
        check.cancel()


async def _configure_network(sandbox: Sandbox, agent: AgentClient, learned: asyncio.Future[None]) -> None:
    """Give the guest its network; what its agent can is to be known first."""
    await learned
    await sandbox.guest_network.configure(agent)


async def _guest_times(sandbox: Sandbox, agent: AgentClient, answered_ns: int) -> None:
    """Split the time until the agent's first answer by what the guest's own clock says."""
    from kata.agent.client import boot_times

    times = await boot_times(agent)
    if times is None:
        return
    started = sandbox.machine.started_ns
    # The guest's clock began with its kernel; the answer was on its way for less than a millisecond.
    kernel_began = max(started, answered_ns - times.ready_ns)
    agent_began = min(answered_ns, kernel_began + times.kernel_ns)
    sandbox.timings.add("hypervisor process", started, kernel_began)
    sandbox.timings.add("kernel", kernel_began, agent_began)
    sandbox.timings.add("agent start", agent_began, answered_ns)


def explain(sandbox: Sandbox, step: str, error: KataError) -> KataError:
    """*error* with what helps to find out why a guest did not come up; the class stays."""
    from kata.agent.text import last_lines

    guest = sandbox.settings.described().guest
    vm = sandbox.vm
    if vm is None:
        return error
    state = "still running" if sandbox.vm_runs else "gone"
    text = (
        f"{error.message} (while {step}; the virtual machine is {state};"
        f" kernel {guest.kernel}, initrd {guest.initrd})"
    )
    lines = last_lines(vm.console_tail().encode())
    if lines:
        text += "\nthe guest's console ends with:\n" + "\n".join(f"  {line}" for line in lines)
    else:
        text += "; the guest wrote nothing to its console"
    error.message = text
    error.args = (text,)
    error.hint = error.hint or "kata guest info shows the guest's files, kata doctor checks the host"
    return error
