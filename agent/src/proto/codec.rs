//! The proto3 wire format.
//!
//! Generated messages call one `put_*` and one `get_*` function per field, named after the field's type.
//! Lengths and nesting are checked; unknown fields, and known ones of another wire type, are skipped.

use crate::prelude::standard::*;
use core::cell::Cell;
use core::fmt;
use core::mem::size_of;

/// Deepest nesting of messages that is decoded; what the official libraries allow by default.
pub const MAX_DEPTH: u32 = 100;

/// What a decoded message may take in memory, in bytes, beside its texts and other bytes (which are no longer than the
/// encoding): two bytes on the wire can be an element of hundreds. The biggest real message is a container's
/// specification, with some thousand elements.
pub const MAX_ELEMENT_BYTES: usize = 8 << 20;

/// Why bytes are not an encoding of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeError {
    Truncated,
    VarintTooLong,
    InvalidTag,
    InvalidUtf8,
    TooDeep,
    TooBig,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DecodeError::Truncated => "message is truncated",
            DecodeError::VarintTooLong => "varint is longer than 10 bytes",
            DecodeError::InvalidTag => "invalid field tag",
            DecodeError::InvalidUtf8 => "string is not UTF-8",
            DecodeError::TooDeep => "messages are nested too deeply",
            DecodeError::TooBig => "message has too many elements",
        })
    }
}

impl core::error::Error for DecodeError {}

/// A generated message.
pub trait Message: Default {
    /// Appends the encoding to `out`.
    fn encode(&self, out: &mut Vec<u8>);

    /// Takes one field of the wire.
    fn merge(&mut self, field: Field<'_>) -> Result<(), DecodeError>;

    /// The message that `buf` is the encoding of.
    fn decode(buf: &[u8]) -> Result<Self, DecodeError> {
        let mut message = Self::default();
        merge_all(&mut message, Reader { buf, depth: 0, budget: Some(&Cell::new(MAX_ELEMENT_BYTES)) })?;
        Ok(message)
    }

    /// The encoding as a vector of its own.
    fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode(&mut out);
        out
    }
}

/// One field as read from the wire.
#[derive(Debug, Clone, Copy)]
pub struct Field<'a> {
    pub number: u32,
    value: Value<'a>,
    depth: u32,
    /// None where nothing is kept.
    budget: Option<&'a Cell<usize>>,
}

impl<'a> Field<'a> {
    /// A reader of what the field holds.
    fn inside(&self, buf: &'a [u8]) -> Reader<'a> {
        Reader { buf, depth: self.depth + 1, budget: self.budget }
    }

    /// Takes what a further element of a type takes in memory off the budget.
    fn charge<T>(&self) -> Result<(), DecodeError> {
        self.charge_bytes(size_of::<T>())
    }

    /// Not inlined into each of the generated decoders.
    #[inline(never)]
    fn charge_bytes(&self, bytes: usize) -> Result<(), DecodeError> {
        let Some(budget) = self.budget else { return Ok(()) };
        budget.set(budget.get().checked_sub(bytes).ok_or(DecodeError::TooBig)?);
        Ok(())
    }
}

/// What a field holds on the wire.
#[derive(Debug, Clone, Copy)]
pub enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    /// Fixed-width numbers and groups: no message here has any, so they only have to be stepped over.
    Other,
}

fn merge_all<M: Message>(message: &mut M, mut reader: Reader<'_>) -> Result<(), DecodeError> {
    while let Some(field) = reader.next()? {
        message.merge(field)?;
    }
    Ok(())
}

/// Calls `each` with the number and value of every field, without knowing the message.
pub fn fields<'a>(buf: &'a [u8], mut each: impl FnMut(u32, Value<'a>)) -> Result<(), DecodeError> {
    let mut reader = Reader { buf, depth: 0, budget: None };
    while let Some(field) = reader.next()? {
        each(field.number, field.value);
    }
    Ok(())
}

/// The numbers of a packed repeated field.
pub fn packed(buf: &[u8], mut each: impl FnMut(u64)) -> Result<(), DecodeError> {
    let mut reader = Reader { buf, depth: 0, budget: None };
    while !reader.buf.is_empty() {
        each(reader.varint()?);
    }
    Ok(())
}

struct Reader<'a> {
    buf: &'a [u8],
    depth: u32,
    /// None where nothing is kept.
    budget: Option<&'a Cell<usize>>,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Option<Field<'a>>, DecodeError> {
        if self.depth > MAX_DEPTH {
            return Err(DecodeError::TooDeep);
        }
        if self.buf.is_empty() {
            return Ok(None);
        }
        let tag = self.tag()?;
        let value = self.value(tag, self.depth)?;
        Ok(Some(Field { number: tag >> 3, value, depth: self.depth, budget: self.budget }))
    }

    fn tag(&mut self) -> Result<u32, DecodeError> {
        let tag = u32::try_from(self.varint()?).map_err(|_| DecodeError::InvalidTag)?;
        if tag < 8 {
            return Err(DecodeError::InvalidTag);
        }
        Ok(tag)
    }

    fn varint(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for (i, &byte) in self.buf.iter().take(10).enumerate() {
            // Of the tenth byte only one bit has room; the others are dropped, as other decoders do.
            value |= u64::from(byte & 0x7f) << (7 * i);
            if byte < 0x80 {
                self.buf = &self.buf[i + 1..];
                return Ok(value);
            }
        }
        Err(if self.buf.len() < 10 { DecodeError::Truncated } else { DecodeError::VarintTooLong })
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], DecodeError> {
        let len = usize::try_from(len).map_err(|_| DecodeError::Truncated)?;
        if len > self.buf.len() {
            return Err(DecodeError::Truncated);
        }
        let (taken, rest) = self.buf.split_at(len);
        self.buf = rest;
        Ok(taken)
    }

    fn value(&mut self, tag: u32, depth: u32) -> Result<Value<'a>, DecodeError> {
        match tag & 7 {
            0 => return Ok(Value::Varint(self.varint()?)),
            1 => self.take(8)?,
            2 => {
                let len = self.varint()?;
                return Ok(Value::Bytes(self.take(len)?));
            }
            3 => {
                if depth >= MAX_DEPTH {
                    return Err(DecodeError::TooDeep);
                }
                loop {
                    let inner = self.tag()?;
                    if inner & 7 == 4 {
                        if inner >> 3 != tag >> 3 {
                            return Err(DecodeError::InvalidTag);
                        }
                        break;
                    }
                    self.value(inner, depth + 1)?;
                }
                &[]
            }
            5 => self.take(4)?,
            _ => return Err(DecodeError::InvalidTag),
        };
        Ok(Value::Other)
    }
}

// ---- writing ----

/// Appends a varint.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_key(out: &mut Vec<u8>, number: u32, wire_type: u32) {
    put_varint(out, u64::from(number << 3 | wire_type));
}

fn put_blob(out: &mut Vec<u8>, number: u32, value: &[u8]) {
    put_key(out, number, 2);
    put_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

pub fn put_string(out: &mut Vec<u8>, number: u32, value: &str) {
    put_bytes(out, number, value.as_bytes());
}

pub fn put_bytes(out: &mut Vec<u8>, number: u32, value: &[u8]) {
    if !value.is_empty() {
        put_blob(out, number, value);
    }
}

pub fn put_repeated_string(out: &mut Vec<u8>, number: u32, values: &[String]) {
    for value in values {
        put_blob(out, number, value.as_bytes());
    }
}

pub fn put_repeated_bytes(out: &mut Vec<u8>, number: u32, values: &[Vec<u8>]) {
    for value in values {
        put_blob(out, number, value);
    }
}

pub fn put_message<M: Message>(out: &mut Vec<u8>, number: u32, value: &Option<Box<M>>) {
    if let Some(message) = value {
        put_blob(out, number, &message.to_vec());
    }
}

pub fn put_repeated_message<M: Message>(out: &mut Vec<u8>, number: u32, values: &[M]) {
    for value in values {
        put_blob(out, number, &value.to_vec());
    }
}

// ---- reading ----

fn text(bytes: &[u8]) -> Result<String, DecodeError> {
    match core::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(DecodeError::InvalidUtf8),
    }
}

pub fn get_string(field: Field<'_>, target: &mut String) -> Result<(), DecodeError> {
    if let Value::Bytes(bytes) = field.value {
        *target = text(bytes)?;
    }
    Ok(())
}

pub fn get_bytes(field: Field<'_>, target: &mut Vec<u8>) -> Result<(), DecodeError> {
    if let Value::Bytes(bytes) = field.value {
        *target = bytes.to_vec();
    }
    Ok(())
}

pub fn get_repeated_string(field: Field<'_>, target: &mut Vec<String>) -> Result<(), DecodeError> {
    if let Value::Bytes(bytes) = field.value {
        field.charge::<String>()?;
        target.push(text(bytes)?);
    }
    Ok(())
}

pub fn get_repeated_bytes(field: Field<'_>, target: &mut Vec<Vec<u8>>) -> Result<(), DecodeError> {
    if let Value::Bytes(bytes) = field.value {
        field.charge::<Vec<u8>>()?;
        target.push(bytes.to_vec());
    }
    Ok(())
}

/// A singular message that comes twice is merged, as the specification wants it.
pub fn get_message<M: Message>(field: Field<'_>, target: &mut Option<Box<M>>) -> Result<(), DecodeError> {
    if let Value::Bytes(bytes) = field.value {
        if target.is_none() {
            field.charge::<M>()?;
        }
        merge_all(&mut **target.get_or_insert_default(), field.inside(bytes))?;
    }
    Ok(())
}

pub fn get_repeated_message<M: Message>(field: Field<'_>, target: &mut Vec<M>) -> Result<(), DecodeError> {
    if let Value::Bytes(bytes) = field.value {
        field.charge::<M>()?;
        let mut message = M::default();
        merge_all(&mut message, field.inside(bytes))?;
        target.push(message);
    }
    Ok(())
}

/// The functions of the types that are varints on the wire. Casting to 32 bits drops the upper half, and
/// casting a negative number to 64 bits extends its sign: both are what the format prescribes.
macro_rules! varints {
    ($type:ty, $read:expr, $put:ident, $put_optional:ident, $put_repeated:ident,
     $get:ident, $get_optional:ident, $get_repeated:ident) => {
        pub fn $put(out: &mut Vec<u8>, number: u32, value: $type) {
            if value != <$type>::default() {
                $put_optional(out, number, &Some(value));
            }
        }

        pub fn $put_optional(out: &mut Vec<u8>, number: u32, value: &Option<$type>) {
            if let Some(value) = *value {
                put_key(out, number, 0);
                put_varint(out, value as u64);
            }
        }

        pub fn $put_repeated(out: &mut Vec<u8>, number: u32, values: &[$type]) {
            let mut packed = Vec::with_capacity(values.len());
            for &value in values {
                put_varint(&mut packed, value as u64);
            }
            put_bytes(out, number, &packed);
        }

        pub fn $get(field: Field<'_>, target: &mut $type) -> Result<(), DecodeError> {
            if let Value::Varint(value) = field.value {
                *target = $read(value);
            }
            Ok(())
        }

        pub fn $get_optional(field: Field<'_>, target: &mut Option<$type>) -> Result<(), DecodeError> {
            if let Value::Varint(value) = field.value {
                *target = Some($read(value));
            }
            Ok(())
        }

        pub fn $get_repeated(field: Field<'_>, target: &mut Vec<$type>) -> Result<(), DecodeError> {
            match field.value {
                Value::Varint(value) => {
                    field.charge::<$type>()?;
                    target.push($read(value));
                }
                Value::Bytes(buf) => {
                    let mut reader = field.inside(buf);
                    while !reader.buf.is_empty() {
                        field.charge::<$type>()?;
                        target.push($read(reader.varint()?));
                    }
                }
                Value::Other => {}
            }
            Ok(())
        }
    };
}

varints!(
    bool,
    |v| v != 0,
    put_bool,
    put_optional_bool,
    put_repeated_bool,
    get_bool,
    get_optional_bool,
    get_repeated_bool
);
varints!(
    u32,
    |v| v as u32,
    put_uint32,
    put_optional_uint32,
    put_repeated_uint32,
    get_uint32,
    get_optional_uint32,
    get_repeated_uint32
);
varints!(
    u64,
    |v| v,
    put_uint64,
    put_optional_uint64,
    put_repeated_uint64,
    get_uint64,
    get_optional_uint64,
    get_repeated_uint64
);
varints!(
    i32,
    |v| v as i32,
    put_int32,
    put_optional_int32,
    put_repeated_int32,
    get_int32,
    get_optional_int32,
    get_repeated_int32
);
varints!(
    i64,
    |v| v as i64,
    put_int64,
    put_optional_int64,
    put_repeated_int64,
    get_int64,
    get_optional_int64,
    get_repeated_int64
);
varints!(
    i32,
    |v| v as i32,
    put_enum,
    put_optional_enum,
    put_repeated_enum,
    get_enum,
    get_optional_enum,
    get_repeated_enum
);

// ---- maps ----
//
// A map is a repeated message of key (field 1) and value (field 2), absent ones being zero.

fn map_entry<V: Default>(
    field: Field<'_>,
    target: &mut BTreeMap<String, V>,
    read: impl Fn(Field<'_>, &mut V) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    if let Value::Bytes(buf) = field.value {
        field.charge::<(String, V)>()?;
        let (mut key, mut value) = (String::new(), V::default());
        let mut reader = field.inside(buf);
        while let Some(part) = reader.next()? {
            match part.number {
                1 => get_string(part, &mut key)?,
                2 => read(part, &mut value)?,
                _ => {}
            }
        }
        target.insert(key, value);
    }
    Ok(())
}

fn put_map<V>(out: &mut Vec<u8>, number: u32, map: &BTreeMap<String, V>, write: impl Fn(&mut Vec<u8>, &V)) {
    for (key, value) in map {
        let mut entry = Vec::new();
        put_blob(&mut entry, 1, key.as_bytes());
        write(&mut entry, value);
        put_blob(out, number, &entry);
    }
}

pub fn put_map_string_string(out: &mut Vec<u8>, number: u32, map: &BTreeMap<String, String>) {
    put_map(out, number, map, |entry, value| {
        put_blob(entry, 2, value.as_bytes());
    });
}

pub fn get_map_string_string(field: Field<'_>, target: &mut BTreeMap<String, String>) -> Result<(), DecodeError> {
    map_entry(field, target, get_string)
}

pub fn put_map_string_uint64(out: &mut Vec<u8>, number: u32, map: &BTreeMap<String, u64>) {
    put_map(out, number, map, |entry, value| {
        put_optional_uint64(entry, 2, &Some(*value));
    });
}

pub fn get_map_string_uint64(field: Field<'_>, target: &mut BTreeMap<String, u64>) -> Result<(), DecodeError> {
    map_entry(field, target, get_uint64)
}

pub fn put_map_string_message<M: Message>(out: &mut Vec<u8>, number: u32, map: &BTreeMap<String, M>) {
    put_map(out, number, map, |entry, value| {
        put_blob(entry, 2, &value.to_vec());
    });
}

pub fn get_map_string_message<M: Message>(
    field: Field<'_>,
    target: &mut BTreeMap<String, M>,
) -> Result<(), DecodeError> {
    map_entry(field, target, |part, value| match part.value {
        Value::Bytes(bytes) => merge_all(value, part.inside(bytes)),
        _ => Ok(()),
    })
}
