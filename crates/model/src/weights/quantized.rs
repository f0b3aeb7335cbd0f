//! Loading the quantised projections of a rank's units, which stay quantised where the backend has kernels for it.
//!
//! A tensor is read once for all units of the rank and stays packed; one unit after the other is unpacked and handed over.
//! Config and shard plan leave no unit without FFN columns or with an odd number of them, so nothing is padded.

use std::ops::Range;
use std::slice;

use engine::Unit;
use kernels::Backend;

use super::{Loader, Part};
use crate::checkpoint::{PackedSlice, QuantizedRows};
use crate::config::Quantization;
use crate::error::Result;
use crate::names::Tensor;

impl<B: Backend> Loader<'_, B> {
    /// For each unit a matrix of runs of rows of several tensors.
    pub(super) fn stacked_quantized(&self, parts: &[Part<'_>]) -> Result<Vec<B::Matrix>> {
        let slices = parts
            .iter()
            .map(|(tensor, run)| {
                let runs: Vec<_> = self.units.iter().map(run).collect();
                let [_, cols] = self.checkpoint.shape(*tensor);
                Ok(self.checkpoint.read_quantized(*tensor, &runs, 0..cols)?)
            })
            .collect::<Result<Vec<_>>>()?;
        (0..self.units.len())
            .map(|unit| {
                let whole = |slices: &Vec<PackedSlice>| slices[unit].unpack(slices[unit].group_size());
                self.quantized_matrix(slices.iter().map(whole).collect())
            })
            .collect()
    }

    /// For each unit a matrix of a run of a tensor's columns.
    ///
    /// Where the border of a unit cuts a group, all units get smaller groups that are not cut: each has the scale and the zero point
    /// of the group that it is a part of. The size is the same for every unit of the model, so that bits do not depend on the width.
    pub(super) fn quantized_columns(
        &self,
        tensor: Tensor,
        quantization: Quantization,
        run: impl Fn(&Unit) -> Range<usize>,
    ) -> Result<Vec<B::Matrix>> {
        let [rows, cols] = self.checkpoint.shape(tensor);
        let borders = self.all_units.iter().map(|unit| run(unit).start);
        let group_size = borders.fold(quantization.group_of(cols), greatest_common_divisor);
        self.units
            .iter()
            .map(|unit| {
                let slices =
                    self.checkpoint.read_quantized(tensor, slice::from_ref(&(0..rows)), run(unit))?;
                self.quantized_matrix(slices.iter().map(|slice| slice.unpack(group_size)).collect())
            })
            .collect()
    }

    fn quantized_matrix(&self, rows: Vec<QuantizedRows>) -> Result<B::Matrix> {
        let blocks: Vec<_> = rows.iter().map(QuantizedRows::block).collect();
        Ok(self.backend.quantized_matrix(&blocks, self.dtype)?)
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
