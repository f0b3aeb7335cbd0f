//! Arguments that several commands share.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use kernels::DType;
use model::ModelOptions;

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
    /// Memory of each worker's KV cache, such as 512MiB or 4GiB [default: four contexts, at most a quarter of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) kv_memory: Option<u64>,
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

    /// What the model crate needs.
    pub(crate) fn options(&self, progress: bool) -> ModelOptions {
        ModelOptions {
            dtype: self.dtype.into(),
            kv_dtype: self.kv_dtype.unwrap_or(self.dtype).into(),
            max_context: self.max_context,
            kv_memory: self.kv_memory,
            progress,
        }
    }

    /// The same arguments on another command line.
    pub(crate) fn command_line(&self, workers: usize) -> Result<Vec<String>> {
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
        push("--kv-memory", self.kv_memory.map(|n| n.to_string()));
        push("--threads", Some(self.threads(workers).to_string()));
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
    fn sizes() {
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(parse_size("4096"), Ok(4096));
        for wrong in ["", "GiB", "1XB", "0", "1e30GB", "-5MB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
