//! Limits of a coordinator.

use std::time::Duration;

use auth::Secret;
use cluster::{Policy, Shape};

/// How a coordinator runs its group.
#[derive(Debug, Clone)]
pub struct CoordinatorConfig {
    /// How groups are cut, and how many there are at most; standing orders change it.
    pub policy: Policy,
    /// How long the first group waits for the width that is wanted after the last worker joined, if it could be formed narrower.
    pub gather: Duration,
    /// What its workers know.
    pub secret: Secret,
    /// Tokens that run in one step, as far as the workers have memory for them; `None`: as many, or 512 where they do not care.
    pub max_batch_tokens: Option<u32>,
    /// Likewise sequences that run at once, or 64; at most [`cluster::convert::MAX_SLICES`] count.
    pub max_sequences: Option<u32>,
    /// Requests that wait for their turn; more are turned away.
    pub max_waiting: usize,
    /// Workers send heartbeats this often.
    pub heartbeat_interval: Duration,
    /// A worker that is not heard of for this long is lost.
    pub heartbeat_timeout: Duration,
    /// A rank that makes no progress in a step for this long is lost, unless the step may take longer by its size. In loading it may
    /// take three times as long.
    pub progress_timeout: Duration,
}

impl CoordinatorConfig {
    /// A group of `ranks` ranks, and no other number of them, with the usual limits.
    pub fn new(ranks: usize, secret: Secret) -> Self {
        let shape = Shape::Fixed { stages: 1, ranks, min_ranks: ranks };
        Self {
            policy: Policy { shape, replicas: 1, context: None },
            gather: Duration::from_secs(2),
            secret,
            max_batch_tokens: None,
            max_sequences: None,
            max_waiting: 1024,
            heartbeat_interval: Duration::from_millis(250),
            heartbeat_timeout: Duration::from_millis(1500),
            progress_timeout: Duration::from_secs(10),
        }
    }
}
