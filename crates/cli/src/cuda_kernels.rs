//! `phalanx kernels`: the CUDA kernels, without a GPU.

#[cfg(feature = "cuda")]
mod compile;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum KernelsCommand {
    /// Compile all kernels, keep them for later starts, and say what each takes of a multiprocessor
    Compile(CompileArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CompileArgs {
    /// What to compile for: sm_80 (A100; also A10, L40, RTX 30 and 40), sm_90a (H100, H200), compute_90 (PTX for newer GPUs)
    #[arg(long, value_name = "ARCH,…", value_delimiter = ',', default_value = "sm_80,sm_90a")]
    arch: Vec<String>,
    /// Folder to fill in place of the user's cache; PHALANX_KERNELS=DIR takes kernels from there, where there is no NVRTC too
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Fail where a kernel takes more registers than it may, spills them, or has a stack
    #[arg(long)]
    check: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl KernelsCommand {
    #[cfg(feature = "cuda")]
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Self::Compile(args) => args.run(),
        }
    }

    #[cfg(not(feature = "cuda"))]
    pub(crate) fn run(self) -> Result<()> {
        anyhow::bail!("this phalanx was built without CUDA: build it with the feature `cuda`")
    }
}
