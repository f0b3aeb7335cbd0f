//! Checkpoints: safetensors files in a model directory, checked on opening and read slice by slice.
//!
//! Opening reads headers and holds them against the config: afterwards every tensor that the model
//! needs is known to be there, whole, of the right shape and of a dtype that the kernels take. Of a quantised
//! checkpoint it also reads `g_idx` and `bias`, which must say nothing. Reading is
//! positioned (`pread`), from any number of threads at once, and never maps a file: a file cut short under a
//! map is a SIGBUS, here it is an error.

mod error;
mod header;
mod inspect;
mod output;
mod pieces;
mod quantized;
mod random;
mod rename;
mod synthesize;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod unpack;
mod weights;

use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use engine::ModelShape;
use kernels::SourceType;
use safetensors::Dtype;

pub use error::CheckpointError;
pub use inspect::{Inspection, RankBytes, WidthBytes, inspect};
pub(crate) use random::Random;
pub use rename::rename;
pub use synthesize::{Synthesis, synthesize};
pub(crate) use unpack::QuantizedRows;

use crate::config::{Config, Quantization};
use crate::names::{Naming, QuantizedPart, Tensor};
use header::Entry;
use quantized::Packed;
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
    plain: Plain,
    packed: Packed,
    quantization: Option<Quantization>,
    model: ModelShape,
}

/// Where the plain tensors lie, and of what type their elements are.
type Plain = HashMap<Tensor, (Place, SourceType)>;

/// Where a tensor lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: usize,
    /// Of its first byte in the file.
    offset: u64,
    element_bytes: usize,
    shape: [usize; 2],
}

/// Where a run of columns is read to.
struct Target<'a> {
    cols: Range<usize>,
    /// Row after row.
    bytes: &'a mut [u8],
    /// From the beginning of a row to that of the next; what lies behind the run is left as it is.
    row_bytes: usize,
}

impl Place {
    /// That rows and runs of columns are inside.
    fn check(
        &self,
        name: impl Fn() -> String,
        rows: &Range<usize>,
        runs: &[Range<usize>],
    ) -> Result<(), CheckpointError> {
        let inside = |range: &Range<usize>, total| range.start <= range.end && range.end <= total;
        let [total_rows, total_cols] = self.shape;
        if inside(rows, total_rows) && runs.iter().all(|run| inside(run, total_cols)) {
            return Ok(());
        }
        let (tensor, rows, cols) = (name(), rows.clone(), runs.to_vec());
        Err(CheckpointError::OutOfRange { tensor, shape: self.shape, rows, cols })
    }
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
        let (plain, packed) = places(&weights, config)?;
        let (quantization, model) = (config.quantization, config.shape);
        let mut checkpoint = Checkpoint { weights, naming, plain, packed, quantization, model };
        for tensor in Tensor::all(config.shape.layers, config.tied) {
            checkpoint.check(tensor)?;
        }
        if config.tied
            && let Some(&embedding) = checkpoint.plain.get(&Tensor::Embedding)
        {
            checkpoint.plain.insert(Tensor::Head, embedding);
        }
        Ok(checkpoint)
    }

    /// Which names its tensors have.
    pub fn naming(&self) -> Naming {
        self.naming
    }

    /// How a tensor is quantised, if it is; then it has no element type and is not read as others are.
    pub fn quantization(&self, tensor: Tensor) -> Option<Quantization> {
        self.quantization.filter(|_| tensor.is_projection())
    }

    /// The element type of a plain tensor.
    pub fn dtype(&self, tensor: Tensor) -> Result<SourceType, CheckpointError> {
        Ok(self.place(tensor)?.1)
    }

    /// Rows and columns of a tensor; a vector is one row.
    pub fn shape(&self, tensor: Tensor) -> [usize; 2] {
        tensor.shape(&self.model)
    }

    /// Reads a slice of a plain tensor: little-endian, dense, row-major.
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
        self.read_place(self.place(tensor)?.0, || tensor.name(self.naming), rows, runs)
    }

    /// Likewise, of any tensor.
    fn read_place(
        &self,
        place: Place,
        name: impl Fn() -> String,
        rows: Range<usize>,
        runs: &[Range<usize>],
    ) -> Result<Vec<Vec<u8>>, CheckpointError> {
        place.check(&name, &rows, runs)?;
        let row_bytes = |run: &Range<usize>| run.len() * place.element_bytes;
        let mut slices: Vec<_> = runs.iter().map(|run| vec![0; rows.len() * row_bytes(run)]).collect();
        let mut targets: Vec<_> = runs
            .iter()
            .zip(&mut slices)
            .map(|(run, bytes)| Target { cols: run.clone(), bytes, row_bytes: row_bytes(run) })
            .collect();
        self.read_into(place, name, rows, &mut targets)?;
        Ok(slices)
    }

    /// Likewise, to where the targets say.
    fn read_into(
        &self,
        place: Place,
        name: impl Fn() -> String,
        rows: Range<usize>,
        targets: &mut [Target<'_>],
    ) -> Result<(), CheckpointError> {
        let runs: Vec<_> = targets.iter().map(|target| target.cols.clone()).collect();
        place.check(name, &rows, &runs)?;
        let Place { element_bytes: size, shape: [_, total_cols], .. } = place;
        let row_bytes = total_cols * size;
        let first_byte = place.offset + (rows.start * row_bytes) as u64;
        if let [Target { cols, bytes, row_bytes: stride }] = targets
            && cols.len() == total_cols
            && *stride == row_bytes
        {
            return self.read_at(&place, &mut bytes[..rows.len() * row_bytes], first_byte);
        }
        let hull = runs.iter().map(|run| run.start).min().unwrap_or(0) * size
            ..runs.iter().map(|run| run.end).max().unwrap_or(0) * size;
        let rows_per_read =
            if row_bytes - hull.len() > MAX_GAP_BYTES { 1 } else { (BLOCK_BYTES / row_bytes).max(1) };
        let mut block = Vec::new();
        for first in (0..rows.len()).step_by(rows_per_read) {
            let count = rows_per_read.min(rows.len() - first);
            block.resize((count - 1) * row_bytes + hull.len(), 0);
            self.read_at(&place, &mut block, first_byte + (first * row_bytes + hull.start) as u64)?;
            for (index, row) in block.chunks(row_bytes).enumerate() {
                for Target { cols, bytes, row_bytes } in &mut *targets {
                    let run = &row[cols.start * size - hull.start..cols.end * size - hull.start];
                    bytes[(first + index) * *row_bytes..][..run.len()].copy_from_slice(run);
                }
            }
        }
        Ok(())
    }

    fn place(&self, tensor: Tensor) -> Result<(Place, SourceType), CheckpointError> {
        self.plain.get(&tensor).copied().ok_or_else(|| self.missing(tensor.name(self.naming)))
    }

    /// That a tensor of the model is there, and as the config says.
    fn check(&self, tensor: Tensor) -> Result<(), CheckpointError> {
        match self.quantization(tensor) {
            Some(quantization) => match self.packed.missing(tensor, quantization) {
                Some(part) => Err(self.missing(part)),
                None => self.check_quantized(tensor, quantization),
            },
            None if self.plain.contains_key(&tensor) => Ok(()),
            None if tensor == Tensor::Head => {
                let (dir, tensor) = (self.weights.dir.clone(), tensor.name(self.naming));
                Err(CheckpointError::NoHead { dir, tensor })
            }
            None => Err(self.missing(tensor.name(self.naming))),
        }
    }

    fn missing(&self, tensor: String) -> CheckpointError {
        CheckpointError::Missing { dir: self.weights.dir.clone(), tensor }
    }

    fn read_at(&self, place: &Place, bytes: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        let file = &self.weights.files[place.file];
        file.file.read_exact_at(bytes, offset).map_err(|source| CheckpointError::io(&file.path, source))
    }
}

/// The place of every tensor of the model that the files have, each checked against the config.
fn places(weights: &WeightFiles, config: &Config) -> Result<(Plain, Packed), CheckpointError> {
    let (mut plain, mut packed) = (Plain::new(), Packed::default());
    for (file, weights) in weights.files.iter().enumerate() {
        let path = &weights.path;
        for entry in &weights.header.tensors {
            let (tensor, part) = match (Tensor::parse(&entry.name), Tensor::parse_part(&entry.name)) {
                (Some((tensor, _)), _) => (tensor, None),
                (None, Some((tensor, part))) => (tensor, Some(part)),
                (None, None) => {
                    tracing::debug!(tensor = entry.name, "not a tensor of the model, ignored");
                    continue;
                }
            };
            if tensor == Tensor::Head && config.tied {
                tracing::debug!(tensor = entry.name, "the head is tied to the embedding, ignored");
                continue;
            }
            if matches!(tensor, Tensor::Layer(layer, _) if layer >= config.shape.layers) {
                let (path, tensor) = (path.clone(), entry.name.clone());
                return Err(CheckpointError::ExtraLayer { path, tensor, layers: config.shape.layers });
            }
            let offset = weights.header.data_start + entry.begin;
            match (part, config.quantization) {
                (None, Some(_)) if tensor.is_projection() => {
                    let detail =
                        "is not quantised, but by quantization_config of config.json every projection is";
                    return Err(CheckpointError::entry(entry, path, detail));
                }
                (None, _) => {
                    check_shape(entry, tensor.stored_shape(&config.shape), path)?;
                    let dtype = source_type(entry, path)?;
                    let shape = tensor.shape(&config.shape);
                    let place = Place { file, offset, element_bytes: dtype.size(), shape };
                    plain.insert(tensor, (place, dtype));
                }
                (Some(part), Some(quantization)) => {
                    packed.add((tensor, part), entry, path, (file, offset), (config, quantization))?;
                }
                (Some(QuantizedPart::Bias), None) => {
                    tracing::debug!(tensor = entry.name, "a bias, ignored");
                }
                (Some(_), None) => {
                    let detail = "is quantised, but config.json has no quantization_config that says how";
                    return Err(CheckpointError::entry(entry, path, detail));
                }
            }
        }
    }
    Ok((plain, packed))
}

/// The element type of a tensor that is not packed.
fn source_type(entry: &Entry, path: &Path) -> Result<SourceType, CheckpointError> {
    match entry.dtype {
        Dtype::F32 => Ok(SourceType::F32),
        Dtype::F16 => Ok(SourceType::F16),
        Dtype::BF16 => Ok(SourceType::Bf16),
        _ => Err(CheckpointError::dtype(entry, path, "F32, F16 or BF16")),
    }
}

fn check_shape(entry: &Entry, expected: Vec<usize>, path: &Path) -> Result<(), CheckpointError> {
    if entry.shape.iter().copied().eq(expected.iter().map(|&size| size as u64)) {
        return Ok(());
    }
    let (path, tensor, found) = (path.to_owned(), entry.name.clone(), entry.shape.clone());
    Err(CheckpointError::Shape { path, tensor, found, expected })
}
