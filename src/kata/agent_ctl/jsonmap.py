"""Converts messages from and to JSON, by proto3's mapping (https://protobuf.dev/programming-guides/json/).

Input: field names as in the ``.proto`` or in lowerCamelCase, 64-bit integers as numbers or strings, bytes as base64
(standard or URL alphabet, padding optional), enums by name or number, null for absent. As an extension, names may
differ in case and hyphens, and ``ociVersion`` is accepted for the spec's ``Version``, so that an OCI ``config.json``
can be used as a Spec.

Output: 64-bit integers as strings, bytes as padded base64, enums by name. By default, names are as in the ``.proto``
and fields with zero values are included; the mapping allows both.
"""

from __future__ import annotations

import base64
import binascii

from kata.agent_ctl.methods import nearest
from kata.errors import UsageError
from kata.proto import csi_pb, health_pb, types_pb
from kata.proto.codec import MAX_DEPTH, EncodeError
from kata.proto.wire import scalar_writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from kata.proto.codec import Field, Message

    M = TypeVar("M", bound=Message)

_ENUMS: dict[str, type[Any]] = {
    "types.IPAddress.family": types_pb.IPFamily,
    "types.Route.family": types_pb.IPFamily,
    "grpc.FSGroup.group_change_policy": types_pb.FSGroupChangePolicy,
    "grpc.VolumeUsage.unit": csi_pb.VolumeUsage_Unit,
    "grpc.HealthCheckResponse.status": health_pb.HealthCheckResponse_ServingStatus,
}
"""Enum classes of fields: the generated tables only say that a field is an enum, not which one."""

_ALIASES = {"ociversion": "version"}
_WIDE = ("int64", "uint64")


def _folded(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()


def camel(name: str) -> str:
    """Return a field's name in lowerCamelCase: without underscores, the letter after each in upper case."""
    head, *rest = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


def enum_values(cls: type[Message], field: Field) -> dict[str, int]:
    """The numbers of an enum field's values, by name; empty if the enum is unknown here."""
    enum = _ENUMS.get(f"{cls.FULL_NAME}.{field.name}")
    return {name: value for name, value in vars(enum).items() if isinstance(value, int)} if enum else {}


def find_field(cls: type[Message], name: str, where: str) -> Field:
    """Find the field with a name.

    Args:
        cls: The message's class.
        name: The field's name, in the `.proto`'s or in JSON's form.
        where: Where in the document it is, for errors.

    Raises:
        UsageError: There is none; the hint has the nearest name.
    """
    fields = cls.fields()
    for field in fields:
        if name in (field.name, camel(field.name)):
            return field
    wanted = _folded(name)
    for candidate in (wanted, _ALIASES.get(wanted)):
        for field in fields:
            if _folded(field.name) == candidate:
                return field
    known = [field.name for field in fields]
    if not known:
        raise UsageError(f"{where}: {cls.__name__} has no fields, so there is no {name!r}", "leave it out")
    hint = nearest(name, known) or f"it has {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    raise UsageError(f"{where}: {cls.__name__} has no field {name!r}", hint)


# ---- reading ----


def from_json(cls: type[M], value: Any, where: str = "") -> M:
    """Convert a parsed JSON value to a message.

    Args:
        cls: Class of the message.
        value: A JSON object.
        where: Its name in error messages; if empty, the class's name.

    Raises:
        UsageError: The value does not fit; the message says which part of it.
    """
    return _message(cls, value, where or cls.__name__, 0)


def _message(cls: type[M], value: Any, where: str, depth: int) -> M:
    if depth > MAX_DEPTH:
        raise UsageError(f"{where}: nested deeper than {MAX_DEPTH}")
    if not isinstance(value, dict):
        raise UsageError(
            f"{where}: {_shortened(value)} is not a JSON object", f"a {cls.__name__} is written {{...}}"
        )
    message = cls()
    given: dict[str, str] = {}
    for name, item in value.items():
        field = find_field(cls, name, where)
        if field.name in given:
            raise UsageError(f"{where}: {given[field.name]!r} and {name!r} are the same field")
        given[field.name] = name
        if item is not None:
            setattr(message, field.name, _field(cls, field, item, f"{where}.{field.name}", depth))
    return message


def _field(cls: type[Message], field: Field, value: Any, where: str, depth: int) -> Any:
    if field.label == "*":
        if not isinstance(value, list):
            raise UsageError(
                f"{where}: {_shortened(value)} is not a list", "a repeated field is written [...]"
            )
        return [_single(cls, field, item, f"{where}[{at}]", depth) for at, item in enumerate(value)]
    if field.label == "%":
        if not isinstance(value, dict):
            raise UsageError(f"{where}: {_shortened(value)} is not a JSON object", "a map is written {...}")
        return {
            str(key): _single(cls, field, item, f"{where}[{key!r}]", depth) for key, item in value.items()
        }
    return _single(cls, field, value, where, depth)


def _single(cls: type[Message], field: Field, value: Any, where: str, depth: int) -> Any:
    if field.sub is not None:
        return _message(field.sub, value, where, depth + 1)
    kind = field.kind
    if kind == "string":
        if not isinstance(value, str):
            raise UsageError(f"{where}: {_shortened(value)} is not a string")
        found: Any = value
    elif kind == "bytes":
        found = read_base64(value, where)
    elif kind == "bool":
        if not isinstance(value, bool):
            raise UsageError(f"{where}: {_shortened(value)} is neither true nor false")
        found = value
    elif kind == "enum":
        found = read_enum(cls, field, value, where)
    else:
        found = _integer(kind, value, where)
    check(kind, found, where)
    return found


def check(kind: str, value: Any, where: str) -> None:
    """Check that a value fits its field.

    Args:
        kind: Type of the field, as in a `.proto`.
        value: The value.
        where: Where in the document it is, for errors.

    Raises:
        UsageError: It does not.
    """
    try:
        scalar_writer(kind)(bytearray(), value)
    except UnicodeEncodeError:
        raise UsageError(f"{where}: the text has characters that UTF-8 cannot carry") from None
    except (EncodeError, ValueError, TypeError):
        raise UsageError(f"{where}: {_shortened(value)} does not fit into {kind}") from None


def _integer(kind: str, value: Any, where: str) -> int:
    if isinstance(value, str):
        try:
            if value.strip() != value or "_" in value:
                raise ValueError
            return int(value)
        except ValueError:
            pass
    elif isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise UsageError(f"{where}: {_shortened(value)} is not an integer ({kind})")


def read_base64(value: Any, where: str) -> bytes:
    """Decode base64.

    Args:
        value: What the document has there.
        where: Where in the document it is, for errors.

    Raises:
        UsageError: It is malformed.
    """
    if isinstance(value, str):
        text = value.replace("-", "+").replace("_", "/").rstrip("=")
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            pass
    raise UsageError(f"{where}: {_shortened(value)} is not base64")


def read_enum(cls: type[Message], field: Field, value: Any, where: str) -> int:
    """Return an enum's number, given its name or a number.

    Args:
        cls: The message's class.
        field: The field.
        value: What the document has there.
        where: Where in the document it is, for errors.

    Raises:
        UsageError: There is no such name.
    """
    values = enum_values(cls, field)
    if isinstance(value, str) and value in values:
        return values[value]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = f"{where}: {_shortened(value)} is none of {', '.join(values)}"
    raise UsageError(text, nearest(value, values) if isinstance(value, str) else "")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- writing ----


def to_json(message: Message, *, camel_case: bool = False, defaults: bool = True) -> dict[str, Any]:
    """Convert a message to a JSON object.

    Args:
        message: The message.
        camel_case: Names in lowerCamelCase instead of those in the ``.proto``.
        defaults: Include fields with zero values; absent sub-messages and `optional` fields are never included.
    """
    cls = type(message)
    out: dict[str, Any] = {}
    for field in cls.fields():
        value = getattr(message, field.name)
        if value is None or (field.implicit and not value and not defaults):
            continue
        name = camel(field.name) if camel_case else field.name
        if field.label == "*":
            out[name] = [_written(cls, field, item, camel_case, defaults) for item in value]
        elif field.label == "%":
            out[name] = {
                str(key): _written(cls, field, item, camel_case, defaults) for key, item in value.items()
            }
        else:
            out[name] = _written(cls, field, value, camel_case, defaults)
    return out


def _written(cls: type[Message], field: Field, value: Any, camel_case: bool, defaults: bool) -> Any:
    if field.sub is not None:
        return to_json(value, camel_case=camel_case, defaults=defaults)
    if field.kind in _WIDE:
        return str(value)
    if field.kind == "bytes":
        return base64.b64encode(value).decode()
    if field.kind == "enum":
        return next((name for name, number in enum_values(cls, field).items() if number == value), value)
    if field.kind == "bool":
        return bool(value)
    return value
