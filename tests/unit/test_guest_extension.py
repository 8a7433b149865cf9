"""Archives of further programs for a guest: from ELF files that a compiler has just made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kata.errors import GuestAssetError
from kata.guest import extension
from kata.guest.progress import Silent


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A program with a library of its own, a module that has what it needs and one that has not."""
    base = tmp_path_factory.mktemp("objects")

    def compile_(name: str, *more: str) -> None:
        source = "int main(void) { return 0; }" if name == "xtables-nft-multi" else f"int f{len(name)};"
        argv = ["gcc", "-x", "c", "-", "-o", name, "-nostdlib", "-Wl,--no-as-needed", "-L.", *more]
        subprocess.run(argv, input=source.encode(), cwd=base, check=True)

    compile_("libbelow.so.1", "-shared", "-fPIC", "-Wl,-soname,libbelow.so.1")
    compile_("libgone.so.1", "-shared", "-fPIC", "-Wl,-soname,libgone.so.1")
    compile_("libxt_good.so", "-shared", "-fPIC", "-l:libbelow.so.1")
    compile_("libxt_bad.so", "-shared", "-fPIC", "-l:libgone.so.1")
    compile_("libebt_other.so", "-shared", "-fPIC")
    compile_("xtables-nft-multi", "-Wl,-e,main", "-l:libbelow.so.1")
    (base / "libgone.so.1").unlink()
    (base / "ld-linux-x86-64.so.2").write_bytes(b"the loader")
    return {path.name: str(path) for path in base.iterdir()}


def names(image: bytes) -> set[str]:
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=image, capture_output=True, check=True)
    return {name.removeprefix("ext/iptables/") for name in listed.stdout.decode().split()}


def test_needed_libraries_are_read(objects: dict[str, str]) -> None:
    assert extension.needed(Path(objects["libxt_good.so"]).read_bytes()) == ["libbelow.so.1"]
    assert extension.needed(Path(objects["libbelow.so.1"]).read_bytes()) == []
    assert extension.needed(b"#!/bin/sh\n") == []


def test_an_archive_has_what_its_programs_need_and_no_more(objects: dict[str, str]) -> None:
    found = names(extension.pack("iptables", objects))
    assert {
        "usr/sbin/xtables-nft-multi",
        "usr/sbin/ip6tables-restore",
        "lib64/ld-linux-x86-64.so.2",
        "usr/lib/x86_64-linux-gnu/libbelow.so.1",
        "usr/lib/x86_64-linux-gnu/xtables/libxt_good.so",
    } <= found
    assert not [name for name in found if "bad" in name or "gone" in name or "ebt" in name]
    assert extension.pack("iptables", objects) == extension.pack("iptables", objects)


@pytest.mark.parametrize("missing", ["xtables-nft-multi", "libbelow.so.1", "ld-linux-x86-64.so.2"])
def test_an_archive_that_could_not_run_is_not_made(objects: dict[str, str], missing: str) -> None:
    with pytest.raises(GuestAssetError, match="with all its libraries"):
        extension.pack("iptables", {name: path for name, path in objects.items() if name != missing})


def test_the_shell_needs_nothing(tmp_path: Path, objects: dict[str, str]) -> None:
    program = tmp_path / "busybox"
    subprocess.run(
        ["gcc", "-x", "c", "-", "-o", program, "-nostdlib", "-static", "-Wl,-e,main"],
        input=b"int main(void) { return 0; }",
        check=True,
    )
    assert names(extension.pack_shell({"busybox": str(program)})) == {"debug", "debug/sh"}
    for files in ({}, {"busybox": objects["xtables-nft-multi"]}, {"busybox": __file__}):
        with pytest.raises(GuestAssetError, match="no busybox that needs no libraries"):
            extension.pack_shell(files)


def test_what_there_is_no_extension_for_is_said() -> None:
    with pytest.raises(GuestAssetError, match="no guest extension 'emacs'"):
        extension.build("emacs", Silent())
