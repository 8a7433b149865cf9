"""``--filter`` of `kata ps` and `kata images`, ``--since`` of `kata logs`: what agrees, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kata.cli import filters, records
from kata.errors import KataError, NotFoundError, UsageError
from kata.images import store


def container(name: str, number: int, **more: Any) -> records.Container:
    record = {
        "id": f"{number}" * 32,
        "name": name,
        "created_at": f"2026-01-0{number}T00:00:00Z",
        "image": {"reference": "busybox", "id": "sha256:1"},
        "labels": {},
        "ports": [],
        "volumes": [],
        "network": "user",
        **more,
    }
    return records.Container(record["id"], record)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[tuple[records.Container, dict[str, Any]]]:
    three: list[tuple[records.Container, dict[str, Any]]] = [
        (
            container(
                "db-1",
                3,
                labels={"tier": "db", "x": ""},
                volumes=[{"source": "/srv", "destination": "/data"}],
            ),
            {"status": "running"},
        ),
        (
            container(
                "web",
                2,
                ports=[{"host_port": 8080, "guest_port": 80, "proto": "tcp"}],
                labels={"tier": "web"},
            ),
            {"status": "exited", "exit_code": 3},
        ),
        (container("webby", 1, network="none"), {"status": "created"}),
    ]
    monkeypatch.setattr(records, "find", lambda name: next(c for c, _ in three if c.name == name))
    monkeypatch.setattr(store, "find_id", lambda text, index: "sha256:1" if text == "box" else None)
    return three


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], ["db-1", "web", "webby"]),
        (["name=web"], ["web", "webby"]),
        (["name=^/web$"], ["web"]),
        (["id=2"], ["web"]),
        (["label=tier"], ["db-1", "web"]),
        (["label=tier", "label=x"], ["db-1"]),
        (["label=tier=web"], ["web"]),
        (["status=exited", "status=created"], ["web", "webby"]),
        (["exited=3"], ["web"]),
        (["exited=0"], []),
        (["ancestor=busybox"], ["db-1", "web", "webby"]),
        (["ancestor=box", "name=db"], ["db-1"]),
        (["ancestor=other"], []),
        (["before=web"], ["webby"]),
        (["since=web"], ["db-1"]),
        (["network=none"], ["webby"]),
        (["volume=/srv"], ["db-1"]),
        (["volume=/data"], ["db-1"]),
        (["publish=8080"], ["web"]),
        (["publish=8080/udp"], []),
    ],
)
def test_containers(found: list[Any], texts: list[str], expected: list[str]) -> None:
    assert [one.name for one, _ in filters.containers(found, texts)] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name", "not KEY=VALUE"),
        ("colour=red", "not offered"),
        ("status=dead", "no state"),
        ("exited=x", "no exit code"),
        ("name=[", "regular expression"),
    ],
)
def test_wrong_filters(found: list[Any], text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        filters.containers(found, [text])


def image(name: str, created: str, labels: dict[str, str] | None = None) -> store.Image:
    record = {
        "id": "sha256:" + name[:1] * 64, "digest": "", "platform": "linux/amd64", "created": created, "size": 1,
        "config": {"Labels": labels} if labels else {}, "chain": "",
    }  # fmt: skip
    return store.Image(record, [name] if ":" in name else [])


def test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [
        image("docker.io/library/alpine:3", "2026-01-03T00:00:00Z", {"a": "b"}),
        image("ghcr.io/x/y:latest", "2026-01-02T00:00:00Z"),
        image("nameless", "2026-01-01T00:00:00Z"),
    ]
    monkeypatch.setattr(store, "find", lambda text: images[1])

    def kept(*texts: str) -> list[int]:
        return [images.index(one) for one in filters.images(images, texts)]

    assert (
        kept("reference=alpine")
        == kept("reference=alp*:3")
        == kept("reference=docker.io/library/alpine:3")
        == [0]
    )
    assert kept("reference=ghcr.io/*/y") == [1]
    assert kept("dangling=true") == [2]
    assert kept("dangling=false") == [0, 1]
    assert kept("label=a=b") == [0]
    assert (kept("before=y"), kept("since=y")) == ([2], [0])
    assert kept("until=2026-01-02T12:00:00Z") == [1, 2]
    with pytest.raises(UsageError, match="neither true nor false"):
        kept("dangling=maybe")


def test_what_says_no_date_is_not_older() -> None:
    assert filters.is_older("2026-01-01T00:00:00Z", 1767225601)
    assert not filters.is_older("2026-01-01T00:00:00Z", 1767225600)
    assert not filters.is_older("", 1767225600)


def test_moments() -> None:
    assert filters.moment("1700000000.5", "--since") == 1700000000.5
    assert filters.moment("2026-01-01T00:00:00Z", "--since") == 1767225600
    assert filters.moment("2026-01-01T00:00:00.25+01:00", "--since") == 1767222000.25
    assert abs(time.time() - 5400 - filters.moment("1h30m", "--since")) < 5
    for text in ("yesterday", "", "-1", "2026-13-01", "10x"):
        with pytest.raises(UsageError, match="is no time"):
            filters.moment(text, "--since")


def test_a_container_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path))
    with pytest.raises(NotFoundError):
        filters.containers([], ["before=nobody"])
    assert issubclass(NotFoundError, KataError)
