"""The settings of a sandbox: plain values and back, and what is refused."""

from __future__ import annotations

import json
import marshal
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sandbox_support
from waiting import until

from kata import journal_undo, settings, settings_part
from kata.cli import session
from kata.engine.launch import launch
from kata.errors import ConfigError, StateError
from kata.journal import FILE_NAME, Journal
from kata.json_text import dumps
from kata.settings import (
    DiskSettings,
    NetworkSettings,
    PodSettings,
    PortSettings,
    SandboxSettings,
    SizeSettings,
    VolumeSettings,
)
from kata.shim import start

ROOT = Path(__file__).resolve().parents[2]


def full() -> SandboxSettings:
    """One with something in every part."""
    made = sandbox_support.sandbox("a", "/c", accel="kvm", kernel="/k", initrd="/i")
    made.disks = [DiskSettings(path="/d", readonly=True), None]
    made.network = NetworkSettings(mode="user", ports=[PortSettings(host_port=80, guest_port=8080)])
    made.resolv_conf = []
    made.sysctls = {"net.core.somaxconn": "9"}
    made.notes = ["a note"]
    machine = made.described()
    machine.configuration = {"hypervisor.path": ["/q", "file:3"]}
    machine.size = SizeSettings(vcpus=2, memory_mib=512, asked_cpus=1.5, asked_memory=1 << 29)
    machine.guest.modules = [["dummy", "numdummies=1"]]
    machine.share.disabled = True
    assert made.container is not None
    made.container.volumes = [VolumeSettings(source="/s", destination="/t", readonly=True)]
    return made


def test_plain_values_and_back() -> None:
    for made in (full(), start.pod_settings("k8s.io", "p", "/bundle", 1, "")):
        plain = made.to_plain()
        assert SandboxSettings.from_plain(marshal.loads(marshal.dumps(plain))) == made
        assert SandboxSettings.from_plain(json.loads(dumps(plain))).to_plain() == plain


def test_what_is_as_by_default_is_left_out() -> None:
    plain = full().to_plain()
    assert plain["machine"]["hypervisor"] == {"accel": "kvm"}
    assert plain["disks"] == [{"path": "/d", "readonly": True}, None]
    # No lines are something else than no word about them.
    assert (plain["resolv_conf"], SandboxSettings.from_plain(plain).resolv_conf) == ([], [])
    assert "pod" not in plain
    assert SandboxSettings(
        id="p", client=session.client_policy(), pod=PodSettings(config_path="")
    ).to_plain()["pod"] == {"config_path": ""}


def test_defaults_are_not_shared() -> None:
    one, other = (SandboxSettings(id=name, client=session.client_policy()) for name in "ab")
    one.notes.append("mine")
    one.sysctls["a"] = "b"
    one.network.ports.append(PortSettings(host_port=1, guest_port=1))
    assert (other.notes, other.sysctls, other.network.ports) == ([], {}, [])


def _without(plain: dict[str, Any], *keys: str) -> dict[str, Any]:
    inner = plain
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return plain


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("door", "kata", "there is no key 'door'"),
        ("machine.guest.colour", 1, "there is no key 'machine.guest.colour'"),
        ("machine.size.vcpus", "1", "machine.size.vcpus should be int, and is str"),
        ("machine.size.vcpus", True, "machine.size.vcpus should be int, and is bool"),
        ("machine.size.asked_cpus", False, "machine.size.asked_cpus should be float, and is bool"),
        ("container.auto_remove", 1, "container.auto_remove should be bool, and is int"),
        ("container.rootfs", [], "container.rootfs should be an object, and is list"),
        ("disks", {}, "disks should be a list, and is dict"),
        ("disks", [{"path": "/d"}], "the key 'disks[0].readonly' is missing"),
        ("sysctls", {"a": 1}, "sysctls.a should be str, and is int"),
        ("sysctls", [], "sysctls should be an object, and is list"),
        ("id", None, "id should be str, and is NoneType"),
    ],
)
def test_values_that_cannot_be(place: str, value: Any, words: str) -> None:
    plain = full().to_plain()
    *above, name = place.split(".")
    inner = plain
    for key in above:
        inner = inner[key]
    inner[name] = value
    with pytest.raises(ConfigError) as caught:
        SandboxSettings.from_plain(plain)
    assert words in caught.value.message
    assert "docs/settings.md" in caught.value.hint


@pytest.mark.parametrize("keys", [("id",), ("client", "idle_s"), ("machine", "guest", "kernel")])
def test_keys_that_are_missing(keys: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"the key '{'.'.join(keys)}' is missing"):
        SandboxSettings.from_plain(_without(full().to_plain(), *keys))


def test_what_is_no_object_at_all() -> None:
    with pytest.raises(ConfigError, match="all of them should be an object, and is list"):
        SandboxSettings.from_plain([])


def test_a_pod_has_no_machine_until_it_is_described() -> None:
    with pytest.raises(StateError, match="'p' has not been created"):
        start.pod_settings("k8s.io", "p", "/bundle", 1, "").described()


def test_every_part_can_be_read_and_written() -> None:
    """Each annotation is of a form that can be checked, and each parameter is kept as an attribute."""
    for name, cls in vars(settings).items():
        if isinstance(cls, type) and issubclass(cls, settings_part.Part) and cls is not settings_part.Part:
            parameters = set(vars(cls)["__init__"].__annotations__) - {"return"}
            assert set(settings_part._readers_of(cls)) == parameters == set(vars(cls)["__slots__"]), name


def test_clients_decide_differently() -> None:
    """What a policy says is what each client wants; the name is only a name."""
    person = session.client_policy().to_plain()
    containerd = start.client_policy("default", "/bundle").to_plain()
    differ = {name for name in person if person[name] != containerd.get(name)}
    assert differ == set(person), "each of these exists because the two clients differ in it"
    assert start.client_policy("moby", "/bundle").recursive_readonly == "rbind"


def test_an_engine_says_what_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log has the error; nothing was begun, and what its launcher made is undone as after any dead engine."""
    plain = SandboxSettings.to_plain
    monkeypatch.setattr(SandboxSettings, "to_plain", lambda self: {**plain(self), "colour": 1})
    engine = launch(sandbox_support.sandbox("a", "/c", accel="tcg", kernel="/k", initrd="/i"), str(tmp_path))
    journal = Journal.open(os.path.join(engine.run_dir, FILE_NAME))
    until(lambda: not journal.owner_alive(), "the engine ends", patience_s=30)
    log = Path(engine.run_dir, "engine.log").read_text()
    assert (
        log == "error: the sandbox's settings: there is no key 'colour'\nhint: " + settings_part._HINT + "\n"
    )
    assert journal_undo.undo(journal) == []
    assert not os.path.exists(engine.run_dir)
    engine.release()


def test_the_page_about_them_is_as_they_are() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "settings_table.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), "run tools/settings_table.py"
