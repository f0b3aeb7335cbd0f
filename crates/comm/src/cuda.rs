//! Collectives for buffers on GPUs.
//!
//! [`StagedCollective`] goes through the host over any transport; [`LocalGpu`] joins threads of one process whose GPUs see each
//! other's memory, or that share one GPU; [`NcclCollective`] is for one process for each GPU.

mod local_gpu;
mod meeting;
mod nccl;
mod staged;

pub use local_gpu::{LocalGpu, LocalGpuSeat, local_gpu_group};
pub use nccl::NcclCollective;
pub use staged::StagedCollective;
