//! The paged KV cache in the kernels' own panel format, RoPE, and the op that writes both.
//!
//! A block holds 64 tokens of one unit in one layer: its keys as two panels of 32 tokens over k = head_dim, then
//! its values as `⌈d/32⌉` panels of 32 dimensions over k = 64 tokens. So q·Kᵀ and P·V are products like any other.

use std::ops::Range;

use half::bf16;

use super::buffer::{Buffer, SharedElements};
use super::isa::{Isa, Kernel};
use super::memory::{Memory, Shared};
use super::path::Vectors;
use super::pool::Pool;
use super::rows::for_runs;
use super::tile::PANEL;
use super::vector::{Number, convert};
use crate::shape::{BLOCK, KvDims, MAX_HEAD_DIM};
use crate::{Batch, DType, Error, Result, Slice};

/// The layout.
impl KvDims {
    /// head_dim in whole panels.
    pub(crate) fn padded_dim(self) -> usize {
        self.head_dim.next_multiple_of(PANEL)
    }

    /// Bytes of one block, all layers and units together.
    pub(crate) fn block_bytes(self) -> usize {
        self.layers * self.units * self.unit_elements() * self.dtype.size()
    }

    /// Elements that one unit's keys and values take in a block of a layer.
    fn unit_elements(self) -> usize {
        BLOCK * (self.head_dim + self.padded_dim())
    }

    /// The first element of a unit's keys.
    #[inline(always)]
    pub(crate) fn keys(self, layer: usize, block: usize, unit: usize) -> usize {
        ((layer * self.blocks + block) * self.units + unit) * self.unit_elements()
    }

    /// The first element of a unit's values.
    #[inline(always)]
    pub(crate) fn values(self, layer: usize, block: usize, unit: usize) -> usize {
        self.keys(layer, block, unit) + BLOCK * self.head_dim
    }
}

/// This rank's paged KV of all layers.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) dims: KvDims,
    memory: Memory,
}

impl KvCache {
    pub(crate) fn zeroed(dims: KvDims) -> Result<Self> {
        let bytes = dims
            .block_bytes()
            .checked_mul(dims.blocks)
            .ok_or(Error::OutOfMemory { what: "the kv cache", bytes: usize::MAX })?;
        Ok(KvCache { dims, memory: Memory::zeroed(bytes, "the kv cache")? })
    }

    pub(crate) fn as_ptr<T: Number>(&self) -> *const T {
        self.memory.as_ptr()
    }
}

/// See [`crate::Backend::rope_table`].
pub(crate) fn rope_table(pool: &Pool, batch: &Batch, frequencies: &[f64], out: Shared<f32>) {
    let half = frequencies.len();
    // A sine and a cosine cost about a hundred times what other elements do.
    for_runs(pool, batch.rows(), 100 * half, |rows| {
        for run in runs(batch, rows) {
            for (row, position) in (run.first_row..).zip(run.positions) {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (sin, cos) = libm::sincos(position as f64 * frequency);
                    // SAFETY: this row of the table is this task's.
                    unsafe {
                        *out.at(row * 2 * half + i) = cos as f32;
                        *out.at(row * 2 * half + half + i) = sin as f32;
                    }
                }
            }
        }
    });
}

/// Consecutive rows of one slice.
struct Run<'a> {
    slice: &'a Slice,
    first_row: usize,
    positions: Range<usize>,
}

/// Cuts a range of the batch's rows at the slices' borders.
fn runs(batch: &Batch, rows: Range<usize>) -> impl Iterator<Item = Run<'_>> {
    let mut next = 0;
    batch.slices.iter().filter_map(move |slice| {
        let first = next;
        next += slice.len;
        let start = rows.start.max(first);
        let end = rows.end.min(next);
        let positions = slice.start + start.saturating_sub(first)..slice.start + end.saturating_sub(first);
        (start < end).then_some(Run { slice, first_row: start, positions })
    })
}

/// What `rope_write_kv` reads.
pub(crate) struct Fresh<'a> {
    pub batch: &'a Batch,
    pub qkv: &'a [f32],
    pub rope: &'a [f32],
    /// Query heads of a unit.
    pub group: usize,
    pub layer: usize,
}

/// See [`crate::Backend::rope_write_kv`].
pub(crate) fn rope_write_kv(
    pool: &Pool,
    vectors: Vectors,
    fresh: &Fresh<'_>,
    kv: &mut KvCache,
    q: &mut Buffer,
) {
    let dims = kv.dims;
    let memory = &mut kv.memory;
    match (q.shared(), dims.dtype) {
        (SharedElements::F32(q), DType::F32) => {
            write_all::<f32, f32>(pool, vectors, fresh, dims, memory.shared(), q)
        }
        (SharedElements::F32(q), DType::Bf16) => {
            write_all::<f32, bf16>(pool, vectors, fresh, dims, memory.shared(), q)
        }
        (SharedElements::Bf16(q), DType::F32) => {
            write_all::<bf16, f32>(pool, vectors, fresh, dims, memory.shared(), q)
        }
        (SharedElements::Bf16(q), DType::Bf16) => {
            write_all::<bf16, bf16>(pool, vectors, fresh, dims, memory.shared(), q);
        }
    }
}

fn write_all<Q: Number, T: KvNumber>(
    pool: &Pool,
    vectors: Vectors,
    fresh: &Fresh<'_>,
    dims: KvDims,
    kv: Shared<T>,
    q: Shared<Q>,
) {
    let row_elements = dims.units * (fresh.group + 2) * dims.head_dim;
    for_runs(pool, fresh.batch.rows(), row_elements, |rows| {
        for run in runs(fresh.batch, rows) {
            vectors.run(WriteRun { fresh, dims, run, kv, q });
        }
    });
}

struct WriteRun<'a, Q, T> {
    fresh: &'a Fresh<'a>,
    dims: KvDims,
    run: Run<'a>,
    kv: Shared<T>,
    q: Shared<Q>,
}

impl<Q: Number, T: KvNumber> Kernel for WriteRun<'_, Q, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Run { slice, first_row, positions } = self.run;
        let KvDims { units, head_dim, .. } = self.dims;
        let heads = self.fresh.group + 2;
        let mut rotated = [0.0f32; MAX_HEAD_DIM];
        let rotated = &mut rotated[..head_dim];
        let mut stored = [T::ZERO; MAX_HEAD_DIM];
        for (row, position) in (first_row..).zip(positions) {
            let block = slice.blocks[position / BLOCK] as usize;
            let ends = position + 1 == slice.start + slice.len;
            let rope = &self.fresh.rope[row * head_dim..][..head_dim];
            for unit in 0..units {
                let unit_row = &self.fresh.qkv[(row * units + unit) * heads * head_dim..][..heads * head_dim];
                let (queries, key_value) = unit_row.split_at(self.fresh.group * head_dim);
                let (key, value) = key_value.split_at(head_dim);
                // SAFETY: this row of `q`, and this token's places in a block that no other slice writes (checked),
                // lie inside their memories.
                unsafe {
                    for (head, query) in queries.chunks_exact(head_dim).enumerate() {
                        rotate(query, rope, rotated);
                        let to = (row * units + unit) * self.fresh.group + head;
                        convert::<I, f32, Q>(rotated.as_ptr(), self.q.at(to * head_dim), head_dim);
                    }
                    rotate(key, rope, rotated);
                    convert::<I, f32, T>(rotated.as_ptr(), stored.as_mut_ptr(), head_dim);
                    let keys = self.kv.at(self.dims.keys(self.fresh.layer, block, unit));
                    T::write_key(keys, &stored[..head_dim], position % BLOCK);
                    convert::<I, f32, T>(value.as_ptr(), stored.as_mut_ptr(), head_dim);
                    let values = self.kv.at(self.dims.values(self.fresh.layer, block, unit));
                    T::write_value(values, &stored[..head_dim], position % BLOCK, ends);
                }
            }
        }
    }
}

/// Turns element i and i + d/2 by the row's angle i.
#[inline(always)]
fn rotate(x: &[f32], rope: &[f32], out: &mut [f32]) {
    let (cos, sin) = rope.split_at(rope.len() / 2);
    let (x1, x2) = x.split_at(cos.len());
    let (out1, out2) = out.split_at_mut(cos.len());
    for i in 0..cos.len() {
        out1[i] = x1[i] * cos[i] - x2[i] * sin[i];
        out2[i] = x2[i] * cos[i] + x1[i] * sin[i];
    }
}

/// An element type of the cache, with its places in a block's panels.
pub(crate) trait KvNumber: Number {
    /// Writes the key of a block's token.
    ///
    /// # Safety
    /// `keys` are a block's keys, and nobody else touches this token's.
    unsafe fn write_key(keys: *mut Self, key: &[Self], token: usize);
    /// Writes the value of a block's token. Products take tokens in pairs, so after the slice's last token, `ends`,
    /// the rest of a pair becomes zero whatever an earlier owner of the block left there.
    ///
    /// # Safety
    /// `values` are a block's values, and nobody else touches this token's.
    unsafe fn write_value(values: *mut Self, value: &[Self], token: usize, ends: bool);
}

impl KvNumber for f32 {
    #[inline(always)]
    unsafe fn write_key(keys: *mut f32, key: &[f32], token: usize) {
        for (i, &x) in key.iter().enumerate() {
            // SAFETY: the place of element `i` in the token's panel of `[d][32]`.
            unsafe { *keys.add((token / PANEL * key.len() + i) * PANEL + token % PANEL) = x };
        }
    }

    #[inline(always)]
    unsafe fn write_value(values: *mut f32, value: &[f32], token: usize, ends: bool) {
        for (panel, columns) in value.chunks(PANEL).enumerate() {
            // SAFETY: the token's row in a panel of `[64][32]`; an even token's partner is in the same block.
            unsafe {
                let to = values.add((panel * BLOCK + token) * PANEL);
                std::ptr::copy_nonoverlapping(columns.as_ptr(), to, columns.len());
                if ends && token.is_multiple_of(2) {
                    to.add(PANEL).write_bytes(0, columns.len());
                }
            }
        }
    }
}

impl KvNumber for bf16 {
    #[inline(always)]
    unsafe fn write_key(keys: *mut bf16, key: &[bf16], token: usize) {
        for (i, pair) in key.chunks_exact(2).enumerate() {
            // SAFETY: the place of pair `i` in the token's panel of `[d/2][32][2]`.
            unsafe {
                let to = keys.add((token / PANEL * (key.len() / 2) + i) * 2 * PANEL + token % PANEL * 2);
                to.cast::<[bf16; 2]>().write([pair[0], pair[1]]);
            }
        }
    }

    #[inline(always)]
    unsafe fn write_value(values: *mut bf16, value: &[bf16], token: usize, ends: bool) {
        for (panel, columns) in value.chunks(PANEL).enumerate() {
            // SAFETY: the token's places in a panel of `[32][32][2]`; an even token's partner is beside it.
            unsafe {
                let to = values.add((panel * (BLOCK / 2) + token / 2) * 2 * PANEL + token % 2);
                for (i, &x) in columns.iter().enumerate() {
                    *to.add(2 * i) = x;
                    if ends && token.is_multiple_of(2) {
                        *to.add(2 * i + 1) = bf16::ZERO;
                    }
                }
            }
        }
    }
}
