"""The guest's view of a container's specification."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from kata.engine.containers import spec
from kata.engine.containers.container_parts import ContainerParts
from kata.errors import (
    ConfigError,
    UnsupportedError,
)
from kata.oci import spec as oci


def docker_like() -> dict[str, Any]:
    request = oci.Request("host")
    request.command = ["/bin/true"]
    request.memory, request.cpus, request.pids_limit = 64 << 20, 1.5, 100
    request.volumes = [("/srv/data", "/data", ["rbind", "ro"])]
    return oci.build(request, {"Env": ["A=b"]})


def guest_view(config: dict[str, Any], **changed: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "rootfs": "/r",
        "bundle": "/b",
        "container_type": "single_container",
        "binds": [spec.GuestBind("/guest/data", ["rbind", "ro"])],
        "files": {"/etc/hosts": "/guest/hosts"},
        "cgroups_path": "/c",
        **changed,
    }
    return spec.for_guest(config, **arguments)


def test_spec_keeps_what_the_guest_applies_and_drops_what_is_the_hosts() -> None:
    config = docker_like()
    config["hooks"] = {"prestart": [{"path": "/x"}], "startContainer": [{"path": "/y"}]}
    config["process"]["apparmorProfile"] = "docker-default"
    before = json.dumps(config)
    message = spec.to_message(guest_view(config))
    assert json.dumps(config) == before
    assert message.Root is not None
    assert message.Root.Path == "/r"
    assert message.Process is not None
    assert message.Process.Args == ["/bin/true"]
    assert message.Process.ApparmorProfile == ""
    assert message.Hooks is not None
    assert [hook.Path for hook in message.Hooks.StartContainer] == ["/y"]
    assert not message.Hooks.Prestart
    linux = message.Linux
    assert linux is not None
    assert {one.Type for one in linux.Namespaces} == {"mount", "ipc", "uts", "pid", "cgroup"}
    assert linux.Seccomp is not None
    assert linux.Resources is not None
    assert linux.Resources.Pids is not None
    assert linux.Resources.Pids.Limit == 100
    assert linux.Resources.Memory is not None
    assert linux.Resources.Memory.Limit == 64 << 20
    assert [(rule.Major, rule.Minor) for rule in linux.Resources.Devices] == [(-1, -1)]
    mounts = {mount.destination: mount for mount in message.Mounts}
    assert mounts["/data"].source == "/guest/data"
    assert mounts["/data"].options == ["rbind", "ro"]
    assert mounts["/etc/hosts"].source == "/guest/hosts"
    assert message.Annotations[spec.BUNDLE_ANNOTATION] == "/b"


def test_a_file_that_the_spec_mounts_itself_is_not_doubled() -> None:
    config = docker_like()
    config["mounts"].append(
        {"destination": "/etc/hosts", "type": "bind", "source": "/h", "options": ["bind"]}
    )
    view = guest_view(
        config, binds=[spec.GuestBind("/guest/data", []), spec.GuestBind("/guest/h", ["bind"])]
    )
    assert [m["source"] for m in view["mounts"] if m["destination"] == "/etc/hosts"] == ["/guest/h"]


def test_sysctl_and_annotation_keys_are_not_field_names() -> None:
    config = docker_like()
    config["linux"]["sysctl"] = {"net.core.somaxconn": "5"}
    config["annotations"] = {"umask": "x"}
    message = spec.to_message(guest_view(config))
    assert message.Linux is not None
    assert message.Linux.Sysctl == {"net.core.somaxconn": "5"}
    assert message.Annotations["umask"] == "x"


@pytest.mark.parametrize(
    "change",
    [
        {"process": "x"},
        {"process": {"args": "not a list"}},
        {"process": {"args": ["x"], "user": {"uid": -1}}},
        {"linux": {"resources": {"memory": {"limit": "lots"}}}},
    ],
)
def test_malformed_spec_is_named_not_a_traceback(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        spec.to_message(guest_view({**docker_like(), **change})).encode()
    assert "specification" in caught.value.message


def test_members_that_the_specification_does_not_have_are_passed_over() -> None:
    config = {**docker_like(), "extra": {"deep": 1}}
    config["process"]["noSuchKey"] = config["linux"]["resources"]["other"] = 1
    unknown: list[str] = []
    message = spec.to_message(guest_view(config), unknown)
    assert sorted(unknown) == ["Extra", "NoSuchKey", "Other"]
    assert message == spec.to_message(guest_view(docker_like()))


def test_what_cannot_be_carried_is_told() -> None:
    config = docker_like()
    config["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_RT", "priority": 1}
    config["process"]["user"]["umask"] = 0o22
    config["linux"]["resources"]["unified"] = {"memory.high": "1"}
    config["mounts"].append(
        {"destination": "/v", "type": "bind", "source": "/v", "options": ["rbind", "rshared"]}
    )
    throttle = [{"major": 254, "minor": 0, "rate": 1 << 20}]
    config["linux"]["resources"]["blockIO"] = {"weight": 300, "throttleReadBpsDevice": throttle}
    config["linux"]["resources"]["cpu"] = {"shares": 512, "cpus": "0,1", "mems": "0"}
    config["linux"]["resources"]["network"] = {"classID": 5}
    told = {"the I/O priority", "raw cgroup v2 settings", *spec.OF_HOST_SETS.values()}
    told.add(spec.OF_HOST_NETWORK["classID"])
    told.add("limits of bytes read from the host's devices")
    backwards = "mount propagation from the container to the host (the other direction works)"
    assert set(spec.dropped(config)) == told | {backwards}
    # Those of a disk that the container has are carried, by the host's number, and not told.
    of_host = spec.OF_HOST_DEVICES["throttleReadBpsDevice"]
    assert set(spec.dropped(config, {(254, 0)})) == (told | {backwards}) - {of_host}
    assert of_host in set(spec.dropped(config, {(254, 1)}))
    resources = config["linux"]["resources"]
    assert spec.guest_resources(resources)["blockIO"] == {"weight": 300}
    throttle.append({"major": 8, "minor": 0, "rate": 7})
    kept = spec.guest_resources(resources, {(254, 0)})["blockIO"]
    assert kept == {"weight": 300, "throttleReadBpsDevice": throttle[:1]}
    assert of_host in set(spec.dropped(config, {(254, 0)})), "one of two"
    binds = [spec.GuestBind(str(mount["source"]), mount["options"]) for mount in spec.host_binds(config)]
    spec.to_message(guest_view(config, binds=binds))


@pytest.mark.parametrize(("number", "told"), [(None, 0), (1, 0), (0, 1), (38, 1)])
def test_the_error_of_what_a_seccomp_profile_does_not_name_is_carried(number: int | None, told: int) -> None:
    config = docker_like()
    config["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": number,
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5}],
    }
    seen = spec.to_message(guest_view(config))
    assert seen.Linux is not None
    profile = seen.Linux.Seccomp
    assert profile is not None
    assert (profile.DefaultErrnoRet, profile.Syscalls[0].errnoret) == (number, 5)
    assert list(spec.dropped(config)) == []
    # To an agent that does not have it, EPERM is nothing new.
    assert len(list(spec.default_errno(config))) == told


def test_limits_of_a_containers_disks_cannot_be_changed_later() -> None:
    """Their numbers are the host's: the guest has others, which its agent learns when the container is created."""
    requests: list[Any] = []

    class Agent:
        async def update(self, _container: str, change: Any) -> None:
            requests.append(change)

    async def ready() -> Agent:
        return Agent()

    async def update(_container: str, _after: Any, change: Any) -> None:
        await change()

    messages: list[str] = []
    host: Any = SimpleNamespace(
        runtime=SimpleNamespace(ready=ready, machine=SimpleNamespace()),
        tasks=SimpleNamespace(log=messages.append),
        settings=SimpleNamespace(container=None),
        socket_forwarding=lambda: None,
        resizer=SimpleNamespace(update=update),
    )
    parts = ContainerParts(host, "c1", "/bundle", {"linux": {}}, None)
    parts._disk_numbers = {(8, 0)}

    def limit(major: int) -> dict[str, Any]:
        return {"blockIO": {"throttleReadBpsDevice": [{"major": major, "minor": 0, "rate": 1}]}}

    with pytest.raises(UnsupportedError, match="limits of bytes read from the host's devices") as refused:
        asyncio.run(parts.update(limit(8)))
    assert "throttleReadBpsDevice" in refused.value.hint
    assert not requests
    # Those of other devices mean nothing in the guest, as when the container is created.
    asyncio.run(parts.update(limit(9)))
    assert len(requests) == len(messages) == 1


def test_the_source_of_a_bind_mount_is_relative_to_the_bundle() -> None:
    mounts: list[Any] = [
        {"destination": "/a", "source": ".", "options": ["bind"]},
        {"destination": "/b", "source": "data/../other", "type": "bind"},
        {"destination": "/c", "source": "/abs", "options": ["rbind", "ro"]},
        {"destination": "/d", "source": "tmpfs", "type": "tmpfs"},
        {"destination": "/e", "source": 7, "type": "bind"},
        {"destination": "/f", "source": "x", "options": 7},
        "no mount",
    ]
    config = {"mounts": mounts}
    spec.resolve_sources(config, "/bundle")
    assert [one["source"] for one in mounts[:-1]] == ["/bundle", "/bundle/other", "/abs", "tmpfs", 7, "x"]
    spec.resolve_sources({}, "/bundle")
    spec.resolve_sources({"mounts": 5}, "/bundle")
