//! The CPU backend: a thread pool and vector kernels chosen at run time.
//!
//! `tile` is the one microkernel; `linear` and `attend` bring rows and panels to it, `matrix` and `kv` keep weights
//! and KV in its format. `isa` is what it needs of the CPU.

mod attend;
mod bandwidth;
mod buffer;
mod isa;
mod kv;
mod linear;
mod matrix;
mod memory;
mod path;
mod pool;
mod rows;
mod tile;
mod vector;

pub use bandwidth::read_bandwidth;
pub use buffer::{Buffer, Table};
pub use kv::KvCache;
pub use matrix::Matrix;
pub use path::{PATH_VARIABLE, Path};

use self::buffer::SharedElements;
use self::memory::Shared;
use self::path::Vectors;
use self::pool::Pool;
use crate::host_sampler::HostSampler;
use crate::shape::{self, Dims, KvDims};
use crate::{Backend, Choice, DType, Error, HostBuffer, KvShape, Partial, Result, RowBlock, Step, Tree};

/// A KV cache takes at most this part of the available memory, unless the user says otherwise.
const KV_MEMORY_SHARE: u64 = 4;

/// One rank's share of this machine's cores.
pub struct Cpu {
    pool: Pool,
    vectors: Vectors,
    products: linear::Scratch,
    attention: attend::Scratch,
    sampler: HostSampler,
}

impl Cpu {
    /// A backend of `threads` threads, the caller's included, on the best path (or [`PATH_VARIABLE`]'s).
    ///
    /// # Errors
    /// [`Error::Unsupported`] where that path does not exist or threads cannot be had.
    pub fn new(threads: usize) -> Result<Self> {
        Cpu::with_path(threads, Path::from_env()?)
    }

    /// Likewise, on a given path.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where this CPU lacks the path or threads cannot be had.
    pub fn with_path(threads: usize, path: Path) -> Result<Self> {
        Ok(Cpu {
            vectors: Vectors::new(path)?,
            pool: Pool::new(threads)?,
            products: linear::Scratch::new()?,
            attention: attend::Scratch::new()?,
            sampler: HostSampler::default(),
        })
    }

    /// Threads that work on an op.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

impl Buffer {
    fn dims(&self) -> Dims {
        Dims { dtype: self.dtype(), rows: self.rows(), cols: self.cols() }
    }

    /// The elements of a buffer that was checked to be f32.
    fn f32s(&self) -> &[f32] {
        self.as_f32().unwrap_or_default()
    }

    /// Likewise, to write.
    fn shared_f32s(&mut self) -> Result<Shared<f32>> {
        match self.shared() {
            SharedElements::F32(shared) => Ok(shared),
            SharedElements::Bf16(_) => Err(Error::Shape { op: "a result", detail: "is not f32".into() }),
        }
    }
}

impl Backend for Cpu {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Table = Table;
    type KvCache = KvCache;

    fn path(&self) -> &str {
        self.vectors.path().name()
    }

    fn buffer(&self, dtype: DType, rows: usize, cols: usize) -> Result<Buffer> {
        Buffer::zeroed(dtype, rows, cols)
    }

    fn matrix(&self, blocks: &[RowBlock<'_>], dtype: DType) -> Result<Matrix> {
        let (n, k) = shape::weight(blocks)?;
        Matrix::pack(&self.pool, blocks, n, k, dtype)
    }

    fn table(&self, block: RowBlock<'_>, first_id: usize, dtype: DType) -> Result<Table> {
        shape::source("table", &block)?;
        let mut rows = Buffer::zeroed(dtype, block.rows, block.cols)?;
        rows::fill_from_source(&self.pool, &block, &mut rows);
        Ok(Table { rows, first_id })
    }

    fn vector(&self, block: RowBlock<'_>) -> Result<Buffer> {
        shape::source("vector", &block)?;
        let flat = RowBlock { rows: 1, cols: block.rows * block.cols, ..block };
        let mut vector = Buffer::zeroed(DType::F32, 1, flat.cols)?;
        rows::fill_from_source(&self.pool, &flat, &mut vector);
        Ok(vector)
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes()
    }

    fn kv_cache(&mut self, shape: KvShape, blocks: usize) -> Result<KvCache> {
        shape::kv_cache(shape.head_dim)?;
        KvCache::zeroed(KvDims::new(shape, blocks))
    }

    fn kv_block_bytes(&self, shape: KvShape) -> usize {
        KvDims::new(shape, 1).block_bytes()
    }

    fn read_row(&self, buffer: &Buffer, row: usize) -> Result<Vec<f32>> {
        shape::read_row(buffer.dims(), row)?;
        Ok(buffer.f32s()[row * buffer.cols()..][..buffer.cols()].to_vec())
    }

    fn kv_budget(&self, enough: u64) -> Result<u64> {
        Ok(enough.min(memory::available() / KV_MEMORY_SHARE))
    }

    fn memory_budget(&self) -> Result<u64> {
        Ok(memory::available())
    }

    fn settle(&mut self) -> Result<()> {
        self.sampler.forget();
        Ok(())
    }

    fn embed(&mut self, step: &Step, table: &Table, out: &mut Buffer) -> Result<()> {
        shape::embed(step, table.rows.cols(), out.dims())?;
        rows::embed(&self.pool, self.vectors, &self.sampler.ids(step), table, out.shared_f32s()?);
        Ok(())
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
        let norm = rows::Norm { rows, x: x.f32s(), residual: None, weight: weight.f32s(), eps };
        rows::rms_norm(&self.pool, self.vectors, &norm, out);
        Ok(())
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
        let residual = Some(residual.shared_f32s()?);
        let norm = rows::Norm { rows, x: x.f32s(), residual, weight: weight.f32s(), eps };
        rows::rms_norm(&self.pool, self.vectors, &norm, out);
        Ok(())
    }

    fn linear(&mut self, rows: usize, x: &Buffer, weights: &[Matrix], out: &mut Buffer) -> Result<()> {
        shape::linear(rows, x.dims(), weights.iter().map(|w| (w.n(), w.k())), out.dims())?;
        let stride = out.cols();
        let shared = out.shared_f32s()?;
        let mut first_col = 0;
        let mut sums = Vec::with_capacity(weights.len());
        for (index, weight) in weights.iter().enumerate() {
            // SAFETY: the weights' columns add up to the row.
            let out = unsafe { shared.shifted(first_col) };
            sums.push(linear::Sum { node: index..index + 1, n: weight.n(), out, stride });
            first_col += weight.n();
        }
        let inputs = linear::Inputs { rows, x, apart: false };
        linear::products(&self.pool, self.vectors, &mut self.products, inputs, weights, &sums)
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
        let sizes: Vec<_> = weights.iter().map(|w| (w.n(), w.k())).collect();
        let places: Vec<_> = partials.iter().map(|p| (p.units.clone(), p.sum.dims())).collect();
        shape::linear_partials(rows, x.dims(), &sizes, first_unit, tree, &places)?;
        let mut sums = Vec::with_capacity(partials.len());
        for partial in partials {
            let n = partial.sum.cols();
            let node = partial.units.start - first_unit..partial.units.end - first_unit;
            sums.push(linear::Sum { node, n, out: partial.sum.shared_f32s()?, stride: n });
        }
        let inputs = linear::Inputs { rows, x, apart: true };
        linear::products(&self.pool, self.vectors, &mut self.products, inputs, weights, &sums)
    }

    fn rope_table(&mut self, step: &Step, frequencies: &[f64], out: &mut Buffer) -> Result<()> {
        shape::rope_table(step, frequencies.len(), out.dims())?;
        kv::rope_table(&self.pool, &step.batch, frequencies, out.shared_f32s()?);
        Ok(())
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
        let fresh = kv::Fresh { batch: &step.batch, qkv: qkv.f32s(), rope: rope.f32s(), group, layer };
        kv::rope_write_kv(&self.pool, self.vectors, &fresh, kv, q);
        Ok(())
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
        let attention = attend::Attention { batch: &step.batch, q, group, layer, kv, scale };
        attend::attend(&self.pool, self.vectors, &mut self.attention, &attention, out)
    }

    fn silu_mul(&mut self, rows: usize, gate_up: &Buffer, widths: &[usize], out: &mut Buffer) -> Result<()> {
        shape::silu_mul(rows, gate_up.dims(), widths, out.dims())?;
        rows::silu_mul(&self.pool, self.vectors, rows, gate_up.f32s(), widths, out);
        Ok(())
    }

    fn gather_sampled(&mut self, step: &Step, x: &Buffer, out: &mut Buffer) -> Result<()> {
        shape::gather_sampled(step, x.dims(), out.dims())?;
        let rows: Vec<usize> = step.sampled.iter().map(|sampled| sampled.row).collect();
        rows::gather_rows(x, &rows, out);
        Ok(())
    }

    fn sample(&mut self, step: &Step, logits: &Buffer, chosen: &mut Buffer) -> Result<()> {
        shape::sample(step, logits.dims(), chosen.dims())?;
        let chosen = chosen.as_f32_mut().unwrap_or_default();
        self.sampler.sample(step, logits.f32s(), logits.cols(), chosen);
        Ok(())
    }

    fn keep(&mut self, step: &Step, chosen: &Buffer) -> Result<()> {
        shape::keep(step, chosen.dims())?;
        self.sampler.keep(step, chosen.f32s());
        Ok(())
    }

    fn choices(&mut self) -> Result<Vec<Choice>> {
        self.sampler.choices()
    }
}
