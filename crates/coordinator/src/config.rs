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
    /// Tokens that run in one step, as far as the workers have memory for them; `None`: as many, or 512 where they do not care.
    pub max_batch_tokens: Option<u32>,
    /// Likewise sequences that run at once, or 64; at most [`cluster::convert::MAX_SLICES`] count.
    pub max_sequences: Option<u32>,
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
            max_batch_tokens: None,
            max_sequences: None,
            max_waiting: 1024,
            max_context: None,
            heartbeat_timeout: Duration::from_secs(6),
        }
    }
}
