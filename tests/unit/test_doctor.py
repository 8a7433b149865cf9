"""`kata doctor` of each hypervisor: what it can do here, and why it cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata.cli import client_crio, client_podman, host
from kata.hypervisor import accel, registry


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KATA_ACCEL", "KATA_HYPERVISOR", "KATA_QEMU", "KATA_CLOUD_HYPERVISOR", "KATA_FIRECRACKER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("KATA_CONF_FILE", "")


def program(tmp_path: Path, name: str) -> str:
    file = tmp_path / name
    file.write_text("#!/bin/sh\necho some version 3\n")
    file.chmod(0o755)
    return str(file)


def test_each_is_there_with_what_it_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "choose", lambda preference="": accel.Accelerator("kvm", "", None))
    monkeypatch.setenv("KATA_FIRECRACKER", program(tmp_path, "fc"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    found = {one["name"]: one for one in host.hypervisors()}
    assert set(found) == set(registry.names())
    assert host.hypervisors()[0]["name"] == registry.DEFAULT
    one = found["firecracker"]
    assert (one["usable"], one["reason"], one["chosen"]) == (True, "", False)
    assert (one["program"], one["version"]) == (str(tmp_path / "fc"), "some version 3")
    assert one["capabilities"] == registry.find("firecracker").capabilities("kvm", {}).to_plain()
    missing = found["cloud-hypervisor"]
    assert (missing["usable"], missing["program"], missing["version"]) == (False, "", "")
    assert "is not installed" in missing["reason"]
    assert "KATA_CLOUD_HYPERVISOR" in missing["hint"]
    rows = {row.name: row for row in host._hypervisors()}
    assert (rows["firecracker"].result, rows["cloud-hypervisor"].result) == (host.OK, host.WARN)
    assert "shares no files" in rows["firecracker"].text
    assert rows[registry.DEFAULT].blocking
    assert not rows["cloud-hypervisor"].blocking


def test_one_that_is_chosen_and_cannot_run_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "choose", lambda preference="": accel.Accelerator("tcg", "", None))
    file = tmp_path / "configuration-clh.toml"
    file.write_text(f"[hypervisor.clh]\npath = '{program(tmp_path, 'ch')}'\n")
    monkeypatch.setenv("KATA_CONF_FILE", str(file))
    first = host._hypervisors()[0]
    assert (first.name, first.result, first.blocking) == ("cloud-hypervisor", host.FAIL, True)
    assert "some version 3" in first.text
    assert "needs KVM" in first.text
    file.write_text("[hypervisor.acrn]\n")
    [row] = host._hypervisors()
    assert (row.result, row.blocking) == (host.FAIL, True)
    assert "is not offered" in row.text


@pytest.mark.parametrize("name", ["qemu", "cloud-hypervisor", "firecracker"])
def test_the_program_that_is_looked_at_is_the_one_that_would_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The configured one, else the variable's: nothing on the PATH, and one of them no program."""
    monkeypatch.setattr(accel, "choose", lambda preference="": accel.Accelerator("kvm", "", None))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monitor = registry.find(name)
    if name != "qemu":  # that is looked for where Debian puts it, too
        assert monitor.version({}) == ""
        assert [check.ok for check in monitor.checks({})] == [False]
    variable = f"KATA_{name.upper().replace('-', '_')}"
    other = program(tmp_path, "other")
    monkeypatch.setenv(variable, other)
    assert (monitor.program({}), monitor.version({})) == (other, "some version 3")
    [check] = monitor.checks({})
    assert (check.ok, check.text) == (True, f"some version 3 ({other})")
    monkeypatch.setenv(variable, str(tmp_path / "gone"))
    assert host.versions()[name] == "unknown"
    configured = program(tmp_path, "configured")
    file = tmp_path / "configuration.toml"
    file.write_text(f"[runtime]\nhypervisor_name = '{name}'\n[hypervisor.{name}]\npath = '{configured}'\n")
    monkeypatch.setenv("KATA_CONF_FILE", str(file))
    first = host.hypervisors()[0]
    assert (first["name"], first["usable"], first["program"]) == (name, True, configured)
    assert host.versions()[name] == "some version 3"
    # What is configured and cannot be executed is named, whatever else there is.
    Path(configured).chmod(0o644)
    monkeypatch.setenv(variable, other)
    first = host.hypervisors()[0]
    assert (first["usable"], first["version"]) == (False, "")
    assert f"{configured} is no program that can be executed" in first["reason"]


def test_podman_has_a_line_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_in = tmp_path / "50-kata.conf"
    monkeypatch.setattr(client_podman, "DEFAULT_PATH", str(drop_in))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not any(check.name == "podman" for check in host._clients())
    says = "cgroupfs|v2|/usr/bin/conmon|conmon version 2.1.6"
    (tmp_path / "podman").write_text(
        f"#!/bin/sh\ncase $1 in --version) echo podman version 4.3.1;; *) echo '{says}';; esac\n"
    )
    (tmp_path / "podman").chmod(0o755)

    def line() -> tuple[str, str, str]:
        [check] = [check for check in host._clients() if check.name == "podman"]
        return check.result, check.text, check.hint

    assert line()[0] == host.OK
    assert line()[2].startswith("kata install podman")
    drop_in.write_text('[engine.runtimes]\nkata = ["/bin/true"]\n')
    with_what = "cgroup manager cgroupfs (cgroups v2), monitor /usr/bin/conmon 2.1.6"
    assert line() == (host.OK, f"4.3.1; its runtime 'kata' is /bin/true; {with_what}", "")
    drop_in.write_text('[engine.runtimes]\nkata = ["/none"]\n')
    assert (line()[0], "cannot be executed" in line()[1]) == (host.WARN, True)
    (tmp_path / "podman").write_text("#!/bin/sh\necho podman version 3.0.1\n")
    assert (line()[0], "too old" in line()[1]) == (host.WARN, True)


def test_crio_has_a_line_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_in = tmp_path / "50-kata.conf"
    monkeypatch.setattr(client_crio, "DEFAULT_PATH", str(drop_in))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not any(check.name == "cri-o" for check in host._clients())
    (tmp_path / "crio").write_text("#!/bin/sh\necho crio version 1.34.0\n")
    (tmp_path / "crio").chmod(0o755)

    def line() -> tuple[str, str, str]:
        [check] = [check for check in host._clients() if check.name == "cri-o"]
        return check.result, check.text, check.hint

    assert line() == (
        host.OK,
        f"1.34.0; {drop_in} names no handler 'kata'",
        "kata install crio, if it is for CRI-O",
    )
    drop_in.write_text('[crio.runtime.runtimes.kata]\nruntime_path = "/none"\n')
    assert (line()[0], "/none, which its handler names" in line()[1]) == (host.WARN, True)
    drop_in.write_text(
        '[crio.runtime.runtimes.kata]\nruntime_path = "/bin/true"\n'
        '[crio.runtime.runtimes.kata-oci]\nruntime_path = "/bin/true"\n'
    )
    assert (line()[0], line()[2]) == (host.WARN, "apt-get install conmon")
    (tmp_path / "conmon").write_text("")
    (tmp_path / "conmon").chmod(0o755)
    assert line() == (host.OK, "1.34.0; its handlers are 'kata' and 'kata-oci'", "")
