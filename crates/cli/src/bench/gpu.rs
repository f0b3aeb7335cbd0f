//! `phalanx bench gpu`: decoding, prefill and attention of a model of random weights on one GPU, as shares of what the GPU reaches in
//! the same run. No checkpoint is needed, and none is written.

#[cfg(feature = "cuda")]
mod counts;
#[cfg(feature = "cuda")]
mod measure;
#[cfg(feature = "cuda")]
mod report;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use model::Config;
use model::config::Preset;

use crate::args::{DeviceArg, parse_part, parse_size};

/// Numbers beyond this are a slip of the keyboard.
const MOST_TOKENS: i64 = 1 << 20;

#[derive(Debug, Args)]
pub(crate) struct GpuArgs {
    /// Shape of the model
    #[arg(long, value_enum, default_value_t = ShapeArg::Yi34b, conflicts_with = "config")]
    shape: ShapeArg,
    /// Shape by a config.json in place of --shape
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How weights are kept; each is measured
    #[arg(long, value_enum, value_name = "FORMAT,…", value_delimiter = ',', default_value = "bf16,int4,fp8")]
    weights: Vec<FormatArg>,
    /// Sequences that decode together [default: 1,8,64]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: Option<Vec<u32>>,
    /// Tokens of context of each sequence that decodes; a short one is measured besides [default: 4096,32768,200000]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=MOST_TOKENS))]
    context: Option<Vec<u32>>,
    /// Tokens of prompts that are read [default: 4096,32768]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=MOST_TOKENS))]
    prefill: Option<Vec<u32>>,
    /// With --deterministic of the other commands, without it, or both and what it costs
    #[arg(long, value_enum, default_value_t = DeterministicArg::Both)]
    deterministic: DeterministicArg,
    /// Decoding steps of each measurement [default: 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    steps: Option<u32>,
    /// Rows of a chunk of a prompt: --max-batch-tokens of the other commands, and its default there
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    max_batch_tokens: u32,
    /// Which GPU: cuda or cuda:N
    #[arg(long, env = "PHALANX_DEVICE", value_name = "DEVICE", default_value = "cuda:0")]
    device: DeviceArg,
    /// Part of the GPU's memory that may be used
    #[arg(long, value_name = "PART", default_value_t = 0.97, value_parser = parse_part)]
    gpu_memory_utilization: f64,
    /// Seconds after which nothing further is begun
    #[arg(long, value_name = "SECONDS", default_value_t = 280)]
    seconds: u64,
    /// Memory that the GPU's bandwidth is measured on, twice this in all [default: 4GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    ceiling_memory: Option<u64>,
    /// Rows and columns of the matrices of the large product, a multiple of 16 [default: 8192]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16..=65_536))]
    ceiling_matrix: Option<u32>,
    /// Write JSON to a file, or to the standard output in place of the table
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    json: Option<Option<PathBuf>>,
    /// Write the tables to a file as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

/// How much is measured.
#[derive(Debug, Clone, PartialEq)]
struct Sizes {
    batch: Vec<u32>,
    context: Vec<u32>,
    prefill: Vec<u32>,
    steps: u32,
    ceiling_memory: u64,
    ceiling_matrix: u32,
}

/// A shape, as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ShapeArg {
    #[value(name = "yi-34b")]
    Yi34b,
    #[value(name = "yi-6b")]
    Yi6b,
    /// About a billion parameters
    #[value(name = "yi-1b")]
    Yi1b,
    /// Less than a million parameters, for trying things: other sizes are small too unless they are given
    Tiny,
}

/// How weights are kept, as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    Bf16,
    Int8,
    Int4,
    Fp8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeterministicArg {
    Both,
    On,
    Off,
}

impl GpuArgs {
    /// What is to be measured.
    fn sizes(&self) -> Sizes {
        let default = if self.config.is_none() && self.shape == ShapeArg::Tiny {
            Sizes {
                batch: vec![1, 2],
                context: vec![64],
                prefill: vec![32],
                steps: 2,
                ceiling_memory: 1 << 20,
                ceiling_matrix: 64,
            }
        } else {
            Sizes {
                batch: vec![1, 8, 64],
                context: vec![4096, 32_768, 200_000],
                prefill: vec![4096, 32_768],
                steps: 32,
                ceiling_memory: 4 << 30,
                ceiling_matrix: 8192,
            }
        };
        Sizes {
            batch: self.batch.clone().unwrap_or(default.batch),
            context: self.context.clone().unwrap_or(default.context),
            prefill: self.prefill.clone().unwrap_or(default.prefill),
            steps: self.steps.unwrap_or(default.steps),
            ceiling_memory: self.ceiling_memory.unwrap_or(default.ceiling_memory),
            ceiling_matrix: self.ceiling_matrix.unwrap_or(default.ceiling_matrix),
        }
    }

    /// The name of the shape, and a model of it whose weights are kept in a format.
    fn model(&self, format: FormatArg) -> Result<(String, Config)> {
        let (name, config) = match &self.config {
            Some(file) => (file.display().to_string(), Config::from_file(file)?),
            None => {
                let name = self.shape.to_possible_value().map_or_else(String::new, |v| v.get_name().into());
                (name, Config::preset(self.shape.into()))
            }
        };
        let bits = match format {
            FormatArg::Bf16 | FormatArg::Fp8 => None,
            FormatArg::Int8 => Some(8),
            FormatArg::Int4 => Some(4),
        };
        let config = config.with_quantization(bits).map_err(|expected| {
            anyhow::anyhow!("--weights {}: {name} does not suit it, which takes {expected}", format.name())
        })?;
        Ok((name, config))
    }

    #[cfg(feature = "cuda")]
    pub(super) fn run(self) -> Result<()> {
        let measured = measure::run(&self)?;
        let text = measured.to_string();
        if let Some(file) = &self.markdown {
            std::fs::write(file, report::markdown(&measured)).with_context(|| file.display().to_string())?;
        }
        let json = serde_json::to_string_pretty(&measured)? + "\n";
        match &self.json {
            Some(None) => print!("{json}"),
            Some(Some(file)) => {
                std::fs::write(file, json).with_context(|| file.display().to_string())?;
                print!("{text}");
            }
            None => print!("{text}"),
        }
        match measured.failures.first() {
            Some(failure) => anyhow::bail!("{failure}"),
            None => Ok(()),
        }
    }

    #[cfg(not(feature = "cuda"))]
    pub(super) fn run(self) -> Result<()> {
        self.weights.iter().try_for_each(|&format| self.model(format).map(drop))?;
        kernels::gpus().map(drop).context("phalanx bench gpu")
    }
}

impl From<ShapeArg> for Preset {
    fn from(shape: ShapeArg) -> Self {
        match shape {
            ShapeArg::Yi34b => Self::Yi34B,
            ShapeArg::Yi6b => Self::Yi6B,
            ShapeArg::Yi1b => Self::Yi1B,
            ShapeArg::Tiny => Self::Tiny,
        }
    }
}

impl FormatArg {
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp8 => "fp8",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: GpuArgs,
    }

    fn parse(line: &str) -> Result<GpuArgs, String> {
        let words = std::iter::once("gpu").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.args).map_err(|error| error.to_string())
    }

    #[test]
    fn without_arguments_it_is_yi_34b_on_the_first_gpu() {
        let args = parse("").unwrap();
        let sizes = args.sizes();
        assert_eq!((sizes.batch, sizes.context), (vec![1, 8, 64], vec![4096, 32_768, 200_000]));
        assert_eq!((sizes.prefill, sizes.steps), (vec![4096, 32_768], 32));
        assert_eq!(args.weights, [FormatArg::Bf16, FormatArg::Int4, FormatArg::Fp8]);
        assert_eq!((args.deterministic, args.max_batch_tokens), (DeterministicArg::Both, 4096));
        assert_eq!((args.device, sizes.ceiling_memory), (DeviceArg::Cuda(Some(0)), 4 << 30));
        let (name, config) = args.model(FormatArg::Int4).unwrap();
        assert_eq!((name.as_str(), config.shape.layers), ("yi-34b", 60));
        assert_eq!(config.quantization.map(|quantization| quantization.bits), Some(4));
        assert_eq!(args.model(FormatArg::Fp8).unwrap().1.quantization, None);
    }

    #[test]
    fn what_is_tiny_is_tiny_throughout() {
        let sizes = parse("--shape tiny --context 100,200").unwrap().sizes();
        assert_eq!((sizes.batch, sizes.context, sizes.prefill), (vec![1, 2], vec![100, 200], vec![32]));
        assert_eq!((sizes.ceiling_memory, sizes.ceiling_matrix), (1 << 20, 64));
    }

    #[test]
    fn json_goes_to_a_file_or_to_the_standard_output() {
        assert_eq!(parse("").unwrap().json, None);
        assert_eq!(parse("--json").unwrap().json, Some(None));
        assert_eq!(parse("--json a.json --batch 2").unwrap().json, Some(Some("a.json".into())));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "--batch 0",
            "--batch 1,x",
            "--context 0",
            "--prefill 2000000",
            "--steps 0",
            "--weights fp16",
            "--shape yi-9b",
            "--device gpu",
            "--ceiling-matrix 8",
            "--gpu-memory-utilization 1.5",
            "--shape tiny --config config.json",
        ] {
            let message = parse(line).expect_err(line);
            assert!(message.contains(line.split(' ').next().unwrap_or_default()), "{message}");
        }
        let args = parse("--config /nowhere/config.json").unwrap();
        assert!(format!("{:#}", args.model(FormatArg::Bf16).unwrap_err()).contains("/nowhere/config.json"));
    }

    #[test]
    fn the_format_is_the_arguments_not_the_files() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/awq4/config.json");
        let args = parse(&format!("--config {file}")).unwrap();
        let bits = |format| {
            let (name, config) = args.model(format).unwrap();
            assert_eq!((name.as_str(), config.shape.hidden), (file, 128));
            config.quantization.map(|quantization| quantization.bits)
        };
        let formats = [FormatArg::Bf16, FormatArg::Fp8, FormatArg::Int4, FormatArg::Int8];
        assert_eq!(formats.map(bits), [None, None, Some(4), Some(8)]);
    }
}
