"""``start``: launch the engine of a new sandbox, or find the one of a container's pod."""

from __future__ import annotations

import os
import time

from kata import sysio
from kata.engine.containers import spec
from kata.engine.launch import check_id, launch
from kata.errors import ConfigError, HostError, JournalError, NotFoundError, UsageError
from kata.journal import FILE_NAME, Journal
from kata.settings import ClientPolicy, PodSettings, SandboxSettings
from kata.shim import bootstrap, options
from kata.shim.names import ADDRESS_FILE, directory_name, required

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from kata.engine.launch import Engine

_DOCKER = "moby"
"""Docker's namespace in containerd."""
IDLE_S = 60.0
"""How long an engine stays that was started and never given a container: its client may be restarting."""
SIGNAL_S = 2.0
"""How long a guest may take for a signal: these clients wait for an end by themselves, and begin to count when they
have their answer."""
LOG_FIFO = "log"
_WIRING_HOOKS = ("prestart", "createRuntime", "createContainer")
"""Kinds of hooks that run once there is a namespace, and before the container runs."""
ENDING_S = 5.0
"""How long an engine of the same name may take to end: containerd asks for a sandbox again only when it has given
the last one up, for example because the command that started it was killed."""


def start(values: Mapping[str, str], answer: Callable[[bytes], None]) -> None:
    """Run the command ``start`` in the bundle's directory, which is the working directory.

    Args:
        values: The options.
        answer: Prints where the engine listens, in the form that this containerd wants. Until it has, a new engine ends
            with this process, since containerd does not know of it.

    Raises:
        KataError: No sandbox could be started; nothing of it is left.
    """
    started_ns = time.monotonic_ns()
    namespace, container_id = required(values, "namespace"), check_id(required(values, "id"))
    bundle = os.getcwd()
    stdin_bytes = options.given()
    bootstrap_params = bootstrap.params(stdin_bytes, namespace, container_id)
    configuration = options.config_path(stdin_bytes, bootstrap_params)
    if bootstrap_params is not None and not os.path.exists("config.json"):
        # A pod of the Sandbox API: CreateSandbox describes it to its engine.
        empty = launch(
            pod_settings(namespace, container_id, bundle, started_ns, configuration),
            name=directory_name(namespace, container_id),
            patience_s=ENDING_S,
        )
        _write_address(bundle, f"unix://{empty.sock_path}")
        answer(bootstrap.answer(f"unix://{empty.sock_path}", bootstrapped=True))
        empty.release()
        return
    config = _read_config(bundle)
    # The engine would refuse it as well, but here nothing has been started yet.
    spec.refuse_foreign(config)
    pod = spec.pod_of(config)
    engine = None
    if pod:
        address = _address_of_pod(bundle, container_id, pod)
    else:
        engine = launch(
            sandbox_settings(namespace, container_id, bundle, config, started_ns, configuration),
            name=directory_name(namespace, container_id),
            patience_s=ENDING_S,
        )
        address = f"unix://{engine.sock_path}"
    _write_address(bundle, address)
    if engine is not None:
        _require_living(engine)
    answer(bootstrap.answer(address, bootstrapped=bootstrap_params is not None))
    if engine is not None:
        engine.release()


def _require_living(engine: Engine) -> None:
    """Check that an engine has not ended already. containerd would not clean up after one that it never reached.

    Raises:
        HostError: It has; nothing of it is left.
    """
    try:
        journal = Journal.open(os.path.join(engine.run_dir, FILE_NAME))
    except JournalError:
        left = []  # it has taken everything back itself
    else:
        try:
            if journal.owner_alive():
                return
            from kata import journal_undo

            left = journal_undo.undo(journal)
        finally:
            journal.close()
    raise HostError(
        f"the engine (pid {engine.pid}) ended as soon as it was started"
        + (f", and left something behind: {left[0]}" if left else ""),
        "Was it killed? The host's kernel log (dmesg) has what the kernel kills.",
    )


def _read_config(bundle: str) -> dict[str, Any]:
    import json

    path = os.path.join(bundle, "config.json")
    try:
        with open(path, "rb") as file:
            config = json.load(file)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", "containerd runs this in a bundle"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return config


def _address_of_pod(bundle: str, container_id: str, pod: str) -> str:
    """Where the engine of a pod listens, as the pod's own bundle beside this one says.

    containerd's bundles are named after their containers. CRI-O's are a directory, ``userdata``, in one of that name.
    """
    above, name = os.path.split(bundle)
    own = check_id(pod)
    place = (
        os.path.join(above, own) if name == container_id else os.path.join(os.path.dirname(above), own, name)
    )
    path = os.path.join(place, ADDRESS_FILE)
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError as error:
        raise NotFoundError(
            f"there is no sandbox {pod} for this container: {path}: {error.strerror}",
            "The pod has ended, or was started with another runtime.",
        ) from None


def _write_address(bundle: str, address: str) -> None:
    path = os.path.join(bundle, ADDRESS_FILE)
    sysio.replace_file(path, address.encode("ascii"), mode=0o644)


def sandbox_settings(
    namespace: str,
    container_id: str,
    bundle: str,
    config: Mapping[str, Any],
    started_ns: int,
    config_path: str = "",
) -> SandboxSettings:
    """What the engine has to know.

    Args:
        namespace: containerd's.
        container_id: The sandbox's first container.
        bundle: Its bundle.
        config: The specification in it.
        started_ns: When the command began, by CLOCK_MONOTONIC.
        config_path: The configuration file that the client names, or empty.

    Raises:
        KataError: What `machine.machine_settings` raises, and about annotations.
    """
    from kata.config import annotations
    from kata.engine import machine
    from kata.resources import sizing

    conf = annotations.load(config_path, config.get("annotations") or {})
    described, notes = machine.machine_settings(sizing.request_of(config), conf, grows=True)
    return SandboxSettings(
        id=container_id,
        client=client_policy(namespace, bundle),
        machine=described,
        notes=[note for _, note in notes],
        all_disk_slots=True,
        host_devices=machine.host_devices(conf, config),
        network=machine.network_settings(
            conf, network_namespace(config), stays_empty=not expects_network(config)
        ),
        cgroups_path=str((config.get("linux") or {}).get("cgroupsPath") or ""),
        oom_score_adj=oom_score_adj(config),
        request_started_ns=started_ns,
    )


def pod_settings(
    namespace: str, container_id: str, bundle: str, started_ns: int, config_path: str
) -> SandboxSettings:
    """The same for the Sandbox API's pod, which is described to its engine later (`kata.engine.lifecycle.pod`)."""
    policy = client_policy(namespace, bundle)
    policy.makes_etc_files = True  # a pod has no container of its own for which containerd would
    return SandboxSettings(
        id=container_id,
        client=policy,
        pod=PodSettings(config_path=config_path),
        all_disk_slots=True,
        request_started_ns=started_ns,
    )


def client_policy(namespace: str, bundle: str) -> ClientPolicy:
    """What containerd, CRI-O and Docker expect of an engine.

    Args:
        namespace: containerd's.
        bundle: The sandbox's.
    """
    fifo = os.path.join(bundle, LOG_FIFO)
    return ClientPolicy(
        name="containerd",
        idle_s=IDLE_S,
        keeps_ended_containers=True,
        ends_when_stale=True,
        sweeps_dead_engines=True,
        ends_with_init=False,
        holds_fifos=True,
        makes_etc_files=False,
        foreign_specs=True,
        keeps_host_mounts=True,
        shares_from_start=True,
        # Docker 25 and newer mean all that is mounted below, too; but they say so only to a runtime that has announced
        # that it can do that, which they ask no shim.
        recursive_readonly="rbind" if namespace == _DOCKER else "never",
        signal_s=SIGNAL_S,
        late_signals_fail=False,
        host_shaped_stats=True,
        all_controllers=True,
        namespace=namespace,
        events_address=os.environ.get("TTRPC_ADDRESS") or "",
        log_fifo=fifo if os.path.exists(fifo) else "",
    )


def oom_score_adj(config: Mapping[str, Any]) -> int:
    """The out-of-memory score of a container's process; 0 for a pod's own, whose containers say what it is."""
    if spec.container_type(config) == "pod_sandbox":
        return 0
    return spec.oom_score_adj(config)


def network_namespace(config: Mapping[str, Any]) -> str:
    """Path of the network namespace in a spec; empty where it is to be made."""
    for namespace in (config.get("linux") or {}).get("namespaces") or ():
        if namespace.get("type") == "network":
            return str(namespace.get("path") or "")
    return ""


def expects_network(config: Mapping[str, Any]) -> bool:
    """Whether the namespace that a spec leaves to the engine is likely to get an interface: a client that wires it
    gives the container a ``resolv.conf`` (Docker), or has hooks that do the wiring (nerdctl, and Docker up to 25). A
    wrong guess costs time and no more: ``ctr run --cni`` tells a runtime nothing.
    """
    hooks = config.get("hooks") or {}
    return any(hooks.get(kind) for kind in _WIRING_HOOKS) or any(
        mount.get("destination") == "/etc/resolv.conf" for mount in config.get("mounts") or ()
    )
