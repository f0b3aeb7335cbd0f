//! The forward pass of Yi (LLaMA's architecture), written once over [`Backend`] and [`Collective`].
//!
//! Every rank runs the same sequence of ops on its own units; the partial sums of the embedding, `o_proj` and
//! `down_proj` meet in `tree_reduce`, and the logits of sampled rows are gathered on rank 0. The residual stream and all
//! sums are f32; what enters a matrix or attention is of the compute dtype.

use std::ops::Range;

use comm::Collective;
use engine::{Unit, units};
use kernels::{Backend, Batch, DType, Partial, Tree};

use crate::config::Config;
use crate::error::Result;
use crate::weights::{Weights, ffn_width};

/// The rank that gets the logits and samples.
pub const SAMPLING_RANK: usize = 0;

/// One rank of a model.
pub(crate) struct Model<B: Backend, C> {
    backend: B,
    collective: C,
    weights: Weights<B>,
    kv: B::KvCache,
    dims: Dims,
    activations: Option<Activations<B>>,
}

/// What the forward pass needs to know of the config and of this rank's share.
struct Dims {
    hidden: usize,
    head_dim: usize,
    eps: f32,
    /// θ^(−2i/d) for i in 0..d/2.
    frequencies: Vec<f64>,
    dtype: DType,
    tree: Tree,
    rank: usize,
    held: Range<usize>,
    qkv_cols: usize,
    head_cols: usize,
    ffn_widths: Vec<usize>,
    /// Vocabulary rows of every rank.
    vocab_counts: Vec<usize>,
}

/// Buffers for up to `rows` rows, reused by every step and layer.
struct Activations<B: Backend> {
    rows: usize,
    /// The residual stream.
    residual: B::Buffer,
    /// What the last reduction gave, not yet added to the residual.
    reduced: B::Buffer,
    partials: Vec<Partial<B::Buffer>>,
    normed: B::Buffer,
    rope: B::Buffer,
    qkv: B::Buffer,
    q: B::Buffer,
    attended: B::Buffer,
    gate_up: B::Buffer,
    activated: B::Buffer,
    /// Rows that are sampled from.
    last_residual: B::Buffer,
    last_reduced: B::Buffer,
    logits: B::Buffer,
    all_logits: B::Buffer,
}

impl<B: Backend, C: Collective<B::Buffer>> Model<B, C> {
    /// `ranges`: the units of every rank of the group.
    pub(crate) fn new(
        backend: B,
        collective: C,
        config: &Config,
        weights: Weights<B>,
        kv: B::KvCache,
        ranges: &[Range<usize>],
        dtype: DType,
    ) -> Self {
        let dims = Dims::new(config, ranges, collective.rank(), dtype);
        Self { backend, collective, weights, kv, dims, activations: None }
    }

    /// Runs a step: fills the KV cache for all its rows. On the sampling rank, returns for each row of `sampled` (ascending) the
    /// logits over the whole vocabulary; elsewhere nothing.
    pub(crate) fn step(&mut self, ids: &[u32], batch: &Batch, sampled: &[usize]) -> Result<Vec<Vec<f32>>> {
        let rows = batch.rows();
        if self.activations.as_ref().is_none_or(|a| a.rows < rows) {
            // Released before the larger ones are taken, so that both need not fit.
            self.activations = None;
            self.activations = Some(Activations::allocate(&self.backend, &self.dims, rows)?);
        }
        let Self { backend, collective, weights, kv, dims, activations } = self;
        let Some(a) = activations else { return Ok(Vec::new()) };
        let (tree, first_unit, len) = (dims.tree, dims.held.start, rows * dims.hidden);
        let scale = 1.0 / (dims.head_dim as f32).sqrt();

        backend.rope_table(batch, &dims.frequencies, &mut a.rope)?;
        for (table, partial) in weights.embedding.iter().zip(&mut a.partials) {
            backend.embed(ids, table, &mut partial.sum)?;
        }
        collective.tree_reduce(tree, len, &a.partials, &mut a.residual)?;

        for (index, layer) in weights.layers.iter().enumerate() {
            if index == 0 {
                backend.rms_norm(rows, &a.residual, &layer.attention_norm, dims.eps, &mut a.normed)?;
            } else {
                let norm = &layer.attention_norm;
                backend.add_rms_norm(rows, &a.reduced, &mut a.residual, norm, dims.eps, &mut a.normed)?;
            }
            backend.linear(rows, &a.normed, &layer.qkv, &mut a.qkv)?;
            backend.rope_write_kv(batch, &a.qkv, &a.rope, index, kv, &mut a.q)?;
            backend.attend(batch, &a.q, index, kv, scale, &mut a.attended)?;
            backend.linear_partials(rows, &a.attended, &layer.o, first_unit, tree, &mut a.partials)?;
            collective.tree_reduce(tree, len, &a.partials, &mut a.reduced)?;

            backend.add_rms_norm(
                rows,
                &a.reduced,
                &mut a.residual,
                &layer.ffn_norm,
                dims.eps,
                &mut a.normed,
            )?;
            backend.linear(rows, &a.normed, &layer.gate_up, &mut a.gate_up)?;
            backend.silu_mul(rows, &a.gate_up, &dims.ffn_widths, &mut a.activated)?;
            backend.linear_partials(rows, &a.activated, &layer.down, first_unit, tree, &mut a.partials)?;
            collective.tree_reduce(tree, len, &a.partials, &mut a.reduced)?;
        }

        if sampled.is_empty() {
            return Ok(Vec::new());
        }
        let count = sampled.len();
        backend.gather_rows(&a.residual, sampled, &mut a.last_residual)?;
        backend.gather_rows(&a.reduced, sampled, &mut a.last_reduced)?;
        backend.add_rms_norm(
            count,
            &a.last_reduced,
            &mut a.last_residual,
            &weights.norm,
            dims.eps,
            &mut a.normed,
        )?;
        backend.linear(count, &a.normed, &weights.head, &mut a.logits)?;
        collective.gather(SAMPLING_RANK, count, &a.logits, &dims.vocab_counts, &mut a.all_logits)?;
        if collective.rank() != SAMPLING_RANK {
            return Ok(Vec::new());
        }
        (0..count).map(|row| Ok(backend.read_row(&a.all_logits, row)?)).collect()
    }

    /// Bytes of weights that a decode step reads.
    pub(crate) fn step_bytes(&self) -> usize {
        self.weights.step_bytes(&self.backend)
    }

    pub(crate) fn samples(&self) -> bool {
        self.collective.rank() == SAMPLING_RANK
    }

    pub(crate) fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }
}

impl Dims {
    fn new(config: &Config, ranges: &[Range<usize>], rank: usize, dtype: DType) -> Self {
        let shape = &config.shape;
        let all = units(shape);
        let held = ranges[rank].clone();
        let own = &all[held.clone()];
        let vocab = |units: &[Unit]| units.iter().map(|u| u.vocab.len()).sum::<usize>();
        let d = shape.head_dim;
        Self {
            hidden: shape.hidden,
            head_dim: d,
            eps: config.rms_norm_eps as f32,
            frequencies: (0..d / 2)
                .map(|i| libm::pow(config.rope_theta, -2.0 * i as f64 / d as f64))
                .collect(),
            dtype,
            tree: Tree { units: all.len() },
            rank,
            qkv_cols: own.len() * (shape.group() + 2) * d,
            head_cols: own.len() * shape.group() * d,
            ffn_widths: own.iter().map(ffn_width).collect(),
            vocab_counts: ranges.iter().map(|range| vocab(&all[range.clone()])).collect(),
            held,
        }
    }
}

impl<B: Backend> Activations<B> {
    fn allocate(backend: &B, dims: &Dims, rows: usize) -> Result<Self> {
        let f32 = |cols| backend.buffer(DType::F32, rows, cols);
        let compute = |cols| backend.buffer(dims.dtype, rows, cols);
        let ffn: usize = dims.ffn_widths.iter().sum();
        let own_vocab = dims.vocab_counts[dims.rank];
        Ok(Self {
            rows,
            residual: f32(dims.hidden)?,
            reduced: f32(dims.hidden)?,
            partials: dims
                .tree
                .subtrees(&dims.held)
                .into_iter()
                .map(|units| Ok(Partial { units, sum: f32(dims.hidden)? }))
                .collect::<Result<_>>()?,
            normed: compute(dims.hidden)?,
            rope: f32(dims.head_dim)?,
            qkv: f32(dims.qkv_cols)?,
            q: compute(dims.head_cols)?,
            attended: compute(dims.head_cols)?,
            gate_up: f32(2 * ffn)?,
            activated: compute(ffn)?,
            last_residual: f32(dims.hidden)?,
            last_reduced: f32(dims.hidden)?,
            logits: f32(own_vocab)?,
            all_logits: f32(dims.vocab_counts.iter().sum())?,
        })
    }
}
