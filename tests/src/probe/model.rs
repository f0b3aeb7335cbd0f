//! Whole models: logits, or tokens as they are served, at any width.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use comm::cuda::{LocalGpu, local_gpu_group};
use engine::{SamplingParams, StepPlan, rank_ranges};
use kernels::{BLOCK_TOKENS, Cuda, CudaOptions, DType, WeightFormat};
use model::{Executor, ModelExecutor, ModelOptions, ModelSource, SAMPLING_RANK, StepSize};
use phalanx_tests::ranks::{each_rank, plan, slice};
use serde::Deserialize;

use crate::collective::join;
use crate::ops::DrawOf;
use crate::tensors::{Inputs, Outputs};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cases {
    /// Folder of the checkpoint.
    model: PathBuf,
    groups: Vec<Group>,
}

/// Ranks that are loaded once, as threads of this process.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    width: usize,
    #[serde(default)]
    deterministic: bool,
    #[serde(default)]
    fp8: bool,
    /// Decoding steps are recorded and replayed.
    #[serde(default)]
    graphs: bool,
    runs: Vec<Run>,
}

/// Steps over sequences that are new to the group.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    name: String,
    want: Want,
    /// Ids of each sequence, which are read step by step, whatever is chosen meanwhile.
    sequences: Vec<String>,
    /// Of each step its slices: sequence and number of tokens. The last row of every slice is sampled from.
    steps: Vec<Vec<(usize, usize)>>,
    /// Greedy where there is none.
    #[serde(default)]
    draw: Option<DrawOf>,
}

/// What is written of a run, slice after slice.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Want {
    /// `NAME`: of every slice the logits `[vocabulary]`.
    Logits,
    /// `NAME.ids` and `NAME.logprobs`: what is chosen, by way of [`Executor::launch`] as in serving.
    Tokens,
}

/// What a run gave.
enum Given {
    Logits(Vec<Vec<f32>>),
    Tokens { ids: Vec<u32>, logprobs: Vec<f32> },
}

/// Of every rank, several of which share a GPU: 65,536 tokens of two layers of Yi-34B.
const KV_MEMORY: u64 = 512 << 20;

type Rank = ModelExecutor<Cuda, LocalGpu>;

pub(crate) fn run(cases: &Cases, inputs: &Inputs<'_>, outputs: &mut Outputs) -> Result<()> {
    let count = cases.groups.len();
    for (index, group) in cases.groups.iter().enumerate() {
        let Group { width, deterministic, fp8, graphs, runs } = group;
        println!(
            "{}/{count} width {width}, deterministic {deterministic}, fp8 {fp8}, graphs {graphs}: {} runs",
            index + 1,
            runs.len()
        );
        let plans = runs.iter().map(|run| run.plans(inputs)).collect::<Result<Vec<_>>>()?;
        for (run, given) in runs.iter().zip(group.run(cases, &plans)?) {
            match given {
                Given::Logits(rows) => {
                    outputs.floats(&run.name, rows.first().map_or(0, Vec::len), &rows.concat());
                }
                Given::Tokens { ids, logprobs } => {
                    outputs.ids(format!("{}.ids", run.name), &ids);
                    outputs.floats(format!("{}.logprobs", run.name), logprobs.len(), &logprobs);
                }
            }
        }
    }
    Ok(())
}

impl Group {
    fn run(&self, cases: &Cases, plans: &[Vec<StepPlan>]) -> Result<Vec<Given>> {
        let options = ModelOptions {
            dtype: DType::Bf16,
            kv_dtype: DType::Bf16,
            max_context: None,
            kv_memory: Some(KV_MEMORY),
            largest_step: plans
                .iter()
                .flatten()
                .map(size)
                .reduce(|a, b| StepSize { rows: a.rows.max(b.rows), sampled: a.sampled.max(b.sampled) }),
            steps_in_flight: 1,
            progress: false,
        };
        let gpu = CudaOptions {
            deterministic: self.deterministic,
            weights: if self.fp8 { WeightFormat::Fp8 } else { WeightFormat::AsStored },
            graphs: self.graphs,
            ..CudaOptions::default()
        };
        let mut ranks = each_rank(local_gpu_group(self.width), |seat| {
            let source = ModelSource::open(&cases.model, options.clone())?;
            let ranges = rank_ranges(source.config().shape.kv_heads, self.width)?;
            let (gpu, collective) = join(seat, &ranges, gpu.clone())?;
            let mut rank = source.executor(gpu, &ranges, collective)?;
            let runs = self.runs.iter().zip(plans);
            runs.map(|(run, plans)| run.run(&mut rank, plans).with_context(|| run.name.clone())).collect()
        })?;
        Ok(ranks.swap_remove(SAMPLING_RANK))
    }
}

impl Run {
    fn plans(&self, inputs: &Inputs<'_>) -> Result<Vec<StepPlan>> {
        let ids = self.sequences.iter().map(|name| inputs.ids(name)).collect::<Result<Vec<_>>>()?;
        let params = self.draw.map_or(SamplingParams::GREEDY, |draw| {
            let DrawOf { temperature, top_k, top_p, seed, .. } = draw;
            SamplingParams { temperature, top_k, top_p, seed }
        });
        let mut done = vec![0; ids.len()];
        let tables = tables(&ids);
        let mut plans = Vec::new();
        for (number, step) in self.steps.iter().enumerate() {
            let mut slices = Vec::new();
            for &(sequence, len) in step {
                let known = ids.get(sequence).map_or(0, Vec::len);
                ensure!(
                    len > 0 && known >= len && done[sequence] <= known - len,
                    "run {}: step {number} goes past the {known} ids of sequence {sequence}",
                    self.name
                );
                let (start, end) = (done[sequence], done[sequence] + len);
                slices.push(slice(sequence, &ids[sequence][..end], start, &tables[sequence], params));
                done[sequence] = end;
            }
            plans.push(plan(number, slices));
        }
        Ok(plans)
    }

    fn run(&self, rank: &mut Rank, plans: &[StepPlan]) -> Result<Given> {
        if self.want == Want::Logits {
            let mut rows = Vec::new();
            for plan in plans {
                rows.extend(rank.logits(plan)?);
            }
            return Ok(Given::Logits(rows));
        }
        let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
        for plan in plans {
            rank.launch(plan)?;
            let tokens = rank.poll()?.map_or(Vec::new(), |output| output.tokens);
            ids.extend(tokens.iter().map(|token| token.id));
            logprobs.extend(tokens.iter().map(|token| token.logprob));
        }
        Ok(Given::Tokens { ids, logprobs })
    }
}

fn size(plan: &StepPlan) -> StepSize {
    StepSize { rows: plan.rows(), sampled: plan.slices.len() }
}

/// KV blocks of each sequence. They are handed out backwards, so that nothing is right by their being in order.
fn tables(ids: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let counts: Vec<u32> = ids.iter().map(|ids| ids.len().div_ceil(BLOCK_TOKENS) as u32).collect();
    let mut rest: u32 = counts.iter().sum();
    let table = |count: u32| {
        rest -= count;
        (rest..rest + count).rev().collect()
    };
    counts.into_iter().map(table).collect()
}
