//! JSON: a reader for documents of an image, and a writer for the report.
//!
//! Source: RFC 8259. The reader is bounded in depth and length, since what it reads may be hostile.

use std::fmt::Write as _;

const MAX_DEPTH: usize = 64;

/// A value. Numbers are kept as integers: nothing that is read here has a use for fractions.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Bool(bool),
    Number(i64),
    Text(String),
    List(Vec<Value>),
    Map(Vec<(String, Value)>),
}

impl Value {
    pub fn get(&self, key: &str) -> &Value {
        if let Value::Map(members) = self {
            if let Some((_, value)) = members.iter().find(|(name, _)| name == key) {
                return value;
            }
        }
        &Value::Null
    }

    pub fn text(&self) -> &str {
        match self {
            Value::Text(text) => text,
            _ => "",
        }
    }

    pub fn number(&self) -> i64 {
        match self {
            Value::Number(number) => *number,
            _ => 0,
        }
    }

    pub fn members(&self) -> &[(String, Value)] {
        match self {
            Value::Map(members) => members,
            _ => &[],
        }
    }

    pub fn list(&self) -> &[Value] {
        match self {
            Value::List(items) => items,
            _ => &[],
        }
    }
}

/// Read a document; `None` if it is malformed or nested too deeply.
pub fn parse(data: &[u8]) -> Option<Value> {
    let mut reader = Reader { data, at: 0 };
    let value = reader.value(0)?;
    reader.space();
    (reader.at == data.len()).then_some(value)
}

struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn space(&mut self) {
        while matches!(self.data.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn next(&mut self) -> Option<u8> {
        let byte = *self.data.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn word(&mut self, word: &[u8], value: Value) -> Option<Value> {
        self.data[self.at..].starts_with(word).then(|| {
            self.at += word.len();
            value
        })
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.space();
        match *self.data.get(self.at)? {
            b'n' => self.word(b"null", Value::Null),
            b't' => self.word(b"true", Value::Bool(true)),
            b'f' => self.word(b"false", Value::Bool(false)),
            b'"' => {
                self.at += 1;
                self.string().map(Value::Text)
            }
            b'[' => {
                self.at += 1;
                let mut items = Vec::new();
                self.space();
                if self.data.get(self.at) == Some(&b']') {
                    self.at += 1;
                    return Some(Value::List(items));
                }
                loop {
                    items.push(self.value(depth + 1)?);
                    self.space();
                    match self.next()? {
                        b',' => {}
                        b']' => return Some(Value::List(items)),
                        _ => return None,
                    }
                }
            }
            b'{' => {
                self.at += 1;
                let mut members = Vec::new();
                self.space();
                if self.data.get(self.at) == Some(&b'}') {
                    self.at += 1;
                    return Some(Value::Map(members));
                }
                loop {
                    self.space();
                    if self.next()? != b'"' {
                        return None;
                    }
                    let key = self.string()?;
                    self.space();
                    if self.next()? != b':' {
                        return None;
                    }
                    members.push((key, self.value(depth + 1)?));
                    self.space();
                    match self.next()? {
                        b',' => {}
                        b'}' => return Some(Value::Map(members)),
                        _ => return None,
                    }
                }
            }
            _ => self.number(),
        }
    }

    fn number(&mut self) -> Option<Value> {
        let start = self.at;
        while matches!(self.data.get(self.at), Some(b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E')) {
            self.at += 1;
        }
        let text = std::str::from_utf8(&self.data[start..self.at]).ok()?;
        if let Ok(whole) = text.parse::<i64>() {
            return Some(Value::Number(whole));
        }
        #[allow(clippy::cast_possible_truncation)]
        text.parse::<f64>().ok().map(|number| Value::Number(number as i64))
    }

    fn string(&mut self) -> Option<String> {
        let mut out = Vec::new();
        loop {
            match self.next()? {
                b'"' => return Some(String::from_utf8_lossy(&out).into_owned()),
                b'\\' => {
                    let character = match self.next()? {
                        b'n' => '\n',
                        b't' => '\t',
                        b'r' => '\r',
                        b'b' => '\u{8}',
                        b'f' => '\u{c}',
                        b'u' => self.escaped()?,
                        other => char::from(other),
                    };
                    let mut buffer = [0; 4];
                    out.extend_from_slice(character.encode_utf8(&mut buffer).as_bytes());
                }
                byte => out.push(byte),
            }
        }
    }

    fn hex(&mut self) -> Option<u32> {
        let text = std::str::from_utf8(self.data.get(self.at..self.at + 4)?).ok()?;
        self.at += 4;
        u32::from_str_radix(text, 16).ok()
    }

    fn escaped(&mut self) -> Option<char> {
        let first = self.hex()?;
        if (0xd800..0xdc00).contains(&first) && self.data[self.at..].starts_with(b"\\u") {
            self.at += 2;
            let second = self.hex()?;
            if (0xdc00..0xe000).contains(&second) {
                return char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00));
            }
        }
        Some(char::from_u32(first).unwrap_or('\u{fffd}'))
    }
}

/// Writes objects and lists into one string; commas are its business.
#[derive(Default)]
pub struct Writer {
    out: String,
    comma: bool,
}

impl Writer {
    pub fn finish(self) -> String {
        self.out
    }

    pub fn len(&self) -> usize {
        self.out.len()
    }

    fn separate(&mut self) {
        if self.comma {
            self.out.push(',');
        }
        self.comma = false;
    }

    pub fn open(&mut self, bracket: char) {
        self.separate();
        self.out.push(bracket);
    }

    pub fn close(&mut self, bracket: char) {
        self.out.push(bracket);
        self.comma = true;
    }

    pub fn key(&mut self, key: &str) {
        self.separate();
        self.quote(key);
        self.out.push(':');
    }

    pub fn text(&mut self, text: &str) {
        self.separate();
        self.quote(text);
        self.comma = true;
    }

    pub fn number(&mut self, number: i64) {
        self.separate();
        let _ = write!(self.out, "{number}");
        self.comma = true;
    }

    pub fn flag(&mut self, flag: bool) {
        self.separate();
        self.out.push_str(if flag { "true" } else { "false" });
        self.comma = true;
    }

    /// A value that was written by another writer.
    pub fn raw(&mut self, json: &str) {
        self.separate();
        self.out.push_str(json);
        self.comma = true;
    }

    fn quote(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                other if (other as u32) < 0x20 => {
                    let _ = write!(self.out, "\\u{:04x}", other as u32);
                }
                other => self.out.push(other),
            }
        }
        self.out.push('"');
    }
}

/// Bytes of an image as text: what is not UTF-8 is written as `\xNN`, and no more than `most` bytes are taken.
pub fn shown(bytes: &[u8], most: usize) -> String {
    let cut = &bytes[..bytes.len().min(most)];
    let mut out = String::with_capacity(cut.len());
    for chunk in cut.utf8_chunks() {
        out.push_str(chunk.valid());
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    if cut.len() < bytes.len() {
        out.push_str("...");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_read() {
        let value = parse(br#" {"a": [1, -2.5, "x\u00e9\ud83d\ude00\n", null, true], "b": {}} "#).unwrap();
        assert_eq!(value.get("a").list()[0].number(), 1);
        assert_eq!(value.get("a").list()[2].text(), "x\u{e9}\u{1f600}\n");
        assert_eq!(value.get("b"), &Value::Map(vec![]));
    }

    #[test]
    fn malformed_ones_are_refused() {
        for text in ["", "{", "[1,", "{\"a\" 1}", "\"\\u12", "[1] x", "nul"] {
            assert!(parse(text.as_bytes()).is_none(), "{text}");
        }
        assert!(parse("[".repeat(100_000).as_bytes()).is_none());
    }

    #[test]
    fn a_report_can_be_read_again() {
        let mut writer = Writer::default();
        writer.open('{');
        writer.key("a");
        writer.open('[');
        writer.text("x\"\\\u{1}");
        writer.number(-3);
        writer.close(']');
        writer.key("b");
        writer.flag(true);
        writer.close('}');
        let text = writer.finish();
        assert_eq!(parse(text.as_bytes()).unwrap().get("a").list()[0].text(), "x\"\\\u{1}");
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_as_such() {
        assert_eq!(shown(b"a\xff<b>", 100), "a\\xff<b>");
        assert_eq!(shown(b"abcdef", 3), "abc...");
    }
}
