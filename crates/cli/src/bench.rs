//! `phalanx bench`: what this machine reaches, as parts of what it could.

mod files;
mod gpu;
mod load;
mod spread;
mod start;
mod step;

use anyhow::Result;
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Prefill and decode of the engine, and the share of this machine's read bandwidth that decode reaches
    Step(step::StepArgs),
    /// A GPU with random weights of any shape: decoding, prefill and attention as shares of its bandwidth and of a large product
    Gpu(gpu::GpuArgs),
    /// Loading a checkpoint, and the share of plain reading of its files that this reaches
    Load(load::LoadArgs),
    /// Seconds from the start of `phalanx serve` until it serves, by stages
    Start(start::StartArgs),
}

impl BenchCommand {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Self::Step(args) => args.run(),
            Self::Gpu(args) => args.run(),
            Self::Load(args) => args.run(),
            Self::Start(args) => args.run(),
        }
    }
}
