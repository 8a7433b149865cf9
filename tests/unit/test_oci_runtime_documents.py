"""What `kata-runtime` writes about itself and its host: spec, features, env, version."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kata import __version__
from kata.oci.capabilities import ALL
from kata.oci_runtime import environment, spec
from kata.oci_runtime import main as oci_runtime

ROOT = Path(__file__).resolve().parents[2]

Run = Any


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def one(*argv: str) -> tuple[int, str, str]:
        status = oci_runtime.main(argv)
        output = capsys.readouterr()
        return status, output.out, output.err

    return one


def test_spec_begins_a_bundle(run: Run, tmp_path: Path) -> None:
    assert run("spec", "--bundle", str(tmp_path)) == (0, "", "")
    text = (tmp_path / "config.json").read_text()
    made = json.loads(text)
    assert (made["process"]["args"], made["process"]["terminal"]) == (["sh"], True)
    assert made["root"] == {"path": "rootfs", "readonly": True}
    assert "seccomp" not in made["linux"]
    assert text.splitlines()[1].startswith("\t")
    # Its own engine takes it: every capability and mount option of it is one that is supported.
    assert set(made["process"]["capabilities"]["bounding"]) <= set(ALL)
    supported = set(json.loads(run("features")[1])["mountOptions"])
    options = {option for mount in made["mounts"] for option in mount["options"] if "=" not in option}
    assert options - supported == {"newinstance"}  # devpts's own


def test_spec_overwrites_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("spec")[0] == 0
    (tmp_path / "config.json").write_text("mine")
    status, out, err = run("spec")
    assert (status, out) == (1, "")
    assert "config.json exists" in err
    assert (tmp_path / "config.json").read_text() == "mine"
    (tmp_path / "link").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "link/config.json")
    assert run("spec", "-b", str(tmp_path / "link"))[0] == 1
    assert not (tmp_path / "elsewhere").exists()
    status, _, err = run("spec", "--bundle", str(tmp_path / "none"))
    assert (status, "there is no directory" in err, "hint: mkdir -p" in err) == (1, True, True)


def test_spec_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spec, "open", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        spec.write(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_spec_refuses_rootless_by_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run("spec", "--rootless")
    assert (status, "--rootless" in err, "hint: leave --rootless out" in err) == (1, True, True)
    assert list(tmp_path.iterdir()) == []


STRINGS, SWITCH = [str], bool
FEATURES: dict[str, Any] = {
    "ociVersionMin": str,
    "ociVersionMax": str,
    "hooks": STRINGS,
    "mountOptions": STRINGS,
    "annotations": dict,
    "potentiallyUnsafeConfigAnnotations": STRINGS,
    "linux": {
        "namespaces": STRINGS,
        "capabilities": STRINGS,
        "cgroup": dict.fromkeys(("v1", "v2", "systemd", "systemdUser", "rdma"), SWITCH),
        "seccomp": {
            "enabled": SWITCH,
            **dict.fromkeys(("actions", "operators", "archs", "knownFlags", "supportedFlags"), STRINGS),
        },
        "apparmor": {"enabled": SWITCH},
        "selinux": {"enabled": SWITCH},
        "intelRdt": {"enabled": SWITCH},
        "mountExtensions": {"idmap": {"enabled": SWITCH}},
        "netDevices": {"enabled": SWITCH},
    },
}
"""The structure of runtime-spec's features.md and features-linux.md (1.3), with the type of each member."""


def check(found: Any, allowed: Any, where: str) -> None:
    if isinstance(allowed, dict):
        assert isinstance(found, dict), where
        for name, value in found.items():
            assert name in allowed, f"{where}.{name} is not in the specification"
            check(value, allowed[name], f"{where}.{name}")
    elif isinstance(allowed, list):
        assert isinstance(found, list), where
        assert all(isinstance(one, str) for one in found), where
        assert len(set(found)) == len(found), where
    else:
        assert isinstance(found, allowed), where


def test_features_have_the_form_of_the_specification(run: Run) -> None:
    status, out, err = run("features")
    assert (status, err) == (0, "")
    found = json.loads(out)
    check(found, FEATURES, "features")
    assert {"ociVersionMin", "ociVersionMax"} <= set(found)  # the only ones that have to be there


def test_features_name_the_seccomp_that_the_agent_has(run: Run) -> None:
    seccomp = json.loads(run("features")[1])["linux"]["seccomp"]
    source = (ROOT / "agent/src/seccomp.rs").read_text()
    known = set(re.findall(r'"((?:SCMP_(?:ACT|CMP)|SECCOMP_FILTER_FLAG)_\w+)"', source))
    named = {*seccomp["actions"], *seccomp["operators"], *seccomp["supportedFlags"]}
    assert known - named == {"SCMP_ACT_NOTIFY"}  # which is there to be refused
    assert named <= known


MEMBERS = {
    "Kernel": {"Path", "Parameters"},
    "Meta": {"Version"},
    "Initrd": {"Path"},
    "Hypervisor": {"Path", "Version", "MachineType", "SharedFS", "VirtioFSDaemon", "Msize9p", "Debug"},
    "Runtime": {"Path", "Debug", "Trace", "DisableGuestSeccomp", "DisableNewNetNs", "Config", "Version"},
    "Host": {"Kernel", "Architecture", "VMContainerCapable", "SupportVSocks", "Distro", "CPU", "Memory"},
    "Agent": {"Debug", "Trace"},
}
"""Members of the original's document that scripts read."""


def test_env_is_one_document_in_two_forms(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "configuration.toml"
    file.write_text(
        '[hypervisor.qemu]\nkernel = "/boot/a \\"kernel\\""\ninitrd = "/boot/i"\nkernel_params = "a=b c"\n'
        'enable_annotations = ["default_vcpus", "\\u007f"]\n[agent.kata]\nenable_debug = true\n'
    )
    monkeypatch.setenv("KATA_CONF_FILE", str(file))
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = run("env", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert {name: set(found[name]) & members for name, members in MEMBERS.items()} == MEMBERS
    assert found["Kernel"] == {"Path": '/boot/a "kernel"', "Parameters": "a=b c"}
    assert (found["Initrd"]["Path"], found["Agent"]["Debug"]) == ("/boot/i", True)
    assert found["Runtime"]["Config"]["Path"] == str(file)
    assert found["Runtime"]["Version"]["Version"]["Semver"] == __version__
    assert found["Hypervisor"]["SecurityInfo"]["EnableAnnotations"] == ["default_vcpus", "\x7f"]
    assert found["Host"]["Kernel"] == os.uname().release
    assert 0 < found["Host"]["Memory"]["Available"] <= found["Host"]["Memory"]["Total"]
    status, out, _ = run("kata-env")
    written = tomllib.loads(out)
    for volatile in (found, written):
        del volatile["Host"]["Memory"]
    assert (status, written) == (0, found)


def test_env_of_a_host_that_has_nothing_yet(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATA_GUEST_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KATA_QEMU", str(tmp_path / "none"))
    found = json.loads(run("env", "--json")[1])
    assert (found["Kernel"]["Path"], found["Hypervisor"]["Version"]) == ("", "")


def test_env_reads_os_release_as_a_shell_would(tmp_path: Path) -> None:
    (tmp_path / "r").write_text('# A=b\nNAME=\'Some "Linux"\'\nBAD="x\nVERSION_ID=12\n\n')
    assert environment._assignments(str(tmp_path / "r")) == {"NAME": 'Some "Linux"', "VERSION_ID": "12"}
    assert environment._assignments(str(tmp_path / "none")) == {}


def test_the_version_is_said_as_runc_says_it(run: Run) -> None:
    for argv in (("--version",), ("-v",), ("version",)):
        status, out, _ = run(*argv)
        assert (status, out.splitlines()[0]) == (0, f"kata-runtime version {__version__}")
        assert re.fullmatch(r"spec: \d+\.\d+\.\d+", out.splitlines()[1])
