"""Lists pods by CRI's ``ListPodSandbox`` and prints them as JSON; a process of its own, see `kata.monitor.cri`."""

from __future__ import annotations

import json
import sys

import grpc

from kata.proto.cri_pb import ListPodSandboxRequest, ListPodSandboxResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CALL_S = 4.0
"""Deadline of the call to one runtime."""
MAX_MESSAGE_BYTES = 16 << 20
METHOD = "/runtime.v1.RuntimeService/ListPodSandbox"


def pods(path: str) -> dict[str, tuple[str, str, str]]:
    """The pods of the runtime behind a CRI socket: sandbox id -> uid, name and namespace.

    Raises:
        grpc.RpcError: It does not answer, or knows no CRI.
    """
    options = [
        ("grpc.enable_http_proxy", 0),
        ("grpc.default_authority", "localhost"),  # else the path, which HTTP/2 servers in Go refuse
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ]
    with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
        call = channel.unary_unary(
            METHOD,
            request_serializer=ListPodSandboxRequest.encode,
            response_deserializer=ListPodSandboxResponse.decode,
        )
        answer = call(ListPodSandboxRequest(), timeout=CALL_S)
    found = {}
    for item in answer.items:
        metadata = item.metadata
        if item.id and metadata is not None:
            found[item.id] = (metadata.uid, metadata.name, metadata.namespace)
    return found


def main(endpoints: Sequence[str]) -> int:
    """List the pods behind all of *endpoints*, and print them with what went wrong.

    Returns:
        0: that a runtime does not answer is part of the output.
    """
    found: dict[str, tuple[str, str, str]] = {}
    problems = []
    for path in endpoints:
        try:
            found |= pods(path)
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
            problems.append(f"{path}: {code}")
    sys.stdout.write(json.dumps({"pods": found, "problems": problems}))
    return 0
