//! Attention: which kernel takes which slices, and what it is told (see attend_short.cu, attend_long.cu, attend_merge.cu).

use bytemuck::{Pod, Zeroable};

use super::buffer::KvCache;
use super::device::{Arguments, Device, Launch};
use super::memory::Scratch;
use super::step::Plan;
use crate::shape::{BLOCK, KvDims};
use crate::{Error, KvShape, Result};

/// Queries, counted over a unit's heads, that a slice may have to be short: one tile of the matrix instruction.
pub(crate) const SHORT_ROWS: usize = 16;
/// Queries of a tile of the other slices.
pub(crate) const LONG_TILE_ROWS: usize = 64;
/// Keys that are folded from a fresh state.
pub(crate) const SPAN: usize = 512;
/// Sequences of a recorded step, each of which may have a span that is not full.
const RECORDED_SLICES: usize = 256;
/// Dynamic shared memory of a block of `attend_short`.
const SHORT_SHARED_BYTES: u32 = 66_048;
const THREADS: usize = 128;

/// One call.
pub(crate) struct Attention<'a> {
    pub(crate) device: &'a Device,
    pub(crate) plan: &'a Plan,
    /// Address of the step's words.
    pub(crate) words: u64,
    pub(crate) q: u64,
    pub(crate) kv: &'a KvCache,
    pub(crate) layer: usize,
    /// Query heads of a unit.
    pub(crate) group: usize,
    pub(crate) scale: f32,
    pub(crate) out: u64,
    /// See [`recorded_spans`].
    pub(crate) recorded_spans: usize,
}

/// Whether there are kernels for this cache.
pub(crate) fn check(shape: KvShape) -> Result<()> {
    kernels(shape.head_dim).map(drop)
}

/// Spans that the recorded steps of a cache of `blocks` blocks can have, unless sequences share most of their blocks.
pub(crate) fn recorded_spans(blocks: usize) -> usize {
    (blocks * BLOCK).div_ceil(SPAN) + RECORDED_SLICES
}

/// Bytes of the partial results of `spans` spans with up to `rows` queries for each unit.
pub(crate) fn scratch_bytes(shape: KvShape, spans: usize, rows: usize) -> usize {
    4 * spans * shape.units * rows.min(SHORT_ROWS) * (shape.head_dim + 2)
}

/// What the kernels know of slices and cache (`Attention` in attend.cuh).
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Shared {
    q: u64,
    kv: u64,
    slice_row: u64,
    slice_start: u64,
    table_offset: u64,
    table: u64,
    layer: i32,
    blocks: i32,
    units: i32,
    group: i32,
}

/// Short slices and where their partial results go (`Splits` in attend.cuh).
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Splits {
    slices: u64,
    span_offset: u64,
    count: u64,
    outputs: u64,
    states: u64,
}

impl Attention<'_> {
    /// Begins it.
    pub(crate) fn run(&self, scratch: &mut Scratch) -> Result<()> {
        let [short, merge, long] = kernels(self.kv.dims.head_dim)?;
        let Plan { sizes, parts, spans, short_rows, decodes, .. } = *self.plan;
        let word = |part: usize| self.words + 4 * part as u64;
        let KvDims { units, head_dim, blocks, .. } = self.kv.dims;
        let shared = Shared {
            q: self.q,
            kv: self.kv.pointer(),
            slice_row: word(parts.slice_row),
            slice_start: word(parts.slice_start),
            table_offset: word(parts.table_offset),
            table: word(parts.table),
            layer: self.layer as i32,
            blocks: blocks as i32,
            units: units as i32,
            group: self.group as i32,
        };
        let launch = |blocks: usize, shared_bytes: usize| Launch {
            grid: (blocks as u32, units as u32),
            threads: THREADS as u32,
            shared_bytes: shared_bytes as u32,
        };
        if sizes.long_tiles > 0 {
            let arguments = Arguments::default()
                .with(shared)
                .with(word(parts.long_tiles))
                .with(self.scale)
                .with(self.out);
            // SAFETY: sizes were checked by `shape`, block tables too; see attend_long.cu.
            unsafe { self.device.launch(long, launch(sizes.long_tiles, 640 * head_dim), arguments) }?;
        }
        if sizes.short_slices > 0 && short_rows > 0 {
            // Where partial results lie must not depend on the contexts of a step that may be recorded.
            let room = if decodes { spans.max(self.recorded_spans) } else { spans };
            let items = room * units * short_rows;
            let outputs = scratch.reserve(4 * items * (head_dim + 2))?;
            let splits = Splits {
                slices: word(parts.short_slices),
                span_offset: word(parts.span_offset),
                count: word(parts.short_count),
                outputs,
                states: outputs + (4 * items * head_dim) as u64,
            };
            let resident = self.device.resident_blocks(short, THREADS as u32, SHORT_SHARED_BYTES)?;
            let whole = (resident as usize / units).max(1);
            // A recorded launch must serve longer contexts than today's.
            let columns = if decodes { whole } else { whole.min(spans) };
            let arguments = |splits: Splits| {
                Arguments::default().with(shared).with(splits).with(self.scale).with(short_rows as i32)
            };
            // SAFETY: as above; the partial results have room for all spans; see attend_short.cu.
            unsafe {
                self.device.launch_early(
                    short,
                    launch(columns, SHORT_SHARED_BYTES as usize),
                    arguments(splits),
                )
            }?;
            let results = (sizes.short_slices * short_rows * head_dim).div_ceil(THREADS);
            // SAFETY: as above; see attend_merge.cu.
            unsafe { self.device.launch_early(merge, launch(results, 0), arguments(splits).with(self.out)) }?;
        }
        Ok(())
    }
}

/// For short slices, for what they left, and for long slices.
fn kernels(head_dim: usize) -> Result<[&'static str; 3]> {
    match head_dim {
        16 => Ok(["attend_short_d16", "attend_merge_d16", "attend_long_d16"]),
        32 => Ok(["attend_short_d32", "attend_merge_d32", "attend_long_d32"]),
        64 => Ok(["attend_short_d64", "attend_merge_d64", "attend_long_d64"]),
        128 => Ok(["attend_short_d128", "attend_merge_d128", "attend_long_d128"]),
        other => Err(unsupported(other)),
    }
}

fn unsupported(head_dim: usize) -> Error {
    Error::Unsupported(format!(
        "the GPU's attention takes heads of 16, 32, 64 or 128 elements, not head_dim {head_dim}; run on the CPU"
    ))
}
