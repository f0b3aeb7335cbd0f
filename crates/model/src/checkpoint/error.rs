//! What can be wrong with a checkpoint: every message names the file or the tensor.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::header::Entry;
use crate::config::ConfigError;

/// Why a checkpoint cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The config, or another JSON file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The directory has no weights, or it is not clear which ones.
    #[error("{}: {detail}", dir.display())]
    NoWeights {
        /// The model directory.
        dir: PathBuf,
        /// What is there instead.
        detail: String,
    },
    /// `model.safetensors.index.json` does not fit the files.
    #[error("{}: {detail}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Git was run without its LFS extension.
    #[error(
        "{}: a Git LFS pointer, not the weights themselves: run `git lfs pull`, or download the file again",
        path.display()
    )]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// The file ends too early.
    #[error(
        "{}: {expected} bytes expected, {found} found: the file is truncated, download it again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that its header promises (at least).
        expected: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// The header is no safetensors header.
    #[error("{}: not a valid safetensors file: {detail}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A tensor that its header or its config contradicts.
    #[error("{}: tensor {tensor} {detail}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong.
        detail: String,
    },
    /// A tensor is not where the config says.
    #[error("{}: tensor {tensor} is missing from the checkpoint", dir.display())]
    Missing {
        /// The model directory.
        dir: PathBuf,
        /// Its name, in the naming of the others.
        tensor: String,
    },
    /// No head, and none may be made out of the embedding.
    #[error(
        "{}: tensor {tensor} is missing from the checkpoint, and tie_word_embeddings is false in config.json",
        dir.display()
    )]
    NoHead {
        /// The model directory.
        dir: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// The config describes a shallower model.
    #[error(
        "{}: tensor {tensor} is of a layer beyond num_hidden_layers ({layers}) of config.json",
        path.display()
    )]
    ExtraLayer {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Layers by the config.
        layers: usize,
    },
    /// The config describes another shape.
    #[error("{}: tensor {tensor} has shape {found:?}, expected {expected:?} by config.json", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its dimensions.
        found: Vec<u64>,
        /// Those by the config.
        expected: Vec<usize>,
    },
    /// Elements that the kernels do not take.
    #[error("{}: tensor {tensor} is of dtype {found}, expected {expected}", path.display())]
    DType {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its dtype.
        found: String,
        /// Those that it may have.
        expected: &'static str,
    },
    /// Both sets of names at once.
    #[error(
        "{}: two namings in one checkpoint: {yi} is one of Yi's names, {llama} one of LLaMA's",
        dir.display()
    )]
    TwoNamings {
        /// The model directory.
        dir: PathBuf,
        /// A tensor with Yi's name.
        yi: String,
        /// A tensor with LLaMA's name.
        llama: String,
    },
    /// One name in two files.
    #[error("tensor {tensor} is in two files: {} and {}", first.display(), second.display())]
    Duplicate {
        /// The tensor's name.
        tensor: String,
        /// One file.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// A slice that the tensor does not have.
    #[error("tensor {tensor} of shape {shape:?} has no rows {rows:?}, columns {cols:?}")]
    OutOfRange {
        /// The tensor's name.
        tensor: String,
        /// Its rows and columns.
        shape: [usize; 2],
        /// The rows asked for.
        rows: Range<usize>,
        /// The runs of columns asked for.
        cols: Vec<Range<usize>>,
    },
    /// The place to write to is not free.
    #[error("{}: {detail}", path.display())]
    Output {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
}

impl CheckpointError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        CheckpointError::Io { path: path.to_owned(), source }
    }

    pub(super) fn entry(entry: &Entry, path: &Path, detail: &str) -> Self {
        let (path, tensor, detail) = (path.to_owned(), entry.name.clone(), detail.to_owned());
        CheckpointError::Entry { path, tensor, detail }
    }

    pub(super) fn dtype(entry: &Entry, path: &Path, expected: &'static str) -> Self {
        let (path, tensor, found) = (path.to_owned(), entry.name.clone(), entry.dtype.to_string());
        CheckpointError::DType { path, tensor, found, expected }
    }
}
