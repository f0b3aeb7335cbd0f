//! A worker that computes on a GPU.

use std::future::Future;

use kernels::CudaOptions;

use crate::{WorkerConfig, WorkerError};

/// Not built in.
#[cfg(not(feature = "cuda"))]
pub(crate) async fn run(
    _: WorkerConfig,
    _: CudaOptions,
    _: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let words = "this program was built without its GPU backend (feature `cuda`)";
    Err(WorkerError::Device(kernels::Error::Unsupported(words.into())))
}
