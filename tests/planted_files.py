"""Files for images that are made to be nasty: programs, package databases, archives and layers, byte by byte.

None is an input that harms a program in use: what they try is aimed at the reader of `kata inspect-image`.
"""

from __future__ import annotations

import gzip
import io
import sqlite3
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

# ---- archives of layers ----

BLOCK = 512


def block(
    name: bytes,
    size: int = 0,
    kind: bytes = b"0",
    *,
    mode: int = 0o644,
    link: bytes = b"",
    extra: Mapping[int, bytes] = MappingProxyType({}),
) -> bytes:
    """A ustar header of any content. `extra` has bytes for offsets."""
    data = bytearray(BLOCK)
    data[: len(name[:100])] = name[:100]
    for at, value in ((100, mode), (108, 0), (116, 0)):
        data[at : at + 8] = b"%07o\0" % value
    data[124:136] = b"%011o\0" % size if size < 1 << 33 else b"\x80\0\0\0" + size.to_bytes(8, "big")
    data[136:148] = b"%011o\0" % 1_600_000_000
    data[156:157] = kind
    data[157 : 157 + len(link[:100])] = link[:100]
    data[257:265] = b"ustar\x0000"
    for place, what in extra.items():
        data[place : place + len(what)] = what
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(records: dict[str, bytes], kind: bytes = b"x") -> bytes:
    """An extended header."""
    body = b""
    for key, value in records.items():
        rest = b" " + key.encode() + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        body += str(length).encode() + rest
    return block(b"PaxHeaders/x", len(body), kind) + padded(body)


def entry(
    name: str | bytes,
    content: bytes = b"",
    kind: bytes = b"0",
    *,
    size: int | None = None,
    records: dict[str, bytes] | None = None,
    mode: int = 0o644,
    link: bytes = b"",
    extra: Mapping[int, bytes] = MappingProxyType({}),
) -> bytes:
    """A member, with whatever sizes are claimed."""
    name = name if isinstance(name, bytes) else name.encode()
    head = pax(records) if records else b""
    claimed = len(content) if size is None else size
    return head + block(name, claimed, kind, mode=mode, link=link, extra=extra) + padded(content)


END = bytes(2 * BLOCK)


def sparse_1_0(name: str, real: int, runs: list[tuple[int, bytes]]) -> bytes:
    """A sparse file as GNU tar writes them by default in pax archives."""
    numbers = [len(runs)] + [number for offset, data in runs for number in (offset, len(data))]
    content = padded("".join(f"{number}\n" for number in numbers).encode()) + b"".join(d for _, d in runs)
    records = {
        "GNU.sparse.major": b"1",
        "GNU.sparse.minor": b"0",
        "GNU.sparse.name": name.encode(),
        "GNU.sparse.realsize": str(real).encode(),
    }
    return entry("GNUSparseFile.0/x", content, records=records)


def sparse_old(name: str, real: int, runs: list[tuple[int, bytes]]) -> bytes:
    """A sparse file of GNU tar's own format, of at most four runs."""
    extra = {257: b"ustar  \0", 483: b"%011o\0" % real}
    for index, (offset, data) in enumerate(runs):
        extra[386 + 24 * index] = b"%011o\0%011o\0" % (offset, len(data))
    return entry(name, b"".join(data for _, data in runs), b"S", extra=extra)


# ---- programs ----

INTERPRETER = "/lib64/ld-linux-x86-64.so.2"


def elf(
    *, machine: int = 62, kind: int = 3, stack: int = 6, relro: bool = True, interpreter: str = INTERPRETER,
    run_path: str = "", canary: bool = True, data: bytes = b"",
) -> bytes:  # fmt: skip
    """A program that nobody can run, with the headers of one that is hardened unless said otherwise."""
    strings = b"\0" + (b"__stack_chk_fail\0" if canary else b"puts\0")
    run_path_at = len(strings)
    strings += run_path.encode() + b"\0"
    segments: list[tuple[int, int, bytes]] = []  # kind, flags, content
    if interpreter:
        segments.append((3, 4, interpreter.encode() + b"\0"))
    segments.append((0x6474E551, stack, b""))
    if relro:
        segments.append((0x6474E552, 4, b""))
    tags = [(24, 0), (10, len(strings))] + ([(29, run_path_at)] if run_path else [])
    count = len(segments) + 3
    at = 64 + 56 * count
    headers, body = b"", b""

    def segment(kind: int, flags: int, content: bytes) -> int:
        nonlocal headers, body
        body += bytes(-(at + len(body)) % 16)
        place = at + len(body)
        size = len(content)
        headers += struct.pack("<IIQQQQQQ", kind, flags, place, place, place, size, size, 16)
        body += content
        return place

    for one in segments:
        segment(*one)
    place = segment(1, 4, strings)  # of the whole file this part is mapped, which has the strings
    tags += [(5, place), (0, 0)]
    segment(2, 6, b"".join(struct.pack("<QQ", *tag) for tag in tags))
    segment(1, 6, data or bytes(16))
    head = b"\x7fELF\2\1\1" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return head + headers + body


def go_record(modules: str, version: str = "go1.22.3") -> bytes:
    """What Go's linker says of a build since 1.18."""

    def counted(text: bytes) -> bytes:
        length, out = len(text), b""
        while length >= 0x80:
            out += bytes([length & 0x7F | 0x80])
            length >>= 7
        return out + bytes([length]) + text

    marked = b"0123456789abcdef" + modules.encode() + b"0123456789abcdef"
    return b"\xff Go buildinf:\x08\x02" + bytes(16) + counted(version.encode()) + counted(marked)


def old_go_program(modules: str, version: str = "go1.16.5") -> bytes:
    """A program of before Go 1.18, whose record points to strings."""
    marked = b"0123456789abcdef" + modules.encode() + b"0123456789abcdef"
    probe = elf(kind=2, interpreter="", data=b"?" * 16)
    base = probe.rindex(b"?" * 16)
    texts = base + 64
    record = b"\xff Go buildinf:\x08\x00" + struct.pack("<QQ", base + 32, base + 48)
    record += struct.pack("<QQQQ", texts, len(version), texts + len(version), len(marked))
    return elf(kind=2, interpreter="", data=record + version.encode() + marked)


# ---- packages ----


def deb(name: str, version: str = "1.0-1", status: str = "install ok installed") -> str:
    return f"Package: {name}\nStatus: {status}\nArchitecture: amd64\nVersion: {version}\n\n"


def apk(name: str, version: str = "1.0-r0") -> str:
    return f"C:Q1abc=\nP:{name}\nV:{version}\nA:x86_64\nL:MIT\n\n"


def rpm_header(name: str, version: str, release: str, epoch: int | None = None) -> bytes:
    index, store = b"", b""
    for tag, text in ((1000, name), (1001, version), (1002, release), (1022, "x86_64")):
        index += struct.pack(">IIII", tag, 6, len(store), 1)
        store += text.encode() + b"\0"
    if epoch is not None:
        store += bytes(-len(store) % 4)
        index += struct.pack(">IIII", 1003, 4, len(store), 1)
        store += struct.pack(">I", epoch)
    return struct.pack(">II", len(index) // 16, len(store)) + index + store


def rpm_sqlite(*headers: bytes) -> bytes:
    """A database as rpm 4.16 and later has it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rpmdb.sqlite"
        database = sqlite3.connect(path)
        database.execute(
            "CREATE TABLE 'Packages' (hnum INTEGER PRIMARY KEY AUTOINCREMENT, blob BLOB NOT NULL)"
        )
        database.executemany("INSERT INTO Packages (blob) VALUES (?)", [(header,) for header in headers])
        database.commit()
        database.close()
        return path.read_bytes()


def rpm_ndb(*headers: bytes) -> bytes:
    """A database as SUSE has it."""
    slots, blobs = bytearray(b"RpmP" + bytes(8) + b"\1" + bytes(19)), b""
    for at in range(2, 256):
        slots += b"Slot" + bytes(12)
        if at - 2 < len(headers):
            blob = headers[at - 2]
            place = 4096 + len(blobs)
            slots[-16:] = struct.pack("<4sIII", b"Slot", at - 1, place // 16, 1)
            piece = struct.pack("<4sIII", b"BlbS", at - 1, 0, len(blob)) + blob
            blobs += piece + bytes(-len(piece) % 16)
    return bytes(slots) + blobs


def jar(members: dict[str, bytes], *, before: bytes = b"") -> bytes:
    """A Java archive, behind whatever starts it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return before + out.getvalue()


def pom(group: str, artifact: str, version: str) -> dict[str, bytes]:
    text = f"groupId={group}\nartifactId={artifact}\nversion={version}\n"
    return {f"META-INF/maven/{group}/{artifact}/pom.properties": text.encode()}


MANIFEST = {"META-INF/MANIFEST.MF": b"Manifest-Version: 1.0\r\n\r\n"}


# ---- secrets, put together here so that nobody takes this file for one that has some ----

BODY = "q7Wx9Zt2Lm4Rk8Yp3Vn6Bd1Hs5Jc0Fg"


def token(prefix: str, length: int, alphabet: str = BODY) -> str:
    return prefix + (alphabet * (length // len(alphabet) + 1))[:length]


def pem(kind: str = "RSA PRIVATE KEY") -> bytes:
    dashes = "-" * 5
    lines = "\n".join((BODY * 3)[at : at + 64] for at in range(20))
    return f"{dashes}BEGIN {kind}{dashes}\n{lines}\n{dashes}END {kind}{dashes}\n".encode()


TOKENS = {
    "aws": token("AK" + "IA", 16, BODY.upper()),
    "aws-session": token("AS" + "IA", 16, BODY.upper()),
    **{f"github-{kind}": token(f"gh{kind}_", 36) for kind in "posur"},
    "github-fine": token("github_" + "pat_", 70),
    "gitlab": token("gl" + "pat-", 20),
    **{f"slack-{kind}": token(f"xox{kind}-", 40) for kind in "bpars"},
    "google": token("AI" + "za", 35),
    "stripe": token("sk_" + "live_", 24),
    "npm": token("npm" + "_", 36),
    "pypi": token("pypi-" + "AgE", 60),
    "sendgrid": token("SG" + ".", 66),
    "openai": token("sk-" + "proj-", 48),
    "anthropic": token("sk-" + "ant-", 60),
    "digitalocean": token("dop_" + "v1_", 64),
    "huggingface": token("h" + "f_", 36),
    "docker": token("dckr_" + "pat_", 27),
    "vault": token("hv" + "s.", 90),
    "azure": "Account" + "Key=" + token("", 86) + "==",
    "jwt": token("eyJhbGci" + "Oi", 90),
    "jwt-type-first": token("eyJ0eXAi" + "Oi", 90),
    "slack-hook": "https://hooks.slack" + ".com/services/" + token("", 44),
}


# ---- layers as they are stored ----


def broken_gzip(data: bytes, how: str) -> bytes:
    packed = gzip.compress(data, 6, mtime=0)
    if how == "cut":
        return packed[: len(packed) // 2]
    if how == "checksum":
        return packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:]
    return packed + b"something that is no gzip"
