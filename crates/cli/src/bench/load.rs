//! `phalanx bench load`: how fast a checkpoint is loaded, beside how fast its files can be read at all.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use comm::{Collective, MeshCollective, local_group};
use kernels::{Backend, Cpu};
use model::{ModelOptions, ModelSource, readers};
use serde::Serialize;
use worker::Device;

use super::files;
use super::spread::Spread;
use crate::args::ModelArgs;

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// How often it is loaded, and read
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// From the disk: the system is told to forget the files before each time. Else they are read once before all
    #[arg(long)]
    cold: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was measured; every load stands between two plain reads.
#[derive(Debug, Serialize)]
struct Figures {
    model: String,
    device: String,
    cold: bool,
    bytes: u64,
    /// Threads that read, in both.
    readers: usize,
    /// From opening the checkpoint to a rank with all units that could run a step.
    load_seconds: Spread,
    /// The same files into memory that is then forgotten.
    read_seconds: Spread,
    load_gb_s: f64,
    read_gb_s: f64,
    /// The first over the second.
    share: f64,
}

impl LoadArgs {
    pub(super) fn run(self) -> Result<()> {
        self.model.check()?;
        let dir = self.model.dir()?;
        let weights = files::weights(&dir)?;
        let bytes = weights.iter().map(|(_, bytes)| bytes).sum();
        let (mut loads, mut reads) = (Vec::new(), Vec::new());
        if !self.cold {
            files::read(&weights)?;
        }
        for _ in 0..self.runs {
            for (times, what) in [(&mut reads, None), (&mut loads, Some(&dir))] {
                if self.cold {
                    files::forget(&weights)?;
                }
                times.push(match what {
                    None => files::read(&weights)?,
                    Some(dir) => load(&self.model, dir)?,
                });
            }
        }
        let (load_seconds, read_seconds) = (Spread::of(loads), Spread::of(reads));
        let rate = |seconds: Spread| bytes as f64 / seconds.median / 1e9;
        let figures = Figures {
            model: dir.display().to_string(),
            device: self.model.device.to_string(),
            cold: self.cold,
            bytes,
            readers: readers(),
            load_seconds,
            read_seconds,
            load_gb_s: rate(load_seconds),
            read_gb_s: rate(read_seconds),
            share: read_seconds.median / load_seconds.median,
        };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&figures)?);
        } else {
            print!("{figures}");
        }
        Ok(())
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let from = if self.cold { "from the disk" } else { "from the system's cache" };
        let gigabytes = self.bytes as f64 / 1e9;
        writeln!(f, "{} onto {}: {gigabytes:.3} GB {from}", self.model, self.device)?;
        writeln!(f, "load   {:8.2} GB/s   {:.3} s", self.load_gb_s, self.load_seconds)?;
        writeln!(f, "read   {:8.2} GB/s   {:.3} s", self.read_gb_s, self.read_seconds)?;
        writeln!(f, "share  {:8.3} of plain reading by as many threads ({})", self.share, self.readers)
    }
}

/// Seconds of loading everything onto the device.
fn load(args: &ModelArgs, dir: &Path) -> Result<f64> {
    match args.device() {
        Device::Cpu { threads } => {
            let join = |_: &Cpu, ranges| MeshCollective::new(local_group(1).remove(0), ranges);
            seconds(args, dir, Cpu::new(threads)?, join, |_| Ok(()))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda { options, .. } => {
            let join = |gpu: &kernels::Cuda, ranges| {
                comm::cuda::StagedCollective::new(gpu, local_group(1).remove(0), ranges)
            };
            seconds(args, dir, kernels::Cuda::open(options)?, join, |gpu| gpu.synchronize())
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda { .. } => {
            anyhow::bail!("this phalanx was built without CUDA: build it with the feature `cuda`")
        }
    }
}

/// The same onto a device that is open already; `wait` waits for it.
fn seconds<B: Backend, C: Collective<B::Buffer>>(
    args: &ModelArgs,
    dir: &Path,
    backend: B,
    join: impl FnOnce(&B, Vec<Range<usize>>) -> comm::Result<C>,
    wait: impl FnOnce(&mut B) -> kernels::Result<()>,
) -> Result<f64> {
    let one_block = ModelSource::open(dir, args.options(false))?.kv_bytes(&backend, 1);
    let options = ModelOptions { kv_memory: Some(one_block), largest_step: None, ..args.options(false) };
    let started = Instant::now();
    let source = ModelSource::open(dir, options)?;
    let whole = 0..source.config().shape.kv_heads;
    let ranges = std::slice::from_ref(&whole);
    let collective = join(&backend, ranges.to_vec())?;
    let mut executor = source.executor(backend, ranges, collective)?;
    wait(executor.backend_mut())?;
    Ok(started.elapsed().as_secs_f64())
}
