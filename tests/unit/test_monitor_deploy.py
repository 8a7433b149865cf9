"""How kata-monitor is put to work: the service, the image, the manifest, each as far as it can be tried here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]
from monitor_support import CONFINED, ROOT, Engines, exposition, monitor, says
from test_monitor_cri import Runtime
from waiting import until

from kata.monitor import discovery, options
from kata.monitor.access import Address

UNIT = ROOT / "deploy/systemd/kata-monitor.service"
CONTAINERFILE = ROOT / "deploy/container/Containerfile"
MANIFEST = ROOT / "deploy/kubernetes/kata-monitor.yaml"
MOST_EXPOSED = 20
"""Tenths; systemd calls up to 2.0 safe, and 9.6 is what a service has that says nothing."""


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    one = Engines(tmp_path)
    yield one
    one.close()


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (apt-get install systemd)"
)
def test_the_service_is_valid_and_confined(tmp_path: Path) -> None:
    text = UNIT.read_text()
    arguments = re.search(r"^ExecStart=/usr/local/bin/kata-monitor (.*)$", text, re.M)
    assert arguments
    assert Address(options.parsed(arguments[1].split()).value("listen-address") or "").local
    # Neither the program nor its manual page is on this machine.
    here = tmp_path / UNIT.name
    here.write_text(
        re.sub(
            r"^Documentation=.*\n", "", text.replace("/usr/local/bin/kata-monitor", "/bin/true"), flags=re.M
        )
    )
    verified = subprocess.run(
        ["systemd-analyze", "verify", here], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    rating = [
        "systemd-analyze",
        "security",
        "--offline=true",
        f"--threshold={MOST_EXPOSED}",
        "--no-pager",
        str(here),
    ]
    rated = subprocess.run(rating, capture_output=True, text=True, check=False)
    assert rated.returncode == 0, rated.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_it_works_with_nothing_of_root_but_the_name(engines: Engines, tmp_path: Path) -> None:
    engines.add("one", says(exposition(1)))
    runtime = Runtime(tmp_path / "cri.sock")
    runtime.pods = {"one": ("u-1", "pod", "space")}
    try:
        with monitor(
            engines.run_directory, "--runtime-endpoint", str(tmp_path / "cri.sock"), around=CONFINED
        ) as one:
            status = Path(f"/proc/{one.process.pid}/status").read_text()
            assert re.search(r"^CapEff:\s+0+$", status, re.M), "no capability at all"
            until(
                lambda: 'cri_name="pod"' in one.get("/metrics").text, "its pod is known", one.log.read_text
            )
            assert 'kata_guest_load{sandbox_id="one",' in one.get("/metrics").text
            engines.add("two", says(exposition(2)))
            until(lambda: one.get("/sandboxes").text == "one\ntwo\n", "the new one is found")
    finally:
        runtime.close()


def instructions() -> list[tuple[str, str]]:
    """The instructions of the container's recipe, lines put together: word and rest."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    return [
        (line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line.strip()
    ]


def test_the_container_s_recipe_is_good_style() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, CONTAINERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(
    not (ROOT / "build/monitor-env").is_dir(), reason="needs build/monitor-env (tools/setup run)"
)
def test_what_the_recipe_copies_is_enough(engines: Engines, tmp_path: Path) -> None:
    """The image without its base: what COPY takes, and the packages that it would install, in their places."""
    image = tmp_path / "image"
    for word, rest in instructions():
        if word == "COPY" and "--from" not in rest:
            *sources, target = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                if target.startswith("/opt/kata"):
                    shutil.copytree(
                        ROOT / source, image / target[1:], ignore=shutil.ignore_patterns("__pycache__")
                    )
    (image / "opt/kata/monitor-packages").symlink_to(ROOT / "build/monitor-env")
    entry = next(rest for word, rest in instructions() if word == "ENTRYPOINT")
    program = [part.strip(' "') for part in entry.strip("[]").split(",")]
    program[-1] = str(image) + program[-1]
    engines.add("one", says(exposition(1)))
    with monitor(engines.run_directory, program=program) as one:
        assert 'kata_guest_load{sandbox_id="one",' in one.get("/metrics").text


def resources() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def test_the_manifest_is_what_kubernetes_takes() -> None:
    for resource in resources():
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_the_manifest_s_monitor_finds_what_it_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    (daemon,) = (one for one in resources() if one["kind"] == "DaemonSet")
    pod = daemon["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = options.parsed(container["args"])
    address = Address(values.value("listen-address") or "")
    assert not address.local
    assert address.port == container["ports"][0]["containerPort"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    assert all(mount["readOnly"] for mount in mounts.values())
    monkeypatch.setenv("KATA_RUN_DIR", "/run/kata")
    files = [values.value(name) or "" for name in ("tls-cert", "tls-key", "token-file")]
    for path in [*discovery.places(), *files]:
        assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), path
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
