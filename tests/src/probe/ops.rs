//! Single ops of the GPU backend.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anyhow::{Context, Result, ensure};
use kernels::cuda::Buffer;
use kernels::{
    Backend, Batch, CHOSEN_COLS, Cuda, CudaOptions, DType, Draw, Error, Partial, QuantizedBlock, SampledRow,
    Slice, Step, Token, Tree, WeightFormat,
};
use serde::Deserialize;

use crate::attention::Attention;
use crate::collective::{Gather, Reduce};
use crate::tensors::{Inputs, Matrix, Outputs};

/// One op on inputs, which are named as the file has them. Outputs are named after the case.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    name: String,
    #[serde(default)]
    deterministic: bool,
    /// Plain weights are kept in E4M3.
    #[serde(default)]
    fp8: bool,
    op: Op,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum Op {
    Embed {
        ids: String,
        table: String,
        first_id: usize,
    },
    RmsNorm {
        x: String,
        weight: String,
        eps: f32,
    },
    /// `NAME` and `NAME.residual`.
    AddRmsNorm {
        x: String,
        residual: String,
        weight: String,
        eps: f32,
    },
    /// The first so many rows of x, for each number in `rows`: `NAME.ROWS`.
    Linear {
        x: String,
        rows: Vec<usize>,
        weights: Vec<Weight>,
    },
    /// Likewise, and for each of the sub-trees of the units' range: `NAME.ROWS.INDEX`.
    LinearPartials {
        x: String,
        rows: Vec<usize>,
        weights: Vec<Weight>,
        first_unit: usize,
        units: usize,
    },
    SiluMul {
        gate_up: String,
        widths: Vec<usize>,
    },
    Gather {
        x: String,
        rows: Vec<usize>,
    },
    /// `NAME.ids` and `NAME.logprobs`.
    Sample {
        logits: String,
        draws: Vec<DrawOf>,
    },
    /// `NAME.rope`, `NAME.q` and `NAME`.
    Attend(Attention),
    /// `NAME.RANK`.
    TreeReduce(Reduce),
    GatherColumns(Gather),
}

/// A weight as a checkpoint has it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum Weight {
    Plain(String),
    Quantized { bits: usize, group_size: usize, values: String, scales: String, zeros: String },
}

/// See [`Draw`].
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DrawOf {
    pub(crate) temperature: f32,
    pub(crate) top_k: u32,
    pub(crate) top_p: f32,
    pub(crate) seed: u64,
    #[serde(default)]
    position: u32,
}

/// Runs the cases, one after the other.
pub(crate) fn run(cases: Vec<Case>, inputs: &Inputs<'_>, outputs: &mut Outputs) -> Result<()> {
    let mut gpus = BTreeMap::new();
    let count = cases.len();
    for (index, case) in cases.into_iter().enumerate() {
        println!("{}/{count} {}", index + 1, case.name);
        let gpu = match gpus.entry((case.deterministic, case.fp8)) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(open(case.deterministic, case.fp8)?),
        };
        case.op.run(gpu, &case.name, inputs, outputs).with_context(|| format!("case {}", case.name))?;
    }
    Ok(())
}

/// Every weight has an allocation of its own, so that compute-sanitizer sees an access beyond its end.
fn open(deterministic: bool, fp8: bool) -> Result<Cuda> {
    let weights = if fp8 { WeightFormat::Fp8 } else { WeightFormat::AsStored };
    let options =
        CudaOptions { deterministic, weights, separate_allocations: true, ..CudaOptions::default() };
    Ok(Cuda::open(options)?)
}

impl Op {
    fn run(&self, gpu: &mut Cuda, name: &str, inputs: &Inputs<'_>, outputs: &mut Outputs) -> Result<()> {
        match self {
            Op::Embed { ids, table, first_id } => {
                let (ids, block) = (inputs.ids(ids)?, inputs.block(table)?);
                let table = gpu.table(block, *first_id, DType::Bf16)?;
                let mut out = gpu.buffer(DType::F32, ids.len(), block.cols)?;
                let step = one_slice(gpu, ids, &[]);
                in_step(gpu, &step, |gpu| gpu.embed(&step, &table, &mut out))?;
                outputs.floats(name, block.cols, &out.read(step.tokens.len() * block.cols)?);
            }
            Op::RmsNorm { x, weight, eps } => {
                let x = inputs.matrix(x)?;
                let weight = gpu.vector(inputs.block(weight)?)?;
                let mut out = gpu.buffer(DType::Bf16, x.rows, x.cols)?;
                gpu.rms_norm(x.rows, &x.on(gpu, DType::F32)?, &weight, *eps, &mut out)?;
                outputs.floats(name, x.cols, &out.read(x.values.len())?);
            }
            Op::AddRmsNorm { x, residual, weight, eps } => {
                let (x, residual) = (inputs.matrix(x)?, inputs.matrix(residual)?);
                let weight = gpu.vector(inputs.block(weight)?)?;
                let mut sum = residual.on(gpu, DType::F32)?;
                let mut out = gpu.buffer(DType::Bf16, x.rows, x.cols)?;
                gpu.add_rms_norm(x.rows, &x.on(gpu, DType::F32)?, &mut sum, &weight, *eps, &mut out)?;
                outputs.floats(name, x.cols, &out.read(x.values.len())?);
                outputs.floats(format!("{name}.residual"), x.cols, &sum.read(x.values.len())?);
            }
            Op::Linear { x, rows, weights } => {
                let (x, weights) = (inputs.matrix(x)?, matrices(gpu, weights, inputs)?);
                let cols = weights.iter().map(|(n, _)| n).sum();
                let weights: Vec<_> = weights.into_iter().map(|(_, weight)| weight).collect();
                let on_gpu = x.on(gpu, DType::Bf16)?;
                for &rows in rows {
                    let mut out = gpu.buffer(DType::F32, rows, cols)?;
                    gpu.linear(rows, &on_gpu, &weights, &mut out)?;
                    outputs.floats(format!("{name}.{rows}"), cols, &out.read(rows * cols)?);
                }
            }
            Op::LinearPartials { x, rows, weights, first_unit, units } => {
                let (x, weights) = (inputs.matrix(x)?, matrices(gpu, weights, inputs)?);
                let n = weights.first().map_or(0, |(n, _)| *n);
                let weights: Vec<_> = weights.into_iter().map(|(_, weight)| weight).collect();
                let (tree, held) = (Tree { units: *units }, *first_unit..first_unit + weights.len());
                let on_gpu = x.on(gpu, DType::Bf16)?;
                for &rows in rows {
                    let mut partials = tree
                        .subtrees(&held)
                        .into_iter()
                        .map(|units| Ok(Partial { units, sum: gpu.buffer(DType::F32, rows, n)? }))
                        .collect::<Result<Vec<_>>>()?;
                    gpu.linear_partials(rows, &on_gpu, &weights, held.start, tree, &mut partials)?;
                    for (index, partial) in partials.iter().enumerate() {
                        outputs.floats(format!("{name}.{rows}.{index}"), n, &partial.sum.read(rows * n)?);
                    }
                }
            }
            Op::SiluMul { gate_up, widths } => {
                let gate_up = inputs.matrix(gate_up)?;
                let (rows, cols) = (gate_up.rows, widths.iter().sum());
                let mut out = gpu.buffer(DType::Bf16, rows, cols)?;
                gpu.silu_mul(rows, &gate_up.on(gpu, DType::F32)?, widths, &mut out)?;
                outputs.floats(name, cols, &out.read(rows * cols)?);
            }
            Op::Gather { x, rows } => {
                let x = inputs.matrix(x)?;
                let sampled: Vec<_> =
                    rows.iter().map(|&row| SampledRow { row, slot: None, draw: Draw::GREEDY }).collect();
                let step = one_slice(gpu, vec![0; x.rows], &sampled);
                let on_gpu = x.on(gpu, DType::F32)?;
                let mut out = gpu.buffer(DType::F32, step.sampled_rows, x.cols)?;
                in_step(gpu, &step, |gpu| gpu.gather_sampled(&step, &on_gpu, &mut out))?;
                outputs.floats(name, x.cols, &out.read(rows.len() * x.cols)?);
            }
            Op::Sample { logits, draws } => {
                let logits = inputs.matrix(logits)?;
                ensure!(draws.len() == logits.rows, "{} draws for {} rows", draws.len(), logits.rows);
                let sampled: Vec<_> = draws
                    .iter()
                    .enumerate()
                    .map(|(row, &DrawOf { temperature, top_k, top_p, seed, position })| SampledRow {
                        row,
                        slot: None,
                        draw: Draw { temperature, top_k, top_p, seed, position },
                    })
                    .collect();
                let step = one_slice(gpu, vec![0; logits.rows], &sampled);
                let on_gpu = logits.on(gpu, DType::F32)?;
                let mut chosen = gpu.buffer(DType::F32, step.sampled_rows, CHOSEN_COLS)?;
                in_step(gpu, &step, |gpu| gpu.sample(&step, &on_gpu, &mut chosen))?;
                let choices = gpu.choices()?;
                let ids: Vec<u32> = choices.iter().map(|choice| choice.id).collect();
                let logprobs: Vec<f32> = choices.iter().map(|choice| choice.logprob).collect();
                outputs.ids(format!("{name}.ids"), &ids);
                outputs.floats(format!("{name}.logprobs"), logprobs.len(), &logprobs);
            }
            Op::Attend(attention) => attention.run(gpu, name, inputs, outputs)?,
            Op::TreeReduce(reduce) => reduce.run(name, inputs, outputs)?,
            Op::GatherColumns(gather) => gather.run(name, inputs, outputs)?,
        }
        Ok(())
    }
}

impl Matrix {
    /// A buffer of its rows.
    pub(crate) fn on(&self, gpu: &Cuda, dtype: DType) -> Result<Buffer> {
        let mut buffer = gpu.buffer(dtype, self.rows, self.cols)?;
        match dtype {
            DType::F32 => buffer.write(&self.values)?,
            DType::Bf16 => {
                for (row, values) in self.values.chunks_exact(self.cols.max(1)).enumerate() {
                    buffer.set_row(row, values)?;
                }
            }
        }
        Ok(buffer)
    }
}

/// Each weight with its rows.
fn matrices(
    gpu: &Cuda,
    weights: &[Weight],
    inputs: &Inputs<'_>,
) -> Result<Vec<(usize, <Cuda as Backend>::Matrix)>> {
    let matrix = |weight: &Weight| match weight {
        Weight::Plain(name) => {
            let block = inputs.block(name)?;
            Ok((block.rows, gpu.matrix(&[block], DType::Bf16)?))
        }
        Weight::Quantized { bits, group_size, values, scales, zeros } => {
            let ([rows, cols], values) = inputs.bytes(values)?;
            let (scales, (_, zeros)) = (inputs.matrix(scales)?.values, inputs.bytes(zeros)?);
            let (bits, group_size) = (*bits, *group_size);
            let block = QuantizedBlock { bits, group_size, rows, cols, values, scales: &scales, zeros };
            Ok((rows, gpu.quantized_matrix(&[block], DType::Bf16)?))
        }
    };
    weights.iter().map(matrix).collect()
}

/// A step of one sequence with these tokens, for ops that do not look at its blocks.
fn one_slice(gpu: &Cuda, ids: Vec<u32>, sampled: &[SampledRow]) -> Step {
    let blocks = vec![0; ids.len().div_ceil(kernels::BLOCK_TOKENS)];
    let slices = vec![Slice { start: 0, len: ids.len(), blocks }];
    gpu.step(ids.into_iter().map(Token::Id).collect(), Batch { slices }, sampled.to_vec())
}

/// Runs ops within a step.
pub(crate) fn in_step(
    gpu: &mut Cuda,
    step: &Step,
    ops: impl FnMut(&mut Cuda) -> kernels::Result<()>,
) -> Result<()> {
    gpu.run::<Error>(step, false, ops)?;
    gpu.synchronize()?;
    Ok(())
}
