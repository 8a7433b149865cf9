//! ttRPC frames without I/O: requests out of a byte stream, answers into buffers.

use crate::prelude::*;

/// Length of a frame's header.
pub const HEADER: usize = 10;
/// The longest payload of a frame that the protocol allows.
pub const MAX_PAYLOAD: usize = 4 << 20;

const TYPE_REQUEST: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
const TYPE_DATA: u8 = 3;
/// Flag of a data frame: the sender's last one.
const REMOTE_CLOSED: u8 = 1;

/// One unary call as it lies in the input buffer.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    pub service: &'a str,
    pub method: &'a str,
    pub payload: &'a [u8],
    /// Nanoseconds that the caller waits; 0 = without end.
    pub timeout_nano: i64,
    /// The caller's place in a trace (W3C Trace Context), from the metadata; empty = none.
    pub traceparent: &'a str,
}

/// What the head of the input is.
#[derive(Debug, PartialEq, Eq)]
pub enum Head {
    /// An incomplete frame, and its total length (an estimate until the header is complete).
    Partial(usize),
    /// A complete request frame of `total` bytes, header included.
    Request { stream: u32, total: usize },
    /// A whole frame of a streaming call's data; the sender's last one or not.
    Data { stream: u32, total: usize, last: bool },
    /// A whole frame of another kind; to be stepped over.
    Other { stream: u32, total: usize },
    /// Bytes that are not a header of this protocol.
    Garbage(&'static str),
}

/// Looks at the first bytes of the input.
pub fn head(input: &[u8]) -> Head {
    let Some(header) = input.first_chunk::<HEADER>() else {
        return Head::Partial(HEADER);
    };
    let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let stream = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    if length > MAX_PAYLOAD {
        return Head::Garbage("frame is longer than 4 MiB");
    }
    if !(1..=3).contains(&header[8]) || header[9] > 7 {
        return Head::Garbage("frame of an unknown type");
    }
    let total = HEADER + length;
    if input.len() < total {
        return Head::Partial(total);
    }
    // Clients number their streams odd; a request on an even one cannot be answered without confusion.
    match header[8] {
        TYPE_REQUEST if stream % 2 == 1 => Head::Request { stream, total },
        TYPE_DATA if stream % 2 == 1 => Head::Data { stream, total, last: header[9] & REMOTE_CLOSED != 0 },
        _ => Head::Other { stream, total },
    }
}

/// The envelope of a request. Written out by hand, so that a megabyte of standard input is not copied to look at it.
pub fn parse_request(mut buf: &[u8]) -> Result<Request<'_>> {
    let mut request = Request { service: "", method: "", payload: &[], timeout_nano: 0, traceparent: "" };
    while let Some((number, field)) = next_field(&mut buf)? {
        match (number, field) {
            (1, Field::Bytes(value)) => request.service = text(value)?,
            (2, Field::Bytes(value)) => request.method = text(value)?,
            (3, Field::Bytes(value)) => request.payload = value,
            (4, Field::Varint(value)) => request.timeout_nano = value as i64,
            (5, Field::Bytes(mut pair)) => {
                let (mut key, mut value) = (&[][..], &[][..]);
                while let Some((number, field)) = next_field(&mut pair)? {
                    match (number, field) {
                        (1, Field::Bytes(bytes)) => key = bytes,
                        (2, Field::Bytes(bytes)) => value = bytes,
                        _ => {}
                    }
                }
                if key == b"traceparent" {
                    request.traceparent = text(value)?;
                }
            }
            _ => {}
        }
    }
    Ok(request)
}

/// A WriteStreamRequest whose data stays where it is.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct WriteStdin<'a> {
    pub container_id: &'a str,
    pub exec_id: &'a str,
    pub data: &'a [u8],
}

pub fn parse_write(mut buf: &[u8]) -> Result<WriteStdin<'_>> {
    let mut request = WriteStdin::default();
    while let Some((number, field)) = next_field(&mut buf)? {
        match (number, field) {
            (1, Field::Bytes(value)) => request.container_id = text(value)?,
            (2, Field::Bytes(value)) => request.exec_id = text(value)?,
            (3, Field::Bytes(value)) => request.data = value,
            _ => {}
        }
    }
    Ok(request)
}

/// A StreamPiece whose data stays where it is.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct StreamPiece<'a> {
    pub data: &'a [u8],
    pub credit: u32,
    pub container_id: &'a str,
    pub exec_id: &'a str,
    pub stream: u32,
    pub port: u32,
    pub end: bool,
    pub socket: u32,
    pub address: &'a [u8],
    pub datagram: u32,
}

pub fn parse_piece(mut buf: &[u8]) -> Result<StreamPiece<'_>> {
    let mut piece = StreamPiece::default();
    while let Some((number, field)) = next_field(&mut buf)? {
        match (number, field) {
            (1, Field::Bytes(value)) => piece.data = value,
            (2, Field::Varint(value)) => piece.credit = value as u32,
            (4, Field::Varint(value)) => piece.port = value as u32,
            (5, Field::Varint(value)) => piece.end = value != 0,
            (6, Field::Varint(value)) => piece.socket = value as u32,
            (7, Field::Bytes(value)) => piece.address = value,
            (8, Field::Varint(value)) => piece.datagram = value as u32,
            (3, Field::Bytes(mut target)) => {
                while let Some((number, field)) = next_field(&mut target)? {
                    match (number, field) {
                        (1, Field::Bytes(value)) => piece.container_id = text(value)?,
                        (2, Field::Bytes(value)) => piece.exec_id = text(value)?,
                        (3, Field::Varint(value)) => piece.stream = value as u32,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(piece)
}

enum Field<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Fixed,
}

/// Number and value of the first field, which is taken off `buf`.
fn next_field<'a>(buf: &mut &'a [u8]) -> Result<Option<(u64, Field<'a>)>> {
    if buf.is_empty() {
        return Ok(None);
    }
    let tag = varint(buf)?;
    let field = match tag & 7 {
        0 => Field::Varint(varint(buf)?),
        2 => {
            let len = varint(buf)?;
            Field::Bytes(take(buf, usize::try_from(len).map_err(|_| truncated())?)?)
        }
        1 => take(buf, 8).map(|_| Field::Fixed)?,
        5 => take(buf, 4).map(|_| Field::Fixed)?,
        _ => return Err(Error::invalid("malformed request: unknown wire type")),
    };
    Ok(Some((tag >> 3, field)))
}

fn take<'a>(buf: &mut &'a [u8], len: usize) -> Result<&'a [u8]> {
    let (value, rest) = buf.split_at_checked(len).ok_or_else(truncated)?;
    *buf = rest;
    Ok(value)
}

fn truncated() -> Error {
    Error::invalid("malformed request: truncated")
}

fn text(bytes: &[u8]) -> Result<&str> {
    core::str::from_utf8(bytes).map_err(|_| Error::invalid("malformed request: name is not UTF-8"))
}

fn varint(buf: &mut &[u8]) -> Result<u64> {
    // Nearly all tags and lengths are one byte.
    if let [byte @ 0..0x80, rest @ ..] = *buf {
        *buf = rest;
        return Ok(u64::from(*byte));
    }
    let mut value = 0u64;
    for (i, byte) in buf.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            *buf = &buf[i + 1..];
            return Ok(value);
        }
    }
    Err(truncated())
}

/// Bytes on their way out: `bytes[start..]` is still to be written.
#[derive(Debug, Default)]
pub struct Outgoing {
    pub bytes: Vec<u8>,
    pub start: usize,
    /// How many bytes of the connection's pipe follow.
    pub piped: usize,
}

/// Room that [`ok_frame_around`] needs before the data: header, two tags, two lengths of at most four bytes.
pub const DATA_OFFSET: usize = 24;

/// A successful answer whose payload is one `bytes` field, number 1 (stream data): `buffer[DATA_OFFSET..]` is the
/// data, which stays where the read call has put it.
pub fn ok_frame_around(stream: u32, mut buffer: Vec<u8>) -> Outgoing {
    let data = buffer.len() - DATA_OFFSET;
    let mut start = DATA_OFFSET;
    if data > 0 {
        start = put_length_before(&mut buffer, start, 0x0a, data);
    }
    let payload = buffer.len() - start;
    if payload > 0 {
        start = put_length_before(&mut buffer, start, 0x12, payload);
    }
    let total = buffer.len() - start;
    start -= HEADER;
    buffer[start..start + HEADER].copy_from_slice(&header(TYPE_RESPONSE, total, stream));
    Outgoing { bytes: buffer, start, piped: 0 }
}

/// A data frame of a streaming call with a StreamPiece; `buffer` as for [`ok_frame_around`], with data.
pub fn data_frame_around(stream: u32, mut buffer: Vec<u8>) -> Outgoing {
    let data = buffer.len() - DATA_OFFSET;
    let body = put_length_before(&mut buffer, DATA_OFFSET, 0x0a, data);
    let total = buffer.len() - body;
    let start = body - HEADER;
    buffer[start..body].copy_from_slice(&header(TYPE_DATA, total, stream));
    Outgoing { bytes: buffer, start, piped: 0 }
}

/// The same for `length` bytes of data that lie in the connection's pipe.
pub fn data_frame_before(stream: u32, length: usize) -> Outgoing {
    let mut bytes = vec![0u8; DATA_OFFSET];
    let body = put_length_before(&mut bytes, DATA_OFFSET, 0x0a, length);
    let total = bytes.len() - body + length;
    let start = body - HEADER;
    bytes[start..body].copy_from_slice(&header(TYPE_DATA, total, stream));
    Outgoing { bytes, start, piped: length }
}

/// A data frame that gives the other side credit.
pub fn credit_frame(stream: u32, credit: usize) -> Vec<u8> {
    let mut out = vec![0u8; HEADER];
    out.push(0x10);
    put_varint(&mut out, credit);
    let length = out.len() - HEADER;
    out[..HEADER].copy_from_slice(&header(TYPE_DATA, length, stream));
    out
}

/// A data frame that ends the agent's direction of a connection.
pub fn end_frame(stream: u32) -> Vec<u8> {
    let mut out = vec![0u8; HEADER];
    out.extend([0x28, 1]);
    out[..HEADER].copy_from_slice(&header(TYPE_DATA, 2, stream));
    out
}

/// A data frame with a datagram and its number.
pub fn datagram_frame(stream: u32, data: &[u8], number: u32) -> Vec<u8> {
    let mut out = vec![0u8; HEADER];
    put_bytes(&mut out, 0x0a, data);
    out.push(0x40);
    put_varint(&mut out, number as usize);
    let length = out.len() - HEADER;
    out[..HEADER].copy_from_slice(&header(TYPE_DATA, length, stream));
    out
}

/// Puts tag and length so that they end at `end`; where they start.
fn put_length_before(buffer: &mut [u8], end: usize, tag: u8, mut value: usize) -> usize {
    let mut bytes = [0u8; 10];
    let mut len = 1;
    bytes[0] = tag;
    loop {
        let more = value > 0x7f;
        bytes[len] = (value & 0x7f) as u8 | if more { 0x80 } else { 0 };
        len += 1;
        value >>= 7;
        if !more {
            break;
        }
    }
    buffer[end - len..end].copy_from_slice(&bytes[..len]);
    end - len
}

fn header(kind: u8, length: usize, stream: u32) -> [u8; HEADER] {
    let mut header = [0u8; HEADER];
    header[0..4].copy_from_slice(&(length as u32).to_be_bytes());
    header[4..8].copy_from_slice(&stream.to_be_bytes());
    header[8] = kind;
    header
}

/// An answer frame: the payload, or the error as a status.
pub fn answer(stream: u32, outcome: &Result<Vec<u8>>) -> Vec<u8> {
    let mut out = vec![0u8; HEADER];
    match outcome {
        Ok(payload) => put_bytes(&mut out, 0x12, payload),
        Err(error) => {
            let mut status = vec![0x08];
            put_varint(&mut status, error.code as usize);
            put_bytes(&mut status, 0x12, error.message.as_bytes());
            put_bytes(&mut out, 0x0a, &status);
        }
    }
    let length = out.len() - HEADER;
    if length > MAX_PAYLOAD {
        let error = Error::exhausted(format!("the answer of {length} bytes is longer than a frame may be"));
        return answer(stream, &Err(error));
    }
    out[..HEADER].copy_from_slice(&header(TYPE_RESPONSE, length, stream));
    out
}

fn put_bytes(out: &mut Vec<u8>, tag: u8, value: &[u8]) {
    if !value.is_empty() {
        out.push(tag);
        put_varint(out, value.len());
        out.extend_from_slice(value);
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    while value > 0x7f {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::agent::{ReadStreamResponse, WriteStreamRequest};
    use crate::proto::codec::Message;
    use crate::proto::{agentext, ttrpc};

    fn request_frame(request: &ttrpc::Request, stream: u32) -> Vec<u8> {
        let body = request.to_vec();
        let mut frame = header(TYPE_REQUEST, body.len(), stream).to_vec();
        frame.extend(body);
        frame
    }

    #[test]
    fn a_request_is_found_and_parsed() {
        let sent = ttrpc::Request {
            service: "grpc.Health".into(),
            method: "Check".into(),
            payload: vec![1, 2, 3],
            timeout_nano: 5_000_000_000,
            metadata: vec![ttrpc::KeyValue { key: "traceparent".into(), value: "x".into() }],
        };
        let frame = request_frame(&sent, 7);
        for cut in 0..frame.len() {
            assert!(matches!(head(&frame[..cut]), Head::Partial(_)), "{cut}");
        }
        assert_eq!(head(&frame), Head::Request { stream: 7, total: frame.len() });
        let got = parse_request(&frame[HEADER..]).unwrap();
        assert_eq!(
            (got.service, got.method, got.payload, got.timeout_nano),
            ("grpc.Health", "Check", &[1u8, 2, 3][..], 5_000_000_000)
        );
        assert_eq!(got.traceparent, "x");
    }

    #[test]
    fn the_data_of_a_write_is_found_in_place() {
        let sent = WriteStreamRequest { container_id: "c".into(), exec_id: "e".into(), data: vec![5; 1000] };
        let bytes = sent.to_vec();
        let got = parse_write(&bytes).unwrap();
        assert_eq!((got.container_id, got.exec_id, got.data), ("c", "e", &sent.data[..]));
        assert!(bytes.as_ptr_range().contains(&got.data.as_ptr()));
        assert!(parse_write(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn what_is_no_request_is_told_apart() {
        assert!(matches!(head(b"\xff\xff\xff\xff\0\0\0\x01\x01\0"), Head::Garbage(_)));
        assert!(matches!(head(b"\0\0\0\0\0\0\0\x01\x09\0"), Head::Garbage(_)));
        assert_eq!(head(b"\0\0\0\0\0\0\0\x02\x01\0"), Head::Other { stream: 2, total: 10 });
        assert_eq!(head(b"\0\0\0\x01\0\0\0\x01\x02\0z"), Head::Other { stream: 1, total: 11 });
    }

    #[test]
    fn hostile_envelopes_are_errors() {
        for bad in [
            &b"\x0a\xff\xff\xff\xff\x0fx"[..],
            b"\x0a",
            b"\x0b",
            b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
            b"\x0d\0",
            b"\x0a\x02\xff\xfe",
        ] {
            assert!(parse_request(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn answers_are_what_the_generated_code_would_say() {
        let frame = answer(5, &Ok(vec![9; 300]));
        assert_eq!(u32::from_be_bytes(frame[..4].try_into().unwrap()) as usize, frame.len() - HEADER);
        assert_eq!(&frame[4..10], [0, 0, 0, 5, 2, 0]);
        let body = ttrpc::Response::decode(&frame[HEADER..]).unwrap();
        assert_eq!((body.payload, body.status), (vec![9; 300], None));
        let frame = answer(5, &Err(Error::not_found("gone")));
        let status = ttrpc::Response::decode(&frame[HEADER..]).unwrap().status.unwrap();
        assert_eq!((status.code, status.message.as_str()), (5, "gone"));
        assert_eq!(answer(5, &Ok(vec![])).len(), HEADER);
        assert!(answer(5, &Ok(vec![0; MAX_PAYLOAD + 1])).len() < 200);
    }

    #[test]
    fn stream_data_is_framed_in_place() {
        for len in [0usize, 1, 100, 127, 128, 20_000, 1 << 20, 3 << 20] {
            let mut buffer = vec![0u8; DATA_OFFSET];
            buffer.extend((0..len).map(|i| i as u8));
            let out = ok_frame_around(3, buffer);
            let frame = &out.bytes[out.start..];
            assert_eq!(u32::from_be_bytes(frame[..4].try_into().unwrap()) as usize, frame.len() - HEADER);
            let body = ttrpc::Response::decode(&frame[HEADER..]).unwrap();
            let data = ReadStreamResponse::decode(&body.payload).unwrap().data;
            assert!(data.len() == len && data.iter().enumerate().all(|(i, b)| *b == i as u8));
        }
    }

    #[test]
    fn pieces_of_streams_both_ways() {
        let piece = agentext::StreamPiece {
            data: vec![1, 2],
            credit: 300,
            target: Some(Box::new(agentext::StreamTarget { container_id: "c".into(), exec_id: "e".into(), stream: 2 })),
            port: 80,
            end: true,
            socket: 3,
            address: vec![4, 5, 6, 7],
            datagram: 400,
        };
        let body = piece.to_vec();
        let got = parse_piece(&body).unwrap();
        assert_eq!(
            got,
            StreamPiece {
                data: &[1, 2],
                credit: 300,
                container_id: "c",
                exec_id: "e",
                stream: 2,
                port: 80,
                end: true,
                socket: 3,
                address: &[4, 5, 6, 7],
                datagram: 400
            }
        );
        assert!(parse_piece(&body[..body.len() - 1]).is_err());
        let mut frame = header(TYPE_DATA, body.len(), 9).to_vec();
        frame.extend(&body);
        assert_eq!(head(&frame), Head::Data { stream: 9, total: frame.len(), last: false });
        frame[9] = REMOTE_CLOSED | 4;
        assert_eq!(head(&frame), Head::Data { stream: 9, total: frame.len(), last: true });

        for size in [1, 127, 128, 70_000] {
            let mut buffer = vec![0; DATA_OFFSET];
            buffer.extend(vec![5u8; size]);
            let out = data_frame_around(11, buffer);
            let sent = &out.bytes[out.start..];
            assert_eq!(head(sent), Head::Data { stream: 11, total: sent.len(), last: false });
            assert_eq!(parse_piece(&sent[HEADER..]).unwrap().data.len(), size);
        }
        let sent = credit_frame(13, 1 << 20);
        assert_eq!(head(&sent), Head::Data { stream: 13, total: sent.len(), last: false });
        assert_eq!(parse_piece(&sent[HEADER..]).unwrap().credit, 1 << 20);
        let sent = datagram_frame(13, b"?", 200);
        assert_eq!(head(&sent), Head::Data { stream: 13, total: sent.len(), last: false });
        assert_eq!(
            parse_piece(&sent[HEADER..]).unwrap(),
            StreamPiece { data: b"?", datagram: 200, ..Default::default() }
        );
        let sent = end_frame(13);
        assert_eq!(head(&sent), Head::Data { stream: 13, total: sent.len(), last: false });
        assert_eq!(parse_piece(&sent[HEADER..]).unwrap(), StreamPiece { end: true, ..Default::default() });
    }
}
