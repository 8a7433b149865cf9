"""Configuration files and annotations in real sandboxes, through containerd and `kata`."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from cli_support import vm_pid
from conftest import Kata
from containerd_support import Containerd, clean_fixture, daemon_fixture  # noqa: F401 - fixtures
from otlp_support import Collector
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PREFIX = "io.katacontainers.config"


def test_containerds_config_path_and_annotations(daemon: Containerd) -> None:
    file = daemon.directory / "c.toml"
    file.write_text(
        "[hypervisor.qemu]\ndefault_memory = 160\nenable_annotations = ['default_vcpus', 'kernel_params']\n"
        "kernel_params = 'of.host=1'\nshared_fs = 'virtio-9p'\nmsize_9p = 65536\n"
        "cpu_features = '-rdrand'\nentropy_source = '/dev/urandom'\n"
    )
    (daemon.directory / "config.d").mkdir(exist_ok=True)
    (daemon.directory / "config.d" / "1.toml").write_text("[hypervisor.qemu]\ndefault_memory = 192\n")
    options = (
        *("--runtime-config-path", str(file)),
        *("--annotation", f"{PREFIX}.hypervisor.default_vcpus=1.5"),
        *("--annotation", f"{PREFIX}.hypervisor.kernel_params=of.pod=1"),
    )
    look = "nproc; grep MemTotal /proc/meminfo; cat /proc/cmdline; grep kataShared /proc/mounts; cat /proc/cpuinfo"
    done = daemon.run("configured", "sh", "-c", look, options=options)
    assert done.returncode == 0, done.stderr.decode() + daemon.diagnosis()
    said = done.stdout.decode()
    cpus, memory, cmdline, mount, *cpuinfo = said.splitlines()
    assert cpus == "2"
    assert 150 * 1024 < int(memory.split()[1]) < 192 * 1024
    assert "of.host=1 of.pod=1" in cmdline
    assert "msize=65536" in mount
    assert "rdrand" not in " ".join(cpuinfo)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--annotation", f"{PREFIX}.hypervisor.path=/bin/sh"), "enable_annotations"),
        (
            ("--annotation", f"{PREFIX}.hypervisor.kernel_param=x"),
            "did you mean io.katacontainers.config.hypervisor.k",
        ),
        (("--runtime-config-path", "/no/such.toml"), "/no/such.toml does not exist"),
    ],
)
def test_what_is_wrong_starts_nothing(daemon: Containerd, options: tuple[str, ...], words: str) -> None:
    done = daemon.run("wrong", "true", options=options)
    assert done.returncode != 0
    assert words in done.stderr.decode()
    assert daemon.has_no_sandbox("default.wrong")


def test_a_shims_start_is_traced(daemon: Containerd) -> None:
    """From the shim down into the guest; the collector's address and password are the configuration's."""
    collector = Collector()
    try:
        directory = daemon.directory / "traced"
        directory.mkdir()
        file = directory / "c.toml"
        file.write_text(
            f'[runtime]\nenable_tracing = true\njaeger_endpoint = "{collector.url}"\njaeger_user = "me"\n'
            'jaeger_password = "dont-show-4x"\n[agent.kata]\nenable_tracing = true\n'
        )
        done = daemon.run("traced", "echo", "words", options=("--runtime-config-path", str(file)))
        assert done.returncode == 0, done.stderr.decode() + daemon.diagnosis()
        until(
            lambda: any("Shutdown" in span.name for _, _, span in collector.spans), "the last of the spans"
        )
        spans = {span.span_id: (service, about, span) for service, about, span in collector.spans}
        (root,) = (span for _, _, span in spans.values() if not span.parent_span_id)
        assert root.name == "shim start"
        assert {span.trace_id for _, _, span in spans.values()} == {root.trace_id}
        assert {about["containerd.namespace"] for _, about, _ in spans.values()} == {"default"}
        (guest,) = (
            span for who, _, span in spans.values() if (who, span.name) == ("kata-agent", "CreateContainer")
        )
        above = [guest]
        while above[-1].parent_span_id:
            above.append(spans[above[-1].parent_span_id][2])
        assert [span.name for span in above[1:]] == [
            "grpc.AgentService/CreateContainer",
            "containerd.task.v2.Task/Create",
            "shim start",
        ]
        for inner, outer in pairwise(above):
            assert outer.start_time_unix_nano <= inner.start_time_unix_nano
            assert inner.end_time_unix_nano <= outer.end_time_unix_nano
        assert collector.requests[0][1]["authorization"].startswith("Basic ")
        assert daemon.has_no_sandbox("default.traced")
    finally:
        collector.close()


def test_without_a_connection_and_without_a_share(
    daemon: Containerd, shared_kata: Kata, busybox_image: str
) -> None:
    file = daemon.directory / "none.toml"
    file.write_text("[runtime]\ninternetworking_model = 'none'\n[hypervisor.qemu]\nmachine_type = 'pc'\n")
    done = daemon.run("alone", "ls", "/sys/class/net", options=("--runtime-config-path", str(file)))
    assert done.returncode == 0, done.stderr.decode() + daemon.diagnosis()
    assert done.stdout.split() == [b"lo"]
    file.write_text(
        "[hypervisor.qemu]\nshared_fs = 'none'\nenable_mem_prealloc = true\nuse_legacy_serial = false\n"
    )
    done = daemon.run("tree", "true", options=("--runtime-config-path", str(file)))
    assert done.returncode == 0, done.stderr.decode() + daemon.diagnosis()  # its root is on disks
    shared_kata.env["KATA_CONF_FILE"] = str(file)
    try:
        said = shared_kata.ok(
            "run",
            "--rm",
            "--network",
            "none",
            "-m",
            "100m",
            busybox_image,
            "cat",
            "/proc/mounts",
            "/proc/cmdline",
        )
        assert "9p" not in said
        assert "console=hvc0" in said
        refused = shared_kata.call(
            "run", "--rm", "--network", "none", "-v", "/etc:/x", busybox_image, "true"
        )
        assert refused.returncode == 125
        assert b"cannot mount /etc writable" in refused.stderr
        assert b"shared_fs" in refused.stderr
        # What is small and read-only is copied, as it is.
        small = daemon.directory / "small"
        (small / "..1").mkdir(parents=True)
        (small / "..1" / "key").write_bytes(b"x" * 600_000)
        (small / "..data").symlink_to("..1")
        (small / "key").symlink_to("..data/key")
        (small / "..1" / "key").chmod(0o640)
        os.chown(small / "..1" / "key", 12, 34)
        shown = shared_kata.ok(
            "run", "--rm", "--network", "none", "-v", f"{small}:/x:ro", busybox_image, "sh", "-c",
            "wc -c < /x/key; stat -c '%a %u %g' /x/..1/key; readlink /x/key; touch /x/new || echo no",
        )  # fmt: skip
        assert shown.split("\n")[:4] == ["600000", "640 12 34", "..data/key", "no"]
        shown = json.loads(shared_kata.ok("config", "show", "--json"))
        [row] = [one for one in shown[0]["settings"] if one["key"] == "shared_fs"]
        assert (row["value"], row["origin"]) == ("none", f"{file}:2")
        checked = shared_kata.call("config", "check", str(file))
        assert checked.returncode == 0
        assert b"3 keys, 3 in effect" in checked.stdout
        file.write_text("[hypervisor.qemu]\nshared_f = 'none'\n")
        for words in (("config", "check", str(file)), ("run", "--rm", busybox_image, "true")):
            wrong = shared_kata.call(*words)
            assert wrong.returncode == 125
            assert b"did you mean 'shared_fs'" in wrong.stderr
    finally:
        del shared_kata.env["KATA_CONF_FILE"]


def test_equal_pages_may_be_merged_where_that_is_asked(
    shared_kata: Kata, busybox_image: str, run_directory: Path
) -> None:
    file = run_directory / "ksm.toml"
    file.write_text("[hypervisor.qemu]\nenable_ksm = true\n")
    shared_kata.env["KATA_CONF_FILE"] = str(file)
    try:
        shared_kata.ok("run", "-d", "--name", "merged", "--network", "none", busybox_image, "sleep", "1000")
        mappings = Path(f"/proc/{vm_pid(shared_kata, 'merged')}/smaps").read_text()
        assert any(line.startswith("VmFlags:") and "mg" in line.split() for line in mappings.splitlines())
    finally:
        del shared_kata.env["KATA_CONF_FILE"]
        shared_kata.ok("rm", "-f", "merged")


def test_a_microvm_has_all_but_what_it_refuses(
    shared_kata: Kata, busybox_image: str, run_directory: Path
) -> None:
    """Network, shared files, several processors, a console of its own kind; and no PCI bus."""
    file = run_directory / "microvm.toml"
    file.write_text("[hypervisor.qemu]\nmachine_type = 'microvm'\nuse_legacy_serial = false\n")
    there = run_directory / "microvm"
    there.mkdir()
    (there / "in").write_text("from the host\n")
    shared_kata.env["KATA_CONF_FILE"] = str(file)
    try:
        shown = shared_kata.ok(
            "run", "--rm", "--cpus", "2", "-m", "100m", "-v", f"{there}:/v", busybox_image, "sh", "-c",
            "cat /v/in; echo back >/v/out; nproc; ls /sys/bus/pci/devices | wc -l; cat /proc/cmdline;"
            " ls /sys/class/net; cat /proc/mounts",
        )  # fmt: skip
        first, processors, pci, parameters, *rest = shown.splitlines()
        assert (first, processors, pci) == ("from the host", "2", "0")
        assert "console=hvc0" in parameters
        assert "eth0" in rest
        assert (there / "out").read_text() == "back\n"
        name = f"m{os.urandom(2).hex()}"
        shared_kata.ok("run", "-d", "--name", name, busybox_image, "sleep", "1000")
        assert shared_kata.ok("exec", name, "cat", "/proc/1/comm").strip() == "sleep"
        [found] = json.loads(shared_kata.ok("inspect", name))
        can = found["sandbox"]["hypervisor"]["capabilities"]
        assert (can["grow_memory"], can["hotplug_nics"], can["attach_disk"]) == (False, False, True)
        shared_kata.ok("rm", "-f", name)
    finally:
        del shared_kata.env["KATA_CONF_FILE"]
