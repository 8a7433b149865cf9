"""The message codec: against Google's protobuf as the oracle, and against malice."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kata.proto import agent_pb, agentext_pb, cgroups_v2_pb, health_pb, oci_pb, task_pb, types_pb
from kata.proto.codec import MAX_DEPTH, MAX_ELEMENTS, DecodeError, EncodeError, Message
from kata.proto.wire import put_varint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

descriptor_pool = pytest.importorskip(
    "google.protobuf.descriptor_pool", reason="needs Google's protobuf (tools/setup test)"
)
pytest.importorskip("grpc_tools", reason="needs grpcio-tools (tools/setup test)")

import protogen  # noqa: E402
from google.protobuf import message_factory  # noqa: E402
from google.protobuf.message import DecodeError as OracleDecodeError  # noqa: E402

MODULES = protogen.load(descriptors := protogen.compile_protos())
POOL = descriptor_pool.DescriptorPool()
for _file in descriptors.file:
    POOL.Add(_file)

CLASSES: list[type[Message]] = [
    getattr(importlib.import_module(f"kata.proto.{module.name}_pb"), message.name)
    for module in MODULES
    for message in module.messages
]

QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=150)

RANGES = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
    "enum": (0, 1),
}


def oracle(cls: type[Message]) -> Any:
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(cls.FULL_NAME))


def scalars(kind: str) -> st.SearchStrategy[Any]:
    if kind == "string":
        return st.text(max_size=20)
    if kind == "bytes":
        return st.binary(max_size=20)
    if kind == "bool":
        return st.booleans()
    if kind in ("double", "float"):
        return st.floats(allow_nan=False, width=64 if kind == "double" else 32)
    low, high = RANGES[kind]
    return st.integers(low, high) | st.sampled_from([low, high, 0, 1, 127, 128]).filter(
        lambda value: low <= value <= high
    )


@st.composite
def plain(draw: st.DrawFn, cls: type[Message], depth: int = 0) -> dict[str, Any]:
    """The fields of a message as `to_dict` has them, some left out."""
    made: dict[str, Any] = {}
    for field in cls._fields:
        if not draw(st.booleans()):
            continue
        if field.kind.startswith("@"):
            if depth > 2:
                continue
            module, name = field.kind[1:].split(".")
            value = plain(getattr(importlib.import_module(f"kata.proto.{module}_pb"), name), depth + 1)
        else:
            value = scalars(field.kind)
        if field.label == "*":
            made[field.name] = draw(st.lists(value, max_size=3))
        elif field.label == "%":
            made[field.name] = draw(st.dictionaries(scalars(field.key), value, max_size=3))
        else:
            made[field.name] = draw(value)
    return made


def is_map(target: Any, name: str) -> bool:
    return bool(target.DESCRIPTOR.fields_by_name[name].message_type.GetOptions().map_entry)


def fill(target: Any, values: dict[str, Any]) -> Any:
    """The oracle's message with these fields."""
    for name, value in values.items():
        if isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    fill(getattr(target, name).add(), item)
                else:
                    getattr(target, name).append(item)
        elif isinstance(value, dict) and is_map(target, name):
            for key, item in value.items():
                if isinstance(item, dict):
                    fill(getattr(target, name)[key], item)
                else:
                    getattr(target, name)[key] = item
        elif isinstance(value, dict):
            getattr(target, name).SetInParent()
            fill(getattr(target, name), value)
        else:
            setattr(target, name, value)
    return target


@QUIET
@given(st.data())
def test_what_we_encode_the_oracle_reads_and_the_other_way_round(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(CLASSES))
    values = data.draw(plain(cls))
    ours = cls.from_dict(values)
    theirs = fill(oracle(cls)(), values)
    assert oracle(cls).FromString(ours.encode()) == theirs
    assert cls.decode(theirs.SerializeToString()) == ours
    assert cls.from_dict(ours.to_dict()) == ours
    assert cls.decode(ours.encode()) == ours


@QUIET
@given(st.data())
def test_malformed_input_is_refused_when_the_oracle_refuses_it(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(CLASSES))
    raw = bytearray(cls.from_dict(data.draw(plain(cls))).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw += data.draw(st.binary(max_size=8))
    try:
        ours = cls.decode(bytes(raw))
    except DecodeError as error:
        # Field number 0 is invalid; not every official decoder minds.
        if "invalid field tag" not in str(error):
            with pytest.raises(OracleDecodeError):
                oracle(cls).FromString(bytes(raw))
        return
    theirs = oracle(cls).FromString(bytes(raw))
    theirs.DiscardUnknownFields()
    again = oracle(cls).FromString(ours.encode())
    assert again.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


@QUIET
@given(st.sampled_from(CLASSES), st.binary(max_size=200))
def test_garbage_never_raises_anything_else(cls: type[Message], raw: bytes) -> None:
    with contextlib.suppress(DecodeError):
        cls.decode(raw)


def test_the_generated_files_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "protogen.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_method_of_every_service_resolves() -> None:
    methods = 0
    for module in MODULES:
        table = getattr(importlib.import_module(f"kata.proto.{module.name}_pb"), "SERVICES", {})
        # A service of streaming methods alone has no table: those are not called by it.
        assert set(table) == {service.name for service in module.services if service.methods}
        for service in table.values():
            for name in service:
                request, response = service[name]
                assert issubclass(request, Message)
                assert issubclass(response, Message)
                methods += 1
    assert len(agent_pb.SERVICES["grpc.AgentService"]) == 42
    assert methods > 42
    assert task_pb.SERVICES["containerd.task.v2.Task"].get("Nope") is None


# ---- bounds ----


def group_bomb(depth: int) -> bytes:
    return b"\x9b\x06" * depth + b"\x9c\x06" * depth


def test_unknown_groups_are_skipped_up_to_a_depth() -> None:
    assert types_pb.Route.decode(group_bomb(MAX_DEPTH) + b"\x0a\x01x").dest == "x"
    with pytest.raises(DecodeError, match="nested deeper"):
        types_pb.Route.decode(group_bomb(MAX_DEPTH + 1))
    with pytest.raises(DecodeError, match="nested deeper"):
        types_pb.Route.decode(b"\x9b\x06" * 2_000_000)
    with pytest.raises(DecodeError, match="not begun"):
        types_pb.Route.decode(b"\x9b\x06\x94\x06")


def test_a_million_empty_messages_are_refused() -> None:
    with pytest.raises(DecodeError, match="elements"):
        agent_pb.Interfaces.decode(b"\x0a\x00" * (MAX_ELEMENTS + 1))
    assert len(agent_pb.Interfaces.decode(b"\x0a\x00" * 1000).Interfaces) == 1000
    packed = b"\x01" * (MAX_ELEMENTS + 1)
    with pytest.raises(DecodeError, match="elements"):
        agent_pb.CpuUsage.decode(b"\x12\x81\x80\x08" + packed)


def four_mebibytes(key: bytes, element: bytes, *, packed: bool = False) -> bytes:
    """As long a message as a frame may hold, of one field again and again."""
    size = (4 << 20) - 8
    if not packed:
        return (key + element) * (size // len(key + element))
    content = element * (size // len(element))
    length = bytearray()
    put_varint(length, len(content))
    return key + bytes(length) + content


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        # What hostile guests can answer: lists of messages, of texts in messages, maps, numbers of 2 bytes.
        (agent_pb.Interfaces, four_mebibytes(b"\x0a", b"\0")),
        (agentext_pb.ListProcessesResponse, four_mebibytes(b"\x0a", b"\0")),
        (agentext_pb.ListProcessesResponse, four_mebibytes(b"\x0a", b"\x08" + b"\x42\0" * 4)),
        (agent_pb.MemoryStats, four_mebibytes(b"\x32", b"\0")),
        (agent_pb.CgroupStats, four_mebibytes(b"\x2a", b"\0")),
        (agent_pb.CpuUsage, four_mebibytes(b"\x12", b"\x80\x04", packed=True)),
        (agent_pb.CpuUsage, four_mebibytes(b"\x10", b"\x80\x04")),
    ],
)
def test_what_is_small_on_the_wire_stays_small_in_memory(kind: type[Message], raw: bytes) -> None:
    kind.decode(b"")  # its plan is made once and stays
    tracemalloc.start()
    try:
        with contextlib.suppress(DecodeError):
            kind.decode(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x0a", "truncated"),
        (b"\x0a\x05abc", "truncated"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "truncated"),
        (b"\x20\x80", "truncated"),
        (b"\x20" + b"\x80" * 10 + b"\x01", "longer than 10"),
        (b"\x0a\x01\xff", "UTF-8"),
        (b"\x0e", "wire type 6"),
        (b"\x00\x00", "tag 0"),
        (b"\xff\xff\xff\xff\xff\x01", "tag"),
    ],
)
def test_malformed(raw: bytes, words: str) -> None:
    with pytest.raises(DecodeError, match=words):
        types_pb.Interface.decode(raw)


def test_a_nested_length_cannot_reach_beyond_its_parent() -> None:
    # The inner string claims the bytes that follow the address.
    with pytest.raises(DecodeError, match="truncated"):
        types_pb.Interface.decode(b"\x1a\x03\x12\x03a" + b"bc\x20\x01")
    with pytest.raises(DecodeError, match="truncated"):
        types_pb.Interface.decode(b"\x1a\x02\x08\x80" + b"\x01")


# ---- values ----


@pytest.mark.parametrize(
    "message",
    [
        agent_pb.SignalProcessRequest(signal=-1),
        agent_pb.SignalProcessRequest(signal=2**32),
        agent_pb.SignalProcessRequest(signal="9"),  # type: ignore[arg-type]
        agent_pb.SignalProcessRequest(container_id=None),  # type: ignore[arg-type]
        agent_pb.SignalProcessRequest(container_id=b"x"),  # type: ignore[arg-type]
        agent_pb.SignalProcessRequest(container_id="\ud800"),
        agent_pb.WriteStreamRequest(data="x"),  # type: ignore[arg-type]
        agent_pb.ExecProcessRequest(process=types_pb.Route()),  # type: ignore[arg-type]
        oci_pb.Process(Args="sh"),  # type: ignore[arg-type]
        oci_pb.Linux(Sysctl={"a": 1}),  # type: ignore[dict-item]
        cgroups_v2_pb.PSIData(avg10="1"),  # type: ignore[arg-type]
    ],
)
def test_a_value_that_does_not_fit_is_an_error(message: Message) -> None:
    with pytest.raises(EncodeError, match=message.FULL_NAME):
        message.encode()


def test_absence_and_zero() -> None:
    assert oci_pb.LinuxSyscall.decode(oci_pb.LinuxSyscall().encode()).errnoret is None
    assert oci_pb.LinuxSyscall.decode(oci_pb.LinuxSyscall(errnoret=0).encode()).errnoret == 0
    assert agentext_pb.WriteFileRequest(mode=0).encode() != agentext_pb.WriteFileRequest().encode()
    assert agent_pb.ExecProcessRequest().process is None
    assert agent_pb.ExecProcessRequest(process=oci_pb.Process()).encode() == b"\x22\x00"
    assert cgroups_v2_pb.PSIData(avg10=-0.0).encode() != b""
    first, second = oci_pb.Process(), oci_pb.Process()
    first.Args.append("sh")
    assert second.Args == []


def test_a_singular_message_that_comes_twice_is_merged() -> None:
    one = agent_pb.ExecProcessRequest(process=oci_pb.Process(Cwd="/", Args=["a"])).encode()
    two = agent_pb.ExecProcessRequest(process=oci_pb.Process(Cwd="/b", Args=["c"])).encode()
    process = agent_pb.ExecProcessRequest.decode(one + two).process
    assert process == oci_pb.Process(Cwd="/b", Args=["a", "c"])


def test_names_that_do_not_exist() -> None:
    with pytest.raises(TypeError, match="no field 'nope'"):
        types_pb.Route(nope=1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        types_pb.Route().nope = 1  # type: ignore[attr-defined]
    with pytest.raises(DecodeError, match="no field 'nope'"):
        types_pb.Route.from_dict({"nope": 1})
    with pytest.raises(DecodeError, match=r"Route\.mtu"):
        types_pb.Route.from_dict({"mtu": "1500"})
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = types_pb.Nope  # type: ignore[attr-defined]


def test_how_a_message_looks() -> None:
    route = types_pb.Route(dest="10.0.0.0/8", family=types_pb.IPFamily.v6)
    assert repr(route) == "Route(dest='10.0.0.0/8', family=1)"
    assert "<1000 bytes>" in repr(agent_pb.WriteStreamRequest(data=bytes(1000)))
    assert route.to_dict() == {"dest": "10.0.0.0/8", "family": 1}
    assert health_pb.HealthCheckResponse_ServingStatus.SERVING == 1
    assert task_pb.Mount.FULL_NAME == "containerd.types.Mount"
    assert "Route" in dir(types_pb)


def test_the_codec_imports_nothing() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
        "from kata.proto import agent_pb, oci_pb, task_pb, types_pb\n"
        "agent_pb.ExecProcessRequest.decode(agent_pb.ExecProcessRequest(process=oci_pb.Process()).encode())\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, ROOT / "src"], capture_output=True, text=True, check=True
    )
    assert {name for name in done.stdout.split() if not name.startswith("kata")} <= {"__future__"}
