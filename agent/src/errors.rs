//! One error type for the whole agent: a gRPC status code and a sentence for the person at the other end.

use crate::sys::errno::Errno;
use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;

/// gRPC status codes (numbers of google.rpc.Code) that the agent answers with.
pub mod code {
    pub const OK: i32 = 0;
    pub const UNKNOWN: i32 = 2;
    pub const INVALID_ARGUMENT: i32 = 3;
    pub const DEADLINE_EXCEEDED: i32 = 4;
    pub const NOT_FOUND: i32 = 5;
    pub const ALREADY_EXISTS: i32 = 6;
    pub const PERMISSION_DENIED: i32 = 7;
    pub const RESOURCE_EXHAUSTED: i32 = 8;
    pub const FAILED_PRECONDITION: i32 = 9;
    pub const UNIMPLEMENTED: i32 = 12;
    pub const INTERNAL: i32 = 13;
    pub const UNAVAILABLE: i32 = 14;
}

/// What failed, as it goes over the wire.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    /// gRPC status code, never 0.
    pub code: i32,
    /// Outermost context first: "mount /proc: permission denied".
    pub message: String,
}

pub type Result<T> = core::result::Result<T, Error>;

impl Error {
    pub fn new(code: i32, message: impl Into<String>) -> Self {
        Error { code, message: message.into() }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(code::INTERNAL, message)
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(code::INVALID_ARGUMENT, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(code::NOT_FOUND, message)
    }

    pub fn exists(message: impl Into<String>) -> Self {
        Self::new(code::ALREADY_EXISTS, message)
    }

    pub fn denied(message: impl Into<String>) -> Self {
        Self::new(code::PERMISSION_DENIED, message)
    }

    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(code::FAILED_PRECONDITION, message)
    }

    pub fn exhausted(message: impl Into<String>) -> Self {
        Self::new(code::RESOURCE_EXHAUSTED, message)
    }

    pub fn unimplemented(message: impl Into<String>) -> Self {
        Self::new(code::UNIMPLEMENTED, message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(code::UNAVAILABLE, message)
    }

    pub fn deadline(message: impl Into<String>) -> Self {
        Self::new(code::DEADLINE_EXCEEDED, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.message, self.code)
    }
}

impl core::error::Error for Error {}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Error::internal(errno.to_string())
    }
}

/// Adds context to an error: what was being done when it failed.
pub trait Context<T> {
    fn context(self, what: &str) -> Result<T>;
    fn with_context<F: FnOnce() -> String>(self, what: F) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for core::result::Result<T, E> {
    fn context(self, what: &str) -> Result<T> {
        self.map_err(|e| {
            let inner: Error = e.into();
            Error { code: inner.code, message: format!("{what}: {}", inner.message) }
        })
    }

    fn with_context<F: FnOnce() -> String>(self, what: F) -> Result<T> {
        self.map_err(|e| {
            let inner: Error = e.into();
            Error { code: inner.code, message: format!("{}: {}", what(), inner.message) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_the_code_and_prefixes_the_message() {
        let inner: Result<()> = Err(Error::not_found("no such thing"));
        let outer = inner.context("open it").unwrap_err();
        assert_eq!(outer.code, code::NOT_FOUND);
        assert_eq!(outer.message, "open it: no such thing");
    }

    #[test]
    fn an_errno_becomes_an_internal_error_with_words() {
        let failed: core::result::Result<(), Errno> = Err(Errno(2));
        let outer = failed.with_context(|| format!("stat {}", "/x")).unwrap_err();
        assert_eq!(outer.code, code::INTERNAL);
        assert_eq!(outer.message, "stat /x: no such file or directory");
    }
}
