//! The step loop: plans every step of a group, applies its outputs, and keeps every request.
//!
//! [`Engine`] is the seam to the gateway: token ids in, events out. Behind it one task, the leader, owns the scheduler and
//! the group, so that nothing here is locked: RPC streams and handles send it commands, and it answers on channels. Of several
//! coordinators one is elected to have a leader ([`Contender`]).

pub mod api;
mod clock;
mod command;
mod config;
mod contender;
mod detector;
mod examination;
mod groups;
mod handle;
mod heartbeats;
mod incidents;
mod leader;
mod limits;
mod replica;
mod requests;
mod routing;
mod service;
mod state;
mod status;

pub use api::{Engine, EngineError, EngineEvent, ModelInfo, Submission};
pub use config::CoordinatorConfig;
pub use contender::{Contender, ContenderService};
pub use handle::CoordinatorHandle;
pub use leader::Coordinator;
pub use service::ClusterService;
pub use state::State;
