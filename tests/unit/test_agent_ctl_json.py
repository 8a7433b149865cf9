"""kata-agent-ctl: requests from words and JSON, answers as JSON; Google's protobuf is the oracle of the mapping."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from kata.agent_ctl import fuzz_cases, jsonmap, methods, request
from kata.errors import UsageError
from kata.proto import agent_pb, csi_pb, health_pb, oci_pb, types_pb
from kata.proto.codec import Message

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

ALL = [method for method in map(methods.find, methods.names()) if method is not None]


def reachable() -> list[type[Message]]:
    """Every message class that a call can carry."""
    found: list[type[Message]] = []
    queue = [cls for method in ALL for cls in (method.request, method.response)]
    while queue:
        cls = queue.pop()
        if cls not in found:
            found.append(cls)
            queue += [field.sub for field in cls.fields() if field.sub is not None]
    return found


def build(name: str, *words: str) -> Any:
    return request.build(methods.get(name), words)


# ---- methods ----


def test_every_method_of_the_protocol_is_there() -> None:
    text = (ROOT / "src/kata/proto/agent.proto").read_text() + (
        ROOT / "src/kata/proto/health.proto"
    ).read_text()
    declared = [line.split()[1].partition("(")[0] for line in text.splitlines() if line.startswith("  rpc ")]
    assert len(declared) == 44
    assert set(declared) <= set(methods.names())
    assert len(set(methods.names())) == len(methods.names())
    assert set(methods.names()) >= methods.WAITING | methods.CHANGES_MACHINE


def test_methods_are_found_in_full_and_misspelt_ones_named() -> None:
    for name in ("Check", "grpc.Health/Check", "grpc.Health.Check"):
        assert methods.get(name).method == "Check"
    assert methods.get("Files.Stat").service == "kata.agent.v1.Files"
    with pytest.raises(UsageError, match="no method 'getmetrics'") as caught:
        methods.get("getmetrics")
    assert caught.value.hint == "did you mean GetMetrics?"


# ---- the mapping ----


@pytest.fixture(scope="module")
def oracle() -> Any:
    """Makes Google's class for one of ours."""
    descriptor_pool = pytest.importorskip(
        "google.protobuf.descriptor_pool", reason="needs Google's protobuf (tools/setup test)"
    )
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools (tools/setup test)")
    import protogen
    from google.protobuf import message_factory

    pool = descriptor_pool.DescriptorPool()
    for file in protogen.compile_protos().file:
        pool.Add(file)
    return lambda cls: message_factory.GetMessageClass(pool.FindMessageTypeByName(cls.FULL_NAME))


def test_json_is_what_googles_library_writes_and_reads(oracle: Any) -> None:
    from google.protobuf import json_format

    rng = random.Random(4711)
    for cls in reachable():
        for _ in range(3):
            message = fuzz_cases._message(rng, cls, 0)
            theirs = oracle(cls)()
            theirs.ParseFromString(message.encode())
            assert jsonmap.to_json(message, defaults=False) == json_format.MessageToDict(
                theirs, preserving_proto_field_name=True
            )
            short = jsonmap.to_json(message, camel_case=True, defaults=False)
            assert short == json_format.MessageToDict(theirs)
            assert jsonmap.from_json(cls, short) == message
            full = jsonmap.to_json(message)
            assert jsonmap.from_json(cls, json.loads(json.dumps(full))) == message
            assert json_format.ParseDict(full, oracle(cls)()) == theirs


def test_every_enum_field_has_its_names(oracle: Any) -> None:
    for cls in reachable():
        for field in cls.fields():
            theirs = oracle(cls).DESCRIPTOR.fields_by_name[field.name].enum_type
            names = {value.name: value.number for value in theirs.values} if theirs else {}
            assert jsonmap.enum_values(cls, field) == names, (
                f"_ENUMS in jsonmap.py: {cls.FULL_NAME}.{field.name}"
            )


def test_names_stay_apart_without_case_and_underscores() -> None:
    for cls in reachable():
        folded = [jsonmap._folded(field.name) for field in cls.fields()]
        assert len(set(folded)) == len(folded), cls


def test_what_the_mapping_allows_is_read() -> None:
    route = jsonmap.from_json(types_pb.Route, {"mtu": "1500", "scope": 2.0, "family": "v6", "dest": None})
    assert route == types_pb.Route(mtu=1500, scope=2, family=1)
    for text in ("_-8=", "/+8=", "_-8"):
        assert jsonmap.from_json(agent_pb.WriteStreamRequest, {"data": text}).data == b"\xff\xef"
    assert jsonmap.from_json(types_pb.Route, {"family": 1}).family == 1
    assert jsonmap.from_json(agent_pb.MemAgentMemcgConfig, {"swap": False}).swap is False
    assert jsonmap.from_json(agent_pb.MemAgentMemcgConfig, {}).swap is None
    for name in ("container_id", "containerId", "Container-ID"):
        assert jsonmap.from_json(agent_pb.StartContainerRequest, {name: "x"}).container_id == "x"


def test_a_runtime_spec_can_be_given_as_it_is() -> None:
    process = {
        "args": ["sh"],
        "user": {"uid": 1, "additionalGids": [2]},
        "noNewPrivileges": True,
        "oomScoreAdj": -5,
        "capabilities": {"bounding": ["CAP_KILL"]},
    }
    linux = {
        "uidMappings": [{"hostID": 0, "containerID": 1, "size": 2}],
        "maskedPaths": ["/proc/kcore"],
        "resources": {"cpu": {"quota": 5}, "blockIO": {"weight": 10}, "memory": {"limit": 7}},
        "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["ptrace"], "errnoRet": 1}]},
    }
    mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}]
    spec = {
        "ociVersion": "1.1.0",
        "process": process,
        "root": {"path": "/r", "readonly": True},
        "mounts": mounts,
    }
    assert jsonmap.from_json(oci_pb.Spec, {**spec, "hostname": "box", "linux": linux}) == oci_pb.Spec(
        Version="1.1.0",
        Hostname="box",
        Process=oci_pb.Process(
            Args=["sh"],
            User=oci_pb.User(UID=1, AdditionalGids=[2]),
            NoNewPrivileges=True,
            OOMScoreAdj=-5,
            Capabilities=oci_pb.LinuxCapabilities(Bounding=["CAP_KILL"]),
        ),
        Root=oci_pb.Root(Path="/r", Readonly=True),
        Mounts=[oci_pb.Mount(destination="/proc", type="proc", source="proc")],
        Linux=oci_pb.Linux(
            UIDMappings=[oci_pb.LinuxIDMapping(ContainerID=1, Size=2)],
            MaskedPaths=["/proc/kcore"],
            Resources=oci_pb.LinuxResources(
                CPU=oci_pb.LinuxCPU(Quota=5),
                BlockIO=oci_pb.LinuxBlockIO(Weight=10),
                Memory=oci_pb.LinuxMemory(Limit=7),
            ),
            Seccomp=oci_pb.LinuxSeccomp(
                DefaultAction="SCMP_ACT_ALLOW",
                Syscalls=[oci_pb.LinuxSyscall(Names=["ptrace"], errnoret=1)],
            ),
        ),
    )


@pytest.mark.parametrize(
    ("cls", "value", "words", "hint"),
    [
        (types_pb.Route, {"mut": 1}, "Route: Route has no field 'mut'", "did you mean mtu?"),
        (types_pb.Route, {"mtu": "1.5"}, r"Route\.mtu: '1.5' is not an integer", ""),
        (types_pb.Route, {"mtu": True}, r"Route\.mtu: True is not an integer", ""),
        (types_pb.Route, {"mtu": 1 << 40}, r"Route\.mtu: \d+ does not fit into uint32", ""),
        (types_pb.Route, {"family": "v5"}, r"Route\.family: 'v5' is none of v4, v6", ""),
        (types_pb.Route, {"dest": 7}, r"Route\.dest: 7 is not a string", ""),
        (types_pb.Route, {"dest": "\ud800"}, r"Route\.dest: the text has characters", ""),
        (types_pb.Route, [], r"Route: \[\] is not a JSON object", "written"),
        (types_pb.Route, {"dest": "a", "Dest": "b"}, "'dest' and 'Dest' are the same field", ""),
        (agent_pb.CopyFileRequest, {"data": "a b"}, r"data: 'a b' is not base64", ""),
        (agent_pb.CopyFileRequest, {"data": 5}, r"data: 5 is not base64", ""),
        (agent_pb.OnlineCPUMemRequest, {"wait": 1}, "wait: 1 is neither true nor false", ""),
        (agent_pb.UpdateRoutesRequest, {"routes": {"Routes": {}}}, r"routes\.Routes: {} is not a list", ""),
        (agent_pb.UpdateRoutesRequest, {"routes": {"Routes": [{"x": 1}]}}, r"Routes\[0\]: Route has no", ""),
        (oci_pb.Spec, {"Annotations": []}, r"Annotations: \[\] is not a JSON object", "map"),
        (oci_pb.Spec, {"Annotations": {"a": 1}}, r"Annotations\['a'\]: 1 is not a string", ""),
        (agent_pb.ListRoutesRequest, {"a": 1}, "has no fields, so there is no 'a'", "leave it out"),
    ],
)
def test_wrong_json_is_one_sentence(cls: type[Message], value: Any, words: str, hint: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        jsonmap.from_json(cls, value)
    assert hint in caught.value.hint


def test_answers_name_their_enums_and_keep_wide_integers() -> None:
    usage = csi_pb.VolumeUsage(available=(1 << 64) - 1, unit=csi_pb.VolumeUsage_Unit.INODES)
    assert jsonmap.to_json(usage) == {
        "available": str((1 << 64) - 1),
        "total": "0",
        "used": "0",
        "unit": "INODES",
    }
    assert jsonmap.to_json(health_pb.HealthCheckResponse(status=77)) == {"status": 77}
    assert jsonmap.to_json(agent_pb.WaitProcessResponse()) == {"status": 0}
    assert jsonmap.to_json(agent_pb.WaitProcessResponse(), defaults=False) == {}
    stats = agent_pb.StatsContainerResponse()
    assert jsonmap.to_json(stats) == {"network_stats": []}
    assert jsonmap.to_json(stats, camel_case=True) == {"networkStats": []}


# ---- words ----


def test_fields_from_options() -> None:
    found = build(
        "CopyFile",
        "--path",
        "/x",
        "--file_mode",
        "0644",
        "--fileSize=5",
        "--data",
        "text:hello",
        "--uid",
        "-1",
    )
    assert found == agent_pb.CopyFileRequest(path="/x", file_mode=0o644, file_size=5, data=b"hello", uid=-1)
    assert build("CopyFile", "--data", "aGk=", "--dir-mode=0x1ff") == agent_pb.CopyFileRequest(
        data=b"hi", dir_mode=0o777
    )
    assert build("OnlineCPUMem", "--wait", "--nb_cpus", "2", "--cpu_only", "no").wait is True
    assert build("OnlineCPUMem", "--cpu_only").cpu_only is True
    assert build("CreateSandbox", "--dns", "a", "--dns", "b", "--dns", '["c", "d"]').dns == [
        "a",
        "b",
        "c",
        "d",
    ]
    assert build("AddSwap", "--PCIPath", "[2, 3]", "--PCIPath", "4").PCIPath == [2, 3, 4]
    nested = build("UpdateInterface", "--interface.name", "eth0", "--interface.mtu", "1400")
    assert nested.interface == types_pb.Interface(name="eth0", mtu=1400)
    listed = build("UpdateInterface", "--interface.IPAddresses", '{"family": "v6", "address": "fd00::1"}')
    assert listed.interface.IPAddresses == [types_pb.IPAddress(family=1, address="fd00::1")]
    mapped = build("CreateContainer", "--OCI.Annotations.io.x.y", "z", "--OCI.Annotations", '{"a": "b"}')
    assert mapped.OCI.Annotations == {"io.x.y": "z", "a": "b"}
    whole = build("UpdateInterface", "--interface", '{"name": "a"}', "--interface.mtu", "9")
    assert whole.interface == types_pb.Interface(name="a", mtu=9)


def test_options_go_over_the_json(tmp_path: Path) -> None:
    document = '{"container_id": "a", "signal": 9}'
    file = tmp_path / "request.json"
    file.write_text(document)
    for word in (document, f"@{file}", f"json://{document}", f"file://{file}"):
        found = build("SignalProcess", word, "--signal", "15")
        assert found == agent_pb.SignalProcessRequest(container_id="a", signal=15)
    data = tmp_path / "data"
    data.write_bytes(b"\0\xff")
    assert build("WriteStdin", "--data", f"@{data}").data == b"\0\xff"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("SignalProcess", "--sginal", "9"), "no field 'sginal'", "did you mean signal?"),
        (("SignalProcess", "--signal", "TERM"), "'TERM' is not an integer", ""),
        (("SignalProcess", "--signal"), "--signal needs a value", "--help"),
        (("SignalProcess", "x"), "unexpected argument 'x'", "usage"),
        (("SignalProcess", "{"), "the argument is not valid JSON", ""),
        (("SignalProcess", "{}", "{}"), "unexpected argument", ""),
        (("SignalProcess", "[" * 100000), "unexpected argument", ""),
        (("SignalProcess", '{"a":' * 100000), "nested too deeply", ""),
        (("SignalProcess", "@/no/such/file"), "cannot read /no/such/file: No such file", ""),
        (("WriteStdin", "--data", "@/no/such/file"), "cannot read /no/such/file", ""),
        (("WriteStdin", "--data", "*"), "'*' is not base64", "text:"),
        (("CreateSandbox", "--dns.x", "a"), "dns is a list", ""),
        (("CreateSandbox", "--hostname.x", "a"), "hostname is a string", ""),
        (("OnlineCPUMem", "--wait", "perhaps"), "'perhaps' is neither true nor false", ""),
        (("UpdateRoutes", "--routes.Routes", '{"family": "v7"}'), "'v7' is none of v4, v6", ""),
        (("Check", "--timeout", "5"), "Check has no field 'timeout'", "--timeout goes before Check"),
    ],
)
def test_wrong_words_are_one_sentence(words: tuple[str, ...], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        request.build(methods.get(words[0]), words[1:], ["--timeout"])
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_field_may_be_called_like_an_option() -> None:
    found: Any = request.build(methods.get("RemoveContainer"), ["--timeout", "5"], ["--timeout"])
    assert found.timeout == 5
