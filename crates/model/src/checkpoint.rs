//! Checkpoints: safetensors files in a model directory, checked on opening and read slice by slice.
//!
//! Opening reads headers alone and holds them against the config: afterwards every tensor that the model
//! needs is known to be there, whole, of the right shape and of a dtype that the kernels take. Reading is
//! positioned (`pread`), from any number of threads at once, and never maps a file: a file cut short under a
//! map is a SIGBUS, here it is an error.

mod error;
mod header;
mod inspect;
mod output;
mod random;
mod rename;
mod synthesize;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod weights;

use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kernels::SourceType;
use safetensors::Dtype;

pub use error::CheckpointError;
pub use inspect::{Inspection, RankBytes, WidthBytes, inspect};
pub use rename::rename;
pub use synthesize::{Synthesis, synthesize};

use crate::config::Config;
use crate::names::{Naming, Tensor};
use weights::WeightFiles;

/// Up to about this many bytes, reading over the gap between two rows' slices costs no more than a seek.
const MAX_GAP_BYTES: usize = 64 << 10;
/// Rows with small gaps between them are read in blocks of about this many bytes.
const BLOCK_BYTES: usize = 1 << 20;

/// An open checkpoint that has every tensor of its model.
#[derive(Debug)]
pub struct Checkpoint {
    weights: WeightFiles,
    naming: Naming,
    places: HashMap<Tensor, Place>,
}

/// Where a tensor lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: usize,
    /// Of its first byte in the file.
    offset: u64,
    dtype: SourceType,
    shape: [usize; 2],
}

impl Checkpoint {
    /// Opens the checkpoint of a model directory: `model.safetensors.index.json` and the files that it names,
    /// or `model.safetensors`, or the only `*.safetensors` file.
    ///
    /// A tied head is the embedding, whether or not the checkpoint has one; tensors that the model does not
    /// know are ignored.
    pub fn open(dir: &Path, config: &Config) -> Result<Checkpoint, CheckpointError> {
        let weights = WeightFiles::open(dir)?;
        let by_architecture =
            if config.architecture == Naming::Yi.architecture() { Naming::Yi } else { Naming::Llama };
        let naming = weights.naming()?.unwrap_or(by_architecture);
        let mut places = places(&weights, config)?;
        for tensor in Tensor::all(config.shape.layers, config.tied) {
            if !places.contains_key(&tensor) {
                let (dir, tensor_name) = (dir.to_owned(), tensor.name(naming));
                return Err(match tensor {
                    Tensor::Head => CheckpointError::NoHead { dir, tensor: tensor_name },
                    _ => CheckpointError::Missing { dir, tensor: tensor_name },
                });
            }
        }
        if config.tied
            && let Some(&embedding) = places.get(&Tensor::Embedding)
        {
            places.insert(Tensor::Head, embedding);
        }
        Ok(Checkpoint { weights, naming, places })
    }

    /// Which names its tensors have.
    pub fn naming(&self) -> Naming {
        self.naming
    }

    /// The element type of a tensor.
    pub fn dtype(&self, tensor: Tensor) -> Result<SourceType, CheckpointError> {
        Ok(self.place(tensor)?.dtype)
    }

    /// Rows and columns of a tensor; a vector is one row.
    pub fn shape(&self, tensor: Tensor) -> Result<[usize; 2], CheckpointError> {
        Ok(self.place(tensor)?.shape)
    }

    /// Reads a slice of a tensor: little-endian, dense, row-major.
    pub fn read(
        &self,
        tensor: Tensor,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Vec<u8>, CheckpointError> {
        Ok(self.read_columns(tensor, rows, &[cols])?.swap_remove(0))
    }

    /// Reads several runs of columns of the same rows in one pass over the file: one dense slice for each.
    ///
    /// Takes the memory of the slices and of one block, and is far faster than a [`read`](Self::read) for
    /// each run where the runs lie side by side.
    pub fn read_columns(
        &self,
        tensor: Tensor,
        rows: Range<usize>,
        runs: &[Range<usize>],
    ) -> Result<Vec<Vec<u8>>, CheckpointError> {
        let place = self.place(tensor)?;
        let [total_rows, total_cols] = place.shape;
        let inside = |range: &Range<usize>, total| range.start <= range.end && range.end <= total;
        if !inside(&rows, total_rows) || !runs.iter().all(|run| inside(run, total_cols)) {
            return Err(CheckpointError::OutOfRange {
                tensor: tensor.name(self.naming),
                shape: place.shape,
                rows,
                cols: runs.to_vec(),
            });
        }
        let size = place.dtype.size();
        let row_bytes = total_cols * size;
        let first_byte = place.offset + (rows.start * row_bytes) as u64;
        if let [run] = runs
            && run.len() == total_cols
        {
            let mut slice = vec![0; rows.len() * row_bytes];
            self.read_at(place, &mut slice, first_byte)?;
            return Ok(vec![slice]);
        }
        let hull = runs.iter().map(|run| run.start).min().unwrap_or(0) * size
            ..runs.iter().map(|run| run.end).max().unwrap_or(0) * size;
        let mut slices: Vec<Vec<u8>> =
            runs.iter().map(|run| Vec::with_capacity(rows.len() * run.len() * size)).collect();
        let rows_per_read =
            if row_bytes - hull.len() > MAX_GAP_BYTES { 1 } else { (BLOCK_BYTES / row_bytes).max(1) };
        let mut block = Vec::new();
        for first in (0..rows.len()).step_by(rows_per_read) {
            let count = rows_per_read.min(rows.len() - first);
            block.resize((count - 1) * row_bytes + hull.len(), 0);
            self.read_at(place, &mut block, first_byte + (first * row_bytes + hull.start) as u64)?;
            for row in block.chunks(row_bytes) {
                for (slice, run) in slices.iter_mut().zip(runs) {
                    slice.extend_from_slice(&row[run.start * size - hull.start..run.end * size - hull.start]);
                }
            }
        }
        Ok(slices)
    }

    fn place(&self, tensor: Tensor) -> Result<&Place, CheckpointError> {
        self.places.get(&tensor).ok_or_else(|| CheckpointError::Missing {
            dir: self.weights.dir.clone(),
            tensor: tensor.name(self.naming),
        })
    }

    fn read_at(&self, place: &Place, bytes: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        let file = &self.weights.files[place.file];
        file.file.read_exact_at(bytes, offset).map_err(|source| CheckpointError::io(&file.path, source))
    }
}

/// The place of every tensor of the model that the files have, each checked against the config.
fn places(weights: &WeightFiles, config: &Config) -> Result<HashMap<Tensor, Place>, CheckpointError> {
    let mut places = HashMap::new();
    for (index, file) in weights.files.iter().enumerate() {
        for entry in &file.header.tensors {
            let Some((tensor, _)) = Tensor::parse(&entry.name) else {
                tracing::debug!(tensor = entry.name, "not a tensor of the model, ignored");
                continue;
            };
            if tensor == Tensor::Head && config.tied {
                tracing::debug!(tensor = entry.name, "the head is tied to the embedding, ignored");
                continue;
            }
            let (path, name) = (file.path.clone(), entry.name.clone());
            if matches!(tensor, Tensor::Layer(layer, _) if layer >= config.shape.layers) {
                return Err(CheckpointError::ExtraLayer { path, tensor: name, layers: config.shape.layers });
            }
            let expected = tensor.stored_shape(&config.shape);
            if !entry.shape.iter().copied().eq(expected.iter().map(|&size| size as u64)) {
                return Err(CheckpointError::Shape {
                    path,
                    tensor: name,
                    found: entry.shape.clone(),
                    expected,
                });
            }
            let dtype = match entry.dtype {
                Dtype::F32 => SourceType::F32,
                Dtype::F16 => SourceType::F16,
                Dtype::BF16 => SourceType::Bf16,
                found => return Err(CheckpointError::DType { path, tensor: name, found: found.to_string() }),
            };
            let offset = file.header.data_start + entry.begin;
            places.insert(tensor, Place { file: index, offset, dtype, shape: tensor.shape(&config.shape) });
        }
    }
    Ok(places)
}
