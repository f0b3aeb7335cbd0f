//! Collectives between the ranks of a stage: the same calls in the same order on every rank, blocking. And what takes the hidden
//! state from one stage of a pipeline to the next: [`StageLink`].
//!
//! [`Collective`] is the seam to the forward pass. On the CPU it is [`MeshCollective`] over a [`Transport`]: threads
//! of one process ([`local_group`]), or processes over TCP ([`TcpTransport`]).

mod choice;
mod collective;
#[cfg(feature = "cuda")]
pub mod cuda;
mod fold;
mod form;
mod frame;
mod group;
mod handshake;
mod link;
mod local;
mod mesh;
mod patience;
mod ranges;
mod tamper;
mod tcp;
mod transport;

pub use choice::CollectiveChoice;
pub use collective::{AbortHandle, Collective, Error, Result};
pub use form::Listener;
pub use group::GroupSpec;
pub use link::{Alone, HostLink, Neighbours, StageLink, local_pipeline};
pub use local::{LocalTransport, local_group};
pub use mesh::MeshCollective;
pub use tamper::{WireFault, Wires};
pub use tcp::TcpTransport;
pub use transport::Transport;
