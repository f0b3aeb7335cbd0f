//! Random weights of a model that there is no checkpoint of: slices of a few random numbers, so that none are made while loading.
//!
//! Matrices are normal with a standard deviation of 1/√hidden, norms ones, quantised values all as likely with zero points in the
//! middle. Slices begin at random places, which depend on the tensor and its first row or column.

use std::borrow::Cow;
use std::ops::Range;

use engine::ModelShape;
use half::bf16;
use kernels::SourceType;

use super::piece::{Block, Piece};
use super::request::Request;
use crate::checkpoint::{QuantizedRows, Random};
use crate::config::{Config, Quantization};
use crate::names::{LayerTensor, Naming, Tensor};

/// Numbers that there are of a kind, unless the largest tensor has fewer: a unit's slice of any matrix of Yi-34B.
const NUMBERS: usize = 1 << 26;
/// Numbers of a scale are fewer by about this.
const SMALLEST_GROUP: usize = 32;

/// What slices are cut from.
#[derive(Debug)]
pub(crate) struct RandomWeights {
    shape: ModelShape,
    quantization: Option<Quantization>,
    /// bf16.
    normal: Vec<u8>,
    /// bf16 of `hidden` ones.
    ones: Vec<u8>,
    values: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl RandomWeights {
    /// For models of this shape.
    pub(crate) fn new(config: &Config) -> Self {
        let shape = config.shape;
        let largest = Tensor::all(shape.layers.min(1), false).map(|t| t.shape(&shape).iter().product()).max();
        let count = largest.unwrap_or(0).min(NUMBERS);
        let deviation = 1.0 / (shape.hidden as f32).sqrt();
        let mut random = Random::new(0, "random weights");
        let mut random_weights = Self {
            shape,
            quantization: config.quantization,
            normal: (0..count)
                .flat_map(|_| bf16::from_f32(deviation * random.normal()).to_le_bytes())
                .collect(),
            ones: bf16::ONE.to_le_bytes().repeat(shape.hidden),
            values: Vec::new(),
            scales: Vec::new(),
            zeros: Vec::new(),
        };
        if let Some(Quantization { bits, .. }) = config.quantization {
            let mask = u8::MAX >> (8 - bits);
            let levels = f32::from(mask) + 1.0;
            // The standard deviation of whole numbers that are all as likely.
            let scale = deviation / ((levels * levels - 1.0) / 12.0).sqrt();
            let groups = count.div_ceil(SMALLEST_GROUP);
            random_weights.values =
                (0..count.div_ceil(4)).flat_map(|_| random.word().to_le_bytes()).map(|v| v & mask).collect();
            random_weights.scales = (0..groups).map(|_| scale * (1.0 + 0.05 * random.normal())).collect();
            random_weights.zeros = vec![1 << (bits - 1); groups];
        }
        random_weights
    }

    /// How a tensor is quantised, if it is.
    pub(crate) fn quantization(&self, tensor: Tensor) -> Option<Quantization> {
        self.quantization.filter(|_| tensor.is_projection())
    }

    /// Rows and columns of a tensor.
    pub(crate) fn shape(&self, tensor: Tensor) -> [usize; 2] {
        tensor.shape(&self.shape)
    }

    /// What a request gets. Where zeros belong behind rows or columns there are other numbers.
    pub(crate) fn piece(&self, request: &Request) -> Piece<'_> {
        let [height, width] = [0, 1].map(|axis| move |tensor: Tensor| self.shape(tensor)[axis]);
        match request {
            Request::Rows { parts, .. } if parts.iter().all(|(tensor, _)| is_norm(*tensor)) => self.norm(),
            Request::Rows { parts, padding } => {
                let cut = |(tensor, rows): &(Tensor, Range<usize>)| Cut {
                    tensor: *tensor,
                    first: rows.start,
                    rows: rows.len() + padding,
                    cols: width(*tensor),
                };
                self.plain(&[parts.iter().map(cut).collect()])
            }
            Request::Columns { tensor, runs } => {
                let (tensor, rows) = (*tensor, height(*tensor));
                let cut = |(run, padding): &(Range<usize>, usize)| {
                    vec![Cut { tensor, first: run.start, rows, cols: run.len() + padding }]
                };
                self.plain(&runs.iter().map(cut).collect::<Vec<_>>())
            }
            Request::QuantizedRows { parts } => {
                let units = parts.first().map_or(0, |(_, runs)| runs.len());
                let rows = |unit: usize| {
                    let of_part = |(tensor, runs): &(Tensor, Vec<Range<usize>>)| {
                        let (tensor, run, cols) = (*tensor, &runs[unit], width(*tensor));
                        let group_size = self.quantization.map_or(cols, |how| how.group_of(cols));
                        self.quantized(&Cut { tensor, first: run.start, rows: run.len(), cols }, group_size)
                    };
                    parts.iter().map(of_part).collect()
                };
                Piece::Quantized((0..units).map(rows).collect())
            }
            Request::QuantizedColumns { tensor, run, group_size } => {
                let (tensor, rows) = (*tensor, height(*tensor));
                let cut = Cut { tensor, first: run.start, rows, cols: run.len() };
                Piece::Quantized(vec![vec![self.quantized(&cut, *group_size)]])
            }
        }
    }

    fn norm(&self) -> Piece<'_> {
        let block = Block { start: 0, dtype: SourceType::Bf16, rows: 1, cols: self.shape.hidden };
        Piece::Plain { bytes: Cow::Borrowed(&self.ones), matrices: vec![vec![block]] }
    }

    /// For each of some matrices its stacked blocks.
    fn plain(&self, matrices: &[Vec<Cut>]) -> Piece<'_> {
        let dtype = SourceType::Bf16;
        let longest = matrices.iter().flatten().map(Cut::elements).max().unwrap_or(0);
        let bytes = stretched(&self.normal, longest * dtype.size());
        let block = |cut: &Cut| {
            let last = bytes.len() / dtype.size() - cut.elements();
            Block { start: cut.place(last) * dtype.size(), dtype, rows: cut.rows, cols: cut.cols }
        };
        let matrices = matrices.iter().map(|cuts| cuts.iter().map(block).collect()).collect();
        Piece::Plain { bytes, matrices }
    }

    fn quantized(&self, cut: &Cut, group_size: usize) -> QuantizedRows<'_> {
        let groups = cut.rows * cut.cols.div_ceil(group_size.max(1));
        QuantizedRows {
            bits: self.quantization.map_or(8, |quantization| quantization.bits),
            group_size,
            rows: cut.rows,
            cols: cut.cols,
            values: cut.of(&self.values, cut.elements()),
            scales: cut.of(&self.scales, groups),
            zeros: cut.of(&self.zeros, groups),
        }
    }
}

/// A slice of a tensor.
struct Cut {
    tensor: Tensor,
    /// Its first row or column, which tells apart the slices of a tensor.
    first: usize,
    rows: usize,
    cols: usize,
}

impl Cut {
    fn elements(&self) -> usize {
        self.rows * self.cols
    }

    /// Where it begins, at most at `last`.
    fn place(&self, last: usize) -> usize {
        Random::new(self.first as u64, &self.tensor.name(Naming::Llama)).word() as usize % (last + 1)
    }

    /// Its share of `numbers`, `len` of them.
    fn of<'a, T: Copy>(&self, numbers: &'a [T], len: usize) -> Cow<'a, [T]> {
        match stretched(numbers, len) {
            Cow::Borrowed(numbers) => {
                let start = self.place(numbers.len() - len);
                Cow::Borrowed(&numbers[start..start + len])
            }
            Cow::Owned(mut numbers) => {
                numbers.truncate(len);
                Cow::Owned(numbers)
            }
        }
    }
}

fn is_norm(tensor: Tensor) -> bool {
    matches!(tensor, Tensor::Norm | Tensor::Layer(_, LayerTensor::AttentionNorm | LayerTensor::FfnNorm))
}

/// At least `len` of `numbers`, which begin anew where there are not so many.
fn stretched<T: Copy>(numbers: &[T], len: usize) -> Cow<'_, [T]> {
    match numbers.len() {
        0 => Cow::Borrowed(numbers),
        count if len <= count => Cow::Borrowed(numbers),
        count => Cow::Owned(numbers.repeat(len.div_ceil(count))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;
    use crate::weights::request::readings;
    use crate::weights::{Cut, Origin, Parts, Share, Weights};
    use kernels::{Cpu, DType};

    fn config(bits: Option<usize>) -> Config {
        Config::preset(Preset::Tiny).with_quantization(bits).unwrap()
    }

    #[test]
    fn every_request_is_served_in_full() {
        for bits in [None, Some(8), Some(4)] {
            let config = config(bits);
            let units = engine::units(&config.shape);
            let origin = Origin::Random(RandomWeights::new(&config));
            for (held, layers) in [(0..2, 0..2), (1..2, 0..2), (0..2, 0..1), (1..2, 1..2)] {
                let mut told = (0, 0);
                let backend = Cpu::new(1).unwrap();
                let mut parts = Parts::default();
                let share = Share { layers: layers.clone(), units: held.clone() };
                let cut = Cut { config: &config, origin: &origin, units: &units };
                let progress = &mut |bytes, all| {
                    told = (bytes, all);
                    Ok(())
                };
                parts.become_share(&backend, cut, &share, DType::Bf16, progress).unwrap();
                let weights = Weights::of(&mut parts, &share, &config.shape).unwrap();
                assert_eq!(weights.layers.len(), layers.len());
                assert!(weights.layers.iter().all(|layer| layer.gate_up.len() == held.len()));
                let (first, last) = (layers.start == 0, layers.end == 2);
                assert_eq!(!weights.embedding.is_empty(), first);
                assert_eq!(weights.last.as_ref().map(|last| last.head.len()), last.then_some(held.len()));
                // Of a projection with scales and zero points these are not counted.
                assert!(told.0 == told.1 && told.0 > 0);
                // A unit has four query heads and a KV head of 32, 256 columns of the FFN and 256 words.
                let projections = layers.len() * ((4 + 2) * 32 * 128 + 128 * 128 + 3 * 256 * 128);
                let words = (usize::from(first) + usize::from(last)) * 256 * 128;
                let norms = (2 * layers.len() + usize::from(last)) * 128 * 2;
                let bytes = held.len() * (projections * bits.unwrap_or(16) / 8 + words * 2) + norms;
                assert_eq!(told.1, bytes as u64);
            }
        }
    }

    #[test]
    fn numbers_have_their_scale_and_slices_differ() {
        let config = config(Some(4));
        let random = RandomWeights::new(&config);
        let origin = Origin::Random(RandomWeights::new(&config));
        let cut = Cut { config: &config, origin: &origin, units: &engine::units(&config.shape) };
        let list = readings(cut, &Share { layers: 0..2, units: 0..2 }, &|_| false);
        let deviation = |numbers: &[f32]| {
            (numbers.iter().map(|x| x * x).sum::<f32>() / numbers.len() as f32).sqrt() * 128f32.sqrt()
        };
        let quantized: Vec<Vec<f32>> = list
            .iter()
            .filter_map(|reading| match random.piece(&reading.request) {
                Piece::Quantized(matrices) => Some(matrices),
                Piece::Plain { .. } => None,
            })
            .flatten()
            .flatten()
            .map(|rows| {
                let bytes = rows.block().dequantize(DType::F32).unwrap();
                bytes.as_chunks().0.iter().map(|&four| f32::from_le_bytes(four)).collect()
            })
            .collect();
        // In each of two layers, of two units: q, k, v, o, gate, up, down.
        assert_eq!(quantized.len(), 28);
        assert!(quantized.iter().all(|numbers| (deviation(numbers) - 1.0).abs() < 0.1));
        assert_ne!(quantized[0], quantized[14]);
        let normal: Vec<f32> =
            random.normal.as_chunks().0.iter().map(|&two| bf16::from_le_bytes(two).to_f32()).collect();
        assert!((deviation(&normal) - 1.0).abs() < 0.02);
    }
}
