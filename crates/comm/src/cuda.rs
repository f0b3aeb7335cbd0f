//! Collectives for buffers on GPUs.
//!
//! [`StagedCollective`] goes through the host over any transport; [`LocalGpu`] joins threads of one process whose GPUs see each
//! other's memory, or that share one GPU.

mod local_gpu;
mod meeting;
mod staged;

pub use local_gpu::{LocalGpu, LocalGpuSeat, local_gpu_group};
pub use staged::StagedCollective;
