//! `phalanx bench load`: how fast a checkpoint is loaded, beside how fast its files can be read at all.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use comm::{Collective, MeshCollective, local_group};
use kernels::{Backend, Cpu};
use model::{ModelOptions, ModelSource, readers};
use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use worker::Device;

use super::spread::Spread;
use crate::args::ModelArgs;

/// Bytes that a thread reads at a time.
const BLOCK_BYTES: usize = 8 << 20;

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
        let files = weight_files(&dir)?;
        let bytes = files.iter().map(|(_, bytes)| bytes).sum();
        let (mut loads, mut reads) = (Vec::new(), Vec::new());
        if !self.cold {
            read(&files)?;
        }
        for _ in 0..self.runs {
            for (times, what) in [(&mut reads, None), (&mut loads, Some(&dir))] {
                if self.cold {
                    forget(&files)?;
                }
                times.push(match what {
                    None => read(&files)?,
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

/// The files of weights with their sizes.
fn weight_files(dir: &Path) -> Result<Vec<(File, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let file = File::open(&path).with_context(|| path.display().to_string())?;
            let bytes = file.metadata().with_context(|| path.display().to_string())?.len();
            files.push((file, bytes));
        }
    }
    if files.is_empty() {
        bail!("{}: no *.safetensors file", dir.display());
    }
    Ok(files)
}

/// Has the system forget what it keeps of the files.
fn forget(files: &[(File, u64)]) -> Result<()> {
    for (file, _) in files {
        // What was written and is not on the disk yet would be kept.
        file.sync_all().context("--cold")?;
        fadvise(file, 0, None, Advice::DontNeed).context("--cold: the system does not forget the files")?;
    }
    Ok(())
}

/// Seconds of reading everything.
fn read(files: &[(File, u64)]) -> Result<f64> {
    let blocks: Vec<(usize, u64)> = files
        .iter()
        .enumerate()
        .flat_map(|(file, (_, bytes))| (0..*bytes).step_by(BLOCK_BYTES).map(move |first| (file, first)))
        .collect();
    let next = AtomicUsize::new(0);
    let reader = || -> Result<()> {
        let mut buffer = vec![0; BLOCK_BYTES];
        while let Some(&(index, first)) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (file, bytes) = &files[index];
            let count = usize::try_from(bytes - first).unwrap_or(usize::MAX).min(BLOCK_BYTES);
            file.read_exact_at(&mut buffer[..count], first).context("reading the checkpoint's files")?;
        }
        Ok(())
    };
    let started = Instant::now();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..readers()).map(|_| scope.spawn(reader)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic in a reader"))
    })?;
    Ok(started.elapsed().as_secs_f64())
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
        Device::Cuda { .. } => bail!("this phalanx was built without CUDA: build it with the feature `cuda`"),
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
