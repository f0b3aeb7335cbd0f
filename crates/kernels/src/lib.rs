//! The op set of the forward pass on preallocated buffers, and its backends.
//!
//! [`Backend`] is the seam: the model is written once over it. [`tree`] is the one fixed order in which partial
//! sums of shard units are added, here and in `comm`.

pub mod backend;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod oracle;
mod shape;
pub mod tree;

pub use backend::{Backend, Batch, DType, Error, HostBuffer, Partial, Result, RowBlock, Slice, SourceType};
pub use cpu::Cpu;
pub use oracle::Oracle;
pub use tree::Tree;
