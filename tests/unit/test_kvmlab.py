"""What of the KVM lab needs no lab: its frames, its options, the choice of a busybox."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from kvmlab import assets, frames, machine, main


@given(
    st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300))),
    st.lists(st.integers(1, 40), min_size=1),
)
def test_frames_survive_any_cutting(sent: list[tuple[int, bytes]], sizes: list[int]) -> None:
    wire = b"".join(frames.frame(kind, payload) for kind, payload in sent)
    decoder = frames.Decoder()
    got: list[tuple[int, bytes]] = []
    turn = 0
    while wire:
        size = sizes[turn % len(sizes)]
        turn += 1
        got += decoder.feed(wire[:size])
        wire = wire[size:]
    assert got == sent


def test_a_frame_beyond_the_limit_is_refused_by_its_head() -> None:
    decoder = frames.Decoder()
    with pytest.raises(frames.WrongFrame):
        list(decoder.feed(frames.HEAD.pack(frames.STDOUT, frames.LIMIT + 1)))


def elf(kinds: list[int]) -> bytes:
    """The beginning of an ELF-64 file with program headers of these types."""
    head = bytearray(64)
    head[:5] = b"\x7fELF\x02"
    head[32:40] = (64).to_bytes(8, "little")
    head[54:56] = (56).to_bytes(2, "little")
    head[56:58] = len(kinds).to_bytes(2, "little")
    return bytes(head) + b"".join(kind.to_bytes(4, "little").ljust(56, b"\0") for kind in kinds)


def test_a_static_program_is_told_by_its_headers() -> None:
    assert assets._is_static(elf([1, 1, 4]))
    assert not assets._is_static(elf([6, 3, 1]))
    assert not assets._is_static(b"#!/bin/sh\n")


def test_the_command_keeps_its_options_and_gets_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    monkeypatch.setenv("MINE", "kept")
    words = ["--get", "/out:here", "--get", "log/", "-e", "A=1=2", "--", "ls", "-l", "--get"]
    request = main._request(main.parser().parse_args(words))
    assert request.argv == ["ls", "-l", "--get"]
    assert request.get == [("/out", str(Path.cwd() / "here")), ("log/", str(Path.cwd() / "log"))]
    assert (request.env["A"], request.env["MINE"], request.env[main.MARK]) == ("1=2", "kept", "1")
    assert "SSH_AUTH_SOCK" not in request.env


def test_the_lab_cannot_write_to_the_host() -> None:
    made = assets.Assets(Path("/k"), Path("/i"), "6.1")
    argv = machine.command_line(made, machine.Size(1024, 2), "isolated", 3, 4)
    [export] = [word for word in argv if word.startswith("local,")]
    assert "readonly=on" in export.split(",")
    assert "user,id=net,restrict=on" in argv
    assert not any(
        word.startswith("virtio-net")
        for word in machine.command_line(made, machine.Size(1, 1), "none", 3, 4)
    )
