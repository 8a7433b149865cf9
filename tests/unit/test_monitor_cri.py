"""Pods' names from a CRI socket: a real gRPC server, and kata-monitor as a program."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from monitor_support import Engines, exposition, monitor, says, state
from waiting import until

from kata.proto.cri_pb import ListPodSandboxRequest, ListPodSandboxResponse, PodSandbox, PodSandboxMetadata


class Runtime:
    """A container runtime that lists pods.

    Args:
        path: Of its socket.
    """

    def __init__(self, path: Path) -> None:
        self.pods: dict[str, tuple[str, str, str]] = {}
        self.asked = 0
        self.silent = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.unary_unary_rpc_method_handler(
            self._list,
            request_deserializer=ListPodSandboxRequest.decode,
            response_serializer=ListPodSandboxResponse.encode,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("runtime.v1.RuntimeService", {"ListPodSandbox": handler}),)
        )
        self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    def _list(self, request: Any, context: Any) -> ListPodSandboxResponse:
        self.asked += 1
        if self.silent.is_set():
            time.sleep(60)
        items = [
            PodSandbox(id=one, metadata=PodSandboxMetadata(uid=uid, name=name, namespace=space))
            for one, (uid, name, space) in self.pods.items()
        ]
        return ListPodSandboxResponse(items=items)

    def close(self) -> None:
        self._server.stop(None)


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    one = Engines(tmp_path)
    yield one
    one.close()


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    one = Runtime(tmp_path / "cri.sock")
    yield one
    one.close()


def test_pods_get_their_names(engines: Engines, runtime: Runtime, tmp_path: Path) -> None:
    engines.add("k8s.io.one", says(exposition(1), document=state("one")), sandbox_id="one")
    engines.add("mine", says(exposition(2)))
    runtime.pods = {"one": ("u-1", 'na"me', "space"), "other": ("u", "n", "s")}
    with monitor(engines.run_directory, "--runtime-endpoint", f"unix://{tmp_path / 'cri.sock'}") as one:

        def labels() -> str:
            return one.get("/metrics?filter_family=kata_monitor_sandbox_up").text

        named = 'kata_monitor_sandbox_up{cri_name="na\\"me",cri_namespace="space",cri_uid="u-1",sandbox_id="one"} 1\n'
        until(lambda: named in labels(), "the pod's name is known", labels)
        assert 'kata_monitor_sandbox_up{sandbox_id="mine"} 1\n' in labels()
        load = 'kata_guest_load{sandbox_id="one",cri_uid="u-1",cri_name="na\\"me",cri_namespace="space",item="load1"} '
        assert load in one.get("/metrics").text
        found = {each["id"]: each["cri"] for each in one.get("/api/v1/sandboxes").json["sandboxes"]}
        assert found == {"one": {"uid": "u-1", "name": 'na"me', "namespace": "space"}, "mine": None}
        # Idle, it asks nobody, nor does it keep the library that would wake it up.
        time.sleep(1.0)
        before = (runtime.asked, one.switches())
        time.sleep(2.0)
        assert (runtime.asked, one.switches()) == before
        # A sandbox that comes is asked for, also one whose pod is listed later than its socket is there.
        engines.add("k8s.io.two", says(exposition(3)), sandbox_id="two")
        until(lambda: runtime.asked > before[0], "the runtime is asked")
        runtime.pods["two"] = ("u-2", "second", "space")
        until(lambda: 'cri_uid="u-2",sandbox_id="two"' in labels(), "the second pod's name is known", labels)


def test_a_runtime_that_is_silent_or_absent_holds_nobody_up(
    engines: Engines, runtime: Runtime, tmp_path: Path
) -> None:
    engines.add("one", says(exposition(1)))
    runtime.silent.set()
    with monitor(engines.run_directory, "--runtime-endpoint", str(tmp_path / "cri.sock")) as one:
        until(lambda: runtime.asked > 0, "the runtime is asked")
        started = time.monotonic()
        assert 'kata_guest_load{sandbox_id="one",' in one.get("/metrics").text
        assert time.monotonic() - started < 3
        until(lambda: "DEADLINE_EXCEEDED" in one.log.read_text(), "it is said", one.log.read_text)
    with monitor(engines.run_directory, "--runtime-endpoint", str(tmp_path / "none.sock")) as one:
        assert 'kata_guest_load{sandbox_id="one",' in one.get("/metrics").text
        time.sleep(1.0)
        assert "pods" not in one.log.read_text()


def test_what_is_no_pod_is_not_asked_for_again_and_again(
    engines: Engines, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    from kata.monitor import cri

    monkeypatch.setattr(cri, "SETTLE_S", 0.0)
    monkeypatch.setattr(cri, "AGAIN_S", 0.0)

    async def asked() -> list[int]:
        pods = cri.Pods([str(tmp_path / "cri.sock")])
        counts = []
        pods.now_there(["mine"])
        for _ in range(cri.ATTEMPTS + 3):
            pods.look_again()
            while pods.busy:
                await asyncio.sleep(0.01)
            counts.append(runtime.asked)
        await pods.close()
        return counts

    assert asyncio.run(asked())[-1] == cri.ATTEMPTS
