//! What is read for a rank's weights, in the order in which they are made of it.

use std::ops::Range;

use engine::Unit;

use super::parts::{Cut, Part};
use super::{Share, ffn_width};
use crate::names::{LayerTensor, Tensor};

/// What is read at a time: enough for one matrix or more.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Request {
    /// A matrix: rows of several tensors, stacked, with `padding` rows of zeros behind each.
    Rows { parts: Vec<(Tensor, Range<usize>)>, padding: usize },
    /// For each run of a tensor's columns a matrix, with so many columns of zeros behind it.
    Columns { tensor: Tensor, runs: Vec<(Range<usize>, usize)> },
    /// For each unit a matrix: rows of several quantised tensors, stacked. Of each tensor every unit's rows.
    QuantizedRows { parts: Vec<(Tensor, Vec<Range<usize>>)> },
    /// A matrix: a run of a quantised tensor's columns, in groups of `group_size` columns.
    QuantizedColumns { tensor: Tensor, run: Range<usize>, group_size: usize },
}

impl Request {
    /// The tensors that it reads of, with how many rows and columns of each.
    pub(crate) fn slices(&self, shape: impl Fn(Tensor) -> [usize; 2]) -> Vec<(Tensor, usize, usize)> {
        let width = |tensor| shape(tensor)[1];
        let height = |tensor| shape(tensor)[0];
        match self {
            Self::Rows { parts, .. } => parts.iter().map(|(t, rows)| (*t, rows.len(), width(*t))).collect(),
            Self::Columns { tensor, runs } => {
                vec![(*tensor, height(*tensor), runs.iter().map(|(run, _)| run.len()).sum())]
            }
            Self::QuantizedRows { parts } => {
                parts.iter().map(|(t, runs)| (*t, runs.iter().map(Range::len).sum(), width(*t))).collect()
            }
            Self::QuantizedColumns { tensor, run, .. } => vec![(*tensor, height(*tensor), run.len())],
        }
    }
}

/// A request, and the weights that are made of it, in order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reading {
    pub(crate) request: Request,
    pub(crate) parts: Vec<Part>,
}

/// What is read for a share: in the first stage embedding tables, then layer after layer its norm, qkv, o, norm, gate and up, down; then,
/// in the last stage, the final norm and the head. Whatever it `has` is left out.
pub(crate) fn readings(cut: Cut<'_>, share: &Share, has: &dyn Fn(&Part) -> bool) -> Vec<Reading> {
    let units = &cut.units[share.units.clone()];
    let mut list = List { cut, units, has, readings: Vec::new() };
    for part in share.tables(cut.units.len()) {
        let rows = cut.units[part.start].vocab.start..cut.units[part.end - 1].vocab.end;
        list.rows(Part::Table(part), vec![(Tensor::Embedding, rows)], 0);
    }
    for index in share.layers.clone() {
        list.layer(index);
    }
    if share.layers.end == cut.config.shape.layers {
        list.vector(Tensor::Norm);
        for unit in list.units {
            list.rows(Part::Matrix(Tensor::Head, unit.index), vec![(Tensor::Head, unit.vocab.clone())], 0);
        }
    }
    list.readings
}

/// Of [`readings`] those of one layer.
pub(crate) fn layer_readings(cut: Cut<'_>, layer: usize, units: Range<usize>) -> Vec<Reading> {
    let mut list = List { cut, units: &cut.units[units], has: &|_| false, readings: Vec::new() };
    list.layer(layer);
    list.readings
}

/// A tensor and the run of its rows that a unit holds.
type Tall<'a> = (Tensor, &'a dyn Fn(&Unit) -> Range<usize>);

struct List<'a> {
    cut: Cut<'a>,
    /// Of this rank.
    units: &'a [Unit],
    has: &'a dyn Fn(&Part) -> bool,
    readings: Vec<Reading>,
}

impl<'a> List<'a> {
    fn layer(&mut self, index: usize) {
        let tensor = |part| Tensor::Layer(index, part);
        let d = self.cut.config.shape.head_dim;
        let columns = |heads: &Range<usize>| heads.start * d..heads.end * d;
        let queries = |unit: &Unit| columns(&unit.heads);
        let kv = |unit: &Unit| columns(&(unit.index..unit.index + 1));
        let ffn = |unit: &Unit| unit.ffn.clone();
        let padding = |unit: &Unit| ffn_width(unit) - unit.ffn.len();
        self.vector(tensor(LayerTensor::AttentionNorm));
        let parts: [Tall<'_>; 3] = [
            (tensor(LayerTensor::Q), &queries),
            (tensor(LayerTensor::K), &kv),
            (tensor(LayerTensor::V), &kv),
        ];
        self.stacked(&parts, |_| 0);
        self.columns(tensor(LayerTensor::O), queries, |_| 0);
        self.vector(tensor(LayerTensor::FfnNorm));
        let parts: [Tall<'_>; 2] = [(tensor(LayerTensor::Gate), &ffn), (tensor(LayerTensor::Up), &ffn)];
        self.stacked(&parts, padding);
        self.columns(tensor(LayerTensor::Down), ffn, padding);
    }

    fn vector(&mut self, tensor: Tensor) {
        self.rows(Part::Vector(tensor), vec![(tensor, 0..1)], 0);
    }

    fn rows(&mut self, part: Part, parts: Vec<(Tensor, Range<usize>)>, padding: usize) {
        if !(self.has)(&part) {
            self.readings.push(Reading { request: Request::Rows { parts, padding }, parts: vec![part] });
        }
    }

    /// The units whose slices of a tensor are not there.
    fn lacking(&self, tensor: Tensor) -> Vec<&'a Unit> {
        self.units.iter().filter(|unit| !(self.has)(&Part::Matrix(tensor, unit.index))).collect()
    }

    /// For each unit a matrix of runs of rows of several tensors, with `padding` rows of zeros behind each. Quantised tensors, which
    /// are not stored row by row, are read once for all units; config and shard plan leave no unit of theirs to be padded.
    fn stacked(&mut self, parts: &[Tall<'_>], padding: impl Fn(&Unit) -> usize) {
        let Some(&(first, _)) = parts.first() else { return };
        if parts.iter().any(|(tensor, _)| self.cut.origin.quantization(*tensor).is_some()) {
            let units = self.lacking(first);
            let of_units = |(tensor, run): &Tall<'_>| (*tensor, units.iter().map(|unit| run(unit)).collect());
            let request = Request::QuantizedRows { parts: parts.iter().map(of_units).collect() };
            return self.read(request, first, &units);
        }
        for unit in self.units {
            let slices = parts.iter().map(|(tensor, run)| (*tensor, run(unit))).collect();
            self.rows(Part::Matrix(first, unit.index), slices, padding(unit));
        }
    }

    /// A request that gives these units' slices of a tensor, unless there are none.
    fn read(&mut self, request: Request, tensor: Tensor, units: &[&Unit]) {
        if !units.is_empty() {
            let parts = units.iter().map(|unit| Part::Matrix(tensor, unit.index)).collect();
            self.readings.push(Reading { request, parts });
        }
    }

    /// For each unit a matrix of a run of a tensor's columns, with `padding` columns of zeros behind it.
    ///
    /// Where the border of a unit cuts a group of a quantised tensor, all units get smaller groups that are not cut: each has the
    /// scale and the zero point of the group that it is a part of. The size is the same for every unit of the model, so that bits do
    /// not depend on the width.
    fn columns(
        &mut self,
        tensor: Tensor,
        run: impl Fn(&Unit) -> Range<usize>,
        padding: impl Fn(&Unit) -> usize,
    ) {
        let units = self.lacking(tensor);
        let Some(quantization) = self.cut.origin.quantization(tensor) else {
            let runs = units.iter().map(|unit| (run(unit), padding(unit))).collect();
            return self.read(Request::Columns { tensor, runs }, tensor, &units);
        };
        let [_, cols] = tensor.shape(&self.cut.config.shape);
        let borders = self.cut.units.iter().map(|unit| run(unit).start);
        let group_size = borders.fold(quantization.group_of(cols), greatest_common_divisor);
        for unit in units {
            self.read(Request::QuantizedColumns { tensor, run: run(unit), group_size }, tensor, &[unit]);
        }
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greatest_common_divisor_is_that() {
        assert_eq!(
            [(128, 0), (128, 896), (64, 112), (32, 7)].map(|(a, b)| greatest_common_divisor(a, b)),
            [128, 128, 16, 1]
        );
    }
}
