//! What `std`'s prelude would have given, for `core` + `alloc`, and the crate's own everyday names.

pub use crate::errors::{Context, Error, Result};
pub use standard::*;

/// Only the standard names, for modules with a `Result` of their own (the generated messages).
pub mod standard {
    pub use alloc::borrow::ToOwned;
    pub use alloc::boxed::Box;
    pub use alloc::collections::{BTreeMap, BTreeSet};
    pub use alloc::format;
    pub use alloc::string::{String, ToString};
    pub use alloc::vec;
    pub use alloc::vec::Vec;
}
