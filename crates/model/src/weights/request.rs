//! What is read for a rank's weights, in the order in which matrices are made of it.

use std::ops::Range;

use engine::Unit;
use kernels::Tree;

use super::origin::Origin;
use super::{Share, ffn_width};
use crate::config::Config;
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

/// The requests of a rank: in the first stage embedding tables, then layer after layer its norm, qkv, o, norm, gate and up, down; then,
/// in the last stage, the final norm and the head.
pub(crate) fn requests(origin: &Origin, config: &Config, units: &[Unit], share: &Share) -> Vec<Request> {
    let Share { layers, units: held } = share;
    let mut list =
        List { origin, config, all_units: units, units: &units[held.clone()], requests: Vec::new() };
    if layers.start == 0 {
        for part in (Tree { units: units.len() }).subtrees(held) {
            let rows = units[part.start].vocab.start..units[part.end - 1].vocab.end;
            list.rows(vec![(Tensor::Embedding, rows)], 0);
        }
    }
    for index in layers.clone() {
        list.layer(index);
    }
    if layers.end == config.shape.layers {
        list.vector(Tensor::Norm);
        for unit in list.units {
            list.rows(vec![(Tensor::Head, unit.vocab.clone())], 0);
        }
    }
    list.requests
}

/// Of [`requests`] those of one layer.
pub(crate) fn layer_requests(
    origin: &Origin,
    config: &Config,
    units: &[Unit],
    layer: usize,
    held: Range<usize>,
) -> Vec<Request> {
    let mut list = List { origin, config, all_units: units, units: &units[held], requests: Vec::new() };
    list.layer(layer);
    list.requests
}

/// A tensor and the run of its rows that a unit holds.
type Part<'a> = (Tensor, &'a dyn Fn(&Unit) -> Range<usize>);

struct List<'a> {
    origin: &'a Origin,
    config: &'a Config,
    /// Of the model.
    all_units: &'a [Unit],
    /// Of this rank.
    units: &'a [Unit],
    requests: Vec<Request>,
}

impl List<'_> {
    fn layer(&mut self, index: usize) {
        let tensor = |part| Tensor::Layer(index, part);
        let d = self.config.shape.head_dim;
        let columns = |heads: &Range<usize>| heads.start * d..heads.end * d;
        let queries = |unit: &Unit| columns(&unit.heads);
        let kv = |unit: &Unit| columns(&(unit.index..unit.index + 1));
        let ffn = |unit: &Unit| unit.ffn.clone();
        let padding = |unit: &Unit| ffn_width(unit) - unit.ffn.len();
        self.vector(tensor(LayerTensor::AttentionNorm));
        let parts: [Part<'_>; 3] = [
            (tensor(LayerTensor::Q), &queries),
            (tensor(LayerTensor::K), &kv),
            (tensor(LayerTensor::V), &kv),
        ];
        self.stacked(&parts, |_| 0);
        self.columns(tensor(LayerTensor::O), queries, |_| 0);
        self.vector(tensor(LayerTensor::FfnNorm));
        let parts: [Part<'_>; 2] = [(tensor(LayerTensor::Gate), &ffn), (tensor(LayerTensor::Up), &ffn)];
        self.stacked(&parts, padding);
        self.columns(tensor(LayerTensor::Down), ffn, padding);
    }

    fn vector(&mut self, tensor: Tensor) {
        self.rows(vec![(tensor, 0..1)], 0);
    }

    fn rows(&mut self, parts: Vec<(Tensor, Range<usize>)>, padding: usize) {
        self.requests.push(Request::Rows { parts, padding });
    }

    /// For each unit a matrix of runs of rows of several tensors, with `padding` rows of zeros behind each. Quantised tensors, which
    /// are not stored row by row, are read once for all units; config and shard plan leave no unit of theirs to be padded.
    fn stacked(&mut self, parts: &[Part<'_>], padding: impl Fn(&Unit) -> usize) {
        if parts.iter().any(|(tensor, _)| self.origin.quantization(*tensor).is_some()) {
            let of_units = |(tensor, run): &Part<'_>| (*tensor, self.units.iter().map(run).collect());
            let parts = parts.iter().map(of_units).collect();
            return self.requests.push(Request::QuantizedRows { parts });
        }
        for unit in self.units {
            self.rows(parts.iter().map(|(tensor, run)| (*tensor, run(unit))).collect(), padding(unit));
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
        let Some(quantization) = self.origin.quantization(tensor) else {
            let runs = self.units.iter().map(|unit| (run(unit), padding(unit))).collect();
            return self.requests.push(Request::Columns { tensor, runs });
        };
        let [_, cols] = tensor.shape(&self.config.shape);
        let borders = self.all_units.iter().map(|unit| run(unit).start);
        let group_size = borders.fold(quantization.group_of(cols), greatest_common_divisor);
        let of_unit = |unit| Request::QuantizedColumns { tensor, run: run(unit), group_size };
        self.requests.extend(self.units.iter().map(of_unit));
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
