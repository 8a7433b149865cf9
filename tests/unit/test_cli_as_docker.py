"""What `inspect`, `stats`, `top` and `update` have under Docker's names, without machines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from image_support import docker_save, layer, member
from test_cli_manage import said, state

from kata import __version__
from kata.cli import image as image_command
from kata.cli import inspect_members, lifecycle, records, top, usage
from kata.oci import capabilities

__all__ = ["state"]


@pytest.fixture
def image(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = [{"layers": [layer(member("one", content=b"1"))], "tags": ["bb:latest"]}]
    said(capsys, "load", "-q", "-i", str(docker_save(tmp_path / "bb.tar", content)))


def create(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    name = said(capsys, "create", "--storage", "tmpfs", *options, "bb", "true").strip()
    [found] = json.loads(said(capsys, "inspect", name))
    assert isinstance(found, dict)
    return found


def test_inspect_reads_the_specification(image: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--cap-add", "NET_ADMIN", "--cap-drop", "MKNOD", "--shm-size", "1m", "-m", "128m")
    host = create(capsys, *options, "-l", "z=1", "-l", "a=2")["HostConfig"]
    assert (host["CapAdd"], host["CapDrop"]) == (["CAP_NET_ADMIN"], ["CAP_MKNOD"])
    assert (host["ShmSize"], host["MemorySwap"], host["Privileged"]) == (1 << 20, 128 << 20, False)
    assert host["LogConfig"]["Config"]["max-file"] == "3"
    labels = said(capsys, "inspect", "-l", "-f", "{{json .Config.Labels}}")
    assert labels == '{"a":"2","z":"1"}\n'  # as Go's maps: sorted


@pytest.mark.parametrize(("options", "user"), [((), ""), (("-u", "5:6"), "5:6")])
def test_inspect_says_who_the_command_runs_as(
    image: None, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], user: str
) -> None:
    found = create(capsys, *options, "--group-add", "audio", "--group-add", "77")
    assert (found["Config"]["User"], found["HostConfig"]["GroupAdd"]) == (user, ["77", "audio"])


@pytest.mark.parametrize(
    ("made", "asked", "seconds"),
    [
        ((), (), 10),
        (("--stop-timeout", "3"), (), 3),
        (("--stop-timeout", "3"), ("-t", "0"), 0),
        ((), ("-t", "-1"), 1e6),
        (("--stop-timeout", "-1"), (), 1e6),
    ],
)
def test_how_long_a_stop_waits(
    image: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    made: tuple[str, ...],
    asked: tuple[str, ...],
    seconds: float,
) -> None:
    create(capsys, "--name", "box", *made)
    waited: list[float] = []
    monkeypatch.setattr(lifecycle, "stop", lambda container, grace_s: waited.append(grace_s))
    said(capsys, "stop", *asked, "box")
    assert waited == [seconds]
    for wrong in ("-2", "x", "nan"):
        assert "-1 for no limit" in said(capsys, "stop", "-t", wrong, "box", status=125)


def test_failures_are_told_in_their_order(image: None, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "rm", "first", "second", "third", status=1)
    assert [line for line in told.splitlines() if "no container" in line] == [
        f"error: no container named '{name}'" for name in ("first", "second", "third")
    ]


def test_inspect_of_a_privileged_container(image: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = create(capsys, "--privileged")
    assert found["HostConfig"]["Privileged"] is True
    assert set(found["HostConfig"]["CapAdd"]) == set(capabilities.ALL) - set(capabilities.DEFAULT)
    assert found["HostConfig"]["CapDrop"] == []


def test_privileged_is_more_than_all_capabilities(image: None, capsys: pytest.CaptureFixture[str]) -> None:
    host = create(capsys, "--cap-add", "ALL")["HostConfig"]
    assert (host["Privileged"], host["SecurityOpt"], host["PublishAllPorts"]) == (False, None, False)
    assert "/proc/kcore" in host["MaskedPaths"]
    host = create(capsys, "--privileged")["HostConfig"]
    assert (host["SecurityOpt"], host["MaskedPaths"], host["ReadonlyPaths"]) == (None, None, None)
    host = create(
        capsys, "--security-opt", "no-new-privileges", "--security-opt", "seccomp=unconfined",
        "--security-opt", "systempaths=unconfined", "--cap-add", "ALL", "-P",
    )["HostConfig"]  # fmt: skip
    # This is all that --privileged takes away, and is told as that.
    assert (host["Privileged"], host["PublishAllPorts"]) == (True, True)
    host = create(
        capsys, "--security-opt", "no-new-privileges", "--security-opt", "seccomp=unconfined",
        "--security-opt", "systempaths=unconfined", "--device", "/dev/null:/dev/nothing:rw",
    )["HostConfig"]  # fmt: skip
    assert host["SecurityOpt"] == ["no-new-privileges", "seccomp=unconfined"]
    assert (host["Privileged"], host["MaskedPaths"], host["ReadonlyPaths"]) == (False, [], [])
    assert host["Devices"] == [
        {"PathOnHost": "/dev/null", "PathInContainer": "/dev/nothing", "CgroupPermissions": "rw"}
    ]


def test_an_unreadable_specification_drops_nothing() -> None:
    host = inspect_members.host_config({"memory": None, "log": {"files": 3, "max_bytes": 10}}, {})
    assert (host["CapAdd"], host["CapDrop"], host["ShmSize"]) == ([], [], 0)


def test_stats_has_dockers_fields() -> None:
    row = {
        "id": "ab" * 16,
        "name": "web",
        "cpu_percent": 12.345,
        "memory_bytes": 1 << 20,
        "memory_limit_bytes": 4 << 20,
        "network_received_bytes": 1024,
        "network_sent_bytes": 0,
        "block_read_bytes": 0,
        "block_written_bytes": 2048,
        "pids": 3,
        "overhead_bytes": 0,
        "memory_returned_bytes": 0,
        "memory_parts": {"guest": 3 << 20, "hypervisor": 2 << 20, "engine": 1 << 20, "helpers": None},
    }
    first, further = (usage._fields(row, is_first=is_first) for is_first in (True, False))
    assert first.keys() == usage.FIELDS.keys()
    assert (first["ID"], first["CPUPerc"], first["MemPerc"]) == ("ab" * 6, "12.35%", "25.00%")
    assert (first["MemUsage"], first["NetIO"], first["BlockIO"]) == ("1MiB / 4MiB", "1KiB / 0B", "0B / 2KiB")
    assert [first[name] for name in ("GuestMem", "HypervisorMem", "EngineMem", "HelpersMem")] == [
        "3MiB",
        "2MiB",
        "1MiB",
        "-",
    ]
    # A pod's network and overhead are told once.
    assert (further["NetIO"], further["Overhead"], further["MemUsage"]) == ("-", "-", first["MemUsage"])
    assert further["GuestMem"] == "-"
    assert usage._fields({**row, "memory_limit_bytes": 0}, is_first=True)["MemPerc"] == "0.00%"
    assert usage._fields(row, is_first=True, digits=None)["ID"] == row["id"]


def test_columns_of_processes(
    state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = SimpleNamespace(
        pid=7, ppid=1, uid=0, cpu_ns=0, rss_bytes=1024, tty="", command=[b"/usr/sbin/httpd", b"-p", b"80"]
    )

    class Engine:
        def __init__(self, socket: str) -> None: ...

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *_: object) -> None: ...

        def processes(self, identity: str) -> list[SimpleNamespace]:
            return [process]

    monkeypatch.setattr("kata.engine.client.EngineClient", Engine)
    monkeypatch.setattr(records, "find", lambda name: SimpleNamespace(socket="", id=name, need_running=dict))
    assert said(capsys, "top", "web", "-o", "pid,comm").split() == ["PID", "COMMAND", "7", "httpd"]
    assert said(capsys, "top", "web", "-o", "cmd").splitlines()[1] == "/usr/sbin/httpd -p 80"
    assert said(capsys, "top", "web").split()[:7] == ["PID", "PPID", "UID", "TIME", "RSS", "TTY", "COMMAND"]
    assert "no column 'colour'" in said(capsys, "top", "web", "-o", "colour", status=125)
    assert "kata top CONTAINER" in said(capsys, "top", "-o", "pid", status=125)
    assert list(top._COLUMNS)[-1] == "comm"


def test_swap_of_update_is_its_memory(image: None, capsys: pytest.CaptureFixture[str]) -> None:
    name = create(capsys, "-m", "128m")["Id"]
    assert said(capsys, "update", "-m", "256m", "--memory-swap", "256m", name) == f"{name}\n"
    # The words are those of `run`.
    for swap, told in (
        (["--memory-swap", "512m", "-m", "256m"], "the machine has no swap"),
        (["--memory-swap", "128m", "-m", "256m"], "is below the limit"),
        (["--memory-swap", "256m"], "needs the limit of the memory"),
    ):
        assert told in said(capsys, "update", *swap, name, status=125)
        assert told in said(capsys, "create", *swap, "bb", "true", status=125)
    assert said(capsys, "update", "-m", "256m", "--memory-swap", "-1", name) == f"{name}\n"


def test_update_leaves_what_is_zero_as_it_is(image: None, capsys: pytest.CaptureFixture[str]) -> None:
    name = create(capsys, "-m", "128m", "--cpus", "0.5")["Id"]
    assert said(capsys, "update", "-m", "0", "--cpus", "0", "--memory-swap", "0", name) == f"{name}\n"
    limits = ("inspect", "-f", "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}}", name)
    assert said(capsys, *limits) == f"{128 << 20} 500000000\n"
    said(capsys, "update", "-m", "0", "--cpus", "0.25", name)
    assert said(capsys, *limits) == f"{128 << 20} 250000000\n"
    assert "no limit to change" in said(capsys, "update", name, status=125)


def test_tables_of_lists_are_the_default_ones(image: None, capsys: pytest.CaptureFixture[str]) -> None:
    create(capsys, "--name", "box")
    for command, headings in (
        (["ps", "-a"], "CONTAINER ID IMAGE COMMAND CREATED STATUS PORTS NAMES"),
        (["ps", "-a", "-s"], "CONTAINER ID IMAGE COMMAND CREATED STATUS PORTS NAMES SIZE"),
        (["images"], "REPOSITORY TAG IMAGE ID CREATED SIZE"),
        (["images", "--digests"], "REPOSITORY TAG DIGEST IMAGE ID CREATED SIZE"),
        (["network", "ls"], "NETWORK ID NAME DRIVER SCOPE"),
        (["volume", "ls"], "DRIVER VOLUME NAME"),
        (["history", "bb"], "IMAGE CREATED CREATED BY SIZE COMMENT"),
    ):
        plain = said(capsys, *command)
        assert " ".join(plain.splitlines()[0].split()) == headings
        assert said(capsys, *command, "--format", "table") == said(capsys, *command, "--format", "") == plain
    assert "no field Nosuch" in said(capsys, "network", "ls", "--format", "{{.Nosuch}}", status=125)
    whole = said(capsys, "info")
    assert said(capsys, "info", "-f", "").splitlines()[:5] == whole.splitlines()[:5]
    assert json.loads(said(capsys, "inspect", "-f", "", "box"))[0]["Name"] == "/box"


@pytest.mark.parametrize(
    "words",
    [
        "top web -o pid --json",
        "stats --json --format {{.Name}}",
        "inspect --json --format {{.Id}} web",
        "ps -q --json",
        "ps -q --format {{.ID}}",
        "ps --json --format {{.ID}}",
        "ps -l -n 3",
        "images -q --format {{.ID}}",
        "images --json --format {{.ID}}",
        "images -q --json",
        "history -q --format {{.ID}} bb",
        "network ls -q --format {{.ID}}",
        "volume ls -q --format {{.Name}}",
        "stop --all --latest",
        "rm --all --latest",
        "start --all --latest",
        "pause -a -l",
    ],
)
def test_of_two_options_that_exclude_each_other_none_is_ignored(
    state: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    error = said(capsys, *words.split(), status=125)
    assert "exclude each other" in error
    assert "hint: leave out one of the two" in error
    command = words.split()[: 2 if words.startswith(("network", "volume")) else 1]
    if len(command) == 1:  # the help says so beforehand
        assert "\nOnly one of --" in said(capsys, *command, "--help")
    else:
        assert "Only one of --quiet and --format can be given." in said(capsys, command[0], "--help")


@pytest.mark.parametrize("words", ["inspect -l web", "logs -l web", "wait -l web"])
def test_the_latest_and_another(state: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    assert "'web' is named, too" in said(capsys, *words.split(), status=125)


@pytest.mark.parametrize(
    "words",
    [
        "debug level web debug --json",
        "debug bundle --with-output",
        "guest info --force",
        "guest info --kernel small",
    ],
)
def test_an_option_of_another_verb(state: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    assert "hint:" in said(capsys, *words.split(), status=125)


@pytest.mark.parametrize("words", ["images -f before=nosuch", "images -f since=nosuch"])
def test_a_filter_by_an_image_needs_that(
    state: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert "there is no image nosuch" in said(capsys, *words.split(), status=125)


@pytest.mark.parametrize("command", ["stats", "top"])
def test_a_wrong_interval_has_a_hint(state: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "hint: --interval " in said(capsys, command, "--interval", "0", status=125)


def test_a_wrong_template_is_told_before_the_readings(
    state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kata.cli.live.Sampler.sample", lambda *_: pytest.fail("it was asked"))
    assert "{{.Name" in said(capsys, "stats", "--format", "{{.Name", status=125)


def test_the_users_of_images_are_looked_for_once(
    image: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create(capsys)
    said(capsys, "tag", "bb", "cc")
    asked: list[int] = []
    users = image_command.users

    def count() -> dict[str, list[str]]:
        asked.append(1)
        return users()

    monkeypatch.setattr(image_command, "users", count)
    assert said(capsys, "images", "--format", "{{.Containers}}") == "1\n1\n"
    assert asked == [1]
    said(capsys, "images")
    assert asked == [1]  # and only if they are to be shown


def test_the_log_and_exposed_ports_are_the_users(image: None, capsys: pytest.CaptureFixture[str]) -> None:
    log = ("--log-opt", "max-size=2m", "--log-opt", "max-file=5")
    found = create(capsys, "--name", "web", *log, "--expose", "8080-8081/udp", "-p", "9")
    assert found["HostConfig"]["LogConfig"]["Config"] == {"max-size": "2097152", "max-file": "5"}
    assert sorted(found["Config"]["ExposedPorts"]) == ["8080/udp", "8081/udp", "9/tcp"]
    assert [port["guest_port"] for port in records.find("web").record["ports"]] == [9]
    create(capsys, "--name", "all", "--expose", "8080/udp", "-P")
    [port] = records.find("all").record["ports"]
    assert (port["guest_port"], port["proto"]) == (8080, "udp")
    assert port["host_port"]
    for words, told in (
        (["--log-opt", "mode=blocking"], "max-size=10m and max-file=3"),
        (["--log-opt", "max-file=0"], "at least 1"),
        (["--expose", "80:80"], "-p HOST:GUEST"),
    ):
        assert told in said(capsys, "create", *words, "bb", "true", status=125)


def test_version_by_a_template(image: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "version", "-f", "{{.Client.Version}} {{.Server.Os}}") == f"{__version__} linux\n"
    whole = json.loads(said(capsys, "version", "--format", "json"))
    assert {one["Name"] for one in whole["Server"]["Components"]} >= {"kata", "qemu", "guest kernel"}
    assert "no field Nosuch" in said(capsys, "version", "-f", "{{.Nosuch}}", status=125)
