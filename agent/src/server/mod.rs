//! The agent's end of the channel: frames, connections, calls that wait.

pub mod calls;
pub mod conn;
pub mod frame;
pub mod listen;
