//! Which versions of NVIDIA's libraries are here, for people and for comparing machines.

use cudarc::{cublaslt, driver};

use super::nccl::nccl_version;
use super::nvrtc::Nvrtc;

/// The libraries that are found, with their versions; those that are missing are not in it. Opens them, which takes a moment.
pub fn libraries() -> Vec<(&'static str, String)> {
    let found = [
        ("driver", driver_version()),
        ("NVRTC", Nvrtc::open().ok().map(|nvrtc| nvrtc.version().to_string())),
        ("cuBLASLt", cublas_version()),
        ("NCCL", nccl_version().ok().map(|version| dotted(version as usize))),
    ];
    found.into_iter().filter_map(|(name, version)| Some((name, version?))).collect()
}

/// The CUDA that the driver was made for.
fn driver_version() -> Option<String> {
    let mut version = 0;
    // SAFETY: looks whether the library can be opened, and opens it; then it writes one integer.
    let told = unsafe {
        driver::sys::is_culib_present() && driver::sys::cuDriverGetVersion(&raw mut version).result().is_ok()
    };
    told.then(|| format!("{}.{}", version / 1000, version % 1000 / 10))
}

fn cublas_version() -> Option<String> {
    // SAFETY: looks whether the library can be opened, and opens it; then there are no arguments.
    unsafe { cublaslt::sys::is_culib_present().then(|| dotted(cublaslt::sys::cublasLtGetVersion())) }
}

/// 22809 is 2.28.9.
fn dotted(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_written_as_people_do() {
        assert_eq!(dotted(22_809), "2.28.9");
        assert_eq!(dotted(130_002), "13.0.2");
    }
}
