//! Collectives for buffers on GPUs.
//!
//! [`connect`] is for processes, each with a GPU: it finds out what connects them and uses the best of it, down to
//! [`StagedCollective`], which goes through the host over any transport. [`LocalGpu`] joins threads of one process whose GPUs see each
//! other's memory, or that share one GPU.

mod agree;
mod connect;
mod direct;
mod edge;
mod guard;
mod local_gpu;
mod meeting;
mod offer;
mod peers;
mod post;
mod staged;
mod stages;

pub use connect::{ConnectOptions, connect};
pub use local_gpu::{LocalGpu, LocalGpuSeat, local_gpu_group};
pub use staged::StagedCollective;
pub use stages::{connect_stages, staged_link};
