//! `phalanx checkpoint`: look at a checkpoint, rename its tensors, make one up.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use kernels::SourceType;
use model::checkpoint::{Synthesis, inspect, rename, synthesize};
use model::names::Naming;

use crate::args::parse_size;

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Say what a checkpoint is, and what each rank would hold at every width
    Inspect(InspectArgs),
    /// Copy a checkpoint with its tensors, config and index renamed to LLaMA's or the original Yi names
    Rename(RenameArgs),
    /// Write a checkpoint of random weights in the shape of a config.json
    Synthesize(SynthesizeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Folder of the checkpoint
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RenameArgs {
    /// Folder of the checkpoint
    dir: PathBuf,
    /// Names to give
    #[arg(long, value_enum)]
    to: NamingArg,
    /// Folder to write; must be new or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct SynthesizeArgs {
    /// The shape
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Folder to write; must be new or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Same seed, same weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Element type of the weights
    #[arg(long, value_enum, default_value_t = WeightType::Bf16)]
    dtype: WeightType,
    /// Names of the tensors
    #[arg(long, value_enum, default_value_t = NamingArg::Llama)]
    naming: NamingArg,
    /// Largest file
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "2GB")]
    shard_size: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum NamingArg {
    /// input_layernorm, post_attention_layernorm (LlamaForCausalLM)
    Llama,
    /// ln1, ln2 (YiForCausalLM)
    Yi,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WeightType {
    Bf16,
    F16,
    F32,
}

impl From<NamingArg> for Naming {
    fn from(naming: NamingArg) -> Self {
        match naming {
            NamingArg::Llama => Naming::Llama,
            NamingArg::Yi => Naming::Yi,
        }
    }
}

impl From<WeightType> for SourceType {
    fn from(dtype: WeightType) -> Self {
        match dtype {
            WeightType::Bf16 => SourceType::Bf16,
            WeightType::F16 => SourceType::F16,
            WeightType::F32 => SourceType::F32,
        }
    }
}

impl CheckpointCommand {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Self::Inspect(args) => {
                let found = inspect(&args.dir)?;
                if args.json {
                    println!("{}", serde_json::to_string_pretty(&found)?);
                } else {
                    println!("{found}");
                }
            }
            Self::Rename(args) => {
                let bar = byte_bar("renaming")?;
                let renamed = rename(&args.dir, args.to.into(), &args.out, &bar)?;
                bar.finish_and_clear();
                println!("{}: {renamed} tensors renamed", args.out.display());
            }
            Self::Synthesize(args) => {
                let bar = byte_bar("writing")?;
                let synthesis = Synthesis {
                    seed: args.seed,
                    max_shard_bytes: args.shard_size,
                    dtype: args.dtype.into(),
                    naming: args.naming.into(),
                };
                let parameters = synthesize(&args.config, &args.out, &synthesis, &bar)?;
                bar.finish_and_clear();
                println!("{}: {parameters} random parameters", args.out.display());
            }
        }
        Ok(())
    }
}

fn byte_bar(message: &'static str) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")?;
    Ok(ProgressBar::new(0).with_style(style).with_message(message))
}
