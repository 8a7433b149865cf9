"""Configuration files and pod annotations: places, merging, origins, and what is wrong with them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from kata.cli import main
from kata.config import annotations as pod
from kata.config import files, keys
from kata.engine import machine
from kata.errors import (
    ConfigError,
    GuestAssetError,
    HostError,
    KataError,
    ResourceExhaustedError,
    UsageError,
)
from kata.hypervisor import accel, registry
from kata.resources import sizing
from kata.settings import GuestSettings, HypervisorSettings, MachineSettings, NetworkSettings, ShareSettings

ROOT = Path(__file__).resolve().parents[2]
HYPERVISOR = "io.katacontainers.config.hypervisor."


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KATA_CONF_FILE", *(variable for variable, _ in files.ENVIRONMENT)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(files, "PLACES", (str(tmp_path / "etc.toml"), str(tmp_path / "opt.toml")))


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def loaded(tmp_path: Path, text: str) -> files.Configuration:
    return files.load(write(tmp_path / "c" / "configuration.toml", text))


# ---- files ----


def test_without_a_file_there_are_defaults(tmp_path: Path) -> None:
    found = files.load()
    assert (found.values, found.files, found.notes) == ({}, [], [])
    assert found.origin("hypervisor.path") == "default"
    assert not (tmp_path / "run").exists(), "nothing to be kept"


def test_the_first_place_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(named: str = "") -> int:
        return int(files.load(named).get("hypervisor.default_vcpus"))

    write(tmp_path / "opt.toml", "[hypervisor.qemu]\ndefault_vcpus = 4\n")
    assert chosen() == 4
    write(tmp_path / "etc.toml", "[hypervisor.qemu]\ndefault_vcpus = 3\n")
    assert chosen() == 3
    monkeypatch.setenv(
        "KATA_CONF_FILE", write(tmp_path / "env.toml", "[hypervisor.qemu]\ndefault_vcpus = 2\n")
    )
    assert chosen() == 2
    assert chosen(write(tmp_path / "named.toml", "[hypervisor.qemu]\ndefault_vcpus = 1\n")) == 1
    monkeypatch.setenv("KATA_CONF_FILE", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match=r"none\.toml does not exist; it was named by KATA_CONF_FILE"):
        files.load()


def test_drop_ins_change_single_keys_and_are_beside_what_the_file_links_to(tmp_path: Path) -> None:
    real = tmp_path / "real"
    main = write(
        real / "configuration-qemu.toml", "[hypervisor.qemu]\n\ndefault_vcpus = 1\ndefault_memory = 512\n"
    )
    write(real / "config.d" / "20-b.toml", "# later\n[hypervisor.qemu]\ndefault_vcpus = 3\n")
    write(
        real / "config.d" / "10-a.toml",
        '[hypervisor.qemu]\ndefault_vcpus = 2\n[runtime]\n"create_container_timeout" = 7\n',
    )
    write(real / "config.d" / "30-c.toml.bak", "not = [toml")
    (tmp_path / "link.toml").symlink_to(main)
    found = files.load(str(tmp_path / "link.toml"))
    assert found.values == {
        "hypervisor.default_vcpus": (3, f"{real}/config.d/20-b.toml:3"),
        "hypervisor.default_memory": (512, f"{tmp_path}/link.toml:4"),
        "runtime.create_container_timeout": (7, f"{real}/config.d/10-a.toml:4"),
    }
    assert [os.path.basename(path) for path in found.files] == ["link.toml", "10-a.toml", "20-b.toml"]


def test_what_was_read_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "configuration.toml"
    write(path, "[hypervisor.qemu]\ndefault_vcpus = 1\nmemory_slots = 3\n")
    first = files.load(str(path))
    monkeypatch.setattr(files, "read", lambda _: pytest.fail("parsed again"))
    again = files.load(str(path))
    assert (again.values, again.files, again.notes) == (first.values, first.files, first.notes)
    assert again.notes
    monkeypatch.undo()
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "run"))
    write(path, "[hypervisor.qemu]\ndefault_vcpus = 2\nmemory_slots = 3\n")
    os.utime(path, ns=(1, 1))
    assert files.load(str(path)).get("hypervisor.default_vcpus") == 2
    write(tmp_path / "config.d" / "x.toml", "[hypervisor.qemu]\ndefault_vcpus = 3\n")
    assert files.load(str(path)).get("hypervisor.default_vcpus") == 3
    [cache] = (tmp_path / "run").iterdir()
    assert cache.stat().st_mode & 0o777 == 0o600
    cache.write_bytes(b"torn")
    assert files.load(str(path)).get("hypervisor.default_vcpus") == 3


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """Others than TOML's do not count: editors number lines as it does."""
    odd = "# \u2028 \x85\n[hypervisor.qemu]\nno_such_key = 1\n"
    with pytest.raises(
        ConfigError, match=r"configuration.toml:3.*no_such_key|no_such_key.*configuration.toml:3"
    ):
        loaded(tmp_path, odd)


def test_the_environment_overrules_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_ACCEL", "tcg")
    monkeypatch.setenv("KATA_BOOT_TIMEOUT", "77")
    monkeypatch.setenv("KATA_GUEST_EXTENSIONS", "iptables, more")
    found = loaded(tmp_path, '[hypervisor.qemu]\naccelerator = "kvm"\n[agent.kata]\ndial_timeout = 5\n')
    assert found.values["hypervisor.accelerator"] == ("tcg", "environment KATA_ACCEL")
    assert found.get("agent.dial_timeout") == 77
    assert found.get("agent.guest_extensions") == ["iptables", "more"]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[hypervisor.qemu]\n\ndefault_vcpu = 1", r"toml:3: there is no key 'default_vcpu' in \[hyp", "default_vcpus"),
        ("[runtime]\nkernel_params = 'x'", r"there is no key 'kernel_params' in \[runtime\]", "[hypervisor.qemu]"),
        ("[hypervisr.qemu]\npath = ''", r"there is no table \[hypervisr\]", ""),
        ("[agent.katta]\nx = 1", r"there is no table \[agent.katta\]", "agent.kata"),
        ("[runtim]\nx = 1", r"there is no table \[runtim\]", "runtime"),
        ("path = '/x'", "there is no key 'path'", "[hypervisor.qemu]"),
        ("[hypervisor]\npath = '/x'", r"there is no key 'path' in \[hypervisor\]", "[hypervisor.qemu]"),
        ("[hypervisor.qemu]\ndefault_vcpus = 'two'", "has to be a number, and is 'two'", "configuration.md"),
        ("[hypervisor.qemu]\ndefault_vcpus = true", "has to be a number, and is true", ""),
        ("[hypervisor.qemu]\ndefault_memory = 1.5", "has to be a whole number", ""),
        ("[hypervisor.qemu]\ndefault_maxmemory = -1", "has to be at least 0", ""),
        ("[hypervisor.qemu]\nmsize_9p = 99999999999", "has to be at most", ""),
        ("[hypervisor.qemu]\nenable_debug = 1", "has to be true or false", ""),
        ("[hypervisor.qemu]\nenable_annotations = 'x'", "has to be a list of strings", ""),
        ("[hypervisor.qemu]\npath = 'qemu'", "has to be an absolute path", ""),
        ("[hypervisor.qemu]\nshared_fs = 'virtio-9'", "'virtio-9', which is not offered", "did you mean 'virtio-9p'"),
        ("[runtime]\ninternetworking_model = 'l3forwarding'", "which is not offered", "tcfilter, macvtap, none"),
        ("[hypervisor.qemu]\nconfidential_guest = true", "confidential_guest = true is refused: conf", ""),
        ("[hypervisor.qemu]\nrootless = true", "rootless = true is refused", ""),
        ("[hypervisor.qemu]\nimage = '/x.img'", "is refused: the guest is booted from an initrd", ""),
        ("[hypervisor.acrn]\npath = '/x'", r"toml:1: the hypervisor of \[hypervisor.acrn\] is not offered", "qemu"),
        ("[hypervisor.clh]\n\nmachine_typ = ''", r"toml:3: there is no key 'machine_typ' in \[hypervisor.clh", "type"),
        ("[hypervisor.clh]\n[hypervisor.firecracker]", r"toml:1: there are the tables \[hypervisor.cloud-", "name"),
        ("[hypervisor.firecracker]\nshared_fs = 'virtio-fs'", r"\[hypervisor.firecracker\] shared_fs is", "none"),
        ("[hypervisor.clh]\naccelerator = 'tcg'", r"\[hypervisor.cloud-hypervisor\] accelerator is", "kvm"),
        ("[hypervisor.clh]\nfirmware = '/x'", "is refused: the kernel is booted without a firmware", ""),
        ("[hypervisor.qemu]\nkernel_params = 'a\\nb'", "is not TOML|has to be one line", ""),
        ('[hypervisor.qemu]\nkernel_params = "a\\nb"', "has to be one line", ""),
        ("[hypervisor.qemu", "is not TOML", "kata config check"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str, hint: str) -> None:
    if "'a\\nb'" in text:  # a literal string keeps the backslash: nothing is wrong with it
        assert loaded(tmp_path, text).get("hypervisor.kernel_params") == "a\\nb"
        return
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, text)
    assert str(tmp_path) in caught.value.message
    assert hint in (caught.value.hint or "")


def test_what_has_no_effect_is_said_and_defaults_of_the_original_are_not(tmp_path: Path) -> None:
    quiet = """
        [hypervisor.qemu]
        shared_fs = "virtio-9p"
        default_bridges = 1
        block_device_driver = "virtio-scsi"
        block_device_aio = "io_uring"
        confidential_guest = false
        image = ""
        hot_plug_vfio = "no-port"
        pflashes = []
        disable_block_device_use = true
        [runtime]
        vfio_mode = "guest-kernel"
        sandbox_cgroup_only = true
        experimental = []
        [factory]
        """
    assert loaded(tmp_path, quiet).notes == []
    found = loaded(
        tmp_path,
        '[hypervisor.qemu]\nmemory_slots = 20\n[hypervisor.clh]\npath = "/x"\n'
        '[factory]\nvm_cache_endpoint = "/x"\n',
    )
    assert "[hypervisor.clh] is not used: qemu is" in found.notes[0]
    assert "vm_cache_endpoint, memory_slots" in found.notes[1]
    assert len(found.notes) == 2


def test_all_keys_are_in_the_documentation() -> None:
    """docs/configuration.md has a row for each, as the table of keys has it."""
    text = (ROOT / "docs/configuration.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", text, re.M)
    documented = sorted((name, kind, default, rest) for name, kind, default, rest in rows)
    expected = sorted((key.name, key.kind, key.default, key.text) for key in keys.KEYS.values())
    assert documented == expected
    for section in keys.SECTIONS.values():
        assert f"`[{section}]`" in text
    for name, variants in keys.VARIANTS.items():
        section = text.partition(f"## `[hypervisor.{name}]`\n")[2].partition("\n## ")[0]
        shown = re.findall(r"^\| `(\w+)` \| (acts|refused|no effect) \| (.*) \|$", section, re.M)
        words = {keys.ACTS: "acts", keys.REFUSED: "refused", keys.IDLE: "no effect"}
        assert dict.fromkeys(variants) == dict.fromkeys(row[0] for row in shown), name
        for key, status, rest in shown:
            found = keys.find(f"hypervisor.{key}", name)
            assert found is not None
            assert (status, rest) == (words[found.status], found.text), key


# ---- annotations ----


def with_annotations(conf: files.Configuration, **given: str) -> files.Configuration:
    pod.apply(conf, {HYPERVISOR + name: value for name, value in given.items()})
    return conf


def test_kernel_parameters_are_allowed_by_default_and_come_behind_the_hosts(tmp_path: Path) -> None:
    conf = loaded(tmp_path, "[hypervisor.qemu]\nkernel_params = 'a=1'\n")
    with_annotations(conf, kernel_params="b=2")
    assert conf.values["hypervisor.kernel_params"] == ("a=1 b=2", f"annotation {HYPERVISOR}kernel_params")


def test_what_the_host_does_not_allow_is_an_error_that_names_the_list(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"default_vcpus is not allowed .* enable_annotations is \['enable_iommu'"
    ) as caught:
        with_annotations(files.Configuration(), default_vcpus="2")
    assert '"default_vcpus" to enable_annotations' in (caught.value.hint or "")
    conf = loaded(tmp_path, "[hypervisor.qemu]\nenable_annotations = ['kernel']\n")
    with pytest.raises(ConfigError, match=r"kernel_params is not allowed .*configuration.toml:2"):
        with_annotations(conf, kernel_params="x")  # the whole name has to match


@pytest.mark.parametrize("pattern", ["default_max_?vcpus", "default_max_vcpus", ".*"])
def test_both_spellings_of_a_name(tmp_path: Path, pattern: str) -> None:
    for name in ("default_max_vcpus", "default_maxvcpus"):
        conf = loaded(tmp_path, f"[hypervisor.qemu]\nenable_annotations = ['{pattern}']\n")
        assert with_annotations(conf, **{name: "7"}).get("hypervisor.default_maxvcpus") == 7


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("hypervisor.default_vcpus", "1.5", 1.5),
        ("hypervisor.enable_mem_prealloc", "True", True),
        ("hypervisor.enable_mem_prealloc", "0", False),
        ("runtime.disable_guest_seccomp", "true", True),
        ("runtime.create_container_timeout", "9", 9),
        ("agent.kernel_modules", "e1000e EEE=1; i915", ["e1000e EEE=1", "i915"]),
        ("agent.container_pipe_size", "65536", 65536),
    ],
)
def test_values_have_their_kinds(tmp_path: Path, name: str, text: str, value: object) -> None:
    conf = loaded(tmp_path, "[hypervisor.qemu]\nenable_annotations = ['.*']\n")
    pod.apply(conf, {f"io.katacontainers.config.{name}": text})
    assert conf.get(name) == value


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        ("config.hypervisor.default_vcpus", "many", "has to be a number, and is 'many'"),
        ("config.hypervisor.enable_debug", "yes", "has to be true or false"),
        ("config.hypervisor.default_vcps", "1", "is not known"),
        ("config.hypervisor.enable_annotations", ".*", "is not known"),
        ("config.hypervisor.valid_hypervisor_paths", "/x", "is not known"),
        ("config.hypervisor.kernel_hash", "aa", "is refused: files of the guest are not checked"),
        ("config.hypervisor.confidential_guest", "true", "is refused: confidential"),
        ("config.hypervisor.cc_init_data", "aa", "is refused: confidential"),
        ("config.agent.policy", "cGFja2FnZQ==", "is refused: the agent's policies are JSON"),
        ("config.agent.debug_console_enabled", "true", "is not known"),
        ("config.runtime.dan_conf", "/x", "is not known"),
        ("config_path", "/x", "is refused: the host chooses"),
        ("container.resource.swappiness", "1", "is refused: the guest has no swap"),
        ("made_up", "1", "is not known"),
    ],
)
def test_annotations_that_are_wrong(tmp_path: Path, annotation: str, value: str, message: str) -> None:
    conf = loaded(tmp_path, "[hypervisor.qemu]\nenable_annotations = ['.*']\n")
    with pytest.raises(ConfigError, match=message) as caught:
        pod.apply(conf, {f"io.katacontainers.{annotation}": value})
    assert f"io.katacontainers.{annotation}" in caught.value.message
    if "default_vcps" in annotation:
        assert "did you mean io.katacontainers.config.hypervisor.default_vcpus" in (caught.value.hint or "")


def test_files_of_the_host_need_a_pattern_besides(tmp_path: Path) -> None:
    text = "[hypervisor.qemu]\nenable_annotations = ['path', 'kernel']\nvalid_hypervisor_paths = ['/opt/*/qemu']\n"
    conf = loaded(tmp_path, text)
    assert with_annotations(conf, path="/opt/x/qemu").get("hypervisor.path") == "/opt/x/qemu"
    for path in ("/opt/x/y/qemu", "/usr/bin/qemu", "/opt/../bin/qemu", "/opt/qemu"):
        with pytest.raises(ConfigError, match="matches no pattern of valid_hypervisor_paths"):
            with_annotations(conf, path=path)
    with pytest.raises(ConfigError, match="matches no pattern of valid_kernel_paths"):
        with_annotations(conf, kernel="/etc/shadow")


def test_other_annotations_are_nobodys_business_here() -> None:
    conf = files.Configuration()
    mine = {"io.kubernetes.cri.sandbox-id": "x", "io.katacontainers.pkg.oci.bundle_path": "/b", "org.x": "1"}
    pod.apply(conf, {**mine, "io.katacontainers.fs-opt.layer=x": "1"})
    assert conf.values == {}


# ---- what becomes of it ----


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KATA_ACCEL", "tcg")
    for name in ("kernel", "initrd", "qemu", "bios"):
        write(tmp_path / name, name)
    return f"kernel = '{tmp_path}/kernel'\ninitrd = '{tmp_path}/initrd'\n"


def settings(conf: files.Configuration) -> MachineSettings:
    return machine.machine_settings(sizing.ResourceRequest(), conf)[0]


def test_keys_reach_the_engine(tmp_path: Path, guest: str) -> None:
    conf = loaded(
        tmp_path,
        f"""
[hypervisor.qemu]
{guest}
path = "{tmp_path}/qemu"
firmware = "{tmp_path}/bios"
machine_type = "pc-q35-7.2"
machine_accelerators = "hpet=off"
cpu_features = "pmu=off"
kernel_params = "a=1"
entropy_source = "/dev/urandom"
default_memory = 300
enable_mem_prealloc = true
reclaim_guest_freed_memory = false
use_legacy_serial = false
seccompsandbox = "on"
enable_debug = true
shared_fs = "none"
virtio_fs_daemon = "/bin/true"
virtio_fs_cache = "never"
msize_9p = 8192
[agent.kata]
enable_debug = true
debug_console_enabled = true
container_pipe_size = 4096
dial_timeout = 33
kernel_modules = ["dummy numdummies=1"]
[runtime]
disable_guest_seccomp = true
create_container_timeout = 44
""",
    )
    found = settings(conf)
    assert found.hypervisor == HypervisorSettings(
        accel="tcg",
        options={
            "path": f"{tmp_path}/qemu",
            "firmware": f"{tmp_path}/bios",
            "machine": "pc-q35-7.2",
            "machine_options": "hpet=off",
            "cpu_features": "pmu=off",
            "entropy": "/dev/urandom",
            "sandbox": "on",
        },
        prealloc=True,
        reclaim=False,
        console="virtio",
    )
    assert found.guest == GuestSettings(
        kernel=f"{tmp_path}/kernel",
        initrd=f"{tmp_path}/initrd",
        ready_s=33.0,
        create_s=44,
        verbose=True,
        cmdline="a=1 agent.log=debug agent.debug_console agent.debug_console_vport=1026"
        " agent.container_pipe_size=4096",
        modules=[["dummy", "numdummies=1"]],
        no_seccomp=True,
    )
    assert found.share == ShareSettings(disabled=True, daemon="/bin/true", cache="never", msize=8192)
    assert found.size.memory_mib == 300
    assert json.loads(json.dumps(found.to_plain()["configuration"]))["hypervisor.default_memory"][0] == 300


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("machine_type = 'microvm-7.2'", "there is no machine type 'microvm-7.2'"),
        ("machine_type = 'q35-7.2'", "there is no machine type 'q35-7.2'"),
        ("machine_type = 'virt'", "there is no machine type 'virt'"),
        ("machine_accelerators = 'firmware=/etc/shadow'", "has characters that no option has"),
        ("path = '/no/such/qemu'", "toml:4: path /no/such/qemu does not exist"),
    ],
)
def test_values_that_cannot_work_are_named(tmp_path: Path, guest: str, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(loaded(tmp_path, f"[hypervisor.qemu]\n{guest}{line}\n"))


def test_a_kernel_needs_its_initrd(tmp_path: Path, guest: str) -> None:
    with pytest.raises(ConfigError, match="names no initrd"):
        settings(loaded(tmp_path, f"[hypervisor.qemu]\n{guest.splitlines()[0]}\n"))
    with pytest.raises(GuestAssetError, match=r"kernel /none does not exist \(.*:2\)"):
        settings(loaded(tmp_path, "[hypervisor.qemu]\nkernel = '/none'\ninitrd = '/none'\n"))


def test_the_table_of_the_hypervisor_that_is_named_counts(tmp_path: Path) -> None:
    both = "[hypervisor.qemu]\ndefault_vcpus = 2\n[hypervisor.other]\ndefault_vcpus = 3\n"
    with pytest.raises(ConfigError, match=r"no table \[hypervisor.other\]|hypervisor.other"):
        loaded(tmp_path, both)
    chosen = loaded(tmp_path, f"{both}[runtime]\nhypervisor_name = 'other'\n")
    assert chosen.get("hypervisor.default_vcpus") == 3
    assert "[hypervisor.qemu] is not used: other is" in chosen.notes[0]
    # Whether there is one of that name is another question.
    with pytest.raises(ConfigError, match="no hypervisor 'other' here") as raised:
        settings(chosen)
    assert raised.value.hint == "one of: " + ", ".join(registry.names())


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("configuration.toml", "[hypervisor.clh]\ndefault_vcpus = 2\n", "cloud-hypervisor"),
        ("configuration.toml", "[hypervisor.cloud-hypervisor]\ndefault_vcpus = 2\n", "cloud-hypervisor"),
        (
            "configuration.toml",
            "[hypervisor.clh]\ndefault_vcpus = 2\n[runtime]\nhypervisor_name = 'clh'",
            "cloud-hypervisor",
        ),
        (
            "configuration.toml",
            "[hypervisor.qemu]\ndefault_vcpus = 2\n[hypervisor.clh]\ndefault_vcpus = 3\n",
            "",
        ),
        (
            "configuration-fc.toml",
            "[hypervisor.firecracker]\ndefault_vcpus = 2\n",
            "firecracker",
        ),
        ("configuration-fc.toml", "[runtime]\nenable_debug = true\n", "firecracker"),
        ("configuration-qemu.toml", "[runtime]\nenable_debug = true\n", ""),
    ],
)
def test_the_hypervisor_is_that_of_the_table_or_of_the_files_name(
    tmp_path: Path, file: str, text: str, expected: str
) -> None:
    found = files.load(write(tmp_path / file, text))
    assert found.get("runtime.hypervisor_name", "") == expected
    if "vcpus" in text:
        assert found.get("hypervisor.default_vcpus") == 2
    again = files.load(str(tmp_path / file))
    assert (again.values, again.hypervisors) == (found.values, found.hypervisors)
    assert expected in ("", *found.hypervisors)


def test_a_hypervisor_that_is_asked_for_has_its_own_file_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path / "etc.toml", "[hypervisor.qemu]\ndefault_vcpus = 2\n[hypervisor.fc]\ndefault_vcpus = 4\n"
    )

    def chosen(name: str) -> tuple[object, object]:
        found = files.load("", name, "--hypervisor")
        assert found.origin("runtime.hypervisor_name") == "--hypervisor"
        return found.get("runtime.hypervisor_name"), found.get("hypervisor.default_vcpus")

    assert chosen("fc") == chosen("firecracker") == ("firecracker", 4)
    assert chosen("qemu") == ("qemu", 2)
    assert chosen("clh") == ("cloud-hypervisor", None)
    write(tmp_path / "configuration-clh.toml", "[hypervisor.clh]\ndefault_vcpus = 3\n")
    assert chosen("clh") == ("cloud-hypervisor", 3)
    assert files.load().get("hypervisor.default_vcpus") == 2
    monkeypatch.setenv("KATA_HYPERVISOR", "clh")
    assert files.load().values["runtime.hypervisor_name"] == (
        "cloud-hypervisor",
        "environment KATA_HYPERVISOR",
    )
    assert chosen("fc") == ("firecracker", 4)


def test_a_pod_chooses_among_the_hypervisors_of_the_host(tmp_path: Path) -> None:
    both = "[hypervisor.qemu]\ndefault_vcpus = 2\n[hypervisor.clh]\ndefault_vcpus = 3\nenable_annotations = ['path']\n"
    path = write(tmp_path / "configuration.toml", both)
    for name in ("clh", "cloud-hypervisor"):
        found = pod.load(path, {pod.HYPERVISOR: name})
        assert found.values["runtime.hypervisor_name"] == (
            "cloud-hypervisor",
            f"annotation {pod.HYPERVISOR}",
        )
        assert found.get("hypervisor.default_vcpus") == 3
    with pytest.raises(ConfigError, match=r"matches no pattern of valid_hypervisor_paths") as caught:
        pod.load(path, {pod.HYPERVISOR: "clh", f"{HYPERVISOR}path": "/x"})
    assert "[hypervisor.cloud-hypervisor]" in (caught.value.hint or "")
    with pytest.raises(
        ConfigError, match=r"there is no hypervisor 'firecracker' in the configuration"
    ) as caught:
        pod.load(path, {pod.HYPERVISOR: "firecracker"})
    assert "one of: cloud-hypervisor, qemu" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="in the configuration"):
        pod.load("", {pod.HYPERVISOR: "clh"})
    assert pod.load("", {pod.HYPERVISOR: "qemu"}).get("runtime.hypervisor_name") == "qemu"


def test_a_hypervisor_that_cannot_run_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATA_ACCEL", "tcg")
    with pytest.raises(HostError, match=r"Cloud Hypervisor needs KVM, and tcg is asked for") as caught:
        machine.require_hypervisor("cloud-hypervisor")
    assert "--hypervisor qemu" in (caught.value.hint or "")
    monkeypatch.setenv("KATA_ACCEL", "kvm")
    monkeypatch.delenv("KATA_CLOUD_HYPERVISOR", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(accel, "choose", lambda configured="": accel.Accelerator("kvm", "", None))
    with pytest.raises(HostError, match="cloud-hypervisor is not installed") as caught:
        machine.require_hypervisor("cloud-hypervisor")
    assert "KATA_CLOUD_HYPERVISOR" in (caught.value.hint or "")
    for name in ("no-such", "a/b"):
        with pytest.raises(ConfigError, match="no hypervisor"):
            machine.require_hypervisor(name)
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "none"))
    command = ["run", "--hypervisor", "no-such", "busybox"]
    assert main.main(command) == 125
    assert not (tmp_path / "none").exists()


def test_networks(tmp_path: Path) -> None:
    assert machine.network_settings(files.Configuration(), "/n") == NetworkSettings(mode="netns", path="/n")
    none = "[runtime]\ninternetworking_model = 'none'\n"
    assert machine.network_settings(loaded(tmp_path, none), "/n") == NetworkSettings(
        mode="netns", path="/n", model="none"
    )
    assert (
        machine.network_settings(loaded(tmp_path, f"{none}disable_new_netns = true\n"), "/n")
        == NetworkSettings()
    )
    with pytest.raises(ConfigError, match=r"toml:2: disable_new_netns needs internetworking_model 'none'"):
        machine.network_settings(loaded(tmp_path, "[runtime]\ndisable_new_netns = true\n"), "/n")


def test_sizes_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(sizing, "_meminfo", lambda: {"MemTotal": 16 << 20, "MemAvailable": 8 << 20})

    def size(text: str, asked: sizing.ResourceRequest | None = None) -> sizing.Size:
        return sizing.plan(asked or sizing.ResourceRequest(), limits=machine.limits(loaded(tmp_path, text)))

    nothing = size("")
    assert (nothing.vcpus, nothing.memory_mib, nothing.max_vcpus, nothing.max_memory_mib) == (
        1,
        2048,
        4,
        16384,
    )
    defaults = size("[hypervisor.qemu]\ndefault_vcpus = 1.5\ndefault_memory = 512\n")
    assert (defaults.vcpus, defaults.memory_mib) == (2, 512)
    assert size("[hypervisor.qemu]\ndefault_vcpus = -1\n").vcpus == 4
    assert size("[hypervisor.qemu]\ndefault_vcpus = 9\n").vcpus == 4
    bounded = "[hypervisor.qemu]\ndefault_maxvcpus = 2\ndefault_maxmemory = 4096\n"
    assert (size(bounded).max_vcpus, size(bounded).max_memory_mib) == (2, 4096)
    with pytest.raises(UsageError, match="3 CPUs were asked for, and default_maxvcpus is 2"):
        size(bounded, sizing.ResourceRequest(3))
    with pytest.raises(
        ResourceExhaustedError, match="5000 MiB of memory were asked for, and default_maxmemory is 4096"
    ):
        size(bounded, sizing.ResourceRequest(None, 5000 << 20))
    fixed = size("[runtime]\nstatic_sandbox_resource_mgmt = true\n", sizing.ResourceRequest(2, 1 << 30))
    assert (fixed.max_vcpus, fixed.max_memory_mib) == (2, fixed.memory_mib)
    memory = size("[hypervisor.qemu]\nenable_virtio_mem = false\n")
    assert (memory.max_vcpus, memory.max_memory_mib) == (4, 2048)


# ---- kata config ----


def test_show_says_what_is_set_and_by_whom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "c.toml",
        "[hypervisor.qemu]\ndefault_vcpus = 2\nenable_iommu = true\nenable_annotations = ['default_memory']\n",
    )
    words = [
        "config",
        "show",
        "--origin",
        "--config",
        path,
        "--annotation",
        f"{HYPERVISOR}default_memory=512",
    ]
    assert main.dispatch(words) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^default_vcpus = 2 +# {path}:2$", said, re.M)
    assert re.search(rf"^default_memory = 512 +# annotation {HYPERVISOR}default_memory$", said, re.M)
    assert re.search(rf"^enable_iommu = true +# {path}:3; no effect: there is no virtual IOMMU$", said, re.M)
    assert re.search(r"^# machine_type: q35 +# default$", said, re.M)
    assert main.dispatch([*words, "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["files"] == [path]
    rows = {f"{row['table']}.{row['key']}": row for row in found["settings"]}
    assert rows["hypervisor.qemu.default_vcpus"]["value"] == 2
    assert rows["hypervisor.qemu.enable_iommu"]["effect"] is False
    assert rows["runtime.internetworking_model"]["value"] is None


def test_check_lists_what_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "c.toml", "[runtime]\nenable_pprof = true\ncreate_container_timeout = 5\n")
    assert main.dispatch(["config", "check", path]) == 0
    idle, summary = capsys.readouterr().out.splitlines()
    assert (
        idle == f"{path}:2: [runtime] enable_pprof: accepted, has no effect: there is no profile to be had"
    )
    assert summary == f"{path}: 2 keys, 1 in effect"
    path = write(
        tmp_path / "d.toml", "[hypervisor.qemu]\ndefault_vcpus = 2\n[hypervisor.clh]\npath = '/x'\n"
    )
    assert main.dispatch(["config", "check", path]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{path}: [hypervisor.clh] is not used: qemu is"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chek"], "there is no 'kata config chek'"),
        (["check"], "there is no configuration file to check"),
        (["check", "/no/such"], "cannot read /no/such"),
        (["check", "--origin", "/x"], "--origin belongs to"),
        (["show", "/x"], "takes no argument"),
        (["show", "--annotation", "x"], "is not NAME=VALUE"),
    ],
)
def test_wrong_use_of_kata_config(words: list[str], message: str) -> None:
    with pytest.raises(KataError, match=message):
        main.dispatch(["config", *words])
