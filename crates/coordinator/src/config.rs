//! Limits of a coordinator.

use std::time::Duration;

use auth::Secret;

/// How a coordinator runs its group.
#[derive(Debug, Clone)]
pub struct CoordinatorConfig {
    /// Tensor ranks of the group.
    pub width: usize,
    /// What its workers know.
    pub secret: Secret,
    /// Tokens that run in one step.
    pub max_batch_tokens: u32,
    /// Sequences that run at once; at most [`cluster::convert::MAX_SLICES`] count.
    pub max_sequences: u32,
    /// Requests that wait for their turn; more are turned away.
    pub max_waiting: usize,
    /// Tokens that prompt and answer may have together, below what the model allows.
    pub max_context: Option<u32>,
    /// A worker that is not heard of for this long is lost.
    pub heartbeat_timeout: Duration,
}

impl CoordinatorConfig {
    /// A group of `width` ranks with the usual limits.
    pub fn new(width: usize, secret: Secret) -> Self {
        Self {
            width,
            secret,
            max_batch_tokens: 512,
            max_sequences: 64,
            max_waiting: 1024,
            max_context: None,
            heartbeat_timeout: Duration::from_secs(6),
        }
    }
}
