//! Weights one by one, each known by what it is of: so one share becomes another without touching what both have.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use engine::Unit;
use kernels::{Backend, DType};

use super::Share;
use super::ahead::read_ahead;
use super::origin::Origin;
use super::piece::Piece;
use super::request::{Reading, readings};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::names::Tensor;

/// What a weight is of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    /// Embedding rows of these units, a sub-tree of the reduction tree.
    Table(Range<usize>),
    /// A norm.
    Vector(Tensor),
    /// A unit's slice of this tensor, and of those that are stacked below it.
    Matrix(Tensor, usize),
}

/// A weight on its backend.
pub(crate) enum Weight<B: Backend> {
    Table(B::Table),
    Vector(B::Buffer),
    Matrix(B::Matrix),
}

/// A model, and how it is cut.
#[derive(Clone, Copy)]
pub(crate) struct Cut<'a> {
    pub(crate) config: &'a Config,
    pub(crate) origin: &'a Origin,
    /// All of the model.
    pub(crate) units: &'a [Unit],
}

/// What a share took, in bytes as the checkpoint has them, without scales and zero points of quantised tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Loaded {
    /// That were there.
    pub kept: u64,
    /// That were read.
    pub read: u64,
}

/// Is told after each request how many bytes have come of how many; its error ends the load.
pub(crate) type OnProgress<'p> = dyn FnMut(u64, u64) -> Result<()> + 'p;

/// Weights of one model on one backend.
pub(crate) struct Parts<B: Backend>(pub(crate) HashMap<Part, Weight<B>>);

impl<B: Backend> Default for Parts<B> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<B: Backend> Parts<B> {
    /// Drops what `share` does not have, then reads what it has and is not here. After an error what had come is here, and is not read
    /// again.
    pub(crate) fn become_share(
        &mut self,
        backend: &B,
        cut: Cut<'_>,
        share: &Share,
        dtype: DType,
        progress: &mut OnProgress<'_>,
    ) -> Result<Loaded> {
        let whole = readings(cut, share, &|_| false);
        let wanted: HashSet<&Part> = whole.iter().flat_map(|reading| &reading.parts).collect();
        self.0.retain(|part, _| wanted.contains(part));
        let missing = readings(cut, share, &|part| self.0.contains_key(part));
        let read = cut.origin.bytes_of(&missing);
        self.read(backend, cut, &missing, dtype, progress)?;
        Ok(Loaded { kept: cut.origin.bytes_of(&whole) - read, read })
    }

    /// Makes weights of what is read, in order.
    pub(super) fn read(
        &mut self,
        backend: &B,
        cut: Cut<'_>,
        readings: &[Reading],
        dtype: DType,
        progress: &mut OnProgress<'_>,
    ) -> Result<()> {
        let all = cut.origin.bytes_of(readings);
        let mut come = 0;
        read_ahead(cut.origin, readings, |pieces| {
            for _ in readings {
                let (reading, piece) = pieces.take()?;
                self.make(backend, cut.units, &reading.parts, &piece, dtype)?;
                pieces.give_back(piece);
                come += cut.origin.bytes(&reading.request);
                progress(come, all)?;
            }
            Ok(())
        })
    }

    fn make(
        &mut self,
        backend: &B,
        units: &[Unit],
        parts: &[Part],
        piece: &Piece<'_>,
        dtype: DType,
    ) -> Result<()> {
        let weights = match parts {
            [Part::Table(held)] => {
                vec![Weight::Table(backend.table(piece.rows(), units[held.start].vocab.start, dtype)?)]
            }
            [Part::Vector(_)] => vec![Weight::Vector(backend.vector(piece.rows())?)],
            _ => piece.matrices(backend, dtype)?.into_iter().map(Weight::Matrix).collect(),
        };
        self.0.extend(parts.iter().cloned().zip(weights));
        Ok(())
    }

    pub(super) fn take_table(&mut self, units: &Range<usize>) -> Result<B::Table> {
        match self.take(Part::Table(units.clone()))? {
            Weight::Table(table) => Ok(table),
            _ => Err(not_here(&Part::Table(units.clone()))),
        }
    }

    pub(super) fn take_vector(&mut self, tensor: Tensor) -> Result<B::Buffer> {
        match self.take(Part::Vector(tensor))? {
            Weight::Vector(vector) => Ok(vector),
            _ => Err(not_here(&Part::Vector(tensor))),
        }
    }

    /// Those of `units`.
    pub(super) fn take_matrices(&mut self, tensor: Tensor, units: &Range<usize>) -> Result<Vec<B::Matrix>> {
        let take = |unit| match self.take(Part::Matrix(tensor, unit))? {
            Weight::Matrix(matrix) => Ok(matrix),
            _ => Err(not_here(&Part::Matrix(tensor, unit))),
        };
        units.clone().map(take).collect()
    }

    fn take(&mut self, part: Part) -> Result<Weight<B>> {
        self.0.remove(&part).ok_or_else(|| not_here(&part))
    }
}

fn not_here(part: &Part) -> Error {
    Error::Option(format!("{part:?} was not loaded"))
}
