"""What containerd executes, without a machine: command line, names, sizes, refusals."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kata.engine.containers import spec
from kata.errors import ConfigError, UnsupportedError, UsageError
from kata.oci import features
from kata.proto.bootstrap_pb import BootstrapParams, BootstrapResult, Extension
from kata.proto.google_pb import Any as Any_
from kata.proto.runtimeoptions_pb import Options
from kata.proto.task_pb import DeleteResponse, RuntimeInfo
from kata.resources import sizing
from kata.shim import bootstrap, names, options, start
from kata.shim.main import Arguments

ROOT = Path(__file__).resolve().parents[2]
SHIM = ["/usr/bin/python3", "-I", "-S", str(ROOT / "src/kata/__main__.py"), "shim"]
NAMESPACES = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]


def shim(*arguments: str, cwd: Path, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*SHIM, *arguments], cwd=cwd, env=env, input=stdin, capture_output=True, timeout=60, check=False
    )


def test_options_as_go_writes_them() -> None:
    found = Arguments(["-namespace", "k8s.io", "--id=a=b", "-debug", "-address", "/run/c.sock", "start"])
    assert found.values == {"namespace": "k8s.io", "id": "a=b", "address": "/run/c.sock"}
    assert (found.flags, found.action) == ({"debug"}, "start")


@pytest.mark.parametrize("argv", [["-nope", "start"], ["-id"], ["start", "again"]])
def test_options_that_are_wrong(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        Arguments(argv)


def test_wrong_use_is_told_in_a_sentence(tmp_path: Path) -> None:
    for arguments, words in (
        ((), "a command is missing"),
        (("fly",), "there is no command 'fly'"),
        (("-namespace", "n", "-id", "x", "start"), "cannot read"),
        (("-id", "x", "start"), "option -namespace is missing"),
    ):
        done = shim(*arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert words in done.stderr.decode()
        assert b"fault of its own" not in done.stderr
        assert done.stdout == b""


def test_info_for_containerd_2(tmp_path: Path) -> None:
    info = RuntimeInfo.decode(shim("-info", cwd=tmp_path).stdout)
    assert info.name == "io.containerd.kata.v2"
    assert info.version is not None
    assert info.version.version
    assert info.features is not None
    assert info.features.type_url == "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    found = json.loads(info.features.value)
    assert "rro" in found["mountOptions"]
    assert found["linux"]["mountExtensions"] == {"idmap": {"enabled": False}}


def test_the_mount_options_that_are_told_are_those_that_the_agent_knows() -> None:
    source = (ROOT / "agent/src/mountopts.rs").read_text()
    tables = re.findall(r"^const (?:FLAGS|PROPAGATION|RECURSIVE):.*?^\];", source, re.M | re.S)
    assert len(tables) == 3
    assert sorted(re.findall(r'^    \("(\w+)"', "\n".join(tables), re.M)) == sorted(features.MOUNT_OPTIONS)


def test_delete_of_what_is_not_there(tmp_path: Path) -> None:
    done = shim(
        "-namespace",
        "n",
        "-id",
        "gone",
        "-bundle",
        "/nowhere",
        "delete",
        cwd=tmp_path,
        KATA_RUN_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr.decode()
    answer = DeleteResponse.decode(done.stdout)
    assert answer.exit_status == 137
    assert answer.exited_at is not None


def test_host_namespaces_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    config = {"linux": {"namespaces": NAMESPACES[:-1]}, "process": {"args": ["true"]}}
    (bundle / "config.json").write_text(json.dumps(config))
    done = shim("-namespace", "n", "-id", "x", "start", cwd=bundle, KATA_RUN_DIR=str(tmp_path / "r"))
    assert done.returncode == 1
    assert b"host's network namespace" in done.stderr
    assert not (tmp_path / "r").exists()


def test_names_stay_apart_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", "/run/kata")
    assert names.directory_name("default", "web") == "default.web"
    long = names.directory_name("k8s.io", "f" * 64)
    assert long == f"k8s.io.{'f' * 64}"
    longer = [names.directory_name("n" * 40, f"{digit}" * 76) for digit in "01"]
    assert len(set(longer)) == 2
    assert all(len(f"/run/kata/sandboxes/{name}/engine.sock") <= 107 for name in longer)


def test_the_configuration_file_that_a_client_names() -> None:
    mine = Options(type_url="x", config_path="/etc/c.toml").encode()
    any_of = Any_(type_url="runtimeoptions.v1.Options", value=mine)
    assert options.config_path(any_of.encode()) == "/etc/c.toml"
    told = BootstrapParams(instance_id="i", namespace="n", extensions=[Extension(value=any_of)])
    raw = told.encode()
    assert options.config_path(raw, bootstrap.params(raw, "n", "i")) == "/etc/c.toml"
    assert options.config_path(b"") == ""
    runc = Any_(type_url="containerd.runc.v1.Options", value=b"\x12\x02ab")
    assert options.config_path(runc.encode()) == ""
    with pytest.raises(ConfigError, match="options cannot be decoded"):
        options.config_path(b"\xff\xff")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (None, None)),
        ({"linux": {"resources": {"cpu": {"quota": 150000, "period": 100000}}}}, (1.5, None)),
        ({"linux": {"resources": {"cpu": {"quota": -1}, "memory": {"limit": 1 << 28}}}}, (None, 1 << 28)),
        (
            {
                "annotations": {
                    "io.kubernetes.cri.sandbox-cpu-quota": "200000",
                    "io.kubernetes.cri.sandbox-cpu-period": "100000",
                    "io.kubernetes.cri.sandbox-memory": "1048576",
                },
                "linux": {"resources": {"cpu": {"quota": 1000, "period": 100000}}},
            },
            (2.0, 1 << 20),
        ),
        ({"annotations": {"io.kubernetes.cri.sandbox-memory": "much"}}, (None, None)),
        (
            {
                "annotations": {
                    "io.kubernetes.cri-o.LinuxResources": json.dumps(
                        {"cpu_period": 50000, "cpu_quota": 75000, "memory_limit_in_bytes": 1 << 29}
                    )
                }
            },
            (1.5, 1 << 29),
        ),
        ({"annotations": {"io.kubernetes.cri-o.LinuxResources": "[]"}}, (None, None)),
        ({"linux": {"resources": {"memory": {"limit": (1 << 63) - 4096}}}}, (None, None)),
    ],
)
def test_what_was_asked_for(config: dict[str, Any], expected: tuple[float | None, int | None]) -> None:
    found = sizing.request_of(config)
    assert (found.cpus, found.memory) == expected


def test_a_network_namespace_and_its_path() -> None:
    linux = {"namespaces": [*NAMESPACES[:-1], {"type": "network", "path": "/run/netns/x"}]}
    assert start.network_namespace({"linux": linux}) == "/run/netns/x"
    assert start.network_namespace({"linux": {"namespaces": NAMESPACES}}) == ""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, False),
        ({"hooks": None, "mounts": None}, False),
        ({"hooks": {"createRuntime": [], "poststop": [{"path": "/h"}]}}, False),
        ({"mounts": [{"destination": "/proc"}, {"destination": "/etc/hosts"}]}, False),
        ({"mounts": [{"destination": "/proc"}, {"destination": "/etc/resolv.conf"}]}, True),
        ({"hooks": {"prestart": [{"path": "/h"}]}}, True),
        ({"hooks": {"createRuntime": [{"path": "/h"}]}}, True),
        ({"hooks": {"createContainer": [{"path": "/h"}]}}, True),
    ],
)
def test_whether_a_new_network_namespace_is_wired_later(config: dict[str, Any], expected: bool) -> None:
    assert start.expects_network(config) is expected


def test_pods() -> None:
    cri = {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": "pod1",
    }
    assert spec.container_type({"annotations": cri}) == "pod_container"
    assert spec.pod_of({"annotations": cri}) == "pod1"
    cri["io.kubernetes.cri.container-type"] = "sandbox"
    assert spec.container_type({"annotations": cri}) == "pod_sandbox"
    assert spec.pod_of({"annotations": cri}) == ""
    assert spec.container_type({}) == "single_container"


@pytest.mark.parametrize("kind", ["network", "pid", "ipc"])
def test_a_host_namespace_is_named(kind: str) -> None:
    given = [one for one in NAMESPACES if one["type"] != kind]
    with pytest.raises(UnsupportedError, match=f"(?i)host's {kind} namespace"):
        spec.refuse_foreign({"linux": {"namespaces": given}})


def test_another_processs_namespace_is_refused_but_for_a_pods_own() -> None:
    namespaces = [*NAMESPACES[1:], {"type": "pid", "path": "/proc/7/ns/pid"}]
    with pytest.raises(UnsupportedError, match="/proc/7/ns/pid"):
        spec.refuse_foreign({"linux": {"namespaces": namespaces}})
    pod = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"}
    spec.refuse_foreign({"linux": {"namespaces": namespaces}, "annotations": pod})


def test_crio_makes_some_namespaces_for_a_pod_itself() -> None:
    pod = {"io.kubernetes.cri-o.ContainerType": "sandbox"}
    plain = {one["type"]: one for one in NAMESPACES}

    def ask(annotations: dict[str, str], kind: str) -> None:
        namespaces = [*{**plain, kind: {"type": kind, "path": f"/run/{kind}"}}.values()]
        spec.refuse_foreign({"linux": {"namespaces": namespaces}, "annotations": annotations})

    for kind in ("ipc", "uts", "network"):
        ask(pod, kind)
    for about, kind in (
        (pod, "pid"),
        (pod, "user"),
        ({"io.kubernetes.cri.container-type": "sandbox"}, "ipc"),
    ):
        with pytest.raises(UnsupportedError, match=f"/run/{kind}"):
            ask(about, kind)


def _join(tmp_path: Path, stdin: bytes) -> bytes:
    """What ``start`` prints for a container of a pod whose engine is there."""
    annotations = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod1"}
    for name in ("pod1", "x"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "pod1/address").write_text("unix:///run/kata/e.sock")
    config = {"linux": {"namespaces": NAMESPACES}, "annotations": annotations}
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    done = shim("-namespace", "n", "-id", "x", "start", cwd=tmp_path / "x", stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_start_answers_as_it_is_asked(tmp_path: Path) -> None:
    plain = b"unix:///run/kata/e.sock"
    assert _join(tmp_path, b"") == plain
    # Options of the runtime, as containerd hands them over until 2.2; and the parameters of another container.
    options = Any_(type_url="runtimeoptions.v1.Options", value=b"\x0a\x01x").encode()
    assert _join(tmp_path, options) == plain
    assert _join(tmp_path, BootstrapParams(instance_id="y", namespace="n").encode()) == plain
    asked = BootstrapParams(instance_id="x", namespace="n", containerd_version="2.3.0").encode()
    told = BootstrapResult.decode(_join(tmp_path, asked))
    assert (told.version, told.address.encode(), told.protocol) == (3, plain, "ttrpc")
