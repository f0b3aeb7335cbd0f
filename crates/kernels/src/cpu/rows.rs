//! Ops that work on each row by itself: embedding, norms, the gated activation, gathering.

use std::ops::Range;

use half::bf16;

use super::buffer::{Buffer, Elements, SharedElements, Table};
use super::isa::{Isa, Kernel};
use super::memory::Shared;
use super::path::Vectors;
use super::pool::Pool;
use super::vector::{Number, convert, exp, load_first, store_first, sum};

/// Elements that are worth a task of their own.
pub(crate) const TASK_ELEMENTS: usize = 16_384;

/// Calls `work(rows)` for runs of rows of about [`TASK_ELEMENTS`] elements.
pub(crate) fn for_runs(pool: &Pool, rows: usize, row_elements: usize, work: impl Fn(Range<usize>) + Sync) {
    let run = (TASK_ELEMENTS / row_elements.max(1)).max(1);
    pool.for_each(rows.div_ceil(run), |_, task| work(task * run..rows.min((task + 1) * run)));
}

/// See [`crate::Backend::embed`].
pub(crate) fn embed(pool: &Pool, vectors: Vectors, ids: &[u32], table: &Table, out: Shared<f32>) {
    for_runs(pool, ids.len(), table.rows.cols(), |rows| {
        vectors.run(Embed { ids, table, rows, out });
    });
}

struct Embed<'a> {
    ids: &'a [u32],
    table: &'a Table,
    rows: Range<usize>,
    out: Shared<f32>,
}

impl Kernel for Embed<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.table.rows.cols();
        for row in self.rows {
            let held = (self.ids[row] as usize)
                .checked_sub(self.table.first_id)
                .filter(|&at| at < self.table.rows.rows());
            // SAFETY: row `row` of the result, which is this task's.
            unsafe {
                let to = self.out.at(row * cols);
                match (held, self.table.rows.elements()) {
                    (None, _) => to.write_bytes(0, cols),
                    (Some(at), Elements::F32(x)) => {
                        convert::<I, _, _>(x[at * cols..][..cols].as_ptr(), to, cols)
                    }
                    (Some(at), Elements::Bf16(x)) => {
                        convert::<I, _, _>(x[at * cols..][..cols].as_ptr(), to, cols)
                    }
                }
            }
        }
    }
}

/// A norm's inputs: `x`, or `residual += x`.
pub(crate) struct Norm<'a> {
    pub rows: usize,
    pub x: &'a [f32],
    pub residual: Option<Shared<f32>>,
    pub weight: &'a [f32],
    pub eps: f32,
}

/// See [`crate::Backend::add_rms_norm`].
pub(crate) fn rms_norm(pool: &Pool, vectors: Vectors, norm: &Norm<'_>, out: &mut Buffer) {
    let shared = out.shared();
    for_runs(pool, norm.rows, norm.weight.len(), |rows| match shared {
        SharedElements::F32(out) => vectors.run(NormRows { norm, rows, out }),
        SharedElements::Bf16(out) => vectors.run(NormRows { norm, rows, out }),
    });
}

struct NormRows<'a, T> {
    norm: &'a Norm<'a>,
    rows: Range<usize>,
    out: Shared<T>,
}

impl<T: Number> Kernel for NormRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.norm.weight.len();
        for row in self.rows.clone() {
            let mut x = self.norm.x[row * cols..][..cols].as_ptr();
            // Four sums in turn, so that an addition need not wait for the last.
            let mut squares = [I::splat(0.0); 4];
            for (turn, i) in (0..cols).step_by(I::LANES).enumerate() {
                let lanes = I::LANES.min(cols - i);
                // SAFETY: `i + lanes <= cols`; the residual's row is this task's.
                unsafe {
                    let mut value = load_first::<I, f32>(x.add(i), lanes);
                    if let Some(residual) = self.norm.residual {
                        let residual = residual.at(row * cols + i);
                        value = I::add(load_first::<I, f32>(residual, lanes), value);
                        store_first::<I, f32>(residual, value, lanes);
                    }
                    squares[turn % 4] = I::fma(value, value, squares[turn % 4]);
                }
            }
            if let Some(residual) = self.norm.residual {
                // SAFETY: this row of the residual.
                x = unsafe { residual.at(row * cols) };
            }
            let total = sum::<I>(I::add(I::add(squares[0], squares[1]), I::add(squares[2], squares[3])));
            let scale = I::splat(1.0 / (total / cols as f32 + self.norm.eps).sqrt());
            for i in (0..cols).step_by(I::LANES) {
                let lanes = I::LANES.min(cols - i);
                // SAFETY: `i + lanes <= cols`; this row of the result is this task's.
                unsafe {
                    let value = I::mul(load_first::<I, f32>(x.add(i), lanes), scale);
                    let weight = load_first::<I, f32>(self.norm.weight.as_ptr().add(i), lanes);
                    store_first::<I, T>(self.out.at(row * cols + i), I::mul(value, weight), lanes);
                }
            }
        }
    }
}

/// See [`crate::Backend::silu_mul`].
pub(crate) fn silu_mul(
    pool: &Pool,
    vectors: Vectors,
    rows: usize,
    gate_up: &[f32],
    widths: &[usize],
    out: &mut Buffer,
) {
    let total = widths.iter().sum();
    let shared = out.shared();
    for_runs(pool, rows, total, |rows| match shared {
        SharedElements::F32(out) => vectors.run(SiluRows { gate_up, widths, total, rows, out }),
        SharedElements::Bf16(out) => vectors.run(SiluRows { gate_up, widths, total, rows, out }),
    });
}

struct SiluRows<'a, T> {
    gate_up: &'a [f32],
    widths: &'a [usize],
    total: usize,
    rows: Range<usize>,
    out: Shared<T>,
}

impl<T: Number> Kernel for SiluRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        for row in self.rows.clone() {
            let mut first = 0;
            for &width in self.widths {
                let unit = &self.gate_up[2 * (row * self.total + first)..][..2 * width];
                for i in (0..width).step_by(I::LANES) {
                    let lanes = I::LANES.min(width - i);
                    // SAFETY: `i + lanes <= width`; this row of the result is this task's.
                    unsafe {
                        let gate = load_first::<I, f32>(unit.as_ptr().add(i), lanes);
                        let up = load_first::<I, f32>(unit.as_ptr().add(width + i), lanes);
                        let one = I::splat(1.0);
                        let silu = I::div(gate, I::add(one, exp::<I>(I::sub(I::splat(0.0), gate))));
                        store_first::<I, T>(
                            self.out.at(row * self.total + first + i),
                            I::mul(silu, up),
                            lanes,
                        );
                    }
                }
                first += width;
            }
        }
    }
}

/// See [`crate::Backend::gather_rows`]; rows and types were checked.
pub(crate) fn gather_rows(x: &Buffer, rows: &[usize], out: &mut Buffer) {
    let cols = x.cols();
    for (to, &from) in rows.iter().enumerate() {
        // SAFETY: both rows lie inside their buffers, which are apart.
        unsafe {
            match (x.elements(), out.shared()) {
                (Elements::F32(x), SharedElements::F32(out)) => {
                    copy(&x[from * cols..][..cols], out.at(to * cols))
                }
                (Elements::Bf16(x), SharedElements::Bf16(out)) => {
                    copy(&x[from * cols..][..cols], out.at(to * cols))
                }
                _ => {}
            }
        }
    }
}

/// # Safety
/// `to` has room for `from`.
unsafe fn copy<T: Number>(from: &[T], to: *mut T) {
    // SAFETY: by contract; a buffer that is borrowed mutably does not overlap `from`.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
}

/// Rows of embeddings or a vector out of a checkpoint: `out` is dense.
pub(crate) fn fill_from_source(pool: &Pool, block: &crate::RowBlock<'_>, out: &mut Buffer) {
    let cols = block.cols;
    let shared = out.shared();
    for_runs(pool, block.rows, cols, |rows| {
        for i in rows.start * cols..rows.end * cols {
            let value = super::buffer::source_f32(block, i);
            // SAFETY: rows of this task.
            unsafe {
                match shared {
                    SharedElements::F32(out) => *out.at(i) = value,
                    SharedElements::Bf16(out) => *out.at(i) = bf16::from_f32(value),
                }
            }
        }
    });
}
