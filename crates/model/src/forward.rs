//! The forward pass of Yi (LLaMA's architecture), written once over [`Backend`] and [`Collective`].
//!
//! Every rank runs the same sequence of ops on its own units; the partial sums of the embedding, `o_proj` and
//! `down_proj` meet in `tree_reduce`, and the logits of sampled rows are gathered on rank 0, which tells the others what it chose if
//! later steps may go on with that unseen. The residual stream and all sums are f32; what enters a matrix or attention is of the compute dtype.
//!
//! In a pipeline a stage runs its layers alone: it takes the residual stream from the stage in front and hands it on, in f32, so the
//! bits are those of one stage.

use std::ops::Range;

use comm::Collective;
use engine::{Unit, units};
use kernels::{Backend, Batch, CHOSEN_COLS, Choice, DType, KvShape, Partial, SampledRow, Step, Token, Tree};

use crate::config::Config;
use crate::error::Result;
use crate::source::StepSize;
use crate::stage::Stage;
use crate::weights::{Weights, ffn_width};

/// The rank, of the last stage, that gets the logits and samples.
pub const SAMPLING_RANK: usize = 0;

/// One rank of a model.
pub(crate) struct Model<B: Backend, C> {
    // Dropped first: other ranks must not wait for this one while it frees a device's memory.
    collective: C,
    stage: Stage<B::Buffer>,
    backend: B,
    weights: Weights<B>,
    kv: B::KvCache,
    dims: Dims,
    activations: Option<Activations<B>>,
}

/// How a model is laid out over a stage's ranks.
pub(crate) struct Layout<'a> {
    pub(crate) config: &'a Config,
    /// The units of every rank.
    pub(crate) ranges: &'a [Range<usize>],
    pub(crate) dtype: DType,
    /// If the activations of the largest step are to be taken at once.
    pub(crate) largest_step: Option<StepSize>,
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

/// Buffers for steps of up to `size`, reused by every step and layer.
struct Activations<B: Backend> {
    size: StepSize,
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
    /// In the last stage.
    last: Option<LastActivations<B>>,
}

/// Of rows that are sampled from.
struct LastActivations<B: Backend> {
    residual: B::Buffer,
    reduced: B::Buffer,
    logits: B::Buffer,
    all_logits: B::Buffer,
    /// What was chosen from them.
    chosen: B::Buffer,
}

impl<B: Backend, C: Collective<B::Buffer>> Model<B, C> {
    /// Activations for the largest step (if given; larger ones take more later) are taken before `kv` sizes the KV cache by what is
    /// left.
    pub(crate) fn new(
        mut backend: B,
        collective: C,
        mut stage: Stage<B::Buffer>,
        weights: Weights<B>,
        layout: &Layout<'_>,
        kv: impl FnOnce(&mut B) -> Result<B::KvCache>,
    ) -> Result<Self> {
        let dims = Dims::new(layout.config, layout.ranges, collective.rank(), layout.dtype);
        let last = stage.is_last();
        let padded = |StepSize { rows, sampled }| StepSize {
            rows: backend.padded_rows(rows),
            sampled: backend.padded_rows(sampled),
        };
        let size = layout.largest_step.map(padded);
        let activations = size.map(|size| Activations::allocate(&backend, &dims, size, last)).transpose()?;
        if let Some(size) = size {
            stage.link.reserve(size.rows * dims.hidden)?;
        }
        let kv = kv(&mut backend)?;
        Ok(Self { collective, stage, backend, weights, kv, dims, activations })
    }

    /// A step of `batch`, of which some rows are sampled.
    pub(crate) fn step(&self, tokens: Vec<Token>, batch: Batch, sampled: Vec<SampledRow>) -> Step {
        self.backend.step(tokens, batch, sampled)
    }

    /// Begins a step: fills the KV cache for all its rows and, on the sampling rank, chooses tokens for its sampled rows; all ranks keep
    /// those that later steps may ask for. Steps before it may still run.
    pub(crate) fn begin(&mut self, step: &Step) -> Result<()> {
        self.receive(step)?;
        self.collective.begin_step()?;
        let Self { collective, backend, weights, kv, dims, activations, .. } = self;
        let Some(a) = activations else { return Ok(()) };
        backend.run(step, collective.can_be_recorded(), |backend| {
            forward(backend, collective, weights, kv, dims, a, step)?;
            choose(backend, collective, a, step)
        })?;
        self.send(step)
    }

    /// Makes room for a step and, behind the first stage, waits for the residual stream as the stage in front left it.
    fn receive(&mut self, step: &Step) -> Result<()> {
        self.reserve(StepSize { rows: step.rows, sampled: step.sampled_rows })?;
        let Some(a) = self.activations.as_mut().filter(|_| !self.stage.is_first()) else { return Ok(()) };
        Ok(self.stage.link.receive(step.batch.rows() * self.dims.hidden, &mut a.residual)?)
    }

    /// Hands the residual stream to the next stage, when it is known to be a result.
    fn send(&mut self, step: &Step) -> Result<()> {
        let Some(a) = self.activations.as_ref().filter(|_| self.stage.link.sends()) else { return Ok(()) };
        self.backend.wait()?;
        self.collective.check()?;
        Ok(self.stage.link.send(step.batch.rows() * self.dims.hidden, &a.residual)?)
    }

    /// The choices of the oldest step that began and was not asked about; nothing on ranks that do not sample.
    pub(crate) fn choices(&mut self) -> Result<Vec<Choice>> {
        let choices = self.backend.choices()?;
        self.collective.check()?;
        Ok(choices)
    }

    /// Whether [`Self::choices`] would not wait.
    pub(crate) fn choices_are_there(&mut self) -> Result<bool> {
        if self.backend.choices_are_there()? {
            return Ok(true);
        }
        // Nobody waits in the backend, where the collective would look after the other ranks.
        self.collective.check()?;
        Ok(false)
    }

    /// Runs a step. On the sampling rank, returns for each sampled row the logits over the whole vocabulary; elsewhere nothing.
    pub(crate) fn logits(&mut self, step: &Step) -> Result<Vec<Vec<f32>>> {
        self.receive(step)?;
        let Self { collective, backend, weights, kv, dims, activations, .. } = self;
        let Some(a) = activations else { return Ok(Vec::new()) };
        // These ops are not those of `begin`.
        backend.reset();
        backend.run(step, false, |backend| forward(backend, collective, weights, kv, dims, a, step))?;
        backend.reset();
        self.send(step)?;
        let Self { collective, backend, activations, .. } = self;
        let last = activations.as_ref().and_then(|a| a.last.as_ref());
        let Some(last) = last.filter(|_| collective.rank() == SAMPLING_RANK) else { return Ok(Vec::new()) };
        let rows = 0..step.sampled.len();
        let logits = rows.map(|row| Ok(backend.read_row(&last.all_logits, row)?)).collect::<Result<_>>()?;
        collective.check()?;
        Ok(logits)
    }

    /// Makes room for steps of up to `size`.
    fn reserve(&mut self, size: StepSize) -> Result<()> {
        let had = self.activations.as_ref().map(|a| a.size);
        if had.is_none_or(|had| had.rows < size.rows || had.sampled < size.sampled) {
            self.backend.reset();
            let size = StepSize {
                rows: had.map_or(0, |had| had.rows).max(size.rows),
                // Batches grow one by one, and memory must not move while ranks wait for each other in a step.
                sampled: had.map_or(0, |had| had.sampled).max(size.sampled.next_power_of_two().max(64)),
            };
            // Released before the larger ones are taken, so that both need not fit.
            self.activations = None;
            self.activations =
                Some(Activations::allocate(&self.backend, &self.dims, size, self.stage.is_last())?);
            self.stage.link.reserve(size.rows * self.dims.hidden)?;
        }
        Ok(())
    }

    /// Replaces the KV cache by one of `blocks` blocks of zeros. Where there is no room for it, one block is left.
    pub(crate) fn resize_kv(&mut self, shape: KvShape, blocks: usize) -> Result<()> {
        // The old one goes before the new one comes, so that both need not fit.
        self.kv = self.backend.kv_cache(shape, 1)?;
        if blocks > 1 {
            self.kv = self.backend.kv_cache(shape, blocks)?;
        }
        Ok(())
    }

    /// Bytes of weights that a decode step reads.
    pub(crate) fn step_bytes(&self) -> usize {
        self.weights.step_bytes(&self.backend)
    }

    pub(crate) fn samples(&self) -> bool {
        self.stage.is_last() && self.collective.rank() == SAMPLING_RANK
    }

    pub(crate) fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Leaves the group: what is left is the backend with the weights.
    ///
    /// # Errors
    /// As [`Backend::settle`]; then nothing is left.
    pub(crate) fn leave(self) -> Result<(B, Weights<B>)> {
        let Self { collective, stage, mut backend, weights, .. } = self;
        // What waits on the device for others ends with it.
        drop((collective, stage));
        backend.settle()?;
        Ok((backend, weights))
    }
}

/// The ops of a step, in order. In the first stage the residual stream begins with the embedding. In the last one the logits of the
/// sampled rows are then in `all_logits` of the sampling rank; elsewhere the residual stream is complete.
fn forward<B: Backend, C: Collective<B::Buffer>>(
    backend: &mut B,
    collective: &mut C,
    weights: &Weights<B>,
    kv: &mut B::KvCache,
    dims: &Dims,
    a: &mut Activations<B>,
    step: &Step,
) -> Result<()> {
    let rows = step.rows;
    let (tree, first_unit, len) = (dims.tree, dims.held.start, rows * dims.hidden);
    let scale = 1.0 / (dims.head_dim as f32).sqrt();

    backend.rope_table(step, &dims.frequencies, &mut a.rope)?;
    match (&weights.embedding[..], collective.size()) {
        ([], _) => {}
        // Not by a swap: other stages look for the residual stream where it was when the step was recorded.
        ([whole], 1) => backend.embed(step, whole, &mut a.residual)?,
        (tables, _) => {
            for (table, partial) in tables.iter().zip(&mut a.partials) {
                backend.embed(step, table, &mut partial.sum)?;
            }
            collective.tree_reduce(tree, len, &a.partials, &mut a.residual)?;
        }
    }

    for (index, layer) in weights.layers.iter().enumerate() {
        let norm = &layer.attention_norm;
        if index == 0 {
            backend.rms_norm(rows, &a.residual, norm, dims.eps, &mut a.normed)?;
        } else {
            backend.add_rms_norm(rows, &a.reduced, &mut a.residual, norm, dims.eps, &mut a.normed)?;
        }
        backend.linear(rows, &a.normed, &layer.qkv, &mut a.qkv)?;
        backend.rope_write_kv(step, &a.qkv, &a.rope, index, kv, &mut a.q)?;
        backend.attend(step, &a.q, index, kv, scale, &mut a.attended)?;
        backend.linear_partials(rows, &a.attended, &layer.o, first_unit, tree, &mut a.partials)?;
        add_partials(collective, tree, len, &mut a.partials, &mut a.reduced)?;

        let norm = &layer.ffn_norm;
        backend.add_rms_norm(rows, &a.reduced, &mut a.residual, norm, dims.eps, &mut a.normed)?;
        backend.linear(rows, &a.normed, &layer.gate_up, &mut a.gate_up)?;
        backend.silu_mul(rows, &a.gate_up, &dims.ffn_widths, &mut a.activated)?;
        backend.linear_partials(rows, &a.activated, &layer.down, first_unit, tree, &mut a.partials)?;
        add_partials(collective, tree, len, &mut a.partials, &mut a.reduced)?;
    }

    let (Some(head), Some(last)) = (&weights.last, &mut a.last) else {
        // The sum is what the next stage needs; its norm, by whatever weights, is not.
        if let Some(layer) = weights.layers.last() {
            let norm = &layer.ffn_norm;
            backend.add_rms_norm(rows, &a.reduced, &mut a.residual, norm, dims.eps, &mut a.normed)?;
        }
        return Ok(());
    };
    if step.sampled.is_empty() {
        return Ok(());
    }
    let count = step.sampled_rows;
    backend.gather_sampled(step, &a.residual, &mut last.residual)?;
    backend.gather_sampled(step, &a.reduced, &mut last.reduced)?;
    let (x, residual) = (&last.reduced, &mut last.residual);
    backend.add_rms_norm(count, x, residual, &head.norm, dims.eps, &mut a.normed)?;
    backend.linear(count, &a.normed, &head.head, &mut last.logits)?;
    collective.gather(SAMPLING_RANK, count, &last.logits, &dims.vocab_counts, &mut last.all_logits)?;
    Ok(())
}

/// The sum of all units' partial sums, in `out`. A rank that holds the whole tree has it already: the buffers only change places.
fn add_partials<B, C: Collective<B>>(
    collective: &mut C,
    tree: Tree,
    len: usize,
    partials: &mut [Partial<B>],
    out: &mut B,
) -> Result<()> {
    if let ([whole], 1) = (&mut *partials, collective.size()) {
        std::mem::swap(&mut whole.sum, out);
        return Ok(());
    }
    Ok(collective.tree_reduce(tree, len, partials, out)?)
}

/// Samples from `all_logits` in the last stage, and has all its ranks keep what later steps may ask for.
fn choose<B: Backend, C: Collective<B::Buffer>>(
    backend: &mut B,
    collective: &mut C,
    a: &mut Activations<B>,
    step: &Step,
) -> Result<()> {
    let Some(last) = a.last.as_mut().filter(|_| !step.sampled.is_empty()) else { return Ok(()) };
    let samples = collective.rank() == SAMPLING_RANK;
    if samples {
        backend.sample(step, &last.all_logits, &mut last.chosen)?;
    }
    if step.keeps() && collective.size() > 1 {
        collective.broadcast(SAMPLING_RANK, step.sampled_rows * CHOSEN_COLS, &mut last.chosen)?;
        if !samples {
            backend.keep(step, &last.chosen)?;
        }
    }
    Ok(())
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
    fn allocate(backend: &B, dims: &Dims, size: StepSize, is_last: bool) -> Result<Self> {
        let StepSize { rows, sampled } = size;
        let f32 = |cols| backend.buffer(DType::F32, rows, cols);
        let compute = |cols| backend.buffer(dims.dtype, rows, cols);
        let ffn: usize = dims.ffn_widths.iter().sum();
        Ok(Self {
            size,
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
            last: if is_last { Some(LastActivations::allocate(backend, dims, sampled)?) } else { None },
        })
    }
}

impl<B: Backend> LastActivations<B> {
    fn allocate(backend: &B, dims: &Dims, rows: usize) -> Result<Self> {
        let f32 = |cols| backend.buffer(DType::F32, rows, cols);
        Ok(Self {
            residual: f32(dims.hidden)?,
            reduced: f32(dims.hidden)?,
            logits: f32(dims.vocab_counts[dims.rank])?,
            all_logits: f32(dims.vocab_counts.iter().sum())?,
            chosen: f32(CHOSEN_COLS)?,
        })
    }
}
