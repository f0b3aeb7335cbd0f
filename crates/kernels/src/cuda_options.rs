//! How a GPU is used; there also where the GPU backend is not built in.

/// How a GPU is used.
#[derive(Debug, Clone, PartialEq)]
pub struct CudaOptions {
    /// Which GPU of this machine.
    pub ordinal: usize,
    /// The same bits for any number of rows, batch and width, at some cost in speed.
    pub deterministic: bool,
    /// Part of the GPU's memory that this process may use, 0 to 1.
    pub memory_utilization: f64,
    /// How weights are kept that the checkpoint has as they are.
    pub weights: WeightFormat,
    /// Decoding steps are recorded as CUDA graphs. Without, each kernel is launched by itself: the same bits, for comparison.
    pub graphs: bool,
    /// Bytes of weights that a wide product unpacks at a time.
    pub unpacked_bytes: usize,
    /// Every weight in an allocation of its own, so that tests notice an access beyond its end.
    pub separate_allocations: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            ordinal: 0,
            deterministic: false,
            memory_utilization: 0.9,
            weights: WeightFormat::AsStored,
            graphs: true,
            unpacked_bytes: 128 << 20,
            separate_allocations: false,
        }
    }
}

/// How a GPU keeps the weights that a checkpoint has in bf16, f16 or f32. Quantised ones stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightFormat {
    /// In bf16.
    #[default]
    AsStored,
    /// In E4M3 with a scale for each row, made while loading: half the memory, and half as much to read for a token.
    Fp8,
}

/// GPUs of this machine that could be used, at least one.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) where there is none, or no driver: in a sentence for users.
pub fn gpus() -> crate::Result<usize> {
    #[cfg(feature = "cuda")]
    return crate::cuda::count();
    #[cfg(not(feature = "cuda"))]
    Err(crate::Error::Unsupported(
        "this program was built without its GPU backend (feature `cuda`): run with --device cpu".into(),
    ))
}
