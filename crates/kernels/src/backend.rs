//! The op set and what it works on.
//!
//! Shapes: T rows (tokens of a step), U local units, H/G local query/KV heads (G = U), g = H/G, d head dimension.
//! Activations are row-major. Matrix results, the residual stream and partial sums are f32 always; inputs of
//! matrices and attention ("compute" buffers) are of the compute dtype, f32 or bf16. Accumulation is f32.
//!
//! Contract on bits: a row of any result depends on that row's inputs alone, not on the number of rows, the
//! number of threads, the other slices of the batch, or which units this rank holds.

use std::ops::Range;

use crate::{Choice, Draw, QuantizedBlock, Tree};

/// Element type of activations, weights and KV at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// The upper half of an f32; conversions round to nearest even.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
        }
    }
}

/// Element type of a checkpoint's tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
}

impl SourceType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            SourceType::F32 => 4,
            SourceType::F16 | SourceType::Bf16 => 2,
        }
    }
}

/// Rows of a checkpoint's tensor as little-endian bytes, dense and row-major.
#[derive(Debug, Clone, Copy)]
pub struct RowBlock<'a> {
    /// `rows · cols` elements of `dtype`.
    pub bytes: &'a [u8],
    /// Their type.
    pub dtype: SourceType,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
}

/// What can go wrong below the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The device has too little memory.
    #[error("no memory for {what} ({bytes} bytes)")]
    OutOfMemory {
        /// What was to be allocated.
        what: &'static str,
        /// How much.
        bytes: usize,
    },
    /// Arguments whose sizes do not fit together.
    #[error("shapes do not fit in {op}: {detail}")]
    Shape {
        /// The op.
        op: &'static str,
        /// Which sizes.
        detail: String,
    },
    /// The device cannot do this at all.
    #[error("{0}")]
    Unsupported(String),
    /// The device failed: nothing on it can be relied on.
    #[error("the device failed in {what}: {why}")]
    Device {
        /// What was being done.
        what: String,
        /// The device's own words.
        why: String,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Tokens that a KV block holds.
pub const BLOCK_TOKENS: usize = 64;

/// Slots that backends keep a token for: as many sequences can be in flight.
pub const MAX_SLOTS: usize = 4096;

/// Steps that every backend takes before the choices of the first of them were asked for.
pub const MAX_STEPS_IN_FLIGHT: usize = 2;

/// Values of a chosen token in a buffer: the bits of its id, and its log-probability.
pub const CHOSEN_COLS: usize = 2;

/// The token of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// This one.
    Id(u32),
    /// The one that was last kept for this slot, below [`MAX_SLOTS`]; 0 if none was.
    LastSampled(u32),
}

/// One sequence's rows in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Position in its sequence of the first of these rows.
    pub start: usize,
    /// Rows; at least 1.
    pub len: usize,
    /// KV blocks that cover positions `0..start + len`.
    pub blocks: Vec<u32>,
}

/// How the rows of a step fall into sequences: slice after slice, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// The slices.
    pub slices: Vec<Slice>,
}

impl Batch {
    /// T.
    pub fn rows(&self) -> usize {
        self.slices.iter().map(|s| s.len).sum()
    }

    /// The position in its sequence of every row.
    pub fn positions(&self) -> impl Iterator<Item = usize> + '_ {
        self.slices.iter().flat_map(|s| s.start..s.start + s.len)
    }
}

/// One rank's share of a paged KV cache, but for the number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// KV heads.
    pub units: usize,
    /// Query heads that share one KV head.
    pub group: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Of keys and values.
    pub dtype: DType,
}

/// A row whose logits are wanted, and how to choose from them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampledRow {
    /// Row of the step.
    pub row: usize,
    /// The slot, below [`MAX_SLOTS`], that the id is kept for, if later steps may ask for it ([`Token::LastSampled`]). No two rows
    /// have the same.
    pub slot: Option<u32>,
    /// How to choose.
    pub draw: Draw,
}

/// What the ops of one step share, all of it known before the step runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The token of every row of the batch.
    pub tokens: Vec<Token>,
    /// How the rows fall into sequences.
    pub batch: Batch,
    /// Rows that are sampled from, ascending.
    pub sampled: Vec<SampledRow>,
    /// Rows that ops run on: those of the batch, then as many more as the backend finds convenient, which mean nothing.
    pub rows: usize,
    /// Likewise, of the sampled rows.
    pub sampled_rows: usize,
}

impl Step {
    /// A step of exactly the rows of the batch.
    pub fn new(tokens: Vec<Token>, batch: Batch, sampled: Vec<SampledRow>) -> Self {
        Self { rows: batch.rows(), sampled_rows: sampled.len(), tokens, batch, sampled }
    }

    /// Whether an id that it samples is kept.
    pub fn keeps(&self) -> bool {
        self.sampled.iter().any(|sampled| sampled.slot.is_some())
    }
}

/// The sum of a whole sub-tree of units: `[T, cols]` f32.
#[derive(Debug)]
pub struct Partial<B> {
    /// A sub-tree of the reduction tree (see [`Tree::subtrees`]).
    pub units: Range<usize>,
    /// Its sum.
    pub sum: B,
}

/// A buffer whose f32 contents are ordinary memory, so that collectives can send them.
pub trait HostBuffer {
    /// All elements, row-major; only for f32 buffers (`None` for any other dtype).
    fn as_f32(&self) -> Option<&[f32]>;
    /// Likewise, mutable.
    fn as_f32_mut(&mut self) -> Option<&mut [f32]>;
}

/// A device's memory and op set. One thread drives it; a CPU backend may fan out inside.
///
/// Every op works on the first `rows` rows (or `batch.rows()`), checks sizes, and writes all of its result.
pub trait Backend {
    /// Activations: a matrix `[capacity, cols]` of one dtype, zeroed when allocated.
    type Buffer;
    /// A weight `[n, k]` in the layout that the kernels want.
    type Matrix;
    /// A run of embedding rows.
    type Table;
    /// This rank's paged KV of all layers.
    type KvCache;

    /// The instruction path, for example `avx512-bf16`: part of a group's fingerprint, since bits differ by path.
    fn path(&self) -> &str;

    // ---- memory

    /// Allocates an activation buffer.
    fn buffer(&self, dtype: DType, rows: usize, cols: usize) -> Result<Self::Buffer>;
    /// Packs a weight: the blocks stacked on top of each other give `[n, k]`, all of the same k (even).
    /// Elements become `dtype`; bf16 sources may stay bf16 under f32, which is exact.
    fn matrix(&self, blocks: &[RowBlock<'_>], dtype: DType) -> Result<Self::Matrix>;
    /// Likewise of quantised blocks, all of the same k, bits and group size. A backend without kernels for them, as the CPU and the
    /// oracle, holds the matrix dequantised to `dtype`, which is what this does unless a backend does better.
    fn quantized_matrix(&self, blocks: &[QuantizedBlock<'_>], dtype: DType) -> Result<Self::Matrix> {
        crate::quantized::dequantized(blocks, dtype, |rows| self.matrix(rows, dtype))
    }
    /// The embedding rows of ids `first_id..first_id + block.rows`.
    fn table(&self, block: RowBlock<'_>, first_id: usize, dtype: DType) -> Result<Self::Table>;
    /// A vector (norm weights) as an f32 buffer `[1, cols]`.
    fn vector(&self, block: RowBlock<'_>) -> Result<Self::Buffer>;
    /// Bytes that a matrix takes, all of which a decode step reads.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize;
    /// A paged KV cache of `blocks` blocks. A backend serves one at a time: the steps that follow are for this one.
    fn kv_cache(&mut self, shape: KvShape, blocks: usize) -> Result<Self::KvCache>;
    /// Bytes that one block takes, all layers together.
    fn kv_block_bytes(&self, shape: KvShape) -> usize;
    /// Copies one row of an f32 buffer to the host, when all that was begun before has ended.
    fn read_row(&self, buffer: &Self::Buffer, row: usize) -> Result<Vec<f32>>;
    /// Waits until all that was begun has ended.
    fn wait(&self) -> Result<()> {
        Ok(())
    }
    /// Bytes that a KV cache may take where the user sets no limit: on a device of its own all that is left, on one that it shares with
    /// other programs no more than `enough`.
    fn kv_budget(&self, enough: u64) -> Result<u64>;
    /// Bytes that weights, activations and a KV cache may still take together.
    fn memory_budget(&self) -> Result<u64> {
        self.kv_budget(u64::MAX)
    }

    // ---- steps

    /// A step as this backend likes it: it may add rows that mean nothing.
    fn step(&self, tokens: Vec<Token>, batch: Batch, sampled: Vec<SampledRow>) -> Step {
        Step::new(tokens, batch, sampled)
    }
    /// The most rows that [`Backend::step`] makes of up to so many.
    fn padded_rows(&self, rows: usize) -> usize {
        rows
    }

    /// Runs the ops of a step, all of which are called in `body`, and returns when they are under way. Where `record` allows it, a GPU
    /// may record them and, for later steps of the same sizes, replay the record without calling `body`.
    fn run<E: From<Error>>(
        &mut self,
        _step: &Step,
        _record: bool,
        mut body: impl FnMut(&mut Self) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        body(self)
    }

    /// Forgets what [`Backend::run`] recorded: buffers that it used are gone, or other ops are to come.
    fn reset(&mut self) {}

    /// Forgets all steps, whose collective is gone: waits for what was begun, drops records and choices that nobody asked for. What
    /// steps used may be freed then, and others begin as on a backend that is new.
    ///
    /// # Errors
    /// [`Error::Device`] where the device failed meanwhile.
    fn settle(&mut self) -> Result<()>;

    // ---- ops

    /// `out[T, hidden]` f32 = the table's row of each token of the step, or zeros where the token is another rank's.
    fn embed(&mut self, step: &Step, table: &Self::Table, out: &mut Self::Buffer) -> Result<()>;

    /// `out = x / rms(x) · weight`, rms(x) = √(mean(x²) + eps); x f32 `[T, hidden]`, out compute `[T, hidden]`.
    fn rms_norm(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Buffer,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `residual += x`, then `out = rms_norm(residual)`.
    fn add_rms_norm(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        residual: &mut Self::Buffer,
        weight: &Self::Buffer,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out[T, Σn]` f32 = `x[T, k] · Wᵀ`, the weights' results side by side. Column-parallel matrices.
    fn linear(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weights: &[Self::Matrix],
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Row-parallel matrices: `x[T, Σk]` holds the inputs of the units' weights side by side; weight `i` belongs to
    /// unit `first_unit + i`. Each partial becomes the sum of its units' products `[T, n]`, added along `tree`.
    /// `partials` are `tree.subtrees(first_unit..first_unit + weights.len())`.
    fn linear_partials(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weights: &[Self::Matrix],
        first_unit: usize,
        tree: Tree,
        partials: &mut [Partial<Self::Buffer>],
    ) -> Result<()>;

    /// `out[T, d]` f32 = for every row of the batch, d/2 cosines then d/2 sines of `position · frequency[i]`; the
    /// angle and its functions in f64, rounded once.
    fn rope_table(&mut self, step: &Step, frequencies: &[f64], out: &mut Self::Buffer) -> Result<()>;

    /// Takes `qkv` f32 `[T, U·(g+2)·d]` (unit after unit: its g query heads, its key, its value), rotates queries
    /// and keys by halves (element i with i + d/2), writes keys and values into `layer` of the cache in the
    /// cache's dtype, and queries to `q`, compute `[T, U·g·d]`.
    fn rope_write_kv(
        &mut self,
        step: &Step,
        qkv: &Self::Buffer,
        rope: &Self::Buffer,
        layer: usize,
        kv: &mut Self::KvCache,
        q: &mut Self::Buffer,
    ) -> Result<()>;

    /// Causal attention of every row over its sequence's keys up to its own position, read from the cache as
    /// stored: softmax(q·kᵀ · scale)·v; `q` and `out` compute `[T, U·g·d]`. Keys are folded in fixed spans from a
    /// fresh state each, and spans merge in ascending order.
    fn attend(
        &mut self,
        step: &Step,
        q: &Self::Buffer,
        layer: usize,
        kv: &Self::KvCache,
        scale: f32,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `gate_up` f32 `[T, Σ 2·widths]` (unit after unit: its gate columns, then its up columns);
    /// `out` compute `[T, Σ widths]` = silu(gate) · up, silu(z) = z / (1 + e^−z).
    fn silu_mul(
        &mut self,
        rows: usize,
        gate_up: &Self::Buffer,
        widths: &[usize],
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out[i] = x[row of the step's i-th sampled row]`; both compute or both f32, of the same width.
    fn gather_sampled(&mut self, step: &Step, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;

    /// Begins to choose a token for each of the step's sampled rows from `logits`, f32 `[sampled rows, vocabulary]`, and keeps the ids of
    /// those that have a slot. `chosen`, f32 `[sampled rows, CHOSEN_COLS]`, gets the bits of each id, and its log-probability.
    fn sample(&mut self, step: &Step, logits: &Self::Buffer, chosen: &mut Self::Buffer) -> Result<()>;

    /// Keeps what another rank chose for this step, whose [`Backend::sample`] gave it `chosen`.
    fn keep(&mut self, step: &Step, chosen: &Self::Buffer) -> Result<()>;

    /// The choices of the oldest [`Backend::sample`] that was not asked for yet; waits for it.
    fn choices(&mut self) -> Result<Vec<Choice>>;

    /// Whether [`Backend::choices`] would not wait. Asked again and again while something is under way.
    fn choices_are_there(&mut self) -> Result<bool> {
        Ok(true)
    }
}
