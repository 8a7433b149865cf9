"""What scripts for Podman ask: `exists`, `--latest`, `--ignore`, `--replace`; and `df`, on records without machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from image_support import docker_save, layer, member
from test_cli_manage import make, said, state
from waiting import PATIENCE, until

from kata.cli import records, volumes
from kata.images import store

__all__ = ["state"]
KATA = Path(__file__).resolve().parents[2] / "src/kata/__main__.py"


@pytest.fixture
def image(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> store.Image:
    content = [{"layers": [layer(member("one", content=b"1" * 40960))], "tags": ["bb:latest"]}]
    said(capsys, "load", "-q", "-i", str(docker_save(tmp_path / "bb.tar", content)))
    return store.find("bb")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("container exists web", 0),
        ("container exists bb", 1),
        ("image exists bb", 0),
        ("image exists web", 1),
        ("exists web", 0),
        ("exists bb", 0),
        ("exists nosuch", 1),
        ("volume exists data", 0),
        ("volume exists web", 1),
        ("network exists web", 1),
    ],
)
def test_exists_prints_nothing(
    image: store.Image, capsys: pytest.CaptureFixture[str], words: str, status: int
) -> None:
    make("web")
    said(capsys, "volume", "create", "data")
    assert said(capsys, *words.split(), status=status) == ""


@pytest.mark.parametrize("words", ["rm nosuch", "rmi nosuch", "volume rm nosuch", "network rm nosuch"])
def test_what_cannot_be_removed_ends_with_1(
    state: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert "nosuch" in said(capsys, *words.split(), status=1)
    assert "--colour" in said(capsys, *words.split(), "--colour", status=125)


def test_the_latest_container(state: Path, image: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("logs -l", "inspect -l", "rm -l"):
        assert "there is no container" in said(capsys, *words.split(), status=125)
    make("first")
    last = said(capsys, "create", "--name", "last", "--storage", "tmpfs", "bb", "true")
    assert said(capsys, "inspect", "--latest", "--format", "{{.Name}}") == "/last\n"
    assert "leave out one" in said(capsys, "rm", "-l", "first", status=125)
    assert "leave out one" in said(capsys, "logs", "-l", "first", status=125)
    assert said(capsys, "rm", "-l") == last
    assert [one.name for one in records.all_containers()] == ["first"]
    assert "too few arguments" in said(capsys, "rm", status=125)


def test_ignore_passes_over_what_is_not_there(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("web")
    assert said(capsys, "rm", "--ignore", "nosuch", "web") == "web\n"
    assert said(capsys, "stop", "-i", "nosuch") == ""


def test_replace_is_about_a_name(
    state: Path, image: store.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--name NAME" in said(capsys, "create", "--replace", "bb", "true", status=125)
    old = make("web")
    # The beginning of an id is no name.
    made = said(
        capsys, "create", "--replace", "--name", old.id[:6], "--storage", "tmpfs", "bb", "true"
    ).strip()
    assert records.load(old.id) is not None
    replaced = said(
        capsys, "create", "--replace", "--name", "web", "--storage", "tmpfs", "bb", "true"
    ).strip()
    assert records.load(old.id) is None
    assert records.find("web").id == replaced
    assert records.load(made) is not None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("-w", "relative"), "not absolute"),
        (("--cap-add", "NOSUCH"), "NOSUCH"),
        (("--storage", "disk", "--storage-size", "17t"), "cannot be made"),
        (("--mount", "type=volume,dst=/d,volume-opt=size=1k"), "cannot be made"),
        (("--network", "inner", "-p", "8080:80"), "no way in"),
        (("--network", "inner", "--ip", "10.0.0.9"), "no member's address"),
        (("--health-interval", "never"), "--health-interval"),
        (("--label", "=x"), "not a label"),
    ],
)
def test_a_refused_command_has_not_removed_the_old_container(
    state: Path, image: store.Image, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], why: str
) -> None:
    said(capsys, "network", "create", "--internal", "inner")
    old = make("web")
    named = ("create", "--replace", "--name", "web", "--storage", "tmpfs")
    id_file = state / "id"
    assert why in said(capsys, *named, "--cidfile", str(id_file), *words, "bb", "true", status=125)
    assert records.find("web").id == old.id
    assert not id_file.exists()
    assert len(records.all_containers()) == 1


def test_a_new_container_has_the_address_of_the_one_it_replaces(
    state: Path, image: store.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "network", "create", "--subnet", "10.5.0.0/24", "net")
    named = ("create", "--replace", "--name", "web", "--storage", "tmpfs", "--network", "net", "--ip")
    said(capsys, *named, "10.5.0.7", "bb", "true")
    said(capsys, *named, "10.5.0.7", "bb", "true")
    assert [one.record["networks"][0]["address"] for one in records.all_containers()] == ["10.5.0.7"]


@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user's command is in a user namespace")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_create_that_is_told_to_end_leaves_nothing(
    state: Path, image: store.Image, number: signal.Signals
) -> None:
    containers = state / "containers"
    words = ("create", "--name", "web", "--storage", "tmpfs", "-v", "data:/data", "bb", "true")
    with (
        volumes.locked(),  # which it waits for
        subprocess.Popen(["/usr/bin/python3", "-IS", KATA, *words], stdout=subprocess.DEVNULL) as child,
    ):
        try:
            until(lambda: containers.is_dir() and list(containers.iterdir()), "it is being made")
            until(lambda: (state / "names/web").exists(), "it has its name")
            child.send_signal(number)
            assert child.wait(PATIENCE) == -number
        finally:
            child.kill()
    assert list(containers.iterdir()) == []
    assert list((state / "names").iterdir()) == []


def test_without_a_name_nothing_is_replaced_or_made(
    state: Path, image: store.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    id_file = state / "id"
    words = ("create", "--replace", "--cidfile", str(id_file), "bb", "true")
    assert "--name NAME" in said(capsys, *words, status=125)
    assert not id_file.exists()


def test_a_name_may_begin_several_ids(
    state: Path, image: store.Image, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for digit in "12":
        with monkeypatch.context() as patched:
            patched.setattr(records, "new_id", lambda digit=digit: f"ab{digit}".ljust(32, "0"))
            make(f"old{digit}")
    said(capsys, "create", "--replace", "--name", "ab", "--storage", "tmpfs", "bb", "true")
    assert len(records.all_containers()) == 3


def test_df(state: Path, image: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    make("user", image.id)
    said(capsys, "volume", "create", "data")
    lines = said(capsys, "system", "df").splitlines()
    assert lines[0].split() == ["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"]
    assert len(lines) == 5
    rows = {row["Type"]: row for row in map(json.loads, said(capsys, "df", "--format", "json").splitlines())}
    assert (rows["Images"]["TotalCount"], rows["Images"]["Active"]) == (1, 1)
    assert rows["Images"]["Reclaimable"] == "0B (0%)"
    assert (rows["Containers"]["TotalCount"], rows["Containers"]["Active"]) == (1, 0)
    assert (rows["Local Volumes"]["TotalCount"], rows["Local Volumes"]["Active"]) == (1, 0)
    assert rows["Local Volumes"]["Reclaimable"].endswith("(100%)")
    assert (rows["Build Cache"]["TotalCount"], rows["Build Cache"]["Size"]) == (0, "0B")
    kept = state / "build" / "storage" / "overlay"
    kept.mkdir(parents=True)
    (kept / "layer").write_bytes(b"1" * 40960)
    rows = {row["Type"]: row for row in map(json.loads, said(capsys, "df", "--format", "json").splitlines())}
    assert rows["Build Cache"]["TotalCount"] == 1
    assert rows["Build Cache"]["Reclaimable"] == f"{rows['Build Cache']['Size']} (100%)"
    assert float(rows["Build Cache"]["Size"].removesuffix("KiB")) >= 40


def test_options_before_the_command(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version").startswith("kata version ")
    assert "options follow the command" in said(capsys, "--nosuch", "ps", status=125)
