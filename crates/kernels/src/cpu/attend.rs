//! Causal attention over the paged cache.
//!
//! The rows of a tile are (token, query head) pairs that share a KV head. Keys fall into fixed spans of 512; a
//! span's state (greatest score m, sum l of e^(score − m), output o) begins anew, and states merge in ascending
//! order. Slices of a few rows spread their spans over the threads and merge afterwards; others spread their rows
//! and merge as they go, which is the same fold.

use std::ops::Range;

use half::bf16;

use super::buffer::{Buffer, Elements, SharedElements};
use super::isa::{Isa, Kernel};
use super::kv::KvCache;
use super::memory::Memory;
use super::path::Vectors;
use super::pool::Pool;
use super::tile::{Dot, PANEL, Product, SPAN, Single, Tile, Widened, ahead, even_part};
use super::vector::{Number, convert, exp, load_first, max, store_first, sum};
use crate::shape::BLOCK;
use crate::{Batch, DType, Result, Slice};

/// Slices of at most so many rows are cut by span.
const SPLIT_ROWS: usize = 12;
/// Rows of a task otherwise: enough that a span of keys and values, in L2, is used many times.
const TASK_ROWS: usize = 96;
/// The most rows of a tile on any path.
const MAX_TILE_ROWS: usize = 12;
/// Beside its output, a state keeps m and l.
const STATE_EXTRA: usize = 16;

/// What an attention reads.
pub(crate) struct Attention<'a> {
    pub batch: &'a Batch,
    pub q: &'a Buffer,
    /// Query heads of a unit.
    pub group: usize,
    pub layer: usize,
    pub kv: &'a KvCache,
    pub scale: f32,
}

/// Memory that attention needs, kept between calls.
pub(crate) struct Scratch {
    workers: Memory,
    partials: Memory,
    tasks: Vec<Task>,
    merges: Vec<Merge>,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self> {
        let empty = || Memory::zeroed(0, "scratch");
        Ok(Scratch { workers: empty()?, partials: empty()?, tasks: Vec::new(), merges: Vec::new() })
    }
}

/// Rows of one slice and unit, over one span of keys or all.
struct Task {
    slice: usize,
    /// Of the slice, in the batch.
    first_row: usize,
    unit: usize,
    /// (token, head) pairs, token after token.
    rows: Range<usize>,
    /// The span, and where its states go; or all spans.
    split: Option<(usize, usize)>,
}

/// States of consecutive spans, to be merged.
struct Merge {
    first_row: usize,
    unit: usize,
    rows: usize,
    spans: usize,
    states: usize,
}

/// See [`crate::Backend::attend`]; sizes were checked.
pub(crate) fn attend(
    pool: &Pool,
    vectors: Vectors,
    scratch: &mut Scratch,
    attention: &Attention<'_>,
    out: &mut Buffer,
) -> Result<()> {
    let units = attention.kv.dims.units;
    let state = attention.state_elements();
    scratch.tasks.clear();
    scratch.merges.clear();
    let mut first_row = 0;
    let mut states = 0;
    for (index, slice) in attention.batch.slices.iter().enumerate() {
        let rows = slice.len * attention.group;
        for unit in 0..units {
            let task = |rows, split| Task { slice: index, first_row, unit, rows, split };
            if rows <= SPLIT_ROWS {
                let spans = (slice.start + slice.len).div_ceil(SPAN);
                scratch.merges.push(Merge { first_row, unit, rows, spans, states });
                scratch
                    .tasks
                    .extend((0..spans).map(|span| task(0..rows, Some((span, states + span * rows)))));
                states += spans * rows;
            } else {
                // The last rows have the most keys: begin with them.
                let parts = (0..rows.div_ceil(TASK_ROWS)).rev();
                scratch.tasks.extend(parts.map(|part| task(even_part(rows, TASK_ROWS, part), None)));
            }
        }
        first_row += slice.len;
    }
    let worker_bytes = attention.worker_elements() * 4;
    scratch.workers.reserve(pool.threads() * worker_bytes, "scratch of attention")?;
    scratch.partials.reserve(states * state * 4, "partial results of attention")?;
    let workers = scratch.workers.shared::<f32>();
    let partials = scratch.partials.shared::<f32>();
    let out = out.shared();
    pool.for_each(scratch.tasks.len(), |worker, index| {
        let task = &scratch.tasks[index];
        // SAFETY: each worker's scratch, and each task's states, lie apart inside their memories.
        let (local, states) = unsafe {
            let states = task.split.map(|(_, at)| partials.at(at * state));
            (workers.at(worker * attention.worker_elements()), states)
        };
        vectors.run(Attend { attention, task, local, states, out });
    });
    pool.for_each(scratch.merges.len(), |_, index| {
        let merge = &scratch.merges[index];
        // SAFETY: this merge's states lie apart inside their memory.
        let states = unsafe { partials.at(merge.states * state) };
        vectors.run(MergeSpans { attention, merge, states, out });
    });
    Ok(())
}

impl Attention<'_> {
    /// A row's state: o, padded, then m and l.
    fn state_elements(&self) -> usize {
        self.kv.dims.padded_dim() + STATE_EXTRA
    }

    /// Per worker: queries, scores and weights of a tile, its states, and the states of a task's rows.
    fn worker_elements(&self) -> usize {
        3 * MAX_TILE_ROWS * SPAN + (MAX_TILE_ROWS + TASK_ROWS) * self.state_elements()
    }

    /// Keys that row `row` of `slice` sees.
    #[inline(always)]
    fn limit(&self, slice: &Slice, row: usize) -> usize {
        slice.start + row / self.group + 1
    }

    /// Whether attention weights are rounded to bf16, as P·V multiplies them on the bf16 path.
    fn rounds(&self) -> bool {
        self.q.dtype() == DType::Bf16 && self.kv.dims.dtype == DType::Bf16
    }

    /// Where q and the result keep a (token, head) row.
    #[inline(always)]
    fn place(&self, first_row: usize, unit: usize, row: usize) -> usize {
        let token = first_row + row / self.group;
        ((token * self.kv.dims.units + unit) * self.group + row % self.group) * self.kv.dims.head_dim
    }
}

/// Runs a task.
struct Attend<'a> {
    attention: &'a Attention<'a>,
    task: &'a Task,
    local: *mut f32,
    states: Option<*mut f32>,
    out: SharedElements,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        // SAFETY: scratch and states have the room that `attend` reserved.
        unsafe {
            match (self.attention.rounds(), self.attention.kv.dims.dtype) {
                (true, _) if I::BF16_DOT => self.fold::<I, Dot>(),
                (_, DType::Bf16) => self.fold::<I, Widened>(),
                (_, DType::F32) => self.fold::<I, Single>(),
            }
        }
    }
}

impl Attend<'_> {
    /// # Safety
    /// `P` fits q and cache; scratch and states have room.
    #[inline(always)]
    unsafe fn fold<I: Isa, P: Product>(self) {
        let (attention, task) = (self.attention, self.task);
        let slice = &attention.batch.slices[task.slice];
        let state = attention.state_elements();
        // SAFETY: the parts of the worker's scratch lie one after the other.
        unsafe {
            let states = self.local.add(3 * MAX_TILE_ROWS * SPAN);
            let folded = states.add(MAX_TILE_ROWS * state);
            let rows = task.rows.len();
            let spans = match task.split {
                Some((span, _)) => span..span + 1,
                None => 0..attention.limit(slice, task.rows.end - 1).div_ceil(SPAN),
            };
            for span in spans {
                for index in 0..rows.div_ceil(I::TILE_ROWS) {
                    let part = even_part(rows, I::TILE_ROWS, index);
                    let tile = task.rows.start + part.start..task.rows.start + part.end;
                    // Straight to where the result belongs, unless there is something to merge with.
                    let to = match self.states {
                        Some(states) => states.add(part.start * state),
                        None if span == 0 => folded.add(part.start * state),
                        None => states,
                    };
                    if attention.limit(slice, tile.end - 1) <= span * SPAN {
                        // No row of this tile sees the span; only merging afterwards has to be told.
                        for r in 0..tile.len() {
                            *to.add(r * state + state - STATE_EXTRA + 1) = 0.0;
                        }
                        continue;
                    }
                    self.tile::<I, P>(tile.clone(), span, to);
                    if self.states.is_none() && span > 0 {
                        for r in 0..tile.len() {
                            merge::<I>(folded.add((part.start + r) * state), states.add(r * state), state);
                        }
                    }
                }
            }
            if self.states.is_none() {
                for r in 0..rows {
                    let place = attention.place(task.first_row, task.unit, task.rows.start + r);
                    finish::<I>(attention, folded.add(r * state), self.out, place);
                }
            }
        }
    }

    /// The states of a tile's rows over one span, in which at least the last row has keys.
    ///
    /// # Safety
    /// `P` fits q and cache; scratch and `states` have room.
    #[inline(always)]
    unsafe fn tile<I: Isa, P: Product>(&self, rows: Range<usize>, span: usize, states: *mut f32) {
        let attention = self.attention;
        let dims = attention.kv.dims;
        let slice = &attention.batch.slices[self.task.slice];
        let state = attention.state_elements();
        let first_key = span * SPAN;
        let keys = SPAN.min(attention.limit(slice, rows.end - 1) - first_key);
        // SAFETY: scratch holds three tiles; the slice's blocks cover its keys (checked), and every value up to an
        // even number of `keys` was written, if only as a pair's zero.
        unsafe {
            let queries = self.local.cast::<P::Row>();
            let scores = self.local.add(MAX_TILE_ROWS * SPAN);
            let weights = self.local.add(2 * MAX_TILE_ROWS * SPAN).cast::<P::Row>();
            for (r, row) in rows.clone().enumerate() {
                let place = attention.place(self.task.first_row, self.task.unit, row);
                let to = queries.add(r * SPAN);
                match attention.q.elements() {
                    Elements::F32(q) => convert::<I, f32, P::Row>(q[place..].as_ptr(), to, dims.head_dim),
                    Elements::Bf16(q) => convert::<I, bf16, P::Row>(q[place..].as_ptr(), to, dims.head_dim),
                }
            }
            let cache = attention.kv.as_ptr::<P::Panel>();
            let mut blocks = [cache; SPAN / BLOCK];
            let blocks = &mut blocks[..keys.div_ceil(BLOCK)];
            for (keys, &block) in blocks.iter_mut().zip(&slice.blocks[first_key / BLOCK..]) {
                *keys = cache.add(dims.keys(attention.layer, block as usize, self.task.unit));
            }
            // What only one tile reads comes from memory, block after block: each brings in the next.
            let streams = self.states.is_some();
            let next_block = |index: usize, last: *const P::Panel| match blocks.get(index + 1) {
                _ if !streams => [0, 0],
                Some(&next) => ahead(blocks[index], next),
                None => ahead(blocks[index], last),
            };
            let values = BLOCK * dims.head_dim;
            let key_panel = |key: usize| blocks[key / BLOCK].add(key % BLOCK * dims.head_dim);
            for key in (0..keys).step_by(PANEL) {
                Tile::<P> {
                    rows: queries,
                    panels: &[key_panel(key)],
                    offset: 0,
                    panel_pairs: dims.head_dim / 2,
                    pairs: dims.head_dim / 2,
                    sums: scores.add(key),
                    stride: SPAN,
                    fresh: true,
                    ahead: next_block(key / BLOCK, blocks[0].add(values)),
                }
                .multiply::<I>(rows.len());
            }
            let even_keys = keys.next_multiple_of(2);
            for (r, row) in rows.clone().enumerate() {
                let seen = attention.limit(slice, row).saturating_sub(first_key).min(keys);
                let softmax = Softmax { scale: attention.scale, round: attention.rounds(), seen };
                let (m, l) = softmax.run::<I, P::Row>(scores.add(r * SPAN), weights.add(r * SPAN), even_keys);
                let extra = states.add(r * state + dims.padded_dim());
                *extra = m;
                *extra.add(1) = l;
            }
            let together = if streams { 1 } else { blocks.len() };
            for (index, group) in blocks.chunks(together).enumerate() {
                for column in (0..dims.head_dim).step_by(PANEL) {
                    Tile::<P> {
                        rows: weights.add(index * together * BLOCK),
                        panels: group,
                        offset: values + column * BLOCK,
                        panel_pairs: BLOCK / 2,
                        pairs: even_keys.min((index + 1) * together * BLOCK) / 2
                            - index * together * BLOCK / 2,
                        sums: states.add(column),
                        stride: state,
                        fresh: index == 0,
                        ahead: next_block(index, blocks[index]),
                    }
                    .multiply::<I>(rows.len());
                }
            }
        }
    }
}

/// One row's softmax over a span.
struct Softmax {
    scale: f32,
    round: bool,
    /// Keys that the row sees; what the scores hold past them is replaced, whatever it is.
    seen: usize,
}

impl Softmax {
    /// Returns m and l, and fills `weights` up to `keys`.
    ///
    /// # Safety
    /// `scores` and `weights` have room for `keys` rounded up to whole vectors.
    #[inline(always)]
    unsafe fn run<I: Isa, N: Number>(&self, scores: *const f32, weights: *mut N, keys: usize) -> (f32, f32) {
        let scale = I::splat(self.scale);
        let mut greatest = I::splat(f32::NEG_INFINITY);
        let mut total = I::splat(0.0);
        // SAFETY: by contract.
        unsafe {
            let score = |i: usize| {
                let score = I::mul(I::load(scores.add(i)), scale);
                if self.seen - i < I::LANES {
                    I::keep_first(score, self.seen - i, f32::NEG_INFINITY)
                } else {
                    score
                }
            };
            for i in (0..self.seen).step_by(I::LANES) {
                greatest = I::max(greatest, score(i));
            }
            let m = max::<I>(greatest);
            for i in (0..self.seen).step_by(I::LANES) {
                let mut weight = exp::<I>(I::sub(score(i), I::splat(m)));
                if self.round {
                    weight = I::round_bf16(weight);
                }
                total = I::add(total, weight);
                N::store::<I>(weights.add(i), weight);
            }
            for i in (self.seen.next_multiple_of(I::LANES)..keys).step_by(I::LANES) {
                N::store::<I>(weights.add(i), I::splat(0.0));
            }
            (m, sum::<I>(total))
        }
    }
}

/// Folds a later span's state into an earlier one.
///
/// # Safety
/// Both have `state` elements; runs under `I::vectorize`.
#[inline(always)]
unsafe fn merge<I: Isa>(into: *mut f32, later: *const f32, state: usize) {
    let dim = state - STATE_EXTRA;
    // SAFETY: by contract; `dim` is in whole panels.
    unsafe {
        let (m1, l1) = (*into.add(dim), *into.add(dim + 1));
        let (m2, l2) = (*later.add(dim), *later.add(dim + 1));
        if l2 == 0.0 {
            return; // the row sees none of the span's keys
        }
        let m = if m1 > m2 { m1 } else { m2 };
        let factor = |of: f32| exp::<I>(I::splat(of - m));
        let (a, b) = (factor(m1), factor(m2));
        for i in (0..dim).step_by(I::LANES) {
            let o = I::fma(I::load(later.add(i)), b, I::mul(I::load(into.add(i)), a));
            I::store(into.add(i), o);
        }
        let l = I::fma(I::splat(l2), b, I::mul(I::splat(l1), a));
        *into.add(dim) = m;
        store_first::<I, f32>(into.add(dim + 1), l, 1);
    }
}

/// Writes o / l.
///
/// # Safety
/// `from` is a state, and `place` a row of the result that is this task's; runs under `I::vectorize`.
#[inline(always)]
unsafe fn finish<I: Isa>(attention: &Attention<'_>, from: *const f32, out: SharedElements, place: usize) {
    let dims = attention.kv.dims;
    // SAFETY: by contract.
    unsafe {
        let scale = I::splat(1.0 / *from.add(dims.padded_dim() + 1));
        for i in (0..dims.head_dim).step_by(I::LANES) {
            let lanes = I::LANES.min(dims.head_dim - i);
            // Keys that a row does not see add +0 if its tile has them, which shows in a -0 alone: there is none.
            let x = I::add(I::mul(load_first::<I, f32>(from.add(i), lanes), scale), I::splat(0.0));
            match out {
                SharedElements::F32(out) => store_first::<I, f32>(out.at(place + i), x, lanes),
                SharedElements::Bf16(out) => store_first::<I, bf16>(out.at(place + i), x, lanes),
            }
        }
    }
}

/// Merges the spans of a split slice's rows.
struct MergeSpans<'a> {
    attention: &'a Attention<'a>,
    merge: &'a Merge,
    states: *mut f32,
    out: SharedElements,
}

impl Kernel for MergeSpans<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let state = self.attention.state_elements();
        let rows = self.merge.rows;
        for row in 0..rows {
            // SAFETY: `spans · rows` states, this row's `rows` apart.
            unsafe {
                let first = self.states.add(row * state);
                for span in 1..self.merge.spans {
                    merge::<I>(first, first.add(span * rows * state), state);
                }
                let place = self.attention.place(self.merge.first_row, self.merge.unit, row);
                finish::<I>(self.attention, first, self.out, place);
            }
        }
    }
}
