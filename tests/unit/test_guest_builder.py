"""Making and installing a guest, with kernels that are quick to make; the real ones are in tests/vm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kata.errors import GuestAssetError, HostError, UsageError
from kata.guest import builder, distro_kernel, extension, kernels, manifest, packages, small_kernel
from kata.guest.progress import Lines, Silent
from kata.hypervisor import initrd
from kata.hypervisor.base import MachineShape


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def a_kernel(key: str = "distro-x", content: bytes = b"kernel", force: bool = False) -> kernels.Kernel:
    def make(work: str) -> dict[str, Any]:
        Path(work, kernels.KERNEL).write_bytes(content)
        Path(work, kernels.MODULES).mkdir()
        Path(work, kernels.MODULES, "a.ko").write_bytes(b"module")
        facts = dict.fromkeys(("boot", "version", "release", "config_hash", "source_package"), "x")
        return {**facts, "kind": "distro", "modules": ["a.ko"]}

    return kernels.obtain(key, Silent(), force, make)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories of our own, an agent, and a distribution's kernel that needs no distribution."""
    monkeypatch.setenv("KATA_GUEST_DIR", str(tmp_path / "guest"))
    monkeypatch.setenv("KATA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KATA_AGENT_BINARY", str(tmp_path / "agent"))
    shutil.copyfile("/usr/bin/busybox", tmp_path / "agent")
    monkeypatch.setattr(distro_kernel, "obtain", lambda progress, force=False: a_kernel(force=force))
    monkeypatch.setattr(small_kernel, "cached", lambda: None)
    return tmp_path


def files(place: Path) -> set[str]:
    return {name for name in os.listdir(place / "guest") if not name.startswith(".")}


def test_a_guest_is_installed_and_found(place: Path) -> None:
    built = builder.build("distro", progress=Silent())
    guest = manifest.load(str(place / "guest"))
    assert Path(guest.kernel).read_bytes() == b"kernel"
    assert guest.kernel_kind == "distro"
    assert guest.content == built
    assert built["initrd"]["modules"] == ["a"]
    assert files(place) == {"guest.json", built["kernel"]["path"], built["initrd"]["path"]}
    assert builder.info() == {"directory": str(place / "guest"), **built}


def test_a_second_build_does_nothing_and_says_so(place: Path) -> None:
    first = builder.build("distro", progress=Silent())
    before = {path: path.stat().st_mtime_ns for path in (place / "guest").iterdir() if path.name != ".lock"}
    notes = Notes()
    assert builder.build("distro", progress=notes) == first
    assert any("up to date" in line for line in notes.said)
    for path, when in before.items():
        assert path.stat().st_mtime_ns == when


def test_a_new_agent_leaves_the_files_of_running_sandboxes(place: Path) -> None:
    first = builder.build("distro", progress=Silent())
    with (place / "agent").open("ab") as agent:
        agent.write(b"kata.pci_scan")
    second = builder.build("distro", progress=Silent())
    assert second["kernel"] == first["kernel"]
    assert second["initrd"]["path"] != first["initrd"]["path"]
    assert first["initrd"]["path"] in files(place)
    assert (first["initrd"]["scans_ports"], second["initrd"]["scans_ports"]) == (False, True)
    assert manifest.load(str(place / "guest")).scans_ports
    # An hour later they are in nobody's way any more.
    retired = place / "guest" / ".retired.json"
    retired.write_text(
        json.dumps({name: when - 3601 for name, when in json.loads(retired.read_text()).items()})
    )
    builder.build("distro", force=True, progress=Silent())
    assert files(place) == {"guest.json", second["kernel"]["path"], second["initrd"]["path"]}


def test_auto_takes_a_small_kernel_that_needs_no_build(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert builder.build("auto", progress=Silent())["kernel"]["kind"] == "distro"
    small = a_kernel("small-x", b"small kernel")
    small.record.update(kind="small", modules=[])
    monkeypatch.setattr(small_kernel, "cached", lambda: small)
    first = builder.build("auto", progress=Silent())
    assert first["kernel"]["kind"] == "small"
    # A newer source has come out, which would take minutes to build: the one that is installed stays.
    monkeypatch.setattr(small_kernel, "cached", lambda: None)
    assert builder.build("auto", progress=Silent()) == first
    with (place / "agent").open("ab") as agent:
        agent.write(b"changed")
    second = builder.build("auto", progress=Silent())
    assert second["kernel"] == first["kernel"]
    assert second["initrd"] != first["initrd"]
    assert Path(manifest.load(str(place / "guest")).kernel).read_bytes() == b"small kernel"


def test_what_was_not_used_for_long_leaves_the_cache(place: Path) -> None:
    old, new = a_kernel("distro-old"), a_kernel("distro-new")
    long_ago = time.time() - kernels.UNUSED_S - 1
    for kernel in (old, new):
        os.utime(kernel.directory, (long_ago, long_ago))
    assert kernels.find("distro-new")
    a_kernel("distro-newest")
    assert not os.path.exists(old.directory)
    assert kernels.find("distro-new")


def test_errors_before_anything_is_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tiny"):
        builder.build("tiny", progress=Silent())
    monkeypatch.setenv("KATA_AGENT_BINARY", str(place / "nowhere"))
    with pytest.raises(GuestAssetError, match="nowhere") as caught:
        builder.build("distro", progress=Silent())
    assert caught.value.hint
    monkeypatch.setenv("KATA_AGENT_BINARY", str(place / "agent"))
    (place / "guest").write_text("in the way")
    with pytest.raises(HostError, match="guest"):
        builder.build("distro", progress=Silent())


def test_guests_that_are_not_whole_are_named(place: Path) -> None:
    directory = place / "guest"
    with pytest.raises(GuestAssetError, match="no guest") as caught:
        manifest.load(str(directory))
    assert "kata guest build" in caught.value.hint
    built = builder.build("distro", progress=Silent())
    (directory / built["initrd"]["path"]).write_bytes(b"")
    with pytest.raises(GuestAssetError, match=r"initrd .* is damaged"):
        manifest.load(str(directory))
    (directory / built["kernel"]["path"]).unlink()
    with pytest.raises(GuestAssetError, match=r"kernel .* cannot be used"):
        manifest.load(str(directory))
    for content, words in (("{", "not valid"), ("[]", "another version"), ('{"format": 1}', "incomplete")):
        (directory / "guest.json").write_text(content)
        with pytest.raises(GuestAssetError, match=words):
            manifest.load(str(directory))
    assert builder.build("distro", progress=Silent())["kernel"] == built["kernel"]


def test_of_several_builds_at_once_one_does_the_work(place: Path) -> None:
    made = []

    def make(work: str) -> dict[str, Any]:
        made.append(work)
        time.sleep(0.3)
        Path(work, kernels.KERNEL).write_bytes(b"kernel")
        return {"kind": "small"}

    notes = [Notes() for _ in range(3)]
    threads = [threading.Thread(target=kernels.obtain, args=("k", note, False, make)) for note in notes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sum("waiting" in line for note in notes for line in note.said) == 2


def test_a_failed_build_leaves_nothing(place: Path) -> None:
    def make(work: str) -> dict[str, Any]:
        Path(work, "half").write_bytes(b"half")
        raise GuestAssetError("no")

    with pytest.raises(GuestAssetError):
        kernels.obtain("k", Silent(), False, make)
    assert kernels.find("k") is None
    assert [name for name in os.listdir(kernels.directory()) if not name.endswith(".lock")] == []


def test_what_a_killed_build_left_is_removed_by_the_next(place: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    left = Path(kernels.directory(), f".other.{child.pid}")
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    a_kernel()
    assert not left.exists()


def test_a_damaged_kernel_in_the_cache_is_made_again(place: Path) -> None:
    kernel = a_kernel()
    Path(kernel.path).write_bytes(b"ker")
    assert Path(a_kernel().path).read_bytes() == b"kernel"


def test_a_failing_build_shows_the_end_of_its_output(place: Path) -> None:
    tree = place / "tree"
    tree.mkdir()
    (tree / "Makefile").write_text("vmlinux:\n\t@echo first; echo mm/slub.c:1: error: broken; false\n")
    Path(kernels.directory()).mkdir(parents=True)
    with pytest.raises(GuestAssetError, match=r"(?s)failed with status 2.*broken") as caught:
        small_kernel._make(["vmlinux"], str(tree), dict(os.environ), str(place / "log"), None, 1)
    assert "distro" in caught.value.hint
    assert "broken" in Path(kernels.directory(), "failed-build.log").read_text()


def test_make_is_not_told_of_the_make_that_runs_us(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKEFLAGS", "--jobserver-auth=3,4")
    monkeypatch.setenv("CFLAGS", "-O0")
    environment = small_kernel._environment(str(place / "agent"), "seed")
    assert not {"MAKEFLAGS", "CFLAGS"} & set(environment)


def test_the_key_of_a_kernel_ignores_remarks(place: Path) -> None:
    from kata.guest import recipe

    source = packages.Package("linux-source-6.1", "6.1.1-1", "x.deb", 1, ("sha256", "00"))
    key = small_kernel.key_of(source, recipe.parse("CONFIG_A=y\n"), [])
    assert key == small_kernel.key_of(source, recipe.parse("# why\nCONFIG_A=y\n"), [])
    assert key != small_kernel.key_of(source, recipe.parse("CONFIG_A=n\n"), [])
    assert key != small_kernel.key_of(source, recipe.parse("CONFIG_A=y  # from 6.2\n"), [])


@pytest.fixture
def fake_apt(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """apt with two kernel sources, of which the newer one cannot be installed, and a download that works."""
    programs = place / "bin"
    programs.mkdir()
    (programs / "apt-cache").write_text(
        """#!/bin/sh
case "$*" in
*pkgnames*) printf 'linux-source-6.1\\nlinux-source-6.12\\nlinux-source-6.9-rc\\nlinux-source-6.20\\n' ;;
*policy*6.20) printf '  Candidate: (none)\\n' ;;
*policy*) printf '  Candidate: 6.12.1-1\\n' ;;
*show*linux-image-amd64) printf 'Package: x\\nDepends: linux-image-6.1.0-9-amd64 (= 6.1.9-1)\\n' ;;
*) echo "E: No packages found" >&2; exit 100 ;;
esac
"""
    )
    (programs / "apt-get").write_text(
        """#!/bin/sh
sum=$(printf content | sha256sum | cut -d' ' -f1)
case "$*" in
*--print-uris*pkg) echo "'http://x/p/pkg_1%3a2.0-1_all.deb' pkg_1%3a2.0-1_all.deb 7 SHA256:$sum" ;;
*pkg=1:2.0-1) printf content >pkg_1%3a2.0-1_all.deb; echo fetched >>"$COUNT" ;;
*) echo "E: Unable to locate package" >&2; exit 100 ;;
esac
"""
    )
    (programs / "dpkg-deb").write_text("#!/bin/sh\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("COUNT", str(place / "count"))
    return place


def test_packages_are_found_and_fetched_once(fake_apt: Path) -> None:
    assert packages.have_apt()
    assert packages.newest_source() == "linux-source-6.12"
    assert packages.packaged_kernel("linux-image-amd64") == "linux-image-6.1.0-9-amd64"
    package = packages.describe("pkg")
    assert (package.version, package.size) == ("1:2.0-1", 7)
    notes = Notes()
    path = packages.fetch(package, notes.note)
    assert Path(path).read_bytes() == b"content"
    assert packages.fetch(package, notes.note) == path
    assert (fake_apt / "count").read_text() == "fetched\n"
    Path(path).write_bytes(b"damaged")
    packages.fetch(package, notes.note)
    assert Path(path).read_bytes() == b"content"
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def test_apts_words_are_passed_on(fake_apt: Path) -> None:
    with pytest.raises(GuestAssetError, match="Unable to locate package"):
        packages.describe("nonesuch")
    with pytest.raises(GuestAssetError, match="No packages found"):
        packages.packaged_kernel("nonesuch")


def test_progress_without_a_terminal_is_a_line_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.start("building")
    for step in range(1000):
        lines.update(step / 1000)
    lines.stop()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "  building"
    assert len(said) == 10
    assert "90 %" in said[-1]


def test_an_extension_stays_with_the_guest(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = extension.Extension("iptables", b"archive".ljust(512, b"\0"), {"iptables": "1.8"})
    monkeypatch.setattr(extension, "build", lambda name, progress: made)
    built = builder.build("distro", progress=Silent(), extensions=["iptables"])
    path = built["extensions"]["iptables"]["path"]
    assert path in files(place)
    assert builder.build("distro", progress=Silent(), force=True)["extensions"] == built["extensions"]
    guest = manifest.load(str(place / "guest"))
    assert Path(guest.extension("iptables")).read_bytes() == made.image
    with pytest.raises(GuestAssetError, match="without the extension 'other'"):
        guest.extension("other")
    # The hypervisor has it behind the initrd.
    plain = MachineShape(kernel=guest.kernel, initrd=guest.initrd)
    assert initrd.whole(plain, str(place)) == guest.initrd
    extended = MachineShape(
        kernel=guest.kernel, initrd=guest.initrd, extensions=[guest.extension("iptables")]
    )
    assert extended != plain
    whole = initrd.whole(extended, str(place))
    assert Path(whole).read_bytes() == Path(guest.initrd).read_bytes() + made.image
    Path(guest.extension("iptables")).write_bytes(b"damaged")
    with pytest.raises(GuestAssetError, match="not there as it was built"):
        guest.extension("iptables")
