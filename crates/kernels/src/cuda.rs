//! The GPU backend.
//!
//! `sources` is the text of the kernels; `modules` gives what a device loads, from the disk (`cache`) or compiled (`nvrtc`)
//! for its `arch`; `usage` and `limits` hold what the kernels may take of a multiprocessor.

mod arch;
mod cache;
mod limits;
mod modules;
mod nvrtc;
mod sources;
mod usage;

pub use arch::Arch;
pub use limits::violations;
pub use modules::{CACHE_VARIABLE, KERNELS_VARIABLE, Loaded, Module, Origin, Store, load};
pub use nvrtc::{CompileError, Nvrtc, Version};
pub use sources::{HEADERS, SOURCES, Source};
pub use usage::KernelUsage;
