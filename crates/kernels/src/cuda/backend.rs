//! The op set on a GPU: sizes are checked here, then each op's own file launches its kernels.

use super::buffer::{self, Buffer, KvCache, Table};
use super::matrix::Matrix;
use super::record::Course;
use super::sample::Kept;
use super::step::{self, Plan};
use super::transfer::MAX_SAMPLED;
use super::{Cuda, RESERVE_BYTES, attend, elementwise, last_sampled, linear, matrix, pack, rope, sample};
use crate::quantized;
use crate::shape::{self, Dims, KvDims};
use crate::{
    Backend, Batch, Choice, DType, Error, KvShape, Partial, QuantizedBlock, Result, RowBlock, SampledRow,
    Step, Token, Tree, WeightFormat,
};

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
        match self.options.weights {
            WeightFormat::AsStored => self.packer().bf16(blocks, n, k),
            WeightFormat::Fp8 => self.packer().fp8(blocks, n, k),
        }
    }

    fn quantized_matrix(&self, blocks: &[QuantizedBlock<'_>], dtype: DType) -> Result<Matrix> {
        bf16_only(dtype, "what a weight stands for")?;
        if blocks.iter().any(|block| !pack::keeps_quantized(block.group_size)) {
            return quantized::dequantized(blocks, dtype, |rows| self.matrix(rows, dtype));
        }
        let (n, k) = quantized::stacked(blocks)?;
        self.packer().quantized(blocks, n, k)
    }

    fn table(&self, block: RowBlock<'_>, first_id: usize, dtype: DType) -> Result<Table> {
        bf16_only(dtype, "the embedding")?;
        shape::source("table", &block)?;
        let mut bytes = Vec::with_capacity(block.rows * block.cols * 2);
        matrix::append_bf16(block.bytes, block.dtype, &mut bytes);
        let rows = self.arena.upload(&bytes)?;
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
        // Weights are there: what they were packed from is not needed any more.
        self.staging.get_mut().release();
        self.reserve_work_space()?;
        let kv = KvCache::zeroed(&self.device, KvDims::new(shape, blocks))?;
        self.reset();
        (self.group, self.kv_blocks) = (shape.group, blocks);
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

    fn wait(&self) -> Result<()> {
        self.device.synchronize()
    }

    fn kv_budget(&self, _enough: u64) -> Result<u64> {
        self.staging.borrow_mut().release();
        let (free, total) = self.device.memory()?;
        let allowed = (total as f64 * self.options.memory_utilization) as u64;
        let taken = total - free + self.missing_work_space() + RESERVE_BYTES;
        Ok(allowed.saturating_sub(taken))
    }

    fn step(&self, tokens: Vec<Token>, batch: Batch, sampled: Vec<SampledRow>) -> Step {
        let decodes = step::decodes(&batch.slices, sampled.len());
        let exact = Step::new(tokens, batch, sampled);
        if !decodes {
            return exact;
        }
        let rows = step::bucket(exact.rows);
        Step { rows, sampled_rows: rows, ..exact }
    }

    fn padded_rows(&self, rows: usize) -> usize {
        step::bucket(rows)
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
            self.records.borrow_mut().clear();
        }
        let recordable = record && self.options.graphs && plan.decodes && plan.spans <= self.recorded_spans;
        let sizes = plan.sizes;
        self.plan = Some(plan);
        self.chosen = None;
        let course = if recordable { self.records.borrow_mut().course(sizes) } else { Course::Run };
        let chosen = match course {
            Course::Run => {
                body(self)?;
                // Work space that moved is not where earlier records have it.
                if self.products.take_moved() | self.attention.get_mut().take_moved() {
                    self.records.borrow_mut().clear();
                }
                self.chosen.take()
            }
            Course::Record => {
                let record = self.record(&mut body)?;
                let mut records = self.records.borrow_mut();
                records.keep(sizes, record);
                records.replay(sizes)?
            }
            Course::Replay => self.records.borrow().replay(sizes)?,
        };
        if let Some(chosen) = chosen {
            self.choices.fetch(chosen, step.sampled.len())?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.records.borrow_mut().clear();
    }

    fn settle(&mut self) -> Result<()> {
        self.reset();
        (self.plan, self.chosen) = (None, None);
        self.device.synchronize()?;
        self.choices.forget();
        self.last_sampled = last_sampled(&self.device)?;
        Ok(())
    }

    fn embed(&mut self, step: &Step, table: &Table, out: &mut Buffer) -> Result<()> {
        shape::embed(step, table.cols, out.dims())?;
        let tokens = self.word(self.plan("embed", step)?.parts.tokens);
        elementwise::embed(&self.device, step.rows, tokens, &self.last_sampled, table, out)
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

    fn sample(&mut self, step: &Step, logits: &Buffer, chosen: &mut Buffer) -> Result<()> {
        shape::sample(step, logits.dims(), chosen.dims())?;
        if step.sampled_rows > MAX_SAMPLED {
            let detail = format!("{} rows, the limit is {MAX_SAMPLED}", step.sampled_rows);
            return Err(Error::Shape { op: "sample", detail });
        }
        let parts = self.plan("sample", step)?.parts;
        let (draws, slots) = (self.word(parts.draws), self.word(parts.slots));
        let kept = Kept { rows: step.sampled_rows, slots, chosen, last: &self.last_sampled };
        sample::sample(&self.device, logits, draws, &kept)?;
        self.chosen = Some(chosen.pointer());
        Ok(())
    }

    fn keep(&mut self, step: &Step, chosen: &Buffer) -> Result<()> {
        shape::keep(step, chosen.dims())?;
        let slots = self.word(self.plan("keep", step)?.parts.slots);
        let kept = Kept { rows: step.sampled_rows, slots, chosen, last: &self.last_sampled };
        sample::keep(&self.device, &kept)
    }

    fn choices(&mut self) -> Result<Vec<Choice>> {
        self.choices.take()
    }

    fn choices_are_there(&mut self) -> Result<bool> {
        self.choices.have_arrived()
    }
}
