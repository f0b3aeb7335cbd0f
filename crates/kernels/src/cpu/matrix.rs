//! Weights, packed once into panels of 32 outputs.

use half::bf16;

use super::buffer::source_f32;
use super::memory::{Memory, Shared};
use super::pool::Pool;
use super::tile::{PANEL, SPAN};
use crate::{DType, Error, Result, RowBlock, SourceType};

/// A weight `[n, k]` as `⌈n/32⌉` panels (see `tile`); outputs past `n` have zero weights.
#[derive(Debug)]
pub struct Matrix {
    memory: Memory,
    dtype: DType,
    n: usize,
    k: usize,
}

impl Matrix {
    /// Packs blocks that were checked to have equal, even widths and all of their bytes.
    pub(crate) fn pack(
        pool: &Pool,
        blocks: &[RowBlock<'_>],
        n: usize,
        k: usize,
        dtype: DType,
    ) -> Result<Self> {
        // Widened bf16 is the same number, and half the bytes to read.
        let all_bf16 = blocks.iter().all(|block| block.dtype == SourceType::Bf16);
        let dtype = if all_bf16 { DType::Bf16 } else { dtype };
        let bytes = packed_elements(n, k)
            .and_then(|elements| elements.checked_mul(dtype.size()))
            .ok_or(Error::OutOfMemory { what: "a weight", bytes: usize::MAX })?;
        let mut memory = Memory::zeroed(bytes, "a weight")?;
        match dtype {
            DType::F32 => {
                let out = memory.shared();
                pool.for_each(n.div_ceil(PANEL), |_, panel| pack_panel::<f32>(blocks, panel, k, out));
            }
            DType::Bf16 if all_bf16 => {
                let out = memory.shared();
                pool.for_each(n.div_ceil(PANEL), |_, panel| pack_pairs(blocks, panel, k / 2, out));
            }
            DType::Bf16 => {
                let out = memory.shared();
                pool.for_each(n.div_ceil(PANEL), |_, panel| pack_panel::<bf16>(blocks, panel, k, out));
            }
        }
        Ok(Matrix { memory, dtype, n, k })
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes of all panels.
    pub(crate) fn bytes(&self) -> usize {
        self.panels() * PANEL * self.k * self.dtype.size()
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// The first panel.
    pub(crate) fn data(&self) -> *const u8 {
        self.memory.as_ptr()
    }
}

fn packed_elements(n: usize, k: usize) -> Option<usize> {
    n.checked_next_multiple_of(PANEL)?.checked_mul(k)
}

/// An element type of panels.
trait Packed: super::vector::Number {
    /// The place in its panel of column `column` at `k`.
    fn place(k: usize, column: usize) -> usize;
    fn from_source(block: &RowBlock<'_>, index: usize) -> Self;
}

impl Packed for f32 {
    fn place(k: usize, column: usize) -> usize {
        k * PANEL + column
    }

    fn from_source(block: &RowBlock<'_>, index: usize) -> f32 {
        source_f32(block, index)
    }
}

impl Packed for bf16 {
    fn place(k: usize, column: usize) -> usize {
        k / 2 * (2 * PANEL) + column * 2 + k % 2
    }

    fn from_source(block: &RowBlock<'_>, index: usize) -> bf16 {
        match block.dtype {
            SourceType::Bf16 => bf16::from_le_bytes([block.bytes[2 * index], block.bytes[2 * index + 1]]),
            SourceType::F32 | SourceType::F16 => bf16::from_f32(source_f32(block, index)),
        }
    }
}

/// Writes one panel, a span of k after the other so that the writes stay in L1.
fn pack_panel<T: Packed>(blocks: &[RowBlock<'_>], panel: usize, k: usize, out: Shared<T>) {
    for start in (0..k).step_by(SPAN) {
        let mut first_row = 0;
        for block in blocks {
            let rows = panel * PANEL..(panel + 1) * PANEL;
            for row in rows.start.max(first_row)..rows.end.min(first_row + block.rows) {
                let source = (row - first_row) * k;
                for i in start..k.min(start + SPAN) {
                    let place = panel * PANEL * k + T::place(i, row % PANEL);
                    // SAFETY: inside panel `panel`, which is this task's.
                    unsafe { *out.at(place) = T::from_source(block, source + i) };
                }
            }
            first_row += block.rows;
        }
    }
}

/// The same for bf16 that stays bf16, of which two lie side by side in rows and in panels: `pairs` of a row are moved as words.
fn pack_pairs(blocks: &[RowBlock<'_>], panel: usize, pairs: usize, out: Shared<u32>) {
    for start in (0..pairs).step_by(SPAN / 2) {
        let end = pairs.min(start + SPAN / 2);
        let mut first_row = 0;
        for block in blocks {
            let rows = panel * PANEL..(panel + 1) * PANEL;
            for row in rows.start.max(first_row)..rows.end.min(first_row + block.rows) {
                let source = (row - first_row) * pairs;
                let (words, _) = block.bytes.as_chunks();
                for (pair, &word) in (start..end).zip(&words[source + start..source + end]) {
                    let place = (panel * pairs + pair) * PANEL + row % PANEL;
                    // SAFETY: inside panel `panel`, which is this task's.
                    unsafe { *out.at(place) = u32::from_ne_bytes(word) };
                }
            }
            first_row += block.rows;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of f32 numbers that bf16 holds, the panels are those of the same numbers in bf16.
    #[test]
    fn pairs_are_packed_as_single_numbers_are() {
        let pool = Pool::new(2).unwrap();
        for (rows, k) in [([1, 0], 2), ([40, 25], SPAN + 6), ([31, 33], 2 * SPAN)] {
            let numbers: Vec<f32> = (0..(rows[0] + rows[1]) * k).map(|i| (i % 251) as f32 - 125.0).collect();
            let single: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            let half: Vec<u8> = numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
            let packed = |bytes: &[u8], dtype: SourceType| {
                let (a, b) = bytes.split_at(rows[0] * k * dtype.size());
                let block = |bytes, rows| RowBlock { bytes, dtype, rows, cols: k };
                let blocks = [block(a, rows[0]), block(b, rows[1])];
                let matrix = Matrix::pack(&pool, &blocks, rows[0] + rows[1], k, DType::Bf16).unwrap();
                matrix.memory.as_slice::<bf16>().to_vec()
            };
            assert!(packed(&half, SourceType::Bf16) == packed(&single, SourceType::F32), "{rows:?} {k}");
        }
    }
}
