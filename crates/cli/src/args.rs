//! Arguments that several commands share.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use comm::CollectiveChoice;
use kernels::{CudaOptions, DType, WeightFormat};
use model::{ModelOptions, StepSize};
use worker::Device;

/// Which model, and how it is run.
#[derive(Debug, Clone, Args)]
pub(crate) struct ModelArgs {
    /// Folder of a Yi or LLaMA checkpoint (config.json, *.safetensors, tokenizer.json) [default: the bundled yi-nano]
    #[arg(long, env = "PHALANX_MODEL", value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Element type of activations, and of weights that are not bf16
    #[arg(long, value_enum, default_value_t = DTypeArg::Bf16)]
    pub(crate) dtype: DTypeArg,
    /// Element type of the KV cache [default: that of --dtype]
    #[arg(long, value_enum)]
    pub(crate) kv_dtype: Option<DTypeArg>,
    /// Tokens that a prompt and its answer may have together [default: what the model was made for]
    #[arg(long, value_name = "N")]
    pub(crate) max_context: Option<usize>,
    /// Memory of each worker's KV cache, such as 512MiB or 4GiB [default: on GPUs all that is left, else four contexts, at most a quarter of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) kv_memory: Option<u64>,
    /// What each worker computes on: cpu, cuda (GPU 0, 1, … of this machine in turn) or cuda:N (one GPU by its number)
    #[arg(long, env = "PHALANX_DEVICE", value_name = "DEVICE", default_value = "cpu")]
    pub(crate) device: DeviceArg,
    /// On GPUs: the same bits for any number of workers, batch and chunking (the CPU always keeps to that), at some cost in speed
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// On GPUs: how those of a group exchange: peer (memory that GPUs of one machine share), nccl, host (its memory and the network), or auto (the fastest that all can). Stages exchange by NCCL with auto and nccl, else by the host
    #[arg(long, value_name = "WAY", default_value_t)]
    pub(crate) collective: CollectiveChoice,
    /// On GPUs: how weights are kept that the checkpoint has in 16 or 32 bits
    #[arg(long, value_enum, default_value_t = WeightsArg::AsStored)]
    pub(crate) weights: WeightsArg,
    /// On GPUs: part of the memory that a worker may use for weights, KV cache and all else
    #[arg(long, value_name = "PART", default_value_t = 0.9, value_parser = parse_part)]
    pub(crate) gpu_memory_utilization: f64,
    /// Rows of one step: decoding sequences and chunks of prompts; of a group's workers and coordinator alike [default: 512, on GPUs 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) max_batch_tokens: Option<u32>,
    /// Sequences that run at once; of a group's workers and coordinator alike [default: 64, on GPUs 256]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) max_sequences: Option<u32>,
    /// Steps that a worker takes before the first of them has ended: with 2 it begins the next one without waiting to be told what it
    /// just sampled [default: 1, on GPUs 2]
    #[arg(long, value_name = "N")]
    pub(crate) steps_in_flight: Option<usize>,
    /// CPU threads of each worker [default: this machine's cores, shared among its workers]
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}

/// An element type, as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DTypeArg {
    /// 16 bits: the checkpoints' own
    Bf16,
    /// 32 bits: exact, slower
    F32,
}

/// How weights are kept, as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WeightsArg {
    /// As the checkpoint has them, in 16 bits; quantised ones in 4 or 8
    AsStored,
    /// In 8 bits (E4M3 with a scale for each row), made while loading
    Fp8,
}

/// A device, as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceArg {
    /// Cores of this machine.
    Cpu,
    /// Its GPUs in turn, or the one of this number.
    Cuda(Option<usize>),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(None)),
            Some(("cuda", number)) if number.parse::<usize>().is_ok() => Ok(Self::Cuda(number.parse().ok())),
            _ => Err(format!("'{text}' is not cpu, cuda or cuda:N")),
        }
    }
}

impl fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

impl From<DTypeArg> for DType {
    fn from(dtype: DTypeArg) -> Self {
        match dtype {
            DTypeArg::Bf16 => DType::Bf16,
            DTypeArg::F32 => DType::F32,
        }
    }
}

impl ModelArgs {
    /// The folder given, or that of the bundled model.
    pub(crate) fn dir(&self) -> Result<PathBuf> {
        model_dir(self.model.as_ref())
    }

    /// Threads of each of `workers` workers on this machine.
    pub(crate) fn threads(&self, workers: usize) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(|| (cores() / workers.max(1)).max(1), usize::from)
    }

    /// Rows of the largest step.
    pub(crate) fn max_batch_tokens(&self) -> u32 {
        self.max_batch_tokens.unwrap_or(if self.on_gpu() { 4096 } else { 512 })
    }

    /// Sequences that run at once.
    pub(crate) fn max_sequences(&self) -> u32 {
        self.max_sequences.unwrap_or(if self.on_gpu() { 256 } else { 64 })
    }

    fn largest_step(&self) -> StepSize {
        let rows = self.max_batch_tokens() as usize;
        StepSize { rows, sampled: rows.min(self.max_sequences() as usize) }
    }

    fn on_gpu(&self) -> bool {
        matches!(self.device, DeviceArg::Cuda(_))
    }

    /// The device of this process.
    pub(crate) fn device(&self) -> Device {
        match self.device {
            DeviceArg::Cpu => Device::Cpu { threads: self.threads(1) },
            DeviceArg::Cuda(number) => Device::Cuda {
                options: CudaOptions {
                    ordinal: number.unwrap_or(0),
                    deterministic: self.deterministic,
                    memory_utilization: self.gpu_memory_utilization,
                    weights: match self.weights {
                        WeightsArg::AsStored => WeightFormat::AsStored,
                        WeightsArg::Fp8 => WeightFormat::Fp8,
                    },
                    ..CudaOptions::default()
                },
                collective: self.collective,
            },
        }
    }

    /// Refuses what the device does not do.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.on_gpu() && (self.deterministic || self.weights != WeightsArg::AsStored) {
            bail!(
                "--deterministic and --weights are for GPUs (--device cuda): the CPU is always deterministic, and keeps weights in bf16"
            );
        }
        if !self.on_gpu() && self.collective != CollectiveChoice::Auto {
            bail!("--collective is for GPUs (--device cuda): workers on CPUs exchange over the network");
        }
        Ok(())
    }

    /// What the model crate needs.
    pub(crate) fn options(&self, progress: bool) -> ModelOptions {
        ModelOptions {
            dtype: self.dtype.into(),
            kv_dtype: self.kv_dtype.unwrap_or(self.dtype).into(),
            max_context: self.max_context,
            kv_memory: self.kv_memory,
            largest_step: self.on_gpu().then(|| self.largest_step()),
            // On the CPU a step takes far longer than a message.
            steps_in_flight: self.steps_in_flight.unwrap_or(if self.on_gpu() { 2 } else { 1 }),
            progress,
        }
    }

    /// The same arguments on the command line of worker number `index` of `workers`.
    pub(crate) fn command_line(&self, index: usize, workers: usize) -> Result<Vec<String>> {
        let name =
            |dtype: DTypeArg| dtype.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
        let dir = self.dir()?;
        let dir =
            dir.to_str().with_context(|| format!("--model {}: the path is not UTF-8", dir.display()))?;
        let mut line = vec!["--model".to_owned(), dir.to_owned(), "--dtype".into(), name(self.dtype)];
        let mut push = |flag: &str, value: Option<String>| {
            if let Some(value) = value {
                line.extend([flag.to_owned(), value]);
            }
        };
        push("--kv-dtype", self.kv_dtype.map(name));
        push("--max-context", self.max_context.map(|n| n.to_string()));
        push("--max-batch-tokens", Some(self.max_batch_tokens().to_string()));
        push("--max-sequences", Some(self.max_sequences().to_string()));
        push("--steps-in-flight", self.steps_in_flight.map(|n| n.to_string()));
        push("--kv-memory", self.kv_memory.map(|n| n.to_string()));
        push("--threads", Some(self.threads(workers).to_string()));
        if let DeviceArg::Cuda(number) = self.device {
            push("--device", Some(DeviceArg::Cuda(Some(number.unwrap_or(index))).to_string()));
            push("--gpu-memory-utilization", Some(self.gpu_memory_utilization.to_string()));
            push("--collective", Some(self.collective.to_string()));
            if self.deterministic {
                line.push("--deterministic".into());
            }
            if self.weights == WeightsArg::Fp8 {
                line.extend(["--weights".into(), "fp8".into()]);
            }
        }
        Ok(line)
    }
}

/// The folder given, or that of the bundled model.
pub(crate) fn model_dir(given: Option<&PathBuf>) -> Result<PathBuf> {
    given.cloned().map_or_else(bundled_model, Ok)
}

/// Where the bundled model lies: beside an installed binary, or in the source tree that it was built from.
fn bundled_model() -> Result<PathBuf> {
    let installed = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.parent()?.join("share/phalanx/models/yi-nano")));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/yi-nano");
    for dir in installed.into_iter().chain([source]) {
        if dir.join("config.json").is_file() {
            return Ok(dir.canonicalize().unwrap_or(dir));
        }
    }
    bail!(
        "the bundled model yi-nano is not where it was built or installed: give a checkpoint with --model DIR"
    )
}

/// A part of a whole.
pub(crate) fn parse_part(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(part) if part > 0.0 && part <= 1.0 => Ok(part),
        _ => Err(format!("'{text}' is not a number above 0, at most 1")),
    }
}

/// Bytes, with an optional unit: `K`, `KB` and so on are powers of 1000, `KiB` and so on of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024f64.powi(2),
        "gib" => 1024f64.powi(3),
        "tib" => 1024f64.powi(4),
        unit => return Err(format!("unknown unit '{unit}': use B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("'{text}' is not a size such as 512MiB or 4GB"))?;
    let bytes = number * factor;
    if bytes < 1.0 || bytes > 2f64.powi(60) {
        return Err(format!("'{text}' is out of range"));
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices() {
        for device in ["cpu", "cuda", "cuda:3"] {
            assert_eq!(device.parse::<DeviceArg>().map(|d| d.to_string()), Ok(device.to_owned()));
        }
        for wrong in ["gpu", "cuda:", "cuda:x", "cpu:1"] {
            assert!(wrong.parse::<DeviceArg>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(parse_size("4096"), Ok(4096));
        for wrong in ["", "GiB", "1XB", "0", "1e30GB", "-5MB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
