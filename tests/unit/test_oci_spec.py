"""The default container: Docker's profile, changed by what was asked."""

from __future__ import annotations

import socket

import pytest

from kata.errors import UsageError
from kata.oci import capabilities
from kata.oci.seccomp import default_profile
from kata.oci.spec import Request, build


def request() -> Request:
    made = Request("box")
    made.command = ["true"]
    return made


def test_the_default_profile_is_dockers() -> None:
    spec = build(request(), {})
    granted = spec["process"]["capabilities"]
    assert granted["bounding"] == sorted(capabilities.DEFAULT)
    assert "inheritable" not in granted
    assert spec["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert "/proc/kcore" in spec["linux"]["maskedPaths"]
    assert "/proc/sys" in spec["linux"]["readonlyPaths"]
    assert spec["process"]["args"] == ["true"]
    assert [m["destination"] for m in spec["mounts"]][:2] == ["/proc", "/dev"]


def test_privileged_has_everything_of_the_guest() -> None:
    asked = request()
    asked.privileged = True
    spec = build(asked, {})
    assert spec["process"]["capabilities"]["bounding"] == sorted(capabilities.ALL)
    assert "seccomp" not in spec["linux"]
    assert "maskedPaths" not in spec["linux"]


def test_the_image_gives_what_was_not_asked() -> None:
    image = {
        "Entrypoint": ["/e"],
        "Cmd": ["c"],
        "Env": ["A=1", "PATH=/bin"],
        "WorkingDir": "/w",
        "User": "web:www",
    }
    asked = Request("box")
    spec = build(asked, image)
    assert spec["process"]["args"] == ["/e", "c"]
    assert "PATH=/bin" in spec["process"]["env"]
    assert spec["process"]["cwd"] == "/w"
    assert spec["process"]["user"]["username"] == "web:www"
    asked.command, asked.env, asked.user = ["x"], ["A=2"], "0"
    spec = build(asked, image)
    assert spec["process"]["args"] == ["/e", "x"]
    assert "A=2" in spec["process"]["env"]
    assert "A=1" not in spec["process"]["env"]
    asked.entrypoint = ["/other"]
    asked.command = []
    assert build(asked, image)["process"]["args"] == ["/other"]


def test_an_entry_point_of_one_empty_word_is_none() -> None:
    asked = Request("box")
    image = {"Entrypoint": [""], "Cmd": ["c"]}
    assert build(asked, image)["process"]["args"] == ["c"]
    asked.command = ["x"]
    assert build(asked, image)["process"]["args"] == ["x"]
    with pytest.raises(UsageError, match="no command"):
        build(Request("box"), {"Entrypoint": [""]})


def test_no_command_at_all_is_an_error() -> None:
    with pytest.raises(UsageError, match="no command"):
        build(Request("box"), {})


def test_an_ordinary_user_starts_without_capabilities_in_effect() -> None:
    asked = request()
    asked.user = "1000:1000"
    sets = build(asked, {})["process"]["capabilities"]
    assert set(sets) == {"bounding"}


def test_limits_become_resources() -> None:
    asked = request()
    asked.cpus, asked.memory, asked.pids_limit = 1.5, 64 << 20, 20
    resources = build(asked, {})["linux"]["resources"]
    assert resources["cpu"] == {"quota": 150000, "period": 100000}
    assert resources["memory"] == {"limit": 64 << 20, "swap": 64 << 20}
    assert resources["pids"] == {"limit": 20}
    asked.pids_limit = -1
    assert "pids" not in build(asked, {})["linux"]["resources"]


def test_a_deeper_mount_comes_later_and_a_given_one_replaces_the_default() -> None:
    asked = request()
    asked.volumes = [("/h/b", "/a/b", ["rbind"]), ("/h/a", "/a", ["rbind"])]
    asked.tmpfs = [("/dev/shm", ["size=1m"])]
    destinations = [mount["destination"] for mount in build(asked, {})["mounts"]]
    assert destinations.index("/a") < destinations.index("/a/b")
    assert destinations.count("/dev/shm") == 1


@pytest.mark.parametrize(
    ("systemd", "command", "ready"),
    [
        ("true", "/sbin/init", True),
        ("true", "/usr/lib/systemd/systemd", True),
        ("true", "/opt/init", False),
        ("true", "/bin/sh", False),
        ("false", "/sbin/init", False),
        ("always", "/bin/sh", True),
    ],
)
def test_what_systemd_needs(systemd: str, command: str, ready: bool) -> None:
    asked = request()
    asked.command, asked.systemd = [command], systemd
    asked.tmpfs = [("/run/lock", ["size=1m"])]
    made = build(asked, {})
    mounts = {mount["destination"]: mount["options"] for mount in made["mounts"]}
    assert ("rw" in mounts["/sys/fs/cgroup"]) is ready
    assert "ro" in mounts["/sys"]
    assert {"/run", "/tmp"} <= set(mounts) or not ready
    assert "size=1m" in mounts["/run/lock"]
    assert ("container=kata" in made["process"]["env"]) is ready
    asked.env = ["container=mine"]
    assert [
        item for item in build(asked, {})["process"]["env"] if item.startswith("container=")
    ] == asked.env


def test_capabilities_add_and_drop() -> None:
    assert "CAP_NET_ADMIN" in capabilities.resolve(["net_admin"], [])
    assert capabilities.resolve(["CAP_CHOWN"], ["ALL"]) == ["CAP_CHOWN"]
    assert "CAP_KILL" not in capabilities.resolve(["ALL"], ["kill"])
    with pytest.raises(UsageError, match="unknown capability 'CAP_NONSENSE'"):
        capabilities.resolve(["CAP_NONSENSE"], [])


def _allowed(profile: dict[str, object], name: str) -> bool:
    rules = profile["syscalls"]
    assert isinstance(rules, list)
    return any(
        name in rule["names"] and rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule for rule in rules
    )


def test_the_seccomp_profile_follows_the_capabilities() -> None:
    plain = default_profile(list(capabilities.DEFAULT))
    assert _allowed(plain, "openat")
    assert _allowed(plain, "chroot")
    for name in (
        "mount",
        "bpf",
        "init_module",
        "reboot",
        "clock_settime",
        "unshare",
        "keyctl",
        "userfaultfd",
    ):
        assert not _allowed(plain, name), name
    admin = default_profile([*capabilities.DEFAULT, "CAP_SYS_ADMIN"])
    for name in ("mount", "clone", "clone3", "unshare"):
        assert _allowed(admin, name), name
    for privileged in ("keyctl", "add_key", "request_key", "userfaultfd", "kexec_load"):
        assert not _allowed(admin, privileged), privileged


def test_the_seccomp_profile_leaves_out_vsock_alone() -> None:
    tests = {
        "SCMP_CMP_LT": lambda found, value: found < value,
        "SCMP_CMP_EQ": lambda found, value: found == value,
    }
    rules = [rule["args"] for rule in default_profile([])["syscalls"] if "socket" in rule["names"]]
    for conditions in rules:
        # Two on one argument would be alternatives: runc's and crun's reading, and our agent's.
        assert len(conditions) == len({one["index"] for one in conditions})

    def allowed(family: int) -> bool:
        return any(all(tests[one["op"]](family, one["value"]) for one in conditions) for conditions in rules)

    # The kernel takes the lower 32 bits.
    refused = [family for family in (*range(46), 1 << 32 | socket.AF_VSOCK) if not allowed(family)]
    assert refused == [socket.AF_VSOCK, 1 << 32 | socket.AF_VSOCK]
