"""``start``: launch the engine of a new sandbox, or find the one of a container's pod."""

from __future__ import annotations

import os
import time

from kata.engine import spec
from kata.engine.launch import check_id, launch
from kata.errors import ConfigError, HostError, JournalError, NotFoundError, UsageError
from kata.journal import FILE_NAME, Journal
from kata.shim import bootstrap, options
from kata.shim.names import ADDRESS_FILE, directory_name, required

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from kata.engine.launch import Engine

LOG_FIFO = "log"
ENDING_S = 5.0
"""How long an engine of the same name may take to end: containerd asks for a sandbox again only when it has given
the last one up, for example because the command that started it was killed."""


def start(values: Mapping[str, str], answer: Callable[[bytes], None]) -> None:
    """Carry it out, in the bundle's directory, which is the working directory.

    Args:
        values: The options.
        answer: Is given what to print: where the engine listens, in the form that this containerd wants. A new
            engine still ends with this process then: it lives on only once containerd knows of it.

    Raises:
        KataError: No sandbox could be started; nothing of it is left.
    """
    began = time.monotonic_ns()
    namespace, container_id = required(values, "namespace"), check_id(required(values, "id"))
    bundle = os.getcwd()
    given = options.given()
    told = bootstrap.params(given, namespace, container_id)
    configuration = options.config_path(given, told)
    if told is not None and not os.path.exists("config.json"):
        # The Sandbox API's pod: what it is to be is said to its engine.
        empty = launch(
            pod_settings(namespace, container_id, bundle, began, configuration),
            name=directory_name(namespace, container_id),
            patience_s=ENDING_S,
        )
        _write_address(bundle, f"unix://{empty.sock_path}")
        answer(bootstrap.answer(f"unix://{empty.sock_path}", bootstrapped=True))
        empty.release()
        return
    config = _read_config(bundle)
    # The engine refuses it as well, whoever asks; here nothing has been started yet.
    spec.refuse_foreign(config)
    pod = spec.pod_of(config)
    engine = None
    if pod:
        address = _address_of_pod(bundle, container_id, pod)
    else:
        engine = launch(
            settings(namespace, container_id, bundle, config, began, configuration),
            name=directory_name(namespace, container_id),
            patience_s=ENDING_S,
        )
        address = f"unix://{engine.sock_path}"
    _write_address(bundle, address)
    if engine is not None:
        _require_living(engine)
    answer(bootstrap.answer(address, bootstrapped=told is not None))
    if engine is not None:
        engine.release()


def _require_living(engine: Engine) -> None:
    """See that an engine has not ended already: nobody would clear up after it, since containerd has nothing
    cleared up that it never reached.

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
    """What the pod's own bundle, beside this one, says.

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
    aside = f"{path}.{os.getpid()}"
    with open(aside, "x", encoding="ascii") as file:
        file.write(address)
    os.replace(aside, path)


def settings(
    namespace: str,
    container_id: str,
    bundle: str,
    config: Mapping[str, Any],
    began: int,
    config_path: str = "",
) -> dict[str, Any]:
    """What the engine has to know; see docs/architecture.md, "sandbox.json".

    Args:
        namespace: containerd's.
        container_id: The sandbox's first container.
        bundle: Its bundle.
        config: The specification in it.
        began: When the door began, by CLOCK_MONOTONIC.
        config_path: The configuration file that the client names, or empty.

    Raises:
        KataError: As of `kata.engine.machine.settings`, and about annotations.
    """
    from kata.config import annotations, files
    from kata.engine import machine
    from kata.hypervisor.qemu import slots
    from kata.resources import sizing

    conf = files.load(config_path)
    annotations.apply(conf, config.get("annotations") or {})
    about_machine, notes = machine.settings(sizing.request_of(config), conf, grows=True)
    found: dict[str, Any] = {
        "id": container_id,
        "door": "containerd",
        "namespace": namespace,
        "share": True,
        **about_machine,
        "notes": [note for _, note in notes],
        "disks": [],
        "disk_slots": len(slots.DISKS),
        "network": machine.network(conf, network_namespace(config)),
        "cgroups_path": str((config.get("linux") or {}).get("cgroupsPath") or ""),
        "oom_score_adj": oom_score_adj(config),
        "door_started_ns": began,
    }
    return {**found, **_client(namespace, bundle)}


def pod_settings(
    namespace: str, container_id: str, bundle: str, began: int, config_path: str
) -> dict[str, Any]:
    """The same for the Sandbox API's pod, which is described to its engine later (`kata.engine.pod`)."""
    from kata.hypervisor.qemu import slots

    return {
        "id": container_id,
        "door": "containerd",
        "namespace": namespace,
        "pod": True,
        "config_path": config_path,
        "share": True,
        "disks": [],
        "disk_slots": len(slots.DISKS),
        "door_started_ns": began,
        **_client(namespace, bundle),
    }


def _client(namespace: str, bundle: str) -> dict[str, Any]:
    """Where containerd wants to hear of what happens."""
    found: dict[str, Any] = {}
    address = os.environ.get("TTRPC_ADDRESS")
    if address:
        found["events"] = {"address": address, "namespace": namespace}
    fifo = os.path.join(bundle, LOG_FIFO)
    if os.path.exists(fifo):
        found["log_fifo"] = fifo
    return found


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
