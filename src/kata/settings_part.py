"""Groups of settings that are written as plain values, and checked when they are read: what `kata.settings` is made of.

The parameters of a class's ``__init__`` are its keys: their annotations are checked at run time, a key without a
default has to be there, and what is as by default is left out. Imported before the hypervisor is started: no
dataclasses, no typing.
"""

from __future__ import annotations

from kata.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self

    Reader = Callable[[Any, str], Any]
    """Checks a plain value and converts it; the second argument is its place, for the error."""

_HINT = "docs/settings.md has all keys and what they may be"
_SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
}
_readers: dict[type, dict[str, Reader]] = {}
_by_kind: dict[str, Reader] = {}


class Part:
    """A group of settings: what its subclasses have in common."""

    __slots__ = ()

    def to_plain(self) -> dict[str, Any]:
        """Its keys with values of JSON; those that are as by default are left out."""
        defaults: dict[str, Any] = vars(type(self))["__init__"].__kwdefaults__ or {}
        plain: dict[str, Any] = {}
        for name in vars(type(self))["__init__"].__annotations__:
            if name == "return":
                continue
            value = _plain(getattr(self, name))
            if name not in defaults or (value != _plain(defaults[name]) and value != {}):
                plain[name] = value
        return plain

    @classmethod
    def from_plain(cls, plain: object, place: str = "") -> Self:
        """The opposite of `to_plain`.

        Args:
            plain: Values of JSON.
            place: Where they were found, for errors: ``machine.guest``.

        Raises:
            ConfigError: A key is missing or unknown, or a value is of the wrong type.
        """
        if not isinstance(plain, dict):
            raise _wrong(place, "an object", plain)
        readers = _readers.get(cls) or _readers_of(cls)
        values = {}
        for name, value in plain.items():
            inside = f"{place}.{name}" if place else name
            if name not in readers:
                raise ConfigError(f"the sandbox's settings: there is no key {inside!r}", _HINT)
            values[name] = readers[name](value, inside)
        defaults = vars(cls)["__init__"].__kwdefaults__ or ()
        for name in readers:
            if name not in values and name not in defaults:
                inside = f"{place}.{name}" if place else name
                raise ConfigError(f"the sandbox's settings: the key {inside!r} is missing", _HINT)
        return cls(**values)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.to_plain() == self.to_plain()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_plain()})"


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_plain()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value


def _readers_of(cls: type) -> dict[str, Reader]:
    annotations: dict[str, str] = vars(cls)["__init__"].__annotations__
    found = {name: _reader(kind) for name, kind in annotations.items() if name != "return"}
    _readers[cls] = found
    return found


def _reader(kind: str) -> Reader:
    """What reads a value of the type that an annotation names."""
    found = _by_kind.get(kind)
    if found is None:
        found = _by_kind[kind] = _new_reader(kind)
    return found


def _new_reader(kind: str) -> Reader:
    if kind in _SCALARS:
        types = _SCALARS[kind]

        def read_scalar(value: Any, place: str) -> Any:
            if type(value) not in types:  # not isinstance: a bool is no int here
                raise _wrong(place, kind, value)
            return value

        return read_scalar
    if kind.endswith(" | None"):
        inner = _reader(kind.removesuffix(" | None"))
        return lambda value, place: None if value is None else inner(value, place)
    if kind.startswith("Sequence["):
        one = _reader(kind[len("Sequence[") : -1])

        def read_list(value: Any, place: str) -> Any:
            if not isinstance(value, list):
                raise _wrong(place, "a list", value)
            return [one(item, f"{place}[{number}]") for number, item in enumerate(value)]

        return read_list
    if kind.startswith("Mapping[str, "):
        each = _reader(kind[len("Mapping[str, ") : -1])

        def read_mapping(value: Any, place: str) -> Any:
            if not isinstance(value, dict):
                raise _wrong(place, "an object", value)
            return {str(name): each(item, f"{place}.{name}") for name, item in value.items()}

        return read_mapping
    if kind == "Any":
        return lambda value, place: value
    parts = {part.__name__: part for part in Part.__subclasses__()}
    return parts[kind].from_plain


def _wrong(place: str, expected: str, value: object) -> ConfigError:
    return ConfigError(
        f"the sandbox's settings: {place or 'all of them'} should be {expected}, and is {type(value).__name__}",
        _HINT,
    )
