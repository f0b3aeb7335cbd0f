//! Attention over sequences that grow step by step: rotary embedding, the paged cache, and what reads it.

use anyhow::{Result, ensure};
use kernels::cuda::KvCache;
use kernels::{BLOCK_TOKENS, Backend, Batch, Cuda, DType, Draw, KvShape, SampledRow, Slice, Step, Token};
use serde::Deserialize;

use crate::ops::in_step;
use crate::tensors::{Inputs, Matrix, Outputs};

/// The layer that is used, of two: the other one's memory must not show.
const LAYER: usize = 1;
/// Blocks at a time that are filled with NaN.
const FILLED_BLOCKS: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Attention {
    units: usize,
    /// Query heads of a unit.
    group: usize,
    head_dim: usize,
    /// Of the cache. All hold NaN before.
    blocks: usize,
    scale: f32,
    /// `[head_dim / 2]`, F64.
    frequencies: String,
    /// `[rows of all steps, units · (group + 2) · head_dim]`, F32.
    qkv: String,
    steps: Vec<StepOf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StepOf {
    slices: Vec<SliceOf>,
    /// Otherwise keys and values are written, no more.
    attend: bool,
}

/// See [`Slice`].
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct SliceOf {
    start: usize,
    len: usize,
    blocks: Vec<u32>,
}

impl Attention {
    pub(crate) fn run(
        &self,
        gpu: &mut Cuda,
        name: &str,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs,
    ) -> Result<()> {
        let (qkv, frequencies) = (inputs.matrix(&self.qkv)?, inputs.doubles(&self.frequencies)?);
        let rows: usize = self.steps.iter().flat_map(|step| &step.slices).map(|slice| slice.len).sum();
        ensure!(qkv.rows == rows, "{} rows of qkv for {rows} of all steps", qkv.rows);
        let Attention { units, group, head_dim, .. } = *self;
        let shape = KvShape { layers: 2, units, group, head_dim, dtype: DType::Bf16 };
        let mut kv = gpu.kv_cache(shape, self.blocks)?;
        self.fill_with_nan(gpu, &mut kv)?;
        let (mut ropes, mut queries, mut attended) = (Vec::new(), Vec::new(), Vec::new());
        let mut rest = &qkv.values[..];
        for StepOf { slices, attend } in &self.steps {
            let slices: Vec<Slice> = slices
                .iter()
                .cloned()
                .map(|SliceOf { start, len, blocks }| Slice { start, len, blocks })
                .collect();
            let step = decoded_or_not(gpu, slices);
            let real = step.batch.rows();
            let (own, others) = rest.split_at(real * qkv.cols);
            rest = others;
            let mut values = own.to_vec();
            values.resize(step.rows * qkv.cols, 0.0);
            let qkv = Matrix { rows: step.rows, cols: qkv.cols, values }.on(gpu, DType::F32)?;
            let cols = units * group * head_dim;
            let mut rope = gpu.buffer(DType::F32, step.rows, head_dim)?;
            let mut q = gpu.buffer(DType::Bf16, step.rows, cols)?;
            let mut out = gpu.buffer(DType::Bf16, step.rows, cols)?;
            in_step(gpu, &step, |gpu| {
                gpu.rope_table(&step, &frequencies, &mut rope)?;
                gpu.rope_write_kv(&step, &qkv, &rope, LAYER, &mut kv, &mut q)?;
                if *attend { gpu.attend(&step, &q, LAYER, &kv, self.scale, &mut out) } else { Ok(()) }
            })?;
            if *attend {
                ropes.extend(rope.read(real * head_dim)?);
                queries.extend(q.read(real * cols)?);
                attended.extend(out.read(real * cols)?);
            }
        }
        outputs.floats(format!("{name}.rope"), head_dim, &ropes);
        outputs.floats(format!("{name}.q"), units * group * head_dim, &queries);
        outputs.floats(name, units * group * head_dim, &attended);
        Ok(())
    }

    /// What another sequence left in a block must have no part in anything.
    fn fill_with_nan(&self, gpu: &mut Cuda, kv: &mut KvCache) -> Result<()> {
        let cols = self.units * (self.group + 2) * self.head_dim;
        let all: Vec<u32> = (0..self.blocks as u32).collect();
        for blocks in all.chunks(FILLED_BLOCKS) {
            let len = blocks.len() * BLOCK_TOKENS;
            let nan =
                |cols| Matrix { rows: len, cols, values: vec![f32::NAN; len * cols] }.on(gpu, DType::F32);
            let (qkv, rope) = (nan(cols)?, nan(self.head_dim)?);
            let mut q = gpu.buffer(DType::Bf16, len, self.units * self.group * self.head_dim)?;
            let slices = vec![Slice { start: 0, len, blocks: blocks.to_vec() }];
            let step = Step::new(vec![Token::Id(0); len], Batch { slices }, Vec::new());
            in_step(gpu, &step, |gpu| gpu.rope_write_kv(&step, &qkv, &rope, LAYER, kv, &mut q))?;
        }
        Ok(())
    }
}

/// As a model has it: where every slice is one token, all are sampled from, which makes it a decoding step.
fn decoded_or_not(gpu: &Cuda, slices: Vec<Slice>) -> Step {
    let decodes = slices.iter().all(|slice| slice.len == 1);
    let sampled = if decodes { slices.len() } else { 0 };
    let sampled = (0..sampled).map(|row| SampledRow { row, slot: None, draw: Draw::GREEDY }).collect();
    let batch = Batch { slices };
    gpu.step(vec![Token::Id(0); batch.rows()], batch, sampled)
}
