//! Log lines as JSON on the console (or standard error), bounded and level-limited.

use crate::prelude::*;
use crate::sys::{self, Errno, Fd, RawFd};
use core::cell::Cell;
use core::fmt::Write;

/// The agent's levels, most severe first; the names are those of `agent.log`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Error,
    Warning,
    Info,
    Debug,
}

impl Level {
    /// The value of `agent.log` on the kernel command line.
    pub fn parse(name: &str) -> Option<Level> {
        Some(match name {
            "fatal" | "panic" | "critical" | "error" => Level::Error,
            "warn" | "warning" => Level::Warning,
            "info" => Level::Info,
            "debug" | "trace" => Level::Debug,
            _ => return None,
        })
    }

    fn letters(self) -> &'static str {
        match self {
            Level::Error => "ERRO",
            Level::Warning => "WARN",
            Level::Info => "INFO",
            Level::Debug => "DEBG",
        }
    }
}

struct Sink {
    level: Cell<Level>,
    fd: Cell<RawFd>,
    /// Where lines go instead of the console while a reader is attached; -1 = none.
    stream: Cell<RawFd>,
    /// The last line was written only in part.
    cut: Cell<bool>,
}

// SAFETY: the agent has one thread.
unsafe impl Sync for Sink {}

static SINK: Sink =
    Sink { level: Cell::new(Level::Info), fd: Cell::new(2), stream: Cell::new(-1), cut: Cell::new(false) };

/// Longer messages are cut: a console is slow and its reader bounded.
const MAX_MESSAGE: usize = 2048;

pub fn set_level(level: Level) {
    SINK.level.set(level);
}

/// Sets where lines go; the descriptor stays open for ever. Ends the use of a stream, which in a forked child is the
/// parent's.
pub fn set_output(fd: RawFd) {
    SINK.fd.set(fd);
    SINK.stream.set(-1);
}

/// Sends lines to a non-blocking pipe or socket until its reader is gone; a former stream is closed.
pub fn set_stream(stream: Option<Fd>) {
    let former = SINK.stream.replace(stream.map_or(-1, Fd::into_raw));
    if former >= 0 {
        sys::close(former);
    }
    SINK.cut.set(false);
}

/// False when there is no stream (any more): the line belongs to the console.
fn to_stream(text: &str) -> bool {
    let fd = SINK.stream.get();
    if fd < 0 {
        return false;
    }
    let mut whole = String::new();
    let text = if SINK.cut.get() {
        // The rest of a line that did not fit becomes a line of its own.
        whole.push('\n');
        whole.push_str(text);
        &whole
    } else {
        text
    };
    match sys::write(fd, text.as_bytes()) {
        Ok(n) => {
            SINK.cut.set(n < text.len());
            true
        }
        // A reader that is too slow misses lines.
        Err(Errno(libc::EAGAIN)) => true,
        Err(_) => {
            set_stream(None);
            false
        }
    }
}

pub fn enabled(level: Level) -> bool {
    level <= SINK.level.get()
}

pub fn error(message: &str) {
    line(Level::Error, message);
}

pub fn warn(message: &str) {
    line(Level::Warning, message);
}

pub fn info(message: &str) {
    line(Level::Info, message);
}

pub fn debug(message: &str) {
    line(Level::Debug, message);
}

fn line(level: Level, message: &str) {
    if enabled(level) {
        let text = format_line(level, sys::clock_ns(libc::CLOCK_REALTIME), message);
        if !to_stream(&text) {
            // A full console loses lines; it must not stop the agent.
            let _ = sys::write_all(SINK.fd.get(), text.as_bytes());
        }
    }
}

fn format_line(level: Level, now_ns: u64, message: &str) -> String {
    let mut out = String::with_capacity(message.len() + 96);
    let _ = write!(
        out,
        r#"{{"ts":{}.{:06},"level":"{}","source":"agent","msg":""#,
        now_ns / 1_000_000_000,
        now_ns % 1_000_000_000 / 1000,
        level.letters()
    );
    let mut left = MAX_MESSAGE;
    for c in message.chars() {
        left = left.saturating_sub(c.len_utf8());
        if left == 0 {
            out.push_str("...");
            break;
        }
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            '\n' => out.push_str("\\n"),
            c if c < ' ' => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push_str("\"}\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_json_whatever_the_message() {
        let text = format_line(Level::Warning, 1_500_000_000_250_001_000, "say \"no\"\\\n\u{1b}[0m");
        assert_eq!(
            text,
            "{\"ts\":1500000000.250001,\"level\":\"WARN\",\"source\":\"agent\",\
             \"msg\":\"say \\\"no\\\"\\\\\\n\\u001b[0m\"}\n"
        );
        assert!(format_line(Level::Info, 0, &"x".repeat(9000)).len() < 2200);
    }

    #[test]
    fn levels_have_the_names_of_the_command_line() {
        assert_eq!(Level::parse("trace"), Some(Level::Debug));
        assert_eq!(Level::parse("loud"), None);
        assert!(Level::Error < Level::Debug);
    }
}
