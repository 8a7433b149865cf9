"""What a start of a container may import.

Python's imports are the largest part of a start that is ours to choose, so every module on the way is on a list
here. A new name in a failure of these tests asks: is it worth its milliseconds on every start? Then add it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"

ENGINE_BEFORE_THE_VM = {
    *("_collections_abc", "_stat", "genericpath", "os", "os.path", "posixpath", "stat"),
    *("_ctypes", "ctypes", "ctypes._endian", "_struct", "struct", "types", "errno", "fcntl"),
    *("__future__", "warnings", "importlib", "importlib._bootstrap", "importlib._bootstrap_external"),
}
"""Modules of the standard library that the engine may load before it has started the hypervisor."""

OURS_BEFORE_THE_VM = {
    *("kata", "kata.children", "kata.errors", "kata.journal", "kata.launcher", "kata.paths", "kata.sysio"),
    *("kata.confinement", "kata.host_cache", "kata.json_text", "kata.settings", "kata.settings_part"),
    "kata.seccomp",
    *(
        "kata.engine",
        "kata.engine.lifecycle",
        "kata.engine.lifecycle.boot",
        "kata.engine.launch",
        "kata.engine.main",
    ),
    *(
        "kata.engine.lifecycle.boot_slots",
        "kata.engine.lifecycle.booted_machine",
        "kata.engine.lifecycle.volumes",
    ),
    *("kata.hypervisor", "kata.hypervisor.base", "kata.hypervisor.registry", "kata.hypervisor.tsc"),
    *("kata.hypervisor.qemu", "kata.hypervisor.qemu.command", "kata.hypervisor.qemu.monitor"),
    *("kata.hypervisor.process", "kata.hypervisor.root", "kata.hypervisor.qemu.process"),
    *("kata.hypervisor.qemu.queues", "kata.hypervisor.qemu.settings", "kata.hypervisor.qemu.slots"),
}

TOO_DEAR_FOR_A_COMMAND = {
    *("argparse", "asyncio", "dataclasses", "hashlib", "http", "inspect", "logging", "pathlib", "random"),
    *(
        "shutil",
        "socket",
        "ssl",
        "subprocess",
        "tempfile",
        "threading",
        "typing",
        "urllib",
        "uuid",
        "zipfile",
    ),
}
"""Top-level names that ``kata run``, ``create``, ``start`` and ``exec`` do without; no third-party package either."""


def loaded_by(*modules: str) -> set[str]:
    """What importing *modules* in a fresh interpreter, started as kata's are, adds to `sys.modules`."""
    program = (
        "import sys\n"
        "bare = set(sys.modules)\n"
        f"sys.path.append({str(SOURCE)!r})\n"
        f"for name in {modules!r}: __import__(name)\n"
        "loaded = sorted(set(sys.modules) - bare)\n"
        "import json; print(json.dumps(loaded))"
    )
    done = subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", program], capture_output=True, check=True)
    return set(json.loads(done.stdout))


def test_the_engine_starts_the_vm_with_few_modules() -> None:
    monitor = ("monitor", "process", "queues", "settings")  # imported by `start`
    loaded = loaded_by(
        "kata.engine.main",
        "kata.engine.lifecycle.boot",
        "kata.hypervisor.root",
        *(f"kata.hypervisor.qemu.{name}" for name in monitor),
    )
    assert loaded - ENGINE_BEFORE_THE_VM - OURS_BEFORE_THE_VM == set()


def test_commands_that_start_containers_do_without_dear_modules() -> None:
    loaded = loaded_by(
        "kata.cli.main",
        "kata.cli.run",
        "kata.cli.session",
        "kata.engine.client",
        "kata.engine.launch",
        "kata.guest.manifest",
        "kata.hypervisor.accel",
        "kata.images.resolve",
        "kata.oci.spec",
        "kata.resources.sizing",
        "kata.storage.ext4",
    )
    assert {name for name in loaded if name.split(".")[0] in TOO_DEAR_FOR_A_COMMAND} == set()
    known = {name for name in loaded if name.split(".")[0] == "kata"}
    assert {name for name in loaded - known if _is_third_party(name)} == set()


def test_exec_does_without_json_and_regular_expressions() -> None:
    loaded = loaded_by("kata.cli.main", "kata.cli.records", "kata.cli.execute", "kata.engine.client")
    assert loaded & {"json", "re", "typing", "subprocess"} == set()


def test_exec_loads_little_of_python_and_nothing_of_starts() -> None:
    loaded = loaded_by("kata.cli.main", "kata.cli.records", "kata.cli.execute", "kata.engine.client")
    of_python = {name for name in loaded if not name.startswith("kata")} - {"__future__", "select", "errno"}
    assert of_python.difference(sys.builtin_module_names) - OF_OS <= {"math"}
    assert loaded & {"kata.cli.run", "kata.engine.launch", "kata.settings", "kata.hypervisor"} == set()


def test_exec_asks_for_the_process_before_it_loads_what_carries_the_streams() -> None:
    """The guest needs as long for the process as this command for the rest of its modules."""
    loaded = loaded_by("kata.cli.main", "kata.cli.records", "kata.cli.execute", "kata.engine.client")
    assert {name for name in loaded if name.startswith("kata")} <= ASKED_BY_PODMAN | {
        *(
            "kata.cli",
            "kata.cli.args",
            "kata.cli.execute",
            "kata.cli.fifos",
            "kata.cli.main",
            "kata.cli.records",
        ),
        "kata.suppress",
    }
    assert loaded & {"importlib", "warnings", "encodings.ascii", "math"} == set()


def test_the_end_of_a_container_loads_little() -> None:
    loaded = loaded_by(
        "kata.cli.main", "kata.cli.lifecycle", "kata.cli.ending", "kata.events", "kata.journal_undo"
    )
    assert (
        loaded & {"json", "re", "contextlib", "collections", "signal", "enum", "typing", "subprocess"}
        == set()
    )


def test_rm_asks_for_the_end_before_it_loads_what_removes_the_container() -> None:
    """The machine needs longer for its end than this command for the rest of its modules."""
    loaded = loaded_by("kata.cli.main", "kata.cli.lifecycle")
    later = {
        f"kata.{name}" for name in ("events", "journal", "journal_undo", "cli.attachment", "cli.session")
    }
    assert loaded & later == set()
    assert loaded & {"importlib", "warnings"} == set()


def test_a_machine_in_a_network_namespace_starts_before_sockets_are_loaded() -> None:
    loaded = loaded_by("kata.engine.main", "kata.engine.hostns", "kata.network.plan", "kata.network.netns")
    assert loaded & {"socket", "selectors", "enum", "collections", "functools", "asyncio"} == set()


def _is_third_party(name: str) -> bool:
    return name.split(".")[0] not in sys.stdlib_module_names


SELDOM_USED_BY_ENGINES = {"ast", "dis", "textwrap", "tokenize", "typing"}
"""What inspect, linecache, traceback and asyncio's timeouts import: here if one of them has been used. See
`kata.deferred`."""

NOT_BEFORE_THEY_ARE_USED = {
    *("kata.engine.services.stats", "kata.engine.services.pod_service", "kata.engine.services.events"),
    *("kata.engine.forwarding.forward", "kata.engine.forwarding.names", "kata.engine.forwarding.sockets"),
    *("kata.engine.containers.hooks", "kata.engine.containers.hostroot"),
    *("kata.engine.lifecycle.pod", "kata.engine.standard_streams.logger"),
    *("kata.network.netns", "kata.network.macvtap", "kata.network.sk_lookup"),
    *(
        "kata.proto.cgroups_v1_pb",
        "kata.proto.cgroups_v2_pb",
        "kata.proto.cri_pb",
        "kata.proto.podsandbox_pb",
    ),
}
"""Parts of an engine that most sandboxes do without: memory of every engine, if they are imported with the others."""

AN_ENGINES_LOOP = """
import sys
sys.path.append({source!r})
sys.modules["ssl"] = None
from kata import deferred
deferred.defer()
deferred.defer_parts()
import asyncio, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
async def main():
    import kata.engine.lifecycle.sandbox, kata.engine.lifecycle.guest_setup, kata.engine.services.sandbox_service
    import kata.engine.services.task_service, kata.hypervisor.qemu.machine, kata.ttrpc.server
    from kata.engine.signals import call_on_signals
    loop = asyncio.get_running_loop()
    arrived = loop.create_future()
    call_on_signals((signal.SIGTERM, signal.SIGINT), arrived.set_result)
    await asyncio.to_thread(signal.raise_signal, signal.SIGTERM)
    assert await asyncio.wait_for(arrived, 5) == signal.SIGTERM
asyncio.run(main())
import json; print(json.dumps(sorted(sys.modules)))
"""


def test_an_engine_does_without_what_only_errors_need() -> None:
    program = AN_ENGINES_LOOP.format(source=str(SOURCE))
    done = subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", program], capture_output=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert loaded & SELDOM_USED_BY_ENGINES == set()
    assert loaded & NOT_BEFORE_THEY_ARE_USED == set()


ASKED_BY_PODMAN = {
    *("kata", "kata.errors", "kata.json_text", "kata.launcher", "kata.paths", "kata.oci"),
    *("kata.oci_runtime", "kata.oci_runtime.containers", "kata.oci_runtime.global_options"),
    *("kata.oci_runtime.main", "kata.oci_runtime.records", "kata.engine", "kata.engine.client"),
    *("kata.proto", "kata.proto.codec", "kata.proto.google_pb", "kata.proto.task_pb", "kata.proto.wire"),
    *("kata.ttrpc", "kata.ttrpc.calls", "kata.ttrpc.envelope", "kata.ttrpc.frame", "kata.ttrpc.status"),
    *("kata.ttrpc.sync_client", "kata.sysio"),
}
"""Our modules that ``state``, ``kill``, ``start`` and ``delete`` load."""


def test_what_podman_asks_an_oci_runtime_costs_few_modules() -> None:
    """``state``, ``kill``, ``start`` and ``delete``: Podman waits for each of them at each end of a container."""
    loaded = loaded_by(
        "kata.oci_runtime.main", "kata.oci_runtime.containers", "kata.engine.client", "kata.oci"
    )
    assert {name for name in loaded if name.startswith("kata")} - ASKED_BY_PODMAN == set()
    of_python = {name for name in loaded if not name.startswith("kata")} - {"__future__", "select"}
    assert of_python.difference(sys.builtin_module_names) <= OF_OS


def test_a_signal_by_its_name_costs_no_enumerations() -> None:
    assert not loaded_by("kata.cli.signals") & {"signal", "enum", "re", "types"}


def test_a_container_is_removed_without_ctypes() -> None:
    assert not loaded_by("kata.sysio") & {"ctypes", "_ctypes", "struct"}


OF_OS = {"_collections_abc", "_stat", "genericpath", "os", "os.path", "posixpath", "stat"}
"""What `os` has loaded, which every program needs."""
