"""Root file systems of overlay snapshots as disks, with hypervisors that need KVM. Firecracker has no other way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from containerd_support import IMAGE, RUNTIME, Containerd, clean, running

from kata import sysio
from kata.hypervisor import registry

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.long]


@pytest.fixture(scope="module")
def daemon(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Containerd]:
    # The KVM lab's own /tmp can hold no upper directory of an overlay.
    place = run_directory / "o"
    place.mkdir()
    sysio.mount("tmpfs", str(place), "tmpfs")
    try:
        with running(place, guest_assets, busybox_image) as one:
            yield one
    finally:
        sysio.umount2(str(place))


@pytest.mark.parametrize("name", ["cloud-hypervisor", "firecracker"])
def test_a_container_of_a_snapshot(daemon: Containerd, name: str) -> None:
    monitor = registry.find(name)
    if not monitor.program({}):
        pytest.skip(f"needs {monitor.title} (set KATA_{name.upper().replace('-', '_')} to its program)")
    configuration = daemon.directory / f"configuration-{name}.toml"
    upper_layer = "auto" if name == "firecracker" else "block"
    configuration.write_text(
        f'[hypervisor.{name}]\n[runtime]\nhypervisor_name = "{name}"\nrootfs_upper_layer = "{upper_layer}"\n'
    )
    options = ["--runtime-config-path", str(configuration)]
    script = "rm /etc/passwd; echo kept >/made; awk '$2 == \"/\" {print $3}' /proc/mounts"
    container = f"of-{name}"
    try:
        said = daemon.ok("run", "--runtime", RUNTIME, *options, IMAGE, container, "sh", "-c", script)
        assert said.strip() == "overlay"
        words = daemon.ok("snapshot", "mounts", "/nowhere", container)
        upper = Path(words.partition("upperdir=")[2].partition(",")[0].split()[0])
        assert (upper / "made").read_text() == "kept\n"
        assert sorted(os.listdir(upper / "etc")) == ["passwd"]
        assert not (upper / ".kata-writable-layer.img").exists()
    finally:
        clean(daemon)
