//! The GPU that tests run on: the emulator's, or with `PHALANX_TEST_GPU=1` this machine's own.

use std::env;

use kernels::cuda::{self, Store};
use kernels::{Cuda, CudaOptions};

use super::Device;

/// Set where a real GPU is to be tested.
const REAL_VARIABLE: &str = "PHALANX_TEST_GPU";

/// Whether there is a GPU to test; says so where there is none.
pub(crate) fn present() -> bool {
    env::var_os(REAL_VARIABLE).is_some() || emulator::open()
}

/// A GPU whose every allocation has a guard behind it.
pub(crate) fn open(deterministic: bool) -> Cuda {
    open_with(CudaOptions { deterministic, ..CudaOptions::default() })
}

/// Likewise.
pub(crate) fn open_with(options: CudaOptions) -> Cuda {
    let options = CudaOptions { separate_allocations: true, ..options };
    // What the emulator's compiler makes must not come into the user's cache.
    let store = if env::var_os(REAL_VARIABLE).is_some() { Store::from_env() } else { Store::none() };
    Cuda::with_kernels(options, &store).unwrap()
}

impl Device for Cuda {
    fn set_row(buffer: &mut cuda::Buffer, row: usize, values: &[f32]) {
        buffer.set_row(row, values).unwrap();
    }

    fn row(buffer: &cuda::Buffer, row: usize) -> Vec<f32> {
        buffer.row(row).unwrap()
    }
}
