"""Kernel modules for the initrd: which files the wanted ones need, and the order in which to insert them.

A packaged kernel has most of its drivers as modules, and a package that was only unpacked has no ``modules.dep``
(``depmod`` writes it during installation). The same facts stand in each module's own ``.modinfo`` section, so they
are read from there.

Source: the ``.modinfo`` tags of include/linux/module.h in the Linux sources; ELF-64 object file format.
"""

from __future__ import annotations

import lzma
import os
import struct
import zlib

from kata.errors import GuestAssetError
from kata.guest.bzimage import unpack_zstd

_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_SHT_NOBITS = 8


class Wanted:
    """One line of a module list.

    Attributes:
        name: The module's name, with underscores.
        required: Whether a kernel without it cannot be a guest.
    """

    __slots__ = ("name", "required")

    def __init__(self, name: str, required: bool) -> None:
        self.name = name
        self.required = required


def parse_list(text: str, origin: str) -> list[Wanted]:
    """Read a module list: one name a line, ``?`` before it when a kernel may lack it, ``#`` starts a comment.

    Args:
        text: The list.
        origin: Where it came from, for the error.

    Raises:
        GuestAssetError: A line is not a module's name.
    """
    wanted = []
    for number, line in enumerate(text.split("\n"), 1):
        word = line.split("#", 1)[0].strip()
        if not word:
            continue
        name = word.lstrip("?").strip()
        if not name.replace("-", "_").replace("_", "a").isalnum():
            raise GuestAssetError(f"{origin}, line {number}: {word!r} is not the name of a kernel module")
        wanted.append(Wanted(_plain(name), not word.startswith("?")))
    return wanted


class Tree:
    """The modules of one kernel: ``lib/modules/<version>`` of an installed or unpacked package.

    Args:
        root: That directory.

    Raises:
        GuestAssetError: It does not exist or holds no modules.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._paths: dict[str, str] = {}
        for directory, _subdirectories, files in os.walk(os.path.join(root, "kernel")):
            for file in files:
                stem, dot, _rest = file.partition(".ko")
                if dot and file.endswith(_SUFFIXES):
                    self._paths[_plain(stem)] = os.path.join(directory, file)
        self._builtin = self._read_builtin()
        if not self._paths and not self._builtin:
            raise GuestAssetError(f"there are no kernel modules below {root}")

    def _read_builtin(self) -> set[str]:
        try:
            with open(os.path.join(self.root, "modules.builtin"), encoding="utf-8") as file:
                return {_plain(os.path.basename(line.strip()).removesuffix(".ko")) for line in file}
        except FileNotFoundError:
            return set()

    def resolve(self, wanted: list[Wanted]) -> list[tuple[str, bytes]]:
        """Return the modules to load, each after everything that it needs.

        Args:
            wanted: What is asked for; modules that are part of the kernel itself need nothing.

        Returns:
            (path relative to ``root``, ending in ``.ko``; the uncompressed module), in the order of insertion.

        Raises:
            GuestAssetError: A required module, or one that a required one needs, is missing or damaged.
        """
        done: dict[str, tuple[str, bytes]] = {}
        missing = []
        for item in wanted:
            trial = dict(done)
            lacking = self._visit(item.name, trial, ())
            if lacking is None:
                done = trial
            elif item.required:
                missing.append(item.name if lacking == item.name else f"{item.name} (which needs {lacking})")
        if missing:
            raise GuestAssetError(
                f"the kernel of {self.root} cannot be a guest: it lacks {', '.join(missing)}",
                "kata guest build --kernel small",
            )
        return list(done.values())

    def _visit(self, name: str, done: dict[str, tuple[str, bytes]], above: tuple[str, ...]) -> str | None:
        """Add a module after its dependencies. Returns the name of a missing one, if any."""
        if name in done or name in self._builtin:
            return None
        path = self._paths.get(name)
        if path is None:
            return name
        if name in above:
            raise GuestAssetError(
                f"kernel modules below {self.root} need each other in a circle: {', '.join(above)}"
            )
        data = read_module(path)
        needs, soft = _dependencies(data, path)
        for other in needs:
            lacking = self._visit(other, done, (*above, name))
            if lacking is not None:
                return lacking
        for other in soft:
            if other not in above:  # a soft dependency that is missing, or already under way, is none
                trial = dict(done)
                if self._visit(other, trial, (*above, name)) is None:
                    done.update(trial)
        relative = os.path.relpath(path, self.root)
        done[name] = (relative[: relative.rindex(".ko") + 3], data)
        return None


def read_module(path: str) -> bytes:
    """A module's ELF file, uncompressed.

    Raises:
        GuestAssetError: It cannot be read or is damaged.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        if path.endswith(".xz"):
            data = lzma.decompress(data)
        elif path.endswith(".gz"):
            data = zlib.decompress(data, 31)
        elif path.endswith(".zst"):
            data = unpack_zstd(data)
    except (OSError, lzma.LZMAError, zlib.error) as error:
        raise GuestAssetError(f"cannot read the kernel module {path}: {error}") from error
    if data[:6] != b"\x7fELF\x02\x01":
        raise GuestAssetError(f"the kernel module {path} is not a 64-bit ELF file")
    return data


def _dependencies(data: bytes, path: str) -> tuple[list[str], list[str]]:
    """The dependencies of a module, and its soft dependencies."""
    needs: list[str] = []
    soft: list[str] = []
    for entry in _section(data, b".modinfo", path).split(b"\0"):
        key, _equals, value = entry.decode("utf-8", "replace").partition("=")
        if key == "depends":
            needs += [_plain(name) for name in value.split(",") if name]
        elif key == "softdep":
            before = False
            for word in value.split():
                if word.endswith(":"):
                    before = word == "pre:"
                elif before:
                    soft.append(_plain(word))
    return needs, soft


def _section(data: bytes, wanted: bytes, path: str) -> bytes:
    """The content of an ELF section; empty if there is none of that name."""
    try:
        table = struct.unpack_from("<Q", data, 40)[0]
        entry, count, names = struct.unpack_from("<HHH", data, 58)
        heads = [struct.unpack_from("<II16xQQ", data, table + index * entry) for index in range(count)]
        _name, _kind, strings, _size = heads[names]
        for name, kind, offset, size in heads:
            start = strings + name
            if kind != _SHT_NOBITS and data[start : start + len(wanted) + 1] == wanted + b"\0":
                return data[offset : offset + size]
    except (struct.error, IndexError) as error:
        raise GuestAssetError(
            f"the kernel module {path} is damaged: its section table lies outside of it"
        ) from error
    return b""


def _plain(name: str) -> str:
    return name.replace("-", "_")
