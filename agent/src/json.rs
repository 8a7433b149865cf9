//! JSON (RFC 8259), as much of it as a policy needs: read whole, numbers are integers.

use crate::prelude::*;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Null,
    Bool(bool),
    Number(i64),
    Text(String),
    List(Vec<Value>),
    /// In the order of the text; a name occurs once.
    Object(Vec<(String, Value)>),
}

/// The deepest nesting that is read; deeper documents are attacks.
const MAX_DEPTH: usize = 32;
/// The most values in one document: two bytes of text may take forty of memory.
const MAX_VALUES: usize = 1 << 17;

/// The document's value.
///
/// # Errors
/// `INVALID_ARGUMENT` with the line where it is not JSON.
pub fn parse(text: &str) -> Result<Value> {
    let mut parser = Parser { text, at: 0, values: 0 };
    let value = parser.value(0).and_then(|value| {
        parser.blanks();
        if parser.at == text.len() {
            Ok(value)
        } else {
            Err("something follows the end")
        }
    });
    value.map_err(|why| {
        let line = text.as_bytes()[..parser.at].split(|byte| *byte == b'\n').count();
        Error::invalid(format!("not JSON, line {line}: {why}"))
    })
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    values: usize,
}

type Parsed<T> = core::result::Result<T, &'static str>;

impl Parser<'_> {
    fn peek(&self) -> u8 {
        self.text.as_bytes().get(self.at).copied().unwrap_or(0)
    }

    fn blanks(&mut self) {
        while matches!(self.peek(), b' ' | b'\t' | b'\n' | b'\r') {
            self.at += 1;
        }
    }

    /// Steps over a byte, if it is the next one that is not blank.
    fn skip(&mut self, byte: u8) -> bool {
        self.blanks();
        let there = self.peek() == byte;
        self.at += usize::from(there);
        there
    }

    fn value(&mut self, depth: usize) -> Parsed<Value> {
        if depth > MAX_DEPTH {
            return Err("it is nested too deeply");
        }
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err("it has too many values");
        }
        self.blanks();
        match self.peek() {
            b'{' => self.object(depth),
            b'[' => self.list(depth),
            b'"' => self.string().map(Value::Text),
            b'-' | b'0'..=b'9' => self.number(),
            _ => {
                let words = [("true", Value::Bool(true)), ("false", Value::Bool(false)), ("null", Value::Null)];
                let found = words.into_iter().find(|(word, _)| self.text[self.at..].starts_with(word));
                let (word, value) = found.ok_or("a value is expected")?;
                self.at += word.len();
                Ok(value)
            }
        }
    }

    fn object(&mut self, depth: usize) -> Parsed<Value> {
        self.at += 1;
        let mut members: Vec<(String, Value)> = Vec::new();
        if self.skip(b'}') {
            return Ok(Value::Object(members));
        }
        loop {
            self.blanks();
            let name = self.string()?;
            if members.iter().any(|(known, _)| *known == name) {
                return Err("a name occurs twice in an object");
            }
            if !self.skip(b':') {
                return Err("a colon is expected");
            }
            members.push((name, self.value(depth + 1)?));
            if self.skip(b'}') {
                return Ok(Value::Object(members));
            }
            if !self.skip(b',') {
                return Err("a comma or } is expected");
            }
        }
    }

    fn list(&mut self, depth: usize) -> Parsed<Value> {
        self.at += 1;
        let mut items = Vec::new();
        if self.skip(b']') {
            return Ok(Value::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            if self.skip(b']') {
                return Ok(Value::List(items));
            }
            if !self.skip(b',') {
                return Err("a comma or ] is expected");
            }
        }
    }

    fn number(&mut self) -> Parsed<Value> {
        let start = self.at;
        self.at += 1;
        while self.peek().is_ascii_digit() {
            self.at += 1;
        }
        if matches!(self.peek(), b'.' | b'e' | b'E') {
            return Err("numbers are integers here");
        }
        let digits = &self.text[start..self.at];
        let magnitude = digits.trim_start_matches('-');
        if magnitude.len() > 1 && magnitude.starts_with('0') {
            return Err("a number starts with 0");
        }
        digits.parse().map(Value::Number).map_err(|_| "a number is not one of 64 bits")
    }

    fn string(&mut self) -> Parsed<String> {
        if self.peek() != b'"' {
            return Err("a string is expected");
        }
        self.at += 1;
        let mut out = String::new();
        loop {
            let start = self.at;
            while !matches!(self.peek(), b'"' | b'\\' | 0..=0x1f) {
                self.at += 1;
            }
            // Both ends are at ASCII characters.
            out.push_str(&self.text[start..self.at]);
            match self.peek() {
                b'"' => {
                    self.at += 1;
                    return Ok(out);
                }
                b'\\' => out.push(self.escape()?),
                _ => return Err("a string has no end, or a control character in it"),
            }
        }
    }

    fn escape(&mut self) -> Parsed<char> {
        self.at += 2;
        Ok(match self.text.as_bytes().get(self.at - 1) {
            Some(c @ (b'"' | b'\\' | b'/')) => *c as char,
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                let high = self.hex()?;
                let code = if (0xd800..0xdc00).contains(&high) {
                    if !self.text[self.at..].starts_with("\\u") {
                        return Err("half of a character");
                    }
                    self.at += 2;
                    let low = self.hex()?;
                    if !(0xdc00..0xe000).contains(&low) {
                        return Err("half of a character");
                    }
                    0x1_0000 + ((high - 0xd800) << 10) + (low - 0xdc00)
                } else {
                    high
                };
                char::from_u32(code).ok_or("half of a character")?
            }
            _ => {
                self.at = self.at.min(self.text.len());
                return Err("an unknown escape");
            }
        })
    }

    fn hex(&mut self) -> Parsed<u32> {
        let digits = self.text.get(self.at..self.at + 4).ok_or("four hexadecimal digits are expected")?;
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err("four hexadecimal digits are expected");
        }
        self.at += 4;
        u32::from_str_radix(digits, 16).map_err(|_| "four hexadecimal digits are expected")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_read() {
        let found = parse(" {\"a\": [1, -2, true, null, \"x\\u00e9\\ud83d\\ude00\\n\"], \"b\": {}}\n").unwrap();
        let list = vec![
            Value::Number(1),
            Value::Number(-2),
            Value::Bool(true),
            Value::Null,
            Value::Text("x\u{e9}\u{1f600}\n".into()),
        ];
        assert_eq!(found, Value::Object(vec![("a".into(), Value::List(list)), ("b".into(), Value::Object(vec![]))]));
        assert_eq!(parse("[]"), Ok(Value::List(vec![])));
    }

    #[test]
    fn what_is_no_json_is_refused_with_its_line() {
        for bad in [
            "",
            "{",
            "[1,]",
            "{\"a\":1,}",
            "{\"a\" 1}",
            "{\"a\":1,\"a\":2}",
            "01",
            "1.5",
            "1e3",
            "-",
            "tru",
            "\"",
            "\"\\",
            "\"\\x\"",
            "\"\\u12\"",
            "\"\\ud800\"",
            "\"\\ud800\\u0041\"",
            "\"\t\"",
            "1 2",
            "99999999999999999999",
            "'a'",
            "\"\\u\u{e9}\u{e9}\"",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert!(parse("{\n\n x}").unwrap_err().message.contains("line 3"));
        assert!(parse(&"[".repeat(100)).unwrap_err().message.contains("deeply"));
        assert!(parse(&format!("[{}0]", "0,".repeat(MAX_VALUES))).unwrap_err().message.contains("too many"));
        assert!(parse(&format!("[{}0]", "0,".repeat(MAX_VALUES / 2))).is_ok());
    }
}
