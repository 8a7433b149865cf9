"""Reads ``--mount``, and ``-v DST``: volumes on disks of their own, and Docker's long form of ``-v`` and ``--tmpfs``.

A volume is a file system in a file of the container's directory, attached to its machine as a disk
(`kata.storage.ext4`). Unlike the writable layer and the host's files, it can be the upper layer of an overlay, which a
dockerd in a container needs.
"""

from __future__ import annotations

import os

from kata.cli import values
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_SIZE = 10 << 30
"""Default size of a volume and of the writable layer, in bytes. The file is sparse: this is an upper bound."""
MOST_VOLUMES = 6
"""A machine has at most eight disks; two of them are the image and the writable layer."""
_FORM = "--mount type=volume,[src=NAME,]dst=PATH[,volume-opt=size=SIZE][,volume-nocopy][,ro]"
_BIND_FORM = "--mount type=bind,src=PATH,dst=PATH[,ro][,bind-propagation=rslave]"
_TMPFS_FORM = "--mount type=tmpfs,dst=PATH[,tmpfs-size=SIZE][,tmpfs-mode=1777]"
_DESTINATIONS = ("dst", "destination", "target")
_READONLY = ("ro", "readonly")
_FLAGS = ("noexec", "nosuid", "nodev")
_OF_KIND = {
    "volume": ("volume-opt", "volume-nocopy", "volume-driver"),
    "bind": ("bind-propagation", "bind-recursive", "consistency", "relabel", *_FLAGS),
    "tmpfs": ("tmpfs-size", "tmpfs-mode", "notmpcopyup", *_FLAGS),
}
_WITH_VALUE = (
    "type",
    *_DESTINATIONS,
    "src",
    "source",
    *(key for keys in _OF_KIND.values() for key in keys if "-" in key and key != "volume-nocopy"),
)
_BELOW = "what is mounted below SRC is always shared, too; with ro, read-only"
_CREATE = "make it first: mkdir -p SRC"
_ELSEWHERE = {
    "bind-recursive": _BELOW,
    "bind-nonrecursive": _BELOW,
    "bind-create-src": _CREATE,
    "bind-create-mountpoint": _CREATE,
    "volume-driver": "leave it out: the one driver is a disk of the machine",
    "volume-label": "leave it out: no one lists volumes by label",
    "volume-subpath": "mount the whole volume, and use the directory in it",
    "tmpcopyup": "type=volume is filled with what the image has there",
    "size": "it is called tmpfs-size, or volume-opt=size=SIZE",
    "mode": "it is called tmpfs-mode",
    "chown": "kata changes nothing of what it shares: chown -R UID:GID SRC",
    "U": "kata changes nothing of what it shares: chown -R UID:GID SRC",
    "idmap": "kata maps no users: inside, owners are those of the host",
}
"""Options of Docker and Podman -> what to do instead."""
_FORMS = {"volume": _FORM, "bind": _BIND_FORM, "tmpfs": _TMPFS_FORM}


class Volume:
    """A volume on a disk of its own.

    Args:
        destination: Its path in the container.
        size: Size of its file system, in bytes.
        readonly: The container may only read it.
        copy: On first use, the image's content at the destination is copied into it.
        name: Its name, where it outlives its container; empty for one that goes with it.
    """

    __slots__ = ("copy", "destination", "name", "readonly", "size")

    def __init__(
        self,
        destination: str,
        size: int = DEFAULT_SIZE,
        *,
        readonly: bool = False,
        copy: bool = True,
        name: str = "",
    ) -> None:
        self.name = name
        self.destination = destination
        self.size = size
        self.readonly = readonly
        self.copy = copy

    @property
    def access(self) -> str:
        """The mount's option: ``ro`` or ``rw``."""
        return "ro" if self.readonly else "rw"

    def record(self, name: str) -> dict[str, Any]:
        """Return its entry for container.json.

        Args:
            name: Name of its file in the container's directory.
        """
        return {
            "name": name,
            "destination": self.destination,
            "size": self.size,
            "readonly": self.readonly,
            "copy": self.copy,
            **({"volume": self.name} if self.name else {}),
        }


class Mounts:
    """The mounts of ``--mount`` and ``-v``, by type.

    Attributes:
        volumes: Volumes on disks.
        binds: Source, destination and options, as returned by `values.volume`.
        tmpfs: Destination and options, as returned by `values.tmpfs`.
    """

    __slots__ = ("binds", "tmpfs", "volumes")

    def __init__(self) -> None:
        self.volumes: list[Volume] = []
        self.binds: list[tuple[str, str, list[str]]] = []
        self.tmpfs: list[tuple[str, list[str]]] = []

    def add(self, text: str) -> None:
        """Add the mount of one ``--mount``.

        Raises:
            UsageError: It is malformed, or not supported.
        """
        options_by_key = _pairs(text)
        kind = options_by_key.pop("type", "volume")
        if kind not in _OF_KIND:
            raise UsageError(
                f"--mount {text!r}: there is no type {kind!r}", "type is one of volume, bind, tmpfs"
            )
        destination = _one(options_by_key, _DESTINATIONS, text)
        source = _one(options_by_key, ("src", "source"), text)
        readonly_switches = [
            _switch(options_by_key.pop(key), text) for key in _READONLY if key in options_by_key
        ]
        writable = [_switch(options_by_key.pop("rw"), text)] if "rw" in options_by_key else []
        readonly = any(readonly_switches) or writable == [False]
        if readonly and (False in readonly_switches or writable == [True]):
            raise UsageError(
                f"--mount {text!r}: ro and rw contradict each other", "leave out one of the two"
            )
        _refuse_strange(options_by_key, kind, text)
        if not destination:
            raise UsageError(f"--mount {text!r} does not say where to mount", _FORMS[kind])
        access = "ro" if readonly else "rw"
        if kind == "bind":
            if not source:
                raise UsageError(f"--mount {text!r} does not say what to mount", _BIND_FORM)
            option = f"--mount {text!r}"
            options = [access, options_by_key.get("bind-propagation", "rprivate")]
            options += [flag for flag in _FLAGS if _switch(options_by_key.get(flag, "false"), text)]
            if options_by_key.get("consistency", "default") != "default":
                options.append(options_by_key["consistency"])
            if "relabel" in options_by_key:
                options.append(
                    {"shared": "z", "private": "Z"}.get(options_by_key["relabel"], options_by_key["relabel"])
                )
            self.binds.append(values.bind(source, destination, options, option))
        elif kind == "tmpfs":
            if source:
                raise UsageError(f"--mount {text!r}: a tmpfs has no source", _TMPFS_FORM)
            self.tmpfs.append((_absolute(destination, text), [access, *_tmpfs_options(options_by_key)]))
        else:
            if source.startswith(("/", ".")):
                raise UsageError(
                    f"--mount {text!r}: {source!r} is no name of a volume",
                    f"--mount type=bind,src={source},dst={destination}",
                )
            place = _absolute(destination, text)
            self._add_volume(options_by_key, place, text, readonly=readonly, name=source)

    def _add_volume(
        self, given: dict[str, str], destination: str, text: str, *, readonly: bool, name: str
    ) -> None:
        if name:
            from kata.cli.volumes import check_name

            check_name(name, f"--mount {text!r}")
        keep_empty = _switch(given.get("volume-nocopy", "false"), text)
        size = DEFAULT_SIZE
        for option in given["volume-opt"].split("\n") if "volume-opt" in given else ():
            key, _, value = option.partition("=")
            if key != "size":
                raise UsageError(
                    f"--mount {text!r}: a volume has no option {key!r}",
                    "its one option is volume-opt=size=10g",
                )
            size = values.size(value, "--mount volume-opt=size")
        self.volumes.append(Volume(destination, size, readonly=readonly, copy=not keep_empty, name=name))

    def add_short(self, text: str) -> None:
        """Add the volume of a ``-v DST`` without a source, or of a ``-v NAME:DST[:OPTION,...]``, with the default size.

        Raises:
            UsageError: The destination, the name or an option is invalid.
        """
        if ":" not in text:
            self.volumes.append(Volume(_absolute(text, text, "-v")))
            return
        from kata.cli.volumes import check_name

        name, destination, *rest = text.split(":")
        options = rest[0].split(",") if rest else []
        strange = set(options) - {"ro", "rw", "nocopy", "copy", "z", "Z"}
        if len(rest) > 1 or strange or {"ro", "rw"} <= set(options):
            wrong = f"a volume has no option {min(strange)!r}" if strange else "it is malformed"
            raise UsageError(f"-v {text!r}: {wrong}", "-v NAME:PATH[:ro|nocopy]")
        check_name(name, f"-v {text!r}")
        self.volumes.append(
            Volume(
                _absolute(destination, text, "-v"),
                readonly="ro" in options,
                copy="nocopy" not in options,
                name=name,
            )
        )


def check_number(volumes: int, of_image: int = 0) -> None:
    """Refuse more volumes than a machine has room for.

    Args:
        volumes: How many there are.
        of_image: How many of them are the image's, which the user need not know of.

    Raises:
        UsageError: There are too many.
    """
    if volumes > MOST_VOLUMES:
        of_them = f" ({of_image} of them the image's, of a read-only container)" if of_image else ""
        raise UsageError(
            f"{volumes} volumes on disks{of_them} are more than a machine has room for: {MOST_VOLUMES}",
            "-v DIR:PATH shares a directory of the host instead, --tmpfs PATH is in memory",
        )


def _pairs(text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in _items(text):
        key, equals, value = item.partition("=")
        key = key if key == "U" else key.lower()
        if not key or (not equals and key in _WITH_VALUE):
            raise UsageError(f"--mount {text!r}: {item!r} is not KEY=VALUE", _FORM)
        if key == "volume-opt" and key in given:
            value = f"{given[key]}\n{value}"
        elif key in given:
            raise UsageError(f"--mount {text!r}: {key} is given twice", "leave out one of the two")
        given[key] = value if equals else "true"
    return given


def _items(text: str) -> list[str]:
    """What the commas separate; an item in double quotes may have some itself, as in a line of CSV."""
    if '"' not in text:
        return text.split(",")
    import csv

    try:
        return next(csv.reader([text], strict=True))
    except (csv.Error, StopIteration):
        raise UsageError(
            f"--mount {text!r}: the quotes do not match", 'a whole item is quoted: "src=/a,b",dst=/c'
        ) from None


def _refuse_strange(given: dict[str, str], kind: str, text: str) -> None:
    """Refuse options that a mount of this kind has not, and values of which there is but one."""
    strange = [key for key in given if key not in _OF_KIND[kind]]
    only = {"bind-recursive": "enabled", "volume-driver": "local"}
    if kind == "tmpfs":  # which has them anyway
        only |= dict.fromkeys((*_FLAGS, "notmpcopyup"), "true")
    strange += [key for key, value in only.items() if given.get(key, value) != value]
    if strange:
        what = f"{strange[0]}={given[strange[0]]}" if strange[0] in _OF_KIND[kind] else strange[0]
        raise UsageError(
            f"--mount {text!r}: {kind} has no option {what!r}", _ELSEWHERE.get(strange[0], _FORMS[kind])
        )


def _one(given: dict[str, str], keys: tuple[str, ...], text: str) -> str:
    found = [given.pop(key) for key in keys if key in given]
    if len(found) > 1:
        raise UsageError(f"--mount {text!r}: {keys[0]} is given twice", "leave out one of the two")
    return found[0] if found else ""


def _switch(value: str, text: str) -> bool:
    if value.lower() not in ("true", "1", "false", "0"):
        raise UsageError(f"--mount {text!r}: {value!r} is neither true nor false")
    return value.lower() in ("true", "1")


def _absolute(destination: str, text: str, option: str = "--mount") -> str:
    normal = os.path.normpath(destination)
    if not destination.startswith("/") or normal in ("/", "//"):
        raise UsageError(
            f"{option} {text!r}: the destination has to be absolute and not the root",
            f"{option} /data" if option == "-v" else _FORM,
        )
    return normal


def _tmpfs_options(given: dict[str, str]) -> list[str]:
    options = []
    if "tmpfs-size" in given:
        options.append(f"size={values.size(given['tmpfs-size'], '--mount tmpfs-size')}")
    mode = given.get("tmpfs-mode", "1777")
    if not mode or not set(mode) <= set("01234567") or len(mode) > 5:
        raise UsageError(f"--mount tmpfs-mode={mode!r} is not an octal mode", "for example 1777")
    return [*options, f"mode={mode}"]
