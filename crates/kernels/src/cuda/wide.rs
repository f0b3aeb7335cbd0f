//! Products of many rows of x: weights are unpacked to rows of bf16 (see unpack.cu), which cuBLASLt multiplies.
//!
//! No promise on bits is kept here: the library sums in an order of its own, which may change with the number of rows, and quantised
//! weights are rounded to bf16 after their scales, where our own kernels scale sums. So `--deterministic` does without.

use std::ops::Range;
use std::rc::Rc;

use super::blas::{Blas, Size};
use super::device::{Arguments, Device, Launch};
use super::linear::panel;
use super::matrix::Matrix;
use super::memory::Scratch;
use crate::{DType, Result};

/// From so many rows on a product is wide. By estimate: unpacking moves 4 bytes of memory for each weight, 1.3 ps on an H100, and the
/// library, which has matrix instructions that our kernels do not use, saves about 2 fs for each weight and row.
pub(crate) const WIDE_ROWS: usize = 512;
/// Weight rows at a time are a multiple of this, so that the library's tiles are full and results aligned.
const GRAIN: usize = 128;
const THREADS: usize = 256;
const TILE_ROWS: usize = 16;
const LINE_BYTES: usize = 1024;

/// What wide products are done with.
pub(crate) struct Wide {
    blas: Blas,
    /// No recorded step has its address: such a step has fewer rows.
    unpacked: Scratch,
    /// Bytes of weights at a time, unless so many do not hold [`GRAIN`] rows.
    room: usize,
}

/// Activations and results: addresses, and elements from one row to the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operands {
    pub(crate) rows: usize,
    pub(crate) x: u64,
    pub(crate) x_cols: usize,
    pub(crate) out: u64,
    pub(crate) out_cols: usize,
}

impl Wide {
    /// To unpack `room` bytes of weights at a time.
    ///
    /// # Errors
    /// Those of [`Blas::open`].
    pub(crate) fn open(device: &Rc<Device>, room: usize) -> Result<Self> {
        Ok(Self { blas: Blas::open(device)?, unpacked: Scratch::new(device), room })
    }

    /// Takes the memory that products need, so that it cannot be missing later.
    pub(crate) fn reserve(&mut self) -> Result<()> {
        self.unpacked.reserve(self.room).map(drop)
    }

    /// Bytes that [`Self::reserve`] would take.
    pub(crate) fn missing_bytes(&self) -> usize {
        self.room.saturating_sub(self.unpacked.bytes())
    }

    /// `out[rows, Σn] = x[rows, k] · Wᵀ`: all weights' rows one behind the other are one matrix.
    ///
    /// # Safety
    /// The operands are as large as they and the weights, all of one k, say; addresses are aligned to 16 bytes and x_cols to 8.
    pub(crate) unsafe fn side_by_side(
        &mut self,
        device: &Device,
        operands: Operands,
        weights: &[Matrix],
    ) -> Result<()> {
        let Some(k) = weights.first().map(|w| w.k) else { return Ok(()) };
        for rows in slices(weights.iter().map(|w| w.n).sum(), k, self.room) {
            let unpacked = self.unpacked.reserve(rows.len() * k * 2)?;
            let mut first = 0;
            for weight in weights {
                let held = rows.start.max(first)..rows.end.min(first + weight.n);
                if !held.is_empty() {
                    let target = unpacked + ((held.start - rows.start) * k * 2) as u64;
                    // SAFETY: the rows are the weight's; the scratch memory holds all of the slice's.
                    unsafe { unpack(device, weight, held.start - first..held.end - first, target, k) }?;
                }
                first += weight.n;
            }
            // SAFETY: the caller's promise; the slice's rows lie in the scratch memory.
            unsafe { self.multiply(operands, k, unpacked, rows) }?;
        }
        Ok(())
    }

    /// `out[rows, n] = x[rows, Σk] · Wᵀ`: the sum of all units' products, whose weights side by side are one matrix.
    ///
    /// # Safety
    /// As [`Self::side_by_side`], with weights all of one n.
    pub(crate) unsafe fn summed(
        &mut self,
        device: &Device,
        operands: Operands,
        weights: &[Matrix],
    ) -> Result<()> {
        let Some(n) = weights.first().map(|w| w.n) else { return Ok(()) };
        let k = weights.iter().map(|w| w.k).sum();
        for rows in slices(n, k, self.room) {
            let unpacked = self.unpacked.reserve(rows.len() * k * 2)?;
            let mut target = unpacked;
            for weight in weights {
                // SAFETY: the rows are the weight's; the scratch memory holds them, k elements from one to the next.
                unsafe { unpack(device, weight, rows.clone(), target, k) }?;
                target += (weight.k * 2) as u64;
            }
            // SAFETY: the caller's promise; the slice's rows lie in the scratch memory.
            unsafe { self.multiply(operands, k, unpacked, rows) }?;
        }
        Ok(())
    }

    /// The columns `columns` of the result, by weights of `[columns, k]`.
    unsafe fn multiply(
        &mut self,
        operands: Operands,
        k: usize,
        weights: u64,
        columns: Range<usize>,
    ) -> Result<()> {
        let Operands { rows, x, x_cols, out, out_cols } = operands;
        let size = Size {
            rows,
            n: columns.len(),
            k,
            x_stride: x_cols,
            weight_stride: k,
            out_stride: out_cols,
            out_dtype: DType::F32,
        };
        // SAFETY: the callers' promise. Slices begin at multiples of 128 columns, so results stay aligned.
        unsafe { self.blas.multiply(size, x, weights, out + (columns.start * size_of::<f32>()) as u64) }
    }
}

/// Cuts `n` rows of `k` elements into few slices of about the same size, each of at most `room` bytes or [`GRAIN`] rows.
fn slices(n: usize, k: usize, room: usize) -> impl Iterator<Item = Range<usize>> {
    let most = (room / (2 * k.max(1)) / GRAIN * GRAIN).max(GRAIN);
    let each = n.div_ceil(n.div_ceil(most).max(1)).next_multiple_of(GRAIN).max(GRAIN);
    (0..n).step_by(each).map(move |start| start..n.min(start + each))
}

/// Begins to write `rows` of a weight to `target`, `stride` elements from one row to the next.
///
/// # Safety
/// The weight has these rows, and the target has room; it and `stride` are aligned to 16 bytes.
unsafe fn unpack(
    device: &Device,
    weight: &Matrix,
    rows: Range<usize>,
    target: u64,
    stride: usize,
) -> Result<()> {
    let tiles = rows.end.div_ceil(TILE_ROWS) - rows.start / TILE_ROWS;
    let lines = weight.format.value_bytes(TILE_ROWS, weight.k) / LINE_BYTES;
    let blocks = (tiles * lines * 32).div_ceil(THREADS);
    let launch = Launch { grid: (blocks as u32, 1), threads: THREADS as u32, shared_bytes: 0 };
    let arguments = Arguments::default()
        .with(panel(weight, 0, 0))
        .with(rows.start as i32)
        .with(rows.len() as i32)
        .with(target)
        .with(stride as i32);
    // SAFETY: the caller's promise; see unpack.cu.
    unsafe { device.launch(weight.format.kernels().unpack, launch, arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes at a time.
    const ROOM: usize = 128 << 20;

    #[test]
    fn slices_are_even_and_fit() {
        let all = |n, k| slices(n, k, ROOM).collect::<Vec<_>>();
        let whole = 0..300;
        assert_eq!(all(300, 64), std::slice::from_ref(&whole));
        // Yi-34B's down projection and its head on one GPU.
        assert_eq!(all(7168, 20_480), [0..2432, 2432..4864, 4864..7168]);
        let head = all(64_000, 7168);
        assert_eq!((head.len(), head[6].clone()), (7, 55_296..64_000));
        for (n, k) in [(7168, 20_480), (64_000, 7168), (40_960, 7168), (129, 1 << 20)] {
            let slices = all(n, k);
            assert!(slices.iter().all(|s| s.start % GRAIN == 0), "{slices:?}");
            assert!(slices.iter().all(|s| s.len() <= GRAIN || s.len() * k * 2 <= ROOM), "{slices:?}");
            assert_eq!(slices.iter().map(|s| s.len()).sum::<usize>(), n);
        }
        assert_eq!(all(0, 8), [0..0; 0]);
    }
}
