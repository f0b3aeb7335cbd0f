//! Golden values made by `tests/golden/make.py` with Hugging Face transformers.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;

/// What transformers computed for one model.
pub struct Golden {
    /// The checkpoint.
    pub dir: PathBuf,
    /// More than 4,200 ids.
    pub prompt: Vec<u32>,
    /// Positions in the prompt, ascending.
    pub positions: Vec<usize>,
    /// For each position the logits over the vocabulary, in float32.
    pub logits: Vec<Vec<f32>>,
    /// ‖a−b‖/‖b‖ of transformers' own bfloat16 run a against its float32 run b: the smaller one of its attention kinds.
    pub bf16_error: f64,
    /// Greedy continuations in float32.
    pub greedy: Vec<Greedy>,
}

/// A greedy continuation.
#[derive(Debug, Deserialize)]
pub struct Greedy {
    /// The text.
    pub prompt: String,
    /// Its ids.
    pub prompt_ids: Vec<u32>,
    /// The ids that follow.
    pub ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Metadata {
    positions: Vec<usize>,
    bf16: Bf16,
    #[serde(default)]
    greedy: Vec<Greedy>,
}

#[derive(Deserialize)]
struct Bf16 {
    sdpa: RunError,
    eager: RunError,
}

#[derive(Deserialize)]
struct RunError {
    error: f64,
}

/// All models with golden values.
pub const MODELS: [&str; 7] = ["yi-nano", "gqa7", "mha", "tied", "awq4", "gptq8", "gptq4"];

/// Reads the golden values of a model.
pub fn load(name: &str) -> Golden {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join("golden").join(name);
    let dir = if name == "yi-nano" { root.join("../models/yi-nano") } else { folder.clone() };
    let text = fs::read_to_string(folder.join("golden.json")).expect("golden.json");
    let metadata: Metadata = serde_json::from_str(&text).expect("golden.json");
    let bytes = fs::read(folder.join("golden.safetensors")).expect("golden.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("golden.safetensors");
    let words = |name| {
        tensors
            .tensor(name)
            .expect("tensor")
            .data()
            .chunks_exact(4)
            .map(|b| [b[0], b[1], b[2], b[3]])
            .collect::<Vec<_>>()
    };
    let flat: Vec<f32> = words("logits").into_iter().map(f32::from_le_bytes).collect();
    let vocabulary = flat.len() / metadata.positions.len();
    Golden {
        dir,
        prompt: words("prompt").into_iter().map(u32::from_le_bytes).collect(),
        logits: flat.chunks(vocabulary).map(<[f32]>::to_vec).collect(),
        positions: metadata.positions,
        bf16_error: metadata.bf16.sdpa.error.min(metadata.bf16.eager.error),
        greedy: metadata.greedy,
    }
}
