//! One rank's weights: for every unit that it holds, that unit's slices of every tensor.
//!
//! Only those slices are read. A unit's matrices stand by themselves, so that another width loads and drops
//! units and touches nothing else.

mod quantized;

use std::ops::Range;

use engine::Unit;
use kernels::{Backend, DType, RowBlock, SourceType, Tree};

use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::Result;
use crate::names::{LayerTensor, Tensor};

/// The weights of a contiguous range of units.
pub(crate) struct Weights<B: Backend> {
    /// One table for each of the rank's sub-trees of the reduction tree.
    pub(crate) embedding: Vec<B::Table>,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) norm: B::Buffer,
    /// By unit.
    pub(crate) head: Vec<B::Matrix>,
}

/// A tensor and the run of its rows that a unit holds.
type Part<'a> = (Tensor, &'a dyn Fn(&Unit) -> Range<usize>);

/// One decoder layer; matrices by unit.
pub(crate) struct Layer<B: Backend> {
    pub(crate) attention_norm: B::Buffer,
    /// `[(g+2)·d, hidden]`: the unit's queries, its key, its value.
    pub(crate) qkv: Vec<B::Matrix>,
    /// `[hidden, g·d]`
    pub(crate) o: Vec<B::Matrix>,
    pub(crate) ffn_norm: B::Buffer,
    /// `[2·width, hidden]`: gate, then up.
    pub(crate) gate_up: Vec<B::Matrix>,
    /// `[hidden, width]`
    pub(crate) down: Vec<B::Matrix>,
}

/// FFN columns that a unit computes: kernels want an even number and at least two, so a unit may have a column or two
/// of zeros behind its own, which add nothing.
pub(crate) fn ffn_width(unit: &Unit) -> usize {
    unit.ffn.len().next_multiple_of(2).max(2)
}

impl<B: Backend> Weights<B> {
    /// Loads the units of `held`; `progress` is called after each of [`Self::parts`] parts.
    pub(crate) fn load(
        backend: &B,
        config: &Config,
        checkpoint: &Checkpoint,
        units: &[Unit],
        held: Range<usize>,
        dtype: DType,
        progress: &mut dyn FnMut(),
    ) -> Result<Self> {
        let tree = Tree { units: units.len() };
        let loader =
            Loader { backend, config, checkpoint, all_units: units, units: &units[held.clone()], dtype };
        let embedding = tree
            .subtrees(&held)
            .into_iter()
            .map(|part| loader.embedding(units[part.start].vocab.start..units[part.end - 1].vocab.end))
            .collect::<Result<_>>()?;
        progress();
        let layers = (0..config.shape.layers)
            .map(|index| loader.layer(index).inspect(|_| progress()))
            .collect::<Result<_>>()?;
        let norm = loader.vector(Tensor::Norm)?;
        let head = loader
            .units
            .iter()
            .map(|u| loader.rows(&[(Tensor::Head, u.vocab.clone())], 0))
            .collect::<Result<_>>()?;
        progress();
        Ok(Self { embedding, layers, norm, head })
    }

    /// How often `load` reports progress.
    pub(crate) fn parts(config: &Config) -> usize {
        config.shape.layers + 2
    }

    /// Bytes that a decode step reads: every matrix.
    pub(crate) fn step_bytes(&self, backend: &B) -> usize {
        let head: usize = self.head.iter().map(|matrix| backend.matrix_bytes(matrix)).sum();
        self.layers.iter().map(|layer| layer.bytes(backend)).sum::<usize>() + head
    }

    /// One layer of a single unit, to see what it takes.
    pub(crate) fn sample(
        backend: &B,
        config: &Config,
        checkpoint: &Checkpoint,
        units: &[Unit],
        dtype: DType,
    ) -> Result<Layer<B>> {
        Loader { backend, config, checkpoint, all_units: units, units: &units[..1], dtype }.layer(0)
    }
}

impl<B: Backend> Layer<B> {
    /// Bytes of its matrices.
    pub(crate) fn bytes(&self, backend: &B) -> usize {
        let matrices = [&self.qkv, &self.o, &self.gate_up, &self.down].into_iter().flatten();
        matrices.map(|matrix| backend.matrix_bytes(matrix)).sum()
    }
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    config: &'a Config,
    checkpoint: &'a Checkpoint,
    /// Of the model.
    all_units: &'a [Unit],
    /// Of this rank.
    units: &'a [Unit],
    dtype: DType,
}

impl<B: Backend> Loader<'_, B> {
    fn layer(&self, index: usize) -> Result<Layer<B>> {
        let tensor = |part| Tensor::Layer(index, part);
        let d = self.config.shape.head_dim;
        let columns = |heads: &Range<usize>| heads.start * d..heads.end * d;
        let kv = |unit: &Unit| columns(&(unit.index..unit.index + 1));
        let padding = |unit: &Unit| ffn_width(unit) - unit.ffn.len();
        Ok(Layer {
            attention_norm: self.vector(tensor(LayerTensor::AttentionNorm))?,
            qkv: self.stacked(
                &[
                    (tensor(LayerTensor::Q), &|unit| columns(&unit.heads)),
                    (tensor(LayerTensor::K), &kv),
                    (tensor(LayerTensor::V), &kv),
                ],
                |_| 0,
            )?,
            o: self.columns(tensor(LayerTensor::O), |unit| columns(&unit.heads), |_| 0)?,
            ffn_norm: self.vector(tensor(LayerTensor::FfnNorm))?,
            gate_up: self.stacked(
                &[
                    (tensor(LayerTensor::Gate), &|unit| unit.ffn.clone()),
                    (tensor(LayerTensor::Up), &|unit| unit.ffn.clone()),
                ],
                padding,
            )?,
            down: self.columns(tensor(LayerTensor::Down), |unit| unit.ffn.clone(), padding)?,
        })
    }

    fn embedding(&self, rows: Range<usize>) -> Result<B::Table> {
        let first_id = rows.start;
        let slice = Slice::read(self.checkpoint, Tensor::Embedding, rows, self.config.shape.hidden)?;
        Ok(self.backend.table(slice.block(), first_id, self.dtype)?)
    }

    fn vector(&self, tensor: Tensor) -> Result<B::Buffer> {
        let slice = Slice::read(self.checkpoint, tensor, 0..1, self.config.shape.hidden)?;
        Ok(self.backend.vector(slice.block())?)
    }

    /// For each unit a matrix of runs of rows of several tensors, with `padding` rows of zeros behind each.
    fn stacked(&self, parts: &[Part<'_>], padding: impl Fn(&Unit) -> usize) -> Result<Vec<B::Matrix>> {
        if parts.iter().any(|(tensor, _)| self.checkpoint.quantization(*tensor).is_some()) {
            return self.stacked_quantized(parts);
        }
        let of_unit = |unit| parts.iter().map(|(tensor, run)| (*tensor, run(unit))).collect::<Vec<_>>();
        self.units.iter().map(|unit| self.rows(&of_unit(unit), padding(unit))).collect()
    }

    /// A matrix of whole rows of several tensors, with `padding` rows of zeros behind each.
    fn rows(&self, parts: &[(Tensor, Range<usize>)], padding: usize) -> Result<B::Matrix> {
        let slices = parts
            .iter()
            .map(|(tensor, rows)| {
                let mut slice =
                    Slice::read(self.checkpoint, *tensor, rows.clone(), self.config.shape.hidden)?;
                slice.rows += padding;
                slice.bytes.resize(slice.rows * slice.cols * slice.dtype.size(), 0);
                Ok(slice)
            })
            .collect::<Result<Vec<_>>>()?;
        let blocks: Vec<_> = slices.iter().map(Slice::block).collect();
        Ok(self.backend.matrix(&blocks, self.dtype)?)
    }

    /// For each unit a matrix of a run of a tensor's columns, with `padding` columns of zeros behind it.
    fn columns(
        &self,
        tensor: Tensor,
        run: impl Fn(&Unit) -> Range<usize>,
        padding: impl Fn(&Unit) -> usize,
    ) -> Result<Vec<B::Matrix>> {
        if let Some(quantization) = self.checkpoint.quantization(tensor) {
            return self.quantized_columns(tensor, quantization, run);
        }
        let dtype = self.checkpoint.dtype(tensor)?;
        let rows = self.config.shape.hidden;
        let runs: Vec<_> = self.units.iter().map(run).collect();
        let paddings = self.units.iter().map(padding);
        let slices = self.checkpoint.read_columns(tensor, 0..rows, &runs)?;
        slices
            .into_iter()
            .zip(runs)
            .zip(paddings)
            .map(|((bytes, run), padding)| {
                let bytes = pad_rows(bytes, rows, padding * dtype.size());
                let slice = Slice { bytes, dtype, rows, cols: run.len() + padding };
                Ok(self.backend.matrix(&[slice.block()], self.dtype)?)
            })
            .collect()
    }
}

/// A slice of a tensor in memory.
struct Slice {
    bytes: Vec<u8>,
    dtype: SourceType,
    rows: usize,
    cols: usize,
}

impl Slice {
    fn read(checkpoint: &Checkpoint, tensor: Tensor, rows: Range<usize>, cols: usize) -> Result<Self> {
        let bytes = checkpoint.read(tensor, rows.clone(), 0..cols)?;
        Ok(Self { bytes, dtype: checkpoint.dtype(tensor)?, rows: rows.len(), cols })
    }

    fn block(&self) -> RowBlock<'_> {
        RowBlock { bytes: &self.bytes, dtype: self.dtype, rows: self.rows, cols: self.cols }
    }
}

/// Appends `padding` zero bytes to every one of `rows` rows.
fn pad_rows(bytes: Vec<u8>, rows: usize, padding: usize) -> Vec<u8> {
    if padding == 0 {
        return bytes;
    }
    let row_bytes = bytes.len() / rows;
    let mut padded = Vec::with_capacity(bytes.len() + rows * padding);
    for row in 0..rows {
        padded.extend_from_slice(&bytes[row * row_bytes..(row + 1) * row_bytes]);
        padded.resize(padded.len() + padding, 0);
    }
    padded
}
