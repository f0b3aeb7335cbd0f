//! Collectives between the ranks of a group: the same calls in the same order on every rank, blocking.
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
mod handshake;
mod local;
mod mesh;
mod patience;
mod ranges;
mod tcp;
mod transport;

pub use choice::CollectiveChoice;
pub use collective::{AbortHandle, Collective, Error, Result};
pub use form::{GroupSpec, Listener};
pub use local::{LocalTransport, local_group};
pub use mesh::MeshCollective;
pub use tcp::TcpTransport;
pub use transport::Transport;
