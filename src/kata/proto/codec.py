"""Protobuf messages without a protobuf library.

The generated modules (`*_pb.py`) are tables of text. A message class is built from its line on first access, its
encoders when the first instance is encoded, its decoders when the first is decoded. So importing a module costs next to
nothing, and a start pays only for what it does with the messages that it uses. Types for checkers are in the `*_pb.pyi`
files beside the modules.

The wire format is proto3's (https://protobuf.dev/programming-guides/encoding/). Input may come from a hostile guest:
nesting, lengths and the number of elements are bounded, and every malformed input raises `DecodeError`. Unknown fields
are skipped.
"""

from __future__ import annotations

from sys import intern

from kata.proto.wire import (
    MAX_DEPTH,
    ZERO,
    DecodeError,
    EncodeError,
    field_key,
    get_tag,
    get_varint,
    put_varint,
    scalar_reader,
    scalar_writer,
    skip,
    wire_type_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, ClassVar, Self, TypeAlias

    Encoders: TypeAlias = list[tuple[str, Callable[[Any, bytearray, int], None]]]
    Decoders: TypeAlias = dict[int, Callable[[Any, bytes, int, int, int, list[int]], int]]

__all__ = [
    "MAX_DEPTH",
    "MAX_ELEMENTS",
    "DecodeError",
    "EncodeError",
    "Field",
    "Message",
    "Methods",
    "lazy_module",
]

MAX_ELEMENTS = 1 << 17
"""Maximum number of sub-messages and repeated elements in one decoded message: two bytes on the wire can become
hundreds in memory. With the largest elements, in a message that fills a frame, the limit amounts to 30 MB."""


class Message:
    """Base of the generated classes.

    An absent field has its type's zero value; an absent sub-message or `optional` field is None. Repeated fields are
    lists, maps are dicts, enums are ints. Messages are mutable and compare by value.
    """

    __slots__: tuple[str, ...] = ()
    FULL_NAME: ClassVar[str] = ""
    """Package and name, as in the type URL of an Any."""
    _fields: ClassVar[tuple[Field, ...]] = ()
    _plan: ClassVar[Plan | None] = None

    def __init__(self, **values: Any) -> None:
        plan = self._plan or _compile(type(self))
        for name, default in plan.defaults:
            setattr(self, name, default)
        for name, make in plan.containers:
            setattr(self, name, make())
        for name, value in values.items():
            if name not in plan.by_name:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
            setattr(self, name, value)

    @classmethod
    def fields(cls) -> tuple[Field, ...]:
        """The fields in the order of the `.proto`, with the classes of sub-messages resolved."""
        _link(cls)
        return cls._fields

    def encode(self) -> bytes:
        """Return the message in wire format.

        Raises:
            EncodeError: A value does not fit its field.
        """
        out = bytearray()
        _encode(self, out, 0)
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Self:
        """Decode a message from wire format.

        Raises:
            DecodeError: `data` is malformed, nested too deeply or has too many elements.
        """
        buf = bytes(data)
        message = cls()
        try:
            _decode(message, buf, 0, len(buf), 0, [MAX_ELEMENTS])
        except DecodeError as error:
            raise DecodeError(f"{cls.FULL_NAME}: {error}") from None
        except IndexError:
            raise DecodeError(f"{cls.FULL_NAME}: truncated") from None
        return message

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, by their names in the `.proto`; sub-messages as dicts, bytes unchanged."""
        plan = _link(type(self))
        out: dict[str, Any] = {}
        for field in plan.by_name.values():
            value = getattr(self, field.name)
            if value is None or (field.implicit and not value):
                continue
            if field.sub is None:
                out[field.name] = value.copy() if field.label in ("*", "%") else value
            elif field.label == "*":
                out[field.name] = [item.to_dict() for item in value]
            elif field.label == "%":
                out[field.name] = {key: item.to_dict() for key, item in value.items()}
            else:
                out[field.name] = value.to_dict()
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], unknown: list[str] | None = None) -> Self:
        """Build a message from `values`, in the form that `to_dict` returns.

        Args:
            values: Field -> value.
            unknown: Takes the names that are no fields, which are passed over then.

        Raises:
            DecodeError: A value has the wrong shape; or there is no field of that name, without `unknown`.
        """
        plan = _link(cls)
        message = cls()
        for name, value in values.items():
            field = plan.by_name.get(name)
            if field is None:
                if unknown is None:
                    raise DecodeError(f"{cls.FULL_NAME} has no field {name!r}")
                unknown.append(name)
                continue
            try:
                setattr(message, name, _from_plain(field, value, unknown))
            except DecodeError:
                raise
            except (TypeError, ValueError, AttributeError) as error:
                raise DecodeError(f"{cls.FULL_NAME}.{name}: {error}") from None
        return message

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __repr__(self) -> str:
        plan = self._plan or _compile(type(self))
        parts = []
        for field in plan.by_name.values():
            value = getattr(self, field.name)
            if value is None or (field.implicit and not value):
                continue
            if isinstance(value, bytes) and len(value) > 64:
                parts.append(f"{field.name}=<{len(value)} bytes>")
            else:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


class Field:
    """One field, as its `.proto` defines it.

    The generated tables write it as ``name:number:type``. The type is a scalar's name or ``@module.Message``, with a
    prefix ``*`` for repeated, ``?`` for optional, or ``%key:`` for a map with that key type.
    """

    __slots__ = ("key", "kind", "label", "name", "number", "sub")
    name: str

    def __init__(self, text: str) -> None:
        name, number, kind = text.split(":", 2)
        self.name = intern(name)
        self.number = int(number)
        self.label = kind[0] if kind[0] in "*?%" else ""
        self.key = ""
        if self.label:
            kind = kind[1:]
        if self.label == "%":
            self.key, kind = kind.split(":")
        self.kind = kind
        self.sub: type[Message] | None = None
        """Class of the sub-messages; None for scalars, and until `_link` has been called for the message."""

    @property
    def implicit(self) -> bool:
        """Whether the zero value is the same as absence."""
        return self.label in ("*", "%") or (not self.label and not self.kind.startswith("@"))


class Plan:
    """What instances of a class begin with, and its encoders and decoders.

    Made by `_compile`; encoders and decoders by `_compile_encoders` and `_compile_decoders`, None until then. Most
    messages only ever go in one of the two directions.
    """

    __slots__ = ("by_name", "containers", "decoders", "defaults", "encoders", "linked")

    def __init__(self) -> None:
        self.defaults: list[tuple[str, Any]] = []
        self.containers: list[tuple[str, Callable[[], Any]]] = []
        self.by_name: dict[str, Field] = {}
        self.linked = False
        """Whether the fields know the classes of their sub-messages."""
        self.encoders: Encoders | None = None
        self.decoders: Decoders | None = None


class Methods:
    """The methods of a service: a read-only mapping from name to (request class, response class)."""

    __slots__ = ("_lines",)

    def __init__(self, lines: dict[str, str]) -> None:
        self._lines = lines

    def __getitem__(self, method: str) -> tuple[type[Message], type[Message]]:
        request, response = self._lines[method].split()
        return _resolve(request), _resolve(response)

    def get(self, method: str) -> tuple[type[Message], type[Message]] | None:
        """The classes of `method`, or None."""
        return self[method] if method in self._lines else None

    def request_name(self, method: str) -> str:
        """Name of the class of a method's request, without making the class; empty for an unknown method."""
        return self._lines.get(method, "").partition(" ")[0].rpartition(".")[2]

    def __contains__(self, method: object) -> bool:
        return method in self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


def lazy_module(
    namespace: dict[str, Any], package: Mapping[str, str], messages: dict[str, str], enums: dict[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a generated module.

    Args:
        namespace: The module's globals; each class is stored there on first access.
        package: Protobuf package by message; the entry "" is for all other messages.
        messages: Fields by message, as `Field` reads them, separated by spaces.
        enums: Values by enum, as ``NAME=number``, separated by spaces.
    """
    module = namespace["__name__"]

    def module_getattr(name: str) -> Any:
        text = messages.get(name)
        if text is not None:
            fields = tuple([Field(item) for item in text.split()])
            body = {
                "__slots__": tuple([field.name for field in fields]),
                "__module__": module,
                "FULL_NAME": f"{package.get(name, package[''])}.{name}",
                "_fields": fields,
            }
            made = namespace[name] = type(name, (Message,), body)
            return made
        text = enums.get(name)
        if text is not None:
            values: dict[str, Any] = {key: int(value) for key, value in (v.split("=") for v in text.split())}
            values["__module__"] = module
            made = namespace[name] = type(name, (), values)
            return made
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def module_dir() -> list[str]:
        return sorted({*namespace, *messages, *enums})

    return module_getattr, module_dir


def _resolve(reference: str) -> type[Message]:
    """The class that ``@module.Message`` names; imports its generated module."""
    module, name = reference[1:].split(".")
    found: type[Message] = getattr(__import__(f"{__package__}.{module}_pb", None, None, [name]), name)
    return found


# ---- plans ----


def _compile(cls: type[Message]) -> Plan:
    plan = Plan()
    for field in cls._fields:
        plan.by_name[field.name] = field
        if field.label == "*":
            plan.containers.append((field.name, list))
        elif field.label == "%":
            plan.containers.append((field.name, dict))
        elif field.label == "?" or field.kind.startswith("@"):
            plan.defaults.append((field.name, None))
        else:
            plan.defaults.append((field.name, ZERO.get(field.kind, 0)))
    cls._plan = plan
    return plan


def _link(cls: type[Message]) -> Plan:
    """Have the fields of a message know the classes of their sub-messages; returns its plan."""
    plan = cls._plan or _compile(cls)
    if not plan.linked:
        for field in cls._fields:
            if field.kind.startswith("@"):
                field.sub = _resolve(field.kind)
        plan.linked = True
    return plan


def _compile_encoders(cls: type[Message]) -> Encoders:
    plan = _link(cls)
    # Fields are written in the order of their numbers, as by the official encoders.
    in_order = sorted(cls._fields, key=lambda field: field.number)
    plan.encoders = encoders = [(field.name, _field_encoder(field)) for field in in_order]
    return encoders


def _compile_decoders(cls: type[Message]) -> Decoders:
    plan = _link(cls)
    decoders: Decoders = {}
    for field in cls._fields:
        _add_decoders(decoders, field)
    plan.decoders = decoders
    return decoders


def _value_writer(kind: str, sub: type[Message] | None) -> Callable[[bytearray, Any, int], None]:
    """Like `scalar_writer`, but also for sub-messages; the function takes the depth of the enclosing message."""
    if sub is None:
        put_scalar = scalar_writer(kind)

        def put(out: bytearray, value: Any, depth: int) -> None:
            put_scalar(out, value)

    else:

        def put(out: bytearray, value: Any, depth: int) -> None:
            if type(value) is not sub:
                raise TypeError(f"{type(value).__name__} is not {sub.__name__}")
            body = bytearray()
            _encode(value, body, depth + 1)
            put_varint(out, len(body))
            out += body

    return put


def _field_encoder(field: Field) -> Callable[[Any, bytearray, int], None]:  # noqa: C901
    wire_type = wire_type_of(field.kind)
    put = _value_writer(field.kind, field.sub)
    key = field_key(field.number, wire_type)
    if field.label == "%":
        put_key = scalar_writer(field.key)
        map_key = field_key(field.number, 2)
        first, second = field_key(1, wire_type_of(field.key)), field_key(2, wire_type)

        def encode(value: Any, out: bytearray, depth: int) -> None:
            for name, item in value.items():
                entry = bytearray(first)
                put_key(entry, name)
                entry += second
                put(entry, item, depth)
                out += map_key
                put_varint(out, len(entry))
                out += entry

    elif field.label == "*" and wire_type == 2:

        def encode(value: Any, out: bytearray, depth: int) -> None:
            if isinstance(value, (str, bytes)):
                raise TypeError(f"{type(value).__name__} is not a list")
            for item in value:
                out += key
                put(out, item, depth)

    elif field.label == "*":
        packed_key = field_key(field.number, 2)

        def encode(value: Any, out: bytearray, depth: int) -> None:
            if not value:
                return
            body = bytearray()
            for item in value:
                put(body, item, depth)
            out += packed_key
            put_varint(out, len(body))
            out += body

    elif field.label == "?" or field.sub:

        def encode(value: Any, out: bytearray, depth: int) -> None:
            if value is not None:
                out += key
                put(out, value, depth)

    else:
        zero = ZERO.get(field.kind, 0)
        floating = isinstance(zero, float)

        def encode(value: Any, out: bytearray, depth: int) -> None:
            # Minus zero is not the default, and None or [] must not be taken for 0.
            if value or (floating and str(value) == "-0.0"):
                out += key
                put(out, value, depth)
            elif value != zero:
                raise TypeError(f"{value!r} is not of type {field.kind}")

    return encode


def _encode(message: Message, out: bytearray, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise EncodeError(f"messages nested deeper than {MAX_DEPTH}")
    cls = type(message)
    plan = cls._plan or _compile(cls)
    for name, encode in plan.encoders if plan.encoders is not None else _compile_encoders(cls):
        try:
            encode(getattr(message, name), out, depth)
        except EncodeError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise EncodeError(f"{message.FULL_NAME}.{name}: {error}") from None


def _add_decoders(decoders: Decoders, field: Field) -> None:  # noqa: C901
    name, number, sub = field.name, field.number, field.sub
    wire_type = wire_type_of(field.kind)
    if field.label == "%":
        decoders[number << 3 | 2] = _map_decoder(field)
        return
    if sub is not None:
        repeated = field.label == "*"

        def decode_message(
            message: Any, buf: bytes, pos: int, end: int, depth: int, budget: list[int]
        ) -> int:
            length, pos = get_varint(buf, pos)
            if pos + length > end:
                raise DecodeError("truncated")
            # A singular field that occurs twice is merged, as the specification demands.
            item = None if repeated else getattr(message, name)
            if item is None:
                item = sub()
                if repeated:
                    getattr(message, name).append(item)
                else:
                    setattr(message, name, item)
            budget[0] -= 1
            _decode(item, buf, pos, pos + length, depth + 1, budget)
            return pos + length

        decoders[number << 3 | 2] = decode_message
        return

    get = scalar_reader(field.kind)
    if field.label == "*":

        def decode_element(
            message: Any, buf: bytes, pos: int, end: int, depth: int, budget: list[int]
        ) -> int:
            value, pos = get(buf, pos, end)
            budget[0] -= 1
            getattr(message, name).append(value)
            return pos

        decoders[number << 3 | wire_type] = decode_element
        if wire_type != 2:

            def decode_packed(
                message: Any, buf: bytes, pos: int, end: int, depth: int, budget: list[int]
            ) -> int:
                length, pos = get_varint(buf, pos)
                stop = pos + length
                if stop > end:
                    raise DecodeError("truncated")
                values = getattr(message, name)
                room = budget[0]
                while pos < stop and room >= 0:
                    value, pos = get(buf, pos, stop)
                    values.append(value)
                    room -= 1
                budget[0] = room
                # With too many elements the caller raises, before millions of numbers are decoded.
                if pos != stop and room >= 0:
                    raise DecodeError("truncated")
                return pos

            decoders[number << 3 | 2] = decode_packed
        return

    def decode_scalar(message: Any, buf: bytes, pos: int, end: int, depth: int, budget: list[int]) -> int:
        value, pos = get(buf, pos, end)
        setattr(message, name, value)
        return pos

    decoders[number << 3 | wire_type] = decode_scalar


def _map_decoder(field: Field) -> Callable[[Any, bytes, int, int, int, list[int]], int]:
    """Decode a map: a repeated message with the fields 1 (key) and 2 (value). The last value of a key counts."""
    name, sub = field.name, field.sub
    get_key = scalar_reader(field.key)
    key_tag = 1 << 3 | wire_type_of(field.key)
    value_tag = 2 << 3 | wire_type_of(field.kind)
    zero_key = ZERO.get(field.key, 0)
    zero_value = ZERO.get(field.kind, 0)
    get_value = None if sub else scalar_reader(field.kind)

    def decode(message: Any, buf: bytes, pos: int, end: int, depth: int, budget: list[int]) -> int:
        length, pos = get_varint(buf, pos)
        stop = pos + length
        if stop > end:
            raise DecodeError("truncated")
        budget[0] -= 1
        key = zero_key
        value = zero_value if sub is None else sub()
        while pos < stop:
            tag, pos = get_tag(buf, pos)
            if tag == key_tag:
                key, pos = get_key(buf, pos, stop)
            elif tag != value_tag:
                pos = skip(buf, pos, stop, tag, depth + 1)
            elif get_value is not None:
                value, pos = get_value(buf, pos, stop)
            elif sub is not None:
                size, pos = get_varint(buf, pos)
                if pos + size > stop:
                    raise DecodeError("truncated")
                # Two levels deeper: the map's entry is a message too.
                _decode(value, buf, pos, pos + size, depth + 2, budget)
                pos += size
        if pos != stop:
            raise DecodeError("truncated")
        getattr(message, name)[key] = value
        return pos

    return decode


def _decode(message: Message, buf: bytes, pos: int, end: int, depth: int, budget: list[int]) -> None:
    if depth > MAX_DEPTH:
        raise DecodeError(f"messages nested deeper than {MAX_DEPTH}")
    cls = type(message)
    plan = cls._plan or _compile(cls)
    decoders = plan.decoders if plan.decoders is not None else _compile_decoders(cls)
    while pos < end:
        tag, pos = get_tag(buf, pos)
        decode = decoders.get(tag)
        if decode is None:
            pos = skip(buf, pos, end, tag, depth)
            continue
        pos = decode(message, buf, pos, end, depth, budget)
        if budget[0] < 0:
            raise DecodeError(f"more than {MAX_ELEMENTS} elements")
    # Varints are read without checking `end`; only the last one can have run over it.
    if pos != end:
        raise DecodeError("truncated")


def _from_plain(field: Field, value: Any, unknown: list[str] | None) -> Any:
    sub = field.sub
    if field.label == "*":
        if isinstance(value, (str, bytes)):
            raise TypeError(f"{type(value).__name__} is not a list")
        return [sub.from_dict(item, unknown) if sub else _checked(field.kind, item) for item in value]
    if field.label == "%":
        return {
            _checked(field.key, key): sub.from_dict(item, unknown) if sub else _checked(field.kind, item)
            for key, item in value.items()
        }
    if value is None and (sub or field.label == "?"):
        return None
    return sub.from_dict(value, unknown) if sub else _checked(field.kind, value)


def _checked(kind: str, value: Any) -> Any:
    scalar_writer(kind)(bytearray(), value)
    return value
