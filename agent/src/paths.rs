//! Where the agent keeps things in the guest's file system.

/// What belongs to the sandbox and its containers.
pub const STATE_DIR: &str = "/run/kata-containers";
