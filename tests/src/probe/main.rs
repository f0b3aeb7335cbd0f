//! What `tests/gpu` asks of the GPU: single ops, and whole models, on inputs and to outputs in safetensors files.
//!
//! `phalanx-probe ops FOLDER` and `phalanx-probe model FOLDER` read `cases.json` and `inputs.safetensors` of the folder and write
//! `outputs.safetensors`. The scripts make the inputs and know what is right; here nothing is judged.

mod attention;
mod collective;
mod model;
mod ops;
mod tensors;

use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

use crate::tensors::{Inputs, Outputs};

fn main() -> ExitCode {
    match run(&env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let [kind, folder] = args else { bail!("usage: phalanx-probe ops|model FOLDER") };
    let folder = Path::new(folder);
    let path = folder.join("inputs.safetensors");
    let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    let inputs = Inputs::new(&bytes).with_context(|| path.display().to_string())?;
    let mut outputs = Outputs::default();
    match kind.as_str() {
        "ops" => ops::run(cases(folder)?, &inputs, &mut outputs)?,
        "model" => model::run(&cases(folder)?, &inputs, &mut outputs)?,
        other => bail!("'{other}' is neither ops nor model"),
    }
    outputs.write(&folder.join("outputs.safetensors"))
}

fn cases<T: DeserializeOwned>(folder: &Path) -> Result<T> {
    let path = folder.join("cases.json");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}
