"""`kata build` before a builder is at work. One that is, is in tests/vm."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from cli_state import state_fixture  # noqa: F401 - a fixture
from waiting import PATIENCE, until

from kata.cli import build, main
from kata.errors import HostError


def test_without_a_builder_it_says_what_to_install(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main.main(["build", "-t", "x", str(tmp_path)]) == 125
    said = capsys.readouterr().err
    assert "neither is on the PATH" in said
    assert "apt-get install buildah" in said
    assert not (state / "build").exists()
    with pytest.raises(HostError):
        build.builder()


def test_buildah_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("podman", "buildah"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        assert build.builder() == str(tmp_path / name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere"], "is no directory"),
        (["-t", "a@sha256:" + "0" * 64, "."], "no name of an image"),
        (["--network", "host", "."], "is not offered for RUN"),
        (["-f", "x", "-"], "leave out -f"),
        (["--build-arg", "=x", "."], "--build-arg '=x' has no name"),
        (["--label", "", "."], "--label '' has no name"),
    ],
)
def test_what_it_refuses(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["build", *words]) == 125
    assert said in capsys.readouterr().err


KATA = Path(__file__).resolve().parents[2] / "src/kata/__main__.py"
FAILS = """\
#!/bin/sh
for word; do
    case $word in
    --file=*) cat "${word#--file=}" >"$SEEN" ;;
    --iidfile=*) echo sha256:abc >"${word#--iidfile=}" ;;
    push) echo "Error: it is full" >&2; exit 1 ;;
    esac
done
"""
"""A builder that builds at once, and cannot hand over what it has built."""
WORKS = """\
#!/bin/sh
case "$*" in *" build "*)
    sh -c 'trap "" TERM; echo $$ >"$SEEN"; while :; do sleep 1; done' &
    wait
esac
"""
"""A builder that is long at work, by a child that does not end when it is told to."""


def fake_builder(tmp_path: Path, script: str) -> dict[str, str]:
    """The environment of a `kata` that finds it as buildah."""
    path = tmp_path / "bin/buildah"
    path.parent.mkdir()
    path.write_text(script)
    path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{path.parent}:{os.environ['PATH']}",
        "SEEN": str(tmp_path / "seen"),
    }


needs_root = pytest.mark.skipif(
    Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"] or os.getuid() != 0,
    reason="kata build needs root",
)


def kata(env: dict[str, str], *words: str, stdin: bytes = b"") -> tuple[int, str]:
    done = subprocess.run(
        ["/usr/bin/python3", "-IS", KATA, "build", *words],
        env=env,
        input=stdin,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    return done.returncode, done.stderr.decode()


@needs_root
@pytest.mark.parametrize("words", [["-f", "-", "."], ["-"]])
def test_a_dockerfile_on_standard_input(words: list[str], state: Path, tmp_path: Path) -> None:
    env = fake_builder(tmp_path, FAILS)
    # What failed is said, and it was not the build.
    status, said = kata(env, *words, stdin=b"FROM scratch\n")
    assert status == 125
    assert "buildah could not hand over the image: it is full" in said
    assert "is there space?" in said
    assert (tmp_path / "seen").read_text() == "FROM scratch\n"
    assert list((state / "build").iterdir()) == []
    assert "is empty" in kata(env, *words)[1]
    assert "tar -xf" in kata(env, *words, stdin=b"Dockerfile\0\0")[1]


@needs_root
def test_the_file_for_the_id_is_looked_at_first(state: Path, tmp_path: Path) -> None:
    env = fake_builder(tmp_path, FAILS)
    where = tmp_path / "nowhere/id"
    status, said = kata(env, "--iidfile", str(where), "-f", "-", ".", stdin=b"FROM scratch")
    assert status == 125
    assert f"--iidfile {where}: No such file or directory" in said
    assert not (tmp_path / "seen").exists()
    (tmp_path / "id").write_text("of an earlier build")
    assert kata(env, "--iidfile", str(tmp_path / "id"), "-f", "-", ".", stdin=b"FROM scratch")[0] == 125
    assert (tmp_path / "seen").exists()
    assert not (tmp_path / "id").exists()


@needs_root
@pytest.mark.parametrize(
    ("number", "stubborn"),
    [
        (signal.SIGTERM, False),
        (signal.SIGHUP, False),
        (signal.SIGINT, False),
        # A second Ctrl-C, while the first one waits for a builder that does not end.
        (signal.SIGINT, True),
    ],
)
def test_told_to_end_it_ends_all_of_the_builder(
    number: signal.Signals, stubborn: bool, state: Path, tmp_path: Path
) -> None:
    script = WORKS.replace("    sh -c", "    trap '' TERM\n    sh -c") if stubborn else WORKS
    env = fake_builder(tmp_path, script)
    seen = tmp_path / "seen"
    with subprocess.Popen(
        ["/usr/bin/python3", "-IS", KATA, "build", str(tmp_path)],
        env=env,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as child:
        try:
            until(lambda: seen.exists() and seen.read_text(), "the builder works")
            assert stat.S_IMODE((state / "build").stat().st_mode) == 0o700
            child.send_signal(number)
            if stubborn:
                time.sleep(0.5)
                assert child.poll() is None
                child.send_signal(number)
            began = time.monotonic()
            child.wait(PATIENCE)
            assert time.monotonic() - began < build._END_S
            assert child.returncode == (130 if number == signal.SIGINT else -number)
            assert list((state / "build").iterdir()) == []
            worker = int(seen.read_text())
            until(lambda: not Path(f"/proc/{worker}").exists(), "the builder's child has ended")
        finally:
            child.kill()
            if seen.exists():
                try:
                    os.kill(int(seen.read_text()), signal.SIGKILL)
                except ProcessLookupError:
                    pass


def test_prune_removes_what_is_kept_for_the_next_build(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # the builder is gone
    layer = state / "build/storage/overlay/layer"
    for words in (["prune", "build", "-f"], ["prune", "-a", "-f"], ["builder", "prune", "--force"]):
        layer.mkdir(parents=True)
        (layer / "content").write_bytes(bytes(100_000))
        assert main.main(["prune", "-f"]) == 0
        assert main.main(["prune", "-a", "-f", "--filter", "until=1h"]) == 0
        assert layer.exists()  # neither is about builds
        capsys.readouterr()
        assert main.main(words) == 0
        assert not (state / "build/storage").exists()
        assert " 0B" not in capsys.readouterr().out
    assert main.main(["prune", "build", "-f"]) == 0
    assert capsys.readouterr().out == "Total reclaimed space: 0B\n"
    assert main.main(["prune", "build", "-f", "--filter", "until=1h"]) == 125
