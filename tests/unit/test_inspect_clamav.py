"""ClamAV for `kata inspect-image`: which signatures are taken, and what is said of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from test_inspect_image import whole_report

from kata.cli import (
    inspect_clamav,
    inspect_html,
    inspect_machine,
    inspect_sbom,
    inspect_schema,
    inspect_text,
)
from kata.errors import GuestAssetError, ImageError, UsageError
from kata.guest import clamav, packages

HASH = "44d88612fea8a8f36de82e1278abb02f:68:Planted.Test\n"
MADE = 1_700_000_000


def archive() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name in ("daily.hdb", "daily.ndb"):
            info = tarfile.TarInfo(name)
            info.size = 3000
            tar.addfile(info, io.BytesIO(b"x" * 3000))
    return target.getvalue()


def official(content: bytes, digest: str = "") -> bytes:
    """An official database: its header, and what follows."""
    digest = digest or hashlib.md5(content, usedforsecurity=False).hexdigest()
    head = f"ClamAV-VDB:14 Nov 2023 22-13 +0000:27345:2067111:90:{digest}:signature:builder:{MADE}"
    return head.encode().ljust(512) + content


def test_official_and_other_signatures(tmp_path: Path) -> None:
    (tmp_path / "daily.cvd").write_bytes(official(archive()))
    (tmp_path / "main.cld").write_bytes(
        official(archive(), "0" * 32)
    )  # of an update: the digest is not its own
    (tmp_path / "more.cld").write_bytes(
        official(archive()[: 14 * 512])
    )  # as freshclam writes it: no zeros at the end
    (tmp_path / "packed.cld").write_bytes(official(gzip.compress(archive())))
    (tmp_path / "own.hdb").write_text(HASH)
    os.utime(tmp_path / "own.hdb", (MADE + 86400,) * 2)
    (tmp_path / "freshclam.dat").write_bytes(b"x")
    found = inspect_clamav.signatures(str(tmp_path))
    assert [(one.name, one.version, one.signatures, one.made) for one in found.databases] == [
        ("daily.cvd", 27345, 2067111, MADE),
        ("main.cld", 27345, 2067111, MADE),
        ("more.cld", 27345, 2067111, MADE),
        ("own.hdb", 0, 0, MADE + 86400),
        ("packed.cld", 27345, 2067111, MADE),
    ]
    described = found.described(MADE + 10 * 86400)
    assert (described["newest"], described["age_days"], described["old"]) == (
        "2023-11-15T22:13:20Z",
        9,
        True,
    )
    assert not found.described(MADE + 86400)["old"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("daily.cvd", official(archive())[:-600], "its content is not what its header says"),
        ("daily.cvd", official(archive())[:40], "it does not begin as one"),
        ("daily.cvd", b"x" * 5000, "it does not begin as one"),
        ("daily.cvd", official(archive())[:300], "its content is not what its header says"),
        ("daily.cld", official(archive())[:3000], "it is cut short, or damaged"),
        ("daily.cld", official(archive())[:4900], "it is cut short, or damaged"),
        ("daily.cld", official(gzip.compress(archive()))[:600], "it is cut short, or damaged"),
        ("daily.cld", official(b""), "it is cut short, or damaged"),
        ("daily.cld", official(b"y" * 4000), "it is cut short, or damaged"),
        ("own.hdb", b"", "it is empty"),
    ],
)
def test_a_torn_database_is_an_error(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / "good.hdb").write_text(HASH)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"{name} is no whole database of ClamAV: {why}") as caught:
        inspect_clamav.signatures(str(tmp_path))
    assert "freshclam" in (caught.value.hint or "")


def test_no_signatures_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone: No such file"):
        inspect_clamav.signatures(str(tmp_path / "gone"))
    (tmp_path / "known.fp").write_text(HASH)  # says what is none
    with pytest.raises(UsageError, match="there are no signatures of ClamAV in"):
        inspect_clamav.signatures(str(tmp_path))
    (tmp_path / "a.hdb").mkdir()
    with pytest.raises(UsageError, match=r"a\.hdb cannot be read: Is a directory"):
        inspect_clamav.signatures(str(tmp_path))


def test_the_machine_has_the_memory_that_they_need(tmp_path: Path) -> None:
    with (tmp_path / "a.hdb").open("wb") as file:
        file.truncate(100 << 20)
    found = inspect_clamav.signatures(str(tmp_path))
    assert 400 << 20 < found.memory < 1 << 30
    assert inspect_clamav.sized(found, 1 << 30, given=None) == (1 << 30) + found.memory
    assert inspect_clamav.sized(found, 2 << 30, given="2g") == 2 << 30
    with pytest.raises(UsageError, match=r"--memory 512m is too little .* 656 MiB") as caught:
        inspect_clamav.sized(found, 512 << 20, given="512m")
    least = int(re.findall(r"--memory (\d+)m", caught.value.hint or "")[0])
    assert inspect_clamav.sized(found, least << 20, given=f"{least}m") == least << 20


def test_the_disk_has_the_signatures(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db/a.hdb").write_text(HASH * 1000)
    found = inspect_clamav.signatures(str(tmp_path / "db"))
    inspect_clamav.write_disk(str(tmp_path / "disk"), found)
    assert HASH.encode() * 1000 in (tmp_path / "disk").read_bytes()
    (tmp_path / "db/a.hdb").write_text(HASH)
    with pytest.raises(UsageError, match="it became shorter"):
        inspect_clamav.write_disk(str(tmp_path / "other"), found)
    assert not (tmp_path / "other").exists()


def a_scan(**changes: Any) -> dict[str, Any]:
    return {"files": 12, "signatures": 3, "seconds": 1, "problem": "", **changes}


def test_a_machine_has_to_say_what_the_scanner_did() -> None:
    answer = '{"format": 1, "images": [], "milliseconds": 5%s}'
    said = ', "clamav": {"files": 12, "signatures": 3, "seconds": 1, "problem": ""}'
    told = {"clamav_seconds": 600}
    assert inspect_schema.parse((answer % said).encode(), 0, told)["clamav"] == a_scan()
    for text, asked in (
        (answer % "", told),
        (answer % said, {}),
        (answer % said.replace("12", '"x"'), told),
    ):
        with pytest.raises(ImageError, match=r"not as it should be: report\.clamav"):
            inspect_schema.parse(text.encode(), 0, asked)


def test_the_reports_tell_it(tmp_path: Path) -> None:
    (tmp_path / "a.hdb").write_text(HASH)
    os.utime(tmp_path / "a.hdb", (time.time() - 30 * 86400,) * 2)
    scan = inspect_clamav.reported(inspect_clamav.signatures(str(tmp_path)), a_scan())
    finding = {"kind": "malware", "path": "/x", "detail": "Planted.Test", "layer": 1}
    report = {**whole_report(findings=[finding], counts={"malware": 1}), "clamav": scan}
    line = "12 files by ClamAV, with 3 signatures, the newest of"
    text, page = inspect_text.text(report), inspect_html.page(report)
    for shown in (text, page):
        assert line in shown
        assert "(30 days old; old: freshclam renews them)" in shown
        assert "Planted.Test" in shown
    assert "HIGH: MALWARE (1)" in text
    [result] = inspect_sbom.sarif(report)["runs"][0]["results"]
    assert (result["ruleId"], result["level"]) == ("malware", "error")


def test_what_was_made_before_is_used_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(packages, "have_apt", lambda: False)
    with pytest.raises(GuestAssetError, match="this machine has no apt"):
        inspect_clamav.scanner(print)
    made = str(tmp_path / "clamav-1.4.6.erofs")
    inspect_machine.write_files(made, {"clamscan": (4, [b"\x7fELF"])})
    (tmp_path / "clamav-1.4.7.erofs").write_bytes(bytes(4096))  # cut short
    assert inspect_clamav.scanner(print) == made


def test_dependencies_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's package depends on freshclam, and that on half of a system."""
    answers = {
        "clamav": "clamav\n  Depends: clamav-freshclam\n  Depends: libclamav99t64\n  Depends: <clamav-data>\n"
        "clamav-freshclam\n  Depends: perl\nperl\nlibclamav99t64\n<clamav-data>\n  clamav-freshclam\n",
        "libclamav99t64": "libclamav99t64\n  Depends: zlib1g\nzlib1g\nlibc6\nlibc6:i386\ngcc-12-base\n",
    }
    monkeypatch.setattr(packages, "_output", lambda argv, *_: answers[argv[-1]])
    assert packages.dependencies("libclamav99t64") == ["gcc-12-base", "libc6", "zlib1g"]
    assert clamav._libraries() == ["libclamav99t64", "libc6", "zlib1g"]
    answers["clamav"] = "clamav\nperl\n"
    with pytest.raises(GuestAssetError, match="depends on no libclamav"):
        clamav._libraries()
