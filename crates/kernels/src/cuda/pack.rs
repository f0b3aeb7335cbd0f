//! Weights on their way to the GPU: copied as the checkpoint has them, then brought into the kernels' order there (see pack.cu).
//!
//! The host neither converts nor waits: while the device copies and packs one matrix, the next is read from the disk.

use std::borrow::Cow;
use std::cell::RefCell;

use super::arena::{Arena, Region};
use super::device::{Arguments, Launch};
use super::matrix::{Format, Matrix, append_bf16, padded_rows};
use super::memory::Scratch;
use crate::{Error, QuantizedBlock, Result, RowBlock, SourceType};

const THREADS: usize = 256;
/// Rows of a block of `pack_fp8`.
const FP8_ROWS: usize = 16;
/// Columns that share a scale and a zero point in the kernels' formats.
const GROUP: usize = 128;

/// Puts weights into an arena.
pub(crate) struct Packer<'a> {
    pub(crate) arena: &'a Arena,
    /// Where they lie as the checkpoint has them.
    pub(crate) staging: &'a RefCell<Scratch>,
}

/// Whether there are kernels for weights in groups of so many columns. The matrix's own width does not matter, so all units of a
/// tensor are treated alike.
pub(crate) fn keeps_quantized(group_size: usize) -> bool {
    group_size > 0 && group_size.is_multiple_of(GROUP)
}

impl Packer<'_> {
    /// Blocks of the same k stacked to `[n, k]`, in bf16.
    pub(crate) fn bf16(&self, blocks: &[RowBlock<'_>], n: usize, k: usize) -> Result<Matrix> {
        let rows = self.stage_bf16(blocks, n, k)?;
        let weights = self.pack("pack_bf16", Format::Bf16, rows, n, k)?;
        let bytes = Format::Bf16.value_bytes(n, k);
        Ok(Matrix { format: Format::Bf16, n, k, weights, scales: None, zeros: None, bytes })
    }

    /// Likewise, rounded to bf16 and from there to E4M3.
    pub(crate) fn fp8(&self, blocks: &[RowBlock<'_>], n: usize, k: usize) -> Result<Matrix> {
        let rows = self.stage_bf16(blocks, n, k)?;
        let value_bytes = Format::Fp8.value_bytes(n, k);
        let scale_bytes = n * size_of::<f32>();
        let weights = self.arena.region(value_bytes)?;
        let scales = self.arena.region(scale_bytes)?;
        let launch =
            Launch { grid: (n.div_ceil(FP8_ROWS) as u32, 1), threads: THREADS as u32, shared_bytes: 0 };
        let arguments = Arguments::default()
            .with(rows)
            .with(n as i32)
            .with(k as i32)
            .with(weights.pointer())
            .with(scales.pointer());
        // SAFETY: the regions are as large as the packed matrix and its scales, the staged rows are n · k; see pack.cu.
        unsafe { self.arena.device().launch("pack_fp8", launch, arguments) }?;
        let bytes = value_bytes + scale_bytes;
        Ok(Matrix { format: Format::Fp8, n, k, weights, scales: Some(scales), zeros: None, bytes })
    }

    /// Quantised blocks of the same k, bits and group size, which there are kernels for.
    pub(crate) fn quantized(&self, blocks: &[QuantizedBlock<'_>], n: usize, k: usize) -> Result<Matrix> {
        check(n, k)?;
        let (format, kernel) = match blocks.first() {
            Some(block) if block.bits == 4 => (Format::Int4, "pack_int4"),
            _ => (Format::Int8, "pack_int8"),
        };
        let group_size = blocks.first().map_or(GROUP, |block| block.group_size);
        let values = self.stage(n * k, blocks.iter().map(|block| Cow::Borrowed(block.values)))?;
        let weights = self.pack(kernel, format, values, n, k)?;
        let of_rows = |block: &QuantizedBlock<'_>| block.groups().max(1);
        let scales = tiled(blocks.iter().flat_map(|b| b.scales.chunks(of_rows(b))), n, k, group_size);
        let zeros = tiled(blocks.iter().flat_map(|b| b.zeros.chunks(of_rows(b))), n, k, group_size);
        let scales: &[u8] = bytemuck::cast_slice(&scales);
        let bytes = format.value_bytes(n, k) + scales.len() + zeros.len();
        let scales = Some(self.arena.upload(scales)?);
        let zeros = Some(self.arena.upload(&zeros)?);
        Ok(Matrix { format, n, k, weights, scales, zeros, bytes })
    }

    /// Packs the staged values, 16 bytes a thread.
    fn pack(&self, kernel: &'static str, format: Format, staged: u64, n: usize, k: usize) -> Result<Region> {
        let bytes = format.value_bytes(n, k);
        let weights = self.arena.region(bytes)?;
        let blocks = bytes.div_ceil(16 * THREADS);
        let launch = Launch { grid: (blocks as u32, 1), threads: THREADS as u32, shared_bytes: 0 };
        let arguments =
            Arguments::default().with(staged).with(n as i32).with(k as i32).with(weights.pointer());
        // SAFETY: the region is as large as the packed matrix, the staged values are n · k; see pack.cu.
        unsafe { self.arena.device().launch(kernel, launch, arguments) }?;
        Ok(weights)
    }

    fn stage_bf16(&self, blocks: &[RowBlock<'_>], n: usize, k: usize) -> Result<u64> {
        check(n, k)?;
        let rows = blocks.iter().map(|block| match block.dtype {
            SourceType::Bf16 => Cow::Borrowed(block.bytes),
            other => {
                let mut rows = Vec::with_capacity(block.rows * block.cols * 2);
                append_bf16(block.bytes, other, &mut rows);
                Cow::Owned(rows)
            }
        });
        self.stage(n * k * 2, rows)
    }

    /// Begins to copy `parts`, `bytes` in all, one behind the other. Whoever used the staging memory before is on the same stream.
    fn stage<'b>(&self, bytes: usize, parts: impl Iterator<Item = Cow<'b, [u8]>>) -> Result<u64> {
        let staged = self.staging.borrow_mut().reserve(bytes)?;
        let mut target = staged;
        for part in parts {
            self.arena.copy(target, &part)?;
            target += part.len() as u64;
        }
        Ok(staged)
    }
}

fn check(n: usize, k: usize) -> Result<()> {
    if k.is_multiple_of(8) {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "a weight of [{n}, {k}] does not suit the GPU's kernels: k must be a multiple of 8"
    )))
}

/// What each row has for each of its groups in the order of the kernels' scales and zeros, which repeat those of larger groups.
fn tiled<'a, T: Copy + Default + 'a>(
    rows: impl Iterator<Item = &'a [T]>,
    n: usize,
    k: usize,
    group_size: usize,
) -> Vec<T> {
    let groups = k.div_ceil(GROUP);
    let mut out = vec![T::default(); padded_rows(n) * groups];
    for (row, values) in rows.enumerate() {
        for group in 0..groups {
            let place = (row / 16 * groups + group) * 16 + row % 8 * 2 + row % 16 / 8;
            out[place] = values[group * GROUP / group_size];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_put_where_kernels_look() {
        let rows: Vec<[u8; 2]> = (0..18).map(|row| [row, row + 100]).collect();
        let out = tiled(rows.iter().map(|row| &row[..]), 18, 300, 256);
        assert_eq!(out.len(), 2 * 3 * 16);
        let at = |row: usize, group: usize| out[(row / 16 * 3 + group) * 16 + row % 8 * 2 + row % 16 / 8];
        assert_eq!([at(0, 0), at(0, 1), at(0, 2)], [0, 0, 100]);
        assert_eq!([at(9, 0), at(9, 1), at(9, 2)], [9, 9, 109]);
        assert_eq!([at(17, 0), at(17, 2), at(18, 0)], [17, 117, 0]);
        assert_eq!(out[..4], [0, 8, 1, 9]);
    }

    #[test]
    fn groups_that_kernels_take() {
        assert_eq!(
            [0, 32, 64, 128, 192, 256, 7168].map(keeps_quantized),
            [false, false, false, true, false, true, true]
        );
    }
}
