//! A group whose ranks are threads of the test, for looking at logits.

use std::ops::Range;
use std::path::Path;
use std::thread;

use anyhow::Result;
use comm::{Collective, MeshCollective, local_group};
use engine::{
    BlockId, Epoch, Sampling, SamplingParams, SeqId, SeqSlice, SlotId, StepId, StepPlan, Tokens, rank_ranges,
};
use kernels::{Backend, DType};
use model::{ModelExecutor, ModelOptions, ModelSource, SAMPLING_RANK};

/// Options for a test: room for `tokens` tokens of one sequence is enough for every golden prompt.
pub fn options(dtype: DType) -> ModelOptions {
    ModelOptions {
        dtype,
        kv_dtype: dtype,
        max_context: None,
        kv_memory: Some(64 << 20),
        step_rows: None,
        steps_in_flight: 1,
        progress: false,
    }
}

/// Runs `plans` on `width` ranks and returns the logits of every sampled row, in order.
pub fn logits<B: Backend>(
    dir: &Path,
    options: &ModelOptions,
    width: usize,
    backend: impl Fn() -> Result<B> + Sync,
    plans: &[StepPlan],
) -> Result<Vec<Vec<f32>>>
where
    B::Buffer: kernels::HostBuffer,
{
    let join = |transport, ranges: &[Range<usize>]| {
        Ok((backend()?, MeshCollective::new(transport, ranges.to_vec())?))
    };
    logits_of(dir, options, local_group(width), join, plans)
}

/// Likewise, for ranks that take their places by `join`, each on its own thread.
pub fn logits_of<P: Send, B: Backend, C: Collective<B::Buffer>>(
    dir: &Path,
    options: &ModelOptions,
    places: Vec<P>,
    join: impl Fn(P, &[Range<usize>]) -> Result<(B, C)> + Sync,
    plans: &[StepPlan],
) -> Result<Vec<Vec<f32>>> {
    on_ranks(dir, options, places, join, |_, executor| {
        let mut all = Vec::new();
        for plan in plans {
            all.extend(executor.logits(plan)?);
        }
        Ok(all)
    })
}

/// Loads a model on ranks that take their places by `join`, and runs `body` for each on its own thread; returns what the sampling rank
/// found.
pub fn on_ranks<P: Send, B: Backend, C: Collective<B::Buffer>, R: Send>(
    dir: &Path,
    options: &ModelOptions,
    places: Vec<P>,
    join: impl Fn(P, &[Range<usize>]) -> Result<(B, C)> + Sync,
    body: impl Fn(usize, &mut ModelExecutor<B, C>) -> Result<R> + Sync,
) -> Result<R> {
    let width = places.len();
    let run = |rank, place| -> Result<R> {
        let source = ModelSource::open(dir, options.clone())?;
        let ranges = rank_ranges(source.config().shape.kv_heads, width)?;
        let (backend, collective) = join(place, &ranges)?;
        body(rank, &mut source.executor(backend, &ranges, collective)?)
    };
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = places
            .into_iter()
            .enumerate()
            .map(|(rank, place)| scope.spawn(move || run(rank, place)))
            .collect();
        let results: Vec<_> = threads.into_iter().map(|t| t.join().expect("no panic in a rank")).collect();
        let mut results = results
            .into_iter()
            .collect::<Result<Vec<R>>>()
            .map_err(|error| anyhow::anyhow!("a rank failed: {error:#}"))?;
        Ok(results.swap_remove(SAMPLING_RANK))
    })
}

/// One sequence, cut into slices that end (exclusively) at `ends`; the last row of each is sampled. Blocks are handed out
/// backwards, so that no test passes by their being in order.
pub fn plans(ids: &[u32], ends: &[usize], block_size: usize) -> Vec<StepPlan> {
    let blocks = ids.len().div_ceil(block_size);
    let mut start = 0;
    let mut plans = Vec::new();
    for (step, &end) in ends.iter().enumerate() {
        let slice = SeqSlice {
            seq: SeqId(0),
            slot: SlotId(0),
            start: start as u32,
            tokens: Tokens::Ids(ids[start..end].to_vec()),
            blocks: (0..blocks as u32).rev().map(BlockId).collect(),
            sampling: Some(Sampling { params: SamplingParams::GREEDY, position: end as u32 }),
        };
        plans.push(StepPlan {
            epoch: Epoch::default(),
            step: StepId(step as u64),
            keep_sampled: false,
            slices: vec![slice],
        });
        start = end;
    }
    plans
}
