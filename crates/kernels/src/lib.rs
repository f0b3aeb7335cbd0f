//! The op set of the forward pass on preallocated buffers, and its backends.
//!
//! [`Backend`] is the seam: the model is written once over it. [`tree`] is the one fixed order in which partial
//! sums of shard units are added, here and in `comm`.

pub mod backend;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod cuda_options;
mod host_sampler;
pub mod oracle;
mod quantized;
pub mod sample;
mod shape;
pub mod tree;

pub use backend::{
    BLOCK_TOKENS, Backend, Batch, CHOSEN_COLS, DType, Error, HostBuffer, KvShape, MAX_SLOTS,
    MAX_STEPS_IN_FLIGHT, Partial, Result, RowBlock, SampledRow, Slice, SourceType, Step, Token,
};
pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
pub use cuda_options::{CudaOptions, WeightFormat, gpus};
pub use oracle::Oracle;
pub use quantized::QuantizedBlock;
pub use sample::{Choice, Draw};
pub use tree::Tree;
