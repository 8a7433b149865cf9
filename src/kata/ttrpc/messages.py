"""Types of callers' arguments, for type checkers; not imported at run time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, Self, TypeVar


class Encodable(Protocol):
    """A request."""

    def encode(self) -> bytes:
        """Wire format; ValueError when a value does not fit."""


class Decodable(Protocol):
    """A response."""

    @classmethod
    def decode(cls, data: bytes, /) -> Self:
        """From wire format; ValueError when it is not one."""


class Socket(Protocol):
    """What the synchronous client needs of a connected stream socket; `_socket.socket` will do."""

    def fileno(self) -> int:
        """The descriptor."""

    def setblocking(self, flag: bool, /) -> None:
        """Choose between waiting and BlockingIOError."""

    def send(self, data: bytes | memoryview, /) -> int:
        """Write some."""

    def recv(self, size: int, /) -> bytes:
        """Read some; empty at the end."""

    def shutdown(self, how: int, /) -> None:
        """End reading and writing; OSError when the other side has."""

    def close(self) -> None:
        """Close it."""


class MethodTable(Protocol):
    """A service's methods: name to (request class, response class)."""

    def __contains__(self, method: object, /) -> bool:
        """Whether there is such a method."""

    def __getitem__(self, method: str, /) -> tuple[type[Decodable], type[Encodable]]:
        """Its classes."""

    def __iter__(self) -> Iterator[str]:
        """The names."""


R = TypeVar("R", bound=Decodable)
