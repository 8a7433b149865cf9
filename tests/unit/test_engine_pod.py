"""What a pod of the Sandbox API asks for becomes settings of its engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata.engine.lifecycle import pod
from kata.errors import ConfigError, UnsupportedError
from kata.proto import cri_pb, google_pb
from kata.proto.podsandbox_pb import CreateSandboxRequest
from kata.settings import NetworkSettings, SandboxSettings
from kata.shim import start

TYPE = "runtime.v1.PodSandboxConfig"


def request(config: cri_pb.PodSandboxConfig, kind: str = TYPE) -> CreateSandboxRequest:
    options = google_pb.Any(type_url=kind, value=config.encode())
    return CreateSandboxRequest(sandbox_id="p", netns_path="/run/netns/x", options=options)


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration file that names files of a guest."""
    for name in ("vmlinux", "initrd"):
        (tmp_path / name).write_text("")
    path = tmp_path / "configuration.toml"
    path.write_text(f'[hypervisor.qemu]\nkernel = "{tmp_path}/vmlinux"\ninitrd = "{tmp_path}/initrd"\n')
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "run"))
    return str(path)


def described(asked: CreateSandboxRequest, config_path: str) -> SandboxSettings:
    settings = start.pod_settings("k8s.io", "p", "/bundle", 1, config_path)
    pod.describe(settings, asked)
    return settings


def test_all_that_a_pod_says(guest: str) -> None:
    linux = cri_pb.LinuxPodSandboxConfig(
        cgroup_parent="/kubepods/pod1",
        sysctls={"net.core.somaxconn": "9"},
        resources=cri_pb.LinuxContainerResources(
            cpu_period=100000, cpu_quota=50000, memory_limit_in_bytes=256 << 20
        ),
    )
    dns = cri_pb.DNSConfig(servers=["10.0.0.1", "10.0.0.2"], searches=["a", "b"], options=["ndots:5"])
    found = described(request(cri_pb.PodSandboxConfig(hostname="h", dns_config=dns, linux=linux)), guest)
    assert found.network == NetworkSettings(mode="netns", path="/run/netns/x")
    assert found.cgroups_path == "/kubepods/pod1/p"
    assert (found.hostname, found.client.makes_etc_files) == ("h", True)
    assert found.resolv_conf == [
        "search a b",
        "nameserver 10.0.0.1",
        "nameserver 10.0.0.2",
        "options ndots:5",
    ]
    assert found.sysctls == {"net.core.somaxconn": "9"}
    assert found.described().size.vcpus == 1
    assert 256 < found.described().size.memory_mib < 400


def test_a_pod_that_says_nothing(guest: str) -> None:
    found = described(CreateSandboxRequest(sandbox_id="p"), guest)
    assert (found.cgroups_path, found.resolv_conf, found.sysctls) == ("", [], {})
    assert found.network.path == ""
    slice_of = cri_pb.LinuxPodSandboxConfig(cgroup_parent="/kubepods.slice/kubepods-pod1.slice")
    found = described(request(cri_pb.PodSandboxConfig(linux=slice_of)), guest)
    assert found.cgroups_path == "kubepods-pod1.slice:cri-containerd:p"


@pytest.mark.parametrize(("field", "name"), [("network", "network"), ("pid", "PID"), ("ipc", "IPC")])
def test_namespaces_of_the_host_are_refused(field: str, name: str) -> None:
    options = cri_pb.NamespaceOption(**{field: 2})
    context = cri_pb.LinuxSandboxSecurityContext(namespace_options=options)
    config = cri_pb.PodSandboxConfig(linux=cri_pb.LinuxPodSandboxConfig(security_context=context))
    with pytest.raises(UnsupportedError, match=f"host's {name} namespace"):
        described(request(config), "")


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown type"):
        described(request(cri_pb.PodSandboxConfig(hostname="h"), "other.Type"), "")
    broken = google_pb.Any(type_url=TYPE, value=b"\xff")
    with pytest.raises(ConfigError, match="cannot be decoded"):
        described(CreateSandboxRequest(sandbox_id="p", options=broken), "")
