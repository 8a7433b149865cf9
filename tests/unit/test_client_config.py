"""`kata install` and `kata uninstall`: what they write is what containerd and Docker read, and goes without a trace.

The programs are the real ones, of every version that is on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kata.cli import client, client_containerd, client_crio, client_docker, client_podman
from kata.cli.main import main
from kata.errors import AlreadyExistsError, ConfigError, HostError, KataError

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = """\
version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
"""
WITH_RUNC = (
    DEBIAN
    + """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""
)
VERSION_1 = '[plugins.cri]\n  sandbox_image = "x"'  # and no end of the line


def _containerds() -> dict[str, str]:
    """The installed one, and a 2.x that set-up has built beside it."""
    found = {}
    installed = shutil.which("containerd")
    if installed:
        found["installed"] = installed
    second = shutil.which("containerd", path=f"{ROOT}/build/programs/containerd2")
    if second:
        found["2.x"] = second
    return found


@pytest.fixture(params=["installed", "2.x"])
def containerd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A containerd that is the one on the PATH; its program."""
    program = _containerds().get(request.param)
    if program is None:
        pytest.skip(f"needs containerd, {request.param} (tools/setup test)")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/containerd").symlink_to(program)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return program


def handlers(program: str, path: Path) -> dict[str, Any]:
    done = subprocess.run([program, "--config", path, "config", "dump"], capture_output=True, check=True)
    return client_containerd.handlers(tomllib.loads(done.stdout.decode()))


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory, with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize(
    "text", [None, DEBIAN, WITH_RUNC, VERSION_1], ids=["absent", "debian", "runc", "v1"]
)
def test_containerd_sees_the_handler_until_it_is_taken_back(
    containerd: str, tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "etc"
    place.mkdir()
    path = place / "config.toml"
    if text is not None:
        path.write_text(text)
        path.chmod(0o640)
    before = snapshot(place)
    assert main(["install", "containerd", "--dry-run", "--config", str(path)]) == 0
    shown = capsys.readouterr().out
    assert '+  runtime_type = "io.containerd.kata.v2"' in shown
    assert snapshot(place) == before
    assert main(["install", "containerd", "--config", str(path)]) == 0
    found = handlers(containerd, path)
    assert found["kata"]["runtime_type"] == "io.containerd.kata.v2"
    assert found["kata"]["pod_annotations"] == ["io.katacontainers.*"]
    assert found["kata"]["privileged_without_host_devices"] is True
    assert found["kata"].get("privileged_without_host_devices_all_devices_allowed") in (True, None)  # 1.6
    assert "runc" in found
    # What was shown is what was done.
    applied = path.read_text()
    assert all(line[1:] in applied for line in shown.splitlines() if line[:1] == "+" and line[:3] != "+++")
    if text is not None:
        assert path.stat().st_mode & 0o777 == 0o640
        assert (place / "config.toml.before-kata").read_text() == text
    once = snapshot(place)
    assert main(["install", "containerd", "--config", str(path)]) == 0
    assert snapshot(place) == once
    assert main(["uninstall", "containerd", "--config", str(path)]) == 0
    assert snapshot(place) == before


def test_where_files_are_imported_it_is_a_file_of_its_own(
    containerd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "etc"
    place.mkdir()
    path = place / "config.toml"
    path.write_text(f'imports = ["{place}/conf.d/*.toml"]\n{DEBIAN}')
    before = snapshot(place)
    assert main(["install", "containerd", "--config", str(path)]) == 0
    assert "kata" in handlers(containerd, path)
    # containerd 1.x would let the file replace the whole section.
    merges = client_containerd.Daemon(containerd, (2, 0)).dump(str(path)).get("version", 2) > 2
    assert (place / "conf.d/kata.toml").exists() == merges
    assert (path.read_bytes() == before["config.toml"]) == merges
    assert client_containerd.is_installed(str(path))
    assert main(["uninstall", "containerd", "--config", str(path)]) == 0
    assert snapshot(place) == before
    assert not client_containerd.is_installed(str(path))


def test_a_shim_that_services_do_not_find_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    services, mine = tmp_path / "services", tmp_path / "mine"
    for directory in (services, mine):
        directory.mkdir()
    monkeypatch.setattr(client, "_WHERE_SERVICES_LOOK", str(services))
    monkeypatch.setenv("PATH", str(mine))
    client._look_for_shim()
    assert "hint: make install" in capsys.readouterr().err
    (mine / client.SHIM).touch(0o755)
    client._look_for_shim()
    said = capsys.readouterr().err
    assert f"{client.SHIM} is in none of {services}" in said
    assert f"hint: ln -s {mine / client.SHIM}" in said
    (services / client.SHIM).touch(0o755)
    client._look_for_shim()
    assert capsys.readouterr().err == ""


def test_what_others_add_later_stays(
    containerd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(DEBIAN)
    assert main(["install", "containerd", "--config", str(path)]) == 0
    path.write_text(path.read_text() + "\n[timeouts]\n")
    assert main(["uninstall", "containerd", "--config", str(path)]) == 0
    assert path.read_text() == DEBIAN + "\n[timeouts]\n"
    assert "has been changed by others" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (WITH_RUNC.replace("runtimes.runc", "runtimes.kata"), "already"),
        ("version = \n", "is not TOML"),
        ('version = "two"\n', "containerd cannot read"),
        ('version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\nruntimes = {}\n', "in a form to which"),
        ("# begin: kata's runtime class handler, by `kata install containerd`\n", "without the one that ends"),
    ],
    ids=["taken", "broken", "no number", "inline", "half"],
)  # fmt: skip
def test_what_stands_in_the_way_is_said_and_left(
    containerd: str, tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    before = snapshot(tmp_path)
    assert main(["install", "containerd", "--config", str(path)]) == 125
    assert words in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_a_change_that_containerd_does_not_like_is_taken_back(
    containerd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(DEBIAN)
    before = snapshot(tmp_path)
    real = client_containerd._table
    monkeypatch.setattr(
        client_containerd, "_table", lambda version: real(version).replace("kata.v2", "kato.v2")
    )
    assert main(["install", "containerd", "--config", str(path)]) == 125
    assert "does not see the handler" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_without_containerd_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main(["install", "containerd", "--config", str(tmp_path / "c.toml")]) == 125
    assert "containerd is not on the PATH" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- Docker ----

TEXTS = [
    "{}",
    "{\n}\n",
    '{"log-driver": "journald"}',
    '{\n    "dns": ["1.1.1.1"],\n    "runtimes": {}\n}\n',
    '{\n\t"runtimes": {\n\t\t"other": {"path": "/x"}\n\t},\n\t"a": {"runtimes": [1, {"kata": 2}]}\n}',
    '{"runtimes":{"a":{"path":"/a"},"b":{"path":"/b"}},"debug":true}',
]


@pytest.mark.parametrize("text", [None, "", *TEXTS])
def test_dockers_file_is_the_same_again(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "daemon.json"
    if text is not None:
        path.write_text(text)
    for edit in client_docker.install(str(path)):
        edit.apply(keep_backup=True)
    merged = json.loads(path.read_text())
    assert merged["runtimes"].pop("kata") == {"runtimeType": "io.containerd.kata.v2"}
    old = json.loads(text or "{}")
    assert merged == {"runtimes": {}, **old}
    assert client_docker.install(str(path)) == []
    edits = client_docker.uninstall(str(path))
    for edit in edits:
        edit.apply()
    assert client_docker.clear_up(edits) == []
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if text is None else [text])


@pytest.mark.parametrize("text", TEXTS)
def test_dockers_file_without_its_backup_means_the_same_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(text)
    for edit in [*client_docker.install(str(path)), *client_docker.uninstall(str(path))]:
        edit.apply()
    for edit in client_docker.uninstall(str(path)):
        edit.apply()
    old = json.loads(text)
    if not old.get("runtimes", True):
        del old["runtimes"]
    assert json.loads(path.read_text()) == old


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"runtimes": {"kata": {"path": "/usr/bin/other"}}}', "already"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"runtimes": [], "x": 1}', "not a JSON object"),
        ('{"debug": true, "debug": false}', "twice"),
        ("\xff", "UTF-8"),
    ],
)
def test_what_dockers_file_refuses(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(KataError, match=words):
        client_docker.install(str(path))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        client_docker.install(str(tmp_path))


def _dockerd() -> bool:
    try:
        client_docker.daemon()
    except HostError:
        return False
    return True


@pytest.mark.skipif(not _dockerd(), reason="needs Docker 23 or newer (tools/setup test unpacks it)")
def test_dockerd_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    path = tmp_path / "d/daemon.json"
    assert main(["install", "docker", "--config", str(path)]) == 0
    assert main(["uninstall", "docker", "--config", str(path)]) == 0
    assert not path.exists()
    path.write_text('{"no-such-option": 1}\n')
    assert main(["install", "docker", "--config", str(path)]) == 125
    assert "dockerd refuses" in capsys.readouterr().err
    assert path.read_text() == '{"no-such-option": 1}\n'
    assert [file.name for file in path.parent.iterdir()] == ["daemon.json"]


# ---- Podman ----


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `kata-runtime` that is on the PATH, with nothing else of kata's."""
    program = tmp_path / "programs/kata-runtime"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho kata-runtime version 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(client_podman, "_WHERE", str(program.parent))
    return program


@pytest.fixture
def podman(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unpacked = ROOT / "build/programs/podman/usr/bin"
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{unpacked}")
    if os.geteuid() != 0 or shutil.which("podman") is None:
        pytest.skip("needs root and podman (tools/setup test unpacks it)")


def test_podmans_drop_in_comes_and_goes(tmp_path: Path, runtime: Path) -> None:
    path = tmp_path / "containers.conf.d/50-kata.conf"
    [edit] = client_podman.install(str(path))
    edit.apply()
    assert tomllib.loads(path.read_text()) == {"engine": {"runtimes": {"kata": [str(runtime)]}}}
    assert client_podman.install(str(path)) == []
    assert client_podman.runtime(str(path)) == str(runtime)
    edits = client_podman.uninstall(str(path))
    for edit in edits:
        edit.apply()
    assert client_podman.clear_up(edits) == []
    assert not path.parent.exists()
    assert client_podman.uninstall(str(path)) == []
    assert client_podman.runtime(str(path)) == ""


def test_podmans_directory_stays_with_what_others_have_in_it(tmp_path: Path, runtime: Path) -> None:
    other = tmp_path / "containers.conf.d/10-mine.conf"
    other.parent.mkdir()
    path = other.with_name("50-kata.conf")
    for edit in client_podman.install(str(path)):
        edit.apply()
    other.write_text("[engine]\n")
    edits = client_podman.uninstall(str(path))
    for edit in edits:
        edit.apply()
    client_podman.clear_up(edits)
    assert list(other.parent.iterdir()) == [other]


def test_podmans_drop_in_follows_a_runtime_that_has_moved(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d/50-kata.conf"
    for edit in client_podman.install(str(path)):
        edit.apply()
    moved = tmp_path / "moved/kata-runtime"
    moved.parent.mkdir()
    runtime.rename(moved)
    monkeypatch.setattr(client_podman, "_WHERE", str(moved.parent))
    [edit] = client_podman.install(str(path))
    edit.apply()
    assert client_podman.runtime(str(path)) == str(moved)
    edits = client_podman.uninstall(str(path))
    for edit in edits:
        edit.apply()
    client_podman.clear_up(edits)
    assert not path.parent.exists()


def test_what_is_not_ours_of_podmans_is_left_alone(tmp_path: Path, runtime: Path) -> None:
    path = tmp_path / "50-kata.conf"
    path.write_text("[engine]\n")
    with pytest.raises(AlreadyExistsError, match="not by `kata install`"):
        client_podman.install(str(path))
    assert client_podman.uninstall(str(path)) == []
    path.unlink()
    for edit in client_podman.install(str(path)):
        edit.apply()
    path.write_text(path.read_text() + 'more = ["x"]\n')
    with pytest.raises(ConfigError, match="has been changed since"):
        client_podman.uninstall(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        client_podman.install(str(path))


def test_what_podman_runs_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "podman"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def says(text: str) -> None:
        # It says so to who asks for "info", as real ones do for these members.
        program.write_text(
            f'#!/bin/sh\ncase "$*" in *" info --format {{{{.Host.CgroupManager}}}}"*) {text};; esac\n'
        )
        program.chmod(0o755)

    says("echo 'cgroupfs|v2|/usr/bin/conmon|conmon version 2.1.12, commit: unknown'")
    assert (
        client_podman.surroundings()
        == "cgroup manager cgroupfs (cgroups v2), monitor /usr/bin/conmon 2.1.12"
    )
    says("echo 'Error: could not find a working conmon binary' >&2; exit 125")
    with pytest.raises(HostError, match="could not find a working conmon binary"):
        client_podman.surroundings()
    says("echo 'systemd|v1|/usr/bin/conmon|conmon version 2.1.6'")
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    with pytest.raises(HostError, match="which this host does not run") as caught:
        client_podman.surroundings()
    assert "cgroupfs" in caught.value.hint


def test_programs_that_cannot_be_started_are_no_faults_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("podman", "dockerd", "containerd", "crio"):
        (tmp_path / name).write_bytes(b"\x7fELF, of another machine")
        (tmp_path / name).chmod(0o755)
    drop_in = tmp_path / "d/50-kata.conf"
    for call in (
        client_podman.podman,
        client_podman.surroundings,
        lambda: client_podman.Podman(str(tmp_path / "podman"), "5.0").check(str(drop_in), "/x"),
        client_docker.daemon,
        lambda: client_docker.Daemon(str(tmp_path / "dockerd")).check(str(drop_in)),
        client_containerd.daemon,
        lambda: client_containerd.Daemon(str(tmp_path / "containerd"), (2, 0)).dump(str(drop_in)),
        lambda: client_crio.check(str(tmp_path / "crio"), str(drop_in)),
    ):
        with pytest.raises(HostError, match="cannot be started: Exec format error"):
            call()


def test_podman_has_to_be_there_and_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(client_podman, "_WHERE", str(tmp_path))
    with pytest.raises(HostError, match="not on the PATH"):
        client_podman.podman()
    with pytest.raises(HostError, match="kata-runtime is in none of"):
        client_podman.install(str(tmp_path / "x.conf"))
    (tmp_path / "podman").write_text("#!/bin/sh\necho podman version 3.0.1\n")
    (tmp_path / "podman").chmod(0o755)
    with pytest.raises(HostError, match="too old"):
        client_podman.podman()


def test_podman_reads_it(
    podman: None, runtime: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d/50-kata.conf"
    assert main(["install", "podman", "--dry-run", "--config", str(path)]) == 0
    assert f'+kata = ["{runtime}"]' in capsys.readouterr().out
    assert not path.exists()
    assert main(["install", "podman", "--config", str(path)]) == 0
    assert str(runtime) in path.read_text()
    assert main(["install", "podman", "--config", str(path)]) == 0
    assert "already" in capsys.readouterr().err
    assert main(["uninstall", "podman", "--config", str(path)]) == 0
    assert not path.parent.exists()


def test_podman_that_refuses_has_the_file_taken_back(
    podman: None,
    runtime: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "d/50-kata.conf"
    monkeypatch.setattr(client_podman, "_content", lambda program, made: "[engine.runtimes]\nkata = 3\n")
    assert main(["install", "podman", "--config", str(path)]) == 125
    assert "podman refuses" in capsys.readouterr().err
    assert not path.parent.exists()
    wrong = '[engine.runtimes]\nkata = ["/usr/bin/true"]\n'
    monkeypatch.setattr(client_podman, "_content", lambda program, made: wrong)
    assert main(["install", "podman", "--config", str(path)]) == 125
    assert "takes /usr/bin/true" in capsys.readouterr().err
    assert not path.parent.exists()


# ---- CRI-O ----


@pytest.fixture
def both_programs(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The shim and `kata-runtime`, on the PATH."""
    shim = runtime.with_name("containerd-shim-kata-v2")
    shim.write_text("#!/bin/sh\n")
    shim.chmod(0o755)
    monkeypatch.setattr(client_crio, "_WHERE", str(shim.parent))
    return shim, runtime


def test_crios_drop_in_comes_and_goes(tmp_path: Path, both_programs: tuple[Path, Path]) -> None:
    path = tmp_path / "crio.conf.d/50-kata.conf"
    [edit] = client_crio.install(str(path))
    edit.apply()
    handlers = tomllib.loads(path.read_text())["crio"]["runtime"]["runtimes"]
    assert {name: (one["runtime_type"], one["runtime_path"]) for name, one in handlers.items()} == {
        "kata": ("vm", str(both_programs[0])),
        "kata-oci": ("oci", str(both_programs[1])),
    }
    assert client_crio.install(str(path)) == []
    assert client_crio.programs(str(path)) == tuple(map(str, both_programs))
    edits = client_crio.uninstall(str(path))
    for edit in edits:
        edit.apply()
    assert client_crio.clear_up(edits) == []
    assert not path.parent.exists()
    assert client_crio.uninstall(str(path)) == []
    assert client_crio.programs(str(path)) == ("", "")


def test_what_is_not_ours_of_crios_is_left_alone(tmp_path: Path, both_programs: tuple[Path, Path]) -> None:
    path = tmp_path / "50-kata.conf"
    path.write_text("[crio]\n")
    with pytest.raises(AlreadyExistsError, match="not by `kata install`"):
        client_crio.install(str(path))
    assert client_crio.uninstall(str(path)) == []
    path.unlink()
    for edit in client_crio.install(str(path)):
        edit.apply()
    path.write_text(path.read_text() + 'monitor_path = "/x"\n')
    with pytest.raises(ConfigError, match="has been changed since"):
        client_crio.uninstall(str(path))


@pytest.fixture
def crio(monkeypatch: pytest.MonkeyPatch) -> None:
    built = ROOT / "build/programs/crio"
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{built}")
    if shutil.which("crio") is None:
        pytest.skip("needs CRI-O (tools/setup test builds it)")


def test_crio_reads_it(
    both_programs: tuple[Path, Path], crio: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "crio.conf.d/50-kata.conf"
    assert main(["install", "crio", "--dry-run", "--config", str(path)]) == 0
    assert f'+runtime_path = "{both_programs[0]}"' in capsys.readouterr().out
    assert not path.exists()
    assert main(["install", "crio", "--config", str(path)]) == 0
    assert path.exists()
    assert main(["install", "crio", "--config", str(path)]) == 0
    assert "already" in capsys.readouterr().err
    assert main(["uninstall", "crio", "--config", str(path)]) == 0
    assert list(tmp_path.iterdir()) == [both_programs[0].parent]


def test_a_drop_in_that_crio_does_not_take_is_taken_back(
    both_programs: tuple[Path, Path], crio: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d/50-kata.conf"
    path.parent.mkdir()
    other = path.with_name("99-other.conf")
    other.write_text('[crio.runtime.runtimes.kata]\nruntime_type = "vm"\nruntime_path = "/other"\n')
    assert main(["install", "crio", "--config", str(path)]) == 125
    assert "a later file has a handler of that name" in capsys.readouterr().err
    other.write_text("[crio\n")
    assert main(["install", "crio", "--config", str(path)]) == 125
    assert "CRI-O refuses its configuration" in capsys.readouterr().err
    assert list(path.parent.iterdir()) == [other]
