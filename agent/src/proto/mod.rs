//! Protocol messages: generated structs (`tools/protogen.py`) over a small codec.
//!
//! Field names are the `.proto` names in snake case; `type` is `type_`. Sub-messages are
//! `Option<Box<_>>`, `None` when absent.

// Every generated message has the same shape, also one with a single field.
#![allow(clippy::single_match)]

pub mod agent;
pub mod agentext;
pub mod codec;
pub mod csi;
pub mod google;
pub mod health;
pub mod oci;
pub mod schema;
#[cfg(test)]
mod tests;
pub mod ttrpc;
pub mod types;
