//! One rank's weights: for every unit that it holds, that unit's slices of every tensor of its layers.
//!
//! Only those slices are read. A unit's matrices stand by themselves, so that another width loads and drops
//! units and touches nothing else.

mod ahead;
mod origin;
mod piece;
mod random;
mod request;

use std::ops::Range;

use engine::Unit;
use kernels::{Backend, DType, Tree};

use crate::config::Config;
use crate::error::Result;

pub use ahead::readers;
use ahead::{Pieces, read_ahead};
pub(crate) use origin::Origin;
pub(crate) use piece::{Block, Piece};
pub(crate) use random::RandomWeights;
pub(crate) use request::Request;
use request::{layer_requests, requests};

/// What a rank holds of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    /// Of its stage: the first has the embedding, the last the final norm and the head.
    pub(crate) layers: Range<usize>,
    /// Of each of them.
    pub(crate) units: Range<usize>,
}

/// The weights of a share.
pub(crate) struct Weights<B: Backend> {
    /// One table for each of the rank's sub-trees of the reduction tree; none but in the first stage.
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

impl<B: Backend> Weights<B> {
    /// Loads a share; `progress` is told how many bytes have come of how many.
    pub(crate) fn load(
        backend: &B,
        config: &Config,
        origin: &Origin,
        units: &[Unit],
        share: &Share,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let requests = requests(origin, config, units, share);
        let Share { layers, units: held } = share;
        let tables = if layers.start == 0 { Tree { units: units.len() }.subtrees(held) } else { Vec::new() };
        read_ahead(origin, &requests, |pieces| {
            let bytes = (0, requests.iter().map(|request| origin.bytes(request)).sum());
            let mut loader = Loader { backend, dtype, units: held.len(), origin, pieces, bytes, progress };
            Ok(Self {
                embedding: tables
                    .into_iter()
                    .map(|part| loader.table(units[part.start].vocab.start))
                    .collect::<Result<_>>()?,
                layers: layers.clone().map(|_| loader.layer()).collect::<Result<_>>()?,
                last: match layers.end == config.shape.layers {
                    true => Some(LastWeights { norm: loader.vector()?, head: loader.matrices()? }),
                    false => None,
                },
            })
        })
    }

    /// Bytes that a decode step reads: every matrix.
    pub(crate) fn step_bytes(&self, backend: &B) -> usize {
        let head = self.last.iter().flat_map(|last| &last.head);
        let head: usize = head.map(|matrix| backend.matrix_bytes(matrix)).sum();
        self.layers.iter().map(|layer| layer.bytes(backend)).sum::<usize>() + head
    }

    /// One layer of the first unit, to see what it takes.
    pub(crate) fn sample(
        backend: &B,
        config: &Config,
        origin: &Origin,
        units: &[Unit],
        dtype: DType,
    ) -> Result<Layer<B>> {
        let requests = layer_requests(origin, config, units, 0, 0..1);
        read_ahead(origin, &requests, |pieces| {
            let progress = &mut |_, _| {};
            Loader { backend, dtype, units: 1, origin, pieces, bytes: (0, 0), progress }.layer()
        })
    }
}

impl<B: Backend> Layer<B> {
    /// Bytes of its matrices.
    pub(crate) fn bytes(&self, backend: &B) -> usize {
        let matrices = [&self.qkv, &self.o, &self.gate_up, &self.down].into_iter().flatten();
        matrices.map(|matrix| backend.matrix_bytes(matrix)).sum()
    }
}

/// Makes weights of what was requested, in the order of the requests.
struct Loader<'a, 'q, 'p, B: Backend> {
    backend: &'a B,
    dtype: DType,
    /// How many of this rank.
    units: usize,
    origin: &'a Origin,
    pieces: &'a mut Pieces<'q, 'p>,
    /// That have come, and all.
    bytes: (u64, u64),
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<B: Backend> Loader<'_, '_, '_, B> {
    fn layer(&mut self) -> Result<Layer<B>> {
        Ok(Layer {
            attention_norm: self.vector()?,
            qkv: self.matrices()?,
            o: self.matrices()?,
            ffn_norm: self.vector()?,
            gate_up: self.matrices()?,
            down: self.matrices()?,
        })
    }

    fn table(&mut self, first_id: usize) -> Result<B::Table> {
        let (backend, dtype) = (self.backend, self.dtype);
        self.next(|piece| Ok(backend.table(piece.rows(), first_id, dtype)?))
    }

    fn vector(&mut self) -> Result<B::Buffer> {
        let backend = self.backend;
        self.next(|piece| Ok(backend.vector(piece.rows())?))
    }

    /// One for each unit.
    fn matrices(&mut self) -> Result<Vec<B::Matrix>> {
        let (backend, dtype) = (self.backend, self.dtype);
        let mut matrices = Vec::new();
        while matrices.len() < self.units {
            matrices.extend(self.next(|piece| piece.matrices(backend, dtype))?);
        }
        Ok(matrices)
    }

    /// What `make` makes of the next piece.
    fn next<T>(&mut self, make: impl FnOnce(&Piece<'_>) -> Result<T>) -> Result<T> {
        let (request, piece) = self.pieces.take()?;
        let made = make(&piece)?;
        self.pieces.give_back(piece);
        self.bytes.0 += self.origin.bytes(request);
        (self.progress)(self.bytes.0, self.bytes.1);
        Ok(made)
    }
}
