//! The CUDA backend: kernels of our own, compiled at start-up, on one GPU that one thread drives.
//!
//! Activations and weights are bf16, sums and the residual stream f32. Each op is a `.cu` file next to the Rust that launches it.
//! A step's plan is sent once (`step`, `transfer`); decoding steps are recorded as CUDA graphs (`record`). Under
//! `deterministic` every product is by our kernels, which sum in one order for any number of rows; else cuBLASLt does the wide ones.

mod arch;
mod attend;
mod blas;
mod buffer;
mod cache;
mod device;
mod elementwise;
mod fold;
mod limits;
mod linear;
mod matrix;
mod memory;
mod modules;
mod nccl;
mod nvrtc;
mod one_shot;
mod record;
mod rope;
mod sample;
mod shared;
mod sources;
mod stage;
mod step;
mod transfer;
mod usage;

use std::cell::RefCell;
use std::rc::Rc;

pub use self::arch::Arch;
pub use self::buffer::{Buffer, KvCache, Table};
pub use self::limits::violations;
pub use self::matrix::Matrix;
pub use self::modules::{CACHE_VARIABLE, KERNELS_VARIABLE, Loaded, Module, Origin, Store, load};
pub use self::nccl::{Communicator, NcclId};
pub use self::nvrtc::{CompileError, Nvrtc, Version};
pub use self::one_shot::OneShot;
pub use self::shared::{Board, MAX_RANKS, Mailbox, Missed};
pub use self::sources::{HEADERS, SOURCES, Source};
pub use self::stage::{Stage, copy_alone, reduce_alone};
pub use self::usage::KernelUsage;

use self::blas::Blas;
use self::device::Device;
use self::linear::Products;
use self::memory::{Arena, Scratch};
use self::record::{Course, Record, Records};
use self::step::Plan;
use self::transfer::{Choices, MAX_SAMPLED, Words};
use crate::shape::{self, Dims, KvDims};
use crate::{
    Backend, Batch, Choice, CudaOptions, DType, Error, KvShape, Partial, Result, RowBlock, SampledRow, Step,
    Tree,
};

/// Weights are put into allocations of this size, so that few bytes are lost to the driver's pages.
const ARENA_CHUNK_BYTES: usize = 256 << 20;
/// What the driver, graphs and work space take beyond what is accounted for.
const RESERVE_BYTES: u64 = 512 << 20;

/// GPUs of this machine, at least one.
pub(crate) fn count() -> Result<usize> {
    Device::count()
}

/// One GPU.
pub struct Cuda {
    device: Rc<Device>,
    options: CudaOptions,
    path: String,
    arena: Arena,
    /// Where weights lie as the checkpoint has them before they are packed.
    staging: RefCell<Scratch>,
    blas: Option<Blas>,
    /// Query heads of a unit, which decide how a step is cut into work, and blocks of the cache.
    group: usize,
    kv_blocks: usize,
    words: Words,
    choices: Choices,
    /// The step that ops are called for.
    plan: Option<Plan>,
    /// Whether they chose tokens.
    samples: bool,
    records: Records,
    /// Sums of units, and partial results of attention.
    products: Scratch,
    attention: RefCell<Scratch>,
    /// Spans of keys that the second has room for in any recorded step.
    recorded_spans: usize,
    frequencies: rope::Frequencies,
}

impl Cuda {
    /// Opens a GPU and loads its kernels, which are compiled first where that was not done before.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where a library or a GPU is missing or too old: in a sentence for users.
    pub fn open(options: CudaOptions) -> Result<Self> {
        Self::with_kernels(options, &Store::from_env())
    }

    /// Likewise, with kernels kept elsewhere.
    ///
    /// # Errors
    /// As [`Cuda::open`].
    pub fn with_kernels(options: CudaOptions, store: &Store) -> Result<Self> {
        let device = Device::open(options.ordinal)?;
        let (major, minor) = device.capability()?;
        let arch = Arch::for_device(major, minor)?;
        let loaded = load(store, arch, &|_| {}).map_err(|error| Error::Unsupported(error.to_string()))?;
        for module in &loaded.modules {
            device.load(&module.image)?;
        }
        let blas = if options.deterministic { None } else { Some(Blas::open(&device)?) };
        let kind = if options.deterministic { "-deterministic" } else { "" };
        let chunk = if options.separate_allocations { 0 } else { ARENA_CHUNK_BYTES };
        Ok(Self {
            path: format!("cuda-{arch}{kind}"),
            arena: Arena::new(&device, chunk)?,
            staging: RefCell::new(Scratch::new(&device)),
            blas,
            group: 1,
            kv_blocks: usize::MAX,
            words: Words::new(&device)?,
            choices: Choices::new(&device)?,
            plan: None,
            samples: false,
            records: Records::default(),
            products: Scratch::new(&device),
            attention: RefCell::new(Scratch::new(&device)),
            recorded_spans: 0,
            frequencies: rope::Frequencies::default(),
            device,
            options,
        })
    }

    /// The GPU's name, as its maker gave it.
    pub fn name(&self) -> Result<String> {
        self.device.name()
    }

    /// Bytes of the GPU's memory that are free, and that there are.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.device.memory()
    }

    /// Waits until everything that was begun has ended.
    pub fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    /// From now on calls `look` again and again while this thread waits for the GPU: a rank that waits for others looks there
    /// after those that could keep it waiting for ever.
    pub fn while_waiting(&self, look: impl FnMut() + 'static) {
        self.device.while_waiting(Box::new(look));
    }

    pub(crate) fn device(&self) -> &Rc<Device> {
        &self.device
    }

    fn products(&mut self) -> Products<'_> {
        Products { device: &self.device, scratch: &mut self.products }
    }

    /// The plan of the step that runs.
    fn plan(&self, op: &'static str, step: &Step) -> Result<&Plan> {
        match &self.plan {
            Some(plan) if plan.sizes.rows == step.rows && plan.sizes.sampled == step.sampled_rows => Ok(plan),
            _ => Err(Error::Shape { op, detail: "called outside of the step's run".into() }),
        }
    }

    /// Where a part of the running step's words lies on the device.
    fn word(&self, part: usize) -> u64 {
        self.words.pointer() + 4 * part as u64
    }

    /// Records the ops that `body` calls.
    fn record<E: From<Error>>(
        &mut self,
        body: &mut impl FnMut(&mut Self) -> std::result::Result<(), E>,
    ) -> std::result::Result<Record, E> {
        record::begin(&self.device)?;
        let called = body(self);
        let graph = record::end(&self.device);
        called?;
        Ok(Record::new(graph?, std::mem::take(&mut self.samples)))
    }
}

/// Activations and KV are bf16, or results in f32.
fn bf16_only(dtype: DType, what: &str) -> Result<()> {
    if dtype == DType::Bf16 {
        return Ok(());
    }
    Err(Error::Unsupported(format!("on a GPU {what} is bf16: run with --dtype bf16, or on the CPU")))
}

impl Backend for Cuda {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Table = Table;
    type KvCache = KvCache;

    fn path(&self) -> &str {
        &self.path
    }

    fn buffer(&self, dtype: DType, rows: usize, cols: usize) -> Result<Buffer> {
        Buffer::zeroed(&self.device, Dims { dtype, rows, cols })
    }

    fn matrix(&self, blocks: &[RowBlock<'_>], dtype: DType) -> Result<Matrix> {
        bf16_only(dtype, "a weight")?;
        let (n, k) = shape::weight(blocks)?;
        Matrix::upload(&self.arena, &self.staging, blocks, n, k)
    }

    fn table(&self, block: RowBlock<'_>, first_id: usize, dtype: DType) -> Result<Table> {
        bf16_only(dtype, "the embedding")?;
        shape::source("table", &block)?;
        let mut bytes = Vec::with_capacity(block.rows * block.cols * 2);
        matrix::append_bf16(block.bytes, block.dtype, &mut bytes);
        let rows = self.arena.upload("the embedding", &bytes)?;
        Ok(Table { rows, count: block.rows, cols: block.cols, first_id })
    }

    fn vector(&self, block: RowBlock<'_>) -> Result<Buffer> {
        shape::source("vector", &block)?;
        let values = matrix::widen(block.bytes, block.dtype);
        let mut vector = self.buffer(DType::F32, 1, values.len())?;
        vector.write(&values)?;
        Ok(vector)
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes
    }

    fn kv_cache(&mut self, shape: KvShape, blocks: usize) -> Result<KvCache> {
        shape::kv_cache(shape.head_dim)?;
        bf16_only(shape.dtype, "the KV cache")?;
        attend::check(shape)?;
        let kv = KvCache::zeroed(&self.device, KvDims::new(shape, blocks))?;
        self.reset();
        (self.group, self.kv_blocks) = (shape.group, blocks);
        // Weights are there: what they were packed from is not needed any more.
        self.staging = RefCell::new(Scratch::new(&self.device));
        // Recorded steps keep the address of this memory, so it is taken for the longest contexts that the cache can hold.
        self.recorded_spans = attend::recorded_spans(blocks);
        self.attention.get_mut().reserve(attend::scratch_bytes(shape, self.recorded_spans, shape.group))?;
        Ok(kv)
    }

    fn kv_block_bytes(&self, shape: KvShape) -> usize {
        buffer::kv_block_bytes(KvDims::new(shape, 1))
    }

    fn read_row(&self, buffer: &Buffer, row: usize) -> Result<Vec<f32>> {
        shape::read_row(buffer.dims(), row)?;
        buffer.row(row)
    }

    fn kv_budget(&self) -> Result<u64> {
        let (free, total) = self.device.memory()?;
        let allowed = (total as f64 * self.options.memory_utilization) as u64;
        Ok(allowed.saturating_sub(total - free).saturating_sub(RESERVE_BYTES))
    }

    fn step(&self, ids: Vec<u32>, batch: Batch, sampled: Vec<SampledRow>) -> Step {
        let decodes = step::decodes(&batch.slices, sampled.len());
        let exact = Step::new(ids, batch, sampled);
        if !decodes {
            return exact;
        }
        let rows = step::bucket(exact.rows);
        Step { rows, sampled_rows: rows, ..exact }
    }

    fn run<E: From<Error>>(
        &mut self,
        step: &Step,
        record: bool,
        mut body: impl FnMut(&mut Self) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        shape::step(step, self.kv_blocks)?;
        let plan = Plan::new(step, self.group);
        if self.words.send(&plan.words)? {
            self.records.clear();
        }
        let recordable = record && plan.decodes && plan.spans <= self.recorded_spans;
        let sizes = plan.sizes;
        self.plan = Some(plan);
        self.samples = false;
        let course = if recordable { self.records.course(sizes) } else { Course::Run };
        let samples = match course {
            Course::Run => {
                body(self)?;
                // Work space that moved is not where earlier records have it.
                if self.products.take_moved() | self.attention.get_mut().take_moved() {
                    self.records.clear();
                }
                std::mem::take(&mut self.samples)
            }
            Course::Record => {
                let record = self.record(&mut body)?;
                self.records.keep(sizes, record);
                self.records.replay(sizes)?.is_some_and(|record| record.samples)
            }
            Course::Replay => self.records.replay(sizes)?.is_some_and(|record| record.samples),
        };
        if samples {
            self.choices.fetch(step.sampled.len())?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.records.clear();
    }

    fn embed(&mut self, step: &Step, table: &Table, out: &mut Buffer) -> Result<()> {
        shape::embed(step, table.cols, out.dims())?;
        let ids = self.word(self.plan("embed", step)?.parts.ids);
        elementwise::embed(&self.device, step.rows, ids, table, out)
    }

    fn rms_norm(
        &mut self,
        rows: usize,
        x: &Buffer,
        weight: &Buffer,
        eps: f32,
        out: &mut Buffer,
    ) -> Result<()> {
        shape::rms_norm(rows, x.dims(), None, weight.dims(), out.dims())?;
        bf16_only(out.dims().dtype, "a norm's result")?;
        elementwise::rms_norm(&self.device, rows, x, weight, eps, out)
    }

    fn add_rms_norm(
        &mut self,
        rows: usize,
        x: &Buffer,
        residual: &mut Buffer,
        weight: &Buffer,
        eps: f32,
        out: &mut Buffer,
    ) -> Result<()> {
        shape::rms_norm(rows, x.dims(), Some(residual.dims()), weight.dims(), out.dims())?;
        bf16_only(out.dims().dtype, "a norm's result")?;
        elementwise::add_rms_norm(&self.device, rows, x, residual, weight, eps, out)
    }

    fn linear(&mut self, rows: usize, x: &Buffer, weights: &[Matrix], out: &mut Buffer) -> Result<()> {
        shape::linear(rows, x.dims(), weights.iter().map(|w| (w.n, w.k)), out.dims())?;
        linear::check(x)?;
        self.products().column_parallel(rows, x, weights, out)
    }

    fn linear_partials(
        &mut self,
        rows: usize,
        x: &Buffer,
        weights: &[Matrix],
        first_unit: usize,
        tree: Tree,
        partials: &mut [Partial<Buffer>],
    ) -> Result<()> {
        let sizes: Vec<_> = weights.iter().map(|w| (w.n, w.k)).collect();
        let places: Vec<_> = partials.iter().map(|p| (p.units.clone(), p.sum.dims())).collect();
        shape::linear_partials(rows, x.dims(), &sizes, first_unit, tree, &places)?;
        linear::check(x)?;
        let subtrees: Vec<_> = partials.iter().map(|p| (p.units.clone(), p.sum.pointer())).collect();
        self.products().row_parallel(rows, x, weights, &subtrees, first_unit)
    }

    fn rope_table(&mut self, step: &Step, frequencies: &[f64], out: &mut Buffer) -> Result<()> {
        shape::rope_table(step, frequencies.len(), out.dims())?;
        let positions = self.word(self.plan("rope_table", step)?.parts.positions);
        let frequencies = self.frequencies.on_device(&self.device, frequencies)?;
        rope::rope_table(&self.device, step.rows, positions, frequencies, out)
    }

    fn rope_write_kv(
        &mut self,
        step: &Step,
        qkv: &Buffer,
        rope: &Buffer,
        layer: usize,
        kv: &mut KvCache,
        q: &mut Buffer,
    ) -> Result<()> {
        let group = shape::rope_write_kv(step, qkv.dims(), rope.dims(), layer, kv.dims, q.dims())?;
        bf16_only(q.dims().dtype, "a query")?;
        let plan = self.plan("rope_write_kv", step)?;
        let fresh = rope::Fresh { plan, words: self.words.pointer(), qkv, rope, layer, group };
        fresh.write(&self.device, kv, q)
    }

    fn attend(
        &mut self,
        step: &Step,
        q: &Buffer,
        layer: usize,
        kv: &KvCache,
        scale: f32,
        out: &mut Buffer,
    ) -> Result<()> {
        let group = shape::attend(step, q.dims(), layer, kv.dims, out.dims())?;
        bf16_only(q.dims().dtype, "a query")?;
        if group != self.group {
            let detail =
                format!("{group} query heads for each KV head where the cache was made for {}", self.group);
            return Err(Error::Shape { op: "attend", detail });
        }
        let plan = match &self.plan {
            Some(plan) if plan.sizes.rows == step.rows => plan,
            _ => {
                return Err(Error::Shape { op: "attend", detail: "called outside of the step's run".into() });
            }
        };
        let attention = attend::Attention {
            device: &self.device,
            plan,
            words: self.words.pointer(),
            q: q.pointer(),
            kv,
            layer,
            group,
            scale,
            out: out.pointer(),
            recorded_spans: self.recorded_spans,
        };
        attention.run(&mut self.attention.borrow_mut())
    }

    fn silu_mul(&mut self, rows: usize, gate_up: &Buffer, widths: &[usize], out: &mut Buffer) -> Result<()> {
        shape::silu_mul(rows, gate_up.dims(), widths, out.dims())?;
        bf16_only(out.dims().dtype, "a gate's result")?;
        elementwise::silu_mul(&self.device, rows, gate_up, widths, out)
    }

    fn gather_sampled(&mut self, step: &Step, x: &Buffer, out: &mut Buffer) -> Result<()> {
        shape::gather_sampled(step, x.dims(), out.dims())?;
        let rows = self.word(self.plan("gather_sampled", step)?.parts.sampled);
        elementwise::gather_rows(&self.device, step.sampled_rows, rows, x, out)
    }

    fn sample(&mut self, step: &Step, logits: &Buffer) -> Result<()> {
        shape::sample(step, logits.dims())?;
        if step.sampled_rows > MAX_SAMPLED {
            let detail = format!("{} rows, the limit is {MAX_SAMPLED}", step.sampled_rows);
            return Err(Error::Shape { op: "sample", detail });
        }
        let draws = self.word(self.plan("sample", step)?.parts.draws);
        sample::sample(&self.device, step.sampled_rows, logits, draws, self.choices.pointer())?;
        self.samples = true;
        Ok(())
    }

    fn choices(&mut self) -> Result<Vec<Choice>> {
        self.choices.take()
    }
}
