//! What crosses processes: protobuf types, their conversions, proofs, and the forming of groups.
//!
//! Everything that comes from the network is parsed here into the types that the rest works with; what does not
//! parse becomes a [`Malformed`] that names the field.

pub mod assignment;
pub mod convert;
pub mod doctor;
pub mod formation;
mod needs;
pub mod order;
pub mod policy;
pub mod preload;
pub mod progress;
pub mod proof;
pub mod proto;
mod ranges;
pub mod registry;
pub mod report;
pub mod worker;

use std::time::Duration;

pub use assignment::{Assignment, Member, StageMembers};
pub use convert::{Malformed, decode_plan, encode_plan};
pub use formation::{Formation, GroupFormation, Rank, Stage, form};
pub use order::Order;
pub use policy::{MAX_STAGES, Policy, Shape, Shortage};
pub use preload::{Part, preload};
pub use progress::{Activity, Progress};
pub use proof::Session;
pub use report::{Difference, ModelReport};
pub use worker::{Candidate, Resources, WorkerId};

/// Version of the internal service; a worker and a coordinator must have the same.
pub const PROTOCOL: u32 = 4;
/// Steps that a worker may offer to take before the first of them has ended.
pub const MAX_STEPS_IN_FLIGHT: u32 = 16;

/// Bytes of a message from a worker: reports and outputs.
pub const WORKER_MESSAGE_LIMIT: usize = 1 << 20;
/// Bytes of a message from the coordinator: a plan carries the block table of every sequence in the step.
pub const COORDINATOR_MESSAGE_LIMIT: usize = 64 << 20;
/// Bytes of a message of the public service, either way: a prompt that fills a context of 200K tokens.
pub const PUBLIC_MESSAGE_LIMIT: usize = 16 << 20;

/// Metadata of an `Unavailable` from a coordinator that stands by: where the leader's public service is, `host:port`.
pub const LEADER_METADATA: &str = "phalanx-leader";

/// HTTP/2 pings, this often where nothing else is heard.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// A ping unanswered for this long is a dead peer.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(4);
