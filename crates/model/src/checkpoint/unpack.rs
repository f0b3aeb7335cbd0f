//! The packed layouts of quantised projections, and how a slice of one becomes rows of values, scales and zero points.
//!
//! A projection `[n, k]` (n outputs) is stored transposed, k first. Words are little-endian int32 of p = 32 / bits values, the
//! value in place i at bits `i · bits` and up; G = ⌈k / group size⌉.
//!
//! | | `qweight` | `qzeros` | `scales` |
//! |---|---|---|---|
//! | AWQ "gemm" | `[k, n/p]`, packed along n | `[G, n/p]`, packed along n | `[G, n]` |
//! | GPTQ | `[k/p, n]`, packed along k | `[G, n/p]`, packed along n | `[G, n]` |
//!
//! AWQ's place i holds output `[0, 2, 4, 6, 1, 3, 5, 7][i]` of the word's eight
//! (`WQLinear_GEMM.from_linear` in <https://github.com/casper-hansen/AutoAWQ>, awq/modules/linear/gemm.py). GPTQ packs in order, and
//! stores zero points less one, modulo 2^bits (`QuantLinear.pack` in <https://github.com/AutoGPTQ/AutoGPTQ>,
//! auto_gptq/nn_modules/qlinear; its Triton kernel adds the one back as `(zeros + 1) & maxq`); the format "gptq_v2" stores them as
//! they are (`convert_gptq_v1_to_v2_format_module` in <https://github.com/ModelCloud/GPTQModel>, gptqmodel/utils/model.py).
//! Column c is of group `c / group size`: where `g_idx` says otherwise, the checkpoint is refused when it is opened.

use std::borrow::Cow;
use std::ops::Range;

use kernels::QuantizedBlock;

use crate::config::{Layout, Quantization};

/// Where in AWQ's word a value is, by its output within the word's eight.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
/// Columns that are unpacked row after row before the next ones, so that the words stay in cache.
const TILE: usize = 256;

/// A slice of a quantised projection as it is stored: the words and scales that hold `rows` and `cols` of it.
#[derive(Debug)]
pub(crate) struct PackedSlice {
    pub(super) quantization: Quantization,
    /// Outputs.
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    /// Columns of a group of the whole matrix.
    pub(super) group_size: usize,
    /// The rectangle of words that [`words_of_values`] says, row-major.
    pub(super) values: Vec<u32>,
    /// Groups that have a part in `cols`, by words that have one in `rows`.
    pub(super) zeros: Vec<u32>,
    /// The same groups, by `rows`.
    pub(super) scales: Vec<f32>,
}

/// A slice of a quantised projection: what a [`QuantizedBlock`] borrows.
#[derive(Debug, PartialEq)]
pub(crate) struct QuantizedRows<'a> {
    pub(crate) bits: usize,
    pub(crate) group_size: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) values: Cow<'a, [u8]>,
    pub(crate) scales: Cow<'a, [f32]>,
    pub(crate) zeros: Cow<'a, [u8]>,
}

impl QuantizedRows<'_> {
    /// As backends take it.
    pub(crate) fn block(&self) -> QuantizedBlock<'_> {
        let Self { bits, group_size, rows, cols, .. } = *self;
        let (values, scales, zeros) = (&self.values, &self.scales, &self.zeros);
        QuantizedBlock { bits, group_size, rows, cols, values, scales, zeros }
    }
}

/// The rows and columns of words of `qweight` that hold a rectangle of values.
pub(super) fn words_of_values(
    quantization: Quantization,
    rows: &Range<usize>,
    cols: &Range<usize>,
) -> (Range<usize>, Range<usize>) {
    match quantization.layout {
        Layout::Awq => (cols.clone(), words(quantization, rows)),
        Layout::Gptq | Layout::GptqV2 => (words(quantization, cols), rows.clone()),
    }
}

/// The words that hold a run of values.
pub(super) fn words(quantization: Quantization, values: &Range<usize>) -> Range<usize> {
    covering(values, quantization.per_word())
}

/// The runs of `size` that have a part in a range; none where it is empty.
pub(super) fn covering(range: &Range<usize>, size: usize) -> Range<usize> {
    let start = range.start / size;
    start..if range.is_empty() { start } else { range.end.div_ceil(size) }
}

impl PackedSlice {
    /// Columns of a group of the matrix.
    pub(crate) fn group_size(&self) -> usize {
        self.group_size
    }

    /// The slice in groups of `group_size` columns counted from its own first column.
    ///
    /// `group_size` divides the matrix's own group size and the first column, or is the former where the first column is on its
    /// border: so each of these groups lies in one of the matrix's, whose scale and zero point it gets.
    pub(crate) fn unpack(&self, group_size: usize) -> QuantizedRows<'static> {
        let rows = self.rows.len();
        let first_group = self.cols.start / self.group_size.max(1);
        let groups: Vec<usize> = self
            .cols
            .clone()
            .step_by(group_size.max(1))
            .map(|column| column / self.group_size.max(1) - first_group)
            .collect();
        let each = |row: usize| groups.iter().map(move |&group| (row, group));
        QuantizedRows {
            bits: self.quantization.bits,
            group_size,
            rows,
            cols: self.cols.len(),
            values: self.unpack_values().into(),
            scales: (0..rows).flat_map(each).map(|(row, group)| self.scales[group * rows + row]).collect(),
            zeros: (0..rows).flat_map(each).map(|(row, group)| self.zero(row, group)).collect(),
        }
    }

    /// `[rows][cols]`
    fn unpack_values(&self) -> Vec<u8> {
        let (bits, per_word, mask) = (self.quantization.bits, self.quantization.per_word(), self.mask());
        let (_, words) = words_of_values(self.quantization, &self.rows, &self.cols);
        let (width, cols) = (words.len().max(1), self.cols.len());
        let mut values = vec![0; self.rows.len() * cols];
        for first in (0..cols).step_by(TILE) {
            let tile = first..cols.min(first + TILE);
            for (row, out) in self.rows.clone().zip(values.chunks_exact_mut(cols)) {
                let out = &mut out[tile.clone()];
                match self.quantization.layout {
                    // A row's values are in words below each other, each in the same place.
                    Layout::Awq => {
                        let shift = AWQ_PLACES[row % per_word] * bits;
                        let column = self.values[first * width + row / per_word - words.start..].iter();
                        for (out, word) in out.iter_mut().zip(column.step_by(width)) {
                            *out = ((word >> shift) & mask) as u8;
                        }
                    }
                    // Here the words have all their values in the row; those of the first one may begin before the tile.
                    Layout::Gptq | Layout::GptqV2 => {
                        let start = self.cols.start + first;
                        let first_word = start / per_word - self.cols.start / per_word;
                        let column =
                            self.values[first_word * width + row - words.start..].iter().step_by(width);
                        let of_word = |&word: &u32| {
                            (0..per_word).map(move |place| ((word >> (place * bits)) & mask) as u8)
                        };
                        let row = column.flat_map(of_word).skip(start % per_word);
                        out.iter_mut().zip(row).for_each(|(out, value)| *out = value);
                    }
                }
            }
        }
        values
    }

    /// The zero point of one of the slice's rows and groups.
    fn zero(&self, row: usize, group: usize) -> u8 {
        let words = words(self.quantization, &self.rows);
        let per_word = self.quantization.per_word();
        let output = self.rows.start + row;
        let word = self.zeros[group * words.len() + output / per_word - words.start];
        let place = match self.quantization.layout {
            Layout::Awq => AWQ_PLACES[output % per_word],
            Layout::Gptq | Layout::GptqV2 => output % per_word,
        };
        let less = u32::from(self.quantization.layout == Layout::Gptq);
        (((word >> (place * self.quantization.bits)) + less) & self.mask()) as u8
    }

    fn mask(&self) -> u32 {
        u32::MAX >> (u32::BITS as usize - self.quantization.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantization(layout: Layout, bits: usize, group_size: Option<usize>) -> Quantization {
        Quantization { layout, bits, group_size, reordered: false }
    }

    /// A hexadecimal word shows its nibbles from place 7 down to place 0.
    #[test]
    fn awq_words_hold_outputs_in_their_order() {
        let slice = PackedSlice {
            quantization: quantization(Layout::Awq, 4, None),
            rows: 0..8,
            cols: 0..1,
            group_size: 1,
            values: vec![0x7531_6420],
            zeros: vec![0x7531_6420],
            scales: (0..8u8).map(f32::from).collect(),
        };
        let found = slice.unpack(1);
        let expected: Vec<u8> = (0..8).collect();
        assert_eq!((&*found.values, &*found.zeros), (&expected[..], &expected[..]));
        assert_eq!(*found.scales, (0..8u8).map(f32::from).collect::<Vec<_>>());
    }

    #[test]
    fn gptq_words_hold_columns_and_zero_points_less_one() {
        let packed = |layout| PackedSlice {
            quantization: quantization(layout, 4, None),
            rows: 0..8,
            cols: 0..8,
            group_size: 8,
            values: vec![0x7654_3210; 8],
            zeros: vec![0xf654_3210],
            scales: vec![1.0; 8],
        };
        let found = packed(Layout::Gptq).unpack(8);
        assert_eq!(found.values[8..16], [0, 1, 2, 3, 4, 5, 6, 7]);
        // A zero point of 0 is stored as 15.
        assert_eq!(*found.zeros, [1, 2, 3, 4, 5, 6, 7, 0]);
        assert_eq!(*packed(Layout::GptqV2).unpack(8).zeros, [0, 1, 2, 3, 4, 5, 6, 15]);
    }

    #[test]
    fn eight_bits_are_four_to_a_word() {
        let slice = PackedSlice {
            quantization: quantization(Layout::Gptq, 8, None),
            rows: 1..3,
            cols: 2..6,
            group_size: 8,
            values: vec![0x0302_0100, 0x1312_1110, 0x0706_0504, 0x1716_1514],
            zeros: vec![0xff7f_8000],
            scales: vec![1.0, 2.0],
        };
        let found = slice.unpack(2);
        assert_eq!(*found.values, [2, 3, 4, 5, 0x12, 0x13, 0x14, 0x15]);
        assert_eq!(
            (&*found.zeros, &*found.scales),
            (&[0x81, 0x81, 0x80, 0x80][..], &[1.0, 1.0, 2.0, 2.0][..])
        );
    }

    /// Groups of four that begin at column 2 of a slice from there: 2 columns of group 0, then 4 of group 1.
    #[test]
    fn a_cut_group_keeps_its_scale() {
        let slice = PackedSlice {
            quantization: quantization(Layout::GptqV2, 4, Some(4)),
            rows: 0..1,
            cols: 2..8,
            group_size: 4,
            values: vec![0x7654_3210],
            zeros: vec![1, 2],
            scales: vec![0.5, 0.25],
        };
        let found = slice.unpack(2);
        assert_eq!(*found.values, [2, 3, 4, 5, 6, 7]);
        assert_eq!((&*found.scales, &*found.zeros), (&[0.5, 0.25, 0.25][..], &[1, 2, 2][..]));
    }
}
