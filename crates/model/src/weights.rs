//! One rank's weights: for every unit that it holds, that unit's slices of every tensor of its layers.
//!
//! Only those slices are read. A unit's matrices stand by themselves ([`Parts`]), so that another width loads and drops
//! units and touches nothing else.

mod ahead;
mod origin;
mod parts;
mod piece;
mod random;
mod request;

use std::ops::Range;

use engine::{ModelShape, Unit};
use kernels::{Backend, DType, Tree};

use crate::error::Result;
use crate::names::{LayerTensor, Tensor};

pub use ahead::readers;
pub(crate) use origin::Origin;
pub use parts::Loaded;
use parts::Weight;
pub(crate) use parts::{Cut, Part, Parts};
pub(crate) use piece::{Block, Piece};
pub(crate) use random::RandomWeights;
pub(crate) use request::Request;
use request::layer_readings;
#[cfg(test)]
pub(crate) use request::{Reading, readings};

/// What a rank holds of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Of its stage: the first has the embedding, the last the final norm and the head.
    pub(crate) layers: Range<usize>,
    /// Of each of them.
    pub(crate) units: Range<usize>,
}

/// The weights of a share.
pub(crate) struct Weights<B: Backend> {
    share: Share,
    /// Its sub-trees of the reduction tree, in the first stage.
    tables: Vec<Range<usize>>,
    /// One for each of them.
    pub(crate) embedding: Vec<B::Table>,
    pub(crate) layers: Vec<Layer<B>>,
    /// In the last stage.
    pub(crate) last: Option<LastWeights<B>>,
}

/// What follows the layers.
pub(crate) struct LastWeights<B: Backend> {
    pub(crate) norm: B::Buffer,
    /// By unit.
    pub(crate) head: Vec<B::Matrix>,
}

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

impl Share {
    /// The sub-trees whose embedding rows it has; none but in the first stage, of a model of so many units.
    fn tables(&self, units: usize) -> Vec<Range<usize>> {
        if self.layers.start == 0 { Tree { units }.subtrees(&self.units) } else { Vec::new() }
    }
}

impl<B: Backend> Weights<B> {
    /// Puts the weights of `share` together, all of which are in `parts`, of a model of so many units and layers.
    pub(crate) fn of(parts: &mut Parts<B>, share: &Share, shape: &ModelShape) -> Result<Self> {
        let Share { layers, units } = share;
        let tables = share.tables(shape.kv_heads);
        Ok(Self {
            embedding: tables.iter().map(|part| parts.take_table(part)).collect::<Result<_>>()?,
            layers: layers.clone().map(|index| Layer::of(parts, index, units)).collect::<Result<_>>()?,
            last: match layers.end == shape.layers {
                true => Some(LastWeights {
                    norm: parts.take_vector(Tensor::Norm)?,
                    head: parts.take_matrices(Tensor::Head, units)?,
                }),
                false => None,
            },
            tables,
            share: share.clone(),
        })
    }

    /// Takes them apart again.
    pub(crate) fn into_parts(self) -> Parts<B> {
        let Self { share: Share { layers, units }, tables, embedding, layers: weights, last } = self;
        let mut parts = Parts::default();
        for (units, table) in tables.into_iter().zip(embedding) {
            parts.0.insert(Part::Table(units), Weight::Table(table));
        }
        let last = last
            .map(|LastWeights { norm, head }| ([(Tensor::Norm, norm)].into(), [(Tensor::Head, head)].into()));
        let layers = layers.zip(weights).map(|(index, layer)| layer.by_tensor(index));
        for (vectors, matrices) in layers.chain(last) {
            let vectors =
                vectors.into_iter().map(|(tensor, norm)| (Part::Vector(tensor), Weight::Vector(norm)));
            parts.0.extend(vectors);
            for (tensor, of_units) in matrices {
                let of_units = units.clone().zip(of_units);
                let matrices =
                    of_units.map(|(unit, matrix)| (Part::Matrix(tensor, unit), Weight::Matrix(matrix)));
                parts.0.extend(matrices);
            }
        }
        parts
    }

    /// Bytes that a decode step reads: every matrix.
    pub(crate) fn step_bytes(&self, backend: &B) -> usize {
        let head = self.last.iter().flat_map(|last| &last.head);
        let head: usize = head.map(|matrix| backend.matrix_bytes(matrix)).sum();
        self.layers.iter().map(|layer| layer.bytes(backend)).sum::<usize>() + head
    }

    /// One layer of the first unit, to see what it takes.
    pub(crate) fn sample(backend: &B, cut: Cut<'_>, dtype: DType) -> Result<Layer<B>> {
        let mut parts = Parts::default();
        parts.read(backend, cut, &layer_readings(cut, 0, 0..1), dtype, &mut |_, _| Ok(()))?;
        Layer::of(&mut parts, 0, &(0..1))
    }
}

/// Vectors and matrices by the tensor that names them.
type ByTensor<B> = (Vec<(Tensor, <B as Backend>::Buffer)>, Vec<(Tensor, Vec<<B as Backend>::Matrix>)>);

impl<B: Backend> Layer<B> {
    fn of(parts: &mut Parts<B>, index: usize, units: &Range<usize>) -> Result<Self> {
        let tensor = |part| Tensor::Layer(index, part);
        Ok(Self {
            attention_norm: parts.take_vector(tensor(LayerTensor::AttentionNorm))?,
            qkv: parts.take_matrices(tensor(LayerTensor::Q), units)?,
            o: parts.take_matrices(tensor(LayerTensor::O), units)?,
            ffn_norm: parts.take_vector(tensor(LayerTensor::FfnNorm))?,
            gate_up: parts.take_matrices(tensor(LayerTensor::Gate), units)?,
            down: parts.take_matrices(tensor(LayerTensor::Down), units)?,
        })
    }

    fn by_tensor(self, index: usize) -> ByTensor<B> {
        let tensor = |part| Tensor::Layer(index, part);
        let Self { attention_norm, qkv, o, ffn_norm, gate_up, down } = self;
        let vectors = [(LayerTensor::AttentionNorm, attention_norm), (LayerTensor::FfnNorm, ffn_norm)];
        let matrices = [
            (LayerTensor::Q, qkv),
            (LayerTensor::O, o),
            (LayerTensor::Gate, gate_up),
            (LayerTensor::Down, down),
        ];
        (
            vectors.into_iter().map(|(part, vector)| (tensor(part), vector)).collect(),
            matrices.into_iter().map(|(part, matrices)| (tensor(part), matrices)).collect(),
        )
    }

    /// Bytes of its matrices.
    pub(crate) fn bytes(&self, backend: &B) -> usize {
        let matrices = [&self.qkv, &self.o, &self.gate_up, &self.down].into_iter().flatten();
        matrices.map(|matrix| backend.matrix_bytes(matrix)).sum()
    }
}
