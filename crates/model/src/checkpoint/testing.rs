//! Small checkpoints for this module's tests, and ways to damage them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{Checkpoint, CheckpointError, Synthesis, synthesize};
use crate::config::Config;

/// A config of two units whose sizes nothing divides well.
pub(super) fn tiny() -> Value {
    json!({
        "architectures": ["YiForCausalLM"], "model_type": "Yi", "torch_dtype": "bfloat16", "eos_token_id": 2,
        "hidden_size": 12, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 17, "max_position_embeddings": 64,
        "rope_theta": 5000000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    })
}

/// A model directory that goes away with it.
pub(super) struct Model {
    dir: TempDir,
}

impl Model {
    /// Of random bf16 weights in one file, with Yi's names.
    pub(super) fn new(config: Value) -> Model {
        Model::with(config, &Synthesis::default())
    }

    /// Of random weights.
    pub(super) fn with(config: Value, synthesis: &Synthesis) -> Model {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("template.json");
        fs::write(&path, config.to_string()).unwrap();
        synthesize(&path, &dir.path().join("model"), synthesis, &ProgressBar::hidden()).unwrap();
        Model { dir }
    }

    /// The same in three files.
    pub(super) fn sharded(config: Value) -> Model {
        Model::with(config, &Synthesis { max_shard_bytes: 3000, ..Synthesis::default() })
    }

    /// The model directory.
    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    /// A file in it.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// A folder beside it.
    pub(super) fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Opens it by its own config.
    pub(super) fn open(&self) -> Result<Checkpoint, CheckpointError> {
        open(&self.path())
    }

    /// What opening it complains about.
    pub(super) fn complaint(&self) -> String {
        self.open().unwrap_err().to_string()
    }

    /// Changes a JSON file.
    pub(super) fn edit_json(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.file(name);
        let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut json);
        fs::write(&path, json.to_string()).unwrap();
    }

    /// Changes the header of a weight file and the data behind it.
    pub(super) fn edit_weights(&self, name: &str, edit: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
        let path = self.file(name);
        let (mut header, mut data) = parts(&path);
        edit(&mut header, &mut data);
        let text = Value::from(header).to_string();
        let mut file = File::create(&path).unwrap();
        file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.write_all(&data).unwrap();
    }
}

/// Opens a model directory.
pub(super) fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::open(dir, &Config::load(dir)?)
}

/// Header and data of a good weight file.
pub(super) fn parts(path: &Path) -> (Map<String, Value>, Vec<u8>) {
    let mut file = File::open(path).unwrap();
    let mut length = [0; 8];
    file.read_exact(&mut length).unwrap();
    let mut header = vec![0; u64::from_le_bytes(length) as usize];
    file.read_exact(&mut header).unwrap();
    let mut data = Vec::new();
    file.read_to_end(&mut data).unwrap();
    (serde_json::from_slice(&header).unwrap(), data)
}
