//! Collectives over every kind of transport, and the forming of groups over TCP.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]
#![allow(clippy::single_range_in_vec_init, reason = "one rank has one range of units")]

mod collectives;
#[cfg(feature = "cuda")]
mod device;
mod forming;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod gpu_links;
mod groups;
mod links;
mod pipelines;
mod tamper;
