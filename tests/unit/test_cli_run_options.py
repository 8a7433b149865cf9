"""The further options of `kata run`: what each puts into the specification and the record, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kata.cli import making, run, values
from kata.cli.run_options import IdFile, RunOptions, exposed_ports, with_host_ports
from kata.engine.containers.etc_files import resolv_conf
from kata.errors import UsageError
from kata.oci import spec as oci
from kata.settings import ContainerSettings


def applied(*words: str, memory: int | None = None) -> tuple[dict[str, Any], dict[str, Any], RunOptions]:
    """The specification and the record of `kata run WORDS image`."""
    options = RunOptions(run.COMMANDS["run"].parse([*words, "image"]))
    request = oci.Request("box")
    request.command, request.memory = ["true"], memory
    spec, record = oci.build(request, {}), {"labels": {"of": "image", "kind": "image"}}
    options.apply(spec, record)
    return spec, record, options


def test_labels_come_from_files_and_the_command_line_which_wins(tmp_path: Path) -> None:
    file = tmp_path / "labels"
    file.write_text("# a comment\n\nkind=file\nempty\nmore=a=b\n")
    _, record, _ = applied("--label-file", str(file), "-l", "more=mine", "--label", "bare")
    assert record["labels"] == {"of": "image", "kind": "file", "empty": "", "more": "mine", "bare": ""}


def test_limits() -> None:
    spec, record, _ = applied(
        *(
            "--ulimit",
            "nofile=10",
            "--ulimit",
            "nofile=20:40",
            "--ulimit",
            "core=-1",
            "--ulimit",
            "RLIMIT_cpu=0:-1",
        ),
        *("-m", "64m", "--memory-swap", "64m", "--memory-reservation", "32m", "--cpu-shares", "512"),
        *("--shm-size", "1m", "--stop-timeout", "3"),
        memory=64 << 20,
    )
    unlimited = (1 << 64) - 1
    assert spec["process"]["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "soft": 20, "hard": 40},
        {"type": "RLIMIT_CORE", "soft": unlimited, "hard": unlimited},
        {"type": "RLIMIT_CPU", "soft": 0, "hard": unlimited},
    ]
    assert spec["linux"]["resources"]["memory"] == {
        "limit": 64 << 20,
        "swap": 64 << 20,
        "reservation": 32 << 20,
    }
    assert spec["linux"]["resources"]["cpu"] == {"shares": 512}
    [shm] = [mount for mount in spec["mounts"] if mount["destination"] == "/dev/shm"]
    assert [option for option in shm["options"] if option.startswith("size=")] == ["size=1048576"]
    assert record["stop_timeout"] == 3


def test_security_and_groups() -> None:
    spec, _, _ = applied(
        *(
            "--security-opt",
            "no-new-privileges:true",
            "--security-opt",
            "seccomp=unconfined",
            "--security-opt",
        ),
        *("label:disable", "--group-add", "7", "--group-add", "audio", "--group-add", "0"),
        *("--sysctl", "net.core.somaxconn=12"),
    )
    assert spec["process"]["noNewPrivileges"] is True
    assert "seccomp" not in spec["linux"]
    assert spec["linux"]["maskedPaths"]
    assert spec["process"]["user"]["additionalGids"] == [7, 0]
    assert spec["process"]["user"]["additionalGroups"] == ["audio"]
    assert spec["linux"]["sysctl"] == {"net.core.somaxconn": "12"}
    spec, _, _ = applied("--security-opt", "unmask=ALL")
    assert not {"maskedPaths", "readonlyPaths"} & set(spec["linux"])


def test_names() -> None:
    _, record, _ = applied(
        *("--add-host", "db:192.0.2.7", "--add-host", "six=[2001:db8::1]", "--add-host", "a;b:192.0.2.8"),
        *("--dns", "192.0.2.53", "--dns-search", "example.org", "--dns-option", "ndots:2"),
    )
    assert record["extra_hosts"] == ["192.0.2.7\tdb", "2001:db8::1\tsix", "192.0.2.8\ta", "192.0.2.8\tb"]
    assert record["dns_servers"] == ["192.0.2.53"]
    before = ["nameserver 10.0.2.3", "search lan", "options edns0"]
    own = ContainerSettings(directory="/", dns_servers=["192.0.2.53"], dns_searches=["."])
    assert resolv_conf(own, before) == ["options edns0", "nameserver 192.0.2.53"]
    own = ContainerSettings(directory="/", dns_searches=["a.example", "b.example"], dns_options=["ndots:2"])
    assert resolv_conf(own, before) == [
        "nameserver 10.0.2.3",
        "search a.example b.example",
        "options ndots:2",
    ]


def test_environment_of_the_host_and_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_THE_HOST", "yes")
    _, _, options = applied("--env-host", "--tz", "local")
    assert "FROM_THE_HOST=yes" in options.env
    [(source, destination, how)] = options.binds
    assert (Path(source).is_file(), destination, how[-1]) == (True, "/etc/localtime", "ro")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--label", "=x"], "is not a label"),
        (["--label", "a b=x"], "is not a label"),
        (["--label-file", "/nonexistent"], "No such file"),
        (["--ulimit", "files=3"], "there is no limit 'files'"),
        (["--ulimit", "nofile"], "is not a limit"),
        (["--ulimit", "nofile=x"], "is not a number"),
        (["--ulimit", "nofile=9:3"], "above the hard one"),
        (["--ulimit", "nofile=-1:3"], "above the hard one"),
        (["--sysctl", "net.core.somaxconn"], "is not NAME=VALUE"),
        (["--sysctl", "net..core=1"], "is not NAME=VALUE"),
        (["--shm-size", "much"], "is not a size"),
        (["--shm-size", "1m", "--tmpfs", "/dev/shm"], "contradict"),
        (["--group-add", "audio:video"], "is not a group"),
        (["--group-add", str(1 << 32)], "is not a group"),
        (["--add-host", "db"], "is not NAME:ADDRESS"),
        (["--add-host", "db:host"], "is not an IP address"),
        (["--add-host", "db:host-gateway"], "no fixed address of its host"),
        (["--add-host", "a\nb:192.0.2.1"], "is not NAME:ADDRESS"),
        (["--dns", "ns.example"], "is not an IP address"),
        (["--dns-search", "a b"], "cannot hold"),
        (["--security-opt", "seccomp=/profile.json"], "is not offered"),
        (["--security-opt", "apparmor=docker-default"], "is not offered"),
        (["--security-opt", "no-new-privilege"], "is not offered"),
        (["--tz", "Mars/Base"], "no time zone"),
        (["--tz", "../../../etc/passwd"], "no time zone"),
        (["--cpu-shares", "1"], "at least 2"),
        (["--memory-reservation", "2g", "-m", "1g"], "above the limit"),
        (["--memory-swap", "1g"], "needs the limit"),
        (["--memory-swap", "1g", "-m", "2g"], "below the limit"),
        (["--memory-swap", "3g", "-m", "2g"], "has no swap"),
        (["--stop-timeout", "-2"], "at least -1"),
    ],
)
def test_refused_with_a_hint(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        applied(*words)


def test_the_file_with_the_id_is_new_and_goes_with_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "id"
    IdFile(str(path)).write("abc")
    assert path.read_text() == "abc"
    with pytest.raises(UsageError, match="is there already"):
        IdFile(str(path))
    other = IdFile(str(tmp_path / "other"))
    other.discard()
    assert not (tmp_path / "other").exists()


def test_a_port_without_one_of_the_host_gets_a_free_one() -> None:
    for text in ("80", "127.0.0.1::80", "0:53/udp"):
        [one] = with_host_ports(values.port(text))
        assert one["host_port"] > 1023
    assert len({one["host_port"] for one in with_host_ports(values.port("80-82") * 2)}) == 6
    with pytest.raises(UsageError, match=r"no free port of 192\.0\.2\.9 can be had"):
        with_host_ports(values.port("192.0.2.9::80"))


def test_0_is_no_limit() -> None:
    zeros = ("--cpu-shares", "--memory-reservation", "--memory-swap", "--shm-size")
    spec, _, _ = applied(*(word for option in zeros for word in (option, "0")))
    plain, _, _ = applied("--label", "x")
    assert spec == plain
    choice = making._Choice(run.COMMANDS["run"].parse(["-m", "0", "--cpus", "0", "image"]), run.SELDOM)
    assert (choice.memory, choice.cpus) == (None, None)


def test_empty_names_are_none() -> None:
    choice = making._Choice(
        run.COMMANDS["run"].parse(["--name", "", "-h", "", "--network", "", "image"]), run.SELDOM
    )
    assert (choice.name, choice.hostname, choice.network) == (None, None, "user")


def test_a_line_that_is_no_label_is_named(tmp_path: Path) -> None:
    file = tmp_path / "labels"
    file.write_text("a=1\n b = 2\n")
    with pytest.raises(UsageError, match=f"--label-file {file}:2: 'b = 2' is not a label"):
        applied("--label-file", str(file))


def test_exposed_ports_get_free_ones_of_the_host() -> None:
    found = exposed_ports({"80/tcp": {}, "53/udp": {}, "443": {}, "22/tcp": {}}, values.port("2222:22"))
    assert [(one["guest_port"], one["proto"]) for one in found] == [(443, "tcp"), (53, "udp"), (80, "tcp")]
    chosen = with_host_ports([*values.port("2222:22"), *found])
    assert [one["guest_port"] for one in chosen] == [22, 443, 53, 80]
    assert chosen[0]["host_port"] == 2222
    assert len({one["host_port"] for one in chosen} - {0}) == 4
    with pytest.raises(UsageError, match="not a port"):
        exposed_ports({"nonsense/tcp": {}}, [])
