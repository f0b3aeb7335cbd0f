//! The ops' preconditions on sizes, checked alike by every backend.

use crate::{Batch, CHOSEN_COLS, DType, Error, KvShape, MAX_SLOTS, Result, RowBlock, Step, Token, Tree};
use std::ops::Range;

pub(crate) use crate::backend::BLOCK_TOKENS as BLOCK;

/// The largest head dimension.
pub(crate) const MAX_HEAD_DIM: usize = 512;

/// A buffer's type and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dims {
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
}

/// A KV cache's type and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KvDims {
    pub layers: usize,
    pub units: usize,
    pub head_dim: usize,
    pub blocks: usize,
    pub dtype: DType,
}

impl KvDims {
    pub(crate) fn new(shape: KvShape, blocks: usize) -> Self {
        let KvShape { layers, units, head_dim, dtype, .. } = shape;
        Self { layers, units, head_dim, blocks, dtype }
    }
}

/// An op by name, which its errors carry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Op(pub &'static str);

impl Op {
    fn require(self, holds: bool, detail: impl FnOnce() -> String) -> Result<()> {
        if holds { Ok(()) } else { Err(Error::Shape { op: self.0, detail: detail() }) }
    }

    /// `name` holds `rows` rows of exactly `cols` elements.
    fn matrix(self, name: &str, dims: Dims, rows: usize, cols: usize) -> Result<()> {
        self.require(dims.rows >= rows && dims.cols == cols, || {
            format!("{name} is [{}, {}], wanted [{rows}, {cols}]", dims.rows, dims.cols)
        })
    }

    /// Likewise, in f32.
    fn f32_matrix(self, name: &str, dims: Dims, rows: usize, cols: usize) -> Result<()> {
        self.require(dims.dtype == DType::F32, || format!("{name} is not f32"))?;
        self.matrix(name, dims, rows, cols)
    }

    fn bytes(self, block: &RowBlock<'_>) -> Result<()> {
        let bytes = block.rows.checked_mul(block.cols).and_then(|n| n.checked_mul(block.dtype.size()));
        self.require(bytes == Some(block.bytes.len()), || {
            format!("{} bytes for [{}, {}] of {:?}", block.bytes.len(), block.rows, block.cols, block.dtype)
        })
    }

    /// Slices with rows, positions that can be, and block tables that cover them.
    fn batch(self, batch: &Batch, blocks: usize) -> Result<()> {
        for slice in &batch.slices {
            let end = slice.start.checked_add(slice.len);
            let covered = end.is_some_and(|end| slice.blocks.len() >= end.div_ceil(BLOCK));
            self.require(slice.len > 0 && covered, || {
                format!("{} blocks for rows {}+{}", slice.blocks.len(), slice.start, slice.len)
            })?;
            let stranger = slice.blocks.iter().find(|&&block| block as usize >= blocks);
            self.require(stranger.is_none(), || format!("block {stranger:?} of {blocks}"))?;
        }
        Ok(())
    }

    /// A step's sizes cover what it holds.
    fn rows(self, step: &Step) -> Result<()> {
        let covered = step.rows >= step.batch.rows() && step.sampled_rows >= step.sampled.len();
        self.require(covered, || {
            format!("{} rows for {}, {} sampled", step.rows, step.batch.rows(), step.sampled_rows)
        })
    }

    /// A token for every row, and slots that there are.
    fn tokens(self, step: &Step) -> Result<()> {
        self.require(step.tokens.len() == step.batch.rows(), || {
            format!("{} tokens for {} rows", step.tokens.len(), step.batch.rows())
        })?;
        let slots = step.tokens.iter().filter_map(|token| match token {
            Token::LastSampled(slot) => Some(*slot),
            Token::Id(_) => None,
        });
        self.slots(slots)
    }

    fn slots(self, mut slots: impl Iterator<Item = u32>) -> Result<()> {
        let stranger = slots.find(|&slot| slot as usize >= MAX_SLOTS);
        self.require(stranger.is_none(), || format!("slot {stranger:?} of {MAX_SLOTS}"))
    }

    /// Slots that there are, for what is chosen.
    fn kept(self, step: &Step) -> Result<()> {
        self.slots(step.sampled.iter().filter_map(|sampled| sampled.slot))
    }

    /// What is chosen for the sampled rows.
    fn chosen(self, step: &Step, chosen: Dims) -> Result<()> {
        self.rows(step)?;
        self.kept(step)?;
        self.f32_matrix("chosen", chosen, step.sampled_rows, CHOSEN_COLS)
    }

    fn layer(self, layer: usize, kv: KvDims) -> Result<()> {
        self.require(layer < kv.layers, || format!("layer {layer} of {}", kv.layers))
    }
}

/// [`crate::Backend::matrix`]: returns `[n, k]`.
pub(crate) fn weight(blocks: &[RowBlock<'_>]) -> Result<(usize, usize)> {
    let op = Op("matrix");
    let k = blocks.first().map_or(0, |block| block.cols);
    op.require(k > 0 && k.is_multiple_of(2), || format!("k = {k} is not a positive even number"))?;
    for block in blocks {
        op.require(block.cols == k, || format!("blocks of width {k} and {}", block.cols))?;
        op.bytes(block)?;
    }
    Ok((blocks.iter().map(|block| block.rows).sum(), k))
}

/// [`crate::Backend::table`] and [`crate::Backend::vector`].
pub(crate) fn source(op: &'static str, block: &RowBlock<'_>) -> Result<()> {
    Op(op).bytes(block)
}

/// [`crate::Backend::kv_cache`].
pub(crate) fn kv_cache(head_dim: usize) -> Result<()> {
    let good = (2..=MAX_HEAD_DIM).contains(&head_dim) && head_dim.is_multiple_of(2);
    Op("kv_cache").require(good, || format!("head_dim {head_dim} is not an even number up to {MAX_HEAD_DIM}"))
}

/// [`crate::Backend::read_row`].
pub(crate) fn read_row(buffer: Dims, row: usize) -> Result<()> {
    Op("read_row").f32_matrix("buffer", buffer, row.saturating_add(1), buffer.cols)
}

/// [`crate::Backend::run`] of a backend that looks into the step before its ops do.
#[cfg(feature = "cuda")]
pub(crate) fn step(step: &Step, blocks: usize) -> Result<()> {
    let op = Op("run");
    op.rows(step)?;
    op.tokens(step)?;
    op.kept(step)?;
    op.batch(&step.batch, blocks)
}

/// [`crate::Backend::embed`].
pub(crate) fn embed(step: &Step, table_cols: usize, out: Dims) -> Result<()> {
    let op = Op("embed");
    op.rows(step)?;
    op.tokens(step)?;
    op.f32_matrix("out", out, step.rows, table_cols)
}

/// [`crate::Backend::rms_norm`] and [`crate::Backend::add_rms_norm`].
pub(crate) fn rms_norm(rows: usize, x: Dims, residual: Option<Dims>, weight: Dims, out: Dims) -> Result<()> {
    let op = Op("rms_norm");
    op.f32_matrix("x", x, rows, x.cols)?;
    if let Some(residual) = residual {
        op.f32_matrix("residual", residual, rows, x.cols)?;
    }
    op.f32_matrix("weight", weight, 1, x.cols)?;
    op.matrix("out", out, rows, x.cols)
}

/// [`crate::Backend::linear`]; weights as `(n, k)`.
pub(crate) fn linear(
    rows: usize,
    x: Dims,
    weights: impl Iterator<Item = (usize, usize)>,
    out: Dims,
) -> Result<()> {
    let op = Op("linear");
    let mut cols = 0;
    for (n, k) in weights {
        op.matrix("x", x, rows, k)?;
        cols += n;
    }
    op.f32_matrix("out", out, rows, cols)
}

/// [`crate::Backend::linear_partials`]; weights as `(n, k)`, partials as units and size.
pub(crate) fn linear_partials(
    rows: usize,
    x: Dims,
    weights: &[(usize, usize)],
    first_unit: usize,
    tree: Tree,
    partials: &[(Range<usize>, Dims)],
) -> Result<()> {
    let op = Op("linear_partials");
    let n = weights.first().map_or(0, |weight| weight.0);
    op.matrix("x", x, rows, weights.iter().map(|weight| weight.1).sum())?;
    op.require(weights.iter().all(|weight| weight.0 == n), || "weights of several n".into())?;
    let held = first_unit..first_unit.saturating_add(weights.len());
    op.require(held.end <= tree.units, || format!("units {held:?} of {}", tree.units))?;
    let wanted = if held.is_empty() { Vec::new() } else { tree.subtrees(&held) };
    let same = wanted.len() == partials.len() && wanted.iter().zip(partials).all(|(a, b)| *a == b.0);
    op.require(same, || format!("partials are not {wanted:?}"))?;
    partials.iter().try_for_each(|(_, dims)| op.f32_matrix("partial", *dims, rows, n))
}

/// [`crate::Backend::rope_table`].
pub(crate) fn rope_table(step: &Step, frequencies: usize, out: Dims) -> Result<()> {
    Op("rope_table").rows(step)?;
    Op("rope_table").f32_matrix("out", out, step.rows, 2 * frequencies)
}

/// [`crate::Backend::rope_write_kv`]: returns g, the query heads of a unit.
pub(crate) fn rope_write_kv(
    step: &Step,
    qkv: Dims,
    rope: Dims,
    layer: usize,
    kv: KvDims,
    q: Dims,
) -> Result<usize> {
    let op = Op("rope_write_kv");
    op.rows(step)?;
    op.batch(&step.batch, kv.blocks)?;
    op.layer(layer, kv)?;
    let rows = step.rows;
    let unit = kv.units * kv.head_dim;
    let group = (qkv.cols / unit.max(1)).saturating_sub(2);
    op.require(group > 0, || format!("qkv of {} columns has no query heads", qkv.cols))?;
    op.f32_matrix("qkv", qkv, rows, unit * (group + 2))?;
    op.f32_matrix("rope", rope, rows, kv.head_dim)?;
    op.matrix("q", q, rows, unit * group)?;
    // Threads write the slices side by side.
    let written = |s: &crate::Slice| s.blocks[s.start / BLOCK..(s.start + s.len).div_ceil(BLOCK)].to_vec();
    let mut blocks: Vec<u32> = step.batch.slices.iter().flat_map(written).collect();
    blocks.sort_unstable();
    op.require(blocks.windows(2).all(|pair| pair[0] != pair[1]), || "a block is written twice".into())?;
    Ok(group)
}

/// [`crate::Backend::attend`]: returns g, the query heads of a unit.
pub(crate) fn attend(step: &Step, q: Dims, layer: usize, kv: KvDims, out: Dims) -> Result<usize> {
    let op = Op("attend");
    op.rows(step)?;
    op.batch(&step.batch, kv.blocks)?;
    op.layer(layer, kv)?;
    let unit = kv.units * kv.head_dim;
    let group = q.cols / unit.max(1);
    op.require(group > 0, || format!("q of {} columns has no heads", q.cols))?;
    op.matrix("q", q, step.rows, unit * group)?;
    op.require(q.dtype == out.dtype, || "q and out are of several types".into())?;
    op.matrix("out", out, step.rows, unit * group)?;
    Ok(group)
}

/// [`crate::Backend::silu_mul`].
pub(crate) fn silu_mul(rows: usize, gate_up: Dims, widths: &[usize], out: Dims) -> Result<()> {
    let total: usize = widths.iter().sum();
    Op("silu_mul").f32_matrix("gate_up", gate_up, rows, 2 * total)?;
    Op("silu_mul").matrix("out", out, rows, total)
}

/// [`crate::Backend::gather_sampled`].
pub(crate) fn gather_sampled(step: &Step, x: Dims, out: Dims) -> Result<()> {
    let op = Op("gather_sampled");
    op.rows(step)?;
    op.require(x.dtype == out.dtype, || "x and out are of several types".into())?;
    op.require(x.rows >= step.rows, || format!("x has {} of {} rows", x.rows, step.rows))?;
    let stranger = step.sampled.iter().find(|sampled| sampled.row >= step.rows);
    op.require(stranger.is_none(), || format!("a sampled row past {}", step.rows))?;
    op.matrix("out", out, step.sampled_rows, x.cols)
}

/// [`crate::Backend::sample`].
pub(crate) fn sample(step: &Step, logits: Dims, chosen: Dims) -> Result<()> {
    let op = Op("sample");
    op.chosen(step, chosen)?;
    op.require(logits.cols > 0, || "no logits".into())?;
    op.f32_matrix("logits", logits, step.sampled_rows, logits.cols)
}

/// [`crate::Backend::keep`].
pub(crate) fn keep(step: &Step, chosen: Dims) -> Result<()> {
    Op("keep").chosen(step, chosen)
}
