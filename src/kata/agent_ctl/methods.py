"""The methods that can be called: those of Kata's protocol by their names, our extensions as ``Service.Method``."""

from __future__ import annotations

import difflib

from kata.errors import UsageError
from kata.proto import agent_pb, agentext_pb, health_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kata.proto.codec import Message, Methods

AGENT = "grpc.AgentService"
HEALTH = "grpc.Health"

WAITING = frozenset({"WaitProcess", "GetOOMEvent", "ReadStdout", "ReadStderr", "WriteStdin"})
"""Calls that wait for an event in the guest; they have no timeout by default."""

CHANGES_MACHINE = frozenset(
    {
        *("CreateContainer", "CreateSandbox", "DestroySandbox", "UpdateEphemeralMounts", "CopyFile"),
        *("UpdateInterface", "UpdateRoutes", "AddARPNeighbors", "GetIPTables", "SetIPTables"),
        *("OnlineCPUMem", "MemHotplugByProbe", "SetGuestDateTime", "ReseedRandomDev"),
        *("AddSwap", "AddSwapPath", "ResizeVolume", "SetPolicy", "MemAgentMemcgSet", "MemAgentCompactSet"),
        "RemoveStaleVirtiofsShareMounts",
    }
)
"""Calls that change the machine itself. If the agent is an ordinary process, that is this machine."""


class Method:
    """One method.

    Attributes:
        name: Its name in this tool.
        service: Full name of its service.
        method: Its name in the service.
        request: Class of the request.
        response: Class of the answer.
    """

    __slots__ = ("method", "name", "request", "response", "service")

    def __init__(
        self, name: str, service: str, method: str, types: tuple[type[Message], type[Message]]
    ) -> None:
        self.name = name
        self.service = service
        self.method = method
        self.request, self.response = types

    @property
    def waits(self) -> bool:
        """Whether the call may wait indefinitely."""
        return self.name in WAITING


def _services() -> Iterable[tuple[str, Methods]]:
    yield from agent_pb.SERVICES.items()
    yield from health_pb.SERVICES.items()
    yield from agentext_pb.SERVICES.items()


def names() -> list[str]:
    """The names of all methods, service by service."""
    return [_name(service, method) for service, table in _services() for method in table]


def _name(service: str, method: str) -> str:
    if service in (AGENT, HEALTH):
        return method
    return f"{service.rpartition('.')[2]}.{method}"


def find(name: str) -> Method | None:
    """The method with exactly this name, which may be in full form (``grpc.Health/Check``); None if there is none."""
    for service, table in _services():
        for method in table:
            if name in (_name(service, method), f"{service}/{method}", f"{service}.{method}"):
                return Method(_name(service, method), service, method, table[method])
    return None


def get(name: str, others: Iterable[str] = ()) -> Method:
    """Find a method by name.

    Args:
        name: The name as the user wrote it.
        others: Further words to consider for the hint.

    Raises:
        UsageError: There is none; the hint has the nearest name.
    """
    found = find(name)
    if found is not None:
        return found
    raise UsageError(
        f"there is no method {name!r}", nearest(name, [*names(), *others]) or "--list shows them all"
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint ``did you mean ...?``; empty if no word is similar to *word*, ignoring case.

    Args:
        word: What the user wrote.
        known: Words that there are.
    """
    by_fold = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(word.casefold(), by_fold, 1)
    return f"did you mean {by_fold[near[0]]}?" if near else ""
