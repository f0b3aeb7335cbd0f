//! Requests, sequences, block pool, scheduler, shard plan and step plan: the pure core.
//!
//! Nothing here knows a clock, a channel, randomness or I/O: time, seeds and worker outputs come in as
//! arguments, plans and events go out as values. That is what makes it testable by itself and what lets a
//! lost group be replaced without losing a request.

mod admission;
mod block_pool;
mod config;
mod ids;
mod needs;
mod plan;
mod prefix_tree;
mod request;
mod scheduler;
mod sequence;
mod shard;

pub use admission::AdmitError;
pub use config::SchedulerConfig;
pub use ids::{BlockId, Epoch, SeqId, SlotId, StepId};
pub use needs::MemoryNeeds;
pub use plan::{SampledToken, Sampling, SeqSlice, StepOutput, StepPlan, Tokens};
pub use request::{Event, FinishReason, Request, SamplingParams, Usage};
pub use scheduler::{Load, OutputError, Scheduler};
pub use shard::{ModelShape, ShardError, Unit, rank_ranges, units};
