"""Frames and envelopes of ttRPC, fed with whole streams, pieces and garbage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.proto import google_pb, ttrpc_pb
from kata.ttrpc import envelope, frame
from kata.ttrpc.status import ProtocolError, TtrpcError, describe

QUIET = settings(deadline=None, database=None)

frames = st.builds(
    frame.Frame,
    st.integers(0, 2**32 - 1),
    st.sampled_from([frame.REQUEST, frame.RESPONSE, frame.DATA]),
    st.binary(max_size=100),
    st.integers(0, 255),
)


@QUIET
@given(st.lists(frames, max_size=10), st.data())
def test_pieces_of_any_size_make_the_same_frames(items: list[frame.Frame], data: st.DataObject) -> None:
    stream = b"".join(frame.encode(item.stream, item.kind, item.data, item.flags) for item in items)
    parser = frame.Parser()
    got = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += parser.feed(stream[:size])
        stream = stream[size:]
    assert got == items
    assert parser.pending == 0


@QUIET
@given(st.binary(max_size=100))
def test_garbage_is_frames_or_a_protocol_error(data: bytes) -> None:
    parser = frame.Parser()
    try:
        parser.feed(data)
    except ProtocolError:
        with pytest.raises(ProtocolError):
            parser.feed(b"")
        assert parser.pending == 0


def test_the_header() -> None:
    assert frame.encode(3, frame.RESPONSE, b"abc") == b"\0\0\0\x03\0\0\0\x03\x02\0abc"


def test_an_oversized_frame_is_refused_by_its_header() -> None:
    head = (frame.MAX_DATA + 1).to_bytes(4, "big") + b"\0\0\0\x01\x02\0"
    with pytest.raises(ProtocolError, match="4194305"):
        frame.Parser().feed(head)
    parser = frame.Parser()
    assert parser.feed(frame.MAX_DATA.to_bytes(4, "big") + b"\0\0\0\x01\x02\0") == []
    assert [len(item.data) for item in parser.feed(bytes(frame.MAX_DATA))] == [frame.MAX_DATA]
    with pytest.raises(ValueError, match="do not fit"):
        frame.encode(1, frame.REQUEST, bytes(frame.MAX_DATA + 1))
    with pytest.raises(ValueError, match="32 bits"):
        frame.encode(1 << 32, frame.REQUEST, b"")


@pytest.mark.parametrize("kind", [0, 4, 255])
def test_an_unknown_type_is_refused(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"type {kind}"):
        frame.Parser().feed(b"\0\0\0\0\0\0\0\x01" + bytes((kind, 0)))


def test_what_is_pending() -> None:
    parser = frame.Parser()
    parser.feed(frame.encode(1, frame.REQUEST, b"abc")[:-1])
    assert parser.pending == 12


# ---- envelopes, with the generated messages as the oracle ----

texts = st.text(max_size=30)
ints64 = st.integers(-(2**63), 2**63 - 1)


@QUIET
@given(texts, texts, st.binary(max_size=50), ints64, st.lists(st.tuples(texts, texts), max_size=4))
def test_requests(
    service: str, method: str, payload: bytes, nano: int, metadata: list[tuple[str, str]]
) -> None:
    raw = envelope.Request(service, method, payload, nano, metadata).encode()
    oracle = ttrpc_pb.Request(
        service=service,
        method=method,
        payload=payload,
        timeout_nano=nano,
        metadata=[ttrpc_pb.KeyValue(key=key, value=value) for key, value in metadata],
    )
    assert ttrpc_pb.Request.decode(raw) == oracle
    back = envelope.Request.decode(oracle.encode())
    assert (back.service, back.method, back.payload, back.timeout_nano) == (service, method, payload, nano)
    assert back.metadata == metadata


@QUIET
@given(st.binary(max_size=50), st.integers(-(2**31), 2**31 - 1), texts, st.lists(st.binary(max_size=9)))
def test_responses(payload: bytes, code: int, message: str, details: list[bytes]) -> None:
    items = [google_pb.Any(type_url="t", value=detail) for detail in details]
    raw = envelope.Response(payload, code, message, [item.encode() for item in items]).encode()
    decoded = ttrpc_pb.Response.decode(raw)
    assert decoded.payload == payload
    status = decoded.status or google_pb.Status()
    assert status == google_pb.Status(code=code, message=message, details=items)
    back = envelope.Response.decode(ttrpc_pb.Response(status=status, payload=payload).encode())
    assert (back.payload, back.code, back.message) == (payload, code, message)
    assert back.details == [item.encode() for item in items]


@QUIET
@given(st.binary(max_size=60))
def test_malformed_envelopes_are_value_errors(raw: bytes) -> None:
    for kind in (envelope.Request, envelope.Response):
        try:
            kind.decode(raw)
        except ValueError:
            continue


def test_metadata_is_bounded() -> None:
    with pytest.raises(ValueError, match="metadata"):
        envelope.Request.decode(b"\x2a\x00" * (envelope.MAX_METADATA + 1))
    body = b"\x1a\x00" * (envelope.MAX_METADATA + 1)
    with pytest.raises(ValueError, match="details"):
        envelope.Response.decode(b"\x0a" + bytes((len(body) & 0x7F | 0x80, len(body) >> 7)) + body)


# ---- statuses ----


class _Named(Exception):
    grpc_code = 5
    hint = "look elsewhere"


def test_how_exceptions_become_statuses() -> None:
    told = describe(_Named("no such thing"))
    # Not in the message: containerd and Docker put that into the middle of a sentence of theirs.
    assert (told.code, told.message) == (5, "no such thing")
    assert told.split_hint() == ("no such thing", "look elsewhere")
    for hint in ("x", "y" * 127, "z" * 128, "ä" * 7000):
        error = _Named("no such thing")
        error.hint = hint
        told = describe(error)
        assert told.split_hint() == ("no such thing", hint)
        assert google_pb.Any.decode(told.details[0]).value.decode() == hint
    assert str(told).endswith("(NOT_FOUND)")
    bug = describe(KeyError("a\nb"))
    assert bug.code == 13
    assert "\n" not in bug.message
    assert bug.message.startswith("KeyError: ")
    assert describe(ValueError()).message == "ValueError"
    same = TtrpcError(99, "odd")
    assert describe(same) is same
    assert "code 99" in str(same)
    assert same.split_hint() == ("odd", "")
