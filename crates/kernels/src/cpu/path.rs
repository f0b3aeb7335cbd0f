//! The instruction path: chosen at run time, part of a group's fingerprint.

#[cfg(target_arch = "x86_64")]
use super::isa::{Avx2, Avx512};
use super::isa::{Isa, Kernel, Portable};
use crate::{Error, Result};

/// Names the path to use instead of the best one, for example `avx2`.
pub const PATH_VARIABLE: &str = "PHALANX_CPU_PATH";

/// Which vector instructions the kernels use. Results differ by path in their last bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// AVX-512 with dot products of bf16 pairs.
    Avx512Bf16,
    /// AVX-512; bf16 is widened.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// Plain Rust for any architecture.
    Portable,
}

impl Path {
    /// All paths, best first.
    const ALL: [Path; 4] = [Path::Avx512Bf16, Path::Avx512, Path::Avx2, Path::Portable];

    /// The paths that this CPU has, best first.
    pub fn available() -> Vec<Path> {
        Path::ALL.into_iter().filter(|path| path.is_available()).collect()
    }

    /// The best path of this CPU.
    pub fn detect() -> Path {
        Path::ALL.into_iter().find(|path| path.is_available()).unwrap_or(Path::Portable)
    }

    /// What [`PATH_VARIABLE`] names, or else the best path.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a name that is no path.
    pub fn from_env() -> Result<Path> {
        match std::env::var(PATH_VARIABLE) {
            Err(_) => Ok(Path::detect()),
            Ok(name) => Path::ALL
                .into_iter()
                .find(|path| path.name() == name)
                .ok_or_else(|| Error::Unsupported(format!("{PATH_VARIABLE}: no such path: {name}"))),
        }
    }

    /// Its name, as in fingerprints.
    pub fn name(self) -> &'static str {
        match self {
            Path::Avx512Bf16 => "avx512-bf16",
            Path::Avx512 => "avx512",
            Path::Avx2 => "avx2",
            Path::Portable => "portable",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        match self {
            Path::Avx512Bf16 => Avx512::<true>::is_available(),
            Path::Avx512 => Avx512::<false>::is_available(),
            Path::Avx2 => Avx2::is_available(),
            Path::Portable => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Path::Portable
    }
}

/// A path that this CPU was found to have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vectors(Path);

impl Vectors {
    /// Checks that the CPU has `path`.
    pub(crate) fn new(path: Path) -> Result<Self> {
        if path.is_available() {
            Ok(Vectors(path))
        } else {
            Err(Error::Unsupported(format!("this CPU has no {}", path.name())))
        }
    }

    pub(crate) fn path(self) -> Path {
        self.0
    }

    /// Whether activations in bf16 stay so in products with bf16 weights.
    pub(crate) fn bf16_dot(self) -> bool {
        self.0 == Path::Avx512Bf16
    }

    /// Runs a kernel with this path's instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: `new` found the CPU to have the path.
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 => unsafe { Avx512::<true>::vectorize(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => unsafe { Avx512::<false>::vectorize(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => unsafe { Avx2::vectorize(kernel) },
            // SAFETY: every CPU has it; the other paths exist on x86-64 only.
            _ => unsafe { Portable::vectorize(kernel) },
        }
    }
}
