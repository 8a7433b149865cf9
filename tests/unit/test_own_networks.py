"""Networks with a name: `kata network`, addresses, and the engine's own answers. Machines are in tests/vm."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest
from cli_state import outcome, state_fixture  # noqa: F401 - a fixture

from kata import paths
from kata.cli import networks, records, subnets
from kata.errors import StateError, UsageError
from kata.network import members, own_names, resolver


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    return outcome(capsys, "network", *words, status=status)


def with_place(container: str, network: str, address: str = "") -> records.Container:
    pending = records.PendingContainer(container)
    place = networks.place(network, ["alias"], address)
    record = {
        "id": pending.id, "name": container, "created_at": records.now(), "network": "user", "networks": [place],
        "ports": [],
    }  # fmt: skip
    return pending.commit(record, {})


def test_life_of_a_network(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = said(capsys, "create", "--label", "kind=test", "front").strip()
    assert len(identity) == 64
    assert "already" in said(capsys, "create", "front", status=125)
    assert said(capsys, "ls", "-q", "--no-trunc") == f"{identity}\n"
    heading, row = said(capsys, "ls").splitlines()
    assert heading.split() == ["NETWORK", "ID", "NAME", "DRIVER", "SCOPE"]
    assert row.split() == [identity[:12], "front", "bridge", "local"]
    assert said(capsys, "ls", "-q", "--filter", "label=kind=other") == ""
    container = with_place("one", "front")
    [about] = json.loads(said(capsys, "inspect", identity[:8]))
    assert about["Containers"][container.id]["IPv4Address"] == "10.210.0.2/24"
    assert about["IPAM"]["Config"] == [{"Subnet": "10.210.0.0/24"}]
    assert "is in the network front" in said(capsys, "rm", "front", status=1)
    assert said(capsys, "prune", "-f") == ""
    records.remove(container)
    assert "front" in said(capsys, "prune", "-f")
    assert os.listdir(state / "networks") == []


def test_a_container_that_does_not_run_is_put_into_networks_and_out(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("front", "back", "third", "fourth"):
        said(capsys, "create", name)
    container = with_place("one", "front")

    def where() -> list[tuple[str, str]]:
        found = records.load(container.id)
        assert found is not None
        return [(place["network"], place["address"]) for place in found.record["networks"]]

    said(capsys, "connect", "--alias", "www", "--ip", "10.210.1.9", "back", "one")
    said(capsys, "connect", "third", "one")
    assert where() == [("front", "10.210.0.2"), ("back", "10.210.1.9"), ("third", "10.210.2.2")]
    [about] = json.loads(said(capsys, "inspect", "back"))
    assert about["Containers"][container.id]["IPv4Address"] == "10.210.1.9/24"
    assert "is in 3 networks" in said(capsys, "connect", "fourth", "one", status=125)
    assert "is in the network back already" in said(capsys, "connect", "back", "one", status=125)
    said(capsys, "disconnect", "front", "one")
    assert where() == [("back", "10.210.1.9"), ("third", "10.210.2.2")]
    assert "not in the network front" in said(capsys, "disconnect", "front", "one", status=125)
    said(capsys, "disconnect", "--force", "front", "one")
    # That there is no such container or network is one all the same, as in Docker.
    assert "no container named" in said(capsys, "disconnect", "--force", "front", "two", status=125)
    assert "no network 'nosuch'" in said(capsys, "disconnect", "--force", "nosuch", "one", status=125)
    said(capsys, "rm", "front")
    assert "no container named" in said(capsys, "connect", "back", "two", status=125)


def test_a_container_is_not_cut_off_from_what_it_publishes(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "create", "--internal", "inner")
    said(capsys, "create", "outer")
    [about] = json.loads(said(capsys, "inspect", "inner"))
    assert about["Internal"] is True
    container = with_place("one", "outer")
    path = os.path.join(container.directory, "container.json")
    records.write_json(path, {**container.record, "ports": [{"host_port": 80}]})
    said(capsys, "connect", "inner", "one")
    assert "publishes ports" in said(capsys, "disconnect", "outer", "one", status=125)
    said(capsys, "disconnect", "inner", "one")
    with_place("two", "inner")
    assert "get a way out" in said(capsys, "disconnect", "inner", "two", status=125)
    assert "--gateway is not offered" in said(capsys, "create", "--gateway", "10.0.0.1", "x", status=125)


def test_addresses(state: Path) -> None:
    networks.create("small", ["10.5.0.0/29"])
    assert networks.create("next")["subnet"] == "10.210.0.0/24"
    with_place("one", "small", "10.5.0.3")
    found = [with_place(f"c{number}", "small") for number in range(4)]
    addresses = [one.record["networks"][0]["address"] for one in found]
    assert addresses == ["10.5.0.2", "10.5.0.4", "10.5.0.5", "10.5.0.6"]
    with pytest.raises(UsageError, match="no address left"):
        networks.place("small", [], "")
    for wrong in ("10.5.0.3", "10.5.0.1", "10.5.0.7", "10.6.0.2", "x"):
        with pytest.raises(UsageError, match="--ip"):
            networks.place("small", [], wrong)
    for wrong in ("10.5.0.0/28", "10.0.2.0/24", "10.0.0.0/8", "10.7.0.0/31", "10.7.0.1/24", "fd00::/64"):
        with pytest.raises(UsageError, match="--subnet"):
            networks.create("wrong", [wrong])
    records_dir = networks.directory()
    assert sorted(os.listdir(records_dir)) == ["next", "small"]


def test_subnets(state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "create", "--ipv6", "--subnet", "10.5.0.0/24", "--subnet", "fd00:5::/64", "both")
    container = with_place("one", "both", "10.5.0.7")
    [about] = json.loads(said(capsys, "inspect", "both"))
    assert about["EnableIPv6"] is True
    assert about["IPAM"]["Config"] == [{"Subnet": "10.5.0.0/24"}, {"Subnet": "fd00:5::/64"}]
    assert about["Containers"][container.id]["IPv6Address"] == "fd00:5::7/64"
    chosen = [networks.create(name, ipv6=True)["subnet6"] for name in ("a", "b")]
    assert chosen[0] != chosen[1]
    assert all(one.startswith("fd") and one.endswith("::/64") for one in chosen)
    for wrong, why in (
        ("--subnet fd00:6::/64", "is one of IPv6"),
        ("--ipv6 --subnet fd00:5::/48", "overlaps"),
        ("--ipv6 --subnet fd6b:6174:6100::/64", "overlaps"),
        ("--ipv6 --subnet fd00:6::/120", "too small"),
        ("--ipv6 --subnet fd00:6::/64 --subnet fd00:7::/64", "a second one of IPv6"),
        ("--subnet 10.7.0.0/24 --ip-range 10.8.0.0/28", "is not a part of"),
        ("--subnet 10.7.0.0/24 --ip-range x", "--ip-range"),
    ):
        assert why in said(capsys, "create", *wrong.split(), "wrong", status=125), wrong
    # Addresses come from the range, others have to be asked for.
    networks.create("part", ["10.7.0.0/24"], ip_range="10.7.0.252/30")
    found = [with_place(f"c{number}", "part").record["networks"][0]["address"] for number in range(3)]
    assert found == ["10.7.0.252", "10.7.0.253", "10.7.0.254"]
    with pytest.raises(UsageError, match=r"no address left \(10\.7\.0\.252/30\)"):
        networks.place("part", [], "")
    assert networks.place("part", [], "10.7.0.9")["address"] == "10.7.0.9"


def test_a_subnet_that_the_host_has_a_route_to_is_not_chosen(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = [ipaddress.ip_network("10.210.0.0/23"), ipaddress.ip_network("10.210.3.128/25")]
    monkeypatch.setattr(subnets, "_routes", lambda: routes)
    assert [networks.create(name)["subnet"] for name in ("a", "b")] == ["10.210.2.0/24", "10.210.4.0/24"]
    assert (
        networks.create("c", ["10.210.0.0/24"])["subnet"] == "10.210.0.0/24"
    )  # who asks for it has reasons


def test_the_hosts_routes_are_read() -> None:
    """Against iproute2's list, as ranges that leave the default route out."""
    listed = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout
    wanted = {ipaddress.ip_network(line.split()[0]) for line in listed.splitlines() if line[:1].isdigit()}
    assert set(subnets._routes()) >= {one for one in wanted if one.prefixlen}


def test_a_container_whose_network_was_made_anew_is_not_started(state: Path) -> None:
    networks.create("front", ["10.5.0.0/24"])
    container = with_place("one", "front")
    container.record["networks"][0]["address"] = "10.6.0.2"
    with pytest.raises(StateError, match="is gone"):
        networks.endpoints(container)


@pytest.mark.parametrize("name", ["user", "none", "host", "-x", "", "a/b", "ä"])
def test_names_that_a_network_cannot_have(name: str) -> None:
    with pytest.raises(UsageError):
        networks.check_name(name, "kata network create")


# ---- names ----


def question(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    return (
        b"\x12\x34\x01\x00" + struct.pack(">HHHH", 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)
    )


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "network"
    (path / "members").mkdir(parents=True)
    return path


def join(network: Path, sandbox: str, addresses: list[str], *names: str) -> int:
    fd = os.open(network / "members" / sandbox, os.O_WRONLY | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.write(fd, json.dumps({"addresses": addresses, "names": names}).encode())
    return fd


def test_names_of_members(network: Path) -> None:
    held = join(network, "a", ["10.5.0.2"], "Web", "alias")
    other = join(network, "b", ["10.5.0.3"], "db", "alias")
    own = own_names.OwnNames([(str(network), [("10.5.0.9", 24)])], ["192.0.2.1"])
    try:
        answer = own.answer(question("wEB"))
        assert answer[:4] == b"\x12\x34\x85\x80"
        assert struct.unpack_from(">HHHH", answer, 4) == (1, 1, 0, 0)
        assert answer.endswith(struct.pack(">IH", 0, 4) + resolver.pack("10.5.0.2"))
        # An alias may be that of several.
        assert struct.unpack_from(">H", own.answer(question("alias")), 6) == (2,)
        # A name that is there has no IPv6 address, rather than being asked of others.
        aaaa = own.answer(question("web", 28))
        assert (aaaa[3] & 15, aaaa[6:8]) == (0, b"\0\0")
        assert own.answer(question("3.0.5.10.in-addr.arpa", 12)).endswith(b"\x02db\0")
        assert own.answer(question("7.0.5.10.in-addr.arpa", 12))[3] & 15 == 3
        # All else is for others.
        for name in ("example.org", "web.example.org", "7.0.6.10.in-addr.arpa"):
            assert own.answer(question(name)) == b""
        # The lock ends with the engine, and with it the name.
        os.close(held)
        assert own.answer(question("web")) == b""
        assert [one.addresses for one in members.living(str(network))] == [["10.5.0.3"]]
    finally:
        os.close(other)


def test_names_with_ipv6_addresses(network: Path) -> None:
    held = join(network, "a", ["10.5.0.2", "fd00::2"], "web")
    own = own_names.OwnNames([(str(network), [("10.5.0.9", 24), ("fd00::9", 64)])], [])
    nibbles = ".".join("2" + "0" * 29 + "df")
    try:
        answer = own.answer(question("web", 28))
        assert answer.endswith(struct.pack(">IH", 0, 16) + resolver.pack("fd00::2"))
        assert struct.unpack_from(">H", answer, 6) == (1,)
        assert own.answer(question("web")).endswith(resolver.pack("10.5.0.2"))
        assert struct.unpack_from(">H", own.answer(question("web", 255)), 6) == (2,)
        assert own.answer(question(f"{nibbles}.ip6.arpa", 12)).endswith(b"\x03web\0")
        # Nobody of this network; one of another, and what is no address.
        assert own.answer(question(f"3{nibbles[1:]}.ip6.arpa", 12))[3] & 15 == 3
        assert own.answer(question(f"{nibbles[:-1]}e.ip6.arpa", 12)) == b""
        assert own.answer(question("2.0.ip6.arpa", 12)) == own.answer(question("ip6.arpa", 12)) == b""
    finally:
        os.close(held)


@pytest.mark.parametrize("length", range(len(question("web.example")) - 1))
def test_a_broken_question_is_no_question(length: int) -> None:
    assert own_names.parse(question("web.example")[:length]) is None


def test_where_the_namespaces_are(state: Path) -> None:
    record = networks.create("front")
    assert networks.runtime_dir(record) == os.path.join(paths.run_dir(), "networks", record["id"])
